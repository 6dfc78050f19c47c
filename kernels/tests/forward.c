/* forward.c: every function that runs a model, on every instruction set of this build, against the scalar
 * oracle (sums in double), within tolerances derived from the sums; the same bytes for any number of threads,
 * for a token alone among others, and never past the end of an output. */
#include "harness.h"

/* Weights and bias of a linear layer, dense or packed. */
typedef struct {
  size_t rows, cols;
  int32_t dtype, bits; /* bits 0: dense */
  size_t group_size;
  const void *weights;
  const uint32_t *packed;
  const uint16_t *scale, *zero;
  const float *bias;
} layer;

static int32_t run_layer(const layer *l, const float *x, size_t tokens, float *out, int32_t isa, int32_t threads) {
  return l->bits ? aq_linear_packed(x, tokens, l->packed, l->scale, l->zero, l->bias, l->rows, l->cols, l->bits,
                                    l->group_size, out, isa, threads)
                 : aq_linear(x, tokens, l->weights, l->dtype, l->bias, l->rows, l->cols, out, isa, threads);
}

/* Fills `l` with random weights of its shape. @returns them as float32 */
static const float *make_layer(layer *l, int symmetric) {
  const size_t n = l->rows * l->cols;
  float *w = gaussians(n, 0.1f), *dense = take(n * 4);
  if (!l->bits) {
    void *weights = take(n * 4);
    aq_convert(w, AQ_F32, weights, l->dtype, n, AQ_ISA_SCALAR, 1);
    aq_convert(weights, l->dtype, dense, AQ_F32, n, AQ_ISA_SCALAR, 1);
    l->weights = weights;
    return dense;
  }
  uint64_t words, groups;
  aq_packed_words(l->cols, l->bits, &words);
  aq_group_count(l->cols, l->group_size, &groups);
  uint32_t *packed = take(l->rows * words * 4);
  uint16_t *scale = take(l->rows * groups * 2), *zero = symmetric ? 0 : take(l->rows * groups * 2);
  aq_quantize_round(w, AQ_F32, l->rows, l->cols, l->bits, l->group_size,
                    symmetric ? AQ_ZERO_POINT_SYMMETRIC : AQ_ZERO_POINT_REAL, packed, scale, zero, AQ_ISA_SCALAR, 1);
  aq_dequantize(packed, scale, zero, l->rows, l->cols, l->bits, l->group_size, dense, AQ_F32, AQ_ISA_SCALAR, 1);
  l->packed = packed;
  l->scale = scale;
  l->zero = zero;
  return dense;
}

/* Linear: |error| <= (k + 8) 2^-24 sum |x w|, once for the sum and once for each rounding of a weight and the
 * end. */
static void linear_case(int32_t isa, size_t tokens, size_t rows, size_t cols, int32_t dtype, int32_t bits,
                        size_t group_size, int symmetric, int with_bias) {
  char where[160];
  snprintf(where, sizeof where, "%s, %zux%zux%zu, %s %d, group %zu%s%s", isa_names[isa], tokens, rows, cols,
           bits ? "bits" : "dtype", bits ? bits : dtype, group_size, symmetric ? ", symmetric" : "",
           with_bias ? ", bias" : "");
  const size_t n = tokens * rows;
  const float *x = gaussians(tokens * cols, 1);
  layer l = {.rows = rows, .cols = cols, .dtype = dtype, .bits = bits, .group_size = group_size};
  const float *dense = make_layer(&l, symmetric);
  if (with_bias) l.bias = gaussians(rows, 1);
  float *expected = guarded(n * 4), *tolerance = take(n * 4), *first = 0;
  for (size_t t = 0; t < tokens; t++)
    for (size_t r = 0; r < rows; r++) {
      double sum = with_bias ? fabs(l.bias[r]) : 0;
      for (size_t k = 0; k < cols; k++) sum += fabs((double)x[t * cols + k] * dense[r * cols + k]);
      tolerance[t * rows + r] = (float)(((double)cols + 8) * 0x1p-24 * sum);
    }
  expect_status("linear", where, run_layer(&l, x, tokens, expected, AQ_ISA_SCALAR, 1), AQ_OK);
  EXPECT_ON_THREADS("linear", where, first, expected, n, tolerance, 0, run_layer(&l, x, tokens, out, isa, threads));
  if (tokens > 3) { /* the tokens from the second on, alone */
    float *some = guarded((n - rows) * 4);
    run_layer(&l, x + cols, tokens - 1, some, isa, 1);
    expect_output("linear, fewer tokens", where, first + rows, some, (n - rows) * 4);
  }
  release();
}

