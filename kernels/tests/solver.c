/* solver.c: moments, their factor, error feedback and refining on every instruction set of this build against
 * the scalar oracle, to the bit, on awkward shapes, with guard bytes behind each output, for 1 and 3 threads;
 * and the oracle against sums in double. */
#include "harness.h"

typedef struct {
  size_t rows, cols, tokens;
  int32_t bits;
  size_t group_size;
  int32_t kind;
  size_t block; /* of the moment that codes are solved against */
} shape;

enum { OUTPUTS = 12 };
static const char *output_names[OUTPUTS] = {"moment", "cross moment", "factor", "pivots", "solved rows",
                                            "codes",  "scales",       "zero points", "objective",
                                            "blocks of a moment", "diagonal of a cross moment",
                                            "objective of feedback"};

#define CALL(what, call) expect_status(what, where, call, AQ_OK)

typedef struct {
  void *data[OUTPUTS];
  size_t bytes[OUTPUTS];
} outputs;

/* Objectives against sums in double. */
static void check_objectives(const shape *s, const float *moment, size_t block, const float *w, const uint8_t *codes,
                             const float *scale, const float *zero, const double *objective, const char *where) {
  const size_t n = s->cols, group = s->group_size ? s->group_size : n, groups = (n - 1) / group + 1;
  double *d = take(n * 8);
  for (size_t row = 0; row < s->rows; row++) {
    for (size_t k = 0; k < n; k++) {
      const size_t g = row * groups + k / group;
      d[k] = (double)w[row * n + k] - (double)scale[g] * ((double)codes[row * n + k] - (double)zero[g]);
    }
    double sum = 0;
    const float *m = moment;
    for (size_t first = 0, size = 0; first < n; first += block, m += size * size) {
      size = n - first < block ? n - first : block;
      for (size_t i = 0; i < size; i++)
        for (size_t j = 0; j < size; j++) sum += d[first + i] * (double)m[i * size + j] * d[first + j];
    }
    expect(fabs(objective[row] - sum) <= 1e-3 * sum + 1e-9, "an objective is not the moment's", where);
  }
}

static outputs solve_all(const shape *s, const float *x, const float *y, const float *weight, const float *w,
                         const int32_t *order, int32_t isa, int32_t threads, const char *where) {
  const size_t rows = s->rows, n = s->cols;
  uint64_t groups, floats;
  CALL("group count", aq_group_count(n, s->group_size, &groups));
  CALL("work", aq_solver_work(n, s->group_size, threads, &floats));
  outputs o;
  const size_t sizes[OUTPUTS] = {n * n * 4, rows * n * 4, n * n * 4,    n * 4,   rows * n * 4,
                                 rows * n,  rows * groups * 4, rows * groups * 4, rows * 8, (n / 7 * 49 + n % 7 * (n % 7)) * 4, n * 4, rows * 8};
  for (int i = 0; i < OUTPUTS; i++) o.data[i] = memset(guarded(o.bytes[i] = sizes[i]), 0, sizes[i]);
  float *work = guarded(floats * 4), *moment = o.data[0], *factor = o.data[2], *scale = o.data[6], *zero = o.data[7];
  uint8_t *codes = o.data[5];
  CALL("moment", aq_accumulate_moment(x, 0, weight, s->tokens, n, n, n, moment, isa, threads));
  CALL("cross moment", aq_accumulate_moment(x, y, 0, s->tokens, rows, n, n, o.data[1], isa, threads));
  CALL("blocks", aq_accumulate_moment(x, 0, weight, s->tokens, n, n, 7, o.data[9], isa, threads));
  CALL("diagonal", aq_accumulate_moment(x, x, weight, s->tokens, n, n, 1, o.data[10], isa, threads));
  for (size_t i = 0, at = 0; i < n; i++)
    for (size_t j = i / 7 * 7; j < i / 7 * 7 + 7 && j < n; j++, at++)
      expect(((float *)o.data[9])[at] == moment[i * n + j], "a block is not the moment's", where);
  for (size_t i = 0; i < n; i++)
    expect(((float *)o.data[10])[i] == moment[i * n + i], "a diagonal is not the moment's", where);
  float mean = 0;
  for (size_t k = 0; k < n; k++) mean += moment[k * n + k] / (float)n;
  for (size_t i = 0; i < n; i++)
    for (size_t j = i; j < n; j++)
      factor[i * n + j] = moment[(size_t)order[i] * n + (size_t)order[j]] + (i == j ? 0.05f * mean + 1e-6f : 0.0f);
  CALL("factor", aq_factor_moment(factor, n, o.data[3], work, isa, threads));
  memcpy(o.data[4], w, rows * n * 4);
  CALL("solve", aq_solve_moment(factor, o.data[3], n, o.data[4], rows, isa, threads));
  CALL("grids", aq_clipped_grids(w, rows, n, s->bits, s->group_size, s->kind, 0.8f, scale, zero, threads));
  const size_t block = s->block ? s->block : n;
  float *own = take(n * block * 4), *own_factor = take(n * block * 4), *own_pivots = take(n * 4);
  int32_t *own_order = take(n * 4);
  float *m = own, *u = own_factor;
  for (size_t first = 0, size = 0; first < n; first += block, m += size * size, u += size * size) {
    size = n - first < block ? n - first : block;
    for (size_t k = 0, at = first; k < n; k++) /* in the order that all columns have */
      if ((size_t)order[k] >= first && (size_t)order[k] < first + size) own_order[at++] = order[k];
    for (size_t i = 0; i < size; i++)
      for (size_t j = 0; j < size; j++) {
        const float damping = i == j ? 0.05f * mean + 1e-6f : 0.0f;
        m[i * size + j] = moment[(first + i) * n + first + j] + damping;
        u[i * size + j] = moment[(size_t)own_order[first + i] * n + (size_t)own_order[first + j]] + damping;
      }
    CALL("factor of a block", aq_factor_moment(u, size, own_pivots + first, work, isa, threads));
  }
  CALL("feedback", aq_quantize_feedback(w, rows, n, s->bits, s->group_size, scale, zero, block, own_factor, own_pivots,
                                        own_order, codes, o.data[11], work, isa, threads));
  double *first_objective = take(rows * 8);
  uint8_t *first_codes = take(rows * n);
  memcpy(first_codes, codes, rows * n);
  CALL("objective", aq_refine_codes(w, rows, n, s->bits, s->group_size, s->kind, block, own, 0, 0, 1, codes, scale, zero,
                                    first_objective, work, isa, threads));
  expect(memcmp(codes, first_codes, rows * n) == 0, "no rounds change codes", where);
  CALL("refine", aq_refine_codes(w, rows, n, s->bits, s->group_size, s->kind, block, own, 1, 2,
                                 1 + (int32_t)(rows % 3), codes, scale, zero, o.data[8], work, isa, threads));
  check_objectives(s, own, block, w, codes, scale, zero, o.data[8], where);
  for (size_t row = 0; row < rows; row++) {
    const double feedback = ((double *)o.data[11])[row], first = first_objective[row];
    expect(fabs(feedback - first) <= 1e-3 * first + 1e-9, "feedback's objective is not the moment's", where);
    expect(((double *)o.data[8])[row] <= first, "refining raised an objective", where);
  }
  for (int i = 0; i < OUTPUTS; i++) expect_guard(output_names[i], where, o.data[i], o.bytes[i]);
  expect_guard("work", where, work, floats * 4);
  return o;
}

