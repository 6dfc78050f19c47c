/* int8/simd128.c: 8-bit activations with WebAssembly's 128-bit vectors, whose dot product takes 16-bit
 * numbers. */
#include "../isa/simd128.h"

#define AQ_NAMED(family) aq_##family##_simd128
#define AQ_TOKENS 4
#define AQ_OWN_WIDE 0
#define AQ_OFFSET 0

AQ_INLINE vi v_dot(vi sum, vi w, vi x, const int32_t wide) {
  (void)wide;
  const v128_t a = (v128_t)w, b = (v128_t)x;
  const v128_t low = wasm_i32x4_dot_i16x8(wasm_u16x8_extend_low_u8x16(a), wasm_u16x8_extend_low_u8x16(b));
  const v128_t high = wasm_i32x4_dot_i16x8(wasm_u16x8_extend_high_u8x16(a), wasm_u16x8_extend_high_u8x16(b));
  return sum + (vi)wasm_i32x4_shuffle(low, high, 0, 2, 4, 6) + (vi)wasm_i32x4_shuffle(low, high, 1, 3, 5, 7);
}

#define AQ_PAIRS(bits) 1
AQ_INLINE vi v_dot_pairs(vi sum, vi w, vi x) { return sum + (vi)wasm_i32x4_dot_i16x8((v128_t)w, (v128_t)x); }

#include "vector.h"
