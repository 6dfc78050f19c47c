/* two_level/symmetric.h: rows of symmetric grids under two levels of scales, arithmetic/symmetric.h. Plain
 * loops: each instruction set compiles them again, with the same order of additions. */
#ifndef AQ_SYMMETRIC_H
#define AQ_SYMMETRIC_H

#include "kernels.h"

/* The groups of one superblock. */
typedef struct {
  float v[AQ_SUPER_GROUPS], zero[AQ_SUPER_GROUPS];
  float wt[AQ_SUPER_GROUPS], tt[AQ_SUPER_GROUPS]; /* sums of u w t and u t t, with t = q - z */
  float step;
  size_t n;       /* groups */
  size_t columns; /* and their columns, from `first` on */
  size_t first;
} symmetric_superblock;

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

/* The step, a half float, whose multiples are nearest to |scale| in least squares; infinite where none is
 * large enough, 0 where none is small enough. */
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
    step = aq_round_half(symmetric_total(&products) / symmetric_total(&squares));
    if (!(step > 0.0f)) continue;
    if (best == 0.0f) best = step; /* infinite: it has no error that is less */
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
  return (symmetric_coding){aq_symmetric_inverse(s->step * s->v[g]), s->zero[g], job->grid.most};
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
  s->step = aq_symmetric_step_for(s->v, s->wt, s->tt, s->n, s->step);
  for (size_t g = 0; g < s->n; g++)
    s->v[g] = aq_symmetric_level_for(s->v[g], s->wt[g], s->tt[g], s->step, job->grid.most_sub);
}

/* Scales whose codes cover the groups of a superblock. */
static void symmetric_ranges(const aq_symmetric_job *job, const float *weights, const symmetric_superblock *s,
                             float *scale) {
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
    scale[g] = aq_symmetric_range(job->grid, least, most);
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
      s.step = symmetric_step(scales, s.n, job->grid.most_sub);
      for (size_t g = 0; g < s.n; g++) {
        s.v[g] = aq_symmetric_first_level(scales[g], s.step, job->grid.most_sub);
        s.zero[g] = aq_symmetric_zero(job->grid, scales[g]);
      }
      if (job->weights) {
        uint8_t codes[AQ_SEGMENT];
        for (int32_t round = 0; round < AQ_SYMMETRIC_ROUNDS(job->grid); round++) {
          symmetric_sums(job, weights, &s);
          symmetric_refit(job, &s);
        }
        symmetric_codes(job, weights, &s, codes);
        job->kernels->pack_row(codes, s.columns, job->bits, job->packed + row * words + col / 32 * (size_t)job->bits);
      }
      const uint16_t minimum = aq_half_from_float(aq_symmetric_super_min(job->grid, s.step));
      if ((minimum & 0x7c00u) == 0x7c00u) return AQ_E_RANGE;
      job->super_scale[at] = aq_half_from_float(s.step);
      job->super_min[at] = minimum;
      for (size_t g = 0; g < s.n; g++) {
        job->sub_scale[first + g] = (uint8_t)s.v[g];
        job->sub_min[first + g] = aq_symmetric_sub_min(job->grid, s.v[g], s.zero[g]);
      }
    }
  }
  return AQ_OK;
}

#endif
