/* cublas.h: products in bfloat16 by the toolkit's library, where it is there: loaded by name, so that a
 * driver without it links. The numbers are those of cublas_api.h and library_types.h. */
#include <dlfcn.h>

#define CUBLAS_TRANSPOSED 1
#define CUBLAS_PLAIN 0
#define CUBLAS_BFLOAT16 14
#define CUBLAS_SUMS_IN_FLOAT32 68
#define CUBLAS_ANY_ALGORITHM (-1)

/* Median milliseconds of out [tokens, rows] = x [tokens, cols] times weights [rows, cols] turned; 0 without
 * cuBLAS. */
static double cublas_milliseconds(size_t tokens, size_t rows, size_t cols) {
#if defined(AQ_EMULATED)
  (void)tokens, (void)rows, (void)cols;
  return 0;
#else
  typedef int (*create_type)(void **);
  typedef int (*product_type)(void *, int, int, int, int, int, const void *, const void *, int, int, const void *, int, int,
                              const void *, void *, int, int, int, int);
  static void *library, *handle;
  for (const char *name : {"libcublas.so", "libcublas.so.13", "libcublas.so.12"})
    if (!library) library = dlopen(name, RTLD_NOW);
  if (!library) return 0;
  const create_type create = (create_type)dlsym(library, "cublasCreate_v2");
  const product_type product = (product_type)dlsym(library, "cublasGemmEx");
  if (!create || !product || (!handle && create(&handle) != 0)) return 0;
  uint16_t *weights = 0, *x = 0, *out = 0;
  cudaEvent_t begin, end;
  float each[9] = {};
  const float one = 1, zero = 0;
  bool is_good = cudaMalloc((void **)&weights, rows * cols * 2) == cudaSuccess && cudaMalloc((void **)&x, tokens * cols * 2) == cudaSuccess &&
                 cudaMalloc((void **)&out, tokens * rows * 2) == cudaSuccess && cudaEventCreate(&begin) == cudaSuccess &&
                 cudaEventCreate(&end) == cudaSuccess;
  if (is_good) cudaMemset(weights, 0x3c, rows * cols * 2), cudaMemset(x, 0x3c, tokens * cols * 2);
  for (int i = -1; i < 9 && is_good; i++) {
    cudaEventRecord(begin, 0);
    is_good = product(handle, CUBLAS_TRANSPOSED, CUBLAS_PLAIN, (int)rows, (int)tokens, (int)cols, &one, weights, CUBLAS_BFLOAT16,
                      (int)cols, x, CUBLAS_BFLOAT16, (int)cols, &zero, out, CUBLAS_BFLOAT16, (int)rows, CUBLAS_SUMS_IN_FLOAT32,
                      CUBLAS_ANY_ALGORITHM) == 0;
    cudaEventRecord(end, 0);
    is_good = is_good && cudaEventSynchronize(end) == cudaSuccess;
    if (is_good && i >= 0) cudaEventElapsedTime(&each[i], begin, end);
  }
  for (uint16_t *memory : {weights, x, out}) cudaFree(memory);
  std::sort(each, each + 9);
  return is_good ? (double)each[4] : 0;
#endif
}
