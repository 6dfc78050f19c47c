/* trellis/avx2.c: levels of trellis codes by byte shuffles. Compiled with the matching -m flags and reached only after a
 * check. */
#include <immintrin.h>
#include <stdint.h>

#include "../packed.h"

typedef char level_table; /* loaded for every block */
AQ_INLINE level_table load_table(void) { return 0; }

/* The one of 16 · 2^`more` levels that the low bits of a byte choose: shuffles by the lowest four, and one of two chosen
 * by each of the next bits. */
AQ_INLINE __m256i look_up(const int8_t *levels, const int more, __m256i at) {
  __m256i found[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    if (i >= 1 << more) break;
    const __m128i table = _mm_load_si128((const __m128i *)(const void *)(levels + 16 * i));
    found[i] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), at);
  }
#pragma GCC unroll 4
  for (int bit = 0; bit < more; bit++) {
    /* a byte is chosen by its highest bit; what other bytes shift into it are lower ones */
    const __m256i by = _mm256_slli_epi16(at, 3 - bit);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      if (i >= 1 << (more - 1 - bit)) break;
      found[i] = _mm256_blendv_epi8(found[2 * i], found[2 * i + 1], by);
    }
  }
  return found[0];
}

AQ_INLINE __m256i sixteen_bytes_twice(const uint8_t *from) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)from));
}

AQ_INLINE void block_levels_2(level_table table, const uint8_t *from, int8_t *levels) {
  (void)table;
  /* a byte and the one before it twice in 16 bits: v >> 2 and v >> 4, v >> 6 and v >> 8 are its four windows */
  const __m256i places = _mm256_setr_epi8(0, 1, 0, 1, 1, 2, 1, 2, 2, 3, 2, 3, 3, 4, 3, 4, 4, 5, 4, 5, 5, 6, 5, 6, 6, 7, 6,
                                          7, 7, 8, 7, 8);
  const __m256i v = _mm256_shuffle_epi8(sixteen_bytes_twice(from), places);
  const __m256i even = _mm256_mulhi_epu16(v, _mm256_set1_epi32(1 << 14 | 1 << 26));
  const __m256i odd = _mm256_mullo_epi16(v, _mm256_set1_epi32(1 << 4 | 1 << 16));
  const __m256i bytes = _mm256_set1_epi16(255);
  const __m256i windows = _mm256_or_si256(_mm256_and_si256(even, bytes), _mm256_andnot_si256(bytes, odd));
  /* the table's second half is the first turned round, with other signs */
  const __m256i second = _mm256_cmpgt_epi8(_mm256_setzero_si256(), windows);
  const __m256i level = look_up(aq_trellis_levels_2, 3, _mm256_xor_si256(windows, second));
  _mm256_storeu_si256((__m256i *)(void *)levels, _mm256_sign_epi8(level, _mm256_or_si256(second, _mm256_set1_epi8(1))));
}

/* The windows of 3-bit codes in the highest bits of 16, those of eight codes in each half. */
AQ_INLINE __m256i high_windows(__m256i bytes, __m256i places) {
  const __m256i up = _mm256_broadcastsi128_si256(_mm_setr_epi16(32, 4, 128, 16, 2, 64, 8, 1));
  return _mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, places), up);
}

AQ_INLINE void block_levels_3(level_table table, const uint8_t *from, int8_t *levels) {
  (void)table;
  const __m256i bytes = sixteen_bytes_twice(from);
  /* of codes 0-7 and 16-23, and of 8-15 and 24-31 */
  const __m256i places = _mm256_setr_epi8(0, 1, 0, 1, 1, 2, 1, 2, 1, 2, 2, 3, 2, 3, 2, 3, 6, 7, 6, 7, 7, 8, 7, 8, 7, 8, 8,
                                          9, 8, 9, 8, 9);
  const __m256i v[2] = {high_windows(bytes, places), high_windows(bytes, _mm256_add_epi8(places, _mm256_set1_epi8(3)))};
  __m256i second[2], at[2];
  for (int i = 0; i < 2; i++) {
    second[i] = _mm256_srai_epi16(v[i], 15);
    at[i] = _mm256_srli_epi16(_mm256_xor_si256(v[i], second[i]), 7);
  }
  const __m256i windows = _mm256_packus_epi16(at[0], at[1]), turned = _mm256_packs_epi16(second[0], second[1]);
  /* a shuffle gives 0 where a byte's highest bit is set */
  const __m256i low = _mm256_and_si256(windows, _mm256_set1_epi8(127));
  const __m256i halves[2] = {look_up(aq_trellis_levels_3, 3, low), look_up(aq_trellis_levels_3 + 128, 3, low)};
  const __m256i level = _mm256_blendv_epi8(halves[0], halves[1], windows);
  _mm256_storeu_si256((__m256i *)(void *)levels, _mm256_sign_epi8(level, _mm256_or_si256(turned, _mm256_set1_epi8(1))));
}

#define AQ_LEVELS 32
#define AQ_LEVELS_FUNCTION aq_levels_2_avx2
#define AQ_LEVELS_BITS 2
#define AQ_LEVELS_READ 16
#define AQ_LEVELS_TABLE level_table
#define AQ_LOAD_TABLE load_table
#define AQ_BLOCK_LEVELS block_levels_2
#include "vector.h"

#define AQ_LEVELS_FUNCTION aq_levels_3_avx2
#define AQ_LEVELS_BITS 3
#define AQ_LEVELS_READ 16
#define AQ_LEVELS_TABLE level_table
#define AQ_LOAD_TABLE load_table
#define AQ_BLOCK_LEVELS block_levels_3
#include "vector.h"
