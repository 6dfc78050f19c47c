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

/* Fragments -----------------------------------------------------------------------------------------------------------
 *
 * Codes are whole numbers that bfloat16 holds exactly, so tensor cores add up x q without rounding a weight; a fold's sums become
 * s (sum x q - z sum x) in float32. x is given as one bfloat16 number or, for float32, as three that add up to it:
 *
 *     x     bfloat16 [windows, columns, 32]: a window is 32 columns of the matrix, a "column" here one part of one token; chunks
 *           have the order of aq_bfloats_of_codes; zeros where there is nothing
 *     sums  float32 [folds, columns]: sum x over a fold's windows, at a token's first part
 */
#define AQ_WINDOW 32
#define AQ_STAGE_WINDOWS 4
#define AQ_STAGE (AQ_STAGE_WINDOWS * AQ_WINDOW) /* columns of the matrix that are copied at once */

struct aq_fragment_view {
  aq_packed_matrix matrix;
  const uint16_t *x;
  const float *sums;
  size_t columns, tokens, token_blocks;
  int parts, fold; /* windows of a fold: 1, 2 or 4, all of one group */
  const float *bias;
  float *out; /* [tokens, rows] */
};

/* Whether a matrix can be taken by fragments: whole groups of windows, rows of whole copies. */
AQ_FUNCTION bool aq_fragments_fit(const aq_layout &layout) {
  return layout.words % 4 == 0 && (layout.groups == 1 || layout.group_size % AQ_WINDOW == 0);
}

AQ_FUNCTION int aq_fold_windows(const aq_layout &layout) {
  if (layout.groups == 1 || layout.group_size % AQ_STAGE == 0) return AQ_STAGE_WINDOWS;
  return layout.group_size % (2 * AQ_WINDOW) == 0 ? 2 : 1;
}

#endif
