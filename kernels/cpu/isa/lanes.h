/* isa/lanes.h: vectors to and from memory and folded into a number, for any instruction set.
 *
 * Expected of an instruction set, in isa/<set>.h:
 *   AQ_W lanes, AQ_CLIP_UNROLL (candidates of a clip search for each pass over a tile)
 *   types vf, vi, vu: AQ_W floats, int32 and uint32 as compiler vectors
 *   v_min(a, b): b < a ? b : a    v_max(a, b): a < b ? b : a   (so NaN in b gives a)
 *   v_round(x), v_round_to_int(x): ties to even, |x| < 2^22
 *   v_half_bits(x), v_half_value(bits): one half float in the low 16 bits of each uint32
 *   v_sqrt(x)
 *   v_load_levels(p): AQ_W signed bytes
 *   v_transpose(r): AQ_W x AQ_W in place
 *   v_unpack(bytes, bits, out): AQ_UNPACK codes from a byte boundary, as floats; reads AQ_UNPACK_BYTES(bits)
 *   AQ_STREAM(p, v), optional: an aligned store past the caches
 *   vd, AQ_D, d_load(p): AQ_D doubles (AQ_D divides 8) from floats; d_abs(x), d_max(a, b)
 */
#ifndef AQ_LANES_H
#define AQ_LANES_H

/* A statement for a width or an element type that is only known when it runs, with `name` a constant in it:
 * the compiler makes code for each. */
#define AQ_CASE(value, name, statement) \
  {                                     \
    enum { name = value };              \
    statement;                          \
    break;                              \
  }
#define AQ_FOR_BITS(width, name, statement)  \
  switch (width) {                           \
    case 2: AQ_CASE(2, name, statement)      \
    case 3: AQ_CASE(3, name, statement)      \
    case 4: AQ_CASE(4, name, statement)      \
    default: AQ_CASE(8, name, statement)     \
  }
#define AQ_FOR_FLOATS(dtype, name, statement)       \
  switch (dtype) {                                  \
    case AQ_F32: AQ_CASE(AQ_F32, name, statement)   \
    case AQ_BF16: AQ_CASE(AQ_BF16, name, statement) \
    default: AQ_CASE(AQ_F16, name, statement)       \
  }

AQ_INLINE vf v_load(const float *p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

AQ_INLINE void v_store(float *p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

#if !defined(AQ_OWN_WIDEN) /* clang 14 takes these apart lane by lane for WebAssembly, which has its own */
typedef uint16_t vh __attribute__((vector_size(2 * AQ_W)));

AQ_INLINE vu v_widen(const uint16_t *p) {
  vh half;
  __builtin_memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, vu);
}

AQ_INLINE void v_narrow(uint16_t *p, vu bits) {
  vh half = __builtin_convertvector(bits, vh);
  __builtin_memcpy(p, &half, sizeof half);
}
#endif

#if !defined(AQ_OWN_FOUR_LEVELS)
AQ_INLINE void v_load_four_levels(const int8_t *p, vf out[4]) {
  for (int i = 0; i < 4; i++) out[i] = v_load_levels(p + i * AQ_W);
}
#endif

#if !defined(AQ_OWN_LOOKUP)
/* Numbers of a table. */
AQ_INLINE vf v_lookup(const float *table, vu at) {
  vf v;
  for (int lane = 0; lane < AQ_W; lane++) v[lane] = table[at[lane]];
  return v;
}
#endif

/* The lanes `distance` further on, for a fold of all lanes into the first in a fixed order. */
#if AQ_W == 16
#define AQ_SHUFFLE(v, d)                                                                                            \
  __builtin_shufflevector(v, v, (d), 1 ^ (d), 2 ^ (d), 3 ^ (d), 4 ^ (d), 5 ^ (d), 6 ^ (d), 7 ^ (d), 8 ^ (d), 9 ^ (d), \
                          10 ^ (d), 11 ^ (d), 12 ^ (d), 13 ^ (d), 14 ^ (d), 15 ^ (d))
#elif AQ_W == 8
#define AQ_SHUFFLE(v, d) \
  __builtin_shufflevector(v, v, (d), 1 ^ (d), 2 ^ (d), 3 ^ (d), 4 ^ (d), 5 ^ (d), 6 ^ (d), 7 ^ (d))
#else
#define AQ_SHUFFLE(v, d) __builtin_shufflevector(v, v, (d), 1 ^ (d), 2 ^ (d), 3 ^ (d))
#endif

AQ_INLINE float v_total(vf v) {
#if AQ_W > 8
  v += AQ_SHUFFLE(v, 8);
#endif
#if AQ_W > 4
  v += AQ_SHUFFLE(v, 4);
#endif
  v += AQ_SHUFFLE(v, 2);
  v += AQ_SHUFFLE(v, 1);
  return v[0];
}

AQ_INLINE float v_largest(vf v) {
#if AQ_W > 8
  v = v_max(v, AQ_SHUFFLE(v, 8));
#endif
#if AQ_W > 4
  v = v_max(v, AQ_SHUFFLE(v, 4));
#endif
  v = v_max(v, AQ_SHUFFLE(v, 2));
  v = v_max(v, AQ_SHUFFLE(v, 1));
  return v[0];
}

#endif
