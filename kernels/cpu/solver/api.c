/* solver/api.c: the functions of arrowquant.h on second moments: argument checks, and work over
 * threads. */
#include "../dispatch.h"
#include "../threads.h"

/* Multiply-adds that take as long as a unit of work. */
#define AQ_PER_WORK 512

/* Columns of U that are made before the others take their products, and within them. */
#define AQ_FACTOR_BLOCK 256
#define AQ_FACTOR_PART 32

int32_t aq_solver_work(size_t cols, size_t group_size, int32_t threads, uint64_t *floats) {
  if (!floats) return AQ_E_ARGUMENT;
  const size_t group = aq_group_columns(group_size, cols);
  if (cols > AQ_MAX_SOLVER_COLS || (group == 0 && cols > 0)) return AQ_E_SHAPE;
  const size_t groups = cols == 0 ? 0 : (cols - 1) / group + 1;
  const uint64_t rows = aq_row_floats(cols, groups, threads < 1 ? 1 : aq_min_size((size_t)threads, AQ_MAX_THREADS));
  const uint64_t factor = (uint64_t)cols * AQ_FACTOR_BLOCK;
  *floats = rows > factor ? rows : factor;
  return AQ_OK;
}

/* Moments ------------------------------------------------------------------------------------------------ */

#define AQ_MIRROR 32

typedef struct {
  float *out;
  size_t n;
} mirror_job;

/* The upper triangle into the lower one. */
static int32_t mirror_rows(const void *context, size_t begin, size_t end) {
  const mirror_job *job = context;
  const size_t n = job->n;
  for (size_t first = begin * AQ_MIRROR; first < aq_min_size(end * AQ_MIRROR, n); first += AQ_MIRROR)
    for (size_t left = 0; left <= first; left += AQ_MIRROR)
      for (size_t i = first; i < aq_min_size(first + AQ_MIRROR, n); i++)
        for (size_t j = left; j < aq_min_size(left + AQ_MIRROR, i); j++) job->out[i * n + j] = job->out[j * n + i];
  return AQ_OK;
}

typedef struct {
  const float *x, *y, *weight;
  size_t tokens, cols;
  float *out;
} diagonal_job;

static int32_t diagonal_columns(const void *context, size_t begin, size_t end) {
  const diagonal_job *job = context;
  for (size_t t = 0; t < job->tokens; t++) {
    const float *x = job->x + t * job->cols, *y = job->y + t * job->cols, weight = job->weight ? job->weight[t] : 1.0f;
    for (size_t j = begin; j < end; j++) job->out[j] = aq_fma(weight * y[j], x[j], job->out[j]);
  }
  return AQ_OK;
}

int32_t aq_accumulate_moment(const float *x, const float *y, const float *weight, size_t tokens, size_t rows,
                             size_t cols, size_t block, float *out, int32_t isa, int32_t threads) {
  if (tokens == 0 || rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!x || !out) return AQ_E_ARGUMENT;
  const int symmetric = !y;
  if (block == 0 || (rows != cols && (symmetric || block < cols)) || !aq_counts_allowed(tokens, cols) ||
      !aq_counts_allowed(tokens, rows) || !aq_counts_allowed(rows, cols))
    return AQ_E_SHAPE;
  int32_t status = AQ_OK;
  if (block == 1 && cols > 1) {
    const diagonal_job job = {x, symmetric ? x : y, weight, tokens, cols, out};
    return aq_run_units(diagonal_columns, &job, cols, aq_work((double)tokens * (double)cols), threads);
  }
  for (size_t first = 0; first < cols && status == AQ_OK; first += block) {
    const size_t n = aq_min_size(block, cols - first), m = rows == cols ? n : rows;
    const aq_product_job job = {.a = (symmetric ? x : y) + first, .a_row = 1, .a_col = (ptrdiff_t)rows,
                                .b = x + first, .b_row = (ptrdiff_t)cols, .b_col = 1, .c = out, .c_row = n,
                                .k = tokens, .weight = weight};
    status = aq_run_product(kernels->product, &job, m, n, symmetric, threads);
    if (symmetric && status == AQ_OK && n > 1) {
      const mirror_job mirror = {out, n};
      status = aq_run_units(mirror_rows, &mirror, (n - 1) / AQ_MIRROR + 1, n * n / 4, threads);
    }
    out += m * n;
  }
  return status == AQ_OK ? aq_stopped() : status;
}

/* Factor ------------------------------------------------------------------------------------------------- */

/* The rows of h above the last columns of U that are known: `u`, `block` of them. g becomes those rows of U
 * before they are scaled, [rows, AQ_FACTOR_BLOCK]. */
typedef struct {
  const aq_product_kernels *kernels;
  float *h;
  const float *u, *pivots;
  size_t stride, block, rows;
  float *g;
} above_job;

#define AQ_ABOVE_ROWS 84 /* of a unit: whole tiles of most instruction sets */

static int32_t above_rows(const void *context, size_t begin, size_t end) {
  const above_job *job = context;
  for (size_t row = begin * AQ_ABOVE_ROWS; row < aq_min_size(end * AQ_ABOVE_ROWS, job->rows); row += AQ_ABOVE_ROWS) {
    const size_t rows = aq_min_size(AQ_ABOVE_ROWS, job->rows - row);
    float *h = job->h + row * job->stride, *g = job->g + row * AQ_FACTOR_BLOCK;
    job->kernels->backward(job->u, job->stride, job->block, h, job->stride, rows);
    for (size_t i = 0; i < rows; i++, h += job->stride, g += AQ_FACTOR_BLOCK)
      for (size_t k = 0; k < job->block; k++) {
        g[k] = h[k];
        h[k] = g[k] / job->pivots[k];
      }
  }
  return AQ_OK;
}

