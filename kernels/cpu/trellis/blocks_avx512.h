/* trellis/blocks_avx512.h: levels of trellis codes, 64 at a time.
 *
 * Expected of the including file: levels/avx512.h; AQ_NAMED(function) */
AQ_INLINE level_table load_table_2(void) { return load_more(2, 0); }
AQ_INLINE level_table load_table_3(void) { return load_more(3, 0); }

AQ_INLINE void block_levels_2(level_table table, const uint8_t *from, int8_t *levels) {
  _mm512_storeu_si512(levels, levels_of(2, table, _mm256_loadu_si256((const __m256i *)(const void *)from)));
}

AQ_INLINE void block_levels_3(level_table table, const uint8_t *from, int8_t *levels) {
  _mm512_storeu_si512(levels, levels_of(3, table, _mm256_loadu_si256((const __m256i *)(const void *)from)));
}

#define AQ_LEVELS 64
#define AQ_LEVELS_FUNCTION AQ_NAMED(aq_levels_2)
#define AQ_LEVELS_BITS 2
#define AQ_LEVELS_READ 32
#define AQ_LEVELS_TABLE level_table
#define AQ_LOAD_TABLE load_table_2
#define AQ_BLOCK_LEVELS block_levels_2
#include "vector.h"

#define AQ_LEVELS_FUNCTION AQ_NAMED(aq_levels_3)
#define AQ_LEVELS_BITS 3
#define AQ_LEVELS_READ 32
#define AQ_LEVELS_TABLE level_table
#define AQ_LOAD_TABLE load_table_3
#define AQ_BLOCK_LEVELS block_levels_3
#include "vector.h"
