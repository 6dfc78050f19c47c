/* linear.cu: linear layers of full, packed and two-level weights. A single token has a warp a row, which
 * reads every weight once; more go through tensor cores, where weights in bfloat16 are their own high
 * part. */
#include "../quantize/packed.h"
#include "../tensor.h"

/* The parts of rows from `row` on; element i is a chunk, padding behind the columns included. */
struct weight_parts {
  aq_weights_view view;
  size_t row;
  aq_parts parts;
  __device__ void operator()(size_t i) const {
    const size_t chunks = parts.stride / AQ_CHUNK, own = aq_quotient(i, chunks), chunk = i - own * chunks;
    const size_t begin = chunk * AQ_CHUNK, cols = view.layout.cols, n = begin < cols ? aq_smaller(AQ_CHUNK, cols - begin) : 0;
    float values[AQ_CHUNK];
    if (n > 0) aq_load_weights(view, row + own, chunk, n, values);
    aq_split_chunk(values, n, parts, own, chunk);
  }
};

static int32_t split_weights(const aq_stream_state *on, const void *source, size_t row, const aq_parts &parts) {
  const aq_weights_view &view = *(const aq_weights_view *)source;
  return aq_run_elements(on, weight_parts{view, row, parts}, parts.rows * (parts.stride / AQ_CHUNK));
}

static __global__ void __launch_bounds__(AQ_BLOCK) one_token(aq_weights_view view, const float *x, const float *bias,
                                                             float *out) {
  const aq_layout &layout = view.layout;
  const size_t lane = threadIdx.x % 32;
  for (size_t row = aq_thread() / 32; row < layout.rows; row += aq_all_threads() / 32) {
    float sum = 0.0f;
    for (size_t chunk = lane; chunk < layout.chunks; chunk += 32) {
      const size_t n = aq_smaller(AQ_CHUNK, layout.cols - chunk * AQ_CHUNK);
      float w[AQ_CHUNK], own[AQ_CHUNK];
      aq_load_weights(view, row, chunk, n, w);
      aq_load_chunk(x, AQ_F32, chunk * AQ_CHUNK, n, own);
      for (int k = 0; k < AQ_CHUNK; k++) sum = AQ_FMA(w[k], own[k], sum);
    }
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0) out[row] = sum + (bias ? bias[row] : 0.0f);
  }
}

static int32_t linear(aq_stream_state *on, const aq_weights_view &view, const float *x, size_t tokens, const float *bias,
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
static int32_t run_linear(aq_stream_state *on, aq_weights_view &view, int32_t status, aq_cuda_buffer x, size_t tokens,
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
  aq_weights_view view = {};
  view.layout = aq_layout_of(rows, cols, 8, 0);
  view.dense = aq_cuda_memory(weights, rows * cols, aq_dtype_bytes(dtype), on, &status);
  view.dtype = dtype;
  return run_linear(on, view, status, x, tokens, bias, out);
}

int32_t aq_cuda_linear_packed(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
                              aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols, int32_t bits,
                              size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  int32_t status;
  aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_bits_allowed(bits)) return AQ_E_ARGUMENT;
  if (!sizes_allowed(tokens, rows, cols)) return AQ_E_SHAPE;
  aq_weights_view view;
  status = aq_view_one_level(on, packed, scale, zero_point, rows, cols, bits, group_size, &view);
  return status == AQ_OK ? run_linear(on, view, status, x, tokens, bias, out) : status;
}

int32_t aq_cuda_linear_two_level(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer sub_scale,
                                 aq_cuda_buffer sub_min, aq_cuda_buffer super_scale, aq_cuda_buffer super_min,
                                 aq_cuda_buffer bias, size_t rows, size_t cols, int32_t bits, size_t group_size,
                                 int32_t scale_bits, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  int32_t status;
  aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_bits_allowed(bits)) return AQ_E_ARGUMENT;
  if (!sizes_allowed(tokens, rows, cols)) return AQ_E_SHAPE;
  aq_weights_view view;
  status = aq_view_two_levels(on, packed, sub_scale, sub_min, super_scale, super_min, rows, cols, bits, group_size,
                              scale_bits, &view);
  return status == AQ_OK ? run_linear(on, view, status, x, tokens, bias, out) : status;
}