/* The oracle's factor and solution against the matrix they came from, in double. */
static void check_oracle(const shape *s, const outputs *o, const int32_t *order, const float *w, const char *where) {
  const size_t n = s->cols;
  const float *moment = o->data[0], *u = o->data[2], *d = o->data[3], *solved = o->data[4];
  double mean = 0, worst = 0;
  for (size_t k = 0; k < n; k++) mean += (double)moment[k * n + k] / (double)n;
  double *m = take(n * n * sizeof *m);
  for (size_t i = 0; i < n; i++)
    for (size_t j = 0; j < n; j++)
      m[i * n + j] = (double)moment[(size_t)order[i] * n + (size_t)order[j]] + (i == j ? 0.05 * mean + 1e-6 : 0.0);
  for (size_t i = 0; i < n; i++)
    for (size_t j = i; j < n; j++) {
      double sum = 0;
      for (size_t k = j; k < n; k++) sum += (double)u[i * n + k] * (double)d[k] * (double)u[j * n + k];
      worst = fmax(worst, fabs(sum - m[i * n + j]));
    }
  expect(worst <= 1e-5 * (double)n * (mean + 1e-6), "U D U' is not the moment", where);
  worst = 0;
  double largest = 0;
  for (size_t row = 0; row < s->rows; row++)
    for (size_t j = 0; j < n; j++) {
      double sum = 0;
      for (size_t k = 0; k < n; k++) sum += (double)solved[row * n + k] * m[k * n + j];
      worst = fmax(worst, fabs(sum - (double)w[row * n + j]));
      largest = fmax(largest, fabs((double)w[row * n + j]));
    }
  expect(worst <= 2e-3 * (largest + 1e-6), "rows times the moment are not what was solved", where);
}

