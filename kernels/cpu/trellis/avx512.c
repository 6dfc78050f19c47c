/* trellis/avx512.c: trellis codes with AVX-512 BW. Compiled with the matching -m flags and reached only after
 * a check. */
#include "levels/avx512.h"

#define AQ_NAMED(function) function##_avx512
#include "blocks_avx512.h"

AQ_INLINE __m512i dot(__m512i sum, __m512i a, __m512i b) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)));
}

#include "token_avx512.h"
