/* quantize/kernels.h: quantizing, dequantizing, codes, element types and error statistics. */
#ifndef AQ_QUANTIZE_H
#define AQ_QUANTIZE_H

#include "../../arithmetic/clip.h"
#include "../packed.h"

/* Lanes of the float64 sums: element i of a run belongs to lane i mod 8. */
#define AQ_SUM_LANES 8

typedef struct {
  const void *weights;
  int32_t dtype;
  size_t cols;
  int32_t bits;
  size_t group_size; /* 1..cols */
  size_t groups;     /* of one row */
  size_t words;      /* of one packed row */
  int32_t zero_point_kind;
  int32_t clip; /* search, or round to nearest only */
  const float *column_weights;
  uint32_t *packed;
  uint16_t *scale;
  uint16_t *zero_point; /* null when symmetric */
} aq_quantize_job;

/* The sums behind the statistics of arrowquant.h, by lane, and the two maxima. */
typedef struct {
  double aa[AQ_SUM_LANES], bb[AQ_SUM_LANES], ab[AQ_SUM_LANES], dd[AQ_SUM_LANES];
  float max_difference, max_a;
} aq_sums;

typedef struct {
  /* Quantizes rows [row_begin, row_end). */
  int32_t (*quantize_rows)(const aq_quantize_job *job, size_t row_begin, size_t row_end);
  /* out[0..n) = weights of `row` from column `col`, a multiple of AQ_SEGMENT; n <= AQ_SEGMENT unless at the
   * end. */
  void (*dequantize)(const aq_packed_view *view, size_t row, size_t col, size_t n, float *out);
  int32_t (*pack_row)(const uint8_t *codes, size_t cols, int32_t bits, uint32_t *packed);
  void (*unpack_row)(const uint32_t *packed, size_t cols, int32_t bits, uint8_t *codes);
  /* out[0..n) = elements [first, first + n) of `in` as float32. */
  void (*load)(const void *in, int32_t dtype, size_t first, size_t n, float *out);
  void (*store)(const float *in, size_t n, void *out, int32_t dtype, size_t first);
  void (*accumulate)(const float *a, const float *b, size_t n, aq_sums *sums);
} aq_quantize_kernels;

extern const aq_quantize_kernels aq_quantize_scalar;

/* NaN or infinity among the weights, or else too large for a half-precision scale: which group failed first
 * depends on how rows were split, which fault the tensor has does not. */
int32_t aq_weights_fault(const void *weights, int32_t dtype, size_t n, int32_t isa, int32_t threads);

int32_t aq_dequantize_view(const aq_quantize_kernels *kernels, const aq_packed_view *view, size_t rows, void *out,
                           int32_t dtype, int32_t threads);
int32_t aq_view_statistics(const aq_quantize_kernels *kernels, const aq_packed_view *view, size_t rows,
                           const void *weights, int32_t dtype, double *statistics, int32_t threads);

#endif
