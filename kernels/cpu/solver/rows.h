/* solver/rows.h: error feedback, descent over codes and refits against a layer's second moment. Each row of a
 * matrix is an independent problem and has one lane; every instruction set multiplies and adds in the oracle's
 * order without fusing, so that codes, scales and zero points are the same to the bit. */
#ifndef AQ_SOLVER_ROWS_H
#define AQ_SOLVER_ROWS_H

#include "kernels.h"

typedef struct {
  const float *weights; /* [rows, cols] */
  size_t rows, cols;
  int32_t bits;
  size_t group_size, groups;
  const float *scale, *zero_point; /* [rows, groups] */
  const float *factor;             /* [cols, cols], unit upper triangular, in the order of `order` */
  const int32_t *order;
  uint8_t *codes;
} aq_feedback_job;

typedef struct {
  const float *weights;
  size_t rows, cols;
  int32_t bits;
  size_t group_size, groups;
  int32_t zero_point_kind;
  int32_t refit; /* scales and zero points, too */
  int32_t rounds;
  const float *moment;       /* [cols, cols], symmetric */
  const double *group_sums;  /* [groups, groups]: sums of the moment over pairs of groups */
  float *scale, *zero_point; /* [rows, groups] */
  uint8_t *codes;
  double *objective; /* [rows] */
} aq_refine_job;

/* Floats that one call of `refine` needs beside its outputs, for one panel. */
static inline size_t aq_refine_floats(size_t cols, size_t groups) {
  return (5 * cols + 6 * groups + 4 * groups * groups) * AQ_PANEL + 2 * (4 * groups * groups + 8 * groups) + 16;
}

/* Both leave with outputs half-made when aq_stopped(). */
typedef struct {
  size_t panel; /* rows of one call, at most AQ_PANEL */
  void (*feedback)(const aq_feedback_job *job, size_t row, size_t rows, float *work);
  void (*refine)(const aq_refine_job *job, size_t row, size_t rows, float *work);
} aq_row_kernels;

extern const aq_row_kernels aq_rows_scalar;

/* Floats of `work` that these functions take. */
uint64_t aq_row_floats(size_t cols, size_t groups, size_t threads);

/* Solves m delta = r for a symmetric positive definite m [n, n] by LDL^T in place, m's diagonal raised by a
 * tiny part of its mean; 0 when a pivot is not positive. */
static inline int aq_solve_positive(double *m, double *r, size_t n) {
  double mean = 0;
  for (size_t i = 0; i < n; i++) mean += m[i * n + i];
  mean /= (double)n;
  if (!(mean > 0)) return 0;
  for (size_t i = 0; i < n; i++) m[i * n + i] += 1e-7 * mean;
  for (size_t k = 0; k < n; k++) {
    const double pivot = m[k * n + k];
    if (!(pivot > 1e-12 * mean)) return 0;
    for (size_t i = k + 1; i < n; i++) {
      const double factor = m[k * n + i] / pivot;
      for (size_t j = i; j < n; j++) m[i * n + j] -= factor * m[k * n + j];
      r[i] -= factor * r[k];
    }
  }
  for (size_t k = n; k-- > 0;) {
    double sum = r[k];
    for (size_t j = k + 1; j < n; j++) sum -= m[k * n + j] * r[j];
    r[k] = sum / m[k * n + k];
  }
  return 1;
}

/* Solves the joint least squares in the steps of all scales and, with real zero points, all offsets of one
 * row, by its sums `stride` floats apart: codes with codes, ones with codes, then the right sides of either.
 * r becomes the steps; 0 as aq_solve_positive. */
static inline int aq_solve_steps(const float *sums, size_t stride, const double *group_sums, size_t groups, int real,
                                 double *m, double *r) {
  const float *qq = sums, *oq = qq + groups * groups * stride, *rq = oq + groups * groups * stride;
  const float *ro = rq + groups * stride;
  const size_t unknowns = real ? 2 * groups : groups;
  for (size_t g = 0; g < groups; g++) {
    for (size_t h = 0; h < groups; h++) {
      m[g * unknowns + h] = qq[(g <= h ? g * groups + h : h * groups + g) * stride];
      if (!real) continue;
      m[(groups + g) * unknowns + h] = m[h * unknowns + groups + g] = oq[(g * groups + h) * stride];
      m[(groups + g) * unknowns + groups + h] = group_sums[g * groups + h];
    }
    r[g] = rq[g * stride];
    if (real) r[groups + g] = ro[g * stride];
  }
  return aq_solve_positive(m, r, unknowns);
}

/* A row's scales and zero points moved by the solved steps; a group whose new pair could not be stored keeps
 * its own. delta: per group the step of the scale, at the zero point as it is, and, with real zero points,
 * that of the offset. */
static inline void aq_move_grid(const double *delta, size_t groups, int32_t kind, float *scale, float *zero_point) {
  const int real = kind == AQ_ZERO_POINT_REAL;
  for (size_t g = 0; g < groups; g++) {
    const double s = scale[g], z = zero_point[g];
    const float new_scale = aq_round_half((float)(s + delta[g]));
    if (new_scale == 0 || !(new_scale - new_scale == 0)) continue;
    if (real) {
      const float new_zero = aq_round_half((float)(z - delta[groups + g] / (double)new_scale));
      if (!(new_zero - new_zero == 0)) continue;
      zero_point[g] = new_zero;
    }
    scale[g] = new_scale;
  }
}

#endif
