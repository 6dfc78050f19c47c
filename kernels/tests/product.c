/* product.c: products of matrices on every instruction set of this build against the scalar oracle, to the
 * bit, on shapes around the edges of tiles and blocks, with guard bytes behind the output, for 1 and 3
 * threads; and the oracle against chains of the C library's fmaf. */
#include "harness.h"

enum { ROWS, K, COLS };
static const size_t shapes[][3] = {{1, 1, 1},      {14, 192, 32},  {15, 193, 33},  {13, 7, 31},
                                   {169, 20, 513}, {200, 400, 70}, {3, 1000, 129}, {340, 33, 90}};

static const size_t *shape;
static float *a, *b, *c, *expected;

static void run(int32_t isa) {
  const size_t bytes = shape[ROWS] * shape[COLS] * sizeof(float);
  char where[64];
  snprintf(where, sizeof where, "%s, %zu x %zu x %zu", isa_names[isa], shape[ROWS], shape[K], shape[COLS]);
  for (int32_t threads = 1; threads <= 3; threads += 2) {
    float *out = guarded(bytes);
    memcpy(out, c, bytes);
    expect_status("product", where, aq_multiply(a, b, shape[ROWS], shape[K], shape[COLS], out, isa, threads), AQ_OK);
    expect_output("product", where, expected, out, bytes);
  }
}

int main(int argc, char **argv) {
  begin(argc, argv);
  for (size_t s = 0; s < (quick ? 6 : COUNT(shapes)); s++) {
    shape = shapes[s];
    const size_t rows = shape[ROWS], k = shape[K], cols = shape[COLS];
    a = gaussians(rows * k, 1), b = gaussians(k * cols, 1), c = gaussians(rows * cols, 1);
    /* few bits, so that sums fall in the middle of two floats; and numbers below the normal ones */
    for (size_t i = 0; i < rows * k; i += 3) a[i] = (float)(int)(a[i] * 4) / 4;
    for (size_t i = 0; i < k * cols; i += 2) b[i] = (float)(int)(b[i] * 256) * 0x1p-20f;
    if (s % 2)
      for (size_t i = 0; i < k * cols; i++) b[i] *= i % 3 ? 1.0f : 0x1p-130f;
    expected = take(rows * cols * sizeof(float));
    for (size_t i = 0; i < rows; i++)
      for (size_t j = 0; j < cols; j++) {
        float sum = c[i * cols + j];
        for (size_t l = 0; l < k; l++) sum = fmaf(a[i * k + l], b[l * cols + j], sum);
        expected[i * cols + j] = sum;
      }
    run(AQ_ISA_SCALAR);
    run_sets(AQ_ISA_NEON_DOT, run);
    release();
  }
  expect_status("refusals", "no matrix", aq_multiply(0, a, 1, 1, 1, c, AQ_ISA_BEST, 1), AQ_E_ARGUMENT);
  expect_status("refusals", "nothing to add", aq_multiply(0, 0, 1, 0, 1, 0, AQ_ISA_BEST, 1), AQ_OK);
  return finish();
}
