/* linear.cu: linear layers of full, packed and two-level weights. A single token has a warp a row, which reads every
 * weight once; more go through tensor cores, where weights in bfloat16 are their own high part. */
#include "tensor.h"

struct weights_view {
  const void *dense; /* null: packed */
  int32_t dtype;
  aq_layout layout;
  const uint32_t *packed;
  const uint16_t *scale, *zero_point; /* zero_point null: symmetric */
  int32_t scale_bits;                 /* 0: one level */
  const uint8_t *sub_scale, *sub_min;
  const uint16_t *super_scale, *super_min;
  size_t super_groups, supers, sub_bytes;
};

/* Codes of a chunk; nothing behind its row is read. */
AQ_DEVICE uint64_t read_codes(const weights_view &view, size_t row, size_t chunk) {
  const size_t bits = (size_t)view.layout.bits, begin = chunk * bits;
  const uint32_t *words = view.packed + row * view.layout.words;
  if (bits == 4) return words[chunk];
  if (bits == 2) return ((const uint16_t *)words)[chunk];
  const uint8_t *bytes = (const uint8_t *)words;
  uint64_t codes = 0;
  for (size_t k = 0; k < bits && begin + k < 4 * view.layout.words; k++) codes |= (uint64_t)bytes[begin + k] << 8 * k;
  return codes;
}

AQ_DEVICE uint32_t read_sub_code(const uint8_t *stream, size_t i, int32_t bits) {
  const size_t bit = i * (size_t)bits, byte = bit >> 3, shift = bit & 7;
  uint32_t code = stream[byte] >> shift;
  if (shift + (size_t)bits > 8) code |= (uint32_t)stream[byte + 1] << (8 - shift);
  return code & ((1u << bits) - 1);
}

/* A group's scale and minimum: w = scale q - minimum. */
AQ_DEVICE void two_level_grid(const weights_view &view, size_t row, size_t group, float *scale, float *minimum) {
  const size_t first = row * view.sub_bytes;
  if (view.scale_bits == AQ_OFFSET_BITS) {
    const uint8_t *s = view.sub_scale + first + 2 * group, *m = view.sub_min + first + 2 * group;
    *scale = aq_half_value((uint16_t)(s[0] | s[1] << 8));
    *minimum = -aq_half_value((uint16_t)(m[0] | m[1] << 8));
    return;
  }
  const size_t super = row * view.supers + group / view.super_groups;
  *scale = aq_half_value(view.super_scale[super]) * (float)read_sub_code(view.sub_scale + first, group, view.scale_bits);
  *minimum = aq_half_value(view.super_min[super]) * (float)read_sub_code(view.sub_min + first, group, view.scale_bits);
}

/* The weights of a chunk, which lies in one group; zeros behind the row. */
AQ_DEVICE void load_weights(const weights_view &view, size_t row, size_t chunk, size_t n, float values[AQ_CHUNK]) {
  const aq_layout &layout = view.layout;
  if (view.dense) {
    aq_load_chunk(view.dense, view.dtype, row * layout.cols + chunk * AQ_CHUNK, n, values);
    return;
  }
  const uint64_t codes = read_codes(view, row, chunk);
  const uint32_t mask = (1u << layout.bits) - 1;
  const size_t group = aq_quotient(chunk * AQ_CHUNK, layout.group_size), at = row * layout.groups + group;
  float scale, minimum = 0.0f, zero = 0.0f;
  if (view.scale_bits) {
    two_level_grid(view, row, group, &scale, &minimum);
  } else {
    scale = aq_half_value(view.scale[at]);
    zero = view.zero_point ? aq_half_value(view.zero_point[at]) : (float)(1 << (layout.bits - 1));
  }
  for (int k = 0; k < AQ_CHUNK; k++) {
    const float code = (float)((uint32_t)(codes >> k * layout.bits) & mask);
    const float value = view.scale_bits ? scale * code - minimum : scale * (code - zero);
    values[k] = (size_t)k < n ? value : 0.0f;
  }
}

/* The parts of rows from `row` on; element i is a chunk, padding behind the columns included. */
struct weight_parts {
  weights_view view;
  size_t row;
  aq_parts parts;
  __device__ void operator()(size_t i) const {
    const size_t chunks = parts.stride / AQ_CHUNK, own = aq_quotient(i, chunks), chunk = i - own * chunks;
    const size_t begin = chunk * AQ_CHUNK, cols = view.layout.cols, n = begin < cols ? aq_smaller(AQ_CHUNK, cols - begin) : 0;
    float values[AQ_CHUNK];
    if (n > 0) load_weights(view, row + own, chunk, n, values);
    aq_split_chunk(values, n, parts, own, chunk);
  }
};

static int32_t split_weights(const aq_stream_state *on, const void *source, size_t row, const aq_parts &parts) {
  const weights_view &view = *(const weights_view *)source;
  return aq_run_elements(on, weight_parts{view, row, parts}, parts.rows * (parts.stride / AQ_CHUNK));
}

static __global__ void __launch_bounds__(AQ_BLOCK) one_token(weights_view view, const float *x, const float *bias,
                                                             float *out) {
  const aq_layout &layout = view.layout;
  const size_t lane = threadIdx.x % 32;
  for (size_t row = aq_thread() / 32; row < layout.rows; row += aq_all_threads() / 32) {
    float sum = 0.0f;
    for (size_t chunk = lane; chunk < layout.chunks; chunk += 32) {
      const size_t n = aq_smaller(AQ_CHUNK, layout.cols - chunk * AQ_CHUNK);
      float w[AQ_CHUNK], own[AQ_CHUNK];
      load_weights(view, row, chunk, n, w);
      aq_load_chunk(x, AQ_F32, chunk * AQ_CHUNK, n, own);
      for (int k = 0; k < AQ_CHUNK; k++) sum = AQ_FMA(w[k], own[k], sum);
    }
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0) out[row] = sum + (bias ? bias[row] : 0.0f);
  }
}

