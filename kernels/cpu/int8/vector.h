/* int8/vector.h: 8-bit activations times packed weights over vectors, included once by each instruction set.
 * The same bytes as int8/scalar.c.
 *
 * Many tokens: blocks of weights are unpacked to bytes and transposed into panels, AQ_W rows in the lanes,
 * four columns (or, as 16-bit numbers, two) in each lane; tiles of tokens run over them. One token: vectors
 * along the row.
 *
 *     panel[i] = columns 4i .. 4i + 3 of row 0 | the same of row 1 | ... | of row AQ_W - 1
 *
 * Expected of the including file, beside the primitives of its instruction set:
 *   AQ_NAMED(family): name of its table
 *   AQ_TOKENS: even, tokens of a tile; 2 AQ_TOKENS accumulators and four more vectors fit the registers
 *   AQ_OFFSET: what is taken from the codes of x so that v_dot can read them, 128 for signed bytes or 0
 *   v_dot(sum, w, x, wide): sum + products of unsigned bytes of w and bytes of x, four in a lane; w up to 255
 *     if wide, else up to 31
 *   AQ_OWN_WIDE: 1 if products of 8 bits are other code than those of fewer
 *   AQ_PAIRS(bits), optional: 1 if panels of this width hold pairs of 16-bit numbers; then also
 *     v_dot_pairs(sum, w, x)
 *   AQ_OWN_LEVELS, optional: 1 if it has what levels.h expects
 */
#include "../isa/lanes.h"
#include "kernels.h"

#if !defined(AQ_OWN_LEVELS)
#define AQ_OWN_LEVELS 0
#endif

#define AQ_KC AQ_SEGMENT     /* columns of a panel */
#define AQ_XS (AQ_KC + 64)   /* elements from one token of a tile to the next: not a power of two */
#define AQ_BLOCK_ROWS 128    /* rows of the panels held at once */
#define AQ_PANELS (AQ_BLOCK_ROWS / AQ_W)
#define AQ_QUADS (4 * AQ_W)  /* columns of a vector of bytes */
#define AQ_MOST_SEGMENTS (AQ_KC / 16)

#if defined(AQ_PAIRS)
#define AQ_PANEL_STEPS (AQ_KC / 2)
#else
#define AQ_PANEL_STEPS (AQ_KC / 4)
#define AQ_PAIRS(bits) 0
AQ_INLINE vi v_dot_pairs(vi sum, vi w, vi x) { return sum + w * x; } /* never called */
#endif

