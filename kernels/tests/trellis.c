/* trellis.c: trellis codes on every instruction set of this build: levels by the definition, dequantized
 * weights and statistics against the scalar oracle to the bit, products with float32 activations against sums
 * in double, products with 8-bit activations and gradients to the bit; what the best path through the table
 * makes of Gaussian numbers; and rotations against their definition in double. */
#include "../arithmetic/trellis.h"
#include "harness.h"

#include "../arithmetic/trellis.h"

enum { MOST_WINDOWS = 512 };
static float tables[2][MOST_WINDOWS]; /* of 2 and of 3 bits */

/* A matrix of random codes. */
static size_t rows, cols, group_size, groups, words;
static int32_t bits;
static uint32_t *packed;
static uint16_t *scale, *offset;
static float *weights; /* by the definition */
static char where[160];

static float half(uint16_t bits) {
  float value;
  aq_convert(&bits, AQ_F16, &value, AQ_F32, 1, AQ_ISA_SCALAR, 1);
  return value;
}

static void matrix(int32_t isa, int32_t b, size_t r, size_t c, size_t g, int tiny) {
  uint64_t count = 0;
  bits = b, rows = r, cols = c, group_size = g;
  aq_packed_words(cols, bits, &count), words = count;
  aq_group_count(cols, group_size, &count), groups = count;
  snprintf(where, sizeof where, "%s, %d bits, %zu x %zu, group %zu%s", isa_names[isa], (int)bits, rows, cols, g, tiny ? ", tiny" : "");
  packed = take(rows * words * 4), scale = take(rows * groups * 2), offset = take(rows * groups * 2);
  weights = take(rows * cols * 4);
  uint8_t *codes = take(rows * cols);
  for (size_t i = 0; i < rows * cols; i++) codes[i] = random_bits() % (1u << bits);
  aq_pack_codes(codes, rows, cols, bits, packed, AQ_ISA_SCALAR, 1);
  for (size_t i = 0; i < rows * groups; i++) {
    const float values[2] = {gaussian() * (tiny ? 1e-6f : 0.05f), gaussian() * 0.01f};
    aq_convert(values, AQ_F32, scale + i, AQ_F16, 1, AQ_ISA_SCALAR, 1);
    aq_convert(values + 1, AQ_F32, offset + i, AQ_F16, 1, AQ_ISA_SCALAR, 1);
  }
  for (size_t i = 0; i < rows; i++)
    for (size_t j = 0; j < cols; j++) {
      const size_t at = i * groups + (group_size ? j / group_size : 0);
      unsigned window = 0;
      for (size_t back = 0; back <= (bits == 2 ? 3 : 2); back++)
        if (back <= j) window |= (unsigned)codes[i * cols + j - back] << (6 - (size_t)bits * back);
      weights[i * cols + j] = fmaf(half(scale[at]), tables[bits - 2][window], half(offset[at]));
    }
}

/* Products with float32 activations against sums in double, with 8-bit ones against the scalar oracle to the
 * bit, and that against sums in double; a token alone is the same with 8 bits. */
