/* int8.h: 8-bit activations and their products with packed weights on a device against the scalar oracle, to
 * the bit; included by cuda.cu behind dequantize.h. */

/* Activations on the device, rounded there as the oracle rounds them. */
struct int8_tokens {
  size_t count, cols;
  output codes, scale, zero;
  int8_tokens(size_t tokens, size_t columns) : count(tokens), cols(columns), codes(tokens * columns), scale(tokens * 4), zero(tokens * 4) {}
  void compare(const char *where, bool whole) const {
    codes.compare("quantize_activations, codes", where, whole);
    scale.compare("quantize_activations, scales", where, whole);
    zero.compare("quantize_activations, zero points", where, whole);
  }
};

/* On both sides; `status` is the oracle's. */
static void quantize_tokens(int8_tokens &out, const std::vector<float> &x, int32_t bits, int32_t kind, const char *where) {
  const device_bytes own_x = on_device(x);
  if (kind == AQ_ACTIVATIONS_STATIC) { /* what is given */
    for (size_t t = 0; t < out.count; t++) {
      out.scale.of<float>()[t] = 4.0f / (float)(1 << bits);
      out.zero.of<int32_t>()[t] = (int32_t)(random_bits() % (1u << bits));
    }
    require(aq_cuda_upload(out.scale.expected.data(), out.count * 4, out.scale.own.handle, 0, stream), "upload");
    require(aq_cuda_upload(out.zero.expected.data(), out.count * 4, out.zero.own.handle, 0, stream), "upload");
  }
  const int32_t status = aq_quantize_activations(x.data(), out.count, out.cols, bits, kind, out.codes.of<uint8_t>(), out.scale.of<float>(),
                                                 out.zero.of<int32_t>(), AQ_ISA_SCALAR, 1);
  expect_status("quantize_activations", where,
                aq_cuda_quantize_activations(own_x.handle, out.count, out.cols, bits, kind, out.codes.own.handle, out.scale.own.handle,
                                             out.zero.own.handle, stream),
                status);
  out.compare(where, status == AQ_OK);
}

/* Rounded and back, apart and in place. */
static void round_tokens(const std::vector<float> &x, size_t tokens, int32_t bits, int32_t kind, const char *where) {
  const size_t cols = x.size() / tokens;
  const float scale = 4.0f / (float)(1 << bits);
  const int32_t zero = (int32_t)(random_bits() % (1u << bits));
  const device_bytes own_x = on_device(x);
  output apart(x.size() * 4);
  const int32_t status = aq_round_activations(x.data(), tokens, cols, bits, kind, scale, zero, apart.of<float>(), AQ_ISA_SCALAR, 1);
  expect_status("round_activations", where,
                aq_cuda_round_activations(own_x.handle, tokens, cols, bits, kind, scale, zero, apart.own.handle, stream), status);
  apart.compare("round_activations", where, status == AQ_OK);
  require(aq_cuda_copy(own_x.handle, apart.own.handle, x.size() * 4, stream), "copy");
  expect_status("round_activations", where,
                aq_cuda_round_activations(apart.own.handle, tokens, cols, bits, kind, scale, zero, apart.own.handle, stream), status);
  apart.compare("round_activations, in place", where, status == AQ_OK);
}

