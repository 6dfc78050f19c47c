/* int8.c: 8-bit activations and their products with packed weights on every instruction set of this build
 * against the scalar oracle, to the bit, for any number of threads; and the oracle against sums in double. */
#include "harness.h"

/* Rounded and back: static ones are what their codes stand for, others within half a step of the narrowest
 * grid that covers their token and 0; and every instruction set against the scalar one, in place. */
static void round_case(int32_t isa, const char *where, const float *x, size_t tokens, size_t cols, int32_t bits,
                       int32_t kind, const uint8_t *codes, const float *scale, const int32_t *zero) {
  const size_t n = tokens * cols;
  const float top = (float)((1 << bits) - 1);
  float *back = guarded(n * 4);
  expect_status("round_activations", where,
                aq_round_activations(x, tokens, cols, bits, kind, scale[0], zero[0], back, AQ_ISA_SCALAR, 1), AQ_OK);
  int near = 1;
  for (size_t i = 0; i < n; i++) {
    if (kind == AQ_ACTIVATIONS_PER_TOKEN) near &= fabsf(back[i] - x[i]) <= 0.5001f * scale[i / cols] * top / (top - 1.0f);
    else if (zero[i / cols] == zero[0]) near &= back[i] == scale[0] * (float)(codes[i] - zero[0]);
  }
  expect(near, "rounded within half a step", where);
  for (size_t k = 0; k < THREAD_COUNTS; k++) {
    float *again = guarded(n * 4);
    memcpy(again, x, n * 4);
    expect_status("round_activations", where,
                  aq_round_activations(again, tokens, cols, bits, kind, scale[0], zero[0], again, isa, thread_counts[k]),
                  AQ_OK);
    expect_output("round_activations", where, back, again, n * 4);
  }
}

/* 8-bit activations: the scalar kernel against sums in double, every instruction set against the scalar one
 * to the bit. */
