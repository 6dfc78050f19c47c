/* forward.h: linear layers and the parts of a forward pass on a device against the scalar oracle, within
 * tolerances; included by cuda.cu behind solver.h. */

/* An output of floats against the oracle's: |difference| <= relative (|expected| + scale). */
struct floats_out {
  std::vector<float> expected;
  device_bytes own;
  explicit floats_out(size_t n) : expected(n, 7.0f), own(bytes(n * 4, 0xcd).data(), n * 4) {}
  explicit floats_out(const std::vector<float> &from) : expected(from), own(from.data(), from.size() * 4) {}
  void compare(const char *what, const char *where, double relative, double scale) const {
    bytes actual(own.size + GUARD);
    require(aq_cuda_download(own.handle, 0, actual.data(), actual.size(), stream), "download");
    std::vector<float> tolerance(expected.size());
    for (size_t i = 0; i < expected.size(); i++) tolerance[i] = (float)(relative * (fabs((double)expected[i]) + scale));
    expect_close(what, where, expected.data(), (const float *)actual.data(), expected.size(), tolerance.data(), 0);
  }
};

static device_bytes on_device_or_null(const std::vector<float> &values, bool there) {
  return device_bytes(there ? values.data() : 0, values.size() * 4);
}

#define FORWARD_TOLERANCE 2e-5
#define LINEAR_TOLERANCE 5e-5 /* of more than one token: sums of products of parts */

static void run_linear(size_t tokens, size_t rows, size_t cols, int32_t bits, size_t group_size, bool biased) {
  char where[120];
  snprintf(where, sizeof where, "%zu tokens, %zu x %zu, %d bits, group %zu", tokens, rows, cols, bits, group_size);
  const std::vector<float> x = normal_values(tokens * cols, 1.0f), w = normal_values(rows * cols, 1.0f), b = normal_values(rows, 1.0f);
  const float *bias = biased ? b.data() : 0;
  const device_bytes own_x = on_device(x), own_bias = on_device_or_null(b, biased);
  const double scale = sqrt((double)cols), tolerance = tokens > 1 ? LINEAR_TOLERANCE : FORWARD_TOLERANCE;
  for (int32_t dtype : {AQ_F32, AQ_F16, AQ_BF16}) {
    bytes stored(rows * cols * dtype_bytes(dtype));
    aq_convert(w.data(), AQ_F32, stored.data(), dtype, rows * cols, AQ_ISA_SCALAR, 1);
    const device_bytes own_w = on_device(stored);
    floats_out out(tokens * rows);
    BOTH("linear", aq_linear(x.data(), tokens, stored.data(), dtype, bias, rows, cols, out.expected.data(), AQ_ISA_SCALAR, 1),
         aq_cuda_linear(own_x.handle, tokens, own_w.handle, dtype, own_bias.handle, rows, cols, out.own.handle, stream));
    out.compare("linear", where, tolerance, scale);
  }
  uint64_t words = 0, groups = 0;
  aq_packed_words(cols, bits, &words);
  aq_group_count(cols, group_size, &groups);
  std::vector<uint32_t> packed(rows * words);
  std::vector<uint16_t> s(rows * groups), z(rows * groups);
  for (int symmetric = 0; symmetric < 2; symmetric++) {
    aq_quantize_round(w.data(), AQ_F32, rows, cols, bits, group_size, symmetric ? AQ_ZERO_POINT_SYMMETRIC : AQ_ZERO_POINT_REAL,
                      packed.data(), s.data(), symmetric ? 0 : z.data(), AQ_ISA_SCALAR, 1);
    const device_bytes own_packed = on_device(packed), own_s = on_device(s), own_z(symmetric ? 0 : z.data(), z.size() * 2);
    floats_out out(tokens * rows);
    BOTH("linear, packed",
         aq_linear_packed(x.data(), tokens, packed.data(), s.data(), symmetric ? 0 : z.data(), bias, rows, cols, bits, group_size,
                          out.expected.data(), AQ_ISA_SCALAR, 1),
         aq_cuda_linear_packed(own_x.handle, tokens, own_packed.handle, own_s.handle, own_z.handle, own_bias.handle, rows, cols, bits,
                               group_size, out.own.handle, stream));
    out.compare("linear, packed", where, tolerance, scale);
  }
  for (int32_t scale_bits : {4, 6}) {
    if (group_size == 0 || group_size > 128) continue;
    uint64_t sizes[2];
    aq_two_level_sizes(cols, group_size, scale_bits, sizes);
    bytes sub_scale(rows * sizes[0]), sub_min(rows * sizes[0]);
    std::vector<uint16_t> super_scale(rows * sizes[1]), super_min(rows * sizes[1]);
    aq_quantize_two_level(w.data(), AQ_F32, rows, cols, bits, group_size, scale_bits, 0, 0, packed.data(), sub_scale.data(),
                          sub_min.data(), super_scale.data(), super_min.data(), AQ_ISA_SCALAR, 1);
    const device_bytes p = on_device(packed), ss = on_device(sub_scale), sm = on_device(sub_min), ps = on_device(super_scale),
                       pm = on_device(super_min);
    floats_out out(tokens * rows);
    BOTH("linear, two levels",
         aq_linear_two_level(x.data(), tokens, packed.data(), sub_scale.data(), sub_min.data(), super_scale.data(), super_min.data(),
                             bias, rows, cols, bits, group_size, scale_bits, out.expected.data(), AQ_ISA_SCALAR, 1),
         aq_cuda_linear_two_level(own_x.handle, tokens, p.handle, ss.handle, sm.handle, ps.handle, pm.handle, own_bias.handle, rows,
                                  cols, bits, group_size, scale_bits, out.own.handle, stream));
    out.compare("linear, two levels", where, tolerance, scale);
  }
}

