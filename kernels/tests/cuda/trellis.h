/* trellis.h: trellis codes on a device against the scalar oracle: weights and products with 8-bit activations
 * to the bit, those with float32 activations within the sums' rounding; included by cuda.cu. */

static void run_trellis(int32_t bits, size_t rows, size_t cols, size_t group_size, size_t tokens, bool with_bias) {
  char where[96];
  snprintf(where, sizeof where, "%d bits, %zu x %zu, group %zu, %zu tokens", (int)bits, rows, cols, group_size, tokens);
  uint64_t words = 0, groups = 0;
  aq_packed_words(cols, bits, &words);
  aq_group_count(cols, group_size, &groups);
  std::vector<uint32_t> packed(rows * words);
  for (uint32_t &word : packed) word = random_bits();
  const auto halves = [&](float size) {
    std::vector<float> values(rows * groups);
    for (float &value : values) value = size * gaussian();
    std::vector<uint16_t> bits(values.size());
    aq_convert(values.data(), AQ_F32, bits.data(), AQ_F16, bits.size(), AQ_ISA_SCALAR, 1);
    return bits;
  };
  const std::vector<uint16_t> scale = halves(0.05f), offset = halves(0.01f);
  std::vector<float> x(tokens * cols), bias(rows);
  for (float &value : x) value = gaussian();
  for (float &value : bias) value = gaussian();
  const device_bytes own_packed = on_device(packed), own_scale = on_device(scale), own_offset = on_device(offset);
  for (int32_t dtype = AQ_F32; dtype <= AQ_BF16; dtype++) {
    output out(rows * cols * dtype_bytes(dtype));
    aq_dequantize_trellis(packed.data(), scale.data(), offset.data(), rows, cols, bits, group_size, out.of<void>(), dtype,
                          AQ_ISA_SCALAR, 1);
    expect_status("dequantize_trellis", where,
                  aq_cuda_dequantize_trellis(own_packed.handle, own_scale.handle, own_offset.handle, rows, cols, bits,
                                             group_size, out.own.handle, dtype, stream),
                  AQ_OK);
    out.compare("dequantize_trellis", where, true);
  }
  const device_bytes own_x = on_device(x), own_bias(with_bias ? bias.data() : 0, 4 * rows);
  output floats(tokens * rows * 4), integers(tokens * rows * 4);
  aq_linear_trellis(x.data(), tokens, packed.data(), scale.data(), offset.data(), with_bias ? bias.data() : 0, rows, cols,
                    bits, group_size, floats.of<float>(), AQ_ISA_SCALAR, 1);
  expect_status("linear_trellis", where,
                aq_cuda_linear_trellis(own_x.handle, tokens, own_packed.handle, own_scale.handle, own_offset.handle,
                                       own_bias.handle, rows, cols, bits, group_size, floats.own.handle, stream),
                AQ_OK);
  bytes found(floats.own.size + GUARD);
  require(aq_cuda_download(floats.own.handle, 0, found.data(), found.size(), stream), "download");
  std::vector<float> weights(rows * cols), tolerance(tokens * rows);
  aq_dequantize_trellis(packed.data(), scale.data(), offset.data(), rows, cols, bits, group_size, weights.data(), AQ_F32,
                        AQ_ISA_SCALAR, 1);
  for (size_t i = 0; i < tokens * rows; i++) {
    double magnitude = fabs((double)bias[i % rows]);
    for (size_t k = 0; k < cols; k++) magnitude += fabs((double)x[i / rows * cols + k] * (double)weights[i % rows * cols + k]);
    tolerance[i] = (float)(tokens > 8 ? PARTS_LARGEST * magnitude : 1e-6 * (double)cols);
  }
  expect_close("linear_trellis", where, floats.of<float>(), (const float *)found.data(), tokens * rows, tolerance.data(), 0);
  std::vector<uint8_t> codes(tokens * cols);
  std::vector<float> x_scale(tokens);
  std::vector<int32_t> x_zero(tokens);
  aq_quantize_activations(x.data(), tokens, cols, 8, AQ_ACTIVATIONS_PER_TOKEN, codes.data(), x_scale.data(),
                          x_zero.data(), AQ_ISA_SCALAR, 1);
  const device_bytes own_codes = on_device(codes), own_x_scale = on_device(x_scale), own_x_zero = on_device(x_zero);
  aq_linear_trellis_int8(codes.data(), x_scale.data(), x_zero.data(), tokens, packed.data(), scale.data(), offset.data(),
                         with_bias ? bias.data() : 0, rows, cols, bits, group_size, integers.of<float>(), AQ_ISA_SCALAR, 1);
  expect_status("linear_trellis_int8", where,
                aq_cuda_linear_trellis_int8(own_codes.handle, own_x_scale.handle, own_x_zero.handle, tokens,
                                            own_packed.handle, own_scale.handle, own_offset.handle, own_bias.handle, rows,
                                            cols, bits, group_size, integers.own.handle, stream),
                AQ_OK);
  integers.compare("linear_trellis_int8", where, true);
}

