/* product.h: what one thread does in products with a packed matrix: its part of the sums with a few tokens, in float32, and with
 * many its part of the tiles that tensor cores multiply.
 *
 * Few tokens: a code is turned into a float in its place within the word: with the mantissa of 2^23 around it, it reads 2^23 + q 2^shift,
 * and what is multiplied with it is x 2^-shift, which is exact and shared by all rows. The zero point is taken out once a word:
 * sum x s (q - z) = s (sum x q - z sum x). */
#ifndef AQ_CUDA_PRODUCT_H
#define AQ_CUDA_PRODUCT_H

#include "chunk.h"

#define AQ_PRODUCT_THREADS 128

struct aq_product_view {
  aq_packed_matrix matrix;
  const float *x; /* [tokens, cols] */
  size_t tokens;
  const float *bias; /* null: none */
  float *out;        /* [tokens, rows] */
};

/* n elements of a row of `from`, zeros behind them; whole runs of four where rows are a multiple of four long. */
template <int COUNT>
AQ_FUNCTION void aq_load_run(const float *from, size_t at, size_t cols, float values[COUNT]) {
  if (cols % 4 == 0 && at + COUNT <= cols) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int k = 0; k < COUNT; k += 4) {
      const aq_words4 v = aq_read16(from + at + k);
      for (int j = 0; j < 4; j++) values[k + j] = aq_bits_float(v.at[j]);
    }
    return;
  }
  for (int k = 0; k < COUNT; k++) values[k] = at + (size_t)k < cols ? from[at + (size_t)k] : 0.0f;
}

/* Code j of a word, times 2^(j BITS mod 16). */
template <int BITS>
AQ_FUNCTION float aq_code_in_place(uint32_t word, int j) {
  const int bit = j * BITS, shift = bit % 16;
  const uint32_t half = bit < 16 ? word : word >> 16;
  return aq_bits_float(0x4b000000u | (half & (((1u << BITS) - 1) << shift))) - 8388608.0f;
}

/* sums[t][r] += what words lane, lane + lanes, ... of rows [row, row + ROWS) give with tokens [token, token + TOKENS);
 * rows and tokens that there are not count as the last one. Widths 2, 4 and 8. */
template <int BITS, int TOKENS, int ROWS>
AQ_FUNCTION void aq_add_word_products(const aq_product_view &view, size_t token, size_t row, size_t lane, size_t lanes,
                                      float sums[TOKENS][ROWS]) {
  const int CODES = 32 / BITS;
  const aq_layout &layout = view.matrix.layout;
  for (size_t word = lane; word < layout.words; word += lanes) {
    const size_t col = word * CODES, group = aq_quotient(col, layout.group_size);
    uint32_t codes[ROWS];
    aq_grid grid[ROWS];
    for (int r = 0; r < ROWS; r++) {
      const size_t from = aq_smaller(row + (size_t)r, layout.rows - 1);
      codes[r] = view.matrix.packed[from * layout.words + word];
      grid[r] = aq_stored_grid(view.matrix, from, group);
    }
    for (int t = 0; t < TOKENS; t++) {
      float x[CODES], total = 0.0f;
      aq_load_run<CODES>(view.x + aq_smaller(token + (size_t)t, view.tokens - 1) * layout.cols, col, layout.cols, x);
      for (int j = 0; j < CODES; j++) {
        total += x[j];
        x[j] *= 1.0f / (float)(1 << j * BITS % 16);
      }
      for (int r = 0; r < ROWS; r++) {
        float sum = 0.0f;
        for (int j = 0; j < CODES; j++) sum += aq_code_in_place<BITS>(codes[r], j) * x[j];
        sums[t][r] += grid[r].scale * (sum - grid[r].zero_point * total);
      }
    }
  }
}

