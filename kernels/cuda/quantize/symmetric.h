/* symmetric.h: symmetric grids under two levels of scales, with the arithmetic of
 * kernels/arithmetic/symmetric.h. A superblock belongs to a warp and its groups, one after the other, to the
 * warp's four teams of eight lanes. Lane l of a team sums columns l, l + 8, ... of a group, as lane l of the
 * CPU's vectors does, and a team's sums are added up in the CPU's order. */
#ifndef AQ_CUDA_SYMMETRIC_H
#define AQ_CUDA_SYMMETRIC_H

#include "../../arithmetic/symmetric.h"
#include "two_level.h"

#define AQ_TEAM 8
#define AQ_TEAMS (32 / AQ_TEAM)

struct aq_symmetric_view {
  aq_two_level_layout layout;
  aq_symmetric_grid grid;
  const void *weights; /* null: only levels for `scale` */
  int32_t dtype;
  const float *scale; /* null: each group's range */
  const float *column_weights; /* null: ones */
  uint32_t *packed;
  uint8_t *sub_scale, *sub_min;
  uint16_t *super_scale, *super_min;
};

/* What the lanes of a warp tell each other of a superblock. Chunks of weights have a word between them, so
 * that lanes with a chunk each are on different banks. */
struct aq_symmetric_notes {
  float weights[AQ_SEGMENT + AQ_SEGMENT / AQ_CHUNK];
  float scale[AQ_SUPER_GROUPS], v[AQ_SUPER_GROUPS], zero[AQ_SUPER_GROUPS];
  float wt[AQ_SUPER_GROUPS], tt[AQ_SUPER_GROUPS];
};

AQ_DEVICE float aq_noted_weight(const aq_symmetric_notes *notes, size_t col) {
  return notes->weights[col + col / AQ_CHUNK];
}

/* The calling thread's superblock and its place in the warp. */
struct aq_symmetric_lane {
  size_t row, super, columns, groups;
  size_t lane, team, of_team; /* 0..31, 0..3, 0..7 */
  __device__ float total(float value) const {
    for (int distance = AQ_TEAM / 2; distance > 0; distance /= 2)
      value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
  }
  __device__ float largest(float value) const {
    for (int distance = AQ_TEAM / 2; distance > 0; distance /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, value, distance);
      value = other > value ? other : value;
    }
    return value;
  }
};

AQ_DEVICE aq_symmetric_lane aq_symmetric_lane_of(const aq_two_level_layout &layout, size_t unit, size_t lane) {
  const size_t row = aq_quotient(unit, layout.supers), super = unit - row * layout.supers;
  const size_t columns = aq_smaller(AQ_SEGMENT, layout.matrix.cols - super * AQ_SEGMENT);
  const size_t groups = (columns - 1) / layout.matrix.group_size + 1;
  return {row, super, columns, groups, lane, lane / AQ_TEAM, lane % AQ_TEAM};
}

/* The superblock's weights and given scales into the notes. */
AQ_DEVICE int32_t aq_load_symmetric(const aq_symmetric_view &view, const aq_symmetric_lane &own,
                                    aq_symmetric_notes *notes) {
  const aq_layout &matrix = view.layout.matrix;
  const size_t first = own.lane * AQ_CHUNK, col = own.super * AQ_SEGMENT;
  int32_t faults = 0;
  if (view.weights && first < own.columns) {
    float values[AQ_CHUNK];
    const size_t n = aq_smaller(AQ_CHUNK, own.columns - first);
    aq_load_chunk(view.weights, view.dtype, own.row * matrix.cols + col + first, n, values);
    for (size_t k = 0; k < AQ_CHUNK; k++) notes->weights[first + own.lane + k] = values[k];
  }
  if (view.column_weights && own.row == 0)
    for (size_t i = own.lane; i < own.columns; i += 32)
      if (!(view.column_weights[col + i] >= 0.0f && view.column_weights[col + i] < __builtin_inff()))
        faults |= AQ_FAULT_COLUMN_WEIGHT;
  if (own.lane < AQ_SUPER_GROUPS) {
    const bool is_given = view.scale && own.lane < own.groups;
    const size_t at = own.row * matrix.groups + own.super * view.layout.super_groups + own.lane;
    const float scale = is_given ? view.scale[at] : 0.0f;
    if (!(scale - scale == 0.0f)) faults |= AQ_FAULT_NONFINITE;
    notes->scale[own.lane] = scale;
  }
  __syncwarp();
  return faults;
}

