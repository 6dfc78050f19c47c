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

/* Whether expert i with number a comes before expert j with b: the larger one, of equals the first; NaN is
 * the least. */
AQ_FUNCTION int aq_comes_before(float a, size_t i, float b, size_t j) {
  a = a == a ? a : -__builtin_inff();
  b = b == b ? b : -__builtin_inff();
  return a > b || (a == b && i < j);
}

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
  for (size_t k = 0, last = 0; k < per_token; k++) {
    size_t best = experts;
    for (size_t e = 0; e < experts; e++)
      if ((k == 0 || aq_comes_before(logits[last], last, logits[e], e)) &&
          (best == experts || aq_comes_before(logits[e], e, logits[best], best)))
        best = e;
    expert[k] = (int32_t)best;
    weight[k] = logits[best];
    last = best;
  }
}

#endif
