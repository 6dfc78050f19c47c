/* trellis/token_avx2.c: a token alone on trellis codes with AVX2, without ever storing a level. Activations
 * lie in the order in which levels come. Compiled with the matching -m flags and reached only after a
 * check. */
#include "../isa/avx2.h"

#include "../isa/lanes.h"
#include "kernels.h"
#include "levels/avx2.h"

#define AQ_COLS 4096
#define AQ_ROOM 128 /* a segment of 256 columns, however many of them are there, and 3 bytes */
#define AQ_AHEAD 4096 /* bytes of codes that are asked for ahead */

/* Columns of a look-up, and vectors of its levels. */
#define AQ_BLOCK(bits) (256 - 64 * (size_t)(bits))
#define AQ_VECTORS(bits) (8 - 2 * (size_t)(bits))
/* Segments of 64 columns lie in the two halves of a look-up of 2 bits. Of sums, what is one vector is a unit:
 * such a look-up, or else a segment. */
#define AQ_HALVES(bits, size) ((bits) == 2 && (size) == 64)
#define AQ_UNIT_COLS(bits, size) (AQ_HALVES(bits, size) ? 128 : (size))

/* Where the level of a column comes out. */
AQ_INLINE size_t place_of(const int bits, size_t col) {
  static const uint8_t places_3[8] = {1, 33, 0, 32, 3, 35, 34, 2};
  if (bits == 2) return col / 128 * 128 + col % 4 * 32 + col % 128 / 4;
  return col / 64 * 64 + col % 64 / 8 * 4 + places_3[col % 8];
}

/* Levels of a block whose byte before the first is from[0], a zero in `there` where it is of no row. */
AQ_INLINE void levels_at(const int bits, term_table table, const uint8_t *from, __m256i there, __m256i levels[4]) {
  if (bits == 2) {
    const __m256i before = _mm256_loadu_si256((const __m256i *)(const void *)from);
    levels_of_2(table, _mm256_and_si256(before, there), _mm256_loadu_si256((const __m256i *)(const void *)(from + 1)), levels);
  } else {
    levels_of_3(table, _mm256_and_si256(load_halves(from, from + 12), there), levels);
  }
}

AQ_INLINE __m256i load_256(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }

/* All bytes, or all but the first. */
AQ_INLINE __m256i bytes_there(int first) {
  static const uint32_t there[9] = {0xffffff00, -1u, -1u, -1u, -1u, -1u, -1u, -1u, -1u};
  return load_256(there + (first ? 1 : 0));
}

static __attribute__((noinline)) vf half_floats_of(const uint16_t *from, size_t n) {
  uint16_t part[8] = {0};
  __builtin_memcpy(part, from, n * sizeof(uint16_t));
  return v_load_half(part);
}

/* Half floats of eight segments, of which `here` are there, zeros behind, or eight times the one of a row. */
AQ_INLINE vf half_floats(const uint16_t *from, size_t here, int same) {
  if (same) return (vf)_mm256_cvtph_ps(_mm_set1_epi16((int16_t)*from));
  return here >= 8 ? v_load_half(from) : half_floats_of(from, here);
}

/* Activations in float32 --------------------------------------------------------------------------------- */

/* Levels come as codes of seven bits, 64 above the level. */
#define AQ_LEVEL_ZERO 64

/* A code as a float is 128 + code, of which its byte and the one above are the upper half. Two lie in a lane,
 * low and high; as a float the lane is
 *
 *     128 + high + 2^-16 (0x4300 + low)
 *
 * so x of the low one is less by 2^-16 x of the high one. What is above the levels is taken from a unit's
 * lanes at first: sums are rounded as of numbers eight times as large. */
#define AQ_FLOAT_ABOVE 0x43

typedef struct {
  vf x[AQ_COLS / 8]; /* by 16 codes: those of the low ones, of the high ones */
  vf less[AQ_COLS / 64];
  float sums[AQ_COLS / 64 + 8]; /* by segment */
} float_x;

