/* activations.cu: activations rounded to codes of up to 8 bits, and to such codes and back, a block a token,
 * with the bytes of the CPU's. */
#include "../context.h"

#include "../../arithmetic/activation.h"

/* The smallest and the largest of a block's values, zero among them, and whether all are finite; in all
 * threads. */
AQ_DEVICE aq_range block_range(const float *x, size_t n) {
  __shared__ float low[AQ_BLOCK / 32], high[AQ_BLOCK / 32];
  aq_range range = {0.0f, 0.0f, 1};
  for (size_t i = threadIdx.x; i < n; i += AQ_BLOCK) {
    if (!(x[i] - x[i] == 0.0f)) range.finite = 0;
    range.minimum = x[i] < range.minimum ? x[i] : range.minimum;
    range.maximum = x[i] > range.maximum ? x[i] : range.maximum;
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    const float a = __shfl_xor_sync(0xffffffffu, range.minimum, distance), b = __shfl_xor_sync(0xffffffffu, range.maximum, distance);
    range.minimum = a < range.minimum ? a : range.minimum;
    range.maximum = b > range.maximum ? b : range.maximum;
  }
  range.finite = !__syncthreads_or(!range.finite); /* and all have read what was there */
  if (threadIdx.x % 32 == 0) {
    low[threadIdx.x / 32] = range.minimum;
    high[threadIdx.x / 32] = range.maximum;
  }
  __syncthreads();
  for (int warp = 0; warp < AQ_BLOCK / 32; warp++) {
    range.minimum = low[warp] < range.minimum ? low[warp] : range.minimum;
    range.maximum = high[warp] > range.maximum ? high[warp] : range.maximum;
  }
  return range;
}

struct encode_token {
  const float *x;
  size_t cols;
  int32_t bits;
  bool per_token;
  uint8_t *codes;
  float *scale;
  int32_t *zero_point, *faults;
  __device__ void operator()(size_t token) const {
    const float *in = x + token * cols, code_max = (float)((1 << bits) - 1);
    float step, zero;
    int32_t fault = 0;
    if (per_token) {
      const aq_range range = block_range(in, cols);
      const float wanted = range.maximum / code_max - range.minimum / code_max; /* the difference itself may overflow */
      step = range.minimum == range.maximum ? 1.0f : wanted < 0x1p-126f ? 0x1p-126f : wanted;
      zero = aq_round_even(-range.minimum / step);
      zero = zero > code_max ? code_max : zero;
      if (!range.finite) {
        fault = AQ_FAULT_NONFINITE;
      } else if (threadIdx.x == 0) {
        scale[token] = step;
        zero_point[token] = (int32_t)zero;
      }
    } else {
      step = scale[token];
      zero = (float)zero_point[token];
      if (!aq_activation_grid_allowed(step, zero_point[token], bits)) fault = AQ_FAULT_COLUMN_WEIGHT; /* before any in the data */
    }
    for (size_t i = threadIdx.x; i < cols && !fault; i += AQ_BLOCK) {
      if (in[i] - in[i] == 0.0f)
        codes[token * cols + i] = (uint8_t)aq_activation_code(in[i], step, zero, code_max);
      else
        fault = AQ_FAULT_NONFINITE;
    }
    if (fault) atomicOr(faults, fault);
  }
};

struct round_token {
  const float *x;
  size_t cols;
  int32_t bits;
  bool per_token;
  aq_activation_grid given;
  float *out;
  int32_t *faults;
  __device__ void operator()(size_t token) const {
    const float *in = x + token * cols, code_max = (float)((1 << bits) - 1);
    aq_activation_grid grid = given;
    int32_t fault = 0;
    if (per_token) {
      const aq_range range = block_range(in, cols); /* of all, before `out`, which may be `x`, is written */
      if (range.finite) grid = aq_covering_grid(range.minimum, range.maximum, bits);
      else fault = AQ_FAULT_NONFINITE;
    }
    for (size_t i = threadIdx.x; i < cols && !fault; i += AQ_BLOCK) {
      const float value = in[i];
      if (value - value == 0.0f)
        out[token * cols + i] = grid.scale * (aq_activation_code(value, grid.scale, grid.zero_point, code_max) - grid.zero_point);
      else
        fault = AQ_FAULT_NONFINITE;
    }
    if (fault) atomicOr(faults, fault);
  }
};

/* f by tokens, and what it found. */
template <class F>
static int32_t run_tokens(const aq_stream_state *on, const F &f, size_t tokens, int32_t status) {
  if (status == AQ_OK) status = aq_cuda_clear_faults(on);
  if (status == AQ_OK) status = aq_run_rows(on, f, tokens);
  return status == AQ_OK ? aq_cuda_read_faults(on) : status;
}

static int32_t check_activations(size_t tokens, size_t cols, int32_t bits, int32_t kind) {
  if (bits < 2 || bits > 8) return AQ_E_ARGUMENT;
  if (kind != AQ_ACTIVATIONS_STATIC && kind != AQ_ACTIVATIONS_PER_TOKEN) return AQ_E_ARGUMENT;
  return aq_counts_allowed(tokens, cols) ? AQ_OK : AQ_E_SHAPE;
}

int32_t aq_cuda_quantize_activations(aq_cuda_buffer x, size_t tokens, size_t cols, int32_t bits, int32_t kind,
                                     aq_cuda_buffer codes, aq_cuda_buffer scale, aq_cuda_buffer zero_point,
                                     aq_cuda_stream stream) {
  if (tokens == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  status = check_activations(tokens, cols, bits, kind);
  const encode_token f = {aq_cuda_view<float>(x, tokens * cols, on, &status),
                          cols,
                          bits,
                          kind == AQ_ACTIVATIONS_PER_TOKEN,
                          aq_cuda_view<uint8_t>(codes, tokens * cols, on, &status),
                          aq_cuda_view<float>(scale, tokens, on, &status),
                          aq_cuda_view<int32_t>(zero_point, tokens, on, &status),
                          on->faults};
  return run_tokens(on, f, tokens, status);
}

int32_t aq_cuda_round_activations(aq_cuda_buffer x, size_t tokens, size_t cols, int32_t bits, int32_t kind, float scale,
                                  int32_t zero_point, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (tokens == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  status = check_activations(tokens, cols, bits, kind);
  if (status == AQ_OK && kind == AQ_ACTIVATIONS_STATIC && !aq_activation_grid_allowed(scale, zero_point, bits)) return AQ_E_VALUE;
  const round_token f = {aq_cuda_view<float>(x, tokens * cols, on, &status),
                         cols,
                         bits,
                         kind == AQ_ACTIVATIONS_PER_TOKEN,
                         {scale, (float)zero_point},
                         aq_cuda_view<float>(out, tokens * cols, on, &status),
                         on->faults};
  return run_tokens(on, f, tokens, status);
}