static void run_int8_linear(size_t tokens, size_t rows, size_t cols, int32_t bits, size_t group_size, bool symmetric, bool biased) {
  char where[120];
  snprintf(where, sizeof where, "%zu tokens, %zu x %zu, %d bits, group %zu%s", tokens, rows, cols, (int)bits, group_size,
           symmetric ? ", symmetric" : "");
  uint64_t words = 0, groups = 0;
  aq_packed_words(cols, bits, &words);
  aq_group_count(cols, group_size, &groups);
  const bytes packed = random_bytes(rows * words * 4); /* bits behind a row's codes are set, too */
  const std::vector<uint16_t> scale = random_halves(rows * groups, 0.05f), zero = random_halves(rows * groups, 4.0f);
  const std::vector<float> x = normal_values(tokens * cols, 1.0f), bias = normal_values(rows, 1.0f);
  int8_tokens codes(tokens, cols);
  quantize_tokens(codes, x, 2 + (int32_t)(random_bits() % 7), random_bits() % 2 ? AQ_ACTIVATIONS_STATIC : AQ_ACTIVATIONS_PER_TOKEN, where);
  for (int32_t kind : {AQ_ACTIVATIONS_STATIC, AQ_ACTIVATIONS_PER_TOKEN}) round_tokens(x, tokens, 2 + (int32_t)(random_bits() % 7), kind, where);
  const device_bytes own = on_device(packed), own_scale = on_device(scale), own_zero(symmetric ? 0 : zero.data(), zero.size() * 2),
                     own_bias = on_device_or_null(bias, biased);
  output out(tokens * rows * 4);
  BOTH("linear_packed_int8",
       aq_linear_packed_int8(codes.codes.of<uint8_t>(), codes.scale.of<float>(), codes.zero.of<int32_t>(), tokens,
                             (const uint32_t *)packed.data(), scale.data(), symmetric ? 0 : zero.data(), biased ? bias.data() : 0, rows,
                             cols, bits, group_size, out.of<float>(), AQ_ISA_SCALAR, 1),
       aq_cuda_linear_packed_int8(codes.codes.own.handle, codes.scale.own.handle, codes.zero.own.handle, tokens, own.handle,
                                  own_scale.handle, own_zero.handle, own_bias.handle, rows, cols, bits, group_size, out.own.handle,
                                  stream));
  out.compare("linear_packed_int8", where, true);
}

