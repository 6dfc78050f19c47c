/* isa/neon.c: the families that share quantize/vector.h, with Arm's Advanced SIMD, four lanes. */
#include "neon.h"

#define AQ_NAMED(family) aq_##family##_neon

#include "../quantize/vector.h"

#include "../forward/vector.h"
#include "../product/vector.h"
#include "../solver/vector.h"
#include "../solver/rows_vector.h"
#include "../solver/trellis_vector.h"
#include "../two_level/vector.h"
