/* group.h: scale and zero point of one group from its minimum and maximum, the part that is scalar in every
 * instruction set and on the GPU. Both outputs are values that a half float holds exactly. */
#ifndef AQ_GROUP_H
#define AQ_GROUP_H

#include "half.h"

/* Columns that a kernel holds at once: a multiple of every group size and of the 32 codes that fill whole
 * words at any width. Sums over longer groups are sums of segments' sums, in every instruction set. */
#define AQ_SEGMENT 256

#define AQ_HALF_MAX 65504.0f
#define AQ_HALF_MIN 0x1p-24f
#define AQ_HALF_MIN_NORMAL 0x1p-14f

/* Quantization parameters of a group: w = scale (code - zero_point). With an offset the zero point is that of
 * the rounded offset, -offset / scale, a float. */
typedef struct {
  float scale;
  float zero_point;
} aq_grid;

AQ_FUNCTION float aq_round_half(float value) { return aq_float_from_half(aq_half_from_float(value)); }

/* The zero point nearest to one that is stored: as it is, or as its offset. */
AQ_FUNCTION float aq_round_zero(float zero_point, float scale, int32_t kind) {
  if (kind != AQ_ZERO_POINT_OFFSET) return aq_round_half(zero_point);
  return 0.0f - aq_round_half(0.0f - zero_point * scale) / scale;
}

/* What is stored beside a scale. */
AQ_FUNCTION float aq_stored_zero(aq_grid grid, int32_t kind) {
  return kind == AQ_ZERO_POINT_OFFSET ? 0.0f - grid.scale * grid.zero_point : grid.zero_point;
}

/* The smallest half float >= value, for value >= 0. */
AQ_FUNCTION float aq_round_half_up(float value) {
  uint16_t half = aq_half_from_float(value);
  if (aq_float_from_half(half) < value) half += 1;
  return aq_float_from_half(half);
}

/* Nearest whole number, ties to even, for |value| < 2^22. */
AQ_FUNCTION float aq_round_even(float value) {
  return (value + 12582912.0f) - 12582912.0f;
}

/* The code nearest to a position, ties to even. */
AQ_FUNCTION float aq_clamped_code(float position, float code_max) {
  position = position > 0.0f ? position : 0.0f;
  position = position < code_max ? position : code_max;
  return aq_round_even(position);
}

/* The code of a weight. */
AQ_FUNCTION uint32_t aq_encode(float weight, aq_grid grid, float code_max) {
  return (uint32_t)aq_clamped_code(weight / grid.scale + grid.zero_point, code_max);
}

AQ_FUNCTION float aq_decode(uint32_t code, aq_grid grid) { return grid.scale * ((float)code - grid.zero_point); }

AQ_FUNCTION double aq_abs_double(double value) { return value < 0 ? -value : value; }

/* Scale and zero point that decode to `value` exactly where the search meets such a pair, else to the nearest
 * it met. A half-precision scale times (code - half-precision zero point) reaches most float32 values
 * although neither factor has 24 bits; see docs/decisions.md. */
AQ_FUNCTION int32_t aq_constant_grid(float value, int32_t bits, int32_t kind, aq_grid *grid) {
  const int32_t code_max = (1 << bits) - 1;
  const float magnitude = value < 0 ? -value : value;
  if (value == 0.0f) {
    grid->scale = 1.0f;
    grid->zero_point = kind == AQ_ZERO_POINT_SYMMETRIC ? (float)(1 << (bits - 1)) : 0.0f;
    return AQ_OK;
  }
  if (kind == AQ_ZERO_POINT_OFFSET) { /* code 0 of steps so wide that rounding reaches no other */
    if (magnitude > AQ_HALF_MAX) return AQ_E_RANGE;
    grid->scale = aq_round_half_up(magnitude);
    grid->zero_point = aq_round_zero(0.0f - value / grid->scale, grid->scale, kind);
    return AQ_OK;
  }
  double best = __builtin_inf();
  if (kind != AQ_ZERO_POINT_REAL) {
    /* value = scale * step for a whole number of steps above or below the zero point */
    const int32_t zero = kind == AQ_ZERO_POINT_SYMMETRIC ? 1 << (bits - 1) : (value < 0 ? code_max : 0);
    for (int32_t code = 0; code <= code_max && best > 0; code++) {
      if (code == zero) continue;
      aq_grid candidate = {aq_round_half(value / (float)(code - zero)), (float)zero};
      if (!(candidate.scale <= AQ_HALF_MAX && candidate.scale >= -AQ_HALF_MAX) || candidate.scale == 0) continue;
      double error = aq_abs_double((double)aq_decode((uint32_t)code, candidate) - (double)value);
      if (error < best) {
        best = error;
        *grid = candidate;
      }
    }
    if (best < __builtin_inf()) return AQ_OK;
    if (magnitude > 1.0f) return AQ_E_RANGE;
    grid->scale = 0x1p-24f; /* every step rounds to zero */
    grid->zero_point = (float)zero;
    return AQ_OK;
  }
  const int32_t start = magnitude > AQ_HALF_MAX ? 0x7bff : aq_half_from_float(magnitude);
  const int32_t codes = code_max < 3 ? code_max : 3;
  for (int32_t distance = 0; distance <= 2048 && best > 0; distance++) {
    const int32_t pattern = start + ((distance & 1) ? (distance + 1) / 2 : -(distance / 2));
    if (pattern < 1 || pattern > 0x7bff) continue;
    const float scale = aq_float_from_half((uint16_t)pattern);
    for (int32_t k = 0; k <= codes && best > 0; k++) {
      const int32_t code = (k + 1) & 3; /* 1, 2, 3, 0: a small zero point first */
      aq_grid candidate = {scale, aq_round_half((float)((double)code - (double)value / (double)scale))};
      if (!(candidate.zero_point <= AQ_HALF_MAX && candidate.zero_point >= -AQ_HALF_MAX)) continue;
      /* the code that the encoder will choose, which may be another */
      uint32_t chosen = aq_encode(value, candidate, (float)code_max);
      double error = aq_abs_double((double)aq_decode(chosen, candidate) - (double)value);
      if (error < best) {
        best = error;
        *grid = candidate;
      }
    }
  }
  return best < __builtin_inf() ? AQ_OK : AQ_E_RANGE;
}

