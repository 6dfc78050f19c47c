/* int8/neon.c: 8-bit activations with the Advanced SIMD that every AArch64 processor has. */
#include "../isa/neon.h"

#define AQ_NAMED(family) aq_##family##_neon
#define AQ_TOKENS 8
#define AQ_OWN_WIDE 0
#define AQ_OFFSET 0

AQ_INLINE vi v_dot(vi sum, vi w, vi x, const int32_t wide) {
  (void)wide;
  const uint8x16_t a = (uint8x16_t)w, b = (uint8x16_t)x;
  const uint32x4_t low = vpaddlq_u16(vmull_u8(vget_low_u8(a), vget_low_u8(b)));
  const uint32x4_t high = vpaddlq_u16(vmull_u8(vget_high_u8(a), vget_high_u8(b)));
  return sum + (vi)vpaddq_u32(low, high);
}

#include "vector.h"
