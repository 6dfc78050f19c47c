/* activation.h: activations as codes, x = scale (code - zero_point) with whole codes and zero points from 0
 * to 2^bits - 1, for every library. */
#ifndef AQ_ACTIVATION_H
#define AQ_ACTIVATION_H

#include "group.h"

/* Limits of x / scale before it is rounded: beyond them the code is 0 or the largest whatever the zero
 * point. */
#define AQ_ENCODE_LIMIT 1024.0f

/* x / scale to nearest even + zero_point, within 0 and code_max: the code, a whole number. */
AQ_FUNCTION float aq_activation_code(float x, float scale, float zero_point, float code_max) {
  float position = x / scale;
  position = position < -AQ_ENCODE_LIMIT ? -AQ_ENCODE_LIMIT : position;
  position = position > AQ_ENCODE_LIMIT ? AQ_ENCODE_LIMIT : position;
  position = aq_round_even(position) + zero_point;
  position = position < 0.0f ? 0.0f : position;
  return position > code_max ? code_max : position;
}

/* Whether a scale and a zero point can be given. */
AQ_FUNCTION int aq_activation_grid_allowed(float scale, int32_t zero_point, int32_t bits) {
  return scale >= 0x1p-126f && scale < __builtin_inff() && zero_point >= 0 && zero_point < 1 << bits;
}

typedef struct {
  float scale, zero_point;
} aq_activation_grid;

/* The smallest scale with a whole zero point whose range covers minimum <= 0 and maximum >= 0. A range that
 * lies almost on one side leaves the other at least one code. */
AQ_FUNCTION aq_activation_grid aq_covering_grid(float minimum, float maximum, int32_t bits) {
  const double top = (double)((1 << bits) - 1), below = -(double)minimum, above = (double)maximum;
  if (minimum == 0.0f && maximum == 0.0f) {
    const aq_activation_grid one = {1.0f, 0.0f};
    return one;
  }
  double ideal = top * (below / (below + above)), best = -1.0, zero = 0.0;
  ideal = ideal < top ? ideal : top;
  const double whole = (double)(int32_t)ideal;
  for (int up = 0; up < 2; up++) {
    const double own = up && whole < ideal ? whole + 1.0 : whole;
    if ((own == 0.0 && below > 0.0) || (own == top && above > 0.0)) continue;
    const double low = own == 0.0 ? 0.0 : below / own, high = own == top ? 0.0 : above / (top - own);
    const double scale = low > high ? low : high;
    if (best >= 0.0 && scale >= best) continue;
    best = scale;
    zero = own;
  }
  if (best < 0.0) {
    const double far = ideal < 1.0 ? above / (top - 1.0) : below / (top - 1.0), near = ideal < 1.0 ? below : above;
    best = near > far ? near : far;
    zero = ideal < 1.0 ? 1.0 : top - 1.0;
  }
  aq_activation_grid grid = {(float)best, (float)zero};
  if ((double)grid.scale < best) grid.scale = (float)(best * (1.0 + 0x1p-23));
  if (grid.scale < 0x1p-126f) grid.scale = 0x1p-126f;
  return grid;
}

#endif
