/* model.c: every function that runs a model, on every instruction set of this build, against the scalar oracle (sums
 * in double), within tolerances derived from the sums; the same bytes for any number of threads, for a token alone
 * among others, and never past the end of an output. Prints what it ran; exit status 1 on a difference. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../include/arrowquant.h"

static const char *isa_names[] = {"best", "scalar", "avx2", "avx512", "neon", "simd128", "avx512_vnni", "neon_dot"};
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

static float *gaussians(size_t n, float factor) {
  float *x = malloc(n * 4 + 4);
  for (size_t i = 0; i < n; i++) x[i] = factor * gaussian();
  return x;
}

#define GUARD 16

static float *guarded(size_t n) {
  float *out = malloc((n + GUARD) * 4);
  if (!out) abort();
  memset(out, 0xa5, (n + GUARD) * 4);
  return out;
}

static void fail(const char *what, const char *where, const char *why, size_t at, double expected, double actual) {
  if (++failures <= 40)
    printf("FAILED %s, %s: %s at %zu: %.9g instead of %.9g\n", what, where, why, at, actual, expected);
}

/* |actual - expected| <= tolerance[i] (or `flat`), and nothing behind the end was touched. */
static void close_to(const char *what, const char *where, const float *expected, const float *actual, size_t n,
                     const float *tolerance, double flat) {
  cases++;
  for (size_t i = 0; i < n; i++) {
    const double e = expected[i], a = actual[i];
    if (isnan(e) ? isnan(a) : e == a || fabs(e - a) <= (tolerance ? (double)tolerance[i] : flat)) continue;
    fail(what, where, "differs", i, e, a);
    return;
  }
  for (size_t i = 0; i < GUARD * 4; i++)
    if (((const uint8_t *)(actual + n))[i] != 0xa5) {
      fail(what, where, "wrote past the end", i, 0, 0);
      return;
    }
}

static void same(const char *what, const char *where, const float *expected, const float *actual, size_t n) {
  cases++;
  for (size_t i = 0; i < n; i++)
    if (memcmp(expected + i, actual + i, 4)) {
      fail(what, where, "other bytes", i, expected[i], actual[i]);
      return;
    }
}

static void ok(const char *what, const char *where, int32_t status, int32_t expected) {
  cases++;
  if (status != expected) fail(what, where, "status", 0, expected, status);
}

static const int32_t thread_counts[] = {1, 2, 3, 8};
#define THREADS (sizeof thread_counts / sizeof *thread_counts)

/* Linear: |error| <= (k + 8) 2^-24 sum |x w|, once for the sum and once for each rounding of a weight and the end. */
static void linear_case(int32_t isa, size_t tokens, size_t rows, size_t cols, int32_t dtype, int32_t bits,
                        size_t group_size, int symmetric, int with_bias) {
  char where[160];
  snprintf(where, sizeof where, "%s, %zux%zux%zu, %s %d, group %zu%s%s", isa_names[isa], tokens, rows, cols,
           bits ? "bits" : "dtype", bits ? bits : dtype, group_size, symmetric ? ", symmetric" : "",
           with_bias ? ", bias" : "");
  const size_t n = tokens * rows;
  float *x = gaussians(tokens * cols, 1), *w = gaussians(rows * cols, 0.1f), *bias = gaussians(rows, 1);
  float *dense = malloc(rows * cols * 4 + 4), *tolerance = malloc(n * 4 + 4);
  uint16_t *narrow = malloc(rows * cols * 2 + 2);
  uint64_t words = 0, groups = 0;
  if (bits) {
    aq_packed_words(cols, bits, &words);
    aq_group_count(cols, group_size, &groups);
  }
  uint32_t *packed = malloc(rows * words * 4 + 4);
  uint16_t *scale = malloc(rows * groups * 2 + 2), *zero = malloc(rows * groups * 2 + 2);
  if (bits) {
    aq_quantize_round(w, AQ_F32, rows, cols, bits, group_size, symmetric ? AQ_ZERO_POINT_SYMMETRIC : AQ_ZERO_POINT_REAL,
                      packed, scale, symmetric ? 0 : zero, AQ_ISA_SCALAR, 1);
    aq_dequantize(packed, scale, symmetric ? 0 : zero, rows, cols, bits, group_size, dense, AQ_F32, AQ_ISA_SCALAR, 1);
  } else {
    aq_convert(w, AQ_F32, dtype == AQ_F32 ? (void *)dense : narrow, dtype, rows * cols, AQ_ISA_SCALAR, 1);
    if (dtype != AQ_F32) aq_convert(narrow, dtype, dense, AQ_F32, rows * cols, AQ_ISA_SCALAR, 1);
  }
  for (size_t t = 0; t < tokens; t++)
    for (size_t r = 0; r < rows; r++) {
      double sum = with_bias ? fabs(bias[r]) : 0;
      for (size_t k = 0; k < cols; k++) sum += fabs((double)x[t * cols + k] * dense[r * cols + k]);
      tolerance[t * rows + r] = (float)(((double)cols + 8) * 0x1p-24 * sum);
    }
  float *out[THREADS + 1], *expected = guarded(n);
  for (size_t k = 0; k <= THREADS; k++) {
    float *to = k < THREADS ? (out[k] = guarded(n)) : expected;
    const int32_t use = k < THREADS ? isa : AQ_ISA_SCALAR, share = k < THREADS ? thread_counts[k] : 1;
    ok("linear", where,
       bits ? aq_linear_packed(x, tokens, packed, scale, symmetric ? 0 : zero, with_bias ? bias : 0, rows, cols, bits,
                               group_size, to, use, share)
            : aq_linear(x, tokens, dtype == AQ_F32 ? (void *)dense : narrow, dtype, with_bias ? bias : 0, rows, cols,
                        to, use, share),
       AQ_OK);
  }
  for (size_t k = 0; k < THREADS; k++) {
    close_to("linear", where, expected, out[k], n, tolerance, 0);
    if (k) same("linear, threads", where, out[0], out[k], n);
  }
  if (tokens > 3) { /* the tokens from the second on, alone */
    float *some = guarded(n - rows);
    if (bits)
      aq_linear_packed(x + cols, tokens - 1, packed, scale, symmetric ? 0 : zero, with_bias ? bias : 0, rows, cols, bits,
                       group_size, some, isa, 1);
    else
      aq_linear(x + cols, tokens - 1, dtype == AQ_F32 ? (void *)dense : narrow, dtype, with_bias ? bias : 0, rows, cols,
                some, isa, 1);
    same("linear, fewer tokens", where, out[0] + rows, some, n - rows);
    free(some);
  }
  for (size_t k = 0; k < THREADS; k++) free(out[k]);
  free(expected);
  free(x);
  free(w);
  free(bias);
  free(dense);
  free(narrow);
  free(tolerance);
  free(packed);
  free(scale);
  free(zero);
}

