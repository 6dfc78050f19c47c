/* trellis/simd128.c: levels of trellis codes with WebAssembly's 128-bit vectors: windows in vectors, eight swizzles
 * for the half of the table of 2 bits of which the other half is the mirror, sixteen for that of 3. */
#include <stdint.h>
#include <wasm_simd128.h>

#include "../packed.h"

typedef char level_table; /* loads in every block */
AQ_INLINE level_table load_table(void) { return 0; }

/* Levels at places of half a table; `second`: -1 where they are of the other half. */
AQ_INLINE void store_levels(const int8_t *table, const int parts, v128_t at, v128_t second, int8_t *levels) {
  v128_t found = wasm_i8x16_splat(0);
#pragma GCC unroll 16
  for (int i = 0; i < parts; i++) { /* places out of a part's 16 find 0 */
    found = wasm_v128_or(found, wasm_i8x16_swizzle(wasm_v128_load(table + 16 * i), at));
    at = wasm_i8x16_sub(at, wasm_i8x16_splat(16));
  }
  wasm_v128_store(levels, wasm_i8x16_sub(wasm_v128_xor(found, second), second));
}

AQ_INLINE void block_levels_2(level_table table, const uint8_t *from, int8_t *levels) {
  (void)table;
  const v128_t bytes = wasm_v128_load64_zero(from);
  /* a byte and the one before it in 32 bits: v >> 2, v >> 4, v >> 6 and v >> 8 are its four windows */
  const v128_t v = wasm_i8x16_shuffle(bytes, bytes, 0, 1, 15, 15, 1, 2, 15, 15, 2, 3, 15, 15, 3, 4, 15, 15);
  const v128_t low = wasm_v128_or(wasm_v128_and(wasm_u32x4_shr(v, 2), wasm_i32x4_splat(0xff)),
                                  wasm_v128_and(wasm_i32x4_shl(v, 4), wasm_i32x4_splat(0xff00)));
  const v128_t high = wasm_v128_or(wasm_v128_and(wasm_i32x4_shl(v, 10), wasm_i32x4_splat(0xff0000)),
                                   wasm_v128_and(wasm_i32x4_shl(v, 16), wasm_i32x4_splat((int32_t)0xff000000u)));
  const v128_t windows = wasm_v128_or(low, high), second = wasm_i8x16_shr(windows, 7);
  store_levels(aq_trellis_levels_2, 8, wasm_v128_xor(windows, second), second, levels);
}

AQ_INLINE void block_levels_3(level_table table, const uint8_t *from, int8_t *levels) {
  (void)table;
  const v128_t bytes = wasm_v128_load64_zero(from), up = wasm_i16x8_make(32, 4, 128, 16, 2, 64, 8, 1);
  /* the windows of eight codes in the highest bits of 16 */
  const v128_t a = wasm_i16x8_mul(up, wasm_i8x16_shuffle(bytes, bytes, 0, 1, 0, 1, 1, 2, 1, 2, 1, 2, 2, 3, 2, 3, 2, 3));
  const v128_t b = wasm_i16x8_mul(up, wasm_i8x16_shuffle(bytes, bytes, 3, 4, 3, 4, 4, 5, 4, 5, 4, 5, 5, 6, 5, 6, 5, 6));
  const v128_t turned_a = wasm_i16x8_shr(a, 15), turned_b = wasm_i16x8_shr(b, 15);
  const v128_t at = wasm_u8x16_narrow_i16x8(wasm_u16x8_shr(wasm_v128_xor(a, turned_a), 7),
                                            wasm_u16x8_shr(wasm_v128_xor(b, turned_b), 7));
  store_levels(aq_trellis_levels_3, 16, at, wasm_i8x16_narrow_i16x8(turned_a, turned_b), levels);
}

#define AQ_LEVELS 16
#define AQ_LEVELS_FUNCTION aq_levels_2_simd128
#define AQ_LEVELS_BITS 2
#define AQ_LEVELS_READ 8
#define AQ_LEVELS_TABLE level_table
#define AQ_LOAD_TABLE load_table
#define AQ_BLOCK_LEVELS block_levels_2
#include "vector.h"

#define AQ_LEVELS_FUNCTION aq_levels_3_simd128
#define AQ_LEVELS_BITS 3
#define AQ_LEVELS_READ 8
#define AQ_LEVELS_TABLE level_table
#define AQ_LOAD_TABLE load_table
#define AQ_BLOCK_LEVELS block_levels_3
#include "vector.h"
