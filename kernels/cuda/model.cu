/* model.cu: what a forward pass needs beside the products with packed weights. Sums of rows are double, as the oracle's;
 * exponentials float32. */
#include "reduce.h"

#include <math.h>

/* Rows ----------------------------------------------------------------------------------------------------------------- */

struct rms_norm {
  const float *x, *weight;
  size_t cols;
  float epsilon, *out;
  __device__ void operator()(size_t row) const {
    const float *in = x + row * cols;
    double sum = 0.0;
    for (size_t i = threadIdx.x; i < cols; i += AQ_BLOCK) sum += (double)in[i] * (double)in[i];
    const double factor = 1.0 / sqrt(aq_block_sum(sum) / (double)cols + (double)epsilon);
    for (size_t i = threadIdx.x; i < cols; i += AQ_BLOCK)
      out[row * cols + i] = (float)((double)in[i] * factor * (weight ? (double)weight[i] : 1.0));
  }
};

struct layer_norm {
  const float *x, *weight, *bias;
  size_t cols;
  float epsilon, *out;
  __device__ void operator()(size_t row) const {
    const float *in = x + row * cols;
    double sum = 0.0, squares = 0.0;
    for (size_t i = threadIdx.x; i < cols; i += AQ_BLOCK) sum += (double)in[i];
    const double mean = aq_block_sum(sum) / (double)cols;
    for (size_t i = threadIdx.x; i < cols; i += AQ_BLOCK) squares += ((double)in[i] - mean) * ((double)in[i] - mean);
    const double factor = 1.0 / sqrt(aq_block_sum(squares) / (double)cols + (double)epsilon);
    for (size_t i = threadIdx.x; i < cols; i += AQ_BLOCK)
      out[row * cols + i] = (float)(((double)in[i] - mean) * factor * (weight ? (double)weight[i] : 1.0) +
                                    (bias ? (double)bias[i] : 0.0));
  }
};

/* The largest of a row, and where it is first. */
static __device__ aq_largest largest_of(const float *x, size_t cols) {
  aq_largest own = {-__builtin_inff(), 0xffffffffu};
  for (size_t i = threadIdx.x; i < cols; i += AQ_BLOCK) own = aq_larger(own, {x[i], (uint32_t)i});
  return aq_block_largest(own);
}

static __device__ double exponentials_of(const float *x, size_t cols, float largest) {
  double sum = 0.0;
  for (size_t i = threadIdx.x; i < cols; i += AQ_BLOCK) sum += (double)expf(x[i] - largest);
  return aq_block_sum(sum);
}

struct softmax {
  const float *x;
  size_t cols;
  float *out;
  __device__ void operator()(size_t row) const {
    const float *in = x + row * cols;
    const float largest = largest_of(in, cols).value;
    const float factor = (float)(1.0 / exponentials_of(in, cols, largest));
    for (size_t i = threadIdx.x; i < cols; i += AQ_BLOCK) out[row * cols + i] = expf(in[i] - largest) * factor;
  }
};

struct top_one {
  const float *x;
  size_t cols;
  int32_t *index;
  float *probability;
  __device__ void operator()(size_t row) const {
    const float *in = x + row * cols;
    const aq_largest top = largest_of(in, cols);
    const double sum = exponentials_of(in, cols, top.value);
    if (threadIdx.x != 0) return;
    index[row] = top.at < cols ? (int32_t)top.at : 0;
    probability[row] = (float)(1.0 / sum);
  }
};

static int32_t rows_of(size_t rows, size_t cols, aq_stream_state **on, aq_cuda_stream stream) {
  int32_t status;
  *on = aq_cuda_use(stream, &status);
  return *on && !aq_shape_allowed(rows, cols) ? AQ_E_SHAPE : status;
}