enum { RMS_NORM, RMS_NORM_PLAIN, LAYER_NORM, LAYER_NORM_PLAIN, SOFTMAX, ROW_FUNCTIONS };

static int32_t call_rows(int function, const float *x, size_t rows, size_t cols, const float *weight, const float *bias,
                         float *out, int32_t isa, int32_t threads) {
  switch (function) {
    case RMS_NORM: return aq_rms_norm(x, rows, cols, weight, 1e-6f, out, isa, threads);
    case RMS_NORM_PLAIN: return aq_rms_norm(x, rows, cols, 0, 1e-6f, out, isa, threads);
    case LAYER_NORM: return aq_layer_norm(x, rows, cols, weight, bias, 1e-5f, out, isa, threads);
    case LAYER_NORM_PLAIN: return aq_layer_norm(x, rows, cols, 0, 0, 1e-5f, out, isa, threads);
    default: return aq_softmax(x, rows, cols, out, isa, threads);
  }
}

static void rows_case(int32_t isa, size_t rows, size_t cols, int function) {
  char where[80];
  snprintf(where, sizeof where, "%s, %zux%zu, function %d", isa_names[isa], rows, cols, function);
  const size_t n = rows * cols;
  float *x = gaussians(n, 3), *weight = gaussians(cols, 1), *bias = gaussians(cols, 1);
  if (function == LAYER_NORM)
    for (size_t i = 0; i < n; i++) x[i] += 10;
  float *expected = guarded(n), *tolerance = malloc(n * 4 + 4), *first = 0;
  ok("rows", where, call_rows(function, x, rows, cols, weight, bias, expected, AQ_ISA_SCALAR, 1), AQ_OK);
  for (size_t i = 0; i < n; i++) {
    /* mean and variance lose (cols / lanes + lanes) roundings of 2^-24 at most; the shift by 10 costs its multiple */
    const double eps = ((double)cols / 4 + 16) * 0x1p-24;
    double magnitude = fabs(expected[i]);
    if (function == LAYER_NORM) magnitude = magnitude + (fabs(bias[i % cols]) + 40.0 * fabs(weight[i % cols]));
    if (function == LAYER_NORM_PLAIN) magnitude += 3;
    if (function == LAYER_NORM && cols == 1) magnitude *= 400; /* 0 times 1 / sqrt(epsilon) */
    if (function == SOFTMAX) magnitude *= 4;
    tolerance[i] = (float)(eps * magnitude);
  }
  for (size_t k = 0; k < THREADS; k++) {
    float *out = guarded(n);
    ok("rows", where, call_rows(function, x, rows, cols, weight, bias, out, isa, thread_counts[k]), AQ_OK);
    close_to("rows", where, expected, out, n, tolerance, 0);
    if (k)
      same("rows, threads", where, first, out, n);
    else
      first = out;
    if (k) free(out);
  }
  ok("rows", where, call_rows(function, x, rows, cols, weight, bias, x, isa, 1), AQ_OK);
  same("rows in place", where, first, x, n);
  free(first);
  free(x);
  free(weight);
  free(bias);
  free(expected);
  free(tolerance);
}

enum { SILU, GELU_TANH, SILU_MULTIPLY, ADD, ELEMENT_FUNCTIONS };

static int32_t call_elements(int function, const float *a, const float *b, size_t n, float *out, int32_t isa,
                             int32_t threads) {
  switch (function) {
    case SILU: return aq_silu(a, n, out, isa, threads);
    case GELU_TANH: return aq_gelu_tanh(a, n, out, isa, threads);
    case SILU_MULTIPLY: return aq_silu_multiply(a, b, n, out, isa, threads);
    default: return aq_add(a, b, n, out, isa, threads);
  }
}

