/* cuda_cases.h: cases of the CUDA driver: awkward shapes, guard bytes behind every output, the scalar CPU kernels as the oracle.
 * `Library` says how a kernel is run. */
#ifndef AQ_CUDA_CASES_H
#define AQ_CUDA_CASES_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <string>
#include <vector>

#include "../include/arrowquant.h"

#define GUARD 64

typedef std::vector<uint8_t> bytes;

struct quantize_case {
  size_t rows, cols;
  int32_t bits;
  size_t group_size;
  int32_t kind, dtype, pattern, clip; /* clip: 0 round, 1 search, 2 search with column weights */
};

struct adam_settings {
  double learning_rate, beta1, beta2, epsilon;
};

static uint64_t state, seed;
static long failures;
static std::map<std::string, long> ran; /* comparisons by kernel */

static void start(uint64_t from) { state = seed = from; }

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

static bytes guarded(size_t size) { return bytes(size + GUARD, 0xa5); }

static size_t width_of(int32_t dtype) {
  static const size_t widths[] = {4, 2, 2, 1, 1, 8};
  return widths[dtype];
}

static void failed(const char *kernel, const std::string &where, const char *how) {
  failures++;
  if (failures <= 40) printf("FAILED %s, %s: %s\n", kernel, where.c_str(), how);
}

static void check_guard(const char *kernel, const std::string &where, const bytes &actual) {
  for (size_t i = actual.size() - GUARD; i < actual.size(); i++)
    if (actual[i] != 0xa5) return failed(kernel, where, "wrote past the end");
}

static void check(const char *kernel, const std::string &where, const bytes &expected, const bytes &actual) {
  ran[kernel]++;
  check_guard(kernel, where, actual);
  for (size_t i = 0; i + GUARD < expected.size(); i++)
    if (expected[i] != actual[i]) {
      char how[80];
      snprintf(how, sizeof how, "differs at byte %zu of %zu", i, expected.size() - GUARD);
      return failed(kernel, where, how);
    }
}

static void check_status(const char *kernel, const std::string &where, int32_t expected, int32_t actual) {
  ran[kernel]++;
  if (expected == actual) return;
  char how[80];
  snprintf(how, sizeof how, "status %d instead of %d", (int)actual, (int)expected);
  failed(kernel, where, how);
}

static void check_near(const char *kernel, const std::string &where, double expected, double actual, double tolerance) {
  ran[kernel]++;
  if (fabs(actual - expected) <= tolerance) return;
  char how[120];
  snprintf(how, sizeof how, "%.9g instead of %.9g, tolerance %.3g", actual, expected, tolerance);
  failed(kernel, where, how);
}

enum { GAUSSIAN, SKEWED, CONSTANT_GROUPS, TINY, OFFSET, SIGNED_ZEROS, NOT_FINITE, HUGE_VALUES, PATTERNS };

static std::vector<float> values_of(size_t n, int pattern) {
  std::vector<float> w(n);
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
      case SIGNED_ZEROS: w[i] = random_bits() % 2 ? 0.0f : random_bits() % 2 ? -0.0f : random_bits() % 5 ? 0.0f : g; break;
      default: w[i] = g; break;
    }
  }
  if (pattern == NOT_FINITE) w[random_bits() % n] = random_bits() % 2 ? NAN : -INFINITY;
  if (pattern == HUGE_VALUES) w[random_bits() % n] = 3e38f;
  return w;
}

static std::string described(const quantize_case &c) {
  char where[160];
  snprintf(where, sizeof where, "%zux%zu, %d bits, group %zu, kind %d, dtype %d, pattern %d", c.rows, c.cols, c.bits,
           c.group_size, c.kind, c.dtype, c.pattern);
  return where;
}

template <class T>
static T *at(bytes &b) {
  return (T *)b.data();
}

/* A packed matrix of the oracle's, its guards included. */
struct packed_bytes {
  bytes packed, scale, zero;
};

static packed_bytes guarded_matrix(const quantize_case &c) {
  uint64_t words = 0, groups = 0;
  aq_packed_words(c.cols, c.bits, &words);
  aq_group_count(c.cols, c.group_size, &groups);
  return {guarded(c.rows * words * 4), guarded(c.rows * groups * 2), guarded(c.rows * groups * 2)};
}