enum { RMS_NORM, RMS_NORM_PLAIN, LAYER_NORM, LAYER_NORM_PLAIN, ROW_FUNCTIONS };

static int32_t call_rows(int function, const float *x, size_t rows, size_t cols, const float *weight, const float *bias,
                         float *out, int32_t isa, int32_t threads) {
  switch (function) {
    case RMS_NORM: return aq_rms_norm(x, rows, cols, weight, 1e-6f, out, isa, threads);
    case RMS_NORM_PLAIN: return aq_rms_norm(x, rows, cols, 0, 1e-6f, out, isa, threads);
    case LAYER_NORM: return aq_layer_norm(x, rows, cols, weight, bias, 1e-5f, out, isa, threads);
    default: return aq_layer_norm(x, rows, cols, 0, 0, 1e-5f, out, isa, threads);
  }
}

/* Largest value of a row in standard deviations, at least 1: the factor by which normalizing enlarges the
 * rounding error of the mean. */
static double row_spread(const float *x, size_t cols) {
  double mean = 0, power = 0, most = 0;
  for (size_t i = 0; i < cols; i++) mean += x[i] / (double)cols;
  for (size_t i = 0; i < cols; i++) {
    power += (x[i] - mean) * (x[i] - mean) / (double)cols;
    most = fmax(most, fabs(x[i]));
  }
  return fmax(1, most / sqrt(power + 1e-5));
}

static void rows_case(int32_t isa, size_t rows, size_t cols, int function) {
  char where[80];
  snprintf(where, sizeof where, "%s, %zux%zu, function %d", isa_names[isa], rows, cols, function);
  const size_t n = rows * cols;
  float *x = gaussians(n, 3), *weight = gaussians(cols, 1), *bias = gaussians(cols, 1);
  if (function == LAYER_NORM)
    for (size_t i = 0; i < n; i++) x[i] += 10;
  float *expected = guarded(n * 4), *tolerance = take(n * 4), *first = 0;
  expect_status("rows", where, call_rows(function, x, rows, cols, weight, bias, expected, AQ_ISA_SCALAR, 1), AQ_OK);
  /* Mean and variance lose (cols / lanes + lanes) roundings of 2^-24 at most. */
  const double eps = ((double)cols / 4 + 16) * 0x1p-24;
  for (size_t row = 0; row < rows; row++) {
    const double spread = row_spread(x + row * cols, cols);
    for (size_t k = 0; k < cols; k++) {
      double magnitude = fabs(expected[row * cols + k]);
      if (function == LAYER_NORM) magnitude += fabs(bias[k]) + fmax(40, 5 * spread) * fabs(weight[k]);
      if (function == LAYER_NORM_PLAIN) magnitude += 3 * spread;
      tolerance[row * cols + k] = (float)(eps * magnitude);
    }
  }
  EXPECT_ON_THREADS("rows", where, first, expected, n, tolerance, 0,
                    call_rows(function, x, rows, cols, weight, bias, out, isa, threads));
  expect_status("rows", where, call_rows(function, x, rows, cols, weight, bias, x, isa, 1), AQ_OK);
  expect_bytes("rows in place", where, first, x, n * 4);
  release();
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
  for (size_t i = 0; i < n && n > 30 && i < COUNT(special); i++) a[i * 2] = special[i];
  float *expected = guarded(n * 4), *tolerance = take(n * 4), *first = 0;
  expect_status("elements", where, call_elements(function, a, b, n, expected, AQ_ISA_SCALAR, 1), AQ_OK);
  /* exp 2^-22, division, products, and |u| 2^-24 more in exp's argument; 2^-112 where exp is flushed to
   * zero */
  for (size_t i = 0; i < n; i++) {
    const double u = function == GELU_TANH ? fmin(1.6 * fabs(a[i]) * (1 + 0.045 * (double)a[i] * a[i]), 90) : 0;
    tolerance[i] = (float)(fabs(expected[i]) * (8 + 6 * u) * 0x1p-24 + 0x1p-112 * (1 + fabs(b[i])));
  }
  EXPECT_ON_THREADS("elements", where, first, expected, n, tolerance, 0,
                    call_elements(function, a, b, n, out, isa, threads));
  expect_status("elements", where, call_elements(function, a, b, n, a, isa, 1), AQ_OK);
  expect_bytes("elements in place", where, first, a, n * 4);
  release();
}

