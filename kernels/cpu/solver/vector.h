/* solver/vector.h: solver/kernels.h over vectors of AQ_W floats, included once by each unit of isa/ behind
 * quantize/vector.h. A panel holds two vectors of rows; every lane repeats the oracle's operations in its
 * order.
 *
 *     panel[k * AQ_ROWS + lane] = column k of the panel's row `lane`
 */
#include "kernels.h"

#define AQ_ROWS (2 * AQ_W)
#if AQ_W >= 16 || defined(AQ_BUILD_NEON)
#define AQ_ST 12 /* columns of a tile: 2 AQ_ST sums, and a few more, fit the registers */
#else
#define AQ_ST 4
#endif

/* sum[i] (+-)= sum_j x[j x_stride + i] y[j y_stride ...], j ascending, multiplied and added apart. */
AQ_INLINE void add_products(const int m, const int subtract, const float *x, size_t x_stride, const float *y,
                            size_t y_stride, size_t n, vf sum[AQ_ST][2]) {
  for (size_t j = 0; j < n; j++) {
    const vf y0 = v_load(y + j * y_stride), y1 = v_load(y + j * y_stride + AQ_W);
    const float *at = x + j * x_stride;
#pragma GCC unroll 16
    for (int i = 0; i < m; i++) {
      const vf factor = v_splat(at[i]);
      if (subtract) {
        sum[i][0] = sum[i][0] - factor * y0;
        sum[i][1] = sum[i][1] - factor * y1;
      } else {
        sum[i][0] = sum[i][0] + factor * y0;
        sum[i][1] = sum[i][1] + factor * y1;
      }
    }
  }
}

/* The same on sums in memory, m of them `stride` floats apart. */
AQ_INLINE void tile_products_of(const int m, const int subtract, const float *x, size_t x_stride, const float *y,
                                size_t y_stride, size_t n, float *out, size_t stride) {
  vf sum[AQ_ST][2];
#pragma GCC unroll 16
  for (int i = 0; i < m; i++) {
    sum[i][0] = v_load(out + (size_t)i * stride);
    sum[i][1] = v_load(out + (size_t)i * stride + AQ_W);
  }
  add_products(m, subtract, x, x_stride, y, y_stride, n, sum);
#pragma GCC unroll 16
  for (int i = 0; i < m; i++) {
    v_store(out + (size_t)i * stride, sum[i][0]);
    v_store(out + (size_t)i * stride + AQ_W, sum[i][1]);
  }
}

#define AQ_TILE_PRODUCTS(name, m, subtract)                                                                  \
  static void name(const float *x, size_t xs, const float *y, size_t ys, size_t n, float *out, size_t stride) { \
    tile_products_of(m, subtract, x, xs, y, ys, n, out, stride);                                               \
  }
AQ_TILE_PRODUCTS(tile_add_whole, AQ_ST, 0)
AQ_TILE_PRODUCTS(tile_add_four, 4, 0)
AQ_TILE_PRODUCTS(tile_add_one, 1, 0)
AQ_TILE_PRODUCTS(tile_subtract_whole, AQ_ST, 1)
AQ_TILE_PRODUCTS(tile_subtract_four, 4, 1)
AQ_TILE_PRODUCTS(tile_subtract_one, 1, 1)

/* out[i] (+-)= sum_j x[j, i] y[j] for m columns i. */
static void columns_products(int subtract, size_t m, const float *x, size_t xs, const float *y, size_t ys, size_t n,
                             float *out, size_t stride) {
  size_t i = 0;
  for (; i + AQ_ST <= m; i += AQ_ST)
    (subtract ? tile_subtract_whole : tile_add_whole)(x + i, xs, y, ys, n, out + i * stride, stride);
  for (; i + 4 <= m; i += 4)
    (subtract ? tile_subtract_four : tile_add_four)(x + i, xs, y, ys, n, out + i * stride, stride);
  for (; i < m; i++) (subtract ? tile_subtract_one : tile_add_one)(x + i, xs, y, ys, n, out + i * stride, stride);
}

