/* two_level.cu: quantizing with two-level scales, and finding them for scales of one level. */
#include "../context.h"
#include "symmetric.h"

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

/* Symmetric grids ---------------------------------------------------------------------------------------- */

static __global__ void __launch_bounds__(AQ_BLOCK) symmetric_supers(aq_symmetric_view view, int32_t *faults) {
  __shared__ aq_symmetric_notes notes[AQ_BLOCK / 32];
  const size_t units = view.layout.matrix.rows * view.layout.supers;
  for (size_t unit = aq_thread() / 32; unit < units; unit += aq_all_threads() / 32) {
    const int32_t fault = aq_quantize_symmetric(view, notes + threadIdx.x / 32, unit, threadIdx.x % 32);
    if (fault) atomicOr(faults, fault);
  }
}

int32_t aq_cuda_quantize_symmetric_levels(aq_cuda_buffer weights, int32_t dtype, aq_cuda_buffer scale,
                                          aq_cuda_buffer column_weights, size_t rows, size_t cols, int32_t bits,
                                          size_t group_size, int32_t scale_bits, aq_cuda_buffer packed,
                                          aq_cuda_buffer sub_scale, aq_cuda_buffer sub_min, aq_cuda_buffer super_scale,
                                          aq_cuda_buffer super_min, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!scale && !weights) return AQ_E_ARGUMENT;
  if (scale_bits != 8 || !aq_symmetric_bits_allowed(bits) || (weights && !aq_dtype_bytes(dtype))) return AQ_E_ARGUMENT;
  if (!aq_two_level_group_size_allowed(group_size) || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  const aq_two_level_layout layout = aq_two_level_layout_of(rows, cols, bits, group_size, scale_bits);
  const aq_symmetric_view view = {
      layout,
      aq_symmetric_grid_of(bits),
      weights ? aq_cuda_memory(weights, rows * cols, aq_dtype_bytes(dtype), on, &status) : 0,
      dtype,
      aq_cuda_optional(scale, rows * layout.matrix.groups, on, &status),
      aq_cuda_optional(column_weights, cols, on, &status),
      weights ? aq_cuda_view<uint32_t>(packed, rows * layout.matrix.words, on, &status) : 0,
      aq_cuda_view<uint8_t>(sub_scale, rows * layout.sub_bytes, on, &status),
      aq_cuda_view<uint8_t>(sub_min, rows * layout.sub_bytes, on, &status),
      aq_cuda_view<uint16_t>(super_scale, rows * layout.supers, on, &status),
      aq_cuda_view<uint16_t>(super_min, rows * layout.supers, on, &status),
  };
  if (status == AQ_OK) status = aq_cuda_clear_faults(on);
  if (status != AQ_OK) return status;
  aq_launch(on, symmetric_supers, aq_cuda_blocks(rows * layout.supers, AQ_BLOCK / 32), AQ_BLOCK, 0, view, on->faults);
  return aq_cuda_read_faults(on);
}

/* Two levels for given scales ---------------------------------------------------------------------------- */

/* A thread has the scales, or the minima, of two superblocks of a row, whose sub-codes are whole bytes. */
struct fitted_levels {
  aq_two_level_layout layout;
  const float *given[2], *group_weights; /* scales, minima */
  uint8_t *sub[2];
  uint16_t *super[2];
  int32_t *faults;
  __device__ int32_t faults_in(size_t first, size_t n, int which, float limit) const {
    int32_t found = 0;
    for (size_t i = first; i < first + n; i++) {
      const float value = given[which][i], weight = group_weights ? group_weights[i] : 1.0f;
      if (!(value - value == 0.0f)) found |= AQ_FAULT_NONFINITE;
      if (value > limit || -value > limit) found |= AQ_FAULT_RANGE;
      if (!(weight >= 0.0f && weight < __builtin_inff())) found |= AQ_FAULT_COLUMN_WEIGHT;
    }
    return found;
  }
  __device__ void operator()(size_t i) const {
    const int which = (int)(i % 2);
    const size_t pairs = layout.units / 2, row = aq_quotient(i / 2, pairs), pair = i / 2 - row * pairs;
    const size_t each = layout.super_groups, groups = layout.matrix.groups;
    const float sub_max = (float)((1 << layout.scale_bits) - 1);
    uint8_t codes[2 * AQ_SUPER_GROUPS] = {};
    int32_t found = 0;
    for (size_t half = 0; half < 2 && 2 * pair + half < layout.supers; half++) {
      const size_t own = 2 * pair + half, n = aq_smaller(each, groups - own * each), first = row * groups + own * each;
      found |= faults_in(first, n, which, AQ_HALF_MAX * sub_max);
      const float step = aq_fit_levels(given[which] + first, group_weights ? group_weights + first : 0, n, sub_max,
                                       codes + half * AQ_SUPER_GROUPS);
      super[which][row * layout.supers + own] = aq_half_from_float(step);
    }
    if (found) atomicOr(faults, found);
    const size_t bytes = 2 * each * (size_t)layout.scale_bits / 8, begin = pair * bytes;
    for (size_t b = 0; b < bytes && begin + b < layout.sub_bytes; b++)
      sub[which][row * layout.sub_bytes + begin + b] = aq_sub_byte(codes, layout, b);
  }
};

int32_t aq_cuda_fit_two_level(aq_cuda_buffer scale, aq_cuda_buffer minimum, aq_cuda_buffer group_weights, size_t rows,
                              size_t cols, size_t group_size, int32_t scale_bits, aq_cuda_buffer sub_scale,
                              aq_cuda_buffer sub_min, aq_cuda_buffer super_scale, aq_cuda_buffer super_min,
                              aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!aq_scale_bits_allowed(scale_bits)) return AQ_E_ARGUMENT;
  if (!aq_two_level_group_size_allowed(group_size) || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  const aq_two_level_layout layout = aq_two_level_layout_of(rows, cols, 2, group_size, scale_bits);
  const size_t groups = rows * layout.matrix.groups, bytes = rows * layout.sub_bytes, supers = rows * layout.supers;
  const fitted_levels levels = {
      layout,
      {aq_cuda_view<float>(scale, groups, on, &status), aq_cuda_view<float>(minimum, groups, on, &status)},
      aq_cuda_optional(group_weights, groups, on, &status),
      {aq_cuda_view<uint8_t>(sub_scale, bytes, on, &status), aq_cuda_view<uint8_t>(sub_min, bytes, on, &status)},
      {aq_cuda_view<uint16_t>(super_scale, supers, on, &status), aq_cuda_view<uint16_t>(super_min, supers, on, &status)},
      on->faults,
  };
  if (status == AQ_OK) status = aq_cuda_clear_faults(on);
  if (status == AQ_OK) status = aq_run_elements(on, levels, rows * layout.units);
  return status == AQ_OK ? aq_cuda_read_faults(on) : status;
}
