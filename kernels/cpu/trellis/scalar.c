/* trellis/scalar.c: the levels of trellis codes one by one: the oracle. */
#include "../packed.h"

_Alignas(64) const int8_t aq_trellis_levels[AQ_TRELLIS_WINDOWS] = {AQ_TRELLIS_LEVELS};

aq_levels_function aq_levels_scalar;

void aq_levels_scalar(const uint8_t *row, size_t bytes, size_t col, size_t n, int8_t *levels) {
  (void)bytes;
  for (size_t i = 0; i < n; i++) levels[i] = aq_trellis_levels[aq_trellis_window(row, col + i)];
}
