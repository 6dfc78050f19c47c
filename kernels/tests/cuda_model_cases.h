/* cuda_model_cases.h: cases of the CUDA driver for the parts of a forward pass, against the scalar oracle within tolerances derived
 * from the terms: exponentials are float32 with two units of the last place and their arguments' rounding, sums of rows double. */
#ifndef AQ_CUDA_MODEL_CASES_H
#define AQ_CUDA_MODEL_CASES_H

#include "cuda_device.h"

#define TINY_FLOAT 1e-36 /* below it numbers lose places, and may become zero */

typedef std::vector<float> floats;

static floats gaussians(size_t n, float factor = 1.0f) {
  floats x(n);
  for (float &v : x) v = factor * gaussian();
  return x;
}

/* tolerance[i] or, of one element, for all */
static void check_floats(const char *kernel, const std::string &where, const floats &expected, const device_bytes &from,
                         const std::vector<double> &tolerance) {
  const bytes actual = downloaded(from);
  ran[kernel]++;
  check_guard(kernel, where, actual);
  for (size_t i = 0; i < expected.size(); i++) {
    const double e = expected[i], a = ((const float *)actual.data())[i], t = tolerance[tolerance.size() == 1 ? 0 : i];
    if (isnan(e) ? isnan(a) : e == a || fabs(e - a) <= t) continue;
    char how[120];
    snprintf(how, sizeof how, "%.9g instead of %.9g at %zu, tolerance %.3g", a, e, i, t);
    return failed(kernel, where, how);
  }
}

static void run_norms(size_t rows, size_t cols) {
  const std::string where = std::to_string(rows) + "x" + std::to_string(cols);
  const floats x = gaussians(rows * cols, 3.0f), weight = gaussians(cols), bias = gaussians(cols);
  floats out(rows * cols);
  std::vector<double> tolerance(rows * cols);
  const device_bytes a = uploaded(x), w = uploaded(weight), b = uploaded(bias);
  for (int which = 0; which < 4; which++) {
    const bool weighted = which % 2;
    const device_bytes o = unwritten(4 * x.size());
    if (which < 2) {
      require(aq_rms_norm(x.data(), rows, cols, weighted ? weight.data() : 0, 1e-5f, out.data(), AQ_ISA_SCALAR, 1), "oracle");
      check_status("RMS norm", where, AQ_OK,
                   aq_cuda_rms_norm(a.handle, rows, cols, weighted ? w.handle : 0, 1e-5f, o.handle, stream));
    } else {
      require(aq_layer_norm(x.data(), rows, cols, weighted ? weight.data() : 0, weighted ? bias.data() : 0, 1e-5f, out.data(),
                            AQ_ISA_SCALAR, 1),
              "oracle");
      check_status("layer norm", where, AQ_OK,
                   aq_cuda_layer_norm(a.handle, rows, cols, weighted ? w.handle : 0, weighted ? b.handle : 0, 1e-5f, o.handle, stream));
    }
    for (size_t i = 0; i < x.size(); i++) tolerance[i] = 0x1p-23 * fabs(out[i]) + TINY_FLOAT; /* double, rounded once */
    check_floats(which < 2 ? "RMS norm" : "layer norm", where, out, o, tolerance);
  }
  floats wide = gaussians(rows * cols, 4.0f);
  if (cols > 3) wide[1] = wide[0] = 11.0f; /* the first of equal ones */
  floats probabilities(rows), top(rows);
  require(aq_softmax(wide.data(), rows, cols, out.data(), AQ_ISA_SCALAR, 1), "oracle");
  const device_bytes z = uploaded(wide), o = unwritten(4 * wide.size()), index = unwritten(4 * rows), p = unwritten(4 * rows);
  check_status("softmax", where, AQ_OK, aq_cuda_softmax(z.handle, rows, cols, o.handle, stream));
  check_status("top one", where, AQ_OK, aq_cuda_top_one(z.handle, rows, cols, index.handle, p.handle, stream));
  std::vector<int32_t> first(rows);
  for (size_t row = 0; row < rows; row++) {
    const float *in = wide.data() + row * cols;
    for (size_t i = 0; i < cols; i++)
      if (in[i] > in[first[row]]) first[row] = (int32_t)i;
    top[row] = out[row * cols + (size_t)first[row]];
    for (size_t i = 0; i < cols; i++) /* the sum's error is a mean of its terms': of those that count, arguments below 30 */
      tolerance[row * cols + i] = out[row * cols + i] * (40.0 + in[first[row]] - in[i]) * 0x1p-23 + TINY_FLOAT;
  }
  check_floats("softmax", where, out, o, tolerance);
  check("top one", where, bytes_of(first), downloaded(index));
  check_floats("top one", where, top, p, {40.0 * 0x1p-23});
}

