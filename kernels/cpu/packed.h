/* packed.h: packed matrices, their sizes, and the checks that every family's functions make. */
#ifndef AQ_PACKED_H
#define AQ_PACKED_H

#include "../arithmetic/sizes.h"
#include "../arithmetic/trellis.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed words are little-endian, and so must the processor be"
#endif

#define AQ_INLINE static inline __attribute__((always_inline))

AQ_INLINE size_t aq_min_size(size_t a, size_t b) { return a < b ? a : b; }

/* Two-level scales of a packed matrix (arithmetic/two_level.h), or its half floats with AQ_OFFSET_BITS;
 * scale_bits 0: it has plain ones. */
typedef struct {
  int32_t scale_bits;
  const uint8_t *sub_scale, *sub_min;
  const uint16_t *super_scale, *super_min;
  size_t super_groups; /* groups of a superblock */
  size_t supers;       /* superblocks of a row */
  size_t sub_bytes;    /* bytes of a row's sub-scales */
} aq_two_level_view;

/* levels[0..n) = those of columns [col, col + n) of a row of trellis codes, col a multiple of 16. Reads
 * nothing behind the row's packed bytes, and may write up to AQ_LEVELS_BEHIND numbers behind the last. */
typedef void aq_levels_function(const uint8_t *row, size_t bytes, size_t col, size_t n, int8_t *levels);
#define AQ_LEVELS_BEHIND 127
extern const int8_t aq_trellis_terms[2][32]; /* of 2 and of 3 bits */

/* Level of weight `i` of a row, one by one. */
static inline int32_t aq_trellis_level(const uint8_t *row, size_t i, int32_t bits) {
  return aq_trellis_level_of(aq_trellis_terms[bits - 2], aq_trellis_window(row, i, bits), bits);
}

typedef struct {
  const uint32_t *packed;
  const uint16_t *scale;
  const uint16_t *zero_point; /* null when symmetric; the offsets of trellis codes */
  aq_levels_function *levels; /* null: not trellis codes */
  size_t cols;
  int32_t bits;
  size_t group_size;
  size_t groups;
  size_t words;
  int32_t stream; /* the result is larger than any cache: store past them */
  aq_two_level_view two_level;
} aq_packed_view;

int aq_three_counts_allowed(size_t a, size_t b, size_t c);
int aq_column_weights_allowed(const float *weights, size_t cols); /* null: all ones */

/* A view of the arguments, checked. */
int32_t aq_view_packed(const uint32_t *packed, const uint16_t *scale, const uint16_t *zero_point, size_t rows,
                       size_t cols, int32_t bits, size_t group_size, aq_packed_view *view);
/* Trellis codes, whose levels those of `levels` read that are for their bits, 2 or 3. */
int32_t aq_view_trellis(const uint32_t *packed, const uint16_t *scale, const uint16_t *offset, size_t rows, size_t cols,
                        int32_t bits, size_t group_size, aq_levels_function *const levels[2], aq_packed_view *view);
int32_t aq_view_two_level(const uint32_t *packed, const uint8_t *sub_scale, const uint8_t *sub_min,
                          const uint16_t *super_scale, const uint16_t *super_min, size_t rows, size_t cols,
                          int32_t bits, size_t group_size, int32_t scale_bits, aq_packed_view *view);

/* Sub-code `i` of a row's bytes. */
static inline uint32_t aq_read_sub_code(const uint8_t *stream, size_t i, int32_t bits) {
  const size_t bit = i * (size_t)bits, byte = bit >> 3, shift = bit & 7;
  uint32_t code = stream[byte] >> shift;
  if (shift + (size_t)bits > 8) code |= (uint32_t)stream[byte + 1] << (8 - shift);
  return code & ((1u << bits) - 1);
}

/* Scale and minimum of group `group` of a row: w = scale * q - minimum. */
static inline void aq_two_level_grid(const aq_packed_view *view, size_t row, size_t group, float *scale,
                                     float *minimum) {
  const aq_two_level_view *t = &view->two_level;
  if (t->scale_bits == AQ_OFFSET_BITS) {
    uint16_t stored[2];
    __builtin_memcpy(&stored[0], t->sub_scale + row * t->sub_bytes + 2 * group, 2);
    __builtin_memcpy(&stored[1], t->sub_min + row * t->sub_bytes + 2 * group, 2);
    *scale = aq_float_from_half(stored[0]);
    *minimum = -aq_float_from_half(stored[1]);
    return;
  }
  const size_t super = row * t->supers + group / t->super_groups, first = row * t->sub_bytes;
  const uint32_t sub_scale = aq_read_sub_code(t->sub_scale + first, group, t->scale_bits);
  const uint32_t sub_min = aq_read_sub_code(t->sub_min + first, group, t->scale_bits);
  *scale = aq_float_from_half(t->super_scale[super]) * (float)sub_scale;
  *minimum = aq_float_from_half(t->super_min[super]) * (float)sub_min;
}

#endif
