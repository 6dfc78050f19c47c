/* int8/simd128.c: 8-bit activations with WebAssembly's 128-bit vectors, whose dot product takes 16-bit
 * numbers. */
#include "../trellis/levels/simd128.h"

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

#define AQ_OWN_LEVELS 1
typedef int16_t level_x;
#define AQ_LEVEL_X(code, zero) ((code) - (zero))
#define AQ_LEVEL_PLACE(i) ((i) % 2 * 8 + (i) / 2)

/* The even numbers' products, 256 times, and the odd ones': neither is widened then. */
typedef struct {
  v128_t even, odd;
} level_sums;

AQ_INLINE void level_dot(level_sums *sums, const v128_t of[4], const int16_t *x) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++, x += 16) {
    sums->even = wasm_i32x4_add(sums->even, wasm_i32x4_dot_i16x8(wasm_i16x8_shl(of[i], 8), wasm_v128_load(x)));
    sums->odd = wasm_i32x4_add(sums->odd, wasm_i32x4_dot_i16x8(wasm_i16x8_shr(of[i], 8), wasm_v128_load(x + 8)));
  }
}

AQ_INLINE vi level_total(const level_sums *sums, int32_t zero) {
  (void)zero;
  return (vi)wasm_i32x4_add(sums->odd, wasm_i32x4_shr(sums->even, 8));
}

#include "vector.h"
