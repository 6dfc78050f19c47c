/* trellis/levels/avx2.h: levels of trellis codes with AVX2: two byte shuffles find the terms of 32 codes.
 *
 * Both places of a window are four neighbouring bits of a stream: the first of the row's bits x, the four
 * before the code, the second of z, the four that end with the code; bit i of z is bits i, i - bits and
 * i - bits - 2 of x, added without carry. */
#include <immintrin.h>
#include <stdint.h>

#include "../../packed.h"

typedef struct {
  __m256i first, second;
  __m256i low; /* four bits of each byte */
} term_table;

/* `v`, of which the compiler knows nothing: GCC loads constants again in loops, and masks x ^ y again where x
 * and y are masked. */
AQ_INLINE __m256i unknown(__m256i v) {
  __asm__("" : "+x"(v));
  return v;
}

/* `more` is added to every level. */
AQ_INLINE term_table load_terms(const int bits, int8_t more) {
  const __m128i *from = (const __m128i *)(const void *)aq_trellis_terms[bits - 2];
  const __m256i first = _mm256_broadcastsi128_si256(_mm_loadu_si128(from));
  const __m256i second = _mm256_broadcastsi128_si256(_mm_loadu_si128(from + 1));
  return (term_table){first, _mm256_add_epi8(second, _mm256_set1_epi8(more)), unknown(_mm256_set1_epi8(15))};
}

AQ_INLINE __m256i levels_at_places(term_table table, __m256i first, __m256i second) {
  return _mm256_add_epi8(_mm256_shuffle_epi8(table.first, first), _mm256_shuffle_epi8(table.second, second));
}

/* Levels of the 128 codes of 2 bits of `bytes`: levels[k] has every byte's code k. `before`: the bytes that
 * lie one before each. */
AQ_INLINE void levels_of_2(term_table table, __m256i before, __m256i bytes, __m256i levels[4]) {
  const __m256i low = table.low;
  /* bits -6 .. -3 of each byte, -4 .. -1, -2 .. 1, 0 .. 3, 2 .. 5, 4 .. 7; the third lies in two bytes: it is
   * taken from the lower of four by their bytes 0 and 1, from the upper by 2 and 3 */
  const __m256i across = _mm256_blend_epi16(_mm256_srli_epi32(before, 6), _mm256_slli_epi32(bytes, 2), 0xaa);
  const __m256i a = _mm256_srli_epi16(before, 2), b = unknown(_mm256_and_si256(_mm256_srli_epi16(before, 4), low));
  const __m256i c = unknown(_mm256_and_si256(across, low)), d = unknown(_mm256_and_si256(bytes, low));
  const __m256i e = unknown(_mm256_and_si256(_mm256_srli_epi16(bytes, 2), low)), f = _mm256_srli_epi16(bytes, 4);
  const __m256i bc = _mm256_xor_si256(b, c), de = _mm256_xor_si256(d, e);
  levels[0] = levels_at_places(table, b, _mm256_and_si256(_mm256_xor_si256(a, bc), low));
  levels[1] = levels_at_places(table, c, _mm256_xor_si256(bc, d));
  levels[2] = levels_at_places(table, d, _mm256_xor_si256(c, de));
  levels[3] = levels_at_places(table, e, _mm256_and_si256(_mm256_xor_si256(de, f), low));
}

/* Of a lane's four bytes, whose bits 4 + 3j .. 7 + 3j are those of code j: codes 2, 0, 7, 4, then 3, 1, 6,
 * 5. */
AQ_INLINE void places_of_3(__m256i low, __m256i lanes, __m256i places[2]) {
  const __m256i odd = _mm256_set1_epi16((short)0xff00), next = _mm256_srli_epi32(lanes, 1);
#define AQ_UP(lower, upper) _mm256_set1_epi32(1 << (lower) | 1 << (16 + (upper)))
  const __m256i a = _mm256_mulhi_epu16(lanes, AQ_UP(6, 7)), b = _mm256_mullo_epi16(lanes, AQ_UP(4, 8));
  const __m256i c = _mm256_mulhi_epu16(next, AQ_UP(4, 11)), d = _mm256_mullo_epi16(next, AQ_UP(2, 6));
#undef AQ_UP
  places[0] = _mm256_and_si256(_mm256_blendv_epi8(a, b, odd), low);
  places[1] = _mm256_and_si256(_mm256_blendv_epi8(c, d, odd), low);
}

/* Levels of 64 codes of 3 bits, of which each half of `bytes` holds 32 and begins with the byte before them:
 * of each eight, four bytes of levels[0] have codes 2, 0, 7, 4 and of levels[1] 3, 1, 6, 5. */
AQ_INLINE void levels_of_3(term_table table, __m256i bytes, __m256i levels[2]) {
  const __m128i triples = _mm_setr_epi8(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12);
  const __m256i x = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(triples));
  /* z three bits down */
  const __m256i z = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi32(x, 3), x), _mm256_slli_epi32(x, 2));
  __m256i first[2], second[2];
  places_of_3(table.low, x, first);
  places_of_3(table.low, z, second);
  for (int i = 0; i < 2; i++) levels[i] = levels_at_places(table, first[i], second[i]);
}

/* Halves of 16 bytes from `from` and from `next` on. */
AQ_INLINE __m256i load_halves(const uint8_t *from, const uint8_t *next) {
  const __m128i low = _mm_loadu_si128((const __m128i *)(const void *)from);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128((const __m128i *)(const void *)next), 1);
}
