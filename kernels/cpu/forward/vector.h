/* forward/vector.h: the parts of a forward pass over vectors of AQ_W floats, included once by each unit of
 * isa/ behind quantize/vector.h. Every output element is summed in an order that depends on its row or token
 * alone, so threads and neighbours never change a byte; against forward/scalar.c results differ by
 * rounding.
 */
#include "elementary.h"
#include "linear_vector.h"

/* exp(x) for x <= 88, relative error below 2^-22; 0 below -87.33, NaN of NaN. Cody-Waite reduction and
 * Cephes' polynomial; the low bits of x log2(e) + 1.5 2^23 are the exponent. */
AQ_INLINE vf v_exp(vf x) {
  const vf magic = v_fma(x, v_splat(1.44269504f), v_splat(12582912.0f)), n = magic - 12582912.0f;
  vf r = v_fma(n, v_splat(-0.693359375f), x);
  r = v_fma(n, v_splat(2.12194440e-4f), r);
  vf p = v_fma(v_splat(1.9875691500e-4f), r, v_splat(1.3981999507e-3f));
  p = v_fma(p, r, v_splat(8.3334519073e-3f));
  p = v_fma(p, r, v_splat(4.1665795894e-2f));
  p = v_fma(p, r, v_splat(1.6666665459e-1f));
  p = v_fma(p, r, v_splat(5.0000001201e-1f));
  p = v_fma(p, r * r, r) + 1.0f;
  const vf power = (vf)(((vu)magic << 23) + 0x3f800000u);
  return (vf)((vi)(p * power) & ~(x < v_splat(-87.33f)));
}

/* x / (1 + exp(-u)) without overflow */
AQ_INLINE vf v_gate(vf x, vf u) {
  const vi positive = u >= (vf){0};
  const vf e = v_exp(v_select(positive, -u, u));
  return x * v_select(positive, v_splat(1.0f), e) / (1.0f + e);
}

/* Rows --------------------------------------------------------------------------------------------------- */

/* Runs `body` with element i and n elements from there, n = AQ_W but at the end. */
#define AQ_FOR_VECTORS(count, ...)                       \
  for (size_t i = 0; i < (count); i += AQ_W) {           \
    const size_t n = aq_min_size(AQ_W, (count) - i);     \
    __VA_ARGS__                                          \
  }

AQ_INLINE vf load_n(const float *p, size_t n) { return n == AQ_W ? v_load(p) : v_load_part(p, n, 0.0f); }

AQ_INLINE void store_n(float *p, vf v, size_t n) {
  if (n == AQ_W)
    v_store(p, v);
  else
    v_store_part(p, v, n);
}

static void rms_norm(const float *x, size_t cols, const float *weight, float epsilon, float *out) {
  vf sum = {0};
  AQ_FOR_VECTORS(cols, {
    const vf v = load_n(x + i, n);
    sum = v_fma(v, v, sum);
  })
  const vf factor = v_splat(1.0f / __builtin_sqrtf(v_total(sum) / (float)cols + epsilon));
  AQ_FOR_VECTORS(cols, {
    const vf v = load_n(x + i, n) * factor;
    store_n(out + i, weight ? v * load_n(weight + i, n) : v, n);
  })
}

static void layer_norm(const float *x, size_t cols, const float *weight, const float *bias, float epsilon, float *out) {
  vf sum = {0};
  vf squares = {0};
  AQ_FOR_VECTORS(cols, { sum += load_n(x + i, n); })
  const float mean = v_total(sum) / (float)cols;
  AQ_FOR_VECTORS(cols, {
    const vf v = (n == AQ_W ? v_load(x + i) : v_load_part(x + i, n, mean)) - mean;
    squares = v_fma(v, v, squares);
  })
  const vf factor = v_splat(1.0f / __builtin_sqrtf(v_total(squares) / (float)cols + epsilon));
  AQ_FOR_VECTORS(cols, {
    vf v = (load_n(x + i, n) - mean) * factor;
    if (weight) v = v * load_n(weight + i, n);
    if (bias) v = v + load_n(bias + i, n);
    store_n(out + i, v, n);
  })
}

static void modulate(const float *x, const float *scale, const float *shift, size_t cols, float *out) {
  AQ_FOR_VECTORS(cols, {
    store_n(out + i, v_fma(load_n(x + i, n), 1.0f + load_n(scale + i, n), load_n(shift + i, n)), n);
  })
}

static void gate_add(const float *residual, const float *gate, const float *x, size_t cols, float *out) {
  AQ_FOR_VECTORS(cols, {
    store_n(out + i, v_fma(load_n(gate + i, n), load_n(x + i, n), load_n(residual + i, n)), n);
  })
}

AQ_INLINE void elementwise_of(const int32_t function, const float *a, const float *b, size_t count, float *out) {
  AQ_FOR_VECTORS(count, {
    const vf x = load_n(a + i, n);
    vf y;
    if (function == AQ_SILU) y = v_gate(x, x);
    else if (function == AQ_GELU_TANH) y = v_gate(x, x * v_fma(x * x, v_splat(0.0713548162f), v_splat(1.5957691216f)));
    else if (function == AQ_SILU_MULTIPLY) y = v_gate(x, x) * load_n(b + i, n);
    else y = x + load_n(b + i, n);
    store_n(out + i, y, n);
  })
}

