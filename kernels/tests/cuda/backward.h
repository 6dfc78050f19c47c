/* backward.h: gradients and Adam's steps on a device against the scalar oracle, to the bit; included by
 * cuda.cu behind solver.h. */

static void run_backward_shape(size_t rows, size_t cols, int32_t bits, size_t group_size) {
  char where[80];
  snprintf(where, sizeof where, "%zu x %zu, %d bits, group %zu", rows, cols, bits, group_size);
  const size_t n = rows * cols;
  const std::vector<float> x = normal_values(n, 2.0f), y = normal_values(n, 1.0f), z = normal_values(n, 1.0f);
  const device_bytes own_x = on_device(x), own_y = on_device(y), own_z = on_device(z);
  changed<float> a{std::vector<float>(n)}, b{std::vector<float>(n)};
  const auto compare = [&](const char *what, bool both) {
    a.compare(what, where);
    if (both) b.compare(what, where);
  };
  BOTH("transpose", aq_transpose(x.data(), rows, cols, a.expected.data(), AQ_ISA_SCALAR, 1),
       aq_cuda_transpose(own_x.handle, rows, cols, a.own.handle, stream));
  compare("transpose", false);
  BOTH("RMS norm", aq_rms_norm_backward(x.data(), y.data(), rows, cols, z.data(), 1e-6f, a.expected.data(), AQ_ISA_SCALAR, 1),
       aq_cuda_rms_norm_backward(own_x.handle, own_y.handle, rows, cols, own_z.handle, 1e-6f, a.own.handle, stream));
  BOTH("layer norm", aq_layer_norm_backward(x.data(), y.data(), rows, cols, 0, 1e-6f, b.expected.data(), AQ_ISA_SCALAR, 1),
       aq_cuda_layer_norm_backward(own_x.handle, own_y.handle, rows, cols, 0, 1e-6f, b.own.handle, stream));
  compare("gradients of norms", true);
  BOTH("SiLU", aq_silu_backward(x.data(), y.data(), n, a.expected.data(), AQ_ISA_SCALAR, 1),
       aq_cuda_silu_backward(own_x.handle, own_y.handle, n, a.own.handle, stream));
  BOTH("GELU", aq_gelu_tanh_backward(x.data(), y.data(), n, b.expected.data(), AQ_ISA_SCALAR, 1),
       aq_cuda_gelu_tanh_backward(own_x.handle, own_y.handle, n, b.own.handle, stream));
  compare("gradients of activations", true);
  BOTH("SiLU times up",
       aq_silu_multiply_backward(x.data(), y.data(), z.data(), n, a.expected.data(), b.expected.data(), AQ_ISA_SCALAR, 1),
       aq_cuda_silu_multiply_backward(own_x.handle, own_y.handle, own_z.handle, n, a.own.handle, b.own.handle, stream));
  compare("gradients of SiLU times up", true);
  BOTH("column sums", aq_column_sums(x.data(), y.data(), 1, rows, cols, cols, a.expected.data(), AQ_ISA_SCALAR, 1),
       aq_cuda_column_sums(own_x.handle, own_y.handle, 1, rows, cols, cols, a.own.handle, stream));
  BOTH("sums of a row", aq_column_sums(x.data(), 0, rows, 1, cols, cols, b.expected.data(), AQ_ISA_SCALAR, 1),
       aq_cuda_column_sums(own_x.handle, 0, rows, 1, cols, cols, b.own.handle, stream));
  compare("column sums", true);
  changed<float> values(x), first{std::vector<float>(n)}, second{std::vector<float>(n)};
  for (int32_t step = 1; step <= 3; step++)
    BOTH("Adam",
         aq_adam_step(values.expected.data(), y.data(), first.expected.data(), second.expected.data(), n, 0.01, 0.9, 0.999, 1e-8, step,
                      AQ_ISA_SCALAR, 1),
         aq_cuda_adam_step(values.own.handle, own_y.handle, first.own.handle, second.own.handle, n, 0.01, 0.9, 0.999, 1e-8, step, stream));
  values.compare("Adam's values", where);
  first.compare("Adam's means", where);
  second.compare("Adam's squares", where);
  uint64_t words = 0, groups = 0;
  aq_packed_words(cols, bits, &words);
  aq_group_count(cols, group_size, &groups);
  std::vector<uint32_t> packed(rows * words);
  std::vector<uint16_t> scale(rows * groups), zero(rows * groups);
  aq_quantize_round(x.data(), AQ_F32, rows, cols, bits, group_size, AQ_ZERO_POINT_REAL, packed.data(), scale.data(), zero.data(),
                    AQ_ISA_SCALAR, 1);
  const device_bytes own_packed = on_device(packed), own_scale = on_device(scale), own_zero = on_device(zero);
  changed<float> dscale{std::vector<float>(rows * groups)}, dzero{std::vector<float>(rows * groups)};
  BOTH("packed gradient",
       aq_packed_gradient(y.data(), packed.data(), scale.data(), zero.data(), rows, cols, bits, group_size, dscale.expected.data(),
                          dzero.expected.data(), AQ_ISA_SCALAR, 1),
       aq_cuda_packed_gradient(own_y.handle, own_packed.handle, own_scale.handle, own_zero.handle, rows, cols, bits, group_size,
                               dscale.own.handle, dzero.own.handle, stream));
  dscale.compare("gradient of scales", where);
  dzero.compare("gradient of zero points", where);
  if (bits > 3) return;
  for (uint32_t &word : packed) word = random_bits();
  const device_bytes own_codes = on_device(packed);
  BOTH("trellis gradient",
       aq_trellis_gradient(y.data(), packed.data(), rows, cols, bits, group_size, dscale.expected.data(), dzero.expected.data(),
                           AQ_ISA_SCALAR, 1),
       aq_cuda_trellis_gradient(own_y.handle, own_codes.handle, rows, cols, bits, group_size, dscale.own.handle, dzero.own.handle,
                                stream));
  dscale.compare("gradient of a trellis' scales", where);
  dzero.compare("gradient of a trellis' offsets", where);
}

