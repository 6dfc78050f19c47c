/* cuda_solver_cases.h: cases of the CUDA driver for two-level scales, error feedback and 8-bit activations, all to the bit. */
#ifndef AQ_CUDA_SOLVER_CASES_H
#define AQ_CUDA_SOLVER_CASES_H

#include "cuda_device.h"

/* Two-level scales -------------------------------------------------------------------------------------------------------- */

static std::vector<float> two_level_weights(size_t n, int pattern) {
  std::vector<float> w = values_of(n, pattern < PATTERNS ? pattern : GAUSSIAN);
  for (size_t i = 0; i < n && pattern >= PATTERNS; i++)
    w[i] = pattern == PATTERNS   ? fabsf(w[i]) * 0.03f
           : pattern == PATTERNS + 1 ? (random_bits() % 300 ? 100.0f : -100.0f) + 0.01f * w[i]
                                     : w[i] * (random_bits() % 2 ? 1e-7f : 1e-30f);
  return w;
}

static void compare_two_level(size_t rows, size_t cols, int32_t bits, size_t group_size, int32_t scale_bits, int32_t dtype,
                              int pattern, int search) {
  const char *kernel = search ? "two-level, search" : "two-level, round";
  char where[160];
  snprintf(where, sizeof where, "%zux%zu, %d bits, group %zu, %d scale bits, dtype %d, pattern %d, search %d", rows, cols, bits,
           group_size, scale_bits, dtype, pattern, search);
  uint64_t words = 0, sizes[2] = {0, 0};
  aq_packed_words(cols, bits, &words);
  aq_two_level_sizes(cols, group_size, scale_bits, sizes);
  const size_t n = rows * cols;
  std::vector<float> values = two_level_weights(n, pattern), column_weights(cols);
  for (float &h : column_weights) h = random_bits() % 4 ? expf(2.0f * gaussian()) : 0.0f;
  if (random_bits() % 2)
    for (size_t i = 0; i < cols && i < 300; i++) column_weights[i] = 0.0f;
  if (search == 2 && random_bits() % 40 == 0) column_weights[random_bits() % cols] = -1.0f;
  bytes weights(n * width_of(dtype));
  aq_convert(values.data(), AQ_F32, weights.data(), dtype, n, AQ_ISA_SCALAR, 1);
  bytes packed = guarded(rows * words * 4), ss = guarded(rows * sizes[0]), sm = guarded(rows * sizes[0]),
        ds = guarded(rows * sizes[1] * 2), dm = guarded(rows * sizes[1] * 2);
  const int32_t status = aq_quantize_two_level(weights.data(), dtype, rows, cols, bits, group_size, scale_bits, search > 0,
                                               search == 2 ? column_weights.data() : 0, at<uint32_t>(packed), ss.data(),
                                               sm.data(), at<uint16_t>(ds), at<uint16_t>(dm), AQ_ISA_SCALAR, 1);
  const device_bytes w = uploaded(weights), h(search == 2 ? column_weights.data() : 0, 4 * cols),
                     p = unwritten(packed.size() - GUARD), a = unwritten(ss.size() - GUARD), b = unwritten(sm.size() - GUARD),
                     c = unwritten(ds.size() - GUARD), d = unwritten(dm.size() - GUARD);
  check_status(kernel, where, status,
               aq_cuda_quantize_two_level(w.handle, dtype, rows, cols, bits, group_size, scale_bits, search > 0, h.handle, p.handle,
                                          a.handle, b.handle, c.handle, d.handle, stream));
  const bytes own[5] = {downloaded(p), downloaded(a), downloaded(b), downloaded(c), downloaded(d)};
  const bytes *wanted[5] = {&packed, &ss, &sm, &ds, &dm};
  for (int i = 0; i < 5; i++) {
    if (status == AQ_OK)
      check(kernel, where, *wanted[i], own[i]);
    else
      check_guard(kernel, where, own[i]);
  }
  if (status != AQ_OK) return;
  for (int32_t to = AQ_F32; to <= AQ_BF16; to++) {
    bytes out = guarded(n * width_of(to));
    aq_dequantize_two_level(at<uint32_t>(packed), ss.data(), sm.data(), at<uint16_t>(ds), at<uint16_t>(dm), rows, cols, bits,
                            group_size, scale_bits, out.data(), to, AQ_ISA_SCALAR, 1);
    const device_bytes o = unwritten(out.size() - GUARD);
    check_status("two-level, dequantize", where, AQ_OK,
                 aq_cuda_dequantize_two_level(p.handle, a.handle, b.handle, c.handle, d.handle, rows, cols, bits, group_size,
                                              scale_bits, o.handle, to, stream));
    check("two-level, dequantize", where, out, downloaded(o));
  }
}