/* The same by chunks, for three bits, whose codes straddle words. */
template <int TOKENS, int ROWS>
AQ_FUNCTION void aq_add_chunk_products(const aq_product_view &view, size_t token, size_t row, size_t lane, size_t lanes,
                                       float sums[TOKENS][ROWS]) {
  const aq_layout &layout = view.matrix.layout;
  for (size_t chunk = lane; chunk < layout.chunks; chunk += lanes) {
    for (int r = 0; r < ROWS; r++) {
      float weights[AQ_CHUNK];
      aq_dequantize_chunk(view.matrix, aq_smaller(row + (size_t)r, layout.rows - 1), chunk, weights);
      for (int t = 0; t < TOKENS; t++) {
        float x[AQ_CHUNK];
        aq_load_run<AQ_CHUNK>(view.x + aq_smaller(token + (size_t)t, view.tokens - 1) * layout.cols,
                              chunk * AQ_CHUNK, layout.cols, x);
        for (int k = 0; k < AQ_CHUNK; k++) sums[t][r] += x[k] * weights[k];
      }
    }
  }
}

/* Many tokens ----------------------------------------------------------------------------------------------------------
 *
 * A block's tile of the result is AQ_TILE tokens by AQ_TILE rows. A step is AQ_TILE_DEPTH columns of both, fetched by all threads
 * and dequantized on their way into tiles of bfloat16 [AQ_TILE, AQ_TILE_PITCH]. */
#define AQ_TILE 128
#define AQ_TILE_DEPTH 32
#define AQ_TILE_PITCH (AQ_TILE_DEPTH + 8) /* so that fragments' rows fall on different banks */
#define AQ_TILE_THREADS 256
#define AQ_TILE_LINE (AQ_TILE_DEPTH / AQ_CHUNK) /* chunks of a token or row */
#define AQ_TILE_CHUNKS (AQ_TILE * AQ_TILE_LINE / AQ_TILE_THREADS)

/* A thread's chunks of a step. */
struct aq_fetched {
  float x[AQ_TILE_CHUNKS][AQ_CHUNK];
  uint64_t codes[AQ_TILE_CHUNKS];
  aq_grid grid[AQ_TILE_CHUNKS];
};

/* Zeros where there is no token, row or column. */
AQ_FUNCTION void aq_fetch_step(const aq_product_view &view, size_t token, size_t row, size_t col, unsigned thread,
                               aq_fetched *next) {
  const aq_layout &layout = view.matrix.layout;
  for (unsigned k = 0; k < AQ_TILE_CHUNKS; k++) {
    const unsigned place = k * AQ_TILE_THREADS + thread, line = place / AQ_TILE_LINE;
    const size_t at = col + (size_t)(place % AQ_TILE_LINE) * AQ_CHUNK, t = token + line, r = row + line;
    const bool inside = at < layout.cols;
    for (int i = 0; i < AQ_CHUNK; i++) next->x[k][i] = 0.0f;
    if (inside && t < view.tokens)
      aq_load_chunk(view.x, AQ_F32, t * layout.cols + at, aq_smaller(AQ_CHUNK, layout.cols - at), next->x[k]);
    next->codes[k] = 0;
    next->grid[k] = {0.0f, 0.0f};
    if (inside && r < layout.rows) {
      next->codes[k] = aq_read_codes(view.matrix.packed, layout, r, at / AQ_CHUNK);
      next->grid[k] = aq_stored_grid(view.matrix, r, aq_quotient(at, layout.group_size));
    }
  }
}

/* Behind a row's last column there are weights, too, those of code 0; the tokens' zeros take them out. */
AQ_FUNCTION void aq_commit_step(const aq_fetched &next, int32_t bits, unsigned thread, uint16_t *x, uint16_t *w) {
  for (unsigned k = 0; k < AQ_TILE_CHUNKS; k++) {
    const unsigned place = k * AQ_TILE_THREADS + thread;
    const unsigned at = place / AQ_TILE_LINE * AQ_TILE_PITCH + place % AQ_TILE_LINE * AQ_CHUNK;
    float weights[AQ_CHUNK];
    for (int i = 0; i < AQ_CHUNK; i++) weights[i] = aq_decode(aq_code_of(next.codes[k], i, bits), next.grid[k]);
    aq_store_chunk(next.x[k], x + at, AQ_BF16, 0, AQ_CHUNK);
    aq_store_chunk(weights, w + at, AQ_BF16, 0, AQ_CHUNK);
  }
}

#endif
