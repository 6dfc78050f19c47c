/* two_level/vector.h: quantizing with two-level scales over vectors of AQ_W floats, included once by each
 * unit of isa/ behind quantize/vector.h. One superblock in each lane, a tile of AQ_SEGMENT columns; every
 * operation is that of two_level/scalar.c, in its order. */
#include "symmetric.h"

typedef struct {
  vf t[AQ_SEGMENT / 2]; /* of the group being searched: at most 128 columns */
  vf weights[AQ_SEGMENT], importance[AQ_SEGMENT];
} super_tile;

typedef struct {
  vf hq, hqq, htq;
} code_sums;

/* One group in each lane, its columns less their minimum: t = w - minimum. */
typedef struct {
  const vf *w, *u;
  size_t n;
  vf minimum, h, ht;
} super_group;

typedef struct {
  vf scale, minimum;
  vf sub_scale[AQ_SUPER_GROUPS], sub_min[AQ_SUPER_GROUPS];
} super_fit;

AQ_INLINE vf clamp_code(vf position, vf code_max) { return v_round(v_min(code_max, v_max((vf){0}, position))); }

AQ_INLINE vf code_of(vf value, vf step, vf code_max) {
  return v_select(step > (vf){0}, clamp_code(value / step, code_max), (vf){0});
}

AQ_INLINE vf code_above(vf value, vf step, vf code_max) {
  vf code = v_round(value / step);
  code = v_select(code * step < value, code + 1.0f, code);
  return v_select(step > (vf){0}, v_select(code < code_max, code, code_max), (vf){0});
}

/* Sums for `count` pairs of inverse and offset at once. */
AQ_INLINE void sums_of(const vf *t, const vf *u, size_t n, const int count, const vf *inverse, const vf *offset,
                       vf code_max, code_sums *out) {
  vf hq[4], hqq[4], htq[4];
  for (int k = 0; k < count; k++) hq[k] = hqq[k] = htq[k] = (vf){0};
  for (size_t i = 0; i < n; i++) {
    const vf ti = t[i], ui = u[i];
#pragma GCC unroll 4
    for (int k = 0; k < count; k++) {
      const vf q = clamp_code(ti * inverse[k] + offset[k], code_max);
      const vf weighted = ui * q;
      hq[k] += weighted;
      hqq[k] += weighted * q;
      htq[k] += weighted * ti;
    }
  }
  for (int k = 0; k < count; k++) out[k] = (code_sums){hq[k], hqq[k], htq[k]};
}

AQ_INLINE vf super_explained(const super_group *g, const code_sums *s, vf scale, vf offset) {
  return 2.0f * (scale * s->htq + offset * g->ht) -
         (scale * (scale * s->hqq + 2.0f * (offset * s->hq)) + offset * (offset * g->h));
}

AQ_INLINE vi super_solve(const super_group *g, const code_sums *s, vf *scale, vf *offset) {
  const vf determinant = g->h * s->hqq - s->hq * s->hq;
  const vf free_scale = (g->h * s->htq - g->ht * s->hq) / determinant;
  const vf free_offset = (g->ht - free_scale * s->hq) / g->h;
  const vi above = g->minimum + free_offset > (vf){0};
  *scale = v_select(above, (s->htq + g->minimum * s->hq) / s->hqq, free_scale);
  *offset = v_select(above, -g->minimum, free_offset);
  return (determinant > (vf){0}) & (*scale > (vf){0});
}

typedef struct {
  vf scale, minimum, offset, best, hq, hqq;
} group_search;

AQ_INLINE void consider(const super_group *g, const code_sums *s, vi alive, group_search *found) {
  vf scale, offset;
  const vi solved = super_solve(g, s, &scale, &offset);
  const vf value = super_explained(g, s, scale, offset);
  const vi better = alive & solved & (value > found->best);
  found->best = v_select(better, value, found->best);
  found->offset = v_select(better, offset, found->offset);
  found->scale = v_select(better, scale, found->scale);
  found->minimum = v_select(better, -(g->minimum + offset), found->minimum);
  found->hq = v_select(better, s->hq, found->hq);
  found->hqq = v_select(better, s->hqq, found->hqq);
}

