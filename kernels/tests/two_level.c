/* two_level.c: two-level scales on every instruction set of this build against the scalar oracle, to the bit, on awkward
 * shapes, with guard bytes behind each output, for 1 and 3 threads. Prints what it ran; exit status 1 on a difference. */
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

static void expect(const char *what, const char *where, int condition) {
  cases++;
  if (condition) return;
  failures++;
  printf("FAILED %s, %s\n", what, where);
}

enum { GAUSSIAN, HEAVY, POSITIVE, FAR, CONSTANT_GROUPS, TINY, ZEROS, LARGE, PATTERNS };

static void fill(float *w, size_t n, int pattern) {
  float constant = 0;
  for (size_t i = 0; i < n; i++) {
    const float g = gaussian();
    if (i % 16 == 0) constant = random_bits() % 3 ? g : 0.0f;
    switch (pattern) {
      case HEAVY: w[i] = 0.03f * g * expf(gaussian()); break;
      case POSITIVE: w[i] = 0.03f * expf(g); break;
      case FAR: w[i] = (random_bits() % 300 ? 100.0f : -100.0f) + 0.01f * g; break;
      case CONSTANT_GROUPS: w[i] = random_bits() % 97 ? constant : g; break;
      case TINY: w[i] = g * (random_bits() % 2 ? 1e-7f : 1e-30f); break;
      case ZEROS: w[i] = random_bits() % 2 ? 0.0f : random_bits() % 2 ? -0.0f : (random_bits() % 40 ? 0.0f : g); break;
      case LARGE: w[i] = g * (random_bits() % 50 ? 60000.0f : 200000.0f); break;
      default: w[i] = g; break;
    }
  }
}

enum { OUTPUTS = 9 };
static const char *output_names[OUTPUTS] = {"packed",    "sub-scales",  "sub-minima", "super scales", "super minima",
                                            "dequantized", "as halves", "as bfloat16", "statistics"};

static void compare(int32_t isa, int32_t threads, size_t rows, size_t cols, int32_t bits, size_t group_size,
                    int32_t scale_bits, int32_t dtype, int pattern, int solver) {
  char where[200];
  snprintf(where, sizeof where, "%s, %d threads, %zux%zu, %d bits, group %zu, %d scale bits, dtype %d, pattern %d, %s",
           isa_names[isa], threads, rows, cols, bits, group_size, scale_bits, dtype, pattern,
           solver == 0 ? "round" : solver == 1 ? "search" : "weighted search");
  uint64_t words = 0, sizes[2];
  aq_packed_words(cols, bits, &words);
  expect("sizes", where, aq_two_level_sizes(cols, group_size, scale_bits, sizes) == AQ_OK);
  const size_t n = rows * cols;
  float *values = malloc(n * 4), *column_weights = malloc(cols * 4);
  void *weights = malloc(n * 4);
  fill(values, n, pattern);
  for (size_t i = 0; i < cols; i++) column_weights[i] = random_bits() % 4 ? expf(2.0f * gaussian()) : 0.0f;
  if (random_bits() % 2)
    for (size_t i = 0; i < cols && i < 300; i++) column_weights[i] = 0.0f;
  aq_convert(values, AQ_F32, weights, dtype, n, AQ_ISA_SCALAR, 1);
  const size_t bytes[OUTPUTS] = {rows * words * 4,    rows * sizes[0],     rows * sizes[0],     rows * sizes[1] * 2,
                                 rows * sizes[1] * 2, n * 4,               n * 2,               n * 2,
                                 AQ_STATISTICS * 8};
  buffer out[2][OUTPUTS];
  int32_t status[2];
  for (int k = 0; k < 2; k++) {
    const int32_t use = k ? isa : AQ_ISA_SCALAR, share = k ? threads : 1;
    for (int i = 0; i < OUTPUTS; i++) out[k][i] = guarded(bytes[i]);
    uint32_t *p = (uint32_t *)out[k][0].bytes;
    uint8_t *ss = out[k][1].bytes, *sm = out[k][2].bytes;
    uint16_t *d = (uint16_t *)out[k][3].bytes, *m = (uint16_t *)out[k][4].bytes;
    status[k] = aq_quantize_two_level(weights, dtype, rows, cols, bits, group_size, scale_bits, solver > 0,
                                      solver == 2 ? column_weights : 0, p, ss, sm, d, m, use, share);
    for (int32_t to = AQ_F32; to <= AQ_BF16; to++)
      aq_dequantize_two_level(p, ss, sm, d, m, rows, cols, bits, group_size, scale_bits, out[k][5 + to].bytes, to, use,
                              share);
    aq_two_level_error_statistics(weights, dtype, p, ss, sm, d, m, rows, cols, bits, group_size, scale_bits,
                                  (double *)out[k][8].bytes, use, share);
  }
  expect("status", where, status[0] == status[1]);
  if (status[0] == AQ_OK && status[1] == AQ_OK) {
    for (int i = 0; i < OUTPUTS; i++) check(output_names[i], where, out[0][i], out[1][i]);
    const double *statistics = (const double *)out[1][8].bytes;
    expect("finite error", where, statistics[3] - statistics[3] == 0.0);
  }
  for (int k = 0; k < 2; k++)
    for (int i = 0; i < OUTPUTS; i++) free(out[k][i].bytes);
  free(values);
  free(column_weights);
  free(weights);
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
    const int32_t status = aq_quantize_two_level(w, AQ_F32, 3, 300, 2, 16, 4, i % 2, 0, packed, sub[0], sub[1], super[0],
                                                 super[1], isa, 2);
    expect("fault", isa_names[isa], status == (i % 5 < 3 ? AQ_E_NONFINITE : AQ_E_RANGE));
  }
}

