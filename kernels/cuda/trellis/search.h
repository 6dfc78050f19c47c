/* search.h: the search for trellis codes of kernels/cpu/solver/trellis.h, with the bytes of its oracle. A
 * thread has a window of a row: the survivor whose newest codes it is. A survivor has its cost, what the
 * columns of the present block are aimed at, and its undecided codes, of the present block and of the one
 * before; its errors are made of these again where they are needed. All of it lies in shared memory, where a
 * column's survivors take it from those of the column before.
 *
 *     columns   ... decided | 16 undecided | 16 searched | targets of a row, in global memory ...
 *                             older          newer */
#ifndef AQ_CUDA_TRELLIS_SEARCH_H
#define AQ_CUDA_TRELLIS_SEARCH_H

#include "../rows.h"

#include "../../arithmetic/trellis.h"

#define AQ_SEARCH_BLOCK 16
#define AQ_SEARCH_THREADS 1024

struct search_job {
  rows_job rows; /* its zero points are offsets */
  const float *table, *factor, *pivots;
  bool one_survivor;
  float *targets; /* [rows, cols]: weights with the errors of all decided columns */
};

/* What a column is to a row. */
struct search_column {
  float weight, pivot, scale, offset;
};

template <int BITS>
struct search_memory {
  static constexpr size_t WINDOWS = AQ_TRELLIS_WINDOWS(BITS), ROWS = AQ_SEARCH_THREADS / WINDOWS;
  float cost[AQ_SEARCH_THREADS], targets[AQ_SEARCH_BLOCK][AQ_SEARCH_THREADS]; /* of each survivor */
  uint64_t older[AQ_SEARCH_THREADS], newer[AQ_SEARCH_THREADS];
  float table[WINDOWS];
  float own[AQ_SEARCH_BLOCK][AQ_SEARCH_BLOCK], next[AQ_SEARCH_BLOCK][AQ_SEARCH_BLOCK]; /* of the factor */
  search_column columns[2][ROWS][AQ_SEARCH_BLOCK];
  float errors[ROWS][AQ_SEARCH_BLOCK]; /* of columns that are being decided */
  uint64_t chosen_older[ROWS], chosen_newer[ROWS];
  uint32_t before[ROWS]; /* the last bits of the decided codes */
  float least[AQ_SEARCH_THREADS / 32];
  unsigned least_at[AQ_SEARCH_THREADS / 32];
};

/* A thread's survivor. */
struct search_place {
  size_t row, own, window; /* own: of the block's rows */
  bool there;              /* behind the last row its work is done again, and not written */
};

/* Row k of blocks on a diagonal: its element j is row[j] for j < *end, and for the columns before its block
 * nobody asks. */
AQ_DEVICE const float *row_of_blocks(const float *matrix, size_t cols, size_t block, size_t k, size_t *end) {
  const size_t begin = k / block * block, size = aq_smaller(block, cols - begin);
  *end = begin + size;
  return matrix + begin * block + (k - begin) * size - begin;
}

AQ_DEVICE float factor_at(const search_job &job, size_t k, size_t j) {
  if (k >= job.rows.cols) return 0.0f;
  size_t end;
  const float *row = row_of_blocks(job.factor, job.rows.cols, job.rows.block, k, &end);
  return j < end ? row[j] : 0.0f;
}

/* Columns from `first` on, and what the factor has for them; every thread calls. */
template <int BITS>
AQ_DEVICE void load_columns(const search_job &job, search_memory<BITS> &m, const search_place &p, size_t first) {
  const rows_job &rows = job.rows;
  if (p.window < AQ_SEARCH_BLOCK && first + p.window < rows.cols) {
    const size_t col = first + p.window, group = p.row * rows.groups + col / rows.group_size;
    m.columns[first / AQ_SEARCH_BLOCK % 2][p.own][p.window] = {rows.weights[p.row * rows.cols + col], job.pivots[col],
                                                               rows.scale[group], rows.zero_point[group]};
  }
  for (size_t at = threadIdx.x; at < 2 * AQ_SEARCH_BLOCK * AQ_SEARCH_BLOCK; at += AQ_SEARCH_THREADS) {
    const size_t i = at / AQ_SEARCH_BLOCK % AQ_SEARCH_BLOCK, j = at % AQ_SEARCH_BLOCK;
    if (at < AQ_SEARCH_BLOCK * AQ_SEARCH_BLOCK)
      m.own[i][j] = factor_at(job, first + i, first + j);
    else if (first > 0)
      m.next[i][j] = factor_at(job, first - AQ_SEARCH_BLOCK + i, first + j);
  }
}

/* The cheapest survivor of a row, the earlier of equals; all threads call, and what it has for that is free
 * again after the next barrier. */
