/* quantize/scalar.c: every kernel in plain loops. This is the oracle: the other instruction sets must give
 * the same bytes, so each float operation and its order here is the definition. */
#include "kernels.h"

static void load(const void *in, int32_t dtype, size_t first, size_t n, float *out) {
  for (size_t i = 0; i < n; i++) out[i] = aq_load_element(in, dtype, first + i);
}

static void store(const float *in, size_t n, void *out, int32_t dtype, size_t first) {
  for (size_t i = 0; i < n; i++) {
    switch (dtype) {
      case AQ_F32: ((float *)out)[first + i] = in[i]; break;
      case AQ_F16: ((uint16_t *)out)[first + i] = aq_half_from_float(in[i]); break;
      case AQ_BF16: ((uint16_t *)out)[first + i] = aq_bfloat_from_float(in[i]); break;
      case AQ_F8_E4M3: ((uint8_t *)out)[first + i] = aq_e4m3_from_float(in[i]); break;
      case AQ_F8_E5M2: ((uint8_t *)out)[first + i] = aq_e5m2_from_float(in[i]); break;
      default: ((double *)out)[first + i] = (double)in[i]; break;
    }
  }
}

static uint32_t read_code(const uint32_t *packed, size_t i, int32_t bits) {
  const size_t bit = i * (size_t)bits;
  const size_t word = bit >> 5, shift = bit & 31;
  uint32_t code = packed[word] >> shift;
  if (shift + (size_t)bits > 32) code |= packed[word + 1] << (32 - shift);
  return code & ((1u << bits) - 1);
}

static void or_code(uint32_t *packed, size_t i, int32_t bits, uint32_t code) {
  const size_t bit = i * (size_t)bits;
  const size_t word = bit >> 5, shift = bit & 31;
  packed[word] |= code << shift;
  if (shift + (size_t)bits > 32) packed[word + 1] |= code >> (32 - shift);
}

static int32_t pack_row(const uint8_t *codes, size_t cols, int32_t bits, uint32_t *packed) {
  const size_t words = (cols * (size_t)bits + 31) / 32;
  for (size_t i = 0; i < words; i++) packed[i] = 0;
  for (size_t i = 0; i < cols; i++) {
    if (codes[i] >> bits) return AQ_E_VALUE;
    or_code(packed, i, bits, codes[i]);
  }
  return AQ_OK;
}

static void unpack_row(const uint32_t *packed, size_t cols, int32_t bits, uint8_t *codes) {
  for (size_t i = 0; i < cols; i++) codes[i] = (uint8_t)read_code(packed, i, bits);
}

static void dequantize(const aq_packed_view *view, size_t row, size_t col, size_t n, float *out) {
  const uint32_t *packed = view->packed + row * view->words;
  for (size_t i = 0; i < n; i++) {
    if (view->two_level.scale_bits) {
      float scale, minimum;
      aq_two_level_grid(view, row, (col + i) / view->group_size, &scale, &minimum);
      out[i] = scale * (float)read_code(packed, col + i, view->bits) - minimum;
      continue;
    }
    const size_t group = row * view->groups + (col + i) / view->group_size;
    if (view->levels) {
      out[i] = aq_trellis_weight(aq_trellis_level((const uint8_t *)packed, col + i, view->bits),
                                 aq_float_from_half(view->scale[group]), aq_float_from_half(view->zero_point[group]));
      continue;
    }
    aq_grid grid = {aq_float_from_half(view->scale[group]),
                    view->zero_point ? aq_float_from_half(view->zero_point[group]) : (float)(1 << (view->bits - 1))};
    out[i] = aq_decode(read_code(packed, col + i, view->bits), grid);
  }
}

static void accumulate(const float *a, const float *b, size_t n, aq_sums *sums) {
  for (size_t i = 0; i < n; i++) {
    const size_t lane = i % AQ_SUM_LANES;
    const double x = a[i], y = b[i], d = x - y;
    const float magnitude = x < 0 ? -a[i] : a[i], difference = (float)(d < 0 ? -d : d);
    sums->aa[lane] += x * x;
    sums->bb[lane] += y * y;
    sums->ab[lane] += x * y;
    sums->dd[lane] += d * d;
    if (magnitude > sums->max_a) sums->max_a = magnitude;
    if (difference > sums->max_difference) sums->max_difference = difference;
  }
}

/* One group of a row, its columns [col, col + n). */
typedef struct {
  const aq_quantize_job *job;
  size_t first; /* element index of the group's first weight */
  size_t col;
  size_t n;
  float weight_scale; /* largest column weight of the group; 0 when all are zero or none are given */
} group;

static float weight_at(const group *g, size_t i) { return aq_load_element(g->job->weights, g->job->dtype, g->first + i); }

/* Column weights of a group are divided by their largest, so that no sum overflows; all zero counts as all
 * one. */
static float importance_at(const group *g, size_t i) {
  return g->weight_scale > 0.0f ? g->job->column_weights[g->col + i] / g->weight_scale : 1.0f;
}