AQ_INLINE vi v_load_int(const void *p) {
  vi v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

AQ_INLINE void v_store_int(void *p, vi v) { __builtin_memcpy(p, &v, sizeof v); }

AQ_INLINE vi v_splat_bytes(int32_t byte) { return (vi){0} + (int32_t)((uint32_t)(byte & 255) * 0x01010101u); }

/* Levels of trellis codes come as codes of seven bits, 64 above the level, each in its own byte. */
#define AQ_LEVEL_BITS 7
#define AQ_STORED(bits) ((bits) == AQ_LEVEL_BITS ? 8 : (bits))

/* AQ_QUADS codes from a byte boundary, a byte each. */
AQ_INLINE vi quads_of(const uint8_t *from, const int32_t bits) {
  if (AQ_STORED(bits) == 8) return v_load_int(from);
  if (bits == 4) {
    uint16_t halves[AQ_W];
    __builtin_memcpy(halves, from, sizeof halves);
    const vu v = v_widen(halves), pairs = (v | (v << 8)) & 0x00ff00ffu;
    return (vi)((pairs | (pairs << 4)) & 0x0f0f0f0fu);
  }
  if (bits == 2) {
    const vu v = v_widen_bytes(from), pairs = (v | (v << 12)) & 0x000f000fu;
    return (vi)((pairs | (pairs << 6)) & 0x03030303u);
  }
  const vu v = v_widen_triples(from), pairs = (v & 0x3fu) | ((v & 0xfc0u) << 10);
  return (vi)((pairs & 0x00070007u) | ((pairs & 0x00380038u) << 5));
}

/* The last n codes of a row, less than a vector's, from byte `from` on; bits behind them become zeros. */
AQ_INLINE void copy_end(const uint8_t *from, size_t n, int32_t bits, uint8_t *to) {
  const size_t used = n * (size_t)bits, bytes = (used + 7) / 8;
  __builtin_memcpy(to, from, bytes);
  if (used % 8) to[bytes - 1] &= (uint8_t)((1u << used % 8) - 1);
}

AQ_INLINE vi codes_of_levels(vi levels) { return (levels & 0x7f7f7f7f) ^ 0x40404040; }

/* Levels of n columns of a row from column col on, as bytes; up to AQ_LEVELS_BEHIND more are written. */
AQ_INLINE void row_levels(const aq_packed_view *view, size_t row, size_t col, size_t n, uint8_t *out) {
  view->levels((const uint8_t *)(view->packed + row * view->words), 4 * view->words, col, n, (int8_t *)out);
}

/* Activations -------------------------------------------------------------------------------------------- */

static int range(const float *x, size_t n, float *minimum, float *maximum) {
  vf low = {0}, high = {0}, rest = {0}; /* rest becomes NaN with the first that is not finite */
  size_t i = 0;
  for (; i + AQ_W <= n; i += AQ_W) {
    const vf v = v_load(x + i);
    rest += v - v;
    low = v_min(low, v);
    high = v_max(high, v);
  }
  float ends[2];
  if (!aq_int8_scalar.range(x + i, n - i, &ends[0], &ends[1]) || !(v_total(rest) == 0.0f)) return 0;
  const float lowest = -v_largest(-low), highest = v_largest(high);
  *minimum = lowest < ends[0] ? lowest : ends[0];
  *maximum = highest > ends[1] ? highest : ends[1];
  return 1;
}

/* aq_activation_code. */
AQ_INLINE vf codes_of(vf x, vf scale, vf zero, vf most) {
  const vf limit = (vf){0} + AQ_ENCODE_LIMIT;
  const vf position = v_round(v_min(v_max(x / scale, -limit), limit)) + zero;
  return v_min(v_max(position, (vf){0}), most);
}

static int encode(const float *x, size_t n, float scale, float zero_point, float code_max, uint8_t *codes) {
  const vf step = (vf){0} + scale, zero = (vf){0} + zero_point, most = (vf){0} + code_max;
  vf rest = {0}; /* becomes NaN with the first that is not finite */
  size_t i = 0;
  for (; i + AQ_W <= n; i += AQ_W) {
    const vf v = v_load(x + i);
    rest += v - v;
    v_narrow_bytes(codes + i, v_round_to_int(codes_of(v, step, zero, most)));
  }
  return aq_int8_scalar.encode(x + i, n - i, scale, zero_point, code_max, codes + i) && v_total(rest) == 0.0f;
}

static int round_values(const float *x, size_t n, float scale, float zero_point, float code_max, float *out) {
  const vf step = (vf){0} + scale, zero = (vf){0} + zero_point, most = (vf){0} + code_max;
  vf rest = {0}; /* becomes NaN with the first that is not finite */
  size_t i = 0;
  for (; i + AQ_W <= n; i += AQ_W) {
    const vf v = v_load(x + i);
    rest += v - v;
    v_store(out + i, step * (codes_of(v, step, zero, most) - zero));
  }
  return aq_int8_scalar.round(x + i, n - i, scale, zero_point, code_max, out + i) && v_total(rest) == 0.0f;
}

/* Many tokens -------------------------------------------------------------------------------------------- */

/* Two panels, and of each of their rows and segments scale, zero point and sum of codes; of trellis codes the
 * offset in place of the zero point and the sum of levels. */
typedef struct {
  vi codes[2][AQ_PANEL_STEPS];
  vf scale[AQ_MOST_SEGMENTS][2], zero[AQ_MOST_SEGMENTS][2], sum[AQ_MOST_SEGMENTS][2];
  int are_levels;
} panels;

/* Tokens of a tile: their codes less AQ_OFFSET as bytes or 16-bit numbers, zeros behind the end. */
typedef struct {
  union {
    uint8_t bytes[AQ_TOKENS * AQ_XS];
    int16_t pairs[AQ_TOKENS * AQ_XS];
  } x;
  float zero[AQ_TOKENS];                  /* zero point less AQ_OFFSET */
  float sum[AQ_MOST_SEGMENTS][AQ_TOKENS]; /* of codes less zero point */
  int32_t start[AQ_MOST_SEGMENTS][AQ_TOKENS]; /* what makes products with codes of levels those with levels */
} tokens_tile;

/* Codes of row `row`, columns [col, col + k), as bytes, zeros up to a multiple of AQ_QUADS. */
AQ_INLINE void unpack_bytes(const aq_packed_view *view, size_t row, size_t col, size_t k, int32_t bits, uint8_t *out) {
  const uint8_t *from = (const uint8_t *)(view->packed + row * view->words) + col / 8 * (size_t)bits;
  size_t i = 0;
  for (; i + AQ_QUADS <= k; i += AQ_QUADS, from += AQ_W * bits / 2) v_store_int(out + i, quads_of(from, bits));
  if (i == k) return;
  uint8_t last[AQ_QUADS] = {0};
  copy_end(from, k - i, bits, last);
  v_store_int(out + i, quads_of(last, bits));
}

AQ_INLINE void fill_rows(const aq_linear_job *job, size_t row, size_t n, size_t col, size_t k, const int32_t bits,
                         vi *panel) {
  _Alignas(64) uint8_t bytes[AQ_W][AQ_KC];
  for (size_t lane = 0; lane < AQ_W; lane++) {
    const size_t from = row + aq_min_size(lane, n - 1);
    if (bits == AQ_LEVEL_BITS) {
      row_levels(&job->view, from, col, k, bytes[lane]);
      __builtin_memset(bytes[lane] + k, 0, (k + AQ_QUADS - 1) / AQ_QUADS * AQ_QUADS - k);
    } else {
      unpack_bytes(&job->view, from, col, k, bits, bytes[lane]);
    }
  }
  vf r[AQ_W];
  if (!AQ_PAIRS(bits)) {
    for (size_t i = 0; i < k; i += AQ_QUADS) {
      for (int lane = 0; lane < AQ_W; lane++) __builtin_memcpy(&r[lane], bytes[lane] + i, sizeof r[lane]);
      v_transpose(r);
      for (size_t j = 0; j < AQ_W; j++) panel[i / 4 + j] = bits == AQ_LEVEL_BITS ? codes_of_levels((vi)r[j]) : (vi)r[j];
    }
    return;
  }
  uint16_t wide[AQ_W][AQ_KC];
  for (int lane = 0; lane < AQ_W; lane++)
    for (size_t i = 0; i < AQ_KC; i++)
      wide[lane][i] = bits == AQ_LEVEL_BITS ? (bytes[lane][i] & 0x7f) ^ AQ_LEVEL_ZERO : bytes[lane][i];
  for (size_t i = 0; i < (k + AQ_QUADS - 1) / AQ_QUADS * AQ_QUADS; i += 2 * AQ_W) {
    for (int lane = 0; lane < AQ_W; lane++) __builtin_memcpy(&r[lane], wide[lane] + i, sizeof r[lane]);
    v_transpose(r);
    for (size_t j = 0; j < AQ_W; j++) panel[i / 2 + j] = (vi)r[j];
  }
}

AQ_INLINE vi dot_step(vi sum, vi w, vi x, const int32_t bits) {
  return AQ_PAIRS(bits) ? v_dot_pairs(sum, w, x) : v_dot(sum, w, x, bits == 8);
}

/* Panel v of two: rows [row, row + n), n <= AQ_W. */
AQ_INLINE void fill_panel(const aq_linear_job *job, size_t row, size_t n, size_t col, size_t k, const int32_t bits,
                          const int v, panels *p) {
  const aq_packed_view *view = &job->view;
  const size_t size = aq_segment_cols(view), segments = (k - 1) / size + 1, step = AQ_PAIRS(bits) ? 2 : 4;
  const size_t first = view->groups == 1 ? 0 : col / size;
  fill_rows(job, row, n, col, k, bits, p->codes[v]);
  p->are_levels = bits == AQ_LEVEL_BITS;
  const vi ones = AQ_PAIRS(bits) ? (vi){0} + 0x00010001 : v_splat_bytes(1);
  for (size_t s = 0; s < segments; s++) {
    uint16_t scale[AQ_W], zero[AQ_W];
    for (size_t lane = 0; lane < AQ_W; lane++) {
      const size_t group = (row + aq_min_size(lane, n - 1)) * view->groups + (view->groups == 1 ? 0 : first + s);
      scale[lane] = view->scale[group];
      zero[lane] = view->zero_point ? view->zero_point[group] : 0;
    }
    p->scale[s][v] = v_load_half(scale);
    p->zero[s][v] = view->zero_point ? v_load_half(zero) : (vf){0} + (float)(1 << (bits - 1));
    vi sum = {0};
    const size_t begin = s * size / step, end = aq_min_size((s + 1) * size, (k + step - 1) / step * step) / step;
    for (size_t i = begin; i < end; i++) sum = dot_step(sum, p->codes[v][i], ones, bits);
    if (bits == AQ_LEVEL_BITS) {
      p->scale[s][v] = p->scale[s][v] * AQ_TRELLIS_UNIT;
      sum = sum - AQ_LEVEL_ZERO * (int32_t)(step * (end - begin));
    }
    p->sum[s][v] = __builtin_convertvector(sum, vf);
  }
}

/* m tokens from t on into a tile of `count`. */
AQ_INLINE void fill_tile(const aq_linear_job *job, size_t t, size_t m, size_t count, size_t col, size_t k,
                         const int pairs, tokens_tile *tile) {
  const size_t size = aq_segment_cols(&job->view), padded = (k + 3) / 4 * 4;
  for (size_t i = 0; i < count; i++) {
    const uint8_t *from = job->codes + (t + i) * job->cols + col;
    uint8_t *bytes = tile->x.bytes + i * AQ_XS;
    int16_t *wide = tile->x.pairs + i * AQ_XS;
    const size_t n = i < m ? k : 0;
    if (pairs) {
      for (size_t c = 0; c < n; c++) wide[c] = (int16_t)(from[c] - AQ_OFFSET);
      for (size_t c = n; c < padded; c++) wide[c] = 0;
    } else {
      size_t c = 0;
      const vi flip = v_splat_bytes(AQ_OFFSET);
      for (; c + AQ_QUADS <= n; c += AQ_QUADS) v_store_int(bytes + c, v_load_int(from + c) ^ flip);
      for (; c < n; c++) bytes[c] = (uint8_t)(from[c] - AQ_OFFSET);
      for (; c < padded; c++) bytes[c] = 0;
    }
    const int32_t zero = i < m ? job->x_zero[t + i] : 0;
    tile->zero[i] = i < m ? (float)(zero - AQ_OFFSET) : 0.0f;
    for (size_t s = 0; s * size < k; s++) {
      int32_t sum = 0;
      const size_t begin = s * size, end = aq_min_size(begin + size, k);
      if (i < m)
        for (size_t c = begin; c < end; c++) sum += from[c];
      tile->sum[s][i] = i < m ? (float)(sum - (int32_t)(end - begin) * zero) : 0.0f;
      tile->start[s][i] = i < m ? -AQ_LEVEL_ZERO * (sum - (int32_t)(end - begin) * AQ_OFFSET) : 0;
    }
  }
}

/* sums[i] += scale (I - zero A), of levels scale I + offset A, over the segments of k columns, for m tokens
 * and both panels. */
AQ_INLINE void tile_of(const int m, const int32_t bits, const tokens_tile *tile, const panels *p, size_t size, size_t k,
                       vf sums[AQ_TOKENS][2]) {
  const size_t step = AQ_PAIRS(bits) ? 2 : 4, steps = (k + step - 1) / step;
  const uint8_t *x = AQ_PAIRS(bits) ? (const uint8_t *)tile->x.pairs : tile->x.bytes;
  const size_t stride = AQ_PAIRS(bits) ? 2 * AQ_XS : AQ_XS;
  for (size_t s = 0, at = 0; at < steps; s++) {
    vi acc[AQ_TOKENS][2];
#pragma GCC unroll 16
    for (int i = 0; i < m; i++) acc[i][0] = acc[i][1] = (vi){0} + (p->are_levels ? tile->start[s][i] : 0);
    for (const size_t end = aq_min_size(steps, at + size / step); at < end; at++) {
      const vi w0 = p->codes[0][at], w1 = p->codes[1][at];
#pragma GCC unroll 16
      for (int i = 0; i < m; i++) {
        int32_t four;
        __builtin_memcpy(&four, x + (size_t)i * stride + 4 * at, 4);
        const vi token = (vi){0} + four;
        acc[i][0] = dot_step(acc[i][0], w0, token, bits);
        acc[i][1] = dot_step(acc[i][1], w1, token, bits);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < m; i++) {
      const vf zero = (vf){0} + tile->zero[i], sum = (vf){0} + tile->sum[s][i];
      for (int v = 0; v < 2; v++) {
        /* exact, fused or not: all three are whole numbers below 2^24 */
        const vf products = v_fma(-zero, p->sum[s][v], __builtin_convertvector(acc[i][v], vf));
        const vf shift = p->zero[s][v] * sum;
        const vf term = p->are_levels ? p->scale[s][v] * products + shift : p->scale[s][v] * (products - shift);
        sums[i][v] = sums[i][v] + term;
      }
    }
  }
}

typedef void (*tile_function)(const tokens_tile *tile, const panels *p, size_t size, size_t k, vf sums[AQ_TOKENS][2]);

#define AQ_TILE(m, bits)                                                                                            \
  static void tile_##m##_##bits(const tokens_tile *tile, const panels *p, size_t size, size_t k,                    \
                                vf sums[AQ_TOKENS][2]) {                                                            \
    tile_of(m, bits, tile, p, size, k, sums);                                                                       \
  }
/* The products of 2, 3 and 4 bits are the same code, and those of 8 where neither the panels nor v_dot
 * differ. */
#if AQ_OWN_WIDE
#define AQ_TILES(m) AQ_TILE(m, 4) AQ_TILE(m, 8)
#define AQ_TILE_ENTRY(m) {tile_##m##_4, tile_##m##_8}
#else
#define AQ_TILES(m) AQ_TILE(m, 8)
#define AQ_TILE_ENTRY(m) {tile_##m##_8, tile_##m##_8}
#endif

AQ_TILES(2) AQ_TILES(4)
#if AQ_TOKENS > 4
AQ_TILES(6) AQ_TILES(8)
#endif
#if AQ_TOKENS > 8
AQ_TILES(10) AQ_TILES(12)
#endif

static const tile_function tiles[AQ_TOKENS / 2][2] = {
    AQ_TILE_ENTRY(2), AQ_TILE_ENTRY(4),
#if AQ_TOKENS > 4
    AQ_TILE_ENTRY(6), AQ_TILE_ENTRY(8),
#endif
#if AQ_TOKENS > 8
    AQ_TILE_ENTRY(10), AQ_TILE_ENTRY(12),
#endif
};

AQ_INLINE void linear_bits(const aq_linear_job *job, size_t token_begin, size_t token_end, size_t row_begin,
                           size_t row_end, const int32_t bits) {
  panels block[AQ_PANELS / 2];
  tokens_tile tile;
  const size_t tokens = token_end - token_begin, tile_count = (tokens + AQ_TOKENS - 1) / AQ_TOKENS;
  const size_t size = aq_segment_cols(&job->view);
  for (size_t row = row_begin; row < row_end; row += AQ_BLOCK_ROWS) {
    const size_t rows = aq_min_size(AQ_BLOCK_ROWS, row_end - row);
    for (size_t col = 0; col < job->cols; col += AQ_KC) {
      const size_t k = aq_min_size(AQ_KC, job->cols - col);
      const int last = col + k == job->cols;
      for (size_t p = 0; p * AQ_W < rows; p += 2)
        for (int v = 0; v < 2; v++) { /* a panel of which nothing is there repeats the last row */
          const size_t at = row + aq_min_size((p + (size_t)v) * AQ_W, rows - 1);
          fill_panel(job, at, aq_min_size(AQ_W, row + rows - at), col, k, bits, v, &block[p / 2]);
        }
      for (size_t i = 0; i < tile_count; i++) {
        const size_t t = token_begin + tokens * i / tile_count;
        const size_t m = token_begin + tokens * (i + 1) / tile_count - t, half = (m + 1) / 2;
        fill_tile(job, t, m, 2 * half, col, k, AQ_PAIRS(bits), &tile);
        for (size_t p = 0; p * AQ_W < rows; p += 2) {
          const size_t at = row + p * AQ_W, n = aq_min_size(2 * AQ_W, row + rows - at);
          vf sums[AQ_TOKENS][2] = {{{0}}};
          for (size_t j = 0; j < m && col > 0; j++)
            __builtin_memcpy(sums[j], job->out + (t + j) * job->rows + at, n * sizeof(float));
          tiles[half - 1][bits == 8](&tile, &block[p / 2], size, k, sums);
          for (size_t j = 0; j < m; j++) {
            float *out = job->out + (t + j) * job->rows + at;
            if (last) {
              vf bias[2] = {{0}};
              if (job->bias) __builtin_memcpy(bias, job->bias + at, n * sizeof(float));
              for (int v = 0; v < 2; v++) {
                sums[j][v] = sums[j][v] * job->x_scale[t + j];
                if (job->bias) sums[j][v] = sums[j][v] + bias[v];
              }
            }
            if (n == 2 * AQ_W)
              __builtin_memcpy(out, sums[j], 2 * sizeof(vf));
            else
              __builtin_memcpy(out, sums[j], n * sizeof(float));
          }
        }
      }
    }
  }
}

static void linear(const aq_linear_job *job, size_t token_begin, size_t token_end, size_t row_begin, size_t row_end) {
  if (job->view.levels)
    linear_bits(job, token_begin, token_end, row_begin, row_end, AQ_LEVEL_BITS);
  else
    AQ_FOR_BITS(job->view.bits, bits, linear_bits(job, token_begin, token_end, row_begin, row_end, bits))
}

/* One token: vectors along the row ----------------------------------------------------------------------- */

#define AQ_VECTOR_COLS 4096 /* columns of x held at once */

/* Bytes of codes that are asked for ahead, into the second cache: two rows or more, because memory would idle
 * while the sums of a row are folded. */
#define AQ_AHEAD 8192

/* Codes of 2 and 4 bits lie in planes: plane p has every 8/bits-th code, from code p on, and needs only a
 * shift and a mask. A step is a vector of bytes of each plane. */
#define AQ_PLANES(bits) ((bits) == 2 ? 4 : (bits) == 4 ? 2 : 1)
#define AQ_STEP(bits) (AQ_PLANES(bits) * AQ_QUADS)     /* columns */
#define AQ_STEP_BYTES(bits) (AQ_STEP(bits) / 8 * AQ_STORED(bits))

/* sum (x - zero) w over a step, by lanes of AQ_STEP / AQ_W columns */
AQ_INLINE vi step_of(const uint8_t *from, const uint8_t *x, vi zero, const int32_t bits, vi sum) {
  if (AQ_STORED(bits) == 8 || bits == 3) {
    const vi w = quads_of(from, bits);
    return v_dot(sum, w, v_load_int(x), bits == 8) - v_dot((vi){0}, w, zero, bits == 8);
  }
  const vu raw = (vu)v_load_int(from);
  vi total = {0};
  for (int plane = 0; plane < AQ_PLANES(bits); plane++) {
    const vi w = (vi)((raw >> plane * bits) & (bits == 4 ? 0x0f0f0f0fu : 0x03030303u));
    sum = v_dot(sum, w, v_load_int(x + plane * AQ_QUADS), 0);
    total += w; /* bytes up to 30: nothing is carried */
  }
  return sum - v_dot((vi){0}, total, zero, 0);
}

/* Lanes 0, 2, 4, ... and 1, 3, 5, ... of two vectors, added. */
AQ_INLINE vi v_add_neighbours(vi a, vi b) {
#if AQ_W == 16
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif AQ_W == 8
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

/* I of AQ_W segments, one in a lane: `run` vectors whose lanes are parts of segments, then neighbours added
 * until one is left. A vector is a step, or `steps` of them where a step is only part of a segment. */
AQ_INLINE vi products_of(const uint8_t *from, const uint8_t *x, vi zero, size_t steps, const int32_t bits,
                         const int run) {
  vi lanes[AQ_W];
  if (run < AQ_W || steps == 1) {
#pragma GCC unroll 16
    for (int i = 0; i < run; i++, from += AQ_STEP_BYTES(bits), x += AQ_STEP(bits)) {
      __builtin_prefetch(from + AQ_AHEAD, 0, 2);
      lanes[i] = step_of(from, x, zero, bits, (vi){0});
    }
  } else {
    for (int i = 0; i < run; i++) {
      vi sum = {0};
      for (size_t j = 0; j < steps; j++, from += AQ_STEP_BYTES(bits), x += AQ_STEP(bits)) {
        __builtin_prefetch(from + AQ_AHEAD, 0, 2);
        sum = step_of(from, x, zero, bits, sum);
      }
      lanes[i] = sum;
    }
  }
#define AQ_FOLD(n)                                                                                                  \
  _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++) lanes[i] = v_add_neighbours(lanes[2 * i], lanes[2 * i + 1])
#if AQ_W > 8
  if (run >= 16) AQ_FOLD(8);
#endif
#if AQ_W > 4
  if (run >= 8) AQ_FOLD(4);
#endif
  if (run >= 4) AQ_FOLD(2);
  if (run >= 2) AQ_FOLD(1);
#undef AQ_FOLD
  return lanes[0];
}

typedef vi (*products_function)(const uint8_t *from, const uint8_t *x, vi zero, size_t steps);

#define AQ_PRODUCTS(bits, run)                                                                                       \
  static vi products_##bits##_##run(const uint8_t *from, const uint8_t *x, vi zero, size_t steps) {                 \
    return products_of(from, x, zero, steps, bits, run);                                                            \
  }