/* The smallest half float >= value, for |value| <= 65504. */
AQ_FUNCTION float aq_round_half_above(double value) {
  if (value >= 0) return aq_round_half_up((float)value);
  const uint16_t half = aq_half_from_float((float)-value);
  const float down = aq_float_from_half(half);
  return 0.0f - ((double)down > -value ? aq_float_from_half((uint16_t)(half - 1)) : down);
}

/* A group so small that half floats have no scale as fine as its codes: no weight gets further from itself
 * than 0 is. One of the levels is 0, or the weight nearest to it. */
AQ_FUNCTION aq_grid aq_tiny_grid(float minimum, float maximum) {
  const float low = minimum / AQ_HALF_MIN, high = maximum / AQ_HALF_MIN;
  aq_grid grid = {AQ_HALF_MIN, aq_round_even(0.0f - low)};
  if (minimum >= 0.0f) grid.zero_point = aq_round_half(0.0f - low);
  else if (maximum <= 0.0f) grid.zero_point = aq_round_half(aq_round_even(high - low) - high);
  return grid;
}

/* Narrow groups, whose range is smaller than this part of their distance from 0, get one value: the steps
 * that half-precision zero points allow at that distance are as wide. With a zero point among the codes it is
 * two steps of 8 bits. */
#define AQ_NARROW_REAL 0x1p-14
#define AQ_NARROW_CODE 0x1p-7f
/* Scales tried, one half float after the other. */
#define AQ_FAR_SCALES 1024

/* The finest of the next scales whose codes cover a group far from 0 with a zero point that is a half float:
 * those of large numbers are far apart, and some scales meet one. 0 if there is none. */
AQ_FUNCTION int aq_far_grid(float minimum, float maximum, double code_max, aq_grid *grid) {
  const double range = (double)maximum - (double)minimum;
  const double distance = minimum > 0.0f ? (double)maximum : -(double)minimum;
  if (range <= distance * AQ_NARROW_REAL) return 0;
  const double finest = range / code_max, least = distance / (double)AQ_HALF_MAX;
  const int32_t first = aq_half_from_float(aq_round_half_up((float)(finest > least ? finest : least)));
  for (int32_t pattern = first; pattern < first + AQ_FAR_SCALES && pattern <= 0x7bff; pattern++) {
    const double scale = (double)aq_float_from_half((uint16_t)pattern), wanted = -(double)minimum / scale - 0.5;
    if (!(wanted <= (double)AQ_HALF_MAX && wanted >= -(double)AQ_HALF_MAX)) continue;
    const float zero_point = aq_round_half_above(wanted);
    if ((double)maximum / scale + (double)zero_point > code_max + 0.5) continue;
    grid->scale = (float)scale;
    grid->zero_point = zero_point;
    return 1;
  }
  return 0;
}

/* A group far from 0 with an offset: the half float next below it, and steps that reach its maximum. 0 where
 * one value is as near. */
AQ_FUNCTION int aq_far_offset_grid(float minimum, float maximum, double code_max, aq_grid *grid) {
  if (minimum > AQ_HALF_MAX || minimum < -AQ_HALF_MAX) return 0;
  const float offset = 0.0f - aq_round_half_above(-(double)minimum);
  const double finest = ((double)maximum - (double)offset) / (code_max + 0.5);
  /* the zero point stays below 2^15 */
  const double least = (double)(offset < 0 ? -offset : offset) * 0x1p-15;
  const float scale = aq_round_half_up((float)(finest > least ? finest : least));
  if (!(scale <= AQ_HALF_MAX && (double)scale < (double)maximum - (double)minimum)) return 0;
  grid->scale = scale;
  grid->zero_point = 0.0f - offset / scale;
  return 1;
}

