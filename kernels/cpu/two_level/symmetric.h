/* two_level/symmetric.h: rows of symmetric grids under two levels of scales, w = d v (q - z), as ggml's Q3_K and Q6_K have
 * them: one half float d a superblock, a whole number v a group. arrowquant.h says how they are stored. Plain
 * loops: each instruction set compiles them again, with the same order of additions. */
#ifndef AQ_SYMMETRIC_H
#define AQ_SYMMETRIC_H

#include "kernels.h"

/* Super scales tried for given scales: (largest v + k / 4) / largest scale, |k| <= this. */
#define AQ_SYMMETRIC_STEPS 2
/* Times that codes and scales are chosen for each other: fewer codes gain nothing from a second one. */
#define AQ_SYMMETRIC_ROUNDS(job) ((job)->has_signs ? 1 : 2)

/* The groups of one superblock. */
typedef struct {
  float v[AQ_SUPER_GROUPS], zero[AQ_SUPER_GROUPS];
  float wt[AQ_SUPER_GROUPS], tt[AQ_SUPER_GROUPS]; /* sums of u w t and u t t, with t = q - z */
  float step;
  size_t n;
} symmetric_superblock;

static float symmetric_half(float value) { return aq_float_from_half(aq_half_from_float(value)); }

static float symmetric_level(float value, float step, float most) {
  const float v = aq_round_even(value / step);
  return v < most ? v : most;
}

/* The step, a half float, whose multiples are nearest to |scale| in least squares; 0 where there is none. */
static float symmetric_step(const float *scale, size_t n, float most) {
  float values[AQ_SUPER_GROUPS], largest = 0.0f, best = 0.0f, least = __builtin_inff();
  for (size_t i = 0; i < n; i++) {
    values[i] = scale[i] < 0.0f ? -scale[i] : scale[i];
    if (values[i] > largest) largest = values[i];
  }
  if (!(largest > 0.0f)) return 0.0f;
  for (int32_t k = -AQ_SYMMETRIC_STEPS; k <= AQ_SYMMETRIC_STEPS; k++) {
    float step = largest / (most + 0.25f * (float)k), sum = 0.0f, squares = 0.0f, error = 0.0f;
    for (size_t i = 0; i < n; i++) {
      const float v = symmetric_level(values[i], step, most);
      sum += v * values[i];
      squares += v * v;
    }
    step = symmetric_half(sum / squares);
    if (!(step > 0.0f)) continue;
    for (size_t i = 0; i < n; i++) {
      const float d = values[i] - step * symmetric_level(values[i], step, most);
      error += d * d;
    }
    if (error < least) {
      least = error;
      best = step;
    }
  }
  return best;
}

/* Partial sums, so that compilers need not keep one order of all additions. */
#define AQ_SUM_LANES 8

/* A group's weights: their part of the sums, or their codes. */
static inline void symmetric_sum_lanes(const float *weights, const float *column_weights, size_t n, float inverse, float zero,
                             float most, float *restrict wt, float *restrict tt) {
  for (size_t i = 0; i < n; i++) {
    const float t = aq_clamped_code(weights[i] * inverse + zero, most) - zero;
    const float ut = column_weights ? column_weights[i] * t : t;
    wt[i] += ut * weights[i];
    tt[i] += ut * t;
  }
}

/* The sums of a row's superblock, from column `col` on, that tell better scales. */
static void symmetric_sums(const aq_symmetric_job *job, const float *weights, size_t col, symmetric_superblock *s) {
  const float *columns = job->column_weights;
  for (size_t g = 0; g < s->n; g++) {
    const size_t begin = col + g * job->group_size, end = aq_min_size(begin + job->group_size, job->cols);
    const float step = s->step * s->v[g], inverse = step > 0.0f ? 1.0f / step : 0.0f, zero = s->zero[g];
    float wt[AQ_SUM_LANES] = {0}, tt[AQ_SUM_LANES] = {0};
    size_t i = begin;
    for (; i + AQ_SUM_LANES <= end; i += AQ_SUM_LANES)
      if (columns)
        symmetric_sum_lanes(weights + i, columns + i, AQ_SUM_LANES, inverse, zero, job->most, wt, tt);
      else
        symmetric_sum_lanes(weights + i, 0, AQ_SUM_LANES, inverse, zero, job->most, wt, tt);
    symmetric_sum_lanes(weights + i, columns ? columns + i : 0, end - i, inverse, zero, job->most, wt, tt);
    s->wt[g] = s->tt[g] = 0.0f;
    for (size_t lane = 0; lane < AQ_SUM_LANES; lane++) {
      s->wt[g] += wt[lane];
      s->tt[g] += tt[lane];
    }
  }
}

