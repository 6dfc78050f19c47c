/* trellis/avx2.c: levels of trellis codes with AVX2, in the order of the columns. Compiled with the matching
 * -m flags and reached only after a check. */
#include "levels/avx2.h"

AQ_INLINE term_table load_terms_2(void) { return load_terms(2, 0); }
AQ_INLINE term_table load_terms_3(void) { return load_terms(3, 0); }

/* The halves of a vector, `apart` bytes from each other. */
AQ_INLINE void store_halves(int8_t *to, size_t apart, __m256i v) {
  _mm_storeu_si128((__m128i *)(void *)to, _mm256_castsi256_si128(v));
  _mm_storeu_si128((__m128i *)(void *)(to + apart), _mm256_extracti128_si256(v, 1));
}

AQ_INLINE void block_levels_2(term_table table, const uint8_t *from, int8_t *levels) {
  __m256i of[4];
  levels_of_2(table, _mm256_loadu_si256((const __m256i *)(const void *)from),
              _mm256_loadu_si256((const __m256i *)(const void *)(from + 1)), of);
  const __m256i low[2] = {_mm256_unpacklo_epi8(of[0], of[1]), _mm256_unpacklo_epi8(of[2], of[3])};
  const __m256i high[2] = {_mm256_unpackhi_epi8(of[0], of[1]), _mm256_unpackhi_epi8(of[2], of[3])};
  store_halves(levels, 64, _mm256_unpacklo_epi16(low[0], low[1]));
  store_halves(levels + 16, 64, _mm256_unpackhi_epi16(low[0], low[1]));
  store_halves(levels + 32, 64, _mm256_unpacklo_epi16(high[0], high[1]));
  store_halves(levels + 48, 64, _mm256_unpackhi_epi16(high[0], high[1]));
}

AQ_INLINE void block_levels_3(term_table table, const uint8_t *from, int8_t *levels) {
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(2, 3, 0, 1, 6, 7, 5, 4, 10, 11, 8, 9, 14, 15, 13, 12));
  __m256i of[2];
  levels_of_3(table, load_halves(from, from + 12), of);
  store_halves(levels, 32, _mm256_shuffle_epi8(_mm256_unpacklo_epi8(of[0], of[1]), order));
  store_halves(levels + 16, 32, _mm256_shuffle_epi8(_mm256_unpackhi_epi8(of[0], of[1]), order));
}

#define AQ_LEVELS 128
#define AQ_LEVELS_FUNCTION aq_levels_2_avx2
#define AQ_LEVELS_BITS 2
#define AQ_LEVELS_READ 33
#define AQ_LEVELS_TABLE term_table
#define AQ_LOAD_TABLE load_terms_2
#define AQ_BLOCK_LEVELS block_levels_2
#include "vector.h"

#undef AQ_LEVELS
#define AQ_LEVELS 64
#define AQ_LEVELS_FUNCTION aq_levels_3_avx2
#define AQ_LEVELS_BITS 3
#define AQ_LEVELS_READ 28
#define AQ_LEVELS_TABLE term_table
#define AQ_LOAD_TABLE load_terms_3
#define AQ_BLOCK_LEVELS block_levels_3
#include "vector.h"
