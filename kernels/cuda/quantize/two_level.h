/* two_level.h: quantizing with two-level scales, with the arithmetic of kernels/arithmetic/two_level.h. A
 * tile is sixteen superblocks in shared memory; a superblock belongs to a team of as many lanes as it has
 * groups when it is whole, one a group. Super scales need all groups: every lane of the team computes them
 * from the notes of all lanes, with the warp's barrier between writing and reading, which teams of one
 * warp reach together. */
#ifndef AQ_CUDA_TWO_LEVEL_H
#define AQ_CUDA_TWO_LEVEL_H

#include "../../arithmetic/two_level.h"
#include "../chunk.h"

/* Superblocks of a tile; even, so that two whose sub-codes share a byte are in one. */
#define AQ_TILE_SUPERS 16

/* Super scales and sub-codes on their way; values of the groups by group. */
struct aq_team_notes {
  float values[AQ_SUPER_GROUPS], weights[AQ_SUPER_GROUPS];
  float sums[AQ_STEP_SUMS][AQ_SUPER_GROUPS];
};

struct aq_two_level_layout {
  aq_layout matrix; /* its group_size up to 128 */
  int32_t scale_bits;
  size_t supers, units; /* of a row; and rounded up to an even number, those that tiles count */
  size_t super_groups;  /* groups of a whole superblock */
  size_t sub_bytes;
};

AQ_FUNCTION aq_two_level_layout aq_two_level_layout_of(size_t rows, size_t cols, int32_t bits, size_t group_size,
                                                       int32_t scale_bits) {
  aq_two_level_layout layout;
  layout.matrix = aq_layout_of(rows, cols, bits, group_size);
  layout.scale_bits = scale_bits;
  layout.supers = (cols - 1) / AQ_SEGMENT + 1;
  layout.units = (layout.supers + 1) / 2 * 2;
  layout.super_groups = AQ_SEGMENT / group_size;
  layout.sub_bytes = aq_sub_bytes_of(layout.matrix.groups, scale_bits);
  return layout;
}

struct aq_two_level_quantize_view {
  aq_two_level_layout layout;
  const void *weights;
  int32_t dtype, search;
  const float *column_weights; /* null: ones */
  uint32_t *packed;
  uint8_t *sub_scale, *sub_min;
  uint16_t *super_scale, *super_min;
};

/* Where unit `unit` of all rows' is; n 0 behind a row's last superblock. */
struct aq_super_place {
  size_t row, super, n;
};

AQ_DEVICE aq_super_place aq_place_super(const aq_two_level_layout &layout, size_t unit) {
  const size_t row = aq_quotient(unit, layout.units), super = unit - row * layout.units;
  const bool there = row < layout.matrix.rows && super < layout.supers;
  return {row, super, there ? aq_smaller(AQ_SEGMENT, layout.matrix.cols - super * AQ_SEGMENT) : 0};
}

/* Shared memory of a tile: weights[place] and importances[place], a group behind the other with a word
 * between them, so that the lanes of a team are on different banks. */
AQ_DEVICE size_t aq_super_pitch(const aq_two_level_layout &layout) { return AQ_SEGMENT + layout.super_groups; }
#define AQ_SUPER_PITCH_MAX (AQ_SEGMENT + AQ_SUPER_GROUPS)

AQ_DEVICE size_t aq_super_column(size_t group_size, size_t col) { return col + col / group_size; }

struct aq_two_level_tile {
  float *weights, *importances;
  float *scale, *minimum, *sign; /* of a group: [super][AQ_SUPER_GROUPS]; of a superblock */
  uint8_t *sub_scale, *sub_min;  /* [super][AQ_SUPER_GROUPS] */
  aq_team_notes *notes;          /* of a superblock */
};

#define AQ_TWO_LEVEL_BYTES                                                                                    \
  (AQ_TILE_SUPERS * (2 * AQ_SUPER_PITCH_MAX * sizeof(float) + (2 * AQ_SUPER_GROUPS + 1) * sizeof(float) + \
                     sizeof(aq_team_notes) + 2 * AQ_SUPER_GROUPS))

