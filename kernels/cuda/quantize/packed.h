/* packed.h: the weights of matrices as they are stored, a chunk of eight at a time: plain, on grids of one
 * level, and of two. */
#ifndef AQ_CUDA_PACKED_H
#define AQ_CUDA_PACKED_H

#include "../context.h"

struct aq_weights_view {
  const void *dense; /* null: packed */
  int32_t dtype;
  aq_layout layout;
  const uint32_t *packed;
  const uint16_t *scale, *zero_point; /* zero_point null: symmetric */
  int32_t scale_bits;                 /* 0: one level */
  const uint8_t *sub_scale, *sub_min;
  const uint16_t *super_scale, *super_min;
  size_t super_groups, supers, sub_bytes;
};

/* Codes of a chunk; nothing behind its row is read. */
AQ_DEVICE uint64_t aq_read_codes(const aq_weights_view &view, size_t row, size_t chunk) {
  const size_t bits = (size_t)view.layout.bits, begin = chunk * bits;
  const uint32_t *words = view.packed + row * view.layout.words;
  if (bits == 4) return words[chunk];
  if (bits == 2) return ((const uint16_t *)words)[chunk];
  const uint8_t *bytes = (const uint8_t *)words;
  uint64_t codes = 0;
  for (size_t k = 0; k < bits && begin + k < 4 * view.layout.words; k++) codes |= (uint64_t)bytes[begin + k] << 8 * k;
  return codes;
}

AQ_DEVICE uint32_t aq_read_sub_code(const uint8_t *stream, size_t i, int32_t bits) {
  const size_t bit = i * (size_t)bits, byte = bit >> 3, shift = bit & 7;
  uint32_t code = stream[byte] >> shift;
  if (shift + (size_t)bits > 8) code |= (uint32_t)stream[byte + 1] << (8 - shift);
  return code & ((1u << bits) - 1);
}

/* A group's scale and minimum: w = scale q - minimum. */
AQ_DEVICE void aq_two_level_grid(const aq_weights_view &view, size_t row, size_t group, float *scale, float *minimum) {
  const size_t first = row * view.sub_bytes;
  if (view.scale_bits == AQ_OFFSET_BITS) {
    const uint8_t *s = view.sub_scale + first + 2 * group, *m = view.sub_min + first + 2 * group;
    *scale = aq_half_value((uint16_t)(s[0] | s[1] << 8));
    *minimum = -aq_half_value((uint16_t)(m[0] | m[1] << 8));
    return;
  }
  const size_t super = row * view.supers + group / view.super_groups;
  *scale = aq_half_value(view.super_scale[super]) * (float)aq_read_sub_code(view.sub_scale + first, group, view.scale_bits);
  *minimum = aq_half_value(view.super_min[super]) * (float)aq_read_sub_code(view.sub_min + first, group, view.scale_bits);
}

/* The weights of a chunk, which lies in one group; zeros behind the row. */
AQ_DEVICE void aq_load_weights(const aq_weights_view &view, size_t row, size_t chunk, size_t n, float values[AQ_CHUNK]) {
  const aq_layout &layout = view.layout;
  if (view.dense) {
    aq_load_chunk(view.dense, view.dtype, row * layout.cols + chunk * AQ_CHUNK, n, values);
    return;
  }
  const uint64_t codes = aq_read_codes(view, row, chunk);
  const uint32_t mask = (1u << layout.bits) - 1;
  const size_t group = aq_quotient(chunk * AQ_CHUNK, layout.group_size), at = row * layout.groups + group;
  float scale, minimum = 0.0f, zero = 0.0f;
  if (view.scale_bits) {
    aq_two_level_grid(view, row, group, &scale, &minimum);
  } else {
    scale = aq_half_value(view.scale[at]);
    zero = view.zero_point ? aq_half_value(view.zero_point[at]) : (float)(1 << (layout.bits - 1));
  }
  for (int k = 0; k < AQ_CHUNK; k++) {
    const float code = (float)((uint32_t)(codes >> k * layout.bits) & mask);
    const float value = view.scale_bits ? scale * code - minimum : scale * (code - zero);
    values[k] = (size_t)k < n ? value : 0.0f;
  }
}

/* Codes and grids of one level behind handles; zero_point 0: symmetric. The sizes are checked. */
static inline int32_t aq_view_one_level(const aq_stream_state *on, aq_cuda_buffer packed, aq_cuda_buffer scale,
                                        aq_cuda_buffer zero_point, size_t rows, size_t cols, int32_t bits,
                                        size_t group_size, aq_weights_view *view) {
  if (!aq_bits_allowed(bits)) return AQ_E_ARGUMENT;
  if (cols == 0 || !aq_counts_allowed(rows, cols) || aq_group_columns(group_size, cols) == 0) return AQ_E_SHAPE;
  int32_t status = AQ_OK;
  *view = {};
  view->layout = aq_layout_of(rows, cols, bits, group_size);
  const size_t units = rows * view->layout.groups;
  view->packed = aq_cuda_view<uint32_t>(packed, rows * view->layout.words, on, &status);
  view->scale = aq_cuda_view<uint16_t>(scale, units, on, &status);
  view->zero_point = zero_point ? aq_cuda_view<uint16_t>(zero_point, units, on, &status) : 0;
  return status;
}

/* The same of two levels; super scales do not count with AQ_OFFSET_BITS. */
static inline int32_t aq_view_two_levels(const aq_stream_state *on, aq_cuda_buffer packed, aq_cuda_buffer sub_scale,
                                         aq_cuda_buffer sub_min, aq_cuda_buffer super_scale, aq_cuda_buffer super_min,
                                         size_t rows, size_t cols, int32_t bits, size_t group_size, int32_t scale_bits,
                                         aq_weights_view *view) {
  if (!aq_bits_allowed(bits) || !aq_sub_bits_allowed(scale_bits)) return AQ_E_ARGUMENT;
  if (cols == 0 || !aq_counts_allowed(rows, cols) || !aq_two_level_group_size_allowed(group_size)) return AQ_E_SHAPE;
  int32_t status = AQ_OK;
  *view = {};
  view->layout = aq_layout_of(rows, cols, bits, group_size);
  view->packed = aq_cuda_view<uint32_t>(packed, rows * view->layout.words, on, &status);
  view->scale_bits = scale_bits;
  view->supers = (cols - 1) / AQ_SEGMENT + 1;
  view->super_groups = AQ_SEGMENT / group_size;
  view->sub_bytes = aq_sub_bytes_of(view->layout.groups, scale_bits);
  view->sub_scale = aq_cuda_view<uint8_t>(sub_scale, rows * view->sub_bytes, on, &status);
  view->sub_min = aq_cuda_view<uint8_t>(sub_min, rows * view->sub_bytes, on, &status);
  if (scale_bits == AQ_OFFSET_BITS) return status;
  view->super_scale = aq_cuda_view<uint16_t>(super_scale, rows * view->supers, on, &status);
  view->super_min = aq_cuda_view<uint16_t>(super_min, rows * view->supers, on, &status);
  return status;
}

#endif
