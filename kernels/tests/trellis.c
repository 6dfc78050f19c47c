/* trellis.c: trellis codes on every instruction set of this build: levels by the definition, dequantized weights and
 * statistics against the scalar oracle to the bit, products with float32 activations against sums in double, products
 * with 8-bit activations and gradients to the bit; and what the best path through the table makes of Gaussian numbers. */
#include "harness.h"

enum { WINDOWS = 256 };
static float table[WINDOWS];

/* A matrix of random codes. */
static size_t rows, cols, group_size, groups, words;
static uint32_t *packed;
static uint16_t *scale, *offset;
static float *weights; /* by the definition */
static char where[160];

static float half(uint16_t bits) {
  float value;
  aq_convert(&bits, AQ_F16, &value, AQ_F32, 1, AQ_ISA_SCALAR, 1);
  return value;
}

static void matrix(int32_t isa, size_t r, size_t c, size_t g, int tiny) {
  uint64_t count = 0;
  rows = r, cols = c, group_size = g;
  aq_packed_words(cols, 2, &count), words = count;
  aq_group_count(cols, group_size, &count), groups = count;
  snprintf(where, sizeof where, "%s, %zu x %zu, group %zu%s", isa_names[isa], rows, cols, g, tiny ? ", tiny" : "");
  packed = take(rows * words * 4), scale = take(rows * groups * 2), offset = take(rows * groups * 2);
  weights = take(rows * cols * 4);
  uint8_t *codes = take(rows * cols);
  for (size_t i = 0; i < rows * cols; i++) codes[i] = random_bits() & 3;
  aq_pack_codes(codes, rows, cols, 2, packed, AQ_ISA_SCALAR, 1);
  for (size_t i = 0; i < rows * groups; i++) {
    const float values[2] = {gaussian() * (tiny ? 1e-6f : 0.05f), gaussian() * 0.01f};
    aq_convert(values, AQ_F32, scale + i, AQ_F16, 1, AQ_ISA_SCALAR, 1);
    aq_convert(values + 1, AQ_F32, offset + i, AQ_F16, 1, AQ_ISA_SCALAR, 1);
  }
  for (size_t i = 0; i < rows; i++)
    for (size_t j = 0; j < cols; j++) {
      const size_t at = i * groups + (group_size ? j / group_size : 0);
      unsigned window = 0;
      for (size_t back = 0; back < 4; back++)
        if (back <= j) window |= (unsigned)codes[i * cols + j - back] << (6 - 2 * back);
      weights[i * cols + j] = fmaf(half(scale[at]), table[window], half(offset[at]));
    }
}

static void run(int32_t isa) {
  static const size_t columns[] = {1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 67, 100, 128, 255, 256, 257, 300, 512, 1000};
  static const size_t sizes[] = {0, 16, 64, 256};
  for (size_t c = 0; c < COUNT(columns); c++)
    for (size_t g = 0; g < COUNT(sizes); g++) {
      if (quick && random_bits() % 4) continue;
      matrix(isa, 1 + random_bits() % 35, columns[c], sizes[g], random_bits() % 4 == 0);
      const size_t n = rows * cols;
      const int32_t threads = 1 + 2 * (int32_t)(random_bits() % 2);
#define DEQUANTIZE(out, dtype, isa, threads) \
  aq_dequantize_trellis(packed, scale, offset, rows, cols, 2, group_size, out, dtype, isa, threads)
      for (int32_t dtype = AQ_F32; dtype <= AQ_BF16; dtype++) {
        void *expected = guarded(n * 4), *actual = guarded(n * 4);
        aq_convert(weights, AQ_F32, expected, dtype, n, AQ_ISA_SCALAR, 1);
        expect_status("dequantize", where, DEQUANTIZE(actual, dtype, isa, threads), AQ_OK);
        expect_output("dequantize", where, expected, actual, n * dtype_bytes(dtype));
      }
      float *other = gaussians(n, 0.05f);
      double *expected = guarded(AQ_STATISTICS * 8), *actual = guarded(AQ_STATISTICS * 8);
#define STATISTICS(out, isa, threads) \
  aq_trellis_error_statistics(other, AQ_F32, packed, scale, offset, rows, cols, 2, group_size, out, isa, threads)
      expect_status("statistics", where, STATISTICS(expected, AQ_ISA_SCALAR, 1), AQ_OK);
      expect_status("statistics", where, STATISTICS(actual, isa, threads), AQ_OK);
      expect_output("statistics", where, expected, actual, AQ_STATISTICS * 8);
      release();
    }
}

/* The mean squared error of the best path for Gaussian numbers: below two thirds of that of four uniform levels. */
static void best_path(void) {
  enum { N = 20000, STATES = 64 };
  double cost[STATES], next[STATES];
  for (int s = 0; s < STATES; s++) cost[s] = s ? 1e30 : 0;
  for (int i = 0; i < N; i++) {
    const double x = (double)gaussian() * (22.474 / 32);
    for (int s = 0; s < STATES; s++) next[s] = 1e30;
    for (int window = 0; window < WINDOWS; window++) {
      const double error = x - (double)table[window], total = cost[window & 63] + error * error;
      if (total < next[window >> 2]) next[window >> 2] = total;
    }
    memcpy(cost, next, sizeof cost);
  }
  double best = cost[0];
  for (int s = 1; s < STATES; s++) best = cost[s] < best ? cost[s] : best;
  best *= 32 / 22.474 * 32 / 22.474 / N;
  printf("best path: mean squared error %.4f\n", best);
  expect(best < 0.1188 * 0.68, "best path", "Gaussian numbers");
}

static void refusals(void) {
  float out[2];
  const uint16_t halves[2] = {0};
  const uint32_t codes[1] = {0};
#define REFUSED(what, status, bits, group, scale, offset) \
  expect_status("refusals", what, \
                aq_dequantize_trellis(codes, scale, offset, 1, 2, bits, group, out, AQ_F32, AQ_ISA_BEST, 1), status)
  REFUSED("no offsets", AQ_E_ARGUMENT, 2, 0, halves, 0);
  REFUSED("no scales", AQ_E_ARGUMENT, 2, 0, 0, halves);
  REFUSED("4 bits", AQ_E_ARGUMENT, 4, 0, halves, halves);
  REFUSED("group", AQ_E_SHAPE, 2, 7, halves, halves);
  expect_status("refusals", "table of 4 bits", aq_trellis_table(4, table), AQ_E_ARGUMENT);
  expect_status("refusals", "nothing", aq_dequantize_trellis(0, 0, 0, 0, 2, 2, 0, 0, AQ_F32, AQ_ISA_BEST, 1), AQ_OK);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  expect_status("table", "2 bits", aq_trellis_table(2, table), AQ_OK);
  best_path();
  refusals();
  run(AQ_ISA_SCALAR);
  run_sets(AQ_ISA_NEON_DOT, run);
  return finish();
}
