/* experts.cu: mixtures of experts: the choice of a token's experts, a thread a token, and rows on their way
 * to them and back, with the bytes of the CPU's. */
#include "../context.h"

#include "../../arithmetic/experts.h"

struct choose_experts {
  float *logits;
  const float *bias;
  size_t experts, per_token;
  int32_t *expert;
  float *weight;
  __device__ void operator()(size_t row) const {
    aq_experts_of_token(logits + row * experts, bias, experts, per_token, expert + row * per_token, weight + row * per_token);
  }
};

int32_t aq_cuda_choose_experts(aq_cuda_buffer logits, aq_cuda_buffer bias, size_t rows, size_t experts, size_t per_token,
                               aq_cuda_buffer expert, aq_cuda_buffer weight, aq_cuda_stream stream) {
  if (rows == 0 || per_token == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(rows, experts, &on, stream);
  if (status != AQ_OK) return status;
  if (per_token > experts || experts > INT32_MAX) return AQ_E_SHAPE;
  const choose_experts f = {aq_cuda_view<float>(logits, rows * experts, on, &status),
                            aq_cuda_optional(bias, experts, on, &status),
                            experts,
                            per_token,
                            aq_cuda_view<int32_t>(expert, rows * per_token, on, &status),
                            aq_cuda_view<float>(weight, rows * per_token, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, rows) : status;
}

struct gather_rows {
  const float *x;
  const int32_t *place;
  size_t rows, cols;
  float *out;
  __device__ void operator()(size_t at) const {
    const size_t i = aq_quotient(at, cols), row = (size_t)place[i];
    out[at] = row < rows ? x[row * cols + (at - i * cols)] : 0.0f;
  }
};

struct scale_rows {
  float *x;
  const float *factor;
  size_t cols;
  __device__ void operator()(size_t at) const { x[at] = x[at] * factor[aq_quotient(at, cols)]; }
};

struct add_rows {
  const float *x;
  const int32_t *place;
  size_t rows, cols;
  float *out;
  __device__ void operator()(size_t at) const {
    const size_t i = aq_quotient(at, cols), row = (size_t)place[i];
    if (row < rows) out[row * cols + (at - i * cols)] += x[at];
  }
};

int32_t aq_cuda_gather_rows(aq_cuda_buffer x, aq_cuda_buffer place, size_t count, size_t rows, size_t cols,
                            aq_cuda_buffer out, aq_cuda_stream stream) {
  if (count == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  if (!aq_counts_allowed(count, cols)) return AQ_E_SHAPE;
  const gather_rows f = {aq_cuda_view<float>(x, rows * cols, on, &status), aq_cuda_view<int32_t>(place, count, on, &status), rows, cols,
                         aq_cuda_view<float>(out, count * cols, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, count * cols) : status;
}

int32_t aq_cuda_scale_rows(aq_cuda_buffer x, aq_cuda_buffer factor, size_t rows, size_t cols, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  const scale_rows f = {aq_cuda_view<float>(x, rows * cols, on, &status), aq_cuda_view<float>(factor, rows, on, &status), cols};
  return status == AQ_OK ? aq_run_elements(on, f, rows * cols) : status;
}

int32_t aq_cuda_add_rows(aq_cuda_buffer x, aq_cuda_buffer place, size_t count, size_t rows, size_t cols,
                         aq_cuda_buffer out, aq_cuda_stream stream) {
  if (count == 0 || cols == 0) return AQ_OK;
  aq_stream_state *on;
  int32_t status = aq_cuda_use_for(rows, cols, &on, stream);
  if (status != AQ_OK) return status;
  if (!aq_counts_allowed(count, cols)) return AQ_E_SHAPE;
  const add_rows f = {aq_cuda_view<float>(x, count * cols, on, &status), aq_cuda_view<int32_t>(place, count, on, &status), rows, cols,
                      aq_cuda_view<float>(out, rows * cols, on, &status)};
  return status == AQ_OK ? aq_run_elements(on, f, count * cols) : status;
}
