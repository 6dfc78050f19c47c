/* solver/rows.h: error feedback, and descent over codes with refits, against a layer's second moment. Rows
 * are independent; a panel of them goes through the moment block by block, and what a block of columns means
 * for the others is one product (product/kernels.h). Every element is one chain of fused multiply-adds in the
 * oracle's order, so that codes, scales and zero points are the same to the bit. */
#ifndef AQ_SOLVER_ROWS_H
#define AQ_SOLVER_ROWS_H

#include "../../arithmetic/refit.h"
#include "kernels.h"

/* The moment and its factor are blocks on the diagonal, `block` columns each, one after the other. */
typedef struct {
  const float *weights; /* [rows, cols] */
  size_t rows, cols;
  int32_t bits;
  size_t group_size, groups, block;
  const float *scale, *zero_point; /* [rows, groups] */
  const float *factor, *pivots;    /* unit upper triangular, in the order of `order` */
  const int32_t *order;
  uint8_t *codes;
  double *objective; /* [rows] */
} aq_feedback_job;

typedef struct {
  const float *weights;
  size_t rows, cols;
  int32_t bits;
  size_t group_size, groups, block;
  int32_t zero_point_kind;
  int32_t refit; /* scales and zero points, too */
  int32_t rounds, sweeps;
  const float *moment;       /* symmetric */
  const float *ones;         /* [cols]: sums of a row of the moment over the columns of its group */
  const double *group_sums;  /* [groups]: sums of those over the group */
  float *scale, *zero_point; /* [rows, groups] */
  uint8_t *codes;
  double *objective; /* [rows] */
} aq_refine_job;

/* Both leave with outputs half-made when aq_stopped(). */
typedef struct {
  /* at most AQ_PANEL_ROWS rows, with aq_panel_floats() of scratch */
  void (*feedback)(const aq_feedback_job *job, size_t row, size_t rows, float *work);
  void (*refine)(const aq_refine_job *job, size_t row, size_t rows, float *work);
} aq_row_kernels;

extern const aq_row_kernels aq_rows_scalar;

/* Floats of scratch for a panel: gradients, codes, a block's steps, scales and zero points; where a group is
 * a whole row that is refitted, products of its weights, too. */
static inline size_t aq_panel_floats(size_t cols, size_t groups) {
  return cols * AQ_PANEL_ROWS * (groups == 1 ? 2 : 1) + cols * AQ_PANEL / 4 + AQ_DESCENT_MOST * AQ_PANEL +
         2 * groups * AQ_PANEL + 16;
}

/* Floats of `work` that these functions take. */
uint64_t aq_row_floats(size_t cols, size_t groups, size_t threads);

/* Whether grids are refitted group by group, before a group's codes descend, or at once for a whole row. */
static inline int aq_refits_groups(const aq_refine_job *job) { return job->refit && job->groups > 1; }

/* Columns of a part of descent. */
static inline size_t aq_descent_part(const aq_refine_job *job) {
  return aq_refits_groups(job) ? job->group_size : AQ_PART;
}

/* Columns that descend, `sweeps` times, before the others take their steps. */
static inline size_t aq_descent_block(const aq_refine_job *job) {
  return aq_refits_groups(job) && job->group_size > AQ_DESCENT_BLOCK ? job->group_size : AQ_DESCENT_BLOCK;
}

#endif