template <int BITS>
AQ_DEVICE unsigned cheapest(search_memory<BITS> &m, const search_place &p, float *cost) {
  float least = m.cost[threadIdx.x];
  unsigned at = (unsigned)p.window;
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(AQ_ALL_LANES, least, distance);
    const unsigned other_at = __shfl_xor_sync(AQ_ALL_LANES, at, distance);
    if (other < least || (other == least && other_at < at)) {
      least = other;
      at = other_at;
    }
  }
  if (threadIdx.x % 32 == 0) {
    m.least[threadIdx.x / 32] = least;
    m.least_at[threadIdx.x / 32] = at;
  }
  __syncthreads();
  const size_t warps = search_memory<BITS>::WINDOWS / 32, first = p.own * warps;
  least = m.least[first];
  at = m.least_at[first];
  for (size_t i = first + 1; i < first + warps; i++)
    if (m.least[i] < least) {
      least = m.least[i];
      at = m.least_at[i];
    }
  *cost = least;
  return at;
}

/* Column t of the block from `first` on: a window's code comes behind the cheapest of the windows that it can
 * follow. */
template <int BITS>
AQ_DEVICE void search_column_of(const search_job &job, search_memory<BITS> &m, const search_place &p, size_t first, size_t t) {
  constexpr size_t WINDOWS = search_memory<BITS>::WINDOWS, CHOICES = (size_t)1 << BITS;
  const search_column column = m.columns[first / AQ_SEARCH_BLOCK % 2][p.own][t];
  const float value = AQ_FMA(column.scale, m.table[p.window], column.offset), error = column.weight - value;
  const size_t before = p.own * WINDOWS + (p.window << BITS & (WINDOWS - 1));
  size_t best = before;
  float cost = 0.0f;
#pragma unroll
  for (size_t part = 0; part < CHOICES; part += 4) {
    const aq_words4 targets = aq_read16(&m.targets[t][before + part]), costs = aq_read16(&m.cost[before + part]);
#pragma unroll
    for (size_t x = 0; x < 4; x++) {
      const float left = aq_bits_float(targets.at[x]) - value;
      const float own = AQ_FMA(left * column.pivot, left, aq_bits_float(costs.at[x]));
      if (part + x > 0 && !(own < cost)) continue;
      cost = own;
      best = before + part + x;
    }
  }
  float next[AQ_SEARCH_BLOCK];
#pragma unroll
  for (size_t j = 0; j < AQ_SEARCH_BLOCK; j++)
    if (j > t) next[j] = AQ_FMA(error, m.own[t][j], m.targets[j][best]);
  const uint64_t older = m.older[best], newer = m.newer[best] | (uint64_t)(p.window >> AQ_TRELLIS_BEFORE) << BITS * t;
  __syncthreads(); /* all have read what was there */
  m.cost[threadIdx.x] = cost;
  m.older[threadIdx.x] = older;
  m.newer[threadIdx.x] = newer;
#pragma unroll
  for (size_t j = 0; j < AQ_SEARCH_BLOCK; j++)
    if (j > t) m.targets[j][threadIdx.x] = next[j];
  __syncthreads();
  if (!job.one_survivor) return;
  if (cheapest(m, p, &cost) != p.window) m.cost[threadIdx.x] = __builtin_inff();
  __syncthreads();
}

/* The window of code i of sixteen, with the bits in front of them. */
template <int BITS>
AQ_DEVICE size_t window_in(uint64_t codes, uint64_t before, size_t i) {
  return (size_t)((codes << AQ_TRELLIS_BEFORE | before) >> BITS * i) & (AQ_TRELLIS_WINDOWS(BITS) - 1);
}

template <int BITS>
AQ_DEVICE uint64_t last_bits(uint64_t codes) {
  return codes >> (BITS * AQ_SEARCH_BLOCK - AQ_TRELLIS_BEFORE);
}

template <int BITS>
AQ_DEVICE float error_of(const search_memory<BITS> &m, const search_column &column, size_t window) {
  return column.weight - AQ_FMA(column.scale, m.table[window], column.offset);
}

/* What survivors aim at in the block from `first` on: the row's targets with the errors of their codes in the
 * block before. These become the older ones. */
template <int BITS>
AQ_DEVICE void begin_block(const search_job &job, search_memory<BITS> &m, const search_place &p, size_t first) {
  const rows_job &rows = job.rows;
  const float *from = (p.there ? job.targets : rows.weights) + p.row * rows.cols;
  const uint64_t newer = m.newer[threadIdx.x], before = last_bits<BITS>(m.older[threadIdx.x]);
  float targets[AQ_SEARCH_BLOCK];
#pragma unroll
  for (size_t j = 0; j < AQ_SEARCH_BLOCK; j++) targets[j] = first + j < rows.cols ? from[first + j] : 0.0f;
  for (size_t i = 0; i < AQ_SEARCH_BLOCK && first > 0; i++) {
    const search_column &column = m.columns[(first / AQ_SEARCH_BLOCK - 1) % 2][p.own][i];
    const float error = error_of<BITS>(m, column, window_in<BITS>(newer, before, i));
#pragma unroll
    for (size_t j = 0; j < AQ_SEARCH_BLOCK; j++) targets[j] = AQ_FMA(error, m.next[i][j], targets[j]);
  }
#pragma unroll
  for (size_t j = 0; j < AQ_SEARCH_BLOCK; j++) m.targets[j][threadIdx.x] = targets[j];
  m.older[threadIdx.x] = newer;
  m.newer[threadIdx.x] = 0;
  __syncthreads();
}

