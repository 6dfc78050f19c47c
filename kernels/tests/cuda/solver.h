/* solver.h: products, a moment's diagonal and factor, feedback and refining on a device against the scalar
 * oracle, to the bit; included by cuda.cu behind tensor.h. */

struct solver_case {
  size_t rows, cols, tokens;
  int32_t bits;
  size_t group_size;
  int32_t kind;
  size_t block; /* of the moment that codes are solved against; 0: all columns */
};

/* What the oracle changes in place, and the device's copy of what it was. */
template <class T>
struct changed {
  std::vector<T> expected;
  device_bytes own;
  explicit changed(const std::vector<T> &from) : expected(from), own(from.data(), from.size() * sizeof(T)) {}
  void compare(const char *kernel, const char *where) const {
    bytes actual(own.size + GUARD);
    require(aq_cuda_download(own.handle, 0, actual.data(), actual.size(), stream), "download");
    expect_bytes(kernel, where, expected.data(), actual.data(), own.size);
    expect_guard(kernel, where, actual.data(), own.size);
  }
};

static void compare_products(const solver_case &c, const std::vector<float> &x, const char *where) {
  const size_t n = c.cols, t = c.tokens;
  const std::vector<float> y = normal_values(t * c.rows, 1.0f), other = normal_values(c.rows * n, 1.0f);
  std::vector<float> weight(t);
  for (float &value : weight) value = 0.25f + (float)(random_bits() % 4);
  const device_bytes own_x = on_device(x), own_y = on_device(y), own_weight = on_device(weight), own_other = on_device(other);
  changed<float> diagonal{std::vector<float>(n)}, product(normal_values(t * c.rows, 1.0f));
  if (n > 1) {
    BOTH("diagonal", aq_accumulate_moment(x.data(), x.data(), weight.data(), t, n, n, 1, diagonal.expected.data(), AQ_ISA_SCALAR, 1),
         aq_cuda_accumulate_moment(own_x.handle, own_x.handle, own_weight.handle, t, n, n, 1, diagonal.own.handle, stream));
    diagonal.compare("diagonal", where);
  }
  BOTH("product", aq_multiply(y.data(), other.data(), t, c.rows, n < c.rows ? n : c.rows, product.expected.data(), AQ_ISA_SCALAR, 1),
       aq_cuda_multiply(own_y.handle, own_other.handle, t, c.rows, n < c.rows ? n : c.rows, product.own.handle, stream));
  product.compare("product", where);
}

/* The moment's blocks with what makes them positive definite, in the order of columns. */
static std::vector<float> ordered_blocks(const std::vector<float> &moment, size_t n, size_t block,
                                         const std::vector<int32_t> &order) {
  std::vector<float> ordered = moment;
  float *u = ordered.data();
  const float *m = moment.data();
  for (size_t first = 0, size = 0; first < n; first += block, m += size * size, u += size * size) {
    size = n - first < block ? n - first : block;
    for (size_t i = 0; i < size; i++)
      for (size_t j = 0; j < size; j++)
        u[i * size + j] = m[((size_t)order[first + i] - first) * size + (size_t)order[first + j] - first];
  }
  return ordered;
}

