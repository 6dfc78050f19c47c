/* trellis_search.c: the search for trellis codes, and what settles their scales, offsets and codes, on every
 * instruction set of this build against the scalar oracle, to the bit, on awkward shapes, with guard bytes
 * behind each output, for 1 and 3 threads; and the oracle against all sequences of codes, against error
 * feedback, and against sums in double. */
#include "harness.h"

typedef struct {
  size_t rows, cols;
  int32_t bits;
  size_t group_size, block;
} shape;

#define CALL(what, call) expect_status(what, where, call, AQ_OK)

/* A layer with the moment of inputs that depend on each other, in blocks, damped and factored. */
typedef struct {
  size_t rows, cols, block, groups;
  float *weights, *moment, *factor, *pivots, *scale, *offset, *table, *work;
  size_t work_bytes;
} layer;

static size_t block_floats(size_t n, size_t block) { return n / block * block * block + n % block * (n % block); }

static layer make_layer(const shape *s, int32_t threads, const char *where) {
  const size_t n = s->cols, block = s->block ? s->block : n, tokens = 2 * n + 8, floats = block_floats(n, block);
  uint64_t groups, work;
  CALL("group count", aq_group_count(n, s->group_size, &groups));
  CALL("work", aq_solver_work(n, s->group_size, threads, &work));
  layer l = {.rows = s->rows, .cols = n, .block = block, .groups = groups};
  l.weights = gaussians(s->rows * n, 0.1f);
  l.moment = memset(take(floats * 4), 0, floats * 4);
  l.factor = take(floats * 4);
  l.pivots = take(n * 4);
  l.scale = take(s->rows * groups * 4);
  l.offset = take(s->rows * groups * 4);
  l.table = take(((size_t)64 << s->bits) * 4);
  l.work_bytes = work * 4;
  l.work = guarded(l.work_bytes);
  float *x = take(tokens * n * 4);
  for (size_t t = 0; t < tokens; t++) {
    const float shared = gaussian();
    for (size_t k = 0; k < n; k++) x[t * n + k] = (shared + gaussian()) * (float)(1 + k % 3);
  }
  CALL("moment", aq_accumulate_moment(x, 0, 0, tokens, n, n, block, l.moment, AQ_ISA_SCALAR, 1));
  float *m = l.moment, *u = l.factor;
  for (size_t first = 0, size = 0; first < n; first += block, m += size * size, u += size * size) {
    size = n - first < block ? n - first : block;
    for (size_t k = 0; k < size; k++) m[k * size + k] *= 1.01f;
    memcpy(u, m, size * size * 4);
    CALL("factor", aq_factor_moment(u, size, l.pivots + first, l.work, AQ_ISA_SCALAR, 1));
  }
  for (size_t i = 0; i < s->rows * groups; i++) {
    l.scale[i] = 0.0625f + (float)(random_bits() % 8) / 256;
    l.offset[i] = gaussian() / 256;
  }
  for (size_t i = 0; i < (size_t)64 << s->bits; i++) l.table[i] = roundf(gaussian() * 32) / 32;
  if (random_bits() % 2) aq_trellis_table(s->bits, l.table); /* levels that are sums of terms */
  return l;
}

static size_t window_of(const uint8_t *codes, size_t k, int32_t bits) {
  size_t window = 0;
  for (size_t i = 0; i <= 6 / (size_t)bits; i++) window = window << bits | (i <= k ? codes[k - i] : 0);
  return window;
}

/* A row's objective in double. */
static double objective_of(const layer *l, const shape *s, size_t row, const uint8_t *codes) {
  const size_t n = l->cols, group = s->group_size ? s->group_size : n;
  double sum = 0, d[600];
  for (size_t k = 0; k < n; k++) {
    const size_t g = row * l->groups + k / group;
    d[k] = (double)l->weights[row * n + k] -
           ((double)l->scale[g] * (double)l->table[window_of(codes, k, s->bits)] + (double)l->offset[g]);
  }
  const float *m = l->moment;
  for (size_t first = 0, size = 0; first < n; first += l->block, m += size * size) {
    size = n - first < l->block ? n - first : l->block;
    for (size_t i = 0; i < size; i++)
      for (size_t j = 0; j < size; j++) sum += d[first + i] * (double)m[i * size + j] * d[first + j];
  }
  return sum;
}

