/* rows.h: what all solve that go over rows of weights against a moment in blocks on its diagonal: sizes,
 * checks, and who has which row. */
#ifndef AQ_CUDA_ROWS_H
#define AQ_CUDA_ROWS_H

#include "product.h"

#define AQ_WARPS (AQ_BLOCK / 32)
#define AQ_PART 32 /* columns whose errors are carried on one after the other */
#define AQ_ALL_LANES 0xffffffffu

static inline unsigned warp_blocks(size_t rows) { return aq_cuda_blocks(rows, AQ_WARPS); }
static inline unsigned thread_blocks(size_t threads) { return aq_cuda_blocks(threads, AQ_BLOCK); }

AQ_DEVICE size_t lane_of(void) { return threadIdx.x % 32; }
AQ_DEVICE size_t first_row(void) { return (size_t)blockIdx.x * AQ_WARPS + threadIdx.x / 32; }
AQ_DEVICE size_t row_step(void) { return (size_t)gridDim.x * AQ_WARPS; }

/* Checks ------------------------------------------------------------------------------------------------- */

static __global__ void __launch_bounds__(AQ_BLOCK) check_finite(const float *values, size_t n, int32_t fault,
                                                                int32_t *faults) {
  int found = 0;
  for (size_t i = aq_thread(); i < n; i += aq_all_threads()) found |= !(values[i] - values[i] == 0);
  if (__syncthreads_or(found) && threadIdx.x == 0) atomicOr(faults, fault);
}

static __global__ void __launch_bounds__(AQ_BLOCK) check_grids(const float *scale, const float *zero_point, size_t n,
                                                               int32_t *faults) {
  int found = 0;
  for (size_t i = aq_thread(); i < n; i += aq_all_threads())
    found |= scale[i] == 0 || !(scale[i] - scale[i] == 0) || !(zero_point[i] - zero_point[i] == 0);
  if (__syncthreads_or(found) && threadIdx.x == 0) atomicOr(faults, (int32_t)AQ_FAULT_COLUMN_WEIGHT);
}

static __global__ void __launch_bounds__(AQ_BLOCK) check_codes(const uint8_t *codes, size_t n, int32_t bits,
                                                               int32_t *faults) {
  int found = 0;
  for (size_t i = aq_thread(); i < n; i += aq_all_threads()) found |= codes[i] >> bits;
  if (__syncthreads_or(found) && threadIdx.x == 0) atomicOr(faults, (int32_t)AQ_FAULT_VALUE);
}

/* What both solve: rows of weights on grids, against a moment in blocks on its diagonal. */
struct rows_job {
  const float *weights; /* [rows, cols] */
  size_t rows, cols;
  int32_t bits;
  size_t group_size, groups, block;
  float *scale, *zero_point; /* [rows, groups] */
  uint8_t *codes;
  double *objective; /* [rows] */
};

static size_t block_elements(size_t cols, size_t block) {
  return cols / block * block * block + cols % block * (cols % block);
}

