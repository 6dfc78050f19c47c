/* trellis/token_avx512.h: a token alone on trellis codes, without ever storing a level; included by each
 * instruction set with its own dot products.
 *
 * Levels come 256 columns at a time, in the order of block_levels; x is brought into that order once. A
 * block's sums then lie in one vector, those of the same 64 columns in the same 128 bits.
 *
 * Expected of the including file: dot(sum, a, b), sum + products of unsigned bytes of a and signed ones of b,
 * four in a lane; two products fit 16 bits. */
#include "../isa/avx512.h"
#include "kernels.h"
#include "levels/avx512.h"

#define AQ_COLS 4096 /* columns of x held at once */
#define AQ_BLOCK 256
#define AQ_BLOCKS (AQ_COLS / AQ_BLOCK)
#define AQ_PART 64   /* columns of 128 bits of a block's sums */
#define AQ_PARTS (AQ_COLS / AQ_PART)
#define AQ_AHEAD 4096 /* bytes of codes that are asked for ahead */

/* A row's bytes from column `col` on, for n columns: what blocks load of them, and the byte before, lies in
 * the matrix, or in the copy. */
AQ_INLINE const uint8_t *row_bytes(const int bits, const aq_linear_job *job, size_t row, size_t col, size_t n,
                                   uint8_t copy[AQ_COLS / 8 * 3 + 64]) {
  const size_t bytes = 4 * job->view.words, at = col / 8 * (size_t)bits;
  const size_t loaded = (n + AQ_BLOCK - 1) / AQ_BLOCK * (AQ_BLOCK / 8) * (size_t)bits + 32;
  const uint8_t *from = (const uint8_t *)(job->view.packed + row * job->view.words) + at;
  if (row + col > 0 && (job->rows - row) * bytes - at >= loaded) return from;
  __builtin_memset(copy, 0, loaded);
  const size_t before = col > 0;
  __builtin_memcpy(copy + 1 - before, from - before, before + aq_min_size(bytes - at, loaded - 32));
  return copy + 1;
}

/* Levels of block b of a row's bytes. `there`: whether a byte is before the first. */
AQ_INLINE void levels_at(const int bits, level_table table, const uint8_t *from, size_t b, int there, __m512i levels[4]) {
  from += b * (AQ_BLOCK / 8) * (size_t)bits;
  __builtin_prefetch(from + AQ_AHEAD, 0, 2);
  if (bits == 3) __builtin_prefetch(from + AQ_AHEAD + 64, 0, 2);
  block_levels(bits, table, from, there || b > 0 ? ~(__mmask64)0 : ~(__mmask64)1, levels);
}

/* The bytes of 256 columns in the order of their levels. */
AQ_INLINE void arrange(const int bits, const void *columns, void *to) {
  const uint8_t *from = columns;
  uint8_t(*vectors)[64] = to;
  for (unsigned l = 0; l < 4; l++)
    for (unsigned k = 0; k < 4; k++) {
      const __m512i fours = _mm512_srli_epi32(_mm512_loadu_si512(from + 64 * l), 8 * k);
      const __m128i next = _mm_loadu_si128((const __m128i *)(const void *)(from + 64 * l + 16 * k));
      _mm_store_si128((__m128i *)(void *)(vectors[k] + 16 * l), bits == 2 ? _mm512_cvtepi32_epi8(fours) : next);
    }
}

/* Half floats of sixteen segments, of which `here` are there, or sixteen times the one of a row. */
AQ_INLINE __m512 half_floats(const uint16_t *from, size_t here, int same) {
  const __mmask16 there = here >= 16 ? 0xffff : (__mmask16)((1u << here) - 1);
  return _mm512_cvtph_ps(same ? _mm256_set1_epi16((int16_t)*from) : _mm256_maskz_loadu_epi16(there, from));
}

/* Activations in float32 --------------------------------------------------------------------------------- */

/* x as whole numbers of 24 bits, three signed bytes each, with one power of two for each part; and what 64
 * times their sums take from a block's lanes. */
typedef struct {
  _Alignas(64) int8_t digits[AQ_BLOCKS][3][AQ_BLOCK];
  __m512i less[AQ_BLOCKS][3];
  float units[AQ_PARTS], sums[AQ_PARTS]; /* of parts; units of levels */
  float factor; /* of what comes of units and sums */
} whole_x;

/* Digits of a part's columns, of which n are there, and zeros behind them: digits[AQ_BLOCK d + i] is the d-th
 * of column i, from the lowest on. */