static void run_activation_functions(size_t n) {
  const std::string where = std::to_string(n) + " elements";
  floats x = gaussians(n, 6.0f), up = gaussians(n), out(n);
  const float special[] = {0.0f, -0.0f, 90.0f, -90.0f, 3e38f, -3e38f};
  for (size_t i = 0; i < 6 && i < n; i++) x[i] = special[i];
  std::vector<double> tolerance(n);
  const device_bytes a = uploaded(x), b = uploaded(up);
  for (int which = 0; which < 4; which++) {
    const device_bytes o = unwritten(4 * n);
    const char *kernel = which == 0 ? "SiLU" : which == 1 ? "GELU" : which == 2 ? "SwiGLU" : "add";
    int32_t status = AQ_OK;
    switch (which) {
      case 0: aq_silu(x.data(), n, out.data(), AQ_ISA_SCALAR, 1), status = aq_cuda_silu(a.handle, n, o.handle, stream); break;
      case 1: aq_gelu_tanh(x.data(), n, out.data(), AQ_ISA_SCALAR, 1), status = aq_cuda_gelu_tanh(a.handle, n, o.handle, stream); break;
      case 2:
        aq_silu_multiply(x.data(), up.data(), n, out.data(), AQ_ISA_SCALAR, 1);
        status = aq_cuda_silu_multiply(a.handle, b.handle, n, o.handle, stream);
        break;
      default:
        aq_add(x.data(), up.data(), n, out.data(), AQ_ISA_SCALAR, 1);
        status = aq_cuda_add(a.handle, b.handle, n, o.handle, stream);
    }
    check_status(kernel, where, AQ_OK, status);
    for (size_t i = 0; i < n; i++) {
      const double v = x[i], argument = which == 1 ? 1.6 * fabs(v + 0.044715 * v * v * v) : fabs(v);
      tolerance[i] = which == 3 ? 0.0 : fabs(out[i]) * (8.0 + 4.0 * argument) * 0x1p-23 + TINY_FLOAT * (1 + fabs(up[i]));
    }
    check_floats(kernel, where, out, o, tolerance);
  }
}

static void run_modulation(size_t batch, size_t tokens, size_t cols) {
  const std::string where = std::to_string(batch) + "x" + std::to_string(tokens) + "x" + std::to_string(cols);
  const size_t stride = 3 * cols + 1, n = batch * tokens * cols;
  const floats x = gaussians(n), residual = gaussians(n), chunks = gaussians(batch * stride);
  const float *scale = chunks.data() + cols, *shift = chunks.data() + 2 * cols;
  floats out(n);
  std::vector<double> tolerance(n), other(n);
  for (size_t i = 0; i < n; i++) {
    const size_t at = i / cols / tokens * stride + i % cols;
    tolerance[i] = (fabs(x[i]) * (1 + fabs(scale[at])) + fabs(shift[at])) * 0x1p-22;
    other[i] = (fabs(residual[i]) + fabs((double)scale[at] * x[i])) * 0x1p-22;
  }
  const device_bytes a = uploaded(x), r = uploaded(residual), c = uploaded(chunks), o = unwritten(4 * n), g = unwritten(4 * n);
  require(aq_modulate(x.data(), scale, shift, stride, batch, tokens, cols, out.data(), AQ_ISA_SCALAR, 1), "oracle");
  /* the last item has no whole stride behind it */
  check_status("modulate", where, AQ_OK,
               aq_cuda_modulate(a.handle, c.handle, c.handle, cols, 2 * cols, stride, batch, tokens, cols, o.handle, stream));
  check_floats("modulate", where, out, o, tolerance);
  require(aq_gate_add(residual.data(), scale, x.data(), stride, batch, tokens, cols, out.data(), AQ_ISA_SCALAR, 1), "oracle");
  check_status("gated sum", where, AQ_OK,
               aq_cuda_gate_add(r.handle, c.handle, cols, a.handle, stride, batch, tokens, cols, g.handle, stream));
  check_floats("gated sum", where, out, g, other);
  check_status("gated sum", "too small", AQ_E_SHAPE,
               aq_cuda_gate_add(r.handle, c.handle, stride * batch + GUARD, a.handle, stride, batch, tokens, cols, g.handle, stream));
}