static void int8_case(int32_t isa, size_t tokens, size_t rows, size_t cols, int32_t bits, size_t group_size,
                      int symmetric, int with_bias, int32_t x_bits, int extreme) {
  char where[160];
  snprintf(where, sizeof where, "%s, %zux%zux%zu, %d bits, group %zu%s%s, x %d bits%s", isa_names[isa], tokens, rows,
           cols, bits, group_size, symmetric ? ", symmetric" : "", with_bias ? ", bias" : "", x_bits,
           extreme ? ", extreme" : "");
  const size_t n = tokens * rows;
  float *x = gaussians(tokens * cols, 1), *bias = gaussians(rows, 1);
  uint64_t words = 0, groups = 0;
  aq_packed_words(cols, bits, &words);
  aq_group_count(cols, group_size, &groups);
  uint32_t *packed = take(rows * words * 4);
  uint16_t *scale = take(rows * groups * 2), *zero = take(rows * groups * 2);
  if (extreme) { /* every code the largest, on both sides, and the bits behind a row's end set */
    memset(packed, 0xff, rows * words * 4);
    for (size_t i = 0; i < rows * groups; i++) {
      scale[i] = 0x2c00;                      /* 1/16 */
      zero[i] = 0x5800 + (uint16_t)(i % 9); /* from 128 on */
    }
    for (size_t i = 0; i < tokens * cols; i++) x[i] = i / cols % 2 ? 7.0f : -7.0f;
  } else {
    float *w = gaussians(rows * cols, 0.1f);
    aq_quantize_round(w, AQ_F32, rows, cols, bits, group_size, symmetric ? AQ_ZERO_POINT_SYMMETRIC : AQ_ZERO_POINT_REAL,
                      packed, scale, symmetric ? 0 : zero, AQ_ISA_SCALAR, 1);
  }
  if (symmetric) zero = 0;
  const int32_t kind = extreme || random_bits() % 4 == 0 ? AQ_ACTIVATIONS_STATIC : AQ_ACTIVATIONS_PER_TOKEN;
  uint8_t *codes = guarded(tokens * cols), *codes2 = guarded(tokens * cols);
  float *x_scale = guarded(tokens * 4), *x_scale2 = guarded(tokens * 4);
  int32_t *x_zero = guarded(tokens * 4), *x_zero2 = guarded(tokens * 4);
  for (size_t t = 0; t < tokens; t++) {
    x_scale[t] = x_scale2[t] = 4.0f / (float)(1 << x_bits);
    x_zero[t] = x_zero2[t] = extreme ? (t % 2 ? 0 : (1 << x_bits) - 1) : 1 << (x_bits - 1);
  }
  expect_status("quantize_activations", where,
     aq_quantize_activations(x, tokens, cols, x_bits, kind, codes, x_scale, x_zero, AQ_ISA_SCALAR, 1), AQ_OK);
  for (size_t i = 0; i < tokens * cols && kind == AQ_ACTIVATIONS_PER_TOKEN; i++) {
    const size_t t = i / cols;
    const double back = (double)x_scale[t] * (codes[i] - x_zero[t]);
    if (fabs(back - x[i]) > 0.5001 * x_scale[t] || codes[i] >> x_bits) {
      fail("quantize_activations", where, "off by more than half a step");
      break;
    }
  }
  for (size_t k = 0; k < THREAD_COUNTS; k++) {
    expect_status("quantize_activations", where,
       aq_quantize_activations(x, tokens, cols, x_bits, kind, codes2, x_scale2, x_zero2, isa, thread_counts[k]), AQ_OK);
    expect_output("codes", where, codes, codes2, tokens * cols);
    expect_output("scales", where, x_scale, x_scale2, tokens * 4);
    expect_output("zero points", where, x_zero, x_zero2, tokens * 4);
  }
  round_case(isa, where, x, tokens, cols, x_bits, kind, codes, x_scale, x_zero);
  float *expected = guarded(n * 4), *tolerance = take(n * 4), *reference = take(n * 4), *part = guarded(rows * 4);
  float *steps = take(rows * groups * 4), *centres = take(rows * groups * 4);
  aq_convert(scale, AQ_F16, steps, AQ_F32, rows * groups, AQ_ISA_SCALAR, 1);
  if (zero) aq_convert(zero, AQ_F16, centres, AQ_F32, rows * groups, AQ_ISA_SCALAR, 1);
  for (size_t i = 0; !zero && i < rows * groups; i++) centres[i] = (float)(1 << (bits - 1));
  for (size_t t = 0; t < tokens; t++)
    for (size_t r = 0; r < rows; r++) {
      double sum = 0, magnitude = 0;
      const uint8_t *bytes = (const uint8_t *)(packed + r * words);
      for (size_t k = 0; k < cols; k++) {
        const size_t group = r * groups + (group_size ? k / group_size : 0), at = k * (size_t)bits;
        uint32_t window = bytes[at / 8];
        if (at % 8 + (size_t)bits > 8) window |= (uint32_t)bytes[at / 8 + 1] << 8;
        const int code = (int)(window >> at % 8 & ((1u << bits) - 1));
        const double a = (double)x_scale[t] * (codes[t * cols + k] - x_zero[t]);
        sum += a * steps[group] * ((double)code - centres[group]);
        magnitude += fabs(a * steps[group]) * (code + fabs(centres[group]));
      }
      reference[t * rows + r] = (float)(sum + (with_bias ? bias[r] : 0));
      tolerance[t * rows + r] = (float)(((double)cols / 16 + 8) * 0x1p-24 * (magnitude + 1));
    }
  const float *b = with_bias ? bias : 0;
#define LINEAR(count, out, isa, threads)                                                                          \
  aq_linear_packed_int8(codes, x_scale, x_zero, count, packed, scale, zero, b, rows, cols, bits, group_size, out, \
                        isa, threads)
  expect_status("linear_packed_int8", where, LINEAR(tokens, expected, AQ_ISA_SCALAR, 1), AQ_OK);
  expect_close("int8 oracle against doubles", where, reference, expected, n, tolerance, 0);
  for (size_t k = 0; k < THREAD_COUNTS; k++) {
    float *out = guarded(n * 4);
    expect_status("linear_packed_int8", where, LINEAR(tokens, out, isa, thread_counts[k]), AQ_OK);
    expect_output("linear_packed_int8", where, expected, out, n * 4);
  }
  LINEAR(1, part, isa, 1);
  expect_output("linear_packed_int8, a token alone", where, expected, part, rows * 4);
  release();
}