static void run_attention_backward(size_t batch, size_t tokens, size_t heads, size_t kv_heads, size_t size, bool masked) {
  char where[80];
  snprintf(where, sizeof where, "%zu x %zu tokens, %zu of %zu heads of %zu", batch, tokens, heads, kv_heads, size);
  const size_t n = batch * tokens * heads * size, kv = batch * tokens * kv_heads * size;
  const std::vector<float> q = normal_values(n, 1.0f), k = normal_values(kv, 1.0f), v = normal_values(kv, 1.0f), dout = normal_values(n, 1.0f);
  std::vector<float> out(n);
  bytes mask(batch * tokens);
  for (uint8_t &own : mask) own = random_bits() % 3 > 0;
  const uint8_t *seen = masked ? mask.data() : 0;
  expect_status("attention", where,
                aq_attention(q.data(), k.data(), v.data(), seen, batch, tokens, heads, kv_heads, size, 0, 0.3f, out.data(), AQ_ISA_SCALAR, 1),
                AQ_OK);
  const device_bytes own_q = on_device(q), own_k = on_device(k), own_v = on_device(v), own_out = on_device(out), own_dout = on_device(dout),
                     own_mask(seen, mask.size());
  changed<float> dq{std::vector<float>(n)}, dk{std::vector<float>(kv)}, dv{std::vector<float>(kv)};
  BOTH("gradient of attention",
       aq_attention_backward(q.data(), k.data(), v.data(), out.data(), dout.data(), seen, batch, tokens, heads, kv_heads, size, 0.3f,
                             dq.expected.data(), dk.expected.data(), dv.expected.data(), AQ_ISA_SCALAR, 1),
       aq_cuda_attention_backward(own_q.handle, own_k.handle, own_v.handle, own_out.handle, own_dout.handle, own_mask.handle, batch, tokens,
                                  heads, kv_heads, size, 0.3f, dq.own.handle, dk.own.handle, dv.own.handle, stream));
  dq.compare("dq", where);
  dk.compare("dk", where);
  dv.compare("dv", where);
}

static void run_backward(void) {
  run_backward_shape(1, 1, 2, 0);
  run_backward_shape(3, 7, 3, 16);
  run_backward_shape(33, 34, 4, 32);
  run_backward_shape(7, 300, 3, 64);
  run_backward_shape(5, 290, 2, 32);
  run_backward_shape(3, 530, 2, 0);
  run_backward_shape(2, 600, 8, 0);
  run_attention_backward(1, 1, 1, 1, 2, false);
  run_attention_backward(2, 37, 4, 2, 16, true);
  run_attention_backward(1, 70, 2, 1, 40, true);
}