/* Codes whose groups have half floats of their own: a scale and what a code of 0 is. */
static void run_offset_linear(size_t tokens, size_t rows, size_t cols, int32_t bits, size_t group_size) {
  char where[120];
  snprintf(where, sizeof where, "%zu tokens, %zu x %zu, %d bits, group %zu", tokens, rows, cols, bits, group_size);
  uint64_t words = 0, groups = 0;
  aq_packed_words(cols, bits, &words);
  aq_group_count(cols, group_size, &groups);
  const std::vector<float> x = normal_values(tokens * cols, 1.0f), w = normal_values(rows * cols, 1.0f);
  std::vector<uint32_t> packed(rows * words);
  std::vector<uint16_t> s(rows * groups), offset(rows * groups);
  aq_quantize_round(w.data(), AQ_F32, rows, cols, bits, group_size, AQ_ZERO_POINT_OFFSET, packed.data(), s.data(), offset.data(),
                    AQ_ISA_SCALAR, 1);
  const size_t supers = (cols - 1) / 256 + 1;
  const std::vector<uint16_t> one(rows * supers, 0x3c00), minus_one(rows * supers, 0xbc00);
  const device_bytes own_x = on_device(x), own_packed = on_device(packed), own_s = on_device(s), own_offset = on_device(offset),
                     own_one = on_device(one), own_minus_one = on_device(minus_one);
  floats_out out(tokens * rows);
  BOTH("linear, offsets",
       aq_linear_two_level(x.data(), tokens, packed.data(), (const uint8_t *)s.data(), (const uint8_t *)offset.data(), one.data(),
                           minus_one.data(), 0, rows, cols, bits, group_size, AQ_OFFSET_BITS, out.expected.data(), AQ_ISA_SCALAR, 1),
       aq_cuda_linear_two_level(own_x.handle, tokens, own_packed.handle, own_s.handle, own_offset.handle, own_one.handle,
                                own_minus_one.handle, 0, rows, cols, bits, group_size, AQ_OFFSET_BITS, out.own.handle, stream));
  out.compare("linear, offsets", where, tokens > 1 ? LINEAR_TOLERANCE : FORWARD_TOLERANCE, sqrt((double)cols));
}

static void run_far_position(void) {
  const std::vector<float> x = normal_values(2 * 8, 1.0f);
  const std::vector<int32_t> positions = {3, INT32_MAX};
  const device_bytes own_positions = on_device(positions);
  floats_out turned(x);
  expect_status("rotary", "a position beyond all", aq_cuda_rotary(turned.own.handle, own_positions.handle, 2, 1, 8, 1e4, stream),
                aq_rotary(turned.expected.data(), positions.data(), 2, 1, 8, 1e4, AQ_ISA_SCALAR, 1));
}

