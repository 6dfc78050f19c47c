/* trellis.h: codes whose levels depend on the codes before them. The level of a weight is a table's entry for
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
 * Each table is Lloyd's algorithm on Gaussian numbers (bench/trellis_table.c): the best paths for given
 * levels, then every level the mean of the numbers that took it, the numbers with other signs among them, so
 * that the level of a window is that of its complement with the other sign, and half of the table holds all.
 * Its float32 levels times 63 / the largest are rounded to whole numbers; `deviation` of them are that of the
 * numbers. Mean squared errors of the best path on other Gaussian numbers of variance 1, where no code of so
 * many bits has less than the bound:
 *
 *     bits   deviation   error    uniform levels   bound
 *     2      21.89       0.0767   0.1188           0.0625
 *     3      18.07       0.0199   0.0374           0.0156
 *
 * Rounding takes less than 0.5 %. Levels up to 63 need 7 bits: two products with 8-bit numbers then fit
 * 16. */
#ifndef AQ_TRELLIS_H
#define AQ_TRELLIS_H

#include "half.h"

#define AQ_TRELLIS_BEFORE 6 /* bits of the codes before its own that a window holds */
#define AQ_TRELLIS_WINDOWS(bits) ((size_t)1 << (AQ_TRELLIS_BEFORE + (bits)))
#define AQ_TRELLIS_UNIT 0x1p-5f /* of a level */

AQ_FUNCTION int aq_trellis_bits_allowed(int32_t bits) { return bits == 2 || bits == 3; }

#define AQ_TRELLIS_LEVELS_2                                                                                      \
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

#define AQ_TRELLIS_LEVELS_3                                                                                    \
  -8, 38, 24, -2, -15, 15, -21, 8, 3, -4, 2, -7, 11, -12, -20, -33, -9, -27, -3, 28, 8, -17, -1, -47, -18, 4,  \
  -11, 16, 9, -6, 25, 0, -35, 19, 3, 10, -4, 27, -11, -21, 15, 14, 25, -14, 22, 34, 6, 0, -11, -29, -49, 25,   \
  14, -18, 4, -5, -17, 45, -2, 4, 22, 14, -10, -30, 10, 18, 43, 2, 24, 34, 15, -8, 13, -21, 38, 26, 5, 16,     \
  -2, 20, -31, 7, -23, 19, -15, -2, 35, -9, 43, -20, 31, 20, -32, 5, 14, 24, -8, 12, -21, 6, -38, -14, 3, -3,  \
  2, -17, -4, -63, 32, 15, 10, -11, 16, 12, -10, 1, -6, -26, -20, 7, 25, 2, 16, -32, -52, 8, -4, 33, -42, 28,  \
  3, 13, -8, 22, 40, -17, -2, 4, -25, -19, -12, 29, -6, -8, 19, -17, 26, -1, -10, 13, 5, -25, 12, -9, -20,     \
  -30, 3, -10, -3, -15, 22, -4, -1, -13, 12, 5, -20, 33, -6, -9, -21, -26, 9, -14, 2, 55, 1, -5, 21, -17, 36,  \
  -11, 12, -7, -2, 30, 9, -43, -23, -15, 4, -5, -24, -17, -3, 39, 16, 1, 8, -10, -14, 13, -40, 0, -19, -5,     \
  -30, -23, 8, 15, -9, -16, 1, 5, -7, 26, -25, 21, 2, 11, 28, -17, 8, -6, -16, 30, -10, 20, -27, 12, -4, 5,    \
  34, -24, 9, 5, -10, -4, -2, 19, -35, -13, -1, -24, -16, 10, -7, 47, 3, -28, -10, -4, 37, -11, 12, -19, 19,   \
  -12, 11, -37, 4, 10, 28, -3, -47, 7, -10, 16, 24, 1, 13, 35, -19, 2, 4, 10, -5, -9, 24, -34, -5, 4, -12,     \
  27, -20, 10, -30, 16, 6, -8, 17, -28, -11, -2, -21, 25, -26, 7, -5, -1, 16, 9, -15, -8, 23, 30, 5, 19, 0,    \
  40, -13, 14, 10, -8, -1, -16, -39, 3, 17, 24, 5, -4, 15, 23, 43, -9, -30, 2, 7, -12, 11, -36, 17, -21, 5,    \
  -1, -55, -2, 14, -9, 26, 21, 9, 6, -33, 20, -5, -12, 13, 1, 4, -22, 15, 3, 10, -3, 30, 20, 9, -12, 25, -5,   \
  -13, 10, 1, -26, 17, -19, 8, 6, -29, 12, 19, 25, -4, 2, 17, -40, -22, 8, -13, -3, -28, 42, -33, 4, -8, 52,   \
  32, -16, -2, -25, -7, 20, 26, 6, -1, 10, -12, -16, 11, -10, -15, -32, 63, 4, 17, -2, 3, -3, 14, 38, -6, 21,  \
  -12, 8, -24, -14, -5, 32, -20, -31, 20, -43, 9, -35, 2, 15, -19, 23, -7, 31, -20, 2, -16, -5, -26, -38, 21,  \
  -13, 8, -15, -34, -24, -2, -43, -18, -10, 30, 10, -14, -22, -4, 2, -45, 17, 5, -4, 18, -14, -25, 49, 29,     \
  11, 0, -6, -34, -22, 14, -25, -14, -15, 21, 11, -27, 4, -10, -3, -19, 35, 0, -25, 6, -9, -16, 11, -4, 18,    \
  47, 1, 17, -8, -28, 3, 27, 9, 33, 20, 12, -11, 7, -2, 4, -3, -8, 21, -15, 15, 2, -24, -38, 8

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
