/* forward/linear.c: linear layers over threads, and the functions of arrowquant.h for those of float32
 * activations. */
#include "linear.h"

#include "../dispatch.h"
#include "../threads.h"

typedef struct {
  const aq_linear_kernels *kernels;
  const aq_linear_job *job;
  int by_tokens;
} linear_context;

static int32_t linear_units(const void *context, size_t begin, size_t end) {
  const linear_context *c = context;
  const aq_linear_job *job = c->job;
  const size_t tile = c->kernels->row_tile;
  if (c->by_tokens) {
    c->kernels->many(job, begin, end, 0, job->rows);
    return AQ_OK;
  }
  const size_t row_begin = begin * tile, row_end = aq_min_size(end * tile, job->rows);
  if (job->tokens > c->kernels->few_tokens) c->kernels->many(job, 0, job->tokens, row_begin, row_end);
  for (size_t t = 0; t < job->tokens && job->tokens <= c->kernels->few_tokens; t++)
    c->kernels->one(job, t, row_begin, row_end);
  return AQ_OK;
}

int32_t aq_run_linear(const aq_linear_kernels *kernels, const aq_linear_job *job, int32_t threads) {
  const size_t tokens = job->tokens;
  if (job->cols == 0) {
    for (size_t t = 0; t < tokens; t++)
      for (size_t row = 0; row < job->rows; row++) job->out[t * job->rows + row] = job->bias ? job->bias[row] : 0.0f;
    return AQ_OK;
  }
  const size_t tiles = (job->rows - 1) / kernels->row_tile + 1;
  const double products = (double)tokens * (double)job->rows * (double)job->cols;
  const size_t work = aq_work(products / (tokens <= kernels->few_tokens ? 64.0 : kernels->per_work));
  /* By rows every weight is prepared once; by tokens once a thread, but the parts come out even. */
  const size_t count = aq_thread_count(tokens, work, threads);
  const int by_tokens = tiles < 4 * count && tiles % count != 0 && tokens >= 32 * count;
  const linear_context context = {kernels, job, by_tokens};
  return aq_run_units(linear_units, &context, by_tokens ? tokens : tiles, work, threads);
}

int32_t aq_check_linear(const aq_linear_job *job, int some) {
  if (!job->out || !some) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(job->rows, job->cols) || !aq_counts_allowed(job->tokens, job->cols) ||
      !aq_counts_allowed(job->tokens, job->rows))
    return AQ_E_SHAPE;
  return AQ_OK;
}

int32_t aq_linear(const float *x, size_t tokens, const void *weights, int32_t dtype, const float *bias, size_t rows,
                  size_t cols, float *out, int32_t isa, int32_t threads) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (dtype != AQ_F32 && dtype != AQ_F16 && dtype != AQ_BF16) return AQ_E_ARGUMENT;
  const aq_linear_job job = {.x = x, .tokens = tokens, .weights = weights, .dtype = dtype, .bias = bias, .rows = rows,
                             .cols = cols, .out = out};
  const int32_t status = aq_check_linear(&job, (x && weights) || cols == 0);
  return status == AQ_OK ? aq_run_linear(&kernels->forward->linear, &job, threads) : status;
}

int32_t aq_linear_packed(const float *x, size_t tokens, const uint32_t *packed, const uint16_t *scale,
                         const uint16_t *zero_point, const float *bias, size_t rows, size_t cols, int32_t bits,
                         size_t group_size, float *out, int32_t isa, int32_t threads) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  AQ_KERNELS(isa);
  aq_linear_job job = {.x = x, .tokens = tokens, .bias = bias, .rows = rows, .cols = cols, .out = out};
  int32_t status = aq_check_linear(&job, x || cols == 0);
  if (status == AQ_OK && cols)
    status = aq_view_packed(packed, scale, zero_point, rows, cols, bits, group_size, &job.view);
  return status == AQ_OK ? aq_run_linear(&kernels->forward->linear, &job, threads) : status;
}

int32_t aq_linear_two_level(const float *x, size_t tokens, const uint32_t *packed, const uint8_t *sub_scale,
                            const uint8_t *sub_min, const uint16_t *super_scale, const uint16_t *super_min,
                            const float *bias, size_t rows, size_t cols, int32_t bits, size_t group_size,
                            int32_t scale_bits, float *out, int32_t isa, int32_t threads) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  AQ_KERNELS(isa);
  aq_linear_job job = {.x = x, .tokens = tokens, .bias = bias, .rows = rows, .cols = cols, .out = out};
  int32_t status = aq_check_linear(&job, x || cols == 0);
  if (status == AQ_OK && cols)
    status = aq_view_two_level(packed, sub_scale, sub_min, super_scale, super_min, rows, cols, bits, group_size,
                               scale_bits, &job.view);
  return status == AQ_OK ? aq_run_linear(&kernels->forward->linear, &job, threads) : status;
}