static void elements_case(int32_t isa, size_t n, int function) {
  char where[80];
  snprintf(where, sizeof where, "%s, %zu elements, function %d", isa_names[isa], n, function);
  float *a = gaussians(n, 4), *b = gaussians(n, 1);
  static const float special[] = {0.0f, -0.0f, 88.0f, -88.0f, 200.0f, -200.0f, 1e-30f, 1e30f, -1e30f, NAN, INFINITY};
  for (size_t i = 0; i < n && n > 30 && i < sizeof special / sizeof *special; i++) a[i * 2] = special[i];
  float *expected = guarded(n), *tolerance = malloc(n * 4 + 4), *first = 0;
  ok("elements", where, call_elements(function, a, b, n, expected, AQ_ISA_SCALAR, 1), AQ_OK);
  /* exp 2^-22, division, products, and |u| 2^-24 more in exp's argument; 2^-112 where exp is flushed to zero */
  for (size_t i = 0; i < n; i++) {
    const double u = function == GELU_TANH ? fmin(1.6 * fabs(a[i]) * (1 + 0.045 * (double)a[i] * a[i]), 90) : 0;
    tolerance[i] = (float)(fabs(expected[i]) * (8 + 6 * u) * 0x1p-24 + 0x1p-112 * (1 + fabs(b[i])));
  }
  for (size_t k = 0; k < THREADS; k++) {
    float *out = guarded(n);
    ok("elements", where, call_elements(function, a, b, n, out, isa, thread_counts[k]), AQ_OK);
    close_to("elements", where, expected, out, n, tolerance, 0);
    if (k)
      same("elements, threads", where, first, out, n);
    else
      first = out;
    if (k) free(out);
  }
  ok("elements", where, call_elements(function, a, b, n, a, isa, 1), AQ_OK);
  same("elements in place", where, first, a, n);
  free(first);
  free(a);
  free(b);
  free(expected);
  free(tolerance);
}

static void modulation_case(int32_t isa, size_t batch, size_t tokens, size_t cols) {
  char where[80];
  snprintf(where, sizeof where, "%s, %zux%zux%zu", isa_names[isa], batch, tokens, cols);
  const size_t n = batch * tokens * cols, stride = 3 * cols + 1;
  float *x = gaussians(n, 1), *r = gaussians(n, 1), *chunks = gaussians(batch * stride, 1);
  for (int gate = 0; gate < 2; gate++) {
    float *expected = guarded(n), *first = 0;
    if (gate)
      aq_gate_add(r, chunks, x, stride, batch, tokens, cols, expected, AQ_ISA_SCALAR, 1);
    else
      aq_modulate(x, chunks, chunks + cols, stride, batch, tokens, cols, expected, AQ_ISA_SCALAR, 1);
    for (size_t k = 0; k < THREADS; k++) {
      float *out = guarded(n);
      ok("modulation", where,
         gate ? aq_gate_add(r, chunks, x, stride, batch, tokens, cols, out, isa, thread_counts[k])
              : aq_modulate(x, chunks, chunks + cols, stride, batch, tokens, cols, out, isa, thread_counts[k]),
         AQ_OK);
      close_to(gate ? "gate_add" : "modulate", where, expected, out, n, 0, 60 * 0x1p-24);
      if (k)
        same("modulation, threads", where, first, out, n);
      else
        first = out;
      if (k) free(out);
    }
    free(first);
    free(expected);
  }
  free(x);
  free(r);
  free(chunks);
}

static void attention_case(int32_t isa, size_t batch, size_t tokens, size_t heads, size_t kv_heads, size_t size,
                           int masked) {
  char where[120];
  snprintf(where, sizeof where, "%s, %zu items, %zu tokens, %zu of %zu heads of %zu%s", isa_names[isa], batch, tokens,
           heads, kv_heads, size, masked ? ", masked" : "");
  const size_t n = batch * tokens * heads * size, m = batch * tokens * kv_heads * size;
  float *q = gaussians(n, 1), *k = gaussians(m, 1), *v = gaussians(m, 1);
  uint8_t *mask = malloc(batch * tokens);
  for (size_t i = 0; i < batch * tokens; i++) mask[i] = random_bits() % 3 != 0;
  if (masked == 2) memset(mask, 0, tokens); /* an item without keys */
  if (masked == 3)                          /* the first keys switched off, more than a block */
    for (size_t i = 0; i < batch * tokens; i++) mask[i] = i % tokens > 300;
  const float scale = 1.0f / sqrtf((float)size);
  float *expected = guarded(n), *first = 0;
  aq_attention(q, k, v, masked ? mask : 0, batch, tokens, heads, kv_heads, size, scale, expected, AQ_ISA_SCALAR, 1);
  for (size_t i = 0; i < THREADS; i++) {
    float *out = guarded(n);
    ok("attention", where,
       aq_attention(q, k, v, masked ? mask : 0, batch, tokens, heads, kv_heads, size, scale, out, isa, thread_counts[i]),
       AQ_OK);
    /* a score's error, 2 size 2^-24 sum |q k| scale, moves each p by as much; |v| below 5 */
    close_to("attention", where, expected, out, n, 0, 5 * ((double)size + (double)tokens / 4 + 32) * 0x1p-23);
    if (i)
      same("attention, threads", where, first, out, n);
    else
      first = out;
    if (i) free(out);
  }
  free(first);
  free(expected);
  free(q);
  free(k);
  free(v);
  free(mask);
}