/* f(group, its first column that is this lane's, its end) for the groups of this lane's team; behind the
 * last group there are no columns, and the lane takes part for its warp's sake. */
template <class F>
AQ_DEVICE void aq_each_team_group(const aq_symmetric_view &view, const aq_symmetric_lane &own, const F &f) {
  const size_t size = view.layout.matrix.group_size;
  for (size_t base = 0; base < own.groups; base += AQ_TEAMS) {
    const size_t group = base + own.team, begin = aq_smaller(group * size, own.columns);
    f(group, begin + own.of_team, aq_smaller(begin + size, own.columns));
  }
  __syncwarp();
}

AQ_DEVICE void aq_symmetric_ranges(const aq_symmetric_view &view, const aq_symmetric_lane &own,
                                   aq_symmetric_notes *notes) {
  aq_each_team_group(view, own, [&](size_t group, size_t begin, size_t end) {
    float least = 0.0f, most = 0.0f;
    for (size_t i = begin; i < end; i += AQ_TEAM) {
      const float w = aq_noted_weight(notes, i);
      least = -w > least ? -w : least;
      most = w > most ? w : most;
    }
    least = own.largest(least);
    most = own.largest(most);
    if (own.of_team == 0 && group < own.groups) notes->scale[group] = aq_symmetric_range(view.grid, least, most);
  });
}

/* The step, a half float, whose multiples are nearest to the noted |scale| in least squares; infinite where
 * none is large enough, 0 where none is small enough. Every team finds it. */
AQ_DEVICE float aq_symmetric_step(const aq_symmetric_lane &own, const aq_symmetric_notes *notes, float most_sub) {
  float low = notes->scale[own.of_team], high = notes->scale[own.of_team + AQ_TEAM];
  low = low < 0.0f ? -low : low;
  high = high < 0.0f ? -high : high;
  const float largest = own.largest(high > low ? high : low);
  float best = 0.0f, least = __builtin_inff();
  if (!(largest > 0.0f)) return 0.0f;
  for (int32_t k = -AQ_SYMMETRIC_STEPS; k <= AQ_SYMMETRIC_STEPS; k++) {
    float step = largest / (most_sub + 0.25f * (float)k);
    float a = aq_symmetric_level(low, step, most_sub), b = aq_symmetric_level(high, step, most_sub);
    const float products = own.total(a * low + b * high), squares = own.total(a * a + b * b);
    step = aq_round_half(products / squares);
    if (!(step > 0.0f)) continue; /* in all lanes */
    if (best == 0.0f) best = step; /* infinite: it has no error that is less */
    a = low - step * aq_symmetric_level(low, step, most_sub);
    b = high - step * aq_symmetric_level(high, step, most_sub);
    const float error = own.total(a * a + b * b);
    if (error < least) {
      least = error;
      best = step;
    }
  }
  return best;
}

/* The sums of the groups that tell better scales. */
AQ_DEVICE void aq_symmetric_sums(const aq_symmetric_view &view, const aq_symmetric_lane &own,
                                 aq_symmetric_notes *notes, float step) {
  const float *columns = view.column_weights ? view.column_weights + own.super * AQ_SEGMENT : 0;
  aq_each_team_group(view, own, [&](size_t group, size_t begin, size_t end) {
    const size_t there = aq_smaller(group, own.groups - 1);
    const float inverse = aq_symmetric_inverse(step * notes->v[there]), zero = notes->zero[there];
    float wt = 0.0f, tt = 0.0f;
    for (size_t i = begin; i < end; i += AQ_TEAM) {
      const float w = aq_noted_weight(notes, i);
      const float t = aq_clamped_code(w * inverse + zero, view.grid.most) - zero;
      const float ut = columns ? columns[i] * t : t;
      wt += ut * w;
      tt += ut * t;
    }
    wt = own.total(wt);
    tt = own.total(tt);
    if (own.of_team == 0 && group < own.groups) {
      notes->wt[group] = wt;
      notes->tt[group] = tt;
    }
  });
}

