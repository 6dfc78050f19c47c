/* solver/api.c: the functions of arrowquant.h on second moments: argument checks, and work over
 * threads. */
#include "../dispatch.h"
#include "../threads.h"
#include "rows.h"

/* The place among the `count` that share `units` of the thread whose share holds one. */
static size_t thread_of(size_t begin, size_t units, size_t count) {
  size_t i = 0;
  while (units * (i + 1) / count <= begin) i++;
  return i;
}

static size_t thread_limit(int32_t threads) {
  return threads < 1 ? 1 : aq_min_size((size_t)threads, AQ_MAX_THREADS);
}

/* Multiply-adds that take as long as a unit of work. */
#define AQ_PER_WORK 512

int32_t aq_solver_work(size_t cols, size_t group_size, int32_t threads, uint64_t *floats) {
  if (!floats) return AQ_E_ARGUMENT;
  const size_t group = aq_group_columns(group_size, cols);
  if (cols > AQ_MAX_SOLVER_COLS || (group == 0 && cols > 0)) return AQ_E_SHAPE;
  const size_t groups = cols == 0 ? 0 : (cols - 1) / group + 1;
  const uint64_t rows = aq_row_floats(cols, groups, thread_limit(threads));
  const uint64_t moments = (uint64_t)cols * (2 * AQ_SOLVER_BLOCK + AQ_PANEL * thread_limit(threads));
  *floats = rows > moments ? rows : moments;
  return AQ_OK;
}

/* Moments ------------------------------------------------------------------------------------------------ */

typedef struct {
  const aq_solver_kernels *kernels;
  const float *x, *y, *weight;
  size_t tokens, rows, cols, panels;
  int symmetric;
  float *out;
} moment_job;

static int32_t moment_panels(const void *context, size_t begin, size_t end) {
  const moment_job *job = context;
  for (size_t unit = begin; unit < end; unit++) {
    /* first, last, second, … : a symmetric moment's later panels are taller */
    const size_t panel = unit % 2 == 0 ? unit / 2 : job->panels - 1 - unit / 2;
    const size_t first = panel * AQ_PANEL;
    job->kernels->moment(job->x, job->y, job->weight, job->tokens, job->rows, job->cols, first,
                         aq_min_size(first + AQ_PANEL, job->cols), job->symmetric, job->out);
  }
  return AQ_OK;
}

int32_t aq_accumulate_moment(const float *x, const float *y, const float *weight, size_t tokens, size_t rows,
                             size_t cols, float *out, int32_t isa, int32_t threads) {
  if (tokens == 0 || rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!x || !out) return AQ_E_ARGUMENT;
  const int symmetric = !y;
  if ((symmetric && rows != cols) || !aq_counts_allowed(tokens, cols) || !aq_counts_allowed(tokens, rows) ||
      !aq_counts_allowed(rows, cols))
    return AQ_E_SHAPE;
  const moment_job job = {kernels->solver, x, symmetric ? x : y, weight, tokens, rows, cols, (cols - 1) / AQ_PANEL + 1,
                          symmetric, out};
  const int32_t status = aq_run_units(moment_panels, &job, job.panels,
                                      aq_work((double)tokens * (double)rows * (double)cols / AQ_PER_WORK), threads);
  if (symmetric && status == AQ_OK)
    for (size_t i = 1; i < cols && !aq_stopped(); i++)
      for (size_t j = 0; j < i; j++) out[i * cols + j] = out[j * cols + i];
  return status == AQ_OK ? aq_stopped() : status;
}

/* Factor ------------------------------------------------------------------------------------------------- */

typedef struct {
  const aq_solver_kernels *kernels;
  float *h;
  const float *g, *a;
  size_t n, block, cols;
} factor_job;

#define AQ_FACTOR_ROWS 48 /* rows of a unit: later ones are shorter, so threads take them in turns */

static int32_t factor_rows(const void *context, size_t begin, size_t end) {
  const factor_job *job = context;
  const size_t units = (job->cols - 1) / AQ_FACTOR_ROWS + 1;
  for (size_t unit = begin; unit < end; unit++) {
    const size_t tile = unit % 2 == 0 ? unit / 2 : units - 1 - unit / 2;
    const size_t first = tile * AQ_FACTOR_ROWS;
    job->kernels->subtract_products(job->h, job->n, job->g, job->a, job->block, first,
                                    aq_min_size(first + AQ_FACTOR_ROWS, job->cols), job->cols);
  }
  return AQ_OK;
}