static void rotary_case(int32_t isa, size_t rows, size_t heads, size_t size, double theta) {
  char where[80];
  snprintf(where, sizeof where, "%s, %zu rows, %zu heads of %zu, theta %g", isa_names[isa], rows, heads, size, theta);
  const size_t n = rows * heads * size;
  float *x = gaussians(n, 1), *expected = guarded(n), *reference = guarded(n), *first = 0;
  int32_t *positions = malloc(rows * 4);
  for (size_t i = 0; i < rows; i++) positions[i] = (int32_t)(random_bits() % (i % 2 ? 2097152 : 100)) - (i % 4 == 1 ? 1048575 : 0);
  for (size_t i = 0; i < rows; i++)
    if (positions[i] > 1048576) positions[i] = 1048576;
  memcpy(expected, x, n * 4);
  aq_rotary(expected, positions, rows, heads, size, theta, AQ_ISA_SCALAR, 1);
  for (size_t row = 0; row < rows; row++)
    for (size_t h = 0; h < heads; h++)
      for (size_t i = 0; i < size / 2; i++) {
        const double angle = positions[row] * pow(theta, -2.0 * (double)i / (double)size);
        const size_t a = (row * heads + h) * size + i, b = a + size / 2;
        reference[a] = (float)(x[a] * cos(angle) - x[b] * sin(angle));
        reference[b] = (float)(x[b] * cos(angle) + x[a] * sin(angle));
      }
  close_to("rotary oracle against the C library", where, reference, expected, n, 0, 5 * 0x1p-23);
  for (size_t k = 0; k < THREADS; k++) {
    float *out = guarded(n);
    memcpy(out, x, n * 4);
    ok("rotary", where, aq_rotary(out, positions, rows, heads, size, theta, isa, thread_counts[k]), AQ_OK);
    close_to("rotary", where, expected, out, n, 0, 6 * 0x1p-22);
    if (k)
      same("rotary, threads", where, first, out, n);
    else
      first = out;
    if (k) free(out);
  }
  free(first);
  free(x);
  free(expected);
  free(reference);
  free(positions);
}

