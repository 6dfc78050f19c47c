/* products.cu: matrices of trellis codes: dequantizing, and products with float32 and 8-bit activations. The
 * terms of levels lie in shared memory, in eight banks, so that lanes never wait for each other. Float32
 * activations of many tokens go through tensor cores. */
#include "../tensor.h"

#include "../../arithmetic/trellis.h"

#define AQ_WARP 32
#define AQ_WARPS (AQ_BLOCK / AQ_WARP)
#define AQ_TOKENS 8 /* of a warp */

struct aq_trellis {
  aq_layout layout;
  const uint32_t *packed;
  const uint16_t *scale, *offset;
};

static __device__ const int8_t all_terms[2][32] = {{AQ_TRELLIS_TERMS_2}, {AQ_TRELLIS_TERMS_3}};

/* The terms in a block's shared memory; every thread calls. */
AQ_DEVICE const int8_t *shared_terms(int32_t bits) {
  __shared__ int8_t terms[32];
  for (size_t i = threadIdx.x; i < 32; i += blockDim.x) terms[i] = all_terms[bits - 2][i];
  __syncthreads();
  return terms;
}

/* The windows of 16 codes, that of code i from bit bits * i + 2 on, and their mixed bits, the second place of
 * code i from there on. */
struct aq_windows {
  uint64_t own, mixed;
};

/* Windows of 2 bits fill a word; of 3 bits, a word and half of the next, or half of a word and the next. */
AQ_DEVICE aq_windows windows_of(const aq_trellis &m, size_t row, size_t sixteen) {
  const uint32_t *from = m.packed + row * m.layout.words;
  const size_t half = sixteen * (size_t)m.layout.bits, word = half / 2;
  const uint32_t next = m.layout.bits == 3 && word + 1 < m.layout.words ? from[word + 1] : 0;
  const uint64_t stream = (uint64_t)next << 32 | from[word];
  const uint64_t own = half % 2 ? stream >> 8 : stream << 8 | (word == 0 ? 0 : from[word - 1] >> 24);
  return {own, own ^ own >> 2 ^ own >> (m.layout.bits + 2)};
}

AQ_DEVICE int32_t level_of(int bits, const int8_t *terms, const aq_windows &windows, int i) {
  const int at = bits * i + 2;
  return terms[windows.own >> (at + 2) & 15] + terms[16 + (windows.mixed >> at & 15)];
}

AQ_DEVICE size_t group_of(const aq_trellis &m, size_t row, size_t col) {
  return row * m.layout.groups + aq_quotient(col, m.layout.group_size);
}

/* Dequantize ------------------------------------------------------------------------------------------- */

template <int DTYPE>
AQ_DEVICE void store_weight(float w, void *out, size_t at) {
  if (DTYPE == AQ_F32)
    ((float *)out)[at] = w;
  else
    ((uint16_t *)out)[at] = DTYPE == AQ_F16 ? aq_half_from_float(w) : aq_bfloat_from_float(w);
}

AQ_DEVICE float weight_at(const aq_trellis &m, const int8_t *terms, size_t row, size_t col) {
  const size_t group = group_of(m, row, col);
  const int32_t level = level_of(m.layout.bits, terms, windows_of(m, row, col / 16), (int)(col % 16));
  return aq_trellis_weight(level, aq_float_from_half(m.scale[group]), aq_float_from_half(m.offset[group]));
}

/* Threads side by side write weights side by side. */
template <int DTYPE>
static __global__ void dequantize(aq_trellis m, void *out) {
  const int8_t *terms = shared_terms(m.layout.bits);
  for (size_t at = aq_thread(); at < m.layout.rows * m.layout.cols; at += aq_all_threads()) {
    const size_t row = aq_quotient(at, m.layout.cols);
    store_weight<DTYPE>(weight_at(m, terms, row, at - row * m.layout.cols), out, at);
  }
}

/* The parts of rows from `row` on, zeros behind the columns. */
static __global__ void split_rows(aq_trellis m, size_t row, aq_parts parts) {
  const int8_t *terms = shared_terms(m.layout.bits);
  for (size_t at = aq_thread(); at < parts.rows * parts.stride; at += aq_all_threads()) {
    const size_t own = aq_quotient(at, parts.stride), col = at - own * parts.stride;
    float value = 0.0f;
    if (col < m.layout.cols) value = weight_at(m, terms, row + own, col);
    aq_split(value, parts.high + at, parts.low + at);
  }
}

static int32_t split_trellis(const aq_stream_state *on, const void *source, size_t row, const aq_parts &parts) {
  const aq_trellis &m = *(const aq_trellis *)source;
  aq_launch(on, split_rows, aq_cuda_blocks(parts.rows * parts.stride, AQ_BLOCK), AQ_BLOCK, 0, m, row, parts);
  return aq_cuda_launched();
}

/* Products --------------------------------------------------------------------------------------------- */

/* A row and some tokens for every warp. */
struct aq_warp_place {
  size_t row, token, tokens, lane;
};