/* The errors of the sixteen columns from `first` on, which are decided, for those from `next` on. */
template <int BITS>
AQ_DEVICE void pass_errors(const search_job &job, const search_memory<BITS> &m, const search_place &p, size_t first, size_t next) {
  const rows_job &rows = job.rows;
  size_t end;
  const float *factor = row_of_blocks(job.factor, rows.cols, rows.block, first, &end);
  const size_t stride = aq_smaller(rows.block, rows.cols - first / rows.block * rows.block);
  float *targets = job.targets + p.row * rows.cols;
  for (size_t j = next + p.window; j < end && p.there; j += search_memory<BITS>::WINDOWS) {
    float target = targets[j];
#pragma unroll
    for (size_t i = 0; i < AQ_SEARCH_BLOCK; i++) target = AQ_FMA(m.errors[p.own][i], factor[i * stride + j], target);
    targets[j] = target;
  }
}

/* Behind the block [first, end): decides the columns in front of it, or all if it is the last one, for the
 * cheapest survivor; ends those that do not share them, and makes ready for the next block. Returns the
 * survivor's cost, which all others are less. */
template <int BITS>
AQ_DEVICE float decide(const search_job &job, search_memory<BITS> &m, const search_place &p, size_t first, size_t end) {
  const rows_job &rows = job.rows;
  constexpr uint64_t MASK = (1u << BITS) - 1;
  const bool is_last = end == rows.cols;
  uint8_t *codes = rows.codes + p.row * rows.cols;
  float least;
  if (cheapest(m, p, &least) == p.window) {
    m.chosen_older[p.own] = m.older[threadIdx.x];
    m.chosen_newer[p.own] = m.newer[threadIdx.x];
  }
  __syncthreads();
  const uint64_t older = m.chosen_older[p.own];
  const size_t i = p.window;
  if (first > 0 && i < AQ_SEARCH_BLOCK) {
    const search_column &column = m.columns[(first / AQ_SEARCH_BLOCK - 1) % 2][p.own][i];
    if (p.there) codes[first - AQ_SEARCH_BLOCK + i] = (uint8_t)(older >> BITS * i & MASK);
    m.errors[p.own][i] = error_of<BITS>(m, column, window_in<BITS>(older, m.before[p.own], i));
  }
  if (is_last) {
    if (first + i < end && p.there) codes[first + i] = (uint8_t)(m.chosen_newer[p.own] >> BITS * i & MASK);
    __syncthreads(); /* before another row's */
    return least;
  }
  const bool is_shared = first == 0 || m.older[threadIdx.x] == older;
  m.cost[threadIdx.x] = is_shared ? m.cost[threadIdx.x] - least : __builtin_inff();
  __syncthreads();
  if (first > 0) pass_errors<BITS>(job, m, p, first - AQ_SEARCH_BLOCK, end);
  if (first > 0 && i == 0) m.before[p.own] = (uint32_t)last_bits<BITS>(older);
  load_columns<BITS>(job, m, p, end);
  __syncthreads();
  begin_block<BITS>(job, m, p, end);
  return least;
}

/* A row for every AQ_TRELLIS_WINDOWS threads of a block. */
template <int BITS>
AQ_DEVICE void search_rows(const search_job &job, search_memory<BITS> &m, size_t base) {
  constexpr size_t WINDOWS = search_memory<BITS>::WINDOWS;
  const rows_job &rows = job.rows;
  const size_t own = threadIdx.x / WINDOWS, row = base + own;
  const search_place p = {aq_smaller(row, rows.rows - 1), own, threadIdx.x % WINDOWS, row < rows.rows};
  for (size_t j = p.window; j < rows.cols && p.there; j += WINDOWS)
    job.targets[p.row * rows.cols + j] = rows.weights[p.row * rows.cols + j];
  m.cost[threadIdx.x] = p.window ? __builtin_inff() : 0.0f;
  m.older[threadIdx.x] = m.newer[threadIdx.x] = 0;
  if (p.window == 0) m.before[own] = 0;
  load_columns<BITS>(job, m, p, 0);
  __syncthreads();
  begin_block<BITS>(job, m, p, 0);
  double objective = 0.0;
  for (size_t first = 0; first < rows.cols; first += AQ_SEARCH_BLOCK) {
    const size_t end = aq_smaller(first + AQ_SEARCH_BLOCK, rows.cols);
    for (size_t col = first; col < end; col++) search_column_of<BITS>(job, m, p, first, col - first);
    objective += (double)decide<BITS>(job, m, p, first, end);
  }
  if (p.window == 0 && p.there) rows.objective[row] = objective;
}

#endif
