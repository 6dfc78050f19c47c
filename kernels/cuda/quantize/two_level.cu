/* two_level.cu: quantizing with two-level scales. */
#include "../context.h"
#include "two_level.h"

static __global__ void quantize_tiles(aq_two_level_quantize_view view, int32_t *faults) {
  AQ_DYNAMIC_SHARED(uint8_t, memory);
  const aq_two_level_tile tile = aq_two_level_tile_in(memory);
  const aq_two_level_layout &layout = view.layout;
  const size_t units = layout.matrix.rows * layout.units, chunks = AQ_TILE_SUPERS * (AQ_SEGMENT / AQ_CHUNK);
  const size_t own = threadIdx.x / (unsigned)layout.super_groups, lane = threadIdx.x % (unsigned)layout.super_groups;
  const size_t pair_bytes = 2 * layout.super_groups * (size_t)layout.scale_bits / 8;
  for (size_t base = (size_t)blockIdx.x * AQ_TILE_SUPERS; base < units; base += (size_t)gridDim.x * AQ_TILE_SUPERS) {
    int32_t fault = 0;
    for (size_t c = threadIdx.x; c < chunks; c += blockDim.x) fault |= aq_load_super_chunk(view, tile, base, c);
    if (fault) atomicOr(faults, fault);
    if (__syncthreads_or(fault)) continue; /* outputs are unspecified now */
    aq_quantize_super(view, tile, base, own, lane);
    __syncthreads();
    for (size_t c = threadIdx.x; c < chunks; c += blockDim.x) aq_write_super_chunk(view, tile, base, c);
    for (size_t i = threadIdx.x; i < AQ_TILE_SUPERS * pair_bytes; i += blockDim.x) {
      const size_t b = i % pair_bytes, pair = i / pair_bytes;
      aq_write_sub_byte(view, tile, base, pair / 2 * 2, b, (int)(pair % 2));
    }
    __syncthreads();
  }
}

int32_t aq_cuda_quantize_two_level(aq_cuda_buffer weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
                                   size_t group_size, int32_t scale_bits, int32_t search, aq_cuda_buffer column_weights,
                                   aq_cuda_buffer packed, aq_cuda_buffer sub_scale, aq_cuda_buffer sub_min,
                                   aq_cuda_buffer super_scale, aq_cuda_buffer super_min, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_bits_allowed(bits) || !aq_scale_bits_allowed(scale_bits) || !aq_dtype_bytes(dtype)) return AQ_E_ARGUMENT;
  if (!aq_two_level_group_size_allowed(group_size) || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  const aq_two_level_layout layout = aq_two_level_layout_of(rows, cols, bits, group_size, scale_bits);
  const aq_two_level_quantize_view view = {
      layout,
      aq_cuda_memory(weights, rows * cols, aq_dtype_bytes(dtype), on, &status),
      dtype,
      search != 0,
      column_weights ? aq_cuda_view<float>(column_weights, cols, on, &status) : 0,
      aq_cuda_view<uint32_t>(packed, rows * layout.matrix.words, on, &status),
      aq_cuda_view<uint8_t>(sub_scale, rows * layout.sub_bytes, on, &status),
      aq_cuda_view<uint8_t>(sub_min, rows * layout.sub_bytes, on, &status),
      aq_cuda_view<uint16_t>(super_scale, rows * layout.supers, on, &status),
      aq_cuda_view<uint16_t>(super_min, rows * layout.supers, on, &status),
  };
  if (status == AQ_OK) status = aq_cuda_clear_faults(on);
  if (status != AQ_OK) return status;
  const size_t threads = AQ_TILE_SUPERS * layout.super_groups;
  aq_launch(on, quantize_tiles, aq_cuda_blocks(rows * layout.units, AQ_TILE_SUPERS), threads, AQ_TWO_LEVEL_BYTES, view,
            on->faults);
  return aq_cuda_read_faults(on);
}
