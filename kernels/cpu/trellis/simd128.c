/* trellis/simd128.c: levels of trellis codes with WebAssembly's 128-bit vectors: windows in vectors, eight swizzles
 * for the half of the table of which the other half is the mirror. */
#include <stdint.h>
#include <wasm_simd128.h>

#include "../packed.h"

#define AQ_LEVELS_FUNCTION aq_levels_simd128
#define AQ_LEVELS 16
#define AQ_LEVELS_READ 8

typedef char level_table; /* sixteen loads a block */
AQ_INLINE level_table load_table(void) { return 0; }

AQ_INLINE void block_levels(level_table table, const uint8_t *from, int8_t *levels) {
  (void)table;
  const v128_t bytes = wasm_v128_load64_zero(from);
  /* a byte and the one before it in 32 bits: v >> 2, v >> 4, v >> 6 and v >> 8 are its four windows */
  const v128_t v = wasm_i8x16_shuffle(bytes, bytes, 0, 1, 15, 15, 1, 2, 15, 15, 2, 3, 15, 15, 3, 4, 15, 15);
  const v128_t low = wasm_v128_or(wasm_v128_and(wasm_u32x4_shr(v, 2), wasm_i32x4_splat(0xff)),
                                  wasm_v128_and(wasm_i32x4_shl(v, 4), wasm_i32x4_splat(0xff00)));
  const v128_t high = wasm_v128_or(wasm_v128_and(wasm_i32x4_shl(v, 10), wasm_i32x4_splat(0xff0000)),
                                   wasm_v128_and(wasm_i32x4_shl(v, 16), wasm_i32x4_splat((int32_t)0xff000000u)));
  const v128_t windows = wasm_v128_or(low, high), second = wasm_i8x16_shr(windows, 7);
  v128_t at = wasm_v128_xor(windows, second), found = wasm_i8x16_splat(0);
  for (int i = 0; i < 8; i++) { /* places out of a part's 16 find 0 */
    found = wasm_v128_or(found, wasm_i8x16_swizzle(wasm_v128_load(aq_trellis_levels + 16 * i), at));
    at = wasm_i8x16_sub(at, wasm_i8x16_splat(16));
  }
  wasm_v128_store(levels, wasm_i8x16_sub(wasm_v128_xor(found, second), second));
}

#include "vector.h"