static void prepare_part(const float *from, size_t n, size_t part, whole_x *x, int8_t *digits) {
  float most = 0.0f, sum = 0.0f;
  for (size_t i = 0; i < n; i++) {
    most = __builtin_fabsf(from[i]) > most ? __builtin_fabsf(from[i]) : most;
    sum += from[i];
  }
  /* three signed bytes hold numbers up to 2^23 / 1.00394 */
  const int32_t exponent = (int32_t)(aq_float_bits(most * 1.004f) >> 23) - 127, up = exponent < -104 ? 126 : 22 - exponent;
  const __m512 scale = _mm512_set1_ps(aq_bits_float((uint32_t)(up + 127) << 23));
  x->units[part] = aq_bits_float((uint32_t)(127 - up) << 23);
  x->sums[part] = sum;
  for (size_t i = 0; i < AQ_PART; i += 16) {
    const __mmask16 there = n <= i ? 0 : n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1);
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(there, from + i), scale));
    /* each byte but the highest is 128 less than that of the sum */
    const __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(whole, _mm512_set1_epi32(0x8080)), _mm512_set1_epi32(0x8080));
    for (unsigned d = 0; d < 3; d++)
      _mm_storeu_si128((__m128i *)(void *)(digits + AQ_BLOCK * d + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bytes, 8 * d)));
  }
}

/* Makes the units those of levels. Of tiny x they and the sums grow: their products with scales would else
 * lose bits below the normal numbers. */
static void prepare_units(whole_x *x) {
  float most = 0.0f;
  for (size_t part = 0; part < AQ_PARTS; part++) most = x->units[part] > most ? x->units[part] : most;
  const float up = most < 0x1p-64f ? 0x1p64f : 1.0f;
  for (size_t part = 0; part < AQ_PARTS; part++) {
    x->units[part] *= up * AQ_TRELLIS_UNIT;
    x->sums[part] *= up;
  }
  x->factor = 1.0f / up;
}

AQ_INLINE void prepare_whole(const int bits, const float *from, size_t n, whole_x *x) {
  for (size_t b = 0; b * AQ_BLOCK < n; b++) {
    int8_t digits[3 * AQ_BLOCK];
    for (size_t i = 0; i < AQ_BLOCK; i += AQ_PART) {
      const size_t at = b * AQ_BLOCK + i;
      prepare_part(from + at, n > at ? aq_min_size(AQ_PART, n - at) : 0, at / AQ_PART, x, digits + i);
    }
    for (int d = 0; d < 3; d++) {
      __m512i sum = _mm512_setzero_si512();
      arrange(bits, digits + AQ_BLOCK * d, x->digits[b][d]);
      for (size_t i = 0; i < AQ_BLOCK; i += 64)
        sum = dot(sum, _mm512_set1_epi8(AQ_LEVEL_ZERO), _mm512_load_si512(x->digits[b][d] + i));
      x->less[b][d] = _mm512_sub_epi32(_mm512_setzero_si512(), sum);
    }
  }
  prepare_units(x);
}

/* total + factors * sums of x level over block b, by lanes. */
AQ_INLINE __m512 add_block(const int bits, level_table table, const uint8_t *from, int there, const whole_x *x, size_t b,
                           const float *factors, __m512 total) {
  __m512i codes[4], sum[3];
  levels_at(bits, table, from, b, there, codes);
#pragma GCC unroll 3
  for (int d = 0; d < 3; d++) {
    sum[d] = x->less[b][d];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) sum[d] = dot(sum[d], codes[k], _mm512_load_si512(x->digits[b][d] + 64 * k));
  }
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512 factor = _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_load_ps(factors + 4 * b)));
  const __m512 low = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum[1], 8), sum[0]));
  const __m512 v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[2]), _mm512_set1_ps(0x1p16f), low);
  return _mm512_fmadd_ps(v, factor, total);
}

