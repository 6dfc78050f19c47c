/* trellis/avx512_vbmi.c: levels of trellis codes with AVX-512 VBMI: permutations of bytes, two tables of 128 entries.
 * Compiled with the matching -m flags and reached only after a check. */
#include <immintrin.h>
#include <stdint.h>

#include "../packed.h"

#define AQ_LEVELS_FUNCTION aq_levels_avx512_vbmi
#define AQ_LEVELS 64
#define AQ_LEVELS_READ 17

typedef struct {
  __m512i part[4];
} level_table;

AQ_INLINE level_table load_table(void) {
  const __m512i *from = (const __m512i *)(const void *)aq_trellis_levels;
  return (level_table){{_mm512_load_si512(from), _mm512_load_si512(from + 1), _mm512_load_si512(from + 2),
                        _mm512_load_si512(from + 3)}};
}

AQ_INLINE void block_levels(level_table table, const uint8_t *from, int8_t *levels) {
  /* three bytes hold the windows of eight codes, from bits 2, 4, ... 16 on */
  const __m512i places = _mm512_setr_epi64(0x020100, 0x040302, 0x060504, 0x080706, 0x0a0908, 0x0c0b0a, 0x0e0d0c, 0x100f0e);
  const __m512i bytes = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(0x1ffff, from));
  const __m512i windows = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x100e0c0a08060402),
                                                       _mm512_permutexvar_epi8(places, bytes));
  const __m512i low = _mm512_permutex2var_epi8(table.part[0], windows, table.part[1]);
  const __m512i high = _mm512_permutex2var_epi8(table.part[2], windows, table.part[3]);
  _mm512_storeu_si512(levels, _mm512_mask_blend_epi8(_mm512_movepi8_mask(windows), low, high));
}

#include "vector.h"
