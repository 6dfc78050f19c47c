/* avx2.c: the kernels with AVX2, FMA and F16C, eight groups at a time. Compiled with the matching -m flags and reached
 * only after a check. */
#include "avx2.h"

#define AQ_KERNELS aq_kernels_avx2

#include "../quantize/vector.h"