/* 8-bit activations: the scalar kernel against sums in double, every instruction set against the scalar one to the bit. */
static void int8_case(int32_t isa, size_t tokens, size_t rows, size_t cols, int32_t bits, size_t group_size,
                      int symmetric, int with_bias, int32_t x_bits, int extreme) {
  char where[160];
  snprintf(where, sizeof where, "%s, %zux%zux%zu, %d bits, group %zu%s%s, x %d bits%s", isa_names[isa], tokens, rows, cols,
           bits, group_size, symmetric ? ", symmetric" : "", with_bias ? ", bias" : "", x_bits,
           extreme ? ", extreme" : "");
  const size_t n = tokens * rows;
  float *x = gaussians(tokens * cols, 1), *bias = gaussians(rows, 1);
  uint64_t words = 0, groups = 0;
  aq_packed_words(cols, bits, &words);
  aq_group_count(cols, group_size, &groups);
  uint32_t *packed = malloc(rows * words * 4);
  uint16_t *scale = malloc(rows * groups * 2), *zero = malloc(rows * groups * 2);
  if (extreme) { /* every code the largest, on both sides, and the bits behind a row's end set */
    memset(packed, 0xff, rows * words * 4);
    for (size_t i = 0; i < rows * groups; i++) scale[i] = 0x2c00, zero[i] = 0x5800 + (uint16_t)(i % 9); /* 1/16, 128 + */
    for (size_t i = 0; i < tokens * cols; i++) x[i] = i / cols % 2 ? 7.0f : -7.0f;
  } else {
    float *w = gaussians(rows * cols, 0.1f);
    aq_quantize_round(w, AQ_F32, rows, cols, bits, group_size, symmetric ? AQ_ZERO_POINT_SYMMETRIC : AQ_ZERO_POINT_REAL,
                      packed, scale, symmetric ? 0 : zero, AQ_ISA_SCALAR, 1);
    free(w);
  }
  if (symmetric) free(zero), zero = 0;
  const int32_t kind = extreme || random_bits() % 4 == 0 ? AQ_ACTIVATIONS_STATIC : AQ_ACTIVATIONS_PER_TOKEN;
  uint8_t *codes = (uint8_t *)guarded((tokens * cols + 3) / 4), *codes2 = (uint8_t *)guarded((tokens * cols + 3) / 4);
  float *x_scale = guarded(tokens), *x_scale2 = guarded(tokens);
  int32_t *x_zero = (int32_t *)guarded(tokens), *x_zero2 = (int32_t *)guarded(tokens);
  for (size_t t = 0; t < tokens; t++) {
    x_scale[t] = x_scale2[t] = 4.0f / (float)(1 << x_bits);
    x_zero[t] = x_zero2[t] = extreme ? (t % 2 ? 0 : (1 << x_bits) - 1) : 1 << (x_bits - 1);
  }
  ok("quantize_activations", where,
     aq_quantize_activations(x, tokens, cols, x_bits, kind, codes, x_scale, x_zero, AQ_ISA_SCALAR, 1), AQ_OK);
  for (size_t i = 0; i < tokens * cols && kind == AQ_ACTIVATIONS_PER_TOKEN; i++) {
    const size_t t = i / cols;
    const double back = (double)x_scale[t] * (codes[i] - x_zero[t]);
    if (fabs(back - x[i]) > 0.5001 * x_scale[t] || codes[i] >> x_bits) {
      fail("quantize_activations", where, "half a step", i, x[i], back);
      break;
    }
  }
  for (size_t k = 0; k < THREADS; k++) {
    ok("quantize_activations", where,
       aq_quantize_activations(x, tokens, cols, x_bits, kind, codes2, x_scale2, x_zero2, isa, thread_counts[k]), AQ_OK);
    same("codes", where, (float *)codes, (float *)codes2, (tokens * cols + 3) / 4 + GUARD);
    same("scales", where, x_scale, x_scale2, tokens + GUARD);
    same("zero points", where, (float *)x_zero, (float *)x_zero2, tokens + GUARD);
  }
  float *expected = guarded(n), *tolerance = malloc(n * 4), *reference = malloc(n * 4), *part = guarded(n);
  for (size_t t = 0; t < tokens; t++)
    for (size_t r = 0; r < rows; r++) {
      double sum = 0, magnitude = 0;
      const uint8_t *bytes = (const uint8_t *)(packed + r * words);
      for (size_t k = 0; k < cols; k++) {
        const size_t group = r * groups + (group_size ? k / group_size : 0), at = k * (size_t)bits;
        uint32_t window = bytes[at / 8];
        if (at % 8 + (size_t)bits > 8) window |= (uint32_t)bytes[at / 8 + 1] << 8;
        const int code = (int)(window >> at % 8 & ((1u << bits) - 1));
        float grid[2];
        aq_convert(scale + group, AQ_F16, grid, AQ_F32, 1, AQ_ISA_SCALAR, 1);
        grid[1] = (float)(1 << (bits - 1));
        if (zero) aq_convert(zero + group, AQ_F16, grid + 1, AQ_F32, 1, AQ_ISA_SCALAR, 1);
        const double a = (double)x_scale[t] * (codes[t * cols + k] - x_zero[t]);
        sum += a * grid[0] * ((double)code - grid[1]);
        magnitude += fabs(a * grid[0]) * (code + fabs(grid[1]));
      }
      reference[t * rows + r] = (float)(sum + (with_bias ? bias[r] : 0));
      tolerance[t * rows + r] = (float)(((double)cols / 16 + 8) * 0x1p-24 * (magnitude + 1));
    }
  const float *b = with_bias ? bias : 0;
  ok("linear_packed_int8", where,
     aq_linear_packed_int8(codes, x_scale, x_zero, tokens, packed, scale, zero, b, rows, cols, bits, group_size, expected,
                           AQ_ISA_SCALAR, 1),
     AQ_OK);
  close_to("int8 oracle against doubles", where, reference, expected, n, tolerance, 0);
  for (size_t k = 0; k < THREADS; k++) {
    float *out = guarded(n);
    ok("linear_packed_int8", where,
       aq_linear_packed_int8(codes, x_scale, x_zero, tokens, packed, scale, zero, b, rows, cols, bits, group_size, out,
                             isa, thread_counts[k]),
       AQ_OK);
    same("linear_packed_int8", where, expected, out, n + GUARD);
    free(out);
  }
  aq_linear_packed_int8(codes, x_scale, x_zero, 1, packed, scale, zero, b, rows, cols, bits, group_size, part, isa, 1);
  same("linear_packed_int8, a token alone", where, expected, part, rows);
  free(part);
  free(expected);
  free(reference);
  free(tolerance);
  free(codes);
  free(codes2);
  free(x_scale);
  free(x_scale2);
  free(x_zero);
  free(x_zero2);
  free(packed);
  free(scale);
  free(zero);
  free(x);
  free(bias);
}

