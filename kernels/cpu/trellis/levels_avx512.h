/* trellis/levels_avx512.h: levels of 64 trellis codes with AVX-512 BW: a byte shuffle for each of a level's
 * two terms. */
#include <immintrin.h>
#include <stdint.h>

#include "../packed.h"

/* The sixteen terms of each kind, in every 128 bits. */
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

/* Levels of the windows whose terms have these places; bits 4 to 6 of a place mean nothing. */
AQ_INLINE __m512i add_terms(level_table table, __m512i first, __m512i second) {
  return _mm512_add_epi8(_mm512_shuffle_epi8(table.first, first), _mm512_shuffle_epi8(table.second, second));
}

#define AQ_XOR3 0x96
#define AQ_OR_AND 0xf8 /* a | b & c */

/* Places of the 64 codes of 3 bits in `bytes`, of which sixteen codes and the byte before them lie in each
 * 128 bits: two in a 16-bit number, from the bit of a byte on. */
AQ_INLINE __m512i places_3(__m512i bytes, __m128i byte, __m128i bit) {
  const __m512i own = _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(byte));
  const __m512i v = _mm512_srlv_epi16(own, _mm512_broadcast_i32x4(bit));
  return _mm512_ternarylogic_epi64(_mm512_and_si512(v, _mm512_set1_epi16(0x000f)), _mm512_slli_epi16(v, 5),
                                   _mm512_set1_epi16(0x0f00), AQ_OR_AND);
}

/* Levels of 64 codes, of which `of` begins with the byte before them. */
AQ_INLINE __m512i levels_of(const int bits, level_table table, __m256i of) {
  const __m512i low = _mm512_set1_epi8(15);
  if (bits == 2) {
    /* four bytes and the one before them in each lane; each byte and the one before it twice in 16 bits, v:
     * v >> 2 and v >> 4, v >> 6 and v >> 8 are its four windows */
    const __m512i words = _mm512_setr_epi32(0, 1, 0, 0, 1, 2, 0, 0, 2, 3, 0, 0, 3, 4, 0, 0);
    const __m512i places = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 1, 2, 1, 2, 2, 3, 2, 3, 3, 4, 3, 4));
    const __m512i v = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(words, _mm512_castsi256_si512(of)), places);
    const __m512i even = _mm512_mulhi_epu16(v, _mm512_set1_epi32(1 << 14 | 1 << 26));
    const __m512i odd = _mm512_mullo_epi16(v, _mm512_set1_epi32(1 << 4 | 1 << 16));
    const __m512i windows = _mm512_mask_mov_epi8(even, 0xaaaaaaaaaaaaaaaa, odd);
    const __m512i first = _mm512_srli_epi16(windows, 2);
    const __m512i second = _mm512_ternarylogic_epi64(windows, first, _mm512_srli_epi16(windows, 4), AQ_XOR3);
    return add_terms(table, _mm512_and_si512(first, low), _mm512_and_si512(second, low));
  }
  const __m512i words = _mm512_setr_epi32(0x10000, 0x30002, 0, 0, 0x40003, 0x60005, 0, 0, 0x70006, 0x90008, 0, 0, 0xa0009,
                                          0xc000b, 0, 0);
  const __m512i x = _mm512_permutexvar_epi16(words, _mm512_castsi256_si512(of));
  const __m512i z = _mm512_ternarylogic_epi64(x, _mm512_srli_epi64(x, 2), _mm512_srli_epi64(x, 5), AQ_XOR3);
  /* from bits 4, 10, ... 46 of x and 2, 8, ... 44 of z on */
  const __m512i first = places_3(x, _mm_setr_epi8(0, 1, 1, 2, 2, 3, 2, 3, 3, 4, 4, 5, 5, 6, 5, 6),
                                 _mm_setr_epi16(4, 2, 0, 6, 4, 2, 0, 6));
  const __m512i second = places_3(z, _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 3, 4, 4, 5, 4, 5, 5, 6),
                                  _mm_setr_epi16(2, 0, 6, 4, 2, 0, 6, 4));
  return add_terms(table, first, second);
}
