/* product.cu: products with packed weights. Matrices whose rows and groups allow it go through tensor cores (product.h,
 * "Fragments"): up to 64 tokens with the columns of 16 rows shared by a block's warps, so that every weight is read once with
 * several copies of each warp on their way, and more tokens in tiles of 128 by 128. The others take a few tokens at a time. */
#include "fragment.h"
#include "product.h"

/* Few tokens without tensor cores -------------------------------------------------------------------------------------- */

/* Block x: ROWS rows; block y: TOKENS tokens. */
template <int BITS, int TOKENS, int ROWS>
static __global__ void __launch_bounds__(AQ_PRODUCT_THREADS) few_tokens(aq_product_view view) {
  __shared__ float parts[AQ_PRODUCT_THREADS / 32][TOKENS * ROWS];
  const size_t row = (size_t)blockIdx.x * ROWS;
  for (size_t token = (size_t)blockIdx.y * TOKENS; token < view.tokens; token += (size_t)gridDim.y * TOKENS) {
    float sums[TOKENS][ROWS] = {};
    if (BITS == 3)
      aq_add_chunk_products<TOKENS, ROWS>(view, token, row, threadIdx.x, AQ_PRODUCT_THREADS, sums);
    else
      aq_add_word_products<BITS == 3 ? 4 : BITS, TOKENS, ROWS>(view, token, row, threadIdx.x, AQ_PRODUCT_THREADS, sums);
#pragma unroll
    for (int i = 0; i < TOKENS * ROWS; i++) {
      float sum = sums[i / ROWS][i % ROWS];
      for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][i] = sum;
    }
    __syncthreads();
    if (threadIdx.x < TOKENS * ROWS) {
      const size_t t = token + threadIdx.x / ROWS, r = row + threadIdx.x % ROWS;
      float sum = 0.0f;
      for (int warp = 0; warp < AQ_PRODUCT_THREADS / 32; warp++) sum += parts[warp][threadIdx.x];
      if (t < view.tokens && r < view.matrix.layout.rows)
        view.out[t * view.matrix.layout.rows + r] = sum + (view.bias ? view.bias[r] : 0.0f);
    }
    __syncthreads();
  }
}

template <int BITS>
static void launch_few(const aq_product_view &view, const aq_stream_state *on) {
  const size_t rows = view.matrix.layout.rows, most = 65535;
  if (view.tokens == 1) {
    aq_launch(on, few_tokens<BITS, 1, 4>, dim3((unsigned)((rows + 3) / 4)), AQ_PRODUCT_THREADS, 0, view);
    return;
  }
  const size_t groups = (view.tokens + 3) / 4;
  const dim3 blocks((unsigned)((rows + 1) / 2), (unsigned)(groups < most ? groups : most));
  aq_launch(on, few_tokens<BITS, 4, 2>, blocks, AQ_PRODUCT_THREADS, 0, view);
}

/* Tokens as fragments ------------------------------------------------------------------------------------------------ */

/* A warp a fold and column: what product.h says of x and sums. */
static __global__ void prepare_tokens(const float *x, size_t cols, aq_fragment_view view, size_t folds, uint16_t *to,
                                      float *sums) {
  const size_t warps = aq_all_threads() / 32, lane = threadIdx.x % 32;
  for (size_t i = aq_thread() / 32; i < folds * view.columns; i += warps) {
    const size_t n = aq_quotient(i, folds), fold = i - n * folds, token = n / (unsigned)view.parts, part = n % (unsigned)view.parts;
    float total = 0.0f;
    for (int w = 0; w < view.fold; w++) {
      const size_t window = fold * (size_t)view.fold + (size_t)w, col = window * AQ_WINDOW + lane;
      float value = token < view.tokens && col < cols ? x[token * cols + col] : 0.0f;
      uint16_t own;
      if (view.parts == 1) {
        own = aq_bfloat_from_float(value);
        value = aq_float_from_bfloat(own);
      } else { /* cut off twice; of 24 bits 8 are left */
        float rest = value;
        for (size_t p = 0; p < part; p++) rest -= aq_bits_float(aq_float_bits(rest) & 0xffff0000u);
        own = (uint16_t)(aq_float_bits(rest) >> 16);
      }
      to[(window * view.columns + n) * AQ_WINDOW + lane / AQ_CHUNK * AQ_CHUNK + aq_paired_place((unsigned)lane % AQ_CHUNK)] = own;
      total += value;
    }
    for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
    if (lane == 0) sums[fold * view.columns + n] = part == 0 ? total : 0.0f;
  }
}