AQ_INLINE group_search search_group(const super_group *g, const vf *t, vf range, vf code_max, float code_max_one) {
  enum { K = AQ_CLIP_UNROLL };
  group_search found = {(vf){0}, -g->minimum, (vf){0}, v_set(-1.0f), (vf){0}, (vf){0}};
  const vi alive = range > (vf){0};
  for (int32_t step = 0; step < AQ_TWO_LEVEL_STEPS; step += K) {
    vf inverse[K], offset[K];
    code_sums s[K];
    for (int k = 0; k < K; k++) {
      float factor, shift;
      aq_two_level_step(step + k, code_max_one, &factor, &shift);
      inverse[k] = factor / range;
      offset[k] = g->minimum * shift * inverse[k];
    }
    sums_of(t, g->u, g->n, K, inverse, offset, code_max, s);
    for (int k = 0; k < K; k++) consider(g, &s[k], alive, &found);
  }
  for (int32_t round = 0; round < AQ_TWO_LEVEL_REFITS; round++) {
    const vf inverse = 1.0f / found.scale, offset = -found.offset * inverse;
    code_sums s;
    sums_of(t, g->u, g->n, 1, &inverse, &offset, code_max, &s);
    consider(g, &s, alive & (found.scale > (vf){0}), &found);
  }
  return found;
}

AQ_INLINE vf fit_super(const vf *values, const vf *weights, size_t n, vf code_max) {
  vf largest = {0}, best = v_set(-1.0f), super = {0};
  for (size_t i = 0; i < n; i++) largest = v_max(largest, values[i]);
  for (int32_t k = -AQ_SUPER_STEPS; k <= AQ_SUPER_STEPS; k++) {
    const vf inverse = (code_max + 0.25f * (float)k) / largest;
    vf hcv = {0}, hcc = {0};
    for (size_t i = 0; i < n; i++) {
      const vf code = clamp_code(values[i] * inverse, code_max);
      const vf hc = weights[i] * code;
      hcv += hc * values[i];
      hcc += hc * code;
    }
    const vf scale = hcv / hcc, value = hcv * scale;
    const vi better = value > best;
    best = v_select(better, value, best);
    super = v_select(better, scale, super);
  }
  super = v_round_half(v_select(super < v_set(AQ_HALF_MAX), super, v_set(AQ_HALF_MAX)));
  super = v_select(super > v_set(AQ_HALF_MIN), super, v_set(AQ_HALF_MIN));
  return v_select(largest > (vf){0}, super, (vf){0});
}

static void round_super(const vf *smallest, const vf *largest, size_t groups, vf code_max, vf sub_max, super_fit *out) {
  vf most = {0};
  for (size_t j = 0; j < groups; j++) most = v_max(most, -smallest[j]);
  out->minimum = round_half_up(most / sub_max);
  most = (vf){0};
  for (size_t j = 0; j < groups; j++) {
    out->sub_min[j] = code_above(-smallest[j], out->minimum, sub_max);
    most = v_max(most, (largest[j] + out->minimum * out->sub_min[j]) / code_max);
  }
  out->scale = round_half_up(most / sub_max);
  for (size_t j = 0; j < groups; j++)
    out->sub_scale[j] = code_above((largest[j] + out->minimum * out->sub_min[j]) / code_max, out->scale, sub_max);
}