#if AQ_W == 16
#define AQ_RUNS(bits) \
  AQ_PRODUCTS(bits, 1) AQ_PRODUCTS(bits, 2) AQ_PRODUCTS(bits, 4) AQ_PRODUCTS(bits, 8) AQ_PRODUCTS(bits, 16)
#define AQ_RUN_ENTRY(bits) \
  {products_##bits##_1, products_##bits##_2, products_##bits##_4, products_##bits##_8, products_##bits##_16}
#elif AQ_W == 8
#define AQ_RUNS(bits) AQ_PRODUCTS(bits, 1) AQ_PRODUCTS(bits, 2) AQ_PRODUCTS(bits, 4) AQ_PRODUCTS(bits, 8)
#define AQ_RUN_ENTRY(bits) {products_##bits##_1, products_##bits##_2, products_##bits##_4, products_##bits##_8}
#else
#define AQ_RUNS(bits) AQ_PRODUCTS(bits, 1) AQ_PRODUCTS(bits, 2) AQ_PRODUCTS(bits, 4)
#define AQ_RUN_ENTRY(bits) {products_##bits##_1, products_##bits##_2, products_##bits##_4}
#endif

AQ_RUNS(2) AQ_RUNS(3) AQ_RUNS(4) AQ_RUNS(7) AQ_RUNS(8)

#include "levels.h"

/* By width, and by the logarithm of the run. */
static const products_function products[5][AQ_W == 16 ? 5 : AQ_W == 8 ? 4 : 3] = {
    AQ_RUN_ENTRY(2), AQ_RUN_ENTRY(3), AQ_RUN_ENTRY(4), AQ_RUN_ENTRY(8), AQ_RUN_ENTRY(7)};

/* A block of columns, for every row. */
typedef struct {
  size_t col, n, segments;
  size_t group; /* of column col, within a row */
  const uint8_t *x;   /* codes of x less AQ_OFFSET, in the order of the planes */
  const float *sums;  /* of x less its zero point, by segment */
  vi zero;            /* bytes */
  products_function products;
  size_t steps;
  const level_x *ordered; /* x for levels in registers; null: they are stored as codes */
  int32_t x_zero;
} vector_block;

/* Whole sums of AQ_W segments of trellis codes from column `from` of the block on. */
AQ_INLINE vi products_of_levels(const aq_packed_view *view, size_t row, const vector_block *b, size_t from) {
  const levels_function function = view->bits == 2 ? level_products_2 : level_products_3;
  return function((const uint8_t *)(view->packed + row * view->words), 4 * view->words,
                  (b->col + from) / 8 * (size_t)view->bits, b->ordered + from, b->x_zero,
                  aq_segment_cols(view) / AQ_LEVEL_COLS, b->n - from);
}

/* Whole sums of AQ_W segments, the first of which is `s`, of codes from byte `from` on. */
AQ_INLINE vi code_products(const vector_block *b, const uint8_t *from, size_t s, size_t size, size_t bits) {
  const uint8_t *codes = from + s * size / 8 * bits;
  uint8_t last[AQ_W * AQ_SEGMENT];
  if ((s + AQ_W) * size > b->n) { /* the row's end: nothing is read behind it */
    __builtin_memset(last, 0, AQ_W * size / 8 * bits);
    copy_end(codes, b->n - s * size, (int32_t)bits, last);
    codes = last;
  }
  return b->products(codes, b->x + s * size, b->zero, b->steps);
}

/* terms[s] = scale (I - zero A) of a row's segments */
static void row_terms(const aq_packed_view *view, size_t row, const vector_block *b, float *terms) {
  const size_t size = aq_segment_cols(view), bits = view->levels ? 8 : (size_t)view->bits;
  const uint8_t *from = (const uint8_t *)(view->packed + row * view->words) + b->col / 8 * bits;
  const size_t group = row * view->groups + b->group;
  const vf middle = (vf){0} + (float)(1 << (bits - 1));
  _Alignas(64) uint8_t level_codes[AQ_VECTOR_COLS + AQ_QUADS];
  const int found = b->ordered != 0; /* levels in registers */
  if (view->levels && !found) {
    row_levels(view, row, b->col, b->n, level_codes);
    for (size_t i = 0; i < b->n; i += AQ_QUADS) v_store_int(level_codes + i, codes_of_levels(v_load_int(level_codes + i)));
    from = level_codes;
  }
  for (size_t s = 0; s < b->segments; s += AQ_W) {
    const vi whole = found ? products_of_levels(view, row, b, s * size) : code_products(b, from, s, size, bits);
    vf scale, zero_point = middle;
    if (view->groups > 1 && s + AQ_W <= b->segments) {
      __builtin_prefetch(view->scale + group + s + 256);
      if (view->zero_point) __builtin_prefetch(view->zero_point + group + s + 256);
      scale = v_load_half(view->scale + group + s);
      if (view->zero_point) zero_point = v_load_half(view->zero_point + group + s);
    } else {
      uint16_t scales[AQ_W] = {0}, zeros[AQ_W] = {0};
      for (size_t i = 0; i < AQ_W && s + i < b->segments; i++) {
        scales[i] = view->scale[group + (view->groups == 1 ? 0 : s + i)];
        if (view->zero_point) zeros[i] = view->zero_point[group + (view->groups == 1 ? 0 : s + i)];
      }
      scale = v_load_half(scales);
      if (view->zero_point) zero_point = v_load_half(zeros);
    }
    const vf sum = v_load(b->sums + s), products = __builtin_convertvector(whole, vf);
    if (view->levels) {
      const vf of_levels = found ? products : products - (float)AQ_LEVEL_ZERO * sum;
      v_store(terms + s, scale * AQ_TRELLIS_UNIT * of_levels + zero_point * sum);
    } else {
      const vf shift = zero_point * sum;
      v_store(terms + s, scale * (products - shift));
    }
  }
}

/* Codes less AQ_OFFSET in the order of the planes; behind the end weights are zero. */
AQ_INLINE void order_by_planes(const uint8_t *codes, size_t n, size_t planes, uint8_t x[AQ_VECTOR_COLS]) {
  __builtin_memset(x, 0, AQ_VECTOR_COLS);
  for (size_t i = 0; i < n; i += planes * AQ_QUADS)
    for (size_t plane = 0; plane < planes; plane++)
      for (size_t j = 0; j < AQ_QUADS && i + j * planes + plane < n; j++)
        x[i + plane * AQ_QUADS + j] = (uint8_t)(codes[i + j * planes + plane] - AQ_OFFSET);
}

static void linear_vector(const aq_linear_job *job, size_t token, size_t row_begin, size_t row_end) {
  const aq_packed_view *view = &job->view;
  const size_t size = aq_segment_cols(view), bits = view->levels ? AQ_LEVEL_BITS : (size_t)view->bits;
  const size_t planes = (size_t)AQ_PLANES(bits);
  const size_t lanes = size / (planes * 4); /* of a segment */
  const size_t run = aq_min_size(lanes, AQ_W);
  const size_t width = bits == AQ_LEVEL_BITS ? 4 : bits == 8 ? 3 : bits - 2;
  const products_function function = products[width][__builtin_ctzll((unsigned long long)run)];
  const int32_t zero = job->x_zero[token];
  for (size_t col = 0; col < job->cols; col += AQ_VECTOR_COLS) {
    const size_t n = aq_min_size(AQ_VECTOR_COLS, job->cols - col), segments = (n - 1) / size + 1;
    const uint8_t *codes = job->codes + token * job->cols + col;
    uint8_t x[AQ_VECTOR_COLS];
    float sums[AQ_VECTOR_COLS / 16 + AQ_W] = {0};
    for (size_t s = 0; s < segments; s++) {
      int32_t sum = 0;
      const size_t end = aq_min_size((s + 1) * size, n);
      for (size_t i = s * size; i < end; i++) sum += codes[i];
      sums[s] = (float)(sum - (int32_t)(end - s * size) * zero);
    }
    level_x ordered[AQ_VECTOR_COLS];
    const int found = AQ_OWN_LEVELS && view->levels && size >= AQ_LEVEL_COLS; /* levels in registers */
    if (found) order_for_levels(codes, n, zero, view->bits, ordered);
    else order_by_planes(codes, n, planes, x);
    const vector_block block = {col, n, segments, view->groups == 1 ? 0 : col / size, x, sums,
                                v_splat_bytes(zero - AQ_OFFSET), function, lanes / run, found ? ordered : 0, zero};
    for (size_t row = row_begin; row < row_end; row += AQ_W) {
      /* rows in the lanes: every row's segments are added up one after the other, the rows at once */
      const size_t rows = aq_min_size(AQ_W, row_end - row);
      float *out = job->out + token * job->rows + row;
      float terms[AQ_W][AQ_VECTOR_COLS / 16 + AQ_W];
      vf total = {0};
      for (size_t r = 0; r < rows; r++) row_terms(view, row + r, &block, terms[r]);
      if (col > 0) __builtin_memcpy(&total, out, rows * sizeof(float));
      for (size_t s = 0; s < segments; s += AQ_W) {
        vf columns[AQ_W];
        for (size_t r = 0; r < AQ_W; r++) columns[r] = r < rows ? v_load(terms[r] + s) : (vf){0};
        v_transpose(columns);
        const size_t m = aq_min_size(AQ_W, segments - s);
        for (size_t i = 0; i < m; i++) total = total + columns[i];
      }
      if (col + n == job->cols) {
        vf bias = {0};
        total = total * job->x_scale[token];
        if (job->bias) {
          __builtin_memcpy(&bias, job->bias + row, rows * sizeof(float));
          total = total + bias;
        }
      }
      __builtin_memcpy(out, &total, rows * sizeof(float));
    }
  }
}

const aq_int8_kernels AQ_NAMED(int8) = {{2 * AQ_W, AQ_FEW_TOKENS, 1024.0, linear, linear_vector}, range, encode, round_values};
