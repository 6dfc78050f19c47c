/* forward/elementary.h: the elementary functions that models need, in double and without a C library
 * (WebAssembly has none). Errors are a few units in the last place of a double. */
#ifndef AQ_MODEL_MATH_H
#define AQ_MODEL_MATH_H

#include <stdint.h>

/* Adding and taking it away rounds to a whole number, which the sum's low bits then hold, for |x| < 2^51. */
#define AQ_MAGIC 6755399441055744.0
/* ln 2 and pi/2 in parts whose products with whole numbers below 2^20 are exact. */
#define AQ_LN2_HIGH 6.93147180369123816490e-01
#define AQ_LN2_LOW 1.90821492927058770002e-10
#define AQ_HALF_PI_1 1.57079632673412561417e+00
#define AQ_HALF_PI_2 6.07710050630396597660e-11
#define AQ_HALF_PI_3 2.02226624879595063154e-21

static inline uint64_t aq_double_bits(double value) {
  uint64_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline double aq_bits_double(uint64_t bits) {
  double value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

static inline double aq_exp(double x) {
  if (x > 709.0) return __builtin_inf();
  if (x < -708.0) return 0.0;
  const double magic = x * 1.4426950408889634 + AQ_MAGIC, n = magic - AQ_MAGIC;
  const double r = (x - n * AQ_LN2_HIGH) - n * AQ_LN2_LOW;
  double sum = 1.0;
  for (int i = 13; i > 0; i--) sum = 1.0 + sum * r / i;
  return sum * aq_bits_double((aq_double_bits(magic) + 1023) << 52);
}

/* x normal and above 0 */
static inline double aq_log(double x) {
  uint64_t bits = aq_double_bits(x);
  int exponent = (int)(bits >> 52) - 1023;
  double m = aq_bits_double((bits & 0x000fffffffffffffu) | 0x3ff0000000000000u);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    exponent += 1;
  }
  const double s = (m - 1.0) / (m + 1.0), s2 = s * s;
  double sum = 0.0;
  for (int i = 23; i > 0; i -= 2) sum = sum * s2 + 1.0 / i;
  return exponent * AQ_LN2_HIGH + (exponent * AQ_LN2_LOW + 2.0 * s * sum);
}

/* Sine and cosine as polynomials in r^2 on [-pi/4, pi/4] (fdlibm). Written for numbers and for vectors
 * alike. */
#define AQ_SINE(r, r2)                                                                                              \
  ((r) + (r) * (r2) *                                                                                               \
             (-1.66666666666666324348e-01 +                                                                         \
              (r2) * (8.33333333332248946124e-03 +                                                                  \
                      (r2) * (-1.98412698298579493134e-04 +                                                         \
                              (r2) * (2.75573137070700676789e-06 +                                                  \
                                      (r2) * (-2.50507602534068634195e-08 + (r2) * 1.58969099521155010221e-10))))))
#define AQ_COSINE(r2)                                                                                               \
  (1.0 - 0.5 * (r2) +                                                                                               \
   (r2) * (r2) *                                                                                                    \
       (4.16666666666666019037e-02 +                                                                                \
        (r2) * (-1.38888888888741095749e-03 +                                                                       \
                (r2) * (2.48015872894767294178e-05 +                                                                \
                        (r2) * (-2.75573143513906633035e-07 +                                                       \
                                (r2) * (2.08757232129817482790e-09 + (r2) * -1.13596475577881948265e-11))))))

/* |x| up to 2^20 */
static inline void aq_sine_cosine(double x, double *sine, double *cosine) {
  const double magic = x * 0.63661977236758134308 + AQ_MAGIC, n = magic - AQ_MAGIC;
  const double r = ((x - n * AQ_HALF_PI_1) - n * AQ_HALF_PI_2) - n * AQ_HALF_PI_3, r2 = r * r;
  const double s = AQ_SINE(r, r2), c = AQ_COSINE(r2);
  const uint64_t quadrant = aq_double_bits(magic) & 3;
  *sine = quadrant & 1 ? c : s;
  *cosine = quadrant & 1 ? s : c;
  if (quadrant & 2) *sine = -*sine;
  if (quadrant == 1 || quadrant == 2) *cosine = -*cosine;
}

#endif
