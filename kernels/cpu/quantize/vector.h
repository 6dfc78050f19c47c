/* quantize/vector.h: quantizing over vectors of AQ_W floats, included once by each unit of isa/ behind the
 * primitives of its instruction set. Results equal quantize/scalar.c's to the bit.
 *
 * There is one group in each lane: a tile holds AQ_SEGMENT columns of AQ_W groups, transposed. Sums then run
 * down the lanes in the oracle's order, and nothing is ever added across lanes.
 *
 *     tile[i] = column i of group 0 | column i of group 1 | ... | column i of group AQ_W - 1
 */
#include "elements_vector.h"

typedef struct {
  const aq_quantize_job *job;
  size_t n;             /* columns of every group here */
  size_t lanes;         /* groups that are there; lanes beyond repeat the last */
  size_t first[AQ_W];   /* element index of each group's first weight */
  size_t col[AQ_W];     /* its first column */
  size_t row[AQ_W];     /* its row */
  size_t index[AQ_W];   /* its number in the row */
  vf importance_scale;  /* largest column weight of each group, 1 where all are zero */
  vi importance_none;   /* groups whose column weights are all zero */
  vf *weights;          /* tile of the segment at hand */
  vf *importance;       /* tile of column weights, null when there are none */
} batch;

AQ_INLINE void load_tile(const void *in, int32_t dtype, const size_t first[AQ_W], size_t n, vf *tile) {
  size_t i = 0;
  for (; i + AQ_W <= n; i += AQ_W) {
    vf r[AQ_W];
    for (int lane = 0; lane < AQ_W; lane++) r[lane] = v_load_as(in, dtype, first[lane] + i);
    v_transpose(r);
    for (int k = 0; k < AQ_W; k++) tile[i + k] = r[k];
  }
  for (; i < n; i++)
    for (int lane = 0; lane < AQ_W; lane++) aq_quantize_scalar.load(in, dtype, first[lane] + i, 1,
                                                                    (float *)&tile[i] + lane);
}

static void load_weights(const batch *b, size_t begin, size_t n) {
  const void *in = b->job->weights;
  size_t first[AQ_W];
  for (int lane = 0; lane < AQ_W; lane++) first[lane] = b->first[lane] + begin;
  switch (b->job->dtype) {
    case AQ_F64:
      for (size_t i = 0; i < n; i++)
        for (int lane = 0; lane < AQ_W; lane++)
          aq_quantize_scalar.load(in, AQ_F64, first[lane] + i, 1, (float *)&b->weights[i] + lane);
      break;
    case AQ_F8_E4M3: load_tile(in, AQ_F8_E4M3, first, n, b->weights); break;
    case AQ_F8_E5M2: load_tile(in, AQ_F8_E5M2, first, n, b->weights); break;
    default: AQ_FOR_FLOATS(b->job->dtype, type, load_tile(in, type, first, n, b->weights))
  }
}

static void load_importance(const batch *b, size_t begin, size_t n) {
  size_t first[AQ_W];
  for (int lane = 0; lane < AQ_W; lane++) first[lane] = b->col[lane] + begin;
  load_tile(b->job->column_weights, AQ_F32, first, n, b->importance);
  for (size_t i = 0; i < n; i++)
    b->importance[i] = v_select(b->importance_none, v_set(1.0f), b->importance[i] / b->importance_scale);
}

/* Runs `body` with segment columns [begin, begin + m); groups of one segment keep their tiles between
 * passes. */
#define AQ_FOR_SEGMENTS(b, m, ...)                                              \
  for (size_t begin = 0; begin < (b)->n; begin += AQ_SEGMENT) {                 \
    const size_t m = aq_min_size(AQ_SEGMENT, (b)->n - begin);                   \
    if ((b)->n > AQ_SEGMENT) {                                                  \
      load_weights(b, begin, m);                                                \
      if ((b)->importance) load_importance(b, begin, m);                        \
    }                                                                           \
    __VA_ARGS__                                                                      \
  }

typedef struct {
  vf hq, hqq, hwq, error;
} fit_sums;

typedef struct {
  vf inverse, offset, zero_point;
} clip_candidate;

typedef struct {
  vf scale, zero_point;
} grid;

