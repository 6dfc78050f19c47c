/* adam.cu: Adam's step, a parameter a thread. */
#include "adam.h"

#include <math.h>

#include "context.h"

static __global__ void step_elements(aq_adam_factors factors, const float *gradient, float *parameters, float *first,
                                     float *second, size_t n) {
  for (size_t i = aq_thread(); i < n; i += aq_all_threads())
    aq_adam_element(factors, gradient[i], parameters + i, first + i, second + i);
}

int32_t aq_cuda_adam_step(aq_cuda_buffer parameters, aq_cuda_buffer gradient, aq_cuda_buffer first,
                          aq_cuda_buffer second, size_t n, double learning_rate, double beta1, double beta2,
                          double epsilon, int32_t step, aq_cuda_stream stream) {
  if (n == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (!(beta1 >= 0 && beta1 < 1) || !(beta2 >= 0 && beta2 < 1) || !(epsilon >= 0) || !isfinite(epsilon) ||
      !isfinite(learning_rate) || step < 1)
    return AQ_E_VALUE;
  if (!aq_shape_allowed(1, n)) return AQ_E_SHAPE;
  float *p = aq_cuda_view<float>(parameters, n, on, &status);
  const float *g = aq_cuda_view<float>(gradient, n, on, &status);
  float *m = aq_cuda_view<float>(first, n, on, &status);
  float *v = aq_cuda_view<float>(second, n, on, &status);
  if (status != AQ_OK) return status;
  aq_launch(on, step_elements, aq_cuda_blocks(n, AQ_BLOCK), AQ_BLOCK, 0, aq_adam_factors_of(learning_rate, beta1, beta2, epsilon, step), g, p, m, v, n);
  return aq_cuda_launched();
}
