/* trellis_solver.h: the search for trellis codes, and what settles them, on a device against the scalar
 * oracle, to the bit; included by cuda.cu behind solver.h. */

struct trellis_case {
  size_t rows, cols;
  int32_t bits;
  size_t group_size, block; /* block 0: all columns */
};

/* A moment of inputs that depend on each other, in blocks, damped; and its factor in the same places. */
struct factored_blocks {
  std::vector<float> moment, factor, pivots;
  factored_blocks(size_t n, size_t block) : pivots(n) {
    const size_t tokens = n + 20;
    std::vector<float> x(tokens * n);
    for (size_t i = 0; i < tokens; i++) {
      const float shared = gaussian();
      for (size_t k = 0; k < n; k++) x[i * n + k] = (shared + gaussian()) * (float)(1 + k % 3);
    }
    size_t elements = 0;
    for (size_t first = 0; first < n; first += block) elements += std::min(block, n - first) * std::min(block, n - first);
    moment.resize(elements);
    aq_accumulate_moment(x.data(), 0, 0, tokens, n, n, block, moment.data(), AQ_ISA_SCALAR, 1);
    size_t at = 0;
    for (size_t first = 0, size = 0; first < n; first += block, at += size * size) {
      size = std::min(block, n - first);
      for (size_t k = 0; k < size; k++) moment[at + k * (size + 1)] *= 1.01f;
    }
    factor = moment;
    at = 0;
    for (size_t first = 0, size = 0; first < n; first += block, at += size * size) {
      size = std::min(block, n - first);
      std::vector<float> work(size * 256);
      expect_status("factor", "trellis", aq_factor_moment(factor.data() + at, size, pivots.data() + first, work.data(), AQ_ISA_SCALAR, 1),
                    AQ_OK);
    }
  }
};

static void run_trellis_solver(const trellis_case &c) {
  const size_t n = c.cols, rows = c.rows, block = c.block ? c.block : n;
  char where[120];
  snprintf(where, sizeof where, "%zu x %zu, %d bits, group %zu, block %zu", rows, n, (int)c.bits, c.group_size, block);
  const factored_blocks h(n, block);
  std::vector<float> weights = normal_values(rows * n, 0.1f);
  for (float &weight : weights) weight = c.rows % 2 == 0 && random_bits() % 2 ? 0.0f : weight;
  uint64_t groups = 0, floats = 0;
  aq_group_count(n, c.group_size, &groups);
  aq_solver_work(n, c.group_size, 1, &floats);
  std::vector<float> work(floats), table((size_t)64 << c.bits), scales(rows * groups), offsets(rows * groups);
  /* levels that round, and of some cases so few that survivors are equal */
  for (float &value : table) value = c.rows % 2 ? gaussian() : (float)(random_bits() % 3) - 1.0f;
  for (float &value : scales) value = 0.0625f + fabsf(gaussian()) / 256;
  for (float &value : offsets) value = c.rows % 2 ? gaussian() / 256 : 0.0f;
  const device_bytes w = on_device(weights), u = on_device(h.factor), d = on_device(h.pivots), t = on_device(table),
                     s = on_device(scales), o = on_device(offsets);
  changed<uint8_t> codes{bytes(rows * n)};
  changed<double> objective{std::vector<double>(rows)};
  for (int32_t survivors = 1; survivors >= 0; survivors--) { /* plain feedback, then all */
    BOTH("trellis search",
         aq_search_trellis(weights.data(), rows, n, c.bits, c.group_size, table.data(), survivors, scales.data(), offsets.data(), block,
                           h.factor.data(), h.pivots.data(), codes.expected.data(), objective.expected.data(), work.data(), AQ_ISA_SCALAR, 1),
         aq_cuda_search_trellis(w.handle, rows, n, c.bits, c.group_size, t.handle, survivors, s.handle, o.handle, block, u.handle, d.handle,
                                codes.own.handle, objective.own.handle, stream));
    codes.compare("codes of a trellis", where);
    objective.compare("objective of a trellis", where);
  }
  changed<float> scale(scales), offset(offsets);
  for (uint8_t &code : codes.expected) code = random_bits() % 4 ? code : (uint8_t)(random_bits() % (1u << c.bits)); /* far from settled */
  require(aq_cuda_upload(codes.expected.data(), codes.expected.size(), codes.own.handle, 0, stream), "upload");
  const device_bytes m = on_device(h.moment);
  for (int32_t turn = 0; turn < 4; turn++) { /* the objective alone, without refits, of scales, and of both */
    const int32_t refit = turn < 2 ? AQ_REFIT_NOTHING : turn == 2 ? AQ_REFIT_SCALES : AQ_REFIT_LINES, rounds = turn < 2 ? turn : 2;
    BOTH("trellis settled",
         aq_settle_trellis(weights.data(), rows, n, c.bits, c.group_size, table.data(), block, h.moment.data(), refit, rounds,
                           codes.expected.data(), scale.expected.data(), offset.expected.data(), objective.expected.data(), work.data(),
                           AQ_ISA_SCALAR, 1),
         aq_cuda_settle_trellis(w.handle, rows, n, c.bits, c.group_size, t.handle, block, m.handle, refit, rounds, codes.own.handle,
                                scale.own.handle, offset.own.handle, objective.own.handle, stream));
    codes.compare("settled codes", where);
    scale.compare("settled scales", where);
    offset.compare("settled offsets", where);
    objective.compare("settled objective", where);
  }
}

