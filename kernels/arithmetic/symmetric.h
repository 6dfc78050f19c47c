/* symmetric.h: symmetric grids under two levels of scales, w = d v (q - z): one half float d a superblock, a
 * whole number v a group. arrowquant.h says how they are stored. */
#ifndef AQ_SYMMETRIC_ARITHMETIC_H
#define AQ_SYMMETRIC_ARITHMETIC_H

#include "two_level.h"

/* Super scales tried for given scales: (largest v + k / 4) / largest scale, |k| <= this. */
#define AQ_SYMMETRIC_STEPS 2
/* Times that codes and scales are chosen for each other: fewer codes gain nothing from a second one. */
#define AQ_SYMMETRIC_ROUNDS(grid) ((grid).has_signs ? 1 : 2)

typedef struct {
  float most;     /* largest code */
  float zero;     /* z of a group with a positive scale */
  float most_sub; /* largest v */
  int has_signs;  /* a group may have a negative scale: then z is one less and its codes are turned round */
} aq_symmetric_grid;

AQ_FUNCTION int aq_symmetric_bits_allowed(int32_t bits) { return bits == 3 || bits == 8; }

AQ_FUNCTION aq_symmetric_grid aq_symmetric_grid_of(int32_t bits) {
  const aq_symmetric_grid three = {7.0f, 4.0f, 31.0f, 1}, six = {63.0f, 32.0f, 127.0f, 0};
  return bits == 3 ? three : six;
}

AQ_FUNCTION float aq_symmetric_level(float value, float step, float most_sub) {
  const float v = aq_round_even(value / step);
  return v < most_sub ? v : most_sub;
}

/* The level of a group that begins with a scale. */
AQ_FUNCTION float aq_symmetric_first_level(float scale, float step, float most_sub) {
  return step > 0.0f ? aq_symmetric_level(scale < 0.0f ? -scale : scale, step, most_sub) : 0.0f;
}

AQ_FUNCTION float aq_symmetric_zero(aq_symmetric_grid grid, float scale) {
  return grid.has_signs && scale < 0.0f ? grid.zero - 1.0f : grid.zero;
}

/* The scale whose codes cover weights from -least to most; where scales have signs, the largest weight is
 * code 0. */
AQ_FUNCTION float aq_symmetric_range(aq_symmetric_grid grid, float least, float most) {
  const float inverse = 1.0f / grid.zero; /* exact: a power of two */
  return (least > most ? least : grid.has_signs ? -most : most) * inverse;
}

/* A weight's code is that of w * inverse + z. */
AQ_FUNCTION float aq_symmetric_inverse(float scale) { return scale > 0.0f ? 1.0f / scale : 0.0f; }

/* The best step for the levels and codes of n groups; `step` where there is none. wt and tt are sums of
 * u w t and u t t, with t = q - z. */
AQ_FUNCTION float aq_symmetric_step_for(const float *v, const float *wt, const float *tt, size_t n, float step) {
  float top = 0.0f, bottom = 0.0f;
  for (size_t g = 0; g < n; g++) {
    top += v[g] * wt[g];
    bottom += v[g] * v[g] * tt[g];
  }
  const float better = bottom > 0.0f ? aq_round_half(top / bottom) : 0.0f;
  return better > 0.0f ? better : step;
}

/* The best level for a group's codes and the step; v where there is none. */
AQ_FUNCTION float aq_symmetric_level_for(float v, float wt, float tt, float step, float most_sub) {
  if (!(tt > 0.0f) || !(step > 0.0f)) return v;
  const float better = aq_symmetric_level(wt, step * tt, most_sub);
  return better > 0.0f ? better : 0.0f;
}

/* What is stored of a superblock beside its step, and of a group beside v. */
AQ_FUNCTION float aq_symmetric_super_min(aq_symmetric_grid grid, float step) {
  return grid.has_signs ? step : step * grid.zero;
}
AQ_FUNCTION uint8_t aq_symmetric_sub_min(aq_symmetric_grid grid, float v, float zero) {
  return (uint8_t)(grid.has_signs ? v * zero : v);
}

#endif
