/* two_level.h: quantizing a superblock with two-level scales, AQ_SEGMENT columns of a row whose groups'
 * scales and minima are whole multiples of two half floats:
 *
 *     w = (super_scale * sub_scale) * q - super_min * sub_min
 * in float32: three products, each rounded, then minus
 *
 * The layout is that of ggml's Q2_K and Q4_K, and so is the search's objective. */
#ifndef AQ_TWO_LEVEL_ARITHMETIC_H
#define AQ_TWO_LEVEL_ARITHMETIC_H

#include "group.h"

/* Groups of a superblock: at least 16 columns each. */
#define AQ_SUPER_GROUPS (AQ_SEGMENT / 16)

/* Ranges tried for each group, half of them clipped on both sides, half beginning at the minimum. */
#define AQ_TWO_LEVEL_STEPS 12
/* Rounds of least squares after the best of them. */
#define AQ_TWO_LEVEL_REFITS 2
/* Super scales tried when the groups' real scales are fitted: (largest code + k / 4) / largest scale, |k|
 * <= this. */
#define AQ_SUPER_STEPS 4
/* Rounds that choose sub-codes for given super scales and then fit the super scales to them. */
#define AQ_TWO_LEVEL_ROUNDS 2
/* A column weight counts at least this part of the superblock's largest, so that every group has a
 * solution. */
#define AQ_LEAST_IMPORTANCE 0x1p-20f

/* Nearest code of `value` in steps of `step`; 0 where there is no step. */
AQ_FUNCTION float aq_nearest_code(float value, float step, float code_max) {
  return step > 0.0f ? aq_clamped_code(value / step, code_max) : 0.0f;
}

/* The smallest code whose multiple of `step` is not below `value`. */
AQ_FUNCTION float aq_code_above(float value, float step, float code_max) {
  if (!(step > 0.0f)) return 0.0f;
  float code = aq_round_even(value / step);
  if (code * step < value) code += 1.0f;
  return code < code_max ? code : code_max;
}

/* A group of a superblock. t stands for w - minimum. */
typedef struct {
  const float *w, *u; /* u: importance of each column */
  size_t n;
  float minimum; /* at most 0 */
  float h, ht;   /* sum u, sum u t */
} aq_sub_group;

typedef struct {
  float hq, hqq, htq;
} aq_code_sums;

/* The codes of t * inverse + offset. */
AQ_FUNCTION aq_code_sums aq_sub_group_sums(const aq_sub_group *g, float inverse, float offset, float code_max) {
  aq_code_sums s = {0.0f, 0.0f, 0.0f};
  for (size_t i = 0; i < g->n; i++) {
    const float t = g->w[i] - g->minimum, q = aq_clamped_code(t * inverse + offset, code_max);
    const float hq = g->u[i] * q;
    s.hq += hq;
    s.hqq += hq * q;
    s.htq += hq * t;
  }
  return s;
}

/* How much of sum u t^2 the values t = scale q + offset explain. */
AQ_FUNCTION float aq_sub_explained(const aq_sub_group *g, const aq_code_sums *s, float scale, float offset) {
  return 2.0f * (scale * s->htq + offset * g->ht) -
         (scale * (scale * s->hqq + 2.0f * (offset * s->hq)) + offset * (offset * g->h));
}

/* Least squares of scale and offset for these codes, with minimum + offset <= 0. 0 if there is no
 * solution. */
AQ_FUNCTION int aq_sub_solve(const aq_sub_group *g, const aq_code_sums *s, float *scale, float *offset) {
  const float determinant = g->h * s->hqq - s->hq * s->hq;
  *scale = (g->h * s->htq - g->ht * s->hq) / determinant;
  *offset = (g->ht - *scale * s->hq) / g->h;
  if (g->minimum + *offset > 0.0f) {
    *offset = -g->minimum;
    *scale = (s->htq + g->minimum * s->hq) / s->hqq;
  }
  return determinant > 0.0f && *scale > 0.0f;
}