AQ_INLINE void float_rows(const int bits, const aq_linear_job *job, const whole_x *x, size_t col, size_t n,
                          size_t row_begin, size_t row_end) {
  const aq_packed_view *view = &job->view;
  const size_t size = aq_segment_cols(view), blocks = (n - 1) / AQ_BLOCK + 1, count = (n - 1) / size + 1;
  const int same = view->groups == 1, there = col > 0;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i group = _mm512_srlv_epi32(lanes, _mm512_set1_epi32(size == 256 ? 2 : size == 128)); /* of a part */
  const level_table table = load_more(bits, AQ_LEVEL_ZERO);
  for (size_t row = row_begin; row < row_end; row++) {
    uint8_t copy[AQ_COLS / 8 * 3 + 64];
    const uint8_t *from = row_bytes(bits, job, row, col, n, copy);
    const size_t first = row * view->groups + (same ? 0 : col / size);
    _Alignas(64) float factors[AQ_PARTS];
    __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (size_t part = 0; part < 4 * blocks; part += 16) {
      const size_t g = part * AQ_PART / size, at = first + (same ? 0 : g);
      __builtin_prefetch(view->scale + at + 512);
      __builtin_prefetch(view->zero_point + at + 512);
      const __m512 scale = _mm512_permutexvar_ps(group, half_floats(view->scale + at, count - g, same));
      const __m512 offset = _mm512_permutexvar_ps(group, half_floats(view->zero_point + at, count - g, same));
      _mm512_store_ps(factors + part, _mm512_mul_ps(scale, _mm512_loadu_ps(x->units + part)));
      total[1] = _mm512_fmadd_ps(offset, _mm512_loadu_ps(x->sums + part), total[1]);
    }
    size_t b = 0;
    for (; b + 2 <= blocks; b += 2)
#pragma GCC unroll 2
      for (size_t k = 0; k < 2; k++) total[k] = add_block(bits, table, from, there, x, b + k, factors, total[k]);
    if (b < blocks) total[0] = add_block(bits, table, from, there, x, b, factors, total[0]);
    float out = _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1])) * x->factor;
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
    __builtin_memset(x.units, 0, sizeof x.units);
    __builtin_memset(x.sums, 0, sizeof x.sums);
    prepare_whole(bits, job.x + col, n, &x);
    float_rows(bits, &job, &x, col, n, row_begin, row_end);
  }
}

/* Activations in 8 bits ---------------------------------------------------------------------------------- */

/* Codes of x of a block of columns, the zero point behind them, and by segment the sum of x less its zero
 * point. */
typedef struct {
  _Alignas(64) uint8_t codes[AQ_BLOCKS][AQ_BLOCK];
  float sums[AQ_PARTS + 16];
  __m512i zero; /* 16-bit numbers */
} byte_x;

AQ_INLINE void prepare_bytes(const int bits, const uint8_t *codes, size_t n, int32_t zero, size_t size, byte_x *x) {
  __builtin_memset(x->sums, 0, sizeof x->sums);
  x->zero = _mm512_set1_epi16((short)zero);
  for (size_t b = 0; b * AQ_BLOCK < n; b++) {
    uint8_t columns[AQ_BLOCK];
    const size_t m = aq_min_size(AQ_BLOCK, n - b * AQ_BLOCK);
    __builtin_memcpy(columns, codes + b * AQ_BLOCK, m);
    __builtin_memset(columns + m, zero, AQ_BLOCK - m);
    arrange(bits, columns, x->codes[b]);
  }
  for (size_t s = 0; s * size < n; s++) {
    int32_t sum = 0;
    for (size_t i = s * size; i < aq_min_size((s + 1) * size, n); i++) sum += codes[i] - zero;
    x->sums[s] = (float)sum;
  }
}

/* sum (x - zero) level over block b, by lanes. */
AQ_INLINE __m512i block_products(const int bits, level_table table, const uint8_t *from, int there, const byte_x *x, size_t b) {
  __m512i levels[4], sum = _mm512_setzero_si512();
  levels_at(bits, table, from, b, there, levels);
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) sum = dot(sum, _mm512_load_si512(x->codes[b] + 64 * k), levels[k]);
  const __m512i ones = _mm512_set1_epi8(1);
  const __m512i more = _mm512_add_epi16(_mm512_maddubs_epi16(ones, _mm512_add_epi8(levels[0], levels[1])),
                                        _mm512_maddubs_epi16(ones, _mm512_add_epi8(levels[2], levels[3])));
  return _mm512_sub_epi32(sum, _mm512_madd_epi16(more, x->zero));
}

