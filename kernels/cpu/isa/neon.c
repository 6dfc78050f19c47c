/* isa/neon.c: the families that share quantize/vector.h, with Arm's Advanced SIMD, four lanes. */
#include "../trellis/levels/neon.h"

#define AQ_NAMED(family) aq_##family##_neon

#include "../quantize/vector.h"

#include "../forward/vector.h"
#include "../product/vector.h"
#include "../solver/vector.h"
#include "../solver/rows_vector.h"
#include "../solver/trellis_vector.h"
#include "../two_level/vector.h"

#define AQ_LEVELS_NAMED(function) function##_neon
#include "../trellis/levels/blocks.h"