static void modulation_case(int32_t isa, size_t batch, size_t tokens, size_t cols) {
  char where[80];
  snprintf(where, sizeof where, "%s, %zux%zux%zu", isa_names[isa], batch, tokens, cols);
  const size_t n = batch * tokens * cols, stride = 3 * cols + 1;
  const float *x = gaussians(n, 1), *r = gaussians(n, 1), *chunks = gaussians(batch * stride, 1);
  float *gated = guarded(n * 4), *modulated = guarded(n * 4), *first = 0;
  aq_gate_add(r, chunks, x, stride, batch, tokens, cols, gated, AQ_ISA_SCALAR, 1);
  aq_modulate(x, chunks, chunks + cols, stride, batch, tokens, cols, modulated, AQ_ISA_SCALAR, 1);
  EXPECT_ON_THREADS("gate_add", where, first, gated, n, 0, 60 * 0x1p-24,
                    aq_gate_add(r, chunks, x, stride, batch, tokens, cols, out, isa, threads));
  EXPECT_ON_THREADS("modulate", where, first, modulated, n, 0, 60 * 0x1p-24,
                    aq_modulate(x, chunks, chunks + cols, stride, batch, tokens, cols, out, isa, threads));
  release();
}

static void attention_case(int32_t isa, size_t batch, size_t tokens, size_t heads, size_t kv_heads, size_t size,
                           int masked, size_t block) {
  char where[140];
  snprintf(where, sizeof where, "%s, %zu items, %zu tokens, %zu of %zu heads of %zu%s, blocks of %zu", isa_names[isa],
           batch, tokens, heads, kv_heads, size, masked ? ", masked" : "", block);
  const size_t n = batch * tokens * heads * size, m = batch * tokens * kv_heads * size;
  const float *q = gaussians(n, 1), *k = gaussians(m, 1), *v = gaussians(m, 1);
  uint8_t *mask = take(batch * tokens);
  for (size_t i = 0; i < batch * tokens; i++) mask[i] = random_bits() % 3 != 0;
  if (masked == 2) memset(mask, 0, tokens); /* an item without keys */
  if (masked == 3)                          /* the first keys switched off, more than a block */
    for (size_t i = 0; i < batch * tokens; i++) mask[i] = i % tokens > 300;
  const uint8_t *used = masked ? mask : 0;
  const float scale = 1.0f / sqrtf((float)size);
  float *expected = guarded(n * 4), *first = 0;
  aq_attention(q, k, v, used, batch, tokens, heads, kv_heads, size, block, scale, expected, AQ_ISA_SCALAR, 1);
  /* a score's error, 2 size 2^-24 sum |q k| scale, moves each p by as much; |v| below 5 */
  EXPECT_ON_THREADS("attention", where, first, expected, n, 0, 5 * ((double)size + (double)tokens / 4 + 32) * 0x1p-23,
                    aq_attention(q, k, v, used, batch, tokens, heads, kv_heads, size, block, scale, out, isa, threads));
  release();
}

