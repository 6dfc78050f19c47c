/* trellis_table.c: trains the levels of trellis codes of 2 or 3 bits (arithmetic/trellis.h) on Gaussian
 * numbers. The level of a window is the sum of two terms, one of sixteen each. In turn: the best path for
 * given levels, then the terms by least squares over the numbers that took each window, those with the other
 * sign in the complement's. Many seeds are trained on a little; the one that is best on other numbers is
 * trained on more. Prints the terms as whole numbers, and mean squared errors on numbers that no level has
 * seen. A minute of one core.
 *
 *     cc -O3 -ffp-contract=off kernels/bench/trellis_table.c -lm -o trellis_table && ./trellis_table 3 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../arithmetic/trellis.h"

enum { STATES = 1 << AQ_TRELLIS_BEFORE, MOST_WINDOWS = 512, MOST_LEVEL = 63, TERMS = 16, SWEEPS = 30 };
enum { SEEDS = 60, FEW = 1 << 15, FEW_ROUNDS = 120, MANY = 1 << 18, MANY_ROUNDS = 16 };

static int bits, windows;
static uint64_t state;

static double uniform(void) { /* SplitMix64 */
  uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return ((double)((z ^ z >> 31) >> 11) + 0.5) * 0x1p-53;
}

static double gaussian(void) { return sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform()); }

typedef struct {
  double of[2][TERMS];
} terms;

static int place(int which, int w) {
  return (int)(which ? aq_trellis_second((uint32_t)w, bits) : aq_trellis_first((uint32_t)w));
}

static float x[MANY];
static uint16_t from[MANY][STATES]; /* the window before those that end in a state */

/* Mean squared error of the best path; the sum and the count of the numbers of each window, if asked for. */
static double best_path(int n, const terms *t, double *sums, double *counts) {
  float cost[MOST_WINDOWS], levels[MOST_WINDOWS], least[STATES];
  for (int w = 0; w < windows; w++) {
    levels[w] = (float)(t->of[0][place(0, w)] + t->of[1][place(1, w)]);
    cost[w] = w ? 1e30f : 0;
  }
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

static double error_on_new(int n, const terms *t) {
  state = 999;
  for (int i = 0; i < n; i++) x[i] = (float)gaussian();
  return best_path(n, t, 0, 0);
}

/* Terms of one kind that are best beside the other kind's, by turns. */
static void fit(terms *t, const double *sums, const double *counts) {
  for (int turn = 0; turn < 2 * SWEEPS; turn++) {
    const int own = turn % 2;
    double sum[TERMS] = {0}, count[TERMS] = {0};
    for (int w = 0; w < windows; w++) {
      sum[place(own, w)] += sums[w] - counts[w] * t->of[1 - own][place(1 - own, w)];
      count[place(own, w)] += counts[w];
    }
    for (int i = 0; i < TERMS; i++) t->of[own][i] = count[i] > 0 ? sum[i] / count[i] : gaussian();
  }
}

static void train(int n, int rounds, terms *t) {
  for (int round = 0; round < rounds; round++) {
    double sums[MOST_WINDOWS] = {0}, counts[MOST_WINDOWS] = {0};
    for (int i = 0; i < n; i++) x[i] = (float)gaussian();
    best_path(n, t, sums, counts);
    fit(t, sums, counts);
  }
}

/* Whole numbers: terms of the other place have the other sign, and levels are MOST_LEVEL at most. */
static double round_terms(terms *t) {
  double most = 0, unit;
  for (int own = 0; own < 2; own++)
    for (int i = 0; i < TERMS / 2; i++) {
      t->of[own][i] = (t->of[own][i] - t->of[own][TERMS - 1 - i]) / 2;
      t->of[own][TERMS - 1 - i] = -t->of[own][i];
    }
  for (int w = 0; w < windows; w++) most = fmax(most, fabs(t->of[0][place(0, w)] + t->of[1][place(1, w)]));
  for (unit = (MOST_LEVEL + 1) / most;; unit *= 0.999) {
    int greatest = 0;
    for (int w = 0; w < windows; w++) {
      const int level = abs((int)(round(t->of[0][place(0, w)] * unit) + round(t->of[1][place(1, w)] * unit)));
      greatest = level > greatest ? level : greatest;
    }
    if (greatest <= MOST_LEVEL) break;
  }
  for (int own = 0; own < 2; own++)
    for (int i = 0; i < TERMS; i++) t->of[own][i] = round(t->of[own][i] * unit) / unit;
  return unit;
}

int main(int argc, char **argv) {
  bits = argc > 1 ? atoi(argv[1]) : 0;
  if (!aq_trellis_bits_allowed(bits)) return fprintf(stderr, "usage: trellis_table 2|3\n"), 2;
  windows = STATES << bits;
  terms best = {0};
  double least = 1;
  for (uint64_t seed = 1; seed <= SEEDS; seed++) {
    terms t;
    state = seed << 32;
    for (int own = 0; own < 2; own++)
      for (int i = 0; i < TERMS / 2; i++) t.of[own][i] = gaussian() / sqrt(2), t.of[own][TERMS - 1 - i] = -t.of[own][i];
    train(FEW, FEW_ROUNDS, &t);
    const double error = error_on_new(FEW, &t);
    printf("seed %d: %.5f\n", (int)seed, error), fflush(stdout);
    if (error >= least) continue;
    least = error, best = t;
  }
  state = 1;
  train(MANY, MANY_ROUNDS, &best);
  printf("mean squared error %.5f, ", error_on_new(MANY, &best));
  const double unit = round_terms(&best);
  printf("of whole numbers %.5f; deviation %.2f\n", error_on_new(MANY, &best), unit);
  for (int own = 0; own < 2; own++)
    for (int i = 0; i < TERMS; i++)
      printf("%d%s", (int)round(best.of[own][i] * unit), i == TERMS - 1 ? "\n" : ", ");
  return 0;
}