/* Values at the ends of what float32 holds, faults in the data and in what is given. */
static void run_activation_ends(void) {
  const float ends[][2] = {{3e38f, -3e38f}, {1e-44f, 0.0f}, {-1e-40f, 1e-40f}, {0.0f, -0.0f}, {5.0f, 3.0f}, {-2.0f, -7.0f}, {1.0f, NAN}, {-INFINITY, 1.0f}};
  for (const float *end : ends)
    for (int32_t kind : {AQ_ACTIVATIONS_STATIC, AQ_ACTIVATIONS_PER_TOKEN}) {
      std::vector<float> x(3 * 300);
      for (size_t i = 0; i < x.size(); i++) x[i] = end[i % 2];
      int8_tokens out(3, 300);
      quantize_tokens(out, x, 5, kind, "ends");
      round_tokens(x, 3, 5, kind, "ends");
    }
  const device_bytes b = on_device(bytes(64));
  const char *where = "refusals of 8-bit activations";
  const auto given = [&](float scale, int32_t zero) {
    const std::vector<float> own_scale = {scale, 1.0f}, x = {1.0f, NAN};
    const std::vector<int32_t> own_zero = {zero, 0};
    const device_bytes s = on_device(own_scale), z = on_device(own_zero), v = on_device(x);
    return aq_cuda_quantize_activations(v.handle, 2, 1, 4, AQ_ACTIVATIONS_STATIC, b.handle, s.handle, z.handle, stream);
  };
  for (float scale : {0.0f, -1.0f, 1e-39f, INFINITY, NAN}) expect_status("a scale", where, given(scale, 0), AQ_E_VALUE);
  for (int32_t zero : {-1, 16, INT32_MAX}) expect_status("a zero point", where, given(1.0f, zero), AQ_E_VALUE);
  expect_status("a value", where, given(1.0f, 15), AQ_E_NONFINITE);
  const auto quantized = [&](size_t cols, int32_t bits, int32_t kind) {
    return aq_cuda_quantize_activations(b.handle, 1, cols, bits, kind, b.handle, b.handle, b.handle, stream);
  };
  expect_status("a bit", where, quantized(4, 1, AQ_ACTIVATIONS_PER_TOKEN), AQ_E_ARGUMENT);
  expect_status("nine bits", where, quantized(4, 9, AQ_ACTIVATIONS_PER_TOKEN), AQ_E_ARGUMENT);
  expect_status("kind", where, quantized(4, 8, 2), AQ_E_ARGUMENT);
  expect_status("too small", where, quantized(100, 8, AQ_ACTIVATIONS_PER_TOKEN), AQ_E_SHAPE);
  expect_status("no columns", where, aq_cuda_quantize_activations(0, 3, 0, 8, AQ_ACTIVATIONS_PER_TOKEN, 0, 0, 0, stream), AQ_OK);
  const auto rounded = [&](size_t cols, int32_t bits, int32_t kind, float scale, int32_t zero) {
    return aq_cuda_round_activations(b.handle, 1, cols, bits, kind, scale, zero, b.handle, stream);
  };
  expect_status("a bit", where, rounded(4, 1, AQ_ACTIVATIONS_PER_TOKEN, 1.0f, 0), AQ_E_ARGUMENT);
  expect_status("kind", where, rounded(4, 8, 2, 1.0f, 0), AQ_E_ARGUMENT);
  expect_status("too small", where, rounded(100, 8, AQ_ACTIVATIONS_STATIC, 1.0f, 0), AQ_E_SHAPE);
  for (float scale : {0.0f, 1e-39f, INFINITY, NAN}) expect_status("a scale", where, rounded(4, 8, AQ_ACTIVATIONS_STATIC, scale, 0), AQ_E_VALUE);
  for (int32_t zero : {-1, 256}) expect_status("a zero point", where, rounded(4, 8, AQ_ACTIVATIONS_STATIC, 1.0f, zero), AQ_E_VALUE);
  expect_status("no tokens", where, aq_cuda_round_activations(0, 0, 4, 8, AQ_ACTIVATIONS_STATIC, 1.0f, 0, 0, stream), AQ_OK);
  const auto multiplied = [&](size_t tokens, size_t cols, int32_t bits, size_t group_size) {
    return aq_cuda_linear_packed_int8(b.handle, b.handle, b.handle, tokens, b.handle, b.handle, 0, 0, 1, cols, bits, group_size, b.handle, stream);
  };
  expect_status("five bits", where, multiplied(1, 8, 5, 0), AQ_E_ARGUMENT);
  expect_status("a group of 7", where, multiplied(1, 8, 4, 7), AQ_E_SHAPE);
  expect_status("too few codes", where, multiplied(9, 100, 4, 0), AQ_E_SHAPE);
  expect_status("no tokens", where, multiplied(0, 8, 4, 0), AQ_OK);
  const std::vector<float> bias = {2.5f};
  const device_bytes own_bias = on_device(bias);
  output out(4);
  *out.of<float>() = 2.5f;
  expect_status("no columns", where, aq_cuda_linear_packed_int8(0, b.handle, b.handle, 1, 0, 0, 0, own_bias.handle, 1, 0, 4, 0, out.own.handle, stream),
                AQ_OK);
  out.compare("linear_packed_int8", "no columns", true);
}

static void run_int8(void) {
  for (size_t cols : {1, 7, 8, 16, 31, 33, 64, 100, 257, 512, 777})
    for (int32_t bits : {2, 3, 4, 8})
      for (size_t group_size : {0, 16, 32, 64, 128, 256})
        if (!passed_over(1))
          run_int8_linear(1 + random_bits() % 18, 1 + random_bits() % 19, cols, bits, group_size, random_bits() % 2, random_bits() % 2);
  for (size_t group_size : {0, 16, 128})
    if (group_size == 0 || !leaves_out_large()) run_int8_linear(70, 150, 520, 4, group_size, false, true); /* more than a tile each way */
  if (!leaves_out_large()) run_int8_linear(3, 2, 9000, 8, 0, false, false);
  run_activation_ends();
}