/* In each 128 bits the sums of those of four vectors. */
AQ_INLINE __m512i add_within(const __m512i v[4]) {
  const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

/* 128 bits 0 and 1, 2 and 3 of two vectors, added. */
AQ_INLINE __m512i add_neighbours(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

/* sum (x - zero) level of sixteen segments, the s-th and those behind it, out of sums by parts: sixteen parts
 * in a vector, in 128 bits k those k, k + 4, k + 8, k + 12. */
AQ_INLINE __m512i segment_sums(const __m512i parts[AQ_PARTS / 16], size_t s, size_t size) {
  if (size == AQ_BLOCK)
    return add_neighbours(add_neighbours(parts[0], parts[1]), add_neighbours(parts[2], parts[3]));
  if (size == AQ_PART) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, parts[s / 16]);
  }
  const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  return _mm512_permutexvar_epi32(order, add_neighbours(parts[s / 8], parts[s / 8 + 1]));
}

/* The terms of a row's segments, as in int8/scalar.c. */
AQ_INLINE void byte_row(const int bits, const aq_linear_job *job, level_table table, size_t row, size_t col, size_t n,
                        const byte_x *x, float *terms) {
  const aq_packed_view *view = &job->view;
  uint8_t copy[AQ_COLS / 8 * 3 + 64];
  const uint8_t *from = row_bytes(bits, job, row, col, n, copy);
  const size_t size = aq_segment_cols(view), count = (n - 1) / size + 1, blocks = (n - 1) / AQ_BLOCK + 1;
  const int same = view->groups == 1;
  const size_t first = row * view->groups + (same ? 0 : col / size);
  __m512i parts[AQ_PARTS / 16] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                                  _mm512_setzero_si512()};
  for (size_t b = 0; b < blocks; b += 4) {
    __m512i sums[4];
#pragma GCC unroll 4
    for (size_t k = 0; k < 4; k++)
      sums[k] = b + k < blocks ? block_products(bits, table, from, col > 0, x, b + k) : _mm512_setzero_si512();
    parts[b / 4] = add_within(sums);
  }
  for (size_t s = 0; s < count; s += 16) {
    const __m512i sums = segment_sums(parts, s, size);
    const size_t at = first + (same ? 0 : s);
    __builtin_prefetch(view->scale + at + 512);
    __builtin_prefetch(view->zero_point + at + 512);
    const __m512 scale = _mm512_mul_ps(half_floats(view->scale + at, count - s, same), _mm512_set1_ps(AQ_TRELLIS_UNIT));
    const __m512 offset = half_floats(view->zero_point + at, count - s, same);
    const __m512 weighted = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sums));
    _mm512_storeu_ps(terms + s, _mm512_add_ps(weighted, _mm512_mul_ps(offset, _mm512_loadu_ps(x->sums + s))));
  }
}

AQ_INLINE void byte_token(const int bits, const aq_linear_job *job, size_t token, size_t row_begin, size_t row_end) {
  const level_table table = load_more(bits, 0);
  const size_t size = aq_segment_cols(&job->view);
  byte_x x;
  for (size_t col = 0; col < job->cols; col += AQ_COLS) {
    const size_t n = aq_min_size(AQ_COLS, job->cols - col), count = (n - 1) / size + 1;
    prepare_bytes(bits, job->codes + token * job->cols + col, n, job->x_zero[token], size, &x);
    for (size_t row = row_begin; row < row_end; row += AQ_W) {
      /* rows in the lanes: every row's terms are added up one after the other, the rows at once */
      const size_t rows = aq_min_size(AQ_W, row_end - row);
      float *out = job->out + token * job->rows + row, terms[AQ_W][AQ_PARTS];
      vf total = {0}, bias = {0};
      for (size_t r = 0; r < rows; r++) byte_row(bits, job, table, row + r, col, n, &x, terms[r]);
      if (col > 0) __builtin_memcpy(&total, out, rows * sizeof(float));
      for (size_t s = 0; s < count; s += AQ_W) {
        vf columns[AQ_W];
        for (size_t r = 0; r < AQ_W; r++) columns[r] = r < rows ? (vf)_mm512_loadu_ps(terms[r] + s) : (vf){0};
        v_transpose(columns);
        for (size_t i = 0; i < aq_min_size(AQ_W, count - s); i++) total = total + columns[i];
      }
      if (col + n == job->cols) {
        total = total * job->x_scale[token];
        if (job->bias) {
          __builtin_memcpy(&bias, job->bias + row, rows * sizeof(float));
          total = total + bias;
        }
      }
      __builtin_memcpy(out, &total, rows * sizeof(float));
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

const aq_trellis_tokens AQ_NAMED(aq_tokens) = {{float_token_2, float_token_3}, {byte_token_2, byte_token_3}};
