/* trellis/rotation.c: signs and Hadamard transforms, which spread large values over blocks. */
#include "../../arithmetic/rotation.h"
#include "../dispatch.h"
#include "../threads.h"

typedef struct {
  const float *x;
  float *out;
  size_t rows, cols, block; /* rows of a block */
  uint32_t seed;
  int32_t inverse;
  float length;
} rotation;

#define AQ_FACTORS 64

/* out = factors x of items [begin, end): each factor is computed once. */
static void multiply(const rotation *r, const float *x, size_t begin, size_t end) {
  for (size_t first = 0; first < r->rows; first += AQ_FACTORS) {
    const size_t count = aq_min_size(AQ_FACTORS, r->rows - first);
    float factors[AQ_FACTORS];
    for (size_t i = 0; i < count; i++) factors[i] = aq_rotation_factor(r->seed, first + i, r->length);
    for (size_t item = begin; item < end; item++) {
      const size_t at = (item * r->rows + first) * r->cols;
      if (r->cols == 1)
        for (size_t i = 0; i < count; i++) r->out[at + i] = factors[i] * x[at + i];
      else
        for (size_t row = 0; row < count; row++)
          for (size_t i = at + row * r->cols; i < at + (row + 1) * r->cols; i++) r->out[i] = factors[row] * x[i];
    }
  }
}

/* Sums and differences of four parts of a run, two stages at once. */
static inline void quarter(float *restrict a, float *restrict b, float *restrict c, float *restrict d, size_t n) {
  for (size_t i = 0; i < n; i++) {
    const float s = a[i] + b[i], t = a[i] - b[i], u = c[i] + d[i], v = c[i] - d[i];
    a[i] = s + u;
    b[i] = t + v;
    c[i] = s - u;
    d[i] = t - v;
  }
}

static inline void halve(float *restrict a, float *restrict b, size_t n) {
  for (size_t i = 0; i < n; i++) {
    const float s = a[i] + b[i], t = a[i] - b[i];
    a[i] = s;
    b[i] = t;
  }
}

/* The transform of a block in place, runs of single rows first. */
static void transform(float *values, size_t rows, size_t cols) {
  const size_t n = rows * cols;
  size_t run = cols;
  for (; 4 * run <= n; run *= 4)
    for (float *v = values; v < values + n; v += 4 * run) {
      if (run == 1) quarter(v, v + 1, v + 2, v + 3, 1);
      else quarter(v, v + run, v + 2 * run, v + 3 * run, run);
    }
  if (run < n) halve(values, values + run, run);
}

static int32_t run(const void *context, size_t begin, size_t end) {
  const rotation *r = context;
  const size_t item = r->rows * r->cols, size = r->block * r->cols;
  float *const out = r->out + begin * item, *const behind = r->out + end * item;
  if (!r->inverse) multiply(r, r->x, begin, end);
  else if (out != r->x + begin * item)
    __builtin_memcpy(out, r->x + begin * item, (end - begin) * item * sizeof *out);
  for (float *block = out; block < behind; block += size) transform(block, r->block, r->cols);
  if (r->inverse) multiply(r, r->out, begin, end);
  return AQ_OK;
}

int32_t aq_rotate(const float *x, size_t batch, size_t rows, size_t cols, int32_t seed, int32_t inverse, float *out,
                  int32_t threads) {
  if (batch == 0 || rows == 0 || cols == 0) return AQ_OK;
  if (!x || !out) return AQ_E_ARGUMENT;
  if (!aq_three_counts_allowed(batch, rows, cols)) return AQ_E_SHAPE;
  const size_t block = aq_rotation_block(rows);
  const rotation job = {x, out, rows, cols, block, (uint32_t)seed, inverse, aq_rotation_length(block)};
  size_t stages = 1;
  for (size_t left = block; left > 2; left /= 4) stages += 2;
  const double work = (double)batch * (double)rows * (double)cols / AQ_CHEAP * (double)stages;
  return aq_run_units(run, &job, batch, aq_work(work), threads);
}