AQ_DEVICE aq_two_level_tile aq_two_level_tile_in(void *memory) {
  aq_two_level_tile tile;
  tile.weights = (float *)memory;
  tile.importances = tile.weights + AQ_TILE_SUPERS * AQ_SUPER_PITCH_MAX;
  tile.scale = tile.importances + AQ_TILE_SUPERS * AQ_SUPER_PITCH_MAX;
  tile.minimum = tile.scale + AQ_TILE_SUPERS * AQ_SUPER_GROUPS;
  tile.sign = tile.minimum + AQ_TILE_SUPERS * AQ_SUPER_GROUPS;
  tile.notes = (aq_team_notes *)(tile.sign + AQ_TILE_SUPERS);
  tile.sub_scale = (uint8_t *)(tile.notes + AQ_TILE_SUPERS);
  tile.sub_min = tile.sub_scale + AQ_TILE_SUPERS * AQ_SUPER_GROUPS;
  return tile;
}

/* Chunk c of the tile's AQ_TILE_SUPERS * 32. */
AQ_DEVICE int32_t aq_load_super_chunk(const aq_two_level_quantize_view &view, const aq_two_level_tile &tile, size_t base,
                                        size_t c) {
  const size_t own = c / (AQ_SEGMENT / AQ_CHUNK), chunk = c % (AQ_SEGMENT / AQ_CHUNK), first = chunk * AQ_CHUNK;
  const aq_super_place place = aq_place_super(view.layout, base + own);
  if (first >= place.n) return 0;
  const size_t n = aq_smaller(AQ_CHUNK, place.n - first), col = place.super * AQ_SEGMENT + first;
  float values[AQ_CHUNK];
  aq_load_chunk(view.weights, view.dtype, place.row * view.layout.matrix.cols + col, n, values);
  int32_t faults = 0;
  for (int k = 0; k < AQ_CHUNK; k++) {
    if ((size_t)k >= n) break;
    const float limit = AQ_HALF_MAX * (float)((1 << view.layout.scale_bits) - 1);
    if (!(values[k] - values[k] == 0.0f)) faults |= AQ_FAULT_NONFINITE;
    if (values[k] > limit || -values[k] > limit) faults |= AQ_FAULT_RANGE;
    const size_t at = own * aq_super_pitch(view.layout) + aq_super_column(view.layout.matrix.group_size, first + (size_t)k);
    tile.weights[at] = values[k];
    const float h = view.column_weights ? view.column_weights[col + (size_t)k] : 1.0f;
    if (!(h >= 0.0f && h < __builtin_inff())) faults |= AQ_FAULT_COLUMN_WEIGHT;
    tile.importances[at] = h;
  }
  return faults;
}

/* The steps of a superblock and the sub-codes of this lane's group. */
struct aq_super_fit {
  aq_super_steps steps;
  float sub_scale, sub_min;
};

/* Minimum and maximum; `lane` may lie behind the last group. */
AQ_DEVICE aq_super_fit aq_round_super(aq_team_notes *notes, size_t lane, size_t groups, float smallest,
                                        float largest, float code_max, float sub_max) {
  aq_super_fit fit;
  if (lane < groups) notes->values[lane] = -smallest;
  __syncwarp();
  float most = 0.0f;
  for (size_t j = 0; j < groups; j++) most = notes->values[j] > most ? notes->values[j] : most;
  fit.steps.minimum = aq_round_half_up(most / sub_max);
  fit.sub_min = aq_code_above(-smallest, fit.steps.minimum, sub_max);
  const float own = (largest + fit.steps.minimum * fit.sub_min) / code_max;
  if (lane < groups) notes->weights[lane] = own;
  __syncwarp();
  most = 0.0f;
  for (size_t j = 0; j < groups; j++) most = notes->weights[j] > most ? notes->weights[j] : most;
  fit.steps.scale = aq_round_half_up(most / sub_max);
  fit.sub_scale = aq_code_above(own, fit.steps.scale, sub_max);
  return fit;
}

