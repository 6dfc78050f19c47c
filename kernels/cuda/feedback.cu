/* feedback.cu: error feedback in blocks of columns. A target takes over errors in the order of the columns, each product rounded
 * before it is added, whichever kernel adds it: so codes are the CPU's to the bit. */
#include "context.h"

#include "../cpu/solver.h"

/* Columns of a block, one a lane. */
#define BLOCK 32
#define ROWS 8 /* of a block of threads that rounds, a warp each */
#define TILE 64 /* rows and columns of a block of threads that updates */

struct feedback_view {
  const float *weights;
  aq_layout layout;
  const float *scale, *zero_point, *factor;
  const int32_t *order;
  uint8_t *codes;
  float *target; /* [rows, cols], in the order of `order` */
  float *errors; /* [rows, BLOCK] */
};

static __global__ void start(feedback_view view, int32_t *faults) {
  const aq_layout &layout = view.layout;
  const size_t cols = layout.cols, n = layout.rows * cols, groups = layout.rows * layout.groups;
  int32_t fault = 0;
  for (size_t i = aq_thread(); i < n; i += aq_all_threads()) {
    const size_t row = aq_quotient(i, cols), from = (size_t)(uint32_t)view.order[i - row * cols];
    if (!(view.weights[i] - view.weights[i] == 0.0f)) fault |= AQ_FAULT_NONFINITE;
    if (from >= cols)
      fault |= AQ_FAULT_VALUE;
    else
      view.target[i] = view.weights[row * cols + from];
  }
  for (size_t i = aq_thread(); i < cols * cols; i += aq_all_threads())
    if (!(view.factor[i] - view.factor[i] == 0.0f)) fault |= AQ_FAULT_VALUE;
  for (size_t i = aq_thread(); i < groups; i += aq_all_threads()) {
    const float s = view.scale[i], z = view.zero_point[i];
    if (s == 0.0f || !(s - s == 0.0f) || !(z - z == 0.0f)) fault |= AQ_FAULT_VALUE;
  }
  if (fault) atomicOr(faults, fault);
}

/* Rounds columns [first, first + BLOCK) of the order, a warp a row. */
static __global__ void __launch_bounds__(ROWS * 32) round_columns(feedback_view view, size_t first) {
  __shared__ float factor[BLOCK][BLOCK];
  const aq_layout &layout = view.layout;
  const size_t cols = layout.cols, count = aq_smaller(BLOCK, cols - first), lane = threadIdx.x % 32;
  for (unsigned e = threadIdx.x; e < BLOCK * BLOCK; e += ROWS * 32) {
    const size_t k = e / BLOCK, j = e % BLOCK;
    factor[k][j] = k < count && j < count ? view.factor[(first + k) * cols + first + j] : 0.0f;
  }
  __syncthreads();
  const float code_max = (float)((1 << layout.bits) - 1);
  for (size_t row = aq_thread() / 32; row < layout.rows; row += aq_all_threads() / 32) {
    const bool there = lane < count;
    const size_t col = there ? (size_t)view.order[first + lane] : 0;
    const size_t group = row * layout.groups + aq_quotient(col, layout.group_size);
    const float s = view.scale[group], z = view.zero_point[group], weight = view.weights[row * cols + col];
    float target = there ? view.target[row * cols + first + lane] : 0.0f, code = 0.0f, error = 0.0f;
    for (int k = 0; k < (int)count; k++) {
      if ((int)lane == k) {
        float position = target / s + z;
        position = position > 0.0f ? position : 0.0f;
        position = position < code_max ? position : code_max;
        code = aq_round_even(position);
        error = weight - s * (code - z);
      }
      const float taken = __shfl_sync(0xffffffffu, error, k);
      if ((int)lane > k) target += taken * factor[k][lane];
    }
    if (there) view.codes[row * cols + col] = (uint8_t)code;
    view.errors[row * BLOCK + lane] = error;
  }
}

