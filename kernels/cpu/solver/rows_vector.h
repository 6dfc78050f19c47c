/* solver/rows_vector.h: solver/rows.h over vectors of AQ_W floats, included once by each unit of isa/ behind
 * solver/vector.h; every lane repeats the oracle's operations in its order. */
#include "rows.h"

AQ_INLINE vf v_quantized(vf value, vf scale, vf zero_point, vf code_max) {
  const vf zero = v_splat(0.0f);
  vf position = value / scale + zero_point;
  position = v_select(position > zero, position, zero);
  position = v_select(position < code_max, position, code_max);
  return v_round(position);
}

/* Scales or zero points of a panel's rows as [groups, AQ_PANEL]; lanes beyond `rows` repeat the last row. */
static void load_grids(const float *from, size_t rows, size_t groups, float *panel) {
  for (size_t lane = 0; lane < AQ_PANEL; lane++)
    for (size_t g = 0; g < groups; g++) panel[g * AQ_PANEL + lane] = from[aq_min_size(lane, rows - 1) * groups + g];
}

/* Feedback ----------------------------------------------------------------------------------------------- */

/* `part` columns in their order, one after the other. left [rows, AQ_FEEDBACK_BLOCK]: what is to be rounded,
 * codes afterwards; errors [rows, cols]: weights, their errors afterwards. */
static void feedback_part(const aq_feedback_job *job, size_t rows, size_t first, size_t part, const float *factor,
                          size_t stride, const float *scale, const float *zero_point, float *left, float *errors,
                          double *objective) {
  const vf code_max = v_splat((float)((1 << job->bits) - 1));
  float target[AQ_PART * AQ_ROWS], error[AQ_PART * AQ_ROWS];
  for (size_t row = 0; row < rows; row += AQ_ROWS) {
    const size_t lanes = aq_min_size(AQ_ROWS, rows - row);
    load_chunk(left + row * AQ_FEEDBACK_BLOCK, AQ_FEEDBACK_BLOCK, lanes, part, target);
    load_chunk(errors + row * job->cols, job->cols, lanes, part, error);
    vf sum[2] = {v_splat(0.0f), v_splat(0.0f)};
    for (size_t k = 0; k < part; k++) {
      const size_t g = (size_t)job->order[first + k] / job->group_size * AQ_PANEL + row;
      const vf pivot = v_splat(job->pivots[first + k]);
      vf own[2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        float *at = target + k * AQ_ROWS + v * AQ_W, *error_at = error + k * AQ_ROWS + v * AQ_W;
        const vf s = v_load(scale + g + v * AQ_W), z = v_load(zero_point + g + v * AQ_W), wanted = v_load(at);
        const vf code = v_quantized(wanted, s, z, code_max), value = s * (code - z), rest = wanted - value;
        own[v] = v_load(error_at) - value;
        sum[v] = v_exact_fma(rest * pivot, rest, sum[v]);
        v_store(at, code);
        v_store(error_at, own[v]);
      }
      for (size_t j = k + 1; j < part; j++) {
        const vf u = v_splat(factor[k * stride + j]);
        float *at = target + j * AQ_ROWS;
        v_store(at, v_exact_fma(own[0], u, v_load(at)));
        v_store(at + AQ_W, v_exact_fma(own[1], u, v_load(at + AQ_W)));
      }
    }
    for (size_t lane = 0; lane < lanes; lane++) objective[row + lane] += (double)sum[lane / AQ_W][lane % AQ_W];
    store_chunk(target, lanes, part, left + row * AQ_FEEDBACK_BLOCK, AQ_FEEDBACK_BLOCK);
    store_chunk(error, lanes, part, errors + row * job->cols, job->cols);
  }
}

