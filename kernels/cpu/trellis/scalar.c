/* trellis/scalar.c: the levels of trellis codes one by one: the oracle. */
#include "../packed.h"

_Alignas(16) const int8_t aq_trellis_terms[2][32] = {{AQ_TRELLIS_TERMS_2}, {AQ_TRELLIS_TERMS_3}};

aq_levels_function aq_levels_2_scalar, aq_levels_3_scalar;

void aq_levels_2_scalar(const uint8_t *row, size_t bytes, size_t col, size_t n, int8_t *levels) {
  (void)bytes;
  for (size_t i = 0; i < n; i++) levels[i] = (int8_t)aq_trellis_level(row, col + i, 2);
}

void aq_levels_3_scalar(const uint8_t *row, size_t bytes, size_t col, size_t n, int8_t *levels) {
  (void)bytes;
  for (size_t i = 0; i < n; i++) levels[i] = (int8_t)aq_trellis_level(row, col + i, 3);
}