static void run_places(void) {
  for (size_t head_size : {2, 10, 64, 128})
    for (size_t rows : {1, 7, 33}) {
      const size_t heads = 1 + random_bits() % 4, n = rows * heads * head_size;
      const std::string where = std::to_string(rows) + " rows, " + std::to_string(heads) + " heads of " + std::to_string(head_size);
      floats x = gaussians(n);
      std::vector<int32_t> positions(rows);
      for (int32_t &p : positions) p = (int32_t)(random_bits() % 5000) - 100;
      const device_bytes a = uploaded(x), p = uploaded(positions);
      check_status("rotary", where, AQ_OK, aq_cuda_rotary(a.handle, p.handle, rows, heads, head_size, 1e4, stream));
      floats before = x;
      aq_rotary(x.data(), positions.data(), rows, heads, head_size, 1e4, AQ_ISA_SCALAR, 1);
      std::vector<double> tolerance(n);
      for (size_t i = 0; i < n; i++) {
        const size_t k = i % head_size, other = k < head_size / 2 ? i + head_size / 2 : i - head_size / 2;
        tolerance[i] = (fabs(before[i]) + fabs(before[other])) * 0x1p-23;
      }
      check_floats("rotary", where, x, a, tolerance);
      positions[0] = AQ_MAX_POSITION + 1;
      const device_bytes bad = uploaded(positions);
      check_status("rotary", where, AQ_E_VALUE, aq_cuda_rotary(a.handle, bad.handle, rows, heads, head_size, 1e4, stream));
    }
  for (int32_t dtype = AQ_F32; dtype <= AQ_BF16; dtype++) {
    const size_t vocabulary = 37, cols = 33, n = 20;
    const floats values = gaussians(vocabulary * cols);
    bytes table(vocabulary * cols * width_of(dtype));
    aq_convert(values.data(), AQ_F32, table.data(), dtype, values.size(), AQ_ISA_SCALAR, 1);
    floats rounded(values.size()), expected(n * cols);
    aq_convert(table.data(), dtype, rounded.data(), AQ_F32, values.size(), AQ_ISA_SCALAR, 1);
    std::vector<int32_t> tokens(n);
    for (size_t i = 0; i < n; i++) {
      tokens[i] = (int32_t)(random_bits() % vocabulary);
      memcpy(&expected[i * cols], &rounded[(size_t)tokens[i] * cols], 4 * cols);
    }
    const device_bytes t = uploaded(table), ids = uploaded(tokens), o = unwritten(4 * n * cols);
    check_status("embedding", "rows", AQ_OK, aq_cuda_embed_tokens(t.handle, dtype, vocabulary, cols, ids.handle, n, o.handle, stream));
    check("embedding", "rows", bytes_of(expected), downloaded(o));
    for (int32_t wrong : {37, -1}) {
      tokens[3] = wrong;
      const device_bytes bad = uploaded(tokens);
      check_status("embedding", "no such row", AQ_E_VALUE,
                   aq_cuda_embed_tokens(t.handle, dtype, vocabulary, cols, bad.handle, n, o.handle, stream));
    }
  }
  for (size_t patch : {1, 2, 3}) {
    const size_t batch = 2, channels = 3, height = 4 * patch, width = 5 * patch, n = batch * channels * height * width;
    const floats images = gaussians(n);
    floats tokens(n), back(n);
    aq_patchify(images.data(), batch, channels, height, width, patch, tokens.data(), 1);
    aq_unpatchify(images.data(), batch, channels, height, width, patch, back.data(), 1);
    const device_bytes a = uploaded(images), o = unwritten(4 * n), u = unwritten(4 * n);
    check_status("patchify", "images", AQ_OK, aq_cuda_patchify(a.handle, batch, channels, height, width, patch, o.handle, stream));
    check_status("unpatchify", "images", AQ_OK, aq_cuda_unpatchify(a.handle, batch, channels, height, width, patch, u.handle, stream));
    check("patchify", "images", bytes_of(tokens), downloaded(o));
    check("unpatchify", "images", bytes_of(back), downloaded(u));
  }
  for (size_t channels : {1, 2, 9, 256})
    for (int32_t cosines_first = 0; cosines_first < 2; cosines_first++) {
      const floats times = {0.0f, 1.0f, 999.0f, 37.5f};
      floats out(times.size() * channels);
      require(aq_timestep_embedding(times.data(), times.size(), channels, cosines_first, 0.0, 1e4, out.data()), "oracle");
      const device_bytes t = uploaded(times), o = unwritten(4 * out.size());
      check_status("timestep embedding", "times", AQ_OK,
                   aq_cuda_timestep_embedding(t.handle, times.size(), channels, cosines_first, 0.0, 1e4, o.handle, stream));
      std::vector<double> tolerance(out.size());
      for (size_t i = 0; i < out.size(); i++) tolerance[i] = 0x1p-23 * (1 + times[i / channels]); /* a frequency may round otherwise */
      check_floats("timestep embedding", "times", out, o, tolerance);
    }
}

