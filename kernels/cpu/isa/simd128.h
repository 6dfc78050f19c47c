/* simd128.h: primitives of WebAssembly's 128-bit vectors, four lanes. */
#ifndef AQ_SIMD128_H
#define AQ_SIMD128_H

#include <stddef.h>
#include <stdint.h>

#include "../packed.h"
#include "../product/kernels.h"
#include <wasm_simd128.h>

#define AQ_W 4
#define AQ_D 2
#define AQ_CLIP_UNROLL 2
#define AQ_MR 4
#define AQ_TM 4
#define AQ_UNPACK_BYTES(bits) ((bits) == 8 ? 8 : 4)

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
typedef double vd __attribute__((vector_size(16)));

/* A constant that is loaded once: engines would make it anew where it is used, and clang 14 would take
 * products with known powers of two apart into shifts of each number. */
AQ_INLINE v128_t v_kept(v128_t constant) {
  __asm__("" : "+r"(constant));
  return constant;
}

AQ_INLINE vf v_min(vf a, vf b) { return (vf)wasm_f32x4_pmin((v128_t)a, (v128_t)b); }
AQ_INLINE vf v_max(vf a, vf b) { return (vf)wasm_f32x4_pmax((v128_t)a, (v128_t)b); }
AQ_INLINE vf v_round(vf x) { return (vf)wasm_f32x4_nearest((v128_t)x); }
AQ_INLINE vf v_sqrt(vf x) { return (vf)wasm_f32x4_sqrt((v128_t)x); }
/* 2^23 + 2^22 leaves the whole number in the low bits; truncation would cost a dozen instructions. */
AQ_INLINE vi v_round_to_int(vf x) { return (vi)(x + 12582912.0f) & 0x003fffff; }

#define AQ_OWN_WIDEN
AQ_INLINE vu v_widen(const uint16_t *p) { return (vu)wasm_u32x4_load16x4(p); }
AQ_INLINE void v_narrow(uint16_t *p, vu bits) {
  wasm_v128_store64_lane(p, wasm_u16x8_narrow_i32x4((v128_t)bits, (v128_t)bits), 0);
}

/* aq_half_from_float and aq_float_from_half, four at a time. */
AQ_INLINE vu v_half_bits(vf x) {
  const vu bits = (vu)x, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const vu nan = (vu)(magnitude > 0x7f800000u), over = (vu)(magnitude >= 0x477ff000u);
  const vu small = (vu)(magnitude < 0x38800000u);
  const vu subnormal = (vu)((vf)magnitude + 0.5f) - 0x3f000000u;
  const vu normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  vu half = (small & subnormal) | (~small & normal);
  half = (over & 0x7c00u) | (~over & half);
  half = (nan & (0x7e00u | ((magnitude >> 13) & 0x3ffu))) | (~nan & half);
  return sign | half;
}
AQ_INLINE vf v_half_value(vu bits) {
  const vu sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  const vu special = (vu)(magnitude >= 0x7c00u), nan = (vu)(magnitude > 0x7c00u), small = (vu)(magnitude < 0x400u);
  const vu subnormal = (vu)(__builtin_convertvector((vi)magnitude, vf) * 0x1p-24f);
  const vu normal = (magnitude << 13) + 0x38000000u;
  vu value = (small & subnormal) | (~small & normal);
  value = (special & (0x7f800000u | (magnitude << 13))) | (~special & value);
  return (vf)(sign | value | (nan & 0x00400000u));
}

AQ_INLINE void v_transpose(vf r[4]) {
  const v128_t a = wasm_i32x4_shuffle((v128_t)r[0], (v128_t)r[1], 0, 4, 1, 5);
  const v128_t b = wasm_i32x4_shuffle((v128_t)r[0], (v128_t)r[1], 2, 6, 3, 7);
  const v128_t c = wasm_i32x4_shuffle((v128_t)r[2], (v128_t)r[3], 0, 4, 1, 5);
  const v128_t d = wasm_i32x4_shuffle((v128_t)r[2], (v128_t)r[3], 2, 6, 3, 7);
  r[0] = (vf)wasm_i64x2_shuffle(a, c, 0, 2);
  r[1] = (vf)wasm_i64x2_shuffle(a, c, 1, 3);
  r[2] = (vf)wasm_i64x2_shuffle(b, d, 0, 2);
  r[3] = (vf)wasm_i64x2_shuffle(b, d, 1, 3);
}

/* No shift by lane here: each lane masks its code in place, and a product with 2^-shift brings it down,
 * exactly. */
AQ_INLINE void v_unpack(const uint8_t *bytes, int32_t bits, vf *out) {
  if (bits == 8) {
    const v128_t wide = wasm_u16x8_load8x8(bytes);
    /* 2^23 + code as bits, less 2^23: clang 14 would convert the codes one by one */
    out[0] = (vf)((vu)wasm_u32x4_extend_low_u16x8(wide) | 0x4b000000u) - 8388608.0f;
    out[1] = (vf)((vu)wasm_u32x4_extend_high_u16x8(wide) | 0x4b000000u) - 8388608.0f;
    return;
  }
  uint32_t word;
  __builtin_memcpy(&word, bytes, 4);
  const uint32_t mask = (1u << bits) - 1;
  const vu masks = {mask, mask << bits, mask << 2 * bits, mask << 3 * bits};
  const float step = 1.0f / (float)(1u << bits);
  const vf scales = {1.0f, step, step * step, step * step * step};
  out[0] = __builtin_convertvector((vi)(((vu){0} + word) & masks), vf) * scales;
  out[1] = __builtin_convertvector((vi)(((vu){0} + (word >> (4 * bits))) & masks), vf) * scales;
}

