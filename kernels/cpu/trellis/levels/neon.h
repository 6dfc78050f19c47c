/* trellis/levels/neon.h: levels of trellis codes with Advanced SIMD's table look-ups of 16 entries. */
#ifndef AQ_TRELLIS_LEVELS_NEON_H
#define AQ_TRELLIS_LEVELS_NEON_H

#include "../../isa/neon.h"

typedef int8x16_t level_vector;

typedef struct {
  int8x16_t first, second;
} level_terms;

AQ_INLINE level_terms load_terms(const int bits) {
  return (level_terms){vld1q_s8(aq_trellis_terms[bits - 2]), vld1q_s8(aq_trellis_terms[bits - 2] + 16)};
}

AQ_INLINE int8x16_t sum_of_terms(level_terms table, uint8x16_t first, uint8x16_t second) {
  return vaddq_s8(vqtbl1q_s8(table.first, first), vqtbl1q_s8(table.second, second));
}

/* Levels of the first, second, third and fourth codes of 16 bytes behind from[0]. */
AQ_INLINE void levels_2(level_terms table, const uint8_t *from, int8x16_t of[4]) {
  const uint8x16_t x = vld1q_u8(from + 1), before = vld1q_u8(from), low = vdupq_n_u8(15);
  const uint8x16_t own = vshrq_n_u8(before, 4); /* moved up into x */
  const uint8x16_t x2 = vsliq_n_u8(vshrq_n_u8(before, 6), x, 2), x4 = vsliq_n_u8(own, x, 4);
  const uint8x16_t x6 = vsliq_n_u8(vshrq_n_u8(before, 2), x, 6);
  const uint8x16_t both = veorq_u8(x2, x4), odd = veorq_u8(x, both), even = veorq_u8(both, x6);
  of[0] = sum_of_terms(table, own, vandq_u8(even, low));
  of[1] = sum_of_terms(table, vandq_u8(x2, low), vandq_u8(odd, low));
  of[2] = sum_of_terms(table, vandq_u8(x, low), vshrq_n_u8(even, 4));
  of[3] = sum_of_terms(table, vshrq_n_u8(x2, 4), vshrq_n_u8(odd, 4));
}

/* Bits 3 i - 1 to 3 i + 2 behind the first byte of a half, i = 0 to 15, each four in a byte. */
AQ_INLINE uint8x16_t nibbles(uint8x16_t bytes, const int half) {
  static const uint8_t places[16] = {0, 1, 1, 2, 2, 3, 2, 3, 3, 4, 4, 5, 5, 6, 5, 6};
  static const int16_t down[8] = {-7, -5, -3, -9, -7, -5, -3, -9}, up[8] = {-2, 0, 2, -4, -2, 0, 2, -4};
  /* two codes in 16 bits, moved down to bit 0 and to bit 8 */
  const uint8x16_t at = vaddq_u8(vld1q_u8(places), vdupq_n_u8((uint8_t)(8 * half)));
  const uint16x8_t v = vreinterpretq_u16_u8(vqtbl1q_u8(bytes, at));
  const uint16x8_t even = vshlq_u16(v, vld1q_s16(down)), odd = vshlq_u16(v, vld1q_s16(up));
  return vandq_u8(vreinterpretq_u8_u16(vbslq_u16(vdupq_n_u16(255), even, odd)), vdupq_n_u8(15));
}

/* Of 32 codes in twelve bytes behind from[0], in their order. */
AQ_INLINE void levels_3(level_terms table, const uint8_t *from, int8x16_t levels[2]) {
  /* six bytes and the one before them in each half */
  const uint64x2_t x = vreinterpretq_u64_u8(vcombine_u8(vld1_u8(from), vld1_u8(from + 6))), x3 = vshlq_n_u64(x, 3);
  const uint8x16_t first = vreinterpretq_u8_u64(x3);
  const uint8x16_t second = vreinterpretq_u8_u64(veorq_u64(veorq_u64(x, x3), vshlq_n_u64(x, 5)));
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++)
    levels[half] = sum_of_terms(table, nibbles(first, half), nibbles(second, half));
}

/* Four vectors whose numbers take turns, stored in that order. */
AQ_INLINE void store_in_turn(int8_t *to, const int8x16_t p[4]) {
  const int16x8_t a = vreinterpretq_s16_s8(vzip1q_s8(p[0], p[1])), b = vreinterpretq_s16_s8(vzip1q_s8(p[2], p[3]));
  const int16x8_t c = vreinterpretq_s16_s8(vzip2q_s8(p[0], p[1])), d = vreinterpretq_s16_s8(vzip2q_s8(p[2], p[3]));
  vst1q_s8(to, vreinterpretq_s8_s16(vzip1q_s16(a, b)));
  vst1q_s8(to + 16, vreinterpretq_s8_s16(vzip2q_s16(a, b)));
  vst1q_s8(to + 32, vreinterpretq_s8_s16(vzip1q_s16(c, d)));
  vst1q_s8(to + 48, vreinterpretq_s8_s16(vzip2q_s16(c, d)));
}

AQ_INLINE void store_levels(int8_t *to, int8x16_t levels) { vst1q_s8(to, levels); }

#endif