static void products(int32_t isa, size_t tokens, int with_bias) {
  const size_t n = tokens * rows;
  float *x = gaussians(tokens * cols, 1), *bias = with_bias ? gaussians(rows, 1) : 0;
  uint8_t *codes = take(tokens * cols);
  float *x_scale = take(tokens * 4), *expected = take(n * 4), *expected8 = take(n * 4), *tolerance = take(n * 4);
  int32_t *x_zero = take(tokens * 4);
  aq_quantize_activations(x, tokens, cols, 8, AQ_ACTIVATIONS_PER_TOKEN, codes, x_scale, x_zero, AQ_ISA_SCALAR, 1);
  for (size_t t = 0; t < tokens; t++)
    for (size_t r = 0; r < rows; r++) {
      double sum = with_bias ? (double)bias[r] : 0, sum8 = sum, magnitude = 1;
      for (size_t k = 0; k < cols; k++) {
        const size_t at = r * groups + (group_size ? k / group_size : 0);
        const double w = weights[r * cols + k], a = (double)x_scale[t] * (codes[t * cols + k] - x_zero[t]);
        sum += w * (double)x[t * cols + k];
        sum8 += w * a;
        magnitude += (fabs((double)half(scale[at])) * 2 + fabs((double)half(offset[at]))) * (fabs((double)x[t * cols + k]) + fabs(a));
      }
      expected[t * rows + r] = (float)sum;
      expected8[t * rows + r] = (float)sum8;
      tolerance[t * rows + r] = (float)(((double)cols / 16 + 8) * 0x1p-24 * magnitude);
    }
  float *first = 0, *oracle = guarded(n * 4), *alone = guarded(rows * 4);
  EXPECT_ON_THREADS("linear_trellis", where, first, expected, n, tolerance, 0,
                    aq_linear_trellis(x, tokens, packed, scale, offset, bias, rows, cols, bits, group_size, out, isa, threads));
#define INT8(count, out, isa, threads)                                                                           \
  aq_linear_trellis_int8(codes, x_scale, x_zero, count, packed, scale, offset, bias, rows, cols, bits, group_size, out, \
                         isa, threads)
  expect_status("linear_trellis_int8", where, INT8(tokens, oracle, AQ_ISA_SCALAR, 1), AQ_OK);
  expect_close("int8 oracle against doubles", where, expected8, oracle, n, tolerance, 0);
  for (size_t k = 0; k < THREAD_COUNTS; k++) {
    float *out = guarded(n * 4);
    expect_status("linear_trellis_int8", where, INT8(tokens, out, isa, thread_counts[k]), AQ_OK);
    expect_output("linear_trellis_int8", where, oracle, out, n * 4);
  }
  expect_status("linear_trellis_int8", where, INT8(1, alone, isa, 1), AQ_OK);
  expect_output("linear_trellis_int8, a token alone", where, oracle, alone, rows * 4);
}

/* dscale = sum dw level, doffset = sum dw. */
static void gradient(int32_t isa) {
  const size_t n = rows * groups;
  float *dw = gaussians(rows * cols, 1), *out[4];
  for (int i = 0; i < 4; i++) out[i] = guarded(n * 4);
  aq_trellis_gradient(dw, packed, rows, cols, bits, group_size, out[0], out[1], AQ_ISA_SCALAR, 1);
  aq_trellis_gradient(dw, packed, rows, cols, bits, group_size, out[2], out[3], isa, 3);
  expect_output("dscale", where, out[0], out[2], n * 4);
  expect_output("doffset", where, out[1], out[3], n * 4);
  uint16_t *one = take(n * 2), *none = memset(take(n * 2), 0, n * 2);
  for (size_t i = 0; i < n; i++) one[i] = 0x3c00;
  float *level = take(rows * cols * 4), *tolerance = take(n * 4), *sums[2] = {take(n * 4), take(n * 4)};
  aq_dequantize_trellis(packed, one, none, rows, cols, bits, group_size, level, AQ_F32, AQ_ISA_SCALAR, 1);
  for (size_t i = 0; i < n; i++) {
    const size_t size = group_size ? group_size : cols, begin = i % groups * size;
    double sum[3] = {0, 0, 1};
    for (size_t k = begin; k < begin + size && k < cols; k++) {
      const double d = dw[i / groups * cols + k], l = level[i / groups * cols + k];
      sum[0] += d * l, sum[1] += d, sum[2] += fabs(d * l) + fabs(d);
    }
    sums[0][i] = (float)sum[0], sums[1][i] = (float)sum[1], tolerance[i] = (float)(sum[2] * 0x1p-22);
  }
  expect_close("dscale against doubles", where, sums[0], out[0], n, tolerance, 0);
  expect_close("doffset against doubles", where, sums[1], out[1], n, tolerance, 0);
}