/* Words of a stage's row, and from one to the next in shared memory: rows of eight lanes' groups lie on different banks. */
static __host__ __device__ constexpr int stage_words(int bits) { return AQ_STAGE * bits / 32; }
static __host__ __device__ constexpr int stage_pitch(int bits) { return stage_words(bits) % 8 == 4 ? stage_words(bits) : stage_words(bits) + 4; }

/* Copy `i` of a stage of packed rows, `bits` of each row; rows that there are not are the last one. */
template <int BITS>
static __device__ __forceinline__ void copy_codes(const aq_packed_matrix &matrix, size_t row, size_t stage, unsigned i,
                                                  uint32_t *shared) {
  const unsigned line = i / BITS, piece = i % BITS;
  const size_t from = aq_smaller(row + line, matrix.layout.rows - 1), word = stage * stage_words(BITS) + 4 * piece;
  aq_copy16(shared + line * stage_pitch(BITS) + 4 * piece, matrix.packed + from * matrix.layout.words + word,
            word < matrix.layout.words);
}

static __device__ __forceinline__ void add_fold(float total[4], const float sums[4], aq_grid upper, aq_grid lower, float x0,
                                                float x1) {
  total[0] += upper.scale * (sums[0] - upper.zero_point * x0);
  total[1] += upper.scale * (sums[1] - upper.zero_point * x1);
  total[2] += lower.scale * (sums[2] - lower.zero_point * x0);
  total[3] += lower.scale * (sums[3] - lower.zero_point * x1);
}

/* Few tokens ----------------------------------------------------------------------------------------------------------- */

#define FEW_WARPS 8
#define FEW_ROWS 16
#define FEW_STAGES 4

/* A block: 16 rows and as many whole tokens as have 8 TILES columns; those of the same rows follow each other, so that their weights
 * are still in the cache. Warps take the matrix's stages in turns and copy for themselves. */
