/* trellis/neon.c: levels of trellis codes with Advanced SIMD's table look-ups, two of 64 entries. */
#include <arm_neon.h>
#include <stdint.h>

#include "../packed.h"

#define AQ_LEVELS_FUNCTION aq_levels_neon
#define AQ_LEVELS 16
#define AQ_LEVELS_READ 8

typedef struct {
  int8x16x4_t low, high;
} level_table;

AQ_INLINE level_table load_table(void) {
  return (level_table){vld1q_s8_x4(aq_trellis_levels), vld1q_s8_x4(aq_trellis_levels + 64)};
}

AQ_INLINE void block_levels(level_table table, const uint8_t *from, int8_t *levels) {
  /* a byte and the one before it twice in 16 bits: v >> 2 and v >> 4, v >> 6 and v >> 8 are its four windows */
  static const uint8_t places[16] = {0, 1, 0, 1, 1, 2, 1, 2, 2, 3, 2, 3, 3, 4, 3, 4};
  static const int16_t low[8] = {-2, -6, -2, -6, -2, -6, -2, -6}, high[8] = {4, 0, 4, 0, 4, 0, 4, 0};
  const uint8x16_t bytes = vcombine_u8(vld1_u8(from), vdup_n_u8(0));
  const uint16x8_t v = vreinterpretq_u16_u8(vqtbl1q_u8(bytes, vld1q_u8(places)));
  const uint16x8_t even = vshlq_u16(v, vld1q_s16(low)), odd = vshlq_u16(v, vld1q_s16(high));
  const uint8x16_t windows = vreinterpretq_u8_u16(vbslq_u16(vdupq_n_u16(255), even, odd));
  /* the table's second half is the first turned round, with other signs */
  const int8x16_t second = vshrq_n_s8(vreinterpretq_s8_u8(windows), 7);
  const uint8x16_t at = veorq_u8(windows, vreinterpretq_u8_s8(second));
  int8x16_t found = vqtbl4q_s8(table.low, at); /* 0 behind the first 64, and kept where the next look-up finds none */
  found = vqtbx4q_s8(found, table.high, vsubq_u8(at, vdupq_n_u8(64)));
  vst1q_s8(levels, vsubq_s8(veorq_s8(found, second), second));
}

#include "vector.h"
