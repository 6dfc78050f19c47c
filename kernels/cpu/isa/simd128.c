/* isa/simd128.c: the families that share quantize/vector.h, with WebAssembly's 128-bit vectors, four
 * lanes. */
#include "../trellis/levels/simd128.h"

#define AQ_NAMED(family) aq_##family##_simd128

#include "../quantize/vector.h"

#include "../forward/vector.h"
#include "../product/vector.h"
#include "../solver/vector.h"
#include "../solver/rows_vector.h"
#include "../solver/trellis_vector.h"
#include "../two_level/vector.h"

#define AQ_LEVELS_NAMED(function) function##_simd128
#include "../trellis/levels/blocks.h"
