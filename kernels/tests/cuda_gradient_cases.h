/* cuda_gradient_cases.h: cases of the CUDA driver for gradients and the step KL. */
#ifndef AQ_CUDA_GRADIENT_CASES_H
#define AQ_CUDA_GRADIENT_CASES_H

#include "cuda_model_cases.h"

static void run_slopes(size_t n) {
  const std::string where = std::to_string(n) + " elements";
  const floats x = gaussians(n, 6.0f), up = gaussians(n), dy = gaussians(n);
  floats dx(n), other(n);
  const device_bytes a = uploaded(x), u = uploaded(up), y = uploaded(dy), o = unwritten(4 * n), p = unwritten(4 * n);
  aq_silu_backward(x.data(), dy.data(), n, dx.data(), AQ_ISA_SCALAR, 1);
  check_status("SiLU, gradient", where, AQ_OK, aq_cuda_silu_backward(a.handle, y.handle, n, o.handle, stream));
  check("SiLU, gradient", where, bytes_of(dx), downloaded(o));
  aq_gelu_tanh_backward(x.data(), dy.data(), n, dx.data(), AQ_ISA_SCALAR, 1);
  check_status("GELU, gradient", where, AQ_OK, aq_cuda_gelu_tanh_backward(a.handle, y.handle, n, o.handle, stream));
  check("GELU, gradient", where, bytes_of(dx), downloaded(o));
  aq_silu_multiply_backward(x.data(), up.data(), dy.data(), n, dx.data(), other.data(), AQ_ISA_SCALAR, 1);
  check_status("SwiGLU, gradient", where, AQ_OK,
               aq_cuda_silu_multiply_backward(a.handle, u.handle, y.handle, n, o.handle, p.handle, stream));
  check("SwiGLU, gradient", where, bytes_of(dx), downloaded(o));
  check("SwiGLU, gradient", where, bytes_of(other), downloaded(p));
  floats values = gaussians(n), low(n, -0.5f), high(n, 0.5f);
  const device_bytes v = uploaded(values), l = uploaded(low), h = uploaded(high);
  aq_projected_gradient_step(values.data(), dy.data(), low.data(), high.data(), n, 0.1f, AQ_ISA_SCALAR, 1);
  check_status("projected step", where, AQ_OK,
               aq_cuda_projected_gradient_step(v.handle, y.handle, l.handle, h.handle, n, 0.1f, stream));
  check("projected step", where, bytes_of(values), downloaded(v));
}

static void run_norm_slopes(size_t rows, size_t cols) {
  const std::string where = std::to_string(rows) + "x" + std::to_string(cols);
  const floats x = gaussians(rows * cols, 2.0f), dy = gaussians(rows * cols), weight = gaussians(cols);
  const device_bytes a = uploaded(x), y = uploaded(dy), w = uploaded(weight);
  for (int layer = 0; layer < 2; layer++) {
    floats dx(rows * cols);
    const device_bytes o = unwritten(4 * dx.size());
    const char *kernel = layer ? "layer norm, gradient" : "RMS norm, gradient";
    if (layer) {
      aq_layer_norm_backward(x.data(), dy.data(), rows, cols, weight.data(), 1e-5f, dx.data(), AQ_ISA_SCALAR, 1);
      check_status(kernel, where, AQ_OK, aq_cuda_layer_norm_backward(a.handle, y.handle, rows, cols, w.handle, 1e-5f, o.handle, stream));
    } else {
      aq_rms_norm_backward(x.data(), dy.data(), rows, cols, weight.data(), 1e-5f, dx.data(), AQ_ISA_SCALAR, 1);
      check_status(kernel, where, AQ_OK, aq_cuda_rms_norm_backward(a.handle, y.handle, rows, cols, w.handle, 1e-5f, o.handle, stream));
    }
    std::vector<double> tolerance(dx.size()); /* double, but for differences of larger terms, of which n + 8 roundings are left */
    for (size_t row = 0; row < rows; row++) {
      double mean = 0, squares = 0, largest = 0, products = 0;
      for (size_t i = 0; i < cols; i++) mean += layer ? x[row * cols + i] / (double)cols : 0.0;
      for (size_t i = 0; i < cols; i++) {
        const double centred = x[row * cols + i] - mean, g = (double)dy[row * cols + i] * weight[i];
        squares += centred * centred / (double)cols;
        products += fabs(g * centred) / (double)cols;
        largest = fmax(largest, fabs(g));
      }
      const double r = 1 / sqrt(squares + 1e-5);
      for (size_t i = 0; i < cols; i++)
        tolerance[row * cols + i] = fabs(dx[row * cols + i]) * 0x1p-23 +
                                    (2 * r * largest + fabs(x[row * cols + i] - mean) * r * r * r * products) * ((double)cols + 8) * 0x1p-52;
    }
    check_floats(kernel, where, dx, o, tolerance);
  }
}

