/* neon.c: the kernels with Arm's Advanced SIMD, four groups at a time. */
#include "neon.h"

#define AQ_KERNELS aq_kernels_neon

#include "../quantize/vector.h"
