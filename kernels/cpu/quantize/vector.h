/* vector.h: the kernels over vectors of AQ_W floats, included once by each instruction set's file after it
 * has defined the primitives below. Results equal scalar.c's to the bit.
 *
 * Quantizing puts one group in each lane: a tile holds AQ_SEGMENT columns of AQ_W groups, transposed. Sums
 * then run down the lanes in the oracle's order, and nothing is ever added across lanes.
 *
 *     tile[i] = column i of group 0 | column i of group 1 | ... | column i of group AQ_W - 1
 *
 * Expected from the including file:
 *   AQ_W, AQ_CLIP_UNROLL (candidates of a clip search per pass over a tile), AQ_NAMED(family) (name of its table)
 *   types vf, vi, vu: AQ_W floats, int32 and uint32 as compiler vectors
 *   v_min(a, b): b < a ? b : a    v_max(a, b): a < b ? b : a   (so NaN in b gives a)
 *   v_round(x), v_round_to_int(x): ties to even, |x| < 2^22
 *   v_half_bits(x), v_half_value(bits): one half float in the low 16 bits of each uint32
 *   v_sqrt(x)
 *   v_transpose(r): AQ_W x AQ_W in place
 *   v_unpack(bytes, bits, out): AQ_UNPACK codes from a byte boundary, as floats; reads AQ_UNPACK_BYTES(bits)
 *   AQ_STREAM(p, v), optional: an aligned store past the caches
 *   vd, AQ_D, d_load(p): AQ_D doubles (AQ_D divides 8) from floats; d_abs(x), d_max(a, b)
 */
#include "../isa/lanes.h"
#include "kernels.h"

#define AQ_UNPACK (AQ_W > 8 ? AQ_W : 8)

AQ_INLINE vf v_set(float x) { return (vf){0} + x; }

AQ_INLINE vf v_select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

AQ_INLINE vf v_round_half(vf x) { return v_half_value(v_half_bits(x)); }

/* Loads and stores --------------------------------------------------------------------------------------- */

typedef uint8_t vb __attribute__((vector_size(AQ_W)));

/* aq_float_from_e4m3 and aq_float_from_e5m2, AQ_W at a time. */
AQ_INLINE vf v_load_f8(const uint8_t *in, int32_t dtype) {
  vb bytes;
  __builtin_memcpy(&bytes, in, sizeof bytes);
  const vu code = __builtin_convertvector(bytes, vu);
  if (dtype == AQ_F8_E5M2) return v_half_value(code << 8);
  const vu sign = (code & 0x80u) << 24, magnitude = code & 0x7fu;
  const vu small = (vu)(magnitude < 8u), nan = (vu)(magnitude == 0x7fu);
  const vu subnormal = (vu)(__builtin_convertvector((vi)magnitude, vf) * 0x1p-9f);
  const vu normal = (magnitude << 20) + 0x3c000000u;
  return (vf)(sign | (nan & 0x7fc00000u) | (~nan & ((small & subnormal) | (~small & normal))));
}

AQ_INLINE vf v_load_as(const void *in, int32_t dtype, size_t i) {
  if (dtype == AQ_F32) return v_load((const float *)in + i);
  if (dtype == AQ_F8_E4M3 || dtype == AQ_F8_E5M2) return v_load_f8((const uint8_t *)in + i, dtype);
  const vu wide = v_widen((const uint16_t *)in + i);
  return dtype == AQ_BF16 ? (vf)(wide << 16) : v_half_value(wide);
}

