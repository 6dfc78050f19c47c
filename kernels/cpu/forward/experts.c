/* forward/experts.c: the functions of arrowquant.h for mixtures of experts: the choice of a token's experts,
 * and rows on their way to them and back. They move numbers, or are small: one version serves every
 * instruction set. */
#include "../../arithmetic/experts.h"
#include "../threads.h"

typedef struct {
  float *logits;
  const float *bias;
  size_t experts, per_token;
  int32_t *expert;
  float *weight;
} choice_context;

static int32_t choose(const void *context, size_t begin, size_t end) {
  const choice_context *c = context;
  for (size_t row = begin; row < end; row++)
    aq_experts_of_token(c->logits + row * c->experts, c->bias, c->experts, c->per_token, c->expert + row * c->per_token,
                        c->weight + row * c->per_token);
  return AQ_OK;
}

int32_t aq_choose_experts(float *logits, const float *bias, size_t rows, size_t experts, size_t per_token,
                          int32_t *expert, float *weight, int32_t threads) {
  if (rows == 0 || per_token == 0) return AQ_OK;
  if (!logits || !expert || !weight) return AQ_E_ARGUMENT;
  if (per_token > experts || experts > INT32_MAX || !aq_counts_allowed(rows, experts)) return AQ_E_SHAPE;
  const choice_context context = {logits, bias, experts, per_token, expert, weight};
  return aq_run_units(choose, &context, rows, rows * experts, threads);
}

typedef struct {
  const float *x, *factor;
  const int32_t *place;
  size_t cols;
  float *out;
} rows_context;

static int32_t gather(const void *context, size_t begin, size_t end) {
  const rows_context *c = context;
  for (size_t i = begin; i < end; i++)
    __builtin_memcpy(c->out + i * c->cols, c->x + (size_t)c->place[i] * c->cols, c->cols * sizeof(float));
  return AQ_OK;
}

static int32_t scale(const void *context, size_t begin, size_t end) {
  const rows_context *c = context;
  for (size_t row = begin; row < end; row++)
    for (size_t i = row * c->cols; i < (row + 1) * c->cols; i++) c->out[i] = c->out[i] * c->factor[row];
  return AQ_OK;
}

static int32_t add(const void *context, size_t begin, size_t end) {
  const rows_context *c = context;
  for (size_t i = begin; i < end; i++) {
    const float *from = c->x + i * c->cols;
    float *to = c->out + (size_t)c->place[i] * c->cols;
    for (size_t k = 0; k < c->cols; k++) to[k] = to[k] + from[k];
  }
  return AQ_OK;
}

static int32_t over_threads(aq_part_function run, const rows_context *c, size_t count, size_t rows, int32_t threads) {
  if (count == 0 || c->cols == 0) return AQ_OK;
  if (!c->out || (!c->factor && (!c->x || !c->place))) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(count, c->cols) || !aq_counts_allowed(rows, c->cols)) return AQ_E_SHAPE;
  for (size_t i = 0; i < count && c->place; i++)
    if (c->place[i] < 0 || (size_t)c->place[i] >= rows) return AQ_E_VALUE;
  return aq_run_units(run, c, count, count * c->cols / AQ_CHEAP, threads);
}

int32_t aq_gather_rows(const float *x, const int32_t *place, size_t count, size_t rows, size_t cols, float *out,
                       int32_t threads) {
  const rows_context context = {.x = x, .place = place, .cols = cols, .out = out};
  return over_threads(gather, &context, count, rows, threads);
}

int32_t aq_scale_rows(float *x, const float *factor, size_t rows, size_t cols, int32_t threads) {
  if (rows != 0 && cols != 0 && !factor) return AQ_E_ARGUMENT;
  const rows_context context = {.factor = factor, .cols = cols, .out = x};
  return over_threads(scale, &context, rows, rows, threads);
}

int32_t aq_add_rows(const float *x, const int32_t *place, size_t count, size_t rows, size_t cols, float *out,
                    int32_t threads) {
  const rows_context context = {.x = x, .place = place, .cols = cols, .out = out};
  return over_threads(add, &context, count, rows, threads);
}
