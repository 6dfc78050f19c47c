/* int8.cu: linear layers of 8-bit activations and packed weights on one level of scales, with the bytes of
 * the CPU's. Products of codes are added up as whole numbers within a
 * segment, four at a time, and segments' terms in float32, in the order of the columns:
 *
 *     sum (x - x_zero) w = sum x w - x_zero sum w        sum (x - x_zero) = sum x - x_zero columns
 *
 * Up to AQ_FEW tokens a warp has a row and some of the tokens; more are multiplied in tiles. */
#include "../quantize/packed.h"

/* Codes as bytes ---------------------------------------------------------------------------------------- */

/* Eight bytes, those behind a chunk's columns 0. */
struct chunk_bytes {
  uint32_t at[2];
};

#define ONES 0x01010101u /* the sum of four bytes is a product with these */

AQ_DEVICE uint32_t first_bytes(uint32_t bytes, size_t begin, size_t n) {
  return n >= begin + 4 ? bytes : n <= begin ? 0 : bytes & ((1u << 8 * (n - begin)) - 1);
}

/* Four codes, of which the first are the lowest bits. */
AQ_DEVICE uint32_t spread(uint32_t codes, int32_t bits) {
  if (bits == 8) return codes;
  const int b = bits;
  const uint32_t mask = (1u << b) - 1;
  return (codes & mask) | (codes >> b & mask) << 8 | (codes >> 2 * b & mask) << 16 | (codes >> 3 * b & mask) << 24;
}

AQ_DEVICE chunk_bytes weight_bytes(const aq_weights_view &m, size_t row, size_t chunk, size_t n) {
  if (n == 0) return {{0, 0}};
  const uint64_t codes = aq_read_codes(m, row, chunk);
  return {{first_bytes(spread((uint32_t)codes, m.layout.bits), 0, n),
           first_bytes(spread((uint32_t)(codes >> 4 * m.layout.bits), m.layout.bits), 4, n)}};
}

/* Of a token's codes, which begin at a multiple of eight where a row does. */
AQ_DEVICE chunk_bytes token_bytes(const uint8_t *codes, size_t cols, size_t chunk, size_t n) {
  chunk_bytes bytes = {{0, 0}};
  if (n == AQ_CHUNK && cols % AQ_CHUNK == 0) {
#if defined(__CUDA_ARCH__)
    const uint2 v = *(const uint2 *)(codes + chunk * AQ_CHUNK);
    bytes = {{v.x, v.y}};
#else
    __builtin_memcpy(&bytes, codes + chunk * AQ_CHUNK, sizeof bytes);
#endif
    return bytes;
  }
  for (size_t k = 0; k < n; k++) bytes.at[k / 4] |= (uint32_t)codes[chunk * AQ_CHUNK + k] << 8 * (k % 4);
  return bytes;
}

/* Terms ------------------------------------------------------------------------------------------------- */

struct token_codes {
  const uint8_t *codes;
  const float *scale;
  const int32_t *zero;
};

struct product {
  aq_weights_view m; /* its layout alone without columns */
  token_codes x;
  size_t tokens, segment; /* columns of a segment: a power of two, of this exponent */
  int segment_bits;
  const float *bias;
  float *out;
};

struct row_grid {
  float scale, zero_point;
};

AQ_DEVICE row_grid grid_of(const aq_weights_view &m, size_t row, size_t segment) {
  const size_t at = row * m.layout.groups + (m.layout.groups == 1 ? 0 : segment);
  return {aq_half_value(m.scale[at]), m.zero_point ? aq_half_value(m.zero_point[at]) : (float)(1 << (m.layout.bits - 1))};
}

/* A segment's term from the sums of x w, w and x over its `n` columns. */
AQ_DEVICE float term_of(row_grid grid, uint32_t zero, uint32_t products, uint32_t weights, uint32_t x, size_t n) {
  const int32_t whole = (int32_t)(products - zero * weights), sum = (int32_t)(x - zero * (uint32_t)n);
  const float shift = grid.zero_point * (float)sum, difference = (float)whole - shift;
  return grid.scale * difference;
}

AQ_DEVICE void store_output(const product &p, size_t token, size_t row, float total) {
  const float y = p.x.scale[token] * total;
  p.out[token * p.m.layout.rows + row] = p.bias ? y + p.bias[row] : y;
}

/* Few tokens -------------------------------------------------------------------------------------------- */

#define AQ_FEW 8
#define WARP_TOKENS 4

