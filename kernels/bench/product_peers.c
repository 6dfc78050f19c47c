/* product_peers.c: what the bench holds matrix products against and no library has: this core's fused
 * multiply-adds as fast as they go, and a peer's dot product called for every row of a matrix, as the peer's
 * own product calls it. The bench compiles it when it runs; it is no part of the kernels. */
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>

#include "../include/arrowquant.h"

/* Ten chains of fused multiply-adds that wait for nothing but themselves. */
#define CHAINS(name, features, bytes, text)                                                                         \
  features static void name(int64_t rounds) {                                                                       \
    typedef float vector __attribute__((vector_size(bytes)));                                                       \
    vector x = (vector){0} + 0.5f, a = x, b = x, c = x, d = x, e = x, f = x, g = x, h = x, i = x, j = x;            \
    for (int64_t k = 0; k < rounds; k++)                                                                            \
      __asm__ volatile(text(0) text(1) text(2) text(3) text(4) text(5) text(6) text(7) text(8) text(9)              \
                       : CONSTRAINT(a), CONSTRAINT(b), CONSTRAINT(c), CONSTRAINT(d), CONSTRAINT(e), CONSTRAINT(f),  \
                         CONSTRAINT(g), CONSTRAINT(h), CONSTRAINT(i), CONSTRAINT(j)                                 \
                       : INPUT(x));                                                                                 \
  }

#if defined(__x86_64__)
#define CONSTRAINT(v) "+v"(v)
#define INPUT(v) "v"(v)
#define FMA(n) "vfmadd231ps %10, %10, %" #n "\n"
CHAINS(chains_avx2, __attribute__((target("avx2,fma"))), 32, FMA)
CHAINS(chains_avx512, __attribute__((target("avx512f"))), 64, FMA)
#elif defined(__aarch64__)
#define CONSTRAINT(v) "+w"(v)
#define INPUT(v) "w"(v)
#define FMA(n) "fmla %" #n ".4s, %10.4s, %10.4s\n"
CHAINS(chains_neon, , 16, FMA)
#endif

/* Runs `rounds` rounds. Returns the multiply-adds of a round, 0 where there are none to run. */
AQ_API int32_t fma_chains(int32_t isa, int64_t rounds) {
#if defined(__x86_64__)
  if (isa == AQ_ISA_AVX2) return chains_avx2(rounds), 10 * 8;
  if (isa == AQ_ISA_AVX512 || isa == AQ_ISA_AVX512_VNNI || isa == AQ_ISA_AVX512_VBMI)
    return chains_avx512(rounds), 10 * 16;
#elif defined(__aarch64__)
  if (isa == AQ_ISA_NEON || isa == AQ_ISA_NEON_DOT) return chains_neon(rounds), 10 * 4;
#endif
  (void)isa;
  (void)rounds;
  return 0;
}

typedef void (*ggml_vec_dot)(int n, float *sum, size_t bs, const void *x, size_t bx, const void *y, size_t by, int nrc);

/* out[row] = dot(row, y) for every row, by `symbol` of the library at `path`. 0, or -1 where it cannot be
 * had. */
AQ_API int32_t ggml_rows(const char *path, const char *symbol, int32_t cols, int64_t rows, const void *x,
                         int64_t row_bytes, const void *y, float *out) {
  void *library = dlopen(path, RTLD_NOW);
  if (!library) return -1;
  ggml_vec_dot dot = 0;
  void *found = dlsym(library, symbol);
  __builtin_memcpy(&dot, &found, sizeof dot);
  for (int64_t row = 0; dot && row < rows; row++)
    dot(cols, out + row, 0, (const char *)x + row * row_bytes, 0, y, 0, 1);
  dlclose(library);
  return dot ? 0 : -1;
}
