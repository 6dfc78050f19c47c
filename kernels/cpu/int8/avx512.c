/* int8/avx512.c: 8-bit activations with AVX-512 BW, where the processor has no VNNI. Compiled with the
 * matching -m flags and reached only after a check. */
#include "../isa/avx512.h"

#define AQ_NAMED(family) aq_##family##_avx512
#define AQ_TOKENS 12
#define AQ_OWN_WIDE 1
#define AQ_OFFSET 128

/* Pairs of products are added up in 16 bits: with codes up to 31 they fit, of 8 bits one half-byte after the
 * other. */
AQ_INLINE vi v_dot(vi sum, vi w, vi x, const int32_t wide) {
  const __m512i ones = _mm512_set1_epi16(1);
  if (!wide) return sum + (vi)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)w, (__m512i)x), ones);
  const __m512i low = (__m512i)(w & 0x0f0f0f0f), high = (__m512i)((w >> 4) & 0x0f0f0f0f);
  return sum + (vi)_mm512_madd_epi16(_mm512_maddubs_epi16(low, (__m512i)x), ones) +
         (vi)_mm512_madd_epi16(_mm512_maddubs_epi16(high, (__m512i)x), _mm512_set1_epi16(16));
}

#define AQ_PAIRS(bits) ((bits) == 8)
AQ_INLINE vi v_dot_pairs(vi sum, vi w, vi x) { return sum + (vi)_mm512_madd_epi16((__m512i)w, (__m512i)x); }

#include "vector.h"
