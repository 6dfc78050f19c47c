/* harness.h: what every driver needs: its arguments, random numbers, memory of a case, checks, and a run over
 * the instruction sets. A driver prints what it ran; exit status 1 on a difference. Drivers run natively,
 * under sanitizers, and for other processors under an emulator: driver [seed] [quick | N], with N for one of
 * N of the cases that are products of lists; from 8 on, which is quick, large cases are smaller too */
#ifndef AQ_HARNESS_H
#define AQ_HARNESS_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../include/arrowquant.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

static const char *const isa_names[] = {"best", "scalar",  "avx2",        "avx512",
                                        "neon", "simd128", "avx512_vnni", "neon_dot", "avx512_vbmi"};
static uint64_t state;
static long cases, failures;
static uint32_t share = 1; /* one of so many cases */
static int quick;          /* a small share, and smaller cases */

/* Random numbers ----------------------------------------------------------------------------------------- */

static inline uint32_t random_bits(void) { /* splitmix64 */
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return (uint32_t)(z >> 32);
}

static inline float gaussian(void) {
  const double u = (random_bits() + 1.0) / 4294967297.0, v = random_bits() / 4294967296.0;
  return (float)(sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v));
}

/* Memory of a case --------------------------------------------------------------------------------------- */

#define GUARD 64

static void *taken[4096];
static size_t taken_count;

/* Bytes that live until release(), each piece a separate allocation so that sanitizers see its ends. */
static inline void *take(size_t bytes) {
  void *p = malloc(bytes ? bytes : 1);
  if (!p || taken_count == COUNT(taken)) abort();
  return taken[taken_count++] = p;
}

/* An output: bytes of 0xa5 with a guard behind them that no kernel may touch. */
static inline void *guarded(size_t bytes) { return memset(take(bytes + GUARD), 0xa5, bytes + GUARD); }

static inline float *gaussians(size_t n, float factor) {
  float *x = (float *)take(n * sizeof *x);
  for (size_t i = 0; i < n; i++) x[i] = factor * gaussian();
  return x;
}

/* Kinds of weights of a case. */
enum { GAUSSIAN, SKEWED, HEAVY, CONSTANT_GROUPS, TINY, VANISHING, OFFSET, FAR_APART, POSITIVE, SIGNED_ZEROS, SPARSE,
       LARGE, PATTERNS };

static inline void fill(float *w, size_t n, int pattern) {
  float constant = 0;
  for (size_t i = 0; i < n; i++) {
    const float g = gaussian();
    if (pattern == CONSTANT_GROUPS && i % 16 == 0) constant = random_bits() % 3 ? g : 0.0f;
    const float zero = random_bits() % 4 == 0 ? -0.0f : 0.0f;
    switch (pattern) {
      case SKEWED: w[i] = 0.03f * expf(g); break;
      case HEAVY: w[i] = 0.03f * g * expf(gaussian()); break;
      case CONSTANT_GROUPS: w[i] = random_bits() % 97 ? constant : g; break;
      case TINY: w[i] = g * 1e-7f; break;
      case VANISHING: w[i] = g * (random_bits() % 2 ? 1e-7f : 1e-30f); break;
      case OFFSET: w[i] = 100.0f + 0.01f * g; break;
      case FAR_APART: w[i] = (random_bits() % 300 ? 100.0f : -100.0f) + 0.01f * g; break;
      case POSITIVE: w[i] = fabsf(g) * 0.03f; break;
      case SIGNED_ZEROS: w[i] = random_bits() % 20 ? zero : g; break;
      case SPARSE: w[i] = random_bits() % 160 ? zero : g; break;
      case LARGE: w[i] = g * (random_bits() % 50 ? 60000.0f : 200000.0f); break;
      default: w[i] = g; break;
    }
  }
}

static inline size_t dtype_bytes(int32_t dtype) {
  static const size_t bytes[] = {4, 2, 2, 1, 1, 8};
  return bytes[dtype];
}

static inline void release(void) {
  while (taken_count) free(taken[--taken_count]);
}

/* Checks ------------------------------------------------------------------------------------------------- */

static inline void fail(const char *what, const char *where, const char *why) {
  if (++failures <= 40) printf("FAILED %s, %s: %s\n", what, where, why);
}

static inline void expect(int condition, const char *what, const char *where) {
  cases++;
  if (!condition) fail(what, where, "is not so");
}