AQ_INLINE vd d_load(const float *p) { return (vd)wasm_f64x2_promote_low_f32x4(wasm_v128_load64_zero(p)); }
AQ_INLINE vd d_abs(vd x) { return (vd)wasm_f64x2_abs((v128_t)x); }
AQ_INLINE vd d_max(vd a, vd b) { return (vd)wasm_f64x2_pmax((v128_t)a, (v128_t)b); }

AQ_INLINE vf v_splat(float x) { return (vf)wasm_f32x4_splat(x); }
AQ_INLINE vf v_fma(vf a, vf b, vf c) { return a * b + c; } /* none here; rounds twice */

/* a b + c rounded once, as aq_fma. */
AQ_INLINE vf v_exact_fma(vf a, vf b, vf c) {
  const v128_t x = (v128_t)a, y = (v128_t)b, z = (v128_t)c;
#define AQ_HIGH(v) wasm_i64x2_shuffle(v, v, 1, 1)
#define AQ_WIDE(v) wasm_f64x2_promote_low_f32x4(v)
  const v128_t low = wasm_f64x2_add(wasm_f64x2_mul(AQ_WIDE(x), AQ_WIDE(y)), AQ_WIDE(z));
  const v128_t high = wasm_f64x2_add(wasm_f64x2_mul(AQ_WIDE(AQ_HIGH(x)), AQ_WIDE(AQ_HIGH(y))), AQ_WIDE(AQ_HIGH(z)));
#undef AQ_HIGH
#undef AQ_WIDE
  const v128_t mask = wasm_i64x2_const_splat(0x1fffffff), middle = wasm_i64x2_const_splat(0x10000000);
  const v128_t least = wasm_f64x2_const_splat(0x1p-126);
  const v128_t smaller = wasm_f64x2_pmin(wasm_f64x2_abs(low), wasm_f64x2_abs(high));
  const v128_t rare = wasm_v128_or(wasm_f64x2_lt(smaller, least),
                                   wasm_v128_or(wasm_i64x2_eq(wasm_v128_and(low, mask), middle),
                                                wasm_i64x2_eq(wasm_v128_and(high, mask), middle)));
  if (__builtin_expect(wasm_v128_any_true(rare), 0)) {
    vf out;
    for (int i = 0; i < AQ_W; i++) out[i] = aq_fma(a[i], b[i], c[i]);
    return out;
  }
  return (vf)wasm_i64x2_shuffle(wasm_f32x4_demote_f64x2_zero(low), wasm_f32x4_demote_f64x2_zero(high), 0, 2);
}

AQ_INLINE vf v_load_half(const uint16_t *p) { return v_half_value(v_widen(p)); }

AQ_INLINE vf v_load_levels(const int8_t *p) {
  const v128_t above = wasm_v128_xor(wasm_v128_load32_zero(p), wasm_i8x16_splat(-128)); /* 128 more, unsigned */
  /* as in v_unpack: clang 14 would convert them one by one */
  const v128_t wide = wasm_u32x4_extend_low_u16x8(wasm_u16x8_extend_low_u8x16(above));
  return (vf)((vu)wide | 0x4b000000u) - (8388608.0f + 128.0f);
}

#define AQ_OWN_FOUR_LEVELS
AQ_INLINE void v_load_four_levels(const int8_t *p, vf out[4]) {
  const v128_t above = wasm_v128_xor(wasm_v128_load(p), wasm_i8x16_splat(-128));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const v128_t place = v_kept((v128_t)((vu){0xffffff00u, 0xffffff01u, 0xffffff02u, 0xffffff03u} + 4u * (uint32_t)i));
    out[i] = (vf)((vu)wasm_i8x16_swizzle(above, place) | 0x4b000000u) - (8388608.0f + 128.0f);
  }
}

/* Four bytes into lanes, and numbers up to 255 back; four times 12 bits from a byte boundary into lanes, with
 * bits above. */
AQ_INLINE vu v_widen_bytes(const uint8_t *p) {
  return (vu)wasm_u32x4_extend_low_u16x8(wasm_u16x8_extend_low_u8x16(wasm_v128_load32_zero(p)));
}
AQ_INLINE void v_narrow_bytes(uint8_t *p, vi codes) {
  const v128_t words = wasm_u16x8_narrow_i32x4((v128_t)codes, (v128_t)codes);
  wasm_v128_store32_lane(p, wasm_u8x16_narrow_i16x8(words, words), 0);
}
AQ_INLINE vu v_widen_triples(const uint8_t *p) {
  uint16_t high;
  __builtin_memcpy(&high, p + 4, 2);
  const v128_t bytes = wasm_i16x8_replace_lane(wasm_v128_load32_zero(p), 2, (int16_t)high);
  const v128_t words = wasm_i8x16_shuffle(bytes, bytes, 0, 1, 15, 15, 1, 2, 15, 15, 3, 4, 15, 15, 4, 5, 15, 15);
  const vu v = (vu)words, odd = {0, ~0u, 0, ~0u};
  return (odd & (v >> 4)) | (~odd & v);
}

#endif
