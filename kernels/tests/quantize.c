/* quantize.c: quantizing, packing, dequantizing, conversions and statistics on every instruction set of this
 * build against the scalar oracle, to the bit, on awkward shapes, with guard bytes behind each output, for 1
 * and 3 threads. */
#include "harness.h"

enum { PACKED, SCALES, ZERO_POINTS, CODES, PACKED_AGAIN, VALUES, HALVES, BFLOATS, STATISTICS, OUTPUTS };
static const char *const names[OUTPUTS] = {"packed", "scales", "zero points", "codes", "packed again",
                                           "dequantized", "as halves", "as bfloat16", "statistics"};

static void compare_quantize(int32_t isa, int32_t threads, size_t rows, size_t cols, int32_t bits, size_t group_size,
                             int32_t kind, int32_t dtype, int pattern, int clip) {
  char where[160];
  snprintf(where, sizeof where, "%s, %d threads, %zux%zu, %d bits, group %zu, kind %d, dtype %d, pattern %d, %s",
           isa_names[isa], threads, rows, cols, bits, group_size, kind, dtype, pattern,
           clip == 0 ? "round" : clip == 1 ? "clip" : "clip weighted");
  uint64_t words = 0, groups = 0;
  aq_packed_words(cols, bits, &words);
  aq_group_count(cols, group_size, &groups);
  const size_t n = rows * cols;
  float *values = take(n * 4), *column_weights = take(cols * 4);
  void *weights = take(n * dtype_bytes(dtype));
  fill(values, n, pattern);
  for (size_t i = 0; i < cols; i++) column_weights[i] = random_bits() % 4 ? fabsf(gaussian()) : 0.0f;
  if (random_bits() % 2)
    for (size_t i = 0; i < cols && i < 40; i++) column_weights[i] = 0.0f;
  aq_convert(values, AQ_F32, weights, dtype, n, AQ_ISA_SCALAR, 1);

  const size_t packed = rows * words * 4, halves = rows * groups * 2;
  const size_t bytes[OUTPUTS] = {packed, halves, halves, n, packed, n * 4, n * 2, n * 2, AQ_STATISTICS * 8};
  void *out[2][OUTPUTS];
  int32_t status[2];
  for (int k = 0; k < 2; k++) {
    const int32_t use = k ? isa : AQ_ISA_SCALAR, share = k ? threads : 1;
    for (int i = 0; i < OUTPUTS; i++) out[k][i] = guarded(bytes[i]);
    uint32_t *p = out[k][PACKED];
    uint16_t *s = out[k][SCALES], *z = kind == AQ_ZERO_POINT_SYMMETRIC ? 0 : out[k][ZERO_POINTS];
    status[k] = clip ? aq_quantize_clip(weights, dtype, rows, cols, bits, group_size, kind,
                                        clip == 2 ? column_weights : 0, p, s, z, use, share)
                     : aq_quantize_round(weights, dtype, rows, cols, bits, group_size, kind, p, s, z, use, share);
    if (status[k] != AQ_OK) continue;
    aq_unpack_codes(p, rows, cols, bits, out[k][CODES], use, share);
    expect_status("pack", where, aq_pack_codes(out[k][CODES], rows, cols, bits, out[k][PACKED_AGAIN], use, share),
                  AQ_OK);
    for (int32_t to = AQ_F32; to <= AQ_BF16; to++)
      aq_dequantize(p, s, z, rows, cols, bits, group_size, out[k][VALUES + to], to, use, share);
    aq_packed_error_statistics(weights, dtype, p, s, z, rows, cols, bits, group_size, out[k][STATISTICS], use, share);
  }
  expect_status("quantize", where, status[1], status[0]);
  if (status[0] == AQ_OK && status[1] == AQ_OK) {
    for (int i = 0; i < OUTPUTS; i++) expect_output(names[i], where, out[0][i], out[1][i], bytes[i]);
    expect_bytes("codes packed again", where, out[0][PACKED], out[1][PACKED_AGAIN], packed);
  }
  release();
}