/* A lane has a chunk of every 32; those of a segment add up their sums. */
static __global__ void __launch_bounds__(AQ_BLOCK) multiply_few(product p) {
  const aq_layout &layout = p.m.layout;
  const size_t lane = threadIdx.x % 32, lanes = p.segment / AQ_CHUNK, parts = (p.tokens - 1) / WARP_TOKENS + 1;
  for (size_t unit = aq_thread() / 32; unit < layout.rows * parts; unit += aq_all_threads() / 32) {
    const size_t part = aq_quotient(unit, layout.rows), row = unit - part * layout.rows, first = part * WARP_TOKENS;
    float totals[WARP_TOKENS] = {};
    for (size_t base = 0; base < layout.chunks; base += 32) {
      const size_t chunk = base + lane, begin = chunk * AQ_CHUNK;
      const size_t n = chunk < layout.chunks ? aq_smaller(AQ_CHUNK, layout.cols - begin) : 0;
      const chunk_bytes w = weight_bytes(p.m, row, chunk, n);
      const size_t segment = begin >> p.segment_bits, from = segment << p.segment_bits;
      const bool is_there = from < layout.cols;
      const size_t columns = is_there ? aq_smaller(p.segment, layout.cols - from) : 0;
      const row_grid grid = is_there ? grid_of(p.m, row, segment) : row_grid{0.0f, 0.0f};
      uint32_t weights = __dp4a(w.at[1], ONES, __dp4a(w.at[0], ONES, 0u));
      for (size_t distance = lanes / 2; distance > 0; distance /= 2) weights += __shfl_xor_sync(0xffffffffu, weights, (int)distance);
#pragma unroll
      for (size_t t = 0; t < WARP_TOKENS; t++) {
        if (first + t >= p.tokens) break;
        const chunk_bytes x = token_bytes(p.x.codes + (first + t) * layout.cols, layout.cols, chunk, n);
        uint32_t products = __dp4a(x.at[1], w.at[1], __dp4a(x.at[0], w.at[0], 0u));
        uint32_t sum = __dp4a(x.at[1], ONES, __dp4a(x.at[0], ONES, 0u));
        for (size_t distance = lanes / 2; distance > 0; distance /= 2) {
          products += __shfl_xor_sync(0xffffffffu, products, (int)distance);
          sum += __shfl_xor_sync(0xffffffffu, sum, (int)distance);
        }
        const float term = term_of(grid, (uint32_t)p.x.zero[first + t], products, weights, sum, columns);
        for (size_t i = 0; i < 32 && (base + i) * AQ_CHUNK < layout.cols; i += lanes)
          totals[t] = totals[t] + __shfl_sync(0xffffffffu, term, (int)i);
      }
    }
#pragma unroll
    for (size_t t = 0; t < WARP_TOKENS; t++)
      if (lane == 0 && first + t < p.tokens) store_output(p, first + t, row, totals[t]);
  }
}

/* Many tokens ------------------------------------------------------------------------------------------- */

#define SIDE 64       /* rows and tokens of a tile */
#define STEP 64       /* columns that are in shared memory at once */
#define OWN 4         /* rows and tokens of a thread, 16 apart */
#define PITCH (STEP / 4 + 1) /* words */

struct tile_sums {
  uint32_t products[OWN][OWN], weights[OWN], x[OWN];
};

/* The terms of the segment that ends before column `end`. */
AQ_DEVICE void end_segment(const product &p, const tile_sums &sums, size_t row, size_t token, size_t end, float totals[OWN][OWN]) {
  const size_t segment = (end - 1) >> p.segment_bits, n = end - (segment << p.segment_bits);
#pragma unroll
  for (size_t i = 0; i < OWN; i++) {
    if (row + 16 * i >= p.m.layout.rows) break;
    const row_grid grid = grid_of(p.m, row + 16 * i, segment);
#pragma unroll
    for (size_t j = 0; j < OWN; j++) {
      if (token + 16 * j >= p.tokens) break;
      const uint32_t zero = (uint32_t)p.x.zero[token + 16 * j];
      totals[i][j] = totals[i][j] + term_of(grid, zero, sums.products[i][j], sums.weights[i], sums.x[j], n);
    }
  }
}

/* Columns [col, col + STEP) of a tile's rows and tokens into shared memory, zeros where there are none. */
AQ_DEVICE void load_step(const product &p, size_t row, size_t token, size_t col, uint32_t *w, uint32_t *x) {
  const aq_layout &layout = p.m.layout;
  for (size_t at = threadIdx.x; at < SIDE * (STEP / AQ_CHUNK); at += AQ_BLOCK) {
    const size_t i = at / (STEP / AQ_CHUNK), own = at % (STEP / AQ_CHUNK), chunk = col / AQ_CHUNK + own;
    const size_t n = chunk < layout.chunks ? aq_smaller(AQ_CHUNK, layout.cols - chunk * AQ_CHUNK) : 0;
    const chunk_bytes weights = weight_bytes(p.m, row + i, chunk, row + i < layout.rows ? n : 0);
    const chunk_bytes codes = token_bytes(p.x.codes + (token + i) * layout.cols, layout.cols, chunk, token + i < p.tokens ? n : 0);
    for (size_t half = 0; half < 2; half++) {
      w[i * PITCH + 2 * own + half] = weights.at[half];
      x[i * PITCH + 2 * own + half] = codes.at[half];
    }
  }
}