/* One row of `x`, and of packed codes times it. */
#define ENCODE(x, bits, kind, codes, isa) aq_quantize_activations(x, 1, 35, bits, kind, codes, scale, zero, isa, 1)
#define ROUND(x, bits, kind, out, isa) aq_round_activations(x, 1, 35, bits, kind, scale[0], zero[0], out, isa, 1)
#define MULTIPLY(codes, bits, group_size, isa) \
  aq_linear_packed_int8(codes, scale, zero, 1, packed, half, 0, 0, 1, 1, bits, group_size, out, isa, 1)

/* Activations at the ends of what float32 holds, and what is refused. */
static void activations(int32_t isa) {
  const char *where = isa_names[isa];
  float x[35], scale[1], back[35], expected_back[35];
  uint8_t codes[35], expected[35];
  int32_t zero[1];
  static const float ends[][2] = {{3e38f, -3e38f}, {1e-44f, 0}, {-1e-40f, 1e-40f}, {0, -0.0f}, {5, 3}, {-2, -7}};
  for (size_t e = 0; e < COUNT(ends); e++)
    for (int32_t bits = 2; bits <= 8; bits++) {
      for (int i = 0; i < 35; i++) x[i] = ends[e][i % 2];
      expect_status("ends", where, ENCODE(x, bits, AQ_ACTIVATIONS_PER_TOKEN, expected, AQ_ISA_SCALAR), AQ_OK);
      expect_status("ends", where, ENCODE(x, bits, AQ_ACTIVATIONS_PER_TOKEN, codes, isa), AQ_OK);
      int near = 1;
      for (int i = 0; i < 35; i++) {
        const double back = (double)scale[0] * (codes[i] - zero[0]);
        near &= codes[i] == expected[i] && fabs(back - (double)x[i]) <= 0.50001 * (double)scale[0];
      }
      expect(near, "ends within half a step", where);
      expect_status("ends", where, ROUND(x, bits, AQ_ACTIVATIONS_PER_TOKEN, expected_back, AQ_ISA_SCALAR), AQ_OK);
      expect_status("ends", where, ROUND(x, bits, AQ_ACTIVATIONS_PER_TOKEN, back, isa), AQ_OK);
      expect_bytes("ends, rounded", where, expected_back, back, sizeof back);
    }
  scale[0] = 1e-30f, zero[0] = 3; /* far beyond a static range */
  for (int i = 0; i < 35; i++) x[i] = i % 2 ? 3e38f : -3e38f;
  expect_status("clipped", where, ENCODE(x, 4, AQ_ACTIVATIONS_STATIC, codes, isa), AQ_OK);
  expect(codes[0] == 0 && codes[1] == 15 && codes[33] == 15 && codes[34] == 0, "clipped codes", where);
  for (int at = 0; at < 35; at += 17)
    for (int kind = 0; kind < 2; kind++)
      for (int bad = 0; bad < 2; bad++) {
        for (int i = 0; i < 35; i++) x[i] = 1;
        x[at] = bad ? NAN : -INFINITY;
        expect_status("not finite", where, ENCODE(x, 8, kind, codes, isa), AQ_E_NONFINITE);
        expect_status("not finite", where, ROUND(x, 8, kind, back, isa), AQ_E_NONFINITE);
      }
  const uint32_t packed[1] = {0};
  const uint16_t half[1] = {0};
  float out[1];
  zero[0] = 16;
  expect_status("zero point", where, ENCODE(x, 4, AQ_ACTIVATIONS_STATIC, codes, isa), AQ_E_VALUE);
  expect_status("zero point", where, ROUND(x, 4, AQ_ACTIVATIONS_STATIC, back, isa), AQ_E_VALUE);
  zero[0] = 256;
  expect_status("zero point", where, MULTIPLY(codes, 4, 0, isa), AQ_E_VALUE);
  scale[0] = 0, zero[0] = 0;
  expect_status("scale", where, ENCODE(x, 4, AQ_ACTIVATIONS_STATIC, codes, isa), AQ_E_VALUE);
  expect_status("width", where, ENCODE(x, 9, 1, codes, isa), AQ_E_ARGUMENT);
  expect_status("kind", where, ENCODE(x, 8, 2, codes, isa), AQ_E_ARGUMENT);
  expect_status("scale", where, ROUND(x, 4, AQ_ACTIVATIONS_STATIC, back, isa), AQ_E_VALUE);
  expect_status("width", where, ROUND(x, 1, 1, back, isa), AQ_E_ARGUMENT);
  expect_status("kind", where, ROUND(x, 8, 2, back, isa), AQ_E_ARGUMENT);
  expect_status("width", where, MULTIPLY(codes, 5, 0, isa), AQ_E_ARGUMENT);
  expect_status("group", where, MULTIPLY(codes, 4, 7, isa), AQ_E_SHAPE);
  expect_status("null", where, MULTIPLY(0, 4, 0, isa), AQ_E_ARGUMENT);
  expect_status("isa", where, MULTIPLY(codes, 4, 0, 99), AQ_E_ISA);
  expect_status("nothing", where, aq_quantize_activations(0, 0, 35, 8, 1, 0, 0, 0, isa, 1), AQ_OK);
  expect_status("nothing", where, aq_linear_packed_int8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 4, 0, 0, isa, 1), AQ_OK);
  const float bias[1] = {2.5f};
  expect_status("no columns", where, aq_linear_packed_int8(0, scale, zero, 1, 0, 0, 0, bias, 1, 0, 4, 0, out, isa, 1),
                AQ_OK);
  expect_bytes("no columns: the bias", where, bias, out, sizeof out);
}

