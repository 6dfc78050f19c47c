/* adam.h: one parameter's step of Adam (Kingma and Ba 2015, algorithm 1), in float32; the corrections of the two moments'
 * bias are taken in double once a step. */
#ifndef AQ_CUDA_ADAM_H
#define AQ_CUDA_ADAM_H

#include "chunk.h"

struct aq_adam_factors {
  float beta1, one_less_beta1, beta2, one_less_beta2;
  float step_size;   /* learning rate / (1 - beta1^step) */
  float root_factor; /* 1 / sqrt(1 - beta2^step) */
  float epsilon;
};

/* As kernels/cpu/backward.c takes powers. */
static inline double aq_power(double base, int32_t exponent) {
  double result = 1.0;
  for (; exponent; exponent >>= 1, base *= base)
    if (exponent & 1) result *= base;
  return result;
}

/* step counts from 1. */
static inline aq_adam_factors aq_adam_factors_of(double learning_rate, double beta1, double beta2, double epsilon,
                                                 int32_t step) {
  return {(float)beta1,
          (float)(1.0 - beta1),
          (float)beta2,
          (float)(1.0 - beta2),
          (float)(learning_rate / (1.0 - aq_power(beta1, step))),
          (float)(1.0 / __builtin_sqrt(1.0 - aq_power(beta2, step))),
          (float)epsilon};
}

AQ_FUNCTION void aq_adam_element(const aq_adam_factors &f, float gradient, float *parameter, float *first,
                                 float *second) {
  const float m = f.beta1 * *first + f.one_less_beta1 * gradient;
  const float v = f.beta2 * *second + f.one_less_beta2 * (gradient * gradient);
  *first = m;
  *second = v;
  *parameter = *parameter - f.step_size * m / (AQ_SQRT(v) * f.root_factor + f.epsilon);
}

#endif
