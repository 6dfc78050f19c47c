/* int8/neon.c: 8-bit activations with the Advanced SIMD that every AArch64 processor has. */
#include "../trellis/levels/neon.h"

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

#define AQ_OWN_LEVELS 1
typedef int8_t level_x;
#define AQ_LEVEL_X(code, zero) ((void)(zero), (code)-128)
#define AQ_LEVEL_PLACE(i) (i)

/* Products of levels with x less 128, and the levels themselves. */
typedef struct {
  int32x4_t products, levels;
} level_sums;

AQ_INLINE void level_dot(level_sums *sums, const int8x16_t of[4], const int8_t *x) {
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    const int8x16_t a = vld1q_s8(x + 16 * i), b = vld1q_s8(x + 16 * i + 16);
    /* four products of a level and 128 fit 16 bits, and two levels 8 */
    int16x8_t four = vmull_s8(vget_low_s8(of[i]), vget_low_s8(a));
    four = vmlal_high_s8(four, of[i], a);
    four = vmlal_s8(four, vget_low_s8(of[i + 1]), vget_low_s8(b));
    four = vmlal_high_s8(four, of[i + 1], b);
    sums->products = vpadalq_s16(sums->products, four);
    sums->levels = vpadalq_s16(sums->levels, vpaddlq_s8(vaddq_s8(of[i], of[i + 1])));
  }
}

AQ_INLINE vi level_total(const level_sums *sums, int32_t zero) {
  return (vi)vmlaq_n_s32(sums->products, sums->levels, 128 - zero);
}

#include "vector.h"