/* `t`: room for a group's columns less their minimum. */
static void search_super(const super_group *g, const vf *scales, const vf *minima, const vf *first_hq,
                         const vf *first_hqq, size_t groups, vf code_max, vf sub_max, vf *t, super_fit *out) {
  vf weights[AQ_SUPER_GROUPS], hq[AQ_SUPER_GROUPS];
  super_fit now;
  out->scale = out->minimum = (vf){0};
  for (size_t j = 0; j < groups; j++) {
    out->sub_scale[j] = out->sub_min[j] = (vf){0};
    hq[j] = first_hq[j];
    weights[j] = g[j].h;
  }
  now.scale = fit_super(scales, first_hqq, groups, sub_max);
  now.minimum = fit_super(minima, weights, groups, sub_max);
  for (size_t j = 0; j < groups; j++) now.sub_scale[j] = code_of(scales[j], now.scale, sub_max);

  vf best = v_set(-__builtin_inff());
  vi alive = best < (vf){0};
  for (int32_t round = 0; round < AQ_TWO_LEVEL_ROUNDS; round++) {
    vf total = {0}, ss = {0}, sm = {0}, mm = {0}, sx = {0}, mx = {0};
    for (size_t j = 0; j < groups; j++) {
      vf group_best = v_set(-__builtin_inff()), hqq = {0}, htq = {0}, chosen_hq = {0}, chosen_min = {0};
      const vf middle = now.sub_scale[j];
      vf code[3], sub_min[3], scale[3], offset[3], inverse[3], position[3];
      code_sums s[3];
      for (int k = 0; k < 3; k++) {
        const vf near = middle + (float)(k - 1), lowest = v_select(near > (vf){0}, near, (vf){0});
        code[k] = v_select(lowest < sub_max, lowest, sub_max);
        scale[k] = now.scale * code[k];
        const vf wanted = (scale[k] * hq[j] - g[j].ht) / g[j].h - g[j].minimum;
        sub_min[k] = code_of(wanted, now.minimum, sub_max);
        offset[k] = now.minimum * sub_min[k] + g[j].minimum;
        inverse[k] = v_select(scale[k] > (vf){0}, 1.0f / scale[k], (vf){0});
        position[k] = offset[k] * inverse[k];
      }
      for (size_t i = 0; i < g[j].n; i++) t[i] = g[j].w[i] - g[j].minimum;
      sums_of(t, g[j].u, g[j].n, 3, inverse, position, code_max, s);
      for (int k = 0; k < 3; k++) {
        const vf value = super_explained(&g[j], &s[k], scale[k], -offset[k]);
        const vi better = value > group_best;
        group_best = v_select(better, value, group_best);
        now.sub_scale[j] = v_select(better, code[k], now.sub_scale[j]);
        chosen_min = v_select(better, sub_min[k], chosen_min);
        chosen_hq = v_select(better, s[k].hq, chosen_hq);
        hqq = v_select(better, s[k].hqq, hqq);
        htq = v_select(better, s[k].htq, htq);
      }
      now.sub_min[j] = chosen_min;
      hq[j] = chosen_hq;
      const vf a = now.sub_scale[j], b = now.sub_min[j];
      total += group_best;
      ss += a * (a * hqq);
      sm += a * (b * hq[j]);
      mm += b * (b * g[j].h);
      sx += a * (htq + g[j].minimum * hq[j]);
      mx += b * (g[j].ht + g[j].minimum * g[j].h);
    }
    const vi better = alive & (total > best);
    best = v_select(better, total, best);
    out->scale = v_select(better, now.scale, out->scale);
    out->minimum = v_select(better, now.minimum, out->minimum);
    for (size_t j = 0; j < groups; j++) {
      out->sub_scale[j] = v_select(better, now.sub_scale[j], out->sub_scale[j]);
      out->sub_min[j] = v_select(better, now.sub_min[j], out->sub_min[j]);
    }
    const vf determinant = ss * mm - sm * sm;
    const vi joint = determinant > (vf){0};
    const vf scale = v_round_half(v_select(joint, (mm * sx - sm * mx) / determinant, sx / ss));
    const vf minimum = v_round_half(v_select(joint, (sm * sx - ss * mx) / determinant, now.minimum));
    alive &= (scale > (vf){0}) & (scale <= v_set(AQ_HALF_MAX)) & (minimum >= (vf){0}) & (minimum <= v_set(AQ_HALF_MAX));
    now.scale = v_select(alive, scale, now.scale);
    now.minimum = v_select(alive, minimum, now.minimum);
  }
}