static void run_trellis_solvers(void) {
  const trellis_case cases[] = {
      {1, 1, 2, 0, 0},      {3, 15, 3, 0, 0},    {5, 16, 2, 16, 0},   {2, 17, 3, 16, 0},   {9, 64, 2, 32, 32},
      {3, 100, 3, 0, 0},    {6, 130, 2, 64, 64}, {2, 300, 3, 128, 0}, {14, 96, 2, 0, 32},  {3, 600, 2, 256, 256},
  };
  const size_t count = quick ? 8 : COUNT(cases);
  for (size_t i = 0; i < count; i++) run_trellis_solver(cases[i]);
  const char *where = "refusals of trellis solvers";
  const std::vector<float> values(256, 1.0f), broken(256, NAN);
  const device_bytes v = on_device(values), b = on_device(broken), codes = on_device(bytes(256, 9)),
                     objective = on_device(values);
  const auto search = [&](int32_t bits, size_t block, const device_bytes &table, const device_bytes &w) {
    return aq_cuda_search_trellis(w.handle, 1, 8, bits, 0, table.handle, 0, v.handle, v.handle, block, v.handle, v.handle, codes.handle,
                                  objective.handle, stream);
  };
  expect_status("four bits", where, search(4, 8, v, v), AQ_E_ARGUMENT);
  expect_status("a block of four columns", where, search(2, 4, v, v), AQ_E_SHAPE);
  expect_status("a table of NaN", where, search(2, 8, b, v), AQ_E_VALUE);
  expect_status("weights of NaN", where, search(2, 8, v, b), AQ_E_NONFINITE);
  expect_status("a table that is too small", where, search(3, 8, v, v), AQ_E_SHAPE);
  require(aq_cuda_upload(bytes(256, 9).data(), 256, codes.handle, 0, stream), "upload");
  expect_status("a code of four bits", where,
                aq_cuda_settle_trellis(v.handle, 1, 8, 2, 0, v.handle, 8, v.handle, 1, 1, codes.handle, v.handle, v.handle, objective.handle, stream),
                AQ_E_VALUE);
  expect_status("a refit of something else", where,
                aq_cuda_settle_trellis(v.handle, 1, 8, 2, 0, v.handle, 8, v.handle, 3, 1, codes.handle, v.handle, v.handle, objective.handle, stream),
                AQ_E_ARGUMENT);
}