AQ_INLINE void candidate_segment(const batch *b, size_t m, const clip_candidate *c, vf code_max, int weighted,
                                 int affine, fit_sums *total) {
  fit_sums part[AQ_CLIP_UNROLL];
  for (int k = 0; k < AQ_CLIP_UNROLL; k++) part[k] = (fit_sums){{0}, {0}, {0}, {0}};
  for (size_t i = 0; i < m; i++) {
    const vf w = b->weights[i];
    for (int k = 0; k < AQ_CLIP_UNROLL; k++) {
      const vf position = v_min(code_max, v_max((vf){0}, w * c[k].inverse + c[k].offset));
      vf q = v_round(position);
      if (!affine) q = q - c[k].zero_point;
      const vf hq = weighted ? b->importance[i] * q : q;
      if (affine) part[k].hq += hq;
      part[k].hqq += hq * q;
      part[k].hwq += hq * w;
    }
  }
  for (int k = 0; k < AQ_CLIP_UNROLL; k++) {
    total[k].hq += part[k].hq;
    total[k].hqq += part[k].hqq;
    total[k].hwq += part[k].hwq;
  }
}

AQ_INLINE void candidate_sums(const batch *b, const clip_candidate *c, vf code_max, int affine, fit_sums *total) {
  for (int k = 0; k < AQ_CLIP_UNROLL; k++) total[k] = (fit_sums){{0}, {0}, {0}, {0}};
  AQ_FOR_SEGMENTS(b, m, {
    if (b->importance)
      candidate_segment(b, m, c, code_max, 1, affine, total);
    else
      candidate_segment(b, m, c, code_max, 0, affine, total);
  })
}

AQ_INLINE vf encode(vf w, grid g, vf code_max) {
  return v_min(code_max, v_max((vf){0}, w / g.scale + g.zero_point));
}

AQ_INLINE fit_sums grid_sums(const batch *b, grid g, vf code_max, int affine) {
  fit_sums total = {{0}, {0}, {0}, {0}};
  AQ_FOR_SEGMENTS(b, m, {
    fit_sums part = {{0}, {0}, {0}, {0}};
    for (size_t i = 0; i < m; i++) {
      const vf w = b->weights[i];
      const vf code = v_round(encode(w, g, code_max));
      const vf difference = w - g.scale * (code - g.zero_point);
      const vf q = affine ? code : code - g.zero_point;
      vf hq = q, weighted = difference;
      if (b->importance) {
        hq = b->importance[i] * q;
        weighted = b->importance[i] * difference;
      }
      part.hq += hq;
      part.hqq += hq * q;
      part.hwq += hq * w;
      part.error += weighted * difference;
    }
    total.hq += part.hq;
    total.hqq += part.hqq;
    total.hwq += part.hwq;
    total.error += part.error;
  })
  return total;
}

AQ_INLINE vi usable(grid g) {
  const vf largest = v_set(AQ_HALF_MAX);
  return (g.scale <= largest) & (g.scale >= -largest) & (g.scale != (vf){0}) & (g.zero_point <= largest) &
         (g.zero_point >= -largest);
}

AQ_LEAST_SQUARES(AQ_INLINE, vf, fit_sums, grid, explained, refit, v_round_half)

AQ_INLINE clip_candidate clip_step(int32_t step, vf minimum, vf maximum, int32_t bits, int32_t kind) {
  const vf code_max = v_set((float)((1 << bits) - 1));
  const vf keep = v_set(1.0f - (float)step * (0.7f / AQ_CLIP_STEPS));
  clip_candidate c;
  if (kind == AQ_ZERO_POINT_SYMMETRIC) {
    const vf half_range = v_set((float)(1 << (bits - 1)));
    const vf larger = v_max(maximum, -minimum);
    c.inverse = half_range / (larger * (1.0f - (float)(step / 2) * (1.4f / AQ_CLIP_STEPS)));
    if (step & 1) c.inverse = -c.inverse;
    c.offset = half_range;
    c.zero_point = half_range;
    return c;
  }
  const vf low = minimum * keep, high = maximum * keep;
  if (kind == AQ_ZERO_POINT_INTEGER) {
    const vf bottom = v_min((vf){0}, low), top = v_max((vf){0}, high);
    c.inverse = code_max / (top - bottom);
    c.offset = v_round(-bottom * c.inverse) + 0.0f; /* no negative zero: it is stored */
    c.zero_point = c.offset;
    return c;
  }
  c.inverse = code_max / (high - low);
  c.offset = -low * c.inverse;
  c.zero_point = (vf){0};
  return c;
}

