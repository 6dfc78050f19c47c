/* settle.h: scales and offsets of trellis codes by least squares, and descent over the codes, as
 * kernels/cpu/solver does it, with the bytes of its oracle. A warp has a row and keeps a part of its columns
 * in shared memory: its lanes try the codes of a column, and take the steps of the best one for the part's
 * columns. What a part means for all other columns is a product. */
#ifndef AQ_CUDA_TRELLIS_SETTLE_H
#define AQ_CUDA_TRELLIS_SETTLE_H

#include "../rows.h"

#include "../../arithmetic/refit.h"
#include "../../arithmetic/trellis.h"

#define AQ_SETTLE_MOST (AQ_SEGMENT + 8) /* columns of a part and those that its codes reach */

/* Its zero points are offsets; its products: errors first, then the levels' products with the moment. */
struct settle_job : descent_job {
  const float *table;
  bool refits_offsets;
  float *levels; /* [rows, cols], where rows have one scale */
  float *steps;  /* [rows, AQ_SETTLE_MOST] */
};

/* A part of a row, in shared memory: columns [first, end), of which those before `part` are its own. */
struct settle_part {
  float gradient[AQ_SETTLE_MOST], scale[AQ_SETTLE_MOST], offset[AQ_SETTLE_MOST], levels[AQ_SETTLE_MOST], values[AQ_SETTLE_MOST];
  uint8_t codes[AQ_SETTLE_MOST + 4]; /* from AQ_TRELLIS_BEFORE / BITS columns in front of the part on */
};

template <int BITS>
struct settle_reach {
  static constexpr size_t COLUMNS = AQ_TRELLIS_BEFORE / BITS;
};

/* The window of column `at` of a part. */
template <int BITS>
AQ_DEVICE size_t part_window(const settle_part &m, size_t at) {
  size_t window = 0;
#pragma unroll
  for (size_t i = 0; i <= settle_reach<BITS>::COLUMNS; i++)
    window = window << BITS | m.codes[at + settle_reach<BITS>::COLUMNS - i];
  return window;
}

template <int BITS>
AQ_DEVICE float part_value(const settle_part &m, const float *table, size_t at) {
  return AQ_FMA(m.scale[at], table[part_window<BITS>(m, at)], m.offset[at]);
}

/* The level of a column of a row in global memory. */
template <int BITS>
AQ_DEVICE float level_at(const settle_job &job, size_t row, size_t col) {
  const uint8_t *codes = job.own.codes + row * job.own.cols + col;
  size_t window = 0;
#pragma unroll
  for (size_t i = 0; i <= settle_reach<BITS>::COLUMNS; i++) window = window << BITS | (i <= col ? codes[-(ptrdiff_t)i] : 0);
  return job.table[window];
}

template <int BITS>
struct trellis_job : settle_job {
  __device__ float value(size_t row, size_t col) const {
    const size_t group = row * own.groups + col / own.group_size;
    return AQ_FMA(own.scale[group], level_at<BITS>(*this, row, col), own.zero_point[group]);
  }
};

/* The moment's elements for two columns of a part, of which those behind `border` are another block's. */
struct part_moment {
  const float *own, *behind;
  size_t own_size, behind_size, border;
  __device__ bool has(size_t k, size_t j) const { return (k < border) == (j < border); }
  __device__ float at(size_t k, size_t j) const {
    if (!has(k, j)) return 0.0f;
    return k < border ? own[k * own_size + j] : behind[(k - border) * behind_size + j - border];
  }
};

AQ_FUNCTION part_moment moment_of(const settle_job &job, size_t first) {
  const size_t n = job.own.cols, block = job.own.block, begin = first / block * block, end = begin + block;
  const size_t size = end < n ? block : n - begin, at = first - begin;
  const size_t behind = end >= n ? 0 : n - end < block ? n - end : block;
  return {job.moment + begin * block + at * size + at, job.moment + (begin + size) * block, size, behind, size - at};
}