static void run_solver(const solver_case &c) {
  const size_t n = c.cols, rows = c.rows, block = c.block ? c.block : n;
  char where[160];
  snprintf(where, sizeof where, "%zu x %zu, %d bits, group %zu, kind %d, block %zu", rows, n, c.bits, c.group_size, c.kind, block);
  std::vector<float> x(c.tokens * n);
  for (size_t i = 0; i < c.tokens; i++) {
    const float shared = gaussian();
    for (size_t k = 0; k < n; k++) x[i * n + k] = (shared + gaussian()) * (float)(1 + k % 3);
  }
  compare_products(c, x, where);
  size_t elements = 0;
  for (size_t first = 0; first < n; first += block) elements += (n - first < block ? n - first : block) * (n - first < block ? n - first : block);
  std::vector<float> damped(elements);
  expect_status("moment", where, aq_accumulate_moment(x.data(), 0, 0, c.tokens, n, n, block, damped.data(), AQ_ISA_SCALAR, 1), AQ_OK);

  std::vector<int32_t> order(n);
  for (size_t first = 0, at = 0, size = 0; first < n; first += block, at += size * size) {
    size = n - first < block ? n - first : block;
    for (size_t k = 0; k < size; k++) {
      order[first + k] = (int32_t)(first + size - 1 - k);
      damped[at + k * (size + 1)] += 0.05f * (float)c.tokens + 1e-6f;
    }
  }
  const std::vector<float> before = ordered_blocks(damped, n, block, order);
  std::vector<float> factor, all_pivots;
  std::vector<float> solved = normal_values(rows * n, 1.0f);
  for (size_t first = 0, at = 0, size = 0; first < n; first += block, at += size * size) {
    size = n - first < block ? n - first : block;
    changed<float> u(std::vector<float>(before.begin() + (ptrdiff_t)at, before.begin() + (ptrdiff_t)(at + size * size)));
    changed<float> pivots{std::vector<float>(size)}, z(std::vector<float>(solved.begin(), solved.begin() + (ptrdiff_t)(rows * size)));
    std::vector<float> work(size * 256);
    BOTH("factor", aq_factor_moment(u.expected.data(), size, pivots.expected.data(), work.data(), AQ_ISA_SCALAR, 1),
         aq_cuda_factor_moment(u.own.handle, size, pivots.own.handle, stream));
    BOTH("solved rows", aq_solve_moment(u.expected.data(), pivots.expected.data(), size, z.expected.data(), rows, AQ_ISA_SCALAR, 1),
         aq_cuda_solve_moment(u.own.handle, pivots.own.handle, size, z.own.handle, rows, stream));
    u.compare("factor", where);
    pivots.compare("pivots", where);
    z.compare("solved rows", where);
    factor.insert(factor.end(), u.expected.begin(), u.expected.end());
    all_pivots.insert(all_pivots.end(), pivots.expected.begin(), pivots.expected.end());
  }

  std::vector<float> weights = normal_values(rows * n, 0.1f);
  for (float &w : weights) w = random_bits() % 40 ? w : 0.0f;
  uint64_t groups = 0, floats = 0;
  aq_group_count(n, c.group_size, &groups);
  aq_solver_work(n, c.group_size, 1, &floats);
  std::vector<float> work(floats);
  changed<float> scale{std::vector<float>(rows * groups)}, zero{std::vector<float>(rows * groups)};
  changed<uint8_t> codes{bytes(rows * n)};
  changed<double> objective{std::vector<double>(rows)};
  const device_bytes w = on_device(weights), u = on_device(factor), d = on_device(all_pivots), o = on_device(order), m = on_device(damped);
  BOTH("grids", aq_clipped_grids(weights.data(), rows, n, c.bits, c.group_size, c.kind, 0.8f, scale.expected.data(), zero.expected.data(), 1),
       aq_cuda_clipped_grids(w.handle, rows, n, c.bits, c.group_size, c.kind, 0.8f, scale.own.handle, zero.own.handle, stream));
  scale.compare("scales", where);
  zero.compare("zero points", where);
  BOTH("feedback",
       aq_quantize_feedback(weights.data(), rows, n, c.bits, c.group_size, scale.expected.data(), zero.expected.data(), block, factor.data(),
                            all_pivots.data(), order.data(), codes.expected.data(), objective.expected.data(), work.data(), AQ_ISA_SCALAR, 1),
       aq_cuda_quantize_feedback(w.handle, rows, n, c.bits, c.group_size, scale.own.handle, zero.own.handle, block, u.handle, d.handle,
                                 o.handle, codes.own.handle, objective.own.handle, stream));
  codes.compare("codes of feedback", where);
  objective.compare("objective of feedback", where);
  for (int32_t turn = 0; turn < 3; turn++) { /* without refits, with them, and with sweeps */
    const int32_t refit = turn > 0, rounds = turn == 1 ? 2 : 1, sweeps = turn == 1 ? 1 : 2;
    BOTH("refine",
         aq_refine_codes(weights.data(), rows, n, c.bits, c.group_size, c.kind, block, damped.data(), refit, rounds, sweeps,
                         codes.expected.data(), scale.expected.data(), zero.expected.data(), objective.expected.data(), work.data(), AQ_ISA_SCALAR, 1),
         aq_cuda_refine_codes(w.handle, rows, n, c.bits, c.group_size, c.kind, block, m.handle, refit, rounds, sweeps, codes.own.handle,
                              scale.own.handle, zero.own.handle, objective.own.handle, stream));
    codes.compare("codes", where);
    scale.compare("refitted scales", where);
    zero.compare("refitted zero points", where);
    objective.compare("objective", where);
  }
}