/* Rows of a matrix into the lanes of a panel; lanes beyond `rows` repeat the last row. */
static void load_panel(const float *from, size_t rows, size_t n, float *panel) {
  for (size_t v = 0; v < AQ_ROWS; v += AQ_W) {
    const float *row[AQ_W];
    for (size_t lane = 0; lane < AQ_W; lane++) row[lane] = from + aq_min_size(v + lane, rows - 1) * n;
    size_t k = 0;
    for (; k + AQ_W <= n; k += AQ_W) {
      vf r[AQ_W];
      for (size_t lane = 0; lane < AQ_W; lane++) r[lane] = v_load(row[lane] + k);
      v_transpose(r);
      for (size_t j = 0; j < AQ_W; j++) v_store(panel + (k + j) * AQ_ROWS + v, r[j]);
    }
    for (; k < n; k++)
      for (size_t lane = 0; lane < AQ_W; lane++) panel[k * AQ_ROWS + v + lane] = row[lane][k];
  }
}

/* Codes of a panel, as floats, into bytes. */
static void store_codes(const float *panel, size_t rows, size_t n, uint8_t *codes) {
  for (size_t v = 0; v < rows; v += AQ_W) {
    const size_t lanes = aq_min_size(AQ_W, rows - v);
    size_t k = 0;
    for (; k + AQ_W <= n; k += AQ_W) {
      vf r[AQ_W];
      for (size_t j = 0; j < AQ_W; j++) r[j] = v_load(panel + (k + j) * AQ_ROWS + v);
      v_transpose(r);
      for (size_t lane = 0; lane < lanes; lane++)
        for (size_t j = 0; j < AQ_W; j++) codes[(v + lane) * n + k + j] = (uint8_t)r[lane][j];
    }
    for (; k < n; k++)
      for (size_t lane = 0; lane < lanes; lane++)
        codes[(v + lane) * n + k] = (uint8_t)panel[k * AQ_ROWS + v + lane];
  }
}

AQ_INLINE vf v_quantized(vf value, vf scale, vf zero_point, vf code_max) {
  const vf zero = v_splat(0.0f);
  vf position = value / scale + zero_point;
  position = v_select(position > zero, position, zero);
  position = v_select(position < code_max, position, code_max);
  return v_round(position);
}

static void feedback(const aq_feedback_job *job, size_t row, size_t rows, float *work) {
  const size_t n = job->cols;
  const vf code_max = v_splat((float)((1 << job->bits) - 1));
  float *errors = work, *weights = errors + n * AQ_ROWS, *codes = weights + n * AQ_ROWS;
  float *scale = codes + n * AQ_ROWS, *zero_point = scale + job->groups * AQ_ROWS;
  load_panel(job->weights + row * n, rows, n, weights);
  for (size_t lane = 0; lane < AQ_ROWS; lane++) {
    const size_t from = (row + aq_min_size(lane, rows - 1)) * job->groups;
    for (size_t g = 0; g < job->groups; g++) {
      scale[g * AQ_ROWS + lane] = job->scale[from + g];
      zero_point[g * AQ_ROWS + lane] = job->zero_point[from + g];
    }
  }
  float target[AQ_SOLVER_BLOCK * AQ_ROWS];
  for (size_t first = 0; first < n && !aq_stopped(); first += AQ_SOLVER_BLOCK) {
    const size_t block = aq_min_size(AQ_SOLVER_BLOCK, n - first);
    for (size_t k = 0; k < block; k++)
      for (size_t v = 0; v < AQ_ROWS; v += AQ_W)
        v_store(target + k * AQ_ROWS + v, v_load(weights + (size_t)job->order[first + k] * AQ_ROWS + v));
    columns_products(0, block, job->factor + first, n, errors, AQ_ROWS, first, target, AQ_ROWS);
    for (size_t k = 0; k < block; k++) {
      const size_t col = (size_t)job->order[first + k], g = col / job->group_size * AQ_ROWS;
      const float *factor = job->factor + (first + k) * n + first;
      for (size_t v = 0; v < AQ_ROWS; v += AQ_W) {
        const vf s = v_load(scale + g + v), z = v_load(zero_point + g + v);
        const vf code = v_quantized(v_load(target + k * AQ_ROWS + v), s, z, code_max);
        const vf error = v_load(weights + col * AQ_ROWS + v) - s * (code - z);
        v_store(codes + col * AQ_ROWS + v, code);
        v_store(errors + (first + k) * AQ_ROWS + v, error);
        for (size_t j = k + 1; j < block; j++)
          v_store(target + j * AQ_ROWS + v, v_load(target + j * AQ_ROWS + v) + v_splat(factor[j]) * error);
      }
    }
  }
  store_codes(codes, rows, n, job->codes + row * n);
}

