/* gradient.cu: gradients of a forward pass's parts, the step KL with its gradient, and steps along them. What has no sum, or a sum
 * in the oracle's order, is the oracle's to the bit; other sums are double. */
#include "reduce.h"

#include <math.h>

/* Elements: kernels/cpu/backward_loops.h's arithmetic ------------------------------------------------------------------- */

/* exp(x) in float32 for x <= 88; 0 below -87.33. */
static __device__ __forceinline__ float exp_of(float x) {
  const float magic = x * 1.44269504f + 12582912.0f, n = magic - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return x < -87.33f ? 0.0f : p * aq_bits_float((aq_float_bits(magic) << 23) + 0x3f800000u);
}

static __device__ __forceinline__ float sigmoid_of(float x) {
  const float e = exp_of(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

struct silu_backward {
  const float *x, *dy;
  float *dx;
  __device__ void operator()(size_t i) const {
    const float s = sigmoid_of(x[i]);
    dx[i] = dy[i] * (s + x[i] * s * (1.0f - s));
  }
};
struct gelu_tanh_backward { /* x sigmoid(u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3) */
  const float *x, *dy;
  float *dx;
  __device__ void operator()(size_t i) const {
    const float v = x[i], square = v * v;
    const float s = sigmoid_of(v * (1.5957691216f + square * 0.0713548162f));
    dx[i] = dy[i] * (s + v * s * (1.0f - s) * (1.5957691216f + square * 0.2140644487f));
  }
};
struct silu_multiply_backward {
  const float *gate, *up, *dy;
  float *dgate, *dup;
  __device__ void operator()(size_t i) const {
    const float x = gate[i], s = sigmoid_of(x), y = dy[i], u = up[i];
    dgate[i] = y * u * (s + x * s * (1.0f - s));
    dup[i] = y * x * s;
  }
};
struct projected_step {
  float *values;
  const float *gradients, *low, *high;
  float rate;
  __device__ void operator()(size_t i) const {
    const float value = values[i] - rate * gradients[i];
    const float floored = value < low[i] ? low[i] : value;
    values[i] = floored > high[i] ? high[i] : floored;
  }
};
struct column_sums {
  const float *a, *b; /* b null: ones */
  size_t tokens, cols, stride;
  float *out;
  __device__ void operator()(size_t i) const {
    const size_t item = aq_quotient(i, cols), col = i - item * cols;
    double sum = 0.0;
    for (size_t t = 0; t < tokens; t++) {
      const size_t at = (item * tokens + t) * cols + col;
      sum += b ? (double)a[at] * (double)b[at] : (double)a[at];
    }
    out[item * stride + col] = (float)sum;
  }
};

static int32_t begin(size_t rows, size_t cols, aq_stream_state **on, aq_cuda_stream stream) {
  int32_t status;
  *on = aq_cuda_use(stream, &status);
  return *on && !aq_shape_allowed(rows, cols) ? AQ_E_SHAPE : status;
}

int32_t aq_cuda_silu_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t n, aq_cuda_buffer dx, aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = begin(1, n, &on, stream);
  if (status != AQ_OK) return status;
  const silu_backward f = {aq_cuda_view<float>(x, n, on, &status), aq_cuda_view<float>(dy, n, on, &status),
                           aq_cuda_view<float>(dx, n, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

int32_t aq_cuda_gelu_tanh_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t n, aq_cuda_buffer dx, aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = begin(1, n, &on, stream);
  if (status != AQ_OK) return status;
  const gelu_tanh_backward f = {aq_cuda_view<float>(x, n, on, &status), aq_cuda_view<float>(dy, n, on, &status),
                                aq_cuda_view<float>(dx, n, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

int32_t aq_cuda_silu_multiply_backward(aq_cuda_buffer gate, aq_cuda_buffer up, aq_cuda_buffer dy, size_t n, aq_cuda_buffer dgate,
                                       aq_cuda_buffer dup, aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = begin(1, n, &on, stream);
  if (status != AQ_OK) return status;
  const silu_multiply_backward f = {aq_cuda_view<float>(gate, n, on, &status), aq_cuda_view<float>(up, n, on, &status),
                                    aq_cuda_view<float>(dy, n, on, &status), aq_cuda_view<float>(dgate, n, on, &status),
                                    aq_cuda_view<float>(dup, n, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

int32_t aq_cuda_projected_gradient_step(aq_cuda_buffer values, aq_cuda_buffer gradients, aq_cuda_buffer low, aq_cuda_buffer high,
                                        size_t n, float rate, aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = begin(1, n, &on, stream);
  if (status != AQ_OK) return status;
  const projected_step f = {aq_cuda_view<float>(values, n, on, &status), aq_cuda_view<float>(gradients, n, on, &status),
                            aq_cuda_view<float>(low, n, on, &status), aq_cuda_view<float>(high, n, on, &status), rate};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

int32_t aq_cuda_column_sums(aq_cuda_buffer a, aq_cuda_buffer b, size_t batch, size_t tokens, size_t cols, size_t stride,
                            aq_cuda_buffer out, aq_cuda_stream stream) {
  if (batch == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = begin(batch, cols, &on, stream);
  if (status != AQ_OK) return status;
  if (stride < cols || !aq_three_allowed(batch, cols, tokens) || !aq_shape_allowed(batch, stride)) return AQ_E_SHAPE;
  const size_t n = batch * tokens * cols;
  const column_sums f = {aq_cuda_view<float>(a, n, on, &status), aq_cuda_optional(b, n, on, &status), tokens, cols, stride,
                         aq_cuda_view<float>(out, (batch - 1) * stride + cols, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, batch * cols) : status;
}

/* Transposition ---------------------------------------------------------------------------------------------------------- */

#define SIDE 32

static __global__ void __launch_bounds__(AQ_BLOCK) turn_tiles(const float *in, size_t rows, size_t cols, float *out) {
  __shared__ float tile[SIDE][SIDE + 1];
  const size_t across = (cols - 1) / SIDE + 1, tiles = across * ((rows - 1) / SIDE + 1);
  const unsigned x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
  for (size_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const size_t row = aq_quotient(i, across) * SIDE, col = i % across * SIDE;
    for (unsigned k = y; k < SIDE; k += AQ_BLOCK / SIDE)
      if (row + k < rows && col + x < cols) tile[k][x] = in[(row + k) * cols + col + x];
    __syncthreads();
    for (unsigned k = y; k < SIDE; k += AQ_BLOCK / SIDE)
      if (col + k < cols && row + x < rows) out[(col + k) * rows + row + x] = tile[x][k];
    __syncthreads();
  }
}

int32_t aq_cuda_transpose(aq_cuda_buffer in, size_t rows, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = begin(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  const float *from = aq_cuda_view<float>(in, rows * cols, on, &status);
  float *to = aq_cuda_view<float>(out, rows * cols, on, &status);
  if (status != AQ_OK) return status;
  aq_launch(on, turn_tiles, aq_cuda_blocks(((rows - 1) / SIDE + 1) * ((cols - 1) / SIDE + 1), 1), AQ_BLOCK, 0, from, rows, cols, to);
  return aq_cuda_launched();
}

/* Scales and zero points ------------------------------------------------------------------------------------------------- */

static __global__ void __launch_bounds__(AQ_BLOCK) sum_groups(aq_packed_matrix matrix, const float *dw, float *dscale,
                                                              float *dzero) {
  const aq_layout &layout = matrix.layout;
  const size_t units = layout.rows * layout.groups, lane = threadIdx.x % 32;
  for (size_t unit = aq_thread() / 32; unit < units; unit += aq_all_threads() / 32) {
    const aq_group_place place = aq_place_group(layout, unit);
    double products = 0.0, plain = 0.0;
    for (size_t c = lane; c * AQ_CHUNK < place.n; c += 32) {
      const size_t col = place.col + c * AQ_CHUNK, n = aq_smaller(AQ_CHUNK, place.n - c * AQ_CHUNK);
      const uint64_t codes = aq_read_codes(matrix.packed, layout, place.row, col / AQ_CHUNK);
      for (int k = 0; k < AQ_CHUNK; k++) {
        if ((size_t)k >= n) break;
        const double slope = dw[place.row * layout.cols + col + (size_t)k];
        products += slope * (double)aq_code_of(codes, k, layout.bits);
        plain += slope;
      }
    }
    for (int distance = 16; distance > 0; distance /= 2) {
      products += __shfl_xor_sync(0xffffffffu, products, distance);
      plain += __shfl_xor_sync(0xffffffffu, plain, distance);
    }
    if (lane != 0) continue;
    const aq_grid grid = aq_stored_grid(matrix, place.row, place.group);
    dscale[unit] = (float)(products - (double)grid.zero_point * plain);
    if (dzero) dzero[unit] = (float)(-(double)grid.scale * plain);
  }
}

int32_t aq_cuda_packed_gradient(aq_cuda_buffer dw, aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer zero_point,
                                size_t rows, size_t cols, int32_t bits, size_t group_size, aq_cuda_buffer dscale,
                                aq_cuda_buffer dzero, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = begin(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  if (dzero && !zero_point) return AQ_E_ARGUMENT;
  const aq_packed_matrix matrix = aq_cuda_packed(packed, scale, zero_point, rows, cols, bits, group_size, on, &status);
  const size_t units = rows * matrix.layout.groups;
  const float *slopes = aq_cuda_view<float>(dw, rows * cols, on, &status);
  float *to = aq_cuda_view<float>(dscale, units, on, &status), *zeros = dzero ? aq_cuda_view<float>(dzero, units, on, &status) : 0;
  if (status != AQ_OK) return status;
  aq_launch(on, sum_groups, aq_cuda_blocks(units * 32, AQ_BLOCK), AQ_BLOCK, 0, matrix, slopes, to, zeros);
  return aq_cuda_launched();
}

/* Norms ------------------------------------------------------------------------------------------------------------------ */

struct rms_norm_backward {
  const float *x, *dy, *weight;
  size_t cols;
  float epsilon, *dx;
  __device__ double slope(size_t at, size_t i) const { return (double)dy[at + i] * (weight ? (double)weight[i] : 1.0); }
  __device__ void operator()(size_t row) const {
    const size_t at = row * cols;
    double squares = 0.0, products = 0.0;
    for (size_t i = threadIdx.x; i < cols; i += AQ_BLOCK) {
      squares += (double)x[at + i] * (double)x[at + i];
      products += slope(at, i) * (double)x[at + i];
    }
    const double n = (double)cols, r = 1.0 / sqrt(aq_block_sum(squares) / n + (double)epsilon);
    const double share = r * r * r * aq_block_sum(products) / n;
    for (size_t i = threadIdx.x; i < cols; i += AQ_BLOCK) dx[at + i] = (float)(r * slope(at, i) - share * (double)x[at + i]);
  }
};

struct layer_norm_backward {
  const float *x, *dy, *weight;
  size_t cols;
  float epsilon, *dx;
  __device__ double slope(size_t at, size_t i) const { return (double)dy[at + i] * (weight ? (double)weight[i] : 1.0); }
  __device__ void operator()(size_t row) const {
    const size_t at = row * cols;
    const double n = (double)cols;
    double sum = 0.0, squares = 0.0, gradients = 0.0, products = 0.0;
    for (size_t i = threadIdx.x; i < cols; i += AQ_BLOCK) sum += (double)x[at + i];
    const double mean = aq_block_sum(sum) / n;
    for (size_t i = threadIdx.x; i < cols; i += AQ_BLOCK) {
      const double centred = (double)x[at + i] - mean, g = slope(at, i);
      squares += centred * centred;
      gradients += g;
      products += g * centred;
    }
    const double r = 1.0 / sqrt(aq_block_sum(squares) / n + (double)epsilon);
    const double mean_gradient = aq_block_sum(gradients) / n, share = r * r * aq_block_sum(products) / n;
    for (size_t i = threadIdx.x; i < cols; i += AQ_BLOCK)
      dx[at + i] = (float)(r * (slope(at, i) - mean_gradient - ((double)x[at + i] - mean) * share));
  }
};

template <class Norm>
static int32_t norm_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t rows, size_t cols, aq_cuda_buffer weight, float epsilon,
                             aq_cuda_buffer dx, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = begin(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  const Norm f = {aq_cuda_view<float>(x, rows * cols, on, &status), aq_cuda_view<float>(dy, rows * cols, on, &status),
                  aq_cuda_optional(weight, cols, on, &status), cols, epsilon, aq_cuda_view<float>(dx, rows * cols, on, &status)};
  return status == AQ_OK ? aq_run_rows(on, f, rows) : status;
}

int32_t aq_cuda_rms_norm_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t rows, size_t cols, aq_cuda_buffer weight,
                                  float epsilon, aq_cuda_buffer dx, aq_cuda_stream stream) {
  return norm_backward<rms_norm_backward>(x, dy, rows, cols, weight, epsilon, dx, stream);
}

int32_t aq_cuda_layer_norm_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t rows, size_t cols, aq_cuda_buffer weight,
                                    float epsilon, aq_cuda_buffer dx, aq_cuda_stream stream) {
  return norm_backward<layer_norm_backward>(x, dy, rows, cols, weight, epsilon, dx, stream);
}

/* Attention -------------------------------------------------------------------------------------------------------------- */

#define PARTS 8 /* elements of a head that a lane has */

struct slopes_view {
  const float *q, *k, *v, *out, *dout;
  const uint8_t *key_mask;
  size_t batch, tokens, heads, kv_heads, size;
  float scale;
  float *dq, *dk, *dv;
  float *notes; /* of a query of a head: largest score, one over the sum, dout out */
  __device__ size_t query_at(size_t item, size_t head, size_t t) const { return ((item * tokens + t) * heads + head) * size; }
  __device__ size_t key_at(size_t item, size_t head, size_t t) const { return ((item * tokens + t) * kv_heads + head) * size; }
  __device__ bool seen(size_t item, size_t key) const { return key < tokens && (!key_mask || key_mask[item * tokens + key]); }
  __device__ float dot(const float *a, const float *b) const {
    float sum = 0.0f;
    for (size_t d = 0; d < size; d++) sum += a[d] * b[d];
    return sum;
  }
};

/* A warp a query: notes and dq. */
static __global__ void __launch_bounds__(AQ_BLOCK) attention_queries(slopes_view view) {
  const size_t lane = threadIdx.x % 32, units = view.batch * view.heads * view.tokens;
  for (size_t unit = aq_thread() / 32; unit < units; unit += aq_all_threads() / 32) {
    const size_t t = unit % view.tokens, head = unit / view.tokens % view.heads, item = unit / view.tokens / view.heads;
    const size_t kv_head = head / (view.heads / view.kv_heads), at = view.query_at(item, head, t);
    float largest = -__builtin_inff(), sum = 0.0f, sums[PARTS] = {};
    for (size_t key = lane; key < view.tokens; key += 32) {
      if (!view.seen(item, key)) continue;
      const float score = view.dot(view.q + at, view.k + view.key_at(item, kv_head, key)) * view.scale;
      if (score > largest) {
        sum = sum * exp_of(largest - score) + 1.0f;
        largest = score;
      } else {
        sum += exp_of(score - largest);
      }
    }
    float peak = largest;
    for (int distance = 16; distance > 0; distance /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, peak, distance);
      peak = other > peak ? other : peak;
    }
    sum = largest == -__builtin_inff() ? 0.0f : sum * exp_of(largest - peak);
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (sum == 0.0f) peak = 0.0f;
    double own = 0.0;
    for (size_t d = lane; d < view.size; d += 32) own += (double)view.dout[at + d] * (double)view.out[at + d];
    for (int distance = 16; distance > 0; distance /= 2) own += __shfl_xor_sync(0xffffffffu, own, distance);
    const float share = (float)own;
    for (size_t first = 0; first < view.tokens; first += 32) {
      const size_t key = first + lane;
      float slope = 0.0f;
      if (view.seen(item, key)) {
        const size_t kv = view.key_at(item, kv_head, key);
        const float p = exp_of(view.dot(view.q + at, view.k + kv) * view.scale - peak) * factor;
        slope = p * (view.dot(view.dout + at, view.v + kv) - share) * view.scale;
      }
      const int count = (int)aq_smaller(32, view.tokens - first);
      for (int k = 0; k < count; k++) {
        const float taken = __shfl_sync(0xffffffffu, slope, k);
        const float *from = view.k + view.key_at(item, kv_head, first + (size_t)k);
#pragma unroll
        for (size_t part = 0; part < PARTS; part++)
          if (lane + 32 * part < view.size) sums[part] += taken * from[lane + 32 * part];
      }
    }
#pragma unroll
    for (size_t part = 0; part < PARTS; part++)
      if (lane + 32 * part < view.size) view.dq[at + lane + 32 * part] = sums[part];
    if (lane == 0) {
      view.notes[3 * unit] = peak;
      view.notes[3 * unit + 1] = factor;
      view.notes[3 * unit + 2] = share;
    }
  }
}

/* A warp a key: dk and dv. */
static __global__ void __launch_bounds__(AQ_BLOCK) attention_keys(slopes_view view) {
  const size_t lane = threadIdx.x % 32, units = view.batch * view.kv_heads * view.tokens, shared = view.heads / view.kv_heads;
  for (size_t unit = aq_thread() / 32; unit < units; unit += aq_all_threads() / 32) {
    const size_t key = unit % view.tokens, kv_head = unit / view.tokens % view.kv_heads, item = unit / view.tokens / view.kv_heads;
    const size_t kv = view.key_at(item, kv_head, key);
    float dk[PARTS] = {}, dv[PARTS] = {};
    for (size_t head = kv_head * shared; head < (kv_head + 1) * shared && view.seen(item, key); head++)
      for (size_t first = 0; first < view.tokens; first += 32) {
        const size_t t = first + lane;
        float p = 0.0f, slope = 0.0f;
        if (t < view.tokens) {
          const float *note = view.notes + 3 * ((item * view.heads + head) * view.tokens + t);
          const size_t at = view.query_at(item, head, t);
          p = exp_of(view.dot(view.q + at, view.k + kv) * view.scale - note[0]) * note[1];
          slope = p * (view.dot(view.dout + at, view.v + kv) - note[2]) * view.scale;
        }
        const int count = (int)aq_smaller(32, view.tokens - first);
        for (int k = 0; k < count; k++) {
          const float own_slope = __shfl_sync(0xffffffffu, slope, k), own_p = __shfl_sync(0xffffffffu, p, k);
          const size_t at = view.query_at(item, head, first + (size_t)k);
#pragma unroll
          for (size_t part = 0; part < PARTS; part++)
            if (lane + 32 * part < view.size) {
              dk[part] += own_slope * view.q[at + lane + 32 * part];
              dv[part] += own_p * view.dout[at + lane + 32 * part];
            }
        }
      }
#pragma unroll
    for (size_t part = 0; part < PARTS; part++)
      if (lane + 32 * part < view.size) {
        view.dk[kv + lane + 32 * part] = dk[part];
        view.dv[kv + lane + 32 * part] = dv[part];
      }
  }
}

int32_t aq_cuda_attention_backward(aq_cuda_buffer q, aq_cuda_buffer k, aq_cuda_buffer v, aq_cuda_buffer out, aq_cuda_buffer dout,
                                   aq_cuda_buffer key_mask, size_t batch, size_t tokens, size_t heads, size_t kv_heads,
                                   size_t head_size, float scale, aq_cuda_buffer dq, aq_cuda_buffer dk, aq_cuda_buffer dv,
                                   aq_cuda_stream stream) {
  if (batch == 0 || tokens == 0 || heads == 0 || head_size == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = begin(batch, tokens, &on, stream);
  if (status != AQ_OK) return status;
  if (kv_heads == 0 || heads % kv_heads != 0 || head_size > 32 * PARTS) return AQ_E_SHAPE;
  if (!aq_three_allowed(batch, tokens, heads) || !aq_shape_allowed(batch * tokens * heads, head_size)) return AQ_E_SHAPE;
  const size_t n = batch * tokens * heads * head_size, kv = batch * tokens * kv_heads * head_size;
  slopes_view view = {};
  view.q = aq_cuda_view<float>(q, n, on, &status);
  view.k = aq_cuda_view<float>(k, kv, on, &status);
  view.v = aq_cuda_view<float>(v, kv, on, &status);
  view.out = aq_cuda_view<float>(out, n, on, &status);
  view.dout = aq_cuda_view<float>(dout, n, on, &status);
  view.key_mask = key_mask ? aq_cuda_view<uint8_t>(key_mask, batch * tokens, on, &status) : 0;
  view.batch = batch;
  view.tokens = tokens;
  view.heads = heads;
  view.kv_heads = kv_heads;
  view.size = head_size;
  view.scale = scale;
  view.dq = aq_cuda_view<float>(dq, n, on, &status);
  view.dk = aq_cuda_view<float>(dk, kv, on, &status);
  view.dv = aq_cuda_view<float>(dv, kv, on, &status);
  view.notes = (float *)aq_cuda_scratch(on, batch * tokens * heads * 3 * sizeof(float), &status);
  if (status != AQ_OK) return status;
  aq_launch(on, attention_queries, aq_cuda_blocks(batch * tokens * heads * 32, AQ_BLOCK), AQ_BLOCK, 0, view);
  aq_launch(on, attention_keys, aq_cuda_blocks(batch * tokens * kv_heads * 32, AQ_BLOCK), AQ_BLOCK, 0, view);
  return aq_cuda_launched();
}

/* Step KL ---------------------------------------------------------------------------------------------------------------- */

static __device__ double log_sum_of(const float *x, size_t cols, float *largest) {
  aq_largest own = {-__builtin_inff(), 0xffffffffu};
  for (size_t i = threadIdx.x; i < cols; i += AQ_BLOCK) own = aq_larger(own, {x[i], (uint32_t)i});
  *largest = aq_block_largest(own).value;
  double sum = 0.0;
  for (size_t i = threadIdx.x; i < cols; i += AQ_BLOCK) sum += exp((double)x[i] - (double)*largest);
  return log(aq_block_sum(sum));
}

/* sum p (log p - log q) with p and q the softmax of the two rows; its slope along the other's logits is q - p. */
struct token_kl {
  const float *full, *other, *weights;
  size_t cols;
  double *kl;
  float *gradient;
  __device__ void operator()(size_t row) const {
    const float *p = full + row * cols, *q = other + row * cols;
    float p_largest, q_largest;
    const double p_log = log_sum_of(p, cols, &p_largest), q_log = log_sum_of(q, cols, &q_largest);
    double sum = 0.0;
    for (size_t i = threadIdx.x; i < cols; i += AQ_BLOCK) {
      const double log_p = (double)p[i] - (double)p_largest - p_log, log_q = (double)q[i] - (double)q_largest - q_log;
      const double own = exp(log_p);
      if (own > 0.0) sum += own * (log_p - log_q); /* a logit of -infinity in both is a token that does not count */
      if (gradient) gradient[row * cols + i] = (float)((weights ? (double)weights[row] : 1.0) * (exp(log_q) - own));
    }
    sum = aq_block_sum(sum);
    if (threadIdx.x == 0) kl[row] = sum > 0.0 ? sum : 0.0;
  }
};

int32_t aq_cuda_token_kl(aq_cuda_buffer full, aq_cuda_buffer other, aq_cuda_buffer weights, size_t rows, size_t cols,
                         aq_cuda_buffer kl, aq_cuda_buffer gradient, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = begin(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  const token_kl f = {aq_cuda_view<float>(full, rows * cols, on, &status), aq_cuda_view<float>(other, rows * cols, on, &status),
                      aq_cuda_optional(weights, rows, on, &status), cols, aq_cuda_view<double>(kl, rows, on, &status),
                      gradient ? aq_cuda_view<float>(gradient, rows * cols, on, &status) : 0};
  return status == AQ_OK ? aq_run_rows(on, f, rows) : status;
}

struct squared_errors {
  const float *full, *other, *weights;
  size_t cols;
  double *sums;
  float *gradient;
  __device__ void operator()(size_t row) const {
    const double weight = weights ? (double)weights[row] : 1.0;
    double sum = 0.0;
    for (size_t i = threadIdx.x; i < cols; i += AQ_BLOCK) {
      const size_t at = row * cols + i;
      const double difference = (double)other[at] - (double)full[at];
      sum += difference * difference;
      if (gradient) gradient[at] = (float)(2.0 * weight * difference);
    }
    sum = aq_block_sum(sum);
    if (threadIdx.x == 0) sums[row] = weight * sum;
  }
};

int32_t aq_cuda_squared_errors(aq_cuda_buffer full, aq_cuda_buffer other, aq_cuda_buffer weights, size_t rows, size_t cols,
                               aq_cuda_buffer sums, aq_cuda_buffer gradient, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = begin(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  const squared_errors f = {aq_cuda_view<float>(full, rows * cols, on, &status), aq_cuda_view<float>(other, rows * cols, on, &status),
                            aq_cuda_optional(weights, rows, on, &status), cols, aq_cuda_view<double>(sums, rows, on, &status),
                            gradient ? aq_cuda_view<float>(gradient, rows * cols, on, &status) : 0};
  return status == AQ_OK ? aq_run_rows(on, f, rows) : status;
}