AQ_INLINE void prepare_floats(const int bits, const float *from, size_t n, size_t size, float_x *x) {
  __builtin_memset(x, 0, sizeof *x);
  for (size_t i = 0; i < n; i++) {
    /* bytes 8 to 15 of each half are unpacked behind all of 0 to 7 */
    const size_t place = place_of(bits, i), at = place % 2 * 8 + place % 32 / 16 * 4 + place % 8 / 2;
    ((float *)x->x)[place / 32 * 32 + place % 16 / 8 * 16 + at] = from[i];
  }
  for (size_t s = 0; s * size < n; s++) {
    vf sum = {0};
    for (size_t i = s * size; i < aq_min_size((s + 1) * size, n); i++) sum[i % 8] += from[i];
    x->sums[s] = v_total(sum);
  }
  const size_t vectors = AQ_UNIT_COLS(bits, size) / 8;
  for (size_t i = 0; i < (n + 127) / 128 * 16; i += 2) {
    const vf low = x->x[i], high = x->x[i + 1], beside = high * 0x1p-16f;
    x->less[i / vectors] -= (float)(128 + AQ_LEVEL_ZERO) * (low + high) + (float)(AQ_FLOAT_ABOVE * 256 - 128) * beside;
    x->x[i] = low - beside;
  }
}

/* sum of x level over a unit, by lanes. */
AQ_INLINE vf unit_floats(const int bits, term_table table, const uint8_t *from, __m256i there, const float_x *x, size_t unit,
                         size_t blocks) {
  vf sum[2] = {x->less[unit], {0}};
  for (size_t block = unit * blocks; block < (unit + 1) * blocks; block++) {
    const vf *of_x = x->x + block * (AQ_BLOCK(bits) / 8);
    __m256i levels[4];
    levels_at(bits, table, from + block * (AQ_BLOCK(bits) / 8 * (size_t)bits), there, levels);
    there = _mm256_set1_epi8(-1);
#pragma GCC unroll 4
    for (size_t v = 0; v < AQ_VECTORS(bits); v++) {
      const __m256i pairs[2] = {_mm256_unpacklo_epi8(levels[v], _mm256_set1_epi8(AQ_FLOAT_ABOVE)),
                                _mm256_unpackhi_epi8(levels[v], _mm256_set1_epi8(AQ_FLOAT_ABOVE))};
#pragma GCC unroll 2
      for (size_t i = 0; i < 2; i++) {
        sum[0] = v_fma((vf)_mm256_slli_epi32(pairs[i], 16), of_x[4 * v + 2 * i], sum[0]);
        sum[1] = v_fma((vf)pairs[i], of_x[4 * v + 2 * i + 1], sum[1]);
      }
    }
  }
  return sum[0] + sum[1];
}