static void rotary_case(int32_t isa, size_t rows, size_t heads, size_t size, double theta) {
  char where[80];
  snprintf(where, sizeof where, "%s, %zu rows, %zu heads of %zu, theta %g", isa_names[isa], rows, heads, size, theta);
  const size_t n = rows * heads * size;
  float *x = gaussians(n, 1), *expected = guarded(n * 4), *reference = take(n * 4), *first = 0;
  int32_t *positions = take(rows * 4);
  for (size_t i = 0; i < rows; i++) {
    positions[i] = (int32_t)(random_bits() % (i % 2 ? 2097152 : 100)) - (i % 4 == 1 ? 1048575 : 0);
    if (positions[i] > AQ_MAX_POSITION) positions[i] = AQ_MAX_POSITION;
  }
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
  expect_close("rotary oracle against the C library", where, reference, expected, n, 0, 5 * 0x1p-23);
  EXPECT_ON_THREADS("rotary", where, first, expected, n, 0, 6 * 0x1p-22,
                    (memcpy(out, x, n * 4), aq_rotary(out, positions, rows, heads, size, theta, isa, threads)));
  release();
}

/* Patches against the definition, index by index; timesteps against the C library. One version for every
 * set. */
static void images(void) {
  static const size_t shapes[][5] = {{1, 1, 1, 1, 1}, {2, 3, 8, 4, 2}, {3, 2, 9, 6, 3}, {5, 4, 64, 64, 2}, {1, 5, 7, 7,
                                                                                                            7}};
  for (size_t s = 0; s < COUNT(shapes); s++) {
    const size_t batch = shapes[s][0], channels = shapes[s][1], height = shapes[s][2], width = shapes[s][3];
    const size_t patch = shapes[s][4], n = batch * channels * height * width;
    float *x = gaussians(n, 1);
    for (size_t k = 0; k < THREAD_COUNTS; k++) {
      float *tokens = guarded(n * 4), *wanted = take(n * 4), *back = take(n * 4), *image = guarded(n * 4);
      expect_status("patchify", "", aq_patchify(x, batch, channels, height, width, patch, tokens, thread_counts[k]),
                    AQ_OK);
      expect_status("unpatchify", "", aq_unpatchify(x, batch, channels, height, width, patch, image, thread_counts[k]),
                    AQ_OK);
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
      expect_output("patchify", "", wanted, tokens, n * 4);
      expect_output("unpatchify", "", back, image, n * 4);
    }
    release();
  }
  float out[9], t[2] = {0, 999.5f};
  expect_status("no images", "", aq_patchify(0, 0, 3, 4, 4, 2, 0, 1), AQ_OK);
  expect_status("patch", "", aq_patchify(t, 1, 1, 2, 1, 2, out, 1), AQ_E_SHAPE);
  expect_status("patch", "", aq_unpatchify(t, 1, 1, 2, 1, 0, out, 1), AQ_E_SHAPE);
  expect_status("null", "", aq_unpatchify(0, 1, 1, 2, 1, 1, out, 1), AQ_E_ARGUMENT);
  expect_status("images overflow", "", aq_patchify(t, SIZE_MAX / 4, 8, 2, 1, 1, out, 1), AQ_E_SHAPE);

  enum { N = 7, MOST = 257 };
  float tolerance[N * MOST];
  const float steps[N] = {0, 1, 7.5f, 500, 999, -3, 1048576};
  for (size_t channels = 1; channels <= MOST; channels += channels < 4 ? 1 : 63)
    for (int flip = 0; flip < 2; flip++)
      for (int shift = 0; shift < 2; shift++) {
        if (channels / 2 == 1 && shift) continue;
        float *embedded = guarded(N * channels * 4), *expected = take(N * channels * 4);
        const size_t half = channels / 2;
        expect_status("timesteps", "", aq_timestep_embedding(steps, N, channels, flip, shift, 10000, embedded), AQ_OK);
        for (size_t i = 0; i < N * channels; i++) {
          const size_t at = i % channels % (half ? half : 1);
          const float exponent = (float)-log(10000.0) * (float)at;
          const float frequency = half ? (float)exp((double)(exponent / (float)((double)half - shift))) : 0;
          const float angle = steps[i / channels] * frequency;
          const int second = i % channels >= half;
          expected[i] = i % channels == 2 * half ? 0 : (float)(second != flip ? cos((double)angle)
                                                               : sin((double)angle));
        }
        /* exp may round a frequency the other way, and the angle with it: 2^-24 of the angle each */
        for (size_t i = 0; i < N * channels; i++)
          tolerance[i] = (float)((fabs((double)steps[i / channels]) + 1) * 0x1p-22);
        expect_close("timesteps", "", expected, embedded, N * channels, tolerance, 0);
        release();
      }
  expect_status("timestep", "", aq_timestep_embedding((float[]){NAN}, 1, 4, 1, 1, 10000, out), AQ_E_VALUE);
  expect_status("timestep", "", aq_timestep_embedding((float[]){2e6f}, 1, 4, 1, 1, 10000, out), AQ_E_VALUE);
  expect_status("shift", "", aq_timestep_embedding(t, 1, 4, 1, 2, 10000, out), AQ_E_VALUE);
  expect_status("period", "", aq_timestep_embedding(t, 1, 4, 1, 1, 0.5, out), AQ_E_VALUE);
  expect_status("no timesteps", "", aq_timestep_embedding(0, 0, 4, 1, 1, 10000, 0), AQ_OK);
}

