/* trellis/avx512.c: levels of trellis codes with AVX-512 BW, where the processor has no VBMI: byte shuffles that write
 * where a bit of the window says. Compiled with the matching -m flags and reached only after a check. */
#include <immintrin.h>
#include <stdint.h>

#include "../packed.h"

#define AQ_LEVELS_FUNCTION aq_levels_avx512
#define AQ_LEVELS 64
#define AQ_LEVELS_READ 32

/* Half of the table, 16 levels in each lane of 16 bytes. */
typedef struct {
  __m512i part[8];
} level_table;

AQ_INLINE level_table load_table(void) {
  level_table table;
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    table.part[i] = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)(const void *)(aq_trellis_levels + 16 * i)));
  return table;
}

AQ_INLINE void block_levels(level_table table, const uint8_t *from, int8_t *levels) {
  /* four bytes and the one before them in each lane; each byte and the one before it twice in 16 bits, v: v >> 2 and
   * v >> 4, v >> 6 and v >> 8 are its four windows */
  const __m512i words = _mm512_setr_epi32(0, 1, 0, 0, 1, 2, 0, 0, 2, 3, 0, 0, 3, 4, 0, 0);
  const __m512i places = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 1, 2, 1, 2, 2, 3, 2, 3, 3, 4, 3, 4));
  const __m512i bytes = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(const void *)from));
  const __m512i v = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(words, bytes), places);
  const __m512i even = _mm512_mulhi_epu16(v, _mm512_set1_epi32(1 << 14 | 1 << 26));
  const __m512i odd = _mm512_mullo_epi16(v, _mm512_set1_epi32(1 << 4 | 1 << 16));
  const __m512i windows = _mm512_mask_mov_epi8(even, 0xaaaaaaaaaaaaaaaa, odd);
  /* the table's second half is the first turned round, with other signs */
  const __mmask64 second = _mm512_movepi8_mask(windows);
  const __m512i at = _mm512_mask_sub_epi8(windows, second, _mm512_set1_epi8(-1), windows);
  const __mmask64 by[3] = {_mm512_test_epi8_mask(at, _mm512_set1_epi8(16)), _mm512_test_epi8_mask(at, _mm512_set1_epi8(32)),
                           _mm512_test_epi8_mask(at, _mm512_set1_epi8(64))};
  __m512i found[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    found[i] = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(table.part[2 * i], at), by[0], table.part[2 * i + 1], at);
  const __m512i low = _mm512_mask_mov_epi8(found[0], by[1], found[1]), high = _mm512_mask_mov_epi8(found[2], by[1], found[3]);
  const __m512i both = _mm512_mask_mov_epi8(low, by[2], high);
  _mm512_storeu_si512(levels, _mm512_mask_sub_epi8(both, second, _mm512_setzero_si512(), both));
}

#include "vector.h"