/* sum of x w over columns [col, col + n) of a row, whose bytes are `from`. */
AQ_INLINE float float_row_of(const int bits, const int halves, const size_t blocks, const aq_linear_job *job, const uint8_t *from, size_t row,
                             size_t col, size_t n, const float_x *x) {
  const aq_packed_view *view = &job->view;
  const size_t unit_cols = blocks * AQ_BLOCK(bits), units = (n - 1) / unit_cols + 1;
  const size_t size = halves ? 64 : unit_cols, count = (n - 1) / size + 1;
  const int same = view->groups == 1, at_once = 8 - 4 * halves;
  const term_table table = load_terms(bits, AQ_LEVEL_ZERO);
  const size_t first = row * view->groups + (same ? 0 : col / size);
  __m256i there = bytes_there(col > 0);
  vf total[2] = {{0}, {0}};
  for (size_t s = 0; s < count; s += 8) {
    const size_t at = first + (same ? 0 : s), unit = s / (halves ? 2 : 1);
    __builtin_prefetch(view->scale + at + 512);
    __builtin_prefetch(view->zero_point + at + 512);
    for (size_t ahead = 0; ahead < size * (size_t)bits; ahead += 64)
      __builtin_prefetch(from + s * size / 8 * (size_t)bits + AQ_AHEAD + ahead);
    const vf factors = half_floats(view->scale + at, count - s, same) * AQ_TRELLIS_UNIT;
    total[0] = v_fma(half_floats(view->zero_point + at, count - s, same), v_load(x->sums + s), total[0]);
#pragma GCC unroll 8
    for (int k = 0; k < at_once; k++) {
      if (unit + (size_t)k >= units) break;
      const vf v = unit_floats(bits, table, from - 1, there, x, unit + (size_t)k, blocks);
      const __m256i lanes = halves ? _mm256_setr_epi32(2 * k, 2 * k, 2 * k, 2 * k, 2 * k + 1, 2 * k + 1, 2 * k + 1, 2 * k + 1)
                                   : _mm256_set1_epi32(k);
      total[k % 2] = v_fma(v, (vf)_mm256_permutevar8x32_ps((__m256)factors, lanes), total[k % 2]);
      there = _mm256_set1_epi8(-1);
    }
  }
  return v_total(total[0] + total[1]);
}

AQ_INLINE float float_row(const int bits, const aq_linear_job *job, const uint8_t *from, size_t row, size_t col, size_t n,
                          const float_x *x) {
  const size_t size = aq_segment_cols(&job->view);
  if (AQ_HALVES(bits, size)) return float_row_of(bits, 1, 1, job, from, row, col, n, x);
  if (size == AQ_BLOCK(bits)) return float_row_of(bits, 0, 1, job, from, row, col, n, x);
  if (size == 2 * AQ_BLOCK(bits)) return float_row_of(bits, 0, 2, job, from, row, col, n, x);
  return float_row_of(bits, 0, 4, job, from, row, col, n, x);
}

/* Activations in 8 bits ---------------------------------------------------------------------------------- */

/* What x is above its zero point, without the sign and the sign alone, zeros behind the last column; and its
 * sums by segment. Two products with levels up to 63 fit 16 bits. */
typedef struct {
  _Alignas(32) uint8_t size[AQ_COLS];
  _Alignas(32) int8_t sign[AQ_COLS];
  float sums[AQ_COLS / 64 + 8];
} byte_x;

AQ_INLINE void prepare_bytes(const int bits, const uint8_t *codes, size_t n, int32_t zero, size_t size, byte_x *x) {
  __builtin_memset(x, 0, sizeof *x);
  for (size_t i = 0; i < n; i++) {
    const size_t place = place_of(bits, i);
    const int32_t v = codes[i] - zero;
    x->size[place] = (uint8_t)(v < 0 ? -v : v);
    x->sign[place] = (int8_t)((v > 0) - (v < 0));
  }
  for (size_t s = 0; s * size < n; s++) {
    int32_t sum = 0;
    for (size_t i = s * size; i < aq_min_size((s + 1) * size, n); i++) sum += codes[i] - zero;
    x->sums[s] = (float)sum;
  }
}

