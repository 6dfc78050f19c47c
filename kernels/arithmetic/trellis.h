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
#define AQ_LEVEL_ZERO 64 /* a level and this are above 0, and below 128 */

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

/* Level of a window; `terms` are those of its bits. */
AQ_FUNCTION int32_t aq_trellis_level_of(const int8_t *terms, uint32_t window, int32_t bits) {
  return terms[aq_trellis_first(window)] + terms[16 + aq_trellis_second(window, bits)];
}

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
