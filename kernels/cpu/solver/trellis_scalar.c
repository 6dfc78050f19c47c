/* solver/trellis_scalar.c: the oracle of solver/trellis.h, a row at a time. */
#include "trellis.h"

#define AQ_UNDECIDED (2 * AQ_TRELLIS_BLOCK)

/* Search ------------------------------------------------------------------------------------------------- */

/* The undecided columns of a survivor, the oldest first. */
typedef struct {
  uint8_t codes[AQ_UNDECIDED];
  float errors[AQ_UNDECIDED];
} path;

typedef struct {
  float *target; /* [cols]: weights with the errors of all decided columns */
  float *cost, *next_cost;
  path *paths, *next_paths; /* [windows] */
  size_t from; /* first undecided column */
} beam;

static size_t best_of(const float *cost, size_t windows) {
  size_t best = 0;
  for (size_t n = 1; n < windows; n++)
    if (cost[n] < cost[best]) best = n;
  return best;
}

/* The cheapest of some survivors, in pairs, the earlier of equals. */
static size_t cheapest(const float *cost, size_t count) {
  size_t at[8];
  for (size_t i = 0; i < count; i++) at[i] = i;
  for (; count > 1; count /= 2)
    for (size_t i = 0; i < count / 2; i++) at[i] = cost[at[2 * i + 1]] < cost[at[2 * i]] ? at[2 * i + 1] : at[2 * i];
  return at[0];
}

static void search_column(const aq_search_job *job, beam *b, size_t row, size_t col) {
  const size_t windows = aq_trellis_windows(job->bits), choices = (size_t)1 << job->bits, known = col - b->from;
  const size_t g = row * job->groups + col / job->group_size;
  const float weight = job->weights[row * job->cols + col], pivot = job->pivots[col];
  float target[AQ_TRELLIS_MOST_WINDOWS];
  for (size_t p = 0; p < windows; p++) {
    target[p] = b->target[col];
    for (size_t i = 0; i < known; i++) {
      const aq_block_row factor = aq_row_of_blocks(job->factor, job->cols, job->block, b->from + i);
      if (col < factor.end) target[p] = aq_fma(b->paths[p].errors[i], factor.row[col], target[p]);
    }
  }
  for (size_t n = 0; n < windows; n++) {
    const size_t first = (n << job->bits) & (windows - 1);
    const float value = aq_fma(job->scale[g], job->table[n], job->offset[g]);
    float cost[8];
    for (size_t x = 0; x < choices; x++) {
      const float left = target[first + x] - value;
      cost[x] = aq_fma(left * pivot, left, b->cost[first + x]);
    }
    const size_t x = cheapest(cost, choices);
    b->next_cost[n] = cost[x];
    b->next_paths[n] = b->paths[first + x];
    b->next_paths[n].codes[known] = (uint8_t)(n >> AQ_TRELLIS_BEFORE);
    b->next_paths[n].errors[known] = weight - value;
  }
  if (job->survivors == 1) {
    const size_t best = best_of(b->next_cost, windows);
    for (size_t n = 0; n < windows; n++)
      if (n != best) b->next_cost[n] = __builtin_inff();
  }
  float *const cost = b->cost;
  path *const paths = b->paths;
  b->cost = b->next_cost;
  b->paths = b->next_paths;
  b->next_cost = cost;
  b->next_paths = paths;
}

/* Decides the columns before `until` for the best survivor, ends those that do not share them, and passes
 * their errors on to the columns from `searched` on. */
static double decide(const aq_search_job *job, beam *b, size_t row, size_t until, size_t searched) {
  const size_t windows = aq_trellis_windows(job->bits), count = until - b->from;
  const size_t best = best_of(b->cost, windows);
  const float least = b->cost[best];
  const path chosen = b->paths[best];
  for (size_t i = 0; i < count; i++) {
    const size_t col = b->from + i;
    const aq_block_row factor = aq_row_of_blocks(job->factor, job->cols, job->block, col);
    job->codes[row * job->cols + col] = chosen.codes[i];
    for (size_t j = searched; j < factor.end; j++)
      b->target[j] = aq_fma(chosen.errors[i], factor.row[j], b->target[j]);
  }
  for (size_t n = 0; n < windows; n++) {
    path *p = b->paths + n;
    int shared = 1;
    for (size_t i = 0; i < count; i++) shared &= p->codes[i] == chosen.codes[i];
    b->cost[n] = shared ? b->cost[n] - least : __builtin_inff();
    for (size_t i = count; i < AQ_UNDECIDED; i++) {
      p->codes[i - count] = p->codes[i];
      p->errors[i - count] = p->errors[i];
    }
  }
  b->from = until;
  return (double)least;
}

