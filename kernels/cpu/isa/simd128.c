/* simd128.c: the kernels with WebAssembly's 128-bit vectors, four groups at a time. */
#include "simd128.h"

#define AQ_KERNELS aq_kernels_simd128

#include "../quantize/vector.h"