int32_t aq_cuda_rms_norm(aq_cuda_buffer x, size_t rows, size_t cols, aq_cuda_buffer weight, float epsilon, aq_cuda_buffer out,
                         aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = rows_of(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  const rms_norm f = {aq_cuda_view<float>(x, rows * cols, on, &status), aq_cuda_optional(weight, cols, on, &status), cols, epsilon,
                      aq_cuda_view<float>(out, rows * cols, on, &status)};
  return status == AQ_OK ? aq_run_rows(on, f, rows) : status;
}

int32_t aq_cuda_layer_norm(aq_cuda_buffer x, size_t rows, size_t cols, aq_cuda_buffer weight, aq_cuda_buffer bias, float epsilon,
                           aq_cuda_buffer out, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = rows_of(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  const layer_norm f = {aq_cuda_view<float>(x, rows * cols, on, &status), aq_cuda_optional(weight, cols, on, &status),
                        aq_cuda_optional(bias, cols, on, &status), cols, epsilon,
                        aq_cuda_view<float>(out, rows * cols, on, &status)};
  return status == AQ_OK ? aq_run_rows(on, f, rows) : status;
}

int32_t aq_cuda_softmax(aq_cuda_buffer x, size_t rows, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = rows_of(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  const softmax f = {aq_cuda_view<float>(x, rows * cols, on, &status), cols, aq_cuda_view<float>(out, rows * cols, on, &status)};
  return status == AQ_OK ? aq_run_rows(on, f, rows) : status;
}

int32_t aq_cuda_top_one(aq_cuda_buffer x, size_t rows, size_t cols, aq_cuda_buffer index, aq_cuda_buffer probability,
                        aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = rows_of(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  if (cols > 0x7fffffff) return AQ_E_SHAPE;
  const top_one f = {aq_cuda_view<float>(x, rows * cols, on, &status), cols, aq_cuda_view<int32_t>(index, rows, on, &status),
                     aq_cuda_view<float>(probability, rows, on, &status)};
  return status == AQ_OK ? aq_run_rows(on, f, rows) : status;
}

/* Elements ------------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

struct silu {
  const float *x;
  float *out;
  __device__ void operator()(size_t i) const { out[i] = x[i] * sigmoid(x[i]); }
};
struct gelu_tanh { /* (1 + tanh(u)) / 2 = sigmoid(2 u) */
  const float *x;
  float *out;
  __device__ void operator()(size_t i) const {
    const float v = x[i];
    out[i] = v * sigmoid(1.5957691216f * (v + 0.044715f * v * v * v));
  }
};
struct silu_multiply {
  const float *gate, *up;
  float *out;
  __device__ void operator()(size_t i) const { out[i] = gate[i] * sigmoid(gate[i]) * up[i]; }
};
struct sum_of_two {
  const float *a, *b;
  float *out;
  __device__ void operator()(size_t i) const { out[i] = a[i] + b[i]; }
};
struct modulate {
  const float *x, *scale, *shift;
  size_t stride, tokens, cols;
  float *out;
  __device__ void operator()(size_t i) const {
    const size_t row = aq_quotient(i, cols), at = aq_quotient(row, tokens) * stride + (i - row * cols);
    out[i] = x[i] * (1.0f + scale[at]) + shift[at];
  }
};
struct gate_add {
  const float *residual, *gate, *x;
  size_t stride, tokens, cols;
  float *out;
  __device__ void operator()(size_t i) const {
    const size_t row = aq_quotient(i, cols), at = aq_quotient(row, tokens) * stride + (i - row * cols);
    out[i] = residual[i] + gate[at] * x[i];
  }
};

static int32_t elements_of(size_t n, aq_stream_state **on, aq_cuda_stream stream) { return rows_of(1, n, on, stream); }

int32_t aq_cuda_silu(aq_cuda_buffer x, size_t n, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = elements_of(n, &on, stream);
  if (status != AQ_OK) return status;
  const silu f = {aq_cuda_view<float>(x, n, on, &status), aq_cuda_view<float>(out, n, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

int32_t aq_cuda_gelu_tanh(aq_cuda_buffer x, size_t n, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = elements_of(n, &on, stream);
  if (status != AQ_OK) return status;
  const gelu_tanh f = {aq_cuda_view<float>(x, n, on, &status), aq_cuda_view<float>(out, n, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

int32_t aq_cuda_silu_multiply(aq_cuda_buffer gate, aq_cuda_buffer up, size_t n, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = elements_of(n, &on, stream);
  if (status != AQ_OK) return status;
  const silu_multiply f = {aq_cuda_view<float>(gate, n, on, &status), aq_cuda_view<float>(up, n, on, &status),
                           aq_cuda_view<float>(out, n, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

int32_t aq_cuda_add(aq_cuda_buffer a, aq_cuda_buffer b, size_t n, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = elements_of(n, &on, stream);
  if (status != AQ_OK) return status;
  const sum_of_two f = {aq_cuda_view<float>(a, n, on, &status), aq_cuda_view<float>(b, n, on, &status),
                        aq_cuda_view<float>(out, n, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

/* Floats of [batch, cols] with `stride` from one item to the next. */
static size_t strided(size_t batch, size_t stride, size_t cols) { return (batch - 1) * stride + cols; }

int32_t aq_cuda_modulate(aq_cuda_buffer x, aq_cuda_buffer scale, aq_cuda_buffer shift, size_t scale_offset, size_t shift_offset,
                         size_t stride, size_t batch, size_t tokens, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (batch == 0 || tokens == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_three_allowed(batch, tokens, cols) || !aq_shape_allowed(batch, stride) || !aq_shape_allowed(1, scale_offset) ||
      !aq_shape_allowed(1, shift_offset))
    return AQ_E_SHAPE;
  const size_t n = batch * tokens * cols, width = strided(batch, stride, cols);
  const float *s = aq_cuda_view<float>(scale, scale_offset + width, on, &status);
  const float *b = aq_cuda_view<float>(shift, shift_offset + width, on, &status);
  modulate f = {aq_cuda_view<float>(x, n, on, &status), s, b, stride, tokens, cols, aq_cuda_view<float>(out, n, on, &status)};
  if (status != AQ_OK) return status;
  f.scale += scale_offset;
  f.shift += shift_offset;
  return aq_run_elements(on, f, n);
}

int32_t aq_cuda_gate_add(aq_cuda_buffer residual, aq_cuda_buffer gate, size_t gate_offset, aq_cuda_buffer x, size_t stride,
                         size_t batch, size_t tokens, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (batch == 0 || tokens == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_three_allowed(batch, tokens, cols) || !aq_shape_allowed(batch, stride) || !aq_shape_allowed(1, gate_offset))
    return AQ_E_SHAPE;
  const size_t n = batch * tokens * cols;
  gate_add f = {aq_cuda_view<float>(residual, n, on, &status),
                aq_cuda_view<float>(gate, gate_offset + strided(batch, stride, cols), on, &status),
                aq_cuda_view<float>(x, n, on, &status), stride, tokens, cols, aq_cuda_view<float>(out, n, on, &status)};
  if (status != AQ_OK) return status;
  f.gate += gate_offset;
  return aq_run_elements(on, f, n);
}

/* Places and times ----------------------------------------------------------------------------------------------------- */

/* A thread a row and frequency; heads share the angle. */
struct rotary {
  float *x;
  const int32_t *positions;
  size_t heads, head_size;
  double log_theta;
  int32_t *faults;
  __device__ void operator()(size_t i) const {
    const size_t half = head_size / 2, row = aq_quotient(i, half), k = i - row * half;
    const int32_t position = positions[row];
    if (position > AQ_MAX_POSITION || position < -AQ_MAX_POSITION) {
      atomicOr(faults, AQ_FAULT_VALUE);
      return;
    }
    double sine, cosine;
    sincos((double)position * exp(-2.0 * (double)k / (double)head_size * log_theta), &sine, &cosine);
    for (size_t head = 0; head < heads; head++) {
      float *a = x + (row * heads + head) * head_size + k, *b = a + half;
      const double low = *a, high = *b;
      *a = (float)(low * cosine - high * sine);
      *b = (float)(high * cosine + low * sine);
    }
  }
};

int32_t aq_cuda_rotary(aq_cuda_buffer x, aq_cuda_buffer positions, size_t rows, size_t heads, size_t head_size, double theta,
                       aq_cuda_stream stream) {
  if (rows == 0 || heads == 0 || head_size == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (head_size % 2 != 0 || !aq_three_allowed(rows, heads, head_size)) return AQ_E_SHAPE;
  if (!(theta >= 1.0 && theta < 1e300)) return AQ_E_VALUE;
  const rotary f = {aq_cuda_view<float>(x, rows * heads * head_size, on, &status), aq_cuda_view<int32_t>(positions, rows, on, &status),
                    heads, head_size, log(theta), on->faults};
  if (status == AQ_OK) status = aq_cuda_clear_faults(on);
  if (status == AQ_OK) status = aq_run_elements(on, f, rows * (head_size / 2));
  return status == AQ_OK ? aq_cuda_read_faults(on) : status;
}

struct embedding {
  const void *table;
  int32_t dtype;
  size_t vocabulary, cols;
  const int32_t *tokens;
  float *out;
  int32_t *faults;
  __device__ void operator()(size_t i) const {
    const size_t token = aq_quotient(i, cols), id = (size_t)(uint32_t)tokens[token];
    if (id >= vocabulary) {
      atomicOr(faults, AQ_FAULT_VALUE);
      return;
    }
    out[i] = aq_load_element(table, dtype, id * cols + (i - token * cols));
  }
};

int32_t aq_cuda_embed_tokens(aq_cuda_buffer table, int32_t dtype, size_t vocabulary, size_t cols, aq_cuda_buffer tokens, size_t n,
                             aq_cuda_buffer out, aq_cuda_stream stream) {
  if (n == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_narrow_dtype(dtype)) return AQ_E_ARGUMENT;
  if (vocabulary > 0x7fffffff || !aq_shape_allowed(vocabulary, cols) || !aq_shape_allowed(n, cols)) return AQ_E_SHAPE;
  const embedding f = {aq_cuda_memory(table, vocabulary * cols, aq_dtype_bytes(dtype), on, &status), dtype, vocabulary, cols,
                       aq_cuda_view<int32_t>(tokens, n, on, &status), aq_cuda_view<float>(out, n * cols, on, &status), on->faults};
  if (status == AQ_OK) status = aq_cuda_clear_faults(on);
  if (status == AQ_OK) status = aq_run_elements(on, f, n * cols);
  return status == AQ_OK ? aq_cuda_read_faults(on) : status;
}

/* Element i of the tokens and its pixel. */
struct patches {
  const float *in;
  float *out;
  size_t channels, patch, down, across;
  int unpatch;
  __device__ void operator()(size_t i) const {
    const size_t size = channels * patch * patch, width = across * patch;
    const size_t token = aq_quotient(i, size), at = i - token * size, line = aq_quotient(token, across), x = token - line * across;
    const size_t image = aq_quotient(line, down), y = (line - image * down) * patch;
    const size_t channel = unpatch ? at % channels : at / (patch * patch);
    const size_t p = unpatch ? at / (channels * patch) : at / patch % patch, q = unpatch ? at / channels % patch : at % patch;
    const size_t pixel = ((image * channels + channel) * down * patch + y + p) * width + x * patch + q;
    if (unpatch)
      out[pixel] = in[i];
    else
      out[i] = in[pixel];
  }
};

static int32_t run_patches(aq_cuda_buffer in, size_t batch, size_t channels, size_t height, size_t width, size_t patch,
                           aq_cuda_buffer out, int unpatch, aq_cuda_stream stream) {
  if (batch == 0 || channels == 0 || height == 0 || width == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (patch == 0 || height % patch != 0 || width % patch != 0) return AQ_E_SHAPE;
  if (!aq_three_allowed(batch, channels, height) || !aq_shape_allowed(batch * channels * height, width)) return AQ_E_SHAPE;
  const size_t n = batch * channels * height * width;
  const patches f = {aq_cuda_view<float>(in, n, on, &status), aq_cuda_view<float>(out, n, on, &status), channels, patch,
                     height / patch, width / patch, unpatch};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

int32_t aq_cuda_patchify(aq_cuda_buffer images, size_t batch, size_t channels, size_t height, size_t width, size_t patch,
                         aq_cuda_buffer out, aq_cuda_stream stream) {
  return run_patches(images, batch, channels, height, width, patch, out, 0, stream);
}

int32_t aq_cuda_unpatchify(aq_cuda_buffer tokens, size_t batch, size_t channels, size_t height, size_t width, size_t patch,
                           aq_cuda_buffer out, aq_cuda_stream stream) {
  return run_patches(tokens, batch, channels, height, width, patch, out, 1, stream);
}

/* As image_api.c rounds: to float32 where PyTorch does. */
struct timesteps {
  const float *times;
  size_t channels, half;
  int32_t cosines_first;
  float slope, divisor;
  float *out;
  int32_t *faults;
  __device__ void operator()(size_t i) const {
    const size_t columns = half + channels % 2, t = aq_quotient(i, columns), k = i - t * columns;
    if (k == half) {
      out[t * channels + channels - 1] = 0.0f;
      return;
    }
    const float time = times[t];
    if (!(time >= -(float)AQ_MAX_POSITION && time <= (float)AQ_MAX_POSITION)) {
      atomicOr(faults, AQ_FAULT_VALUE);
      return;
    }
    const float exponent = slope * (float)k, angle = time * (float)exp((double)(exponent / divisor));
    double sine, cosine;
    sincos((double)angle, &sine, &cosine);
    out[t * channels + k] = (float)(cosines_first ? cosine : sine);
    out[t * channels + half + k] = (float)(cosines_first ? sine : cosine);
  }
};

int32_t aq_cuda_timestep_embedding(aq_cuda_buffer times, size_t n, size_t channels, int32_t cosines_first,
                                   double downscale_freq_shift, double max_period, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (n == 0 || channels == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_shape_allowed(n, channels)) return AQ_E_SHAPE;
  const size_t half = channels / 2;
  const float divisor = (float)((double)half - downscale_freq_shift);
  if (!(max_period >= 1.0 && max_period < 1e300) || (half > 0 && !(divisor > 0.0f))) return AQ_E_VALUE;
  const timesteps f = {aq_cuda_view<float>(times, n, on, &status), channels, half, cosines_first, (float)-log(max_period), divisor,
                       aq_cuda_view<float>(out, n * channels, on, &status), on->faults};
  if (status == AQ_OK) status = aq_cuda_clear_faults(on);
  if (status == AQ_OK) status = aq_run_elements(on, f, n * (half + channels % 2));
  return status == AQ_OK ? aq_cuda_read_faults(on) : status;
}

/* Linear with weights that are not packed -------------------------------------------------------------------------------- */

#define TILE 64
#define DEPTH 16

struct linear_view {
  const float *x;
  size_t tokens;
  const void *weights;
  int32_t dtype;
  const float *bias; /* null: none */
  size_t rows, cols;
  float *out;
};

/* 64 rows by 64 tokens, 4 by 4 a thread, float32 throughout. */
static __global__ void __launch_bounds__(256) linear_tiles(linear_view view) {
  __shared__ float w[DEPTH][TILE + 1], x[DEPTH][TILE + 1];
  const size_t row = (size_t)blockIdx.x * TILE, token = (size_t)blockIdx.y * TILE;
  const unsigned a = threadIdx.x % 16, b = threadIdx.x / 16; /* rows a + 16 i, tokens b + 16 j */
  float sums[4][4] = {};
  for (size_t first = 0; first < view.cols; first += DEPTH) {
    for (unsigned e = threadIdx.x; e < TILE * DEPTH; e += 256) {
      const size_t line = e / DEPTH, col = first + e % DEPTH, r = row + line, t = token + line;
      w[e % DEPTH][line] = r < view.rows && col < view.cols ? aq_load_element(view.weights, view.dtype, r * view.cols + col) : 0.0f;
      x[e % DEPTH][line] = t < view.tokens && col < view.cols ? view.x[t * view.cols + col] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < DEPTH; k++)
#pragma unroll
      for (unsigned i = 0; i < 16; i++) sums[i / 4][i % 4] += w[k][a + 16 * (i / 4)] * x[k][b + 16 * (i % 4)];
    __syncthreads();
  }
#pragma unroll
  for (unsigned i = 0; i < 16; i++) {
    const size_t r = row + a + 16 * (i / 4), t = token + b + 16 * (i % 4);
    if (r < view.rows && t < view.tokens) view.out[t * view.rows + r] = sums[i / 4][i % 4] + (view.bias ? view.bias[r] : 0.0f);
  }
}

int32_t aq_cuda_linear(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer weights, int32_t dtype, aq_cuda_buffer bias, size_t rows,
                       size_t cols, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_narrow_dtype(dtype)) return AQ_E_ARGUMENT;
  /* a grid has 65535 tiles of tokens */
  if (cols == 0 || rows > 0x7fffffff || tokens > (size_t)65535 * TILE || !aq_shape_allowed(tokens, cols) ||
      !aq_shape_allowed(tokens, rows) || !aq_shape_allowed(rows, cols))
    return AQ_E_SHAPE;
  const linear_view view = {aq_cuda_view<float>(x, tokens * cols, on, &status), tokens,
                            aq_cuda_memory(weights, rows * cols, aq_dtype_bytes(dtype), on, &status), dtype,
                            aq_cuda_optional(bias, rows, on, &status), rows, cols,
                            aq_cuda_view<float>(out, tokens * rows, on, &status)};
  if (status != AQ_OK) return status;
  aq_launch(on, linear_tiles, dim3((unsigned)((rows - 1) / TILE + 1), (unsigned)((tokens - 1) / TILE + 1)), 256, 0, view);
  return aq_cuda_launched();
}

/* Attention -------------------------------------------------------------------------------------------------------------- */

/* Eight warps of four queries each; keys in runs of 32, a lane a key for the scores and some of a head's elements for the sums. */
#define WARPS 8
#define QUERIES 4
#define KEYS 32
#define PARTS 8 /* elements of a head that a lane has */

struct attention_view {
  const float *q, *k, *v;
  const uint8_t *key_mask;
  size_t tokens, heads, kv_heads, size;
  float scale, *out;
};

static __global__ void __launch_bounds__(WARPS * 32) attend(attention_view view) {
  AQ_DYNAMIC_SHARED(float, memory);
  const size_t size = view.size, pitch = size + 1;
  float *const keys = memory, *const values = keys + KEYS * pitch, *const queries = values + KEYS * size;
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const size_t head = blockIdx.y, item = blockIdx.z, kv_head = head / (view.heads / view.kv_heads);
  const size_t query = (size_t)blockIdx.x * WARPS * QUERIES;
  for (size_t e = threadIdx.x; e < WARPS * QUERIES * size; e += WARPS * 32) {
    const size_t i = aq_quotient(e, size), t = query + i;
    queries[e] = t < view.tokens ? view.q[((item * view.tokens + t) * view.heads + head) * size + (e - i * size)] : 0.0f;
  }
  float largest[QUERIES], total[QUERIES] = {}, sums[QUERIES][PARTS] = {};
  for (int i = 0; i < QUERIES; i++) largest[i] = -__builtin_inff();
  for (size_t first = 0; first < view.tokens; first += KEYS) {
    __syncthreads(); /* all are done with what was there */
    for (size_t e = threadIdx.x; e < KEYS * size; e += WARPS * 32) {
      const size_t i = aq_quotient(e, size), d = e - i * size, t = first + i;
      const size_t at = ((item * view.tokens + t) * view.kv_heads + kv_head) * size + d;
      keys[i * pitch + d] = t < view.tokens ? view.k[at] : 0.0f;
      values[e] = t < view.tokens ? view.v[at] : 0.0f;
    }
    __syncthreads();
    const size_t own = first + lane;
    const bool there = own < view.tokens && (!view.key_mask || view.key_mask[item * view.tokens + own]);
#pragma unroll
    for (int i = 0; i < QUERIES; i++) {
      const float *const q = queries + (warp * QUERIES + (unsigned)i) * size;
      float score = 0.0f;
      for (size_t d = 0; d < size; d++) score += q[d] * keys[lane * pitch + d];
      score = there ? score * view.scale : -__builtin_inff();
      float peak = score > largest[i] ? score : largest[i];
      for (int distance = 16; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, peak, distance);
        peak = other > peak ? other : peak;
      }
      if (peak == -__builtin_inff()) continue; /* no key yet */
      const float kept = expf(largest[i] - peak), p = expf(score - peak);
      largest[i] = peak;
      float run = p;
      for (int distance = 16; distance > 0; distance /= 2) run += __shfl_xor_sync(0xffffffffu, run, distance);
      total[i] = total[i] * kept + run;
#pragma unroll
      for (int part = 0; part < PARTS; part++) sums[i][part] *= kept;
      for (int key = 0; key < KEYS; key++) {
        const float share = __shfl_sync(0xffffffffu, p, key);
#pragma unroll
        for (unsigned part = 0; part < PARTS; part++)
          if (lane + 32 * part < size) sums[i][part] += share * values[(unsigned)key * size + lane + 32 * part];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < QUERIES; i++) {
    const size_t t = query + warp * QUERIES + (unsigned)i;
    if (t >= view.tokens) continue;
#pragma unroll
    for (unsigned part = 0; part < PARTS; part++)
      if (lane + 32 * part < size)
        view.out[((item * view.tokens + t) * view.heads + head) * size + lane + 32 * part] =
            total[i] == 0.0f ? 0.0f : sums[i][part] / total[i];
  }
}

int32_t aq_cuda_attention(aq_cuda_buffer q, aq_cuda_buffer k, aq_cuda_buffer v, aq_cuda_buffer key_mask, size_t batch,
                          size_t tokens, size_t heads, size_t kv_heads, size_t head_size, float scale, aq_cuda_buffer out,
                          aq_cuda_stream stream) {
  if (batch == 0 || tokens == 0 || heads == 0 || head_size == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (kv_heads == 0 || heads % kv_heads != 0 || head_size > 32 * PARTS || batch > 65535 || heads > 65535) return AQ_E_SHAPE;
  if (!aq_three_allowed(batch, tokens, heads) || !aq_shape_allowed(batch * tokens * heads, head_size)) return AQ_E_SHAPE;
  const size_t n = batch * tokens * heads * head_size, kv = batch * tokens * kv_heads * head_size;
  const attention_view view = {aq_cuda_view<float>(q, n, on, &status), aq_cuda_view<float>(k, kv, on, &status),
                               aq_cuda_view<float>(v, kv, on, &status),
                               key_mask ? aq_cuda_view<uint8_t>(key_mask, batch * tokens, on, &status) : 0, tokens, heads, kv_heads,
                               head_size, scale, aq_cuda_view<float>(out, n, on, &status)};
  if (status != AQ_OK) return status;
  const size_t bytes = (KEYS * (head_size + 1) + KEYS * head_size + WARPS * QUERIES * head_size) * sizeof(float);
  status = aq_cuda_status(cudaFuncSetAttribute(attend, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
  if (status != AQ_OK) return status;
  const dim3 blocks((unsigned)((tokens - 1) / (WARPS * QUERIES) + 1), (unsigned)heads, (unsigned)batch);
  aq_launch(on, attend, blocks, WARPS * 32, bytes, view);
  return aq_cuda_launched();
}
