/* int8/scalar.c: 8-bit activations times packed weights in plain loops: the oracle whose bytes every other
 * instruction set must give. */
#include "kernels.h"

static int range(const float *x, size_t n, float *minimum, float *maximum) {
  float low = 0.0f, high = 0.0f;
  for (size_t i = 0; i < n; i++) {
    if (!(x[i] - x[i] == 0.0f)) return 0;
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  *minimum = low;
  *maximum = high;
  return 1;
}

static int encode(const float *x, size_t n, float scale, float zero_point, float code_max, uint8_t *codes) {
  for (size_t i = 0; i < n; i++) {
    if (!(x[i] - x[i] == 0.0f)) return 0;
    codes[i] = (uint8_t)aq_activation_code(x[i], scale, zero_point, code_max);
  }
  return 1;
}

static int round_values(const float *x, size_t n, float scale, float zero_point, float code_max, float *out) {
  for (size_t i = 0; i < n; i++) {
    if (!(x[i] - x[i] == 0.0f)) return 0;
    out[i] = scale * (aq_activation_code(x[i], scale, zero_point, code_max) - zero_point);
  }
  return 1;
}

static float dot(const aq_linear_job *job, size_t token, size_t row) {
  const aq_packed_view *view = &job->view;
  const uint8_t *packed = (const uint8_t *)(view->packed + row * view->words), *x = job->codes + token * job->cols;
  const size_t size = aq_segment_cols(view), bits = (size_t)view->bits;
  const int32_t zero = job->x_zero[token];
  float total = 0.0f;
  for (size_t col = 0, segment = 0; col < job->cols; col += size, segment++) {
    const size_t group = row * view->groups + (view->groups == 1 ? 0 : segment), n = aq_min_size(size, job->cols - col);
    int32_t products = 0, sum = 0;
    for (size_t i = col; i < col + n; i++) {
      int32_t code = 0;
      for (size_t bit = 0; bit < bits; bit++)
        code |= (packed[(i * bits + bit) / 8] >> (i * bits + bit) % 8 & 1) << bit;
      if (view->levels) code = aq_trellis_level(packed, i, view->bits);
      products += (x[i] - zero) * code;
      sum += x[i] - zero;
    }
    const float scale = aq_float_from_half(view->scale[group]);
    if (view->levels) {
      const float weighted = scale * AQ_TRELLIS_UNIT * (float)products;
      const float shift = aq_float_from_half(view->zero_point[group]) * (float)sum, term = weighted + shift;
      total = total + term;
      continue;
    }
    const float middle = (float)(1 << (bits - 1));
    const float zero_point = view->zero_point ? aq_float_from_half(view->zero_point[group]) : middle;
    const float shift = zero_point * (float)sum, difference = (float)products - shift, term = scale * difference;
    total = total + term;
  }
  return total;
}

static void linear(const aq_linear_job *job, size_t token_begin, size_t token_end, size_t row_begin, size_t row_end) {
  for (size_t t = token_begin; t < token_end; t++)
    for (size_t row = row_begin; row < row_end; row++) {
      const float y = job->x_scale[t] * dot(job, t, row);
      job->out[t * job->rows + row] = job->bias ? y + job->bias[row] : y;
    }
}

static void linear_vector(const aq_linear_job *job, size_t token, size_t row_begin, size_t row_end) {
  linear(job, token, token + 1, row_begin, row_end);
}

const aq_int8_kernels aq_int8_scalar = {{1, AQ_FEW_TOKENS, 1024.0, linear, linear_vector}, range, encode, round_values};
