/* trellis_encode.c: processor time of solving for trellis codes, for a weight: the search, least squares with
 * two rounds of descent, and three passes of both, as `effort: high` makes for each of its starts. Rows are
 * whole groups; inputs depend on their neighbours. Time of one thread, which other load on the machine hardly
 * changes.
 *
 *     bun run scripts/build.ts --output libarrowquant.so
 *     cc -O2 kernels/bench/trellis_encode.c ./libarrowquant.so -Wl,-rpath,. -lm -o trellis_encode && \
 *         ./trellis_encode */
#define _POSIX_C_SOURCE 199309L
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../include/arrowquant.h"

enum { ROWS = 64, PASSES = 3, ROUNDS = 2 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint32_t state = 1;
static float gaussian(void) {
  float sum = -6;
  for (int i = 0; i < 12; i++) state = state * 1664525u + 1013904223u, sum += (float)(state >> 8) * 0x1p-24f;
  return sum;
}

static void *take(size_t bytes) {
  void *memory = calloc(bytes, 1);
  if (!memory) exit(1);
  return memory;
}

static void check(int32_t status) {
  if (status == AQ_OK) return;
  fprintf(stderr, "status %d\n", (int)status);
  exit(1);
}

/* The damped mean of x xT, and its factor. */
static void moment_of(size_t cols, float *moment, float *factor, float *pivots, float *work) {
  const size_t tokens = cols;
  float *x = take(4 * tokens * cols);
  for (size_t i = 0; i < tokens * cols; i++) x[i] = gaussian() + (i % cols ? 0.8f * x[i - 1] : 0);
  check(aq_accumulate_moment(x, 0, 0, tokens, cols, cols, cols, moment, AQ_ISA_BEST, 1));
  for (size_t i = 0; i < cols * cols; i++) moment[i] /= (float)tokens;
  for (size_t i = 0; i < cols; i++) moment[i * cols + i] *= 1.01f;
  memcpy(factor, moment, 4 * cols * cols);
  check(aq_factor_moment(factor, cols, pivots, work, AQ_ISA_BEST, 1));
  free(x);
}

static void measure(int32_t bits, size_t cols) {
  const size_t n = ROWS * cols;
  uint64_t floats = 0;
  check(aq_solver_work(cols, 0, 1, &floats));
  float *work = take(4 * floats), *moment = take(4 * cols * cols), *factor = take(4 * cols * cols), *pivots = take(4 * cols);
  float *weights = take(4 * n), table[512], scale[ROWS], offset[ROWS];
  double objective[ROWS], searching = 0, settling = 0;
  uint8_t *codes = take(n);
  moment_of(cols, moment, factor, pivots, work);
  for (size_t i = 0; i < n; i++) weights[i] = gaussian();
  for (size_t i = 0; i < ROWS; i++) scale[i] = bits == 2 ? 1.75f : 2.1f, offset[i] = 0;
  check(aq_trellis_table(bits, table));
  for (int pass = 0; pass < PASSES; pass++) {
    const double begin = now();
    check(aq_search_trellis(weights, ROWS, cols, bits, 0, table, 0, scale, offset, cols, factor, pivots, codes, objective, work,
                            AQ_ISA_BEST, 1));
    const double middle = now();
    check(aq_settle_trellis(weights, ROWS, cols, bits, 0, table, cols, moment, 1, ROUNDS, codes, scale, offset, objective, work,
                            AQ_ISA_BEST, 1));
    searching += middle - begin, settling += now() - middle;
  }
  const double of_weight = 1e6 / (double)n;
  printf("| %d | %zu | %.2f | %.2f | %.2f |\n", (int)bits, cols, searching / PASSES * of_weight,
         settling / PASSES * of_weight, (searching + settling) * of_weight);
  fflush(stdout);
  free(work), free(moment), free(factor), free(pivots), free(weights), free(codes);
}

int main(void) {
  static const size_t columns[] = {1024, 3584};
  printf("| bits | columns | search, us | least squares and descent, us | %d passes, us |\n"
         "|---|---|---|---|---|\n", PASSES);
  for (int32_t bits = 2; bits <= 3; bits++)
    for (size_t i = 0; i < sizeof columns / sizeof *columns; i++) measure(bits, columns[i]);
  return 0;
}