AQ_DEVICE aq_super_fit aq_search_super(aq_team_notes *notes, size_t lane, size_t groups,
                                         const aq_sub_group &g, const aq_sub_fit &own, float code_max, float sub_max) {
  const bool there = lane < groups;
  aq_super_fit now = {}, out = {};
  float hq = own.sums.hq;
  if (there) {
    notes->values[lane] = own.scale;
    notes->weights[lane] = own.sums.hqq;
  }
  __syncwarp();
  now.steps.scale = aq_fit_super(notes->values, notes->weights, groups, sub_max);
  if (there) now.sub_scale = aq_nearest_code(own.scale, now.steps.scale, sub_max);
  __syncwarp();
  if (there) {
    notes->values[lane] = own.minimum;
    notes->weights[lane] = g.h;
  }
  __syncwarp();
  now.steps.minimum = aq_fit_super(notes->values, notes->weights, groups, sub_max);

  float best = -__builtin_inff();
  for (int32_t round = 0; round < AQ_TWO_LEVEL_ROUNDS; round++) {
    if (there) {
      const aq_sub_choice choice = aq_choose_sub_codes(&g, now.steps, now.sub_scale, &hq, code_max, sub_max);
      now.sub_scale = choice.sub_scale;
      now.sub_min = choice.sub_min;
      for (int i = 0; i < AQ_STEP_SUMS; i++) notes->sums[i][lane] = choice.sums[i];
    }
    __syncwarp();
    float sums[AQ_STEP_SUMS] = {};
    for (int i = 0; i < AQ_STEP_SUMS; i++)
      for (size_t j = 0; j < groups; j++) sums[i] += notes->sums[i][j];
    __syncwarp();
    if (sums[AQ_EXPLAINED] > best) {
      best = sums[AQ_EXPLAINED];
      out = now;
    }
    /* the end; the other teams of the warp go on and want this one at their barriers */
    if (!aq_refit_steps(sums, &now.steps)) best = __builtin_inff();
  }
  return out;
}

/* Superblock `own` of the tile by its team; `lane` is the group. Its grid, sign and sub-codes into the
 * tile, its super scales into the outputs. Weights become sign * weight. */
AQ_DEVICE void aq_quantize_super(const aq_two_level_quantize_view &view, const aq_two_level_tile &tile, size_t base,
                                   size_t own, size_t lane) {
  const aq_two_level_layout &layout = view.layout;
  const aq_super_place place = aq_place_super(layout, base + own);
  const size_t n = place.n, size = layout.matrix.group_size, groups = n == 0 ? 0 : (n - 1) / size + 1;
  const float code_max = (float)((1 << layout.matrix.bits) - 1), sub_max = (float)((1 << layout.scale_bits) - 1);
  float *w = tile.weights + own * aq_super_pitch(layout), *u = tile.importances + own * aq_super_pitch(layout);
  aq_team_notes *notes = tile.notes + own;
  const size_t begin = aq_smaller(lane * size, n), count = aq_smaller(begin + size, n) - begin;
  float *mine = w + aq_super_column(size, lane * size), *importances = u + aq_super_column(size, lane * size);
  float smallest = 0.0f, largest = 0.0f;
  for (size_t i = 0; i < count; i++) {
    if (i == 0 || mine[i] < smallest) smallest = mine[i];
    if (i == 0 || mine[i] > largest) largest = mine[i];
  }
  if (lane < groups)
    notes->values[lane] = (smallest > largest - smallest ? 1.0f : 0.0f) - (-largest > largest - smallest ? 1.0f : 0.0f);
  __syncwarp();
  float away = 0.0f;
  for (size_t j = 0; j < groups; j++) away += notes->values[j];
  const float sign = away > 0.0f ? -1.0f : 1.0f;
  const float a = smallest * sign, b = largest * sign;
  smallest = b < a ? b : a;
  if (!(smallest < 0.0f)) smallest = 0.0f;
  largest = a < b ? b : a;
  for (size_t i = 0; i < count; i++) mine[i] *= sign;
  __syncwarp();

  aq_super_fit fit = {};
  if (!view.search) {
    fit = aq_round_super(notes, lane, groups, smallest, largest, code_max, sub_max);
  } else {
    float squares = 0.0f, most_important = 0.0f;
    for (size_t i = 0; i < n; i++) {
      const float value = w[aq_super_column(size, i)], h = u[aq_super_column(size, i)];
      squares += value * value;
      if (h > most_important) most_important = h;
    }
    __syncwarp();
    aq_sub_group g = {mine, importances, count, smallest, 0.0f, 0.0f};
    aq_sub_fit own_fit = {0.0f, -smallest, {0.0f, 0.0f, 0.0f}};
    for (size_t i = 0; i < count; i++) {
      const float importance = most_important > 0.0f ? importances[i] / most_important : 1.0f;
      importances[i] = (importance > AQ_LEAST_IMPORTANCE ? importance : AQ_LEAST_IMPORTANCE) *
                       AQ_SQRT(squares / (float)n + mine[i] * mine[i]);
      g.h += importances[i];
      g.ht += importances[i] * (mine[i] - smallest);
    }
    if (largest > smallest) aq_search_sub_group(&g, largest - smallest, code_max, &own_fit);
    fit = aq_search_super(notes, lane, groups, g, own_fit, code_max, sub_max);
    if (!(squares > 0.0f)) fit = {};
  }
  const size_t at = own * AQ_SUPER_GROUPS + lane;
  tile.scale[at] = fit.steps.scale * fit.sub_scale;
  tile.minimum[at] = fit.steps.minimum * fit.sub_min;
  tile.sub_scale[at] = lane < groups ? (uint8_t)fit.sub_scale : (uint8_t)0;
  tile.sub_min[at] = lane < groups ? (uint8_t)fit.sub_min : (uint8_t)0;
  if (lane == 0 && n > 0) {
    view.super_scale[place.row * layout.supers + place.super] = aq_half_from_float(fit.steps.scale * sign);
    view.super_min[place.row * layout.supers + place.super] = aq_half_from_float(fit.steps.minimum * sign);
  }
}

