/* forward/scalar.c: the parts of a forward pass in plain loops, with sums in double: the oracle that the
 * other instruction sets are compared with, within tolerances. */
#include "../quantize/kernels.h"
#include "elementary.h"
#include "kernels.h"

static double dot(const aq_linear_job *job, const float *x, size_t row) {
  double sum = 0.0;
  for (size_t col = 0; col < job->cols; col += AQ_SEGMENT) {
    float w[AQ_SEGMENT];
    const size_t n = aq_min_size(AQ_SEGMENT, job->cols - col);
    if (job->view.packed)
      aq_quantize_scalar.dequantize(&job->view, row, col, n, w);
    else
      aq_quantize_scalar.load(job->weights, job->dtype, row * job->cols + col, n, w);
    for (size_t i = 0; i < n; i++) sum += (double)x[col + i] * (double)w[i];
  }
  return sum;
}

static void linear(const aq_linear_job *job, size_t token_begin, size_t token_end, size_t row_begin, size_t row_end) {
  for (size_t t = token_begin; t < token_end; t++)
    for (size_t row = row_begin; row < row_end; row++)
      job->out[t * job->rows + row] =
          (float)(dot(job, job->x + t * job->cols, row) + (job->bias ? (double)job->bias[row] : 0.0));
}

static void linear_vector(const aq_linear_job *job, size_t token, size_t row_begin, size_t row_end) {
  linear(job, token, token + 1, row_begin, row_end);
}

static void rms_norm(const float *x, size_t cols, const float *weight, float epsilon, float *out) {
  double sum = 0.0;
  for (size_t i = 0; i < cols; i++) sum += (double)x[i] * (double)x[i];
  const double factor = 1.0 / __builtin_sqrt(sum / (double)cols + (double)epsilon);
  for (size_t i = 0; i < cols; i++) out[i] = (float)((double)x[i] * factor * (weight ? (double)weight[i] : 1.0));
}

static void layer_norm(const float *x, size_t cols, const float *weight, const float *bias, float epsilon, float *out) {
  double sum = 0.0, squares = 0.0;
  for (size_t i = 0; i < cols; i++) sum += (double)x[i];
  const double mean = sum / (double)cols;
  for (size_t i = 0; i < cols; i++) squares += ((double)x[i] - mean) * ((double)x[i] - mean);
  const double factor = 1.0 / __builtin_sqrt(squares / (double)cols + (double)epsilon);
  for (size_t i = 0; i < cols; i++)
    out[i] = (float)(((double)x[i] - mean) * factor * (weight ? (double)weight[i] : 1.0) +
                     (bias ? (double)bias[i] : 0.0));
}

/* Twice over the keys, for the largest score and for the sums; again for every 64 elements of a head. */
static void attention(const aq_attention_job *job, size_t item, size_t head, size_t begin, size_t end) {
  const size_t size = job->head_size, kv_head = head / (job->heads / job->kv_heads);
  const uint8_t *mask = job->key_mask ? job->key_mask + item * job->tokens : 0;
  for (size_t t = begin; t < end; t++) {
    const size_t at = ((item * job->tokens + t) * job->heads + head) * size;
    const size_t keys = aq_visible_keys(job, t);
    double largest = -__builtin_inf();
    for (size_t first = 0; first < size; first += 64) {
      const size_t n = aq_min_size(64, size - first);
      double sums[64] = {0}, total = 0.0;
      for (int pass = first > 0; pass < 2; pass++) {
        for (size_t key = 0; key < keys; key++) {
          if (mask && !mask[key]) continue;
          const size_t kv = ((item * job->tokens + key) * job->kv_heads + kv_head) * size;
          double score = 0.0;
          for (size_t i = 0; i < size; i++) score += (double)job->q[at + i] * (double)job->k[kv + i];
          score *= (double)job->scale;
          if (pass == 0) {
            if (!(score <= largest)) largest = score;
            continue;
          }
          const double p = aq_exp(score - largest);
          total += p;
          for (size_t i = 0; i < n; i++) sums[i] += p * (double)job->v[kv + first + i];
        }
      }
      for (size_t i = 0; i < n; i++) job->out[at + first + i] = total == 0.0 ? 0.0f : (float)(sums[i] / total);
    }
  }
}

static void rotary(float *x, double position, const double *frequency, size_t heads, size_t head_size, size_t first,
                   size_t count) {
  for (size_t i = 0; i < count; i++) {
    double sine, cosine;
    aq_sine_cosine(position * frequency[i], &sine, &cosine);
    for (size_t head = 0; head < heads; head++) {
      float *a = x + head * head_size + first + i, *b = a + head_size / 2;
      const double low = *a, high = *b;
      *a = (float)(low * cosine - high * sine);
      *b = (float)(high * cosine + low * sine);
    }
  }
}

static double sigmoid(double x) { return 1.0 / (1.0 + aq_exp(-x)); }

static void elementwise(int32_t function, const float *a, const float *b, size_t n, float *out) {
  for (size_t i = 0; i < n; i++) {
    const double x = a[i];
    switch (function) {
      case AQ_SILU: out[i] = (float)(x * sigmoid(x)); break;
      /* (1 + tanh(u)) / 2 = sigmoid(2 u) */
      case AQ_GELU_TANH: out[i] = (float)(x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))); break;
      case AQ_SILU_MULTIPLY: out[i] = (float)(x * sigmoid(x) * (double)b[i]); break;
      default: out[i] = a[i] + b[i]; break;
    }
  }
}

static void modulate(const float *x, const float *scale, const float *shift, size_t cols, float *out) {
  for (size_t i = 0; i < cols; i++) out[i] = (float)((double)x[i] * (1.0 + (double)scale[i]) + (double)shift[i]);
}

static void gate_add(const float *residual, const float *gate, const float *x, size_t cols, float *out) {
  for (size_t i = 0; i < cols; i++) out[i] = (float)((double)residual[i] + (double)gate[i] * (double)x[i]);
}

const aq_forward_kernels aq_forward_scalar = {{1, 1, 512.0, linear, linear_vector},
                                              SIZE_MAX, rms_norm, layer_norm, attention,
                                              rotary, elementwise, modulate, gate_add};
