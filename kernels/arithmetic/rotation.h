/* rotation.h: what a rotation multiplies by, for every library. */
#ifndef AQ_ROTATION_H
#define AQ_ROTATION_H

#include "group.h"

/* Rows of a block: the largest power of two that divides all. */
AQ_FUNCTION size_t aq_rotation_block(size_t rows) { return rows & (~rows + 1); }

/* What undoes the growth of a block's sums. */
AQ_FUNCTION float aq_rotation_length(size_t block) {
  float length = 1;
  for (; block > 2; block /= 4) length /= 2;
  return block == 2 ? length * 0x1.6a09e6p-1f : length;
}

/* The factor of value i: its sign, from a hash of i and the seed, times `length`. */
AQ_FUNCTION float aq_rotation_factor(uint32_t seed, size_t i, float length) {
  uint32_t hash = (uint32_t)i * 0x9e3779b1u + seed;
  hash = (hash ^ hash >> 16) * 0x85ebca6bu;
  hash = (hash ^ hash >> 13) * 0xc2b2ae35u;
  return (hash ^ hash >> 16) >> 31 ? -length : length;
}

#endif