AQ_DEVICE void aq_write_super_chunk(const aq_two_level_quantize_view &view, const aq_two_level_tile &tile, size_t base,
                                      size_t c) {
  const size_t own = c / (AQ_SEGMENT / AQ_CHUNK), first = c % (AQ_SEGMENT / AQ_CHUNK) * AQ_CHUNK;
  const aq_super_place place = aq_place_super(view.layout, base + own);
  if (first >= place.n) return;
  const size_t n = aq_smaller(AQ_CHUNK, place.n - first), size = view.layout.matrix.group_size, group = first / size;
  const int32_t bits = view.layout.matrix.bits;
  const float code_max = (float)((1 << bits) - 1);
  const float scale = tile.scale[own * AQ_SUPER_GROUPS + group], minimum = tile.minimum[own * AQ_SUPER_GROUPS + group];
  const float *w = tile.weights + own * aq_super_pitch(view.layout) + aq_super_column(size, first);
  uint64_t codes = 0;
  for (int k = 0; k < AQ_CHUNK; k++)
    if ((size_t)k < n && scale > 0.0f)
      codes |= (uint64_t)aq_clamped_code((w[k] + minimum) / scale, code_max) << (k * bits);
  aq_write_codes(codes, view.packed, view.layout.matrix, place.row,
                 place.super * (AQ_SEGMENT / AQ_CHUNK) + first / AQ_CHUNK);
}

/* Byte `b` of the sub-codes of a superblock and the next, codes[AQ_SUPER_GROUPS] each, which fill whole bytes
 * together. */
AQ_DEVICE uint8_t aq_sub_byte(const uint8_t *codes, const aq_two_level_layout &layout, size_t b) {
  const size_t groups = layout.super_groups;
  uint32_t byte = 0;
  for (size_t bit = 0; bit < 8; bit++) {
    const size_t i = (8 * b + bit) / (size_t)layout.scale_bits, inside = (8 * b + bit) % (size_t)layout.scale_bits;
    const uint32_t code = i < 2 * groups ? codes[i / groups * AQ_SUPER_GROUPS + i % groups] : 0;
    byte |= (code >> inside & 1u) << bit;
  }
  return (uint8_t)byte;
}

/* Byte `b` of the sub-scales (which 0) or sub-minima of superblocks `pair` and pair + 1 of the tile. */
AQ_DEVICE void aq_write_sub_byte(const aq_two_level_quantize_view &view, const aq_two_level_tile &tile, size_t base,
                                   size_t pair, size_t b, int which) {
  const aq_two_level_layout &layout = view.layout;
  const aq_super_place place = aq_place_super(layout, base + pair);
  const size_t at = place.super * layout.super_groups * (size_t)layout.scale_bits / 8 + b;
  if (place.n == 0 || at >= layout.sub_bytes) return;
  (which ? view.sub_min : view.sub_scale)[place.row * layout.sub_bytes + at] =
      aq_sub_byte((which ? tile.sub_min : tile.sub_scale) + pair * AQ_SUPER_GROUPS, layout, b);
}

#endif
