/* avx2.h: primitives of AVX2, FMA and F16C, eight lanes. Included only by files that are compiled with the
 * matching -m flags and reached after a check. */
#ifndef AQ_AVX2_H
#define AQ_AVX2_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "../packed.h"

#define AQ_W 8
#define AQ_D 4
#define AQ_CLIP_UNROLL 2
#define AQ_MR 6
#define AQ_TM 6
#define AQ_UNPACK_BYTES(bits) ((bits) == 8 ? 8 : 4)

typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint32_t vu __attribute__((vector_size(32)));
typedef double vd __attribute__((vector_size(32)));

AQ_INLINE vf v_min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)b, (__m256)a); }
AQ_INLINE vf v_max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)b, (__m256)a); }
AQ_INLINE vf v_round(vf x) {
  return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
AQ_INLINE vf v_sqrt(vf x) { return (vf)_mm256_sqrt_ps((__m256)x); }
AQ_INLINE vi v_round_to_int(vf x) { return (vi)_mm256_cvtps_epi32((__m256)x); }
AQ_INLINE vu v_half_bits(vf x) {
  return (vu)_mm256_cvtepu16_epi32(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
AQ_INLINE vf v_half_value(vu bits) {
  __m128i low = _mm256_castsi256_si128((__m256i)bits), high = _mm256_extracti128_si256((__m256i)bits, 1);
  return (vf)_mm256_cvtph_ps(_mm_packus_epi32(low, high));
}

AQ_INLINE void v_transpose(vf r[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = (vf)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4] = (vf)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

AQ_INLINE void v_unpack(const uint8_t *bytes, int32_t bits, vf *out) {
  __m256i codes;
  if (bits == 8) {
    codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes));
  } else {
    int32_t word;
    __builtin_memcpy(&word, bytes, 4);
    const __m256i shifts = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(bits));
    codes = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(word), shifts), _mm256_set1_epi32((1 << bits) - 1));
  }
  out[0] = (vf)_mm256_cvtepi32_ps(codes);
}

AQ_INLINE vd d_load(const float *p) { return (vd)_mm256_cvtps_pd(_mm_loadu_ps(p)); }
AQ_INLINE vd d_abs(vd x) { return (vd)_mm256_andnot_pd(_mm256_set1_pd(-0.0), (__m256d)x); }
AQ_INLINE vd d_max(vd a, vd b) { return (vd)_mm256_max_pd((__m256d)b, (__m256d)a); }

AQ_INLINE vf v_splat(float x) { return (vf)_mm256_set1_ps(x); }
AQ_INLINE vf v_fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

#define v_exact_fma v_fma

AQ_INLINE vf v_load_half(const uint16_t *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

/* Up to 3 bits a permutation looks the weight up by its code's low bits; the bits above need no masking. */
#define AQ_OWN_DECODE
#define AQ_DECODE_BYTES(bits) (2 * (bits))
#define AQ_DECODE_ORDER(bits, lane) (lane)
typedef struct {
  vf scale, offset, table;
} v_grid;

AQ_INLINE v_grid v_grid_of(float scale, float offset, int32_t bits) {
  const vf s = v_splat(scale), o = v_splat(offset), four = {0, 1, 2, 3, 0, 1, 2, 3}, eight = {0, 1, 2, 3, 4, 5, 6, 7};
  return (v_grid){s, o, v_fma(bits == 2 ? four : eight, s, o)};
}

AQ_INLINE void v_decode(const uint8_t *from, int32_t bits, v_grid g, vf out[2]) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  if (bits == 8) {
    for (int i = 0; i < 2; i++) {
      const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(from + 8 * i)));
      out[i] = v_fma((vf)_mm256_cvtepi32_ps(codes), g.scale, g.offset);
    }
    return;
  }
  int32_t low, high;
  __builtin_memcpy(&low, from, 4);
  __builtin_memcpy(&high, from + (bits == 2 ? 0 : bits == 3 ? 2 : 4), 4);
  const __m256i first = _mm256_mullo_epi32(lanes, _mm256_set1_epi32(bits));
  const __m256i second = _mm256_add_epi32(first, _mm256_set1_epi32(bits == 2 ? 16 : bits == 3 ? 8 : 0));
  const __m256i words[2] = {_mm256_srlv_epi32(_mm256_set1_epi32(low), first),
                            _mm256_srlv_epi32(_mm256_set1_epi32(high), second)};
  for (int i = 0; i < 2; i++) {
    if (bits == 4)
      out[i] = v_fma((vf)_mm256_cvtepi32_ps(_mm256_and_si256(words[i], _mm256_set1_epi32(15))), g.scale, g.offset);
    else if (bits == 2)
      out[i] = (vf)_mm256_permutevar_ps((__m256)g.table, words[i]); /* two bits of index, and cheaper */
    else
      out[i] = (vf)_mm256_permutevar8x32_ps((__m256)g.table, words[i]);
  }
}

AQ_INLINE vf v_load_levels(const int8_t *p) {
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)));
}

/* Eight bytes into lanes, and numbers up to 255 back; eight times 12 bits from a byte boundary into lanes,
 * with bits above. */
AQ_INLINE vu v_widen_bytes(const uint8_t *p) { return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
AQ_INLINE void v_narrow_bytes(uint8_t *p, vi codes) {
  const __m128i low = _mm256_castsi256_si128((__m256i)codes), high = _mm256_extracti128_si256((__m256i)codes, 1);
  const __m128i words = _mm_packus_epi32(low, high);
  _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(words, words));
}
AQ_INLINE vu v_widen_triples(const uint8_t *p) {
  int32_t high;
  __builtin_memcpy(&high, p + 8, 4);
  const __m128i bytes = _mm_insert_epi32(_mm_loadl_epi64((const __m128i *)p), high, 2);
  const __m256i places = _mm256_setr_epi8(0, 1, -1, -1, 1, 2, -1, -1, 3, 4, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 7, 8,
                                          -1,
                                          -1, 9, 10, -1, -1, 10, 11, -1, -1);
  const __m256i shifts = _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4);
  return (vu)_mm256_srlv_epi32(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), places), shifts);
}

#define AQ_OWN_LOOKUP
AQ_INLINE vf v_lookup(const float *table, vu at) { return (vf)_mm256_i32gather_ps(table, (__m256i)at, 4); }

#endif