enum { OUTPUTS = 6 };
static const char *output_names[OUTPUTS] = {"codes", "objective", "settled codes", "scales", "offsets",
                                            "settled objective"};

typedef struct {
  void *data[OUTPUTS];
  size_t bytes[OUTPUTS];
} outputs;

static outputs solve(const shape *s, layer l, int32_t survivors, int32_t refit, int32_t isa, int32_t threads,
                     const char *where) {
  const size_t sizes[OUTPUTS] = {l.rows * l.cols,       l.rows * 8,            l.rows * l.cols,
                                 l.rows * l.groups * 4, l.rows * l.groups * 4, l.rows * 8};
  outputs o;
  for (int i = 0; i < OUTPUTS; i++) o.data[i] = guarded(o.bytes[i] = sizes[i]);
  uint64_t work;
  CALL("work", aq_solver_work(l.cols, s->group_size, threads, &work));
  l.work = guarded(work * 4);
  CALL("search", aq_search_trellis(l.weights, l.rows, l.cols, s->bits, s->group_size, l.table, survivors, l.scale,
                                   l.offset, l.block, l.factor, l.pivots, o.data[0], o.data[1], l.work, isa, threads));
  memcpy(o.data[2], o.data[0], sizes[2]);
  memcpy(o.data[3], l.scale, sizes[3]);
  memcpy(o.data[4], l.offset, sizes[4]);
  CALL("settle", aq_settle_trellis(l.weights, l.rows, l.cols, s->bits, s->group_size, l.table, l.block, l.moment, refit,
                                   2, o.data[2], o.data[3], o.data[4], o.data[5], l.work, isa, threads));
  for (int i = 0; i < OUTPUTS; i++) expect_guard(output_names[i], where, o.data[i], o.bytes[i]);
  expect_guard("work", where, l.work, work * 4);
  return o;
}

static void check_shape(const shape *s) {
  char where[160];
  snprintf(where, sizeof where, "scalar, %zu x %zu, %d bits, groups of %zu", s->rows, s->cols, s->bits, s->group_size);
  layer l = make_layer(s, 1, where);
  for (int32_t survivors = 0; survivors < 2; survivors++) {
    const int32_t refit = survivors ? AQ_REFIT_SCALES : AQ_REFIT_LINES;
    const outputs expected = solve(s, l, survivors, refit, AQ_ISA_SCALAR, 1, where);
    layer settled = l;
    settled.scale = expected.data[3];
    settled.offset = expected.data[4];
    for (size_t row = 0; row < s->rows; row++) {
      const double before = objective_of(&l, s, row, (uint8_t *)expected.data[0] + row * s->cols);
      const double after = objective_of(&settled, s, row, (uint8_t *)expected.data[2] + row * s->cols);
      const double found = ((double *)expected.data[1])[row], left = ((double *)expected.data[5])[row];
      expect(fabs(found - before) <= 1e-3 * before + 1e-9, "the search's objective is not the moment's", where);
      expect(fabs(left - after) <= 1e-3 * after + 1e-9, "a settled objective is not the moment's", where);
      expect(after <= before * 1.0001, "settling raised an objective", where);
    }
    for (int32_t isa = 1; isa <= AQ_ISA_NEON_DOT; isa++) {
      if (!aq_isa_supported(isa)) continue;
      for (int32_t threads = 1; threads <= 3; threads += 2) {
        snprintf(where, sizeof where, "%s, %d threads, %zu x %zu, %d bits, groups of %zu", isa_names[isa], threads,
                 s->rows, s->cols, s->bits, s->group_size);
        const outputs actual = solve(s, l, survivors, refit, isa, threads, where);
        for (int i = 0; i < OUTPUTS; i++)
          expect_bytes(output_names[i], where, expected.data[i], actual.data[i], expected.bytes[i]);
      }
    }
  }
  release();
}

/* Least squares of scales alone against sums in double, in a first group, which is fitted before codes
 * change: half a unit of the half float is left. Offsets stay. */
