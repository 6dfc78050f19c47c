/* trellis/avx2.c: levels of trellis codes by byte shuffles. Compiled with the matching -m flags and reached only after a
 * check. */
#include <immintrin.h>
#include <stdint.h>

#include "../packed.h"

#define AQ_LEVELS_FUNCTION aq_levels_avx2
#define AQ_LEVELS 32
#define AQ_LEVELS_READ 16

/* The table's second half is the first turned round, with other signs: eight shuffles by a window's low four bits, and
 * one of two chosen by each of the next bits. */
AQ_INLINE __m256i look_up(__m256i windows) {
  const __m256i second = _mm256_cmpgt_epi8(_mm256_setzero_si256(), windows), at = _mm256_xor_si256(windows, second);
  __m256i found[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    const __m128i table = _mm_load_si128((const __m128i *)(const void *)(aq_trellis_levels + 16 * i));
    found[i] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), at);
  }
  /* a byte is chosen by its highest bit; what other bytes shift into it are lower ones */
  const __m256i fourth = _mm256_slli_epi16(at, 3), fifth = _mm256_slli_epi16(at, 2), sixth = _mm256_slli_epi16(at, 1);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) found[i] = _mm256_blendv_epi8(found[2 * i], found[2 * i + 1], fourth);
  const __m256i low = _mm256_blendv_epi8(found[0], found[1], fifth), high = _mm256_blendv_epi8(found[2], found[3], fifth);
  const __m256i level = _mm256_blendv_epi8(low, high, sixth);
  return _mm256_sign_epi8(level, _mm256_or_si256(second, _mm256_set1_epi8(1)));
}

typedef char level_table; /* loaded for every block */
AQ_INLINE level_table load_table(void) { return 0; }

AQ_INLINE void block_levels(level_table table, const uint8_t *from, int8_t *levels) {
  (void)table;
  /* a byte and the one before it twice in 16 bits: v >> 2 and v >> 4, v >> 6 and v >> 8 are its four windows */
  const __m256i places = _mm256_setr_epi8(0, 1, 0, 1, 1, 2, 1, 2, 2, 3, 2, 3, 3, 4, 3, 4, 4, 5, 4, 5, 5, 6, 5, 6, 6, 7, 6,
                                          7, 7, 8, 7, 8);
  const __m256i v = _mm256_shuffle_epi8(
      _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)from)), places);
  const __m256i even = _mm256_mulhi_epu16(v, _mm256_set1_epi32(1 << 14 | 1 << 26));
  const __m256i odd = _mm256_mullo_epi16(v, _mm256_set1_epi32(1 << 4 | 1 << 16));
  const __m256i bytes = _mm256_set1_epi16(255);
  const __m256i windows = _mm256_or_si256(_mm256_and_si256(even, bytes), _mm256_andnot_si256(bytes, odd));
  _mm256_storeu_si256((__m256i *)(void *)levels, look_up(windows));
}

#include "vector.h"