AQ_INLINE void v_store_as(vf v, void *out, int32_t dtype, size_t i) {
  if (dtype == AQ_F32) {
    v_store((float *)out + i, v);
    return;
  }
  vu bits;
  if (dtype == AQ_BF16) {
    vu raw = (vu)v;
    vu nan = (vu)(v != v);
    bits = (nan & ((raw >> 16) | 0x40u)) | (~nan & ((raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16));
  } else {
    bits = v_half_bits(v);
  }
  v_narrow((uint16_t *)out + i, bits);
}

AQ_INLINE void load_vectors(const void *in, int32_t dtype, size_t first, size_t n, float *out) {
  size_t i = 0;
  for (; i + AQ_W <= n; i += AQ_W) v_store(out + i, v_load_as(in, dtype, first + i));
  aq_quantize_scalar.load(in, dtype, first + i, n - i, out + i);
}

static void load(const void *in, int32_t dtype, size_t first, size_t n, float *out) {
  switch (dtype) {
    case AQ_F64: aq_quantize_scalar.load(in, dtype, first, n, out); break;
    case AQ_F8_E4M3: load_vectors(in, AQ_F8_E4M3, first, n, out); break;
    case AQ_F8_E5M2: load_vectors(in, AQ_F8_E5M2, first, n, out); break;
    default: AQ_FOR_FLOATS(dtype, type, load_vectors(in, type, first, n, out))
  }
}

AQ_INLINE void store_vectors(const float *in, size_t n, void *out, int32_t dtype, size_t first) {
  size_t i = 0;
  for (; i + AQ_W <= n; i += AQ_W) v_store_as(v_load(in + i), out, dtype, first + i);
  aq_quantize_scalar.store(in + i, n - i, out, dtype, first + i);
}

static void store(const float *in, size_t n, void *out, int32_t dtype, size_t first) {
  if (dtype == AQ_F64 || dtype == AQ_F8_E4M3 || dtype == AQ_F8_E5M2)
    aq_quantize_scalar.store(in, n, out, dtype, first);
  else
    AQ_FOR_FLOATS(dtype, type, store_vectors(in, n, out, type, first))
}

/* Codes <-> words: eight codes at a time inside one uint64 ----------------------------------------------- */

AQ_INLINE uint64_t spread_codes(uint64_t packed, int32_t bits) {
  if (bits == 8) return packed;
  const int32_t gap = 8 - bits;
  const uint64_t code = (1u << bits) - 1, pair = (1u << 2 * bits) - 1, quad = (1u << 4 * bits) - 1;
  packed = (packed | packed << 4 * gap) & (quad * 0x0000000100000001u);
  packed = (packed | packed << 2 * gap) & (pair * 0x0001000100010001u);
  return (packed | packed << gap) & (code * 0x0101010101010101u);
}

AQ_INLINE uint64_t gather_codes(uint64_t codes, int32_t bits) {
  if (bits == 8) return codes;
  const int32_t gap = 8 - bits;
  const uint64_t pair = (1u << 2 * bits) - 1, quad = (1u << 4 * bits) - 1;
  codes = (codes | codes >> gap) & (pair * 0x0001000100010001u);
  codes = (codes | codes >> 2 * gap) & (quad * 0x0000000100000001u);
  return (codes | codes >> 4 * gap) & (((uint64_t)1 << 8 * bits) - 1);
}

AQ_INLINE int32_t pack_row_bits(const uint8_t *codes, size_t cols, int32_t bits, uint32_t *packed) {
  const uint64_t forbidden = (uint64_t)(0xff & ~((1u << bits) - 1)) * 0x0101010101010101u;
  uint64_t seen = 0;
  size_t i = 0;
  for (; i + 32 <= cols; i += 32) {
    uint64_t part[4];
    for (int k = 0; k < 4; k++) {
      uint64_t eight;
      __builtin_memcpy(&eight, codes + i + 8 * k, 8);
      seen |= eight;
      part[k] = gather_codes(eight, bits);
    }
    uint8_t *out = (uint8_t *)(packed + i / 32 * (size_t)bits);
    uint8_t block[40] = {0};
    for (int k = 0; k < 4; k++) __builtin_memcpy(block + k * bits, &part[k], 8);
    __builtin_memcpy(out, block, 4 * (size_t)bits);
  }
  if (seen & forbidden) return AQ_E_VALUE;
  return aq_quantize_scalar.pack_row(codes + i, cols - i, bits, packed + i / 32 * (size_t)bits);
}

static int32_t pack_row(const uint8_t *codes, size_t cols, int32_t bits, uint32_t *packed) {
  int32_t status;
  AQ_FOR_BITS(bits, width, status = pack_row_bits(codes, cols, width, packed))
  return status;
}

AQ_INLINE void unpack_row_bits(const uint32_t *packed, size_t cols, int32_t bits, uint8_t *codes) {
  size_t i = 0;
  for (; i + 32 <= cols; i += 32) {
    uint8_t block[40] = {0};
    __builtin_memcpy(block, packed + i / 32 * (size_t)bits, 4 * (size_t)bits);
    for (int k = 0; k < 4; k++) {
      uint64_t part;
      __builtin_memcpy(&part, block + k * bits, 8);
      if (bits < 8) part &= ((uint64_t)1 << 8 * (bits & 7)) - 1;
      part = spread_codes(part, bits);
      __builtin_memcpy(codes + i + 8 * k, &part, 8);
    }
  }
  aq_quantize_scalar.unpack_row(packed + i / 32 * (size_t)bits, cols - i, bits, codes + i);
}

static void unpack_row(const uint32_t *packed, size_t cols, int32_t bits, uint8_t *codes) {
  switch (bits) {
    case 2: unpack_row_bits(packed, cols, 2, codes); break;
    case 3: unpack_row_bits(packed, cols, 3, codes); break;
    case 4: unpack_row_bits(packed, cols, 4, codes); break;
    default: __builtin_memcpy(codes, packed, cols); break; /* a code a byte */
  }
}

/* Dequantize, along the row ------------------------------------------------------------------------------ */

/* Groups whose scales and zero points are widened at once. */
#define AQ_GRIDS 32

AQ_INLINE void widen_halves(const uint16_t *in, size_t n, float *out) {
  size_t i = 0;
  for (; i + AQ_W <= n; i += AQ_W) v_store(out + i, v_load_as(in, AQ_F16, i));
  for (; i < n; i++) out[i] = aq_float_from_half(in[i]);
}

/* Stores past the caches, where they fill a whole line at once: half lines were slower than plain stores. */
#if defined(AQ_STREAM)
#define AQ_STORE(stream, p, v) \
  do {                         \
    if (stream)                \
      AQ_STREAM(p, v);         \
    else                       \
      v_store(p, v);           \
  } while (0)
#else
#define AQ_STORE(stream, p, v) ((void)(stream), v_store(p, v))
#endif

/* Eight codes of 6 bits to a byte each. */
AQ_INLINE uint64_t spread_six_bits(uint64_t packed) {
  packed = (packed & 0x0000000000ffffffu) | (packed & 0x0000ffffff000000u) << 8;
  packed = (packed & 0x00000fff00000fffu) | (packed & 0x00fff00000fff000u) << 4;
  return (packed & 0x003f003f003f003fu) | (packed & 0x0fc00fc00fc00fc0u) << 2;
}

/* Sub-codes of AQ_UNPACK groups from bit `bit` on, of a row's `bytes`. */
AQ_INLINE void unpack_sub_codes(const uint8_t *stream, size_t bytes, size_t bit, int32_t bits, vf *out) {
  const size_t from = bit / 8, shift = bit % 8; /* a superblock's groups start at an even bit */
  uint64_t word[2] = {0, 0}, codes[2];
  if (bytes - from >= sizeof word)
    __builtin_memcpy(word, stream + from, sizeof word);
  else
    __builtin_memcpy(word, stream + from, bytes - from);
  if (bits == 4) { /* starts at a whole byte */
#if defined(AQ_BUILD_SIMD128) /* clang 14 makes wrong sub-scales of the other branch; the tests of wasm notice */
    codes[0] = spread_codes(word[0] & 0xffffffffu, 4);
    v_unpack((const uint8_t *)codes, 8, out);
#else
    v_unpack((const uint8_t *)word, 4, out);
#endif
    return;
  }
  codes[0] = spread_six_bits(word[0] >> shift);
  codes[1] = spread_six_bits(word[0] >> (48 + shift) | word[1] << (16 - shift));
  v_unpack((const uint8_t *)codes, 8, out);
}

/* Superblocks whose two half floats are widened at once. */
#define AQ_SUPERS 16

/* Scales, and minima times `sign`, of `count` groups of a row from `first` on, which starts a superblock.
 * Writes up to AQ_UNPACK - 1 floats beyond the last. */
AQ_INLINE void widen_two_level_bits(const aq_packed_view *view, size_t row, size_t first, size_t count, float sign,
                                    float *scales, float *minima, int32_t bits) {
  const aq_two_level_view *t = &view->two_level;
  const size_t bytes = t->sub_bytes, supers = (count - 1) / t->super_groups + 1;
  const uint8_t *sub_scale = t->sub_scale + row * bytes, *sub_min = t->sub_min + row * bytes;
  for (size_t base = 0; base < supers; base += AQ_SUPERS) {
    float scale[AQ_SUPERS], minimum[AQ_SUPERS];
    const size_t here = aq_min_size(AQ_SUPERS, supers - base);
    const size_t at = row * t->supers + first / t->super_groups + base;
    widen_halves(t->super_scale + at, here, scale);
    widen_halves(t->super_min + at, here, minimum);
    for (size_t s = 0; s < here; s++) {
      const size_t begin = (base + s) * t->super_groups, end = aq_min_size(begin + t->super_groups, count);
      const vf one_scale = v_splat(scale[s]), one_minimum = v_splat(sign * minimum[s]);
      for (size_t i = begin; i < end; i += AQ_UNPACK) {
        const size_t bit = (first + i) * (size_t)bits;
        vf codes[2][AQ_UNPACK / AQ_W];
        unpack_sub_codes(sub_scale, bytes, bit, bits, codes[0]);
        unpack_sub_codes(sub_min, bytes, bit, bits, codes[1]);
        for (int k = 0; k < AQ_UNPACK / AQ_W; k++) {
          v_store(scales + i + k * AQ_W, one_scale * codes[0][k]);
          v_store(minima + i + k * AQ_W, one_minimum * codes[1][k]);
        }
      }
    }
  }
}

static void widen_two_level(const aq_packed_view *view, size_t row, size_t first, size_t count, float sign,
                            float *scales, float *minima) {
  if (view->two_level.scale_bits == 4)
    widen_two_level_bits(view, row, first, count, sign, scales, minima, 4);
  else
    widen_two_level_bits(view, row, first, count, sign, scales, minima, 6);
}

/* `two_level`: `zero` is the minimum, subtracted behind the product. */
AQ_INLINE void dequantize_unit(const uint8_t *from, int32_t bits, vf scale, vf zero, float *out, int stream,
                               int two_level) {
  vf codes[AQ_UNPACK / AQ_W];
  v_unpack(from, bits, codes);
  for (int k = 0; k < AQ_UNPACK / AQ_W; k++) {
    const vf weights = two_level ? scale * codes[k] - zero : scale * (codes[k] - zero);
    AQ_STORE(stream, out + k * AQ_W, weights);
  }
}

AQ_INLINE void dequantize_bits(const aq_packed_view *view, size_t row, size_t col, size_t n, float *out,
                               int32_t bits, int stream, int two_level) {
  const uint8_t *from = (const uint8_t *)(view->packed + row * view->words) + col / 8 * (size_t)bits;
  const uint8_t *end = (const uint8_t *)(view->packed + (row + 1) * view->words);
  const size_t first = row * view->groups + col / view->group_size;
  const size_t groups = (col % view->group_size + n - 1) / view->group_size + 1;
  /* a multiple of 256 columns starts a group, or lies in the one group of its row */
  size_t left = n;
  for (size_t base = 0; base < groups; base += AQ_GRIDS) {
    float scales[AQ_GRIDS + AQ_UNPACK], zeros[AQ_GRIDS + AQ_UNPACK];
    const size_t count = aq_min_size(AQ_GRIDS, groups - base);
    if (two_level)
      widen_two_level(view, row, col / view->group_size + base, count, 1.0f, scales, zeros);
    else
      widen_halves(view->scale + first + base, count, scales);
    if (two_level)
      ;
    else if (view->zero_point)
      widen_halves(view->zero_point + first + base, count, zeros);
    else
      for (size_t i = 0; i < count; i++) zeros[i] = (float)(1 << (bits - 1));
    for (size_t i = 0; i < count; i++) {
      const vf scale = v_splat(scales[i]), zero = v_splat(zeros[i]); /* v_set has no -0 */
      size_t rest = aq_min_size(view->groups == 1 ? left : view->group_size, left);
      left -= rest;
      while (rest >= 32 && end - from >= (ptrdiff_t)(4 * bits + AQ_UNPACK_BYTES(bits))) {
        for (int k = 0; k < 32 / AQ_UNPACK; k++)
          dequantize_unit(from + k * (AQ_UNPACK / 8) * bits, bits, scale, zero, out + k * AQ_UNPACK, stream, two_level);
        from += 4 * bits;
        out += 32;
        rest -= 32;
      }
      while (rest >= AQ_UNPACK && end - from >= (ptrdiff_t)AQ_UNPACK_BYTES(bits)) {
        dequantize_unit(from, bits, scale, zero, out, stream, two_level);
        from += AQ_UNPACK / 8 * bits;
        out += AQ_UNPACK;
        rest -= AQ_UNPACK;
      }
      while (rest) { /* the row's end: neither reads nor writes past it */
        uint8_t last[AQ_UNPACK_BYTES(8)] = {0};
        float unit[AQ_UNPACK];
        const size_t m = aq_min_size(AQ_UNPACK, rest);
        __builtin_memcpy(last, from, aq_min_size(sizeof last, (size_t)(end - from)));
        dequantize_unit(last, bits, scale, zero, unit, 0, two_level);
        __builtin_memcpy(out, unit, m * sizeof(float));
        from += AQ_UNPACK / 8 * bits;
        out += m;
        rest -= m;
      }
    }
  }
}

static void dequantize(const aq_packed_view *view, size_t row, size_t col, size_t n, float *out) {
  if (view->two_level.scale_bits) {
    AQ_FOR_BITS(view->bits, bits, dequantize_bits(view, row, col, n, out, bits, 0, 1))
    return;
  }
#if defined(AQ_STREAM)
  /* groups are multiples of 16 columns: what starts aligned stays aligned up to the row's end */
  if (view->stream && (uintptr_t)out % sizeof(vf) == 0) {
    AQ_FOR_BITS(view->bits, bits, dequantize_bits(view, row, col, n, out, bits, 1, 0))
    return;
  }
#endif
  AQ_FOR_BITS(view->bits, bits, dequantize_bits(view, row, col, n, out, bits, 0, 0))
}

/* Error statistics --------------------------------------------------------------------------------------- */

static void accumulate(const float *a, const float *b, size_t n, aq_sums *sums) {
  enum { K = AQ_SUM_LANES / AQ_D };
  vd aa[K], bb[K], ab[K], dd[K], max_d = (vd){0}, max_a = (vd){0};
  __builtin_memcpy(aa, sums->aa, sizeof aa);
  __builtin_memcpy(bb, sums->bb, sizeof bb);
  __builtin_memcpy(ab, sums->ab, sizeof ab);
  __builtin_memcpy(dd, sums->dd, sizeof dd);
  size_t i = 0;
  for (; i + AQ_SUM_LANES <= n; i += AQ_SUM_LANES) {
    for (int k = 0; k < K; k++) {
      const vd x = d_load(a + i + k * AQ_D), y = d_load(b + i + k * AQ_D), d = x - y;
      aa[k] += x * x;
      bb[k] += y * y;
      ab[k] += x * y;
      dd[k] += d * d;
      max_a = d_max(max_a, d_abs(x));
      max_d = d_max(max_d, d_abs(d));
    }
  }
  __builtin_memcpy(sums->aa, aa, sizeof aa);
  __builtin_memcpy(sums->bb, bb, sizeof bb);
  __builtin_memcpy(sums->ab, ab, sizeof ab);
  __builtin_memcpy(sums->dd, dd, sizeof dd);
  for (int k = 0; k < AQ_D; k++) {
    if ((float)max_a[k] > sums->max_a) sums->max_a = (float)max_a[k];
    if ((float)max_d[k] > sums->max_difference) sums->max_difference = (float)max_d[k];
  }
  /* i is a multiple of the lanes, so the rest keeps its lanes */
  aq_quantize_scalar.accumulate(a + i, b + i, n - i, sums);
}

/* Quantize, one group per lane --------------------------------------------------------------------------- */

typedef struct {
  const aq_quantize_job *job;
  size_t n;             /* columns of every group here */
  size_t lanes;         /* groups that are there; lanes beyond repeat the last */
  size_t first[AQ_W];   /* element index of each group's first weight */
  size_t col[AQ_W];     /* its first column */
  size_t row[AQ_W];     /* its row */
  size_t index[AQ_W];   /* its number in the row */
  vf importance_scale;  /* largest column weight of each group, 1 where all are zero */
  vi importance_none;   /* groups whose column weights are all zero */
  vf *weights;          /* tile of the segment at hand */
  vf *importance;       /* tile of column weights, null when there are none */
} batch;

AQ_INLINE void load_tile(const void *in, int32_t dtype, const size_t first[AQ_W], size_t n, vf *tile) {
  size_t i = 0;
  for (; i + AQ_W <= n; i += AQ_W) {
    vf r[AQ_W];
    for (int lane = 0; lane < AQ_W; lane++) r[lane] = v_load_as(in, dtype, first[lane] + i);
    v_transpose(r);
    for (int k = 0; k < AQ_W; k++) tile[i + k] = r[k];
  }
  for (; i < n; i++)
    for (int lane = 0; lane < AQ_W; lane++) aq_quantize_scalar.load(in, dtype, first[lane] + i, 1,
                                                                    (float *)&tile[i] + lane);
}

static void load_weights(const batch *b, size_t begin, size_t n) {
  const void *in = b->job->weights;
  size_t first[AQ_W];
  for (int lane = 0; lane < AQ_W; lane++) first[lane] = b->first[lane] + begin;
  switch (b->job->dtype) {
    case AQ_F64:
      for (size_t i = 0; i < n; i++)
        for (int lane = 0; lane < AQ_W; lane++)
          aq_quantize_scalar.load(in, AQ_F64, first[lane] + i, 1, (float *)&b->weights[i] + lane);
      break;
    case AQ_F8_E4M3: load_tile(in, AQ_F8_E4M3, first, n, b->weights); break;
    case AQ_F8_E5M2: load_tile(in, AQ_F8_E5M2, first, n, b->weights); break;
    default: AQ_FOR_FLOATS(b->job->dtype, type, load_tile(in, type, first, n, b->weights))
  }
}

static void load_importance(const batch *b, size_t begin, size_t n) {
  size_t first[AQ_W];
  for (int lane = 0; lane < AQ_W; lane++) first[lane] = b->col[lane] + begin;
  load_tile(b->job->column_weights, AQ_F32, first, n, b->importance);
  for (size_t i = 0; i < n; i++)
    b->importance[i] = v_select(b->importance_none, v_set(1.0f), b->importance[i] / b->importance_scale);
}

/* Runs `body` with segment columns [begin, begin + m); groups of one segment keep their tiles between
 * passes. */
#define AQ_FOR_SEGMENTS(b, m, ...)                                              \
  for (size_t begin = 0; begin < (b)->n; begin += AQ_SEGMENT) {                 \
    const size_t m = aq_min_size(AQ_SEGMENT, (b)->n - begin);                   \
    if ((b)->n > AQ_SEGMENT) {                                                  \
      load_weights(b, begin, m);                                                \
      if ((b)->importance) load_importance(b, begin, m);                        \
    }                                                                           \
    __VA_ARGS__                                                                      \
  }

typedef struct {
  vf hq, hqq, hwq, error;
} fit_sums;

typedef struct {
  vf inverse, offset, zero_point;
} clip_candidate;

typedef struct {
  vf scale, zero_point;
} grid;

AQ_INLINE void candidate_segment(const batch *b, size_t m, const clip_candidate *c, vf code_max, int weighted,
                                 int affine, fit_sums *total) {
  fit_sums part[AQ_CLIP_UNROLL];
  for (int k = 0; k < AQ_CLIP_UNROLL; k++) part[k] = (fit_sums){{0}, {0}, {0}, {0}};
  for (size_t i = 0; i < m; i++) {
    const vf w = b->weights[i];
    for (int k = 0; k < AQ_CLIP_UNROLL; k++) {
      const vf position = v_min(code_max, v_max((vf){0}, w * c[k].inverse + c[k].offset));
      vf q = v_round(position);
      if (!affine) q = q - c[k].zero_point;
      const vf hq = weighted ? b->importance[i] * q : q;
      if (affine) part[k].hq += hq;
      part[k].hqq += hq * q;
      part[k].hwq += hq * w;
    }
  }
  for (int k = 0; k < AQ_CLIP_UNROLL; k++) {
    total[k].hq += part[k].hq;
    total[k].hqq += part[k].hqq;
    total[k].hwq += part[k].hwq;
  }
}

AQ_INLINE void candidate_sums(const batch *b, const clip_candidate *c, vf code_max, int affine, fit_sums *total) {
  for (int k = 0; k < AQ_CLIP_UNROLL; k++) total[k] = (fit_sums){{0}, {0}, {0}, {0}};
  AQ_FOR_SEGMENTS(b, m, {
    if (b->importance)
      candidate_segment(b, m, c, code_max, 1, affine, total);
    else
      candidate_segment(b, m, c, code_max, 0, affine, total);
  })
}

AQ_INLINE vf encode(vf w, grid g, vf code_max) {
  return v_min(code_max, v_max((vf){0}, w / g.scale + g.zero_point));
}

AQ_INLINE fit_sums grid_sums(const batch *b, grid g, vf code_max, int affine) {
  fit_sums total = {{0}, {0}, {0}, {0}};
  AQ_FOR_SEGMENTS(b, m, {
    fit_sums part = {{0}, {0}, {0}, {0}};
    for (size_t i = 0; i < m; i++) {
      const vf w = b->weights[i];
      const vf code = v_round(encode(w, g, code_max));
      const vf difference = w - g.scale * (code - g.zero_point);
      const vf q = affine ? code : code - g.zero_point;
      vf hq = q, weighted = difference;
      if (b->importance) {
        hq = b->importance[i] * q;
        weighted = b->importance[i] * difference;
      }
      part.hq += hq;
      part.hqq += hq * q;
      part.hwq += hq * w;
      part.error += weighted * difference;
    }
    total.hq += part.hq;
    total.hqq += part.hqq;
    total.hwq += part.hwq;
    total.error += part.error;
  })
  return total;
}

AQ_INLINE vi usable(grid g) {
  const vf largest = v_set(AQ_HALF_MAX);
  return (g.scale <= largest) & (g.scale >= -largest) & (g.scale != (vf){0}) & (g.zero_point <= largest) &
         (g.zero_point >= -largest);
}

AQ_INLINE vf explained(const fit_sums *s, vf h, vf hw, int affine) {
  if (!affine) return s->hwq * s->hwq / s->hqq;
  const vf numerator = h * s->hwq - s->hq * hw;
  const vf determinant = h * s->hqq - s->hq * s->hq;
  return numerator * (numerator / determinant);
}

AQ_INLINE grid refit(const fit_sums *s, vf h, vf hw, int affine, vf zero_point) {
  grid g;
  if (!affine) {
    g.scale = v_round_half(s->hwq / s->hqq);
    g.zero_point = zero_point;
    return g;
  }
  const vf numerator = h * s->hwq - s->hq * hw;
  const vf determinant = h * s->hqq - s->hq * s->hq;
  g.scale = v_round_half(numerator / determinant);
  g.zero_point = v_round_half((g.scale * s->hq - hw) / (h * g.scale));
  return g;
}

AQ_INLINE clip_candidate clip_step(int32_t step, vf minimum, vf maximum, int32_t bits, int32_t kind) {
  const vf code_max = v_set((float)((1 << bits) - 1));
  const vf keep = v_set(1.0f - (float)step * (0.7f / AQ_CLIP_STEPS));
  clip_candidate c;
  if (kind == AQ_ZERO_POINT_SYMMETRIC) {
    const vf half_range = v_set((float)(1 << (bits - 1)));
    const vf larger = v_max(maximum, -minimum);
    c.inverse = half_range / (larger * (1.0f - (float)(step / 2) * (1.4f / AQ_CLIP_STEPS)));
    if (step & 1) c.inverse = -c.inverse;
    c.offset = half_range;
    c.zero_point = half_range;
    return c;
  }
  const vf low = minimum * keep, high = maximum * keep;
  if (kind == AQ_ZERO_POINT_INTEGER) {
    const vf bottom = v_min((vf){0}, low), top = v_max((vf){0}, high);
    c.inverse = code_max / (top - bottom);
    c.offset = v_round(-bottom * c.inverse) + 0.0f; /* no negative zero: it is stored */
    c.zero_point = c.offset;
    return c;
  }
  c.inverse = code_max / (high - low);
  c.offset = -low * c.inverse;
  c.zero_point = (vf){0};
  return c;
}

AQ_INLINE grid clip_search_kind(const batch *b, grid start, vf minimum, vf maximum, int affine) {
  const int32_t bits = b->job->bits, kind = b->job->zero_point_kind;
  const vf code_max = v_set((float)((1 << bits) - 1));
  vf h = {0}, hw = {0};
  AQ_FOR_SEGMENTS(b, m, {
    vf part_h = {0}; vf part_hw = {0};
    for (size_t i = 0; i < m; i++) {
      const vf weight = b->importance ? b->importance[i] : v_set(1.0f);
      part_h += weight;
      part_hw += b->importance ? weight * b->weights[i] : b->weights[i];
    }
    h += part_h;
    hw += part_hw;
  })

  fit_sums sums = {{0}, {0}, {0}, {0}};
  vf best_explained = v_set(-1.0f), zero_point = {0};
  for (int32_t step = 0; step < AQ_CLIP_STEPS; step += AQ_CLIP_UNROLL) {
    clip_candidate c[AQ_CLIP_UNROLL];
    fit_sums tried[AQ_CLIP_UNROLL];
    for (int k = 0; k < AQ_CLIP_UNROLL; k++) c[k] = clip_step(step + k, minimum, maximum, bits, kind);
    candidate_sums(b, c, code_max, affine, tried);
    for (int k = 0; k < AQ_CLIP_UNROLL; k++) {
      const vf value = explained(&tried[k], h, hw, affine);
      const vi better = value > best_explained;
      best_explained = v_select(better, value, best_explained);
      sums.hq = v_select(better, tried[k].hq, sums.hq);
      sums.hqq = v_select(better, tried[k].hqq, sums.hqq);
      sums.hwq = v_select(better, tried[k].hwq, sums.hwq);
      zero_point = v_select(better, c[k].zero_point, zero_point);
    }
  }

  grid best = start;
  vf best_error = grid_sums(b, start, code_max, 1).error;
  vi alive = minimum < maximum;
  for (int32_t round = 0; round < AQ_REFITS; round++) {
    const grid g = refit(&sums, h, hw, affine, zero_point);
    alive &= usable(g);
    sums = grid_sums(b, g, code_max, affine);
    const vi better = alive & (sums.error < best_error);
    best_error = v_select(better, sums.error, best_error);
    best.scale = v_select(better, g.scale, best.scale);
    best.zero_point = v_select(better, g.zero_point, best.zero_point);
  }
  return best;
}

static grid clip_search(const batch *b, grid start, vf minimum, vf maximum) {
  return b->job->zero_point_kind == AQ_ZERO_POINT_REAL ? clip_search_kind(b, start, minimum, maximum, 1)
                                                       : clip_search_kind(b, start, minimum, maximum, 0);
}

AQ_INLINE vf round_half_up(vf x) {
  const vu bits = v_half_bits(x);
  return v_half_value(bits - (vu)(v_half_value(bits) < x));
}

/* aq_round_grid for every lane; lanes outside the plain formula go through the scalar function. */
static int32_t round_grids(const batch *b, vf minimum, vf maximum, grid *out) {
  const int32_t bits = b->job->bits, kind = b->job->zero_point_kind;
  const vf code_max = v_set((float)((1 << bits) - 1)), half_range = v_set((float)(1 << (bits - 1)));
  const vf largest = v_set(AQ_HALF_MAX);
  minimum += 0.0f;
  vi plain = minimum < maximum;
  if (kind == AQ_ZERO_POINT_REAL) {
    out->scale = v_round_half((maximum - minimum) / code_max);
    const vf zero = (vf){0} - minimum / out->scale;
    out->zero_point = v_round_half(zero);
    plain &= (out->scale >= v_set(AQ_HALF_MIN_NORMAL)) & (zero <= v_set(1024.0f)) & (zero >= v_set(-1024.0f));
  } else if (kind == AQ_ZERO_POINT_INTEGER) {
    const vf low = v_min((vf){0}, minimum), high = v_max((vf){0}, maximum);
    out->scale = round_half_up((high - low) / code_max);
    out->zero_point = v_min(code_max, v_round(-low / out->scale) + 0.0f);
  } else {
    const vf negative = -minimum, positive = maximum;
    const vi flip = positive > negative;
    const vf from_larger = v_select(flip, positive, negative) / half_range;
    const vf from_smaller = v_select(flip, negative, positive) / (half_range - 0.5f);
    const vf scale = round_half_up(v_max(from_smaller, from_larger));
    plain &= scale <= largest;
    out->scale = v_select(flip, -scale, scale);
    out->zero_point = half_range;
  }
  plain &= out->scale <= largest;
  for (int lane = 0; lane < AQ_W; lane++) {
    if (plain[lane]) continue;
    aq_grid g;
    const int32_t status = aq_round_grid(minimum[lane], maximum[lane], bits, kind, &g);
    if (status != AQ_OK) return status;
    out->scale[lane] = g.scale;
    out->zero_point[lane] = g.zero_point;
  }
  return AQ_OK;
}

/* Codes of up to 32 columns into `bits` words a lane. */
AQ_INLINE void encode_words(const vf *weights, size_t n, grid g, int32_t bits, vu *words) {
  const vf code_max = v_set((float)((1 << bits) - 1));
  for (int j = 0; j < bits; j++) words[j] = (vu){0};
#pragma GCC unroll 32
  for (int i = 0; i < 32; i++) {
    if ((size_t)i >= n) break;
    const vu code = (vu)v_round_to_int(encode(weights[i], g, code_max));
    const int bit = i * bits, word = bit >> 5, shift = bit & 31;
    words[word] |= code << shift;
    if (shift + bits > 32) words[word + 1] |= code >> (32 - shift);
  }
}

AQ_INLINE void encode_batch(const batch *b, grid g, int32_t bits) {
  const aq_quantize_job *job = b->job;
  AQ_FOR_SEGMENTS(b, m, {
    uint32_t words[AQ_SEGMENT / 32 * 8][AQ_W];
    size_t count = 0;
    size_t i = 0;
    for (; i + 32 <= m; i += 32) {
      vu block[8];
      encode_words(b->weights + i, 32, g, bits, block);
      __builtin_memcpy(words[count], block, sizeof(vu) * (size_t)bits);
      count += (size_t)bits;
    }
    if (i < m) {
      vu block[8];
      encode_words(b->weights + i, m - i, g, bits, block);
      const size_t used = ((m - i) * (size_t)bits + 31) / 32;
      __builtin_memcpy(words[count], block, sizeof(vu) * used);
      count += used;
    }
    for (size_t lane = 0; lane < b->lanes; lane++) {
      const size_t bit = (b->col[lane] + begin) * (size_t)bits;
      uint32_t *out = job->packed + b->row[lane] * job->words + bit / 32;
      if (bit % 32 == 0 && (m * (size_t)bits) % 32 == 0) {
        for (size_t j = 0; j < count; j++) out[j] = words[j][lane];
      } else { /* words shared with a neighbour, or the row's last: they were zeroed */
        const size_t shift = bit % 32;
        const size_t last = (shift + m * (size_t)bits - 1) / 32;
        for (size_t j = 0; j < count; j++) {
          out[j] |= words[j][lane] << shift;
          if (shift && j + 1 <= last) out[j + 1] |= words[j][lane] >> (32 - shift);
        }
      }
    }
  })
}

static int32_t quantize_batch(batch *b, const void *context) {
  (void)context;
  const aq_quantize_job *job = b->job;
  if (job->column_weights) {
    vf largest = {0};
    for (int lane = 0; lane < AQ_W; lane++)
      for (size_t i = 0; i < b->n; i++)
        if (job->column_weights[b->col[lane] + i] > largest[lane]) largest[lane] = job->column_weights[b->col[lane] + i];
    b->importance_none = largest == (vf){0};
    b->importance_scale = v_select(b->importance_none, v_set(1.0f), largest);
  }
  if (b->n <= AQ_SEGMENT) {
    load_weights(b, 0, b->n);
    if (b->importance) load_importance(b, 0, b->n);
  }
  vf minimum = v_set(__builtin_inff()), maximum = -minimum, sum = {0};
  AQ_FOR_SEGMENTS(b, m, {
    for (size_t i = 0; i < m; i++) {
      const vf w = b->weights[i];
      minimum = v_min(minimum, w);
      maximum = v_max(maximum, w);
      sum += w;
    }
  })
  /* A sum overflows only with weights that no half-precision scale holds: an error either way. */
  const vi bad = (sum - sum) != (vf){0};
  for (int lane = 0; lane < AQ_W; lane++)
    if (bad[lane]) return AQ_E_NONFINITE;
  grid g;
  const int32_t status = round_grids(b, minimum, maximum, &g);
  if (status != AQ_OK) return status;
  if (job->clip) g = clip_search(b, g, minimum, maximum);
  AQ_FOR_BITS(job->bits, bits, encode_batch(b, g, bits))
  const vu scale = v_half_bits(g.scale), zero_point = v_half_bits(g.zero_point);
  for (size_t lane = 0; lane < b->lanes; lane++) {
    const size_t at = b->row[lane] * job->groups + b->index[lane];
    job->scale[at] = (uint16_t)scale[lane];
    if (job->zero_point) job->zero_point[at] = (uint16_t)zero_point[lane];
  }
  return AQ_OK;
}

/* Pieces [begin, end) of every row, each `width` columns from the one before and `n` wide, AQ_W at a time. */
AQ_INLINE int32_t run_pieces(batch *b, size_t row_begin, size_t row_end, size_t begin, size_t end, size_t width,
                             size_t n, int32_t (*run)(batch *b, const void *context), const void *context) {
  b->n = n;
  b->lanes = 0;
  for (size_t row = row_begin; row < row_end && begin < end; row++) {
    for (size_t index = begin; index < end; index++) {
      b->row[b->lanes] = row;
      b->index[b->lanes] = index;
      b->col[b->lanes] = index * width;
      b->first[b->lanes] = row * b->job->cols + index * width;
      if (++b->lanes < AQ_W && (row + 1 < row_end || index + 1 < end)) continue;
      for (size_t lane = b->lanes; lane < AQ_W; lane++) {
        b->first[lane] = b->first[b->lanes - 1];
        b->col[lane] = b->col[b->lanes - 1];
      }
      const int32_t status = run(b, context);
      if (status != AQ_OK) return status;
      b->lanes = 0;
    }
  }
  return AQ_OK;
}

/* The whole pieces of every row, then the shorter last ones. */
AQ_INLINE int32_t run_rows(batch *b, size_t row_begin, size_t row_end, size_t width,
                           int32_t (*run)(batch *b, const void *context), const void *context) {
  const size_t whole = b->job->cols / width, rest = b->job->cols % width;
  const int32_t status = run_pieces(b, row_begin, row_end, 0, whole, width, width, run, context);
  if (status != AQ_OK || rest == 0) return status;
  return run_pieces(b, row_begin, row_end, whole, whole + 1, width, rest, run, context);
}

static int32_t quantize_rows(const aq_quantize_job *job, size_t row_begin, size_t row_end) {
  vf weights[AQ_SEGMENT], importance[AQ_SEGMENT];
  batch b = {.job = job, .weights = weights, .importance = job->clip && job->column_weights ? importance : 0};
  if (job->cols % job->group_size || (job->group_size * (size_t)job->bits) % 32)
    __builtin_memset(job->packed + row_begin * job->words, 0, (row_end - row_begin) * job->words * 4);
  return run_rows(&b, row_begin, row_end, job->group_size, quantize_batch, 0);
}

const aq_quantize_kernels AQ_NAMED(quantize) = {quantize_rows, dequantize, pack_row, unpack_row,
                                                load,          store,      accumulate};