static void symmetric_codes(const aq_symmetric_job *job, const float *weights, size_t col, const symmetric_superblock *s,
                            uint8_t *codes) {
  for (size_t g = 0; g < s->n; g++) {
    const size_t begin = col + g * job->group_size, end = aq_min_size(begin + job->group_size, job->cols);
    const float step = s->step * s->v[g], inverse = step > 0.0f ? 1.0f / step : 0.0f, zero = s->zero[g];
    for (size_t i = begin; i < end; i++)
      codes[i] = (uint8_t)(int32_t)aq_clamped_code(weights[i] * inverse + zero, job->most);
  }
}

/* The best step for the codes and levels, then the best levels for the codes and the step. */
static void symmetric_refit(const aq_symmetric_job *job, symmetric_superblock *s) {
  float top = 0.0f, bottom = 0.0f;
  for (size_t g = 0; g < s->n; g++) {
    top += s->v[g] * s->wt[g];
    bottom += s->v[g] * s->v[g] * s->tt[g];
  }
  const float step = bottom > 0.0f ? symmetric_half(top / bottom) : 0.0f;
  if (step > 0.0f) s->step = step;
  for (size_t g = 0; g < s->n; g++) {
    if (!(s->tt[g] > 0.0f) || !(s->step > 0.0f)) continue;
    const float v = symmetric_level(s->wt[g], s->step * s->tt[g], job->most_sub);
    s->v[g] = v > 0.0f ? v : 0.0f;
  }
}

/* Scales whose codes cover the groups of a superblock; where they have signs, the largest weight is code 0. */
static void symmetric_ranges(const aq_symmetric_job *job, const float *weights, size_t col, size_t n, float *scale) {
  for (size_t g = 0; g < n; g++) {
    const size_t begin = col + g * job->group_size, end = aq_min_size(begin + job->group_size, job->cols);
    float least = 0.0f, most = 0.0f;
    for (size_t i = begin; i < end; i++) {
      least = weights[i] < least ? weights[i] : least;
      most = weights[i] > most ? weights[i] : most;
    }
    scale[g] = (-least > most ? -least : job->has_signs ? -most : most) / job->zero;
  }
}

static int32_t symmetric_rows(const aq_symmetric_job *job, size_t row_begin, size_t row_end) {
  const size_t each = AQ_SEGMENT / job->group_size;
  for (size_t row = row_begin; row < row_end; row++) {
    const float *weights = job->weights ? job->weights + row * job->cols : 0;
    for (size_t super = 0; super < job->supers; super++) {
      const size_t first = row * job->groups + super * each, at = row * job->supers + super;
      symmetric_superblock s = {.n = aq_min_size(each, job->groups - super * each)};
      float ranges[AQ_SUPER_GROUPS];
      const float *scales = job->scale ? job->scale + first : ranges;
      if (!job->scale) symmetric_ranges(job, weights, super * AQ_SEGMENT, s.n, ranges);
      s.step = symmetric_step(scales, s.n, job->most_sub);
      for (size_t g = 0; g < s.n; g++) {
        const float scale = scales[g];
        s.v[g] = s.step > 0.0f ? symmetric_level(scale < 0.0f ? -scale : scale, s.step, job->most_sub) : 0.0f;
        s.zero[g] = job->has_signs && scale < 0.0f ? job->zero - 1.0f : job->zero;
      }
      for (int32_t round = 0; weights && round < AQ_SYMMETRIC_ROUNDS(job); round++) {
        symmetric_sums(job, weights, super * AQ_SEGMENT, &s);
        symmetric_refit(job, &s);
      }
      if (weights) symmetric_codes(job, weights, super * AQ_SEGMENT, &s, job->codes + row * job->cols);
      const uint16_t minimum = aq_half_from_float(job->has_signs ? s.step : s.step * job->zero);
      if ((minimum & 0x7c00u) == 0x7c00u) return AQ_E_RANGE;
      job->super_scale[at] = aq_half_from_float(s.step);
      job->super_min[at] = minimum;
      for (size_t g = 0; g < s.n; g++) {
        job->sub_scale[first + g] = (uint8_t)s.v[g];
        job->sub_min[first + g] = (uint8_t)(job->has_signs ? s.v[g] * s.zero[g] : s.v[g]);
      }
    }
  }
  return AQ_OK;
}

#endif
