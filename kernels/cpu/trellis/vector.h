/* trellis/vector.h: levels of trellis codes a block at a time, included once by each instruction set.
 *
 * Expected of the including file:
 *   AQ_LEVELS_FUNCTION: name of the function
 *   AQ_LEVELS: weights of a block, a multiple of 16, at most AQ_LEVELS_BEHIND + 1
 *   AQ_LEVELS_READ: bytes that block_levels reads
 *   level_table, load_table(): the table in registers, or where they do not hold it, nothing
 *   block_levels(table, from, levels): levels of the codes from byte from[1] on; from[0] is the byte before them
 */
#include "../packed.h"

aq_levels_function AQ_LEVELS_FUNCTION;

void AQ_LEVELS_FUNCTION(const uint8_t *row, size_t bytes, size_t col, size_t n, int8_t *levels) {
  const level_table table = load_table();
  for (size_t i = 0, at = col / 4; i < n; i += AQ_LEVELS, at += AQ_LEVELS / 4) {
    for (; at > 0 && i < n && at - 1 + AQ_LEVELS_READ <= bytes; i += AQ_LEVELS, at += AQ_LEVELS / 4)
      block_levels(table, row + at - 1, levels + i);
    if (i >= n) return;
    uint8_t part[AQ_LEVELS_READ] = {0}; /* zeros in front of the row, nothing read behind it */
    const size_t first = at == 0, from = at - !first;
    __builtin_memcpy(part + first, row + from, aq_min_size(sizeof part - first, bytes - from));
    block_levels(table, part, levels + i);
  }
}
