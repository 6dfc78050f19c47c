/* trellis/levels_avx512.h: levels of 64 trellis codes with AVX-512 BW, where the processor has no VBMI:
 * permutations of 16-bit numbers that hold two levels. */
#include <immintrin.h>
#include <stdint.h>

#include "../packed.h"

/* Half of a table, levels i and i + 64 of each 128 in the bytes of a number, the numbers of 64 in two
 * vectors; and a number that was added to each level, twice. */
typedef struct {
  __m512i part[4], twice;
} level_table;

AQ_INLINE level_table load_more(const int bits, int8_t more) {
  const int8_t *levels = bits == 2 ? aq_trellis_levels_2 : aq_trellis_levels_3;
  level_table table = {.twice = _mm512_set1_epi8((int8_t)(2 * more))};
#pragma GCC unroll 4
  for (int i = 0; i < 2 * (bits - 1); i++, levels += i % 2 ? 32 : 96) {
    const __m512i low = _mm512_cvtepu8_epi16(_mm256_load_si256((const __m256i *)(const void *)levels));
    const __m512i high = _mm512_cvtepu8_epi16(_mm256_load_si256((const __m256i *)(const void *)(levels + 64)));
    table.part[i] = _mm512_add_epi8(_mm512_or_si512(low, _mm512_slli_epi16(high, 8)), _mm512_set1_epi8(more));
  }
  return table;
}

/* The one of 128 levels that the low seven bits of each byte choose. */
AQ_INLINE __m512i look_up(const __m512i part[2], __m512i at) {
  const __mmask64 odd = 0xaaaaaaaaaaaaaaaa, later = _mm512_test_epi8_mask(at, _mm512_set1_epi8(64));
  const __m512i even_pair = _mm512_permutex2var_epi16(part[0], at, part[1]);
  const __m512i odd_pair = _mm512_permutex2var_epi16(part[0], _mm512_srli_epi16(at, 8), part[1]);
  const __m512i low = _mm512_mask_mov_epi8(even_pair, odd, _mm512_slli_epi16(odd_pair, 8));
  const __m512i high = _mm512_mask_mov_epi8(_mm512_srli_epi16(even_pair, 8), odd, odd_pair);
  return _mm512_mask_mov_epi8(low, later, high);
}

/* Levels of 64 codes, of which `of` begins with the byte before them. A table's second half is the first
 * turned round, with other signs. */
AQ_INLINE __m512i levels_of(const int bits, level_table table, __m256i of) {
  if (bits == 2) {
    /* four bytes and the one before them in each lane; each byte and the one before it twice in 16 bits, v:
     * v >> 2 and v >> 4, v >> 6 and v >> 8 are its four windows */
    const __m512i words = _mm512_setr_epi32(0, 1, 0, 0, 1, 2, 0, 0, 2, 3, 0, 0, 3, 4, 0, 0);
    const __m512i places = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 1, 2, 1, 2, 2, 3, 2, 3, 3, 4, 3, 4));
    const __m512i v = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(words, _mm512_castsi256_si512(of)), places);
    const __m512i even = _mm512_mulhi_epu16(v, _mm512_set1_epi32(1 << 14 | 1 << 26));
    const __m512i odd = _mm512_mullo_epi16(v, _mm512_set1_epi32(1 << 4 | 1 << 16));
    const __m512i windows = _mm512_mask_mov_epi8(even, 0xaaaaaaaaaaaaaaaa, odd);
    const __mmask64 second = _mm512_movepi8_mask(windows);
    const __m512i found = look_up(table.part, _mm512_mask_sub_epi8(windows, second, _mm512_set1_epi8(-1), windows));
    return _mm512_mask_sub_epi8(found, second, table.twice, found);
  }
  /* six bytes and the one before them in each lane, of 16 codes; the windows of eight in the highest bits of
   * 16 */
  const __m512i words = _mm512_setr_epi32(0x10000, 0x30002, 0, 0, 0x40003, 0x60005, 0, 0, 0x70006, 0x90008, 0, 0, 0xa0009,
                                          0xc000b, 0, 0);
  const __m512i places = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 1, 2, 1, 2, 1, 2, 2, 3, 2, 3, 2, 3));
  const __m512i up = _mm512_broadcast_i32x4(_mm_setr_epi16(32, 4, 128, 16, 2, 64, 8, 1));
  const __m512i bytes = _mm512_permutexvar_epi16(words, _mm512_castsi256_si512(of));
  __m512i turned[2], at[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const __m512i own = _mm512_shuffle_epi8(bytes, _mm512_add_epi8(places, _mm512_set1_epi8((char)(3 * i))));
    const __m512i v = _mm512_mullo_epi16(own, up);
    turned[i] = _mm512_srai_epi16(v, 15);
    at[i] = _mm512_srli_epi16(_mm512_xor_si512(v, turned[i]), 7);
  }
  const __m512i windows = _mm512_packus_epi16(at[0], at[1]);
  const __mmask64 second = _mm512_movepi8_mask(_mm512_packs_epi16(turned[0], turned[1]));
  const __m512i found = _mm512_mask_mov_epi8(look_up(table.part, windows), _mm512_movepi8_mask(windows),
                                             look_up(table.part + 2, windows));
  return _mm512_mask_sub_epi8(found, second, table.twice, found);
}
