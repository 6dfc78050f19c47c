/* levels.h: symmetric grids under two levels of scales, and two levels for given scales, on a device against
 * the scalar oracle, to the bit; included by cuda.cu behind tensor.h. */

/* The outputs of both functions. */
struct level_outputs {
  output sub_scale, sub_min, super_scale, super_min;
  level_outputs(size_t sub, size_t super) : sub_scale(sub), sub_min(sub), super_scale(2 * super), super_min(2 * super) {}
  void compare(const char *kernel, const char *where, bool whole) const {
    for (const output *out : {&sub_scale, &sub_min, &super_scale, &super_min}) out->compare(kernel, where, whole);
  }
};

/* Real scales of both signs; one in ten has a fault. */
static std::vector<float> random_scales(size_t n) {
  std::vector<float> scales = normal_values(n, random_bits() % 4 ? 0.05f : 1e-7f);
  for (float &scale : scales)
    if (random_bits() % 12 == 0) scale = random_bits() % 2 ? 0.0f : -0.0f;
  const float faults[] = {NAN, -INFINITY, 3e38f};
  if (random_bits() % 10 == 0) scales[random_bits() % n] = faults[random_bits() % COUNT(faults)];
  return scales;
}

/* `given` 0: weights alone; 1: weights and scales to begin with; 2: scales alone. */
static void run_symmetric(const matrix_case &c, int given) {
  const char *kernel = "symmetric two levels";
  char where[160];
  snprintf(where, sizeof where, "%zux%zu, %d bits, group %zu, dtype %d, pattern %d, search %d, given %d", c.rows, c.cols,
           c.bits, c.group_size, c.dtype, c.pattern, c.search, given);
  uint64_t sizes[2] = {0, 0};
  aq_two_level_sizes(c.cols, c.group_size, 8, sizes);
  const inputs in(c);
  const std::vector<float> scales = random_scales(c.rows * sizes[0]);
  const device_bytes own_scales(given ? scales.data() : 0, scales.size() * 4);
  output packed(c.rows * words_of(c) * 4);
  level_outputs out(c.rows * sizes[0], c.rows * sizes[1]);
  const bool has_weights = given < 2;
  const int32_t status = aq_quantize_symmetric_levels(
      has_weights ? in.weights.data() : 0, c.dtype, given ? scales.data() : 0, in.columns_or_null(c), c.rows, c.cols,
      c.bits, c.group_size, 8, packed.of<uint32_t>(), out.sub_scale.of<uint8_t>(), out.sub_min.of<uint8_t>(),
      out.super_scale.of<uint16_t>(), out.super_min.of<uint16_t>(), AQ_ISA_SCALAR, 1);
  expect_status(kernel, where,
                aq_cuda_quantize_symmetric_levels(has_weights ? in.own_weights.handle : 0, c.dtype, own_scales.handle,
                                                  in.own_column_weights.handle, c.rows, c.cols, c.bits, c.group_size, 8,
                                                  packed.own.handle, out.sub_scale.own.handle, out.sub_min.own.handle,
                                                  out.super_scale.own.handle, out.super_min.own.handle, stream),
                status);
  packed.compare(kernel, where, status == AQ_OK && has_weights);
  out.compare(kernel, where, status == AQ_OK);
}

static void run_fit(size_t rows, size_t cols, size_t group_size, int32_t scale_bits) {
  const char *kernel = "two levels for given scales";
  char where[96];
  snprintf(where, sizeof where, "%zux%zu, group %zu, %d scale bits", rows, cols, group_size, scale_bits);
  uint64_t groups = 0, sizes[2] = {0, 0};
  aq_group_count(cols, group_size, &groups);
  aq_two_level_sizes(cols, group_size, scale_bits, sizes);
  const std::vector<float> scale = random_scales(rows * groups), minimum = random_scales(rows * groups);
  std::vector<float> weights(rows * groups);
  for (float &weight : weights) weight = random_bits() % 4 ? expf(2.0f * gaussian()) : 0.0f;
  if (random_bits() % 20 == 0) weights[random_bits() % weights.size()] = -1.0f;
  const bool weighted = random_bits() % 2;
  const device_bytes own_scale = on_device(scale), own_minimum = on_device(minimum),
                     own_weights(weighted ? weights.data() : 0, 4 * weights.size());
  level_outputs out(rows * sizes[0], rows * sizes[1]);
  const int32_t status = aq_fit_two_level(scale.data(), minimum.data(), weighted ? weights.data() : 0, rows, cols,
                                          group_size, scale_bits, out.sub_scale.of<uint8_t>(), out.sub_min.of<uint8_t>(),
                                          out.super_scale.of<uint16_t>(), out.super_min.of<uint16_t>());
  expect_status(kernel, where,
                aq_cuda_fit_two_level(own_scale.handle, own_minimum.handle, own_weights.handle, rows, cols, group_size,
                                      scale_bits, out.sub_scale.own.handle, out.sub_min.own.handle,
                                      out.super_scale.own.handle, out.super_min.own.handle, stream),
                status);
  out.compare(kernel, where, status == AQ_OK);
}