/* Refining ----------------------------------------------------------------------------------------------- */

typedef struct {
  float *codes, *kept, *delta, *products, *weights; /* [cols, AQ_ROWS] */
  float *scale, *zero_point, *own_scale, *own_zero; /* [groups, AQ_ROWS] */
  float *sums; /* [2 groups^2 + 2 groups, AQ_ROWS], and a row's scales and zero points */
  double objective[AQ_ROWS];
} panel_state;

static void panel_evaluate(const aq_refine_job *job, panel_state *s) {
  const size_t n = job->cols;
  for (size_t k = 0; k < n; k++) {
    const size_t g = k / job->group_size * AQ_ROWS;
    for (size_t v = k * AQ_ROWS, e = v + AQ_ROWS, p = g; v < e; v += AQ_W, p += AQ_W) {
      const vf value = v_load(s->scale + p) * (v_load(s->codes + v) - v_load(s->zero_point + p));
      v_store(s->delta + v, v_load(s->weights + v) - value);
      v_store(s->products + v, v_splat(0.0f));
    }
  }
  columns_products(0, n, job->moment, n, s->delta, AQ_ROWS, n, s->products, AQ_ROWS);
  for (size_t lane = 0; lane < AQ_ROWS; lane++) s->objective[lane] = 0;
  for (size_t k = 0; k < n; k++)
    for (size_t lane = 0; lane < AQ_ROWS; lane++)
      s->objective[lane] += (double)(s->delta[k * AQ_ROWS + lane] * s->products[k * AQ_ROWS + lane]);
}

static void panel_refit(const aq_refine_job *job, panel_state *s, size_t rows, double *m, double *r,
                        int moved[AQ_ROWS]) {
  const size_t n = job->cols, groups = job->groups;
  const int real = job->zero_point_kind == AQ_ZERO_POINT_REAL;
  float *qq = s->sums, *oq = qq + groups * groups * AQ_ROWS, *rq = oq + groups * groups * AQ_ROWS;
  float *ro = rq + groups * AQ_ROWS, *u = s->delta; /* not needed before the next evaluation */
  __builtin_memset(s->sums, 0, (2 * groups * groups + 2 * groups) * AQ_ROWS * sizeof(float));
  for (size_t k = 0; k < n; k++)
    for (size_t v = 0; v < AQ_ROWS; v += AQ_W)
      v_store(u + k * AQ_ROWS + v,
              v_load(s->codes + k * AQ_ROWS + v) - v_load(s->zero_point + k / job->group_size * AQ_ROWS + v));
  for (size_t h = 0; h < groups && !aq_stopped(); h++) {
    const size_t begin = h * job->group_size, length = aq_min_size(job->group_size, n - begin);
    for (size_t first = 0; first < n; first += AQ_ST) {
      const size_t m_cols = aq_min_size(AQ_ST, n - first);
      float sum[AQ_ST * AQ_ROWS] = {0};
      columns_products(0, m_cols, job->moment + begin * n + first, n, u + begin * AQ_ROWS, AQ_ROWS, length, sum,
                       AQ_ROWS);
      for (size_t i = 0; i < m_cols; i++) {
        const size_t k = first + i, at = (k / job->group_size * groups + h) * AQ_ROWS;
        for (size_t v = 0; v < AQ_ROWS; v += AQ_W) {
          const vf part = v_load(sum + i * AQ_ROWS + v);
          v_store(qq + at + v, v_load(qq + at + v) + v_load(u + k * AQ_ROWS + v) * part);
          v_store(oq + at + v, v_load(oq + at + v) + part);
        }
      }
    }
  }
  for (size_t k = 0; k < n; k++) {
    const size_t at = k / job->group_size * AQ_ROWS;
    for (size_t v = 0; v < AQ_ROWS; v += AQ_W) {
      const vf p = v_load(s->products + k * AQ_ROWS + v);
      v_store(rq + at + v, v_load(rq + at + v) + v_load(u + k * AQ_ROWS + v) * p);
      v_store(ro + at + v, v_load(ro + at + v) + p);
    }
  }
  for (size_t lane = 0; lane < AQ_ROWS; lane++) {
    moved[lane] = 0;
    if (lane >= rows) continue;
    if (!aq_solve_steps(s->sums + lane, AQ_ROWS, job->group_sums, groups, real, m, r)) continue;
    moved[lane] = 1;
    float *row_scale = ro + groups * AQ_ROWS, *row_zero = row_scale + groups;
    for (size_t g = 0; g < groups; g++) {
      row_scale[g] = s->scale[g * AQ_ROWS + lane];
      row_zero[g] = s->zero_point[g * AQ_ROWS + lane];
    }
    aq_move_grid(r, groups, job->zero_point_kind, row_scale, row_zero);
    for (size_t g = 0; g < groups; g++) {
      s->scale[g * AQ_ROWS + lane] = row_scale[g];
      s->zero_point[g * AQ_ROWS + lane] = row_zero[g];
    }
  }
}