static void run_bits(int32_t isa, int32_t b) {
  static const size_t token_counts[] = {1, 2, 3, 5, 13, 33};
  static const size_t columns[] = {1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 67, 100, 128, 255, 256, 257, 300, 512, 1000};
  static const size_t sizes[] = {0, 16, 64, 256};
  for (size_t c = 0; c < COUNT(columns); c++)
    for (size_t g = 0; g < COUNT(sizes); g++) {
      if (quick && random_bits() % 4) continue;
      matrix(isa, b, 1 + random_bits() % 35, columns[c], sizes[g], random_bits() % 4 == 0);
      const size_t n = rows * cols;
      const int32_t threads = 1 + 2 * (int32_t)(random_bits() % 2);
#define DEQUANTIZE(out, dtype, isa, threads) \
  aq_dequantize_trellis(packed, scale, offset, rows, cols, bits, group_size, out, dtype, isa, threads)
      for (int32_t dtype = AQ_F32; dtype <= AQ_BF16; dtype++) {
        void *expected = guarded(n * 4), *actual = guarded(n * 4);
        aq_convert(weights, AQ_F32, expected, dtype, n, AQ_ISA_SCALAR, 1);
        expect_status("dequantize", where, DEQUANTIZE(actual, dtype, isa, threads), AQ_OK);
        expect_output("dequantize", where, expected, actual, n * dtype_bytes(dtype));
      }
      float *other = gaussians(n, 0.05f);
      double *expected = guarded(AQ_STATISTICS * 8), *actual = guarded(AQ_STATISTICS * 8);
#define STATISTICS(out, isa, threads) \
  aq_trellis_error_statistics(other, AQ_F32, packed, scale, offset, rows, cols, bits, group_size, out, isa, threads)
      expect_status("statistics", where, STATISTICS(expected, AQ_ISA_SCALAR, 1), AQ_OK);
      expect_status("statistics", where, STATISTICS(actual, isa, threads), AQ_OK);
      expect_output("statistics", where, expected, actual, AQ_STATISTICS * 8);
      products(isa, token_counts[random_bits() % COUNT(token_counts)], random_bits() % 2);
      gradient(isa);
      release();
    }
  static const size_t wide[] = {4096, 4100, 4500, 8200};
  for (size_t i = 0; i < COUNT(wide); i++)
    for (size_t g = 0; g < COUNT(sizes); g++) {
      if (quick && (i + g) % 4) continue;
      matrix(isa, b, 5, wide[i], sizes[g], 0);
      products(isa, 1 + g % 3, 1);
      release();
    }
}

/* Activations of `magnitude`: sums of large ones over a group are above what float32 holds, and products of
 * tiny ones with scales below its normal numbers; those with weights are not. */
static void extreme_activations(int32_t isa, int32_t b, float magnitude, size_t columns) {
  static const size_t sizes[] = {0, 64, 256};
  for (size_t g = 0; g < COUNT(sizes); g++) {
    matrix(isa, b, 5, columns, sizes[g], 0);
    for (size_t i = 0; i < rows * groups; i++) {
      const float values[2] = {1e-3f * (1 + (float)(i % 7)), 1e-5f};
      aq_convert(values, AQ_F32, scale + i, AQ_F16, 1, AQ_ISA_SCALAR, 1);
      aq_convert(values + 1, AQ_F32, offset + i, AQ_F16, 1, AQ_ISA_SCALAR, 1);
    }
    aq_dequantize_trellis(packed, scale, offset, rows, cols, bits, group_size, weights, AQ_F32, AQ_ISA_SCALAR, 1);
    float *x = take(cols * 4), *first = 0, *expected = take(rows * 4), *tolerance = take(rows * 4);
    for (size_t k = 0; k < cols; k++) x[k] = magnitude;
    for (size_t r = 0; r < rows; r++) {
      double sum = 0, all = 0;
      for (size_t k = 0; k < cols; k++) {
        sum += (double)weights[r * cols + k] * (double)x[k];
        all += fabs((double)weights[r * cols + k]) * (double)x[k];
      }
      expected[r] = (float)sum, tolerance[r] = (float)(all * 0x1p-16);
    }
    snprintf(where + strlen(where), sizeof where - strlen(where), ", x = %g", (double)magnitude);
    EXPECT_ON_THREADS("linear_trellis", where, first, expected, rows, tolerance, 0,
                      aq_linear_trellis(x, 1, packed, scale, offset, 0, rows, cols, bits, group_size, out, isa, threads));
    release();
  }
}

