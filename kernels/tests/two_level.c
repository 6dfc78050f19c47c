/* two_level.c: two-level scales on every instruction set of this build against the scalar oracle, to the bit,
 * on awkward shapes, with guard bytes behind each output, for 1 and 3 threads. */
#include "harness.h"

enum { OUTPUTS = 9 };
static const char *const names[OUTPUTS] = {"packed",      "sub-scales", "sub-minima",  "super scales", "super minima",
                                           "dequantized", "as halves",  "as bfloat16", "statistics"};

static void compare(int32_t isa, int32_t threads, size_t rows, size_t cols, int32_t bits, size_t group_size,
                    int32_t scale_bits, int32_t dtype, int pattern, int solver) {
  char where[200];
  snprintf(where, sizeof where, "%s, %d threads, %zux%zu, %d bits, group %zu, %d scale bits, dtype %d, pattern %d, %s",
           isa_names[isa], threads, rows, cols, bits, group_size, scale_bits, dtype, pattern,
           solver == 0 ? "round" : solver == 1 ? "search" : "weighted search");
  uint64_t words = 0, sizes[2];
  aq_packed_words(cols, bits, &words);
  expect_status("sizes", where, aq_two_level_sizes(cols, group_size, scale_bits, sizes), AQ_OK);
  const size_t n = rows * cols;
  float *values = take(n * 4), *column_weights = take(cols * 4);
  void *weights = take(n * 4);
  fill(values, n, pattern);
  for (size_t i = 0; i < cols; i++) column_weights[i] = random_bits() % 4 ? expf(2.0f * gaussian()) : 0.0f;
  if (random_bits() % 2)
    for (size_t i = 0; i < cols && i < 300; i++) column_weights[i] = 0.0f;
  aq_convert(values, AQ_F32, weights, dtype, n, AQ_ISA_SCALAR, 1);
  const size_t sub = rows * sizes[0], super = rows * sizes[1] * 2;
  const size_t bytes[OUTPUTS] = {rows * words * 4, sub, sub, super, super, n * 4, n * 2, n * 2, AQ_STATISTICS * 8};
  void *out[2][OUTPUTS];
  int32_t status[2];
  for (int k = 0; k < 2; k++) {
    const int32_t use = k ? isa : AQ_ISA_SCALAR, share = k ? threads : 1;
    void **o = out[k];
    for (int i = 0; i < OUTPUTS; i++) o[i] = guarded(bytes[i]);
    status[k] = aq_quantize_two_level(weights, dtype, rows, cols, bits, group_size, scale_bits, solver > 0,
                                      solver == 2 ? column_weights : 0, o[0], o[1], o[2], o[3], o[4], use, share);
    for (int32_t to = AQ_F32; to <= AQ_BF16; to++)
      aq_dequantize_two_level(o[0], o[1], o[2], o[3], o[4], rows, cols, bits, group_size, scale_bits, o[5 + to], to,
                              use, share);
    aq_two_level_error_statistics(weights, dtype, o[0], o[1], o[2], o[3], o[4], rows, cols, bits, group_size,
                                  scale_bits, o[8], use, share);
  }
  expect_status("quantize", where, status[1], status[0]);
  if (status[0] == AQ_OK && status[1] == AQ_OK) {
    for (int i = 0; i < OUTPUTS; i++) expect_output(names[i], where, out[0][i], out[1][i], bytes[i]);
    const double *statistics = out[1][8];
    expect(statistics[3] - statistics[3] == 0.0, "finite error", where);
  }
  release();
}

/* One NaN, infinity or much too large weight anywhere is found. */
static void faults(int32_t isa) {
  static const float bad[] = {NAN, INFINITY, -INFINITY, 1e30f, -3e38f};
  float w[3 * 300];
  uint32_t packed[3 * 19];
  uint8_t sub[2][3 * 10];
  uint16_t super[2][3 * 2];
  for (int i = 0; i < 50; i++) {
    fill(w, 900, GAUSSIAN);
    w[random_bits() % 900] = bad[i % 5];
    const int32_t status = aq_quantize_two_level(w, AQ_F32, 3, 300, 2, 16, 4, i % 2, 0, packed, sub[0], sub[1],
                                                 super[0], super[1], isa, 2);
    expect_status("fault", isa_names[isa], status, i % 5 < 3 ? AQ_E_NONFINITE : AQ_E_RANGE);
  }
}

static void run(int32_t isa) {
  static const size_t columns[] = {1, 15, 16, 17, 31, 32, 33, 64, 65, 100, 128, 160, 255, 256, 257, 272, 300, 512,
                                   1000, 1030};
  static const size_t sizes[] = {16, 32, 64, 128};
  static const int32_t widths[] = {2, 3, 4, 8};
  faults(isa);
  for (size_t c = 0; c < COUNT(columns); c++)
    for (size_t g = 0; g < COUNT(sizes); g++)
      for (size_t b = 0; b < COUNT(widths); b++)
        for (int32_t scale_bits = 4; scale_bits <= 8; scale_bits += 2)
          for (int solver = 0; solver < 3; solver++) {
            if (passed_over(1)) continue;
            compare(isa, 1 + 2 * (int32_t)(random_bits() % 2), 1 + random_bits() % 37, columns[c], widths[b], sizes[g],
                    scale_bits, (int32_t)(random_bits() % 3), (int)(random_bits() % PATTERNS), solver);
          }
  compare(isa, 3, 67, 4096, 2, 16, 4, AQ_BF16, GAUSSIAN, 1);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  faults(AQ_ISA_SCALAR);
  run_sets(AQ_ISA_SIMD128, run);
  return finish();
}
