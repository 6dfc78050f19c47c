/* trellis/rotation.c: signs and Hadamard transforms, which spread large values over blocks. */
#include "../dispatch.h"
#include "../threads.h"

/* What value i is multiplied by: the sign of a hash, and what keeps the transform's lengths. */
static float factor_of(uint32_t seed, size_t i, float length) {
  uint32_t hash = (uint32_t)i * 0x9e3779b1u + seed;
  hash = (hash ^ hash >> 16) * 0x85ebca6bu;
  hash = (hash ^ hash >> 13) * 0xc2b2ae35u;
  return (hash ^ hash >> 16) >> 31 ? -length : length;
}

typedef struct {
  const float *x;
  float *out;
  size_t blocks, block, cols; /* blocks of an item, rows of a block */
  uint32_t seed;
  int32_t inverse;
  float length;
} rotation;

/* Sums and differences of halves, in place: of single rows first. */
static void transform(float *values, size_t rows, size_t cols) {
  for (size_t half = cols; half < rows * cols; half *= 2)
    for (size_t first = 0; first < rows * cols; first += 2 * half)
      for (size_t i = first; i < first + half; i++) {
        const float a = values[i], b = values[i + half];
        values[i] = a + b;
        values[i + half] = a - b;
      }
}

static int32_t run(const void *context, size_t begin, size_t end) {
  const rotation *r = context;
  const size_t size = r->block * r->cols;
  for (size_t unit = begin; unit < end; unit++) {
    const float *x = r->x + unit * size;
    float *out = r->out + unit * size;
    const size_t first = unit % r->blocks * r->block;
    if (r->inverse) {
      if (out != x) __builtin_memcpy(out, x, size * sizeof *out);
      transform(out, r->block, r->cols);
      x = out;
    }
    for (size_t row = 0; row < r->block; row++) {
      const float factor = factor_of(r->seed, first + row, r->length);
      for (size_t i = row * r->cols; i < (row + 1) * r->cols; i++) out[i] = factor * x[i];
    }
    if (!r->inverse) transform(out, r->block, r->cols);
  }
  return AQ_OK;
}

int32_t aq_rotate(const float *x, size_t batch, size_t rows, size_t cols, int32_t seed, int32_t inverse, float *out,
                  int32_t threads) {
  if (batch == 0 || rows == 0 || cols == 0) return AQ_OK;
  if (!x || !out) return AQ_E_ARGUMENT;
  if (!aq_three_counts_allowed(batch, rows, cols)) return AQ_E_SHAPE;
  const size_t block = rows & (~rows + 1);
  rotation job = {x, out, rows / block, block, cols, (uint32_t)seed, inverse, 1};
  size_t left = block, stages = 1;
  for (; left > 2; left /= 4, stages += 2) job.length /= 2;
  if (left == 2) job.length *= 0x1.6a09e6p-1f;
  const double work = (double)batch * (double)rows * (double)cols / AQ_CHEAP * (double)stages;
  return aq_run_units(run, &job, batch * job.blocks, aq_work(work), threads);
}
