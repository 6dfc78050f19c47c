/* backward/loops.h: the loops of backward/kernels.h, included once by each file that defines AQ_NAMED. Sums
 * run in AQ_SUM_LANES lanes by position, added up in order: the same bits whatever the vectors' width. */
#include "kernels.h"

AQ_INLINE double total(const double lanes[AQ_SUM_LANES]) {
  double sum = 0.0;
  for (int i = 0; i < AQ_SUM_LANES; i++) sum += lanes[i];
  return sum;
}

/* Runs body(i, lane) for i in [0, count), lane = i mod AQ_SUM_LANES. */
#define AQ_FOR_LANES(count, ...)                                              \
  do {                                                                        \
    size_t at_ = 0;                                                           \
    for (; at_ + AQ_SUM_LANES <= (count); at_ += AQ_SUM_LANES)                \
      for (size_t lane = 0; lane < AQ_SUM_LANES; lane++) {                    \
        const size_t i = at_ + lane;                                          \
        __VA_ARGS__                                                           \
      }                                                                       \
    for (size_t lane = 0; at_ < (count); at_++, lane++) {                     \
      const size_t i = at_;                                                   \
      __VA_ARGS__                                                             \
    }                                                                         \
  } while (0)

static void transpose(const float *in, size_t rows, size_t cols, size_t row_begin, size_t row_end, float *out) {
  for (size_t row = row_begin; row < row_end; row += 16)
    for (size_t col = 0; col < cols; col += 16) {
      const size_t row_stop = aq_min_size(row + 16, row_end), col_stop = aq_min_size(col + 16, cols);
      for (size_t c = col; c < col_stop; c++)
        for (size_t r = row; r < row_stop; r++) out[c * rows + r] = in[r * cols + c];
    }
}

static void code_sums(const uint8_t *codes, const float *dw, size_t n, double sums[2]) {
  double products[AQ_SUM_LANES] = {0}, plain[AQ_SUM_LANES] = {0};
  AQ_FOR_LANES(n, {
    products[lane] += (double)dw[i] * (double)codes[i];
    plain[lane] += (double)dw[i];
  });
  sums[0] = total(products);
  sums[1] = total(plain);
}

/* y = x r w, r = (mean(x^2) + e)^(-1/2): dx = r (dy w - x r^2 mean(dy w x)) */
static void rms_norm(const float *x, const float *dy, size_t cols, const float *weight, float epsilon, float *dx) {
  double squares[AQ_SUM_LANES] = {0}, products[AQ_SUM_LANES] = {0};
  AQ_FOR_LANES(cols, {
    const double g = (double)dy[i] * (weight ? (double)weight[i] : 1.0);
    squares[lane] += (double)x[i] * (double)x[i];
    products[lane] += g * (double)x[i];
  });
  const double n = (double)cols, r = 1.0 / __builtin_sqrt(total(squares) / n + (double)epsilon);
  const double share = r * r * r * total(products) / n;
  for (size_t i = 0; i < cols; i++) {
    const double g = (double)dy[i] * (weight ? (double)weight[i] : 1.0);
    dx[i] = (float)(r * g - share * (double)x[i]);
  }
}

/* y = (x - m) r w + b: dx = r (g - mean(g) - h mean(g h)), g = dy w, h = (x - m) r */
static void layer_norm(const float *x, const float *dy, size_t cols, const float *weight, float epsilon, float *dx) {
  double sums[AQ_SUM_LANES] = {0}, squares[AQ_SUM_LANES] = {0}, gradients[AQ_SUM_LANES] = {0},
         products[AQ_SUM_LANES] = {0};
  const double n = (double)cols;
  AQ_FOR_LANES(cols, { sums[lane] += (double)x[i]; });
  const double mean = total(sums) / n;
  AQ_FOR_LANES(cols, {
    const double g = (double)dy[i] * (weight ? (double)weight[i] : 1.0), centred = (double)x[i] - mean;
    squares[lane] += centred * centred;
    gradients[lane] += g;
    products[lane] += g * centred;
  });
  const double r = 1.0 / __builtin_sqrt(total(squares) / n + (double)epsilon);
  const double mean_gradient = total(gradients) / n, share = r * r * total(products) / n;
  for (size_t i = 0; i < cols; i++) {
    const double g = (double)dy[i] * (weight ? (double)weight[i] : 1.0);
    dx[i] = (float)(r * (g - mean_gradient - ((double)x[i] - mean) * share));
  }
}

