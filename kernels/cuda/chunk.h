/* chunk.h: the part of one thread in a chunk, eight consecutive columns of a row, whose codes are `bits`
 * whole bytes at any width.
 *
 *     row    | chunk 0 | chunk 1 | ... | last chunk, 1 to 8 columns |
 *     packed | bits B  | bits B  | ... | up to the end of the row's last word, zeros behind the codes |
 */
#ifndef AQ_CUDA_CHUNK_H
#define AQ_CUDA_CHUNK_H

#include <cuda_runtime.h>

/* Functions of the host, too: what a launch needs, and all of kernels/arithmetic. */
#define AQ_FUNCTION static inline __host__ __device__
#define AQ_DEVICE static inline __device__

#include "../arithmetic/sizes.h"
#include "../include/arrowquant_cuda.h"

#define AQ_CHUNK 8

#if defined(__CUDA_ARCH__)
#define AQ_SQRT __fsqrt_rn
#else
#define AQ_SQRT __builtin_sqrtf
#endif

/* A quantized matrix's sizes; group_size is 1..cols. */
struct aq_layout {
  size_t rows, cols;
  int32_t bits;
  size_t group_size, groups, words, chunks;
};

AQ_FUNCTION aq_layout aq_layout_of(size_t rows, size_t cols, int32_t bits, size_t group_size) {
  const size_t size = aq_group_columns(group_size, cols), groups = (cols - 1) / size + 1;
  return {rows, cols, bits, size, groups, aq_words_of(cols, bits), (cols - 1) / AQ_CHUNK + 1};
}

/* a / b, by the short division where both are short. */
AQ_DEVICE size_t aq_quotient(size_t a, size_t b) {
  return ((a | b) >> 32) ? a / b : (size_t)((uint32_t)a / (uint32_t)b);
}

AQ_DEVICE size_t aq_smaller(size_t a, size_t b) { return a < b ? a : b; }

/* Elements --------------------------------------------------------------------------------------------- */

struct aq_words4 {
  uint32_t at[4];
};

/* Sixteen bytes from an address that is a multiple of sixteen. */
AQ_DEVICE aq_words4 aq_read16(const void *from) {
#if defined(__CUDA_ARCH__)
  const uint4 v = *(const uint4 *)from;
  return {{v.x, v.y, v.z, v.w}};
#else
  aq_words4 v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
#endif
}

/* A half float's value. */
AQ_DEVICE float aq_half_value(uint16_t half) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  return aq_float_from_half(half);
#endif
}

/* n <= 8 elements from `first`; `in` itself is a multiple of sixteen. */
AQ_DEVICE void aq_load_chunk(const void *in, int32_t dtype, size_t first, size_t n, float values[AQ_CHUNK]) {
  const bool whole = n == AQ_CHUNK && first % AQ_CHUNK == 0;
  if (whole && dtype == AQ_F32) {
    for (int half = 0; half < 2; half++) {
      const aq_words4 v = aq_read16((const float *)in + first + 4 * half);
      for (int k = 0; k < 4; k++) values[4 * half + k] = aq_bits_float(v.at[k]);
    }
    return;
  }
  if (whole && (dtype == AQ_F16 || dtype == AQ_BF16)) {
    const aq_words4 v = aq_read16((const uint16_t *)in + first);
    for (int k = 0; k < AQ_CHUNK; k++) {
      const uint16_t element = (uint16_t)(v.at[k / 2] >> (k & 1) * 16);
      values[k] = dtype == AQ_F16 ? aq_half_value(element) : aq_float_from_bfloat(element);
    }
    return;
  }
  for (int k = 0; k < AQ_CHUNK; k++) values[k] = (size_t)k < n ? aq_load_element(in, dtype, first + (size_t)k) : 0.0f;
}

/* Codes -> bytes --------------------------------------------------------------------------------------- */

/* Bits of `codes` behind the chunk's columns are zero. */
AQ_DEVICE void aq_write_codes(uint64_t codes, uint32_t *packed, const aq_layout &layout, size_t row, size_t chunk) {
  uint32_t *words = packed + row * layout.words;
  const size_t begin = chunk * (size_t)layout.bits;
  if (chunk + 1 == layout.chunks) { /* and the rest of the row's last word */
    uint8_t *bytes = (uint8_t *)words;
    for (size_t at = begin; at < 4 * layout.words; at++)
      bytes[at] = at - begin < 8 ? (uint8_t)(codes >> 8 * (at - begin)) : (uint8_t)0;
    return;
  }
  switch (layout.bits) {
    case 2: ((uint16_t *)words)[chunk] = (uint16_t)codes; break;
    case 4: words[chunk] = (uint32_t)codes; break;
    case 8:
      words[2 * chunk] = (uint32_t)codes;
      words[2 * chunk + 1] = (uint32_t)(codes >> 32);
      break;
    default:
      for (int k = 0; k < 3; k++) ((uint8_t *)words)[begin + (size_t)k] = (uint8_t)(codes >> 8 * k);
      break;
  }
}

/* Quantize --------------------------------------------------------------------------------------------- */

/* Chunks of a lane, and lanes that share a group of up to 256 columns: a power of two, so that shuffles
 * reduce over them. */