/* Codes of every column into the rows' words. */
AQ_INLINE void encode_super(const aq_two_level_job *job, const batch *b, const vf *weights, const super_fit *fit,
                            int32_t bits) {
  const aq_quantize_job *base = &job->base;
  const vf code_max = v_set((float)((1 << bits) - 1));
  for (size_t begin = 0; begin < b->n; begin += 32) {
    const size_t m = aq_min_size(32, b->n - begin), used = (m * (size_t)bits + 31) / 32;
    uint32_t words[8][AQ_W];
    vu block[8];
    for (int j = 0; j < bits; j++) block[j] = (vu){0};
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const size_t at = begin + 16 * (size_t)half;
      if (at >= b->n) break;
      const size_t group = at / base->group_size;
      const vf scale = fit->scale * fit->sub_scale[group], minimum = fit->minimum * fit->sub_min[group];
      const vi positive = scale > (vf){0};
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        if (at + (size_t)i >= b->n) break;
        const vf position = v_select(positive, (weights[at + (size_t)i] + minimum) / scale, (vf){0});
        const vu code = (vu)v_round_to_int(v_min(code_max, v_max((vf){0}, position)));
        const int bit = (16 * half + i) * bits, word = bit >> 5, shift = bit & 31;
        block[word] |= code << shift;
        if (shift + bits > 32) block[word + 1] |= code >> (32 - shift);
      }
    }
    __builtin_memcpy(words, block, sizeof(vu) * (size_t)bits);
    for (size_t lane = 0; lane < b->lanes; lane++) {
      uint32_t *out = base->packed + b->row[lane] * base->words + (b->col[lane] + begin) / 32 * (size_t)bits;
      for (size_t j = 0; j < used; j++) out[j] = words[j][lane];
    }
  }
}

typedef struct {
  const aq_two_level_job *job;
  super_tile *tile;
} super_context;

/* Ranges of the groups of one superblock in each lane; its sign, which the weights take on so that most lie
 * above. */
typedef struct {
  vf smallest[AQ_SUPER_GROUPS], largest[AQ_SUPER_GROUPS], sign, squares;
} super_ranges;

static int32_t find_ranges(const batch *b, size_t size, vf limit, vf *w, super_ranges *r) {
  const size_t n = b->n, groups = (n - 1) / size + 1;
  vf sum = {0}, away = {0};
  vi beyond = (vi){0};
  for (size_t j = 0; j < groups; j++) {
    vf least = w[j * size], most = least;
    for (size_t i = j * size; i < aq_min_size(n, (j + 1) * size); i++) {
      least = v_min(least, w[i]);
      most = v_max(most, w[i]);
      sum += w[i] - w[i];
    }
    const vf range = most - least;
    beyond |= (most > limit) | (-least > limit);
    away += v_select(least > range, v_set(1.0f), (vf){0}) - v_select(-most > range, v_set(1.0f), (vf){0});
    r->smallest[j] = least;
    r->largest[j] = most;
  }
  const vi bad = sum != (vf){0};
  for (int lane = 0; lane < AQ_W; lane++)
    if (bad[lane]) return AQ_E_NONFINITE;
  for (int lane = 0; lane < AQ_W; lane++)
    if (beyond[lane]) return AQ_E_RANGE;
  r->sign = v_select(away > (vf){0}, v_set(-1.0f), v_set(1.0f));
  for (size_t j = 0; j < groups; j++) {
    const vf a = r->smallest[j] * r->sign, c = r->largest[j] * r->sign;
    r->smallest[j] = v_min((vf){0}, v_min(a, c));
    r->largest[j] = v_max(a, c);
  }
  r->squares = (vf){0};
  for (size_t i = 0; i < n; i++) {
    w[i] *= r->sign;
    r->squares += w[i] * w[i];
  }
  return AQ_OK;
}

/* Column weights times sqrt(mean of the squares + w^2). */
static void find_importance(const batch *b, const vf *w, vf mean, vf *u) {
  const size_t n = b->n;
  if (!b->job->column_weights) {
    for (size_t i = 0; i < n; i++) u[i] = v_sqrt(mean + w[i] * w[i]);
    return;
  }
  vf most_important = {0};
  load_tile(b->job->column_weights, AQ_F32, b->col, n, u);
  for (size_t i = 0; i < n; i++) most_important = v_max(most_important, u[i]);
  const vi some = most_important > (vf){0};
  for (size_t i = 0; i < n; i++) {
    const vf importance = v_select(some, u[i] / most_important, v_set(1.0f));
    u[i] = v_max(v_set(AQ_LEAST_IMPORTANCE), importance) * v_sqrt(mean + w[i] * w[i]);
  }
}