/* Asymmetric with real zero point or offset where the plain formula is not safe: scales below the normal half
 * floats, or data so far from zero that the rounding of the zero point shifts the range by more than a
 * quarter step. The scale grows until codes cover the group again; data nearly constant at that distance gets
 * its middle. */
AQ_FUNCTION int32_t aq_real_grid_slow(float minimum, float maximum, int32_t bits, int32_t kind, aq_grid *grid) {
  const double code_max = (double)((1 << bits) - 1);
  const double range = (double)maximum - (double)minimum;
  if (range / code_max > (double)AQ_HALF_MAX) return AQ_E_RANGE;
  if (range < code_max * (double)AQ_HALF_MIN && minimum > -0x1p-14f && maximum < 0x1p-14f) {
    *grid = aq_tiny_grid(minimum, maximum);
    grid->zero_point = aq_round_zero(grid->zero_point, grid->scale, kind);
    return AQ_OK;
  }
  double wanted = range;
  for (int attempt = 0; attempt < 16; attempt++) {
    float scale = aq_round_half_up((float)(wanted / code_max));
    if (scale > AQ_HALF_MAX) break;
    float zero_point = aq_round_zero((float)(-(double)minimum / (double)scale), scale, kind);
    if (!(zero_point <= AQ_HALF_MAX && zero_point >= -AQ_HALF_MAX)) break;
    double low = -(double)scale * (double)zero_point;
    double high = (double)scale * (code_max - (double)zero_point);
    double below = low - (double)minimum, above = (double)maximum - high;
    double half_step = 0.5 * (double)scale;
    if (below <= half_step && above <= half_step) {
      grid->scale = scale;
      grid->zero_point = zero_point;
      return AQ_OK;
    }
    wanted += (below > 0 ? below : -below) + (above > 0 ? above : 0) + (double)scale * 0x1p-10;
    if (wanted > 4 * range && wanted > 4 * 0x1p-24 * code_max) break;
  }
  if (kind == AQ_ZERO_POINT_REAL ? aq_far_grid(minimum, maximum, code_max, grid)
                                 : aq_far_offset_grid(minimum, maximum, code_max, grid))
    return AQ_OK;
  return aq_constant_grid((float)((double)minimum + range / 2), bits, kind, grid);
}

/* Round to nearest on [minimum, maximum], both finite. */
AQ_FUNCTION int32_t aq_round_grid(float minimum, float maximum, int32_t bits, int32_t kind, aq_grid *grid) {
  const float code_max = (float)((1 << bits) - 1);
  const float half_range = (float)(1 << (bits - 1));
  minimum += 0.0f; /* -0 becomes +0: its sign would show in the zero point */
  if (minimum == maximum) return aq_constant_grid(minimum, bits, kind, grid);
  /* An offset is the value of code 0. */
  if (kind == AQ_ZERO_POINT_OFFSET && !(aq_round_half(minimum) <= AQ_HALF_MAX && aq_round_half(minimum) >= -AQ_HALF_MAX))
    return AQ_E_RANGE;
  if (kind == AQ_ZERO_POINT_REAL || kind == AQ_ZERO_POINT_OFFSET) {
    float scale = aq_round_half((maximum - minimum) / code_max);
    float zero = 0.0f - minimum / scale; /* no negative zero */
    if (scale >= AQ_HALF_MIN_NORMAL && scale <= AQ_HALF_MAX && zero <= 1024.0f && zero >= -1024.0f) {
      grid->scale = scale;
      grid->zero_point = aq_round_zero(zero, scale, kind);
      return AQ_OK;
    }
    return aq_real_grid_slow(minimum, maximum, bits, kind, grid);
  }
  if (minimum > maximum * (1.0f - AQ_NARROW_CODE) || maximum < minimum * (1.0f - AQ_NARROW_CODE))
    return aq_constant_grid(minimum + (maximum - minimum) * 0.5f, bits, kind, grid);
  if (kind == AQ_ZERO_POINT_INTEGER) {
    float low = minimum < 0.0f ? minimum : 0.0f, high = maximum > 0.0f ? maximum : 0.0f;
    float scale = aq_round_half_up((high - low) / code_max);
    if (!(scale <= AQ_HALF_MAX)) return AQ_E_RANGE;
    float zero = aq_round_even(-low / scale);
    grid->scale = scale;
    grid->zero_point = zero < code_max ? zero : code_max;
    return AQ_OK;
  }
  /* The larger magnitude goes to the side with 2^(b-1) steps, by the sign of the scale. */
  float negative = -minimum, positive = maximum;
  int flip = positive > negative;
  float larger = flip ? positive : negative, smaller = flip ? negative : positive;
  float from_larger = larger / half_range, from_smaller = smaller / (half_range - 0.5f);
  float scale = aq_round_half_up(from_larger > from_smaller ? from_larger : from_smaller);
  if (!(scale <= AQ_HALF_MAX)) return AQ_E_RANGE;
  grid->scale = flip ? -scale : scale;
  grid->zero_point = half_range;
  return AQ_OK;
}

#endif
