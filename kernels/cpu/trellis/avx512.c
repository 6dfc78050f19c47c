/* trellis/avx512.c: levels of trellis codes with AVX-512 BW, where the processor has no VBMI: byte shuffles that write
 * where a bit of the window says. Compiled with the matching -m flags and reached only after a check. */
#include <immintrin.h>
#include <stdint.h>

#include "../packed.h"

/* Half of a table, 16 levels in each lane of 16 bytes. */
typedef struct {
  __m512i part[8];
} level_table_2;
typedef struct {
  __m512i part[16];
} level_table_3;

AQ_INLINE void load_parts(const int8_t *levels, const int parts, __m512i *part) {
#pragma GCC unroll 16
  for (int i = 0; i < parts; i++)
    part[i] = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)(const void *)(levels + 16 * i)));
}

AQ_INLINE level_table_2 load_table_2(void) {
  level_table_2 table;
  load_parts(aq_trellis_levels_2, 8, table.part);
  return table;
}

AQ_INLINE level_table_3 load_table_3(void) {
  level_table_3 table;
  load_parts(aq_trellis_levels_3, 16, table.part);
  return table;
}

/* The one of 128 levels that the low seven bits of each byte choose; the eighth is 0. */
AQ_INLINE __m512i look_up(const __m512i part[8], __m512i at) {
  const __mmask64 by[3] = {_mm512_test_epi8_mask(at, _mm512_set1_epi8(16)), _mm512_test_epi8_mask(at, _mm512_set1_epi8(32)),
                           _mm512_test_epi8_mask(at, _mm512_set1_epi8(64))};
  __m512i found[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    found[i] = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(part[2 * i], at), by[0], part[2 * i + 1], at);
  const __m512i low = _mm512_mask_mov_epi8(found[0], by[1], found[1]), high = _mm512_mask_mov_epi8(found[2], by[1], found[3]);
  return _mm512_mask_mov_epi8(low, by[2], high);
}

AQ_INLINE __m512i bytes_of(const uint8_t *from) {
  return _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(const void *)from));
}

AQ_INLINE void block_levels_2(level_table_2 table, const uint8_t *from, int8_t *levels) {
  /* four bytes and the one before them in each lane; each byte and the one before it twice in 16 bits, v: v >> 2 and
   * v >> 4, v >> 6 and v >> 8 are its four windows */
  const __m512i words = _mm512_setr_epi32(0, 1, 0, 0, 1, 2, 0, 0, 2, 3, 0, 0, 3, 4, 0, 0);
  const __m512i places = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 1, 2, 1, 2, 2, 3, 2, 3, 3, 4, 3, 4));
  const __m512i v = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(words, bytes_of(from)), places);
  const __m512i even = _mm512_mulhi_epu16(v, _mm512_set1_epi32(1 << 14 | 1 << 26));
  const __m512i odd = _mm512_mullo_epi16(v, _mm512_set1_epi32(1 << 4 | 1 << 16));
  const __m512i windows = _mm512_mask_mov_epi8(even, 0xaaaaaaaaaaaaaaaa, odd);
  /* the table's second half is the first turned round, with other signs */
  const __mmask64 second = _mm512_movepi8_mask(windows);
  const __m512i found = look_up(table.part, _mm512_mask_sub_epi8(windows, second, _mm512_set1_epi8(-1), windows));
  _mm512_storeu_si512(levels, _mm512_mask_sub_epi8(found, second, _mm512_setzero_si512(), found));
}

AQ_INLINE void block_levels_3(level_table_3 table, const uint8_t *from, int8_t *levels) {
  /* six bytes and the one before them in each lane, of 16 codes; the windows of eight in the highest bits of 16 */
  const __m512i words = _mm512_setr_epi32(0x10000, 0x30002, 0, 0, 0x40003, 0x60005, 0, 0, 0x70006, 0x90008, 0, 0, 0xa0009,
                                          0xc000b, 0, 0);
  const __m512i places = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 1, 2, 1, 2, 1, 2, 2, 3, 2, 3, 2, 3));
  const __m512i up = _mm512_broadcast_i32x4(_mm_setr_epi16(32, 4, 128, 16, 2, 64, 8, 1));
  const __m512i bytes = _mm512_permutexvar_epi16(words, bytes_of(from));
  __m512i turned[2], at[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const __m512i own = _mm512_shuffle_epi8(bytes, _mm512_add_epi8(places, _mm512_set1_epi8((char)(3 * i))));
    const __m512i v = _mm512_mullo_epi16(own, up);
    turned[i] = _mm512_srai_epi16(v, 15);
    at[i] = _mm512_srli_epi16(_mm512_xor_si512(v, turned[i]), 7);
  }
  const __m512i windows = _mm512_packus_epi16(at[0], at[1]), low = _mm512_and_si512(windows, _mm512_set1_epi8(127));
  const __mmask64 second = _mm512_movepi8_mask(_mm512_packs_epi16(turned[0], turned[1]));
  const __m512i found = _mm512_mask_mov_epi8(look_up(table.part, low), _mm512_movepi8_mask(windows),
                                             look_up(table.part + 8, low));
  _mm512_storeu_si512(levels, _mm512_mask_sub_epi8(found, second, _mm512_setzero_si512(), found));
}

#define AQ_LEVELS 64
#define AQ_LEVELS_FUNCTION aq_levels_2_avx512
#define AQ_LEVELS_BITS 2
#define AQ_LEVELS_READ 32
#define AQ_LEVELS_TABLE level_table_2
#define AQ_LOAD_TABLE load_table_2
#define AQ_BLOCK_LEVELS block_levels_2
#include "vector.h"

#define AQ_LEVELS_FUNCTION aq_levels_3_avx512
#define AQ_LEVELS_BITS 3
#define AQ_LEVELS_READ 32
#define AQ_LEVELS_TABLE level_table_3
#define AQ_LOAD_TABLE load_table_3
#define AQ_BLOCK_LEVELS block_levels_3
#include "vector.h"