static void run_rows_and_elements(size_t rows, size_t cols, bool weighted) {
  char where[80];
  snprintf(where, sizeof where, "%zu x %zu", rows, cols);
  const size_t n = rows * cols;
  const std::vector<float> x = normal_values(n, 3.0f), y = normal_values(n, 2.0f), w = normal_values(cols, 1.0f), b = normal_values(cols, 1.0f);
  const device_bytes own_x = on_device(x), own_y = on_device(y), own_w = on_device_or_null(w, weighted), own_b = on_device_or_null(b, weighted);
  const float *weight = weighted ? w.data() : 0, *bias = weighted ? b.data() : 0;
  const auto close = [&](const char *what, const floats_out &out) { out.compare(what, where, FORWARD_TOLERANCE, 1.0); };
#define ONE(what, oracle, device)     \
  do {                                \
    floats_out out(n);                \
    float *to = out.expected.data();  \
    const aq_cuda_buffer own = out.own.handle; \
    BOTH(what, oracle, device);       \
    close(what, out);                 \
  } while (0)
  ONE("rms norm", aq_rms_norm(x.data(), rows, cols, weight, 1e-6f, to, AQ_ISA_SCALAR, 1),
      aq_cuda_rms_norm(own_x.handle, rows, cols, own_w.handle, 1e-6f, own, stream));
  ONE("layer norm", aq_layer_norm(x.data(), rows, cols, weight, bias, 1e-6f, to, AQ_ISA_SCALAR, 1),
      aq_cuda_layer_norm(own_x.handle, rows, cols, own_w.handle, own_b.handle, 1e-6f, own, stream));
  ONE("silu", aq_silu(x.data(), n, to, AQ_ISA_SCALAR, 1), aq_cuda_silu(own_x.handle, n, own, stream));
  ONE("gelu", aq_gelu_tanh(x.data(), n, to, AQ_ISA_SCALAR, 1), aq_cuda_gelu_tanh(own_x.handle, n, own, stream));
  ONE("silu times up", aq_silu_multiply(x.data(), y.data(), n, to, AQ_ISA_SCALAR, 1),
      aq_cuda_silu_multiply(own_x.handle, own_y.handle, n, own, stream));
  ONE("add", aq_add(x.data(), y.data(), n, to, AQ_ISA_SCALAR, 1), aq_cuda_add(own_x.handle, own_y.handle, n, own, stream));
  const std::vector<float> chunks = normal_values(rows * 3 * cols, 1.0f);
  const device_bytes own_chunks = on_device(chunks);
  ONE("modulate", aq_modulate(x.data(), chunks.data(), chunks.data(), 3 * cols, rows, 1, cols, to, AQ_ISA_SCALAR, 1),
      aq_cuda_modulate(own_x.handle, own_chunks.handle, own_chunks.handle, 3 * cols, rows, 1, cols, own, stream));
  ONE("gated sum", aq_gate_add(y.data(), chunks.data(), x.data(), cols, 1, rows, cols, to, AQ_ISA_SCALAR, 1),
      aq_cuda_gate_add(own_y.handle, own_chunks.handle, own_x.handle, cols, 1, rows, cols, own, stream));
}

