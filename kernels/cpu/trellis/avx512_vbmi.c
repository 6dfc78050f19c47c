/* trellis/avx512_vbmi.c: trellis codes with AVX-512 VBMI, permutations of bytes out of a table of 128 entries; and a
 * token alone with VNNI, without ever storing a level. Compiled with the matching -m flags and reached only after a
 * check. */
#include <immintrin.h>
#include <stdint.h>

#include "kernels.h"

/* Half of a width's table, 128 levels of 2 bits or 256 of 3, each more by a number that its other half takes twice. */
typedef struct {
  __m512i part[4], twice;
} level_table;

AQ_INLINE level_table load_more(const int bits, int8_t more) {
  const int8_t *levels = bits == 2 ? aq_trellis_levels_2 : aq_trellis_levels_3;
  level_table table = {.twice = _mm512_set1_epi8((int8_t)(2 * more))};
#pragma GCC unroll 4
  for (int i = 0; i < 2 * (bits - 1); i++)
    table.part[i] = _mm512_add_epi8(_mm512_load_si512(levels + 64 * i), _mm512_set1_epi8(more));
  return table;
}

AQ_INLINE level_table load_table_2(void) { return load_more(2, 0); }
AQ_INLINE level_table load_table_3(void) { return load_more(3, 0); }

/* Levels of 64 codes, of which `of` begins with the byte before them. A table's second half is the first turned round,
 * with other signs. */
AQ_INLINE __m512i levels_of(const int bits, level_table table, __m256i of) {
  const __m512i bytes = _mm512_castsi256_si512(of);
  if (bits == 2) {
    /* three bytes hold the windows of eight codes, from bits 2, 4, ... 16 on */
    const __m512i places = _mm512_setr_epi64(0x020100, 0x040302, 0x060504, 0x080706, 0x0a0908, 0x0c0b0a, 0x0e0d0c, 0x100f0e);
    const __m512i windows = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x100e0c0a08060402),
                                                         _mm512_permutexvar_epi8(places, bytes));
    const __mmask64 second = _mm512_movepi8_mask(windows);
    const __m512i at = _mm512_mask_sub_epi8(windows, second, _mm512_set1_epi8(-1), windows);
    const __m512i found = _mm512_permutex2var_epi8(table.part[0], at, table.part[1]);
    return _mm512_mask_sub_epi8(found, second, table.twice, found);
  }
  /* four bytes, from bits 2, 5, ... 23 on; a window's ninth bit is the highest of the eight that begin a bit later */
  const __m512i places = _mm512_setr_epi64(0x03020100, 0x06050403, 0x09080706, 0x0c0b0a09, 0x0f0e0d0c, 0x1211100f, 0x15141312,
                                           0x18171615);
  const __m512i own = _mm512_permutexvar_epi8(places, bytes);
  const __m512i windows = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x1714110e0b080502), own);
  const __mmask64 second =
      _mm512_movepi8_mask(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x1815120f0c090603), own));
  const __m512i at = _mm512_mask_sub_epi8(windows, second, _mm512_set1_epi8(-1), windows);
  const __m512i low = _mm512_permutex2var_epi8(table.part[0], at, table.part[1]);
  const __m512i high = _mm512_permutex2var_epi8(table.part[2], at, table.part[3]);
  const __m512i found = _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(at), high);
  return _mm512_mask_sub_epi8(found, second, table.twice, found);
}

AQ_INLINE void block_levels_2(level_table table, const uint8_t *from, int8_t *levels) {
  _mm512_storeu_si512(levels, levels_of(2, table, _mm256_loadu_si256((const __m256i *)(const void *)from)));
}

AQ_INLINE void block_levels_3(level_table table, const uint8_t *from, int8_t *levels) {
  _mm512_storeu_si512(levels, levels_of(3, table, _mm256_loadu_si256((const __m256i *)(const void *)from)));
}

#define AQ_LEVELS 64
#define AQ_LEVELS_FUNCTION aq_levels_2_avx512_vbmi
#define AQ_LEVELS_BITS 2
#define AQ_LEVELS_READ 32
#define AQ_LEVELS_TABLE level_table
#define AQ_LOAD_TABLE load_table_2
#define AQ_BLOCK_LEVELS block_levels_2
#include "vector.h"

#define AQ_LEVELS_FUNCTION aq_levels_3_avx512_vbmi
#define AQ_LEVELS_BITS 3
#define AQ_LEVELS_READ 32
#define AQ_LEVELS_TABLE level_table
#define AQ_LOAD_TABLE load_table_3
#define AQ_BLOCK_LEVELS block_levels_3
#include "vector.h"

/* One token --------------------------------------------------------------------------------------------- */