/* Products against double: float32 sums of n terms |x| |s| (|q| + |z|), each off by 2^-23 a few times on its way. */
template <class Library>
static void run_linear(const Library &library, const char *kernel, const quantize_case &c, packed_bytes &m, size_t tokens,
                       double term_error) {
  const bool symmetric = c.kind == AQ_ZERO_POINT_SYMMETRIC;
  uint16_t *zero = symmetric ? 0 : at<uint16_t>(m.zero);
  std::vector<float> x(tokens * c.cols), bias(c.rows);
  for (float &v : x) v = gaussian();
  for (float &v : bias) v = gaussian();
  const bool biased = random_bits() % 2;
  bytes actual = guarded(tokens * c.rows * 4);
  const std::string where = described(c) + ", " + std::to_string(tokens) + " tokens";
  check_status(kernel, where, AQ_OK,
               library.linear(c, x.data(), tokens, at<uint32_t>(m.packed), at<uint16_t>(m.scale), zero,
                              biased ? bias.data() : 0, at<float>(actual)));
  check_guard(kernel, where, actual);
  std::vector<float> weights(c.rows * c.cols);
  aq_dequantize(at<uint32_t>(m.packed), at<uint16_t>(m.scale), zero, c.rows, c.cols, c.bits, c.group_size,
                weights.data(), AQ_F32, AQ_ISA_SCALAR, 1);
  const size_t size = c.group_size == 0 || c.group_size > c.cols ? c.cols : c.group_size;
  const size_t groups = (c.cols - 1) / size + 1;
  std::vector<float> scales(c.rows * groups), zeros(c.rows * groups, (float)(1 << (c.bits - 1)));
  aq_convert(m.scale.data(), AQ_F16, scales.data(), AQ_F32, scales.size(), AQ_ISA_SCALAR, 1);
  if (zero) aq_convert(m.zero.data(), AQ_F16, zeros.data(), AQ_F32, zeros.size(), AQ_ISA_SCALAR, 1);
  for (size_t t = 0; t < tokens; t++)
    for (size_t r = 0; r < c.rows; r++) {
      double sum = biased ? bias[r] : 0.0, terms = fabs(sum), products = 0.0;
      for (size_t k = 0; k < c.cols; k++) {
        const double product = (double)x[t * c.cols + k] * weights[r * c.cols + k];
        const size_t group = r * groups + k / size;
        sum += product;
        products += fabs(product);
        terms += fabs((double)x[t * c.cols + k] * scales[group]) * ((1 << c.bits) - 1 + fabs((double)zeros[group]));
      }
      check_near(kernel, where, sum, at<float>(actual)[t * c.rows + r],
                 terms * ((double)c.cols + 16) * 0x1p-23 + products * term_error + 1e-30);
    }
}

template <class Library>
static void run_quantize(const Library &library, const quantize_case &c) {
  const char *kernel = c.clip == 0 ? "quantize round" : c.clip == 1 ? "quantize clip" : "quantize clip, column weights";
  const std::string where = described(c);
  const size_t n = c.rows * c.cols;
  const bool symmetric = c.kind == AQ_ZERO_POINT_SYMMETRIC;
  std::vector<float> values = values_of(n, c.pattern), column_weights(c.cols);
  for (float &h : column_weights) h = random_bits() % 4 ? fabsf(gaussian()) : 0.0f;
  if (random_bits() % 2)
    for (size_t i = 0; i < c.cols && i < 40; i++) column_weights[i] = 0.0f;
  if (c.clip == 2 && random_bits() % 50 == 0) column_weights[random_bits() % c.cols] = -1.0f;
  bytes weights(n * width_of(c.dtype));
  aq_convert(values.data(), AQ_F32, weights.data(), c.dtype, n, AQ_ISA_SCALAR, 1);
  packed_bytes expected = guarded_matrix(c), actual = guarded_matrix(c);
  uint16_t *zero = symmetric ? 0 : at<uint16_t>(expected.zero);
  const int32_t status =
      c.clip ? aq_quantize_clip(weights.data(), c.dtype, c.rows, c.cols, c.bits, c.group_size, c.kind,
                                c.clip == 2 ? column_weights.data() : 0, at<uint32_t>(expected.packed),
                                at<uint16_t>(expected.scale), zero, AQ_ISA_SCALAR, 1)
             : aq_quantize_round(weights.data(), c.dtype, c.rows, c.cols, c.bits, c.group_size, c.kind,
                                 at<uint32_t>(expected.packed), at<uint16_t>(expected.scale), zero, AQ_ISA_SCALAR, 1);
  check_status(kernel, where, status,
               library.quantize(c, weights.data(), column_weights.data(), at<uint32_t>(actual.packed),
                                at<uint16_t>(actual.scale), symmetric ? 0 : at<uint16_t>(actual.zero)));
  check_guard(kernel, where, actual.packed);
  check_guard(kernel, where, actual.scale);
  check_guard(kernel, where, actual.zero);
  if (status != AQ_OK) return;
  check(kernel, where, expected.packed, actual.packed);
  check(kernel, where, expected.scale, actual.scale);
  check(kernel, where, expected.zero, actual.zero);

  bytes codes = guarded(n), own_codes = guarded(n), again = guarded(expected.packed.size() - GUARD);
  aq_unpack_codes(at<uint32_t>(expected.packed), c.rows, c.cols, c.bits, codes.data(), AQ_ISA_SCALAR, 1);
  check_status("unpack", where, AQ_OK,
               library.unpack(at<uint32_t>(expected.packed), c.rows, c.cols, c.bits, own_codes.data()));
  check("unpack", where, codes, own_codes);
  check_status("pack", where, AQ_OK, library.pack(codes.data(), c.rows, c.cols, c.bits, at<uint32_t>(again)));
  check("pack", where, expected.packed, again);
  if (c.bits < 8) {
    codes[random_bits() % n] = (uint8_t)(1u << c.bits);
    check_status("pack", where, AQ_E_VALUE, library.pack(codes.data(), c.rows, c.cols, c.bits, at<uint32_t>(again)));
  }
  for (int32_t dtype = AQ_F32; dtype <= AQ_BF16; dtype++) {
    bytes out = guarded(n * width_of(dtype)), own = guarded(n * width_of(dtype));
    aq_dequantize(at<uint32_t>(expected.packed), at<uint16_t>(expected.scale), zero, c.rows, c.cols, c.bits,
                  c.group_size, out.data(), dtype, AQ_ISA_SCALAR, 1);
    check_status("dequantize", where, AQ_OK,
                 library.dequantize(c, at<uint32_t>(expected.packed), at<uint16_t>(expected.scale), zero, own.data(),
                                    dtype));
    check("dequantize", where, out, own);
  }
  if (c.clip == 0) {
    run_linear(library, "linear", c, expected, 1, 0.0);
    run_linear(library, "linear", c, expected, 2 + random_bits() % 9, 0.0);
  }
}