static void run_packed_slopes(const quantize_case &c) {
  const std::string where = described(c);
  const floats w = gaussians(c.rows * c.cols), dw = gaussians(c.rows * c.cols);
  packed_bytes m = guarded_matrix(c);
  aq_quantize_round(w.data(), AQ_F32, c.rows, c.cols, c.bits, c.group_size, AQ_ZERO_POINT_REAL, at<uint32_t>(m.packed),
                    at<uint16_t>(m.scale), at<uint16_t>(m.zero), AQ_ISA_SCALAR, 1);
  const size_t units = (m.scale.size() - GUARD) / 2, groups = units / c.rows, size = c.group_size == 0 ? c.cols : c.group_size;
  floats dscale(units), dzero(units);
  aq_packed_gradient(dw.data(), at<uint32_t>(m.packed), at<uint16_t>(m.scale), at<uint16_t>(m.zero), c.rows, c.cols, c.bits, c.group_size,
                     dscale.data(), dzero.data(), AQ_ISA_SCALAR, 1);
  std::vector<double> tolerance(units), zero_tolerance(units);
  for (size_t i = 0; i < units; i++) {
    double sum = 0;
    for (size_t col = i % groups * size; col < c.cols && col < (i % groups + 1) * size; col++) sum += fabs(dw[i / groups * c.cols + col]);
    tolerance[i] = fabs(dscale[i]) * 0x1p-23 + sum * (double)(1 << c.bits) * 4 * (double)size * 0x1p-52;
    zero_tolerance[i] = fabs(dzero[i]) * 0x1p-23 + sum * (double)size * 0x1p-52;
  }
  const device_bytes d = uploaded(dw), p(m.packed.data(), m.packed.size() - GUARD), s(m.scale.data(), 2 * units), z(m.zero.data(), 2 * units),
                     o = unwritten(4 * units), u = unwritten(4 * units);
  check_status("packed gradient", where, AQ_OK,
               aq_cuda_packed_gradient(d.handle, p.handle, s.handle, z.handle, c.rows, c.cols, c.bits, c.group_size, o.handle, u.handle, stream));
  check_floats("packed gradient", where, dscale, o, tolerance);
  check_floats("packed gradient", where, dzero, u, zero_tolerance);
}

