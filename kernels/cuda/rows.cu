/* rows.cu: error feedback, and descent over codes with refits, against a layer's second moment: the CPU's
 * bytes. A warp has a row; its lanes have the columns of a part side by side, and what one column means for
 * the others is exchanged by shuffles. What a block of columns means for all others is one product. */
#include "rows.h"

#include "../arithmetic/refit.h"

#define AQ_DESCENT_BLOCK 128 /* columns of a sweep, or a wider group's */
#define AQ_STEP_BLOCK 256    /* columns that all others take at once: a multiple of every group's */

static __global__ void __launch_bounds__(AQ_BLOCK) check_order(const int32_t *order, size_t cols, size_t block,
                                                               int32_t *faults) {
  int found = 0;
  for (size_t k = aq_thread(); k < cols; k += aq_all_threads())
    found |= order[k] < 0 || (size_t)order[k] >= cols || (size_t)order[k] / block != k / block;
  if (__syncthreads_or(found) && threadIdx.x == 0) atomicOr(faults, (int32_t)AQ_FAULT_VALUE);
}

/* Feedback ----------------------------------------------------------------------------------------------- */

/* The weights in the order of the columns, whose errors they become; no objective yet. */
static __global__ void __launch_bounds__(AQ_BLOCK) order_columns(rows_job job, const int32_t *order, float *errors) {
  for (size_t i = aq_thread(); i < job.rows * job.cols; i += aq_all_threads()) {
    const size_t row = i / job.cols, k = i % job.cols;
    errors[i] = job.weights[row * job.cols + (size_t)order[k]];
    if (k == 0) job.objective[row] = 0.0;
  }
}

/* cols <= AQ_STEP_BLOCK columns of `from` [rows, stride] side by side. */
static __global__ void __launch_bounds__(AQ_BLOCK) copy_block(const float *from, size_t stride, size_t rows,
                                                              size_t cols, float *to) {
  for (size_t i = aq_thread(); i < rows * cols; i += aq_all_threads())
    to[i / cols * AQ_STEP_BLOCK + i % cols] = from[i / cols * stride + i % cols];
}

/* `part` columns in their order from `first` on. left [rows, AQ_STEP_BLOCK]: what is to be rounded; errors:
 * weights, their errors afterwards. `u`: the factor's own rows and columns. */
static __global__ void __launch_bounds__(AQ_BLOCK)
    feedback_part(rows_job job, size_t first, size_t part, const float *u, size_t stride, const float *pivots,
                  const int32_t *order, const float *left, float *errors) {
  __shared__ float own[AQ_PART][AQ_PART + 1];
  const size_t lane = lane_of();
  const bool there = lane < part;
  for (size_t i = threadIdx.x / 32; i < part; i += AQ_WARPS)
    if (there) own[i][lane] = u[i * stride + lane];
  __syncthreads();
  const float code_max = (float)((1 << job.bits) - 1), pivot = there ? pivots[first + lane] : 0.0f;
  const size_t col = there ? (size_t)order[first + lane] : 0;
  for (size_t row = first_row(); row < job.rows; row += row_step()) {
    const size_t at = row * job.groups + col / job.group_size;
    const aq_grid grid = there ? aq_grid{job.scale[at], job.zero_point[at]} : aq_grid{1.0f, 0.0f};
    float target = there ? left[row * AQ_STEP_BLOCK + lane] : 0.0f, sum = 0.0f;
    const float weight = there ? errors[row * job.cols + first + lane] : 0.0f;
    float code = 0.0f, error = 0.0f;
    for (size_t k = 0; k < part; k++) {
      /* every lane as if it were its turn; its own target changes no more once that has passed */
      code = (float)aq_encode(target, grid, code_max);
      const float value = grid.scale * (code - grid.zero_point), rest = target - value;
      error = weight - value;
      sum = AQ_FMA(__shfl_sync(AQ_ALL_LANES, rest * pivot, (int)k), __shfl_sync(AQ_ALL_LANES, rest, (int)k), sum);
      const float taken = __shfl_sync(AQ_ALL_LANES, error, (int)k);
      if (lane > k && there) target = AQ_FMA(taken, own[k][lane], target);
    }
    if (there) {
      job.codes[row * job.cols + col] = (uint8_t)code;
      errors[row * job.cols + first + lane] = error;
    }
    if (lane == 0) job.objective[row] += (double)sum;
  }
}