template <class Library>
static void run_adam(const Library &library, size_t n) {
  const adam_settings settings = {1e-3, 0.9, 0.999, 1e-8};
  std::vector<float> p = values_of(n, GAUSSIAN), m(n), v(n), own_p = p, own_m(n), own_v(n);
  const std::string where = std::to_string(n) + " parameters";
  for (int32_t step = 1; step <= 3; step++) {
    std::vector<float> g = values_of(n, step == 2 ? TINY : GAUSSIAN);
    aq_adam_step(p.data(), g.data(), m.data(), v.data(), n, settings.learning_rate, settings.beta1, settings.beta2,
                 settings.epsilon, step, AQ_ISA_SCALAR, 1);
    check_status("Adam", where, AQ_OK,
                 library.adam(own_p.data(), g.data(), own_m.data(), own_v.data(), n, settings, step));
    ran["Adam"]++;
    if (memcmp(p.data(), own_p.data(), 4 * n) || memcmp(m.data(), own_m.data(), 4 * n) ||
        memcmp(v.data(), own_v.data(), 4 * n))
      failed("Adam", where, "differs");
  }
}

/* Sums of n doubles in another order; the maxima are exact. */
static void compare_sums(const char *kernel, const std::string &where, size_t n, const double *expected,
                         const double *actual) {
  for (int i = 0; i < AQ_STATISTICS; i++) {
    const double magnitude = i == 2 ? sqrt(expected[0] * expected[1]) : expected[i];
    check_near(kernel, where, expected[i], actual[i], i < 4 ? magnitude * ((double)n + 8) * 0x1p-52 : 0.0);
  }
}

template <class Library>
static void run_statistics(const Library &library) {
  for (size_t n : {1, 7, 8, 9, 255, 4097, 300001, 3000000}) {
    const std::vector<float> a = values_of(n, GAUSSIAN), b = values_of(n, SKEWED);
    double expected[AQ_STATISTICS], actual[AQ_STATISTICS];
    aq_error_statistics(a.data(), AQ_F32, b.data(), AQ_F32, n, expected, AQ_ISA_SCALAR, 1);
    check_status("error statistics", std::to_string(n) + " elements", AQ_OK,
                 library.statistics(a.data(), b.data(), n, actual));
    compare_sums("error statistics", std::to_string(n) + " elements", n, expected, actual);
  }
  for (size_t cols : {1, 17, 100, 512, 1030})
    for (int32_t bits : {2, 3, 4, 8}) {
      const quantize_case c = {45, cols, bits, 32, AQ_ZERO_POINT_REAL, AQ_F32, GAUSSIAN, 0};
      const std::vector<float> w = values_of(c.rows * cols, GAUSSIAN);
      packed_bytes m = guarded_matrix(c);
      aq_quantize_round(w.data(), AQ_F32, c.rows, cols, bits, 32, c.kind, at<uint32_t>(m.packed),
                                at<uint16_t>(m.scale), at<uint16_t>(m.zero), AQ_ISA_SCALAR, 1);
      double expected[AQ_STATISTICS], actual[AQ_STATISTICS];
      aq_packed_error_statistics(w.data(), AQ_F32, at<uint32_t>(m.packed), at<uint16_t>(m.scale),
                                 at<uint16_t>(m.zero), c.rows, cols, bits, 32, expected, AQ_ISA_SCALAR, 1);
      check_status("packed error statistics", described(c), AQ_OK,
                   library.packed_statistics(c, w.data(), at<uint32_t>(m.packed), at<uint16_t>(m.scale),
                                             at<uint16_t>(m.zero), actual));
      compare_sums("packed error statistics", described(c), w.size(), expected, actual);
    }
}