/* A part's scale and offset, of a group of its own, and what they mean for its columns. */
template <int BITS>
AQ_DEVICE void fit_part(const settle_job &job, settle_part &m, const part_moment &h, const float *table, size_t first, size_t part, size_t end) {
  const size_t lane = lane_of();
  for (size_t k = lane; k < part; k += 32) m.levels[k] = table[part_window<BITS>(m, k)];
  __syncwarp();
  float products[AQ_SEGMENT / 32];
#pragma unroll
  for (int q = 0; q < AQ_SEGMENT / 32; q++) {
    const size_t j = 32 * (size_t)q + lane;
    products[q] = 0.0f;
    for (size_t k = 0; k < part && j < part; k++) products[q] = AQ_FMA(m.levels[k], h.at(k, j), products[q]);
  }
  float sums[4] = {};
#pragma unroll
  for (int q = 0; q < AQ_SEGMENT / 32; q++)
    for (size_t k = 32 * (size_t)q; k < aq_smaller(part, 32 * (size_t)q + 32); k++) {
      const float product = __shfl_sync(AQ_ALL_LANES, products[q], (int)(k % 32)), p = m.gradient[k];
      sums[0] = AQ_FMA(m.levels[k], product, sums[0]);
      sums[1] += product;
      sums[2] = AQ_FMA(m.levels[k], p, sums[2]);
      sums[3] += p;
    }
  const double totals[4] = {(double)sums[0], (double)sums[1], (double)sums[2], (double)sums[3]};
  float scale = m.scale[0], offset = m.offset[0];
  aq_best_line(totals, job.group_sums[first / job.own.group_size], &scale, &offset);
  __syncwarp(); /* all have read what there was */
  for (size_t k = lane; k < part; k += 32) {
    m.scale[k] = scale;
    m.offset[k] = offset;
    m.levels[k] = AQ_FMA(scale, m.levels[k], offset) - m.values[k]; /* its step */
  }
  __syncwarp();
  for (size_t j = lane; first + j < end; j += 32) {
    float gradient = m.gradient[j];
    for (size_t k = 0; k < part; k++)
      if (h.has(k, j)) gradient = AQ_FMA(-m.levels[k], h.at(k, j), gradient);
    m.gradient[j] = gradient;
  }
  __syncwarp();
}

/* Column `at` of a part gets the code that is best given all others, where the objective falls. */
template <int BITS>
AQ_DEVICE void descend_code(const settle_job &job, settle_part &m, const part_moment &h, const float *table, size_t first, size_t at, size_t end) {
  constexpr size_t REACH = settle_reach<BITS>::COLUMNS;
  const size_t col = first + at, reach = aq_smaller(REACH, job.own.cols - 1 - col), lane = lane_of();
  const unsigned old = m.codes[at + REACH], code = (unsigned)(lane % (1u << BITS));
  float steps[REACH + 1] = {}, change = 0.0f;
#pragma unroll
  for (size_t i = 0; i <= REACH; i++)
    if (i <= reach) {
      const size_t shift = AQ_TRELLIS_BEFORE - i * BITS; /* of the column's code in the windows of the next ones */
      const size_t window = part_window<BITS>(m, at + i), other = (window & ~((((size_t)1 << BITS) - 1) << shift)) | (size_t)code << shift;
      const float value = AQ_FMA(m.scale[at + i], table[window], m.offset[at + i]);
      steps[i] = AQ_FMA(m.scale[at + i], table[other], m.offset[at + i]) - value;
    }
#pragma unroll
  for (size_t i = 0; i <= REACH; i++)
    if (i <= reach) {
      float sum = -2 * m.gradient[at + i];
#pragma unroll
      for (size_t l = 0; l <= REACH; l++)
        if (l <= reach) sum = AQ_FMA(h.at(at + i, at + l), steps[l], sum);
      change = AQ_FMA(steps[i], sum, change);
    }
  float least = code != old && change < 0.0f ? change : 0.0f;
  unsigned chosen = code != old && change < 0.0f ? code : (unsigned)lane + 32; /* the present one: behind all others */
  for (int distance = (1 << BITS) / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(AQ_ALL_LANES, least, distance);
    const unsigned other_code = __shfl_xor_sync(AQ_ALL_LANES, chosen, distance);
    if (other < least || (other == least && other_code < chosen)) {
      least = other;
      chosen = other_code;
    }
  }
  chosen = __shfl_sync(AQ_ALL_LANES, chosen, 0);
  float best[REACH + 1];
#pragma unroll
  for (size_t i = 0; i <= REACH; i++) {
    const float step = __shfl_sync(AQ_ALL_LANES, steps[i], (int)(chosen < 32 ? chosen : 0));
    best[i] = chosen < 32 ? step : 0.0f;
  }
  __syncwarp(); /* all have read the codes and the gradient */
  if (lane == 0 && chosen < 32) m.codes[at + REACH] = (uint8_t)chosen;
  for (size_t j = lane; first + j < end; j += 32) {
    float gradient = m.gradient[j];
#pragma unroll
    for (size_t i = 0; i <= REACH; i++)
      if (i <= reach && h.has(at + i, j)) gradient = AQ_FMA(-best[i], h.at(at + i, j), gradient);
    m.gradient[j] = gradient;
  }
  __syncwarp();
}

