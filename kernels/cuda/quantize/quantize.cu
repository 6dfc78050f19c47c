/* quantize.cu: round to nearest with the lanes of a warp sharing a group, the clip search with a thread a
 * group over tiles in shared memory, and longer groups with a warp each. */
#include "../context.h"
#include "quantize.h"

/* `lanes` threads a group, AQ_LANE_CHUNKS chunks each. */
template <int BITS>
static __global__ void __launch_bounds__(AQ_BLOCK) round_groups(aq_quantize_view view, int lanes, int32_t *faults) {
  view.layout.bits = BITS; /* known to the compiler */
  const size_t units = view.layout.rows * view.layout.groups;
  const size_t warp_lane = threadIdx.x % 32;
  const int shift = 31 - __clz(lanes);
  for (size_t i = aq_thread(); i - warp_lane < units << shift; i += aq_all_threads()) {
    const size_t unit = i >> shift, lane = (i & (size_t)(lanes - 1)) * AQ_LANE_CHUNKS;
    const bool there = unit < units;
    aq_group_place place = {};
    float values[AQ_LANE_CHUNKS][AQ_CHUNK];
    size_t n[AQ_LANE_CHUNKS] = {};
    if (there) place = aq_place_group(view.layout, unit);
    aq_range range = aq_empty_range();
#pragma unroll
    for (int c = 0; c < AQ_LANE_CHUNKS; c++)
      if (there) n[c] = aq_load_lane(view, place, lane + (size_t)c, values[c]);
#pragma unroll
    for (int c = 0; c < AQ_LANE_CHUNKS; c++) range = aq_joined_range(range, aq_chunk_range(values[c], n[c]));
    for (int distance = lanes / 2; distance > 0; distance /= 2)
      range = aq_joined_range(range, aq_warp::exchanged(range, distance));
    if (!there) continue;
    aq_grid grid;
    const int32_t fault =
        !range.finite ? AQ_FAULT_NONFINITE
        : aq_round_grid(range.minimum, range.maximum, BITS, view.zero_point_kind, &grid) != AQ_OK ? AQ_FAULT_RANGE
                                                                                                 : 0;
    if (fault) {
      if (lane == 0) atomicOr(faults, fault);
      continue;
    }
#pragma unroll
    for (int c = 0; c < AQ_LANE_CHUNKS; c++) aq_write_lane(view, place, lane + (size_t)c, values[c], n[c], grid);
    if (lane == 0) aq_write_grid(view, unit, grid);
  }
}

static void launch_round(const aq_quantize_view &view, const aq_stream_state *on) {
  const int lanes = aq_group_lanes(view.layout);
  const unsigned blocks = aq_cuda_blocks(view.layout.rows * view.layout.groups * (size_t)lanes, AQ_BLOCK);
  switch (view.layout.bits) {
    case 2: aq_launch(on, round_groups<2>, blocks, AQ_BLOCK, 0, view, lanes, on->faults); break;
    case 3: aq_launch(on, round_groups<3>, blocks, AQ_BLOCK, 0, view, lanes, on->faults); break;
    case 4: aq_launch(on, round_groups<4>, blocks, AQ_BLOCK, 0, view, lanes, on->faults); break;
    default: aq_launch(on, round_groups<8>, blocks, AQ_BLOCK, 0, view, lanes, on->faults); break;
  }
}

static __global__ void clip_tiles(aq_quantize_view view, int32_t *faults) {
  AQ_DYNAMIC_SHARED(float, memory);
  const aq_tile tile = aq_tile_in(memory, view.layout, view.column_weights != 0);
  const size_t units = view.layout.rows * view.layout.groups, chunks = tile.groups * tile.group_chunks;
  for (size_t base = blockIdx.x * tile.groups; base < units; base += (size_t)gridDim.x * tile.groups) {
    int32_t fault = 0;
    for (size_t c = threadIdx.x; c < chunks; c += blockDim.x) fault |= aq_load_tile_chunk(view, tile, base, units, c);
    __syncthreads();
    fault |= aq_search_tile_group(view, tile, base, units, threadIdx.x);
    if (fault) atomicOr(faults, fault);
    if (__syncthreads_or(fault)) continue; /* outputs are unspecified now */
    for (size_t c = threadIdx.x; c < chunks; c += blockDim.x) aq_write_tile_chunk(view, tile, base, units, c);
    __syncthreads();
  }
}

