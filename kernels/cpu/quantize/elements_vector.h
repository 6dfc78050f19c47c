/* quantize/elements_vector.h: elements, codes, dequantizing and error statistics, over vectors along the row.
 * Results equal quantize/scalar.c's to the bit. */
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
  if (bits == 8) {
    v_unpack((const uint8_t *)word, 8, out);
    return;
  }
  if (bits == 4) { /* starts at a whole byte */
/* clang 14 makes wrong sub-scales of the other branch; the tests of wasm notice */
#if defined(AQ_BUILD_SIMD128)
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
  const aq_two_level_view *t = &view->two_level;
  if (t->scale_bits == AQ_OFFSET_BITS) {
    const size_t at = row * t->sub_bytes + 2 * first;
    widen_halves((const uint16_t *)(const void *)(t->sub_scale + at), count, scales);
    widen_halves((const uint16_t *)(const void *)(t->sub_min + at), count, minima);
    for (size_t i = 0; i < count; i++) minima[i] *= -sign;
  } else if (t->scale_bits == 4)
    widen_two_level_bits(view, row, first, count, sign, scales, minima, 4);
  else if (view->two_level.scale_bits == 6)
    widen_two_level_bits(view, row, first, count, sign, scales, minima, 6);
  else
    widen_two_level_bits(view, row, first, count, sign, scales, minima, 8);
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

/* Columns whose levels are read at once, a multiple of every group. */
#define AQ_LEVEL_COLS 1024

/* Trellis codes. The product is exact: fused or not, the sum is rounded once. */
AQ_INLINE void dequantize_levels(const aq_packed_view *view, size_t row, size_t col, size_t n, float *out, int stream) {
  const uint8_t *from = (const uint8_t *)(view->packed + row * view->words);
  for (size_t at = 0; at < n; at += AQ_LEVEL_COLS, out += AQ_LEVEL_COLS) {
    _Alignas(64) int8_t levels[AQ_LEVEL_COLS + AQ_LEVELS_BEHIND];
    float scales[AQ_LEVEL_COLS / 16], offsets[AQ_LEVEL_COLS / 16];
    const size_t m = aq_min_size(AQ_LEVEL_COLS, n - at), size = view->groups == 1 ? m : view->group_size;
    const size_t first = row * view->groups + (col + at) / view->group_size, count = (m - 1) / size + 1;
    view->levels(from, 4 * view->words, col + at, m, levels);
    widen_halves(view->scale + first, count, scales);
    widen_halves(view->zero_point + first, count, offsets);
    for (size_t group = 0, i = 0; group < count; group++) {
      const vf scale = v_splat(scales[group] * AQ_TRELLIS_UNIT), offset = v_splat(offsets[group]);
      const size_t end = aq_min_size(m, i + size);
      for (; i + 4 * AQ_W <= end; i += 4 * AQ_W) {
        vf weights[4];
        v_load_four_levels(levels + i, weights);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
          weights[k] = v_fma(weights[k], scale, offset);
          AQ_STORE(stream, out + i + k * AQ_W, weights[k]);
        }
      }
      for (; i + AQ_W <= end; i += AQ_W) {
        const vf weights = v_fma(v_load_levels(levels + i), scale, offset);
        AQ_STORE(stream, out + i, weights);
      }
      for (; i < end; i++) out[i] = aq_trellis_weight(levels[i], scales[group], offsets[group]);
    }
  }
}

static void dequantize(const aq_packed_view *view, size_t row, size_t col, size_t n, float *out) {
  if (view->two_level.scale_bits) {
    AQ_FOR_BITS(view->bits, bits, dequantize_bits(view, row, col, n, out, bits, 0, 1))
    return;
  }
#if defined(AQ_STREAM)
  if (view->levels && view->stream && (uintptr_t)out % sizeof(vf) == 0) {
    dequantize_levels(view, row, col, n, out, 1);
    return;
  }
#endif
  if (view->levels) {
    dequantize_levels(view, row, col, n, out, 0);
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
