/* clip.h: the clip search of one group, the arithmetic of kernels/cpu/scalar.c in its order: sums run over
 * segments of AQ_SEGMENT columns, and the segments' sums are added up in order. `Group` says where weights
 * come from and who sums which segment:
 *
 *     size_t n                         columns
 *     float weight(size_t i)           weight i
 *     float importance(size_t i)       its column weight over the group's largest; 1 without
 *     Sums ordered<Sums>(part)         part(begin, end) of all segments, added up from the first to the last */
#ifndef AQ_CUDA_CLIP_H
#define AQ_CUDA_CLIP_H

#include "chunk.h"

#define AQ_WHOLE_WARP 0xffffffffu

/* The calling thread's warp, all of whose lanes are there. */
struct aq_warp {
  int lane;
  template <class T>
  __device__ T shared(const T &value, int from) const {
    static_assert(sizeof(T) % 4 == 0, "exchanged in words");
    T result;
    const uint32_t *in = (const uint32_t *)&value;
    uint32_t *out = (uint32_t *)&result;
#pragma unroll
    for (size_t i = 0; i < sizeof(T) / 4; i++) out[i] = __shfl_sync(AQ_WHOLE_WARP, in[i], from);
    return result;
  }
  __device__ aq_range joined(aq_range range) const {
    for (int distance = 16; distance > 0; distance /= 2) range = aq_joined_range(range, exchanged(range, distance));
    return range;
  }
  __device__ float largest(float value) const {
    for (int distance = 16; distance > 0; distance /= 2) {
      const float other = __shfl_xor_sync(AQ_WHOLE_WARP, value, distance);
      value = other > value ? other : value;
    }
    return value;
  }
  __device__ int32_t any(int32_t faults) const { return (int32_t)__reduce_or_sync(AQ_WHOLE_WARP, (unsigned)faults); }
  static __device__ aq_range exchanged(const aq_range &range, int distance) {
    return {__shfl_xor_sync(AQ_WHOLE_WARP, range.minimum, distance),
            __shfl_xor_sync(AQ_WHOLE_WARP, range.maximum, distance),
            __shfl_xor_sync(AQ_WHOLE_WARP, range.finite, distance)};
  }
};

struct aq_weight_sums {
  float h, hw;
  __device__ void add(const aq_weight_sums &part) {
    h += part.h;
    hw += part.hw;
  }
};

/* For the least squares of w = s q + b; fixed zero point: with p = q - z in place of q. */
struct aq_fit_sums {
  float hq, hqq, hwq, error;
  __device__ void add(const aq_fit_sums &part) {
    hq += part.hq;
    hqq += part.hqq;
    hwq += part.hwq;
    error += part.error;
  }
};

/* Candidates whose sums are taken in one pass. */
#define AQ_CLIP_PASS 4

struct aq_pass_sums {
  aq_fit_sums of[AQ_CLIP_PASS];
  __device__ void add(const aq_pass_sums &part) {
    for (int k = 0; k < AQ_CLIP_PASS; k++) of[k].add(part.of[k]);
  }
};

struct aq_clip_candidate {
  float inverse, offset; /* q = round(w * inverse + offset), clamped */
  float zero_point;      /* subtracted from q in the sums */
};

AQ_DEVICE aq_clip_candidate aq_clip_step(int32_t step, float minimum, float maximum, int32_t bits, int32_t kind) {
  const float code_max = (float)((1 << bits) - 1);
  const float keep = 1.0f - (float)step * (0.7f / AQ_CLIP_STEPS);
  aq_clip_candidate c;
  if (kind == AQ_ZERO_POINT_SYMMETRIC) {
    const float half_range = (float)(1 << (bits - 1));
    const float larger = -minimum > maximum ? -minimum : maximum;
    c.inverse = half_range / (larger * (1.0f - (float)(step / 2) * (1.4f / AQ_CLIP_STEPS)));
    if (step & 1) c.inverse = -c.inverse;
    c.offset = half_range;
    c.zero_point = half_range;
    return c;
  }
  const float low = minimum * keep, high = maximum * keep;
  if (kind == AQ_ZERO_POINT_INTEGER) {
    const float bottom = low < 0.0f ? low : 0.0f, top = high > 0.0f ? high : 0.0f;
    c.inverse = code_max / (top - bottom);
    c.offset = aq_round_even(-bottom * c.inverse);
    c.zero_point = c.offset;
    return c;
  }
  c.inverse = code_max / (high - low);
  c.offset = -low * c.inverse;
  c.zero_point = 0.0f;
  return c;
}

template <class Group>
AQ_DEVICE aq_pass_sums aq_candidate_sums(const Group &group, const aq_clip_candidate c[AQ_CLIP_PASS],
                                           float code_max) {
  return group.template ordered<aq_pass_sums>([&](size_t begin, size_t end) {
    aq_pass_sums part = {};
    for (size_t i = begin; i < end; i++) {
      const float w = group.weight(i), h = group.importance(i);
      for (int k = 0; k < AQ_CLIP_PASS; k++) {
        float position = w * c[k].inverse + c[k].offset;
        position = position > 0.0f ? position : 0.0f;
        position = position < code_max ? position : code_max;
        const float q = aq_round_even(position) - c[k].zero_point;
        const float hq = h * q;
        part.of[k].hq += hq;
        part.of[k].hqq += hq * q;
        part.of[k].hwq += hq * w;
      }
    }
    return part;
  });
}