static aq_fit_sums candidate_sums(const group *g, aq_clip_candidate c, float code_max) {
  aq_fit_sums total = {0};
  for (size_t begin = 0; begin < g->n; begin += AQ_SEGMENT) {
    aq_fit_sums part = {0};
    for (size_t i = begin; i < aq_min_size(begin + AQ_SEGMENT, g->n); i++)
      aq_add_candidate(&part, weight_at(g, i), importance_at(g, i), c, code_max);
    aq_add_sums(&total, &part);
  }
  return total;
}

static aq_fit_sums grid_sums(const group *g, aq_grid grid, float code_max, float zero_point) {
  aq_fit_sums total = {0};
  for (size_t begin = 0; begin < g->n; begin += AQ_SEGMENT) {
    aq_fit_sums part = {0};
    for (size_t i = begin; i < aq_min_size(begin + AQ_SEGMENT, g->n); i++)
      aq_add_encoded(&part, weight_at(g, i), importance_at(g, i), grid, code_max, zero_point);
    aq_add_sums(&total, &part);
  }
  return total;
}

static aq_grid clip_search(const group *g, aq_grid start, float minimum, float maximum) {
  const int32_t bits = g->job->bits, kind = g->job->zero_point_kind;
  const int affine = AQ_AFFINE(kind);
  const float code_max = (float)((1 << bits) - 1);
  float h = 0.0f, hw = 0.0f;
  for (size_t begin = 0; begin < g->n; begin += AQ_SEGMENT) {
    float part_h = 0.0f, part_hw = 0.0f;
    for (size_t i = begin; i < aq_min_size(begin + AQ_SEGMENT, g->n); i++) {
      part_h += importance_at(g, i);
      part_hw += importance_at(g, i) * weight_at(g, i);
    }
    h += part_h;
    hw += part_hw;
  }

  aq_fit_sums best_sums = {0};
  float best_explained = -1.0f, zero_point = 0.0f;
  for (int32_t step = 0; step < AQ_CLIP_STEPS; step++) {
    const aq_clip_candidate c = aq_clip_step(step, minimum, maximum, bits, kind);
    const aq_fit_sums sums = candidate_sums(g, c, code_max);
    const float value = aq_explained(&sums, h, hw, affine);
    if (value > best_explained) {
      best_explained = value;
      best_sums = sums;
      zero_point = c.zero_point;
    }
  }

  aq_grid best = start;
  float best_error = grid_sums(g, start, code_max, 0.0f).error;
  aq_fit_sums sums = best_sums;
  for (int32_t round = 0; round < AQ_REFITS; round++) {
    const aq_grid grid = aq_refit_grid(&sums, h, hw, affine, zero_point);
    if (!aq_usable_grid(grid)) break;
    sums = grid_sums(g, grid, code_max, affine ? 0.0f : zero_point);
    if (sums.error < best_error) {
      best_error = sums.error;
      best = grid;
    }
  }
  return best;
}

static int32_t quantize_rows(const aq_quantize_job *job, size_t row_begin, size_t row_end) {
  const float code_max = (float)((1 << job->bits) - 1);
  for (size_t row = row_begin; row < row_end; row++) {
    uint32_t *packed = job->packed + row * job->words;
    for (size_t i = 0; i < job->words; i++) packed[i] = 0;
    for (size_t index = 0; index < job->groups; index++) {
      group g = {job, 0, index * job->group_size, 0, 0.0f};
      g.first = row * job->cols + g.col;
      g.n = aq_min_size(job->group_size, job->cols - g.col);
      float minimum = weight_at(&g, 0), maximum = minimum;
      for (size_t i = 0; i < g.n; i++) {
        const float w = weight_at(&g, i);
        if (!(w - w == 0.0f)) return AQ_E_NONFINITE;
        if (w < minimum) minimum = w;
        if (w > maximum) maximum = w;
        if (job->column_weights && job->column_weights[g.col + i] > g.weight_scale)
          g.weight_scale = job->column_weights[g.col + i];
      }
      aq_grid grid;
      const int32_t status = aq_round_grid(minimum, maximum, job->bits, job->zero_point_kind, &grid);
      if (status != AQ_OK) return status;
      if (job->clip && minimum < maximum) grid = clip_search(&g, grid, minimum, maximum);
      for (size_t i = 0; i < g.n; i++)
        or_code(packed, g.col + i, job->bits, aq_encode(weight_at(&g, i), grid, code_max));
      job->scale[row * job->groups + index] = aq_half_from_float(grid.scale);
      if (job->zero_point)
        job->zero_point[row * job->groups + index] = aq_half_from_float(aq_stored_zero(grid, job->zero_point_kind));
    }
  }
  return AQ_OK;
}

const aq_quantize_kernels aq_quantize_scalar = {quantize_rows, dequantize, pack_row, unpack_row,
                                                load,          store,      accumulate};