static void feedback(const aq_feedback_job *job, size_t row, size_t rows, float *work) {
  const size_t n = job->cols;
  float *errors = work, *left = errors + rows * n, *scale = left + AQ_PANEL_ROWS * AQ_FEEDBACK_BLOCK;
  float *zero_point = scale + job->groups * AQ_PANEL;
  double *objective = job->objective + row;
  load_grids(job->scale + row * job->groups, rows, job->groups, scale);
  load_grids(job->zero_point + row * job->groups, rows, job->groups, zero_point);
  for (size_t i = 0; i < rows; i++) {
    objective[i] = 0;
    for (size_t k = 0; k < n; k++) errors[i * n + k] = job->weights[(row + i) * n + (size_t)job->order[k]];
  }
  const float *factor = job->factor;
  for (size_t begin = 0, size = 0; begin < n; begin += job->block, factor += size * size) {
    size = aq_min_size(job->block, n - begin);
    for (size_t at = 0; at < size && !aq_stopped(); at += AQ_FEEDBACK_BLOCK) {
      const size_t block = aq_min_size(AQ_FEEDBACK_BLOCK, size - at);
      for (size_t i = 0; i < rows; i++)
        __builtin_memcpy(left + i * AQ_FEEDBACK_BLOCK, errors + i * n + begin + at, block * sizeof *left);
      const aq_product_job earlier = {.a = errors + begin, .a_row = (ptrdiff_t)n, .a_col = 1, .b = factor + at,
                                      .b_row = (ptrdiff_t)size, .b_col = 1, .c = left, .c_row = AQ_FEEDBACK_BLOCK,
                                      .k = at};
      product_block(&earlier, 0, rows, 0, block, 0);
      for (size_t first = 0; first < block; first += AQ_PART) {
        const size_t part = aq_min_size(AQ_PART, block - first);
        const float *own = factor + (at + first) * size + at + first;
        feedback_part(job, rows, begin + at + first, part, own, size, scale, zero_point, left + first,
                      errors + begin + at + first, objective);
        const aq_product_job later = {.a = errors + begin + at + first, .a_row = (ptrdiff_t)n, .a_col = 1,
                                      .b = own + part, .b_row = (ptrdiff_t)size, .b_col = 1,
                                      .c = left + first + part, .c_row = AQ_FEEDBACK_BLOCK, .k = part};
        product_block(&later, 0, rows, 0, block - first - part, 0);
      }
      for (size_t i = 0; i < rows; i++)
        for (size_t k = 0; k < block; k++)
          job->codes[(row + i) * n + (size_t)job->order[begin + at + k]] = (uint8_t)left[i * AQ_FEEDBACK_BLOCK + k];
    }
  }
}

/* Refining ----------------------------------------------------------------------------------------------- */

typedef struct {
  const float *weights;     /* [rows, cols] */
  size_t rows;
  float *gradient, *own;    /* [rows, cols]; own: the weights' products with the moment */
  uint8_t *codes;           /* [cols, AQ_PANEL] */
  float *steps;             /* [AQ_DESCENT_MOST, AQ_PANEL] */
  float *scale, *zero_point; /* [groups, AQ_PANEL] */
} panel_state;

AQ_INLINE vf v_code(const uint8_t *codes) { return __builtin_convertvector((vi)v_widen_bytes(codes), vf); }

/* A code's value, in the lanes from `lane` on. */
AQ_INLINE vf v_value(const aq_refine_job *job, const panel_state *s, size_t col, size_t lane) {
  const size_t at = col / job->group_size * AQ_PANEL + lane;
  return v_load(s->scale + at) * (v_code(s->codes + col * AQ_PANEL + lane) - v_load(s->zero_point + at));
}

/* out += or -= steps of `size` columns times their rows of the moment, in columns [begin, end) of its
 * block. */
static void multiply_steps(const panel_state *s, size_t n, int subtract, const float *moment, size_t stride,
                           size_t size, float *out, size_t begin, size_t end) {
  const aq_product_job job = {.a = s->steps, .a_row = 1, .a_col = AQ_PANEL, .b = moment, .b_row = (ptrdiff_t)stride,
                              .b_col = 1, .c = out, .c_row = n, .k = size, .subtract = subtract};
  product_block(&job, 0, s->rows, begin, end, 0);
}