static void run(int32_t isa) {
  for (int32_t b = 2; b <= 3; b++) {
    run_bits(isa, b);
    extreme_activations(isa, b, 1e37f, 256);
    extreme_activations(isa, b, 0x1p100f, 300);
    extreme_activations(isa, b, 1e-15f, 4500);
    extreme_activations(isa, b, 1e-33f, 4500);
  }
}

/* The mean squared error of the best path for Gaussian numbers: below two thirds of that of uniform
 * levels. */
static void best_path(int32_t b, double deviation, double uniform) {
  enum { N = 20000, STATES = 64 };
  double cost[STATES], next[STATES];
  for (int s = 0; s < STATES; s++) cost[s] = s ? 1e30 : 0;
  for (int i = 0; i < N; i++) {
    const double x = (double)gaussian() * (deviation / 32);
    for (int s = 0; s < STATES; s++) next[s] = 1e30;
    for (int window = 0; window < 64 << b; window++) {
      const double error = x - (double)tables[b - 2][window], total = cost[window & 63] + error * error;
      if (total < next[window >> b]) next[window >> b] = total;
    }
    memcpy(cost, next, sizeof cost);
  }
  double best = cost[0];
  for (int s = 1; s < STATES; s++) best = cost[s] < best ? cost[s] : best;
  best *= 32 / deviation * 32 / deviation / N;
  printf("best path, %d bits: mean squared error %.4f\n", (int)b, best);
  expect(best < uniform * 0.67, "best path", "Gaussian numbers");
}

/* A value of a rotation by the definition: row `i` of a column of an item, the inverse too. */
static double rotated(const float *x, size_t n, size_t stride, size_t i, uint32_t seed, int32_t inverse) {
  const size_t block = n & (~n + 1), first = i / block * block;
  double sum = 0;
  for (size_t j = first; j < first + block; j++) {
    const size_t at = inverse ? i : j;
    uint32_t hash = (uint32_t)at * 0x9e3779b1u + seed;
    hash ^= hash >> 16, hash *= 0x85ebca6bu;
    hash ^= hash >> 13, hash *= 0xc2b2ae35u;
    hash ^= hash >> 16;
    int odd = (int)(hash >> 31);
    for (size_t common = i & j & (block - 1); common; common &= common - 1) odd = !odd;
    sum += odd ? -(double)x[j * stride] : (double)x[j * stride];
  }
  return sum / sqrt((double)block);
}

static void rotations(void) {
  static const size_t shapes[][3] = {{3, 1, 1}, {2, 7, 5}, {3, 24, 1}, {2, 96, 3}, {1, 128, 4}, {300, 512, 1}};
  static const int32_t seeds[] = {0, -1, 7};
  for (size_t s = 0; s < COUNT(shapes) - (quick ? 1 : 0); s++)
    for (size_t k = 0; k < COUNT(seeds); k++) {
      const size_t batch = shapes[s][0], n = shapes[s][1], stride = shapes[s][2], size = batch * n * stride;
      const int32_t seed = seeds[k];
      float *x = gaussians(size, 1), *forth = 0;
      snprintf(where, sizeof where, "%zu x %zu x %zu, seed %d", batch, n, stride, (int)seed);
      for (int32_t inverse = 0; inverse <= 1; inverse++) {
        float *expected = take(size * 4), *first;
        for (size_t at = 0; at < size; at++) {
          const size_t row = at / stride;
          expected[at] = (float)rotated(x + row / n * n * stride + at % stride, n, stride, row % n, (uint32_t)seed, inverse);
        }
        EXPECT_ON_THREADS("rotation", where, first, expected, size, 0, 1e-5,
                          aq_rotate(x, batch, n, stride, seed, inverse, out, threads));
        if (!inverse) forth = first;
      }
      expect_status("rotation", where, aq_rotate(forth, batch, n, stride, seed, 1, forth, 1), AQ_OK);
      expect_close("rotation and its inverse, in place", where, x, forth, size, 0, 1e-5);
      release();
    }
  float one[1] = {1};
  expect_status("rotation", "no values", aq_rotate(0, 1, 1, 1, 0, 0, one, 1), AQ_E_ARGUMENT);
  expect_status("rotation", "no output", aq_rotate(one, 1, 1, 1, 0, 0, 0, 1), AQ_E_ARGUMENT);
  expect_status("rotation", "too many values", aq_rotate(one, SIZE_MAX / 2, 8, 8, 0, 0, one, 1), AQ_E_SHAPE);
  expect_status("rotation", "nothing", aq_rotate(0, 0, 8, 8, 0, 0, 0, 1), AQ_OK);
}