/* In double from the definition; float32 scores move shares as run_attention says, sums have their terms' roundings. */
static void run_attention_slopes(size_t batch, size_t tokens, size_t heads, size_t kv_heads, size_t size, bool masked) {
  const std::string where = std::to_string(batch) + "x" + std::to_string(tokens) + ", " + std::to_string(heads) + "/" +
                            std::to_string(kv_heads) + " heads of " + std::to_string(size) + (masked ? ", masked" : "");
  const size_t n = batch * tokens * heads * size, kv = batch * tokens * kv_heads * size, shared = heads / kv_heads;
  const floats q = gaussians(n), k = gaussians(kv), v = gaussians(kv), dout = gaussians(n);
  std::vector<uint8_t> mask(batch * tokens, 1);
  for (size_t i = 0; i < mask.size() && masked; i++) mask[i] = i < tokens ? 0 : random_bits() % 2;
  const float scale = 1.0f / sqrtf((float)size);
  floats out(n);
  aq_attention(q.data(), k.data(), v.data(), masked ? mask.data() : 0, batch, tokens, heads, kv_heads, size, scale, out.data(), AQ_ISA_SCALAR, 1);
  std::vector<double> d[3] = {std::vector<double>(n), std::vector<double>(kv), std::vector<double>(kv)}, terms[3] = {d[0], d[1], d[2]};
  double worst = 0;
  for (size_t b = 0; b < batch; b++)
    for (size_t h = 0; h < heads; h++)
      for (size_t t = 0; t < tokens; t++) {
        const size_t at = ((b * tokens + t) * heads + h) * size;
        std::vector<double> p(tokens);
        double largest = -INFINITY, total = 0, share = 0, share_terms = 0;
        for (int pass = 0; pass < 2; pass++)
          for (size_t key = 0; key < tokens; key++) {
            if (!mask[b * tokens + key]) continue;
            const size_t from = ((b * tokens + key) * kv_heads + h / shared) * size;
            double score = 0, size_of = 0;
            for (size_t e = 0; e < size; e++) {
              score += (double)q[at + e] * k[from + e] * scale;
              size_of += fabs((double)q[at + e] * k[from + e] * scale);
            }
            worst = fmax(worst, size_of);
            if (pass == 0) largest = fmax(largest, score);
            if (pass == 1) total += p[key] = exp(score - largest);
          }
        for (size_t e = 0; e < size; e++) {
          share += (double)dout[at + e] * out[at + e];
          share_terms += fabs((double)dout[at + e] * out[at + e]);
        }
        for (size_t key = 0; key < tokens; key++) {
          if (!mask[b * tokens + key]) continue;
          const size_t from = ((b * tokens + key) * kv_heads + h / shared) * size;
          double dot = 0, dot_terms = share_terms;
          for (size_t e = 0; e < size; e++) {
            dot += (double)dout[at + e] * v[from + e];
            dot_terms += fabs((double)dout[at + e] * v[from + e]);
          }
          const double part = p[key] / total, slope = part * (dot - share) * scale, slope_terms = part * dot_terms * scale;
          for (size_t e = 0; e < size; e++) {
            d[0][at + e] += slope * k[from + e];
            terms[0][at + e] += slope_terms * fabs(k[from + e]);
            d[1][from + e] += slope * q[at + e];
            terms[1][from + e] += slope_terms * fabs(q[at + e]);
            d[2][from + e] += part * dout[at + e];
            terms[2][from + e] += part * fabs(dout[at + e]);
          }
        }
      }
  const device_bytes a = uploaded(q), c = uploaded(k), e = uploaded(v), o = uploaded(out), g = uploaded(dout),
                     m(masked ? mask.data() : 0, mask.size()), dq = unwritten(4 * n), dk = unwritten(4 * kv), dv = unwritten(4 * kv);
  check_status("attention, gradient", where, AQ_OK,
               aq_cuda_attention_backward(a.handle, c.handle, e.handle, o.handle, g.handle, m.handle, batch, tokens, heads, kv_heads, size,
                                          scale, dq.handle, dk.handle, dv.handle, stream));
  const device_bytes *outputs[3] = {&dq, &dk, &dv};
  for (int i = 0; i < 3; i++) {
    floats expected(d[i].size());
    std::vector<double> tolerance(d[i].size());
    for (size_t j = 0; j < expected.size(); j++) {
      expected[j] = (float)d[i][j];
      tolerance[j] = terms[i][j] * (2 * worst * ((double)size + 4) + (double)(tokens * shared + size) + 32) * 0x1p-23;
    }
    check_floats("attention, gradient", where, expected, *outputs[i], tolerance);
  }
}