static void panel_descend(const aq_refine_job *job, panel_state *s) {
  const size_t n = job->cols;
  const vf code_max = v_splat((float)((1 << job->bits) - 1));
  float steps[AQ_SOLVER_BLOCK * AQ_ROWS];
  for (size_t first = 0; first < n && !aq_stopped(); first += AQ_SOLVER_BLOCK) {
    const size_t block = aq_min_size(AQ_SOLVER_BLOCK, n - first);
    for (size_t k = 0; k < block; k++) {
      const size_t col = first + k, g = col / job->group_size * AQ_ROWS;
      const float *moment = job->moment + col * n + first;
      for (size_t v = 0; v < AQ_ROWS; v += AQ_W) {
        const vf s0 = v_load(s->scale + g + v), z = v_load(s->zero_point + g + v);
        const vf old = v_load(s->codes + col * AQ_ROWS + v);
        vf code = old;
        if (moment[k] > 0)
          code = v_quantized(s0 * (old - z) + v_load(s->products + col * AQ_ROWS + v) / v_splat(moment[k]), s0, z,
                             code_max);
        const vf step = s0 * (code - old);
        v_store(s->codes + col * AQ_ROWS + v, code);
        v_store(steps + k * AQ_ROWS + v, step);
        for (size_t j = 0; j < block; j++) {
          float *to = s->products + (first + j) * AQ_ROWS + v;
          v_store(to, v_load(to) - v_splat(moment[j]) * step);
        }
      }
    }
    const size_t end = first + block;
    columns_products(1, first, job->moment + first * n, n, steps, AQ_ROWS, block, s->products, AQ_ROWS);
    columns_products(1, n - end, job->moment + first * n + end, n, steps, AQ_ROWS, block,
                     s->products + end * AQ_ROWS, AQ_ROWS);
  }
}

static void copy_lane(float *to, const float *from, size_t count, size_t lane) {
  for (size_t i = 0; i < count; i++) to[i * AQ_ROWS + lane] = from[i * AQ_ROWS + lane];
}