template <int BITS, int TILES>
static __global__ void __launch_bounds__(FEW_WARPS * 32) few_fragments(aq_fragment_view view) {
  AQ_DYNAMIC_SHARED(uint32_t, memory);
  const aq_packed_matrix &matrix = view.matrix;
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const size_t row_block = aq_quotient(blockIdx.x, view.token_blocks), token_block = blockIdx.x - row_block * view.token_blocks;
  const size_t row = row_block * FEW_ROWS, own_tokens = 8 * TILES / (unsigned)view.parts;
  const size_t token = token_block * own_tokens, column = token * (size_t)view.parts;
  const size_t stages = (matrix.layout.words - 1) / stage_words(BITS) + 1, last_row = matrix.layout.rows - 1;
  uint32_t *const slots = memory + warp * FEW_STAGES * FEW_ROWS * stage_pitch(BITS);
  const auto fetch = [&](size_t turn) {
    const size_t stage = turn * FEW_WARPS + (size_t)warp;
    if (stage < stages)
      for (unsigned i = (unsigned)lane; i < FEW_ROWS * BITS; i += 32)
        copy_codes<BITS>(matrix, row, stage, i, slots + turn % FEW_STAGES * FEW_ROWS * stage_pitch(BITS));
    aq_commit_copies();
  };
  float total[TILES][4] = {};
  for (size_t turn = 0; turn < FEW_STAGES - 1; turn++) fetch(turn);
  for (size_t turn = 0; turn * FEW_WARPS + (size_t)warp < stages; turn++) {
    const size_t stage = turn * FEW_WARPS + (size_t)warp;
    aq_wait_copies<FEW_STAGES - 2>();
    __syncwarp(); /* the others' copies are there, too, and all are done with the slot that is filled next */
    fetch(turn + FEW_STAGES - 1);
    const uint32_t *upper = slots + (turn % FEW_STAGES * FEW_ROWS + (unsigned)g) * stage_pitch(BITS);
    const uint32_t *lower = upper + 8 * stage_pitch(BITS);
    float sums[TILES][4] = {};
#pragma unroll
    for (int w = 0; w < AQ_STAGE_WINDOWS; w++) {
      const size_t window = stage * AQ_STAGE_WINDOWS + (size_t)w;
      uint32_t a[4], b[4];
      aq_bfloats_of_codes<BITS>(upper, (unsigned)(4 * w + t), a);
      aq_bfloats_of_codes<BITS>(lower, (unsigned)(4 * w + t), b);
      const uint32_t first[4] = {a[0], b[0], a[1], b[1]}, second[4] = {a[2], b[2], a[3], b[3]};
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const aq_words4 x = aq_read16(
            view.x + (window * view.columns + column + (unsigned)(8 * tile + g)) * AQ_WINDOW + (unsigned)t * AQ_CHUNK);
        aq_multiply_fragments(sums[tile], first, x.at);
        aq_multiply_fragments(sums[tile], second, x.at + 2);
      }
      if ((w + 1) % view.fold != 0) continue;
      const size_t group = aq_smaller(window * AQ_WINDOW >> matrix.layout.group_shift, matrix.layout.groups - 1);
      const aq_grid above = aq_stored_grid(matrix, aq_smaller(row + (unsigned)g, last_row), group);
      const aq_grid below = aq_stored_grid(matrix, aq_smaller(row + (unsigned)g + 8, last_row), group);
      const float *x = view.sums + window / (unsigned)view.fold * view.columns + column + (unsigned)(2 * t);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        add_fold(total[tile], sums[tile], above, below, x[8 * tile], x[8 * tile + 1]);
        for (int i = 0; i < 4; i++) sums[tile][i] = 0.0f;
      }
    }
  }
  aq_wait_copies<0>();
  __syncthreads();
  float *const parts = (float *)memory; /* [warp][row][column] */
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
    for (int i = 0; i < 4; i++)
      parts[((warp * FEW_ROWS) + g + i / 2 * 8) * 8 * TILES + 8 * tile + 2 * t + i % 2] = total[tile][i];
  __syncthreads();
  for (unsigned e = threadIdx.x; e < FEW_ROWS * own_tokens; e += FEW_WARPS * 32) {
    const unsigned own_row = e % FEW_ROWS, own_token = e / FEW_ROWS;
    if (token + own_token >= view.tokens || row + own_row > last_row) continue;
    float sum = 0.0f;
    for (int part = view.parts - 1; part >= 0; part--)
      for (int k = 0; k < FEW_WARPS; k++)
        sum += parts[((unsigned)k * FEW_ROWS + own_row) * 8 * TILES + own_token * (unsigned)view.parts + (unsigned)part];
    view.out[(token + own_token) * matrix.layout.rows + row + own_row] = sum + (view.bias ? view.bias[row + own_row] : 0.0f);
  }
}

