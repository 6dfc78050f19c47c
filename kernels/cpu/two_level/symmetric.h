/* two_level/symmetric.h: rows of symmetric grids under two levels of scales, w = d v (q - z), as ggml's Q3_K
 * and Q6_K have them: one half float d a superblock, a whole number v a group. arrowquant.h says how they are
 * stored. Plain loops: each instruction set compiles them again, with the same order of additions. */
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
  size_t n;       /* groups */
  size_t columns; /* and their columns, from `first` on */
  size_t first;
} symmetric_superblock;

static float symmetric_half(float value) { return aq_float_from_half(aq_half_from_float(value)); }

/* Eight floats and their masks: compilers make them of what an instruction set has. */
typedef float eight __attribute__((vector_size(32)));
typedef int32_t eight_int __attribute__((vector_size(32)));
typedef uint8_t eight_bytes __attribute__((vector_size(8)));
#define AQ_LANES 8

AQ_INLINE void symmetric_load(const float *from, eight *to) { __builtin_memcpy(to, from, sizeof *to); }

/* Half of the lanes each. */
typedef float four __attribute__((vector_size(16)));
typedef int32_t four_int __attribute__((vector_size(16)));
AQ_INLINE void symmetric_halves(const eight *x, four *low, four *high) {
  __builtin_memcpy(low, x, sizeof *low);
  __builtin_memcpy(high, (const char *)x + sizeof *low, sizeof *high);
}

/* The sum of the lanes: halves, quarters, then the two that are left. */
AQ_INLINE float symmetric_total(const eight *x) {
  four low, high;
  symmetric_halves(x, &low, &high);
  low += high;
  return (low[0] + low[2]) + (low[1] + low[3]);
}

static float symmetric_level(float value, float step, float most) {
  const float v = aq_round_even(value / step);
  return v < most ? v : most;
}

/* The smaller of each, of numbers. */
AQ_INLINE void symmetric_limit(eight *values, float most) {
  const eight limit = (eight){0} + most;
  const eight_int is_below = *values < limit;
  *values = (eight)(((eight_int)*values & is_below) | ((eight_int)limit & ~is_below));
}

/* The larger of each; `to` where either is NaN. */
AQ_INLINE void symmetric_raise(eight *to, const eight *other) {
  const eight_int is_higher = *other > *to;
  *to = (eight)(((eight_int)*other & is_higher) | ((eight_int)*to & ~is_higher));
}

/* The largest lane. */
AQ_INLINE float symmetric_most(const eight *x) {
  four low, high;
  symmetric_halves(x, &low, &high);
  const four_int is_higher = high > low;
  low = (four)(((four_int)high & is_higher) | ((four_int)low & ~is_higher));
  const float even = low[0] > low[2] ? low[0] : low[2], odd = low[1] > low[3] ? low[1] : low[3];
  return even > odd ? even : odd;
}

/* The levels of eight values. */
AQ_INLINE void symmetric_levels(eight *values, float step, float most) {
  *values = (*values / step + 12582912.0f) - 12582912.0f;
  symmetric_limit(values, most);
}

/* The step, a half float, whose multiples are nearest to |scale| in least squares; 0 where there is none. */
static float symmetric_step(const float *scale, size_t n, float most) {
  float values[AQ_SUPER_GROUPS] = {0}, largest = 0.0f, best = 0.0f, least = __builtin_inff();
  for (size_t i = 0; i < n; i++) {
    values[i] = scale[i] < 0.0f ? -scale[i] : scale[i];
    if (values[i] > largest) largest = values[i];
  }
  if (!(largest > 0.0f)) return 0.0f;
  eight low, high;
  symmetric_load(values, &low);
  symmetric_load(values + AQ_LANES, &high);
  for (int32_t k = -AQ_SYMMETRIC_STEPS; k <= AQ_SYMMETRIC_STEPS; k++) {
    float step = largest / (most + 0.25f * (float)k);
    eight a = low, b = high;
    symmetric_levels(&a, step, most);
    symmetric_levels(&b, step, most);
    const eight products = a * low + b * high, squares = a * a + b * b;
    step = symmetric_half(symmetric_total(&products) / symmetric_total(&squares));
    if (!(step > 0.0f)) continue;
    a = low;
    b = high;
    symmetric_levels(&a, step, most);
    symmetric_levels(&b, step, most);
    a = low - step * a;
    b = high - step * b;
    const eight errors = a * a + b * b;
    const float error = symmetric_total(&errors);
    if (error < least) {
      least = error;
      best = step;
    }
  }
  return best;
}

/* How a group's weights become codes: w * inverse + zero, clamped, to nearest. */
typedef struct {
  float inverse, zero, most;
} symmetric_coding;

static symmetric_coding symmetric_coding_of(const aq_symmetric_job *job, const symmetric_superblock *s, size_t g) {
  const float step = s->step * s->v[g];
  return (symmetric_coding){step > 0.0f ? 1.0f / step : 0.0f, s->zero[g], job->most};
}

/* aq_clamped_code of eight weights. */
AQ_INLINE void symmetric_encode(const float *weights, symmetric_coding c, eight *codes) {
  eight w;
  symmetric_load(weights, &w);
  eight position = w * c.inverse + c.zero;
  position = (eight)((eight_int)position & (position > 0.0f));
  symmetric_limit(&position, c.most);
  *codes = (position + 12582912.0f) - 12582912.0f;
}