/* out = products of the errors, or of the weights, with the moment. */
static void panel_multiply(const aq_refine_job *job, panel_state *s, int errors, float *out) {
  const size_t n = job->cols;
  float chunk[AQ_PART * AQ_ROWS];
  __builtin_memset(out, 0, s->rows * n * sizeof *out);
  const float *moment = job->moment;
  for (size_t begin = 0, size = 0; begin < n; begin += job->block, moment += size * size) {
    size = aq_min_size(job->block, n - begin);
    for (size_t first = 0; first < size && !aq_stopped(); first += AQ_DESCENT_BLOCK) {
      const size_t block = aq_min_size(AQ_DESCENT_BLOCK, size - first);
      for (size_t at = 0; at < block; at += AQ_PART)
        for (size_t row = 0; row < s->rows; row += AQ_ROWS) {
          const size_t part = aq_min_size(AQ_PART, block - at), col = begin + first + at;
          load_chunk(s->weights + row * n + col, n, aq_min_size(AQ_ROWS, s->rows - row), part, chunk);
          for (size_t k = 0; k < part; k++)
            for (size_t v = 0; v < AQ_ROWS; v += AQ_W) {
              const vf weight = v_load(chunk + k * AQ_ROWS + v);
              v_store(s->steps + (at + k) * AQ_PANEL + row + v,
                      errors ? weight - v_value(job, s, col + k, row + v) : weight);
            }
        }
      multiply_steps(s, n, 0, moment + first * size, size, block, out + begin, 0, size);
    }
  }
}

static void panel_objective(const aq_refine_job *job, const panel_state *s, double *objective) {
  const size_t n = job->cols;
  float weights[AQ_PART * AQ_ROWS], gradient[AQ_PART * AQ_ROWS];
  for (size_t row = 0; row < s->rows; row += AQ_ROWS) {
    const size_t lanes = aq_min_size(AQ_ROWS, s->rows - row);
    for (size_t lane = 0; lane < lanes; lane++) objective[row + lane] = 0;
    for (size_t first = 0; first < n; first += AQ_PART) {
      const size_t part = aq_min_size(AQ_PART, n - first);
      load_chunk(s->weights + row * n + first, n, lanes, part, weights);
      load_chunk(s->gradient + row * n + first, n, lanes, part, gradient);
      vf sum[2] = {v_splat(0.0f), v_splat(0.0f)};
      for (size_t k = 0; k < part; k++)
        for (size_t v = 0; v < 2; v++) {
          const size_t at = k * AQ_ROWS + v * AQ_W;
          const vf error = v_load(weights + at) - v_value(job, s, first + k, row + v * AQ_W);
          sum[v] = v_exact_fma(error, v_load(gradient + at), sum[v]);
        }
      for (size_t lane = 0; lane < lanes; lane++) objective[row + lane] += (double)sum[lane / AQ_W][lane % AQ_W];
    }
  }
}

/* New grids from the sums of a chunk, [4, AQ_ROWS] each, and how far weights move. */
static int chunk_grids(const aq_refine_job *job, size_t g, const double *sums, float *scale, float *zero_point,
                       float *step, float *shift) {
  int any = 0;
  for (size_t lane = 0; lane < AQ_ROWS; lane++) {
    const double own[4] = {sums[lane], sums[AQ_ROWS + lane], sums[2 * AQ_ROWS + lane], sums[3 * AQ_ROWS + lane]};
    aq_grid grid = {scale[lane], zero_point[lane]};
    step[lane] = shift[lane] = 0;
    if (!aq_best_grid(own, job->group_sums[g], job->zero_point_kind, &grid, step + lane, shift + lane)) continue;
    scale[lane] = grid.scale;
    zero_point[lane] = grid.zero_point;
    any = 1;
  }
  return any;
}