AQ_INLINE grid clip_search_kind(const batch *b, grid start, vf minimum, vf maximum, int affine) {
  const int32_t bits = b->job->bits, kind = b->job->zero_point_kind;
  const vf code_max = v_set((float)((1 << bits) - 1));
  vf h = {0}, hw = {0};
  AQ_FOR_SEGMENTS(b, m, {
    vf part_h = {0}; vf part_hw = {0};
    for (size_t i = 0; i < m; i++) {
      const vf weight = b->importance ? b->importance[i] : v_set(1.0f);
      part_h += weight;
      part_hw += b->importance ? weight * b->weights[i] : b->weights[i];
    }
    h += part_h;
    hw += part_hw;
  })

  fit_sums sums = {{0}, {0}, {0}, {0}};
  vf best_explained = v_set(-1.0f), zero_point = {0};
  for (int32_t step = 0; step < AQ_CLIP_STEPS; step += AQ_CLIP_UNROLL) {
    clip_candidate c[AQ_CLIP_UNROLL];
    fit_sums tried[AQ_CLIP_UNROLL];
    for (int k = 0; k < AQ_CLIP_UNROLL; k++) c[k] = clip_step(step + k, minimum, maximum, bits, kind);
    candidate_sums(b, c, code_max, affine, tried);
    for (int k = 0; k < AQ_CLIP_UNROLL; k++) {
      const vf value = explained(&tried[k], h, hw, affine);
      const vi better = value > best_explained;
      best_explained = v_select(better, value, best_explained);
      sums.hq = v_select(better, tried[k].hq, sums.hq);
      sums.hqq = v_select(better, tried[k].hqq, sums.hqq);
      sums.hwq = v_select(better, tried[k].hwq, sums.hwq);
      zero_point = v_select(better, c[k].zero_point, zero_point);
    }
  }

  grid best = start;
  vf best_error = grid_sums(b, start, code_max, 1).error;
  vi alive = minimum < maximum;
  for (int32_t round = 0; round < AQ_REFITS; round++) {
    const grid g = refit(&sums, h, hw, affine, zero_point);
    alive &= usable(g);
    sums = grid_sums(b, g, code_max, affine);
    const vi better = alive & (sums.error < best_error);
    best_error = v_select(better, sums.error, best_error);
    best.scale = v_select(better, g.scale, best.scale);
    best.zero_point = v_select(better, g.zero_point, best.zero_point);
  }
  return best;
}

static grid clip_search(const batch *b, grid start, vf minimum, vf maximum) {
  switch (AQ_AFFINE(b->job->zero_point_kind)) {
    case 1: return clip_search_kind(b, start, minimum, maximum, 1);
    case 2: return clip_search_kind(b, start, minimum, maximum, 2);
    default: return clip_search_kind(b, start, minimum, maximum, 0);
  }
}

AQ_INLINE vf round_half_up(vf x) {
  const vu bits = v_half_bits(x);
  return v_half_value(bits - (vu)(v_half_value(bits) < x));
}