/* The product of errors [rows, cols] and rows of the factor, added to columns of `left`. */
static void take_errors(const aq_stream_state *on, const rows_job &job, const float *errors, size_t k, const float *u,
                        size_t stride, float *left, size_t cols) {
  aq_product p = {};
  p.a = errors;
  p.a_row = (ptrdiff_t)job.cols;
  p.b = u;
  p.b_row = (ptrdiff_t)stride;
  p.a_col = p.b_col = 1;
  p.c = left;
  p.c_row = AQ_STEP_BLOCK;
  p.k = k;
  p.rows = job.rows;
  p.cols = cols;
  aq_cuda_product(on, p);
}

static void feedback(const aq_stream_state *on, const rows_job &job, const float *factor, const float *pivots,
                     const int32_t *order, float *errors, float *left) {
  const size_t n = job.cols;
  aq_launch(on, order_columns, thread_blocks(job.rows * n), AQ_BLOCK, 0, job, order, errors);
  for (size_t begin = 0, size = 0; begin < n; begin += job.block, factor += size * size) {
    size = job.block < n - begin ? job.block : n - begin;
    for (size_t at = 0; at < size; at += AQ_STEP_BLOCK) {
      const size_t block = AQ_STEP_BLOCK < size - at ? AQ_STEP_BLOCK : size - at;
      aq_launch(on, copy_block, thread_blocks(job.rows * block), AQ_BLOCK, 0, (const float *)errors + begin + at, n,
                job.rows, block, left);
      take_errors(on, job, errors + begin, at, factor + at, size, left, block);
      for (size_t first = 0; first < block; first += AQ_PART) {
        const size_t part = AQ_PART < block - first ? AQ_PART : block - first;
        const float *own = factor + (at + first) * size + at + first;
        aq_launch(on, feedback_part, warp_blocks(job.rows), AQ_BLOCK, 0, job, begin + at + first, part, own, size,
                  pivots, order, (const float *)left + first, errors);
        take_errors(on, job, errors + begin + at + first, part, own + part, size, left + first + part,
                    block - first - part);
      }
    }
  }
}

int32_t aq_cuda_quantize_feedback(aq_cuda_buffer weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                                  aq_cuda_buffer scale, aq_cuda_buffer zero_point, size_t block, aq_cuda_buffer factor,
                                  aq_cuda_buffer pivots, aq_cuda_buffer order, aq_cuda_buffer codes,
                                  aq_cuda_buffer objective, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  rows_job job;
  status = check_rows(on, weights, rows, cols, bits, group_size, block, scale, zero_point, codes, objective, &job);
  if (status != AQ_OK) return status;
  const size_t elements = block_elements(cols, block);
  const float *u = aq_cuda_view<float>(factor, elements, on, &status), *d = aq_cuda_view<float>(pivots, cols, on, &status);
  const int32_t *own_order = aq_cuda_view<int32_t>(order, cols, on, &status);
  aq_cutter sizes = {0, 0};
  sizes.take<float>(rows * cols);
  sizes.take<float>(rows * AQ_STEP_BLOCK);
  aq_cutter work = {(uint8_t *)aq_cuda_scratch(on, sizes.used, &status), 0};
  if (status != AQ_OK) return status;
  aq_launch(on, check_order, thread_blocks(cols), AQ_BLOCK, 0, own_order, cols, block, on->faults);
  for (const float *values : {u, d})
    aq_launch(on, check_finite, thread_blocks(values == u ? elements : cols), AQ_BLOCK, 0, values,
              values == u ? elements : cols, (int32_t)AQ_FAULT_VALUE, on->faults);
  status = aq_cuda_read_faults(on); /* columns out of order would be read beyond the end */
  if (status != AQ_OK) return status;
  float *errors = work.take<float>(rows * cols);
  feedback(on, job, u, d, own_order, errors, work.take<float>(rows * AQ_STEP_BLOCK));
  return aq_cuda_read_faults(on);
}