/* Scores of a block, scores[i][j] = sum_d a[i, d] b[j, d], d in parts of AQ_BLOCK with b turned over. */
AQ_INLINE void block_scores(const float *a, size_t a_stride, size_t m, const float *b, size_t b_stride, size_t n,
                            size_t size, float scores[AQ_BLOCK_QUERIES][AQ_BLOCK]) {
  float turned[AQ_BLOCK][AQ_BLOCK];
  for (size_t i = 0; i < m; i++)
    for (size_t j = 0; j < AQ_BLOCK; j++) scores[i][j] = 0.0f;
  for (size_t first = 0; first < size; first += AQ_BLOCK) {
    const size_t depth = aq_min_size(AQ_BLOCK, size - first);
    for (size_t d = 0; d < depth; d++)
      for (size_t j = 0; j < AQ_BLOCK; j++) turned[d][j] = j < n ? b[j * b_stride + first + d] : 0.0f;
    for (size_t i = 0; i < m; i++)
      for (size_t d = 0; d < depth; d++) {
        const float factor = a[i * a_stride + first + d];
        for (size_t j = 0; j < AQ_BLOCK; j++) scores[i][j] += factor * turned[d][j];
      }
  }
}

/* P = softmax(scale q k^T), dP = dout v^T, dS = P (dP - dout out): dq = scale dS k, dk = scale dS^T q, dv =
 * P^T dout. One key/value head of one item: the heads that share it add up in order. Scores are made again,
 * never kept. */
static void attention(const aq_attention_backward_job *job, size_t item, size_t kv_head) {
  float scores[AQ_BLOCK_QUERIES][AQ_BLOCK], slopes[AQ_BLOCK_QUERIES][AQ_BLOCK];
  float largest[AQ_BLOCK_QUERIES], sums[AQ_BLOCK_QUERIES], shares[AQ_BLOCK_QUERIES];
  const float lowest = -__builtin_inff();
  const size_t size = job->head_size, tokens = job->tokens, shared = job->heads / job->kv_heads;
  const size_t q_stride = job->heads * size, kv_stride = job->kv_heads * size;
  const size_t kv_first = item * tokens * kv_stride + kv_head * size;
  const uint8_t *mask = job->key_mask ? job->key_mask + item * tokens : 0;
  for (size_t key = 0; key < tokens; key++)
    for (size_t d = 0; d < size; d++)
      job->dk[kv_first + key * kv_stride + d] = job->dv[kv_first + key * kv_stride + d] = 0.0f;
  for (size_t head = kv_head * shared; head < (kv_head + 1) * shared; head++)
    for (size_t query = 0; query < tokens; query += AQ_BLOCK_QUERIES) {
      const size_t m = aq_min_size(AQ_BLOCK_QUERIES, tokens - query);
      const size_t first = (item * tokens + query) * q_stride + head * size;
      const float *q = job->q + first, *dout = job->dout + first;
      for (size_t i = 0; i < m; i++) {
        largest[i] = lowest;
        sums[i] = 0.0f;
        double share = 0.0;
        for (size_t d = 0; d < size; d++)
          share += (double)dout[i * q_stride + d] * (double)job->out[first + i * q_stride + d];
        shares[i] = (float)share;
        for (size_t d = 0; d < size; d++) job->dq[first + i * q_stride + d] = 0.0f;
      }
      for (int pass = 0; pass < 2; pass++)
        for (size_t key = 0; key < tokens; key += AQ_BLOCK) {
          const size_t n = aq_min_size(AQ_BLOCK, tokens - key), kv = kv_first + key * kv_stride;
          block_scores(q, q_stride, m, job->k + kv, kv_stride, n, size, scores);
          for (size_t i = 0; i < m; i++)
            for (size_t j = 0; j < AQ_BLOCK; j++)
              scores[i][j] = j < n && (!mask || mask[key + j]) ? scores[i][j] * job->scale : lowest;
          if (pass == 0) {
            for (size_t i = 0; i < m; i++) {
              float peak = largest[i];
              for (size_t j = 0; j < n; j++) peak = scores[i][j] > peak ? scores[i][j] : peak;
              if (peak == lowest) continue;
              float sum = largest[i] == lowest ? 0.0f : sums[i] * aq_exp_of(largest[i] - peak);
              float lanes[AQ_SUM_LANES] = {0};
              for (size_t j = 0; j < AQ_BLOCK; j += AQ_SUM_LANES)
                for (size_t lane = 0; lane < AQ_SUM_LANES; lane++) lanes[lane] += aq_exp_of(scores[i][j + lane] - peak);
              for (size_t lane = 0; lane < AQ_SUM_LANES; lane++) sum += lanes[lane];
              largest[i] = peak;
              sums[i] = sum;
            }
            continue;
          }
          block_scores(dout, q_stride, m, job->v + kv, kv_stride, n, size, slopes);
          for (size_t i = 0; i < m; i++) {
            const float factor = sums[i] == 0.0f ? 0.0f : 1.0f / sums[i], peak = sums[i] == 0.0f ? 0.0f : largest[i];
            for (size_t j = 0; j < AQ_BLOCK; j++) {
              const float p = aq_exp_of(scores[i][j] - peak) * factor;
              scores[i][j] = p;
              slopes[i][j] = p * (slopes[i][j] - shares[i]) * job->scale;
            }
          }
          for (size_t i = 0; i < m; i++) {
            float *dq = job->dq + first + i * q_stride;
            for (size_t j = 0; j < n; j++) {
              const float p = scores[i][j], slope = slopes[i][j];
              const float *k = job->k + kv + j * kv_stride;
              float *dk = job->dk + kv + j * kv_stride, *dv = job->dv + kv + j * kv_stride;
              for (size_t d = 0; d < size; d++) dq[d] += slope * k[d];
              for (size_t d = 0; d < size; d++) dk[d] += slope * q[i * q_stride + d];
              for (size_t d = 0; d < size; d++) dv[d] += p * dout[i * q_stride + d];
            }
          }
        }
    }
}

