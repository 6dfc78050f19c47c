/* gradients.h: the arithmetic of an element in gradients and in Adam's steps, compiled by the CPU's loops and
 * by CUDA. Nothing is fused, so that all give the same bits. */
#ifndef AQ_GRADIENTS_H
#define AQ_GRADIENTS_H

#include "half.h"

#define AQ_ELEMENT AQ_FUNCTION __attribute__((always_inline))

/* exp(x) in float32 for x <= 88, relative error below 2^-22; 0 below -87.33. As v_exp of
 * cpu/forward/vector.h, unfused. */
AQ_ELEMENT float aq_exp_of(float x) {
  const float magic = x * 1.44269504f + 12582912.0f, n = magic - 12582912.0f;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float power = aq_bits_float((aq_float_bits(magic) << 23) + 0x3f800000u);
  return x < -87.33f ? 0.0f : p * power;
}

/* 1 / (1 + exp(-x)) without overflow */
AQ_ELEMENT float aq_sigmoid_of(float x) {
  const float e = aq_exp_of(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

/* The slope of x sigmoid(x), s = sigmoid(x). */
AQ_ELEMENT float aq_silu_slope(float x, float s) { return s + x * s * (1.0f - s); }

/* The slope of x sigmoid(u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3). */
AQ_ELEMENT float aq_gelu_tanh_slope(float x) {
  const float square = x * x, s = aq_sigmoid_of(x * (1.5957691216f + square * 0.0713548162f));
  return s + x * s * (1.0f - s) * (1.5957691216f + square * 0.2140644487f);
}

/* What Adam's step has for all elements. */
typedef struct {
  float b1, c1, b2, c2, rate, root, epsilon;
} aq_adam;

static inline double aq_power_of(double base, int32_t exponent) {
  double result = 1.0;
  for (; exponent; exponent >>= 1, base *= base)
    if (exponent & 1) result *= base;
  return result;
}

static inline int aq_adam_allowed(double beta1, double beta2, double epsilon, int32_t step) {
  return beta1 >= 0.0 && beta1 < 1.0 && beta2 >= 0.0 && beta2 < 1.0 && epsilon >= 0.0 && step >= 1;
}

static inline aq_adam aq_adam_of(double rate, double beta1, double beta2, double epsilon, int32_t step) {
  const aq_adam adam = {(float)beta1, (float)(1.0 - beta1), (float)beta2, (float)(1.0 - beta2),
                        (float)(rate / (1.0 - aq_power_of(beta1, step))),
                        (float)(1.0 / __builtin_sqrt(1.0 - aq_power_of(beta2, step))), (float)epsilon};
  return adam;
}

#endif
