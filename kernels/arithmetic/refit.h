/* refit.h: a group's new scale and zero point by least squares, given its codes, for every library. */
#ifndef AQ_REFIT_H
#define AQ_REFIT_H

#include "group.h"

/* A row's new grid for a group by least squares, given its codes. With u = code - zero point, 1 all ones, H
 * the moment and p the gradient: sums u H u, 1 H u, u p and 1 p. `step`: how far weights move along u, and
 * `shift` along 1. 0 where the objective would not fall, or the new pair could not be stored. */
AQ_FUNCTION int aq_best_grid(const double sums[4], double ones, int32_t kind, aq_grid *grid, float *step,
                                float *shift) {
  const double uu = sums[0], ou = sums[1], up = sums[2], op = sums[3];
  const int real = kind == AQ_ZERO_POINT_REAL;
  const double determinant = uu * ones - ou * ou;
  double a, c = 0;
  if (!(uu > 0)) return 0;
  if (real && ones > 0 && determinant > 1e-7 * uu * ones) {
    a = (up * ones - op * ou) / determinant;
    c = (op * uu - up * ou) / determinant;
  } else {
    a = up / uu;
  }
  const float scale = aq_round_half((float)((double)grid->scale + a));
  if (scale == 0 || !(scale - scale == 0)) return 0;
  float zero_point = grid->zero_point;
  if (real) zero_point = aq_round_half((float)((double)zero_point - c / (double)scale));
  if (!(zero_point - zero_point == 0)) return 0;
  const float along_u = scale - grid->scale, along_ones = scale * (grid->zero_point - zero_point);
  const double s = (double)along_u, o = (double)along_ones;
  if (!(2 * (s * up + o * op) > s * s * uu + 2 * s * o * ou + o * o * ones)) return 0;
  *step = along_u;
  *shift = along_ones;
  *grid = (aq_grid){scale, zero_point};
  return 1;
}

/* A row's new scale and offset for a group by least squares, given its codes. With u the levels, H the moment
 * and p the gradient: sums u H u, 1 H u, u p and 1 p. `ones`: 1 H 1, or 0 for a new scale alone. 0 where the
 * objective would not fall, or the new pair could not be stored. */
AQ_FUNCTION int aq_best_line(const double sums[4], double ones, float *scale, float *offset) {
  const double uu = sums[0], ou = sums[1], up = sums[2], op = sums[3], determinant = uu * ones - ou * ou;
  if (!(uu > 0)) return 0;
  const int both = ones > 0 && determinant > 1e-7 * uu * ones;
  const double a = both ? (up * ones - op * ou) / determinant : up / uu;
  const float next = aq_round_half((float)((double)*scale + a));
  if (next == 0 || !(next - next == 0)) return 0;
  const double s = (double)(next - *scale);
  float shifted = *offset;
  if (both) shifted = aq_round_half((float)((double)shifted + (op - s * ou) / ones)); /* best for the rounded scale */
  if (!(shifted - shifted == 0)) return 0;
  const double o = (double)(shifted - *offset);
  if (!(2 * (s * up + o * op) > s * s * uu + 2 * s * o * ou + o * o * ones)) return 0;
  *scale = next;
  *offset = shifted;
  return 1;
}

#endif