static void refine(const aq_refine_job *job, size_t row, size_t rows, float *work) {
  const size_t n = job->cols, groups = job->groups;
  double *m = (double *)work, *r = m + 4 * groups * groups;
  panel_state s;
  float *at = (float *)(r + 2 * groups);
  float **columns[] = {&s.codes, &s.kept, &s.delta, &s.products, &s.weights};
  float **grids[] = {&s.scale, &s.zero_point, &s.own_scale, &s.own_zero};
  for (int i = 0; i < 5; i++, at += n * AQ_ROWS) *columns[i] = at;
  for (int i = 0; i < 4; i++, at += groups * AQ_ROWS) *grids[i] = at;
  s.sums = at;
  for (size_t lane = 0; lane < AQ_ROWS; lane++) {
    const size_t from = row + aq_min_size(lane, rows - 1);
    for (size_t k = 0; k < n; k++)
      s.codes[k * AQ_ROWS + lane] = s.kept[k * AQ_ROWS + lane] = (float)job->codes[from * n + k];
    for (size_t g = 0; g < groups; g++) {
      s.scale[g * AQ_ROWS + lane] = s.own_scale[g * AQ_ROWS + lane] = job->scale[from * groups + g];
      s.zero_point[g * AQ_ROWS + lane] = s.own_zero[g * AQ_ROWS + lane] = job->zero_point[from * groups + g];
    }
  }
  load_panel(job->weights + row * n, rows, n, s.weights);
  panel_evaluate(job, &s);
  double best[AQ_ROWS];
  for (size_t lane = 0; lane < AQ_ROWS; lane++) best[lane] = s.objective[lane];
  for (int32_t round = 0; round < 2 * job->rounds && !aq_stopped(); round++) {
    int tried[AQ_ROWS], any = 0;
    if (round % 2 == 0) {
      if (!job->refit) continue;
      panel_refit(job, &s, rows, m, r, tried);
    } else {
      panel_descend(job, &s);
      for (size_t lane = 0; lane < AQ_ROWS; lane++) tried[lane] = 1;
    }
    panel_evaluate(job, &s);
    for (size_t lane = 0; lane < AQ_ROWS; lane++) {
      if (!tried[lane]) continue;
      if (s.objective[lane] < best[lane]) {
        best[lane] = s.objective[lane];
        copy_lane(s.kept, s.codes, n, lane);
        copy_lane(s.own_scale, s.scale, groups, lane);
        copy_lane(s.own_zero, s.zero_point, groups, lane);
      } else {
        copy_lane(s.codes, s.kept, n, lane);
        copy_lane(s.scale, s.own_scale, groups, lane);
        copy_lane(s.zero_point, s.own_zero, groups, lane);
        any = 1;
      }
    }
    if (any) panel_evaluate(job, &s);
  }
  for (size_t lane = 0; lane < rows; lane++) {
    for (size_t g = 0; g < groups; g++) {
      job->scale[(row + lane) * groups + g] = s.own_scale[g * AQ_ROWS + lane];
      job->zero_point[(row + lane) * groups + g] = s.own_zero[g * AQ_ROWS + lane];
    }
    job->objective[row + lane] = best[lane];
  }
  store_codes(s.kept, rows, n, job->codes + row * n);
}

/* Moments and their factor ------------------------------------------------------------------------------- */

/* out[i] -= sum_j x[i, j] y[j], j descending: rows of x this time. */
AQ_INLINE void subtract_rows(const int m, const float *x, size_t x_rows, const float *y, size_t n, float *out) {
  vf sum[4][2];
  for (int i = 0; i < m; i++) {
    sum[i][0] = v_load(out + i * AQ_ROWS);
    sum[i][1] = v_load(out + i * AQ_ROWS + AQ_W);
  }
  for (size_t j = n; j-- > 0;) {
    const vf y0 = v_load(y + j * AQ_ROWS), y1 = v_load(y + j * AQ_ROWS + AQ_W);
#pragma GCC unroll 4
    for (int i = 0; i < m; i++) {
      const vf factor = v_splat(x[(size_t)i * x_rows + j]);
      sum[i][0] = sum[i][0] - factor * y0;
      sum[i][1] = sum[i][1] - factor * y1;
    }
  }
  for (int i = 0; i < m; i++) {
    v_store(out + i * AQ_ROWS, sum[i][0]);
    v_store(out + i * AQ_ROWS + AQ_W, sum[i][1]);
  }
}

