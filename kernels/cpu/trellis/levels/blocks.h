/* trellis/levels/blocks.h: levels of trellis codes in the order of the columns, with vectors of 128 bits.
 *
 * Expected of the including file, as trellis/levels/<set>.h has them: level_vector, level_terms, load_terms,
 * levels_2, levels_3, store_in_turn, store_levels; AQ_LEVELS_NAMED(function) */
AQ_INLINE level_terms load_terms_2(void) { return load_terms(2); }
AQ_INLINE level_terms load_terms_3(void) { return load_terms(3); }

AQ_INLINE void block_levels_2(level_terms table, const uint8_t *from, int8_t *levels) {
  level_vector of[4];
  levels_2(table, from, of);
  store_in_turn(levels, of);
}

AQ_INLINE void block_levels_3(level_terms table, const uint8_t *from, int8_t *levels) {
  level_vector of[2];
  levels_3(table, from, of);
  store_levels(levels, of[0]);
  store_levels(levels + 16, of[1]);
}

#define AQ_LEVELS 64
#define AQ_LEVELS_FUNCTION AQ_LEVELS_NAMED(aq_levels_2)
#define AQ_LEVELS_BITS 2
#define AQ_LEVELS_READ 17
#define AQ_LEVELS_TABLE level_terms
#define AQ_LOAD_TABLE load_terms_2
#define AQ_BLOCK_LEVELS block_levels_2
#include "../vector.h"

#undef AQ_LEVELS
#define AQ_LEVELS 32
#define AQ_LEVELS_FUNCTION AQ_LEVELS_NAMED(aq_levels_3)
#define AQ_LEVELS_BITS 3
#define AQ_LEVELS_READ 14
#define AQ_LEVELS_TABLE level_terms
#define AQ_LOAD_TABLE load_terms_3
#define AQ_BLOCK_LEVELS block_levels_3
#include "../vector.h"
