/* int8/avx2.c: 8-bit activations with AVX2, compiled with the matching -m flags and reached only after a
 * check. */
#include "../isa/avx2.h"

#define AQ_NAMED(family) aq_##family##_avx2
#define AQ_TOKENS 4
#define AQ_OWN_WIDE 1
#define AQ_OFFSET 128

/* Pairs of products are added up in 16 bits: with codes up to 31 they fit, of 8 bits one half-byte after the
 * other. */
AQ_INLINE vi v_dot(vi sum, vi w, vi x, const int32_t wide) {
  const __m256i ones = _mm256_set1_epi16(1);
  if (!wide) return sum + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w, (__m256i)x), ones);
  const __m256i low = (__m256i)(w & 0x0f0f0f0f), high = (__m256i)((w >> 4) & 0x0f0f0f0f);
  return sum + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16(low, (__m256i)x), ones) +
         (vi)_mm256_madd_epi16(_mm256_maddubs_epi16(high, (__m256i)x), _mm256_set1_epi16(16));
}

#define AQ_PAIRS(bits) ((bits) == 8)
AQ_INLINE vi v_dot_pairs(vi sum, vi w, vi x) { return sum + (vi)_mm256_madd_epi16((__m256i)w, (__m256i)x); }

#include "vector.h"
