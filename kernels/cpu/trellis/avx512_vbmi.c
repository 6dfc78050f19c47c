/* trellis/avx512_vbmi.c: trellis codes with AVX-512 VBMI, which finds places of terms by multishifts and
 * needs no masks for them. Compiled with the matching -m flags and reached only after a check. */
#include <immintrin.h>
#include <stdint.h>

#include "kernels.h"

/* The sixteen terms of each kind, four times. */
typedef struct {
  __m512i first, second;
} level_table;

/* Terms of levels that are greater by `more`. */
AQ_INLINE level_table load_more(const int bits, int8_t more) {
  static const int8_t terms[2][32] = {{AQ_TRELLIS_TERMS_2}, {AQ_TRELLIS_TERMS_3}};
  const __m128i *from = (const __m128i *)(const void *)terms[bits - 2];
  return (level_table){_mm512_add_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(from)), _mm512_set1_epi8(more)),
                       _mm512_broadcast_i32x4(_mm_loadu_si128(from + 1))};
}

/* Levels of 64 codes, of which `of` begins with the byte before them. */
AQ_INLINE __m512i levels_of(const int bits, level_table table, __m256i of) {
  /* three bytes hold the windows of eight codes of 2 bits, from bits 2, 4, ... 16 on, four those of 3 bits,
   * from bits 2, 5, ... 23 on; first terms are found two bits later */
  const __m512i places =
      bits == 2 ? _mm512_setr_epi64(0x020100, 0x040302, 0x060504, 0x080706, 0x0a0908, 0x0c0b0a, 0x0e0d0c, 0x100f0e)
                : _mm512_setr_epi64(0x03020100, 0x06050403, 0x09080706, 0x0c0b0a09, 0x0f0e0d0c, 0x1211100f, 0x15141312,
                                    0x18171615);
  const __m512i at = _mm512_set1_epi64(bits == 2 ? 0x100e0c0a08060402 : 0x1714110e0b080502);
  const __m512i x = _mm512_permutexvar_epi8(places, _mm512_castsi256_si512(of));
  const __m512i z = _mm512_ternarylogic_epi64(x, _mm512_srli_epi64(x, 2), _mm512_srli_epi64(x, bits + 2), 0x96);
  const __m512i first = _mm512_multishift_epi64_epi8(_mm512_add_epi8(at, _mm512_set1_epi8(2)), x);
  const __m512i second = _mm512_multishift_epi64_epi8(at, z);
  return _mm512_add_epi8(_mm512_permutexvar_epi8(first, table.first), _mm512_permutexvar_epi8(second, table.second));
}

#define AQ_NAMED(function) function##_avx512_vbmi
#include "blocks_avx512.h"

#include "token_avx512.h"

const aq_trellis_tokens aq_tokens_avx512_vbmi = AQ_TOKENS;
