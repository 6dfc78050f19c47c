/* blas_sgemm.c: a product of float32 matrices by a BLAS library that lies on this machine, for the bench to
 * hold ours against. The bench compiles it when it runs; it is no part of the kernels. */
#include <dlfcn.h>
#include <stdint.h>

enum { ROW_MAJOR = 101, NO_TRANSPOSE = 111 };

typedef void (*sgemm_fn)(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                         const float *b, int ldb, float beta, float *c, int ldc);
typedef void (*threads_fn)(int threads);

static void *library;
static sgemm_fn sgemm;

static void *first_symbol(const char *const *names) {
  void *found = 0;
  for (; *names && !found; names++) found = dlsym(library, *names);
  return found;
}

/* Opens the library at `path`, by name where dlopen finds it. 0, or -1 where it has no 32-bit cblas_sgemm. */
int32_t blas_open(const char *path, int32_t threads) {
  static const char *const products[] = {"cblas_sgemm", "scipy_cblas_sgemm", 0};
  static const char *const counts[] = {"openblas_set_num_threads", "scipy_openblas_set_num_threads", 0};
  library = dlopen(path, RTLD_NOW);
  if (!library) return -1;
  void *product = first_symbol(products), *set = first_symbol(counts);
  if (!product || !set) {
    dlclose(library);
    return -1;
  }
  __builtin_memcpy(&sgemm, &product, sizeof sgemm);
  threads_fn set_threads;
  __builtin_memcpy(&set_threads, &set, sizeof set_threads);
  set_threads(threads);
  return 0;
}

/* c[m, n] = a[m, k] b[k, n], row-major. */
void blas_sgemm(const float *a, const float *b, int32_t m, int32_t k, int32_t n, float *c) {
  sgemm(ROW_MAJOR, NO_TRANSPOSE, NO_TRANSPOSE, m, n, k, 1.0f, a, k, b, n, 0.0f, c, n);
}

void blas_close(void) { dlclose(library); }