/* aq_round_grid for every lane; lanes outside the plain formula go through the scalar function. */
static int32_t round_grids(const batch *b, vf minimum, vf maximum, grid *out) {
  const int32_t bits = b->job->bits, kind = b->job->zero_point_kind;
  const vf code_max = v_set((float)((1 << bits) - 1)), half_range = v_set((float)(1 << (bits - 1)));
  const vf largest = v_set(AQ_HALF_MAX);
  minimum += 0.0f;
  vi plain = minimum < maximum;
  if (AQ_AFFINE(kind)) {
    out->scale = v_round_half((maximum - minimum) / code_max);
    const vf zero = (vf){0} - minimum / out->scale;
    out->zero_point = AQ_AFFINE(kind) == 1 ? v_round_half(zero)
                                           : 0.0f - v_round_half(0.0f - zero * out->scale) / out->scale;
    plain &= (out->scale >= v_set(AQ_HALF_MIN_NORMAL)) & (zero <= v_set(1024.0f)) & (zero >= v_set(-1024.0f));
    if (AQ_AFFINE(kind) == 2) /* an offset is the value of code 0 */
      plain &= (v_round_half(minimum) <= largest) & (v_round_half(minimum) >= -largest);
  } else {
    const vf less = v_set(1.0f - AQ_NARROW_CODE);
    plain &= ~((minimum > maximum * less) | (maximum < minimum * less));
  }
  if (kind == AQ_ZERO_POINT_INTEGER) {
    const vf low = v_min((vf){0}, minimum), high = v_max((vf){0}, maximum);
    out->scale = round_half_up((high - low) / code_max);
    out->zero_point = v_min(code_max, v_round(-low / out->scale) + 0.0f);
  } else if (kind == AQ_ZERO_POINT_SYMMETRIC) {
    const vf negative = -minimum, positive = maximum;
    const vi flip = positive > negative;
    const vf from_larger = v_select(flip, positive, negative) / half_range;
    const vf from_smaller = v_select(flip, negative, positive) / (half_range - 0.5f);
    const vf scale = round_half_up(v_max(from_smaller, from_larger));
    plain &= scale <= largest;
    out->scale = v_select(flip, -scale, scale);
    out->zero_point = half_range;
  }
  plain &= out->scale <= largest;
  for (int lane = 0; lane < AQ_W; lane++) {
    if (plain[lane]) continue;
    aq_grid g;
    const int32_t status = aq_round_grid(minimum[lane], maximum[lane], bits, kind, &g);
    if (status != AQ_OK) return status;
    out->scale[lane] = g.scale;
    out->zero_point[lane] = g.zero_point;
  }
  return AQ_OK;
}

/* Codes of up to 32 columns into `bits` words a lane. */
AQ_INLINE void encode_words(const vf *weights, size_t n, grid g, int32_t bits, vu *words) {
  const vf code_max = v_set((float)((1 << bits) - 1));
  for (int j = 0; j < bits; j++) words[j] = (vu){0};
#pragma GCC unroll 32
  for (int i = 0; i < 32; i++) {
    if ((size_t)i >= n) break;
    const vu code = (vu)v_round_to_int(encode(weights[i], g, code_max));
    const int bit = i * bits, word = bit >> 5, shift = bit & 31;
    words[word] |= code << shift;
    if (shift + bits > 32) words[word + 1] |= code >> (32 - shift);
  }
}

AQ_INLINE void encode_batch(const batch *b, grid g, int32_t bits) {
  const aq_quantize_job *job = b->job;
  AQ_FOR_SEGMENTS(b, m, {
    uint32_t words[AQ_SEGMENT / 32 * 8][AQ_W];
    size_t count = 0;
    size_t i = 0;
    for (; i + 32 <= m; i += 32) {
      vu block[8];
      encode_words(b->weights + i, 32, g, bits, block);
      __builtin_memcpy(words[count], block, sizeof(vu) * (size_t)bits);
      count += (size_t)bits;
    }
    if (i < m) {
      vu block[8];
      encode_words(b->weights + i, m - i, g, bits, block);
      const size_t used = ((m - i) * (size_t)bits + 31) / 32;
      __builtin_memcpy(words[count], block, sizeof(vu) * used);
      count += used;
    }
    for (size_t lane = 0; lane < b->lanes; lane++) {
      const size_t bit = (b->col[lane] + begin) * (size_t)bits;
      uint32_t *out = job->packed + b->row[lane] * job->words + bit / 32;
      if (bit % 32 == 0 && (m * (size_t)bits) % 32 == 0) {
        for (size_t j = 0; j < count; j++) out[j] = words[j][lane];
      } else { /* words shared with a neighbour, or the row's last: they were zeroed */
        const size_t shift = bit % 32;
        const size_t last = (shift + m * (size_t)bits - 1) / 32;
        for (size_t j = 0; j < count; j++) {
          out[j] |= words[j][lane] << shift;
          if (shift && j + 1 <= last) out[j + 1] |= words[j][lane] >> (32 - shift);
        }
      }
    }
  })
}

