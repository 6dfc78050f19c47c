/* tensor.h: products on tensor cores, for moments and forward passes. A float32 number is the sum of two
 * bfloat16 ones, its parts; three products of parts are within 3/65536 of the product (docs/cuda.md). What
 * decides codes from equal moments takes the sums of fixed order in product.h instead. */
#ifndef AQ_CUDA_TENSOR_H
#define AQ_CUDA_TENSOR_H

#include "context.h"

/* Rows of parts are zeros from k to a multiple of this. */
#define AQ_TENSOR_STEP 32

/* Bytes of parts that are made at once. */
#define AQ_SLICE_BYTES ((size_t)256 << 20)

static inline size_t aq_tensor_padded(size_t k) { return (k + AQ_TENSOR_STEP - 1) / AQ_TENSOR_STEP * AQ_TENSOR_STEP; }

/* How many rows of `k` numbers have their parts in a slice: 1 or a multiple of AQ_TENSOR_STEP at least,
 * `rows` at most. */
static inline size_t aq_tensor_slice(size_t rows, size_t k) {
  const size_t fit = AQ_SLICE_BYTES / (aq_tensor_padded(k) * 4) / AQ_TENSOR_STEP * AQ_TENSOR_STEP;
  const size_t most = fit < AQ_TENSOR_STEP ? AQ_TENSOR_STEP : fit;
  return rows < most ? rows : most;
}

/* The parts of a matrix [rows, stride]; low null: high is all there is. Both are multiples of sixteen
 * bytes. */
struct aq_parts {
  uint16_t *high, *low;
  size_t rows, stride;
};

/* Parts of [rows, k] of memory that a cutter has. */
static inline aq_parts aq_take_parts(aq_cutter *cutter, size_t rows, size_t k) {
  aq_parts parts = {0, 0, rows, aq_tensor_padded(k)};
  parts.high = cutter->take<uint16_t>(rows * parts.stride);
  parts.low = cutter->take<uint16_t>(rows * parts.stride);
  return parts;
}

/* c[i, j] += sum over k of a[i, k] b[j, k]. */
struct aq_tensor_product {
  aq_parts a, b; /* only b may be without a low part */
  size_t k;
  float *c;
  size_t c_row;
  bool upper; /* entries below the diagonal need not be right */
};

/* Puts a product on the stream. */
int32_t aq_cuda_tensor_product(const aq_stream_state *on, const aq_tensor_product &product);

/* Puts x [k, rows] as parts of rows [rows, k] on the stream; weight null, or [k], multiplied and rounded
 * first. */
int32_t aq_cuda_split_columns(const aq_stream_state *on, const float *x, size_t k, size_t rows, const float *weight,
                              const aq_parts &parts);

/* Weights [rows, cols] of a linear layer. */
struct aq_tensor_weights {
  size_t rows, cols;
  const uint16_t *whole; /* bfloat16 of whole steps of columns, read as they are; null: `split` makes parts of rows */
  int32_t (*split)(const aq_stream_state *on, const void *source, size_t row, const aq_parts &parts);
  const void *source;
};

/* Puts x [tokens, cols] times weights plus bias, null for none, -> out [tokens, rows] on the stream. */
int32_t aq_cuda_tensor_linear(aq_stream_state *on, const aq_tensor_weights &weights, const float *x, size_t tokens,
                              const float *bias, float *out);

/* A number's high part is the nearest bfloat16, or the last finite one; the low part the nearest to the
 * rest. */
AQ_DEVICE void aq_split(float value, uint16_t *high, uint16_t *low) {
  const uint16_t nearest = aq_bfloat_from_float(value);
  const bool is_finite = value - value == 0.0f;
  *high = is_finite && (nearest & 0x7f80) == 0x7f80 ? (uint16_t)(aq_float_bits(value) >> 16) : nearest;
  *low = is_finite ? aq_bfloat_from_float(value - aq_float_from_bfloat(*high)) : 0;
}

/* A chunk's parts; zeros behind its `n` columns. */
AQ_DEVICE void aq_split_chunk(const float values[AQ_CHUNK], size_t n, const aq_parts &parts, size_t row, size_t chunk) {
  __align__(16) uint16_t high[AQ_CHUNK], low[AQ_CHUNK];
  for (size_t k = 0; k < AQ_CHUNK; k++) aq_split(k < n ? values[k] : 0.0f, high + k, low + k);
  const size_t at = row * parts.stride + chunk * AQ_CHUNK;
#if defined(__CUDA_ARCH__)
  *(uint4 *)(parts.high + at) = *(const uint4 *)high;
  *(uint4 *)(parts.low + at) = *(const uint4 *)low;
#else
  __builtin_memcpy(parts.high + at, high, sizeof high);
  __builtin_memcpy(parts.low + at, low, sizeof low);
#endif
}

#endif