/* Puts the errors of columns [first, first + BLOCK) on those behind them. */
static __global__ void __launch_bounds__(256) update_targets(feedback_view view, size_t first) {
  __shared__ float errors[TILE][BLOCK + 1], factor[BLOCK][TILE];
  const size_t rows = view.layout.rows, cols = view.layout.cols, behind = first + BLOCK;
  const size_t row = (size_t)blockIdx.y * TILE, col = behind + (size_t)blockIdx.x * TILE;
  for (unsigned e = threadIdx.x; e < TILE * BLOCK; e += 256) {
    const size_t r = row + e / BLOCK, k = e / TILE, j = col + e % TILE;
    errors[e / BLOCK][e % BLOCK] = r < rows ? view.errors[r * BLOCK + e % BLOCK] : 0.0f;
    factor[k][e % TILE] = j < cols ? view.factor[(first + k) * cols + j] : 0.0f;
  }
  __syncthreads();
  const unsigned x = threadIdx.x % 16, y = threadIdx.x / 16;
  float target[4][4];
#pragma unroll
  for (unsigned i = 0; i < 16; i++) {
    const size_t r = row + y + 16 * (i / 4), j = col + x + 16 * (i % 4);
    target[i / 4][i % 4] = r < rows && j < cols ? view.target[r * cols + j] : 0.0f;
  }
  for (unsigned k = 0; k < BLOCK; k++)
#pragma unroll
    for (unsigned i = 0; i < 16; i++)
      target[i / 4][i % 4] += errors[y + 16 * (i / 4)][k] * factor[k][x + 16 * (i % 4)];
#pragma unroll
  for (unsigned i = 0; i < 16; i++) {
    const size_t r = row + y + 16 * (i / 4), j = col + x + 16 * (i % 4);
    if (r < rows && j < cols) view.target[r * cols + j] = target[i / 4][i % 4];
  }
}

int32_t aq_cuda_quantize_feedback(aq_cuda_buffer weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                                  aq_cuda_buffer scale, aq_cuda_buffer zero_point, aq_cuda_buffer factor,
                                  aq_cuda_buffer order, aq_cuda_buffer codes, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_bits_allowed(bits)) return AQ_E_ARGUMENT;
  /* a grid has 65535 tiles of rows */
  if (!aq_group_size_allowed(group_size) || cols > AQ_MAX_SOLVER_COLS || rows > (size_t)65535 * TILE) return AQ_E_SHAPE;
  const aq_layout layout = aq_layout_of(rows, cols, bits, group_size);
  feedback_view view = {aq_cuda_view<float>(weights, rows * cols, on, &status),
                        layout,
                        aq_cuda_view<float>(scale, rows * layout.groups, on, &status),
                        aq_cuda_view<float>(zero_point, rows * layout.groups, on, &status),
                        aq_cuda_view<float>(factor, cols * cols, on, &status),
                        aq_cuda_view<int32_t>(order, cols, on, &status),
                        aq_cuda_view<uint8_t>(codes, rows * cols, on, &status),
                        0,
                        0};
  view.target = (float *)aq_cuda_scratch(on, (rows * cols + rows * BLOCK) * sizeof(float), &status);
  view.errors = view.target + rows * cols;
  if (status == AQ_OK) status = aq_cuda_clear_faults(on);
  if (status != AQ_OK) return status;
  aq_launch(on, start, aq_cuda_blocks(rows * cols, AQ_BLOCK), AQ_BLOCK, 0, view, on->faults);
  status = aq_cuda_launched();
  if (status == AQ_OK) status = aq_cuda_read_faults(on);
  for (size_t first = 0; first < cols && status == AQ_OK; first += BLOCK) {
    aq_launch(on, round_columns, aq_cuda_blocks(rows, ROWS), ROWS * 32, 0, view, first);
    const size_t behind = first + BLOCK;
    if (behind < cols) {
      const dim3 tiles((unsigned)((cols - behind - 1) / TILE + 1), (unsigned)((rows - 1) / TILE + 1));
      aq_launch(on, update_targets, tiles, 256, 0, view, first);
    }
    status = aq_cuda_launched();
  }
  return status;
}
