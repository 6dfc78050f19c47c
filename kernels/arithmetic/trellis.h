/* trellis.h: codes whose levels depend on the codes before them. The level of a weight is a table's entry for its
 * window, the 8 bits that end at its own two: its own code on top of the three before it, zeros in front of the row.
 *
 *     window = c[j] << 6 | c[j-1] << 4 | c[j-2] << 2 | c[j-3]       bits 2j - 6 .. 2j + 1 of the row's bit stream
 *     w = scale * (level / 32) + offset                             float32: the product is exact, the sum rounded
 *
 * A row's codes are chosen together: a weight has 256 levels for its two bits, and can still be read alone.
 *
 * The table is Lloyd's algorithm on Gaussian numbers (the best path for given levels, then every level the mean of
 * the numbers that took it), 256 float32 levels times 63 / the largest, to the nearest whole number. A level is then
 * 1 / 22.474 of the numbers' deviation; the best path's mean squared error on other Gaussian numbers of variance 1 is
 * 0.0797, 0.014 % more than that of the float32 levels, where 4 uniform levels have 0.1188 and no code of two bits
 * less than 0.0625. Levels up to 63 need 7 bits: two products with 8-bit numbers then fit 16. */
#ifndef AQ_TRELLIS_H
#define AQ_TRELLIS_H

#include "half.h"

#define AQ_TRELLIS_BITS 2          /* the width of codes there is */
#define AQ_TRELLIS_WINDOWS 256
#define AQ_TRELLIS_UNIT 0x1p-5f    /* of a level */

#define AQ_TRELLIS_LEVELS                                                                                        \
  26, 9, -38, -9, -7, 31, 10, -28, 19, -8, -23, 6, 23, -39, -13, 3, -4, 12, 33, -20, 3, -31, -11, 20, 41, 14,     \
  -19, -6, -14, -51, 1, 19, 13, 39, -15, -2, -3, -25, 34, 12, -14, 24, -40, 3, 0, -19, 19, -47, 12, -3, -21, 35,  \
  10, -4, 24, -27, 19, 1, -34, -12, 48, -25, -3, 14, 22, 5, -11, -38, 42, -19, -7, 12, 28, -34, 7, -11, 3, 26,    \
  -32, -14, 1, -16, 18, -35, 15, 49, -20, 0, -47, -15, -1, 17, -62, -19, 19, -1, 28, -8, -28, 10, 6, 22, -34,     \
  -11, -10, 5, 20, -40, 9, 35, -5, -22, 25, -32, 4, -13, 9, -4, 30, -27, -32, 6, 26, -7, 31, -2, -21, 11, 15,     \
  -2, -14, -63, -16, -44, 2, 20, 6, -9, -25, 30, -31, -7, 9, 28, -24, 16, -2, 40, -4, -18, 13, 43, -16, 58, 14,   \
  1, 27, -31, 7, -9, -35, -11, 4, 23, 41, -18, 15, -2, 2, -18, -48, 21, 9, -6, -27, 31, -3, -17, 49, 10, -2, 13,  \
  40, -15, -4, 15, -20, 34, -40, 8, -11, 27, 2, -38, 21, -15, 19, 4, -44, -12, -6, -25, 35, 10, -20, -2, 34, 11,  \
  62, 0, -19, 15, 23, -53, 2, -15, 11, -21, 35, -4, -32, 7, 26, -14, -15, 44, 14, -2, -28, -4, 7, 31, 27, -5, 6,  \
  -22, -17, 16, 56, 0, 1, -17, 46, 16, -14, -30, 21, 5, -29, -12, 3, 18, 21, -10, -29, 3

/* Window of weight `i` of a row whose packed bytes are `row`. */
AQ_FUNCTION uint32_t aq_trellis_window(const uint8_t *row, size_t i) {
  const uint32_t before = i < 4 ? 0 : row[i / 4 - 1], here = row[i / 4];
  return (before | here << 8) >> (2 * (i % 4) + 2) & 255;
}

/* A weight; only the sum is rounded. */
AQ_FUNCTION float aq_trellis_weight(int32_t level, float scale, float offset) {
  const float product = scale * AQ_TRELLIS_UNIT * (float)level;
  return product + offset;
}

#endif
