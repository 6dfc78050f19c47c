/* dequantize.cu: packing, unpacking and dequantizing, a chunk a thread. */
#include "context.h"

static __global__ void pack(aq_layout layout, const uint8_t *codes, uint32_t *packed, int32_t *faults) {
  for (size_t i = aq_thread(); i < layout.rows * layout.chunks; i += aq_all_threads())
    if (aq_pack_thread(layout, codes, packed, i) != AQ_OK) atomicOr(faults, AQ_FAULT_VALUE);
}

static __global__ void unpack(aq_layout layout, const uint32_t *packed, uint8_t *codes) {
  for (size_t i = aq_thread(); i < layout.rows * layout.chunks; i += aq_all_threads())
    aq_unpack_thread(layout, packed, codes, i);
}

template <int BITS, int DTYPE>
static __global__ void __launch_bounds__(AQ_BLOCK) dequantize(aq_packed_matrix matrix, void *out) {
  matrix.layout.bits = BITS; /* known to the compiler */
  for (size_t i = aq_thread(); i < aq_dequantize_threads(matrix.layout); i += aq_all_threads())
    aq_dequantize_thread(matrix, out, DTYPE, i);
}

template <int BITS>
static void launch_dequantize(const aq_packed_matrix &matrix, void *out, int32_t dtype, const aq_stream_state *on) {
  const unsigned blocks = aq_cuda_blocks(aq_dequantize_threads(matrix.layout), AQ_BLOCK);
  switch (dtype) {
    case AQ_F32: aq_launch(on, dequantize<BITS, AQ_F32>, blocks, AQ_BLOCK, 0, matrix, out); break;
    case AQ_F16: aq_launch(on, dequantize<BITS, AQ_F16>, blocks, AQ_BLOCK, 0, matrix, out); break;
    default: aq_launch(on, dequantize<BITS, AQ_BF16>, blocks, AQ_BLOCK, 0, matrix, out); break;
  }
}

int32_t aq_cuda_pack_codes(aq_cuda_buffer codes, size_t rows, size_t cols, int32_t bits, aq_cuda_buffer packed,
                           aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_bits_allowed(bits)) return AQ_E_ARGUMENT;
  if (!aq_shape_allowed(rows, cols)) return AQ_E_SHAPE;
  const aq_layout layout = aq_layout_of(rows, cols, bits, 0);
  const uint8_t *in = aq_cuda_view<uint8_t>(codes, rows * cols, on, &status);
  uint32_t *out = aq_cuda_view<uint32_t>(packed, rows * layout.words, on, &status);
  if (status == AQ_OK) status = aq_cuda_clear_faults(on);
  if (status != AQ_OK) return status;
  aq_launch(on, pack, aq_cuda_blocks(rows * layout.chunks, AQ_BLOCK), AQ_BLOCK, 0, layout, in, out, on->faults);
  status = aq_cuda_launched();
  return status == AQ_OK ? aq_cuda_read_faults(on) : status;
}

int32_t aq_cuda_unpack_codes(aq_cuda_buffer packed, size_t rows, size_t cols, int32_t bits, aq_cuda_buffer codes,
                             aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_bits_allowed(bits)) return AQ_E_ARGUMENT;
  if (!aq_shape_allowed(rows, cols)) return AQ_E_SHAPE;
  const aq_layout layout = aq_layout_of(rows, cols, bits, 0);
  const uint32_t *in = aq_cuda_view<uint32_t>(packed, rows * layout.words, on, &status);
  uint8_t *out = aq_cuda_view<uint8_t>(codes, rows * cols, on, &status);
  if (status != AQ_OK) return status;
  aq_launch(on, unpack, aq_cuda_blocks(rows * layout.chunks, AQ_BLOCK), AQ_BLOCK, 0, layout, in, out);
  return aq_cuda_launched();
}

int32_t aq_cuda_dequantize(aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer zero_point, size_t rows,
                           size_t cols, int32_t bits, size_t group_size, aq_cuda_buffer out, int32_t dtype,
                           aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_narrow_dtype(dtype)) return AQ_E_ARGUMENT;
  const aq_packed_matrix matrix =
      aq_cuda_packed(packed, scale, zero_point, rows, cols, bits, group_size, on, &status);
  void *values = aq_cuda_memory(out, rows * cols, aq_dtype_bytes(dtype), on, &status);
  if (status != AQ_OK) return status;
  switch (bits) {
    case 2: launch_dequantize<2>(matrix, values, dtype, on); break;
    case 3: launch_dequantize<3>(matrix, values, dtype, on); break;
    case 4: launch_dequantize<4>(matrix, values, dtype, on); break;
    default: launch_dequantize<8>(matrix, values, dtype, on); break;
  }
  return aq_cuda_launched();
}
