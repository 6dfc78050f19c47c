/* two_level/scalar.c: quantizing with two-level scales in plain loops; the oracle for two_level/vector.h and
 * the CUDA kernels. */
#include "symmetric.h"

/* Super scale and sub-codes of one superblock. */
typedef struct {
  aq_super_steps steps;
  float sub_scale[AQ_SUPER_GROUPS], sub_min[AQ_SUPER_GROUPS];
} super_fit;

static void round_super(const float *smallest, const float *largest, size_t groups, float code_max, float sub_max,
                        super_fit *out) {
  float most = 0.0f;
  for (size_t j = 0; j < groups; j++) most = -smallest[j] > most ? -smallest[j] : most;
  out->steps.minimum = aq_round_half_up(most / sub_max);
  most = 0.0f;
  for (size_t j = 0; j < groups; j++) {
    out->sub_min[j] = aq_code_above(-smallest[j], out->steps.minimum, sub_max);
    const float scale = (largest[j] + out->steps.minimum * out->sub_min[j]) / code_max;
    most = scale > most ? scale : most;
  }
  out->steps.scale = aq_round_half_up(most / sub_max);
  for (size_t j = 0; j < groups; j++) {
    const float scale = (largest[j] + out->steps.minimum * out->sub_min[j]) / code_max;
    out->sub_scale[j] = aq_code_above(scale, out->steps.scale, sub_max);
  }
}

/* Sub-codes for given super scales: for each group its nearest sub-scale and that one's neighbours, each
 * with the minimum that suits the group's codes so far. Then super scales for the codes, and again. */
static void search_super(const aq_sub_group *g, const aq_sub_fit *fits, size_t groups, float code_max, float sub_max,
                         super_fit *out) {
  float values[AQ_SUPER_GROUPS], weights[AQ_SUPER_GROUPS], hq[AQ_SUPER_GROUPS];
  super_fit now;
  for (size_t j = 0; j < groups; j++) {
    values[j] = fits[j].scale;
    weights[j] = fits[j].sums.hqq;
    hq[j] = fits[j].sums.hq;
  }
  now.steps.scale = aq_fit_super(values, weights, groups, sub_max);
  for (size_t j = 0; j < groups; j++) {
    now.sub_scale[j] = aq_nearest_code(values[j], now.steps.scale, sub_max);
    values[j] = fits[j].minimum;
    weights[j] = g[j].h;
  }
  now.steps.minimum = aq_fit_super(values, weights, groups, sub_max);

  float best = -__builtin_inff();
  for (int32_t round = 0; round < AQ_TWO_LEVEL_ROUNDS; round++) {
    float sums[AQ_STEP_SUMS] = {0.0f};
    for (size_t j = 0; j < groups; j++) {
      const aq_sub_choice choice = aq_choose_sub_codes(&g[j], now.steps, now.sub_scale[j], &hq[j], code_max, sub_max);
      now.sub_scale[j] = choice.sub_scale;
      now.sub_min[j] = choice.sub_min;
      for (int i = 0; i < AQ_STEP_SUMS; i++) sums[i] += choice.sums[i];
    }
    if (sums[AQ_EXPLAINED] > best) {
      best = sums[AQ_EXPLAINED];
      *out = now;
    }
    if (!aq_refit_steps(sums, &now.steps)) break;
  }
}

static int32_t quantize_super(const aq_two_level_job *job, size_t row, size_t super) {
  const aq_quantize_job *base = &job->base;
  const size_t col = super * AQ_SEGMENT, n = aq_min_size(AQ_SEGMENT, base->cols - col);
  const size_t size = base->group_size, groups = (n - 1) / size + 1;
  const size_t first_group = super * (AQ_SEGMENT / size); /* a row of one superblock may have any size */
  const float code_max = (float)((1 << base->bits) - 1), sub_max = (float)((1 << job->scale_bits) - 1);
  float w[AQ_SEGMENT], u[AQ_SEGMENT], smallest[AQ_SUPER_GROUPS], largest[AQ_SUPER_GROUPS];
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

  super_fit fit = {{0.0f, 0.0f}, {0.0f}, {0.0f}};
  if (!base->clip) {
    round_super(smallest, largest, groups, code_max, sub_max, &fit);
  } else if (squares > 0.0f) {
    aq_sub_group all[AQ_SUPER_GROUPS];
    aq_sub_fit fits[AQ_SUPER_GROUPS];
    for (size_t i = 0; i < n; i++) {
      const float importance = most_important > 0.0f ? u[i] / most_important : 1.0f;
      u[i] = (importance > AQ_LEAST_IMPORTANCE ? importance : AQ_LEAST_IMPORTANCE) *
             __builtin_sqrtf(squares / (float)n + w[i] * w[i]);
    }
    for (size_t j = 0; j < groups; j++) {
      const size_t begin = j * size, count = aq_min_size(n, begin + size) - begin;
      all[j] = (aq_sub_group){w + begin, u + begin, count, smallest[j], 0.0f, 0.0f};
      for (size_t i = begin; i < begin + count; i++) {
        all[j].h += u[i];
        all[j].ht += u[i] * (w[i] - smallest[j]);
      }
      fits[j] = (aq_sub_fit){0.0f, -smallest[j], {0.0f, 0.0f, 0.0f}};
      if (largest[j] > smallest[j]) aq_search_sub_group(&all[j], largest[j] - smallest[j], code_max, &fits[j]);
    }
    search_super(all, fits, groups, code_max, sub_max, &fit);
  }

  uint8_t codes[AQ_SEGMENT];
  for (size_t j = 0; j < groups; j++) {
    const float scale = fit.steps.scale * fit.sub_scale[j], minimum = fit.steps.minimum * fit.sub_min[j];
    for (size_t i = j * size; i < aq_min_size(n, (j + 1) * size); i++)
      codes[i] = (uint8_t)(scale > 0.0f ? aq_clamped_code((w[i] + minimum) / scale, code_max) : 0.0f);
    aq_set_sub_code(job->sub_scale + row * job->sub_bytes, first_group + j, job->scale_bits,
                    (uint32_t)fit.sub_scale[j]);
    aq_set_sub_code(job->sub_min + row * job->sub_bytes, first_group + j, job->scale_bits, (uint32_t)fit.sub_min[j]);
  }
  job->super_scale[row * job->supers + super] = aq_half_from_float(fit.steps.scale * sign);
  job->super_min[row * job->supers + super] = aq_half_from_float(fit.steps.minimum * sign);
  return aq_quantize_scalar.pack_row(codes, n, base->bits,
                                    base->packed + row * base->words + col / 32 * (size_t)base->bits);
}

int32_t aq_two_level_scalar(const aq_two_level_job *job, size_t row_begin, size_t row_end) {
  if (job->symmetric) return symmetric_rows(job->symmetric, row_begin, row_end);
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