/* Adds u H u, 1 H u, u p and 1 p of a column to the sums of a chunk. */
AQ_INLINE void add_sums(vf u, vf product, vf p, vf sums[4]) {
  sums[0] = v_exact_fma(u, product, sums[0]);
  sums[1] += product;
  sums[2] = v_exact_fma(u, p, sums[2]);
  sums[3] += p;
}

static void panel_refit(const aq_refine_job *job, panel_state *s) {
  const size_t n = job->cols;
  float own[AQ_PART * AQ_ROWS], gradient[AQ_PART * AQ_ROWS];
  for (size_t row = 0; row < s->rows && !aq_stopped(); row += AQ_ROWS) {
    const size_t lanes = aq_min_size(AQ_ROWS, s->rows - row);
    double sums[4 * AQ_ROWS] = {0};
    float old[AQ_ROWS], step[AQ_ROWS], shift[AQ_ROWS];
    for (size_t first = 0; first < n; first += AQ_PART) {
      const size_t part = aq_min_size(AQ_PART, n - first);
      load_chunk(s->own + row * n + first, n, lanes, part, own);
      load_chunk(s->gradient + row * n + first, n, lanes, part, gradient);
      for (size_t v = 0; v < AQ_ROWS; v += AQ_W) {
        const vf scale = v_load(s->scale + row + v), zero_point = v_load(s->zero_point + row + v);
        vf sum[4] = {v_splat(0.0f), v_splat(0.0f), v_splat(0.0f), v_splat(0.0f)};
        for (size_t k = 0; k < part; k++) {
          const vf p = v_load(gradient + k * AQ_ROWS + v);
          add_sums(v_code(s->codes + (first + k) * AQ_PANEL + row + v) - zero_point,
                   (v_load(own + k * AQ_ROWS + v) - p) / scale, p, sum);
        }
        for (size_t i = 0; i < 4; i++)
          for (size_t lane = 0; lane < AQ_W; lane++) sums[i * AQ_ROWS + v + lane] += (double)sum[i][lane];
      }
    }
    __builtin_memcpy(old, s->scale + row, sizeof old);
    if (!chunk_grids(job, 0, sums, s->scale + row, s->zero_point + row, step, shift)) continue;
    for (size_t lane = 0; lane < lanes; lane++) {
      float *p = s->gradient + (row + lane) * n;
      const float *weights = s->own + (row + lane) * n;
      if (step[lane] == 0 && shift[lane] == 0) continue;
      size_t k = 0;
      for (; k + AQ_W <= n; k += AQ_W) {
        const vf product = (v_load(weights + k) - v_load(p + k)) / v_splat(old[lane]);
        v_store(p + k, v_exact_fma(v_splat(-shift[lane]), v_load(job->ones + k),
                                   v_exact_fma(v_splat(-step[lane]), product, v_load(p + k))));
      }
      for (; k < n; k++)
        p[k] = aq_fma(-shift[lane], job->ones[k], aq_fma(-step[lane], (weights[k] - p[k]) / old[lane], p[k]));
    }
  }
}

