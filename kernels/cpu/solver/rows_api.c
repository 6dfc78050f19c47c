/* solver/rows_api.c: the functions of arrowquant.h that solve rows for codes: argument checks, and work over
 * threads. */
#include "../dispatch.h"
#include "../threads.h"
#include "rows.h"
#include "trellis.h"

static int all_finite(const float *values, size_t n) {
  float sum[16] = {0}; /* 0, or NaN; as many as a vector has */
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    if (i % (1 << 24) == 0 && aq_stopped()) return 1; /* whoever asks will see it, too */
    for (size_t k = 0; k < 16; k++) sum[k] += values[i + k] * 0.0f;
  }
  for (; i < n; i++) sum[0] += values[i] * 0.0f;
  for (size_t k = 1; k < 16; k++) sum[0] += sum[k];
  return sum[0] == 0.0f;
}

/* The place among the `count` that share `units` of the thread whose share holds one. */
static size_t thread_of(size_t begin, size_t units, size_t count) {
  size_t i = 0;
  while (units * (i + 1) / count <= begin) i++;
  return i;
}

/* Multiply-adds that take as long as a unit of work. */
#define AQ_PER_WORK 512

/* Floats of one thread, and in front of all. */
static size_t thread_floats(size_t cols, size_t groups) {
  const size_t panel = aq_panel_floats(cols, groups), chunk = aq_trellis_floats(cols, groups);
  return ((panel > chunk ? panel : chunk) + 15) / 16 * 16;
}
static size_t shared_floats(size_t cols, size_t groups) { return (cols + 2 * groups + 15) / 16 * 16; }

uint64_t aq_row_floats(size_t cols, size_t groups, size_t threads) {
  return shared_floats(cols, groups) + threads * (uint64_t)thread_floats(cols, groups);
}

/* Panels of rows over threads, each thread with a work area of `floats`. */
typedef struct {
  const aq_row_kernels *kernels;
  const aq_feedback_job *feedback;
  const aq_refine_job *refine;
  size_t rows, cols, floats;
  float *work;
  size_t panel, panels, threads; /* rows of a panel, panels */
} panels_context;

static int32_t run_panels(const void *context, size_t begin, size_t end) {
  const panels_context *c = context;
  float *work = c->work + thread_of(begin, c->panels, c->threads) * c->floats;
  for (; begin < end; begin++) {
    const size_t row = begin * c->panel, rows = aq_min_size(c->panel, c->rows - row);
    if (c->feedback)
      c->kernels->feedback(c->feedback, row, rows, work);
    else
      c->kernels->refine(c->refine, row, rows, work);
  }
  return AQ_OK;
}

/* `products`: multiply-adds for every element of a row and every column of its block. */
static int32_t panels_over_threads(panels_context *c, double products, size_t block, int32_t threads) {
  const size_t work = aq_work(products * (double)c->rows * (double)c->cols * (double)block / AQ_PER_WORK);
  const size_t count = aq_thread_count(c->rows, work, threads);
  /* as many for every thread, all of about the same size */
  c->panels = ((c->rows - 1) / AQ_PANEL_ROWS / count + 1) * count;
  c->panel = (c->rows - 1) / c->panels + 1;
  c->panels = (c->rows - 1) / c->panel + 1;
  c->threads = aq_thread_count(c->panels, work, threads);
  return aq_run_units(run_panels, c, c->panels, work, threads);
}