/* sum (x - zero) level over a unit, by lanes. */
AQ_INLINE __m256i unit_bytes(const int bits, term_table table, const uint8_t *from, __m256i there, const byte_x *x, size_t unit,
                             size_t blocks) {
  __m256i sum = _mm256_setzero_si256();
  for (size_t block = unit * blocks; block < (unit + 1) * blocks; block++) {
    __m256i levels[4];
    levels_at(bits, table, from + block * (AQ_BLOCK(bits) / 8 * (size_t)bits), there, levels);
    there = _mm256_set1_epi8(-1);
#pragma GCC unroll 4
    for (size_t v = 0; v < AQ_VECTORS(bits); v++) {
      const size_t at = block * AQ_BLOCK(bits) + 32 * v;
      const __m256i pairs = _mm256_maddubs_epi16(load_256(x->size + at), _mm256_sign_epi8(levels[v], load_256(x->sign + at)));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
  }
  return sum;
}

/* In each half the sums of those of four vectors. */
AQ_INLINE __m256i add_within(const __m256i v[4]) {
  const __m256i a = _mm256_add_epi32(_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
  const __m256i b = _mm256_add_epi32(_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
  return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}

/* sum (x - zero) level of eight segments from unit `unit` on; those from `units` on are 0. */
AQ_INLINE __m256i eight_products(const int bits, const int halves, term_table table, const uint8_t *from, __m256i there,
                                 const byte_x *x, size_t unit, size_t units, size_t blocks) {
  const int count = 2 - halves;
  __m256i quarters[2];
#pragma GCC unroll 2
  for (int q = 0; q < count; q++) {
    __m256i sums[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++, unit++) {
      sums[k] = _mm256_setzero_si256();
      if (unit < units) sums[k] = unit_bytes(bits, table, from, there, x, unit, blocks);
      there = _mm256_set1_epi8(-1);
    }
    quarters[q] = add_within(sums);
  }
  if (halves) return _mm256_permutevar8x32_epi32(quarters[0], _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  return _mm256_add_epi32(_mm256_permute2x128_si256(quarters[0], quarters[1], 0x20),
                          _mm256_permute2x128_si256(quarters[0], quarters[1], 0x31));
}

AQ_INLINE void byte_row_of(const int bits, const int halves, const size_t blocks, const aq_linear_job *job, const uint8_t *from, size_t row,
                           size_t col, size_t n, const byte_x *x, float *terms) {
  const aq_packed_view *view = &job->view;
  const term_table table = load_terms(bits, 0);
  const size_t unit_cols = blocks * AQ_BLOCK(bits), units = (n - 1) / unit_cols + 1;
  const size_t size = halves ? 64 : unit_cols, count = (n - 1) / size + 1;
  const int same = view->groups == 1;
  const size_t first = row * view->groups + (same ? 0 : col / size);
  __m256i there = bytes_there(col > 0);
  for (size_t s = 0; s < count; s += 8) {
    const size_t at = first + (same ? 0 : s), unit = s / (halves ? 2 : 1);
    for (size_t ahead = 0; ahead < size * (size_t)bits; ahead += 64)
      __builtin_prefetch(from + s * size / 8 * (size_t)bits + AQ_AHEAD + ahead, 0, 2);
    __builtin_prefetch(view->scale + at + 512);
    __builtin_prefetch(view->zero_point + at + 512);
    const __m256i sums = eight_products(bits, halves, table, from - 1, there, x, unit, units, blocks);
    there = _mm256_set1_epi8(-1);
    const vf weighted = half_floats(view->scale + at, count - s, same) * AQ_TRELLIS_UNIT * (vf)_mm256_cvtepi32_ps(sums);
    const vf shift = half_floats(view->zero_point + at, count - s, same) * v_load(x->sums + s);
    v_store(terms + s, weighted + shift);
  }
}

AQ_INLINE void byte_row(const int bits, const aq_linear_job *job, const uint8_t *from, size_t row, size_t col, size_t n,
                        const byte_x *x, float *terms) {
  const size_t size = aq_segment_cols(&job->view);
  if (AQ_HALVES(bits, size))
    byte_row_of(bits, 1, 1, job, from, row, col, n, x, terms);
  else if (size == AQ_BLOCK(bits))
    byte_row_of(bits, 0, 1, job, from, row, col, n, x, terms);
  else if (size == 2 * AQ_BLOCK(bits))
    byte_row_of(bits, 0, 2, job, from, row, col, n, x, terms);
  else
    byte_row_of(bits, 0, 4, job, from, row, col, n, x, terms);
}

#include "token.h"

const aq_trellis_tokens aq_tokens_avx2 = AQ_TOKENS;
