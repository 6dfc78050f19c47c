/* quantize.h: the steps of the threads that quantize: a group of up to AQ_SEGMENT columns in a tile of
 * groups, or a longer one by a warp. */
#ifndef AQ_CUDA_QUANTIZE_H
#define AQ_CUDA_QUANTIZE_H

#include "clip.h"

/* Tiles ------------------------------------------------------------------------------------------------
 *
 *     weights[i * stride + g] = column i of group g of the tile; importances likewise, where there are
 *     column weights
 */
struct aq_tile {
  float *weights, *importances; /* importances null without column weights */
  aq_grid *grids;
  size_t stride, groups, group_chunks;
};

/* Groups of a tile: as many as fill about 32 KiB, between a warp's and four warps'. */
AQ_FUNCTION size_t aq_tile_groups(const aq_layout &layout) {
  size_t groups = 128;
  while (groups > 32 && groups * layout.group_size > 8192) groups /= 2;
  return groups;
}

AQ_FUNCTION size_t aq_tile_bytes(const aq_layout &layout, bool weighted) {
  const size_t groups = aq_tile_groups(layout);
  return (layout.group_size * (groups + 1) * (weighted ? 2 : 1)) * sizeof(float) + groups * sizeof(aq_grid);
}

AQ_DEVICE aq_tile aq_tile_in(void *memory, const aq_layout &layout, bool weighted) {
  aq_tile tile;
  tile.groups = aq_tile_groups(layout);
  tile.stride = tile.groups + 1;
  tile.group_chunks = (layout.group_size - 1) / AQ_CHUNK + 1;
  tile.weights = (float *)memory;
  tile.importances = weighted ? tile.weights + layout.group_size * tile.stride : 0;
  tile.grids = (aq_grid *)(tile.weights + layout.group_size * tile.stride * (weighted ? 2 : 1));
  return tile;
}

/* Chunk c of the tile's groups * group_chunks, the tile's first group being `base` of `units`. */
AQ_DEVICE int32_t aq_load_tile_chunk(const aq_quantize_view &view, const aq_tile &tile, size_t base, size_t units,
                                       size_t c) {
  const size_t g = aq_quotient(c, tile.group_chunks), lane = c - g * tile.group_chunks;
  if (base + g >= units) return 0;
  const aq_group_place place = aq_place_group(view.layout, base + g);
  float values[AQ_CHUNK];
  int32_t faults = 0;
  const size_t n = aq_load_lane(view, place, lane, values);
  for (int k = 0; k < AQ_CHUNK; k++) {
    if ((size_t)k >= n) break;
    const size_t i = lane * AQ_CHUNK + (size_t)k;
    tile.weights[i * tile.stride + g] = values[k];
    if (!tile.importances) continue;
    const float h = view.column_weights[place.col + i];
    if (!(h >= 0.0f && h < __builtin_inff())) faults = AQ_FAULT_COLUMN_WEIGHT;
    tile.importances[i * tile.stride + g] = h;
  }
  return faults;
}

/* Group g of the tile, by its own thread: its grid into tile.grids and the outputs. */
AQ_DEVICE int32_t aq_search_tile_group(const aq_quantize_view &view, const aq_tile &tile, size_t base, size_t units,
                                         size_t g) {
  if (base + g >= units) return 0;
  const aq_group_place place = aq_place_group(view.layout, base + g);
  const float *weights = tile.weights + g;
  float *importances = tile.importances ? tile.importances + g : 0;
  aq_range range = aq_empty_range();
  float weight_scale = 0.0f;
  for (size_t i = 0; i < place.n; i++) {
    const float w = weights[i * tile.stride];
    if (!(w - w == 0.0f)) return AQ_FAULT_NONFINITE;
    if (w < range.minimum) range.minimum = w;
    if (w > range.maximum) range.maximum = w;
    if (importances && importances[i * tile.stride] > weight_scale) weight_scale = importances[i * tile.stride];
  }
  if (importances)
    for (size_t i = 0; i < place.n; i++) {
      float *h = importances + i * tile.stride;
      *h = weight_scale > 0.0f ? *h / weight_scale : 1.0f;
    }
  aq_grid grid;
  if (aq_round_grid(range.minimum, range.maximum, view.layout.bits, view.zero_point_kind, &grid) != AQ_OK)
    return AQ_FAULT_RANGE;
  if (range.minimum < range.maximum) {
    const aq_tile_group group = {weights, importances, tile.stride, place.n};
    grid = aq_clip_search(group, grid, range.minimum, range.maximum, view.layout.bits, view.zero_point_kind);
  }
  tile.grids[g] = grid;
  aq_write_grid(view, base + g, grid);
  return 0;
}