/* Columns [first, first + part) of a row: their scale and offset, where a group has its own, and their codes;
 * what both change in the values before `end`, into `steps`. */
template <int BITS>
AQ_DEVICE void settle_columns(const settle_job &job, settle_part &m, const float *table, size_t row, size_t first, size_t part,
                              size_t end) {
  constexpr size_t REACH = settle_reach<BITS>::COLUMNS;
  const rows_job &own = job.own;
  const size_t lane = lane_of();
  const part_moment h = moment_of(job, first);
  for (size_t k = lane; first + k < end; k += 32) {
    const size_t group = row * own.groups + (first + k) / own.group_size;
    m.gradient[k] = job.gradient[row * own.cols + first + k];
    m.scale[k] = own.scale[group];
    m.offset[k] = own.zero_point[group];
  }
  for (size_t k = lane; k < end - first + REACH; k += 32)
    m.codes[k] = first + k < REACH ? (uint8_t)0 : own.codes[row * own.cols + first + k - REACH];
  __syncwarp();
  for (size_t k = lane; first + k < end; k += 32) m.values[k] = part_value<BITS>(m, table, k);
  __syncwarp();
  if (job.refits_groups) fit_part<BITS>(job, m, h, table, first, part, end);
  for (size_t k = 0; k < part; k++) descend_code<BITS>(job, m, h, table, first, k, end);
  for (size_t k = lane; first + k < end; k += 32) {
    job.steps[row * AQ_SETTLE_MOST + k] = part_value<BITS>(m, table, k) - m.values[k];
    job.gradient[row * own.cols + first + k] = m.gradient[k];
    if (k < part) own.codes[row * own.cols + first + k] = m.codes[k + REACH];
  }
  if (lane == 0 && job.refits_groups) {
    own.scale[row * own.groups + first / own.group_size] = m.scale[0];
    own.zero_point[row * own.groups + first / own.group_size] = m.offset[0];
  }
  __syncwarp(); /* before the next row's */
}

/* Kernels: a warp a row, or a thread an element ---------------------------------------------------------- */

template <int BITS>
static __global__ void __launch_bounds__(AQ_BLOCK) settle_part_kernel(settle_job job, size_t first, size_t part, size_t end) {
  __shared__ settle_part parts[AQ_WARPS];
  __shared__ float table[AQ_TRELLIS_WINDOWS(BITS)];
  for (size_t i = threadIdx.x; i < AQ_TRELLIS_WINDOWS(BITS); i += AQ_BLOCK) table[i] = job.table[i];
  __syncthreads();
  for (size_t row = first_row(); row < job.own.rows; row += row_step())
    settle_columns<BITS>(job, parts[threadIdx.x / 32], table, row, first, part, end);
}