int main(int argc, char **argv) {
  const uint64_t seed = argc > 1 ? strtoull(argv[1], 0, 10) : 1;
  const int quick = argc > 2 && strcmp(argv[2], "quick") == 0;
  state = seed;
  static const size_t columns[] = {1, 15, 16, 17, 31, 32, 33, 64, 65, 100, 128, 160, 255, 256, 257, 272, 300, 512, 1000, 1030};
  static const size_t sizes[] = {16, 32, 64, 128};
  static const int32_t widths[] = {2, 3, 4, 8};
  int ran = 0;
  faults(AQ_ISA_SCALAR);
  for (int32_t isa = AQ_ISA_AVX2; isa <= AQ_ISA_SIMD128; isa++) {
    if (!aq_isa_supported(isa)) {
      printf("skipped %s: not in this build or not on this processor\n", isa_names[isa]);
      continue;
    }
    ran++;
    const long before = cases;
    faults(isa);
    for (size_t c = 0; c < sizeof columns / sizeof *columns; c++)
      for (size_t g = 0; g < sizeof sizes / sizeof *sizes; g++)
        for (size_t b = 0; b < 4; b++)
          for (int32_t scale_bits = 4; scale_bits <= 6; scale_bits += 2)
            for (int solver = 0; solver < 3; solver++) {
              if (quick && random_bits() % 8) continue;
              compare(isa, 1 + 2 * (int32_t)(random_bits() % 2), 1 + random_bits() % 37, columns[c], widths[b], sizes[g],
                      scale_bits, (int32_t)(random_bits() % 3), (int)(random_bits() % PATTERNS), solver);
            }
    compare(isa, 3, 67, 4096, 2, 16, 4, AQ_BF16, GAUSSIAN, 1);
    printf("%s: %ld comparisons with scalar\n", isa_names[isa], cases - before);
  }
  printf("seed %llu: %ld comparisons, %ld failed, %d instruction sets\n", (unsigned long long)seed, cases, failures, ran);
  return failures ? 1 : 0;
}