#define AQ_COLS 4096                          /* columns of x held at once */
#define AQ_BLOCKS (AQ_COLS / AQ_LEVELS)

/* The bytes of the block from byte `at` of a row on: none in front of the row or behind its end. */
AQ_INLINE __m256i bytes_at(const int bits, const uint8_t *row, size_t bytes, size_t at) {
  if (at > 0 && at + 31 <= bytes) return _mm256_loadu_si256((const __m256i *)(const void *)(row + at - 1));
  const uint32_t there = (2u << aq_min_size(bytes - at, AQ_LEVELS / 8 * (size_t)bits)) - 1;
  return _mm256_maskz_loadu_epi8(at == 0 ? there & ~1u : there, row + at - 1);
}

/* Levels come as codes of seven bits, 64 above the level. */
#define AQ_LEVEL_ZERO 64

AQ_INLINE __m512i codes_at(const int bits, level_table table, const uint8_t *row, size_t bytes, size_t col) {
  const size_t at = col / 8 * (size_t)bits;
  __builtin_prefetch(row + at + 2048);
  return levels_of(bits, table, bytes_at(bits, row, bytes, at));
}

/* x as whole numbers of 31 bits, four signed bytes each, with one power of two for all of a call's columns; and what
 * 64 times their sums take from the lanes of each group. */
typedef struct {
  _Alignas(64) int8_t digits[4][AQ_COLS];
  __m512i less[AQ_BLOCKS][4];
  float sums[AQ_BLOCKS]; /* of x, by group */
  float unit;
} whole_x;

static void prepare(const float *from, size_t n, size_t size, whole_x *x) {
  float most = 0.0f;
  for (size_t i = 0; i < n; i++) most = __builtin_fabsf(from[i]) > most ? __builtin_fabsf(from[i]) : most;
  const int32_t exponent = (int32_t)(aq_float_bits(most) >> 23) - 127, up = exponent < -97 ? 126 : 29 - exponent;
  const __m512 scale = _mm512_set1_ps(aq_bits_float((uint32_t)(up + 127) << 23));
  x->unit = aq_bits_float((uint32_t)(127 - up) << 23);
  const size_t blocks = (n + AQ_LEVELS - 1) / AQ_LEVELS;
  for (size_t i = 0; i < blocks * AQ_LEVELS; i += 16) {
    const __mmask16 there = n <= i ? 0 : n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(there, from + i), scale));
    /* each digit but the first is 128 less than a byte of the sum */
    const __m512i bytes =
        _mm512_xor_si512(_mm512_add_epi32(whole, _mm512_set1_epi32(0x00808080)), _mm512_set1_epi32(0x00808080));
    for (int k = 0; k < 4; k++)
      _mm_store_si128((__m128i *)(void *)(x->digits[k] + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bytes, 8 * (unsigned)k)));
  }
  for (size_t group = 0; group * size < n; group++) {
    const size_t begin = group * size, end = aq_min_size(begin + size, n);
    float sum = 0.0f;
    for (size_t i = begin; i < end; i++) sum += from[i];
    x->sums[group] = sum;
    for (int k = 0; k < 4; k++) {
      __m512i lanes = _mm512_setzero_si512();
      for (size_t i = begin; i < end; i += AQ_LEVELS)
        lanes = _mm512_dpbusd_epi32(lanes, _mm512_set1_epi8(64), _mm512_load_si512(x->digits[k] + i));
      x->less[group][k] = _mm512_sub_epi32(_mm512_setzero_si512(), lanes);
    }
  }
}

/* The whole numbers of a group, exact up to their sum over the digits. */
AQ_INLINE __m512 weigh(const __m512i sum[4]) {
  __m512 v = _mm512_cvtepi32_ps(sum[0]);
  v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[1]), _mm512_set1_ps(0x1p8f), v);
  v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[2]), _mm512_set1_ps(0x1p16f), v);
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[3]), _mm512_set1_ps(0x1p24f), v);
}

AQ_INLINE __m512 half_floats(__mmask16 there, const uint16_t *from) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, from));
}

