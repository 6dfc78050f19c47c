/* chunk.h: what one thread does with a chunk, eight consecutive columns of a row, whose codes are `bits` whole bytes at any
 * width. Everything here is compiled for the device by nvcc and for the host by kernels/tests/cuda_host.cpp, which compares it
 * with the scalar oracle to the bit; arithmetic is the CPU's own half.h and group.h.
 *
 *     row    | chunk 0 | chunk 1 | ... | last chunk, 1 to 8 columns |
 *     packed | bits B  | bits B  | ... | up to the end of the row's last word, zeros behind the codes |
 */
#ifndef AQ_CUDA_CHUNK_H
#define AQ_CUDA_CHUNK_H

#if defined(__CUDACC__)
#define AQ_FUNCTION static inline __host__ __device__
#define AQ_MEMBER __host__ __device__
#else
#define AQ_FUNCTION static inline
#define AQ_MEMBER
#endif

#include "../cpu/kernels.h"
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
  int32_t group_shift; /* column >> group_shift is its group */
};

AQ_FUNCTION aq_layout aq_layout_of(size_t rows, size_t cols, int32_t bits, size_t group_size) {
  const size_t size = group_size == 0 || group_size > cols ? cols : group_size;
  const size_t groups = (cols - 1) / size + 1;
  int32_t shift = groups == 1 ? 63 : 0; /* sizes are powers of two, or all of a row */
  while (groups > 1 && ((size_t)1 << shift) < size) shift++;
  return {rows, cols, bits, size, groups, (cols * (size_t)bits + 31) / 32, (cols - 1) / AQ_CHUNK + 1, shift};
}

/* a / b, by the short division where both are short. */
AQ_FUNCTION size_t aq_quotient(size_t a, size_t b) {
  return ((a | b) >> 32) ? a / b : (size_t)((uint32_t)a / (uint32_t)b);
}

AQ_FUNCTION size_t aq_smaller(size_t a, size_t b) { return a < b ? a : b; }

AQ_FUNCTION size_t aq_chunk_columns(const aq_layout &layout, size_t chunk) {
  return aq_smaller(AQ_CHUNK, layout.cols - chunk * AQ_CHUNK);
}

/* Elements ------------------------------------------------------------------------------------------------------------ */

struct aq_words4 {
  uint32_t at[4];
};

/* Sixteen bytes from an address that is a multiple of sixteen. */
AQ_FUNCTION aq_words4 aq_read16(const void *from) {
#if defined(__CUDA_ARCH__)
  const uint4 v = *(const uint4 *)from;
  return {{v.x, v.y, v.z, v.w}};
#else
  aq_words4 v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
#endif
}

AQ_FUNCTION void aq_write16(void *to, const aq_words4 &v) {
#if defined(__CUDA_ARCH__)
  *(uint4 *)to = make_uint4(v.at[0], v.at[1], v.at[2], v.at[3]);
#else
  __builtin_memcpy(to, &v, sizeof v);
#endif
}

/* A half float's value, and two numbers as half or bfloat16: the device's instructions round as half.h does. */
AQ_FUNCTION float aq_half_value(uint16_t half) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  return aq_float_from_half(half);
#endif
}

AQ_FUNCTION uint32_t aq_two_halves(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  return (uint32_t)aq_half_from_float(low) | (uint32_t)aq_half_from_float(high) << 16;
#endif
}

AQ_FUNCTION uint32_t aq_two_bfloats(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  return (uint32_t)aq_bfloat_from_float(low) | (uint32_t)aq_bfloat_from_float(high) << 16;
#endif
}

AQ_FUNCTION float aq_load_element(const void *in, int32_t dtype, size_t i) {
  switch (dtype) {
    case AQ_F32: return ((const float *)in)[i];
    case AQ_F16: return aq_float_from_half(((const uint16_t *)in)[i]);
    case AQ_BF16: return aq_float_from_bfloat(((const uint16_t *)in)[i]);
    case AQ_F8_E4M3: return aq_float_from_e4m3(((const uint8_t *)in)[i]);
    case AQ_F8_E5M2: return aq_float_from_e5m2(((const uint8_t *)in)[i]);
    default: return (float)((const double *)in)[i];
  }
}