static void check_scales_alone(const shape *s) {
  const char *where = "scales alone";
  layer l = make_layer(s, 1, where);
  const size_t n = s->cols, lines = s->rows * l.groups * 4, size = s->group_size ? s->group_size : n;
  uint8_t *first = take(s->rows * n), *codes = take(s->rows * n);
  float *scale = take(lines), *offset = take(lines);
  double *objective = take(s->rows * 8);
  size_t moved = 0;
  for (size_t i = 0; i < s->rows * n; i++) first[i] = codes[i] = (uint8_t)(random_bits() >> 7 & ((1u << s->bits) - 1));
  memcpy(scale, l.scale, lines);
  memcpy(offset, l.offset, lines);
  CALL("settle", aq_settle_trellis(l.weights, s->rows, n, s->bits, s->group_size, l.table, n, l.moment, AQ_REFIT_SCALES, 1,
                                   codes, scale, offset, objective, l.work, AQ_ISA_BEST, 1));
  expect_bytes("offsets", where, l.offset, offset, lines);
  for (size_t row = 0; row < s->rows; row++) {
    double d[600], u[600], up = 0, uu = 0;
    const uint8_t *own = first + row * n;
    for (size_t k = 0; k < n; k++) {
      const size_t g = row * l.groups + k / size;
      u[k] = l.table[window_of(own, k, s->bits)];
      d[k] = (double)l.weights[row * n + k] - ((double)l.scale[g] * u[k] + (double)l.offset[g]);
    }
    for (size_t i = 0; i < size; i++)
      for (size_t j = 0; j < n; j++) {
        up += u[i] * (double)l.moment[i * n + j] * d[j];
        uu += j < size ? u[i] * (double)l.moment[i * n + j] * u[j] : 0;
      }
    const double best = (double)l.scale[row * l.groups] + up / uu, found = (double)scale[row * l.groups];
    expect(fabs(found - best) <= 0x1p-11 * fabs(best) * 1.01 + 1e-6, "a scale is not that of least squares", where);
    moved += fabs(found - (double)l.scale[row * l.groups]) > 0.01 * found;
  }
  expect(moved > s->rows / 2, "scales hardly move", where);
  release();
}

/* While no two survivors share a window the search is exact: it finds the best of all sequences. */
static void check_exhaustive(int32_t bits, size_t cols) {
  const shape s = {20, cols, bits, 0, 0};
  const char *where = "against all sequences";
  layer l = make_layer(&s, 1, where);
  uint8_t *codes = take(s.rows * cols), tried[8];
  double *objective = take(s.rows * 8);
  CALL("search", aq_search_trellis(l.weights, s.rows, cols, bits, 0, l.table, 0, l.scale, l.offset, cols, l.factor,
                                   l.pivots, codes, objective, l.work, AQ_ISA_BEST, 1));
  for (size_t row = 0; row < s.rows; row++) {
    double best = INFINITY;
    for (size_t i = 0; i < (size_t)1 << ((size_t)bits * cols); i++) {
      for (size_t k = 0; k < cols; k++) tried[k] = (uint8_t)(i >> (k * (size_t)bits) & ((1u << bits) - 1));
      best = fmin(best, objective_of(&l, &s, row, tried));
    }
    const double found = objective_of(&l, &s, row, codes + row * cols);
    expect(found <= best * 1.0001, "a search is not exhaustive", where);
    expect(fabs(objective[row] - found) <= 1e-3 * found + 1e-9, "an objective is not that of the codes", where);
  }
  release();
}