static void run(int32_t isa) {
  static const size_t tokens[] = {1, 2, 3, 5, 12, 13, 33, 65}, rows[] = {1, 3, 17, 32, 33, 130};
  static const size_t cols[] = {1, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 256, 257, 300, 600};
  static const size_t group_sizes[] = {0, 16, 32, 64, 128, 256};
  static const int32_t widths[] = {2, 3, 4, 8};
  for (size_t t = 0; t < COUNT(tokens); t++)
    for (size_t r = 0; r < COUNT(rows); r++)
      for (size_t c = 0; c < COUNT(cols); c++)
        for (size_t b = 0; b < COUNT(widths); b++) {
          if (passed_over(4)) continue;
          int8_case(isa, tokens[t], rows[r], cols[c], widths[b], group_sizes[random_bits() % 6], random_bits() % 3 == 0,
                    random_bits() % 2, random_bits() % 2 ? 8 : 2 + (int32_t)(random_bits() % 7),
                    random_bits() % 6 == 0);
        }
  for (size_t b = 0; b < COUNT(widths); b++)
    for (size_t g = 0; g < COUNT(group_sizes); g++) {
      if (quick && random_bits() % (share / 4)) continue;
      int8_case(isa, 1, 5, 4096 + 7 * g, widths[b], group_sizes[g], g % 2, 1, 8, 0);
      int8_case(isa, 3, 5, 333, widths[b], group_sizes[g], 0, 1, 4, 0);
      int8_case(isa, 1, 6, 4500, widths[b], group_sizes[g], 0, 0, 8, 1);
      int8_case(isa, 4, 33, 600, widths[b], group_sizes[g], 0, 0, 8, 1);
    }
  int8_case(isa, 3, 2, 70000, 8, 0, 0, 0, 8, 1); /* the row's sum of products is past 2^31 */
  int8_case(isa, 1, 2, 70000, 8, 0, 0, 0, 8, 1);
  int8_case(isa, 64, 300, 512, 4, 64, 0, 1, 8, 0);
  activations(isa);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  run_sets(AQ_ISA_NEON_DOT, run);
  return finish();
}