/* Columns from the last on, one after the other: each is scaled by its pivot and its products leave the
 * columns before it. */
static int32_t factor_columns(float *h, size_t stride, size_t n, float *pivots) {
  for (size_t k = n; k-- > 0;) {
    float g[AQ_FACTOR_PART];
    const float pivot = pivots[k] = h[k * stride + k];
    if (!(pivot > 0) || !(pivot - pivot == 0)) return AQ_E_VALUE;
    h[k * stride + k] = 1;
    for (size_t i = 0; i < k; i++) {
      g[i] = h[i * stride + k];
      h[i * stride + k] = g[i] / pivot;
    }
    for (size_t i = 0; i < k; i++)
      for (size_t j = i; j < k; j++) h[i * stride + j] = aq_fma(-g[i], h[j * stride + k], h[i * stride + j]);
  }
  return AQ_OK;
}

/* The same in blocks of columns. */
static int32_t factor_blocks(const aq_product_kernels *kernels, float *h, size_t stride, size_t n, size_t size,
                             float *pivots, float *g, int32_t threads) {
  int32_t status = AQ_OK;
  for (size_t end = n; end > 0 && status == AQ_OK;) {
    const size_t block = aq_min_size(size, end), begin = end - block;
    float *diagonal = h + begin * stride + begin;
    status = size == AQ_FACTOR_PART
        ? factor_columns(diagonal, stride, block, pivots + begin)
        : factor_blocks(kernels, diagonal, stride, block, AQ_FACTOR_PART, pivots + begin, g, 1);
    if (begin > 0 && status == AQ_OK) {
      const above_job above = {kernels, h + begin, diagonal, pivots + begin, stride, block, begin, g};
      aq_run_units(above_rows, &above, (begin - 1) / AQ_ABOVE_ROWS + 1,
                   aq_work((double)begin * (double)block * (double)block / 2 / AQ_PER_WORK), threads);
      const aq_product_job products = {.a = g + block - 1, .a_row = AQ_FACTOR_BLOCK, .a_col = -1, .b = h + end - 1,
                                       .b_row = -1, .b_col = (ptrdiff_t)stride, .c = h, .c_row = stride, .k = block,
                                       .subtract = 1};
      status = aq_run_product(kernels, &products, begin, begin, 1, threads);
    }
    end = begin;
  }
  return status;
}

int32_t aq_factor_moment(float *h, size_t n, float *pivots, float *work, int32_t isa, int32_t threads) {
  if (n == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!h || !pivots || !work) return AQ_E_ARGUMENT;
  if (n > AQ_MAX_SOLVER_COLS) return AQ_E_SHAPE;
  const int32_t status = factor_blocks(kernels->product, h, n, n, AQ_FACTOR_BLOCK, pivots, work, threads);
  if (status != AQ_OK) return status;
  for (size_t i = 1; i < n && !aq_stopped(); i++) __builtin_memset(h + i * n, 0, i * sizeof *h);
  return aq_stopped();
}

/* Rows times the inverse --------------------------------------------------------------------------------- */

typedef struct {
  const aq_product_kernels *kernels;
  const float *factor, *pivots;
  float *b;
  size_t rows, n, unit; /* rows of a unit */
} solve_job;

static int32_t solve_rows(const void *context, size_t begin, size_t end) {
  const solve_job *job = context;
  const size_t n = job->n;
  for (size_t row = begin * job->unit; row < aq_min_size(end * job->unit, job->rows); row += job->unit) {
    const size_t rows = aq_min_size(job->unit, job->rows - row);
    float *b = job->b + row * n;
    job->kernels->backward(job->factor, n, n, b, n, rows);
    for (size_t i = 0; i < rows; i++)
      for (size_t k = 0; k < n; k++) b[i * n + k] = b[i * n + k] / job->pivots[k];
    job->kernels->forward(job->factor, n, n, b, n, rows);
  }
  return AQ_OK;
}

int32_t aq_solve_moment(const float *factor, const float *pivots, size_t n, float *b, size_t rows, int32_t isa,
                        int32_t threads) {
  if (n == 0 || rows == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!factor || !pivots || !b) return AQ_E_ARGUMENT;
  if (n > AQ_MAX_SOLVER_COLS || !aq_counts_allowed(rows, n)) return AQ_E_SHAPE;
  solve_job job = {kernels->product, factor, pivots, b, rows, n, AQ_PRODUCT_ROWS};
  const size_t work = aq_work((double)rows * (double)n * (double)n / AQ_PER_WORK);
  const size_t count = aq_thread_count(rows, work, threads);
  while (count > 1 && job.unit > AQ_PRODUCT_ROWS / 8 && (rows - 1) / job.unit + 1 < 4 * count) job.unit /= 2;
  const int32_t status = aq_run_units(solve_rows, &job, (rows - 1) / job.unit + 1, work, threads);
  return status == AQ_OK ? aq_stopped() : status;
}