static __global__ void __launch_bounds__(AQ_BLOCK) multiply_many(product p) {
  __shared__ uint32_t w[SIDE * PITCH], x[SIDE * PITCH];
  const aq_layout &layout = p.m.layout;
  const size_t down = (layout.rows - 1) / SIDE + 1, across = (p.tokens - 1) / SIDE + 1;
  const size_t own_row = threadIdx.x / 16, own_token = threadIdx.x % 16, run = aq_smaller(p.segment, STEP);
  for (size_t tile = blockIdx.x; tile < down * across; tile += gridDim.x) {
    const size_t row = tile / across * SIDE, token = tile % across * SIDE;
    float totals[OWN][OWN] = {};
    tile_sums sums = {};
    for (size_t col = 0; col < layout.cols; col += STEP) {
      __syncthreads(); /* all are done with what was there */
      load_step(p, row, token, col, w, x);
      __syncthreads();
      for (size_t begin = 0; begin < STEP && col + begin < layout.cols; begin += run) {
        for (size_t k = begin / 4; k < (begin + run) / 4; k++) {
          uint32_t own_w[OWN], own_x[OWN];
#pragma unroll
          for (size_t i = 0; i < OWN; i++) {
            own_w[i] = w[(own_row + 16 * i) * PITCH + k];
            own_x[i] = x[(own_token + 16 * i) * PITCH + k];
            sums.weights[i] = __dp4a(own_w[i], ONES, sums.weights[i]);
            sums.x[i] = __dp4a(own_x[i], ONES, sums.x[i]);
          }
#pragma unroll
          for (size_t i = 0; i < OWN; i++)
#pragma unroll
            for (size_t j = 0; j < OWN; j++) sums.products[i][j] = __dp4a(own_x[j], own_w[i], sums.products[i][j]);
        }
        const size_t end = aq_smaller(col + begin + run, layout.cols);
        if ((end & (p.segment - 1)) != 0 && end < layout.cols) continue;
        end_segment(p, sums, row + own_row, token + own_token, end, totals);
        sums = {};
      }
    }
#pragma unroll
    for (size_t i = 0; i < OWN; i++)
#pragma unroll
      for (size_t j = 0; j < OWN; j++)
        if (row + own_row + 16 * i < layout.rows && token + own_token + 16 * j < p.tokens)
          store_output(p, token + own_token + 16 * j, row + own_row + 16 * i, totals[i][j]);
  }
}

int32_t aq_cuda_linear_packed_int8(aq_cuda_buffer codes, aq_cuda_buffer x_scale, aq_cuda_buffer x_zero_point,
                                   size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
                                   aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols,
                                   int32_t bits, size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_counts_allowed(tokens, cols) || !aq_counts_allowed(tokens, rows)) return AQ_E_SHAPE;
  product p = {};
  if (cols > 0) status = aq_view_one_level(on, packed, scale, zero_point, rows, cols, bits, group_size, &p.m);
  p.m.layout.rows = rows;
  p.x = {cols ? aq_cuda_view<uint8_t>(codes, tokens * cols, on, &status) : 0, aq_cuda_view<float>(x_scale, tokens, on, &status),
         aq_cuda_view<int32_t>(x_zero_point, tokens, on, &status)};
  p.tokens = tokens;
  p.segment = p.m.layout.groups == 1 || cols == 0 ? AQ_SEGMENT : p.m.layout.group_size;
  while ((size_t)1 << p.segment_bits < p.segment) p.segment_bits++;
  p.bias = aq_cuda_optional(bias, rows, on, &status);
  p.out = aq_cuda_view<float>(out, tokens * rows, on, &status);
  if (status != AQ_OK) return status;
  if (tokens <= AQ_FEW) {
    const size_t warps = rows * ((tokens - 1) / WARP_TOKENS + 1);
    aq_launch(on, multiply_few, aq_cuda_blocks(warps, AQ_BLOCK / 32), AQ_BLOCK, 0, p);
  } else {
    const size_t tiles = ((rows - 1) / SIDE + 1) * ((tokens - 1) / SIDE + 1);
    aq_launch(on, multiply_many, aq_cuda_blocks(tiles, 1), AQ_BLOCK, 0, p);
  }
  return aq_cuda_launched();
}