/* Grids of a group of columns from `col` on, whose gradient is `p`. */
static void chunk_refit(const aq_refine_job *job, panel_state *s, size_t col, size_t size, size_t row,
                        const float *moment, size_t stride, float *p) {
  const size_t g = col / job->group_size;
  float u[AQ_DESCENT_MOST * AQ_ROWS], products[AQ_DESCENT_MOST * AQ_ROWS], step[AQ_ROWS], shift[AQ_ROWS];
  double sums[4 * AQ_ROWS];
  float *scale = s->scale + g * AQ_PANEL + row, *zero_point = s->zero_point + g * AQ_PANEL + row;
  for (size_t k = 0; k < size; k++)
    for (size_t v = 0; v < AQ_ROWS; v += AQ_W) {
      v_store(u + k * AQ_ROWS + v, v_code(s->codes + (col + k) * AQ_PANEL + row + v) - v_load(zero_point + v));
      v_store(products + k * AQ_ROWS + v, v_splat(0.0f));
    }
  columns_products(0, size, moment, stride, u, size, products);
  for (size_t v = 0; v < AQ_ROWS; v += AQ_W) {
    vf sum[4] = {v_splat(0.0f), v_splat(0.0f), v_splat(0.0f), v_splat(0.0f)};
    for (size_t k = 0; k < size; k++) {
      const size_t at = k * AQ_ROWS + v;
      add_sums(v_load(u + at), v_load(products + at), v_load(p + at), sum);
    }
    for (size_t i = 0; i < 4; i++)
      for (size_t lane = 0; lane < AQ_W; lane++) sums[i * AQ_ROWS + v + lane] = (double)sum[i][lane];
  }
  if (!chunk_grids(job, g, sums, scale, zero_point, step, shift)) return;
  for (size_t k = 0; k < size; k++)
    for (size_t v = 0; v < AQ_ROWS; v += AQ_W) {
      float *at = p + k * AQ_ROWS + v;
      const vf along = v_exact_fma(v_splat(0.0f) - v_load(step + v), v_load(products + k * AQ_ROWS + v), v_load(at));
      v_store(at, v_exact_fma(v_splat(0.0f) - v_load(shift + v), v_splat(job->ones[col + k]), along));
    }
}

/* A sweep over a block of columns from `col` on, for a chunk of rows: refits, codes, and the gradient within
 * the block. */
static int chunk_descend(const aq_refine_job *job, panel_state *s, int32_t sweep, size_t row, size_t col,
                         size_t block, const float *moment, size_t stride, float *p) {
  const size_t most = aq_descent_part(job);
  const vf code_max = v_splat((float)((1 << job->bits) - 1));
  int any = 0;
  for (size_t first = 0, part = 0; first < block; first += part) {
    part = aq_min_size(most, block - first);
    float change[AQ_DESCENT_MOST * AQ_ROWS], *own = p + first * AQ_ROWS;
    for (size_t k = 0; k < part; k++)
      for (size_t v = 0; v < AQ_ROWS; v += AQ_W)
        v_store(change + k * AQ_ROWS + v, v_value(job, s, col + first + k, row + v));
    const float *rows = moment + first * stride;
    if (aq_refits_groups(job)) chunk_refit(job, s, col + first, part, row, rows + first, stride, own);
    for (size_t k = 0; k < part; k++) {
      const size_t at = (col + first + k) / job->group_size * AQ_PANEL + row;
      const float *moments = rows + k * stride + first;
      vf step[2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        uint8_t *codes = s->codes + (col + first + k) * AQ_PANEL + row + v * AQ_W;
        const vf scale = v_load(s->scale + at + v * AQ_W), zero_point = v_load(s->zero_point + at + v * AQ_W);
        const vf old = scale * (v_code(codes) - zero_point);
        vf value = old;
        if (moments[k] > 0) {
          const vf code = v_quantized(old + v_load(own + k * AQ_ROWS + v * AQ_W) / v_splat(moments[k]), scale,
                                      zero_point, code_max);
          v_narrow_bytes(codes, __builtin_convertvector(code, vi));
          value = scale * (code - zero_point);
        }
        step[v] = value - old;
        float *to = change + k * AQ_ROWS + v * AQ_W;
        v_store(to, value - v_load(to));
      }
      for (size_t j = 0; j < part; j++) {
        const vf factor = v_splat(-moments[j]);
        float *to = own + j * AQ_ROWS;
        v_store(to, v_exact_fma(factor, step[0], v_load(to)));
        v_store(to + AQ_W, v_exact_fma(factor, step[1], v_load(to + AQ_W)));
      }
    }
    vi moved = {0};
    for (size_t k = 0; k < part; k++)
      for (size_t v = 0; v < AQ_ROWS; v += AQ_W) {
        const vf step = v_load(change + k * AQ_ROWS + v);
        float *to = s->steps + (first + k) * AQ_PANEL + row + v;
        v_store(to, sweep > 0 ? v_load(to) + step : step);
        moved |= step != v_splat(0.0f);
      }
    int moves = 0;
    for (size_t lane = 0; lane < AQ_W; lane++) moves |= moved[lane];
    if (!moves) continue;
    any = 1;
    columns_products(1, first, rows, stride, change, part, p);
    columns_products(1, block - first - part, rows + first + part, stride, change, part, own + part * AQ_ROWS);
  }
  return any;
}

