/* trellis/tables.c: levels of trellis codes out of tables of several at once, for instruction sets whose byte
 * shuffles reach few entries. */
#include "../packed.h"

/* Levels by the bits of some codes and the six before them: of 2 bits the four codes of a byte, of 3 two
 * codes. The first caller fills them, and those that come meanwhile do without. */
static uint32_t fours[1 << 14];
static uint16_t pairs[1 << 12];
enum { EMPTY, FILLING, FILLED };
static int state;

static int fill_tables(void) {
  int expected = EMPTY;
  if (!__atomic_compare_exchange_n(&state, &expected, FILLING, 0, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE)) return expected == FILLED;
  for (uint32_t window = 0; window < 1 << 14; window++)
    for (uint32_t i = 0; i < 4; i++)
      fours[window] |= (uint32_t)(uint8_t)aq_trellis_levels_2[window >> 2 * i & 255] << 8 * i;
  for (uint32_t window = 0; window < 1 << 12; window++)
    for (uint32_t i = 0; i < 2; i++)
      pairs[window] |= (uint16_t)((uint32_t)(uint8_t)aq_trellis_levels_3[window >> 3 * i & 511] << 8 * i);
  __atomic_store_n(&state, FILLED, __ATOMIC_RELEASE);
  return 1;
}

AQ_INLINE int tables_filled(void) { return __atomic_load_n(&state, __ATOMIC_ACQUIRE) == FILLED || fill_tables(); }

AQ_INLINE uint32_t load_16(const uint8_t *from) {
  uint16_t v;
  __builtin_memcpy(&v, from, 2);
  return v;
}

aq_levels_function aq_levels_2_scalar, aq_levels_3_scalar, aq_levels_2_tables, aq_levels_3_tables;

void aq_levels_2_tables(const uint8_t *row, size_t bytes, size_t col, size_t n, int8_t *levels) {
  if (!tables_filled()) {
    aq_levels_2_scalar(row, bytes, col, n, levels);
    return;
  }
  const uint8_t *from = row + col / 4;
  const int8_t *end = levels + n;
  if (col == 0) {
    __builtin_memcpy(levels, &fours[*from++ << 6], 4);
    levels += 4;
  }
#pragma GCC unroll 4
  for (; levels < end; levels += 4) __builtin_memcpy(levels, &fours[load_16(from++ - 1) >> 2], 4);
}

/* Levels of the eight codes of three bytes that lie above the one before them. */
AQ_INLINE void store_eight(uint32_t bytes, int8_t *levels) {
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) __builtin_memcpy(levels + 2 * k, &pairs[bytes >> (6 * k + 2) & 4095], 2);
}

void aq_levels_3_tables(const uint8_t *row, size_t bytes, size_t col, size_t n, int8_t *levels) {
  if (!tables_filled()) {
    aq_levels_3_scalar(row, bytes, col, n, levels);
    return;
  }
  for (size_t i = 0, at = col / 8 * 3; i < n; i += 8, at += 3) {
    uint32_t window = 0;
    for (; at > 0 && at + 3 <= bytes && i < n; i += 8, at += 3) {
      __builtin_memcpy(&window, row + at - 1, 4);
      store_eight(window, levels + i);
    }
    if (i >= n) return;
    const size_t before = at > 0; /* zeros in front of the row, nothing read behind it */
    uint8_t part[4] = {0};
    __builtin_memcpy(part + 1 - before, row + at - before, before + aq_min_size(3, bytes - at));
    __builtin_memcpy(&window, part, 4);
    store_eight(window, levels + i);
  }
}