/* Products by both functions of shapes that fragments take and of some that they do not. x rounded to bfloat16 is off by 2^-9 of
 * itself; a tensor core's sums lose up to 2^-23 a term. */
template <class Library>
static void run_products(const Library &library, const Library &rounded, int quick) {
  for (size_t cols : {1, 31, 64, 100, 128, 160, 512, 1056})
    for (size_t group_size : {0, 16, 32, 64, 128, 256})
      for (int32_t bits : {2, 3, 4, 8})
        for (size_t tokens : {1, 2, 3, 6, 9, 17, 40, 65, 130}) {
          if (random_bits() % (quick ? 24 : 4)) continue;
          const quantize_case c = {1 + random_bits() % (tokens > 64 ? 150 : 40), cols, bits, group_size,
                                   (int32_t)(random_bits() % 3), AQ_F32, GAUSSIAN, 0};
          const std::vector<float> w = values_of(c.rows * cols, GAUSSIAN);
          packed_bytes m = guarded_matrix(c);
          aq_quantize_round(w.data(), AQ_F32, c.rows, cols, bits, c.group_size, c.kind, at<uint32_t>(m.packed),
                            at<uint16_t>(m.scale), c.kind == AQ_ZERO_POINT_SYMMETRIC ? 0 : at<uint16_t>(m.zero), AQ_ISA_SCALAR, 1);
          run_linear(library, "linear", c, m, tokens, 0.0);
          run_linear(rounded, "linear, bfloat16", c, m, tokens, 0x1p-9);
        }
}

/* `many`: the library whose products are those for many tokens. */
template <class Library>
static void run_shared_cases(const Library &library, const Library &many, int quick) {
  static const size_t columns[] = {1,   7,   8,   15,  16,  17,  31,  32,  33,  63,  64,   65,
                                   100, 127, 128, 160, 255, 256, 257, 300, 512, 1000, 1030};
  static const size_t sizes[] = {0, 16, 32, 64, 128, 256};
  static const int32_t widths[] = {2, 3, 4, 8};
  for (size_t cols : columns)
    for (size_t size : sizes)
      for (int32_t bits : widths)
        for (int32_t kind = 0; kind < 3; kind++)
          for (int32_t clip = 0; clip < 3; clip++) {
            if (quick && random_bits() % 8) continue;
            const quantize_case c = {1 + random_bits() % 37, cols, bits, size, kind, (int32_t)(random_bits() % 6),
                                     random_bits() % 12 ? (int32_t)(random_bits() % NOT_FINITE)
                                                        : (int32_t)(NOT_FINITE + random_bits() % 2),
                                     clip};
            run_quantize(library, c);
          }
  /* every pattern and type with vectors of whole chunks, and more groups than a tile holds */
  for (int32_t pattern = 0; pattern < PATTERNS; pattern++)
    for (int32_t dtype = AQ_F32; dtype <= AQ_F64; dtype++)
      run_quantize(library, {67, 512, 4, 32, AQ_ZERO_POINT_REAL, dtype, pattern, pattern % 3});
  /* rows of many segments */
  for (int32_t clip = 0; clip < 3; clip++) run_quantize(library, {3, 9000, 2, 0, AQ_ZERO_POINT_REAL, AQ_BF16, GAUSSIAN, clip});
  for (size_t n : {1, 31, 257, 5000}) run_adam(library, n);
  run_statistics(library);
  run_products(library, many, quick);
}

/* The closing lines; the program's exit status. */
static int finish(const char *place) {
  long total = 0;
  for (const auto &kernel : ran) {
    printf("%s: %ld comparisons %s\n", kernel.first.c_str(), kernel.second, place);
    total += kernel.second;
  }
  printf("seed %llu: %ld comparisons, %ld failed\n", (unsigned long long)seed, total, failures);
  return failures ? 1 : 0;
}

#endif