/* Every pattern of the narrow formats to every other, and float32 values around each rounding boundary. */
static void compare_convert(int32_t isa, int32_t threads) {
  char where[80];
  for (int32_t from = AQ_F32; from <= AQ_F64; from++) {
    const size_t wide = quick ? 140003 : 400003; /* on 2 threads or more */
    const size_t n = from == AQ_F8_E4M3 || from == AQ_F8_E5M2 ? 256 : from == AQ_F32 || from == AQ_F64 ? wide : 65536;
    uint8_t *in = take(n * dtype_bytes(from));
    for (size_t i = 0; i < n; i++) {
      const uint32_t bits = i < 131072 ? (uint32_t)(i << 15) + (random_bits() % 3 - 1) : random_bits();
      float value;
      memcpy(&value, &bits, 4);
      if (from == AQ_F32) memcpy(in + 4 * i, &bits, 4);
      else if (from == AQ_F64) memcpy(in + 8 * i, &(double){(double)value * (1.0 + 0x1p-30)}, 8);
      else if (dtype_bytes(from) == 2) memcpy(in + 2 * i, &(uint16_t){(uint16_t)i}, 2);
      else in[i] = (uint8_t)i;
    }
    for (int32_t to = AQ_F32; to <= AQ_F64; to++) {
      const size_t bytes = n * dtype_bytes(to);
      void *expected = guarded(bytes), *actual = guarded(bytes);
      aq_convert(in, from, expected, to, n, AQ_ISA_SCALAR, 1);
      aq_convert(in, from, actual, to, n, isa, threads);
      snprintf(where, sizeof where, "%s, %d threads, dtype %d to %d", isa_names[isa], threads, from, to);
      expect_output("convert", where, expected, actual, bytes);
    }
    release();
  }
}

static void compare_statistics(int32_t isa, int32_t threads) {
  static const size_t lengths[] = {1, 7, 8, 9, 255, 256, 257, 4095, 4096, 4097, 300001};
  for (size_t l = 0; l < COUNT(lengths); l++) {
    const size_t n = lengths[l], bytes = AQ_STATISTICS * 8;
    char where[80];
    snprintf(where, sizeof where, "%s, %d threads, %zu elements", isa_names[isa], threads, n);
    float *a = take(n * 4), *b = take(n * 4);
    fill(a, n, GAUSSIAN);
    fill(b, n, SKEWED);
    double *expected = guarded(bytes), *actual = guarded(bytes);
    aq_error_statistics(a, AQ_F32, b, AQ_F32, n, expected, AQ_ISA_SCALAR, 1);
    aq_error_statistics(a, AQ_F32, b, AQ_F32, n, actual, isa, threads);
    expect_output("statistics", where, expected, actual, bytes);
    uint64_t first = n, found = 0;
    if (n > 8) a[first = n - 2] = NAN;
    aq_find_nonfinite(a, AQ_F32, n, &found, isa, threads);
    expect(found == first, "first non-finite", where);
    release();
  }
}

static void run(int32_t isa) {
  static const size_t columns[] = {1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 160, 255, 256, 257, 300, 512,
                                   1000};
  static const size_t sizes[] = {0, 16, 32, 64, 128, 256};
  static const int32_t widths[] = {2, 3, 4, 8};
  for (size_t c = 0; c < COUNT(columns); c++)
    for (size_t g = 0; g < COUNT(sizes); g++)
      for (size_t b = 0; b < COUNT(widths); b++)
        for (int32_t kind = 0; kind <= AQ_ZERO_POINT_OFFSET; kind++)
          for (int clip = 0; clip < 3; clip++) {
            if (passed_over(1)) continue;
            compare_quantize(isa, 1 + 2 * (int32_t)(random_bits() % 2), 1 + random_bits() % 37, columns[c], widths[b],
                             sizes[g], kind, (int32_t)(random_bits() % 6), (int)(random_bits() % PATTERNS), clip);
          }
  compare_quantize(isa, 3, 130, 1030, 2, 0, 0, AQ_BF16, GAUSSIAN, 1);
  compare_quantize(isa, 3, 67, 4096, 4, 32, 0, AQ_BF16, GAUSSIAN, 0);
  if (!quick) { /* results beyond the size from which stores bypass the caches, rows aligned and not */
    compare_quantize(isa, 3, 1100, 8192, 8, 32, 0, AQ_F32, GAUSSIAN, 0);
    compare_quantize(isa, 2, 1100, 8200, 3, 64, 2, AQ_F32, GAUSSIAN, 0);
  }
  compare_convert(isa, 3);
  compare_statistics(isa, 1);
  compare_statistics(isa, 3);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  run_sets(AQ_ISA_SIMD128, run);
  return finish();
}