static void run_step_kl(size_t rows, size_t cols, bool weighted) {
  const std::string where = std::to_string(rows) + "x" + std::to_string(cols);
  floats full = gaussians(rows * cols, 3.0f), other = full, weights(rows);
  for (float &v : other) v += 0.1f * gaussian();
  for (float &v : weights) v = fabsf(gaussian());
  if (cols > 2) full[1] = other[1] = -INFINITY;
  std::vector<double> kl(rows), kl_tolerance(rows), squares(rows);
  floats gradient(rows * cols), difference(rows * cols);
  for (size_t row = 0; row < rows; row++) {
    const float *a = &full[row * cols], *b = &other[row * cols];
    double sums[2] = {0, 0}, tops[2] = {-INFINITY, -INFINITY};
    for (size_t i = 0; i < cols; i++) tops[0] = fmax(tops[0], a[i]), tops[1] = fmax(tops[1], b[i]);
    for (size_t i = 0; i < cols; i++) sums[0] += exp(a[i] - tops[0]), sums[1] += exp(b[i] - tops[1]);
    for (size_t i = 0; i < cols; i++) {
      const double p = exp(a[i] - tops[0]) / sums[0], other_p = exp(b[i] - tops[1]) / sums[1], weight = weighted ? weights[row] : 1.0;
      if (p > 0) {
        kl[row] += p * (a[i] - tops[0] - log(sums[0]) - (b[i] - tops[1] - log(sums[1])));
        kl_tolerance[row] += p * (fabs(a[i] - tops[0]) + fabs(b[i] - tops[1]) + 8) * ((double)cols + 8) * 0x1p-52;
      }
      gradient[row * cols + i] = (float)(weight * (other_p - p));
    }
    kl[row] = fmax(kl[row], 0.0);
  }
  const device_bytes a = uploaded(full), b = uploaded(other), w(weighted ? weights.data() : 0, 4 * rows), o = unwritten(8 * rows),
                     g = unwritten(4 * gradient.size());
  check_status("token KL", where, AQ_OK, aq_cuda_token_kl(a.handle, b.handle, w.handle, rows, cols, o.handle, g.handle, stream));
  const bytes own = downloaded(o);
  check_guard("token KL", where, own);
  for (size_t row = 0; row < rows; row++) check_near("token KL", where, kl[row], ((const double *)own.data())[row], kl_tolerance[row]);
  std::vector<double> tolerance(gradient.size());
  for (size_t i = 0; i < tolerance.size(); i++) tolerance[i] = fabs(gradient[i]) * 0x1p-23 + 1e-13;
  check_floats("token KL, gradient", where, gradient, g, tolerance);

  full = gaussians(rows * cols), other = gaussians(rows * cols);
  for (size_t i = 0; i < full.size(); i++) {
    const double weight = weighted ? weights[i / cols] : 1.0, d = (double)other[i] - full[i];
    squares[i / cols] += weight * d * d;
    difference[i] = (float)(2 * weight * d);
    tolerance[i] = fabs(difference[i]) * 0x1p-23;
  }
  const device_bytes x = uploaded(full), y = uploaded(other), s = unwritten(8 * rows), e = unwritten(4 * full.size());
  check_status("squared errors", where, AQ_OK, aq_cuda_squared_errors(x.handle, y.handle, w.handle, rows, cols, s.handle, e.handle, stream));
  const bytes sums = downloaded(s);
  check_guard("squared errors", where, sums);
  for (size_t row = 0; row < rows; row++)
    check_near("squared errors", where, squares[row], ((const double *)sums.data())[row], squares[row] * ((double)cols + 8) * 0x1p-52);
  check_floats("squared errors, gradient", where, difference, e, tolerance);
}

static void run_gradients(void) {
  for (size_t n : {1, 255, 3000}) run_slopes(n);
  for (size_t cols : {1, 7, 256, 1030}) run_norm_slopes(1 + random_bits() % 4, cols);
  for (int32_t bits : {2, 3, 4, 8})
    for (size_t cols : {1, 33, 300}) run_packed_slopes({5, cols, bits, (size_t)(random_bits() % 2 ? 32 : 0), 0, AQ_F32, GAUSSIAN, 0});
  for (bool masked : {false, true}) {
    run_attention_slopes(2, 1, 1, 1, 1, masked);
    run_attention_slopes(2, 33, 4, 2, 72, masked);
    run_attention_slopes(1, 40, 3, 1, 256, masked);
  }
  for (size_t cols : {1, 5, 256, 1030}) run_step_kl(3, cols, cols % 2);
  for (size_t rows : {1, 31, 33, 70})
    for (size_t cols : {1, 32, 45}) {
      const std::string where = std::to_string(rows) + "x" + std::to_string(cols);
      const floats in = gaussians(rows * cols), other = gaussians(rows * cols);
      floats out(rows * cols), sums(cols);
      aq_transpose(in.data(), rows, cols, out.data(), AQ_ISA_SCALAR, 1);
      const device_bytes a = uploaded(in), b = uploaded(other), o = unwritten(4 * out.size()), s = unwritten(4 * cols);
      check_status("transpose", where, AQ_OK, aq_cuda_transpose(a.handle, rows, cols, o.handle, stream));
      check("transpose", where, bytes_of(out), downloaded(o));
      for (int both = 0; both < 2; both++) {
        aq_column_sums(in.data(), both ? other.data() : 0, 1, rows, cols, cols, sums.data(), AQ_ISA_SCALAR, 1);
        check_status("column sums", where, AQ_OK, aq_cuda_column_sums(a.handle, both ? b.handle : 0, 1, rows, cols, cols, s.handle, stream));
        check("column sums", where, bytes_of(sums), downloaded(s));
      }
    }
}

#endif