static void search_supers(const batch *b, super_tile *tile, const super_ranges *r, vf code_max, vf sub_max,
                          super_fit *fit) {
  const size_t n = b->n, size = b->job->group_size, groups = (n - 1) / size + 1;
  const vf *w = tile->weights, *u = tile->importance;
  super_group all[AQ_SUPER_GROUPS];
  vf scales[AQ_SUPER_GROUPS], minima[AQ_SUPER_GROUPS], hq[AQ_SUPER_GROUPS], hqq[AQ_SUPER_GROUPS];
  find_importance(b, w, r->squares / (float)n, tile->importance);
  for (size_t j = 0; j < groups; j++) {
    const size_t begin = j * size, count = aq_min_size(n, begin + size) - begin;
    vf h = {0}, ht = {0};
    for (size_t i = 0; i < count; i++) {
      tile->t[i] = w[begin + i] - r->smallest[j];
      h += u[begin + i];
      ht += u[begin + i] * tile->t[i];
    }
    all[j] = (super_group){w + begin, u + begin, count, r->smallest[j], h, ht};
    const group_search found =
        search_group(&all[j], tile->t, r->largest[j] - r->smallest[j], code_max, code_max[0]);
    scales[j] = found.scale;
    minima[j] = found.minimum;
    hq[j] = found.hq;
    hqq[j] = found.hqq;
  }
  search_super(all, scales, minima, hq, hqq, groups, code_max, sub_max, tile->t, fit);
  const vi some = r->squares > (vf){0};
  fit->scale = v_select(some, fit->scale, (vf){0});
  fit->minimum = v_select(some, fit->minimum, (vf){0});
  for (size_t j = 0; j < groups; j++) {
    fit->sub_scale[j] = v_select(some, fit->sub_scale[j], (vf){0});
    fit->sub_min[j] = v_select(some, fit->sub_min[j], (vf){0});
  }
}

static int32_t quantize_supers(batch *b, const void *context) {
  const super_context *c = context;
  const aq_two_level_job *job = c->job;
  const aq_quantize_job *base = &job->base;
  const size_t size = base->group_size, groups = (b->n - 1) / size + 1;
  const vf code_max = v_set((float)((1 << base->bits) - 1)), sub_max = v_set((float)((1 << job->scale_bits) - 1));
  super_ranges ranges;
  super_fit fit;
  load_weights(b, 0, b->n);
  const int32_t status = find_ranges(b, size, AQ_HALF_MAX * sub_max, b->weights, &ranges);
  if (status != AQ_OK) return status;
  if (base->clip)
    search_supers(b, c->tile, &ranges, code_max, sub_max, &fit);
  else
    round_super(ranges.smallest, ranges.largest, groups, code_max, sub_max, &fit);
  AQ_FOR_BITS(base->bits, bits, encode_super(job, b, b->weights, &fit, bits))
  const vu scale = v_half_bits(fit.scale * ranges.sign), minimum = v_half_bits(fit.minimum * ranges.sign);
  for (size_t lane = 0; lane < b->lanes; lane++) {
    const size_t super = b->index[lane], first_group = b->col[lane] / size;
    uint8_t *sub_scale = job->sub_scale + b->row[lane] * job->sub_bytes;
    uint8_t *sub_min = job->sub_min + b->row[lane] * job->sub_bytes;
    for (size_t j = 0; j < groups; j++) {
      aq_set_sub_code(sub_scale, first_group + j, job->scale_bits, (uint32_t)fit.sub_scale[j][lane]);
      aq_set_sub_code(sub_min, first_group + j, job->scale_bits, (uint32_t)fit.sub_min[j][lane]);
    }
    job->super_scale[b->row[lane] * job->supers + super] = (uint16_t)scale[lane];
    job->super_min[b->row[lane] * job->supers + super] = (uint16_t)minimum[lane];
  }
  return AQ_OK;
}

int32_t AQ_NAMED(two_level)(const aq_two_level_job *job, size_t row_begin, size_t row_end) {
  if (job->symmetric) return symmetric_rows(job->symmetric, row_begin, row_end);
  super_tile tile;
  batch b = {.job = &job->base, .weights = tile.weights};
  const super_context context = {job, &tile};
  const size_t bytes = (row_end - row_begin) * job->sub_bytes;
  __builtin_memset(job->sub_scale + row_begin * job->sub_bytes, 0, bytes);
  __builtin_memset(job->sub_min + row_begin * job->sub_bytes, 0, bytes);
  return run_rows(&b, row_begin, row_end, AQ_SEGMENT, quantize_supers, &context);
}
