/* isa/avx512.c: the families that share quantize/vector.h, with AVX-512 F, BW, DQ and VL, sixteen lanes.
 * Compiled with the matching -m flags and reached only after a check. */
#include "avx512.h"

#define AQ_NAMED(family) aq_##family##_avx512

#include "../quantize/vector.h"

#include "../forward/vector.h"
#include "../product/vector.h"
#include "../solver/vector.h"
#include "../solver/rows_vector.h"
#include "../solver/trellis_vector.h"
#include "../two_level/vector.h"