/* Activations at the ends of what float32 holds, and what is refused. */
static void activations(int32_t isa) {
  const char *where = isa_names[isa];
  float x[35], scale[1];
  uint8_t codes[35], expected[35];
  int32_t zero[1];
  static const float ends[][2] = {{3e38f, -3e38f}, {1e-44f, 0}, {-1e-40f, 1e-40f}, {0, -0.0f}, {5, 3}, {-2, -7}};
  for (size_t e = 0; e < sizeof ends / sizeof *ends; e++)
    for (int32_t bits = 2; bits <= 8; bits++) {
      for (int i = 0; i < 35; i++) x[i] = ends[e][i % 2];
      ok("ends", where, aq_quantize_activations(x, 1, 35, bits, AQ_ACTIVATIONS_PER_TOKEN, expected, scale, zero, AQ_ISA_SCALAR, 1), AQ_OK);
      ok("ends", where, aq_quantize_activations(x, 1, 35, bits, AQ_ACTIVATIONS_PER_TOKEN, codes, scale, zero, isa, 1), AQ_OK);
      cases++;
      for (int i = 0; i < 35; i++) {
        const double back = (double)scale[0] * (codes[i] - zero[0]);
        if (codes[i] != expected[i] || !(fabs(back - (double)x[i]) <= 0.50001 * (double)scale[0])) {
          fail("ends", where, "half a step", e, x[i], back);
          break;
        }
      }
    }
  scale[0] = 1e-30f, zero[0] = 3; /* far beyond a static range */
  for (int i = 0; i < 35; i++) x[i] = i % 2 ? 3e38f : -3e38f;
  ok("clipped", where, aq_quantize_activations(x, 1, 35, 4, AQ_ACTIVATIONS_STATIC, codes, scale, zero, isa, 1), AQ_OK);
  ok("clipped codes", where, codes[0] == 0 && codes[1] == 15 && codes[33] == 15 && codes[34] == 0, 1);
  for (int at = 0; at < 35; at += 17)
    for (int kind = 0; kind < 2; kind++)
      for (int bad = 0; bad < 2; bad++) {
        for (int i = 0; i < 35; i++) x[i] = 1;
        x[at] = bad ? NAN : -INFINITY;
        ok("not finite", where, aq_quantize_activations(x, 1, 35, 8, kind, codes, scale, zero, isa, 1), AQ_E_NONFINITE);
      }
  const uint32_t packed[1] = {0};
  const uint16_t half[1] = {0};
  float out[1];
  zero[0] = 16;
  ok("zero point", where, aq_quantize_activations(x, 1, 35, 4, AQ_ACTIVATIONS_STATIC, codes, scale, zero, isa, 1), AQ_E_VALUE);
  zero[0] = 256;
  ok("zero point", where, aq_linear_packed_int8(codes, scale, zero, 1, packed, half, 0, 0, 1, 1, 4, 0, out, isa, 1), AQ_E_VALUE);
  scale[0] = 0, zero[0] = 0;
  ok("scale", where, aq_quantize_activations(x, 1, 35, 4, AQ_ACTIVATIONS_STATIC, codes, scale, zero, isa, 1), AQ_E_VALUE);
  ok("width", where, aq_quantize_activations(x, 1, 35, 9, 1, codes, scale, zero, isa, 1), AQ_E_ARGUMENT);
  ok("kind", where, aq_quantize_activations(x, 1, 35, 8, 2, codes, scale, zero, isa, 1), AQ_E_ARGUMENT);
  ok("width", where, aq_linear_packed_int8(codes, scale, zero, 1, packed, half, 0, 0, 1, 1, 5, 0, out, isa, 1), AQ_E_ARGUMENT);
  ok("group", where, aq_linear_packed_int8(codes, scale, zero, 1, packed, half, 0, 0, 1, 1, 4, 7, out, isa, 1), AQ_E_SHAPE);
  ok("null", where, aq_linear_packed_int8(0, scale, zero, 1, packed, half, 0, 0, 1, 1, 4, 0, out, isa, 1), AQ_E_ARGUMENT);
  ok("isa", where, aq_linear_packed_int8(codes, scale, zero, 1, packed, half, 0, 0, 1, 1, 4, 0, out, 99, 1), AQ_E_ISA);
  ok("nothing", where, aq_quantize_activations(0, 0, 35, 8, 1, 0, 0, 0, isa, 1), AQ_OK);
  ok("nothing", where, aq_linear_packed_int8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 4, 0, 0, isa, 1), AQ_OK);
  const float bias[1] = {2.5f};
  ok("no columns", where, aq_linear_packed_int8(0, scale, zero, 1, 0, 0, 0, bias, 1, 0, 4, 0, out, isa, 1), AQ_OK);
  same("no columns: the bias", where, bias, out, 1);
}

static void int8_cases(int32_t isa, int quick) {
  static const size_t tokens[] = {1, 2, 3, 5, 12, 13, 33, 65}, rows[] = {1, 3, 17, 32, 33, 130};
  static const size_t cols[] = {1, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 256, 257, 300, 600};
  static const size_t group_sizes[] = {0, 16, 32, 64, 128, 256};
  static const int32_t widths[] = {2, 3, 4, 8};
  for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++)
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
      for (size_t c = 0; c < sizeof cols / sizeof *cols; c++)
        for (size_t b = 0; b < 4; b++) {
          if (random_bits() % (quick ? 32 : 4)) continue;
          int8_case(isa, tokens[t], rows[r], cols[c], widths[b], group_sizes[random_bits() % 6], random_bits() % 3 == 0,
                    random_bits() % 2, random_bits() % 2 ? 8 : 2 + (int32_t)(random_bits() % 7), random_bits() % 6 == 0);
        }
  for (size_t b = 0; b < 4; b++)
    for (size_t g = 0; g < 6; g++) {
      int8_case(isa, 1, 5, 4096 + 7 * g, widths[b], group_sizes[g], g % 2, 1, 8, 0);
      int8_case(isa, 3, 5, 333, widths[b], group_sizes[g], 0, 1, 4, 0);
      int8_case(isa, 1, 6, 4500, widths[b], group_sizes[g], 0, 0, 8, 1);
      int8_case(isa, 4, 33, 600, widths[b], group_sizes[g], 0, 0, 8, 1);
    }
  int8_case(isa, 3, 2, 70000, 8, 0, 0, 0, 8, 1); /* the row's sum of products is past 2^31 */
  int8_case(isa, 1, 2, 70000, 8, 0, 0, 0, 8, 1);
  int8_case(isa, 64, 300, 512, 4, 64, 0, 1, 8, 0);
  activations(isa);
}

