/* solver.cu: second moments, and their factor and rows times their inverse: the CPU's bytes. As there, blocks
 * of columns are made from the last on, and what a block means for the others is one product. A warp has a
 * row. Only second moments are sums on tensor cores, within a tolerance. */
#include "product.h"
#include "tensor.h"

#define AQ_FACTOR_BLOCK 256
#define AQ_FACTOR_PART 32
#define AQ_WARPS (AQ_BLOCK / 32)

/* Moments ------------------------------------------------------------------------------------------------ */

/* The upper triangle into the lower one. */
struct mirrored {
  float *out;
  size_t n;
  __device__ bool wants(size_t row, size_t col) const { return col >= row; }
  __device__ float at(size_t i, size_t j) const { return out[i * n + j]; }
  __device__ void put(size_t j, size_t i, float value) const {
    if (j > i) out[j * n + i] = value;
  }
};

static __global__ void __launch_bounds__(AQ_BLOCK)
    diagonal_columns(const float *x, const float *y, const float *weight, size_t tokens, size_t cols, float *out) {
  for (size_t j = aq_thread(); j < cols; j += aq_all_threads()) {
    float sum = out[j];
    for (size_t t = 0; t < tokens; t++)
      sum = AQ_FMA((weight ? weight[t] : 1.0f) * y[t * cols + j], x[t * cols + j], sum);
    out[j] = sum;
  }
}

static size_t moment_elements(size_t rows, size_t cols, size_t block) {
  return block >= cols ? rows * cols : cols / block * block * block + cols % block * (cols % block);
}

struct moment_sums {
  const float *x, *y, *weight;
  size_t tokens, rows, cols, block;
  float *sums;
  bool symmetric;
};

/* Blocks on the diagonal, of slices of tokens; columns of x and y become rows of parts. */
static int32_t moment_blocks(aq_stream_state *on, const moment_sums &m) {
  const bool is_one = m.symmetric && !m.weight; /* y's parts are x's */
  const size_t slice = aq_tensor_slice(m.tokens, m.rows > m.cols ? m.rows : m.cols);
  aq_cutter cutter = {};
  aq_parts x = aq_take_parts(&cutter, m.cols, slice), y = is_one ? x : aq_take_parts(&cutter, m.rows, slice);
  int32_t status = AQ_OK;
  cutter = {(uint8_t *)aq_cuda_scratch(on, cutter.used, &status), 0};
  if (status != AQ_OK) return status;
  x = aq_take_parts(&cutter, m.cols, slice);
  y = is_one ? x : aq_take_parts(&cutter, m.rows, slice);
  for (size_t token = 0; token < m.tokens && status == AQ_OK; token += slice) {
    const size_t own = slice < m.tokens - token ? slice : m.tokens - token;
    status = aq_cuda_split_columns(on, m.x + token * m.cols, own, m.cols, 0, x);
    if (!is_one && status == AQ_OK)
      status = aq_cuda_split_columns(on, m.y + token * m.rows, own, m.rows, m.weight ? m.weight + token : 0, y);
    float *sums = m.sums;
    for (size_t first = 0; first < m.cols && status == AQ_OK; first += m.block) {
      const size_t n = m.block < m.cols - first ? m.block : m.cols - first, height = m.rows == m.cols ? n : m.rows;
      const auto from = [&](const aq_parts &parts, size_t rows) {
        const size_t at = first * parts.stride;
        return aq_parts{parts.high + at, parts.low + at, rows, parts.stride};
      };
      status = aq_cuda_tensor_product(on, {from(y, height), from(x, n), own, sums, n, m.symmetric});
      sums += height * n;
    }
  }
  float *sums = m.sums;
  for (size_t first = 0; first < m.cols && m.symmetric && status == AQ_OK; first += m.block) {
    const size_t n = m.block < m.cols - first ? m.block : m.cols - first;
    if (n > 1) status = aq_run_turned(on, mirrored{sums, n}, n, n);
    sums += n * n;
  }
  return status;
}

