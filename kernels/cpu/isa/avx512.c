/* avx512.c: the kernels with AVX-512 F, BW, DQ and VL, sixteen groups at a time. Compiled with the matching -m flags
 * and reached only after a check. */
#include "avx512.h"

#define AQ_KERNELS aq_kernels_avx512

#include "../quantize/vector.h"
