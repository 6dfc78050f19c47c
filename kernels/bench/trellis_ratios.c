/* trellis_ratios.c: the speed of trellis codes beside uniform codes of as many bits, in processor time of one
 * thread, the two in turn: medians of paired ratios that other load on the machine hardly moves.
 *
 *     bun run scripts/build.ts --output libarrowquant.so
 *     cc -O2 kernels/bench/trellis_ratios.c ./libarrowquant.so -Wl,-rpath,. -o trellis_ratios && \
 *         ./trellis_ratios [instruction set] */
#define _POSIX_C_SOURCE 199309L
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../include/arrowquant.h"

enum { COLS = 4096, CACHED = 256, ROWS = 2048, MANY = 65536, TOKENS = 64, SAMPLES = 15 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static uint32_t *packed;
static uint16_t *scale, *offset;
static float *x, *out, x_scale[TOKENS];
static uint8_t *codes;
static int32_t x_zero[TOKENS], isa, bits;
static size_t group_size;

enum { DEQUANTIZE, FLOATS, BYTES };

static void call(int what, int trellis, size_t rows, size_t tokens) {
  int32_t status;
  if (what == DEQUANTIZE)
    status = (trellis ? aq_dequantize_trellis : aq_dequantize)(packed, scale, offset, rows, COLS, bits, group_size, out, AQ_F32,
                                                               isa, 1);
  else if (what == FLOATS)
    status = (trellis ? aq_linear_trellis : aq_linear_packed)(x, tokens, packed, scale, offset, 0, rows, COLS, bits, group_size,
                                                              out, isa, 1);
  else
    status = (trellis ? aq_linear_trellis_int8 : aq_linear_packed_int8)(codes, x_scale, x_zero, tokens, packed, scale, offset,
                                                                        0, rows, COLS, bits, group_size, out, isa, 1);
  if (status != AQ_OK) exit(1);
}

static double ratio(int what, size_t rows, size_t tokens) {
  double ratios[SAMPLES], times[2];
  for (int i = -1; i < SAMPLES; i++) {
    for (int trellis = 0; trellis < 2; trellis++) {
      const double begin = now();
      for (int repeat = 0; repeat < (rows == CACHED ? 8 : 1); repeat++) call(what, trellis, rows, tokens);
      times[trellis] = now() - begin;
    }
    if (i >= 0) ratios[i] = times[0] / times[1];
  }
  qsort(ratios, SAMPLES, sizeof *ratios, ascending);
  return ratios[SAMPLES / 2];
}

int main(int count, char **arguments) {
  static const char *const names[] = {[AQ_ISA_AVX2] = "avx2", [AQ_ISA_AVX512] = "avx512",
                                      [AQ_ISA_AVX512_VNNI] = "avx512_vnni", [AQ_ISA_AVX512_VBMI] = "avx512_vbmi",
                                      [AQ_ISA_NEON] = "neon", [AQ_ISA_NEON_DOT] = "neon_dot"};
  const size_t words = MANY * (COLS / 32 * 3), groups = MANY * (COLS / 64);
  packed = malloc(4 * words), scale = malloc(2 * groups), offset = malloc(2 * groups);
  x = malloc(4 * TOKENS * COLS), codes = malloc(TOKENS * COLS), out = malloc(4 * (size_t)ROWS * COLS);
  if (!packed || !scale || !offset || !x || !codes || !out) return 1;
  for (size_t i = 0; i < words; i++) packed[i] = (uint32_t)rand() * 2654435761u;
  for (size_t i = 0; i < groups; i++) scale[i] = (uint16_t)(0x2c00 + rand() % 100), offset[i] = 0x2800;
  for (size_t i = 0; i < TOKENS * COLS; i++) x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
  aq_quantize_activations(x, TOKENS, COLS, 8, AQ_ACTIVATIONS_PER_TOKEN, codes, x_scale, x_zero, AQ_ISA_BEST, 1);
  printf("| bits | instruction set | group | dequantize in cache | from memory | 64 tokens, float32 | 8-bit | one token, float32 | "
         "8-bit |\n|---|---|---|---|---|---|---|---|---|\n");
  for (size_t i = 0; i < 2 * (sizeof names / sizeof *names); i++) {
    const size_t set = i % (sizeof names / sizeof *names);
    bits = set == i ? 2 : 3;
    if (names[set] && count > 1 && strcmp(names[set], arguments[1]) != 0) continue;
    for (group_size = 0; names[set] && aq_isa_supported((int32_t)set) && group_size <= 64; group_size += 64) {
      isa = (int32_t)set;
      printf("| %d | %s | %s | %.2f | %.2f | %.2f | %.2f | %.2f | %.2f |\n", (int)bits, names[set], group_size ? "64" : "row",
             ratio(DEQUANTIZE, CACHED, 0), ratio(DEQUANTIZE, ROWS, 0), ratio(FLOATS, ROWS / 4, TOKENS),
             ratio(BYTES, ROWS / 4, TOKENS), ratio(FLOATS, MANY, 1), ratio(BYTES, MANY, 1));
      fflush(stdout);
    }
  }
  return 0;
}
