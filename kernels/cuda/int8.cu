/* int8.cu: 8-bit activations: quantizing them, a block a token, and their products with packed weights, a warp a row for a few
 * tokens and tiles of 64 by 64 for many. */
#include "context.h"
#include "int8.h"

struct quantize_view {
  const float *x;
  size_t tokens, cols;
  int32_t bits, kind;
  uint8_t *codes;
  float *scale;
  int32_t *zero_point;
};

static __global__ void __launch_bounds__(AQ_BLOCK) quantize_tokens(quantize_view view, int32_t *faults) {
  __shared__ float lows[AQ_BLOCK / 32], highs[AQ_BLOCK / 32];
  const float code_max = (float)((1 << view.bits) - 1);
  for (size_t token = blockIdx.x; token < view.tokens; token += gridDim.x) {
    const float *x = view.x + token * view.cols;
    float low = 0.0f, high = 0.0f;
    int32_t fault = 0;
    for (size_t i = threadIdx.x; i < view.cols; i += AQ_BLOCK) {
      if (!(x[i] - x[i] == 0.0f)) fault = AQ_FAULT_NONFINITE;
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
    }
    float scale = 0.0f;
    int32_t zero = 0;
    if (view.kind == AQ_ACTIVATIONS_STATIC) {
      scale = view.scale[token];
      zero = view.zero_point[token];
      if (!(scale >= 0x1p-126f && scale < __builtin_inff()) || zero < 0 || zero >= 1 << view.bits) fault |= AQ_FAULT_VALUE;
    } else {
      for (int distance = 16; distance > 0; distance /= 2) {
        const float other_low = __shfl_xor_sync(0xffffffffu, low, distance);
        const float other_high = __shfl_xor_sync(0xffffffffu, high, distance);
        low = other_low < low ? other_low : low;
        high = other_high > high ? other_high : high;
      }
      if (threadIdx.x % 32 == 0) {
        lows[threadIdx.x / 32] = low;
        highs[threadIdx.x / 32] = high;
      }
      __syncthreads();
      for (int warp = 0; warp < AQ_BLOCK / 32; warp++) {
        low = lows[warp] < low ? lows[warp] : low;
        high = highs[warp] > high ? highs[warp] : high;
      }
    }
    if (fault) atomicOr(faults, fault);
    if (__syncthreads_or(fault)) continue; /* outputs are unspecified now */
    if (view.kind == AQ_ACTIVATIONS_PER_TOKEN) {
      scale = aq_activation_scale(low, high, code_max);
      zero = aq_activation_zero(low, scale, code_max);
      if (threadIdx.x == 0) {
        view.scale[token] = scale;
        view.zero_point[token] = zero;
      }
    }
    for (size_t i = threadIdx.x; i < view.cols; i += AQ_BLOCK)
      view.codes[token * view.cols + i] = aq_activation_code(x[i], scale, (float)zero, code_max);
  }
}

static __global__ void check_tokens(const int32_t *zero_point, size_t tokens, int32_t *faults) {
  for (size_t i = aq_thread(); i < tokens; i += aq_all_threads())
    if (zero_point[i] < 0 || zero_point[i] > 255) atomicOr(faults, AQ_FAULT_VALUE);
}

/* A warp a row, its lanes a segment each; all lanes add the segments up in order. */
static __global__ void few_tokens(aq_activations_view view) {
  const aq_layout &layout = view.matrix.layout;
  const size_t lane = threadIdx.x % 32, segments = aq_segments(layout);
  for (size_t row = aq_thread() / 32; row < layout.rows; row += aq_all_threads() / 32)
    for (size_t token = 0; token < view.tokens; token++) {
      float total = 0.0f;
      for (size_t first = 0; first < segments; first += 32) {
        const float own = first + lane < segments ? aq_segment_of(view, token, row, first + lane) : 0.0f;
        const int count = (int)aq_smaller(32, segments - first);
        for (int k = 0; k < count; k++) total += __shfl_sync(0xffffffffu, own, k);
      }
      if (lane == 0) aq_store_product(view, token, row, total);
    }
}

/* Rows and tokens of a block; columns that are held at once, two words apart from what would be the same banks. */
#define TILE 64
#define DEPTH 64
#define PITCH (DEPTH / 4 + 1)