static int32_t quantize_batch(batch *b, const void *context) {
  (void)context;
  const aq_quantize_job *job = b->job;
  if (job->column_weights) {
    vf largest = {0};
    for (int lane = 0; lane < AQ_W; lane++)
      for (size_t i = 0; i < b->n; i++) {
        const float weight = job->column_weights[b->col[lane] + i];
        if (weight > largest[lane]) largest[lane] = weight;
      }
    b->importance_none = largest == (vf){0};
    b->importance_scale = v_select(b->importance_none, v_set(1.0f), largest);
  }
  if (b->n <= AQ_SEGMENT) {
    load_weights(b, 0, b->n);
    if (b->importance) load_importance(b, 0, b->n);
  }
  vf minimum = v_set(__builtin_inff()), maximum = -minimum, sum = {0};
  AQ_FOR_SEGMENTS(b, m, {
    for (size_t i = 0; i < m; i++) {
      const vf w = b->weights[i];
      minimum = v_min(minimum, w);
      maximum = v_max(maximum, w);
      sum += w;
    }
  })
  /* A sum overflows only with weights that no half-precision scale holds: an error either way. */
  const vi bad = (sum - sum) != (vf){0};
  for (int lane = 0; lane < AQ_W; lane++)
    if (bad[lane]) return AQ_E_NONFINITE;
  grid g;
  const int32_t status = round_grids(b, minimum, maximum, &g);
  if (status != AQ_OK) return status;
  if (job->clip) g = clip_search(b, g, minimum, maximum);
  AQ_FOR_BITS(job->bits, bits, encode_batch(b, g, bits))
  const vf stored = AQ_AFFINE(job->zero_point_kind) == 2 ? 0.0f - g.scale * g.zero_point : g.zero_point;
  const vu scale = v_half_bits(g.scale), zero_point = v_half_bits(stored);
  for (size_t lane = 0; lane < b->lanes; lane++) {
    const size_t at = b->row[lane] * job->groups + b->index[lane];
    job->scale[at] = (uint16_t)scale[lane];
    if (job->zero_point) job->zero_point[at] = (uint16_t)zero_point[lane];
  }
  return AQ_OK;
}

/* Pieces [begin, end) of every row, each `width` columns from the one before and `n` wide, AQ_W at a time. */
AQ_INLINE int32_t run_pieces(batch *b, size_t row_begin, size_t row_end, size_t begin, size_t end, size_t width,
                             size_t n, int32_t (*run)(batch *b, const void *context), const void *context) {
  b->n = n;
  b->lanes = 0;
  for (size_t row = row_begin; row < row_end && begin < end; row++) {
    for (size_t index = begin; index < end; index++) {
      b->row[b->lanes] = row;
      b->index[b->lanes] = index;
      b->col[b->lanes] = index * width;
      b->first[b->lanes] = row * b->job->cols + index * width;
      if (++b->lanes < AQ_W && (row + 1 < row_end || index + 1 < end)) continue;
      for (size_t lane = b->lanes; lane < AQ_W; lane++) {
        b->first[lane] = b->first[b->lanes - 1];
        b->col[lane] = b->col[b->lanes - 1];
      }
      const int32_t status = run(b, context);
      if (status != AQ_OK) return status;
      b->lanes = 0;
    }
  }
  return AQ_OK;
}

/* The whole pieces of every row, then the shorter last ones. */
AQ_INLINE int32_t run_rows(batch *b, size_t row_begin, size_t row_end, size_t width,
                           int32_t (*run)(batch *b, const void *context), const void *context) {
  const size_t whole = b->job->cols / width, rest = b->job->cols % width;
  const int32_t status = run_pieces(b, row_begin, row_end, 0, whole, width, width, run, context);
  if (status != AQ_OK || rest == 0) return status;
  return run_pieces(b, row_begin, row_end, whole, whole + 1, width, rest, run, context);
}

static int32_t quantize_rows(const aq_quantize_job *job, size_t row_begin, size_t row_end) {
  vf weights[AQ_SEGMENT], importance[AQ_SEGMENT];
  batch b = {.job = job, .weights = weights, .importance = job->clip && job->column_weights ? importance : 0};
  if (job->cols % job->group_size || (job->group_size * (size_t)job->bits) % 32)
    __builtin_memset(job->packed + row_begin * job->words, 0, (row_end - row_begin) * job->words * 4);
  return run_rows(&b, row_begin, row_end, job->group_size, quantize_batch, 0);
}

const aq_quantize_kernels AQ_NAMED(quantize) = {quantize_rows, dequantize, pack_row, unpack_row,
                                                load,          store,      accumulate};
