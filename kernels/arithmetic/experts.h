/* experts.h: the experts of a token in a mixture, for every library: of operations that are rounded alike
 * everywhere. */
#ifndef AQ_EXPERTS_H
#define AQ_EXPERTS_H

#include "group.h"

/* e^x for x <= 0, 0 below -700. */
AQ_FUNCTION double aq_small_exp(double x) {
  const double high = 0.693147180369123816490, low = 1.90821492927058770002e-10; /* of ln 2 */
  if (!(x > -700.0)) return x == x ? 0.0 : x;
  const double nearest = x / high + 0.5;
  int32_t whole = (int32_t)nearest;
  if ((double)whole > nearest) whole--;
  const double rest = x - (double)whole * high - (double)whole * low;
  double sum = 1.0;
  for (int k = 13; k > 0; k--) sum = 1.0 + sum * rest / (double)k;
  const uint64_t bits = (uint64_t)(1023 + whole) << 52;
  double power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return sum * power;
}

/* Whether a number comes before one of an earlier expert; NaN is the least. */
AQ_FUNCTION int aq_is_chosen_before(float a, float b) { return a > b || (a > -__builtin_inff() && b != b); }

/* Softmax over a token's logits plus the experts' biases (null: none), and of these numbers the largest, of
 * equals the first: their experts, each once, whatever the numbers are, and the numbers. The logits are
 * lost. */
AQ_FUNCTION void aq_experts_of_token(float *logits, const float *bias, size_t experts, size_t per_token,
                                     int32_t *expert, float *weight) {
  float largest = -__builtin_inff();
  double sum = 0.0;
  for (size_t e = 0; e < experts; e++) largest = logits[e] > largest ? logits[e] : largest;
  for (size_t e = 0; e < experts; e++) sum += aq_small_exp((double)logits[e] - (double)largest);
  for (size_t e = 0; e < experts; e++)
    logits[e] = (float)(aq_small_exp((double)logits[e] - (double)largest) / sum + (bias ? (double)bias[e] : 0.0));
  for (size_t e = 0; e < experts; e++) {
    size_t k = e < per_token ? e : per_token; /* chosen so far, in order */
    if (k == per_token && !aq_is_chosen_before(logits[e], weight[--k])) continue;
    for (; k > 0 && aq_is_chosen_before(logits[e], weight[k - 1]); k--) {
      expert[k] = expert[k - 1];
      weight[k] = weight[k - 1];
    }
    expert[k] = (int32_t)e;
    weight[k] = logits[e];
  }
}

#endif