/* 256 threads of 4 rows by 4 tokens, segment after segment. */
static __global__ void __launch_bounds__(256) many_tokens(aq_activations_view view) {
  __shared__ uint32_t weights[TILE][PITCH], activations[TILE][PITCH];
  const aq_layout &layout = view.matrix.layout;
  const size_t row = (size_t)blockIdx.x * TILE, token = (size_t)blockIdx.y * TILE, size = aq_segment_columns(layout);
  const size_t last_row = layout.rows - 1, last_token = view.tokens - 1;
  const unsigned x = threadIdx.x % 16, y = threadIdx.x / 16; /* rows x + 16 i, tokens y + 16 j */
  float total[4][4] = {};
  for (size_t begin = 0, segment = 0; begin < layout.cols; begin += size, segment++) {
    const size_t n = aq_smaller(size, layout.cols - begin);
    uint32_t products[4][4] = {}, codes[4] = {}, sums[4] = {};
    for (size_t first = begin; first < begin + n; first += DEPTH) {
      const size_t depth = aq_smaller(DEPTH, begin + n - first);
      __syncthreads(); /* all are done with what was there */
      for (unsigned e = threadIdx.x; e < TILE * (DEPTH / AQ_CHUNK); e += 256) {
        const unsigned line = e / (DEPTH / AQ_CHUNK), chunk = e % (DEPTH / AQ_CHUNK);
        if (chunk * AQ_CHUNK >= depth) continue;
        uint32_t *const to = weights[line] + 2 * chunk, *const a = activations[line] + 2 * chunk;
        aq_bytes_of_codes(aq_read_codes(view.matrix.packed, layout, aq_smaller(row + line, last_row), first / AQ_CHUNK + chunk),
                          layout.bits, to);
        aq_bytes_of_activations(view.codes + aq_smaller(token + line, last_token) * layout.cols, layout.cols,
                                first + chunk * AQ_CHUNK, a);
      }
      __syncthreads();
      for (size_t k = 0; k < (depth + AQ_CHUNK - 1) / AQ_CHUNK * 2; k++) {
        uint32_t w[4], a[4];
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
          w[i] = weights[x + 16 * i][k];
          a[i] = activations[y + 16 * i][k];
          codes[i] = aq_dot_bytes(0x01010101u, w[i], codes[i]);
          sums[i] = aq_dot_bytes(a[i], 0x01010101u, sums[i]);
        }
#pragma unroll
        for (unsigned i = 0; i < 16; i++) products[i / 4][i % 4] = aq_dot_bytes(a[i % 4], w[i / 4], products[i / 4][i % 4]);
      }
    }
#pragma unroll
    for (unsigned i = 0; i < 4; i++) {
      const aq_grid grid =
          aq_stored_grid(view.matrix, aq_smaller(row + x + 16 * i, last_row), layout.groups == 1 ? 0 : segment);
#pragma unroll
      for (unsigned j = 0; j < 4; j++)
        total[i][j] += aq_segment_term({products[i][j], codes[i], sums[j]}, grid,
                                       view.zero_point[aq_smaller(token + y + 16 * j, last_token)], n);
    }
  }
#pragma unroll
  for (unsigned i = 0; i < 16; i++) {
    const size_t r = row + x + 16 * (i / 4), t = token + y + 16 * (i % 4);
    if (r <= last_row && t <= last_token) aq_store_product(view, t, r, total[i / 4][i % 4]);
  }
}

/* Tokens that are taken one by one. */
#define FEW 8

int32_t aq_cuda_quantize_activations(aq_cuda_buffer x, size_t tokens, size_t cols, int32_t bits, int32_t kind,
                                     aq_cuda_buffer codes, aq_cuda_buffer scale, aq_cuda_buffer zero_point,
                                     aq_cuda_stream stream) {
  if (tokens == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (bits < 2 || bits > 8 || (kind != AQ_ACTIVATIONS_STATIC && kind != AQ_ACTIVATIONS_PER_TOKEN)) return AQ_E_ARGUMENT;
  if (!aq_shape_allowed(tokens, cols)) return AQ_E_SHAPE;
  const quantize_view view = {aq_cuda_view<float>(x, tokens * cols, on, &status), tokens, cols, bits, kind,
                              aq_cuda_view<uint8_t>(codes, tokens * cols, on, &status),
                              aq_cuda_view<float>(scale, tokens, on, &status),
                              aq_cuda_view<int32_t>(zero_point, tokens, on, &status)};
  if (status == AQ_OK) status = aq_cuda_clear_faults(on);
  if (status != AQ_OK) return status;
  aq_launch(on, quantize_tokens, aq_cuda_blocks(tokens, 1), AQ_BLOCK, 0, view, on->faults);
  status = aq_cuda_launched();
  return status == AQ_OK ? aq_cuda_read_faults(on) : status;
}

int32_t aq_cuda_linear_packed_int8(aq_cuda_buffer codes, aq_cuda_buffer x_scale, aq_cuda_buffer x_zero_point, size_t tokens,
                                   aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer zero_point,
                                   aq_cuda_buffer bias, size_t rows, size_t cols, int32_t bits, size_t group_size,
                                   aq_cuda_buffer out, aq_cuda_stream stream) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  /* a grid has 65535 tiles of tokens */
  if (cols == 0 || rows > 0x7fffffff || tokens > (size_t)65535 * TILE || !aq_shape_allowed(tokens, cols) ||
      !aq_shape_allowed(tokens, rows))
    return AQ_E_SHAPE;
  aq_activations_view view = {};
  view.matrix = aq_cuda_packed(packed, scale, zero_point, rows, cols, bits, group_size, on, &status);
  view.codes = aq_cuda_view<uint8_t>(codes, tokens * cols, on, &status);
  view.scale = aq_cuda_view<float>(x_scale, tokens, on, &status);
  view.zero_point = aq_cuda_view<int32_t>(x_zero_point, tokens, on, &status);
  view.tokens = tokens;
  view.bias = bias ? aq_cuda_view<float>(bias, rows, on, &status) : 0;
  view.out = aq_cuda_view<float>(out, tokens * rows, on, &status);
  if (status == AQ_OK) status = aq_cuda_clear_faults(on);
  if (status != AQ_OK) return status;
  aq_launch(on, check_tokens, aq_cuda_blocks(tokens, AQ_BLOCK), AQ_BLOCK, 0, view.zero_point, tokens, on->faults);
  if (tokens <= FEW) {
    aq_launch(on, few_tokens, aq_cuda_blocks(rows * 32, AQ_BLOCK), AQ_BLOCK, 0, view);
  } else {
    const dim3 tiles((unsigned)((rows - 1) / TILE + 1), (unsigned)((tokens - 1) / TILE + 1));
    aq_launch(on, many_tokens, tiles, 256, 0, view);
  }
  status = aq_cuda_launched();
  return status == AQ_OK ? aq_cuda_read_faults(on) : status;
}