/* The codes of the lane's chunk. */
AQ_DEVICE void aq_write_symmetric_codes(const aq_symmetric_view &view, const aq_symmetric_lane &own,
                                        const aq_symmetric_notes *notes, float step) {
  const size_t first = own.lane * AQ_CHUNK;
  if (first >= own.columns) return;
  const size_t n = aq_smaller(AQ_CHUNK, own.columns - first), group = first / view.layout.matrix.group_size;
  const float inverse = aq_symmetric_inverse(step * notes->v[group]), zero = notes->zero[group];
  uint64_t codes = 0;
  for (size_t k = 0; k < n; k++) {
    const float position = aq_noted_weight(notes, first + k) * inverse + zero;
    codes |= (uint64_t)(uint32_t)aq_clamped_code(position, view.grid.most) << k * (size_t)view.layout.matrix.bits;
  }
  aq_write_codes(codes, view.packed, view.layout.matrix, own.row, own.super * (AQ_SEGMENT / AQ_CHUNK) + own.lane);
}

/* Superblock `unit` of all rows' by a warp. Returns the lane's faults. */
AQ_DEVICE int32_t aq_quantize_symmetric(const aq_symmetric_view &view, aq_symmetric_notes *notes, size_t unit,
                                        size_t lane) {
  const aq_two_level_layout &layout = view.layout;
  const aq_symmetric_lane own = aq_symmetric_lane_of(layout, unit, lane);
  const bool has_group = lane < own.groups;
  int32_t faults = aq_load_symmetric(view, own, notes);
  if (__reduce_or_sync(0xffffffffu, (unsigned)(faults & AQ_FAULT_NONFINITE))) return faults; /* all lanes leave */
  if (!view.scale) aq_symmetric_ranges(view, own, notes);
  float step = aq_symmetric_step(own, notes, view.grid.most_sub);
  if (has_group) {
    notes->v[lane] = aq_symmetric_first_level(notes->scale[lane], step, view.grid.most_sub);
    notes->zero[lane] = aq_symmetric_zero(view.grid, notes->scale[lane]);
  }
  __syncwarp();
  for (int32_t round = 0; view.weights && round < AQ_SYMMETRIC_ROUNDS(view.grid); round++) {
    aq_symmetric_sums(view, own, notes, step);
    step = aq_symmetric_step_for(notes->v, notes->wt, notes->tt, own.groups, step);
    __syncwarp(); /* all have read what now changes */
    if (has_group)
      notes->v[lane] = aq_symmetric_level_for(notes->v[lane], notes->wt[lane], notes->tt[lane], step, view.grid.most_sub);
    __syncwarp();
  }
  if (view.weights) aq_write_symmetric_codes(view, own, notes, step);
  const uint16_t minimum = aq_half_from_float(aq_symmetric_super_min(view.grid, step));
  if ((minimum & 0x7c00u) == 0x7c00u) faults |= AQ_FAULT_RANGE;
  if (lane == 0) {
    view.super_scale[own.row * layout.supers + own.super] = aq_half_from_float(step);
    view.super_min[own.row * layout.supers + own.super] = minimum;
  }
  if (has_group) {
    const size_t at = own.row * layout.matrix.groups + own.super * layout.super_groups + lane;
    view.sub_scale[at] = (uint8_t)notes->v[lane];
    view.sub_min[at] = aq_symmetric_sub_min(view.grid, notes->v[lane], notes->zero[lane]);
  }
  return faults;
}

#endif