/* Refining ----------------------------------------------------------------------------------------------- */

/* Its products: errors first, then the weights' products with the moment. */
struct refine_job : descent_job {
  int32_t kind;
  float *steps, *changes; /* [rows, AQ_STEP_BLOCK]: of all sweeps over a block, of the last one */
  __device__ float value(size_t row, size_t col) const {
    const size_t at = row * own.groups + col / own.group_size;
    return own.scale[at] * ((float)own.codes[row * own.cols + col] - own.zero_point[at]);
  }
};

/* A row's one grid. */
static __global__ void __launch_bounds__(AQ_BLOCK) refit_rows(refine_job job) {
  const rows_job &own = job.own;
  const size_t n = own.cols;
  for (size_t row = first_row(); row < own.rows; row += row_step()) {
    const aq_grid old = {own.scale[row], own.zero_point[row]};
    aq_grid grid = old;
    float *gradient = job.gradient + row * n;
    const float *weights = job.products + row * n;
    double sums[4];
    sum_parts<4>(n, sums, [&](size_t k, float *part) {
      const float u = (float)own.codes[row * n + k] - old.zero_point, p = gradient[k];
      const float product = (weights[k] - p) / old.scale;
      part[0] = AQ_FMA(u, product, part[0]);
      part[1] += product;
      part[2] = AQ_FMA(u, p, part[2]);
      part[3] += p;
    });
    float step, shift;
    const bool better = aq_best_grid(sums, job.group_sums[0], job.kind, &grid, &step, &shift);
    __syncwarp(); /* all lanes have read the gradient and the grid */
    if (!better) continue;
    if (lane_of() == 0) {
      own.scale[row] = grid.scale;
      own.zero_point[row] = grid.zero_point;
    }
    for (size_t k = lane_of(); k < n; k += 32) {
      const float p = gradient[k], product = (weights[k] - p) / old.scale;
      gradient[k] = AQ_FMA(-shift, job.ones[k], AQ_FMA(-step, product, p));
    }
  }
}

/* What the lanes of a warp have of a part of up to 32 * OWN columns of a row: column 32 q + lane is number
 * q. */
template <int OWN>
struct part_columns {
  float gradient[OWN], code[OWN];
};

/* The grid of a part that is a group; `rows`: the moment's rows from the part's first column on. */
template <int OWN>
AQ_DEVICE void refit_part(const refine_job &job, size_t col, size_t part, const float *rows, size_t stride,
                          part_columns<OWN> &own, aq_grid *grid) {
  float products[OWN] = {}, sums[4] = {};
#pragma unroll
  for (int q = 0; q < OWN; q++)
    for (size_t k = 32 * (size_t)q; k < aq_smaller(part, 32 * (size_t)q + 32); k++) {
      const float u = __shfl_sync(AQ_ALL_LANES, own.code[q], (int)(k % 32)) - grid->zero_point;
#pragma unroll
      for (int j = 0; j < OWN; j++) {
        const size_t at = 32 * (size_t)j + lane_of();
        if (at < part) products[j] = AQ_FMA(rows[k * stride + at], u, products[j]);
      }
    }
#pragma unroll
  for (int q = 0; q < OWN; q++)
    for (size_t k = 32 * (size_t)q; k < aq_smaller(part, 32 * (size_t)q + 32); k++) {
      const float u = __shfl_sync(AQ_ALL_LANES, own.code[q], (int)(k % 32)) - grid->zero_point;
      const float product = __shfl_sync(AQ_ALL_LANES, products[q], (int)(k % 32));
      const float p = __shfl_sync(AQ_ALL_LANES, own.gradient[q], (int)(k % 32));
      sums[0] = AQ_FMA(u, product, sums[0]);
      sums[1] += product;
      sums[2] = AQ_FMA(u, p, sums[2]);
      sums[3] += p;
    }
  const double totals[4] = {(double)sums[0], (double)sums[1], (double)sums[2], (double)sums[3]};
  float step, shift;
  if (!aq_best_grid(totals, job.group_sums[col / job.own.group_size], job.kind, grid, &step, &shift)) return;
#pragma unroll
  for (int q = 0; q < OWN; q++) {
    const size_t at = 32 * (size_t)q + lane_of();
    if (at < part)
      own.gradient[q] = AQ_FMA(-shift, job.ones[col + at], AQ_FMA(-step, products[q], own.gradient[q]));
  }
}

