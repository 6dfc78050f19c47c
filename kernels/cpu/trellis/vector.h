/* trellis/vector.h: levels of trellis codes a block at a time, included by each instruction set once for each
 * width.
 *
 * Expected of the including file:
 *   AQ_LEVELS_FUNCTION: name of the function
 *   AQ_LEVELS_BITS: of a code, 2 or 3
 *   AQ_LEVELS: weights of a block, a multiple of 16, at most AQ_LEVELS_BEHIND + 1
 *   AQ_LEVELS_READ: bytes that AQ_BLOCK_LEVELS reads
 *   AQ_LEVELS_TABLE, AQ_LOAD_TABLE(): the table in registers, or where they do not hold it, nothing
 *   AQ_BLOCK_LEVELS(table, from, levels): levels of the codes from byte from[1] on; from[0] is the byte
 *   before them */
#include "../packed.h"

aq_levels_function AQ_LEVELS_FUNCTION;

void AQ_LEVELS_FUNCTION(const uint8_t *row, size_t bytes, size_t col, size_t n, int8_t *levels) {
  enum { STEP = AQ_LEVELS / 8 * AQ_LEVELS_BITS };
  const AQ_LEVELS_TABLE table = AQ_LOAD_TABLE();
  for (size_t i = 0, at = col / 8 * AQ_LEVELS_BITS; i < n; i += AQ_LEVELS, at += STEP) {
    for (; at > 0 && i < n && at - 1 + AQ_LEVELS_READ <= bytes; i += AQ_LEVELS, at += STEP)
      AQ_BLOCK_LEVELS(table, row + at - 1, levels + i);
    if (i >= n) return;
    uint8_t part[AQ_LEVELS_READ] = {0}; /* zeros in front of the row, nothing read behind it */
    const size_t first = at == 0, from = at - !first;
    __builtin_memcpy(part + first, row + from, aq_min_size(sizeof part - first, bytes - from));
    AQ_BLOCK_LEVELS(table, part, levels + i);
  }
}

#undef AQ_LEVELS_FUNCTION
#undef AQ_LEVELS_BITS
#undef AQ_LEVELS_READ
#undef AQ_LEVELS_TABLE
#undef AQ_LOAD_TABLE
#undef AQ_BLOCK_LEVELS
