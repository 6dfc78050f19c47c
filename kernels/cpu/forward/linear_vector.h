/* forward/linear_vector.h: linear layers over vectors of AQ_W floats.
 *
 * A linear layer transposes blocks of weights into panels: AQ_W rows in the lanes, columns one after the
 * other, and runs tiles of AQ_MR tokens over them. Panels live on the stack.
 *
 *     panel[k] = column k of row 0 | column k of row 1 | ... | column k of row AQ_W - 1
 *
 * Expected of an instruction set, beside the primitives of isa/lanes.h:
 *   AQ_MR: tokens of a tile; 2 AQ_MR accumulators and three more vectors fit the registers
 *   v_splat(x), v_fma(a, b, c): a b + c, fused where the processor can
 *   v_load_half(p): AQ_W half floats
 *   Optionally, under AQ_OWN_DECODE: v_grid, v_grid_of, v_decode, AQ_DECODE_BYTES and AQ_DECODE_ORDER
 */
#include "kernels.h"

#define AQ_KC AQ_SEGMENT          /* columns of a panel; sums over more are sums of such parts' sums */
#define AQ_XS (AQ_KC + 16)        /* floats from one token of a tile to the next: not a power of two */
#define AQ_PANELS (64 / AQ_W)     /* panels held at once: 64 rows */
#define AQ_QUERIES (56 / AQ_MR * AQ_MR)

AQ_INLINE vf v_load_part(const float *p, size_t n, float fill) {
  float part[AQ_W];
  for (size_t i = 0; i < AQ_W; i++) part[i] = i < n ? p[i] : fill;
  return v_load(part);
}

AQ_INLINE void v_store_part(float *p, vf v, size_t n) { __builtin_memcpy(p, &v, n * sizeof(float)); }

/* Tiles of products -------------------------------------------------------------------------------------- */