static void run_two_level(int quick) {
  for (size_t cols : {1, 7, 16, 31, 100, 255, 256, 257, 300, 512, 777, 1030})
    for (size_t group_size : {16, 32, 64, 128})
      for (int32_t bits : {2, 3, 4, 8})
        for (int32_t scale_bits : {4, 6})
          for (int search = 0; search < 3; search++) {
            if (quick && random_bits() % 4) continue;
            compare_two_level(1 + random_bits() % 23, cols, bits, group_size, scale_bits, (int32_t)(random_bits() % 6),
                              (int)(random_bits() % (PATTERNS + 3)), search);
          }
}

/* Error feedback ---------------------------------------------------------------------------------------------------------- */

static void compare_feedback(size_t rows, size_t cols, int32_t bits, size_t group_size, int fault) {
  const std::string where = std::to_string(rows) + "x" + std::to_string(cols) + ", " + std::to_string(bits) + " bits, group " +
                            std::to_string(group_size) + ", fault " + std::to_string(fault);
  uint64_t groups = 0;
  aq_group_count(cols, group_size, &groups);
  std::vector<float> weights = values_of(rows * cols, GAUSSIAN), factor(cols * cols), scale(rows * groups), zero(rows * groups);
  for (size_t i = 0; i < cols; i++)
    for (size_t j = i; j < cols; j++) factor[i * cols + j] = i == j ? 1.0f : 0.2f * gaussian();
  aq_clipped_grids(weights.data(), rows, cols, bits, group_size, (int32_t)(random_bits() % 3), 0.9f, scale.data(), zero.data(), 1);
  std::vector<int32_t> order(cols);
  for (size_t i = 0; i < cols; i++) order[i] = (int32_t)i;
  for (size_t i = cols; i > 1; i--) std::swap(order[i - 1], order[random_bits() % i]);
  if (fault == 1) order[random_bits() % cols] = (int32_t)cols;
  if (fault == 2) weights[random_bits() % weights.size()] = NAN;
  if (fault == 3) factor[random_bits() % factor.size()] = INFINITY;
  if (fault == 4) scale[random_bits() % scale.size()] = 0.0f;
  uint64_t floats = 0;
  aq_solver_work(cols, group_size, 1, &floats);
  std::vector<float> work(floats);
  bytes codes = guarded(rows * cols);
  const int32_t status = aq_quantize_feedback(weights.data(), rows, cols, bits, group_size, scale.data(), zero.data(),
                                              factor.data(), order.data(), codes.data(), work.data(), AQ_ISA_SCALAR, 1);
  const device_bytes w = uploaded(weights), s = uploaded(scale), z = uploaded(zero), f = uploaded(factor), o = uploaded(order),
                     c = unwritten(rows * cols);
  check_status("error feedback", where, status,
               aq_cuda_quantize_feedback(w.handle, rows, cols, bits, group_size, s.handle, z.handle, f.handle, o.handle, c.handle,
                                         stream));
  if (status == AQ_OK)
    check("error feedback", where, codes, downloaded(c));
  else
    check_guard("error feedback", where, downloaded(c));
}

static void run_feedback(int quick) {
  for (size_t cols : {1, 31, 32, 33, 64, 65, 100, 129, 300})
    for (size_t group_size : {0, 16, 64})
      for (int32_t bits : {2, 3, 4, 8}) {
        if (quick && random_bits() % 3) continue;
        compare_feedback(1 + random_bits() % 90, cols, bits, group_size, random_bits() % 5 ? 0 : 1 + (int)(random_bits() % 4));
      }
}

/* 8-bit activations ------------------------------------------------------------------------------------------------------- */