#define AQ_LANE_CHUNKS 2
AQ_FUNCTION int aq_group_lanes(const aq_layout &layout) {
  int lanes = 1;
  while ((size_t)lanes * AQ_LANE_CHUNKS * AQ_CHUNK < layout.group_size) lanes *= 2;
  return lanes;
}

/* A group's columns of a row. */
struct aq_group_place {
  size_t row, group, col, n;
};

AQ_DEVICE aq_group_place aq_place_group(const aq_layout &layout, size_t unit) {
  const size_t row = aq_quotient(unit, layout.groups), group = unit - row * layout.groups;
  const size_t col = group * layout.group_size;
  return {row, group, col, aq_smaller(layout.group_size, layout.cols - col)};
}

struct aq_range {
  float minimum, maximum;
  int32_t finite;
};

/* The range of nothing. */
AQ_DEVICE aq_range aq_empty_range(void) { return {__builtin_inff(), -__builtin_inff(), 1}; }

AQ_DEVICE aq_range aq_joined_range(const aq_range &a, const aq_range &b) {
  return {b.minimum < a.minimum ? b.minimum : a.minimum, b.maximum > a.maximum ? b.maximum : a.maximum,
          a.finite & b.finite};
}

AQ_DEVICE aq_range aq_chunk_range(const float values[AQ_CHUNK], size_t n) {
  aq_range range = aq_empty_range();
  for (int k = 0; k < AQ_CHUNK; k++) {
    if ((size_t)k >= n) break;
    const float w = values[k];
    if (!(w - w == 0.0f)) range.finite = 0;
    if (w < range.minimum) range.minimum = w;
    if (w > range.maximum) range.maximum = w;
  }
  return range;
}

#if defined(__CUDA_ARCH__)
#define AQ_FMA __fmaf_rn
#else
#define AQ_FMA __builtin_fmaf
#endif

/* weight / scale as IEEE rounds it, by the nearest number to 1 / scale: one step of Newton's on the
 * quotient is exact (Markstein 1990) where its remainder is no denormal number. Where it is, the quotient
 * is below 2^-78 - scales are half floats - and vanishes beside any zero point but 0, whose code it does
 * not change. */
AQ_DEVICE float aq_quotient_by(float weight, float scale, float inverse) {
  const float near = weight * inverse;
  return AQ_FMA(AQ_FMA(-near, scale, weight), inverse, near);
}

/* aq_encode of a chunk. */
AQ_DEVICE uint64_t aq_encode_chunk(const float values[AQ_CHUNK], size_t n, aq_grid grid, int32_t bits) {
  const float code_max = (float)((1 << bits) - 1), inverse = 1.0f / grid.scale;
  uint64_t codes = 0;
  for (int k = 0; k < AQ_CHUNK; k++) {
    const float position = aq_quotient_by(values[k], grid.scale, inverse) + grid.zero_point;
    if ((size_t)k < n) codes |= (uint64_t)(uint32_t)aq_clamped_code(position, code_max) << (k * bits);
  }
  return codes;
}

/* What quantizing reads and writes. */
struct aq_quantize_view {
  aq_layout layout;
  const void *weights;
  int32_t dtype, zero_point_kind;
  const float *column_weights; /* null: ones */
  uint32_t *packed;
  uint16_t *scale, *zero_point; /* zero_point null: symmetric */
};

AQ_DEVICE void aq_write_grid(const aq_quantize_view &view, size_t unit, aq_grid grid) {
  view.scale[unit] = aq_half_from_float(grid.scale);
  if (view.zero_point) view.zero_point[unit] = aq_half_from_float(aq_stored_zero(grid, view.zero_point_kind));
}

/* Columns of a row that a lane has of its group, and their values. */
AQ_DEVICE size_t aq_load_lane(const aq_quantize_view &view, const aq_group_place &place, size_t lane,
                                float values[AQ_CHUNK]) {
  const size_t from = lane * AQ_CHUNK;
  if (from >= place.n) return 0;
  const size_t n = aq_smaller(AQ_CHUNK, place.n - from);
  aq_load_chunk(view.weights, view.dtype, place.row * view.layout.cols + place.col + from, n, values);
  return n;
}

AQ_DEVICE void aq_write_lane(const aq_quantize_view &view, const aq_group_place &place, size_t lane,
                               const float values[AQ_CHUNK], size_t n, aq_grid grid) {
  if (n == 0) return;
  aq_write_codes(aq_encode_chunk(values, n, grid, view.layout.bits), view.packed, view.layout, place.row,
                 place.col / AQ_CHUNK + lane);
}

/* Faults found in the data, bits of a word that all threads share. */
#define AQ_FAULT_NONFINITE 1
#define AQ_FAULT_RANGE 2
#define AQ_FAULT_COLUMN_WEIGHT 4 /* or a grid that no code can be on */
#define AQ_FAULT_VALUE 8

/* As the CPU reports them: column weights are looked at first, and of two faults among the weights NaN or
 * infinity counts. */
static inline int32_t aq_status_of_faults(int32_t faults) {
  if (faults & AQ_FAULT_COLUMN_WEIGHT) return AQ_E_VALUE;
  if (faults & AQ_FAULT_NONFINITE) return AQ_E_NONFINITE;
  if (faults & AQ_FAULT_VALUE) return AQ_E_VALUE;
  return faults & AQ_FAULT_RANGE ? AQ_E_RANGE : AQ_OK;
}

#endif