/* With levels that do not depend on older codes and one survivor it is error feedback. */
static void check_feedback(void) {
  const shape s = {40, 100, 2, 16, 0};
  const char *where = "against error feedback";
  layer l = make_layer(&s, 1, where);
  const float middle = 1.5f;
  float *zero = take(s.rows * l.groups * 4);
  int32_t *order = take(s.cols * 4);
  uint8_t *expected = take(s.rows * s.cols), *codes = take(s.rows * s.cols);
  double *objectives = take(s.rows * 8), *objective = take(s.rows * 8);
  for (size_t i = 0; i < s.rows * l.groups; i++) {
    zero[i] = middle;
    l.offset[i] = 0;
  }
  for (size_t i = 0; i < 256; i++) l.table[i] = (float)(i >> 6) - middle;
  for (size_t k = 0; k < s.cols; k++) order[k] = (int32_t)k;
  CALL("feedback", aq_quantize_feedback(l.weights, s.rows, s.cols, 2, 16, l.scale, zero, s.cols, l.factor, l.pivots, order,
                                        expected, objectives, l.work, AQ_ISA_SCALAR, 1));
  CALL("search", aq_search_trellis(l.weights, s.rows, s.cols, 2, 16, l.table, 1, l.scale, l.offset, s.cols, l.factor,
                                   l.pivots, codes, objective, l.work, AQ_ISA_BEST, 1));
  expect(memcmp(codes, expected, s.rows * s.cols) == 0, "one survivor is not error feedback", where);
  CALL("search", aq_search_trellis(l.weights, s.rows, s.cols, 2, 16, l.table, 0, l.scale, l.offset, s.cols, l.factor,
                                   l.pivots, codes, objective, l.work, AQ_ISA_BEST, 1));
  double sum = 0, before = 0;
  for (size_t row = 0; row < s.rows; row++) {
    sum += objective[row];
    before += objectives[row];
  }
  expect(sum < before, "many survivors find no more than one", where);
  release();
}

#define REFUSED(what, status, call) expect_status("refusals", what, call, status)
#define SEARCH(weights, bits, table, survivors, block)                                                             \
  aq_search_trellis(weights, 2, 2, bits, 0, table, survivors, unit, unit, block, one, unit, codes, objective, work, \
                    AQ_ISA_BEST, 1)

static void check_refusals(void) {
  uint64_t floats;
  REFUSED("work", AQ_OK, aq_solver_work(2, 0, 1, &floats));
  float one[4] = {1, 0, 0, 1}, unit[2] = {1, 1}, broken[4] = {1, nanf(""), 0, 1}, *work = take(floats * 4);
  float *table = memset(take(2048), 0, 2048), *bad_table = memset(take(2048), 0xff, 2048);
  uint8_t codes[4] = {0, 4, 0, 0};
  double objective[2];
  REFUSED("4 bits", AQ_E_ARGUMENT, SEARCH(one, 4, table, 0, 2));
  REFUSED("two survivors", AQ_E_ARGUMENT, SEARCH(one, 2, table, 2, 2));
  REFUSED("no table", AQ_E_ARGUMENT, SEARCH(one, 2, 0, 0, 2));
  REFUSED("a table of NaN", AQ_E_VALUE, SEARCH(one, 2, bad_table, 0, 2));
  REFUSED("a block of no whole words", AQ_E_SHAPE, SEARCH(one, 2, table, 0, 1));
  REFUSED("NaN", AQ_E_NONFINITE, SEARCH(broken, 2, table, 0, 2));
  REFUSED("a code above 3", AQ_E_VALUE, aq_settle_trellis(one, 2, 2, 2, 0, table, 2, one, 1, 1, codes, unit, unit,
                                                          objective, work, AQ_ISA_BEST, 1));
  for (int32_t refit = -1; refit <= 3; refit += 4)
    REFUSED("another refit", AQ_E_ARGUMENT, aq_settle_trellis(one, 2, 2, 2, 0, table, 2, one, refit, 1, codes, unit, unit,
                                                              objective, work, AQ_ISA_BEST, 1));
  REFUSED("no rows", AQ_OK, aq_settle_trellis(0, 0, 2, 2, 0, 0, 2, 0, 1, 1, 0, 0, 0, 0, 0, AQ_ISA_BEST, 1));
  release();
}

int main(int argc, char **argv) {
  begin(argc, argv);
  static const shape shapes[] = {
      {1, 1, 2, 0, 0},    {3, 17, 2, 0, 0},     {33, 47, 2, 16, 0},  {9, 100, 2, 32, 32}, {5, 70, 3, 0, 0},
      {40, 96, 2, 0, 64}, {2, 300, 2, 256, 0}, {17, 65, 3, 16, 32}, {3, 200, 2, 128, 128},
  };
  const size_t count = quick ? 5 : COUNT(shapes);
  for (size_t i = 0; i < count; i++) check_shape(&shapes[i]);
  check_scales_alone(&shapes[2]);
  check_scales_alone(&shapes[4]);
  check_exhaustive(2, 3);
  check_exhaustive(2, 4);
  check_exhaustive(3, 3);
  check_feedback();
  check_refusals();
  return finish();
}
