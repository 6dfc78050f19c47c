/* statistics.h: what one thread adds to the error statistics, a chunk at a time, in double. */
#ifndef AQ_CUDA_STATISTICS_H
#define AQ_CUDA_STATISTICS_H

#include "chunk.h"

struct aq_error_sums {
  double aa, bb, ab, dd;
  float max_difference, max_a;
};

AQ_FUNCTION void aq_add_errors(const float a[AQ_CHUNK], const float b[AQ_CHUNK], size_t n, aq_error_sums *sums) {
  for (int k = 0; k < AQ_CHUNK; k++) {
    if ((size_t)k >= n) break;
    const double x = a[k], y = b[k], d = x - y;
    const float magnitude = x < 0 ? -a[k] : a[k], difference = (float)(d < 0 ? -d : d);
    sums->aa += x * x;
    sums->bb += y * y;
    sums->ab += x * y;
    sums->dd += d * d;
    if (magnitude > sums->max_a) sums->max_a = magnitude;
    if (difference > sums->max_difference) sums->max_difference = difference;
  }
}

/* Two flat arrays of n elements. */
struct aq_flat_pair {
  const void *a, *b;
  int32_t a_dtype, b_dtype;
  size_t n;
};

AQ_FUNCTION size_t aq_flat_chunks(size_t n) { return (n - 1) / AQ_CHUNK + 1; }

AQ_FUNCTION void aq_add_flat_errors(const aq_flat_pair &pair, size_t chunk, aq_error_sums *sums) {
  float x[AQ_CHUNK], y[AQ_CHUNK];
  const size_t first = chunk * AQ_CHUNK, n = aq_smaller(AQ_CHUNK, pair.n - first);
  aq_load_chunk(pair.a, pair.a_dtype, first, n, x);
  aq_load_chunk(pair.b, pair.b_dtype, first, n, y);
  aq_add_errors(x, y, n, sums);
}

/* Chunk i of rows * chunks. */
AQ_FUNCTION void aq_add_packed_errors(const void *weights, int32_t dtype, const aq_packed_matrix &matrix, size_t i,
                                      aq_error_sums *sums) {
  const aq_layout &layout = matrix.layout;
  const size_t row = aq_quotient(i, layout.chunks), chunk = i - row * layout.chunks;
  const size_t n = aq_chunk_columns(layout, chunk);
  float x[AQ_CHUNK], y[AQ_CHUNK];
  aq_load_chunk(weights, dtype, row * layout.cols + chunk * AQ_CHUNK, n, x);
  aq_dequantize_chunk(matrix, row, chunk, y);
  aq_add_errors(x, y, n, sums);
}

#endif