static void panel_descend(const aq_refine_job *job, panel_state *s) {
  const size_t n = job->cols, most = aq_descent_block(job);
  float p[AQ_DESCENT_MOST * AQ_ROWS];
  const float *moment = job->moment;
  for (size_t begin = 0, size = 0; begin < n; begin += job->block, moment += size * size) {
    size = aq_min_size(job->block, n - begin);
    for (size_t first = 0; first < size && !aq_stopped(); first += most) {
      const size_t block = aq_min_size(most, size - first);
      const float *rows = moment + first * size;
      int any = 0;
      for (size_t row = 0; row < s->rows; row += AQ_ROWS) {
        const size_t lanes = aq_min_size(AQ_ROWS, s->rows - row);
        float *gradient = s->gradient + row * n + begin + first;
        load_chunk(gradient, n, lanes, block, p);
        for (int32_t sweep = 0; sweep < job->sweeps; sweep++)
          any |= chunk_descend(job, s, sweep, row, begin + first, block, rows + first, size, p);
        store_chunk(p, lanes, block, gradient, n);
      }
      if (!any) continue;
      multiply_steps(s, n, 1, rows, size, block, s->gradient + begin, 0, first);
      multiply_steps(s, n, 1, rows, size, block, s->gradient + begin, first + block, size);
    }
  }
}

static void refine(const aq_refine_job *job, size_t row, size_t rows, float *work) {
  const size_t n = job->cols, groups = job->groups;
  float *scale = job->scale + row * groups, *zero_point = job->zero_point + row * groups;
  uint8_t *codes = job->codes + row * n;
  panel_state s = {.weights = job->weights + row * n, .rows = rows, .gradient = work, .own = work + rows * n};
  s.steps = s.own + (groups == 1 ? rows * n : 0);
  s.scale = s.steps + AQ_DESCENT_MOST * AQ_PANEL;
  s.zero_point = s.scale + groups * AQ_PANEL;
  s.codes = (uint8_t *)(s.zero_point + groups * AQ_PANEL);
  load_grids(scale, rows, groups, s.scale);
  load_grids(zero_point, rows, groups, s.zero_point);
  for (size_t lane = 0; lane < AQ_PANEL; lane++)
    for (size_t k = 0; k < n; k++) s.codes[k * AQ_PANEL + lane] = codes[aq_min_size(lane, rows - 1) * n + k];
  panel_multiply(job, &s, 1, s.gradient);
  panel_objective(job, &s, job->objective + row);
  if (job->rounds == 0) return;
  const int refits_row = job->refit && groups == 1;
  if (refits_row) panel_multiply(job, &s, 0, s.own);
  for (int32_t round = 0; round < job->rounds && !aq_stopped(); round++) {
    if (refits_row) panel_refit(job, &s);
    panel_descend(job, &s);
  }
  double objective[AQ_PANEL_ROWS];
  panel_objective(job, &s, objective);
  for (size_t i = 0; i < rows; i++) {
    if (!(objective[i] < job->objective[row + i])) continue;
    job->objective[row + i] = objective[i];
    for (size_t k = 0; k < n; k++) codes[i * n + k] = s.codes[k * AQ_PANEL + i];
    for (size_t g = 0; g < groups; g++) {
      scale[i * groups + g] = s.scale[g * AQ_PANEL + i];
      zero_point[i * groups + g] = s.zero_point[g * AQ_PANEL + i];
    }
  }
}

const aq_row_kernels AQ_NAMED(rows) = {feedback, refine};
