/* model_bench.c: speed of linear layers and attention against this core's measured peak of fused multiply-adds and
 * against float32. One thread, in its own processor time; every figure is the median of samples taken in turn with
 * what it is compared with. */
#define _POSIX_C_SOURCE 199309L
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../include/arrowquant.h"

static const char *isa_names[] = {"best", "scalar", "avx2", "avx512", "neon", "simd128", "avx512_vnni", "neon_dot"};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#if defined(__x86_64__)
#define PEAK(name, features, bytes)                                                                                \
  __attribute__((target(features))) static double name(void) {                                                      \
    typedef float vector __attribute__((vector_size(bytes)));                                                       \
    vector x = (vector){0} + 0.5f, a = x, b = x, c = x, d = x, e = x, f = x, g = x, h = x, i = x, j = x;            \
    const double start = now();                                                                                     \
    for (int k = 0; k < 400000; k++)                                                                                \
      __asm__ volatile("vfmadd231ps %10, %10, %0\n vfmadd231ps %10, %10, %1\n vfmadd231ps %10, %10, %2\n"         \
                       "vfmadd231ps %10, %10, %3\n vfmadd231ps %10, %10, %4\n vfmadd231ps %10, %10, %5\n"         \
                       "vfmadd231ps %10, %10, %6\n vfmadd231ps %10, %10, %7\n vfmadd231ps %10, %10, %8\n"         \
                       "vfmadd231ps %10, %10, %9"                                                                   \
                       : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h), "+v"(i), "+v"(j)   \
                       : "v"(x));                                                                                   \
    return 400000.0 * 10 * 2 * (bytes / 4) / (now() - start) * 1e-9;                                                \
  }
PEAK(peak_avx2, "avx2,fma", 32)
PEAK(peak_avx512, "avx512f", 64)
#endif

static double peak(int32_t isa) {
#if defined(__x86_64__)
  if (isa == AQ_ISA_AVX2) return peak_avx2();
  if (isa == AQ_ISA_AVX512 || isa == AQ_ISA_AVX512_VNNI) return peak_avx512();
#endif
  (void)isa;
  return 0;
}

