/* solver/rows_vector.h: solver/rows.h over vectors of AQ_W floats, included once by each unit of isa/ behind
 * solver/vector.h; every lane repeats the oracle's operations in its order. */
#include "rows.h"

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

const aq_row_kernels AQ_NAMED(rows) = {AQ_ROWS, feedback, refine};