/* Patches against the definition, index by index; timesteps against the C library. One version for every set. */
static void images(void) {
  static const size_t shapes[][5] = {{1, 1, 1, 1, 1}, {2, 3, 8, 4, 2}, {3, 2, 9, 6, 3}, {5, 4, 64, 64, 2}, {1, 5, 7, 7, 7}};
  for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
    const size_t batch = shapes[s][0], channels = shapes[s][1], height = shapes[s][2], width = shapes[s][3];
    const size_t patch = shapes[s][4], n = batch * channels * height * width;
    float *x = gaussians(n, 1);
    for (size_t k = 0; k < THREADS; k++) {
      float *tokens = guarded(n), *wanted = guarded(n), *back = guarded(n), *image = guarded(n);
      ok("patchify", "", aq_patchify(x, batch, channels, height, width, patch, tokens, thread_counts[k]), AQ_OK);
      ok("unpatchify", "", aq_unpatchify(x, batch, channels, height, width, patch, image, thread_counts[k]), AQ_OK);
      size_t at = 0;
      for (size_t b = 0; b < batch; b++)
        for (size_t y = 0; y < height / patch; y++)
          for (size_t z = 0; z < width / patch; z++)
            for (size_t i = 0; i < channels * patch * patch; i++, at++) {
              const size_t p = i / patch % patch, q = i % patch, c = i / patch / patch;
              wanted[at] = x[((b * channels + c) * height + y * patch + p) * width + z * patch + q];
              const size_t up = i / channels / patch, uq = i / channels % patch, uc = i % channels;
              back[((b * channels + uc) * height + y * patch + up) * width + z * patch + uq] = x[at];
            }
      same("patchify", "", wanted, tokens, n + GUARD);
      same("unpatchify", "", back, image, n + GUARD);
      free(tokens);
      free(wanted);
      free(back);
      free(image);
    }
    free(x);
  }
  float out[9], t[2] = {0, 999.5f};
  ok("no images", "", aq_patchify(0, 0, 3, 4, 4, 2, 0, 1), AQ_OK);
  ok("patch", "", aq_patchify(t, 1, 1, 2, 1, 2, out, 1), AQ_E_SHAPE);
  ok("patch", "", aq_unpatchify(t, 1, 1, 2, 1, 0, out, 1), AQ_E_SHAPE);
  ok("null", "", aq_unpatchify(0, 1, 1, 2, 1, 1, out, 1), AQ_E_ARGUMENT);
  ok("images overflow", "", aq_patchify(t, SIZE_MAX / 4, 8, 2, 1, 1, out, 1), AQ_E_SHAPE);

  enum { N = 7, MOST = 257 };
  float tolerance[N * MOST];
  const float steps[N] = {0, 1, 7.5f, 500, 999, -3, 1048576};
  for (size_t channels = 1; channels <= MOST; channels += channels < 4 ? 1 : 63)
    for (int flip = 0; flip < 2; flip++)
      for (int shift = 0; shift < 2; shift++) {
        if (channels / 2 == 1 && shift) continue;
        float *embedded = guarded(N * channels), *expected = guarded(N * channels);
        const size_t half = channels / 2;
        ok("timesteps", "", aq_timestep_embedding(steps, N, channels, flip, shift, 10000, embedded), AQ_OK);
        for (size_t i = 0; i < N * channels; i++) {
          const size_t at = i % channels % (half ? half : 1);
          const float exponent = (float)-log(10000.0) * (float)at;
          const float frequency = half ? (float)exp((double)(exponent / (float)((double)half - shift))) : 0;
          const float angle = steps[i / channels] * frequency;
          const int second = i % channels >= half;
          expected[i] = i % channels == 2 * half ? 0 : (float)(second != flip ? cos((double)angle) : sin((double)angle));
        }
        /* exp may round a frequency the other way, and the angle with it: 2^-24 of the angle each */
        for (size_t i = 0; i < N * channels; i++)
          tolerance[i] = (float)((fabs((double)steps[i / channels]) + 1) * 0x1p-22);
        close_to("timesteps", "", expected, embedded, N * channels, tolerance, 0);
        free(embedded);
        free(expected);
      }
  ok("timestep", "", aq_timestep_embedding((float[]){NAN}, 1, 4, 1, 1, 10000, out), AQ_E_VALUE);
  ok("timestep", "", aq_timestep_embedding((float[]){2e6f}, 1, 4, 1, 1, 10000, out), AQ_E_VALUE);
  ok("shift", "", aq_timestep_embedding(t, 1, 4, 1, 2, 10000, out), AQ_E_VALUE);
  ok("period", "", aq_timestep_embedding(t, 1, 4, 1, 1, 0.5, out), AQ_E_VALUE);
  ok("no timesteps", "", aq_timestep_embedding(0, 0, 4, 1, 1, 10000, 0), AQ_OK);
}

static void nothing_and_nonsense(int32_t isa) {
  const char *where = isa_names[isa];
  float x[4] = {1, 2, 3, 4}, out[4];
  int32_t far = AQ_MAX_POSITION + 1;
  ok("no tokens", where, aq_linear(0, 0, 0, AQ_F32, 0, 4, 4, 0, isa, 1), AQ_OK);
  ok("no rows", where, aq_linear_packed(0, 4, 0, 0, 0, 0, 0, 4, 2, 64, 0, isa, 1), AQ_OK);
  ok("no columns", where, aq_linear(0, 1, 0, AQ_F32, x, 4, 0, out, isa, 1), AQ_OK);
  same("no columns: the bias", where, x, out, 4);
  ok("no elements", where, aq_silu(0, 0, 0, isa, 1), AQ_OK);
  ok("no rows", where, aq_softmax(0, 0, 5, 0, isa, 1), AQ_OK);
  ok("no batch", where, aq_attention(0, 0, 0, 0, 0, 4, 2, 1, 4, 1, 0, isa, 1), AQ_OK);
  ok("dtype", where, aq_linear(x, 1, x, AQ_F64, 0, 1, 4, out, isa, 1), AQ_E_ARGUMENT);
  ok("null", where, aq_add(x, 0, 4, out, isa, 1), AQ_E_ARGUMENT);
  ok("heads", where, aq_attention(x, x, x, 0, 1, 1, 2, 3, 1, 1, out, isa, 1), AQ_E_SHAPE);
  ok("overflow", where, aq_linear(x, 2, x, AQ_F32, 0, SIZE_MAX / 8, SIZE_MAX / 8, out, isa, 1), AQ_E_SHAPE);
  ok("odd head", where, aq_rotary(x, &far, 1, 1, 3, 1e4, isa, 1), AQ_E_SHAPE);
  ok("position", where, aq_rotary(x, &far, 1, 1, 4, 1e4, isa, 1), AQ_E_VALUE);
  ok("isa", where, aq_silu(x, 4, out, 99, 1), AQ_E_ISA);
}

