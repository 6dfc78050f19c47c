/* trellis/levels/avx512.h: levels of trellis codes with AVX-512 BW: a byte shuffle for each of a level's two
 * terms. Where a file is compiled for VBMI, places need no mask, and a multishift finds them. */
#ifndef AQ_TRELLIS_LEVELS_AVX512_H
#define AQ_TRELLIS_LEVELS_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#include "../../packed.h"

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

/* Terms at the places in the low four bits of bytes. */
AQ_INLINE __m512i terms_at(__m512i terms, __m512i places) {
#if defined(__AVX512VBMI__)
  return _mm512_permutexvar_epi8(places, terms);
#else
  return _mm512_shuffle_epi8(terms, _mm512_and_si512(places, _mm512_set1_epi8(15)));
#endif
}

/* Levels of windows whose terms have these places. */
AQ_INLINE __m512i add_terms(level_table table, __m512i first, __m512i second) {
  return _mm512_add_epi8(terms_at(table.first, first), terms_at(table.second, second));
}

#define AQ_XOR3 0x96
#define AQ_SELECT 0xca /* a ? b : c */

/* Places of sixteen codes in half 0 or 1 of each 128 bits: the bits from `begin`, `begin` + 3, ... on, of
 * which the lowest four count. */
AQ_INLINE __m512i places_3(__m512i x, int half, int begin) {
#if defined(__AVX512VBMI__)
  const __m128i steps = _mm_setr_epi8(0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45);
  const __m512i at = _mm512_broadcast_i32x4(_mm_add_epi8(_mm_set1_epi8((char)begin), steps));
  return _mm512_multishift_epi64_epi8(at, half ? _mm512_unpackhi_epi64(x, x) : _mm512_unpacklo_epi64(x, x));
#else
  /* a 16-bit number gets the bytes of two codes; their places lie three bits apart, then eight */
  const __m128i bits = _mm_add_epi16(_mm_set1_epi16((short)begin), _mm_setr_epi16(0, 6, 12, 18, 24, 30, 36, 42));
  const __m128i bytes = _mm_mullo_epi16(_mm_srli_epi16(bits, 3), _mm_set1_epi16(0x101));
  const __m512i places = _mm512_broadcast_i32x4(_mm_add_epi8(bytes, _mm_set1_epi16(half ? 0x908 : 0x100)));
  const __m512i shifts = _mm512_broadcast_i32x4(_mm_and_si128(bits, _mm_set1_epi16(7)));
  const __m512i v = _mm512_srlv_epi16(_mm512_shuffle_epi8(x, places), shifts);
  return _mm512_ternarylogic_epi64(_mm512_set1_epi16(255), v, _mm512_slli_epi16(v, 5), AQ_SELECT);
#endif
}

/* The exclusive or whose bits are the second places, in each 64 bits. */
AQ_INLINE __m512i mixed_3(__m512i x) {
  return _mm512_ternarylogic_epi64(x, _mm512_srli_epi64(x, 2), _mm512_srli_epi64(x, 5), AQ_XOR3);
}

/* Levels of sixteen codes of 3 bits in half 0 or 1 of each 128 bits of x, behind the byte before them; z is x
 * mixed. */
AQ_INLINE __m512i levels_3(level_table table, __m512i x, __m512i z, int half) {
  return add_terms(table, places_3(x, half, 4), places_3(z, half, 2));
}

/* Levels of 64 codes, of which `of` begins with the byte before them. */
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
    const __m512i first = _mm512_srli_epi16(windows, 2);
    const __m512i second = _mm512_ternarylogic_epi64(windows, first, _mm512_srli_epi16(windows, 4), AQ_XOR3);
    return add_terms(table, first, second);
  }
  const __m512i words = _mm512_setr_epi32(0x10000, 0x30002, 0, 0, 0x40003, 0x60005, 0, 0, 0x70006, 0x90008, 0, 0, 0xa0009,
                                          0xc000b, 0, 0);
  const __m512i x = _mm512_permutexvar_epi16(words, _mm512_castsi256_si512(of));
  return levels_3(table, x, mixed_3(x), 0);
}

/* Levels of 256 codes from byte `from` on, in an order that takes fewer operations: in each vector the same
 * 128 bits are of the same 64 codes. `there`: its lowest bit is whether a byte is before, the others are set.
 *
 *     levels[k], byte 16 l + i     2 bits: code 64 l + 4 i + k     3 bits: code 64 l + 16 k + i */
AQ_INLINE void block_levels(const int bits, level_table table, const uint8_t *from, __mmask64 there, __m512i levels[4]) {
  const __m512i before = _mm512_maskz_loadu_epi8(there, from - 1);
  if (bits == 2) {
    /* a byte's bits moved up by 2 and by 4, those of the byte before it coming in; z is the exclusive or of
     * the three, and the second place of its code k lies from bit 2k - 2 on */
    __m512i x = _mm512_loadu_si512(from);
    __asm__("" : "+v"(x)); /* loaded once: each operation that loads it again would wait for memory */
    const __m512i last = _mm512_srli_epi16(before, 4);
    const __m512i up_2 = _mm512_ternarylogic_epi64(_mm512_set1_epi8((char)0xfc), _mm512_slli_epi16(x, 2),
                                                   _mm512_srli_epi16(before, 6), AQ_SELECT);
    const __m512i up_4 =
        _mm512_ternarylogic_epi64(_mm512_set1_epi8((char)0xf0), _mm512_slli_epi16(x, 4), last, AQ_SELECT);
    const __m512i z = _mm512_ternarylogic_epi64(x, up_2, up_4, AQ_XOR3);
    const __m512i z_before = _mm512_ternarylogic_epi64(up_2, last, _mm512_srli_epi16(before, 2), AQ_XOR3);
    const __m512i first[4] = {last, up_2, x, _mm512_srli_epi16(x, 2)};
    const __m512i second[4] = {z_before, z, _mm512_srli_epi16(z, 2), _mm512_srli_epi16(z, 4)};
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
      levels[k] = add_terms(table, first[k], second[k]);
    return;
  }
  /* 32 codes and the byte before them in each 128 bits, then sixteen in each half */
  const __m512i more = _mm512_loadu_si512(from + 35);
  const __m512i halves = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9, 10, 11, 12, 13));
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const __m512i words = i == 0 ? _mm512_setr_epi32(0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 25, 26, 27, 28)
                                 : _mm512_setr_epi32(3, 4, 5, 6, 9, 10, 11, 12, 15, 23, 24, 25, 28, 29, 30, 31);
    const __m512i x = _mm512_shuffle_epi8(_mm512_permutex2var_epi32(before, words, more), halves);
    levels[2 * i] = levels_3(table, x, mixed_3(x), 0);
    levels[2 * i + 1] = levels_3(table, x, mixed_3(x), 1);
  }
}

#endif