AQ_DEVICE bool next_place(const aq_layout &layout, size_t tokens, size_t unit, aq_warp_place *place) {
  const size_t parts = (tokens + AQ_TOKENS - 1) / AQ_TOKENS;
  if (unit >= layout.rows * parts) return false;
  const size_t part = aq_quotient(unit, layout.rows);
  *place = {unit - part * layout.rows, part * AQ_TOKENS, aq_smaller(AQ_TOKENS, tokens - part * AQ_TOKENS),
            threadIdx.x % AQ_WARP};
  return true;
}

#define AQ_FOR_PLACES(layout, tokens, place)                                                  \
  aq_warp_place place;                                                                        \
  for (size_t unit = aq_thread() / AQ_WARP; next_place(layout, tokens, unit, &place);         \
       unit += aq_all_threads() / AQ_WARP)

/* A lane has every 32nd 16 codes of a row; the lanes' sums are added in pairs, always the same ones. */
template <int BITS>
static __global__ void multiply_floats(aq_trellis m, const float *x, size_t tokens, const float *bias, float *out) {
  const int8_t *terms = shared_terms(m.layout.bits);
  const size_t cols = m.layout.cols;
  AQ_FOR_PLACES(m.layout, tokens, p) {
    float sums[AQ_TOKENS] = {0};
    for (size_t col = 16 * p.lane; col < cols; col += 16 * AQ_WARP) {
      const size_t n = aq_smaller(16, cols - col), group = group_of(m, p.row, col);
      const aq_windows windows = windows_of(m, p.row, col / 16);
      const float scale = aq_float_from_half(m.scale[group]) * AQ_TRELLIS_UNIT;
      const float offset = aq_float_from_half(m.offset[group]);
      float levels[16]; /* for all tokens */
#pragma unroll
      for (int i = 0; i < 16; i++) levels[i] = (float)level_of(BITS, terms, windows, i);
#pragma unroll
      for (int t = 0; t < AQ_TOKENS; t++) {
        if ((size_t)t >= p.tokens) break;
        const float *from = x + (p.token + (size_t)t) * cols + col;
        float products = 0.0f, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; i++) {
          if ((size_t)i >= n) break;
          products = fmaf(levels[i], from[i], products);
          sum += from[i];
        }
        sums[t] = fmaf(scale, products, fmaf(offset, sum, sums[t]));
      }
    }
    for (size_t t = 0; t < p.tokens; t++) {
      float sum = sums[t];
      for (int distance = AQ_WARP / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      if (p.lane == 0) out[(p.token + t) * m.layout.rows + p.row] = bias ? sum + bias[p.row] : sum;
    }
  }
}

struct aq_token_codes {
  const uint8_t *codes;
  const float *scale;
  const int32_t *zero;
};

/* Whole sums of a segment, x less its zero point times levels, and x less its zero point. */
template <int BITS>
AQ_DEVICE void segment_sums(const aq_trellis &m, const int8_t *terms, size_t row, size_t begin, size_t end,
                            const uint8_t *x, int32_t zero, int32_t *products, int32_t *sum) {
  *products = *sum = 0;
  for (size_t col = begin; col < end; col += 16) {
    const aq_windows windows = windows_of(m, row, col / 16);
#pragma unroll
    for (int i = 0; i < 16; i++) {
      if (col + (size_t)i >= end) break;
      const int32_t value = x[col + (size_t)i] - zero;
      *products += value * level_of(BITS, terms, windows, i);
      *sum += value;
    }
  }
}

/* The bytes of the CPU's: a lane has every 32nd segment, and terms are added in the order of the columns. */
template <int BITS>
static __global__ void multiply_bytes(aq_trellis m, aq_token_codes x, size_t tokens, const float *bias, float *out) {
  const int8_t *terms = shared_terms(m.layout.bits);
  const size_t cols = m.layout.cols, size = m.layout.groups == 1 ? AQ_SEGMENT : m.layout.group_size;
  const size_t segments = cols ? (cols - 1) / size + 1 : 0;
  AQ_FOR_PLACES(m.layout, tokens, p) {
    for (size_t t = p.token; t < p.token + p.tokens; t++) {
      float total = 0.0f;
      for (size_t first = 0; first < segments; first += AQ_WARP) {
        const size_t segment = first + p.lane, begin = segment * size;
        float term = 0.0f;
        if (segment < segments) {
          int32_t products, sum;
          const size_t group = group_of(m, p.row, begin);
          segment_sums<BITS>(m, terms, p.row, begin, aq_smaller(begin + size, cols), x.codes + t * cols, x.zero[t], &products,
                       &sum);
          const float weighted = aq_float_from_half(m.scale[group]) * AQ_TRELLIS_UNIT * (float)products;
          const float shift = aq_float_from_half(m.offset[group]) * (float)sum;
          term = weighted + shift;
        }
        for (size_t lane = 0; lane < AQ_WARP && first + lane < segments; lane++)
          total = total + __shfl_sync(~0u, term, (int)lane);
      }
      const float y = x.scale[t] * total;
      if (p.lane == 0) out[t * m.layout.rows + p.row] = bias ? y + bias[p.row] : y;
    }
  }
}