/* The sums of a row's superblock, from column `col` on, that tell better scales. */
static void symmetric_sums(const aq_symmetric_job *job, const float *weights, symmetric_superblock *s) {
  const float *columns = job->column_weights ? job->column_weights + s->first : 0;
  for (size_t g = 0; g < s->n; g++) {
    const size_t begin = g * job->group_size, end = aq_min_size(begin + job->group_size, s->columns);
    const symmetric_coding c = symmetric_coding_of(job, s, g);
    eight wt = {0}, tt = {0}, t, w, u;
    size_t i = begin;
    for (; i + AQ_LANES <= end; i += AQ_LANES) {
      symmetric_encode(weights + i, c, &t);
      symmetric_load(weights + i, &w);
      t -= c.zero;
      if (columns) {
        symmetric_load(columns + i, &u);
        u *= t;
      } else {
        u = t;
      }
      wt += u * w;
      tt += u * t;
    }
    for (size_t lane = 0; i < end; i++, lane++) {
      const float q = aq_clamped_code(weights[i] * c.inverse + c.zero, c.most) - c.zero;
      const float uq = columns ? columns[i] * q : q;
      wt[lane] += uq * weights[i];
      tt[lane] += uq * q;
    }
    s->wt[g] = symmetric_total(&wt);
    s->tt[g] = symmetric_total(&tt);
  }
}

static void symmetric_codes(const aq_symmetric_job *job, const float *weights, const symmetric_superblock *s,
                            uint8_t *codes) {
  for (size_t g = 0; g < s->n; g++) {
    const size_t begin = g * job->group_size, end = aq_min_size(begin + job->group_size, s->columns);
    const symmetric_coding c = symmetric_coding_of(job, s, g);
    size_t i = begin;
    for (; i + AQ_LANES <= end; i += AQ_LANES) {
      eight position;
      symmetric_encode(weights + i, c, &position);
      const eight_bytes own = __builtin_convertvector(__builtin_convertvector(position, eight_int), eight_bytes);
      __builtin_memcpy(codes + i, &own, sizeof own);
    }
    for (; i < end; i++) codes[i] = (uint8_t)(int32_t)aq_clamped_code(weights[i] * c.inverse + c.zero, c.most);
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

/* Scales whose codes cover the groups of a superblock; where they have signs, the largest weight is code
 * 0. */
static void symmetric_ranges(const aq_symmetric_job *job, const float *weights, const symmetric_superblock *s,
                             float *scale) {
  const float inverse = 1.0f / job->zero; /* exact: a power of two */
  for (size_t g = 0; g < s->n; g++) {
    const size_t begin = g * job->group_size, end = aq_min_size(begin + job->group_size, s->columns);
    eight below = {0}, above = {0}, w;
    size_t i = begin;
    for (; i + AQ_LANES <= end; i += AQ_LANES) {
      symmetric_load(weights + i, &w);
      symmetric_raise(&above, &w);
      w = -w;
      symmetric_raise(&below, &w);
    }
    float least = symmetric_most(&below), most = symmetric_most(&above);
    for (; i < end; i++) {
      least = -weights[i] > least ? -weights[i] : least;
      most = weights[i] > most ? weights[i] : most;
    }
    scale[g] = (least > most ? least : job->has_signs ? -most : most) * inverse;
  }
}

static int32_t symmetric_rows(const aq_symmetric_job *job, size_t row_begin, size_t row_end) {
  const size_t each = AQ_SEGMENT / job->group_size;
  for (size_t row = row_begin; row < row_end; row++) {
    const size_t words = aq_words_of(job->cols, job->bits);
    for (size_t super = 0; super < job->supers; super++) {
      const size_t first = row * job->groups + super * each, at = row * job->supers + super, col = super * AQ_SEGMENT;
      symmetric_superblock s = {.n = aq_min_size(each, job->groups - super * each),
                                .columns = aq_min_size(AQ_SEGMENT, job->cols - col), .first = col};
      float weights[AQ_SEGMENT], ranges[AQ_SUPER_GROUPS];
      if (job->weights) job->kernels->load(job->weights, job->dtype, row * job->cols + col, s.columns, weights);
      const float *scales = job->scale ? job->scale + first : ranges;
      if (!job->scale) symmetric_ranges(job, weights, &s, ranges);
      s.step = symmetric_step(scales, s.n, job->most_sub);
      for (size_t g = 0; g < s.n; g++) {
        const float scale = scales[g];
        s.v[g] = s.step > 0.0f ? symmetric_level(scale < 0.0f ? -scale : scale, s.step, job->most_sub) : 0.0f;
        s.zero[g] = job->has_signs && scale < 0.0f ? job->zero - 1.0f : job->zero;
      }
      if (job->weights) {
        uint8_t codes[AQ_SEGMENT];
        for (int32_t round = 0; round < AQ_SYMMETRIC_ROUNDS(job); round++) {
          symmetric_sums(job, weights, &s);
          symmetric_refit(job, &s);
        }
        symmetric_codes(job, weights, &s, codes);
        job->kernels->pack_row(codes, s.columns, job->bits, job->packed + row * words + col / 32 * (size_t)job->bits);
      }
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
