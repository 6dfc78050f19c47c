/* clip.h: the clip search of one group with the arithmetic of kernels/arithmetic/clip.h. `Group` says
 * where weights come from and which thread sums which segment:
 *
 *     size_t n                         columns
 *     float weight(size_t i)           weight i
 *     float importance(size_t i)       its column weight over the group's largest; 1 without
 *     Sums ordered<Sums>(part)         part(begin, end) of all segments, added up from the first to the last
 */
#ifndef AQ_CUDA_CLIP_H
#define AQ_CUDA_CLIP_H

#include "../../arithmetic/clip.h"
#include "../chunk.h"

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
};
AQ_DEVICE void aq_add_sums(aq_weight_sums *total, const aq_weight_sums *part) {
  total->h += part->h;
  total->hw += part->hw;
}

/* Candidates whose sums are taken in one pass. */
#define AQ_CLIP_PASS 4

struct aq_pass_sums {
  aq_fit_sums of[AQ_CLIP_PASS];
};
AQ_DEVICE void aq_add_sums(aq_pass_sums *total, const aq_pass_sums *part) {
  for (int k = 0; k < AQ_CLIP_PASS; k++) aq_add_sums(&total->of[k], &part->of[k]);
}

template <class Group>
AQ_DEVICE aq_pass_sums aq_candidate_sums(const Group &group, const aq_clip_candidate c[AQ_CLIP_PASS], float code_max) {
  return group.template ordered<aq_pass_sums>([&](size_t begin, size_t end) {
    aq_pass_sums part = {};
    for (size_t i = begin; i < end; i++) {
      const float w = group.weight(i), h = group.importance(i);
      for (int k = 0; k < AQ_CLIP_PASS; k++) aq_add_candidate(&part.of[k], w, h, c[k], code_max);
    }
    return part;
  });
}

template <class Group>
AQ_DEVICE aq_fit_sums aq_grid_sums(const Group &group, aq_grid grid, float code_max, float zero_point) {
  return group.template ordered<aq_fit_sums>([&](size_t begin, size_t end) {
    aq_fit_sums part = {};
    for (size_t i = begin; i < end; i++)
      aq_add_encoded(&part, group.weight(i), group.importance(i), grid, code_max, zero_point);
    return part;
  });
}

/* The best grid found from `start`, round to nearest's; minimum < maximum. */
template <class Group>
AQ_DEVICE aq_grid aq_clip_search(const Group &group, aq_grid start, float minimum, float maximum, int32_t bits,
                                   int32_t kind) {
  const int affine = AQ_AFFINE(kind);
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
      const float value = aq_explained(&pass.of[k], all.h, all.hw, affine);
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
    const aq_grid grid = aq_refit_grid(&sums, all.h, all.hw, affine, zero_point);
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
    const Sums all = part((size_t)0, n);
    aq_add_sums(&total, &all);
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
      for (int lane = 0; lane < 32 && base + (size_t)lane < segments; lane++) {
        const Sums shared = warp.shared(mine, lane);
        aq_add_sums(&total, &shared);
      }
    }
    return total;
  }
};

#endif