static void nothing_and_nonsense(int32_t isa) {
  const char *where = isa_names[isa];
  float x[4] = {1, 2, 3, 4}, out[4];
  int32_t far = AQ_MAX_POSITION + 1;
  expect_status("no tokens", where, aq_linear(0, 0, 0, AQ_F32, 0, 4, 4, 0, isa, 1), AQ_OK);
  expect_status("no rows", where, aq_linear_packed(0, 4, 0, 0, 0, 0, 0, 4, 2, 64, 0, isa, 1), AQ_OK);
  expect_status("no columns", where, aq_linear(0, 1, 0, AQ_F32, x, 4, 0, out, isa, 1), AQ_OK);
  expect_bytes("no columns: the bias", where, x, out, sizeof out);
  expect_status("no elements", where, aq_silu(0, 0, 0, isa, 1), AQ_OK);
  expect_status("no rows", where, aq_rms_norm(0, 0, 5, 0, 1e-6f, 0, isa, 1), AQ_OK);
  expect_status("no batch", where, aq_attention(0, 0, 0, 0, 0, 4, 2, 1, 4, 0, 1, 0, isa, 1), AQ_OK);
  expect_status("dtype", where, aq_linear(x, 1, x, AQ_F64, 0, 1, 4, out, isa, 1), AQ_E_ARGUMENT);
  expect_status("null", where, aq_add(x, 0, 4, out, isa, 1), AQ_E_ARGUMENT);
  expect_status("heads", where, aq_attention(x, x, x, 0, 1, 1, 2, 3, 1, 0, 1, out, isa, 1), AQ_E_SHAPE);
  expect_status("overflow", where, aq_linear(x, 2, x, AQ_F32, 0, SIZE_MAX / 8, SIZE_MAX / 8, out, isa, 1), AQ_E_SHAPE);
  expect_status("odd head", where, aq_rotary(x, &far, 1, 1, 3, 1e4, isa, 1), AQ_E_SHAPE);
  expect_status("position", where, aq_rotary(x, &far, 1, 1, 4, 1e4, isa, 1), AQ_E_VALUE);
  expect_status("isa", where, aq_silu(x, 4, out, 99, 1), AQ_E_ISA);
}

