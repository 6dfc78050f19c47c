/* two_level/scalar.c: quantizing with two-level scales in plain loops; the oracle for two_level/vector.h. */
#include "kernels.h"

static float clamp_code(float position, float code_max) {
  position = position > 0.0f ? position : 0.0f;
  position = position < code_max ? position : code_max;
  return aq_round_even(position);
}

/* Nearest code of `value` in steps of `step`; 0 where there is no step. */
static float code_of(float value, float step, float code_max) {
  return step > 0.0f ? clamp_code(value / step, code_max) : 0.0f;
}

/* The smallest code whose multiple of `step` is not below `value`. */
static float code_above(float value, float step, float code_max) {
  if (!(step > 0.0f)) return 0.0f;
  float code = aq_round_even(value / step);
  if (code * step < value) code += 1.0f;
  return code < code_max ? code : code_max;
}

/* A group, its columns less its minimum: t = w - minimum. */
typedef struct {
  const float *t, *u; /* u: importance of each column */
  size_t n;
  float minimum; /* at most 0 */
  float h, ht;   /* sum u, sum u t */
} group;

typedef struct {
  float hq, hqq, htq;
} code_sums;

static code_sums sums_of(const group *g, float inverse, float offset, float code_max) {
  code_sums s = {0.0f, 0.0f, 0.0f};
  for (size_t i = 0; i < g->n; i++) {
    const float q = clamp_code(g->t[i] * inverse + offset, code_max);
    const float hq = g->u[i] * q;
    s.hq += hq;
    s.hqq += hq * q;
    s.htq += hq * g->t[i];
  }
  return s;
}

/* How much of sum u t^2 the grid t = scale q + offset explains. */
static float explained(const group *g, const code_sums *s, float scale, float offset) {
  return 2.0f * (scale * s->htq + offset * g->ht) -
         (scale * (scale * s->hqq + 2.0f * (offset * s->hq)) + offset * (offset * g->h));
}

/* Least squares of scale and offset for these codes, with minimum + offset <= 0. 0 if there is no
 * solution. */
static int solve(const group *g, const code_sums *s, float *scale, float *offset) {
  const float determinant = g->h * s->hqq - s->hq * s->hq;
  *scale = (g->h * s->htq - g->ht * s->hq) / determinant;
  *offset = (g->ht - *scale * s->hq) / g->h;
  if (g->minimum + *offset > 0.0f) {
    *offset = -g->minimum;
    *scale = (s->htq + g->minimum * s->hq) / s->hqq;
  }
  return determinant > 0.0f && *scale > 0.0f;
}

typedef struct {
  float scale, minimum; /* real: w = scale q - minimum */
  code_sums sums;
} group_fit;

static void search_group(const group *g, float range, float code_max, group_fit *fit) {
  float best = -1.0f, best_offset = 0.0f;
  for (int32_t step = 0; step < AQ_TWO_LEVEL_STEPS + AQ_TWO_LEVEL_REFITS; step++) {
    float inverse, offset, scale, shift;
    if (step < AQ_TWO_LEVEL_STEPS) {
      aq_two_level_step(step, code_max, &scale, &shift);
      inverse = scale / range;
      offset = g->minimum * shift * inverse;
    } else {
      if (!(fit->scale > 0.0f)) break;
      inverse = 1.0f / fit->scale;
      offset = -best_offset * inverse;
    }
    const code_sums s = sums_of(g, inverse, offset, code_max);
    if (!solve(g, &s, &scale, &shift)) continue;
    const float value = explained(g, &s, scale, shift);
    if (value > best) {
      best = value;
      best_offset = shift;
      fit->scale = scale;
      fit->minimum = -(g->minimum + shift);
      fit->sums = s;
    }
  }
}

float aq_fit_super(const float *values, const float *weights, size_t n, float code_max) {
  float largest = 0.0f, best = -1.0f, super = 0.0f;
  for (size_t i = 0; i < n; i++) largest = values[i] > largest ? values[i] : largest;
  for (int32_t k = -AQ_SUPER_STEPS; k <= AQ_SUPER_STEPS; k++) {
    const float inverse = (code_max + 0.25f * (float)k) / largest;
    float hcv = 0.0f, hcc = 0.0f;
    for (size_t i = 0; i < n; i++) {
      const float code = clamp_code(values[i] * inverse, code_max);
      const float hc = weights[i] * code;
      hcv += hc * values[i];
      hcc += hc * code;
    }
    const float scale = hcv / hcc, value = hcv * scale;
    if (value > best) {
      best = value;
      super = scale;
    }
  }
  if (!(largest > 0.0f)) return 0.0f;
  super = super < AQ_HALF_MAX ? super : AQ_HALF_MAX;
  super = aq_round_half(super);
  return super > AQ_HALF_MIN ? super : AQ_HALF_MIN;
}