static int32_t linear(aq_stream_state *on, const weights_view &view, const float *x, size_t tokens, const float *bias,
                      float *out) {
  const size_t rows = view.layout.rows, cols = view.layout.cols;
  if (tokens == 1) {
    aq_launch(on, one_token, aq_cuda_blocks(rows * 32, AQ_BLOCK), AQ_BLOCK, 0, view, x, bias, out);
    return aq_cuda_launched();
  }
  const bool is_whole = view.dense && view.dtype == AQ_BF16 && cols % AQ_TENSOR_STEP == 0;
  return aq_cuda_tensor_linear(on, {rows, cols, is_whole ? (const uint16_t *)view.dense : 0, split_weights, &view}, x, tokens,
                               bias, out);
}

/* What the functions below have in common: sizes, x, bias and out; `view` has its own parts. */
static int32_t run_linear(aq_stream_state *on, weights_view &view, int32_t status, aq_cuda_buffer x, size_t tokens,
                          aq_cuda_buffer bias, aq_cuda_buffer out) {
  const size_t rows = view.layout.rows, cols = view.layout.cols;
  const float *own_x = aq_cuda_view<float>(x, tokens * cols, on, &status);
  const float *own_bias = bias ? aq_cuda_view<float>(bias, rows, on, &status) : 0;
  float *own_out = aq_cuda_view<float>(out, tokens * rows, on, &status);
  return status == AQ_OK ? linear(on, view, own_x, tokens, own_bias, own_out) : status;
}

static bool sizes_allowed(size_t tokens, size_t rows, size_t cols) {
  return cols > 0 && aq_counts_allowed(rows, cols) && aq_counts_allowed(tokens, cols) && aq_counts_allowed(tokens, rows);
}

int32_t aq_cuda_linear(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer weights, int32_t dtype, aq_cuda_buffer bias,
                       size_t rows, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  int32_t status;
  aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (dtype != AQ_F32 && dtype != AQ_F16 && dtype != AQ_BF16) return AQ_E_ARGUMENT;
  if (!sizes_allowed(tokens, rows, cols)) return AQ_E_SHAPE;
  weights_view view = {};
  view.layout = aq_layout_of(rows, cols, 8, 0);
  view.dense = aq_cuda_memory(weights, rows * cols, aq_dtype_bytes(dtype), on, &status);
  view.dtype = dtype;
  return run_linear(on, view, status, x, tokens, bias, out);
}

/* Codes of a checked layout. */
static int32_t view_codes(const aq_stream_state *on, aq_cuda_buffer packed, size_t tokens, size_t rows, size_t cols,
                          int32_t bits, size_t group_size, weights_view *view) {
  if (!aq_bits_allowed(bits)) return AQ_E_ARGUMENT;
  if (!sizes_allowed(tokens, rows, cols) || aq_group_columns(group_size, cols) == 0) return AQ_E_SHAPE;
  int32_t status = AQ_OK;
  view->layout = aq_layout_of(rows, cols, bits, group_size);
  view->packed = aq_cuda_view<uint32_t>(packed, rows * view->layout.words, on, &status);
  return status;
}

int32_t aq_cuda_linear_packed(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
                              aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols, int32_t bits,
                              size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  int32_t status;
  aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  weights_view view = {};
  status = view_codes(on, packed, tokens, rows, cols, bits, group_size, &view);
  const size_t units = rows * view.layout.groups;
  view.scale = aq_cuda_view<uint16_t>(scale, units, on, &status);
  view.zero_point = zero_point ? aq_cuda_view<uint16_t>(zero_point, units, on, &status) : 0;
  return run_linear(on, view, status, x, tokens, bias, out);
}

int32_t aq_cuda_linear_two_level(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer sub_scale,
                                 aq_cuda_buffer sub_min, aq_cuda_buffer super_scale, aq_cuda_buffer super_min,
                                 aq_cuda_buffer bias, size_t rows, size_t cols, int32_t bits, size_t group_size,
                                 int32_t scale_bits, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  int32_t status;
  aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  weights_view view = {};
  status = view_codes(on, packed, tokens, rows, cols, bits, group_size, &view);
  if (status != AQ_OK) return status;
  if (!aq_sub_bits_allowed(scale_bits)) return AQ_E_ARGUMENT;
  if (!aq_two_level_group_size_allowed(group_size)) return AQ_E_SHAPE;
  view.scale_bits = scale_bits;
  view.supers = (cols - 1) / AQ_SEGMENT + 1;
  view.super_groups = AQ_SEGMENT / group_size;
  view.sub_bytes = aq_sub_bytes_of(view.layout.groups, scale_bits);
  view.sub_scale = aq_cuda_view<uint8_t>(sub_scale, rows * view.sub_bytes, on, &status);
  view.sub_min = aq_cuda_view<uint8_t>(sub_min, rows * view.sub_bytes, on, &status);
  if (scale_bits != AQ_OFFSET_BITS) {
    view.super_scale = aq_cuda_view<uint16_t>(super_scale, rows * view.supers, on, &status);
    view.super_min = aq_cuda_view<uint16_t>(super_min, rows * view.supers, on, &status);
  }
  return run_linear(on, view, status, x, tokens, bias, out);
}