AQ_INLINE void float_rows(const int bits, const aq_linear_job *job, const whole_x *x, size_t col, size_t n, size_t row_begin,
                          size_t row_end) {
  const aq_packed_view *view = &job->view;
  const size_t size = view->groups == 1 ? n : view->group_size, bytes = 4 * view->words;
  const level_table table = load_more(bits, AQ_LEVEL_ZERO);
  for (size_t row = row_begin; row < row_end; row++) {
    const uint8_t *from = (const uint8_t *)(view->packed + row * view->words);
    const size_t first = row * view->groups + (view->groups == 1 ? 0 : col / size);
    _Alignas(64) float scales[AQ_BLOCKS + 16];
    __m512 total = _mm512_setzero_ps(), shift = total;
    for (size_t group = 0; group * size < n; group += 16) {
      const size_t left = (n - 1) / size + 1 - group;
      const __mmask16 there = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
      const __m512 scale = half_floats(there, view->scale + first + group);
      const __m512 offset = half_floats(there, view->zero_point + first + group);
      _mm512_store_ps(scales + group, _mm512_mul_ps(scale, _mm512_set1_ps(AQ_TRELLIS_UNIT * x->unit)));
      shift = _mm512_fmadd_ps(offset, _mm512_maskz_loadu_ps(there, x->sums + group), shift);
    }
    for (size_t group = 0; group * size < n; group++) {
      __m512i sum[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) sum[k] = x->less[group][k];
      const size_t end = aq_min_size((group + 1) * size, n);
      for (size_t i = group * size; i < end; i += AQ_LEVELS) {
        const __m512i codes = codes_at(bits, table, from, bytes, col + i);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
          sum[k] = _mm512_dpbusd_epi32(sum[k], codes, _mm512_load_si512(x->digits[k] + i));
      }
      total = _mm512_fmadd_ps(weigh(sum), _mm512_set1_ps(scales[group]), total);
    }
    float out = _mm512_reduce_add_ps(total) + _mm512_reduce_add_ps(shift);
    if (col > 0) out = job->out[row] + out;
    if (col + n == job->cols && job->bias) out = out + job->bias[row];
    job->out[row] = out;
  }
}

AQ_INLINE void float_token(const int bits, const aq_linear_job *all, size_t token, size_t row_begin, size_t row_end) {
  aq_linear_job job = *all;
  job.x += token * job.cols;
  job.out += token * job.rows;
  whole_x x;
  for (size_t col = 0; col < job.cols; col += AQ_COLS) {
    const size_t n = aq_min_size(AQ_COLS, job.cols - col);
    prepare(job.x + col, n, job.view.groups == 1 ? n : job.view.group_size, &x);
    float_rows(bits, &job, &x, col, n, row_begin, row_end);
  }
}

/* Sums over the lanes of four vectors. */
AQ_INLINE __m128i add_lanes(const __m512i v[4]) {
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  const __m512i c = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  const __m256i d = _mm256_add_epi32(_mm512_castsi512_si256(c), _mm512_extracti64x4_epi64(c, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1));
}

/* x less 128 of a block of columns, and of each segment 64 times its sum, in the lanes that add it up, less the zero
 * point's share of what they add too much; and the sum of x less its zero point. */
typedef struct {
  _Alignas(64) int8_t codes[AQ_COLS];
  __m512i less[AQ_BLOCKS];
  float sums[AQ_BLOCKS + 4];
  __m512i zero; /* bytes: the zero point less 128 */
  size_t size;  /* of a segment */
} byte_x;

static void prepare_bytes(const uint8_t *codes, size_t n, int32_t zero, size_t size, byte_x *x) {
  __builtin_memset(x, 0, sizeof *x);
  x->zero = _mm512_set1_epi8((int8_t)(zero - 128));
  x->size = size;
  for (size_t i = 0; i < n; i++) x->codes[i] = (int8_t)(codes[i] - 128);
  const __m512i level_zero = _mm512_set1_epi8(AQ_LEVEL_ZERO);
  for (size_t s = 0; s * size < n; s++) {
    const size_t end = aq_min_size((s + 1) * size, n);
    int32_t sum = 0;
    for (size_t i = s * size; i < end; i++) sum += codes[i] - zero;
    x->sums[s] = (float)sum;
    for (size_t i = s * size; i < end; i += AQ_LEVELS) {
      const __m512i most = _mm512_dpbusd_epi32(x->less[s], level_zero, x->zero);
      x->less[s] = _mm512_sub_epi32(most, _mm512_dpbusd_epi32(_mm512_setzero_si512(), level_zero,
                                                             _mm512_load_si512(x->codes + i)));
    }
  }
}

/* sum (x - zero) level over columns [begin, end) of x, by lanes, added to `sum`. `inside`: whole blocks, all of whose
 * loads lie in the row. */