static void run_dense(size_t tokens, size_t rows, size_t cols, int32_t dtype) {
  const std::string where = std::to_string(tokens) + "x" + std::to_string(rows) + "x" + std::to_string(cols) + ", dtype " + std::to_string(dtype);
  const floats x = gaussians(tokens * cols), values = gaussians(rows * cols), bias = gaussians(rows);
  bytes weights(values.size() * width_of(dtype));
  floats rounded(values.size()), out(tokens * rows);
  aq_convert(values.data(), AQ_F32, weights.data(), dtype, values.size(), AQ_ISA_SCALAR, 1);
  aq_convert(weights.data(), dtype, rounded.data(), AQ_F32, values.size(), AQ_ISA_SCALAR, 1);
  require(aq_linear(x.data(), tokens, weights.data(), dtype, bias.data(), rows, cols, out.data(), AQ_ISA_SCALAR, 1), "oracle");
  std::vector<double> tolerance(out.size());
  for (size_t t = 0; t < tokens; t++)
    for (size_t r = 0; r < rows; r++) {
      double sum = fabs(bias[r]);
      for (size_t k = 0; k < cols; k++) sum += fabs((double)x[t * cols + k] * rounded[r * cols + k]);
      tolerance[t * rows + r] = sum * ((double)cols + 4) * 0x1p-24;
    }
  const device_bytes a = uploaded(x), w = uploaded(weights), b = uploaded(bias), o = unwritten(4 * out.size());
  check_status("linear, not packed", where, AQ_OK, aq_cuda_linear(a.handle, tokens, w.handle, dtype, b.handle, rows, cols, o.handle, stream));
  check_floats("linear, not packed", where, out, o, tolerance);
}

/* A score's rounding, of n terms |q k| and the exponential's argument, moves a share by as much of itself. */
static void run_attention(size_t batch, size_t tokens, size_t heads, size_t kv_heads, size_t size, bool masked) {
  const std::string where = std::to_string(batch) + "x" + std::to_string(tokens) + ", " + std::to_string(heads) + "/" +
                            std::to_string(kv_heads) + " heads of " + std::to_string(size) + (masked ? ", masked" : "");
  const size_t n = batch * tokens * heads * size, kv = batch * tokens * kv_heads * size;
  const floats q = gaussians(n), k = gaussians(kv), v = gaussians(kv);
  std::vector<uint8_t> mask(batch * tokens, 1);
  for (size_t i = 0; i < mask.size() && masked; i++) mask[i] = i < tokens ? 0 : random_bits() % 2; /* the first item has no key */
  const float scale = 1.0f / sqrtf((float)size);
  floats out(n);
  require(aq_attention(q.data(), k.data(), v.data(), masked ? mask.data() : 0, batch, tokens, heads, kv_heads, size, scale, out.data(),
                       AQ_ISA_SCALAR, 1),
          "oracle");
  std::vector<double> tolerance(n);
  for (size_t b = 0; b < batch; b++)
    for (size_t h = 0; h < heads; h++)
      for (size_t t = 0; t < tokens; t++) {
        const size_t at = ((b * tokens + t) * heads + h) * size;
        double worst = 0, largest_v = 0;
        for (size_t key = 0; key < tokens; key++) {
          double terms = 0;
          const size_t from = ((b * tokens + key) * kv_heads + h / (heads / kv_heads)) * size;
          for (size_t d = 0; d < size; d++) {
            terms += fabs((double)q[at + d] * k[from + d]);
            largest_v = fmax(largest_v, fabs(v[from + d]));
          }
          worst = fmax(worst, terms * scale);
        }
        for (size_t d = 0; d < size; d++)
          tolerance[at + d] = largest_v * (2 * worst * ((double)size + 4) + (double)tokens + 16) * 0x1p-23;
      }
  const device_bytes a = uploaded(q), c = uploaded(k), e = uploaded(v), m(masked ? mask.data() : 0, mask.size()), o = unwritten(4 * n);
  check_status("attention", where, AQ_OK,
               aq_cuda_attention(a.handle, c.handle, e.handle, m.handle, batch, tokens, heads, kv_heads, size, scale, o.handle, stream));
  check_floats("attention", where, out, o, tolerance);
}

static void run_model(void) {
  for (size_t cols : {1, 7, 255, 256, 257, 1030}) run_norms(1 + random_bits() % 5, cols);
  for (size_t n : {1, 255, 257, 3000}) run_activation_functions(n);
  run_modulation(2, 3, 17);
  run_modulation(1, 1, 1);
  run_modulation(3, 5, 128);
  run_places();
  for (int32_t dtype = AQ_F32; dtype <= AQ_BF16; dtype++) {
    run_dense(1, 65, 33, dtype);
    run_dense(70, 3, 17, dtype);
    run_dense(3, 130, 64, dtype);
  }
  for (bool masked : {false, true}) {
    run_attention(2, 1, 1, 1, 1, masked);
    run_attention(2, 33, 4, 2, 72, masked);
    run_attention(1, 70, 2, 2, 128, masked);
    run_attention(2, 40, 3, 1, 256, masked);
  }
}

#endif
