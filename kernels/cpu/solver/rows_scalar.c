/* solver/rows_scalar.c: the oracle of solver/rows.h, a row at a time. */
#include "rows.h"

static void feedback_row(const aq_feedback_job *job, size_t row, float *target) {
  const size_t n = job->cols;
  const float code_max = (float)((1 << job->bits) - 1);
  const float *weights = job->weights + row * n, *factor = job->factor;
  double objective = 0;
  for (size_t begin = 0; begin < n; begin += job->block) {
    const size_t size = aq_min_size(job->block, n - begin);
    const int32_t *order = job->order + begin;
    for (size_t k = 0; k < size; k++) target[k] = weights[order[k]];
    float sum = 0;
    for (size_t k = 0; k < size; k++) {
      const size_t col = (size_t)order[k], at = row * job->groups + col / job->group_size;
      const aq_grid grid = {job->scale[at], job->zero_point[at]};
      const float code = (float)aq_encode(target[k], grid, code_max);
      const float value = grid.scale * (code - grid.zero_point), error = weights[col] - value, left = target[k] - value;
      job->codes[row * n + col] = (uint8_t)code;
      sum = aq_fma(left * job->pivots[begin + k], left, sum);
      if (k % AQ_PART == AQ_PART - 1 || k == size - 1) {
        objective += (double)sum;
        sum = 0;
      }
      for (size_t j = k + 1; j < size; j++) target[j] = aq_fma(error, factor[k * size + j], target[j]);
    }
    factor += size * size;
  }
  job->objective[row] = objective;
}

static void feedback(const aq_feedback_job *job, size_t row, size_t rows, float *work) {
  for (size_t i = 0; i < rows && !aq_stopped(); i++) feedback_row(job, row + i, work);
}

/* Refining ----------------------------------------------------------------------------------------------- */

typedef struct {
  const float *weights;
  float *codes, *gradient, *own; /* [cols]; own: the weights' products with the moment */
  float *scale, *zero_point;     /* [groups] */
} state;

static float value_of(const aq_refine_job *job, const state *s, size_t k) {
  const size_t g = k / job->group_size;
  return s->scale[g] * (s->codes[k] - s->zero_point[g]);
}

/* out = products of the error, or of the weights, with the moment. */
static void multiply(const aq_refine_job *job, const state *s, int errors, float *out) {
  const size_t n = job->cols;
  const float *moment = job->moment;
  for (size_t k = 0; k < n; k++) out[k] = 0;
  for (size_t begin = 0; begin < n; begin += job->block) {
    const size_t size = aq_min_size(job->block, n - begin);
    for (size_t k = begin; k < begin + size; k++, moment += size) {
      const float factor = errors ? s->weights[k] - value_of(job, s, k) : s->weights[k];
      for (size_t j = 0; j < size; j++) out[begin + j] = aq_fma(factor, moment[j], out[begin + j]);
    }
  }
}

static double objective_of(const aq_refine_job *job, const state *s) {
  double objective = 0;
  for (size_t first = 0; first < job->cols; first += AQ_PART) {
    float sum = 0;
    for (size_t k = first; k < aq_min_size(first + AQ_PART, job->cols); k++)
      sum = aq_fma(s->weights[k] - value_of(job, s, k), s->gradient[k], sum);
    objective += (double)sum;
  }
  return objective;
}

/* A row's one grid. */
static void refit_row(const aq_refine_job *job, state *s) {
  aq_grid grid = {s->scale[0], s->zero_point[0]};
  const aq_grid old = grid;
  double sums[4] = {0};
  for (size_t first = 0; first < job->cols; first += AQ_PART) {
    float part[4] = {0};
    for (size_t k = first; k < aq_min_size(first + AQ_PART, job->cols); k++) {
      const float u = s->codes[k] - old.zero_point, p = s->gradient[k], product = (s->own[k] - p) / old.scale;
      part[0] = aq_fma(u, product, part[0]);
      part[1] += product;
      part[2] = aq_fma(u, p, part[2]);
      part[3] += p;
    }
    for (int i = 0; i < 4; i++) sums[i] += (double)part[i];
  }
  float step, shift;
  if (!aq_best_grid(sums, job->group_sums[0], job->zero_point_kind, &grid, &step, &shift)) return;
  s->scale[0] = grid.scale;
  s->zero_point[0] = grid.zero_point;
  for (size_t k = 0; k < job->cols; k++) {
    const float p = s->gradient[k], product = (s->own[k] - p) / old.scale;
    s->gradient[k] = aq_fma(-shift, job->ones[k], aq_fma(-step, product, p));
  }
}