static void compare_activations(size_t tokens, size_t cols, int32_t bits, int32_t kind, int pattern) {
  const std::string where = std::to_string(tokens) + "x" + std::to_string(cols) + ", " + std::to_string(bits) + " bits, kind " +
                            std::to_string(kind) + ", pattern " + std::to_string(pattern);
  const std::vector<float> x = values_of(tokens * cols, pattern);
  std::vector<float> scale(tokens, 0.02f);
  std::vector<int32_t> zero(tokens, 1 << (bits - 1));
  if (kind == AQ_ACTIVATIONS_STATIC && random_bits() % 8 == 0) zero[random_bits() % tokens] = 1 << bits;
  const device_bytes a = uploaded(x), c = unwritten(tokens * cols), s = uploaded(scale), z = uploaded(zero);
  bytes codes = guarded(tokens * cols);
  const int32_t status = aq_quantize_activations(x.data(), tokens, cols, bits, kind, codes.data(), scale.data(), zero.data(),
                                                 AQ_ISA_SCALAR, 1);
  check_status("activations", where, status,
               aq_cuda_quantize_activations(a.handle, tokens, cols, bits, kind, c.handle, s.handle, z.handle, stream));
  const bytes own = downloaded(c);
  check_guard("activations", where, own);
  if (status != AQ_OK) return;
  check("activations", where, codes, own);
  check("activations", where, bytes_of(scale), downloaded(s));
  check("activations", where, bytes_of(zero), downloaded(z));
}

static void compare_int8(const quantize_case &c, size_t tokens) {
  const std::string where = described(c) + ", " + std::to_string(tokens) + " tokens";
  const std::vector<float> w = values_of(c.rows * c.cols, c.pattern);
  packed_bytes m = guarded_matrix(c);
  uint16_t *zero = c.kind == AQ_ZERO_POINT_SYMMETRIC ? 0 : at<uint16_t>(m.zero);
  require(aq_quantize_round(w.data(), AQ_F32, c.rows, c.cols, c.bits, c.group_size, c.kind, at<uint32_t>(m.packed),
                            at<uint16_t>(m.scale), zero, AQ_ISA_SCALAR, 1),
          "quantize");
  std::vector<uint8_t> codes(tokens * c.cols);
  for (uint8_t &code : codes) code = random_bits() % 9 ? (uint8_t)random_bits() : (uint8_t)255;
  std::vector<float> x_scale(tokens), bias(c.rows);
  std::vector<int32_t> x_zero(tokens);
  for (size_t t = 0; t < tokens; t++) {
    x_scale[t] = 0.01f + fabsf(gaussian());
    x_zero[t] = (int32_t)(random_bits() % 256);
  }
  if (random_bits() % 16 == 0) x_zero[random_bits() % tokens] = 256;
  for (float &b : bias) b = gaussian();
  const bool biased = random_bits() % 2;
  bytes out = guarded(tokens * c.rows * 4);
  const int32_t status = aq_linear_packed_int8(codes.data(), x_scale.data(), x_zero.data(), tokens, at<uint32_t>(m.packed),
                                               at<uint16_t>(m.scale), zero, biased ? bias.data() : 0, c.rows, c.cols, c.bits,
                                               c.group_size, at<float>(out), AQ_ISA_SCALAR, 1);
  const device_bytes a = uploaded(codes), s = uploaded(x_scale), z = uploaded(x_zero),
                     p(m.packed.data(), m.packed.size() - GUARD), ws(m.scale.data(), m.scale.size() - GUARD),
                     wz(zero, m.zero.size() - GUARD), b(biased ? bias.data() : 0, 4 * c.rows), o = unwritten(out.size() - GUARD);
  check_status("8-bit product", where, status,
               aq_cuda_linear_packed_int8(a.handle, s.handle, z.handle, tokens, p.handle, ws.handle, wz.handle, b.handle, c.rows,
                                          c.cols, c.bits, c.group_size, o.handle, stream));
  if (status == AQ_OK)
    check("8-bit product", where, out, downloaded(o));
  else
    check_guard("8-bit product", where, downloaded(o));
}

static void run_int8(int quick) {
  for (size_t cols : {1, 7, 33, 64, 255, 257, 1030})
    for (int32_t bits : {2, 5, 8})
      for (int32_t kind : {AQ_ACTIVATIONS_STATIC, AQ_ACTIVATIONS_PER_TOKEN})
        for (int pattern = 0; pattern < PATTERNS; pattern++)
          compare_activations(1 + random_bits() % 9, cols, bits, kind, pattern);
  for (size_t cols : {1, 7, 16, 33, 100, 256, 257, 512, 1030})
    for (size_t group_size : {0, 16, 32, 128})
      for (int32_t bits : {2, 3, 4, 8})
        for (size_t tokens : {1, 8, 9, 70}) {
          if (quick && random_bits() % 4) continue;
          compare_int8({1 + random_bits() % 80, cols, bits, group_size, (int32_t)(random_bits() % 3), AQ_F32, GAUSSIAN, 0}, tokens);
        }
}

#endif