AQ_INLINE __m512i segment_products(const int bits, level_table table, const uint8_t *row, size_t bytes, size_t col,
                                   const byte_x *x, size_t begin, size_t end, const int inside, __m512i sum) {
  __m512i more = _mm512_setzero_si512();
  const uint8_t *from = row + (col + begin) / 8 * (size_t)bits - 1;
  for (size_t i = begin; i < end; i += AQ_LEVELS, from += AQ_LEVELS / 8 * bits) {
    __m512i codes;
    if (inside)
      codes = levels_of(bits, table, _mm256_loadu_si256((const __m256i *)(const void *)from));
    else
      codes = codes_at(bits, table, row, bytes, col + i);
    if (!inside && end - i < AQ_LEVELS) /* behind the row's end x is the zero point: levels of 0 */
      codes = _mm512_mask_mov_epi8(_mm512_set1_epi8(AQ_LEVEL_ZERO), ((__mmask64)1 << (end - i)) - 1, codes);
    sum = _mm512_dpbusd_epi32(sum, codes, _mm512_load_si512(x->codes + i));
    more = _mm512_dpbusd_epi32(more, codes, x->zero);
  }
  return _mm512_sub_epi32(sum, more);
}

/* Four half floats, of which `here` are there, or four times the one of a row. */
AQ_INLINE __m128 four_halves(const uint16_t *from, size_t here, int same) {
  const __m128i halves =
      same ? _mm_set1_epi16((int16_t)*from) : _mm_maskz_loadu_epi16((__mmask8)((1u << here) - 1), from);
  return _mm_cvtph_ps(halves);
}

/* The same bytes as int8/scalar.c: whole sums by segments, then terms in its order. */
AQ_INLINE float byte_row(const int bits, const aq_packed_view *view, level_table table, size_t row, size_t col, size_t n,
                         const byte_x *x, float total) {
  const uint8_t *from = (const uint8_t *)(view->packed + row * view->words);
  const size_t bytes = 4 * view->words, size = x->size, count = (n - 1) / size + 1;
  const size_t first = row * view->groups + (view->groups == 1 ? 0 : col / size);
  for (size_t s = 0; s < count; s += 4) {
    const size_t here = aq_min_size(4, count - s);
    const size_t begin = s * size, end = begin + 4 * size;
    __m512i sums[4];
    if (col + begin > 0 && end <= n && (col + end) / 8 * (size_t)bits + 31 <= bytes) {
      __builtin_prefetch(from + (col + begin) / 8 * (size_t)bits + 2048);
#pragma GCC unroll 4
      for (size_t k = 0; k < 4; k++)
        sums[k] = segment_products(bits, table, from, bytes, col, x, begin + k * size, begin + (k + 1) * size, 1,
                                   x->less[s + k]);
    } else {
      for (size_t k = 0; k < 4; k++) sums[k] = _mm512_setzero_si512();
      for (size_t k = 0; k < here; k++)
        sums[k] = segment_products(bits, table, from, bytes, col, x, begin + k * size,
                                   aq_min_size(begin + (k + 1) * size, n), 0, x->less[s + k]);
    }
    const size_t at = first + (view->groups == 1 ? 0 : s);
    const __m128 scale =
        _mm_mul_ps(four_halves(view->scale + at, here, view->groups == 1), _mm_set1_ps(AQ_TRELLIS_UNIT));
    const __m128 shift =
        _mm_mul_ps(four_halves(view->zero_point + at, here, view->groups == 1), _mm_loadu_ps(x->sums + s));
    float terms[4];
    _mm_storeu_ps(terms, _mm_add_ps(_mm_mul_ps(scale, _mm_cvtepi32_ps(add_lanes(sums))), shift));
    for (size_t k = 0; k < here; k++) total = total + terms[k];
  }
  return total;
}

AQ_INLINE void byte_token(const int bits, const aq_linear_job *job, size_t token, size_t row_begin, size_t row_end) {
  const level_table table = load_more(bits, AQ_LEVEL_ZERO);
  float *out = job->out + token * job->rows;
  byte_x x;
  for (size_t col = 0; col < job->cols; col += AQ_COLS) {
    const size_t n = aq_min_size(AQ_COLS, job->cols - col);
    prepare_bytes(job->codes + token * job->cols + col, n, job->x_zero[token], aq_segment_cols(&job->view), &x);
    for (size_t row = row_begin; row < row_end; row++) {
      float total = byte_row(bits, &job->view, table, row, col, n, &x, col > 0 ? out[row] : 0.0f);
      if (col + n == job->cols) {
        total = total * job->x_scale[token];
        if (job->bias) total = total + job->bias[row];
      }
      out[row] = total;
    }
  }
}

#define AQ_TOKEN(what, bits)                                                                                     \
  static void what##_token_##bits(const aq_linear_job *job, size_t token, size_t row_begin, size_t row_end) {      \
    what##_token(bits, job, token, row_begin, row_end);                                                            \
  }
AQ_TOKEN(float, 2)
AQ_TOKEN(float, 3)
AQ_TOKEN(byte, 2)
AQ_TOKEN(byte, 3)

const aq_trellis_tokens aq_tokens_avx512_vbmi = {{float_token_2, float_token_3}, {byte_token_2, byte_token_3}};
