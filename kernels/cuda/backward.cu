/* backward.cu: gradients of a forward pass's parts, and Adam's steps along them: the CPU's bytes. Sums run in
 * AQ_SUM_LANES lanes by position, added up in order, as kernels/cpu/backward/loops.h says. */
#include "context.h"

#include "../arithmetic/gradients.h"
#include "../arithmetic/trellis.h"

#define AQ_SUM_LANES 8
#define AQ_SUM_ROWS (AQ_BLOCK / AQ_SUM_LANES) /* rows of a block, a quarter of a warp each */
#define AQ_ALL_LANES 0xffffffffu

/* Elements ----------------------------------------------------------------------------------------------- */

struct silu_backward {
  const float *x, *dy;
  float *dx;
  __device__ void operator()(size_t i) const {
    dx[i] = dy[i] * aq_silu_slope(x[i], aq_sigmoid_of(x[i]));
  }
};

struct gelu_tanh_backward {
  const float *x, *dy;
  float *dx;
  __device__ void operator()(size_t i) const { dx[i] = dy[i] * aq_gelu_tanh_slope(x[i]); }
};

struct silu_multiply_backward {
  const float *gate, *up, *dy;
  float *dgate, *dup;
  __device__ void operator()(size_t i) const {
    const float x = gate[i], s = aq_sigmoid_of(x), y = dy[i], u = up[i];
    dgate[i] = y * u * aq_silu_slope(x, s);
    dup[i] = y * x * s;
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

struct adam {
  float *values;
  const float *gradients;
  float *first, *second;
  aq_adam step;
  __device__ void operator()(size_t i) const {
    const float g = gradients[i], m = step.b1 * first[i] + step.c1 * g, v = step.b2 * second[i] + step.c2 * (g * g);
    first[i] = m;
    second[i] = v;
    values[i] = values[i] - step.rate * m / (AQ_SQRT(v) * step.root + step.epsilon);
  }
};

int32_t aq_cuda_silu_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t n, aq_cuda_buffer dx, aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(1, n, &on, stream);
  if (status != AQ_OK) return status;
  const silu_backward f = {aq_cuda_view<float>(x, n, on, &status), aq_cuda_view<float>(dy, n, on, &status),
                           aq_cuda_view<float>(dx, n, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

int32_t aq_cuda_gelu_tanh_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t n, aq_cuda_buffer dx,
                                   aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(1, n, &on, stream);
  if (status != AQ_OK) return status;
  const gelu_tanh_backward f = {aq_cuda_view<float>(x, n, on, &status), aq_cuda_view<float>(dy, n, on, &status),
                                aq_cuda_view<float>(dx, n, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

int32_t aq_cuda_silu_multiply_backward(aq_cuda_buffer gate, aq_cuda_buffer up, aq_cuda_buffer dy, size_t n,
                                       aq_cuda_buffer dgate, aq_cuda_buffer dup, aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(1, n, &on, stream);
  if (status != AQ_OK) return status;
  const silu_multiply_backward f = {aq_cuda_view<float>(gate, n, on, &status), aq_cuda_view<float>(up, n, on, &status),
                                    aq_cuda_view<float>(dy, n, on, &status), aq_cuda_view<float>(dgate, n, on, &status),
                                    aq_cuda_view<float>(dup, n, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

int32_t aq_cuda_column_sums(aq_cuda_buffer a, aq_cuda_buffer b, size_t batch, size_t tokens, size_t cols, size_t stride,
                            aq_cuda_buffer out, aq_cuda_stream stream) {
  if (batch == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(batch, cols, &on, stream);
  if (status != AQ_OK) return status;
  if (stride < cols || !aq_three_allowed(batch, cols, tokens) || !aq_counts_allowed(batch, stride)) return AQ_E_SHAPE;
  const size_t n = batch * tokens * cols;
  const column_sums f = {n ? aq_cuda_view<float>(a, n, on, &status) : 0, aq_cuda_optional(b, n, on, &status), tokens, cols,
                         stride, aq_cuda_view<float>(out, (batch - 1) * stride + cols, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, batch * cols) : status;
}

int32_t aq_cuda_adam_step(aq_cuda_buffer values, aq_cuda_buffer gradients, aq_cuda_buffer first, aq_cuda_buffer second,
                          size_t n, double rate, double beta1, double beta2, double epsilon, int32_t step,
                          aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(1, n, &on, stream);
  if (status != AQ_OK) return status;
  if (!aq_adam_allowed(beta1, beta2, epsilon, step)) return AQ_E_VALUE;
  const adam f = {aq_cuda_view<float>(values, n, on, &status), aq_cuda_view<float>(gradients, n, on, &status),
                  aq_cuda_view<float>(first, n, on, &status), aq_cuda_view<float>(second, n, on, &status),
                  aq_adam_of(rate, beta1, beta2, epsilon, step)};
  return status == AQ_OK ? aq_run_elements(on, f, n) : status;
}

/* Transposition ------------------------------------------------------------------------------------------ */

struct transposed {
  const float *in;
  size_t rows, cols;
  float *out;
  __device__ bool wants(size_t, size_t) const { return true; }
  __device__ float at(size_t i, size_t j) const { return in[i * cols + j]; }
  __device__ void put(size_t j, size_t i, float value) const { out[j * rows + i] = value; }
};

int32_t aq_cuda_transpose(aq_cuda_buffer in, size_t rows, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  const transposed f = {aq_cuda_view<float>(in, rows * cols, on, &status), rows, cols,
                        aq_cuda_view<float>(out, rows * cols, on, &status)};
  return status == AQ_OK ? aq_run_turned(on, f, rows, cols) : status;
}

/* Sums in lanes ------------------------------------------------------------------------------------------ */

AQ_DEVICE size_t sum_lane(void) { return threadIdx.x % AQ_SUM_LANES; }

/* The lanes' sums added up in order, in all of them. */
AQ_DEVICE double total(double own) {
  double sum = 0.0;
  const int first = (int)(threadIdx.x % 32) / AQ_SUM_LANES * AQ_SUM_LANES;
  for (int i = 0; i < AQ_SUM_LANES; i++) sum += __shfl_sync(AQ_ALL_LANES, own, first + i);
  return sum;
}

/* f(unit, there) for every unit, a quarter of a warp each; all quarters come as often. */
template <class F>
static __global__ void __launch_bounds__(AQ_BLOCK) each_sum(F f, size_t units) {
  for (size_t first = (size_t)blockIdx.x * AQ_SUM_ROWS; first < units; first += (size_t)gridDim.x * AQ_SUM_ROWS) {
    const size_t unit = first + threadIdx.x / AQ_SUM_LANES;
    f(unit < units ? unit : units - 1, unit < units);
  }
}

template <class F>
static int32_t run_sums(const aq_stream_state *on, const F &f, size_t units) {
  aq_launch(on, each_sum<F>, aq_cuda_blocks(units, AQ_SUM_ROWS), AQ_BLOCK, 0, f, units);
  return aq_cuda_launched();
}

/* The sums of dw times code_at(row, col) over a group, and of dw, in the lanes of a unit. */
struct code_sums {
  double products, plain;
};
template <class Code>
AQ_DEVICE code_sums sums_of_codes(const float *dw, const aq_layout &layout, size_t unit, const Code &code_at) {
  const aq_group_place place = aq_place_group(layout, unit);
  code_sums sums = {0.0, 0.0};
  for (size_t first = 0; first < place.n; first += AQ_SEGMENT) {
    double own = 0.0, own_plain = 0.0;
    for (size_t k = first + sum_lane(); k < aq_smaller(first + AQ_SEGMENT, place.n); k += AQ_SUM_LANES) {
      const double slope = dw[place.row * layout.cols + place.col + k];
      own += slope * (double)code_at(place.row, place.col + k);
      own_plain += slope;
    }
    sums.products += total(own);
    sums.plain += total(own_plain);
  }
  return sums;
}

/* The `count` bits of a row from `bit` on, at most 25. */
AQ_DEVICE uint32_t bits_at(const uint32_t *packed, const aq_layout &layout, size_t row, size_t bit, int32_t count) {
  const size_t shift = bit % 32;
  const uint32_t *word = packed + row * layout.words + bit / 32;
  uint32_t bits = word[0] >> shift;
  if (shift + (size_t)count > 32) bits |= word[1] << (32 - shift);
  return bits & ((1u << count) - 1);
}

struct packed_sums {
  const float *dw;
  const uint32_t *packed;
  const uint16_t *scale, *zero_point;
  aq_layout layout;
  float *dscale, *dzero;
  __device__ void operator()(size_t unit, bool there) const {
    const code_sums sums = sums_of_codes(dw, layout, unit, [&](size_t row, size_t col) {
      return bits_at(packed, layout, row, col * (size_t)layout.bits, layout.bits);
    });
    if (!there || sum_lane() != 0) return;
    const double zero = zero_point ? (double)aq_half_value(zero_point[unit]) : (double)(1 << (layout.bits - 1));
    dscale[unit] = (float)(sums.products - zero * sums.plain);
    if (dzero) dzero[unit] = (float)(-(double)aq_half_value(scale[unit]) * sums.plain);
  }
};

int32_t aq_cuda_packed_gradient(aq_cuda_buffer dw, aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer zero_point,
                                size_t rows, size_t cols, int32_t bits, size_t group_size, aq_cuda_buffer dscale,
                                aq_cuda_buffer dzero, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  if (!aq_bits_allowed(bits) || (dzero && !zero_point)) return AQ_E_ARGUMENT;
  if (aq_group_columns(group_size, cols) == 0) return AQ_E_SHAPE;
  const aq_layout layout = aq_layout_of(rows, cols, bits, group_size);
  const size_t units = rows * layout.groups;
  const packed_sums f = {aq_cuda_view<float>(dw, rows * cols, on, &status),
                         aq_cuda_view<uint32_t>(packed, rows * layout.words, on, &status),
                         aq_cuda_view<uint16_t>(scale, units, on, &status),
                         zero_point ? aq_cuda_view<uint16_t>(zero_point, units, on, &status) : 0,
                         layout,
                         aq_cuda_view<float>(dscale, units, on, &status),
                         dzero ? aq_cuda_view<float>(dzero, units, on, &status) : 0};
  return status == AQ_OK ? run_sums(on, f, units) : status;
}

static __device__ const int8_t trellis_terms[2][32] = {{AQ_TRELLIS_TERMS_2}, {AQ_TRELLIS_TERMS_3}};

struct trellis_sums {
  const float *dw;
  const uint32_t *packed;
  aq_layout layout;
  float *dscale, *doffset;
  __device__ void operator()(size_t unit, bool there) const {
    const int8_t *terms = trellis_terms[layout.bits - 2];
    const code_sums sums = sums_of_codes(dw, layout, unit, [&](size_t row, size_t col) {
      const size_t bit = col * (size_t)layout.bits;
      const int32_t missing = bit < AQ_TRELLIS_BEFORE ? AQ_TRELLIS_BEFORE - (int32_t)bit : 0;
      const int32_t count = AQ_TRELLIS_BEFORE + layout.bits - missing;
      const uint32_t window = bits_at(packed, layout, row, bit + (size_t)missing - AQ_TRELLIS_BEFORE, count) << missing;
      const int32_t level = aq_trellis_level_of(terms, window, layout.bits);
      return level + AQ_LEVEL_ZERO; /* as the CPU's sums have it */
    });
    if (!there || sum_lane() != 0) return;
    dscale[unit] = (float)((sums.products - AQ_LEVEL_ZERO * sums.plain) * (double)AQ_TRELLIS_UNIT);
    doffset[unit] = (float)sums.plain;
  }
};

int32_t aq_cuda_trellis_gradient(aq_cuda_buffer dw, aq_cuda_buffer packed, size_t rows, size_t cols, int32_t bits,
                                 size_t group_size, aq_cuda_buffer dscale, aq_cuda_buffer doffset,
                                 aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  if (!aq_trellis_bits_allowed(bits)) return AQ_E_ARGUMENT;
  if (aq_group_columns(group_size, cols) == 0) return AQ_E_SHAPE;
  const aq_layout layout = aq_layout_of(rows, cols, bits, group_size);
  const size_t units = rows * layout.groups;
  const trellis_sums f = {aq_cuda_view<float>(dw, rows * cols, on, &status),
                          aq_cuda_view<uint32_t>(packed, rows * layout.words, on, &status), layout,
                          aq_cuda_view<float>(dscale, units, on, &status),
                          aq_cuda_view<float>(doffset, units, on, &status)};
  return status == AQ_OK ? run_sums(on, f, units) : status;
}

struct norm_backward {
  const float *x, *dy, *weight;
  size_t cols;
  float epsilon, *dx;
  bool centres; /* a layer norm */
  __device__ double slope(size_t at, size_t i) const {
    return (double)dy[at + i] * (weight ? (double)weight[i] : 1.0);
  }
  __device__ void rms(size_t at, bool there) const {
    double squares = 0.0, products = 0.0;
    for (size_t i = sum_lane(); i < cols; i += AQ_SUM_LANES) {
      squares += (double)x[at + i] * (double)x[at + i];
      products += slope(at, i) * (double)x[at + i];
    }
    const double n = (double)cols, r = 1.0 / sqrt(total(squares) / n + (double)epsilon);
    const double share = r * r * r * total(products) / n;
    for (size_t i = sum_lane(); there && i < cols; i += AQ_SUM_LANES)
      dx[at + i] = (float)(r * slope(at, i) - share * (double)x[at + i]);
  }
  __device__ void layer(size_t at, bool there) const {
    const double n = (double)cols;
    double sum = 0.0, squares = 0.0, gradients = 0.0, products = 0.0;
    for (size_t i = sum_lane(); i < cols; i += AQ_SUM_LANES) sum += (double)x[at + i];
    const double mean = total(sum) / n;
    for (size_t i = sum_lane(); i < cols; i += AQ_SUM_LANES) {
      const double g = slope(at, i), centred = (double)x[at + i] - mean;
      squares += centred * centred;
      gradients += g;
      products += g * centred;
    }
    const double r = 1.0 / sqrt(total(squares) / n + (double)epsilon);
    const double mean_gradient = total(gradients) / n, share = r * r * total(products) / n;
    for (size_t i = sum_lane(); there && i < cols; i += AQ_SUM_LANES)
      dx[at + i] = (float)(r * (slope(at, i) - mean_gradient - ((double)x[at + i] - mean) * share));
  }
  __device__ void operator()(size_t row, bool there) const {
    if (centres) layer(row * cols, there);
    else rms(row * cols, there);
  }
};

static int32_t run_norm_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t rows, size_t cols, aq_cuda_buffer weight,
                                 float epsilon, aq_cuda_buffer dx, bool centres, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  norm_backward f = {aq_cuda_view<float>(x, rows * cols, on, &status),
                     aq_cuda_view<float>(dy, rows * cols, on, &status),
                     aq_cuda_optional(weight, cols, on, &status),
                     cols,
                     epsilon,
                     aq_cuda_view<float>(dx, rows * cols, on, &status),
                     centres};
  return status == AQ_OK ? run_sums(on, f, rows) : status;
}

int32_t aq_cuda_rms_norm_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t rows, size_t cols, aq_cuda_buffer weight,
                                  float epsilon, aq_cuda_buffer dx, aq_cuda_stream stream) {
  return run_norm_backward(x, dy, rows, cols, weight, epsilon, dx, false, stream);
}

int32_t aq_cuda_layer_norm_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t rows, size_t cols, aq_cuda_buffer weight,
                                    float epsilon, aq_cuda_buffer dx, aq_cuda_stream stream) {
  return run_norm_backward(x, dy, rows, cols, weight, epsilon, dx, true, stream);
}

/* Attention ---------------------------------------------------------------------------------------------- */

#define PARTS 8  /* elements of a head that a lane has */
#define SCORES 64 /* keys whose exponentials are summed up at once */

struct slopes_view {
  const float *q, *k, *v, *out, *dout;
  const uint8_t *key_mask;
  size_t batch, tokens, heads, kv_heads, size;
  float scale;
  float *dq, *dk, *dv;
  float *notes; /* of a query of a head: largest score, one over the sum, dout out */
  __device__ size_t query_at(size_t item, size_t head, size_t t) const {
    return ((item * tokens + t) * heads + head) * size;
  }
  __device__ size_t key_at(size_t item, size_t head, size_t t) const {
    return ((item * tokens + t) * kv_heads + head) * size;
  }
  __device__ float dot(const float *a, const float *b) const {
    float sum = 0.0f;
    for (size_t d = 0; d < size; d++) sum += a[d] * b[d];
    return sum;
  }
  __device__ float score(size_t at, size_t item, size_t kv_head, size_t key) const {
    if (key >= tokens || (key_mask && !key_mask[item * tokens + key])) return -__builtin_inff();
    return dot(q + at, k + key_at(item, kv_head, key)) * scale;
  }
};

/* The largest score of a query, and the sum of the exponentials behind it. */
AQ_DEVICE void softmax_of(const slopes_view &view, size_t at, size_t item, size_t kv_head, float *largest, float *sum) {
  const float lowest = -__builtin_inff();
  const size_t lane = threadIdx.x % 32;
  *largest = lowest;
  *sum = 0.0f;
  for (size_t first = 0; first < view.tokens; first += SCORES) {
    const float low = view.score(at, item, kv_head, first + lane), high = view.score(at, item, kv_head, first + 32 + lane);
    float peak = low > *largest ? low : *largest;
    peak = high > peak ? high : peak;
    for (int distance = 16; distance > 0; distance /= 2) {
      const float other = __shfl_xor_sync(AQ_ALL_LANES, peak, distance);
      peak = other > peak ? other : peak;
    }
    if (peak == lowest) continue; /* of all lanes */
    const float e_low = aq_exp_of(low - peak), e_high = aq_exp_of(high - peak);
    float own = 0.0f; /* of lane i of the sums: keys i, AQ_SUM_LANES + i, ... */
    for (size_t j = 0; j < 32; j += AQ_SUM_LANES) own += __shfl_sync(AQ_ALL_LANES, e_low, (int)(j + sum_lane()));
    for (size_t j = 0; j < 32; j += AQ_SUM_LANES) own += __shfl_sync(AQ_ALL_LANES, e_high, (int)(j + sum_lane()));
    float added = *largest == lowest ? 0.0f : *sum * aq_exp_of(*largest - peak);
    for (int i = 0; i < AQ_SUM_LANES; i++) added += __shfl_sync(AQ_ALL_LANES, own, i);
    *largest = peak;
    *sum = added;
  }
}

/* A warp a query: notes and dq. */
static __global__ void __launch_bounds__(AQ_BLOCK) attention_queries(slopes_view view) {
  const size_t lane = threadIdx.x % 32, units = view.batch * view.heads * view.tokens;
  for (size_t unit = aq_thread() / 32; unit < units; unit += aq_all_threads() / 32) {
    const size_t t = unit % view.tokens, head = unit / view.tokens % view.heads, item = unit / view.tokens / view.heads;
    const size_t kv_head = head / (view.heads / view.kv_heads), at = view.query_at(item, head, t);
    float peak, sum, sums[PARTS] = {};
    softmax_of(view, at, item, kv_head, &peak, &sum);
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (sum == 0.0f) peak = 0.0f;
    double own = 0.0;
    for (size_t d = 0; d < view.size; d++) own += (double)view.dout[at + d] * (double)view.out[at + d];
    const float share = (float)own;
    for (size_t first = 0; first < view.tokens; first += 32) {
      const size_t key = first + lane;
      float slope = 0.0f;
      if (key < view.tokens) {
        const float p = aq_exp_of(view.score(at, item, kv_head, key) - peak) * factor;
        slope = p * (view.dot(view.dout + at, view.v + view.key_at(item, kv_head, key)) - share) * view.scale;
      }
      const int count = (int)aq_smaller(32, view.tokens - first);
      for (int k = 0; k < count; k++) {
        const float taken = __shfl_sync(AQ_ALL_LANES, slope, k);
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
  const size_t lane = threadIdx.x % 32, units = view.batch * view.kv_heads * view.tokens;
  const size_t shared = view.heads / view.kv_heads;
  for (size_t unit = aq_thread() / 32; unit < units; unit += aq_all_threads() / 32) {
    const size_t key = unit % view.tokens, kv_head = unit / view.tokens % view.kv_heads;
    const size_t item = unit / view.tokens / view.kv_heads, kv = view.key_at(item, kv_head, key);
    float dk[PARTS] = {}, dv[PARTS] = {};
    for (size_t head = kv_head * shared; head < (kv_head + 1) * shared; head++)
      for (size_t first = 0; first < view.tokens; first += 32) {
        const size_t t = first + lane;
        float p = 0.0f, slope = 0.0f;
        if (t < view.tokens) {
          const float *note = view.notes + 3 * ((item * view.heads + head) * view.tokens + t);
          const size_t at = view.query_at(item, head, t);
          p = aq_exp_of(view.score(at, item, kv_head, key) - note[0]) * note[1];
          slope = p * (view.dot(view.dout + at, view.v + kv) - note[2]) * view.scale;
        }
        const int count = (int)aq_smaller(32, view.tokens - first);
        for (int k = 0; k < count; k++) {
          const float own_slope = __shfl_sync(AQ_ALL_LANES, slope, k), own_p = __shfl_sync(AQ_ALL_LANES, p, k);
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

int32_t aq_cuda_attention_backward(aq_cuda_buffer q, aq_cuda_buffer k, aq_cuda_buffer v, aq_cuda_buffer out,
                                   aq_cuda_buffer dout, aq_cuda_buffer key_mask, size_t batch, size_t tokens,
                                   size_t heads, size_t kv_heads, size_t head_size, float scale, aq_cuda_buffer dq,
                                   aq_cuda_buffer dk, aq_cuda_buffer dv, aq_cuda_stream stream) {
  if (batch == 0 || tokens == 0 || heads == 0 || head_size == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(batch, tokens, &on, stream);
  if (status != AQ_OK) return status;
  if (kv_heads == 0 || heads % kv_heads != 0) return AQ_E_SHAPE;
  if (!aq_three_allowed(batch, tokens, heads) || !aq_counts_allowed(batch * tokens * heads, head_size)) return AQ_E_SHAPE;
  if (head_size > 32 * PARTS) return AQ_E_UNSUPPORTED; /* a lane's registers have no room */
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
