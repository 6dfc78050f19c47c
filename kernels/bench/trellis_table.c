/* trellis_table.c: trains the levels of trellis codes of 2 or 3 bits (arithmetic/trellis.h) on Gaussian
 * numbers: the best path for given levels, then every level the mean of the numbers that took its window,
 * those with the other sign in the complement's. Eight seeds are trained on a little; the one that is best on
 * other numbers is trained on more. A window that no number took is drawn again. Prints the levels as whole
 * numbers, and mean squared errors on numbers that no level has seen. A minute of one core.
 *
 *     cc -O3 -ffp-contract=off kernels/bench/trellis_table.c -lm -o trellis_table && ./trellis_table 3 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { BEFORE = 6, STATES = 1 << BEFORE, MOST_WINDOWS = 512, MOST_LEVEL = 63 };
enum { SEEDS = 8, FEW = 1 << 15, FEW_ROUNDS = 100, MANY = 1 << 18, MANY_ROUNDS = 16 };

static int bits, windows;
static uint64_t state;

static double uniform(void) { /* SplitMix64 */
  uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return ((double)((z ^ z >> 31) >> 11) + 0.5) * 0x1p-53;
}

static double gaussian(void) { return sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform()); }

static float x[MANY];
static uint16_t from[MANY][STATES]; /* the window before those that end in a state */

/* Mean squared error of the best path; the sum and the count of the numbers of each window, if asked for. */
static double best_path(int n, const float *levels, double *sums, double *counts) {
  float cost[MOST_WINDOWS], least[STATES];
  for (int w = 0; w < windows; w++) cost[w] = w ? 1e30f : 0;
  for (int i = 0; i < n; i++) {
    float lowest = 1e30f;
    for (int s = 0; s < STATES; s++) {
      int best = s << bits & (windows - 1);
      for (int w = best + 1, end = best + (1 << bits); w < end; w++)
        if (cost[w] < cost[best]) best = w;
      least[s] = cost[best], from[i][s] = (uint16_t)best;
      lowest = least[s] < lowest ? least[s] : lowest;
    }
    for (int w = 0; w < windows; w++) {
      const float error = x[i] - levels[w];
      cost[w] = least[w & (STATES - 1)] - lowest + error * error;
    }
  }
  int w = 0;
  for (int other = 1; other < windows; other++)
    if (cost[other] < cost[w]) w = other;
  double squares = 0;
  for (int i = n - 1; i >= 0; w = from[i][w & (STATES - 1)], i--) {
    squares += ((double)x[i] - (double)levels[w]) * ((double)x[i] - (double)levels[w]);
    if (!sums) continue;
    sums[w] += (double)x[i], counts[w]++;
    sums[windows - 1 - w] -= (double)x[i], counts[windows - 1 - w]++;
  }
  return squares / n;
}

static double error_on_new(int n, const float *levels) {
  state = 999;
  for (int i = 0; i < n; i++) x[i] = (float)gaussian();
  return best_path(n, levels, 0, 0);
}

static void train(int n, int rounds, float *levels) {
  for (int round = 0; round < rounds; round++) {
    double sums[MOST_WINDOWS] = {0}, counts[MOST_WINDOWS] = {0};
    for (int i = 0; i < n; i++) x[i] = (float)gaussian();
    best_path(n, levels, sums, counts);
    for (int w = 0; w < windows / 2; w++) {
      levels[w] = (float)(counts[w] > 0 ? sums[w] / counts[w] : gaussian());
      levels[windows - 1 - w] = -levels[w];
    }
  }
}

int main(int argc, char **argv) {
  bits = argc > 1 ? atoi(argv[1]) : 0;
  if (bits != 2 && bits != 3) return fprintf(stderr, "usage: trellis_table 2|3\n"), 2;
  windows = STATES << bits;
  float best[MOST_WINDOWS], levels[MOST_WINDOWS], most = 0;
  double least = 1;
  for (uint64_t seed = 1; seed <= SEEDS; seed++) {
    state = seed << 32;
    for (int w = 0; w < windows / 2; w++) levels[w] = (float)gaussian(), levels[windows - 1 - w] = -levels[w];
    train(FEW, FEW_ROUNDS, levels);
    const double error = error_on_new(FEW, levels);
    printf("seed %d: %.5f\n", (int)seed, error), fflush(stdout);
    if (error >= least) continue;
    least = error;
    for (int w = 0; w < windows; w++) best[w] = levels[w];
  }
  state = 1;
  train(MANY, MANY_ROUNDS, best);
  for (int w = 0; w < windows; w++) most = fabsf(best[w]) > most ? fabsf(best[w]) : most;
  const float unit = MOST_LEVEL / most;
  for (int w = 0; w < windows; w++) levels[w] = roundf(best[w] * unit) / unit;
  printf("mean squared error %.5f, of whole numbers %.5f; deviation %.2f\n", error_on_new(MANY, best),
         error_on_new(MANY, levels), (double)unit);
  for (int w = 0; w < windows; w++)
    printf("%d%s", (int)roundf(levels[w] * unit), w == windows - 1 ? "\n" : w % 24 == 23 ? ",\n" : ", ");
  return 0;
}