template <int BITS, int TILES>
static int32_t launch_few_fragments(const aq_fragment_view &view, const aq_stream_state *on) {
  const size_t copies = (size_t)FEW_WARPS * FEW_STAGES * FEW_ROWS * stage_pitch(BITS) * 4;
  const size_t results = (size_t)FEW_WARPS * FEW_ROWS * 8 * TILES * 4, bytes = copies > results ? copies : results;
  const int32_t status = aq_cuda_status(cudaFuncSetAttribute(
      few_fragments<BITS, TILES>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
  if (status != AQ_OK) return status;
  const size_t blocks = ((view.matrix.layout.rows - 1) / FEW_ROWS + 1) * view.token_blocks;
  if (blocks > 0x7fffffff) return AQ_E_SHAPE;
  aq_launch(on, few_fragments<BITS, TILES>, (unsigned)blocks, FEW_WARPS * 32, bytes, view);
  return aq_cuda_launched();
}

/* Many tokens ---------------------------------------------------------------------------------------------------------- */

#define MANY_TILE 128 /* rows of a block, and columns */
#define MANY_THREADS 256
#define MANY_STAGES 3

/* A stage in shared memory: x of four windows, sums of up to four folds, packed rows. */
#define MANY_X_BYTES (AQ_STAGE_WINDOWS * MANY_TILE * AQ_WINDOW * 2)
#define MANY_SUM_BYTES (AQ_STAGE_WINDOWS * MANY_TILE * 4)
static __host__ __device__ constexpr size_t many_bytes(int bits) {
  return MANY_X_BYTES + MANY_SUM_BYTES + (size_t)MANY_TILE * stage_pitch(bits) * 4;
}

/* Block x: 128 rows; block y: 128 tokens of one part each. Eight warps of 32 rows by 64 tokens. */
template <int BITS>
static __global__ void __launch_bounds__(MANY_THREADS, 1) many_fragments(aq_fragment_view view) {
  AQ_DYNAMIC_SHARED(uint8_t, memory);
  const aq_packed_matrix &matrix = view.matrix;
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 64;
  const size_t row = (size_t)blockIdx.x * MANY_TILE, column = (size_t)blockIdx.y * MANY_TILE;
  const size_t stages = (matrix.layout.words - 1) / stage_words(BITS) + 1, last_row = matrix.layout.rows - 1;
  const auto fetch = [&](size_t stage) {
    uint8_t *const slot = memory + stage % MANY_STAGES * many_bytes(BITS);
    if (stage < stages) {
      for (unsigned i = threadIdx.x; i < MANY_X_BYTES / 16; i += MANY_THREADS) {
        const size_t window = stage * AQ_STAGE_WINDOWS + i / (MANY_TILE * 4);
        aq_copy16(slot + 16 * i, view.x + (window * view.columns + column) * AQ_WINDOW + i % (MANY_TILE * 4) * 8, true);
      }
      const unsigned folds = AQ_STAGE_WINDOWS / (unsigned)view.fold;
      for (unsigned i = threadIdx.x; i < folds * MANY_TILE / 4; i += MANY_THREADS)
        aq_copy16(slot + MANY_X_BYTES + 16 * i,
                  view.sums + (stage * folds + i / (MANY_TILE / 4)) * view.columns + column + i % (MANY_TILE / 4) * 4, true);
      for (unsigned i = threadIdx.x; i < MANY_TILE * BITS; i += MANY_THREADS)
        copy_codes<BITS>(matrix, row, stage, i, (uint32_t *)(slot + MANY_X_BYTES + MANY_SUM_BYTES));
    }
    aq_commit_copies();
  };
  float total[2][8][4] = {};
  for (size_t stage = 0; stage < MANY_STAGES - 1; stage++) fetch(stage);
  for (size_t stage = 0; stage < stages; stage++) {
    aq_wait_copies<MANY_STAGES - 2>();
    __syncthreads(); /* the others' copies are there, too, and all are done with the slot that is filled next */
    fetch(stage + MANY_STAGES - 1);
    const uint8_t *const slot = memory + stage % MANY_STAGES * many_bytes(BITS);
    const uint16_t *const x = (const uint16_t *)slot;
    const float *const x_sums = (const float *)(slot + MANY_X_BYTES);
    const uint32_t *const codes = (const uint32_t *)(slot + MANY_X_BYTES + MANY_SUM_BYTES);
    float sums[2][8][4] = {};
#pragma unroll
    for (int w = 0; w < AQ_STAGE_WINDOWS; w++) {
      uint32_t first[2][4], second[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t *upper = codes + (warp_row + 16 * i + g) * stage_pitch(BITS);
        uint32_t a[4], b[4];
        aq_bfloats_of_codes<BITS>(upper, (unsigned)(4 * w + t), a);
        aq_bfloats_of_codes<BITS>(upper + 8 * stage_pitch(BITS), (unsigned)(4 * w + t), b);
#pragma unroll
        for (int k = 0; k < 4; k++) {
          first[i][k] = k % 2 ? b[k / 2] : a[k / 2];
          second[i][k] = k % 2 ? b[2 + k / 2] : a[2 + k / 2];
        }
      }
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const aq_words4 from = aq_read16(x + (w * MANY_TILE + warp_column + 8 * j + g) * AQ_WINDOW + t * AQ_CHUNK);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          aq_multiply_fragments(sums[i][j], first[i], from.at);
          aq_multiply_fragments(sums[i][j], second[i], from.at + 2);
        }
      }
      if ((w + 1) % view.fold != 0) continue;
      const size_t window = stage * AQ_STAGE_WINDOWS + (size_t)w;
      const size_t group = aq_smaller(window * AQ_WINDOW >> matrix.layout.group_shift, matrix.layout.groups - 1);
      const float *const own_sums = x_sums + w / view.fold * MANY_TILE + warp_column + 2 * t;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const size_t from = row + (unsigned)(warp_row + 16 * i + g);
        const aq_grid upper = aq_stored_grid(matrix, aq_smaller(from, last_row), group);
        const aq_grid lower = aq_stored_grid(matrix, aq_smaller(from + 8, last_row), group);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          add_fold(total[i][j], sums[i][j], upper, lower, own_sums[8 * j], own_sums[8 * j + 1]);
          for (int k = 0; k < 4; k++) sums[i][j][k] = 0.0f;
        }
      }
    }
  }
  aq_wait_copies<0>();
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const size_t r = row + (unsigned)(warp_row + 16 * i + g + k / 2 * 8);
        const size_t token = column + (unsigned)(warp_column + 8 * j + 2 * t + k % 2);
        if (token < view.tokens && r <= last_row)
          view.out[token * matrix.layout.rows + r] = total[i][j][k] + (view.bias ? view.bias[r] : 0.0f);
      }
}

