/* forward.cu: what a forward pass needs beside linear layers, within tolerances of the CPU's. Sums of rows
 * are double, as the oracle's; exponentials float32. */
#include "../context.h"

#include <math.h>

/* Rows --------------------------------------------------------------------------------------------------- */

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

int32_t aq_cuda_rms_norm(aq_cuda_buffer x, size_t rows, size_t cols, aq_cuda_buffer weight, float epsilon, aq_cuda_buffer out,
                         aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  const rms_norm f = {aq_cuda_view<float>(x, rows * cols, on, &status), aq_cuda_optional(weight, cols, on, &status), cols, epsilon,
                      aq_cuda_view<float>(out, rows * cols, on, &status)};
  return status == AQ_OK ? aq_run_rows(on, f, rows) : status;
}

int32_t aq_cuda_layer_norm(aq_cuda_buffer x, size_t rows, size_t cols, aq_cuda_buffer weight, aq_cuda_buffer bias, float epsilon,
                           aq_cuda_buffer out, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  const layer_norm f = {aq_cuda_view<float>(x, rows * cols, on, &status), aq_cuda_optional(weight, cols, on, &status),
                        aq_cuda_optional(bias, cols, on, &status), cols, epsilon,
                        aq_cuda_view<float>(out, rows * cols, on, &status)};
  return status == AQ_OK ? aq_run_rows(on, f, rows) : status;
}

/* Elements ----------------------------------------------------------------------------------------------- */

AQ_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

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