template <class Group>
AQ_DEVICE aq_fit_sums aq_grid_sums(const Group &group, aq_grid grid, float code_max, float zero_point) {
  return group.template ordered<aq_fit_sums>([&](size_t begin, size_t end) {
    aq_fit_sums part = {};
    for (size_t i = begin; i < end; i++) {
      const float w = group.weight(i), h = group.importance(i);
      const float code = (float)aq_encode(w, grid, code_max);
      const float difference = w - grid.scale * (code - grid.zero_point);
      const float q = code - zero_point;
      const float hq = h * q;
      part.hq += hq;
      part.hqq += hq * q;
      part.hwq += hq * w;
      part.error += h * difference * difference;
    }
    return part;
  });
}

AQ_DEVICE bool aq_usable_grid(aq_grid grid) {
  return grid.scale <= AQ_HALF_MAX && grid.scale >= -AQ_HALF_MAX && grid.scale != 0.0f &&
         grid.zero_point <= AQ_HALF_MAX && grid.zero_point >= -AQ_HALF_MAX;
}

/* How much of sum h w^2 the best grid for these codes explains, less what a constant explains. */
AQ_DEVICE float aq_explained(const aq_fit_sums &sums, const aq_weight_sums &all, bool affine) {
  if (!affine) return sums.hwq * sums.hwq / sums.hqq;
  const float numerator = all.h * sums.hwq - sums.hq * all.hw;
  const float determinant = all.h * sums.hqq - sums.hq * sums.hq;
  return numerator * (numerator / determinant);
}

AQ_DEVICE aq_grid aq_refit_grid(const aq_fit_sums &sums, const aq_weight_sums &all, bool affine, float zero_point) {
  aq_grid grid;
  if (!affine) {
    grid.scale = aq_round_half(sums.hwq / sums.hqq);
    grid.zero_point = zero_point;
    return grid;
  }
  const float numerator = all.h * sums.hwq - sums.hq * all.hw;
  const float determinant = all.h * sums.hqq - sums.hq * sums.hq;
  grid.scale = aq_round_half(numerator / determinant);
  grid.zero_point = aq_round_half((grid.scale * sums.hq - all.hw) / (all.h * grid.scale));
  return grid;
}

/* The best grid found from `start`, round to nearest's; minimum < maximum. */
template <class Group>
AQ_DEVICE aq_grid aq_clip_search(const Group &group, aq_grid start, float minimum, float maximum, int32_t bits,
                                   int32_t kind) {
  const bool affine = kind == AQ_ZERO_POINT_REAL;
  const float code_max = (float)((1 << bits) - 1);
  const aq_weight_sums all = group.template ordered<aq_weight_sums>([&](size_t begin, size_t end) {
    aq_weight_sums part = {};
    for (size_t i = begin; i < end; i++) {
      const float h = group.importance(i);
      part.h += h;
      part.hw += h * group.weight(i);
    }
    return part;
  });

  aq_fit_sums sums = {};
  float best_explained = -1.0f, zero_point = 0.0f;
  for (int32_t step = 0; step < AQ_CLIP_STEPS; step += AQ_CLIP_PASS) {
    aq_clip_candidate c[AQ_CLIP_PASS];
    for (int k = 0; k < AQ_CLIP_PASS; k++) c[k] = aq_clip_step(step + k, minimum, maximum, bits, kind);
    const aq_pass_sums pass = aq_candidate_sums(group, c, code_max);
    for (int k = 0; k < AQ_CLIP_PASS; k++) {
      const float value = aq_explained(pass.of[k], all, affine);
      if (value > best_explained) {
        best_explained = value;
        sums = pass.of[k];
        zero_point = c[k].zero_point;
      }
    }
  }

  aq_grid best = start;
  float best_error = aq_grid_sums(group, start, code_max, 0.0f).error;
  for (int32_t round = 0; round < AQ_REFITS; round++) {
    const aq_grid grid = aq_refit_grid(sums, all, affine, zero_point);
    if (!aq_usable_grid(grid)) break;
    sums = aq_grid_sums(group, grid, code_max, affine ? 0.0f : zero_point);
    if (sums.error < best_error) {
      best_error = sums.error;
      best = grid;
    }
  }
  return best;
}

/* A group of at most AQ_SEGMENT columns of one thread, in a tile that holds a group in each column:
 * weights[i * stride]; importances likewise, or null. */
struct aq_tile_group {
  const float *weights, *importances;
  size_t stride, n;
  __device__ float weight(size_t i) const { return weights[i * stride]; }
  __device__ float importance(size_t i) const { return importances ? importances[i * stride] : 1.0f; }
  template <class Sums, class Part>
  __device__ Sums ordered(Part part) const {
    Sums total = {};
    total.add(part((size_t)0, n));
    return total;
  }
};

/* A group of any length of a warp's lanes, read from memory in every pass. */
struct aq_long_group {
  aq_warp warp;
  const void *weights;
  int32_t dtype;
  size_t first, n;
  const float *column_weights; /* of the group's first column, or null */
  float weight_scale;
  __device__ float weight(size_t i) const { return aq_load_element(weights, dtype, first + i); }
  __device__ float importance(size_t i) const { return weight_scale > 0.0f ? column_weights[i] / weight_scale : 1.0f; }
  template <class Sums, class Part>
  __device__ Sums ordered(Part part) const {
    const size_t segments = (n - 1) / AQ_SEGMENT + 1;
    Sums total = {};
    for (size_t base = 0; base < segments; base += 32) {
      const size_t own = base + (size_t)warp.lane;
      Sums mine = {};
      if (own < segments) mine = part(own * AQ_SEGMENT, aq_smaller((own + 1) * AQ_SEGMENT, n));
      for (int lane = 0; lane < 32 && base + (size_t)lane < segments; lane++) total.add(warp.shared(mine, lane));
    }
    return total;
  }
};

#endif