static void elementwise(int32_t function, const float *a, const float *b, size_t count, float *out) {
  switch (function) {
    case AQ_SILU: elementwise_of(AQ_SILU, a, b, count, out); break;
    case AQ_GELU_TANH: elementwise_of(AQ_GELU_TANH, a, b, count, out); break;
    case AQ_SILU_MULTIPLY: elementwise_of(AQ_SILU_MULTIPLY, a, b, count, out); break;
    default: elementwise_of(AQ_ADD, a, b, count, out); break;
  }
}

/* Rotary embedding --------------------------------------------------------------------------------------- */

typedef int64_t vl __attribute__((vector_size(8 * AQ_D)));

static void rotary(float *x, double position, const double *frequency, size_t heads, size_t head_size, size_t first,
                   size_t count) {
  float cosines[64];
  float sines[64];
  for (size_t i = 0; i < count; i += AQ_D) {
    vd angle = {0};
    for (size_t j = 0; j < AQ_D; j++) angle[j] = i + j < count ? position * frequency[i + j] : 0.0;
    const vd magic = angle * 0.63661977236758134308 + AQ_MAGIC, turns = magic - AQ_MAGIC;
    const vd r = ((angle - turns * AQ_HALF_PI_1) - turns * AQ_HALF_PI_2) - turns * AQ_HALF_PI_3, r2 = r * r;
    const vl s = (vl)(AQ_SINE(r, r2)), c = (vl)(AQ_COSINE(r2));
    const vl quadrant = (vl)magic, swap = -(quadrant & 1);
    const vd sine = (vd)(((swap & c) | (~swap & s)) ^ ((quadrant & 2) << 62));
    const vd cosine = (vd)(((swap & s) | (~swap & c)) ^ (((quadrant + 1) & 2) << 62));
    for (size_t j = 0; j < AQ_D && i + j < count; j++) {
      sines[i + j] = (float)sine[j];
      cosines[i + j] = (float)cosine[j];
    }
  }
  for (size_t head = 0; head < heads; head++) {
    float *a = x + head * head_size + first, *b = a + head_size / 2;
    AQ_FOR_VECTORS(count, {
      const vf low = load_n(a + i, n), high = load_n(b + i, n);
      const vf sine = load_n(sines + i, n), cosine = load_n(cosines + i, n);
      store_n(a + i, v_fma(low, cosine, -(high * sine)), n);
      store_n(b + i, v_fma(high, cosine, low * sine), n);
    })
  }
}

/* Attention ---------------------------------------------------------------------------------------------- */

/* Queries of one head against blocks of AQ_KC keys, each block's largest score and sum carried on to the
 * next. */
typedef struct {
  const aq_attention_job *job;
  size_t first, queries, tile_count, q_stride, kv_stride, kv_first;
  const float *q;
  float *out;
  const uint8_t *mask; /* of the block's keys, or null */
  size_t key, keys;    /* first key of the block, and how many */
  vf panels[2][AQ_KC];
  float scores[AQ_QUERIES * AQ_XS], x[AQ_MR * AQ_XS];
  vi allowed[AQ_KC / AQ_W];
  float largest[AQ_QUERIES], sums[AQ_QUERIES];
} attention_state;

/* scores = q k^T */
AQ_INLINE void block_scores(attention_state *s) {
  const size_t size = s->job->head_size, key_panels = (s->keys + AQ_W - 1) / AQ_W;
  for (size_t p = 0; p < key_panels; p += 2) {
    const size_t nv = aq_min_size(2, key_panels - p);
    for (size_t d = 0; d < size; d += AQ_KC) {
      const size_t k = aq_min_size(AQ_KC, size - d);
      for (size_t v = 0; v < nv; v++) {
        size_t first[AQ_W];
        for (size_t lane = 0; lane < AQ_W; lane++)
          first[lane] = s->kv_first + (s->key + aq_min_size((p + v) * AQ_W + lane, s->keys - 1)) * s->kv_stride + d;
        fill_panel(s->job->k, AQ_F32, first, k, s->panels[v]);
      }
      for (size_t i = 0; i < s->tile_count; i++) {
        const size_t t = s->queries * i / s->tile_count, m = s->queries * (i + 1) / s->tile_count - t;
        copy_tile(s->q + t * s->q_stride + d, s->q_stride, m, k, s->x);
        tiles[m - 1][nv - 1](s->x, s->panels[0], k, s->scores + t * AQ_XS + p * AQ_W, AQ_XS, d > 0, 0);
      }
    }
  }
}

/* Allows the first `keys` of the block's keys, without those that the mask switches off. */
AQ_INLINE void block_allow(attention_state *s, size_t keys) {
  const size_t key_panels = (s->keys + AQ_W - 1) / AQ_W;
  for (size_t i = 0; i < key_panels * AQ_W; i++)
    ((int32_t *)s->allowed)[i] = i < keys && (!s->mask || s->mask[i]) ? -1 : 0;
}

