/* solver/trellis.h: codes whose weight depends on the codes before it: weight j of a row is scale *
 * table[window] + offset, the window the code's own bits on top of those before it, codes in front of the row
 * 0. Searched by a beam with a survivor for each window, every one of which carries its own error feedback;
 * then scales and offsets by least squares, and descent over codes. Rows are independent. Every element is
 * one chain of fused multiply-adds in the oracle's order, so that codes, scales and offsets are the same to
 * the bit. */
#ifndef AQ_SOLVER_TRELLIS_H
#define AQ_SOLVER_TRELLIS_H

#include "../../arithmetic/refit.h"
#include "kernels.h"

#define AQ_TRELLIS_MOST_WINDOWS 512
#define AQ_TRELLIS_MOST_LANES 32 /* rows of a chunk of any instruction set */

/* Columns that are decided at once, when as many behind them have been searched. */
#define AQ_TRELLIS_BLOCK 16

/* Columns behind a code whose windows hold it. */
static inline size_t aq_trellis_reach(int32_t bits) { return AQ_TRELLIS_BEFORE / (size_t)bits; }

static inline size_t aq_trellis_windows(int32_t bits) { return AQ_TRELLIS_WINDOWS(bits); }

/* The moment and its factor are blocks on the diagonal, `block` columns each, one after the other; columns
 * keep their order. */
typedef struct {
  const float *weights; /* [rows, cols] */
  size_t rows, cols;
  int32_t bits;
  size_t group_size, groups, block;
  const float *table;          /* [windows] */
  const float *factor, *pivots; /* unit upper triangular */
  int32_t survivors;           /* 1: plain error feedback */
  const float *scale, *offset; /* [rows, groups] */
  uint8_t *codes;
  double *objective; /* [rows] */
} aq_search_job;

typedef struct {
  const float *weights;
  size_t rows, cols;
  int32_t bits;
  size_t group_size, groups, block;
  const float *table;
  int32_t refit, rounds;
  const float *moment;      /* symmetric */
  const float *ones;        /* [cols]: sums of a row of the moment over the columns of its group */
  const double *group_sums; /* [groups]: sums of those over the group; both 0 where scales alone are fitted */
  float *scale, *offset;
  uint8_t *codes;
  double *objective;
} aq_settle_job;

/* Both leave with outputs half-made when aq_stopped(). */
typedef struct {
  size_t lanes; /* rows of a chunk, at most AQ_TRELLIS_MOST_LANES */
  /* at most a chunk of rows, with aq_trellis_floats() of scratch */
  void (*search)(const aq_search_job *job, size_t row, size_t rows, float *work);
  void (*settle)(const aq_settle_job *job, size_t row, size_t rows, float *work);
} aq_trellis_kernels;

extern const aq_trellis_kernels aq_trellis_scalar;

/* Floats of scratch for a chunk: its rows four times, codes, grids, and for each window of each row its cost,
 * its targets in a block and its path. */
static inline size_t aq_trellis_floats(size_t cols, size_t groups) {
  return AQ_TRELLIS_MOST_LANES * (4 * cols + cols / 4 + 2 * groups + AQ_TRELLIS_MOST_WINDOWS * (AQ_TRELLIS_BLOCK + 5) + 64);
}

/* A matrix of blocks on the diagonal, and where row k of it lies: its element j is row[j] for begin <= j <
 * end. */
typedef struct {
  const float *row;
  size_t begin, end;
} aq_block_row;

static inline aq_block_row aq_row_of_blocks(const float *matrix, size_t cols, size_t block, size_t k) {
  const size_t begin = k / block * block, size = aq_min_size(block, cols - begin);
  return (aq_block_row){matrix + begin * block + (k - begin) * size - begin, begin, begin + size};
}

static inline float aq_element_of(const aq_block_row *row, size_t j) {
  return j >= row->begin && j < row->end ? row->row[j] : 0.0f;
}

#endif