static void search_row(const aq_search_job *job, size_t row, float *work) {
  const size_t n = job->cols, windows = aq_trellis_windows(job->bits);
  path *paths = (path *)(work + n + 2 * windows);
  beam b = {work, work + n, work + n + windows, paths, paths + windows, 0};
  __builtin_memset(paths, 0, 2 * windows * sizeof *paths);
  __builtin_memcpy(b.target, job->weights + row * n, n * sizeof *b.target);
  for (size_t i = 0; i < windows; i++) b.cost[i] = i ? __builtin_inff() : 0;
  double objective = 0;
  for (size_t first = 0; first < n; first += AQ_TRELLIS_BLOCK) {
    const size_t end = aq_min_size(first + AQ_TRELLIS_BLOCK, n);
    for (size_t col = first; col < end; col++) search_column(job, &b, row, col);
    objective += decide(job, &b, row, end == n ? n : first, end);
  }
  job->objective[row] = objective;
}

static void search(const aq_search_job *job, size_t row, size_t rows, float *work) {
  for (size_t i = 0; i < rows && !aq_stopped(); i++) search_row(job, row + i, work);
}

/* Scales, offsets and descent ---------------------------------------------------------------------------- */

typedef struct {
  const float *weights;
  uint8_t *codes;           /* [cols] */
  float *gradient, *levels; /* [cols] */
  float *scale, *offset;    /* [groups] */
} state;

static size_t window_of(const aq_settle_job *job, const uint8_t *codes, size_t col) {
  size_t window = 0;
  for (size_t i = 0; i <= aq_trellis_reach(job->bits); i++)
    window = window << job->bits | (i <= col ? codes[col - i] : 0);
  return window;
}

static float value_of(const aq_settle_job *job, const state *s, size_t col) {
  const size_t g = col / job->group_size;
  return aq_fma(s->scale[g], job->table[window_of(job, s->codes, col)], s->offset[g]);
}

/* out[j] (+-)= sum over columns [begin, end) of x times their rows of the moment, for j outside [skip,
 * skip_end). */
static void multiply(const aq_settle_job *job, int subtract, const float *x, size_t begin, size_t end, size_t skip,
                     size_t skip_end, float *out) {
  for (size_t k = begin; k < end; k++) {
    const aq_block_row row = aq_row_of_blocks(job->moment, job->cols, job->block, k);
    const float factor = subtract ? -x[k - begin] : x[k - begin];
    for (size_t j = row.begin; j < row.end; j++)
      if (j < skip || j >= skip_end) out[j] = aq_fma(factor, row.row[j], out[j]);
  }
}

static double objective_of(const aq_settle_job *job, const state *s) {
  double objective = 0;
  for (size_t first = 0; first < job->cols; first += AQ_PART) {
    float sum = 0;
    for (size_t k = first; k < aq_min_size(first + AQ_PART, job->cols); k++)
      sum = aq_fma(s->weights[k] - value_of(job, s, k), s->gradient[k], sum);
    objective += (double)sum;
  }
  return objective;
}

/* A row's one scale and offset. */
static void fit_row(const aq_settle_job *job, state *s, float *products) {
  const size_t n = job->cols;
  const float old_scale = s->scale[0], old_offset = s->offset[0];
  double sums[4] = {0};
  for (size_t k = 0; k < n; k++) {
    s->levels[k] = job->table[window_of(job, s->codes, k)];
    products[k] = 0;
  }
  multiply(job, 0, s->levels, 0, n, 0, 0, products);
  for (size_t first = 0; first < n; first += AQ_PART) {
    float part[4] = {0};
    for (size_t k = first; k < aq_min_size(first + AQ_PART, n); k++) {
      part[0] = aq_fma(s->levels[k], products[k], part[0]);
      part[1] += products[k];
      part[2] = aq_fma(s->levels[k], s->gradient[k], part[2]);
      part[3] += s->gradient[k];
    }
    for (int i = 0; i < 4; i++) sums[i] += (double)part[i];
  }
  if (!aq_best_line(sums, job->group_sums[0], s->scale, s->offset)) return;
  const float step = old_scale - s->scale[0], shift = old_offset - s->offset[0];
  for (size_t k = 0; k < n; k++)
    s->gradient[k] = aq_fma(shift, job->ones[k], aq_fma(step, products[k], s->gradient[k]));
}

/* Those of the group of columns [first, first + size). */
static void fit_group(const aq_settle_job *job, state *s, size_t first, size_t size) {
  const size_t g = first / job->group_size;
  float levels[AQ_SEGMENT], products[AQ_SEGMENT], part[4] = {0};
  for (size_t k = 0; k < size; k++) {
    levels[k] = job->table[window_of(job, s->codes, first + k)];
    products[k] = 0;
  }
  for (size_t k = 0; k < size; k++) {
    const aq_block_row row = aq_row_of_blocks(job->moment, job->cols, job->block, first + k);
    for (size_t j = 0; j < size; j++) products[j] = aq_fma(levels[k], row.row[first + j], products[j]);
  }
  for (size_t k = 0; k < size; k++) {
    const float p = s->gradient[first + k];
    part[0] = aq_fma(levels[k], products[k], part[0]);
    part[1] += products[k];
    part[2] = aq_fma(levels[k], p, part[2]);
    part[3] += p;
  }
  const double sums[4] = {(double)part[0], (double)part[1], (double)part[2], (double)part[3]};
  aq_best_line(sums, job->group_sums[g], s->scale + g, s->offset + g);
}

