/* isa/avx2.c: the families that share quantize/vector.h, with AVX2, FMA and F16C, eight lanes. Compiled with
 * the matching -m flags and reached only after a check. */
#include "avx2.h"

#define AQ_NAMED(family) aq_##family##_avx2

#include "../quantize/vector.h"

#include "../forward/vector.h"
#include "../product/vector.h"
#include "../solver/vector.h"
#include "../solver/rows_vector.h"
#include "../solver/trellis_vector.h"
#include "../two_level/vector.h"
