/* trellis/neon.c: levels of trellis codes with Advanced SIMD's table look-ups of 64 entries: two for half of
 * the table of 2 bits, four for that of 3. */
#include <arm_neon.h>
#include <stdint.h>

#include "../packed.h"

typedef struct {
  int8x16x4_t part[2];
} level_table_2;
typedef struct {
  int8x16x4_t part[4];
} level_table_3;

AQ_INLINE level_table_2 load_table_2(void) {
  return (level_table_2){{vld1q_s8_x4(aq_trellis_levels_2), vld1q_s8_x4(aq_trellis_levels_2 + 64)}};
}

AQ_INLINE level_table_3 load_table_3(void) {
  return (level_table_3){{vld1q_s8_x4(aq_trellis_levels_3), vld1q_s8_x4(aq_trellis_levels_3 + 64),
                          vld1q_s8_x4(aq_trellis_levels_3 + 128), vld1q_s8_x4(aq_trellis_levels_3 + 192)}};
}

/* Levels at places of half a table; `second`: -1 where they are of the other half, which is the first turned
 * round, with other signs. */
AQ_INLINE void store_levels(const int8x16x4_t *part, const int parts, uint8x16_t at, int8x16_t second, int8_t *levels) {
  int8x16_t found = vqtbl4q_s8(part[0], at); /* 0 behind the first 64, and kept where the next look-up finds none */
#pragma GCC unroll 4
  for (int i = 1; i < parts; i++) found = vqtbx4q_s8(found, part[i], vsubq_u8(at, vdupq_n_u8((uint8_t)(64 * i))));
  vst1q_s8(levels, vsubq_s8(veorq_s8(found, second), second));
}

AQ_INLINE void block_levels_2(level_table_2 table, const uint8_t *from, int8_t *levels) {
  /* a byte and the one before it twice in 16 bits: v >> 2 and v >> 4, v >> 6 and v >> 8 are its four
   * windows */
  static const uint8_t places[16] = {0, 1, 0, 1, 1, 2, 1, 2, 2, 3, 2, 3, 3, 4, 3, 4};
  static const int16_t low[8] = {-2, -6, -2, -6, -2, -6, -2, -6}, high[8] = {4, 0, 4, 0, 4, 0, 4, 0};
  const uint8x16_t bytes = vcombine_u8(vld1_u8(from), vdup_n_u8(0));
  const uint16x8_t v = vreinterpretq_u16_u8(vqtbl1q_u8(bytes, vld1q_u8(places)));
  const uint16x8_t even = vshlq_u16(v, vld1q_s16(low)), odd = vshlq_u16(v, vld1q_s16(high));
  const uint8x16_t windows = vreinterpretq_u8_u16(vbslq_u16(vdupq_n_u16(255), even, odd));
  const int8x16_t second = vshrq_n_s8(vreinterpretq_s8_u8(windows), 7);
  store_levels(table.part, 2, veorq_u8(windows, vreinterpretq_u8_s8(second)), second, levels);
}

AQ_INLINE void block_levels_3(level_table_3 table, const uint8_t *from, int8_t *levels) {
  /* the windows of eight codes in the highest bits of 16 */
  static const uint8_t places[16] = {0, 1, 0, 1, 1, 2, 1, 2, 1, 2, 2, 3, 2, 3, 2, 3};
  static const uint16_t up[8] = {32, 4, 128, 16, 2, 64, 8, 1};
  const uint8x16_t bytes = vcombine_u8(vld1_u8(from), vdup_n_u8(0));
  uint8x8_t at[2];
  int8x8_t second[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const uint8x16_t own = vqtbl1q_u8(bytes, vaddq_u8(vld1q_u8(places), vdupq_n_u8((uint8_t)(3 * i))));
    const uint16x8_t v = vmulq_u16(vreinterpretq_u16_u8(own), vld1q_u16(up));
    const int16x8_t turned = vshrq_n_s16(vreinterpretq_s16_u16(v), 15);
    second[i] = vmovn_s16(turned);
    at[i] = vshrn_n_u16(veorq_u16(v, vreinterpretq_u16_s16(turned)), 7);
  }
  store_levels(table.part, 4, vcombine_u8(at[0], at[1]), vcombine_s8(second[0], second[1]), levels);
}

#define AQ_LEVELS 16
#define AQ_LEVELS_FUNCTION aq_levels_2_neon
#define AQ_LEVELS_BITS 2
#define AQ_LEVELS_READ 8
#define AQ_LEVELS_TABLE level_table_2
#define AQ_LOAD_TABLE load_table_2
#define AQ_BLOCK_LEVELS block_levels_2
#include "vector.h"

#define AQ_LEVELS_FUNCTION aq_levels_3_neon
#define AQ_LEVELS_BITS 3
#define AQ_LEVELS_READ 8
#define AQ_LEVELS_TABLE level_table_3
#define AQ_LOAD_TABLE load_table_3
#define AQ_BLOCK_LEVELS block_levels_3
#include "vector.h"
