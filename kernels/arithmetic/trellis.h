/* trellis.h: codes whose levels depend on the codes before them. The level of a weight depends on
 * its window, its own code on top of the six bits before it, which are three codes of 2 bits or two of 3;
 * zeros in front of the row.
 *
 *     2 bits: window = c[j] << 6 | c[j-1] << 4 | c[j-2] << 2 | c[j-3]    bits 2j - 6 .. 2j + 1 of the row
 *     3 bits: window = c[j] << 6 | c[j-1] << 3 | c[j-2]                  bits 3j - 6 .. 3j + 2
 *     w = scale * (level / 32) + offset     float32: the product is exact, the sum rounded
 *
 * A row's codes are chosen together: a weight has 256 levels for its two bits or 512 for three, and can still
 * be read alone.
 *
 * The level of a window is the sum of two terms, each one of sixteen, so that two byte shuffles find it:
 *
 *     level = first[window >> 2 & 15] + second[(window ^ window >> 2 ^ window >> (bits + 2)) & 15]
 *
 * The second place mixes bits of all codes of the window. Terms are trained by Lloyd's algorithm on Gaussian
 * numbers (bench/trellis_table.c): the best paths for given levels, then the terms by least squares over the
 * numbers that took each window, the numbers with other signs among them, so that the level of a window is
 * that of its complement with the other sign. They are then rounded to whole numbers; `deviation` of them are
 * that of the numbers. Mean squared errors of the best path on other Gaussian numbers of variance 1, where no
 * code of so many bits has less than the bound:
 *
 *     bits   deviation   error    a level of its own for each window   uniform levels   bound
 *     2      24.50       0.0763   0.0767                               0.1188           0.0625
 *     3      20.08       0.0199   0.0199                               0.0374           0.0156
 *
 * Levels up to 63 need 7 bits: two products with 8-bit numbers then fit 16. */
#ifndef AQ_TRELLIS_H
#define AQ_TRELLIS_H

#include "half.h"

#define AQ_TRELLIS_BEFORE 6 /* bits of the codes before its own that a window holds */
#define AQ_TRELLIS_WINDOWS(bits) ((size_t)1 << (AQ_TRELLIS_BEFORE + (bits)))
#define AQ_TRELLIS_UNIT 0x1p-5f /* of a level */

AQ_FUNCTION int aq_trellis_bits_allowed(int32_t bits) { return bits == 2 || bits == 3; }

/* Places of a window's two terms. */
AQ_FUNCTION uint32_t aq_trellis_first(uint32_t window) { return window >> 2 & 15; }
AQ_FUNCTION uint32_t aq_trellis_second(uint32_t window, int32_t bits) {
  return (window ^ window >> 2 ^ window >> (bits + 2)) & 15;
}

/* The sixteen first terms, then the sixteen second ones. */
#define AQ_TRELLIS_TERMS_2 \
  7, -29, -17, 13, 0, 12, -5, -2, 2, 5, -12, 0, -13, 17, 29, -7, \
  -9, -31, 9, 34, 8, 28, -7, -27, 27, 7, -28, -8, -34, -9, 31, 9
#define AQ_TRELLIS_TERMS_3 \
  -8, -6, 1, 1, -4, -5, -27, 14, -14, 27, 5, 4, -1, -1, 6, 8, \
  11, 3, -36, 20, 29, -19, -11, -3, 3, 11, 19, -29, -20, 36, -3, -11

#define AQ_TRELLIS_LEVELS_2 \
  -2, -24, 16, 41, -1, -21, -56, -36, -45, -25, 10, -10, 22, 44, 4, -21, 28, 8, -27, -7, 3, -19, 21, \
  46, 4, 26, -14, -39, -30, -10, 25, 5, -26, -6, 29, 9, 14, 36, -4, -29, -21, -43, -3, 22, 28, 8, -27, \
  -7, -4, 18, -22, -47, -11, 9, 44, 24, 57, 37, 2, 22, -16, -38, 2, 27, 15, 35, 0, -20, -60, -38, 5, \
  -20, 14, -8, -51, -26, 5, -15, 20, 40, -31, -9, 34, 9, 20, 40, 5, -15, -13, -33, 2, 22, 29, 7, -36, \
  -11, 33, 11, -32, -7, -3, -23, 12, 32, -4, 16, -19, -39, -31, -9, 34, 9, -21, -41, -6, 14, 48, 26, \
  -17, 8, -2, 20, 63, 38, 1, 21, -14, -34, 34, 14, -21, -1, -38, -63, -20, 2, -8, 17, -26, -48, -14, 6, \
  41, 21, -9, -34, 9, 31, 39, 19, -16, 4, -32, -12, 23, 3, 7, 32, -11, -33, 11, 36, -7, -29, -22, -2, \
  33, 13, 15, -5, -40, -20, -9, -34, 9, 31, -40, -20, 15, -5, 26, 51, 8, -14, 20, -5, 38, 60, 20, 0, \
  -35, -15, -27, -2, 38, 16, -22, -2, -37, -57, -24, -44, -9, 11, 47, 22, -18, 4, 7, 27, -8, -28, -22, \
  3, 43, 21, 29, 4, -36, -14, -9, -29, 6, 26, -5, -25, 10, 30, 39, 14, -26, -4, -46, -21, 19, -3, 7, \
  27, -8, -28, 21, -4, -44, -22, 10, -10, 25, 45, 36, 56, 21, 1, -41, -16, 24, 2

