/* int8/neon_dot.c: 8-bit activations with Arm's dot product of bytes (UDOT), part of Armv8.2 and later.
 * Compiled with the matching -march flag and reached only after a check. */
#include "../trellis/levels/neon.h"

#define AQ_NAMED(family) aq_##family##_neon_dot
#define AQ_TOKENS 8
#define AQ_OWN_WIDE 0
#define AQ_OFFSET 0

AQ_INLINE vi v_dot(vi sum, vi w, vi x, const int32_t wide) {
  (void)wide;
  return (vi)vdotq_u32((uint32x4_t)sum, (uint8x16_t)w, (uint8x16_t)x);
}

#define AQ_OWN_LEVELS 1
typedef int8_t level_x;
#define AQ_LEVEL_X(code, zero) ((void)(zero), (code)-128)
#define AQ_LEVEL_PLACE(i) (i)

/* Products of levels with x less 128, and the levels themselves. */
typedef struct {
  int32x4_t products, levels;
} level_sums;

AQ_INLINE void level_dot(level_sums *sums, const int8x16_t of[4], const int8_t *x) {
  const int8x16_t one = vdupq_n_s8(1);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) sums->products = vdotq_s32(sums->products, of[i], vld1q_s8(x + 16 * i));
  /* two levels fit 8 bits */
  sums->levels = vdotq_s32(sums->levels, vaddq_s8(of[0], of[1]), one);
  sums->levels = vdotq_s32(sums->levels, vaddq_s8(of[2], of[3]), one);
}

AQ_INLINE vi level_total(const level_sums *sums, int32_t zero) {
  return (vi)vmlaq_n_s32(sums->products, sums->levels, 128 - zero);
}

#include "vector.h"
