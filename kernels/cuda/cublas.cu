/* cublas.cu: cuBLAS as something to be measured against, opened when it is asked for: nothing else needs it. Numbers are those of
 * cublas_api.h and library_types.h, whose ABI has kept them since CUDA 11. */
#include <dlfcn.h>

#include "context.h"

#define CUDA_R_16BF_NUMBER 14
#define CUBLAS_COMPUTE_32F_NUMBER 68
#define CUBLAS_GEMM_DEFAULT_NUMBER (-1)
#define CUBLAS_OP_N_NUMBER 0
#define CUBLAS_OP_T_NUMBER 1

typedef int (*create_function)(void **handle);
typedef int (*destroy_function)(void *handle);
typedef int (*stream_function)(void *handle, cudaStream_t stream);
typedef int (*product_function)(void *handle, int turn_a, int turn_b, int m, int n, int k, const void *alpha, const void *a,
                                int a_type, int lda, const void *b, int b_type, int ldb, const void *beta, void *c, int c_type,
                                int ldc, int compute, int algorithm);

struct cublas_functions {
  create_function create;
  destroy_function destroy;
  stream_function set_stream;
  product_function multiply;
};

/* All functions, or none; the library stays open. */
static cublas_functions open_cublas(void) {
  static const char *const names[] = {"libcublas.so.13", "libcublas.so.12", "libcublas.so.11", "libcublas.so"};
  for (const char *name : names) {
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library) continue;
    const cublas_functions found = {(create_function)dlsym(library, "cublasCreate_v2"),
                                    (destroy_function)dlsym(library, "cublasDestroy_v2"),
                                    (stream_function)dlsym(library, "cublasSetStream_v2"),
                                    (product_function)dlsym(library, "cublasGemmEx")};
    if (found.create && found.destroy && found.set_stream && found.multiply) return found;
  }
  return {};
}

static const cublas_functions &cublas(void) {
  static const cublas_functions functions = open_cublas();
  return functions;
}

void aq_cuda_release_cublas(aq_stream_state *stream) {
  if (stream->cublas) cublas().destroy(stream->cublas);
  stream->cublas = 0;
}

int32_t aq_cuda_linear_cublas(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer weights, size_t rows, size_t cols,
                              aq_cuda_buffer out, aq_cuda_stream stream) {
  if (tokens == 0 || rows == 0) return AQ_OK;
  int32_t status;
  aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  if (cols == 0 || tokens > 0x7fffffff || rows > 0x7fffffff || cols > 0x7fffffff) return AQ_E_SHAPE;
  const uint16_t *from = aq_cuda_view<uint16_t>(x, tokens * cols, on, &status);
  const uint16_t *w = aq_cuda_view<uint16_t>(weights, rows * cols, on, &status);
  uint16_t *to = aq_cuda_view<uint16_t>(out, tokens * rows, on, &status);
  if (status != AQ_OK) return status;
  if (!cublas().multiply) return AQ_E_LIBRARY;
  if (!on->cublas && (cublas().create(&on->cublas) != 0 || cublas().set_stream(on->cublas, on->stream) != 0)) return AQ_E_LIBRARY;
  const float one = 1.0f, zero = 0.0f;
  /* its matrices are column by column: [rows, cols] by rows is [cols, rows], turned */
  const int failure = cublas().multiply(on->cublas, CUBLAS_OP_T_NUMBER, CUBLAS_OP_N_NUMBER, (int)rows, (int)tokens, (int)cols, &one,
                                        w, CUDA_R_16BF_NUMBER, (int)cols, from, CUDA_R_16BF_NUMBER, (int)cols, &zero, to,
                                        CUDA_R_16BF_NUMBER, (int)rows, CUBLAS_COMPUTE_32F_NUMBER, CUBLAS_GEMM_DEFAULT_NUMBER);
  return failure ? AQ_E_LIBRARY : aq_cuda_launched();
}
