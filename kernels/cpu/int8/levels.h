/* int8/levels.h: one token on trellis codes whose levels are found in registers and never stored.
 *
 * Expected of the instruction set, where AQ_OWN_LEVELS is 1:
 *   trellis/levels/<set>.h
 *   level_x: type in which x is held, of a number that AQ_LEVEL_X(code, zero) makes of its code
 *   AQ_LEVEL_PLACE(i): where, in each 16 columns, x of number i of a vector of levels lies
 *   level_sums: products so far; level_dot(sums, levels, x), of four vectors of levels;
 *     level_total(sums, zero) */
#define AQ_LEVEL_COLS 64

#if !AQ_OWN_LEVELS
typedef uint8_t level_x;
#endif

typedef vi (*levels_function)(const uint8_t *row, size_t bytes, size_t at, const level_x *x, int32_t zero, size_t blocks,
                              size_t left);

#if AQ_OWN_LEVELS

/* Bytes of 64 codes, and of what is read for them with the byte before. */
#define AQ_CODES_BYTES(bits) (AQ_LEVEL_COLS / 8 * (bits))
#define AQ_CODES_READ(bits) ((bits) == 2 ? 17 : 26)

/* x in the order in which levels are found; behind the end it is the zero point. */
static void order_for_levels(const uint8_t *codes, size_t n, int32_t zero, int32_t bits, level_x *x) {
  for (size_t i = 0; i < (n + AQ_LEVEL_COLS - 1) / AQ_LEVEL_COLS * AQ_LEVEL_COLS; i++) {
    const size_t block = i / AQ_LEVEL_COLS * AQ_LEVEL_COLS, at = i % AQ_LEVEL_COLS;
    const size_t vector = bits == 2 ? at % 4 : at / 16, number = bits == 2 ? at / 4 : at % 16;
    x[block + vector * 16 + AQ_LEVEL_PLACE(number)] = (level_x)AQ_LEVEL_X(i < n ? codes[i] : zero, zero);
  }
}

AQ_INLINE void block_products(level_sums *sums, level_terms table, const uint8_t *from, const level_x *x, const int bits) {
  level_vector of[4];
  if (bits == 2) {
    levels_2(table, from, of);
  } else {
    levels_3(table, from, of);
    levels_3(table, from + 12, of + 2);
  }
  level_dot(sums, of, x);
}

/* The same at a row's ends: zeros in front of it, nothing read behind it. */
AQ_INLINE void end_products(level_sums *sums, level_terms table, const uint8_t *row, size_t bytes, size_t at,
                            const level_x *x, const int bits) {
  uint8_t part[AQ_CODES_READ(3)] = {0};
  const size_t first = at == 0, from = at - !first;
  __builtin_memcpy(part + first, row + from, aq_min_size(AQ_CODES_READ(bits) - first, bytes - from));
  block_products(sums, table, part, x, bits);
}

/* Products of x less its zero point with levels over AQ_W segments of `blocks` 64 columns, from byte `at` of
 * a row on, one in a lane; `left`: columns that are there. */
AQ_INLINE vi level_products(const uint8_t *row, size_t bytes, size_t at, const level_x *x, int32_t zero, size_t blocks,
                            size_t left, const int bits) {
  vi lanes[AQ_W];
  const level_terms table = load_terms(bits);
  for (int i = 0; i < AQ_W; i++) {
    level_sums sums = {0};
    size_t count = aq_min_size(blocks, (left + AQ_LEVEL_COLS - 1) / AQ_LEVEL_COLS);
    left -= aq_min_size(left, blocks * AQ_LEVEL_COLS);
    if (count > 0 && at == 0) {
      end_products(&sums, table, row, bytes, at, x, bits);
      count--, at += AQ_CODES_BYTES(bits), x += AQ_LEVEL_COLS;
    }
    for (; count > 0 && at - 1 + AQ_CODES_READ(bits) <= bytes; count--, at += AQ_CODES_BYTES(bits), x += AQ_LEVEL_COLS) {
      __builtin_prefetch(row + at + AQ_AHEAD);
      block_products(&sums, table, row + at - 1, x, bits);
    }
    if (count > 0) { /* the row's last */
      end_products(&sums, table, row, bytes, at, x, bits);
      at += AQ_CODES_BYTES(bits), x += AQ_LEVEL_COLS;
    }
    lanes[i] = level_total(&sums, zero);
  }
  return v_add_neighbours(v_add_neighbours(lanes[0], lanes[1]), v_add_neighbours(lanes[2], lanes[3]));
}

#define AQ_LEVEL_PRODUCTS(bits)                                                                                      \
  static vi level_products_##bits(const uint8_t *row, size_t bytes, size_t at, const level_x *x, int32_t zero,       \
                                  size_t blocks, size_t left) {                                                      \
    return level_products(row, bytes, at, x, zero, blocks, left, bits);                                              \
  }
AQ_LEVEL_PRODUCTS(2)
AQ_LEVEL_PRODUCTS(3)
#else
static const levels_function level_products_2 = 0, level_products_3 = 0; /* never called */
AQ_INLINE void order_for_levels(const uint8_t *codes, size_t n, int32_t zero, int32_t bits, level_x *x) {
  (void)codes, (void)n, (void)zero, (void)bits, (void)x;
}
#endif
