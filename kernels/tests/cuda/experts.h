/* experts.h: mixtures of experts on a device against the CPU's functions, to the bit; included by cuda.cu
 * behind backward.h. */

static void run_experts(size_t rows, size_t experts, size_t per_token, bool biased) {
  char where[96];
  snprintf(where, sizeof where, "%zu rows, %zu of %zu experts", rows, per_token, experts);
  std::vector<float> logits = normal_values(rows * experts, 5.0f), bias = normal_values(experts, 0.1f);
  for (float &value : logits)
    if (random_bits() % 4 == 0) value = (float)(random_bits() % 3); /* equals */
  if (rows * experts > 4) logits[random_bits() % logits.size()] = -3e38f;
  if (biased && experts > 4)
    for (size_t e = 1; e < experts; e++) bias[e] = e % 4 == 3 ? NAN : -INFINITY; /* each is chosen once still */
  const device_bytes own_bias = on_device_or_null(bias, biased), own_logits = on_device(logits);
  output expert(rows * per_token * 4), weight(rows * per_token * 4);
  BOTH("choose_experts",
       aq_choose_experts(logits.data(), biased ? bias.data() : 0, rows, experts, per_token, expert.of<int32_t>(), weight.of<float>(), 1),
       aq_cuda_choose_experts(own_logits.handle, own_bias.handle, rows, experts, per_token, expert.own.handle, weight.own.handle, stream));
  expert.compare("choose_experts, experts", where, true);
  weight.compare("choose_experts, weights", where, true);
}

static void run_row_moves(size_t rows, size_t cols, size_t count) {
  char where[96];
  snprintf(where, sizeof where, "%zu of %zu rows of %zu", count, rows, cols);
  std::vector<int32_t> place(rows);
  for (size_t i = 0; i < rows; i++) place[i] = (int32_t)i;
  for (size_t i = 0; i < rows; i++) std::swap(place[i], place[random_bits() % rows]);
  place.resize(count);
  const std::vector<float> x = normal_values(rows * cols, 1.0f), factor = normal_values(count, 1.0f);
  const device_bytes own_x = on_device(x), own_place = on_device(place), own_factor = on_device(factor);
  changed<float> taken{std::vector<float>(count * cols)}, sums{normal_values(rows * cols, 1.0f)};
  BOTH("gather_rows", aq_gather_rows(x.data(), place.data(), count, rows, cols, taken.expected.data(), 1),
       aq_cuda_gather_rows(own_x.handle, own_place.handle, count, rows, cols, taken.own.handle, stream));
  taken.compare("gather_rows", where);
  BOTH("scale_rows", aq_scale_rows(taken.expected.data(), factor.data(), count, cols, 1),
       aq_cuda_scale_rows(taken.own.handle, own_factor.handle, count, cols, stream));
  taken.compare("scale_rows", where);
  BOTH("add_rows", aq_add_rows(taken.expected.data(), place.data(), count, rows, cols, sums.expected.data(), 1),
       aq_cuda_add_rows(taken.own.handle, own_place.handle, count, rows, cols, sums.own.handle, stream));
  sums.compare("add_rows", where);
}

static void run_mixtures(void) {
  for (bool biased : {false, true}) {
    run_experts(1, 1, 1, biased);
    run_experts(7, 4, 2, biased);
    run_experts(leaves_out_large() ? 33 : 300, 64, 8, biased);
    run_experts(5, 9, 9, biased);
  }
  run_row_moves(1, 1, 1);
  run_row_moves(9, 33, 4);
  run_row_moves(40, 257, 40);
  const device_bytes b = on_device(bytes(64));
  const char *where = "refusals of mixtures";
  expect_status("more than there are", where, aq_cuda_choose_experts(b.handle, 0, 1, 4, 5, b.handle, b.handle, stream), AQ_E_SHAPE);
  expect_status("too small", where, aq_cuda_choose_experts(b.handle, 0, 100, 4, 2, b.handle, b.handle, stream), AQ_E_SHAPE);
  expect_status("no rows", where, aq_cuda_choose_experts(0, 0, 0, 4, 2, 0, 0, stream), AQ_OK);
  expect_status("too small", where, aq_cuda_gather_rows(b.handle, b.handle, 1, 100, 4, b.handle, stream), AQ_E_SHAPE);
  expect_status("too small", where, aq_cuda_scale_rows(b.handle, b.handle, 100, 4, stream), AQ_E_SHAPE);
  expect_status("no columns", where, aq_cuda_add_rows(0, 0, 1, 1, 0, 0, stream), AQ_OK);
  const std::vector<int32_t> beyond = {-1, 1, INT32_MAX};
  const std::vector<float> x = {1.0f, 2.0f, 3.0f};
  const device_bytes own_beyond = on_device(beyond), own_x = on_device(x);
  changed<float> taken{std::vector<float>{7.0f, 7.0f, 7.0f}}, sums{std::vector<float>{5.0f, 6.0f}};
  taken.expected = {0.0f, 2.0f, 0.0f};
  sums.expected = {5.0f, 8.0f};
  expect_status("a place beyond", where, aq_cuda_gather_rows(own_x.handle, own_beyond.handle, 3, 3, 1, taken.own.handle, stream), AQ_OK);
  expect_status("a place beyond", where, aq_cuda_add_rows(own_x.handle, own_beyond.handle, 3, 2, 1, sums.own.handle, stream), AQ_OK);
  taken.compare("gather_rows", "a place beyond");
  sums.compare("add_rows", "a place beyond");
}