static void run_solver_refusals(void) {
  const char *kernel = "refusals of solvers", *where = kernel;
  const std::vector<float> one = {1, 0, 0, 1}, broken = {1, NAN, 0, 1}, indefinite = {1, 2, 2, 1}, units = {1, 1}, none = {0, 1};
  const std::vector<int32_t> order = {0, 1}, wrong = {0, 2}, crossed = {1, 0};
  const device_bytes o = on_device(one), b = on_device(broken), i = on_device(indefinite), u = on_device(units), z = on_device(none);
  const device_bytes good = on_device(order), bad = on_device(wrong), cross = on_device(crossed), codes = on_device(bytes(4)),
                     objective = on_device(std::vector<double>(2)), high = on_device(bytes(4, 9));
  const auto feedback = [&](const device_bytes &w, const device_bytes &scale, const device_bytes &columns, size_t block) {
    return aq_cuda_quantize_feedback(w.handle, 2, 2, 2, 0, scale.handle, u.handle, block, o.handle, u.handle, columns.handle, codes.handle,
                                     objective.handle, stream);
  };
  expect_status("indefinite", where, aq_cuda_factor_moment(i.handle, 2, u.handle, stream), AQ_E_VALUE);
  require(aq_cuda_upload(units.data(), 8, u.handle, 0, stream), "upload");
  expect_status("NaN", where, feedback(b, u, good, 2), AQ_E_NONFINITE);
  expect_status("a wrong order", where, feedback(o, u, bad, 2), AQ_E_VALUE);
  expect_status("an order across blocks", where, feedback(o, u, cross, 1), AQ_E_VALUE);
  expect_status("no columns in a block", where, feedback(o, u, good, 0), AQ_E_SHAPE);
  expect_status("a scale of 0", where, feedback(b, z, good, 2), AQ_E_VALUE);
  expect_status("a code of four bits", where,
                aq_cuda_refine_codes(o.handle, 2, 2, 2, 0, 0, 2, o.handle, 1, 1, 1, high.handle, u.handle, u.handle, objective.handle, stream),
                AQ_E_VALUE);
  expect_status("a wrong kind", where,
                aq_cuda_refine_codes(o.handle, 2, 2, 2, 0, 3, 2, o.handle, 1, 1, 1, codes.handle, u.handle, u.handle, objective.handle, stream),
                AQ_E_ARGUMENT);
  expect_status("too small", where, aq_cuda_factor_moment(o.handle, 99, u.handle, stream), AQ_E_SHAPE);
}

static void run_solvers(void) {
  const solver_case cases[] = {
      {1, 1, 5, 2, 0, 0, 0},     {3, 17, 40, 2, 0, 0, 5},    {9, 47, 30, 3, 16, 0, 0},   {7, 48, 60, 8, 0, 2, 1},
      {11, 96, 57, 4, 32, 1, 64}, {5, 130, 140, 2, 64, 2, 0}, {4, 200, 64, 3, 128, 1, 128}, {40, 300, 64, 2, 0, 0, 0},
      {12, 520, 40, 4, 256, 0, 0}, {67, 270, 33, 3, 16, 0, 0}, {150, 530, 70, 2, 0, 0, 300},
  };
  const size_t count = quick ? 9 : COUNT(cases);
  for (size_t i = 0; i < count; i++) run_solver(cases[i]);
  run_solver_refusals();
}
