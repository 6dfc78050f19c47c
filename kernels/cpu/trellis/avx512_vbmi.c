/* trellis/avx512_vbmi.c: trellis codes with AVX-512 VBMI, permutations of bytes out of a table of 128
 * entries. Compiled with the matching -m flags and reached only after a check. */
#include <immintrin.h>
#include <stdint.h>

#include "kernels.h"

/* Half of a width's table, 128 levels of 2 bits or 256 of 3, each more by a number that its other half takes
 * twice. */
typedef struct {
  __m512i part[4], twice;
} level_table;

AQ_INLINE level_table load_more(const int bits, int8_t more) {
  const int8_t *levels = bits == 2 ? aq_trellis_levels_2 : aq_trellis_levels_3;
  level_table table = {.twice = _mm512_set1_epi8((int8_t)(2 * more))};
#pragma GCC unroll 4
  for (int i = 0; i < 2 * (bits - 1); i++)
    table.part[i] = _mm512_add_epi8(_mm512_load_si512(levels + 64 * i), _mm512_set1_epi8(more));
  return table;
}

/* Levels of 64 codes, of which `of` begins with the byte before them. A table's second half is the first
 * turned round, with other signs. */
AQ_INLINE __m512i levels_of(const int bits, level_table table, __m256i of) {
  const __m512i bytes = _mm512_castsi256_si512(of);
  if (bits == 2) {
    /* three bytes hold the windows of eight codes, from bits 2, 4, ... 16 on */
    const __m512i places = _mm512_setr_epi64(0x020100, 0x040302, 0x060504, 0x080706, 0x0a0908, 0x0c0b0a, 0x0e0d0c, 0x100f0e);
    const __m512i windows = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x100e0c0a08060402),
                                                         _mm512_permutexvar_epi8(places, bytes));
    const __mmask64 second = _mm512_movepi8_mask(windows);
    const __m512i at = _mm512_mask_sub_epi8(windows, second, _mm512_set1_epi8(-1), windows);
    const __m512i found = _mm512_permutex2var_epi8(table.part[0], at, table.part[1]);
    return _mm512_mask_sub_epi8(found, second, table.twice, found);
  }
  /* four bytes, from bits 2, 5, ... 23 on; a window's ninth bit is the highest of the eight that begin a bit
   * later */
  const __m512i places = _mm512_setr_epi64(0x03020100, 0x06050403, 0x09080706, 0x0c0b0a09, 0x0f0e0d0c, 0x1211100f, 0x15141312,
                                           0x18171615);
  const __m512i own = _mm512_permutexvar_epi8(places, bytes);
  const __m512i windows = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x1714110e0b080502), own);
  const __mmask64 second =
      _mm512_movepi8_mask(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x1815120f0c090603), own));
  const __m512i at = _mm512_mask_sub_epi8(windows, second, _mm512_set1_epi8(-1), windows);
  const __m512i low = _mm512_permutex2var_epi8(table.part[0], at, table.part[1]);
  const __m512i high = _mm512_permutex2var_epi8(table.part[2], at, table.part[3]);
  const __m512i found = _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(at), high);
  return _mm512_mask_sub_epi8(found, second, table.twice, found);
}

#define AQ_NAMED(function) function##_avx512_vbmi
#include "blocks_avx512.h"

#include "token_avx512.h"

const aq_trellis_tokens aq_tokens_avx512_vbmi = AQ_TOKENS;
