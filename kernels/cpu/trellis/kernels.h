/* trellis/kernels.h: a token alone on trellis codes, where an instruction set has its own way. */
#ifndef AQ_TRELLIS_KERNELS_H
#define AQ_TRELLIS_KERNELS_H

#include "../int8/kernels.h"

/* As aq_linear_kernels.one, for a group of 64 columns at least, for codes of 2 and of 3 bits. */
typedef struct {
  void (*floats[2])(const aq_linear_job *job, size_t token, size_t row_begin, size_t row_end); /* of x below 2^100 */
  void (*bytes[2])(const aq_linear_job *job, size_t token, size_t row_begin, size_t row_end);
} aq_trellis_tokens;

#endif
