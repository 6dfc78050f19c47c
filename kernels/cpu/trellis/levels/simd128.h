/* trellis/levels/simd128.h: levels of trellis codes with WebAssembly's byte shuffles. */
#ifndef AQ_TRELLIS_LEVELS_SIMD128_H
#define AQ_TRELLIS_LEVELS_SIMD128_H

#include "../../isa/simd128.h"

typedef v128_t level_vector; /* sixteen */

/* What look-ups hold in registers. */
typedef struct {
  v128_t first, second, low;  /* terms, and 15 in each byte */
  v128_t places[2], up, high; /* of 3 bits, see nibbles */
} level_terms;

AQ_INLINE level_terms load_terms(const int bits) {
  level_terms t = {.low = v_kept(wasm_i8x16_splat(15))};
  t.first = v_kept(wasm_v128_load(aq_trellis_terms[bits - 2]));
  t.second = v_kept(wasm_v128_load(aq_trellis_terms[bits - 2] + 16));
  if (bits == 2) return t;
  t.places[0] = v_kept(wasm_i8x16_make(0, 1, 1, 2, 2, 3, 2, 3, 3, 4, 4, 5, 5, 6, 5, 6));
  t.places[1] = v_kept(wasm_i8x16_make(8, 9, 9, 10, 10, 11, 10, 11, 11, 12, 12, 13, 13, 14, 13, 14));
  t.up = v_kept(wasm_i16x8_make(4, 16, 64, 1, 4, 16, 64, 1));
  t.high = v_kept(wasm_i16x8_splat(15 << 8));
  t.low = v_kept(wasm_i16x8_splat(15));
  return t;
}

AQ_INLINE v128_t sum_of_terms(level_terms table, v128_t first, v128_t second) {
  return wasm_i8x16_add(wasm_i8x16_swizzle(table.first, first), wasm_i8x16_swizzle(table.second, second));
}

/* Levels of the first, second, third and fourth codes of 16 bytes behind from[0]. */
AQ_INLINE void levels_2(level_terms table, const uint8_t *from, v128_t of[4]) {
  const v128_t x = wasm_v128_load(from + 1);
  /* the bytes before those of eight, whose bits move up into them */
  const v128_t before = wasm_v128_and(wasm_v128_load(from), wasm_i64x2_splat(255));
  const v128_t x2 = wasm_v128_or(wasm_i64x2_shl(x, 2), wasm_u64x2_shr(before, 6));
  const v128_t x4 = wasm_v128_or(wasm_i64x2_shl(x, 4), wasm_u64x2_shr(before, 4));
  const v128_t x6 = wasm_v128_or(wasm_i64x2_shl(x, 6), wasm_u64x2_shr(before, 2));
  const v128_t both = wasm_v128_xor(x2, x4), odd = wasm_v128_xor(x, both), even = wasm_v128_xor(both, x6);
#define AQ_LOW(v) wasm_v128_and(v, table.low)
#define AQ_HIGH(v) wasm_v128_and(wasm_u16x8_shr(v, 4), table.low)
  of[0] = sum_of_terms(table, AQ_LOW(x4), AQ_LOW(even));
  of[1] = sum_of_terms(table, AQ_LOW(x2), AQ_LOW(odd));
  of[2] = sum_of_terms(table, AQ_LOW(x), AQ_HIGH(even));
  of[3] = sum_of_terms(table, AQ_HIGH(x2), AQ_HIGH(odd));
#undef AQ_LOW
#undef AQ_HIGH
}

/* Bits 3 i - 1 to 3 i + 2 behind the first byte of a half, i = 0 to 15, each four in a byte. */
AQ_INLINE v128_t nibbles(level_terms table, v128_t bytes, const int half) {
  /* those of two codes in 16 bits, from bit 7, 5, 3 or 9 on, and moved up to bit 9 */
  const v128_t v = wasm_i16x8_mul(wasm_i8x16_swizzle(bytes, table.places[half]), table.up);
  return wasm_v128_or(wasm_v128_and(wasm_u16x8_shr(v, 9), table.low), wasm_v128_and(wasm_u16x8_shr(v, 4), table.high));
}

/* Of 32 codes in twelve bytes behind from[0], in their order. */
AQ_INLINE void levels_3(level_terms table, const uint8_t *from, v128_t levels[2]) {
  /* six bytes and the one before them in each half */
  const v128_t x = wasm_v128_load64_lane(from + 6, wasm_v128_load64_zero(from), 1);
  const v128_t x3 = wasm_i64x2_shl(x, 3), mixed = wasm_v128_xor(wasm_v128_xor(x, x3), wasm_i64x2_shl(x, 5));
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++)
    levels[half] = sum_of_terms(table, nibbles(table, x3, half), nibbles(table, mixed, half));
}

#define AQ_ZIP_BYTES(a, b, i)                                                                                       \
  wasm_i8x16_shuffle(a, b, (i), 16 + (i), 1 + (i), 17 + (i), 2 + (i), 18 + (i), 3 + (i), 19 + (i), 4 + (i), 20 + (i), \
                     5 + (i), 21 + (i), 6 + (i), 22 + (i), 7 + (i), 23 + (i))
#define AQ_ZIP_PAIRS(a, b, i) \
  wasm_i16x8_shuffle(a, b, (i), 8 + (i), 1 + (i), 9 + (i), 2 + (i), 10 + (i), 3 + (i), 11 + (i))

/* Four vectors whose numbers take turns, stored in that order. */
AQ_INLINE void store_in_turn(int8_t *to, const v128_t p[4]) {
  const v128_t a = AQ_ZIP_BYTES(p[0], p[1], 0), b = AQ_ZIP_BYTES(p[2], p[3], 0);
  const v128_t c = AQ_ZIP_BYTES(p[0], p[1], 8), d = AQ_ZIP_BYTES(p[2], p[3], 8);
  wasm_v128_store(to, AQ_ZIP_PAIRS(a, b, 0));
  wasm_v128_store(to + 16, AQ_ZIP_PAIRS(a, b, 4));
  wasm_v128_store(to + 32, AQ_ZIP_PAIRS(c, d, 0));
  wasm_v128_store(to + 48, AQ_ZIP_PAIRS(c, d, 4));
}

AQ_INLINE void store_levels(int8_t *to, v128_t levels) { wasm_v128_store(to, levels); }

#endif
