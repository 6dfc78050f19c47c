/* clip.h: the clip search of one group: the ranges that are tried, what a weight adds to a range's sums,
 * and the least squares of w = s q + b (with a fixed zero point z: of w = s p, p = q - z in place of q).
 * Sums run over segments of AQ_SEGMENT columns, and the segments' sums are added up in order. */
#ifndef AQ_CLIP_H
#define AQ_CLIP_H

#include "group.h"

/* Clipped ranges tried, and rounds of least squares after the best of them. */
#define AQ_CLIP_STEPS 12
#define AQ_REFITS 5

/* h is a column's importance. */
typedef struct {
  float hq, hqq, hwq;
  float error; /* sum h (w - s (q - z))^2 */
} aq_fit_sums;

AQ_FUNCTION void aq_add_sums(aq_fit_sums *total, const aq_fit_sums *part) {
  total->hq += part->hq;
  total->hqq += part->hqq;
  total->hwq += part->hwq;
  total->error += part->error;
}

typedef struct {
  float inverse, offset; /* q = round(w * inverse + offset), clamped */
  float zero_point;      /* subtracted from q in the sums */
} aq_clip_candidate;

AQ_FUNCTION aq_clip_candidate aq_clip_step(int32_t step, float minimum, float maximum, int32_t bits, int32_t kind) {
  const float code_max = (float)((1 << bits) - 1);
  const float keep = 1.0f - (float)step * (0.7f / AQ_CLIP_STEPS);
  aq_clip_candidate c;
  if (kind == AQ_ZERO_POINT_SYMMETRIC) {
    const float half_range = (float)(1 << (bits - 1));
    const float larger = -minimum > maximum ? -minimum : maximum;
    c.inverse = half_range / (larger * (1.0f - (float)(step / 2) * (1.4f / AQ_CLIP_STEPS)));
    if (step & 1) c.inverse = -c.inverse;
    c.offset = half_range;
    c.zero_point = half_range;
    return c;
  }
  const float low = minimum * keep, high = maximum * keep;
  if (kind == AQ_ZERO_POINT_INTEGER) {
    const float bottom = low < 0.0f ? low : 0.0f, top = high > 0.0f ? high : 0.0f;
    c.inverse = code_max / (top - bottom);
    c.offset = aq_round_even(-bottom * c.inverse);
    c.zero_point = c.offset;
    return c;
  }
  c.inverse = code_max / (high - low);
  c.offset = -low * c.inverse;
  c.zero_point = 0.0f;
  return c;
}

/* Adds a weight to the sums of a candidate, without the error. */
AQ_FUNCTION void aq_add_candidate(aq_fit_sums *sums, float w, float h, aq_clip_candidate c, float code_max) {
  const float q = aq_clamped_code(w * c.inverse + c.offset, code_max) - c.zero_point;
  const float hq = h * q;
  sums->hq += hq;
  sums->hqq += hq * q;
  sums->hwq += hq * w;
}

/* Adds a weight to the sums of stored parameters; `zero_point` is subtracted from its code in the sums. */
AQ_FUNCTION void aq_add_encoded(aq_fit_sums *sums, float w, float h, aq_grid grid, float code_max, float zero_point) {
  const float code = (float)aq_encode(w, grid, code_max);
  const float difference = w - grid.scale * (code - grid.zero_point);
  const float q = code - zero_point;
  const float hq = h * q;
  sums->hq += hq;
  sums->hqq += hq * q;
  sums->hwq += hq * w;
  sums->error += h * difference * difference;
}

/* How a kind of zero point is fitted: 0 fixed, 1 with the scale, 2 with the scale as an offset. */
#define AQ_AFFINE(kind) ((kind) == AQ_ZERO_POINT_REAL ? 1 : (kind) == AQ_ZERO_POINT_OFFSET ? 2 : 0)

/* The least squares of the sums, once for floats and once for vectors of them. `explained`: how much of
 * sum h w^2 the best parameters for the codes explain, less what a constant explains; h and hw are the
 * group's sums of importances and of weighted weights. `refit`: those parameters, rounded to half floats. */
#define AQ_LEAST_SQUARES(declare, real, fit_sums, grid, explained, refit, round_half)                       \
  declare real explained(const fit_sums *sums, real h, real hw, int affine) {                               \
    if (!affine) return sums->hwq * sums->hwq / sums->hqq;                                                  \
    const real numerator = h * sums->hwq - sums->hq * hw;                                                   \
    const real determinant = h * sums->hqq - sums->hq * sums->hq;                                           \
    return numerator * (numerator / determinant);                                                           \
  }                                                                                                         \
  declare grid refit(const fit_sums *sums, real h, real hw, int affine, real zero_point) {                  \
    grid found;                                                                                             \
    found.scale = round_half(affine ? (h * sums->hwq - sums->hq * hw) /                                     \
                                          (h * sums->hqq - sums->hq * sums->hq)                             \
                                    : sums->hwq / sums->hqq);                                               \
    if (affine == 2) {                                                                                      \
      found.zero_point = 0.0f - round_half((hw - found.scale * sums->hq) / h) / found.scale;                \
      return found;                                                                                         \
    }                                                                                                       \
    found.zero_point = affine ? round_half((found.scale * sums->hq - hw) / (h * found.scale)) : zero_point; \
    return found;                                                                                           \
  }

AQ_LEAST_SQUARES(AQ_FUNCTION, float, aq_fit_sums, aq_grid, aq_explained, aq_refit_grid, aq_round_half)

AQ_FUNCTION int aq_usable_grid(aq_grid grid) {
  return grid.scale <= AQ_HALF_MAX && grid.scale >= -AQ_HALF_MAX && grid.scale != 0.0f &&
         grid.zero_point <= AQ_HALF_MAX && grid.zero_point >= -AQ_HALF_MAX;
}

#endif