int main(int argc, char **argv) {
  const uint64_t seed = argc > 1 ? strtoull(argv[1], 0, 10) : 1;
  const int quick = argc > 2 && strcmp(argv[2], "quick") == 0;
  state = seed;
  static const size_t tokens[] = {1, 2, 3, 5, 14, 17, 33, 100}, rows[] = {1, 3, 17, 32, 33, 100};
  static const size_t cols[] = {1, 3, 5, 17, 33, 64, 100, 256, 300, 600};
  static const size_t lengths[] = {1, 3, 5, 17, 33, 100, 1023, 1025, 600001};
  static const size_t group_sizes[] = {0, 16, 32, 64, 128, 256};
  static const int32_t widths[] = {2, 3, 4, 8};
  int ran = 0;
  images();
  for (int32_t isa = AQ_ISA_AVX2; isa <= AQ_ISA_NEON_DOT; isa++) {
    if (!aq_isa_supported(isa)) {
      printf("skipped %s: not in this build or not on this processor\n", isa_names[isa]);
      continue;
    }
    ran++;
    const long before = cases;
    int8_cases(isa, quick);
    if (isa > AQ_ISA_SIMD128) { /* the rest is the code of another set's */
      printf("%s: %ld comparisons with scalar, 8-bit activations\n", isa_names[isa], cases - before);
      continue;
    }
    for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++)
      for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
        for (size_t c = 0; c < sizeof cols / sizeof *cols; c++) {
          if (quick && random_bits() % 8) continue;
          linear_case(isa, tokens[t], rows[r], cols[c], (int32_t)(random_bits() % 3), 0, 0, 0, random_bits() % 2);
          linear_case(isa, tokens[t], rows[r], cols[c], 0, widths[random_bits() % 4], group_sizes[random_bits() % 6],
                      random_bits() % 3 == 0, random_bits() % 2);
        }
    for (size_t b = 0; b < 4; b++)
      for (size_t g = 0; g < 6; g++)
        for (size_t c = 0; c < 12; c++)
          linear_case(isa, 1, 5, (size_t[]){1, 15, 16, 17, 31, 32, 48, 80, 176, 333, 4096, 4500}[c], 0, widths[b],
                      group_sizes[g], random_bits() % 2, random_bits() % 2);
    linear_case(isa, 130, 192, 768, AQ_F32, 0, 0, 0, 1);
    linear_case(isa, 70, 97, 1024, AQ_BF16, 0, 0, 0, 1);
    linear_case(isa, 1, 300, 5000, AQ_F16, 0, 0, 0, 1);
    for (size_t r = 0; r < 5; r++)
      for (size_t c = 0; c < 10; c++)
        for (int f = 0; f < ROW_FUNCTIONS; f++) rows_case(isa, (size_t[]){1, 3, 5, 33, 300}[r], cols[c], f);
    for (int f = 0; f < ROW_FUNCTIONS; f++) rows_case(isa, 3000, 300, f);
    modulation_case(isa, 3, 300, 600);
    rotary_case(isa, 2000, 4, 72, 1e4);
    for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
      for (int f = 0; f < ELEMENT_FUNCTIONS; f++) elements_case(isa, lengths[l], f);
    for (size_t c = 0; c < 10; c++) modulation_case(isa, 1 + c % 3, 1 + 11 * (c % 5), cols[c]);
    for (size_t t = 0; t < 8; t++)
      for (size_t d = 0; d < 7; d++) {
        const size_t kv = 1 + random_bits() % 2;
        attention_case(isa, 1 + random_bits() % 3, tokens[t], kv * (1 + random_bits() % 3), kv,
                       (size_t[]){1, 3, 8, 16, 32, 72, 100}[d], (int)(random_bits() % 3));
      }
    attention_case(isa, 1, 700, 1, 1, 40, 0);
    attention_case(isa, 2, 700, 2, 1, 33, 3);
    attention_case(isa, 1, 40, 2, 2, 300, 1);
    for (size_t s = 0; s < 7; s++)
      rotary_case(isa, 9 + 40 * s, 1 + s % 3, (size_t[]){2, 4, 6, 16, 64, 72, 256}[s], s % 2 ? 1e4 : 1e6);
    nothing_and_nonsense(isa);
    printf("%s: %ld comparisons with scalar\n", isa_names[isa], cases - before);
  }
  printf("seed %llu: %ld comparisons, %ld failed, %d instruction sets\n", (unsigned long long)seed, cases, failures, ran);
  return failures ? 1 : 0;
}