/* Super scale and sub-codes of one superblock. */
typedef struct {
  float scale, minimum;
  float sub_scale[AQ_SUPER_GROUPS], sub_min[AQ_SUPER_GROUPS];
} super_fit;

static void round_super(const float *smallest, const float *largest, size_t groups, float code_max, float sub_max,
                        super_fit *out) {
  float most = 0.0f;
  for (size_t j = 0; j < groups; j++) most = -smallest[j] > most ? -smallest[j] : most;
  out->minimum = aq_round_half_up(most / sub_max);
  most = 0.0f;
  for (size_t j = 0; j < groups; j++) {
    out->sub_min[j] = code_above(-smallest[j], out->minimum, sub_max);
    const float scale = (largest[j] + out->minimum * out->sub_min[j]) / code_max;
    most = scale > most ? scale : most;
  }
  out->scale = aq_round_half_up(most / sub_max);
  for (size_t j = 0; j < groups; j++)
    out->sub_scale[j] = code_above((largest[j] + out->minimum * out->sub_min[j]) / code_max, out->scale, sub_max);
}

/* Sub-codes for given super scales: for each group its nearest sub-scale and that one's neighbours, each with
 * the minimum that suits the group's codes so far. Then super scales for the codes, and again. */
static void search_super(const group *g, const group_fit *fits, size_t groups, float code_max, float sub_max,
                         super_fit *out) {
  float values[AQ_SUPER_GROUPS], weights[AQ_SUPER_GROUPS], hq[AQ_SUPER_GROUPS];
  super_fit now;
  for (size_t j = 0; j < groups; j++) {
    values[j] = fits[j].scale;
    weights[j] = fits[j].sums.hqq;
    hq[j] = fits[j].sums.hq;
  }
  now.scale = aq_fit_super(values, weights, groups, sub_max);
  for (size_t j = 0; j < groups; j++) {
    now.sub_scale[j] = code_of(values[j], now.scale, sub_max);
    values[j] = fits[j].minimum;
    weights[j] = g[j].h;
  }
  now.minimum = aq_fit_super(values, weights, groups, sub_max);

  float best = -__builtin_inff();
  for (int32_t round = 0; round < AQ_TWO_LEVEL_ROUNDS; round++) {
    float total = 0.0f, ss = 0.0f, sm = 0.0f, mm = 0.0f, sx = 0.0f, mx = 0.0f;
    for (size_t j = 0; j < groups; j++) {
      const float middle = now.sub_scale[j];
      float group_best = -__builtin_inff();
      now.sub_min[j] = 0.0f;
      code_sums chosen = {0.0f, 0.0f, 0.0f};
      for (int32_t k = -1; k <= 1; k++) {
        float code = middle + (float)k;
        code = code > 0.0f ? code : 0.0f;
        code = code < sub_max ? code : sub_max;
        const float scale = now.scale * code;
        const float wanted = (scale * hq[j] - g[j].ht) / g[j].h - g[j].minimum;
        const float sub_min = code_of(wanted, now.minimum, sub_max);
        const float offset = now.minimum * sub_min + g[j].minimum;
        const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        const code_sums s = sums_of(&g[j], inverse, offset * inverse, code_max);
        const float value = explained(&g[j], &s, scale, -offset);
        if (value > group_best) {
          group_best = value;
          now.sub_scale[j] = code;
          now.sub_min[j] = sub_min;
          chosen = s;
        }
      }
      const float a = now.sub_scale[j], b = now.sub_min[j];
      hq[j] = chosen.hq;
      total += group_best;
      ss += a * (a * chosen.hqq);
      sm += a * (b * chosen.hq);
      mm += b * (b * g[j].h);
      sx += a * (chosen.htq + g[j].minimum * chosen.hq);
      mx += b * (g[j].ht + g[j].minimum * g[j].h);
    }
    if (total > best) {
      best = total;
      *out = now;
    }
    const float determinant = ss * mm - sm * sm;
    float scale = (mm * sx - sm * mx) / determinant, minimum = (sm * sx - ss * mx) / determinant;
    if (!(determinant > 0.0f)) {
      scale = sx / ss;
      minimum = now.minimum;
    }
    scale = aq_round_half(scale);
    minimum = aq_round_half(minimum);
    if (!(scale > 0.0f && scale <= AQ_HALF_MAX && minimum >= 0.0f && minimum <= AQ_HALF_MAX)) break;
    now.scale = scale;
    now.minimum = minimum;
  }
}