/* A code to the one that is best given all others, where the objective falls; gradients of columns before
 * `end`. */
static void descend_code(const aq_settle_job *job, state *s, size_t first, size_t col, size_t end) {
  const size_t reach = aq_min_size(aq_trellis_reach(job->bits), job->cols - 1 - col);
  const uint8_t old = s->codes[col];
  float moments[4][4], values[4], best[4] = {0}, least = 0;
  uint8_t chosen = old;
  for (size_t i = 0; i <= reach; i++) {
    const aq_block_row row = aq_row_of_blocks(job->moment, job->cols, job->block, col + i);
    for (size_t l = 0; l <= reach; l++) moments[i][l] = aq_element_of(&row, col + l);
    values[i] = value_of(job, s, col + i);
  }
  for (uint8_t code = 0; code < 1 << job->bits; code++) {
    float change = 0, steps[4] = {0};
    if (code == old) continue;
    s->codes[col] = code;
    for (size_t i = 0; i <= reach; i++) steps[i] = value_of(job, s, col + i) - values[i];
    for (size_t i = 0; i <= reach; i++) {
      float sum = -2 * s->gradient[col + i];
      for (size_t l = 0; l <= reach; l++) sum = aq_fma(moments[i][l], steps[l], sum);
      change = aq_fma(steps[i], sum, change);
    }
    if (!(change < least)) continue;
    least = change;
    chosen = code;
    __builtin_memcpy(best, steps, sizeof best);
  }
  s->codes[col] = chosen;
  for (size_t i = 0; i <= reach; i++) {
    const aq_block_row row = aq_row_of_blocks(job->moment, job->cols, job->block, col + i);
    for (size_t j = first; j < end; j++)
      if (j >= row.begin && j < row.end) s->gradient[j] = aq_fma(-best[i], row.row[j], s->gradient[j]);
  }
}

/* A part of the columns after the other: its scale and offset where groups have their own, then its codes,
 * then what both mean for all other columns. */
static void descend(const aq_settle_job *job, state *s) {
  const size_t n = job->cols, most = job->groups > 1 && job->refit ? job->group_size : AQ_PART;
  for (size_t first = 0; first < n; first += most) {
    const size_t part = aq_min_size(most, n - first);
    const size_t end = aq_min_size(first + part + aq_trellis_reach(job->bits), n);
    float steps[AQ_SEGMENT + 4];
    for (size_t k = first; k < end; k++) steps[k - first] = value_of(job, s, k);
    if (job->groups > 1 && job->refit) {
      fit_group(job, s, first, part);
      for (size_t k = first; k < first + part; k++) {
        const float step = value_of(job, s, k) - steps[k - first];
        const aq_block_row row = aq_row_of_blocks(job->moment, n, job->block, k);
        for (size_t j = first; j < end; j++)
          if (j < row.end) s->gradient[j] = aq_fma(-step, row.row[j], s->gradient[j]);
      }
    }
    for (size_t k = first; k < first + part; k++) descend_code(job, s, first, k, end);
    for (size_t k = first; k < end; k++) steps[k - first] = value_of(job, s, k) - steps[k - first];
    multiply(job, 1, steps, first, end, first, end, s->gradient);
  }
}

static void settle_row(const aq_settle_job *job, size_t row, float *work) {
  const size_t n = job->cols, groups = job->groups;
  float *scale = job->scale + row * groups, *offset = job->offset + row * groups, *products = work + 2 * n;
  uint8_t *codes = job->codes + row * n;
  state s = {job->weights + row * n, (uint8_t *)(work + 3 * n + 2 * groups), work, work + n, work + 3 * n,
             work + 3 * n + groups};
  __builtin_memcpy(s.codes, codes, n);
  __builtin_memcpy(s.scale, scale, groups * sizeof *scale);
  __builtin_memcpy(s.offset, offset, groups * sizeof *offset);
  for (size_t k = 0; k < n; k++) {
    s.levels[k] = s.weights[k] - value_of(job, &s, k);
    s.gradient[k] = 0;
  }
  multiply(job, 0, s.levels, 0, n, 0, 0, s.gradient);
  job->objective[row] = objective_of(job, &s);
  if (job->rounds == 0) return;
  for (int32_t round = 0; round < job->rounds && !aq_stopped(); round++) {
    if (job->refit && groups == 1) fit_row(job, &s, products);
    descend(job, &s);
  }
  const double objective = objective_of(job, &s);
  if (!(objective < job->objective[row])) return;
  job->objective[row] = objective;
  __builtin_memcpy(codes, s.codes, n);
  __builtin_memcpy(scale, s.scale, groups * sizeof *scale);
  __builtin_memcpy(offset, s.offset, groups * sizeof *offset);
}

static void settle(const aq_settle_job *job, size_t row, size_t rows, float *work) {
  for (size_t i = 0; i < rows && !aq_stopped(); i++) settle_row(job, row + i, work);
}

const aq_trellis_kernels aq_trellis_scalar = {1, search, settle};