static int compare(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(double *values, int n) {
  qsort(values, (size_t)n, sizeof *values, compare);
  return values[n / 2];
}

static float *values(size_t n) {
  float *x = malloc(n * 4);
  for (size_t i = 0; i < n; i++) x[i] = (float)((i * 2654435761u >> 7) % 2001) / 1000.0f - 1.0f;
  return x;
}

typedef struct {
  size_t rows, cols;
  float *dense;
  uint16_t *half;
  uint32_t *packed[9];
  uint16_t *scale[9], *zero[9];
} matrix;

static matrix make(size_t rows, size_t cols) {
  matrix m = {.rows = rows, .cols = cols, .dense = values(rows * cols), .half = malloc(rows * cols * 2)};
  aq_convert(m.dense, AQ_F32, m.half, AQ_BF16, rows * cols, 0, 2);
  for (int32_t bits = 2; bits <= 8; bits = bits == 4 ? 8 : bits + 1) {
    uint64_t words, groups;
    aq_packed_words(cols, bits, &words);
    aq_group_count(cols, 64, &groups);
    m.packed[bits] = malloc(rows * words * 4);
    m.scale[bits] = malloc(rows * groups * 2);
    m.zero[bits] = malloc(rows * groups * 2);
    aq_quantize_round(m.dense, AQ_F32, rows, cols, bits, 64, 0, m.packed[bits], m.scale[bits], m.zero[bits], 0, 2);
  }
  return m;
}

static void drop(matrix *m) {
  for (int bits = 2; bits <= 8; bits++) {
    free(m->packed[bits]);
    free(m->scale[bits]);
    free(m->zero[bits]);
  }
  free(m->dense);
  free(m->half);
}

/* kind 0: F32, 1: BF16, else bits */
static double time_once(const matrix *m, int kind, const float *x, size_t tokens, float *out, int32_t isa, int repeats) {
  const double start = now();
  for (int i = 0; i < repeats; i++) {
    if (kind == 0) aq_linear(x, tokens, m->dense, AQ_F32, 0, m->rows, m->cols, out, isa, 1);
    else if (kind == 1) aq_linear(x, tokens, m->half, AQ_BF16, 0, m->rows, m->cols, out, isa, 1);
    else
      aq_linear_packed(x, tokens, m->packed[kind], m->scale[kind], m->zero[kind], 0, m->rows, m->cols, kind, 64, out, isa, 1);
  }
  return (now() - start) / repeats;
}

static void products(int32_t isa, size_t tokens, size_t rows, size_t cols, int vector) {
  enum { SAMPLES = 15 };
  static const int kinds[] = {0, 1, 8, 4, 3, 2};
  matrix m = make(rows, cols);
  float *x = values(tokens * cols), *out = malloc(tokens * rows * 4);
  double seconds[6][SAMPLES], ratios[6][SAMPLES], share[SAMPLES];
  const double work = 2.0 * (double)tokens * (double)rows * (double)cols;
  const int repeats = vector ? 1 : (int)(2e8 / work) + 1;
  for (int s = -2; s < SAMPLES; s++) {
    const double top = peak(isa);
    for (int k = 0; k < 6; k++) {
      const double t = time_once(&m, kinds[k], x, tokens, out, isa, repeats);
      if (s < 0) continue;
      seconds[k][s] = t;
      ratios[k][s] = t / seconds[0][s];
      if (k == 0) share[s] = top > 0 ? work / t * 1e-9 / top : 0;
    }
  }
  printf("%-7s %5zu tokens, %5zux%-5zu", isa_names[isa], tokens, rows, cols);
  const double f32 = median(seconds[0], SAMPLES);
  if (vector)
    printf("  F32 %6.2f GB/s; speed against F32:", (double)rows * (double)cols * 4 / f32 * 1e-9);
  else
    printf("  F32 %6.1f GFLOP/s, %3.0f %% of peak; time against F32:", work / f32 * 1e-9, 100 * median(share, SAMPLES));
  static const char *names[] = {"F32", "BF16", "8 bits", "4 bits", "3 bits", "2 bits"};
  for (int k = 1; k < 6; k++) {
    const double r = median(ratios[k], SAMPLES);
    printf("  %s %.2f", names[k], vector ? 1 / r : r);
  }
  printf("\n");
  fflush(stdout);
  free(x);
  free(out);
  drop(&m);
}

/* 8-bit activations: their own quantizing included, against the packed product of float32 activations */
static void int8_products(int32_t isa, size_t tokens, size_t rows, size_t cols) {
  enum { SAMPLES = 15 };
  static const int kinds[] = {8, 4, 3, 2};
  matrix m = make(rows, cols);
  float *x = values(tokens * cols), *out = malloc(tokens * rows * 4), *scale = malloc(tokens * 4);
  uint8_t *codes = malloc(tokens * cols);
  int32_t *zero = malloc(tokens * 4);
  double ratios[4][SAMPLES], quantizing[SAMPLES], dense[4][SAMPLES];
  const double work = 2.0 * (double)tokens * (double)rows * (double)cols;
  const int repeats = tokens == 1 ? 1 : (int)(2e8 / work) + 1;
  for (int s = -2; s < SAMPLES; s++) {
    const double f32 = time_once(&m, 0, x, tokens, out, isa, repeats);
    double start = now();
    for (int i = 0; i < repeats; i++)
      aq_quantize_activations(x, tokens, cols, 8, AQ_ACTIVATIONS_PER_TOKEN, codes, scale, zero, isa, 1);
    const double quantize = (now() - start) / repeats;
    if (s >= 0) quantizing[s] = quantize / f32;
    for (int k = 0; k < 4; k++) {
      const int b = kinds[k];
      const double t = time_once(&m, b, x, tokens, out, isa, repeats);
      start = now();
      for (int i = 0; i < repeats; i++)
        aq_linear_packed_int8(codes, scale, zero, tokens, m.packed[b], m.scale[b], m.zero[b], 0, rows, cols, b, 64, out,
                              isa, 1);
      const double int8 = (now() - start) / repeats;
      if (s >= 0) ratios[k][s] = t / int8, dense[k][s] = f32 / int8;
    }
  }
  printf("%-11s %5zu tokens, %5zux%-5zu  int8 against packed f32, (against F32):", isa_names[isa], tokens, rows, cols);
  for (int k = 0; k < 4; k++)
    printf("  %d bits %.2f (%.2f)", kinds[k], median(ratios[k], SAMPLES), median(dense[k], SAMPLES));
  printf("; quantizing x %.3f of F32's time\n", median(quantizing, SAMPLES));
  fflush(stdout);
  free(x);
  free(out);
  free(scale);
  free(codes);
  free(zero);
  drop(&m);
}

static void attention(int32_t isa, size_t batch, size_t tokens, size_t heads, size_t size) {
  enum { SAMPLES = 9 };
  const size_t n = batch * tokens * heads * size;
  float *q = values(n), *k = values(n), *v = values(n), *out = malloc(n * 4);
  double rates[SAMPLES], share[SAMPLES];
  const double work = 4.0 * (double)n * (double)tokens;
  const int repeats = (int)(1e8 / work) + 1;
  for (int s = -1; s < SAMPLES; s++) {
    const double top = peak(isa), start = now();
    for (int i = 0; i < repeats; i++) aq_attention(q, k, v, 0, batch, tokens, heads, heads, size, 0.2f, out, isa, 1);
    const double rate = work * repeats / (now() - start) * 1e-9;
    if (s >= 0) rates[s] = rate, share[s] = top > 0 ? rate / top : 0;
  }
  printf("%-7s attention %zu x %zu tokens, %zu heads of %zu: %.1f GFLOP/s, %.0f %% of peak\n", isa_names[isa], batch, tokens,
         heads, size, median(rates, SAMPLES), 100 * median(share, SAMPLES));
  free(q);
  free(k);
  free(v);
  free(out);
}

int main(int argc, char **argv) {
  for (int32_t isa = AQ_ISA_AVX2; isa <= AQ_ISA_NEON_DOT; isa++) {
    if (!aq_isa_supported(isa) || (argc > 1 && strcmp(argv[1], isa_names[isa]))) continue;
    int8_products(isa, 2, 1024, 1024);
    int8_products(isa, 3, 1024, 1024);
    int8_products(isa, 8, 1024, 1024);
    int8_products(isa, 64, 1024, 1024);
    int8_products(isa, 256, 1024, 1024);
    int8_products(isa, 36 * 32, 64, 64);
    int8_products(isa, 512, 512, 128);
    int8_products(isa, 1, 16384, 4096);
    if (isa > AQ_ISA_SIMD128) continue; /* the rest is the code of another set's */
    printf("%s: peak %.1f GFLOP/s on one core\n", isa_names[isa], peak(isa));
    products(isa, 1024, 1024, 1024, 0);
    products(isa, 64, 1024, 1024, 0);
    products(isa, 36 * 32, 64, 64, 0);
    products(isa, 36 * 32, 160, 64, 0);
    products(isa, 36 * 32, 64, 160, 0);
    products(isa, 36 * 32, 192, 192, 0);
    products(isa, 64, 128, 128, 0);
    products(isa, 64 * 8, 512, 128, 0);
    products(isa, 64 * 8, 128, 512, 0);
    products(isa, 64 * 8, 768, 128, 0);
    attention(isa, 32, 36, 4, 16);
    attention(isa, 16, 64, 4, 32);
    attention(isa, 1, 2048, 4, 128);
    products(isa, 1, 16384, 4096, 1);
  }
}