int32_t aq_cuda_silu(aq_cuda_buffer x, size_t n, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(1, n, &on, stream);
  if (status != AQ_OK) return status;
  const silu f = {aq_cuda_view<float>(x, n, on, &status), aq_cuda_view<float>(out, n, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

int32_t aq_cuda_gelu_tanh(aq_cuda_buffer x, size_t n, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(1, n, &on, stream);
  if (status != AQ_OK) return status;
  const gelu_tanh f = {aq_cuda_view<float>(x, n, on, &status), aq_cuda_view<float>(out, n, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

int32_t aq_cuda_silu_multiply(aq_cuda_buffer gate, aq_cuda_buffer up, size_t n, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(1, n, &on, stream);
  if (status != AQ_OK) return status;
  const silu_multiply f = {aq_cuda_view<float>(gate, n, on, &status), aq_cuda_view<float>(up, n, on, &status),
                           aq_cuda_view<float>(out, n, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

int32_t aq_cuda_add(aq_cuda_buffer a, aq_cuda_buffer b, size_t n, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(1, n, &on, stream);
  if (status != AQ_OK) return status;
  const sum_of_two f = {aq_cuda_view<float>(a, n, on, &status), aq_cuda_view<float>(b, n, on, &status),
                        aq_cuda_view<float>(out, n, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

/* Floats of [batch, cols] with `stride` from one item to the next. */
static size_t strided(size_t batch, size_t stride, size_t cols) { return (batch - 1) * stride + cols; }

int32_t aq_cuda_modulate(aq_cuda_buffer x, aq_cuda_buffer scale, aq_cuda_buffer shift, size_t stride, size_t batch,
                         size_t tokens, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (batch == 0 || tokens == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_three_allowed(batch, tokens, cols) || !aq_counts_allowed(batch, stride)) return AQ_E_SHAPE;
  const size_t n = batch * tokens * cols, width = strided(batch, stride, cols);
  const modulate f = {aq_cuda_view<float>(x, n, on, &status),         aq_cuda_view<float>(scale, width, on, &status),
                      aq_cuda_view<float>(shift, width, on, &status), stride,
                      tokens,                                         cols,
                      aq_cuda_view<float>(out, n, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

int32_t aq_cuda_gate_add(aq_cuda_buffer residual, aq_cuda_buffer gate, aq_cuda_buffer x, size_t stride, size_t batch,
                         size_t tokens, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (batch == 0 || tokens == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_three_allowed(batch, tokens, cols) || !aq_counts_allowed(batch, stride)) return AQ_E_SHAPE;
  const size_t n = batch * tokens * cols;
  const gate_add f = {aq_cuda_view<float>(residual, n, on, &status),
                      aq_cuda_view<float>(gate, strided(batch, stride, cols), on, &status),
                      aq_cuda_view<float>(x, n, on, &status),
                      stride,
                      tokens,
                      cols,
                      aq_cuda_view<float>(out, n, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

/* Places and times --------------------------------------------------------------------------------------- */

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
      atomicOr(faults, (int32_t)AQ_FAULT_VALUE);
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
  if (!aq_three_allowed(batch, channels, height) || !aq_counts_allowed(batch * channels * height, width)) return AQ_E_SHAPE;
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

/* Attention ---------------------------------------------------------------------------------------------- */

/* Eight warps of four queries each; keys in runs of 32, a lane a key for the scores and some of a head's
 * elements for the sums. */
#define WARPS 8
#define QUERIES 4
#define KEYS 32
#define PARTS 8 /* elements of a head that a lane has */

struct attention_view {
  const float *q, *k, *v;
  const uint8_t *key_mask;
  size_t batch, tokens, heads, kv_heads, size, block;
  float scale, *out;
};

/* Keys that a query sees: the first so many. */
AQ_DEVICE size_t visible_keys(const attention_view &view, size_t query) {
  if (view.block == 0) return view.tokens;
  return query + aq_smaller(view.block - query % view.block, view.tokens - query);
}

static __global__ void __launch_bounds__(WARPS * 32) attend(attention_view view) {
  AQ_DYNAMIC_SHARED(float, memory);
  const size_t size = view.size, pitch = size + 1;
  float *const keys = memory, *const values = keys + KEYS * pitch, *const queries = values + KEYS * size;
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const size_t tiles = (view.tokens - 1) / (WARPS * QUERIES) + 1;
  for (size_t unit = blockIdx.x; unit < tiles * view.heads * view.batch; unit += gridDim.x) {
    const size_t query = unit % tiles * WARPS * QUERIES, head = unit / tiles % view.heads, item = unit / tiles / view.heads;
    const size_t kv_head = head / (view.heads / view.kv_heads);
    __syncthreads(); /* all are done with what was there */
    for (size_t e = threadIdx.x; e < WARPS * QUERIES * size; e += WARPS * 32) {
      const size_t i = aq_quotient(e, size), t = query + i;
      queries[e] = t < view.tokens ? view.q[((item * view.tokens + t) * view.heads + head) * size + (e - i * size)] : 0.0f;
    }
    float largest[QUERIES], total[QUERIES] = {}, sums[QUERIES][PARTS] = {};
    for (int i = 0; i < QUERIES; i++) largest[i] = -__builtin_inff();
    const size_t most = visible_keys(view, aq_smaller(query + WARPS * QUERIES, view.tokens) - 1);
    for (size_t first = 0; first < most; first += KEYS) {
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
        const size_t seen = visible_keys(view, aq_smaller(query + warp * QUERIES + (unsigned)i, view.tokens - 1));
        const float *const q = queries + (warp * QUERIES + (unsigned)i) * size;
        float score = 0.0f;
        for (size_t d = 0; d < size; d++) score += q[d] * keys[lane * pitch + d];
        score = there && own < seen ? score * view.scale : -__builtin_inff();
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
}

int32_t aq_cuda_attention(aq_cuda_buffer q, aq_cuda_buffer k, aq_cuda_buffer v, aq_cuda_buffer key_mask, size_t batch,
                          size_t tokens, size_t heads, size_t kv_heads, size_t head_size, size_t block, float scale,
                          aq_cuda_buffer out, aq_cuda_stream stream) {
  if (batch == 0 || tokens == 0 || heads == 0 || head_size == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (kv_heads == 0 || heads % kv_heads != 0) return AQ_E_SHAPE;
  if (!aq_three_allowed(batch, tokens, heads) || !aq_counts_allowed(batch * tokens * heads, head_size)) return AQ_E_SHAPE;
  if (head_size > 32 * PARTS) return AQ_E_UNSUPPORTED; /* a lane's registers have no room */
  const size_t n = batch * tokens * heads * head_size, kv = batch * tokens * kv_heads * head_size;
  const attention_view view = {aq_cuda_view<float>(q, n, on, &status),
                               aq_cuda_view<float>(k, kv, on, &status),
                               aq_cuda_view<float>(v, kv, on, &status),
                               key_mask ? aq_cuda_view<uint8_t>(key_mask, batch * tokens, on, &status) : 0,
                               batch,
                               tokens,
                               heads,
                               kv_heads,
                               head_size,
                               block,
                               scale,
                               aq_cuda_view<float>(out, n, on, &status)};
  if (status != AQ_OK) return status;
  const size_t bytes = (KEYS * (head_size + 1) + KEYS * head_size + WARPS * QUERIES * head_size) * sizeof(float);
  status = aq_cuda_status(cudaFuncSetAttribute(attend, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
  if (status != AQ_OK) return status;
  const size_t units = ((tokens - 1) / (WARPS * QUERIES) + 1) * heads * batch;
  aq_launch(on, attend, aq_cuda_blocks(units, 1), WARPS * 32, bytes, view);
  return aq_cuda_launched();
}
