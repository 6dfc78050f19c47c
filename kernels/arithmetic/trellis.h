/* trellis.h: codes whose levels depend on the codes before them. The level of a weight is a table's entry for its
 * window, the 8 bits that end at its own two: its own code on top of the three before it, zeros in front of the row.
 *
 *     window = c[j] << 6 | c[j-1] << 4 | c[j-2] << 2 | c[j-3]       bits 2j - 6 .. 2j + 1 of the row's bit stream
 *     w = scale * (level / 32) + offset                             float32: the product is exact, the sum rounded
 *
 * A row's codes are chosen together: a weight has 256 levels for its two bits, and can still be read alone.
 *
 * The table is Lloyd's algorithm on Gaussian numbers: the best paths for given levels, then every level the mean of the
 * numbers that took it, the numbers with other signs among them, so that the level of a window is that of its complement
 * with the other sign, and half of the table holds all. Its float32 levels times 63 / the largest are rounded to whole
 * numbers, 21.89 of them the numbers' deviation. The best path's mean squared error on other Gaussian numbers of
 * variance 1 is 0.0767, 0.003 % more than that of the float32 levels; 4 uniform levels have 0.1188, and no code of two
 * bits less than 0.0625. Levels up to 63 need 7 bits: two products with 8-bit numbers then fit 16. */
#ifndef AQ_TRELLIS_H
#define AQ_TRELLIS_H

#include "half.h"

#define AQ_TRELLIS_BITS 2          /* the width of codes there is */
#define AQ_TRELLIS_WINDOWS 256
#define AQ_TRELLIS_UNIT 0x1p-5f    /* of a level */

#define AQ_TRELLIS_LEVELS                                                                                        \
  9, -7, 42, -21, 5, -16, -29, 23, 0, 46, 22, -25, 25, 9, -16, -2, 19, 1, -15, 21, -19, 2, 44, 19, -45, -28, -3,  \
  15, 5, 15, 35, -12, -24, 21, -7, 6, -6, -34, 4, 4, 10, -19, 28, -2, -3, -19, 16, 33, -28, 35, 11, -6, -1, 20,   \
  -12, -43, 15, 4, -12, -26, -4, 13, 30, -31, -8, 5, 20, 47, -24, -4, 27, 5, -63, 27, -7, 13, -29, -50, 15, -15,  \
  -6, 35, -36, -12, 19, 21, -14, 3, 15, -11, 12, -11, -17, -5, 7, -36, -6, 60, -27, 35, -38, 17, -12, 14, 22,     \
  -5, 10, -43, 32, 0, -18, -2, -10, 1, -29, 13, 11, -10, 5, 28, 34, -10, -32, 9, 49, -2, -22, 26, -26, 22, 2,     \
  -49, -9, 32, 10, -34, -28, -5, 10, -11, -13, 29, -1, 10, 2, 18, 0, -32, 43, -10, 5, -22, -14, 12, -17, 38,      \
  -35, 27, -60, 6, 36, -7, 5, 17, 11, -12, 11, -15, -3, 14, -21, -19, 12, 36, -35, 6, 15, -15, 50, 29, -13, 7,    \
  -27, 63, -5, -27, 4, 24, -47, -20, -5, 8, 31, -30, -13, 4, 26, 12, -4, -15, 43, 12, -20, 1, 6, -11, -35, 28,    \
  -33, -16, 19, 3, 2, -28, 19, -10, -4, -4, 34, 6, -6, 7, -21, 24, 12, -35, -15, -5, -15, 3, 28, 45, -19, -44,    \
  -2, 19, -21, 15, -1, -19, 2, 16, -9, -25, 25, -22, -46, 0, -23, 29, 16, -5, 21, -42, 7, -9

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
