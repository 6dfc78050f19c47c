/* int8/kernels.h: 8-bit activations times packed weights. Every instruction set gives the same bytes:
 * products are added up as whole numbers over segments of a row, each exact in float32 too, and segments are
 * combined in float32 in one order, each operation rounded:
 *
 *     I = sum (x_code - x_zero) w_code        A = sum (x_code - x_zero)      both below 2^24
 *     sum = sum + w_scale (I - w_zero A)      segment after segment; of trellis codes
 *     sum = sum + (w_scale / 32 I + w_offset A)        with the levels in place of w_code
 *     out = x_scale sum + bias
 *
 * A segment is a group, or AQ_SEGMENT columns where the group is the whole row: no sum of products overflows,
 * however long a row is. */
#ifndef AQ_INT8_H
#define AQ_INT8_H

#include "../../arithmetic/activation.h"
#include "../forward/linear.h"

typedef struct {
  aq_linear_kernels linear;
  /* 0 if an element is NaN or infinite, else the smallest and the largest, zero among them */
  int (*range)(const float *x, size_t n, float *minimum, float *maximum);
  /* codes[i] = x[i] / scale to nearest even + zero_point, within 0 and code_max; 0 if an element is NaN or
   * infinite */
  int (*encode)(const float *x, size_t n, float scale, float zero_point, float code_max, uint8_t *codes);
  /* out[i] = scale (code - zero_point) of that code; out may be x */
  int (*round)(const float *x, size_t n, float scale, float zero_point, float code_max, float *out);
} aq_int8_kernels;

extern const aq_int8_kernels aq_int8_scalar;

/* Up to as many tokens are taken one by one: unpacking into panels costs more than it saves. */
#define AQ_FEW_TOKENS 2

/* Columns of a segment, a multiple of 16 that divides AQ_SEGMENT, and how many a row has. */
AQ_INLINE size_t aq_segment_cols(const aq_packed_view *view) {
  return view->groups == 1 ? AQ_SEGMENT : view->group_size;
}

#endif