static inline void expect_status(const char *what, const char *where, int32_t actual, int32_t expected) {
  char why[64];
  cases++;
  if (actual == expected) return;
  snprintf(why, sizeof why, "status %d instead of %d", (int)actual, (int)expected);
  fail(what, where, why);
}

static inline void expect_guard(const char *what, const char *where, const void *output, size_t bytes) {
  cases++;
  for (size_t i = 0; i < GUARD; i++)
    if (((const uint8_t *)output)[bytes + i] != 0xa5) {
      fail(what, where, "wrote past the end");
      return;
    }
}

/* The same bytes; both may be longer. */
static inline void expect_bytes(const char *what, const char *where, const void *expected, const void *actual,
                                size_t bytes) {
  const uint8_t *e = (const uint8_t *)expected, *a = (const uint8_t *)actual;
  size_t at = 0;
  char why[80];
  cases++;
  while (at < bytes && e[at] == a[at]) at++;
  if (at == bytes) return;
  snprintf(why, sizeof why, "differs at byte %zu of %zu", at, bytes);
  fail(what, where, why);
}

/* Outputs of guarded() against the oracle's. */
static inline void expect_output(const char *what, const char *where, const void *expected, const void *actual,
                                 size_t bytes) {
  expect_bytes(what, where, expected, actual, bytes);
  expect_guard(what, where, actual, bytes);
}

/* |actual - expected| <= tolerance[i], or `flat` where that is null; and nothing behind the end was
 * touched. */
static inline void expect_close(const char *what, const char *where, const float *expected, const float *actual,
                                size_t n, const float *tolerance, double flat) {
  char why[96];
  cases++;
  for (size_t i = 0; i < n; i++) {
    const double e = expected[i], a = actual[i];
    if (isnan(e) ? isnan(a) : e == a || fabs(e - a) <= (tolerance ? (double)tolerance[i] : flat)) continue;
    snprintf(why, sizeof why, "%.9g instead of %.9g at %zu", a, e, i);
    fail(what, where, why);
    return;
  }
  expect_guard(what, where, actual, n * sizeof *actual);
}

/* Numbers of threads that must give the same bytes; the first two where a driver is quick. */
static const int32_t thread_counts[] = {1, 3, 2, 8};
#define THREAD_COUNTS (quick ? 2 : COUNT(thread_counts))

/* `call`, which writes `out` with `threads`, against the oracle's output as expect_close, and the same bytes
 * for every number of threads. `first` becomes the output of one thread. */
#define EXPECT_ON_THREADS(what, where, first, expected, n, tolerance, flat, call)                 \
  do {                                                                                            \
    for (size_t at_ = 0; at_ < THREAD_COUNTS; at_++) {                                            \
      const int32_t threads = thread_counts[at_];                                                 \
      float *out = guarded((n) * sizeof *out);                                                    \
      expect_status(what, where, call, AQ_OK);                                                    \
      expect_close(what, where, expected, out, n, tolerance, flat);                               \
      if (at_ == 0) first = out;                                                                  \
      expect_bytes(what ", threads", where, first, out, (n) * sizeof *out);                       \
    }                                                                                             \
  } while (0)

/* Whether a case is passed over: of one in `every` of them, and of these one in `share`, none is. */
static inline int passed_over(uint32_t every) { return every * share > 1 && random_bits() % (every * share); }

/* Whether so few cases are taken, as under a device's sanitizer, that those that take long are left out. */
static inline int leaves_out_large(void) { return share >= 64; }

/* Runs --------------------------------------------------------------------------------------------------- */

static inline void begin(int argc, char **argv) {
  state = argc > 1 ? strtoull(argv[1], 0, 10) : 1;
  if (argc > 2) share = strcmp(argv[2], "quick") == 0 ? 8 : (uint32_t)strtoul(argv[2], 0, 10);
  if (share == 0) abort();
  quick = share >= 8;
  printf("seed %llu\n", (unsigned long long)state);
}

/* Runs a driver's cases on every instruction set up to `last` that this build and processor have. */
static inline void run_sets(int32_t last, void (*run)(int32_t isa)) {
  for (int32_t isa = AQ_ISA_AVX2; isa <= last; isa++) {
    if (!aq_isa_supported(isa)) {
      printf("skipped %s: not in this build or not on this processor\n", isa_names[isa]);
      continue;
    }
    const long before = cases;
    run(isa);
    printf("%s: %ld checks\n", isa_names[isa], cases - before);
  }
}

/* The exit status of a driver. */
static inline int finish(void) {
  printf("%ld checks, %ld failed\n", cases, failures);
  return failures != 0;
}

#endif
