/* solver.cu: codes of trellises against a layer's second moment: the CPU's bytes. */
#include "search.h"
#include "settle.h"

template <int BITS>
static __global__ void __launch_bounds__(AQ_SEARCH_THREADS) search_kernel(search_job job) {
  AQ_DYNAMIC_SHARED(search_memory<BITS>, memory);
  search_memory<BITS> &m = *memory;
  for (size_t i = threadIdx.x; i < search_memory<BITS>::WINDOWS; i += AQ_SEARCH_THREADS) m.table[i] = job.table[i];
  __syncthreads();
  constexpr size_t ROWS = search_memory<BITS>::ROWS;
  for (size_t base = blockIdx.x * ROWS; base < job.rows.rows; base += gridDim.x * ROWS) search_rows<BITS>(job, m, base);
}

template <int BITS>
static int32_t launch_search(const aq_stream_state *on, const search_job &job) {
  const size_t bytes = sizeof(search_memory<BITS>);
  const int32_t status = aq_cuda_status(
      cudaFuncSetAttribute(search_kernel<BITS>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
  if (status != AQ_OK) return status;
  const unsigned blocks = aq_cuda_blocks(job.rows.rows, search_memory<BITS>::ROWS);
  aq_launch(on, search_kernel<BITS>, blocks, AQ_SEARCH_THREADS, bytes, job);
  return AQ_OK;
}

/* Checks of both functions: as check_rows, and the table. */
static int32_t check_trellis(const aq_stream_state *on, aq_cuda_buffer weights, size_t rows, size_t cols, int32_t bits,
                             size_t group_size, size_t block, aq_cuda_buffer table, aq_cuda_buffer scale,
                             aq_cuda_buffer offset, aq_cuda_buffer codes, aq_cuda_buffer objective, rows_job *job,
                             const float **levels) {
  if (!aq_trellis_bits_allowed(bits)) return AQ_E_ARGUMENT;
  int32_t status = check_rows(on, weights, rows, cols, bits, group_size, block, scale, offset, codes, objective, job);
  if (status == AQ_OK && block % AQ_PART != 0 && block < cols) return AQ_E_SHAPE;
  const size_t windows = AQ_TRELLIS_WINDOWS(bits);
  *levels = aq_cuda_view<float>(table, windows, on, &status);
  if (status != AQ_OK) return status;
  aq_launch(on, check_finite, thread_blocks(windows), AQ_BLOCK, 0, *levels, windows, (int32_t)AQ_FAULT_VALUE, on->faults);
  return AQ_OK;
}

int32_t aq_cuda_search_trellis(aq_cuda_buffer weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                               aq_cuda_buffer table, int32_t survivors, aq_cuda_buffer scale, aq_cuda_buffer offset,
                               size_t block, aq_cuda_buffer factor, aq_cuda_buffer pivots, aq_cuda_buffer codes,
                               aq_cuda_buffer objective, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (survivors != 0 && survivors != 1) return AQ_E_ARGUMENT;
  search_job job = {};
  status = check_trellis(on, weights, rows, cols, bits, group_size, block, table, scale, offset, codes, objective, &job.rows,
                         &job.table);
  if (status != AQ_OK) return status;
  const size_t elements = block_elements(cols, block);
  job.factor = aq_cuda_view<float>(factor, elements, on, &status);
  job.pivots = aq_cuda_view<float>(pivots, cols, on, &status);
  job.one_survivor = survivors == 1;
  job.targets = (float *)aq_cuda_scratch(on, rows * cols * sizeof *job.targets, &status);
  if (status != AQ_OK) return status;
  for (const float *values : {job.factor, job.pivots})
    aq_launch(on, check_finite, thread_blocks(values == job.factor ? elements : cols), AQ_BLOCK, 0, values,
              values == job.factor ? elements : cols, (int32_t)AQ_FAULT_VALUE, on->faults);
  status = bits == 2 ? launch_search<2>(on, job) : launch_search<3>(on, job);
  return status == AQ_OK ? aq_cuda_read_faults(on) : status;
}

static void cut_work(aq_cutter &work, settle_job &job) {
  cut_descent(work, job);
  job.levels = work.take<float>(job.refits_row ? job.own.rows * job.own.cols : 0);
  job.steps = work.take<float>(job.own.rows * AQ_SETTLE_MOST);
}

template <int BITS>
static int32_t settle(const aq_stream_state *on, const trellis_job<BITS> &job, const rows_job &kept, int32_t rounds) {
  const rows_job &own = job.own;
  const size_t elements = own.rows * own.cols;
  const int32_t status = begin_descent(on, job, kept);
  if (status != AQ_OK) return status;
  if (rounds == 0) return aq_cuda_read_faults(on);
  cudaError_t error = cudaSuccess;
  if (job.refits_offsets) sum_moment(on, job);
  else {
    error = cudaMemsetAsync(job.ones, 0, own.cols * sizeof *job.ones, on->stream);
    if (error == cudaSuccess) error = cudaMemsetAsync(job.group_sums, 0, own.groups * sizeof *job.group_sums, on->stream);
    if (error != cudaSuccess) return aq_cuda_status(error);
  }
  for (int32_t round = 0; round < rounds; round++) {
    if (job.refits_row) {
      aq_launch(on, trellis_levels<BITS>, thread_blocks(elements), AQ_BLOCK, 0, job);
      error = cudaMemsetAsync(job.products, 0, elements * sizeof(float), on->stream);
      if (error != cudaSuccess) return aq_cuda_status(error);
      multiply_moment(on, job, job.levels, job.products);
      aq_launch(on, fit_rows, warp_blocks(own.rows), AQ_BLOCK, 0, job);
    }
    descend_parts<BITS>(on, job);
  }
  return end_descent(on, job, kept);
}

int32_t aq_cuda_settle_trellis(aq_cuda_buffer weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                               aq_cuda_buffer table, size_t block, aq_cuda_buffer moment, int32_t refit, int32_t rounds,
                               aq_cuda_buffer codes, aq_cuda_buffer scale, aq_cuda_buffer offset,
                               aq_cuda_buffer objective, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (rounds < 0 || !aq_refit_allowed(refit)) return AQ_E_ARGUMENT;
  rows_job kept;
  settle_job job = {};
  status = check_trellis(on, weights, rows, cols, bits, group_size, block, table, scale, offset, codes, objective, &kept,
                         &job.table);
  if (status != AQ_OK) return status;
  const size_t elements = block_elements(cols, block);
  job.moment = aq_cuda_view<float>(moment, elements, on, &status);
  job.own = kept;
  job.refits_groups = refit != AQ_REFIT_NOTHING && kept.groups > 1;
  job.refits_row = refit != AQ_REFIT_NOTHING && kept.groups == 1;
  job.refits_offsets = refit == AQ_REFIT_LINES;
  aq_cutter sizes = {0, 0};
  cut_work(sizes, job);
  aq_cutter work = {(uint8_t *)aq_cuda_scratch(on, sizes.used, &status), 0};
  if (status != AQ_OK) return status;
  aq_launch(on, check_finite, thread_blocks(elements), AQ_BLOCK, 0, job.moment, elements, (int32_t)AQ_FAULT_VALUE, on->faults);
  aq_launch(on, check_codes, thread_blocks(rows * cols), AQ_BLOCK, 0, (const uint8_t *)kept.codes, rows * cols, bits,
            on->faults);
  status = aq_cuda_read_faults(on); /* codes beyond their bits would be read beyond the table */
  if (status != AQ_OK) return status;
  cut_work(work, job);
  return bits == 2 ? settle<2>(on, {job}, kept, rounds) : settle<3>(on, {job}, kept, rounds);
}