static void refusals(void) {
  float out[2];
  const uint16_t halves[2] = {0};
  const uint32_t codes[1] = {0};
#define REFUSED(what, status, bits, group, scale, offset) \
  expect_status("refusals", what, \
                aq_dequantize_trellis(codes, scale, offset, 1, 2, bits, group, out, AQ_F32, AQ_ISA_BEST, 1), status)
  REFUSED("no offsets", AQ_E_ARGUMENT, 2, 0, halves, 0);
  REFUSED("no scales", AQ_E_ARGUMENT, 2, 0, 0, halves);
  REFUSED("4 bits", AQ_E_ARGUMENT, 4, 0, halves, halves);
  REFUSED("group", AQ_E_SHAPE, 2, 7, halves, halves);
  const float *x = out;
  const uint8_t x_codes[2] = {0};
  const int32_t zero[1] = {256};
  expect_status("refusals", "products of 4 bits",
                aq_linear_trellis(x, 1, codes, halves, halves, 0, 1, 2, 4, 0, out, AQ_ISA_BEST, 1), AQ_E_ARGUMENT);
  expect_status("refusals", "zero point",
                aq_linear_trellis_int8(x_codes, x, zero, 1, codes, halves, halves, 0, 1, 2, 2, 0, out, AQ_ISA_BEST, 1),
                AQ_E_VALUE);
  expect_status("refusals", "no gradient", aq_trellis_gradient(x, codes, 1, 2, 2, 0, 0, out, AQ_ISA_BEST, 1), AQ_E_ARGUMENT);
  expect_status("refusals", "table of 4 bits", aq_trellis_table(4, tables[0]), AQ_E_ARGUMENT);
  expect_status("refusals", "nothing", aq_dequantize_trellis(0, 0, 0, 0, 2, 2, 0, 0, AQ_F32, AQ_ISA_BEST, 1), AQ_OK);
}

int main(int argc, char **argv) {
  static const int terms[2][32] = {{AQ_TRELLIS_TERMS_2}, {AQ_TRELLIS_TERMS_3}};
  begin(argc, argv);
  for (int32_t b = 2; b <= 3; b++) {
    const int windows = 64 << b;
    const float *table = tables[b - 2];
    expect_status("table", b == 2 ? "2 bits" : "3 bits", aq_trellis_table(b, tables[b - 2]), AQ_OK);
    for (int i = 0; i < windows; i++)
      expect(table[i] == -table[windows - 1 - i], "table", "its second half is the first turned round");
    for (int i = 0; i < windows; i++)
      expect(table[i] * 32 == (float)(terms[b - 2][i >> 2 & 15] + terms[b - 2][16 + ((i ^ i >> 2 ^ i >> (b + 2)) & 15)]),
             "table", "a level is the sum of two terms");
  }
  best_path(2, 24.5, 0.1188);
  best_path(3, 20.08, 0.0374);
  rotations();
  refusals();
  run(AQ_ISA_SCALAR);
  run_sets(AQ_ISA_AVX512_VBMI, run);
  return finish();
}
