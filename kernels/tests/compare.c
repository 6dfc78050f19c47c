/* compare.c: every kernel on every instruction set of this build against the scalar oracle, on awkward shapes,
 * with guard bytes behind each output, and for 1 and 3 threads. Prints what it ran; exit status 1 on a difference.
 * Run natively, under sanitizers, and for other processors under an emulator. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../include/arrowquant.h"

static const char *isa_names[] = {"best", "scalar", "avx2", "avx512", "neon", "simd128"};
static uint64_t state;
static long cases, failures;

static uint32_t random_bits(void) { /* splitmix64 */
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return (uint32_t)(z >> 32);
}

static float gaussian(void) {
  const double u = (random_bits() + 1.0) / 4294967297.0, v = random_bits() / 4294967296.0;
  return (float)(sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v));
}

#define GUARD 64

typedef struct {
  uint8_t *bytes;
  size_t size;
} buffer;

static buffer guarded(size_t size) {
  buffer b = {malloc(size + GUARD), size};
  if (!b.bytes) abort();
  memset(b.bytes, 0xa5, size + GUARD);
  return b;
}

static void check(const char *what, const char *where, buffer expected, buffer actual) {
  cases++;
  int guard = 1;
  for (size_t i = 0; i < GUARD; i++) guard &= actual.bytes[actual.size + i] == 0xa5;
  size_t at = 0;
  while (at < expected.size && expected.bytes[at] == actual.bytes[at]) at++;
  if (guard && at == expected.size) return;
  failures++;
  printf("FAILED %s, %s: %s at byte %zu of %zu\n", what, where, guard ? "differs" : "wrote past the end", at, expected.size);
}

static void check_status(const char *what, const char *where, int32_t expected, int32_t actual) {
  cases++;
  if (expected == actual) return;
  failures++;
  printf("FAILED %s, %s: status %d instead of %d\n", what, where, actual, expected);
}

static size_t dtype_bytes(int32_t dtype) { return (size_t[]){4, 2, 2, 1, 1, 8}[dtype]; }

/* What the weights of a case look like. */
enum { GAUSSIAN, SKEWED, CONSTANT_GROUPS, TINY, OFFSET, SIGNED_ZEROS, PATTERNS };

static void fill(float *w, size_t n, int pattern) {
  float constant = 0;
  for (size_t i = 0; i < n; i++) {
    const float g = gaussian();
    switch (pattern) {
      case SKEWED: w[i] = expf(g) * 0.03f; break;
      case CONSTANT_GROUPS:
        if (i % 16 == 0) constant = random_bits() % 3 ? g : 0.0f;
        w[i] = random_bits() % 97 ? constant : g;
        break;
      case TINY: w[i] = g * 1e-7f; break;
      case OFFSET: w[i] = 100.0f + 0.01f * g; break;
      case SIGNED_ZEROS: w[i] = random_bits() % 2 ? 0.0f : random_bits() % 2 ? -0.0f : (random_bits() % 5 ? 0.0f : g); break;
      default: w[i] = g; break;
    }
  }
}

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
  float *values = malloc(n * 4), *column_weights = malloc(cols * 4);
  void *weights = malloc(n * dtype_bytes(dtype));
  fill(values, n, pattern);
  for (size_t i = 0; i < cols; i++) column_weights[i] = random_bits() % 4 ? fabsf(gaussian()) : 0.0f;
  if (random_bits() % 2)
    for (size_t i = 0; i < cols && i < 40; i++) column_weights[i] = 0.0f;
  aq_convert(values, AQ_F32, weights, dtype, n, AQ_ISA_SCALAR, 1);

  buffer packed[2], scale[2], zero[2], codes[2], out[2], statistics[2];
  int32_t status[2];
  for (int k = 0; k < 2; k++) {
    const int32_t use = k ? isa : AQ_ISA_SCALAR, share = k ? threads : 1;
    packed[k] = guarded(rows * words * 4);
    scale[k] = guarded(rows * groups * 2);
    zero[k] = guarded(rows * groups * 2);
    codes[k] = guarded(n);
    out[k] = guarded(n * 4);
    statistics[k] = guarded(AQ_STATISTICS * 8);
    uint32_t *p = (uint32_t *)packed[k].bytes;
    uint16_t *s = (uint16_t *)scale[k].bytes, *z = kind == AQ_ZERO_POINT_SYMMETRIC ? 0 : (uint16_t *)zero[k].bytes;
    status[k] = clip ? aq_quantize_clip(weights, dtype, rows, cols, bits, group_size, kind,
                                        clip == 2 ? column_weights : 0, p, s, z, use, share)
                     : aq_quantize_round(weights, dtype, rows, cols, bits, group_size, kind, p, s, z, use, share);
    if (status[k] != AQ_OK) continue;
    aq_unpack_codes(p, rows, cols, bits, codes[k].bytes, use, share);
    aq_dequantize(p, s, z, rows, cols, bits, group_size, out[k].bytes, AQ_F32, use, share);
    aq_packed_error_statistics(weights, dtype, p, s, z, rows, cols, bits, group_size, (double *)statistics[k].bytes,
                               use, share);
  }
  check_status("quantize", where, status[0], status[1]);
  if (status[0] == AQ_OK && status[1] == AQ_OK) {
    check("packed", where, packed[0], packed[1]);
    check("scale", where, scale[0], scale[1]);
    check("zero point", where, zero[0], zero[1]);
    check("codes", where, codes[0], codes[1]);
    check("dequantized", where, out[0], out[1]);
    check("statistics", where, statistics[0], statistics[1]);
    buffer again = guarded(packed[1].size);
    check_status("pack", where, AQ_OK,
                 aq_pack_codes(codes[1].bytes, rows, cols, bits, (uint32_t *)again.bytes, isa, threads));
    check("packed again", where, packed[0], again);
    free(again.bytes);
    for (int32_t to = AQ_F16; to <= AQ_BF16; to++) {
      buffer narrow[2];
      for (int k = 0; k < 2; k++) {
        narrow[k] = guarded(n * 2);
        aq_dequantize((uint32_t *)packed[0].bytes, (uint16_t *)scale[0].bytes,
                      kind == AQ_ZERO_POINT_SYMMETRIC ? 0 : (uint16_t *)zero[0].bytes, rows, cols, bits, group_size,
                      narrow[k].bytes, to, k ? isa : AQ_ISA_SCALAR, threads);
      }
      check("dequantized to a half", where, narrow[0], narrow[1]);
      free(narrow[0].bytes);
      free(narrow[1].bytes);
    }
  }
  for (int k = 0; k < 2; k++) {
    free(packed[k].bytes);
    free(scale[k].bytes);
    free(zero[k].bytes);
    free(codes[k].bytes);
    free(out[k].bytes);
    free(statistics[k].bytes);
  }
  free(values);
  free(column_weights);
  free(weights);
}