/* Calls ------------------------------------------------------------------------------------------------ */

static int32_t trellis_of(aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer offset, size_t rows, size_t cols,
                          int32_t bits, size_t group_size, const aq_stream_state *on, aq_trellis *m) {
  int32_t status = AQ_OK;
  if (!aq_trellis_bits_allowed(bits)) return AQ_E_ARGUMENT;
  if (cols == 0) return *m = {{rows, 0, bits, 1, 1, 0, 0}, 0, 0, 0}, AQ_OK; /* the bias alone */
  if (aq_group_columns(group_size, cols) == 0 || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  const aq_layout layout = aq_layout_of(rows, cols, bits, group_size);
  *m = {layout, aq_cuda_view<uint32_t>(packed, rows * layout.words, on, &status),
        aq_cuda_view<uint16_t>(scale, rows * layout.groups, on, &status),
        aq_cuda_view<uint16_t>(offset, rows * layout.groups, on, &status)};
  return status;
}

int32_t aq_cuda_dequantize_trellis(aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer offset, size_t rows,
                                   size_t cols, int32_t bits, size_t group_size, aq_cuda_buffer out, int32_t dtype,
                                   aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (dtype != AQ_F32 && dtype != AQ_F16 && dtype != AQ_BF16) return AQ_E_ARGUMENT;
  aq_trellis m;
  status = trellis_of(packed, scale, offset, rows, cols, bits, group_size, on, &m);
  void *to = aq_cuda_memory(out, rows * cols, aq_dtype_bytes(dtype), on, &status);
  if (status != AQ_OK) return status;
  const auto kernel = dtype == AQ_F32 ? dequantize<AQ_F32> : dtype == AQ_F16 ? dequantize<AQ_F16> : dequantize<AQ_BF16>;
  aq_launch(on, kernel, aq_cuda_blocks(rows * cols, AQ_BLOCK), AQ_BLOCK, 0, m, to);
  return aq_cuda_launched();
}

/* The same for a product with `tokens` rows. */
static int32_t product_of(aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer offset, size_t tokens, size_t rows,
                          size_t cols, int32_t bits, size_t group_size, const aq_stream_state *on, aq_trellis *m) {
  if (!aq_counts_allowed(tokens, cols) || !aq_counts_allowed(tokens, rows)) return AQ_E_SHAPE;
  return trellis_of(packed, scale, offset, rows, cols, bits, group_size, on, m);
}

static unsigned product_blocks(size_t rows, size_t tokens) {
  return aq_cuda_blocks(rows * ((tokens + AQ_TOKENS - 1) / AQ_TOKENS), AQ_WARPS);
}

int32_t aq_cuda_linear_trellis(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
                               aq_cuda_buffer offset, aq_cuda_buffer bias, size_t rows, size_t cols, int32_t bits,
                               size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  int32_t status;
  aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  aq_trellis m;
  status = product_of(packed, scale, offset, tokens, rows, cols, bits, group_size, on, &m);
  const float *from = cols ? aq_cuda_view<float>(x, tokens * cols, on, &status) : 0;
  const float *add = bias ? aq_cuda_view<float>(bias, rows, on, &status) : 0;
  float *to = aq_cuda_view<float>(out, tokens * rows, on, &status);
  if (status != AQ_OK) return status;
  if (tokens > AQ_TOKENS && cols > 0) return aq_cuda_tensor_linear(on, {rows, cols, 0, split_trellis, &m}, from, tokens, add, to);
  const auto kernel = bits == 2 ? multiply_floats<2> : multiply_floats<3>;
  aq_launch(on, kernel, product_blocks(rows, tokens), AQ_BLOCK, 0, m, from, tokens, add, to);
  return aq_cuda_launched();
}

int32_t aq_cuda_linear_trellis_int8(aq_cuda_buffer codes, aq_cuda_buffer x_scale, aq_cuda_buffer x_zero_point,
                                    size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer offset,
                                    aq_cuda_buffer bias, size_t rows, size_t cols, int32_t bits, size_t group_size,
                                    aq_cuda_buffer out, aq_cuda_stream stream) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  aq_trellis m;
  status = product_of(packed, scale, offset, tokens, rows, cols, bits, group_size, on, &m);
  const aq_token_codes x = {cols ? aq_cuda_view<uint8_t>(codes, tokens * cols, on, &status) : 0,
                            aq_cuda_view<float>(x_scale, tokens, on, &status),
                            aq_cuda_view<int32_t>(x_zero_point, tokens, on, &status)};
  const float *add = bias ? aq_cuda_view<float>(bias, rows, on, &status) : 0;
  float *to = aq_cuda_view<float>(out, tokens * rows, on, &status);
  if (status != AQ_OK) return status;
  const auto kernel = bits == 2 ? multiply_bytes<2> : multiply_bytes<3>;
  aq_launch(on, kernel, product_blocks(rows, tokens), AQ_BLOCK, 0, m, x, tokens, add, to);
  return aq_cuda_launched();
}