/* The grid of the group of columns [first, first + size), whose rows of the moment are at `moment`. */
static void refit_group(const aq_refine_job *job, state *s, size_t first, size_t size, const float *moment,
                        size_t stride) {
  const size_t g = first / job->group_size;
  aq_grid grid = {s->scale[g], s->zero_point[g]};
  float products[AQ_DESCENT_MOST] = {0}, *p = s->gradient + first, part[4] = {0};
  for (size_t k = 0; k < size; k++)
    for (size_t j = 0; j < size; j++)
      products[j] = aq_fma(moment[k * stride + j], s->codes[first + k] - grid.zero_point, products[j]);
  for (size_t k = 0; k < size; k++) {
    const float u = s->codes[first + k] - grid.zero_point;
    part[0] = aq_fma(u, products[k], part[0]);
    part[1] += products[k];
    part[2] = aq_fma(u, p[k], part[2]);
    part[3] += p[k];
  }
  const double sums[4] = {(double)part[0], (double)part[1], (double)part[2], (double)part[3]};
  float step, shift;
  if (!aq_best_grid(sums, job->group_sums[g], job->zero_point_kind, &grid, &step, &shift)) return;
  s->scale[g] = grid.scale;
  s->zero_point[g] = grid.zero_point;
  for (size_t k = 0; k < size; k++) p[k] = aq_fma(-shift, job->ones[first + k], aq_fma(-step, products[k], p[k]));
}

/* A part of a block: its refit and its codes. gradient, codes and steps are those of the block from `begin`
 * on, whose rows of the moment begin at `moment`. */
static void descend_part(const aq_refine_job *job, state *s, size_t begin, size_t first, size_t part, size_t block,
                         const float *moment, size_t stride, float *change) {
  const float code_max = (float)((1 << job->bits) - 1);
  const float *rows = moment + first * stride;
  float *p = s->gradient + begin;
  for (size_t k = 0; k < part; k++) change[k] = value_of(job, s, begin + first + k);
  if (aq_refits_groups(job)) refit_group(job, s, begin + first, part, rows + first, stride);
  for (size_t k = 0; k < part; k++) {
    const size_t col = begin + first + k, g = col / job->group_size;
    const aq_grid grid = {s->scale[g], s->zero_point[g]};
    const float diagonal = rows[k * stride + first + k], old = value_of(job, s, col);
    if (diagonal > 0) s->codes[col] = (float)aq_encode(old + p[first + k] / diagonal, grid, code_max);
    const float value = value_of(job, s, col), step = value - old;
    for (size_t j = first; j < first + part; j++) p[j] = aq_fma(-rows[k * stride + j], step, p[j]);
    change[k] = value - change[k];
  }
  for (size_t k = 0; k < part; k++)
    for (size_t j = 0; j < block; j++)
      if (j < first || j >= first + part) p[j] = aq_fma(-change[k], rows[k * stride + j], p[j]);
}

static void descend(const aq_refine_job *job, state *s) {
  const size_t n = job->cols, most = aq_descent_block(job), most_part = aq_descent_part(job);
  const float *moment = job->moment;
  for (size_t begin = 0, size = 0; begin < n; begin += job->block, moment += size * size) {
    size = aq_min_size(job->block, n - begin);
    for (size_t at = 0, block = 0; at < size; at += block) {
      block = aq_min_size(most, size - at);
      const float *rows = moment + at * size;
      float steps[AQ_DESCENT_MOST] = {0}, change[AQ_DESCENT_MOST];
      for (int32_t sweep = 0; sweep < job->sweeps; sweep++)
        for (size_t first = 0, part = 0; first < block; first += part) {
          part = aq_min_size(most_part, block - first);
          descend_part(job, s, begin + at, first, part, block, rows + at, size, change);
          for (size_t k = 0; k < part; k++) steps[first + k] += change[k];
        }
      for (size_t k = 0; k < block; k++)
        for (size_t j = 0; j < size; j++)
          if (j < at || j >= at + block)
            s->gradient[begin + j] = aq_fma(-steps[k], rows[k * size + j], s->gradient[begin + j]);
    }
  }
}

static void refine_row(const aq_refine_job *job, size_t row, float *work) {
  const size_t n = job->cols, groups = job->groups;
  float *scale = job->scale + row * groups, *zero_point = job->zero_point + row * groups;
  uint8_t *codes = job->codes + row * n;
  float *own = work + 2 * n, *grids = own + (groups == 1 ? n : 0);
  state s = {job->weights + row * n, work, work + n, own, grids, grids + groups};
  for (size_t k = 0; k < n; k++) s.codes[k] = (float)codes[k];
  __builtin_memcpy(s.scale, scale, groups * sizeof *scale);
  __builtin_memcpy(s.zero_point, zero_point, groups * sizeof *zero_point);
  multiply(job, &s, 1, s.gradient);
  job->objective[row] = objective_of(job, &s);
  if (job->rounds == 0) return;
  const int refits_row = job->refit && groups == 1;
  if (refits_row) multiply(job, &s, 0, s.own);
  for (int32_t round = 0; round < job->rounds && !aq_stopped(); round++) {
    if (refits_row) refit_row(job, &s);
    descend(job, &s);
  }
  const double objective = objective_of(job, &s);
  if (!(objective < job->objective[row])) return;
  job->objective[row] = objective;
  for (size_t k = 0; k < n; k++) codes[k] = (uint8_t)s.codes[k];
  __builtin_memcpy(scale, s.scale, groups * sizeof *scale);
  __builtin_memcpy(zero_point, s.zero_point, groups * sizeof *zero_point);
}

static void refine(const aq_refine_job *job, size_t row, size_t rows, float *work) {
  for (size_t i = 0; i < rows && !aq_stopped(); i++) refine_row(job, row + i, work);
}

const aq_row_kernels aq_rows_scalar = {feedback, refine};