static void check_shape(const shape *s) {
  const size_t rows = s->rows, n = s->cols, tokens = s->tokens;
  float *x = take(tokens * n * 4), *y = take(tokens * rows * 4), *weight = take(tokens * 4), *w = take(rows * n * 4);
  int32_t *order = take(n * 4);
  for (size_t i = 0; i < tokens; i++) {
    const float shared = gaussian();
    for (size_t k = 0; k < n; k++) x[i * n + k] = (shared + gaussian()) * (float)(1 + k % 3);
    weight[i] = 0.25f + (float)(random_bits() % 4);
  }
  for (size_t i = 0; i < tokens * rows; i++) y[i] = gaussian();
  for (size_t i = 0; i < rows * n; i++) w[i] = random_bits() % 40 ? 0.1f * gaussian() : 0.0f;
  for (size_t k = 0; k < n; k++) order[k] = (int32_t)k;
  for (size_t k = n; k > 1; k--) {
    const size_t j = random_bits() % k;
    const int32_t t = order[k - 1];
    order[k - 1] = order[j];
    order[j] = t;
  }
  char where[160];
  snprintf(where, sizeof where, "scalar, %zu x %zu, %d bits, groups of %zu, kind %d", rows, n, s->bits, s->group_size,
           s->kind);
  outputs expected = solve_all(s, x, y, weight, w, order, AQ_ISA_SCALAR, 1, where);
  check_oracle(s, &expected, order, w, where);
  for (int32_t isa = 1; isa <= AQ_ISA_NEON_DOT; isa++) {
    if (!aq_isa_supported(isa)) continue;
    for (int32_t threads = 1; threads <= 3; threads += 2) {
      snprintf(where, sizeof where, "%s, %d threads, %zu x %zu, %d bits, groups of %zu, kind %d", isa_names[isa],
               threads, rows, n, s->bits, s->group_size, s->kind);
      outputs actual = solve_all(s, x, y, weight, w, order, isa, threads, where);
      for (int i = 0; i < OUTPUTS; i++)
        expect_bytes(output_names[i], where, expected.data[i], actual.data[i], expected.bytes[i]);
    }
  }
  release();
}

#define REFUSED(what, status, call) expect_status("refusals", what, call, status)
#define FEEDBACK(weights, scale, order, block) \
  aq_quantize_feedback(weights, 2, 2, 2, 0, scale, unit, block, one, unit, order, codes, objective, work, AQ_ISA_BEST, 1)

static void check_refusals(void) {
  float one[4] = {1, 0, 0, 1}, work[1 << 14];
  uint8_t codes[4] = {0};
  int32_t order[2] = {0, 1}, wrong[2] = {0, 2}, crossed[2] = {1, 0};
  double objective[2];
  uint64_t floats;
  const float nan = nanf("");
  float broken[4] = {1, nan, 0, 1}, zero_scale[2] = {0, 1}, unit[2] = {1, 1}, indefinite[4] = {1, 2, 2, 1};
  REFUSED("too many columns", AQ_E_SHAPE, aq_solver_work(AQ_MAX_SOLVER_COLS + 1, 0, 1, &floats));
  REFUSED("a group of 17", AQ_E_SHAPE, aq_solver_work(2, 17, 1, &floats));
  REFUSED("an indefinite moment", AQ_E_VALUE, aq_factor_moment(indefinite, 2, work, work + 64, AQ_ISA_BEST, 1));
  REFUSED("NaN", AQ_E_NONFINITE, FEEDBACK(broken, unit, order, 2));
  REFUSED("a wrong order", AQ_E_VALUE, FEEDBACK(one, unit, wrong, 2));
  REFUSED("an order across blocks", AQ_E_VALUE, FEEDBACK(one, unit, crossed, 1));
  REFUSED("no columns in a block", AQ_E_SHAPE, FEEDBACK(one, unit, order, 0));
  REFUSED("a scale of 0", AQ_E_VALUE, FEEDBACK(one, zero_scale, order, 2));
  REFUSED("a wrong kind", AQ_E_ARGUMENT, aq_refine_codes(one, 2, 2, 2, 0, 3, 2, one, 1, 1, 1, codes, unit, unit, objective,
                                                         work, AQ_ISA_BEST, 1));
  REFUSED("no rows", AQ_OK, aq_refine_codes(0, 0, 2, 2, 0, 0, 2, 0, 1, 1, 1, 0, 0, 0, 0, 0, AQ_ISA_BEST, 1));
  REFUSED("a ratio above 1", AQ_E_VALUE, aq_clipped_grids(one, 2, 2, 2, 0, 0, 1.5f, work, work, 1));
}

int main(int argc, char **argv) {
  begin(argc, argv);
  static const shape shapes[] = {
      {1, 1, 5, 2, 0, 0, 0},        {3, 17, 40, 2, 0, 0, 5},      {33, 47, 300, 3, 16, 0, 0},
      {40, 96, 257, 4, 32, 1, 64},  {31, 48, 90, 8, 0, 2, 1},     {70, 49, 100, 2, 64, 2, 0},
      {5, 130, 200, 2, 32, 0, 32},  {64, 160, 513, 2, 0, 0, 0},   {65, 200, 64, 3, 128, 1, 128},
      {172, 300, 64, 3, 16, 0, 0},  {32, 600, 300, 4, 256, 0, 0}, {400, 530, 300, 2, 0, 0, 300},
  };
  const size_t count = quick ? 7 : COUNT(shapes);
  for (size_t i = 0; i < count; i++) check_shape(&shapes[i]);
  check_refusals();
  return finish();
}