static void run_rotation(size_t batch, size_t rows, size_t cols) {
  char where[80];
  snprintf(where, sizeof where, "%zu of %zu x %zu", batch, rows, cols);
  const std::vector<float> x = normal_values(batch * rows * cols, 1.0f);
  const device_bytes own_x = on_device(x);
  changed<float> there{std::vector<float>(x.size())};
  const int32_t seed = (int32_t)random_bits();
  BOTH("rotate", aq_rotate(x.data(), batch, rows, cols, seed, 0, there.expected.data(), 1),
       aq_cuda_rotate(own_x.handle, batch, rows, cols, seed, 0, there.own.handle, stream));
  there.compare("rotate", where);
  BOTH("rotate back, in place", aq_rotate(there.expected.data(), batch, rows, cols, seed, 1, there.expected.data(), 1),
       aq_cuda_rotate(there.own.handle, batch, rows, cols, seed, 1, there.own.handle, stream));
  there.compare("rotate back, in place", where);
}

static void run_rotations(void) {
  for (size_t rows : {1, 2, 3, 4, 8, 12, 96, 100, 320, 1024, 1600, 2048})
    for (size_t cols : {1, 3, 31, 100}) run_rotation(1 + random_bits() % 5, rows, cols);
  run_rotation(3, 4096, 1);
  run_rotation(2, 24576, 1);
  run_rotation(1, 65536, 2);
  run_rotation(5000, 2, 1);
  run_rotation(1, 2, 5000);
  const device_bytes b = on_device(bytes(64));
  expect_status("rotate", "too small", aq_cuda_rotate(b.handle, 1, 400, 5, 1, 0, b.handle, stream), AQ_E_SHAPE);
  expect_status("rotate", "too many", aq_cuda_rotate(b.handle, SIZE_MAX, 4, 5, 1, 0, b.handle, stream), AQ_E_SHAPE);
  expect_status("rotate", "nothing", aq_cuda_rotate(0, 0, 4, 5, 1, 0, 0, stream), AQ_OK);
}

static void run_trellis_shapes(void) {
  run_rotations();
  for (int32_t bits : {2, 3}) {
    for (size_t cols : {1, 3, 15, 16, 17, 31, 64, 65, 100, 256, 257, 1000})
      for (size_t group_size : {0, 16, 64, 256})
        if (!quick || random_bits() % 4 == 0)
          run_trellis(bits, 1 + random_bits() % 19, cols, group_size, 1 + random_bits() % 18, random_bits() % 2);
    run_trellis(bits, 3, 9000, 0, 2, true);
  }
  const std::vector<uint32_t> word(1);
  const device_bytes b = on_device(word);
  const auto dequantized = [&](int32_t bits, size_t group_size, int32_t dtype) {
    return aq_cuda_dequantize_trellis(b.handle, b.handle, b.handle, 1, 1, bits, group_size, b.handle, dtype, stream);
  };
  expect_status("dequantize_trellis", "4 bits", dequantized(4, 0, AQ_F32), AQ_E_ARGUMENT);
  expect_status("dequantize_trellis", "group", dequantized(2, 7, AQ_F32), AQ_E_SHAPE);
  expect_status("dequantize_trellis", "to float64", dequantized(2, 0, AQ_F64), AQ_E_ARGUMENT);
  const std::vector<float> bias = {2.5f};
  const device_bytes own_bias = on_device(bias);
  output out(4);
  *out.of<float>() = 2.5f;
  expect_status("linear_trellis", "no columns",
                aq_cuda_linear_trellis(0, 1, 0, 0, 0, own_bias.handle, 1, 0, 2, 0, out.own.handle, stream), AQ_OK);
  out.compare("linear_trellis", "no columns", true);
  expect_status("linear_trellis", "no tokens", aq_cuda_linear_trellis(0, 0, 0, 0, 0, 0, 1, 1, 2, 0, 0, stream), AQ_OK);
}
