/* int8.h: 8-bit activations times packed weights, the arithmetic of kernels/cpu/int8_scalar.c in its order: whole-number sums of a
 * segment, which may be taken in any order, then segments combined in float32 from the first to the last. */
#ifndef AQ_CUDA_INT8_H
#define AQ_CUDA_INT8_H

#include "chunk.h"

#include "../cpu/int8.h"

struct aq_activations_view {
  const uint8_t *codes; /* [tokens, cols] */
  const float *scale;
  const int32_t *zero_point;
  size_t tokens;
  aq_packed_matrix matrix;
  const float *bias; /* null: none */
  float *out;        /* [tokens, rows] */
};

/* Columns of a segment, and how many a row has. */
AQ_FUNCTION size_t aq_segment_columns(const aq_layout &layout) {
  return layout.groups == 1 ? AQ_SEGMENT : layout.group_size;
}
AQ_FUNCTION size_t aq_segments(const aq_layout &layout) { return (layout.cols - 1) / aq_segment_columns(layout) + 1; }

AQ_FUNCTION uint32_t aq_dot_bytes(uint32_t a, uint32_t b, uint32_t sum) {
#if defined(__CUDA_ARCH__)
  return __dp4a(a, b, sum);
#else
  for (int k = 0; k < 32; k += 8) sum += (a >> k & 255) * (b >> k & 255);
  return sum;
#endif
}

/* A chunk's codes as bytes, four a word. */
AQ_FUNCTION void aq_bytes_of_codes(uint64_t codes, int32_t bits, uint32_t words[2]) {
  for (int half = 0; half < 2; half++) {
    words[half] = 0;
    for (int k = 0; k < 4; k++) words[half] |= aq_code_of(codes, 4 * half + k, bits) << 8 * k;
  }
}

/* A chunk's activation codes as bytes, zeros behind the row's last. */
AQ_FUNCTION void aq_bytes_of_activations(const uint8_t *row, size_t cols, size_t first, uint32_t words[2]) {
  words[0] = words[1] = 0;
  for (int k = 0; k < AQ_CHUNK; k++)
    if (first + (size_t)k < cols) words[k / 4] |= (uint32_t)row[first + (size_t)k] << 8 * (k % 4);
}

/* Sums over a segment: x q, q and x as whole numbers. */
struct aq_segment_sums {
  uint32_t products, codes, activations;
};

/* What a segment of n columns adds to a row's sum. */
AQ_FUNCTION float aq_segment_term(const aq_segment_sums &sums, aq_grid grid, int32_t x_zero, size_t n) {
  const int32_t products = (int32_t)sums.products - x_zero * (int32_t)sums.codes;
  const int32_t total = (int32_t)sums.activations - x_zero * (int32_t)n;
  const float shift = grid.zero_point * (float)total, difference = (float)products - shift;
  return grid.scale * difference;
}

/* Segment `segment` of a row and token. */
AQ_FUNCTION float aq_segment_of(const aq_activations_view &view, size_t token, size_t row, size_t segment) {
  const aq_layout &layout = view.matrix.layout;
  const size_t size = aq_segment_columns(layout), begin = segment * size, n = aq_smaller(size, layout.cols - begin);
  const uint8_t *x = view.codes + token * layout.cols;
  aq_segment_sums sums = {0, 0, 0};
  for (size_t col = begin; col < begin + n; col += AQ_CHUNK) {
    uint32_t q[2], a[2];
    aq_bytes_of_codes(aq_read_codes(view.matrix.packed, layout, row, col / AQ_CHUNK), layout.bits, q);
    aq_bytes_of_activations(x, layout.cols, col, a);
    for (int half = 0; half < 2; half++) {
      sums.products = aq_dot_bytes(a[half], q[half], sums.products);
      sums.codes = aq_dot_bytes(0x01010101u, q[half], sums.codes);
      sums.activations = aq_dot_bytes(a[half], 0x01010101u, sums.activations);
    }
  }
  return aq_segment_term(sums, aq_stored_grid(view.matrix, row, layout.groups == 1 ? 0 : segment), view.zero_point[token], n);
}

AQ_FUNCTION void aq_store_product(const aq_activations_view &view, size_t token, size_t row, float total) {
  const float y = view.scale[token] * total;
  view.out[token * view.matrix.layout.rows + row] = view.bias ? y + view.bias[row] : y;
}

/* Activations --------------------------------------------------------------------------------------------------------- */

AQ_FUNCTION uint8_t aq_activation_code(float x, float scale, float zero_point, float code_max) {
  float position = x / scale;
  position = position < -AQ_ENCODE_LIMIT ? -AQ_ENCODE_LIMIT : position;
  position = position > AQ_ENCODE_LIMIT ? AQ_ENCODE_LIMIT : position;
  position = aq_round_even(position) + zero_point;
  position = position < 0.0f ? 0.0f : position;
  return (uint8_t)(position > code_max ? code_max : position);
}

/* A token's own scale and zero point from its range, zero among it. */
AQ_FUNCTION float aq_activation_scale(float minimum, float maximum, float code_max) {
  const float wanted = maximum / code_max - minimum / code_max; /* the difference itself may overflow */
  return minimum == maximum ? 1.0f : wanted < 0x1p-126f ? 0x1p-126f : wanted;
}
AQ_FUNCTION int32_t aq_activation_zero(float minimum, float scale, float code_max) {
  const int32_t zero = (int32_t)aq_round_even(-minimum / scale);
  return zero > (int32_t)code_max ? (int32_t)code_max : zero;
}

#endif
