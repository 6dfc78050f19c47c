/* solver/rows_scalar.c: the oracle of solver/rows.h, a row at a time. */
#include "rows.h"

static void feedback(const aq_feedback_job *job, size_t row, size_t rows, float *work) {
  (void)rows;
  const size_t n = job->cols;
  const float code_max = (float)((1 << job->bits) - 1);
  const float *weights = job->weights + row * n;
  float *target = work; /* in the order of `order` */
  for (size_t k = 0; k < n; k++) target[k] = weights[job->order[k]];
  for (size_t k = 0; k < n; k++) {
    const size_t col = (size_t)job->order[k], at = row * job->groups + col / job->group_size;
    const float s = job->scale[at], z = job->zero_point[at];
    const float code = (float)aq_encode(target[k], (aq_grid){s, z}, code_max);
    job->codes[row * n + col] = (uint8_t)code;
    const float error = weights[col] - s * (code - z);
    for (size_t j = k + 1; j < n; j++) target[j] += error * job->factor[k * n + j];
  }
}

/* Refining ----------------------------------------------------------------------------------------------- */

typedef struct {
  float *codes, *delta, *products; /* [cols] */
  float *scale, *zero_point;       /* [groups] */
  double objective;
} state;

static void evaluate(const aq_refine_job *job, const float *weights, state *s) {
  for (size_t k = 0; k < job->cols; k++) {
    const size_t g = k / job->group_size;
    s->delta[k] = weights[k] - s->scale[g] * (s->codes[k] - s->zero_point[g]);
    s->products[k] = 0;
  }
  for (size_t k = 0; k < job->cols; k++)
    for (size_t j = 0; j < job->cols; j++) s->products[j] += s->delta[k] * job->moment[k * job->cols + j];
  s->objective = 0;
  for (size_t k = 0; k < job->cols; k++) s->objective += (double)(s->delta[k] * s->products[k]);
}

static int refit_grid(const aq_refine_job *job, const state *s, float *sums, double *m, double *r, float *scale,
                      float *zero_point) {
  const size_t n = job->cols, groups = job->groups;
  /* sums: codes with codes, then ones with codes, then the right sides */
  float *qq = sums, *oq = sums + groups * groups, *rq = oq + groups * groups, *ro = rq + groups;
  for (size_t i = 0; i < 2 * groups * groups + 2 * groups; i++) sums[i] = 0;
  for (size_t h = 0; h < groups; h++) {
    const size_t begin = h * job->group_size, end = aq_min_size(begin + job->group_size, n);
    for (size_t k = 0; k < n; k++) {
      float sum = 0;
      for (size_t j = begin; j < end; j++)
        sum += (s->codes[j] - s->zero_point[h]) * job->moment[j * n + k];
      const size_t g = k / job->group_size;
      qq[g * groups + h] += (s->codes[k] - s->zero_point[g]) * sum;
      oq[g * groups + h] += sum;
    }
  }
  for (size_t k = 0; k < n; k++) {
    const size_t g = k / job->group_size;
    rq[g] += (s->codes[k] - s->zero_point[g]) * s->products[k];
    ro[g] += s->products[k];
  }
  if (!aq_solve_steps(sums, 1, job->group_sums, groups, job->zero_point_kind == AQ_ZERO_POINT_REAL, m, r)) return 0;
  aq_move_grid(r, groups, job->zero_point_kind, scale, zero_point);
  return 1;
}

static void descend(const aq_refine_job *job, state *s) {
  const size_t n = job->cols;
  const float code_max = (float)((1 << job->bits) - 1);
  for (size_t k = 0; k < n; k++) {
    const size_t g = k / job->group_size;
    const float diagonal = job->moment[k * n + k];
    const aq_grid grid = {s->scale[g], s->zero_point[g]};
    const float value = grid.scale * (s->codes[k] - grid.zero_point);
    const float code =
        diagonal > 0 ? (float)aq_encode(value + s->products[k] / diagonal, grid, code_max) : s->codes[k];
    const float step = grid.scale * (code - s->codes[k]);
    s->codes[k] = code;
    for (size_t j = 0; j < n; j++) s->products[j] -= step * job->moment[k * n + j];
  }
}

static void refine(const aq_refine_job *job, size_t row, size_t rows, float *work) {
  (void)rows;
  const size_t n = job->cols, groups = job->groups;
  const float *weights = job->weights + row * n;
  double *m = (double *)work, *r = m + 4 * groups * groups;
  float *floats = (float *)(r + 2 * groups);
  float *candidate = floats, *kept = candidate + n, *delta = kept + n, *products = delta + n, *sums = products + n;
  float *scale = sums + 2 * groups * groups + 2 * groups, *zero_point = scale + groups;
  state s = {candidate, delta, products, scale, zero_point, 0};
  uint8_t *codes = job->codes + row * n;
  float *own_scale = job->scale + row * groups, *own_zero = job->zero_point + row * groups;
  for (size_t k = 0; k < n; k++) candidate[k] = kept[k] = (float)codes[k];
  __builtin_memcpy(scale, own_scale, groups * sizeof *scale);
  __builtin_memcpy(zero_point, own_zero, groups * sizeof *zero_point);
  evaluate(job, weights, &s);
  double best = s.objective;
  for (int32_t round = 0; round < 2 * job->rounds && !aq_stopped(); round++) {
    if (round % 2 == 0) {
      if (!job->refit || !refit_grid(job, &s, sums, m, r, scale, zero_point)) continue;
    } else {
      descend(job, &s);
    }
    evaluate(job, weights, &s);
    if (s.objective < best) {
      best = s.objective;
      __builtin_memcpy(kept, candidate, n * sizeof *kept);
      __builtin_memcpy(own_scale, scale, groups * sizeof *scale);
      __builtin_memcpy(own_zero, zero_point, groups * sizeof *zero_point);
    } else {
      __builtin_memcpy(candidate, kept, n * sizeof *kept);
      __builtin_memcpy(scale, own_scale, groups * sizeof *scale);
      __builtin_memcpy(zero_point, own_zero, groups * sizeof *zero_point);
      evaluate(job, weights, &s);
    }
  }
  for (size_t k = 0; k < n; k++) codes[k] = (uint8_t)kept[k];
  job->objective[row] = best;
}

const aq_row_kernels aq_rows_scalar = {1, feedback, refine};