/* Every pattern of the narrow formats to every other, and float32 values around each rounding boundary. */
static void compare_convert(int32_t isa, int32_t threads) {
  char where[80];
  for (int32_t from = AQ_F32; from <= AQ_F64; from++) {
    const size_t n = from == AQ_F8_E4M3 || from == AQ_F8_E5M2 ? 256 : from == AQ_F32 || from == AQ_F64 ? 400003 : 65536;
    uint8_t *in = malloc(n * dtype_bytes(from));
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
      buffer out[2];
      for (int k = 0; k < 2; k++) {
        out[k] = guarded(n * dtype_bytes(to));
        aq_convert(in, from, out[k].bytes, to, n, k ? isa : AQ_ISA_SCALAR, k ? threads : 1);
      }
      snprintf(where, sizeof where, "%s, %d threads, dtype %d to %d", isa_names[isa], threads, from, to);
      check("convert", where, out[0], out[1]);
      free(out[0].bytes);
      free(out[1].bytes);
    }
    free(in);
  }
}

static void compare_statistics(int32_t isa, int32_t threads) {
  static const size_t lengths[] = {1, 7, 8, 9, 255, 256, 257, 4095, 4096, 4097, 300001};
  for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++) {
    const size_t n = lengths[l];
    char where[80];
    snprintf(where, sizeof where, "%s, %d threads, %zu elements", isa_names[isa], threads, n);
    float *a = malloc(n * 4), *b = malloc(n * 4);
    fill(a, n, GAUSSIAN);
    fill(b, n, SKEWED);
    buffer out[2];
    for (int k = 0; k < 2; k++) {
      out[k] = guarded(AQ_STATISTICS * 8);
      aq_error_statistics(a, AQ_F32, b, AQ_F32, n, (double *)out[k].bytes, k ? isa : AQ_ISA_SCALAR, k ? threads : 1);
    }
    check("statistics", where, out[0], out[1]);
    uint64_t expected = n, found = 0;
    if (n > 8) a[expected = n - 2] = NAN;
    aq_find_nonfinite(a, AQ_F32, n, &found, isa, threads);
    check_status("first non-finite", where, (int32_t)expected, (int32_t)found);
    free(out[0].bytes);
    free(out[1].bytes);
    free(a);
    free(b);
  }
}

int main(int argc, char **argv) {
  const uint64_t seed = argc > 1 ? strtoull(argv[1], 0, 10) : 1;
  const int quick = argc > 2 && strcmp(argv[2], "quick") == 0;
  state = seed;
  static const size_t columns[] = {1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 160, 255, 256, 257, 300, 512, 1000};
  static const size_t sizes[] = {0, 16, 32, 64, 128, 256};
  static const int32_t widths[] = {2, 3, 4, 8};
  int ran = 0;
  for (int32_t isa = AQ_ISA_AVX2; isa <= AQ_ISA_SIMD128; isa++) {
    if (!aq_isa_supported(isa)) {
      printf("skipped %s: not in this build or not on this processor\n", isa_names[isa]);
      continue;
    }
    ran++;
    const long before = cases;
    for (size_t c = 0; c < sizeof columns / sizeof *columns; c++)
      for (size_t g = 0; g < sizeof sizes / sizeof *sizes; g++)
        for (size_t b = 0; b < 4; b++)
          for (int32_t kind = 0; kind < 3; kind++)
            for (int clip = 0; clip < 3; clip++) {
              if (quick && random_bits() % 8) continue;
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
    printf("%s: %ld comparisons with scalar\n", isa_names[isa], cases - before);
  }
  printf("seed %llu: %ld comparisons, %ld failed, %d instruction sets\n", (unsigned long long)seed, cases, failures, ran);
  return failures ? 1 : 0;
}
