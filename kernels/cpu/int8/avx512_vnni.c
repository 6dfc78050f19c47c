/* int8/avx512_vnni.c: 8-bit activations with AVX-512 VNNI. Compiled with the matching -m flags and reached
 * only after a check. */
#include "../isa/avx512.h"

#define AQ_NAMED(family) aq_##family##_avx512_vnni
#define AQ_TOKENS 12
#define AQ_OWN_WIDE 0
#define AQ_OFFSET 128

AQ_INLINE vi v_dot(vi sum, vi w, vi x, const int32_t wide) {
  (void)wide;
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
}

#include "vector.h"