/* out[i, j] (+)= sum_k x[i, k] w[k, j] (+ bias[j]) for m tokens and nv vectors of rows. */
AQ_INLINE void tile_of(const int m, const int nv, const float *x, const vf *w, size_t k, float *out, size_t out_stride,
                       int add, const float *bias) {
  vf sum[AQ_MR][2];
#pragma GCC unroll 16
  for (int i = 0; i < m; i++) sum[i][0] = sum[i][1] = (vf){0};
  for (size_t at = 0; at < k; at++) {
    const vf w0 = w[at];
    vf w1 = w0;
    if (nv > 1) w1 = w[AQ_KC + at];
#pragma GCC unroll 16
    for (int i = 0; i < m; i++) {
      const vf token = v_splat(x[i * AQ_XS + at]);
      sum[i][0] = v_fma(token, w0, sum[i][0]);
      if (nv > 1) sum[i][1] = v_fma(token, w1, sum[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < m; i++) {
    float *to = out + (size_t)i * out_stride;
    for (int j = 0; j < nv; j++) {
      vf v = sum[i][j];
      if (add) v = v_load(to + j * AQ_W) + v;
      if (bias) v = v + v_load(bias + j * AQ_W);
      v_store(to + j * AQ_W, v);
    }
  }
}

typedef void (*tile_function)(const float *x, const vf *w, size_t k, float *out, size_t out_stride, int add,
                              const float *bias);

#define AQ_TILE(m, nv)                                                                                              \
  static void tile_##m##_##nv(const float *x, const vf *w, size_t k, float *out, size_t out_stride, int add,        \
                              const float *bias) {                                                                  \
    tile_of(m, nv, x, w, k, out, out_stride, add, bias);                                                            \
  }
#define AQ_TILES(m) AQ_TILE(m, 1) AQ_TILE(m, 2)
#define AQ_TILE_ENTRY(m) {tile_##m##_1, tile_##m##_2}

AQ_TILES(1) AQ_TILES(2) AQ_TILES(3) AQ_TILES(4)
#if AQ_MR > 4
AQ_TILES(5) AQ_TILES(6)
#endif
#if AQ_MR > 6
AQ_TILES(7) AQ_TILES(8) AQ_TILES(9) AQ_TILES(10) AQ_TILES(11) AQ_TILES(12)
#endif
#if AQ_MR > 12
AQ_TILES(13) AQ_TILES(14)
#endif

static const tile_function tiles[AQ_MR][2] = {
    AQ_TILE_ENTRY(1), AQ_TILE_ENTRY(2), AQ_TILE_ENTRY(3), AQ_TILE_ENTRY(4),
#if AQ_MR > 4
    AQ_TILE_ENTRY(5), AQ_TILE_ENTRY(6),
#endif
#if AQ_MR > 6
    AQ_TILE_ENTRY(7), AQ_TILE_ENTRY(8), AQ_TILE_ENTRY(9), AQ_TILE_ENTRY(10), AQ_TILE_ENTRY(11), AQ_TILE_ENTRY(12),
#endif
#if AQ_MR > 12
    AQ_TILE_ENTRY(13), AQ_TILE_ENTRY(14),
#endif
};

/* A tile of which only n columns are there. */
static void tile(size_t m, size_t nv, size_t n, const float *x, const vf *w, size_t k, float *out, size_t out_stride,
                 int add, const float *bias) {
  if (n == nv * AQ_W) {
    tiles[m - 1][nv - 1](x, w, k, out, out_stride, add, bias);
    return;
  }
  float whole[AQ_MR][2 * AQ_W];
  tiles[m - 1][nv - 1](x, w, k, whole[0], 2 * AQ_W, 0, 0);
  for (size_t i = 0; i < m; i++)
    for (size_t j = 0; j < n; j++) {
      float v = whole[i][j];
      if (add) v = out[i * out_stride + j] + v;
      if (bias) v = v + bias[j];
      out[i * out_stride + j] = v;
    }
}

/* Rows first[0..AQ_W) of `in`, n elements each, into the lanes of panel[0..n). */
AQ_INLINE void fill_panel(const void *in, int32_t dtype, const size_t first[AQ_W], size_t n, vf *panel) {
  size_t i = 0;
  vf r[AQ_W];
  for (; i + AQ_W <= n; i += AQ_W) {
    for (int lane = 0; lane < AQ_W; lane++) r[lane] = v_load_as(in, dtype, first[lane] + i);
    v_transpose(r);
    for (int j = 0; j < AQ_W; j++) panel[i + j] = r[j];
  }
  if (i == n) return;
  float part[AQ_W][AQ_W] = {{0}};
  for (int lane = 0; lane < AQ_W; lane++) aq_quantize_scalar.load(in, dtype, first[lane] + i, n - i, part[lane]);
  for (int lane = 0; lane < AQ_W; lane++) r[lane] = v_load(part[lane]);
  v_transpose(r);
  for (int j = 0; i < n; i++, j++) panel[i] = r[j];
}

/* Weights of rows [row, row + n), columns [col, col + k), n <= AQ_W; lanes beyond repeat the last row. */
static void fill_weights(const aq_linear_job *job, size_t row, size_t n, size_t col, size_t k, vf *panel) {
  size_t first[AQ_W];
  if (job->view.packed) {
    float rows[AQ_W][AQ_KC];
    for (size_t lane = 0; lane < AQ_W; lane++) {
      first[lane] = aq_min_size(lane, n - 1) * AQ_KC;
      if (lane < n) dequantize(&job->view, row + lane, col, k, rows[lane]);
    }
    fill_panel(rows, AQ_F32, first, k, panel);
    return;
  }
  for (size_t lane = 0; lane < AQ_W; lane++) first[lane] = (row + aq_min_size(lane, n - 1)) * job->cols + col;
  AQ_FOR_FLOATS(job->dtype, type, fill_panel(job->weights, type, first, k, panel))
}

/* m tokens of k columns each into a tile. */
AQ_INLINE void copy_tile(const float *x, size_t stride, size_t m, size_t k, float *out) {
  for (size_t i = 0; i < m; i++, x += stride, out += AQ_XS) {
    size_t at = 0;
    for (; at + AQ_W <= k; at += AQ_W) v_store(out + at, v_load(x + at));
    for (; at < k; at++) out[at] = x[at];
  }
}

static void linear(const aq_linear_job *job, size_t token_begin, size_t token_end, size_t row_begin, size_t row_end) {
  vf panels[AQ_PANELS][AQ_KC];
  float x[AQ_MR * AQ_XS];
  const size_t tokens = token_end - token_begin, tile_count = (tokens + AQ_MR - 1) / AQ_MR;
  for (size_t row = row_begin; row < row_end; row += AQ_PANELS * AQ_W) {
    const size_t n = aq_min_size(AQ_PANELS * AQ_W, row_end - row), count = (n + AQ_W - 1) / AQ_W;
    for (size_t col = 0; col < job->cols; col += AQ_KC) {
      const size_t k = aq_min_size(AQ_KC, job->cols - col);
      const int last = col + k == job->cols;
      for (size_t p = 0; p < count; p++)
        fill_weights(job, row + p * AQ_W, aq_min_size(AQ_W, n - p * AQ_W), col, k, panels[p]);
      for (size_t i = 0; i < tile_count; i++) {
        const size_t t = token_begin + tokens * i / tile_count;
        const size_t m = token_begin + tokens * (i + 1) / tile_count - t;
        copy_tile(job->x + t * job->cols + col, job->cols, m, k, x);
        for (size_t p = 0; p < count; p += 2) {
          const size_t nv = aq_min_size(2, count - p), at = row + p * AQ_W;
          tile(m, nv, aq_min_size(nv * AQ_W, row_end - at), x, panels[p], k, job->out + t * job->rows + at, job->rows,
               col > 0, last && job->bias ? job->bias + at : 0);
        }
      }
    }
  }
}

/* One token: vectors along the row ----------------------------------------------------------------------- */

/* Dense rows begun together, so that their loads and sums overlap. */
#define AQ_VECTOR_ROWS 4

AQ_INLINE void dense_rows(const aq_linear_job *job, int32_t dtype, size_t row, const int count) {
  vf sum[AQ_VECTOR_ROWS][2];
#pragma GCC unroll 4
  for (int r = 0; r < count; r++) sum[r][0] = sum[r][1] = (vf){0};
  const size_t cols = job->cols, first = row * cols;
  size_t i = 0;
  for (; i + 2 * AQ_W <= cols; i += 2 * AQ_W) {
    const vf x0 = v_load(job->x + i), x1 = v_load(job->x + i + AQ_W);
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) {
      sum[r][0] = v_fma(v_load_as(job->weights, dtype, first + (size_t)r * cols + i), x0, sum[r][0]);
      sum[r][1] = v_fma(v_load_as(job->weights, dtype, first + (size_t)r * cols + i + AQ_W), x1, sum[r][1]);
    }
  }
  for (int lane = 0; i < cols; i += AQ_W, lane = 1) {
    const size_t n = aq_min_size(AQ_W, cols - i);
    const vf x = v_load_part(job->x + i, n, 0.0f);
#pragma GCC unroll 4
    for (int r = 0; r < count; r++) {
      float w[AQ_W] = {0};
      aq_quantize_scalar.load(job->weights, dtype, first + (size_t)r * cols + i, n, w);
      sum[r][lane] = v_fma(v_load(w), x, sum[r][lane]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < count; r++)
    job->out[row + (size_t)r] = v_total(sum[r][0] + sum[r][1]) + (job->bias ? job->bias[row + (size_t)r] : 0.0f);
}

AQ_INLINE void dense_vector(const aq_linear_job *job, int32_t dtype, size_t row_begin, size_t row_end) {
  size_t row = row_begin;
  for (; row + AQ_VECTOR_ROWS <= row_end; row += AQ_VECTOR_ROWS) dense_rows(job, dtype, row, AQ_VECTOR_ROWS);
  for (; row < row_end; row++) dense_rows(job, dtype, row, 1);
}

#if !defined(AQ_OWN_DECODE)
typedef struct {
  vf scale, offset;
} v_grid;

/* w = scale q + offset */
AQ_INLINE v_grid v_grid_of(float scale, float offset, int32_t bits) {
  (void)bits;
  return (v_grid){v_splat(scale), v_splat(offset)};
}

/* Weights of 16 codes from a multiple of 16 on. */
AQ_INLINE void v_decode(const uint8_t *from, int32_t bits, v_grid g, vf out[16 / AQ_W]) {
  v_unpack(from, bits, out);
  v_unpack(from + bits, bits, out + 8 / AQ_W);
  for (int i = 0; i < 16 / AQ_W; i++) out[i] = v_fma(out[i], g.scale, g.offset);
}

/* that v_decode reads, 2 bits of them its own */
#define AQ_DECODE_BYTES(bits) ((bits) == 8 ? 16 : (bits) + 4)
#define AQ_DECODE_ORDER(bits, lane) (lane)                    /* the column that comes out in a lane */
#endif

/* Columns of x that are held at once, in the order in which codes come out. */
#define AQ_VECTOR_COLS 4096

/* Scales and offsets -scale zero_point of n groups; the product of two half floats is exact. */
AQ_INLINE void widen_grids(const aq_packed_view *view, size_t group, size_t n, float *scales, float *offsets) {
  const uint16_t *scale = view->scale + group, *zero_point = view->zero_point ? view->zero_point + group : 0;
  const float middle = (float)(1 << (view->bits - 1));
  size_t i = 0;
  for (; i + AQ_W <= n; i += AQ_W) {
    const vf s = v_load_half(scale + i);
    v_store(scales + i, s);
    v_store(offsets + i, -s * (zero_point ? v_load_half(zero_point + i) : v_splat(middle)));
  }
  for (; i < n; i++) {
    scales[i] = aq_float_from_half(scale[i]);
    offsets[i] = -scales[i] * (zero_point ? aq_float_from_half(zero_point[i]) : middle);
  }
}

/* The next 16 codes into one of the sums. */
#define AQ_TAKE(at, which)                                                                                          \
  do {                                                                                                              \
    v_decode(from + (at) * 2 * bits, bits, g, w);                                                                   \
    _Pragma("GCC unroll 4") for (int k = 0; k < K; k++) which[k] = v_fma(w[k], x[(at) * K + k], which[k]);          \
  } while (0)

/* Four sums in turn: a single one would wait for its last addition. One row after the other, because memory
 * is read fastest as one stream. */
AQ_INLINE void packed_row(const aq_linear_job *job, int32_t bits, const vf *x, size_t col, size_t n, size_t row) {
  enum { K = 16 / AQ_W };
  const aq_packed_view *view = &job->view;
  const size_t size = view->groups == 1 ? n : view->group_size, groups = (n - 1) / size + 1;
  const size_t first = row * view->groups + (view->groups == 1 ? 0 : col / view->group_size);
  const uint8_t *from = (const uint8_t *)(view->packed + row * view->words) + col / 8 * (size_t)bits;
  const uint8_t *end = (const uint8_t *)(view->packed + (row + 1) * view->words);
  float scales[AQ_VECTOR_COLS / 16 + AQ_UNPACK];
  float offsets[AQ_VECTOR_COLS / 16 + AQ_UNPACK];
  if (view->two_level.scale_bits)
    widen_two_level(view, row, col / view->group_size, groups, -1.0f, scales, offsets);
  else
    widen_grids(view, first, groups, scales, offsets);
  vf a[K], b[K], c[K], d[K], w[K];
#pragma GCC unroll 4
  for (int k = 0; k < K; k++) a[k] = b[k] = c[k] = d[k] = (vf){0};
  for (size_t group = 0, left = n; group < groups; group++) {
    const v_grid g = v_grid_of(scales[group], offsets[group], bits);
    size_t rest = aq_min_size(size, left);
    left -= rest;
    /* where v_decode reads more than it takes, the row's end is left to the loop below */
    const ptrdiff_t beyond = AQ_DECODE_BYTES(bits) - 2 * bits;
    for (; rest >= 64 && (beyond == 0 || end - from >= 8 * bits + beyond); rest -= 64) {
      __builtin_prefetch(from + 1024);
      AQ_TAKE(0, a);
      AQ_TAKE(1, b);
      AQ_TAKE(2, c);
      AQ_TAKE(3, d);
      from += 8 * bits;
      x += 4 * K;
    }
    for (int half = 0; rest > 0; half ^= 1) {
      if (beyond == 0 && rest >= 16) {
        if (half)
          AQ_TAKE(0, b);
        else
          AQ_TAKE(0, a);
      } else {
        uint8_t last[24] = {0};
        __builtin_memcpy(last, from, aq_min_size(2 * (size_t)bits, (size_t)(end - from)));
        v_decode(last, bits, g, w);
#pragma GCC unroll 4
        for (int k = 0; k < K; k++) {
          if (half)
            b[k] = v_fma(w[k], x[k], b[k]);
          else
            a[k] = v_fma(w[k], x[k], a[k]);
        }
      }
      from += 2 * bits;
      x += K;
      rest -= aq_min_size(16, rest);
    }
  }
  vf sum = {0};
#pragma GCC unroll 4
  for (int k = 0; k < K; k++) sum += (a[k] + b[k]) + (c[k] + d[k]);
  float total = v_total(sum);
  if (col > 0) total = job->out[row] + total;
  if (col + n == job->cols && job->bias) total = total + job->bias[row];
  job->out[row] = total;
}

AQ_INLINE void packed_vector_bits(const aq_linear_job *job, size_t row_begin, size_t row_end, int32_t bits) {
  for (size_t col = 0; col < job->cols; col += AQ_VECTOR_COLS) {
    vf x[AQ_VECTOR_COLS / AQ_W];
    const size_t n = aq_min_size(AQ_VECTOR_COLS, job->cols - col);
    for (size_t i = 0; i < (n + 15) / 16 * 16; i += 16)
      for (size_t lane = 0; lane < 16; lane++) {
        const size_t from = i + (size_t)AQ_DECODE_ORDER(bits, lane);
        ((float *)x)[i + lane] = from < n ? job->x[col + from] : 0.0f;
      }
    for (size_t row = row_begin; row < row_end; row++) packed_row(job, bits, x, col, n, row);
  }
}

/* A row of trellis codes: levels times x by groups, and offsets times the groups' sums of x. */
AQ_INLINE void levels_row(const aq_linear_job *job, const vf *x, const float *sums, size_t col, size_t n, size_t row) {
  const aq_packed_view *view = &job->view;
  const size_t size = view->groups == 1 ? n : view->group_size, groups = (n - 1) / size + 1;
  const size_t first = row * view->groups + (view->groups == 1 ? 0 : col / size);
  _Alignas(64) int8_t levels[AQ_VECTOR_COLS + AQ_LEVELS_BEHIND];
  float scales[AQ_VECTOR_COLS / 16], offsets[AQ_VECTOR_COLS / 16], shift = 0.0f;
  view->levels((const uint8_t *)(view->packed + row * view->words), 4 * view->words, col, n, levels);
  widen_halves(view->scale + first, groups, scales);
  widen_halves(view->zero_point + first, groups, offsets);
  vf total = {0};
  const int8_t *from = levels;
  for (size_t group = 0, left = n; group < groups; group++) {
    vf sum[4] = {{0}, {0}, {0}, {0}};
    size_t vectors = (aq_min_size(size, left) + AQ_W - 1) / AQ_W; /* behind the row's end x is 0 */
    left -= aq_min_size(size, left);
    for (; vectors >= 4; vectors -= 4, from += 4 * AQ_W, x += 4) {
      vf four[4];
      v_load_four_levels(from, four);
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) sum[k] = v_fma(four[k], x[k], sum[k]);
    }
    for (; vectors > 0; vectors--, from += AQ_W, x++) sum[0] = v_fma(v_load_levels(from), *x, sum[0]);
    total = v_fma(v_splat(scales[group] * AQ_TRELLIS_UNIT), (sum[0] + sum[1]) + (sum[2] + sum[3]), total);
    shift += offsets[group] * sums[group];
  }
  float out = v_total(total) + shift;
  if (col > 0) out = job->out[row] + out;
  if (col + n == job->cols && job->bias) out = out + job->bias[row];
  job->out[row] = out;
}

AQ_INLINE void levels_vector(const aq_linear_job *job, size_t row_begin, size_t row_end) {
  for (size_t col = 0; col < job->cols; col += AQ_VECTOR_COLS) {
    vf x[AQ_VECTOR_COLS / AQ_W];
    float sums[AQ_VECTOR_COLS / 16];
    const size_t n = aq_min_size(AQ_VECTOR_COLS, job->cols - col), end = (n + AQ_W - 1) / AQ_W * AQ_W;
    const size_t size = job->view.groups == 1 ? n : job->view.group_size;
    for (size_t i = 0; i < end; i++) ((float *)x)[i] = i < n ? job->x[col + i] : 0.0f;
    for (size_t group = 0; group * size < n; group++) {
      vf sum = {0};
      for (size_t i = group * size; i < aq_min_size((group + 1) * size, end); i += AQ_W) sum += x[i / AQ_W];
      sums[group] = v_total(sum);
    }
    for (size_t row = row_begin; row < row_end; row++) levels_row(job, x, sums, col, n, row);
  }
}

static void linear_vector(const aq_linear_job *all, size_t token, size_t row_begin, size_t row_end) {
  aq_linear_job one = *all;
  const aq_linear_job *job = &one;
  one.x += token * one.cols;
  one.out += token * one.rows;
  if (job->view.levels)
    levels_vector(job, row_begin, row_end);
  else if (job->view.packed)
    AQ_FOR_BITS(job->view.bits, bits, packed_vector_bits(job, row_begin, row_end, bits))
  else
    AQ_FOR_FLOATS(job->dtype, type, dense_vector(job, type, row_begin, row_end))
}