/* A part of columns from `col` on: its refit, then its codes one after the other, each the best given all
 * others. changes [rows, AQ_STEP_BLOCK]: how far its values have moved; added to `steps` from the second
 * sweep on. */
template <int OWN>
static __global__ void __launch_bounds__(AQ_BLOCK)
    descend_part(refine_job job, size_t col, size_t part, const float *rows, size_t stride, float *changes,
                 float *steps, bool adds) {
  const rows_job &all = job.own;
  const float code_max = (float)((1 << all.bits) - 1);
  const size_t lane = lane_of();
  for (size_t row = first_row(); row < all.rows; row += row_step()) {
    part_columns<OWN> own;
    float before[OWN], diagonal[OWN];
    /* without a refit a part may have columns of several groups */
    aq_grid grids[OWN];
#pragma unroll
    for (int q = 0; q < OWN; q++) {
      const size_t k = 32 * (size_t)q + lane, at = col + (k < part ? k : 0);
      const size_t group = row * all.groups + at / all.group_size;
      grids[q] = {all.scale[group], all.zero_point[group]};
      own.gradient[q] = job.gradient[row * all.cols + at];
      own.code[q] = (float)all.codes[row * all.cols + at];
      diagonal[q] = k < part ? rows[k * stride + k] : 0.0f;
      before[q] = grids[q].scale * (own.code[q] - grids[q].zero_point);
    }
    if (job.refits_groups) {
      refit_part<OWN>(job, col, part, rows, stride, own, &grids[0]);
#pragma unroll
      for (int q = 1; q < OWN; q++) grids[q] = grids[0];
      __syncwarp(); /* all lanes have read the grid */
      if (lane == 0) {
        all.scale[row * all.groups + col / all.group_size] = grids[0].scale;
        all.zero_point[row * all.groups + col / all.group_size] = grids[0].zero_point;
      }
    }
#pragma unroll
    for (int q = 0; q < OWN; q++)
      for (size_t k = 32 * (size_t)q; k < aq_smaller(part, 32 * (size_t)q + 32); k++) {
        const float old = grids[q].scale * (own.code[q] - grids[q].zero_point);
        float code = own.code[q];
        if (diagonal[q] > 0) code = (float)aq_encode(old + own.gradient[q] / diagonal[q], grids[q], code_max);
        const float value = grids[q].scale * (code - grids[q].zero_point);
        if (lane == k % 32) own.code[q] = code;
        const float step = __shfl_sync(AQ_ALL_LANES, value - old, (int)(k % 32));
#pragma unroll
        for (int j = 0; j < OWN; j++) {
          const size_t at = 32 * (size_t)j + lane;
          if (at < part) own.gradient[j] = AQ_FMA(-rows[k * stride + at], step, own.gradient[j]);
        }
      }
#pragma unroll
    for (int q = 0; q < OWN; q++) {
      const size_t k = 32 * (size_t)q + lane;
      if (k >= part) continue;
      job.gradient[row * all.cols + col + k] = own.gradient[q];
      all.codes[row * all.cols + col + k] = (uint8_t)own.code[q];
      const size_t to = row * AQ_STEP_BLOCK + k;
      const float change = grids[q].scale * (own.code[q] - grids[q].zero_point) - before[q];
      changes[to] = change;
      steps[to] = adds ? steps[to] + change : change;
    }
  }
}

/* Columns of the gradient less steps [rows, AQ_STEP_BLOCK] times rows of the moment. */
static void take_steps(const aq_stream_state *on, const refine_job &job, const float *steps, size_t k,
                       const float *moment, size_t stride, float *gradient, size_t cols) {
  aq_product p = {};
  p.a = steps;
  p.a_row = AQ_STEP_BLOCK;
  p.b = moment;
  p.b_row = (ptrdiff_t)stride;
  p.a_col = p.b_col = 1;
  p.c = gradient;
  p.c_row = job.own.cols;
  p.k = k;
  p.rows = job.own.rows;
  p.cols = cols;
  p.subtract = true;
  aq_cuda_product(on, p);
}