/* Range `step` of a group: t * inverse + offset is a position among the codes, where t = w - minimum,
 * inverse = factor / (maximum - minimum) and offset = minimum * shift * inverse. */
AQ_FUNCTION void aq_two_level_step(int32_t step, float code_max, float *factor, float *shift) {
  if (step & 1) {
    const float clipped = (float)step * (0.7f / AQ_TWO_LEVEL_STEPS);
    *factor = code_max / (1.0f - clipped);
    *shift = clipped;
  } else {
    *factor = code_max - 0.9f + (float)step * (1.8f / (AQ_TWO_LEVEL_STEPS - 1));
    *shift = 0.0f;
  }
}

typedef struct {
  float scale, minimum; /* real: w = scale q - minimum */
  aq_code_sums sums;
} aq_sub_fit;

/* The best real scale and minimum of a group, range = maximum - minimum > 0; `fit` begins as all zeros'
 * and keeps that if nothing is better. */
AQ_FUNCTION void aq_search_sub_group(const aq_sub_group *g, float range, float code_max, aq_sub_fit *fit) {
  float best = -1.0f, best_offset = 0.0f;
  for (int32_t step = 0; step < AQ_TWO_LEVEL_STEPS + AQ_TWO_LEVEL_REFITS; step++) {
    float inverse, offset, scale, shift;
    if (step < AQ_TWO_LEVEL_STEPS) {
      aq_two_level_step(step, code_max, &scale, &shift);
      inverse = scale / range;
      offset = g->minimum * shift * inverse;
    } else {
      if (!(fit->scale > 0.0f)) break;
      inverse = 1.0f / fit->scale;
      offset = -best_offset * inverse;
    }
    const aq_code_sums s = aq_sub_group_sums(g, inverse, offset, code_max);
    if (!aq_sub_solve(g, &s, &scale, &shift)) continue;
    const float value = aq_sub_explained(g, &s, scale, shift);
    if (value > best) {
      best = value;
      best_offset = shift;
      fit->scale = scale;
      fit->minimum = -(g->minimum + shift);
      fit->sums = s;
    }
  }
}

/* Half-precision step for real values of a superblock's groups, by weighted least squares among several. */
AQ_FUNCTION float aq_fit_super(const float *values, const float *weights, size_t n, float code_max) {
  float largest = 0.0f, best = -1.0f, super = 0.0f;
  for (size_t i = 0; i < n; i++) largest = values[i] > largest ? values[i] : largest;
  for (int32_t k = -AQ_SUPER_STEPS; k <= AQ_SUPER_STEPS; k++) {
    const float inverse = (code_max + 0.25f * (float)k) / largest;
    float hcv = 0.0f, hcc = 0.0f;
    for (size_t i = 0; i < n; i++) {
      const float code = aq_clamped_code(values[i] * inverse, code_max);
      const float hc = weights[i] * code;
      hcv += hc * values[i];
      hcc += hc * code;
    }
    const float scale = hcv / hcc, value = hcv * scale;
    if (value > best) {
      best = value;
      super = scale;
    }
  }
  if (!(largest > 0.0f)) return 0.0f;
  super = super < AQ_HALF_MAX ? super : AQ_HALF_MAX;
  super = aq_round_half(super);
  return super > AQ_HALF_MIN ? super : AQ_HALF_MIN;
}

/* The step nearest to given real values of a superblock's groups, weighted, or equally where weights are
 * null; with the sign of their weighted sum, because codes have none. Their codes; of a value with the other
 * sign 0. */