static void solve(const float *factor, const float *pivots, size_t n, float *b, size_t rows, float *work) {
  float *x = work;
  load_panel(b, rows, n, x);
  for (size_t end = n; end > 0 && !aq_stopped();) {
    const size_t block = end >= 4 ? 4 : 1, first = end - block;
    const float *right = factor + first * n + end;
    if (block == 4)
      subtract_rows(4, right, n, x + end * AQ_ROWS, n - end, x + first * AQ_ROWS);
    else
      subtract_rows(1, right, n, x + end * AQ_ROWS, n - end, x + first * AQ_ROWS);
    for (size_t k = end; k-- > first;)
      subtract_rows(1, factor + k * n + k + 1, n, x + (k + 1) * AQ_ROWS, end - k - 1, x + k * AQ_ROWS);
    end = first;
  }
  for (size_t k = 0; k < n; k++)
    for (size_t v = k * AQ_ROWS; v < (k + 1) * AQ_ROWS; v += AQ_W) v_store(x + v, v_load(x + v) / v_splat(pivots[k]));
  for (size_t first = 0; first < n && !aq_stopped(); first += AQ_ST) {
    const size_t block = aq_min_size(AQ_ST, n - first);
    columns_products(1, block, factor + first, n, x, AQ_ROWS, first, x + first * AQ_ROWS, AQ_ROWS);
    for (size_t k = first; k < first + block; k++)
      tile_subtract_one(factor + first * n + k, n, x + first * AQ_ROWS, AQ_ROWS, k - first, x + k * AQ_ROWS, AQ_ROWS);
  }
  for (size_t lane = 0; lane < rows; lane++)
    for (size_t k = 0; k < n; k++) b[lane * n + k] = x[k * AQ_ROWS + lane];
}

static void subtract_products(float *h, size_t stride, const float *g, const float *a, size_t block, size_t begin,
                              size_t end, size_t cols) {
  size_t i = begin;
  while (i < end) {
    const size_t m = i + AQ_ST <= end ? AQ_ST : i + 4 <= end ? 4 : 1;
    void (*subtract)(const float *, size_t, const float *, size_t, size_t, float *, size_t) =
        m == 1 ? tile_subtract_one : m == 4 ? tile_subtract_four : tile_subtract_whole;
    /* a tile that crosses the diagonal also changes entries below it, which nobody reads */
    for (size_t j = i / AQ_ROWS * AQ_ROWS; j < cols; j += AQ_ROWS)
      subtract(g + i, stride, a + j, stride, block, h + i * stride + j, stride);
    i += m;
  }
}

static void moment(const float *x, const float *y, const float *weight, size_t tokens, size_t rows, size_t cols,
                   size_t begin, size_t end, int symmetric, float *out) {
  float right[AQ_MOMENT_TOKENS * AQ_ROWS], left[AQ_MOMENT_TOKENS * AQ_ST], sum[AQ_ST * AQ_ROWS];
  for (size_t first = 0; first < tokens; first += AQ_MOMENT_TOKENS) {
    const size_t count = aq_min_size(AQ_MOMENT_TOKENS, tokens - first);
    for (size_t j = begin; j < end; j += AQ_ROWS) {
      const size_t n = aq_min_size(AQ_ROWS, end - j);
      for (size_t t = 0; t < count; t++)
        for (size_t lane = 0; lane < AQ_ROWS; lane++)
          right[t * AQ_ROWS + lane] = lane < n ? x[(first + t) * cols + j + lane] : 0.0f;
      for (size_t i = 0; i < (symmetric ? j + n : rows); i += AQ_ST) {
        const size_t m = aq_min_size(AQ_ST, rows - i);
        for (size_t t = 0; t < count; t++)
          for (size_t k = 0; k < m; k++) {
            const float value = y[(first + t) * rows + i + k];
            left[t * AQ_ST + k] = weight ? weight[first + t] * value : value;
          }
        __builtin_memset(sum, 0, sizeof sum);
        columns_products(0, m, left, AQ_ST, right, AQ_ROWS, count, sum, AQ_ROWS);
        for (size_t k = 0; k < m; k++)
          for (size_t lane = 0; lane < n; lane++) out[(i + k) * cols + j + lane] += sum[k * AQ_ROWS + lane];
      }
    }
  }
}

const aq_solver_kernels AQ_NAMED(solver) = {AQ_ROWS, feedback, refine, solve, subtract_products, moment};