static void launch_part(const aq_stream_state *on, const refine_job &job, size_t col, size_t part, const float *rows,
                        size_t stride, size_t at, bool adds) {
  const auto kernel = part <= 32    ? descend_part<1>
                      : part <= 64  ? descend_part<2>
                      : part <= 128 ? descend_part<4>
                                    : descend_part<8>;
  aq_launch(on, kernel, warp_blocks(job.own.rows), AQ_BLOCK, 0, job, col, part, rows, stride, job.changes + at, job.steps + at,
            adds);
}

static void descend(const aq_stream_state *on, const refine_job &job, int32_t sweeps) {
  const size_t n = job.own.cols, most = job.refits_groups ? job.own.group_size : AQ_PART;
  const size_t most_block = most > AQ_DESCENT_BLOCK ? most : AQ_DESCENT_BLOCK;
  const float *moment = job.moment;
  for (size_t begin = 0, size = 0; begin < n; begin += job.own.block, moment += size * size) {
    size = job.own.block < n - begin ? job.own.block : n - begin;
    float *gradient = job.gradient + begin;
    for (size_t at = 0, block = 0; at < size; at += block) {
      block = most_block < size - at ? most_block : size - at;
      for (int32_t sweep = 0; sweep < sweeps; sweep++)
        for (size_t first = at, part = 0; first < at + block; first += part) {
          part = most < at + block - first ? most : at + block - first;
          const float *rows = moment + first * size, *changes = job.changes + (first - at);
          const size_t end = first + part;
          launch_part(on, job, begin + first, part, rows + first, size, first - at, sweep > 0);
          take_steps(on, job, changes, part, rows + at, size, gradient + at, first - at);
          take_steps(on, job, changes, part, rows + end, size, gradient + end, at + block - end);
        }
      const float *rows = moment + at * size;
      const size_t end = at + block;
      take_steps(on, job, job.steps, block, rows, size, gradient, at);
      take_steps(on, job, job.steps, block, rows + end, size, gradient + end, size - end);
    }
  }
}

static void cut_work(aq_cutter &work, refine_job &job) {
  cut_descent(work, job);
  job.steps = work.take<float>(job.own.rows * AQ_STEP_BLOCK);
  job.changes = work.take<float>(job.own.rows * AQ_STEP_BLOCK);
}

static int32_t refine(const aq_stream_state *on, const refine_job &job, const rows_job &kept, int32_t rounds,
                      int32_t sweeps) {
  const rows_job &own = job.own;
  const int32_t status = begin_descent(on, job, kept);
  if (status != AQ_OK) return status;
  if (rounds == 0) return aq_cuda_read_faults(on);
  if (job.refits_groups || job.refits_row) sum_moment(on, job);
  if (job.refits_row) {
    const cudaError_t error = cudaMemsetAsync(job.products, 0, own.rows * own.cols * sizeof(float), on->stream);
    if (error != cudaSuccess) return aq_cuda_status(error);
    multiply_moment(on, job, own.weights, job.products);
  }
  for (int32_t round = 0; round < rounds; round++) {
    if (job.refits_row) aq_launch(on, refit_rows, warp_blocks(own.rows), AQ_BLOCK, 0, job);
    descend(on, job, sweeps);
  }
  return end_descent(on, job, kept);
}