static void run_levels(void) {
  for (size_t cols : {1, 7, 8, 16, 31, 33, 64, 100, 160, 255, 257, 512, 777, 1030})
    for (size_t group_size : {16, 32, 64, 128}) {
      for (int32_t bits : {3, 8})
        for (int search = 1; search < 3; search++)
          for (int given = 0; given < 3; given++)
            if (!passed_over(1)) {
              const int pattern = random_bits() % 12 ? (int)(random_bits() % NOT_FINITE) : HUGE_VALUES;
              run_symmetric({1 + random_bits() % 13, cols, bits, group_size, (int32_t)(random_bits() % 6), pattern, search}, given);
            }
      for (int32_t scale_bits : {4, 6, 8})
        if (!passed_over(1)) run_fit(1 + random_bits() % 13, cols, group_size, scale_bits);
    }
  /* so many that sums in another order show, although all that is stored is rounded to few bits */
  for (int32_t bits : {3, 8})
    if (!leaves_out_large()) run_symmetric({128, 16384, bits, 16, AQ_F32, GAUSSIAN, 1}, 0);
  const device_bytes b = on_device(bytes(64));
  const char *where = "refusals of two levels";
  const auto symmetric = [&](aq_cuda_buffer weights, int32_t bits, size_t group_size, int32_t scale_bits, aq_cuda_buffer packed) {
    return aq_cuda_quantize_symmetric_levels(weights, AQ_F32, 0, 0, 1, 8, bits, group_size, scale_bits, packed, b.handle,
                                             b.handle, b.handle, b.handle, stream);
  };
  const auto fit = [&](size_t rows, size_t group_size, int32_t scale_bits) {
    return aq_cuda_fit_two_level(b.handle, b.handle, 0, rows, 8, group_size, scale_bits, b.handle, b.handle, b.handle, b.handle, stream);
  };
  expect_status("neither weights nor scales", where, symmetric(0, 3, 16, 8, b.handle), AQ_E_ARGUMENT);
  expect_status("weights without room for codes", where, symmetric(b.handle, 3, 16, 8, 0), AQ_E_ARGUMENT);
  expect_status("a symmetric grid of four bits", where, symmetric(b.handle, 4, 16, 8, b.handle), AQ_E_ARGUMENT);
  expect_status("a symmetric grid with scales of six bits", where, symmetric(b.handle, 3, 16, 6, b.handle), AQ_E_ARGUMENT);
  expect_status("a symmetric group of 256", where, symmetric(b.handle, 3, 256, 8, b.handle), AQ_E_SHAPE);
  expect_status("five scale bits", where, fit(1, 16, 5), AQ_E_ARGUMENT);
  expect_status("a group of 7", where, fit(1, 7, 4), AQ_E_SHAPE);
  expect_status("too small", where, fit(100, 16, 4), AQ_E_SHAPE);
  const device_bytes one = on_device(std::vector<float>(8, 1.0f)), negative = on_device(std::vector<float>(8, -1.0f)),
                     large = on_device(std::vector<float>(8, 1e9f)), out = on_device(bytes(64));
  const auto weighted = [&](const device_bytes &from, aq_cuda_buffer weights) {
    return aq_cuda_quantize_symmetric_levels(from.handle, AQ_F32, 0, weights, 1, 8, 8, 16, 8, out.handle, b.handle, b.handle,
                                             b.handle, b.handle, stream);
  };
  expect_status("a negative column weight", where, weighted(one, negative.handle), AQ_E_VALUE);
  expect_status("weights beyond half floats", where, weighted(large, 0), AQ_E_RANGE);
  expect_status("and both", where, weighted(large, negative.handle), AQ_E_VALUE);
  expect_status("neither", where, weighted(one, one.handle), AQ_OK);
  const device_bytes all = on_device(bytes(256));
  for (size_t at : {0, 3, 8, 15}) { /* one lane finds it, all of its warp leave */
    std::vector<float> scales(16, 1.0f);
    scales[at] = NAN;
    const device_bytes own_scales = on_device(scales);
    expect_status("a scale that is NaN", where,
                  aq_cuda_quantize_symmetric_levels(0, AQ_F32, own_scales.handle, 0, 1, 256, 8, 16, 8, 0, all.handle, all.handle,
                                                    all.handle, all.handle, stream),
                  AQ_E_NONFINITE);
  }
  expect_status("a negative group weight", where,
                aq_cuda_fit_two_level(large.handle, one.handle, negative.handle, 1, 8, 16, 4, b.handle, b.handle, b.handle,
                                      b.handle, stream),
                AQ_E_VALUE);
}