template <int BITS>
static int32_t launch_many_fragments(const aq_fragment_view &view, const aq_stream_state *on) {
  const size_t bytes = MANY_STAGES * many_bytes(BITS);
  const int32_t status = aq_cuda_status(
      cudaFuncSetAttribute(many_fragments<BITS>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
  if (status != AQ_OK) return status;
  const dim3 blocks((unsigned)((view.matrix.layout.rows - 1) / MANY_TILE + 1), (unsigned)view.token_blocks);
  aq_launch(on, many_fragments<BITS>, blocks, MANY_THREADS, bytes, view);
  return aq_cuda_launched();
}

/* ---------------------------------------------------------------------------------------------------------------------- */

template <int BITS>
static int32_t launch_fragments(const aq_fragment_view &view, int tiles, const aq_stream_state *on) {
  switch (tiles) {
    case 0: return launch_many_fragments<BITS>(view, on);
    case 1: return launch_few_fragments<BITS, 1>(view, on);
    case 2: return launch_few_fragments<BITS, 2>(view, on);
    case 4: return launch_few_fragments<BITS, 4>(view, on);
    default: return launch_few_fragments<BITS, 8>(view, on);
  }
}

/* Tokens whose fragments are held at once. */
#define FRAGMENT_TOKENS 4096

static int32_t linear_fragments(const aq_product_view &whole, bool rounded, aq_stream_state *on) {
  const aq_layout &layout = whole.matrix.layout;
  for (size_t done = 0; done < whole.tokens; done += FRAGMENT_TOKENS) {
    const size_t tokens = aq_smaller(FRAGMENT_TOKENS, whole.tokens - done);
    const int parts = rounded ? 1 : 3;
    int tiles = rounded ? tokens > 64 ? 0 : 8 : 4; /* 0: many tokens */
    while (tiles > 1 && tokens * (size_t)parts <= (size_t)tiles * 4) tiles /= 2;
    const size_t own_tokens = tiles ? 8 * (size_t)tiles / (size_t)parts : MANY_TILE;
    const size_t blocks = (tokens - 1) / own_tokens + 1, width = tiles ? 8 * (size_t)tiles : MANY_TILE;
    const size_t columns = (blocks - 1) * own_tokens * (size_t)parts + width, windows = ((layout.cols - 1) / AQ_STAGE + 1) * AQ_STAGE_WINDOWS;
    const int fold = aq_fold_windows(layout);
    const size_t folds = windows / (size_t)fold, x_bytes = windows * columns * AQ_WINDOW * 2;
    int32_t status = AQ_OK;
    uint8_t *scratch = (uint8_t *)aq_cuda_scratch(on, x_bytes + folds * columns * 4, &status);
    if (status != AQ_OK) return status;
    const aq_fragment_view view = {whole.matrix, (const uint16_t *)scratch, (const float *)(scratch + x_bytes), columns, tokens, blocks,
                                   parts, fold, whole.bias, whole.out + done * layout.rows};
    aq_launch(on, prepare_tokens, aq_cuda_blocks(folds * columns * 32, AQ_BLOCK), AQ_BLOCK, 0, whole.x + done * layout.cols,
              layout.cols, view, folds, (uint16_t *)scratch, (float *)(scratch + x_bytes));
    status = aq_cuda_launched();
    if (status != AQ_OK) return status;
    switch (layout.bits) {
      case 2: status = launch_fragments<2>(view, tiles, on); break;
      case 3: status = launch_fragments<3>(view, tiles, on); break;
      case 4: status = launch_fragments<4>(view, tiles, on); break;
      default: status = launch_fragments<8>(view, tiles, on); break;
    }
    if (status != AQ_OK) return status;
  }
  return AQ_OK;
}

static int32_t linear(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
                      aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols, int32_t bits,
                      size_t group_size, aq_cuda_buffer out, bool rounded, aq_cuda_stream stream) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  int32_t status;
  aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  /* a grid has 2^31 - 1 blocks of at least two rows */
  if (cols == 0 || rows > 0x7fffffff || !aq_shape_allowed(tokens, cols) || !aq_shape_allowed(tokens, rows))
    return AQ_E_SHAPE;
  aq_product_view view = {};
  view.matrix = aq_cuda_packed(packed, scale, zero_point, rows, cols, bits, group_size, on, &status);
  view.x = aq_cuda_view<float>(x, tokens * cols, on, &status);
  view.tokens = tokens;
  view.bias = bias ? aq_cuda_view<float>(bias, rows, on, &status) : 0;
  view.out = aq_cuda_view<float>(out, tokens * rows, on, &status);
  if (status != AQ_OK) return status;
  if (aq_fragments_fit(view.matrix.layout)) return linear_fragments(view, rounded, on);
  switch (bits) {
    case 2: launch_few<2>(view, on); break;
    case 3: launch_few<3>(view, on); break;
    case 4: launch_few<4>(view, on); break;
    default: launch_few<8>(view, on); break;
  }
  return aq_cuda_launched();
}

int32_t aq_cuda_linear_packed(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
                              aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols, int32_t bits,
                              size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream) {
  return linear(x, tokens, packed, scale, zero_point, bias, rows, cols, bits, group_size, out, false, stream);
}

int32_t aq_cuda_linear_packed_bf16(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
                                   aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols,
                                   int32_t bits, size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream) {
  return linear(x, tokens, packed, scale, zero_point, bias, rows, cols, bits, group_size, out, true, stream);
}