int32_t aq_cuda_refine_codes(aq_cuda_buffer weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                             int32_t zero_point_kind, size_t block, aq_cuda_buffer moment, int32_t refit, int32_t rounds,
                             int32_t sweeps, aq_cuda_buffer codes, aq_cuda_buffer scale, aq_cuda_buffer zero_point,
                             aq_cuda_buffer objective, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_zero_point_kind_allowed(zero_point_kind) || rounds < 0 || sweeps < 1) return AQ_E_ARGUMENT;
  rows_job kept;
  status = check_rows(on, weights, rows, cols, bits, group_size, block, scale, zero_point, codes, objective, &kept);
  if (status != AQ_OK) return status;
  const size_t elements = block_elements(cols, block);
  const float *own_moment = aq_cuda_view<float>(moment, elements, on, &status);
  refine_job job = {};
  job.own = kept;
  aq_cutter sizes = {0, 0};
  cut_work(sizes, job);
  aq_cutter work = {(uint8_t *)aq_cuda_scratch(on, sizes.used, &status), 0};
  if (status != AQ_OK) return status;
  aq_launch(on, check_finite, thread_blocks(elements), AQ_BLOCK, 0, own_moment, elements, (int32_t)AQ_FAULT_VALUE,
            on->faults);
  aq_launch(on, check_codes, thread_blocks(rows * cols), AQ_BLOCK, 0, (const uint8_t *)kept.codes, rows * cols, bits,
            on->faults);
  status = aq_cuda_read_faults(on);
  if (status != AQ_OK) return status;
  cut_work(work, job);
  job.kind = zero_point_kind;
  job.refits_groups = refit && kept.groups > 1;
  job.refits_row = refit && kept.groups == 1;
  job.moment = own_moment;
  return refine(on, job, kept, rounds, sweeps);
}

/* Grids -------------------------------------------------------------------------------------------------- */

static __global__ void __launch_bounds__(AQ_BLOCK) grid_groups(rows_job job, int32_t kind, float ratio, int32_t *faults) {
  for (size_t i = aq_thread(); i < job.rows * job.groups; i += aq_all_threads()) {
    const size_t row = i / job.groups, first = i % job.groups * job.group_size;
    const float *w = job.weights + row * job.cols + first;
    const size_t n = aq_smaller(job.group_size, job.cols - first);
    float minimum = w[0], maximum = w[0];
    bool finite = true;
    for (size_t k = 0; k < n; k++) {
      finite = finite && w[k] - w[k] == 0;
      minimum = w[k] < minimum ? w[k] : minimum;
      maximum = w[k] > maximum ? w[k] : maximum;
    }
    if (minimum < maximum && ratio < 1) {
      /* a real zero point moves with the range's middle, the others keep zero where it is */
      const float middle = kind == AQ_ZERO_POINT_REAL ? minimum / 2 + maximum / 2 : 0.0f;
      minimum = middle + ratio * (minimum - middle);
      maximum = middle + ratio * (maximum - middle);
    }
    aq_grid grid = {1.0f, 0.0f};
    const int32_t fault = !finite ? AQ_FAULT_NONFINITE
                          : aq_round_grid(minimum, maximum, job.bits, kind, &grid) != AQ_OK ? AQ_FAULT_RANGE
                                                                                             : 0;
    if (fault) atomicOr(faults, fault);
    job.scale[i] = grid.scale;
    job.zero_point[i] = grid.zero_point;
  }
}

int32_t aq_cuda_clipped_grids(aq_cuda_buffer weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                              int32_t zero_point_kind, float ratio, aq_cuda_buffer scale, aq_cuda_buffer zero_point,
                              aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_bits_allowed(bits) || !aq_zero_point_kind_allowed(zero_point_kind)) return AQ_E_ARGUMENT;
  if (!(ratio > 0) || !(ratio <= 1)) return AQ_E_VALUE;
  const size_t group = aq_group_columns(group_size, cols);
  if (group == 0 || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  const size_t groups = (cols - 1) / group + 1;
  rows_job job = {};
  job.weights = aq_cuda_view<float>(weights, rows * cols, on, &status);
  job.rows = rows;
  job.cols = cols;
  job.bits = bits;
  job.group_size = group;
  job.groups = groups;
  job.scale = aq_cuda_view<float>(scale, rows * groups, on, &status);
  job.zero_point = aq_cuda_view<float>(zero_point, rows * groups, on, &status);
  if (status == AQ_OK) status = aq_cuda_clear_faults(on);
  if (status != AQ_OK) return status;
  aq_launch(on, grid_groups, thread_blocks(rows * groups), AQ_BLOCK, 0, job, zero_point_kind, ratio, on->faults);
  return aq_cuda_read_faults(on);
}