/* Checks sizes, and puts checks of values on the stream. */
static int32_t check_rows(const aq_stream_state *on, aq_cuda_buffer weights, size_t rows, size_t cols, int32_t bits,
                          size_t group_size, size_t block, aq_cuda_buffer scale, aq_cuda_buffer zero_point,
                          aq_cuda_buffer codes, aq_cuda_buffer objective, rows_job *job) {
  if (!aq_bits_allowed(bits)) return AQ_E_ARGUMENT;
  const size_t group = aq_group_columns(group_size, cols);
  if (group == 0 || cols > AQ_MAX_SOLVER_COLS || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  if (block == 0 || block > cols || (block % group != 0 && group < cols && block < cols)) return AQ_E_SHAPE;
  const size_t groups = (cols - 1) / group + 1;
  int32_t status = AQ_OK;
  *job = {aq_cuda_view<float>(weights, rows * cols, on, &status),
          rows,
          cols,
          bits,
          group,
          groups,
          block,
          aq_cuda_view<float>(scale, rows * groups, on, &status),
          aq_cuda_view<float>(zero_point, rows * groups, on, &status),
          aq_cuda_view<uint8_t>(codes, rows * cols, on, &status),
          aq_cuda_view<double>(objective, rows, on, &status)};
  if (status == AQ_OK) status = aq_cuda_clear_faults(on);
  if (status != AQ_OK) return status;
  aq_launch(on, check_grids, thread_blocks(rows * groups), AQ_BLOCK, 0, job->scale, job->zero_point, rows * groups,
            on->faults);
  aq_launch(on, check_finite, thread_blocks(rows * cols), AQ_BLOCK, 0, job->weights, rows * cols,
            (int32_t)AQ_FAULT_NONFINITE, on->faults);
  return AQ_OK;
}

/* Refining ----------------------------------------------------------------------------------------------- */

/* A descent over codes, with refits. */
struct descent_job {
  rows_job own; /* its codes and grids are the state, kept only where it helped */
  const float *moment;
  bool refits_groups, refits_row;
  float *gradient, *products; /* [rows, cols] */
  float *ones;                /* [cols]: sums of a row of the moment over the columns of its group */
  double *group_sums;         /* [groups]: sums of those over the group */
  double *improved;           /* [rows]: objectives */
};

/* Cuts the arrays of a descent out of memory. */
static void cut_descent(aq_cutter &work, descent_job &job) {
  rows_job &own = job.own;
  job.gradient = work.take<float>(own.rows * own.cols);
  job.products = work.take<float>(own.rows * own.cols);
  job.ones = work.take<float>(own.cols);
  job.group_sums = work.take<double>(own.groups);
  job.improved = work.take<double>(own.rows);
  own.scale = work.take<float>(own.rows * own.groups);
  own.zero_point = work.take<float>(own.rows * own.groups);
  own.codes = work.take<uint8_t>(own.rows * own.cols);
}

static __global__ void __launch_bounds__(AQ_BLOCK) sum_rows(descent_job job) {
  const rows_job &own = job.own;
  for (size_t k = aq_thread(); k < own.cols; k += aq_all_threads()) {
    const size_t first = k / own.block * own.block, size = aq_smaller(own.block, own.cols - first);
    const size_t group = k / own.group_size * own.group_size;
    const float *row = job.moment + k / own.block * own.block * own.block + (k - first) * size;
    double sum = 0;
    for (size_t j = group > first ? group - first : 0; j < aq_smaller(group + own.group_size - first, size); j++)
      sum += (double)row[j];
    job.ones[k] = (float)sum;
  }
}

static __global__ void __launch_bounds__(AQ_BLOCK) sum_groups(descent_job job) {
  const rows_job &own = job.own;
  for (size_t g = aq_thread(); g < own.groups; g += aq_all_threads()) {
    double sum = 0;
    for (size_t k = g * own.group_size; k < aq_smaller((g + 1) * own.group_size, own.cols); k++)
      sum += (double)job.ones[k];
    job.group_sums[g] = sum;
  }
}

/* Sums of parts of AQ_PART columns, each lane those of a part, added up in double in the parts' order.
 * `add(k, sums)` adds what column k means to the part's N sums. */
template <int N, class Add>
AQ_DEVICE void sum_parts(size_t cols, double totals[N], const Add &add) {
  for (int i = 0; i < N; i++) totals[i] = 0;
  for (size_t first = 0; first < cols; first += 32 * AQ_PART) {
    const size_t begin = aq_smaller(first + lane_of() * AQ_PART, cols), end = aq_smaller(begin + AQ_PART, cols);
    float sums[N] = {};
    for (size_t k = begin; k < end; k++) add(k, sums);
    const size_t parts = (aq_smaller(first + 32 * AQ_PART, cols) - first - 1) / AQ_PART + 1;
    for (size_t part = 0; part < parts; part++)
      for (int i = 0; i < N; i++) totals[i] += (double)__shfl_sync(AQ_ALL_LANES, sums[i], (int)part);
  }
}

/* out = products of a [rows, cols] with the moment. */
static void multiply_moment(const aq_stream_state *on, const descent_job &job, const float *a, float *out) {
  const size_t n = job.own.cols;
  const float *moment = job.moment;
  for (size_t begin = 0, size = 0; begin < n; begin += job.own.block, moment += size * size) {
    size = job.own.block < n - begin ? job.own.block : n - begin;
    aq_product p = {};
    p.a = a + begin;
    p.a_row = (ptrdiff_t)n;
    p.b = moment;
    p.b_row = (ptrdiff_t)size;
    p.a_col = p.b_col = 1;
    p.c = out + begin;
    p.c_row = n;
    p.k = p.cols = size;
    p.rows = job.own.rows;
    aq_cuda_product(on, p);
  }
}

/* A Job is a descent_job with `value(row, col)`: what the codes say there. */
template <class Job>
static __global__ void __launch_bounds__(AQ_BLOCK) errors_of(Job job) {
  const rows_job &own = job.own;
  for (size_t i = aq_thread(); i < own.rows * own.cols; i += aq_all_threads())
    job.products[i] = own.weights[i] - job.value(i / own.cols, i % own.cols);
}

template <class Job>
static __global__ void __launch_bounds__(AQ_BLOCK) objective_rows(Job job, double *objective) {
  const rows_job &own = job.own;
  for (size_t row = first_row(); row < own.rows; row += row_step()) {
    double total[1];
    sum_parts<1>(own.cols, total, [&](size_t k, float *sums) {
      const size_t at = row * own.cols + k;
      sums[0] = AQ_FMA(own.weights[at] - job.value(row, k), job.gradient[at], sums[0]);
    });
    if (lane_of() == 0) objective[row] = total[0];
  }
}

/* The state as it is kept, its gradient and its objective. */
template <class Job>
static int32_t begin_descent(const aq_stream_state *on, const Job &job, const rows_job &kept) {
  const rows_job &own = job.own;
  const size_t elements = own.rows * own.cols, grids = own.rows * own.groups * sizeof(float);
  cudaError_t error = cudaMemcpyAsync(own.codes, kept.codes, elements, cudaMemcpyDeviceToDevice, on->stream);
  if (error == cudaSuccess)
    error = cudaMemcpyAsync(own.scale, kept.scale, grids, cudaMemcpyDeviceToDevice, on->stream);
  if (error == cudaSuccess)
    error = cudaMemcpyAsync(own.zero_point, kept.zero_point, grids, cudaMemcpyDeviceToDevice, on->stream);
  if (error == cudaSuccess) error = cudaMemsetAsync(job.gradient, 0, elements * sizeof(float), on->stream);
  if (error != cudaSuccess) return aq_cuda_status(error);
  aq_launch(on, errors_of<Job>, thread_blocks(elements), AQ_BLOCK, 0, job);
  multiply_moment(on, job, job.products, job.gradient);
  aq_launch(on, objective_rows<Job>, warp_blocks(own.rows), AQ_BLOCK, 0, job, kept.objective);
  return AQ_OK;
}

/* `ones` and `group_sums`, which refits of offsets read. */
static void sum_moment(const aq_stream_state *on, const descent_job &job) {
  aq_launch(on, sum_rows, thread_blocks(job.own.cols), AQ_BLOCK, 0, job);
  aq_launch(on, sum_groups, thread_blocks(job.own.groups), AQ_BLOCK, 0, job);
}

/* What a row's descent has found, where that is better. */
static __global__ void __launch_bounds__(AQ_BLOCK) keep_better(descent_job job, rows_job kept) {
  const rows_job &own = job.own;
  for (size_t row = first_row(); row < own.rows; row += row_step()) {
    const double improved = job.improved[row];
    const bool better = improved < kept.objective[row];
    __syncwarp(); /* all lanes have read the objective */
    if (!better) continue;
    if (lane_of() == 0) kept.objective[row] = improved;
    for (size_t k = row * own.cols + lane_of(); k < (row + 1) * own.cols; k += 32) kept.codes[k] = own.codes[k];
    for (size_t g = row * own.groups + lane_of(); g < (row + 1) * own.groups; g += 32) {
      kept.scale[g] = own.scale[g];
      kept.zero_point[g] = own.zero_point[g];
    }
  }
}

template <class Job>
static int32_t end_descent(const aq_stream_state *on, const Job &job, const rows_job &kept) {
  aq_launch(on, objective_rows<Job>, warp_blocks(job.own.rows), AQ_BLOCK, 0, job, job.improved);
  aq_launch(on, keep_better, warp_blocks(job.own.rows), AQ_BLOCK, 0, (const descent_job &)job, kept);
  return aq_cuda_read_faults(on);
}

#endif