AQ_FUNCTION void aq_store_element(float value, void *out, int32_t dtype, size_t i) {
  switch (dtype) {
    case AQ_F16: ((uint16_t *)out)[i] = aq_half_from_float(value); break;
    case AQ_BF16: ((uint16_t *)out)[i] = aq_bfloat_from_float(value); break;
    default: ((float *)out)[i] = value; break;
  }
}

/* n <= 8 elements from `first`; `in` itself is a multiple of sixteen. */
AQ_FUNCTION void aq_load_chunk(const void *in, int32_t dtype, size_t first, size_t n, float values[AQ_CHUNK]) {
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

AQ_FUNCTION void aq_store_chunk(const float values[AQ_CHUNK], void *out, int32_t dtype, size_t first, size_t n) {
  const bool whole = n == AQ_CHUNK && first % AQ_CHUNK == 0;
  if (whole && dtype == AQ_F32) {
    for (int half = 0; half < 2; half++) {
      aq_words4 v;
      for (int k = 0; k < 4; k++) v.at[k] = aq_float_bits(values[4 * half + k]);
      aq_write16((float *)out + first + 4 * half, v);
    }
    return;
  }
  if (whole && (dtype == AQ_F16 || dtype == AQ_BF16)) {
    aq_words4 v;
    for (int k = 0; k < 4; k++) {
      const float low = values[2 * k], high = values[2 * k + 1];
      v.at[k] = dtype == AQ_F16 ? aq_two_halves(low, high) : aq_two_bfloats(low, high);
    }
    aq_write16((uint16_t *)out + first, v);
    return;
  }
  for (int k = 0; k < AQ_CHUNK; k++)
    if ((size_t)k < n) aq_store_element(values[k], out, dtype, first + (size_t)k);
}

/* Codes <-> bytes ----------------------------------------------------------------------------------------------------- */

AQ_FUNCTION uint32_t aq_code_of(uint64_t codes, int k, int32_t bits) {
  return (uint32_t)(codes >> (k * bits)) & ((1u << bits) - 1);
}

/* The codes of a row's chunk, one behind the other. */
AQ_FUNCTION uint64_t aq_read_codes(const uint32_t *packed, const aq_layout &layout, size_t row, size_t chunk) {
  const uint32_t *words = packed + row * layout.words;
  switch (layout.bits) {
    case 2: return ((const uint16_t *)words)[chunk];
    case 4: return words[chunk];
    case 8: {
      const size_t second = 2 * chunk + 1;
      return words[2 * chunk] | (second < layout.words ? (uint64_t)words[second] << 32 : 0);
    }
    default: {
      const uint8_t *bytes = (const uint8_t *)words + 3 * chunk;
      uint64_t codes = 0;
      const size_t n = aq_smaller(3, 4 * layout.words - 3 * chunk);
      for (size_t k = 0; k < n; k++) codes |= (uint64_t)bytes[k] << 8 * k;
      return codes;
    }
  }
}

/* Bits of `codes` behind the chunk's columns are zero. */
AQ_FUNCTION void aq_write_codes(uint64_t codes, uint32_t *packed, const aq_layout &layout, size_t row, size_t chunk) {
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

/* Thread i of rows * chunks. AQ_E_VALUE if a code is above 2^bits - 1. */
AQ_FUNCTION int32_t aq_pack_thread(const aq_layout &layout, const uint8_t *codes, uint32_t *packed, size_t i) {
  const size_t row = aq_quotient(i, layout.chunks), chunk = i - row * layout.chunks;
  const size_t first = row * layout.cols + chunk * AQ_CHUNK, n = aq_chunk_columns(layout, chunk);
  uint64_t chunk_codes = 0;
  int32_t status = AQ_OK;
  for (int k = 0; k < AQ_CHUNK; k++) {
    if ((size_t)k >= n) break;
    const uint32_t code = codes[first + (size_t)k];
    if (code >> layout.bits) status = AQ_E_VALUE;
    chunk_codes |= (uint64_t)code << (k * layout.bits);
  }
  aq_write_codes(chunk_codes, packed, layout, row, chunk);
  return status;
}

AQ_FUNCTION void aq_unpack_thread(const aq_layout &layout, const uint32_t *packed, uint8_t *codes, size_t i) {
  const size_t row = aq_quotient(i, layout.chunks), chunk = i - row * layout.chunks;
  const size_t first = row * layout.cols + chunk * AQ_CHUNK, n = aq_chunk_columns(layout, chunk);
  const uint64_t chunk_codes = aq_read_codes(packed, layout, row, chunk);
  for (int k = 0; k < AQ_CHUNK; k++)
    if ((size_t)k < n) codes[first + (size_t)k] = (uint8_t)aq_code_of(chunk_codes, k, layout.bits);
}

/* Dequantize ---------------------------------------------------------------------------------------------------------- */

/* A packed matrix; zero_point null: symmetric. */
struct aq_packed_matrix {
  aq_layout layout;
  const uint32_t *packed;
  const uint16_t *scale, *zero_point;
};

AQ_FUNCTION aq_grid aq_stored_grid(const aq_packed_matrix &matrix, size_t row, size_t group) {
  const size_t at = row * matrix.layout.groups + group;
  return {aq_half_value(matrix.scale[at]),
          matrix.zero_point ? aq_half_value(matrix.zero_point[at]) : (float)(1 << (matrix.layout.bits - 1))};
}

/* A chunk lies in one group: group sizes are multiples of eight, or the whole row. */
AQ_FUNCTION void aq_dequantize_chunk(const aq_packed_matrix &matrix, size_t row, size_t chunk, float values[AQ_CHUNK]) {
  const uint64_t codes = aq_read_codes(matrix.packed, matrix.layout, row, chunk);
  const aq_grid grid = aq_stored_grid(matrix, row, chunk * AQ_CHUNK >> matrix.layout.group_shift);
  for (int k = 0; k < AQ_CHUNK; k++) values[k] = aq_decode(aq_code_of(codes, k, matrix.layout.bits), grid);
}

/* Chunks of a dequantizing thread, one behind the other: where it stands is worked out once for all. */
#define AQ_DEQUANTIZED 2

AQ_FUNCTION size_t aq_dequantize_threads(const aq_layout &layout) {
  return layout.rows * ((layout.chunks - 1) / AQ_DEQUANTIZED + 1);
}

AQ_FUNCTION void aq_dequantize_thread(const aq_packed_matrix &matrix, void *out, int32_t dtype, size_t i) {
  const aq_layout &layout = matrix.layout;
  const size_t runs = (layout.chunks - 1) / AQ_DEQUANTIZED + 1, row = aq_quotient(i, runs);
  const size_t first = (i - row * runs) * AQ_DEQUANTIZED;
  for (size_t chunk = first; chunk < first + AQ_DEQUANTIZED && chunk < layout.chunks; chunk++) {
    float values[AQ_CHUNK];
    aq_dequantize_chunk(matrix, row, chunk, values);
    aq_store_chunk(values, out, dtype, row * layout.cols + chunk * AQ_CHUNK, aq_chunk_columns(layout, chunk));
  }
}

/* Quantize ------------------------------------------------------------------------------------------------------------ */

/* Chunks of a lane, and lanes that share a group of up to 256 columns: a power of two, so that shuffles reduce over them. */
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

AQ_FUNCTION aq_group_place aq_place_group(const aq_layout &layout, size_t unit) {
  const size_t row = aq_quotient(unit, layout.groups), group = unit - row * layout.groups;
  const size_t col = group * layout.group_size;
  return {row, group, col, aq_smaller(layout.group_size, layout.cols - col)};
}

struct aq_range {
  float minimum, maximum;
  int32_t finite;
};

/* The range of nothing. */
AQ_FUNCTION aq_range aq_empty_range(void) { return {__builtin_inff(), -__builtin_inff(), 1}; }

AQ_FUNCTION aq_range aq_joined_range(const aq_range &a, const aq_range &b) {
  return {b.minimum < a.minimum ? b.minimum : a.minimum, b.maximum > a.maximum ? b.maximum : a.maximum,
          a.finite & b.finite};
}

AQ_FUNCTION aq_range aq_chunk_range(const float values[AQ_CHUNK], size_t n) {
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

/* weight / scale as IEEE rounds it, by the nearest number to 1 / scale: one step of Newton's on the quotient is exact (Markstein 1990)
 * where its remainder is no denormal number. Where it is, the quotient is below 2^-78 - scales are half floats - and vanishes beside
 * any zero point but 0, whose code it does not change. */
AQ_FUNCTION float aq_quotient_by(float weight, float scale, float inverse) {
  const float near = weight * inverse;
  return AQ_FMA(AQ_FMA(-near, scale, weight), inverse, near);
}

/* aq_encode of a chunk. */
AQ_FUNCTION uint64_t aq_encode_chunk(const float values[AQ_CHUNK], size_t n, aq_grid grid, int32_t bits) {
  const float code_max = (float)((1 << bits) - 1), inverse = 1.0f / grid.scale;
  uint64_t codes = 0;
  for (int k = 0; k < AQ_CHUNK; k++) {
    float position = aq_quotient_by(values[k], grid.scale, inverse) + grid.zero_point;
    position = position > 0.0f ? position : 0.0f;
    position = position < code_max ? position : code_max;
    if ((size_t)k < n) codes |= (uint64_t)(uint32_t)aq_round_even(position) << (k * bits);
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

AQ_FUNCTION void aq_write_grid(const aq_quantize_view &view, size_t unit, aq_grid grid) {
  view.scale[unit] = aq_half_from_float(grid.scale);
  if (view.zero_point) view.zero_point[unit] = aq_half_from_float(grid.zero_point);
}

/* Columns of a row that a lane has of its group, and their values. */
AQ_FUNCTION size_t aq_load_lane(const aq_quantize_view &view, const aq_group_place &place, size_t lane,
                                float values[AQ_CHUNK]) {
  const size_t from = lane * AQ_CHUNK;
  if (from >= place.n) return 0;
  const size_t n = aq_smaller(AQ_CHUNK, place.n - from);
  aq_load_chunk(view.weights, view.dtype, place.row * view.layout.cols + place.col + from, n, values);
  return n;
}

AQ_FUNCTION void aq_write_lane(const aq_quantize_view &view, const aq_group_place &place, size_t lane,
                               const float values[AQ_CHUNK], size_t n, aq_grid grid) {
  if (n == 0) return;
  aq_write_codes(aq_encode_chunk(values, n, grid, view.layout.bits), view.packed, view.layout, place.row,
                 place.col / AQ_CHUNK + lane);
}

/* Faults found in the data, bits of a word that all threads share. */
#define AQ_FAULT_NONFINITE 1
#define AQ_FAULT_RANGE 2
#define AQ_FAULT_VALUE 4
#define AQ_FAULT_COLUMN_WEIGHT 8

/* As the CPU reports them: column weights are looked at first, and of two faults among the weights NaN or infinity counts. */
AQ_FUNCTION int32_t aq_status_of_faults(int32_t faults) {
  if (faults & (AQ_FAULT_COLUMN_WEIGHT | AQ_FAULT_VALUE)) return AQ_E_VALUE;
  if (faults & AQ_FAULT_NONFINITE) return AQ_E_NONFINITE;
  return faults & AQ_FAULT_RANGE ? AQ_E_RANGE : AQ_OK;
}

#endif