template <int BITS>
static __global__ void __launch_bounds__(AQ_BLOCK) trellis_levels(settle_job job) {
  const rows_job &own = job.own;
  for (size_t i = aq_thread(); i < own.rows * own.cols; i += aq_all_threads())
    job.levels[i] = level_at<BITS>(job, i / own.cols, i % own.cols);
}

/* A row's one scale and offset. */
static __global__ void __launch_bounds__(AQ_BLOCK) fit_rows(settle_job job) {
  const rows_job &own = job.own;
  const size_t n = own.cols;
  for (size_t row = first_row(); row < own.rows; row += row_step()) {
    const float *levels = job.levels + row * n, *products = job.products + row * n;
    const float old_scale = own.scale[row], old_offset = own.zero_point[row];
    float *gradient = job.gradient + row * n, scale = old_scale, offset = old_offset;
    double sums[4];
    sum_parts<4>(n, sums, [&](size_t k, float *part) {
      part[0] = AQ_FMA(levels[k], products[k], part[0]);
      part[1] += products[k];
      part[2] = AQ_FMA(levels[k], gradient[k], part[2]);
      part[3] += gradient[k];
    });
    const bool better = aq_best_line(sums, job.group_sums[0], &scale, &offset);
    __syncwarp(); /* all lanes have read the gradient and the line */
    if (!better) continue;
    if (lane_of() == 0) {
      own.scale[row] = scale;
      own.zero_point[row] = offset;
    }
    const float step = old_scale - scale, shift = old_offset - offset;
    for (size_t k = lane_of(); k < n; k += 32)
      gradient[k] = AQ_FMA(shift, job.ones[k], AQ_FMA(step, products[k], gradient[k]));
  }
}

/* Columns of the gradient less steps times rows of the moment. */
static void take_part(const aq_stream_state *on, const settle_job &job, const float *steps, size_t k, const float *moment,
                      size_t stride, size_t col, size_t cols) {
  if (k == 0 || cols == 0) return;
  aq_product p = {};
  p.a = steps;
  p.a_row = AQ_SETTLE_MOST;
  p.b = moment;
  p.b_row = (ptrdiff_t)stride;
  p.a_col = p.b_col = 1;
  p.c = job.gradient + col;
  p.c_row = job.own.cols;
  p.k = k;
  p.rows = job.own.rows;
  p.cols = cols;
  p.subtract = true;
  aq_cuda_product(on, p);
}

/* A part of the columns after the other, and what it means for all other columns. */
template <int BITS>
static void descend_parts(const aq_stream_state *on, const settle_job &job) {
  const rows_job &own = job.own;
  const size_t most = job.refits_groups ? own.group_size : AQ_PART;
  for (size_t first = 0, part = 0; first < own.cols; first += part) {
    part = most < own.cols - first ? most : own.cols - first;
    const size_t wanted = first + part + settle_reach<BITS>::COLUMNS, end = wanted < own.cols ? wanted : own.cols;
    aq_launch(on, settle_part_kernel<BITS>, warp_blocks(own.rows), AQ_BLOCK, 0, job, first, part, end);
    const part_moment h = moment_of(job, first);
    const size_t here = h.border < end - first ? h.border : end - first, begin = first / own.block * own.block;
    take_part(on, job, job.steps, here, h.own - (first - begin), h.own_size, begin, first - begin);
    if (end < first + h.border) take_part(on, job, job.steps, here, h.own + (end - first), h.own_size, end, first + h.border - end);
    const size_t border = first + h.border;
    if (end > border)
      take_part(on, job, job.steps + h.border, end - border, h.behind + (end - border), h.behind_size, end,
                border + h.behind_size - end);
  }
}

#endif