static void elementwise(int32_t function, const float *x, const float *dy, size_t n, float *dx) {
  if (function == AQ_SILU_BACKWARD)
    for (size_t i = 0; i < n; i++) dx[i] = dy[i] * aq_silu_slope(x[i], aq_sigmoid_of(x[i]));
  else
    for (size_t i = 0; i < n; i++) dx[i] = dy[i] * aq_gelu_tanh_slope(x[i]);
}

static void silu_multiply(const float *gate, const float *up, const float *dy, size_t n, float *dgate, float *dup) {
  for (size_t i = 0; i < n; i++) {
    const float x = gate[i], s = aq_sigmoid_of(x), y = dy[i];
    dgate[i] = y * up[i] * aq_silu_slope(x, s);
    dup[i] = y * x * s;
  }
}

static void column_sums(const float *a, const float *b, size_t rows, size_t cols, size_t begin, size_t end,
                        float *out) {
  double sums[AQ_BLOCK];
  for (size_t first = begin; first < end; first += AQ_BLOCK) {
    const size_t n = aq_min_size(AQ_BLOCK, end - first);
    for (size_t i = 0; i < n; i++) sums[i] = 0.0;
    for (size_t row = 0; row < rows; row++) {
      const float *from = a + row * cols + first;
      if (b) {
        const float *other = b + row * cols + first;
        for (size_t i = 0; i < n; i++) sums[i] += (double)from[i] * (double)other[i];
      } else {
        for (size_t i = 0; i < n; i++) sums[i] += (double)from[i];
      }
    }
    for (size_t i = 0; i < n; i++) out[first + i] = (float)sums[i];
  }
}

static void adam(float *values, const float *gradients, float *first, float *second, size_t n, const aq_adam *step) {
  const float b1 = step->b1, c1 = step->c1, b2 = step->b2, c2 = step->c2;
  const float rate = step->rate, root = step->root, epsilon = step->epsilon;
  for (size_t i = 0; i < n; i++) {
    const float g = gradients[i], m = b1 * first[i] + c1 * g, v = b2 * second[i] + c2 * (g * g);
    first[i] = m;
    second[i] = v;
    values[i] = values[i] - rate * m / (__builtin_sqrtf(v) * root + epsilon);
  }
}

const aq_backward_kernels AQ_NAMED(backward) = {transpose,   code_sums,     rms_norm,    layer_norm, attention,
                                                elementwise, silu_multiply, column_sums, adam};
