/* forward/images.c: the functions of arrowquant.h that take images apart into patches and put them together
 * again, and the embedding of timesteps. They move numbers, or are small: one version serves every
 * instruction set. */
#include "../threads.h"
#include "elementary.h"

typedef struct {
  const float *in;
  float *out;
  size_t channels, patch, down, across; /* patches of one image */
  int unpatch;
} patches_context;

/* A unit is a row of patches. */
static int32_t run_patches(const void *context, size_t begin, size_t end) {
  const patches_context *c = context;
  const size_t patch = c->patch, channels = c->channels, size = channels * patch * patch, width = c->across * patch;
  for (size_t unit = begin; unit < end; unit++) {
    const size_t image = unit / c->down * channels * c->down * patch * width, y = unit % c->down * patch;
    for (size_t i = 0; i < c->across * size; i++) {
      const size_t x = i / size, at = i % size;
      const size_t channel = c->unpatch ? at % channels : at / (patch * patch);
      const size_t p = c->unpatch ? at / (channels * patch) : at / patch % patch;
      const size_t q = c->unpatch ? at / channels % patch : at % patch;
      const size_t pixel = image + (channel * c->down * patch + y + p) * width + x * patch + q;
      const size_t token = unit * c->across * size + i;
      if (c->unpatch)
        c->out[pixel] = c->in[token];
      else
        c->out[token] = c->in[pixel];
    }
  }
  return AQ_OK;
}

static int32_t patches(const float *in, size_t batch, size_t channels, size_t height, size_t width, size_t patch,
                       float *out, int unpatch, int32_t threads) {
  if (batch == 0 || channels == 0 || height == 0 || width == 0) return AQ_OK;
  if (!in || !out) return AQ_E_ARGUMENT;
  if (patch == 0 || height % patch != 0 || width % patch != 0) return AQ_E_SHAPE;
  if (!aq_three_counts_allowed(batch, channels, height) || !aq_counts_allowed(batch * channels * height, width))
    return AQ_E_SHAPE;
  const patches_context context = {in, out, channels, patch, height / patch, width / patch, unpatch};
  return aq_run_units(run_patches, &context, batch * context.down, batch * channels * height * width / 4, threads);
}

int32_t aq_patchify(const float *images, size_t batch, size_t channels, size_t height, size_t width, size_t patch,
                    float *out, int32_t threads) {
  return patches(images, batch, channels, height, width, patch, out, 0, threads);
}

int32_t aq_unpatchify(const float *tokens, size_t batch, size_t channels, size_t height, size_t width, size_t patch,
                      float *out, int32_t threads) {
  return patches(tokens, batch, channels, height, width, patch, out, 1, threads);
}

int32_t aq_timestep_embedding(const float *timesteps, size_t n, size_t channels, int32_t cosines_first,
                              double downscale_freq_shift, double max_period, float *out) {
  if (n == 0 || channels == 0) return AQ_OK;
  if (!timesteps || !out) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(n, channels)) return AQ_E_SHAPE;
  const size_t half = channels / 2;
  const float divisor = (float)((double)half - downscale_freq_shift);
  if (!(max_period >= 1.0 && max_period < 1e300) || (half > 0 && !(divisor > 0.0f))) return AQ_E_VALUE;
  for (size_t t = 0; t < n; t++)
    if (!(timesteps[t] >= -(float)AQ_MAX_POSITION && timesteps[t] <= (float)AQ_MAX_POSITION)) return AQ_E_VALUE;
  const float slope = (float)-aq_log(max_period);
  for (size_t i = 0; i < half; i++) {
    /* rounded to float32 where PyTorch rounds: of an angle near 1000 the rounding is not negligible */
    const float exponent = slope * (float)i, frequency = (float)aq_exp((double)(exponent / divisor));
    if (!(frequency <= 1.0f)) return AQ_E_VALUE;
    for (size_t t = 0; t < n; t++) {
      double sine, cosine;
      const float angle = timesteps[t] * frequency;
      aq_sine_cosine((double)angle, &sine, &cosine);
      out[t * channels + i] = (float)(cosines_first ? cosine : sine);
      out[t * channels + half + i] = (float)(cosines_first ? sine : cosine);
    }
  }
  for (size_t t = 0; t < n && channels % 2 != 0; t++) out[t * channels + channels - 1] = 0.0f;
  return AQ_OK;
}
