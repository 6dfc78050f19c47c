/* avx512.h: primitives of AVX-512 F, BW, DQ and VL, sixteen lanes. Included only by files that are compiled
 * with the matching -m flags and reached after a check. */
#ifndef AQ_AVX512_H
#define AQ_AVX512_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "../packed.h"

#define AQ_W 16
#define AQ_D 8
#define AQ_STREAM(p, v) _mm512_stream_ps(p, (__m512)(v))
#define AQ_CLIP_UNROLL 4
#define AQ_MR 14
#define AQ_TM 14
#define AQ_UNPACK_BYTES(bits) ((bits) == 8 ? 16 : (bits) + 4)

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef double vd __attribute__((vector_size(64)));

AQ_INLINE vf v_min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)b, (__m512)a); }
AQ_INLINE vf v_max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)b, (__m512)a); }
AQ_INLINE vf v_round(vf x) { return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
AQ_INLINE vf v_sqrt(vf x) { return (vf)_mm512_sqrt_ps((__m512)x); }
AQ_INLINE vi v_round_to_int(vf x) { return (vi)_mm512_cvtps_epi32((__m512)x); }
AQ_INLINE vu v_half_bits(vf x) {
  return (vu)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
AQ_INLINE vf v_half_value(vu bits) { return (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)bits)); }

/* Four stages; after each, blocks of 1, 2, 4 and 8 lanes are in place. */
AQ_INLINE void v_transpose(vf r[16]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps((__m512)r[i], (__m512)r[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)r[i], (__m512)r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = (vf)_mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
    r[i + 8] = (vf)_mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
    r[i + 4] = (vf)_mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0x88);
    r[i + 12] = (vf)_mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0xdd);
  }
}

AQ_INLINE void v_unpack(const uint8_t *bytes, int32_t bits, vf *out) {
  __m512i codes;
  if (bits == 8) {
    codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes));
  } else {
    int32_t low, high; /* eight codes each */
    __builtin_memcpy(&low, bytes, 4);
    __builtin_memcpy(&high, bytes + bits, 4);
    const __m512i words = _mm512_inserti64x4(_mm512_set1_epi32(low), _mm256_set1_epi32(high), 1);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i shifts = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(bits));
    codes = _mm512_and_si512(_mm512_srlv_epi32(words, shifts), _mm512_set1_epi32((1 << bits) - 1));
  }
  out[0] = (vf)_mm512_cvtepi32_ps(codes);
}

AQ_INLINE vd d_load(const float *p) { return (vd)_mm512_cvtps_pd(_mm256_loadu_ps(p)); }
AQ_INLINE vd d_abs(vd x) { return (vd)_mm512_abs_pd((__m512d)x); }
AQ_INLINE vd d_max(vd a, vd b) { return (vd)_mm512_max_pd((__m512d)b, (__m512d)a); }

AQ_INLINE vf v_splat(float x) { return (vf)_mm512_set1_ps(x); }
AQ_INLINE vf v_fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

#define v_exact_fma v_fma

AQ_INLINE vf v_load_half(const uint16_t *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

/* Up to 4 bits a permutation looks the weight up by its code's low bits; the bits above need no masking. */
#define AQ_OWN_DECODE
#define AQ_DECODE_BYTES(bits) (2 * (bits))
/* a broadcast of 64 bits leaves codes 0-7 in the even lanes and 8-15 in the odd ones */
#define AQ_DECODE_ORDER(bits, lane) ((bits) == 4 ? (lane) / 2 + 8 * ((lane) % 2) : (lane))
typedef struct {
  vf scale, offset, table;
} v_grid;

AQ_INLINE v_grid v_grid_of(float scale, float offset, int32_t bits) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const vf codes = (vf)_mm512_cvtepi32_ps(_mm512_and_si512(lanes, _mm512_set1_epi32((1 << bits) - 1)));
  const vf s = v_splat(scale), o = v_splat(offset);
  return (v_grid){s, o, v_fma(codes, s, o)};
}

AQ_INLINE void v_decode(const uint8_t *from, int32_t bits, v_grid g, vf out[1]) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i words, shifts = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(bits));
  if (bits == 8) {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
    out[0] = v_fma((vf)_mm512_cvtepi32_ps(codes), g.scale, g.offset);
    return;
  }
  if (bits == 4) {
    int64_t word;
    __builtin_memcpy(&word, from, 8);
    words = _mm512_set1_epi64(word);
    shifts = _mm512_slli_epi32(_mm512_srli_epi32(lanes, 1), 2);
  } else {
    int32_t low, high;
    __builtin_memcpy(&low, from, 4);
    __builtin_memcpy(&high, from + (bits == 3 ? 2 : 0), 4);
    words = _mm512_set1_epi32(low);
    if (bits == 3) {
      words = _mm512_mask_set1_epi32(words, 0xff00, high);
      shifts = _mm512_mask_sub_epi32(shifts, 0xff00, shifts, _mm512_set1_epi32(16));
    }
  }
  words = _mm512_srlv_epi32(words, shifts);
  if (bits == 2)
    out[0] = (vf)_mm512_permutevar_ps((__m512)g.table, words); /* two bits of index, and cheaper */
  else
    out[0] = (vf)_mm512_permutexvar_ps(words, (__m512)g.table);
}

AQ_INLINE vf v_load_levels(const int8_t *p) {
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}

/* Sixteen bytes into lanes, and numbers up to 255 back; sixteen times 12 bits from a byte boundary into
 * lanes, with bits above. */
AQ_INLINE vu v_widen_bytes(const uint8_t *p) { return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
AQ_INLINE void v_narrow_bytes(uint8_t *p, vi codes) {
  _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)codes));
}
AQ_INLINE vu v_widen_triples(const uint8_t *p) {
  const __m512i words = _mm512_maskz_loadu_epi16(0xfff, p);
  /* lane i begins at bit 12 i: in word 3 i / 4, at bit 0, 12, 8 or 4; with the next word the 12 bits are
   * there */
  const __m512i places = _mm512_setr_epi32(0x10000, 0x10000, 0x20001, 0x30002, 0x40003, 0x40003, 0x50004, 0x60005,
                                           0x70006, 0x70006, 0x80007, 0x90008, 0xa0009, 0xa0009, 0xb000a, 0xc000b);
  const __m512i shifts = _mm512_setr_epi32(0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4);
  return (vu)_mm512_srlv_epi32(_mm512_permutexvar_epi16(places, words), shifts);
}

#define AQ_OWN_LOOKUP
AQ_INLINE vf v_lookup(const float *table, vu at) { return (vf)_mm512_i32gather_ps((__m512i)at, table, 4); }

/* Those of sixteen numbers that the low four bits of `at` choose. */
#define AQ_OWN_SIXTEEN
AQ_INLINE vf v_sixteen(const float *numbers, vu at) {
  return (vf)_mm512_permutexvar_ps((__m512i)at, _mm512_loadu_ps(numbers));
}

#endif