static __global__ void quantize_long(aq_quantize_view view, bool clip, int32_t *faults) {
  const size_t units = view.layout.rows * view.layout.groups;
  const aq_warp warp = {(int)(threadIdx.x % 32)};
  for (size_t unit = aq_thread() / 32; unit < units; unit += aq_all_threads() / 32) {
    const int32_t fault = aq_quantize_long_group(view, unit, clip, warp);
    if (fault && warp.lane == 0) atomicOr(faults, fault);
  }
}

static int32_t quantize(aq_cuda_buffer weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
                        size_t group_size, int32_t zero_point_kind, bool clip, aq_cuda_buffer column_weights,
                        aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer zero_point,
                        aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_bits_allowed(bits) || !aq_dtype_bytes(dtype)) return AQ_E_ARGUMENT;
  if (!aq_grid_kind_allowed(zero_point_kind)) return AQ_E_ARGUMENT;
  if ((zero_point == 0) != (zero_point_kind == AQ_ZERO_POINT_SYMMETRIC)) return AQ_E_ARGUMENT;
  if (aq_group_columns(group_size, cols) == 0 || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  const aq_layout layout = aq_layout_of(rows, cols, bits, group_size);
  const size_t units = rows * layout.groups;
  const aq_quantize_view view = {
      layout,
      aq_cuda_memory(weights, rows * cols, aq_dtype_bytes(dtype), on, &status),
      dtype,
      zero_point_kind,
      column_weights ? aq_cuda_view<float>(column_weights, cols, on, &status) : 0,
      aq_cuda_view<uint32_t>(packed, rows * layout.words, on, &status),
      aq_cuda_view<uint16_t>(scale, units, on, &status),
      zero_point ? aq_cuda_view<uint16_t>(zero_point, units, on, &status) : 0,
  };
  if (status == AQ_OK) status = aq_cuda_clear_faults(on);
  if (status != AQ_OK) return status;
  if (layout.group_size > AQ_SEGMENT) {
    aq_launch(on, quantize_long, aq_cuda_blocks(units * 32, AQ_BLOCK), AQ_BLOCK, 0, view, clip, on->faults);
  } else if (clip) {
    const size_t groups = aq_tile_groups(layout), bytes = aq_tile_bytes(layout, column_weights != 0);
    status = aq_cuda_status(cudaFuncSetAttribute(clip_tiles, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    if (status != AQ_OK) return status;
    aq_launch(on, clip_tiles, aq_cuda_blocks(units, groups), (unsigned)groups, bytes, view, on->faults);
  } else {
    launch_round(view, on);
  }
  return aq_cuda_read_faults(on);
}

int32_t aq_cuda_quantize_round(aq_cuda_buffer weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
                               size_t group_size, int32_t zero_point_kind, aq_cuda_buffer packed, aq_cuda_buffer scale,
                               aq_cuda_buffer zero_point, aq_cuda_stream stream) {
  return quantize(weights, dtype, rows, cols, bits, group_size, zero_point_kind, false, 0, packed, scale, zero_point,
                  stream);
}

int32_t aq_cuda_quantize_clip(aq_cuda_buffer weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
                              size_t group_size, int32_t zero_point_kind, aq_cuda_buffer column_weights,
                              aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer zero_point,
                              aq_cuda_stream stream) {
  return quantize(weights, dtype, rows, cols, bits, group_size, zero_point_kind, true, column_weights, packed, scale,
                  zero_point, stream);
}
