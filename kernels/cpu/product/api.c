/* product/api.c: products of matrices over threads, and the function of arrowquant.h for them. */
#include "../dispatch.h"
#include "../threads.h"

typedef struct {
  const aq_product_kernels *kernels;
  const aq_product_job *job;
  size_t rows, cols;             /* of c */
  size_t block_rows, block_cols; /* of a unit */
  int upper;
} product_context;

/* Blocks of columns in front of the diagonal in a row of blocks: they have nothing to do. */
static size_t skipped(const product_context *c, size_t row_block) {
  return c->upper ? row_block * c->block_rows / c->block_cols : 0;
}

static size_t unit_count(const product_context *c) {
  const size_t across = (c->cols - 1) / c->block_cols + 1, down = (c->rows - 1) / c->block_rows + 1;
  size_t count = 0;
  for (size_t i = 0; i < down; i++) count += across - skipped(c, i);
  return count;
}

static int32_t product_units(const void *context, size_t begin, size_t end) {
  const product_context *c = context;
  const size_t across = (c->cols - 1) / c->block_cols + 1;
  size_t row_block = 0, unit = begin;
  for (; unit >= across - skipped(c, row_block); row_block++) unit -= across - skipped(c, row_block);
  for (; begin < end; begin++) {
    const size_t row = row_block * c->block_rows, col = (skipped(c, row_block) + unit) * c->block_cols;
    c->kernels->block(c->job, row, aq_min_size(row + c->block_rows, c->rows), col,
                      aq_min_size(col + c->block_cols, c->cols), c->upper);
    if (++unit == across - skipped(c, row_block)) unit = 0, row_block++;
  }
  return AQ_OK;
}

/* Multiply-adds that take as long as a unit of work. */
#define AQ_PER_WORK 512

int32_t aq_run_product(const aq_product_kernels *kernels, const aq_product_job *job, size_t rows, size_t cols,
                       int upper, int32_t threads) {
  if (rows == 0 || cols == 0 || job->k == 0) return AQ_OK;
  product_context context = {kernels, job, rows, cols, AQ_PRODUCT_ROWS, AQ_PRODUCT_COLS, upper};
  const size_t work = aq_work((double)rows * (double)cols * (double)job->k / (upper ? 2 : 1) / AQ_PER_WORK);
  const size_t count = aq_thread_count((size_t)-1, work, threads);
  /* smaller blocks where there are too few for all threads to end together */
  while (count > 1 && unit_count(&context) < 6 * count && context.block_cols > 32) {
    if (context.block_cols > 128 || context.block_rows < 84)
      context.block_cols /= 2;
    else
      context.block_rows /= 2;
  }
  return aq_run_units(product_units, &context, unit_count(&context), work, threads);
}

int32_t aq_multiply(const float *a, const float *b, size_t rows, size_t k, size_t cols, float *c, int32_t isa,
                    int32_t threads) {
  if (rows == 0 || cols == 0 || k == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!a || !b || !c) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(rows, k) || !aq_counts_allowed(k, cols) || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  const aq_product_job job = {.a = a, .a_row = (ptrdiff_t)k, .a_col = 1, .b = b, .b_row = (ptrdiff_t)cols, .b_col = 1,
                              .c = c, .c_row = cols, .k = k};
  const int32_t status = aq_run_product(kernels->product, &job, rows, cols, 0, threads);
  return status == AQ_OK ? aq_stopped() : status;
}