int32_t aq_factor_moment(float *h, size_t n, float *pivots, float *work, int32_t isa, int32_t threads) {
  if (n == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!h || !pivots || !work) return AQ_E_ARGUMENT;
  if (n > AQ_MAX_SOLVER_COLS) return AQ_E_SHAPE;
  /* row k - begin of g: column k of h before it is scaled; of a: after */
  float *g = work, *a = work + AQ_SOLVER_BLOCK * n;
  for (size_t end = n; end > 0 && !aq_stopped();) {
    const size_t block = aq_min_size(AQ_SOLVER_BLOCK, end), begin = end - block;
    for (size_t k = end; k-- > begin;) {
      const float pivot = h[k * n + k];
      if (!(pivot > 0) || !(pivot - pivot == 0)) return AQ_E_VALUE;
      pivots[k] = pivot;
      float *gk = g + (end - 1 - k) * n, *ak = a + (end - 1 - k) * n;
      for (size_t i = 0; i < n; i++) gk[i] = ak[i] = 0;
      for (size_t i = 0; i < k; i++) {
        gk[i] = h[i * n + k];
        ak[i] = gk[i] / pivot;
        h[i * n + k] = ak[i];
      }
      h[k * n + k] = 1;
      for (size_t i = 0; i < k; i++)
        for (size_t j = i > begin ? i : begin; j < k; j++) h[i * n + j] -= gk[i] * ak[j];
    }
    if (begin > 0) {
      for (size_t k = 0; k < block; k++)
        for (size_t j = begin; j < aq_min_size(begin + AQ_PANEL, n); j++) a[k * n + j] = 0;
      const factor_job job = {kernels->solver, h, g, a, n, block, begin};
      aq_run_units(factor_rows, &job, (begin - 1) / AQ_FACTOR_ROWS + 1,
                   aq_work((double)begin * (double)begin * (double)block / AQ_PER_WORK), threads);
    }
    end = begin;
  }
  for (size_t i = 1; i < n && !aq_stopped(); i++)
    for (size_t j = 0; j < i; j++) h[i * n + j] = 0;
  return aq_stopped();
}

/* Panels of rows over threads, each thread with a work area of `floats`. */
typedef struct {
  const aq_solver_kernels *kernels;
  const float *factor, *pivots;
  float *b;
  size_t rows, cols, floats;
  float *work;
  size_t panels, threads;
} panels_context;

static int32_t run_panels(const void *context, size_t begin, size_t end) {
  const panels_context *c = context;
  float *work = c->work + thread_of(begin, c->panels, c->threads) * c->floats;
  for (; begin < end; begin++) {
    const size_t row = begin * c->kernels->panel, rows = aq_min_size(c->kernels->panel, c->rows - row);
    c->kernels->solve(c->factor, c->pivots, c->cols, c->b + row * c->cols, rows, work);
  }
  return AQ_OK;
}

/* `products`: sums over all columns for every element, in multiples of rows cols^2. */
static int32_t panels_over_threads(panels_context *c, double products, int32_t threads) {
  const size_t work = aq_work(products * (double)c->rows * (double)c->cols * (double)c->cols / AQ_PER_WORK);
  c->panels = (c->rows - 1) / c->kernels->panel + 1;
  c->threads = aq_thread_count(c->panels, work, threads);
  return aq_run_units(run_panels, c, c->panels, work, threads);
}

int32_t aq_solve_moment(const float *factor, const float *pivots, size_t n, float *b, size_t rows, float *work,
                        int32_t isa, int32_t threads) {
  if (n == 0 || rows == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!factor || !pivots || !b || !work) return AQ_E_ARGUMENT;
  if (n > AQ_MAX_SOLVER_COLS || !aq_counts_allowed(rows, n)) return AQ_E_SHAPE;
  panels_context context = {.kernels = kernels->solver, .factor = factor, .pivots = pivots, .b = b, .rows = rows,
                            .cols = n, .floats = n * AQ_PANEL, .work = work};
  return panels_over_threads(&context, 2, threads);
}