static void run_attention(size_t batch, size_t tokens, size_t heads, size_t kv_heads, size_t size, size_t block, bool masked) {
  char where[120];
  snprintf(where, sizeof where, "%zu x %zu tokens, %zu of %zu heads of %zu, block %zu", batch, tokens, heads, kv_heads, size, block);
  const size_t n = batch * tokens * heads * size, kv = batch * tokens * kv_heads * size;
  const std::vector<float> q = normal_values(n, 1.0f), k = normal_values(kv, 1.0f), v = normal_values(kv, 1.0f);
  bytes mask(batch * tokens);
  for (uint8_t &own : mask) own = random_bits() % 3 > 0;
  const device_bytes own_q = on_device(q), own_k = on_device(k), own_v = on_device(v), own_mask(masked ? mask.data() : 0, mask.size());
  floats_out out(n);
  BOTH("attention",
       aq_attention(q.data(), k.data(), v.data(), masked ? mask.data() : 0, batch, tokens, heads, kv_heads, size, block, 0.3f,
                    out.expected.data(), AQ_ISA_SCALAR, 1),
       aq_cuda_attention(own_q.handle, own_k.handle, own_v.handle, own_mask.handle, batch, tokens, heads, kv_heads, size, block, 0.3f,
                         out.own.handle, stream));
  out.compare("attention", where, FORWARD_TOLERANCE, 1.0);
  std::vector<int32_t> positions(batch * tokens);
  for (int32_t &position : positions) position = (int32_t)(random_bits() % 5000) - 100;
  floats_out turned(q);
  if (size % 2 == 0) {
    const device_bytes own_positions = on_device(positions);
    BOTH("rotary", aq_rotary(turned.expected.data(), positions.data(), batch * tokens, heads, size, 1e4, AQ_ISA_SCALAR, 1),
         aq_cuda_rotary(turned.own.handle, own_positions.handle, batch * tokens, heads, size, 1e4, stream));
    turned.compare("rotary", where, FORWARD_TOLERANCE, 1.0);
  }
}

static void run_patches(size_t batch, size_t channels, size_t height, size_t width, size_t patch) {
  const size_t n = batch * channels * height * width;
  const std::vector<float> images = normal_values(n, 1.0f);
  const device_bytes own = on_device(images);
  changed<float> there{std::vector<float>(n)}, back{std::vector<float>(n)};
  const char *where = "patches";
  BOTH("patchify", aq_patchify(images.data(), batch, channels, height, width, patch, there.expected.data(), 1),
       aq_cuda_patchify(own.handle, batch, channels, height, width, patch, there.own.handle, stream));
  BOTH("unpatchify", aq_unpatchify(images.data(), batch, channels, height, width, patch, back.expected.data(), 1),
       aq_cuda_unpatchify(own.handle, batch, channels, height, width, patch, back.own.handle, stream));
  there.compare("patchify", where);
  back.compare("unpatchify", where);
  expect_status("a patch that does not divide", where,
                aq_cuda_patchify(own.handle, batch, channels, height, width, height + 1, there.own.handle, stream), AQ_E_SHAPE);
}

/* Heads that a lane's registers have no room for. */
static void run_large_heads(void) {
  const char *where = "heads of 257";
  const std::vector<float> values(257);
  const device_bytes b = on_device(values), out = on_device(values);
  expect_status("attention", where, aq_cuda_attention(b.handle, b.handle, b.handle, 0, 1, 1, 1, 1, 257, 0, 1.0f, out.handle, stream),
                AQ_E_UNSUPPORTED);
  expect_status("attention, backward", where,
                aq_cuda_attention_backward(b.handle, b.handle, b.handle, b.handle, b.handle, 0, 1, 1, 1, 1, 257, 1.0f, out.handle, out.handle,
                                           out.handle, stream),
                AQ_E_UNSUPPORTED);
}

static void run_forward(void) {
  run_large_heads();
  for (size_t tokens : {1, 2, 9}) {
    run_linear(tokens, 1, 1, 4, 0, true);
    run_linear(tokens, 13, 67, 3, 16, false);
    run_linear(tokens, 40, 300, 2, 32, true);
    run_linear(tokens, 9, 264, 4, 64, false);
    run_linear(tokens, 5, 130, 8, 256, true);
  }
  run_linear(70, 130, 96, 4, 32, true);
  for (size_t tokens : {1, 5}) {
    run_offset_linear(tokens, 1, 1, 4, 16);
    run_offset_linear(tokens, 13, 67, 3, 16);
    run_offset_linear(tokens, 9, 600, 2, 64);
    run_offset_linear(tokens, 5, 130, 8, 128);
  }
  run_far_position();
  run_rows_and_elements(1, 1, true);
  run_rows_and_elements(3, 300, false);
  run_rows_and_elements(7, 64, true);
  run_attention(1, 1, 1, 1, 2, 0, false);
  run_attention(2, 37, 4, 2, 16, 0, true);
  run_attention(1, 70, 2, 1, 96, 16, false);
  run_attention(1, 33, 1, 1, 257 - 1, 0, true);
  run_patches(2, 3, 6, 4, 2);
}