int32_t aq_cuda_accumulate_moment(aq_cuda_buffer x, aq_cuda_buffer y, aq_cuda_buffer weight, size_t tokens, size_t rows,
                                  size_t cols, size_t block, aq_cuda_buffer out, aq_cuda_stream stream) {
  if (tokens == 0 || rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  const bool symmetric = y == 0;
  if (block == 0 || (rows != cols && (symmetric || block < cols)) || !aq_counts_allowed(tokens, cols) ||
      !aq_counts_allowed(tokens, rows) || !aq_counts_allowed(rows, cols))
    return AQ_E_SHAPE;
  const float *own_x = aq_cuda_view<float>(x, tokens * cols, on, &status);
  const float *own_y = symmetric ? own_x : aq_cuda_view<float>(y, tokens * rows, on, &status);
  const float *own_weight = weight ? aq_cuda_view<float>(weight, tokens, on, &status) : 0;
  float *sums = aq_cuda_view<float>(out, moment_elements(rows, cols, block), on, &status);
  if (status != AQ_OK) return status;
  if (block == 1 && cols > 1) {
    aq_launch(on, diagonal_columns, aq_cuda_blocks(cols, AQ_BLOCK), AQ_BLOCK, 0, own_x, own_y, own_weight, tokens, cols,
              sums);
    return aq_cuda_launched();
  }
  return moment_blocks(on, {own_x, own_y, own_weight, tokens, rows, cols, block, sums, symmetric});
}

/* Triangles ---------------------------------------------------------------------------------------------- */

/* n <= AQ_FACTOR_PART columns of rows of b, against U: z U^T = b (`back`) or z U = b. */
static __global__ void __launch_bounds__(AQ_BLOCK)
    triangle_rows(const float *u, size_t u_row, size_t n, float *b, size_t b_row, size_t rows, bool back) {
  __shared__ float own[AQ_FACTOR_PART][AQ_FACTOR_PART + 1];
  const size_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (size_t i = warp; i < n; i += AQ_WARPS)
    if (lane < n) own[i][lane] = u[i * u_row + lane];
  __syncthreads();
  for (size_t row = blockIdx.x * AQ_WARPS + warp; row < rows; row += (size_t)gridDim.x * AQ_WARPS) {
    float z = lane < n ? b[row * b_row + lane] : 0.0f;
    for (size_t step = 0; step < n; step++) {
      const size_t k = back ? n - 1 - step : step;
      const float known = __shfl_sync(0xffffffffu, z, (int)k);
      if (back ? lane < k : lane > k && lane < n) z = AQ_FMA(-known, back ? own[lane][k] : own[k][lane], z);
    }
    if (lane < n) b[row * b_row + lane] = z;
  }
}

static unsigned warp_blocks(size_t rows) { return aq_cuda_blocks(rows, AQ_WARPS); }

static void solve_triangle(const aq_stream_state *on, const float *u, size_t u_row, size_t n, float *b, size_t b_row,
                           size_t rows, bool back) {
  aq_launch(on, triangle_rows, warp_blocks(rows), AQ_BLOCK, 0, u, u_row, n, b, b_row, rows, back);
}

/* c [rows, cols] -= products of solved columns of b, taken up or down from `first`, and rows or columns of
 * U. */
static void subtract_solved(const aq_stream_state *on, const float *solved, ptrdiff_t row, ptrdiff_t step,
                            const float *u, ptrdiff_t u_step, ptrdiff_t u_col, size_t k, float *c, size_t rows,
                            size_t cols) {
  aq_product p = {};
  p.a = solved;
  p.a_row = row;
  p.a_col = step;
  p.b = u;
  p.b_row = u_step;
  p.b_col = u_col;
  p.c = c;
  p.c_row = (size_t)row;
  p.k = k;
  p.rows = rows;
  p.cols = cols;
  p.subtract = true;
  aq_cuda_product(on, p);
}

/* rows of b become z, z U^T = b: columns from the last on. */
static void solve_backward(const aq_stream_state *on, const float *u, size_t u_row, size_t n, float *b, size_t b_row,
                           size_t rows) {
  const ptrdiff_t stride = (ptrdiff_t)u_row, b_stride = (ptrdiff_t)b_row;
  for (size_t end = n; end > 0;) {
    const size_t begin = end - (end < AQ_FACTOR_BLOCK ? end : AQ_FACTOR_BLOCK);
    subtract_solved(on, b + n - 1, b_stride, -1, u + begin * u_row + n - 1, -1, stride, n - end, b + begin, rows,
                    end - begin);
    for (size_t last = end; last > begin;) {
      const size_t first = last - (last - begin < AQ_FACTOR_PART ? last - begin : AQ_FACTOR_PART);
      solve_triangle(on, u + first * u_row + first, u_row, last - first, b + first, b_row, rows, true);
      subtract_solved(on, b + last - 1, b_stride, -1, u + begin * u_row + last - 1, -1, stride, last - first, b + begin,
                      rows, first - begin);
      last = first;
    }
    end = begin;
  }
}

/* The same for z U = b: columns from the first on. */
static void solve_forward(const aq_stream_state *on, const float *u, size_t n, float *b, size_t rows) {
  const ptrdiff_t stride = (ptrdiff_t)n;
  for (size_t begin = 0; begin < n; begin += AQ_FACTOR_BLOCK) {
    const size_t end = begin + AQ_FACTOR_BLOCK < n ? begin + AQ_FACTOR_BLOCK : n;
    subtract_solved(on, b, stride, 1, u + begin, stride, 1, begin, b + begin, rows, end - begin);
    for (size_t first = begin; first < end; first += AQ_FACTOR_PART) {
      const size_t last = first + AQ_FACTOR_PART < end ? first + AQ_FACTOR_PART : end;
      solve_triangle(on, u + first * n + first, n, last - first, b + first, n, rows, false);
      subtract_solved(on, b + first, stride, 1, u + first * n + last, stride, 1, last - first, b + last, rows,
                      end - last);
    }
  }
}

static __global__ void __launch_bounds__(AQ_BLOCK) divide_columns(float *b, size_t rows, size_t n, const float *pivots) {
  for (size_t i = aq_thread(); i < rows * n; i += aq_all_threads()) b[i] = b[i] / pivots[i % n];
}

int32_t aq_cuda_solve_moment(aq_cuda_buffer factor, aq_cuda_buffer pivots, size_t n, aq_cuda_buffer b, size_t rows,
                             aq_cuda_stream stream) {
  if (n == 0 || rows == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (n > AQ_MAX_SOLVER_COLS || !aq_counts_allowed(rows, n)) return AQ_E_SHAPE;
  const float *u = aq_cuda_view<float>(factor, n * n, on, &status), *d = aq_cuda_view<float>(pivots, n, on, &status);
  float *z = aq_cuda_view<float>(b, rows * n, on, &status);
  if (status != AQ_OK) return status;
  solve_backward(on, u, n, n, z, n, rows);
  aq_launch(on, divide_columns, aq_cuda_blocks(rows * n, AQ_BLOCK), AQ_BLOCK, 0, z, rows, n, d);
  solve_forward(on, u, n, z, rows);
  return aq_cuda_launched();
}

/* Factor ------------------------------------------------------------------------------------------------- */

/* n <= AQ_FACTOR_PART columns, from the last on: each is scaled by its pivot and its products leave those
 * before. */
static __global__ void __launch_bounds__(AQ_BLOCK)
    factor_columns(float *h, size_t stride, size_t n, float *pivots, int32_t *faults) {
  __shared__ float own[AQ_FACTOR_PART][AQ_FACTOR_PART + 1], g[AQ_FACTOR_PART];
  const size_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (size_t i = warp; i < n; i += AQ_WARPS)
    if (lane < n) own[i][lane] = h[i * stride + lane];
  __syncthreads();
  for (size_t k = n; k-- > 0;) {
    const float pivot = own[k][k];
    __syncthreads();
    if (threadIdx.x < k) {
      g[threadIdx.x] = own[threadIdx.x][k];
      own[threadIdx.x][k] = own[threadIdx.x][k] / pivot;
    } else if (threadIdx.x == k) {
      pivots[k] = pivot;
      own[k][k] = 1.0f;
      if (!(pivot > 0) || !(pivot - pivot == 0)) atomicOr(faults, (int32_t)AQ_FAULT_VALUE);
    }
    __syncthreads();
    for (size_t i = warp; i < k; i += AQ_WARPS)
      if (lane >= i && lane < k) own[i][lane] = AQ_FMA(-g[i], own[lane][k], own[i][lane]);
    __syncthreads();
  }
  for (size_t i = warp; i < n; i += AQ_WARPS)
    if (lane < n) h[i * stride + lane] = own[i][lane];
}

/* g = rows of h before they are scaled, and h those scaled by pivots. */
static __global__ void __launch_bounds__(AQ_BLOCK)
    scale_above(float *h, size_t stride, size_t block, size_t rows, const float *pivots, float *g) {
  for (size_t i = aq_thread(); i < rows * block; i += aq_all_threads()) {
    const size_t row = i / block, k = i % block;
    const float value = h[row * stride + k];
    g[row * AQ_FACTOR_BLOCK + k] = value;
    h[row * stride + k] = value / pivots[k];
  }
}

static void factor_blocks(const aq_stream_state *on, float *h, size_t stride, size_t n, size_t size, float *pivots,
                          float *g) {
  for (size_t end = n; end > 0;) {
    const size_t block = size < end ? size : end, begin = end - block;
    float *diagonal = h + begin * stride + begin;
    if (size == AQ_FACTOR_PART)
      aq_launch(on, factor_columns, 1, AQ_BLOCK, 0, diagonal, stride, block, pivots + begin, on->faults);
    else
      factor_blocks(on, diagonal, stride, block, AQ_FACTOR_PART, pivots + begin, g);
    if (begin > 0) {
      solve_backward(on, diagonal, stride, block, h + begin, stride, begin);
      aq_launch(on, scale_above, aq_cuda_blocks(begin * block, AQ_BLOCK), AQ_BLOCK, 0, h + begin, stride, block, begin,
                pivots + begin, g);
      aq_product p = {};
      p.a = g + block - 1;
      p.a_row = AQ_FACTOR_BLOCK;
      p.a_col = -1;
      p.b = h + end - 1;
      p.b_row = -1;
      p.b_col = (ptrdiff_t)stride;
      p.c = h;
      p.c_row = stride;
      p.k = block;
      p.rows = p.cols = begin;
      p.subtract = p.upper = true;
      aq_cuda_product(on, p);
    }
    end = begin;
  }
}

static __global__ void __launch_bounds__(AQ_BLOCK) clear_below(float *h, size_t n) {
  for (size_t i = aq_thread(); i < n * n; i += aq_all_threads())
    if (i % n < i / n) h[i] = 0.0f;
}

int32_t aq_cuda_factor_moment(aq_cuda_buffer m, size_t n, aq_cuda_buffer pivots, aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  int32_t status;
  aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (n > AQ_MAX_SOLVER_COLS) return AQ_E_SHAPE;
  float *h = aq_cuda_view<float>(m, n * n, on, &status), *d = aq_cuda_view<float>(pivots, n, on, &status);
  float *g = (float *)aq_cuda_scratch(on, n * AQ_FACTOR_BLOCK * sizeof *g, &status);
  if (status == AQ_OK) status = aq_cuda_clear_faults(on);
  if (status != AQ_OK) return status;
  factor_blocks(on, h, n, n, AQ_FACTOR_BLOCK, d, g);
  aq_launch(on, clear_below, aq_cuda_blocks(n * n, AQ_BLOCK), AQ_BLOCK, 0, h, n);
  return aq_cuda_read_faults(on);
}