static int32_t quantize_super(const aq_two_level_job *job, size_t row, size_t super) {
  const aq_quantize_job *base = &job->base;
  const size_t col = super * AQ_SEGMENT, n = aq_min_size(AQ_SEGMENT, base->cols - col);
  const size_t size = base->group_size, groups = (n - 1) / size + 1;
  const size_t first_group = super * (AQ_SEGMENT / size); /* a row of one superblock may have any size */
  const float code_max = (float)((1 << base->bits) - 1), sub_max = (float)((1 << job->scale_bits) - 1);
  float w[AQ_SEGMENT], t[AQ_SEGMENT], u[AQ_SEGMENT], smallest[AQ_SUPER_GROUPS], largest[AQ_SUPER_GROUPS];
  aq_quantize_scalar.load(base->weights, base->dtype, row * base->cols + col, n, w);

  float squares = 0.0f, most_important = 0.0f, away = 0.0f;
  const float limit = AQ_HALF_MAX * sub_max;
  for (size_t j = 0; j < groups; j++) {
    smallest[j] = largest[j] = w[j * size];
    for (size_t i = j * size; i < aq_min_size(n, (j + 1) * size); i++) {
      if (!(w[i] - w[i] == 0.0f)) return AQ_E_NONFINITE;
      if (w[i] < smallest[j]) smallest[j] = w[i];
      if (w[i] > largest[j]) largest[j] = w[i];
    }
    if (largest[j] > limit || -smallest[j] > limit) return AQ_E_RANGE;
    if (smallest[j] > largest[j] - smallest[j]) away += 1.0f;
    if (-largest[j] > largest[j] - smallest[j]) away -= 1.0f;
  }
  const float sign = away > 0.0f ? -1.0f : 1.0f;
  for (size_t j = 0; j < groups; j++) {
    const float a = smallest[j] * sign, b = largest[j] * sign;
    smallest[j] = b < a ? b : a;
    if (!(smallest[j] < 0.0f)) smallest[j] = 0.0f;
    largest[j] = a < b ? b : a;
  }
  for (size_t i = 0; i < n; i++) {
    w[i] *= sign;
    squares += w[i] * w[i];
    u[i] = base->column_weights ? base->column_weights[col + i] : 1.0f;
    if (u[i] > most_important) most_important = u[i];
  }

  super_fit fit = {0.0f, 0.0f, {0.0f}, {0.0f}};
  if (!base->clip) {
    round_super(smallest, largest, groups, code_max, sub_max, &fit);
  } else if (squares > 0.0f) {
    group all[AQ_SUPER_GROUPS];
    group_fit fits[AQ_SUPER_GROUPS];
    for (size_t i = 0; i < n; i++) {
      const float importance = most_important > 0.0f ? u[i] / most_important : 1.0f;
      u[i] = (importance > AQ_LEAST_IMPORTANCE ? importance : AQ_LEAST_IMPORTANCE) *
             __builtin_sqrtf(squares / (float)n + w[i] * w[i]);
    }
    for (size_t j = 0; j < groups; j++) {
      const size_t begin = j * size, count = aq_min_size(n, begin + size) - begin;
      all[j] = (group){t + begin, u + begin, count, smallest[j], 0.0f, 0.0f};
      for (size_t i = begin; i < begin + count; i++) {
        t[i] = w[i] - smallest[j];
        all[j].h += u[i];
        all[j].ht += u[i] * t[i];
      }
      fits[j] = (group_fit){0.0f, -smallest[j], {0.0f, 0.0f, 0.0f}};
      if (largest[j] > smallest[j]) search_group(&all[j], largest[j] - smallest[j], code_max, &fits[j]);
    }
    search_super(all, fits, groups, code_max, sub_max, &fit);
  }

  uint8_t codes[AQ_SEGMENT];
  for (size_t j = 0; j < groups; j++) {
    const float scale = fit.scale * fit.sub_scale[j], minimum = fit.minimum * fit.sub_min[j];
    for (size_t i = j * size; i < aq_min_size(n, (j + 1) * size); i++)
      codes[i] = (uint8_t)(scale > 0.0f ? clamp_code((w[i] + minimum) / scale, code_max) : 0.0f);
    aq_set_sub_code(job->sub_scale + row * job->sub_bytes, first_group + j, job->scale_bits,
                    (uint32_t)fit.sub_scale[j]);
    aq_set_sub_code(job->sub_min + row * job->sub_bytes, first_group + j, job->scale_bits, (uint32_t)fit.sub_min[j]);
  }
  job->super_scale[row * job->supers + super] = aq_half_from_float(fit.scale * sign);
  job->super_min[row * job->supers + super] = aq_half_from_float(fit.minimum * sign);
  return aq_quantize_scalar.pack_row(codes, n, base->bits,
                                    base->packed + row * base->words + col / 32 * (size_t)base->bits);
}

int32_t aq_two_level_scalar(const aq_two_level_job *job, size_t row_begin, size_t row_end) {
  for (size_t row = row_begin; row < row_end; row++) {
    for (size_t i = 0; i < job->sub_bytes; i++)
      job->sub_scale[row * job->sub_bytes + i] = job->sub_min[row * job->sub_bytes + i] = 0;
    for (size_t super = 0; super < job->supers; super++) {
      const int32_t status = quantize_super(job, row, super);
      if (status != AQ_OK) return status;
    }
  }
  return AQ_OK;
}
