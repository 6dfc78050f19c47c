/* dequantize.h: the weights of packed matrices on a device, of random codes on random grids, against the
 * scalar oracle, to the bit; included by cuda.cu behind forward.h. */

/* Half floats of some size, and now and then a zero, a denormal or a largest one. */
static std::vector<uint16_t> random_halves(size_t n, float size) {
  const uint16_t odd[] = {0, 0x8000, 1, 0x83ff, 0x7bff, 0xfbff};
  const std::vector<float> values = normal_values(n, size);
  std::vector<uint16_t> halves(n);
  aq_convert(values.data(), AQ_F32, halves.data(), AQ_F16, n, AQ_ISA_SCALAR, 1);
  for (uint16_t &half : halves)
    if (random_bits() % 20 == 0) half = odd[random_bits() % COUNT(odd)];
  return halves;
}

static void run_one_level(size_t rows, size_t cols, int32_t bits, size_t group_size, bool symmetric) {
  uint64_t words = 0, groups = 0;
  aq_packed_words(cols, bits, &words);
  aq_group_count(cols, group_size, &groups);
  const bytes packed = random_bytes(rows * words * 4);
  const std::vector<uint16_t> scale = random_halves(rows * groups, 0.05f), zero = random_halves(rows * groups, 4.0f);
  const device_bytes own = on_device(packed), own_scale = on_device(scale), own_zero(symmetric ? 0 : zero.data(), zero.size() * 2);
  for (int32_t dtype = AQ_F32; dtype <= AQ_BF16; dtype++) {
    char where[96];
    snprintf(where, sizeof where, "%zu x %zu, %d bits, group %zu%s, dtype %d", rows, cols, (int)bits, group_size,
             symmetric ? ", symmetric" : "", (int)dtype);
    output out(rows * cols * dtype_bytes(dtype));
    BOTH("dequantize",
         aq_dequantize((const uint32_t *)packed.data(), scale.data(), symmetric ? 0 : zero.data(), rows, cols, bits, group_size,
                       out.of<void>(), dtype, AQ_ISA_SCALAR, 1),
         aq_cuda_dequantize(own.handle, own_scale.handle, own_zero.handle, rows, cols, bits, group_size, out.own.handle, dtype, stream));
    out.compare("dequantize", where, true);
  }
}

static void run_two_levels(size_t rows, size_t cols, int32_t bits, size_t group_size, int32_t scale_bits) {
  uint64_t words = 0, sizes[2] = {0, 0};
  aq_packed_words(cols, bits, &words);
  aq_two_level_sizes(cols, group_size, scale_bits, sizes);
  const bytes packed = random_bytes(rows * words * 4);
  bytes sub_scale = random_bytes(rows * sizes[0]), sub_min = random_bytes(rows * sizes[0]);
  if (scale_bits == AQ_OFFSET_BITS) { /* they are half floats themselves */
    const std::vector<uint16_t> scales = random_halves(rows * sizes[0] / 2, 0.05f), offsets = random_halves(rows * sizes[0] / 2, 1.0f);
    memcpy(sub_scale.data(), scales.data(), sub_scale.size());
    memcpy(sub_min.data(), offsets.data(), sub_min.size());
  }
  const std::vector<uint16_t> super_scale = random_halves(rows * sizes[1], 0.01f), super_min = random_halves(rows * sizes[1], 0.01f);
  const device_bytes own = on_device(packed), own_scale = on_device(sub_scale), own_min = on_device(sub_min),
                     own_super = on_device(super_scale), own_super_min = on_device(super_min);
  for (int32_t dtype = AQ_F32; dtype <= AQ_BF16; dtype++) {
    char where[96];
    snprintf(where, sizeof where, "%zu x %zu, %d bits, group %zu, %d scale bits, dtype %d", rows, cols, (int)bits, group_size,
             (int)scale_bits, (int)dtype);
    output out(rows * cols * dtype_bytes(dtype));
    BOTH("dequantize, two levels",
         aq_dequantize_two_level((const uint32_t *)packed.data(), sub_scale.data(), sub_min.data(), super_scale.data(), super_min.data(),
                                 rows, cols, bits, group_size, scale_bits, out.of<void>(), dtype, AQ_ISA_SCALAR, 1),
         aq_cuda_dequantize_two_level(own.handle, own_scale.handle, own_min.handle, own_super.handle, own_super_min.handle, rows, cols,
                                      bits, group_size, scale_bits, out.own.handle, dtype, stream));
    out.compare("dequantize, two levels", where, true);
  }
}

static void run_dequantize(void) {
  for (size_t cols : {1, 7, 8, 16, 31, 33, 64, 100, 257, 512, 777, 1030})
    for (int32_t bits : {2, 3, 4, 8}) {
      for (size_t group_size : {0, 16, 32, 64, 128, 256})
        if (!passed_over(1)) run_one_level(1 + random_bits() % 19, cols, bits, group_size, random_bits() % 2);
      for (size_t group_size : {16, 32, 64, 128})
        for (int32_t scale_bits : {4, 6, 8, AQ_OFFSET_BITS})
          if (!passed_over(1)) run_two_levels(1 + random_bits() % 9, cols, bits, group_size, scale_bits);
    }
  const device_bytes b = on_device(bytes(64));
  const char *where = "refusals of dequantize";
  const auto plain = [&](int32_t bits, size_t group_size, int32_t dtype, size_t cols) {
    return aq_cuda_dequantize(b.handle, b.handle, b.handle, 1, cols, bits, group_size, b.handle, dtype, stream);
  };
  const auto levels = [&](size_t group_size, int32_t scale_bits) {
    return aq_cuda_dequantize_two_level(b.handle, b.handle, b.handle, b.handle, b.handle, 1, 8, 4, group_size, scale_bits, b.handle, AQ_F32,
                                        stream);
  };
  expect_status("five bits", where, plain(5, 0, AQ_F32, 8), AQ_E_ARGUMENT);
  expect_status("a group of 7", where, plain(4, 7, AQ_F32, 8), AQ_E_SHAPE);
  expect_status("to float64", where, plain(4, 0, AQ_F64, 8), AQ_E_ARGUMENT);
  expect_status("too small", where, plain(4, 0, AQ_F32, 1000), AQ_E_SHAPE);
  expect_status("a group of 256 in two levels", where, levels(256, 4), AQ_E_SHAPE);
  expect_status("five scale bits", where, levels(16, 5), AQ_E_ARGUMENT);
  expect_status("no rows", where, aq_cuda_dequantize(0, 0, 0, 0, 8, 4, 0, 0, AQ_F32, stream), AQ_OK);
}
