/* trellis/avx512_vnni.c: a token alone on trellis codes with VNNI. Compiled with the matching -m flags and
 * reached only after a check. */
#include "levels/avx512.h"

AQ_INLINE __m512i dot(__m512i sum, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sum, a, b); }

#define AQ_NAMED(function) function##_avx512_vnni
#include "token_avx512.h"