static void run(int32_t isa) {
  static const size_t tokens[] = {1, 2, 3, 5, 14, 17, 33, 100}, rows[] = {1, 3, 17, 32, 33, 100};
  static const size_t cols[] = {1, 3, 5, 17, 33, 64, 100, 256, 300, 600};
  /* the last one on 2 threads or more */
  const size_t lengths[] = {1, 3, 5, 17, 33, 100, 1023, 1025, quick ? 70001 : 600001};
  static const size_t group_sizes[] = {0, 16, 32, 64, 128, 256};
  static const size_t vector_cols[] = {1, 15, 16, 17, 31, 32, 48, 80, 176, 333, 4096, 4500};
  static const size_t head_sizes[] = {1, 3, 8, 16, 32, 72, 100}, rotary_sizes[] = {2, 4, 6, 16, 64, 72, 256};
  static const int32_t widths[] = {2, 3, 4, 8};
  for (size_t t = 0; t < COUNT(tokens); t++)
    for (size_t r = 0; r < COUNT(rows); r++)
      for (size_t c = 0; c < COUNT(cols); c++) {
        if (passed_over(1)) continue;
        linear_case(isa, tokens[t], rows[r], cols[c], (int32_t)(random_bits() % 3), 0, 0, 0, random_bits() % 2);
        linear_case(isa, tokens[t], rows[r], cols[c], 0, widths[random_bits() % 4], group_sizes[random_bits() % 6],
                    random_bits() % 3 == 0, random_bits() % 2);
      }
  for (size_t b = 0; b < COUNT(widths); b++)
    for (size_t g = 0; g < COUNT(group_sizes); g++)
      for (size_t c = 0; c < COUNT(vector_cols); c++)
        if (!passed_over(1))
          linear_case(isa, 1, 5, vector_cols[c], 0, widths[b], group_sizes[g], random_bits() % 2, random_bits() % 2);
  linear_case(isa, 130, 192, 768, AQ_F32, 0, 0, 0, 1);
  linear_case(isa, 70, 97, 1024, AQ_BF16, 0, 0, 0, 1);
  linear_case(isa, 1, 300, 5000, AQ_F16, 0, 0, 0, 1);
  for (size_t r = 0; r < 5; r++)
    for (size_t c = 0; c < COUNT(cols); c++)
      for (int f = 0; f < ROW_FUNCTIONS; f++) rows_case(isa, (size_t[]){1, 3, 5, 33, 300}[r], cols[c], f);
  for (int f = 0; f < ROW_FUNCTIONS; f++) rows_case(isa, quick ? 300 : 3000, 300, f);
  modulation_case(isa, 3, quick ? 50 : 300, 600);
  rotary_case(isa, quick ? 300 : 2000, 4, 72, 1e4);
  for (size_t l = 0; l < COUNT(lengths); l++)
    for (int f = 0; f < ELEMENT_FUNCTIONS; f++) elements_case(isa, lengths[l], f);
  for (size_t c = 0; c < COUNT(cols); c++) modulation_case(isa, 1 + c % 3, 1 + 11 * (c % 5), cols[c]);
  for (size_t t = 0; t < COUNT(tokens); t++)
    for (size_t d = 0; d < COUNT(head_sizes); d++) {
      const size_t kv = 1 + random_bits() % 2;
      attention_case(isa, 1 + random_bits() % 3, tokens[t], kv * (1 + random_bits() % 3), kv, head_sizes[d],
                     (int)(random_bits() % 3), random_bits() % 2 ? random_bits() % 40 : 0);
    }
  attention_case(isa, 1, 700, 1, 1, 40, 0, 0);
  attention_case(isa, 2, 700, 2, 1, 33, 3, 0);
  attention_case(isa, 1, 40, 2, 2, 300, 1, 0);
  attention_case(isa, 1, 700, 2, 1, 32, 0, 4);
  attention_case(isa, 2, 700, 1, 1, 24, 3, 64);
  attention_case(isa, 1, 50, 2, 1, 16, 1, 1000);
  for (size_t s = 0; s < COUNT(rotary_sizes); s++)
    rotary_case(isa, 9 + 40 * s, 1 + s % 3, rotary_sizes[s], s % 2 ? 1e4 : 1e6);
  nothing_and_nonsense(isa);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  images();
  run_sets(AQ_ISA_SIMD128, run);
  return finish();
}