/* Scores become exp(scale score - largest so far); what is in sums and out shrinks to the new largest. */
AQ_INLINE void block_softmax(attention_state *s) {
  const float lowest = -__builtin_inff(), scale = s->job->scale;
  const size_t size = s->job->head_size, key_panels = (s->keys + AQ_W - 1) / AQ_W;
  size_t allowed = s->keys;
  block_allow(s, allowed);
  for (size_t i = 0; i < s->queries; i++) {
    const size_t visible = aq_visible_keys(s->job, s->first + i);
    const size_t keys = visible <= s->key ? 0 : aq_min_size(visible - s->key, s->keys);
    if (keys != allowed) block_allow(s, allowed = keys);
    float *row = s->scores + i * AQ_XS;
    vf peaks = v_splat(lowest);
    for (size_t p = 0; p < key_panels; p++) {
      const vf score = v_select(s->allowed[p], v_load(row + p * AQ_W) * scale, v_splat(lowest));
      peaks = v_max(peaks, score);
      v_store(row + p * AQ_W, score);
    }
    const float block = v_largest(peaks), peak = block > s->largest[i] ? block : s->largest[i];
    const vf shift = v_splat(peak == lowest ? 0.0f : peak);
    vf sum = {0};
    for (size_t p = 0; p < key_panels; p++) {
      const vf e = v_exp(v_load(row + p * AQ_W) - shift);
      sum += e;
      v_store(row + p * AQ_W, e);
    }
    if (s->key > 0 && peak > s->largest[i]) {
      const vf keep = v_exp(v_splat(s->largest[i]) - shift);
      s->sums[i] *= keep[0];
      float *row_out = s->out + i * s->q_stride;
      AQ_FOR_VECTORS(size, { store_n(row_out + i, load_n(row_out + i, n) * keep, n); })
    }
    s->largest[i] = peak;
    s->sums[i] += v_total(sum);
  }
}

/* out += scores v */
AQ_INLINE void block_values(attention_state *s) {
  const size_t size = s->job->head_size, keys = s->keys, kv_stride = s->kv_stride;
  const uint8_t *mask = s->mask;
  for (size_t d = 0; d < size; d += 2 * AQ_W) {
    const size_t n = aq_min_size(2 * AQ_W, size - d), nv = (n + AQ_W - 1) / AQ_W;
    for (size_t v = 0; v < nv; v++) {
      const size_t there = aq_min_size(AQ_W, n - v * AQ_W);
      const float *from = s->job->v + s->kv_first + s->key * kv_stride + d + v * AQ_W;
      for (size_t i = 0; i < keys; i++)
        s->panels[v][i] = mask && !mask[i] ? (vf){0} : load_n(from + i * kv_stride, there);
    }
    for (size_t i = 0; i < s->tile_count; i++) {
      const size_t t = s->queries * i / s->tile_count, m = s->queries * (i + 1) / s->tile_count - t;
      tile(m, nv, n, s->scores + t * AQ_XS, s->panels[0], keys, s->out + t * s->q_stride + d, s->q_stride,
           s->key > 0, 0);
    }
  }
}

static void attention(const aq_attention_job *job, size_t item, size_t head, size_t begin, size_t end) {
  const size_t size = job->head_size, q_stride = job->heads * size, kv_stride = job->kv_heads * size;
  const size_t q_first = (item * job->tokens + begin) * q_stride + head * size;
  attention_state s;
  s.job = job;
  s.first = begin;
  s.queries = end - begin;
  s.tile_count = (s.queries + AQ_MR - 1) / AQ_MR;
  s.q_stride = q_stride;
  s.kv_stride = kv_stride;
  s.kv_first = item * job->tokens * kv_stride + head / (job->heads / job->kv_heads) * size;
  s.q = job->q + q_first;
  s.out = job->out + q_first;
  for (size_t i = 0; i < s.queries; i++) {
    s.largest[i] = -__builtin_inff();
    s.sums[i] = 0.0f;
  }
  const size_t visible = aq_visible_keys(job, end - 1);
  for (s.key = 0; s.key < visible; s.key += AQ_KC) {
    s.keys = aq_min_size(AQ_KC, visible - s.key);
    s.mask = job->key_mask ? job->key_mask + item * job->tokens + s.key : 0;
    block_scores(&s);
    block_softmax(&s);
    block_values(&s);
  }
  for (size_t i = 0; i < s.queries; i++) {
    const vf factor = v_splat(s.sums[i] == 0.0f ? 0.0f : 1.0f / s.sums[i]);
    float *row = s.out + i * q_stride;
    AQ_FOR_VECTORS(size, { store_n(row + i, load_n(row + i, n) * factor, n); })
  }
}

const aq_forward_kernels AQ_NAMED(forward) = {{2 * AQ_W, 1, 512.0, linear, linear_vector},
                                              AQ_QUERIES, rms_norm, layer_norm, attention,
                                              rotary, elementwise, modulate, gate_add};
