/* int8/neon_dot.c: 8-bit activations with Arm's dot product of bytes (UDOT), part of Armv8.2 and later.
 * Compiled with the matching -march flag and reached only after a check. */
#include "../isa/neon.h"

#define AQ_NAMED(family) aq_##family##_neon_dot
#define AQ_TOKENS 8
#define AQ_OWN_WIDE 0
#define AQ_OFFSET 0

AQ_INLINE vi v_dot(vi sum, vi w, vi x, const int32_t wide) {
  (void)wide;
  return (vi)vdotq_u32((uint32x4_t)sum, (uint8x16_t)w, (uint8x16_t)x);
}

#include "vector.h"