AQ_FUNCTION float aq_fit_levels(const float *given, const float *given_weights, size_t n, float sub_max,
                                uint8_t codes[AQ_SUPER_GROUPS]) {
  float values[AQ_SUPER_GROUPS], weights[AQ_SUPER_GROUPS], total = 0.0f;
  for (size_t i = 0; i < n; i++) {
    weights[i] = given_weights ? given_weights[i] : 1.0f;
    total += weights[i] * given[i];
  }
  const float sign = total < 0.0f ? -1.0f : 1.0f;
  for (size_t i = 0; i < n; i++) values[i] = given[i] * sign;
  const float step = aq_fit_super(values, weights, n, sub_max);
  for (size_t i = 0; i < n; i++) codes[i] = (uint8_t)aq_nearest_code(values[i], step, sub_max);
  return step * sign;
}

/* The two steps of a superblock. */
typedef struct {
  float scale, minimum;
} aq_super_steps;

/* What groups add to the least squares of the two steps, with a = sub_scale q and b = sub_min: sums of
 * these products, each weighted. */
enum { AQ_EXPLAINED, AQ_AA, AQ_AB, AQ_BB, AQ_AW, AQ_BW, AQ_STEP_SUMS };

typedef struct {
  float sub_scale, sub_min;
  float sums[AQ_STEP_SUMS];
} aq_sub_choice;

/* Sub-codes of a group for given steps: the sub-scale `middle` or one of its neighbours, each with the
 * minimum that suits the group's codes so far, whose sum is *hq. */
AQ_FUNCTION aq_sub_choice aq_choose_sub_codes(const aq_sub_group *g, aq_super_steps steps, float middle, float *hq,
                                              float code_max, float sub_max) {
  aq_sub_choice best = {middle, 0.0f, {-__builtin_inff(), 0.0f, 0.0f, 0.0f, 0.0f, 0.0f}};
  aq_code_sums chosen = {0.0f, 0.0f, 0.0f};
  for (int32_t k = -1; k <= 1; k++) {
    float code = middle + (float)k;
    code = code > 0.0f ? code : 0.0f;
    code = code < sub_max ? code : sub_max;
    const float scale = steps.scale * code;
    const float wanted = (scale * *hq - g->ht) / g->h - g->minimum;
    const float sub_min = aq_nearest_code(wanted, steps.minimum, sub_max);
    const float offset = steps.minimum * sub_min + g->minimum;
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    const aq_code_sums s = aq_sub_group_sums(g, inverse, offset * inverse, code_max);
    const float value = aq_sub_explained(g, &s, scale, -offset);
    if (value > best.sums[AQ_EXPLAINED]) {
      best.sums[AQ_EXPLAINED] = value;
      best.sub_scale = code;
      best.sub_min = sub_min;
      chosen = s;
    }
  }
  const float a = best.sub_scale, b = best.sub_min;
  *hq = chosen.hq;
  best.sums[AQ_AA] = a * (a * chosen.hqq);
  best.sums[AQ_AB] = a * (b * chosen.hq);
  best.sums[AQ_BB] = b * (b * g->h);
  best.sums[AQ_AW] = a * (chosen.htq + g->minimum * chosen.hq);
  best.sums[AQ_BW] = b * (g->ht + g->minimum * g->h);
  return best;
}

/* Steps by least squares of all groups' sums, rounded to half floats. 0 where they are not usable; *steps
 * stays then. */
AQ_FUNCTION int aq_refit_steps(const float sums[AQ_STEP_SUMS], aq_super_steps *steps) {
  const float aa = sums[AQ_AA], ab = sums[AQ_AB], bb = sums[AQ_BB], aw = sums[AQ_AW], bw = sums[AQ_BW];
  const float determinant = aa * bb - ab * ab;
  float scale = (bb * aw - ab * bw) / determinant, minimum = (ab * aw - aa * bw) / determinant;
  if (!(determinant > 0.0f)) {
    scale = aw / aa;
    minimum = steps->minimum;
  }
  scale = aq_round_half(scale);
  minimum = aq_round_half(minimum);
  if (!(scale > 0.0f && scale <= AQ_HALF_MAX && minimum >= 0.0f && minimum <= AQ_HALF_MAX)) return 0;
  steps->scale = scale;
  steps->minimum = minimum;
  return 1;
}

#endif