AQ_DEVICE void aq_write_tile_chunk(const aq_quantize_view &view, const aq_tile &tile, size_t base, size_t units,
                                     size_t c) {
  const size_t g = aq_quotient(c, tile.group_chunks), lane = c - g * tile.group_chunks;
  if (base + g >= units) return;
  const aq_group_place place = aq_place_group(view.layout, base + g);
  if (lane * AQ_CHUNK >= place.n) return;
  const size_t n = aq_smaller(AQ_CHUNK, place.n - lane * AQ_CHUNK);
  float values[AQ_CHUNK];
  for (int k = 0; k < AQ_CHUNK; k++)
    values[k] = (size_t)k < n ? tile.weights[(lane * AQ_CHUNK + (size_t)k) * tile.stride + g] : 0.0f;
  aq_write_lane(view, place, lane, values, n, tile.grids[g]);
}

/* Longer groups ---------------------------------------------------------------------------------------- */

/* Group `unit` by a warp, clip search or round to nearest. Returns the faults of all lanes. */
AQ_DEVICE int32_t aq_quantize_long_group(const aq_quantize_view &view, size_t unit, bool clip, const aq_warp &warp) {
  const aq_group_place place = aq_place_group(view.layout, unit);
  aq_range range = aq_empty_range();
  float weight_scale = 0.0f;
  int32_t faults = 0;
  for (size_t lane = (size_t)warp.lane; lane * AQ_CHUNK < place.n; lane += 32) {
    float values[AQ_CHUNK];
    const size_t n = aq_load_lane(view, place, lane, values);
    range = aq_joined_range(range, aq_chunk_range(values, n));
    if (!clip || !view.column_weights) continue;
    for (size_t k = 0; k < n; k++) {
      const float h = view.column_weights[place.col + lane * AQ_CHUNK + k];
      if (!(h >= 0.0f && h < __builtin_inff())) faults |= AQ_FAULT_COLUMN_WEIGHT;
      if (h > weight_scale) weight_scale = h;
    }
  }
  range = warp.joined(range);
  weight_scale = warp.largest(weight_scale);
  if (!range.finite) faults |= AQ_FAULT_NONFINITE;
  faults = warp.any(faults);
  if (faults) return faults;
  aq_grid grid;
  if (aq_round_grid(range.minimum, range.maximum, view.layout.bits, view.zero_point_kind, &grid) != AQ_OK)
    return AQ_FAULT_RANGE;
  if (clip && range.minimum < range.maximum) {
    const float *column_weights = view.column_weights ? view.column_weights + place.col : 0;
    const aq_long_group group = {warp, view.weights, view.dtype, place.row * view.layout.cols + place.col,
                                 place.n, column_weights, weight_scale};
    grid = aq_clip_search(group, grid, range.minimum, range.maximum, view.layout.bits, view.zero_point_kind);
  }
  for (size_t lane = (size_t)warp.lane; lane * AQ_CHUNK < place.n; lane += 32) {
    float values[AQ_CHUNK];
    const size_t n = aq_load_lane(view, place, lane, values);
    aq_write_lane(view, place, lane, values, n, grid);
  }
  if (warp.lane == 0) aq_write_grid(view, unit, grid);
  return 0;
}

#endif