#define AQ_TRELLIS_LEVELS_3 \
  3, -5, -44, 12, -25, 23, -9, -17, 20, -28, 4, 12, -10, -2, 37, -19, 25, -23, -15, -7, -2, 6, 15, -41, \
  -30, -38, -47, 9, -15, 33, 25, 17, -3, -11, -43, 5, 7, 63, 24, 16, 25, -31, 8, 16, -7, 1, 33, -15, \
  35, -21, -12, -4, 2, 10, 18, -30, 3, -5, -13, 35, -28, 28, 19, 11, -44, 12, 3, -5, -9, -17, -25, 23, \
  4, 12, 20, -28, 37, -19, -10, -2, -15, -7, 25, -23, 15, -41, -2, 6, -47, 9, -30, -38, 25, 17, -15, \
  33, -43, 5, -3, -11, 24, 16, 7, 63, 8, 16, 25, -31, 33, -15, -7, 1, -12, -4, 35, -21, 18, -30, 2, 10, \
  -13, 35, 3, -5, 19, 11, -28, 28, 21, -27, -19, -11, -3, 5, 14, -42, -2, -10, -19, 37, -28, 20, 12, 4, \
  7, -1, -40, 16, -24, 24, -8, -16, -8, -56, -24, -16, 3, 11, 50, -6, 22, -34, -25, -17, 30, 38, 46, \
  -2, 2, -6, -14, 34, -32, 24, 15, 7, 10, 2, -30, 18, -21, 35, -4, -12, 26, -30, 9, 17, -3, 5, 37, -11, \
  -19, -11, 21, -27, 14, -42, -3, 5, -19, 37, -2, -10, 12, 4, -28, 20, -40, 16, 7, -1, -8, -16, -24, \
  24, -24, -16, -8, -56, 50, -6, 3, 11, -25, -17, 22, -34, 46, -2, 30, 38, -14, 34, 2, -6, 15, 7, -32, \
  24, -30, 18, 10, 2, -4, -12, -21, 35, 9, 17, 26, -30, 37, -11, -3, 5, -5, 3, 11, -37, 30, -26, -17, \
  -9, -35, 21, 12, 4, -2, -10, -18, 30, -24, 32, -7, -15, 6, -2, -34, 14, -38, -30, 2, -46, 34, -22, \
  17, 25, -11, -3, 6, -50, 56, 8, 16, 24, -24, 24, 16, 8, 1, -7, -16, 40, -20, 28, -4, -12, 10, 2, -37, \
  19, -5, 3, 42, -14, 27, -21, 11, 19, 11, -37, -5, 3, -17, -9, 30, -26, 12, 4, -35, 21, -18, 30, -2, \
  -10, -7, -15, -24, 32, -34, 14, 6, -2, 2, -46, -38, -30, 17, 25, 34, -22, 6, -50, -11, -3, 16, 24, \
  56, 8, 16, 8, -24, 24, -16, 40, 1, -7, -4, -12, -20, 28, -37, 19, 10, 2, 42, -14, -5, 3, 11, 19, 27, \
  -21, -28, 28, -11, -19, 5, -3, -35, 13, -10, -2, 30, -18, 21, -35, 4, 12, -1, 7, 15, -33, 31, -25, \
  -16, -8, -63, -7, -16, -24, 11, 3, -5, 43, -33, 15, -17, -25, 38, 30, -9, 47, -6, 2, 41, -15, 23, \
  -25, 7, 15, 2, 10, 19, -37, 28, -20, -12, -4, -23, 25, 17, 9, 5, -3, -12, 44, -11, -19, -28, 28, -35, \
  13, 5, -3, 30, -18, -10, -2, 4, 12, 21, -35, 15, -33, -1, 7, -16, -8, 31, -25, -16, -24, -63, -7, -5, \
  43, 11, 3, -17, -25, -33, 15, -9, 47, 38, 30, 41, -15, -6, 2, 7, 15, 23, -25, 19, -37, 2, 10, -12, \
  -4, 28, -20, 17, 9, -23, 25, -12, 44, 5, -3

/* Window of weight `i` of a row whose packed bytes are `row`. */
AQ_FUNCTION uint32_t aq_trellis_window(const uint8_t *row, size_t i, int32_t bits) {
  const size_t last = (i + 1) * (size_t)bits - 1, byte = last / 8; /* of its own highest bit */
  const uint32_t stream = (byte > 1 ? row[byte - 2] : 0u) | (byte > 0 ? row[byte - 1] : 0u) << 8 | (uint32_t)row[byte] << 16;
  return stream >> (17 + last % 8 - AQ_TRELLIS_BEFORE - (size_t)bits) & (AQ_TRELLIS_WINDOWS(bits) - 1);
}

/* A weight; only the sum is rounded. */
AQ_FUNCTION float aq_trellis_weight(int32_t level, float scale, float offset) {
  const float product = scale * AQ_TRELLIS_UNIT * (float)level;
  return product + offset;
}

#endif