static int32_t check_rows(const float *weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                          size_t block, const float *scale, const float *zero_point, size_t *groups) {
  const size_t group = aq_group_columns(group_size, cols);
  if (!weights || !scale || !zero_point || !aq_bits_allowed(bits)) return AQ_E_ARGUMENT;
  if (group == 0 || cols > AQ_MAX_SOLVER_COLS || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  if (block == 0 || block > cols || (block % group != 0 && group < cols && block < cols)) return AQ_E_SHAPE;
  *groups = (cols - 1) / group + 1;
  for (size_t i = 0; i < rows * *groups; i++)
    if (scale[i] == 0 || !(scale[i] - scale[i] == 0) || !(zero_point[i] - zero_point[i] == 0)) return AQ_E_VALUE;
  return all_finite(weights, rows * cols) ? AQ_OK : AQ_E_NONFINITE;
}

/* Elements of the blocks on a diagonal. */
static size_t block_elements(size_t cols, size_t block) {
  return cols / block * block * block + cols % block * (cols % block);
}

int32_t aq_quantize_feedback(const float *weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                             const float *scale, const float *zero_point, size_t block, const float *factor,
                             const float *pivots, const int32_t *order, uint8_t *codes, double *objective,
                             float *work, int32_t isa, int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  size_t groups;
  const int32_t status = check_rows(weights, rows, cols, bits, group_size, block, scale, zero_point, &groups);
  if (status != AQ_OK) return status;
  if (!factor || !pivots || !order || !codes || !objective || !work) return AQ_E_ARGUMENT;
  for (size_t k = 0; k < cols; k++)
    if (order[k] < 0 || (size_t)order[k] >= cols || (size_t)order[k] / block != k / block) return AQ_E_VALUE;
  if (!all_finite(factor, block_elements(cols, block)) || !all_finite(pivots, cols)) return AQ_E_VALUE;
  const aq_feedback_job job = {weights, rows, cols, bits, aq_group_columns(group_size, cols), groups, block,
                               scale, zero_point, factor, pivots, order, codes, objective};
  panels_context context = {.kernels = kernels->rows, .feedback = &job, .rows = rows, .cols = cols,
                            .floats = thread_floats(cols, groups), .work = work + shared_floats(cols, groups)};
  return panels_over_threads(&context, 0.5, block, threads);
}

typedef struct {
  const float *moment;
  size_t cols, group, block;
  float *ones;
} ones_job;

/* Rows of the moment added up over the columns of their group, within their block. */
static int32_t sum_rows(const void *context, size_t begin, size_t end) {
  const ones_job *job = context;
  for (size_t k = begin; k < end; k++) {
    const size_t first = k / job->block * job->block, size = aq_min_size(job->block, job->cols - first);
    const size_t group = k / job->group * job->group;
    const float *row = job->moment + k / job->block * job->block * job->block + (k - first) * size;
    double sum = 0;
    for (size_t j = group > first ? group - first : 0; j < aq_min_size(group + job->group - first, size); j++)
      sum += (double)row[j];
    job->ones[k] = (float)sum;
  }
  return AQ_OK;
}

/* Both of what refits take: rows added up, and those over their groups. */
static int32_t group_sums(const float *moment, size_t cols, size_t group, size_t block, double *sums, float *ones,
                          int32_t threads) {
  const ones_job job = {moment, cols, group, block, ones};
  const size_t work = aq_work((double)cols * (double)aq_min_size(group, block));
  __builtin_memset(sums, 0, ((cols - 1) / group + 1) * sizeof *sums);
  const int32_t status = aq_run_units(sum_rows, &job, cols, work, threads);
  for (size_t k = 0; k < cols && status == AQ_OK; k++) sums[k / group] += (double)ones[k];
  return status;
}

int32_t aq_refine_codes(const float *weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                        int32_t zero_point_kind, size_t block, const float *moment, int32_t refit, int32_t rounds,
                        int32_t sweeps, uint8_t *codes, float *scale, float *zero_point, double *objective,
                        float *work, int32_t isa, int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  size_t groups;
  int32_t status = check_rows(weights, rows, cols, bits, group_size, block, scale, zero_point, &groups);
  if (status != AQ_OK) return status;
  if (!moment || !codes || !objective || !work || !aq_zero_point_kind_allowed(zero_point_kind) || rounds < 0 ||
      sweeps < 1)
    return AQ_E_ARGUMENT;
  if (!all_finite(moment, block_elements(cols, block))) return AQ_E_VALUE;
  for (size_t i = 0; i < rows * cols; i++)
    if (codes[i] >> bits) return AQ_E_VALUE;
  const size_t group = aq_group_columns(group_size, cols);
  double *sums = (double *)work;
  float *ones = work + 2 * groups;
  if (refit && rounds > 0) status = group_sums(moment, cols, group, block, sums, ones, threads);
  if (status != AQ_OK) return status;
  const aq_refine_job job = {weights, rows, cols, bits, group, groups, block, zero_point_kind, refit, rounds, sweeps,
                             moment, ones, sums, scale, zero_point, codes, objective};
  panels_context context = {.kernels = kernels->rows, .refine = &job, .rows = rows, .cols = cols,
                            .floats = thread_floats(cols, groups), .work = work + shared_floats(cols, groups)};
  return panels_over_threads(&context, 1 + (double)rounds + (refit && groups == 1), block, threads);
}

/* Trellis codes ------------------------------------------------------------------------------------------ */

/* Chunks of rows over threads, each thread with a work area of `floats`. */
typedef struct {
  const aq_trellis_kernels *kernels;
  const aq_search_job *search;
  const aq_settle_job *settle;
  size_t rows, floats, chunks, threads;
  float *work;
} chunks_context;

static int32_t run_chunks(const void *context, size_t begin, size_t end) {
  const chunks_context *c = context;
  float *work = c->work + thread_of(begin, c->chunks, c->threads) * c->floats;
  for (; begin < end; begin++) {
    const size_t row = begin * c->kernels->lanes, rows = aq_min_size(c->kernels->lanes, c->rows - row);
    if (c->search)
      c->kernels->search(c->search, row, rows, work);
    else
      c->kernels->settle(c->settle, row, rows, work);
  }
  return AQ_OK;
}

/* `products`: multiply-adds for a weight. */
static int32_t chunks_over_threads(chunks_context *c, size_t cols, double products, int32_t threads) {
  const size_t work = aq_work(products * (double)c->rows * (double)cols / AQ_PER_WORK);
  c->chunks = (c->rows - 1) / c->kernels->lanes + 1;
  c->threads = aq_thread_count(c->chunks, work, threads);
  return aq_run_units(run_chunks, c, c->chunks, work, threads);
}

static int32_t check_trellis(const float *weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                             size_t block, const float *table, const float *scale, const float *offset,
                             size_t *groups) {
  if (!table || !aq_trellis_bits_allowed(bits)) return AQ_E_ARGUMENT;
  const int32_t status = check_rows(weights, rows, cols, bits, group_size, block, scale, offset, groups);
  if (status != AQ_OK) return status;
  if (block % AQ_PART != 0 && block < cols) return AQ_E_SHAPE;
  return all_finite(table, aq_trellis_windows(bits)) ? AQ_OK : AQ_E_VALUE;
}

int32_t aq_search_trellis(const float *weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                          const float *table, int32_t survivors, const float *scale, const float *offset, size_t block,
                          const float *factor, const float *pivots, uint8_t *codes, double *objective, float *work,
                          int32_t isa, int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  size_t groups;
  const int32_t status = check_trellis(weights, rows, cols, bits, group_size, block, table, scale, offset, &groups);
  if (status != AQ_OK) return status;
  if (!factor || !pivots || !codes || !objective || !work || (survivors != 1 && survivors != 0)) return AQ_E_ARGUMENT;
  if (!all_finite(factor, block_elements(cols, block)) || !all_finite(pivots, cols)) return AQ_E_VALUE;
  const aq_search_job job = {weights, rows, cols, bits, aq_group_columns(group_size, cols), groups, block, table,
                             factor, pivots, survivors, scale, offset, codes, objective};
  chunks_context context = {.kernels = kernels->trellis, .search = &job, .rows = rows,
                            .floats = thread_floats(cols, groups), .work = work + shared_floats(cols, groups)};
  const double products = (double)aq_trellis_windows(bits) * 2 * AQ_TRELLIS_BLOCK + 0.5 * (double)block;
  return chunks_over_threads(&context, cols, products, threads);
}

int32_t aq_settle_trellis(const float *weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                          const float *table, size_t block, const float *moment, int32_t refit, int32_t rounds,
                          uint8_t *codes, float *scale, float *offset, double *objective, float *work, int32_t isa,
                          int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  size_t groups;
  int32_t status = check_trellis(weights, rows, cols, bits, group_size, block, table, scale, offset, &groups);
  if (status != AQ_OK) return status;
  if (!moment || !codes || !objective || !work || rounds < 0 || !aq_refit_allowed(refit)) return AQ_E_ARGUMENT;
  if (!all_finite(moment, block_elements(cols, block))) return AQ_E_VALUE;
  for (size_t i = 0; i < rows * cols; i++)
    if (codes[i] >> bits) return AQ_E_VALUE;
  const size_t group = aq_group_columns(group_size, cols);
  double *sums = (double *)work;
  float *ones = work + 2 * groups;
  __builtin_memset(work, 0, (2 * groups + cols) * sizeof *work); /* of scales alone */
  if (refit == AQ_REFIT_LINES && rounds > 0) status = group_sums(moment, cols, group, block, sums, ones, threads);
  if (status != AQ_OK) return status;
  const aq_settle_job job = {weights, rows, cols, bits, group, groups, block, table, refit, rounds, moment, ones, sums,
                             scale, offset, codes, objective};
  chunks_context context = {.kernels = kernels->trellis, .settle = &job, .rows = rows,
                            .floats = thread_floats(cols, groups), .work = work + shared_floats(cols, groups)};
  const double passes = 1 + (double)rounds * (1 + (refit != AQ_REFIT_NOTHING && groups == 1));
  return chunks_over_threads(&context, cols, passes * (double)block, threads);
}

/* Grids -------------------------------------------------------------------------------------------------- */

typedef struct {
  const float *weights;
  size_t cols, group_size, groups;
  int32_t bits, kind;
  float ratio;
  float *scale, *zero_point;
} grid_job;

static int32_t grid_rows(const void *context, size_t begin, size_t end) {
  const grid_job *job = context;
  for (size_t row = begin; row < end; row++)
    for (size_t g = 0; g < job->groups; g++) {
      const float *w = job->weights + row * job->cols + g * job->group_size;
      const size_t n = aq_min_size(job->group_size, job->cols - g * job->group_size);
      float minimum = w[0], maximum = w[0];
      for (size_t i = 0; i < n; i++) {
        if (!(w[i] - w[i] == 0)) return AQ_E_NONFINITE;
        minimum = w[i] < minimum ? w[i] : minimum;
        maximum = w[i] > maximum ? w[i] : maximum;
      }
      if (minimum < maximum && job->ratio < 1) {
        /* a real zero point moves with the range's middle, the others keep zero where it is */
        const float middle = job->kind == AQ_ZERO_POINT_REAL ? minimum / 2 + maximum / 2 : 0.0f;
        minimum = middle + job->ratio * (minimum - middle);
        maximum = middle + job->ratio * (maximum - middle);
      }
      aq_grid grid;
      const int32_t status = aq_round_grid(minimum, maximum, job->bits, job->kind, &grid);
      if (status != AQ_OK) return status;
      job->scale[row * job->groups + g] = grid.scale;
      job->zero_point[row * job->groups + g] = grid.zero_point;
    }
  return AQ_OK;
}

int32_t aq_clipped_grids(const float *weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                int32_t zero_point_kind, float ratio, float *scale, float *zero_point, int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  if (!weights || !scale || !zero_point || !aq_bits_allowed(bits) || !aq_zero_point_kind_allowed(zero_point_kind))
    return AQ_E_ARGUMENT;
  if (!(ratio > 0) || !(ratio <= 1)) return AQ_E_VALUE;
  const size_t group = aq_group_columns(group_size, cols);
  if (group == 0 || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  const grid_job job = {weights, cols, group, (cols - 1) / group + 1, bits, zero_point_kind, ratio, scale, zero_point};
  return aq_run_units(grid_rows, &job, rows, rows * cols, threads);
}
