/* trellis/token_avx512.h: a token alone on trellis codes with VNNI, without ever storing a level; included by
 * each instruction set with its own look-up.
 *
 * Expected of the including file:
 *   level_table, load_more(bits, more): levels, each greater by `more`
 *   levels_of(bits, table, of): of 64 codes, of which `of` begins with the byte before them */
#include "../isa/avx512.h"
#include "kernels.h"

#define AQ_COLS 4096 /* columns of x held at once */
#define AQ_BLOCK 64  /* columns of a look-up */
#define AQ_BLOCKS (AQ_COLS / AQ_BLOCK)
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

/* Levels of the block from byte `from` on. `first`: of those that are read at once; `there`: whether a byte
 * is before. */
AQ_INLINE __m512i levels_at(const int bits, const int first, level_table table, const uint8_t *from, int there) {
  if (!first) return levels_of(bits, table, _mm256_loadu_si256((const __m256i *)(const void *)(from - 1)));
  return levels_of(bits, table, _mm256_maskz_loadu_epi8(there ? 0xffffffffu : 0xfffffffeu, from - 1));
}

/* Half floats of sixteen segments, of which `here` are there, or sixteen times the one of a row. */
AQ_INLINE __m512 half_floats(const uint16_t *from, size_t here, int same) {
  const __mmask16 there = here >= 16 ? 0xffff : (__mmask16)((1u << here) - 1);
  return _mm512_cvtph_ps(same ? _mm256_set1_epi16((int16_t)*from) : _mm256_maskz_loadu_epi16(there, from));
}

/* Activations in float32 --------------------------------------------------------------------------------- */

/* x as whole numbers of 24 bits, three signed bytes each, with one power of two for each segment; and what 64
 * times their sums take from a segment's lanes: together where a segment is a block, else of each byte. Four
 * products of a level and such a number fit 32 bits, so a block's lanes are added up as whole numbers. */
typedef struct {
  _Alignas(64) int8_t digits[AQ_BLOCKS][3][AQ_BLOCK];
  __m512i less[3 * AQ_BLOCKS / 2];
  float units[AQ_BLOCKS + 16], sums[AQ_BLOCKS + 16]; /* by segment */
  size_t blocks;
} whole_x;

static void prepare_segment(const float *from, size_t n, size_t segment, size_t size, whole_x *x) {
  float most = 0.0f, sum = 0.0f;
  for (size_t i = 0; i < n; i++) {
    most = __builtin_fabsf(from[i]) > most ? __builtin_fabsf(from[i]) : most;
    sum += from[i];
  }
  /* three signed bytes hold numbers up to 2^23 / 1.00394 */
  const int32_t exponent = (int32_t)(aq_float_bits(most * 1.004f) >> 23) - 127, up = exponent < -104 ? 126 : 22 - exponent;
  const __m512 scale = _mm512_set1_ps(aq_bits_float((uint32_t)(up + 127) << 23));
  x->units[segment] = aq_bits_float((uint32_t)(127 - up) << 23);
  x->sums[segment] = sum;
  int8_t(*digits)[3][AQ_BLOCK] = x->digits + segment * (size / AQ_BLOCK);
  __m512i less[3] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (size_t block = 0; block * AQ_BLOCK < n; block++) {
    for (size_t i = 0; i < AQ_BLOCK; i += 16) {
      const size_t at = block * AQ_BLOCK + i;
      const __mmask16 there = n <= at ? 0 : n - at >= 16 ? 0xffff : (__mmask16)((1u << (n - at)) - 1);
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(there, from + at), scale));
      /* each byte but the highest is 128 less than that of the sum */
      const __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(whole, _mm512_set1_epi32(0x8080)), _mm512_set1_epi32(0x8080));
      for (unsigned k = 0; k < 3; k++)
        _mm_store_si128((__m128i *)(void *)(digits[block][k] + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bytes, 8 * k)));
    }
    for (int k = 0; k < 3; k++)
      less[k] = _mm512_dpbusd_epi32(less[k], _mm512_set1_epi8(AQ_LEVEL_ZERO), _mm512_load_si512(digits[block][k]));
  }
  if (size == AQ_BLOCK) {
    const __m512i high = _mm512_add_epi32(_mm512_slli_epi32(less[2], 16), _mm512_slli_epi32(less[1], 8));
    x->less[segment] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_add_epi32(high, less[0]));
  } else {
    for (size_t k = 0; k < 3; k++) x->less[3 * segment + k] = _mm512_sub_epi32(_mm512_setzero_si512(), less[k]);
  }
}

/* total + factor * sum of x level over segment s, by lanes. `one`: it is a block. */
AQ_INLINE __m512 add_segment(const int bits, const int one, const int first, level_table table, const uint8_t *from,
                             int there, const whole_x *x, size_t s, size_t blocks, float factor, __m512 total) {
  if (one) {
    const int8_t(*digits)[AQ_BLOCK] = x->digits[s];
    const __m512i codes = levels_at(bits, first, table, from + s * (AQ_BLOCK / 8) * (size_t)bits, there);
    __m512i high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_load_si512(digits[2]));
    high = _mm512_dpbusd_epi32(_mm512_slli_epi32(high, 8), codes, _mm512_load_si512(digits[1]));
    const __m512i low = _mm512_dpbusd_epi32(x->less[s], codes, _mm512_load_si512(digits[0]));
    const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(factor), total);
  }
  __m512i sum[3];
#pragma GCC unroll 3
  for (size_t k = 0; k < 3; k++) sum[k] = x->less[3 * s + k];
  size_t block = s * blocks;
  const size_t end = aq_min_size(block + blocks, x->blocks);
  __m512i codes = levels_at(bits, first, table, from + block * (AQ_BLOCK / 8) * (size_t)bits, there);
  for (;;) {
#pragma GCC unroll 3
    for (size_t k = 0; k < 3; k++) sum[k] = _mm512_dpbusd_epi32(sum[k], codes, _mm512_load_si512(x->digits[block][k]));
    if (++block >= end) break;
    codes = levels_at(bits, 0, table, from + block * (AQ_BLOCK / 8) * (size_t)bits, 1);
  }
  __m512 v = _mm512_cvtepi32_ps(sum[0]);
  v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[1]), _mm512_set1_ps(0x1p8f), v);
  v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[2]), _mm512_set1_ps(0x1p16f), v);
  return _mm512_fmadd_ps(v, _mm512_set1_ps(factor), total);
}

AQ_INLINE void float_rows(const int bits, const int one, const aq_linear_job *job, const whole_x *x, size_t col, size_t n,
                          size_t row_begin, size_t row_end) {
  const aq_packed_view *view = &job->view;
  const size_t size = aq_segment_cols(view), count = (n - 1) / size + 1, blocks = size / AQ_BLOCK;
  const int same = view->groups == 1, there = col > 0;
  const level_table table = load_more(bits, AQ_LEVEL_ZERO);
  for (size_t row = row_begin; row < row_end; row++) {
    uint8_t copy[AQ_COLS / 8 * 3 + 64];
    const uint8_t *from = row_bytes(bits, job, row, col, n, copy);
    const size_t first = row * view->groups + (same ? 0 : col / size);
    _Alignas(64) float factors[AQ_BLOCKS];
    __m512 total[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (size_t s = 0; s < count; s += 16) {
      const size_t at = first + (same ? 0 : s);
      __builtin_prefetch(view->scale + at + 512);
      __builtin_prefetch(view->zero_point + at + 512);
      const __m512 scale = half_floats(view->scale + at, count - s, same);
      const __m512 offset = half_floats(view->zero_point + at, count - s, same);
      const __m512 unit = _mm512_mul_ps(_mm512_loadu_ps(x->units + s), _mm512_set1_ps(AQ_TRELLIS_UNIT));
      _mm512_store_ps(factors + s, _mm512_mul_ps(scale, unit));
      total[0] = _mm512_fmadd_ps(offset, _mm512_loadu_ps(x->sums + s), total[0]);
    }
    total[0] = add_segment(bits, one, 1, table, from, there, x, 0, blocks, factors[0], total[0]);
    size_t s = 1;
    for (; s + 4 <= count; s += 4) {
      for (size_t ahead = 0; ahead < size / 2 * (size_t)bits; ahead += 64)
        __builtin_prefetch(from + s * size / 8 * (size_t)bits + AQ_AHEAD + ahead);
#pragma GCC unroll 4
      for (size_t k = 0; k < 4; k++)
        total[k] = add_segment(bits, one, 0, table, from, 1, x, s + k, blocks, factors[s + k], total[k]);
    }
    for (; s < count; s++) total[0] = add_segment(bits, one, 0, table, from, 1, x, s, blocks, factors[s], total[0]);
    float out = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(total[0], total[1]), _mm512_add_ps(total[2], total[3])));
    if (col > 0) out = job->out[row] + out;
    if (col + n == job->cols && job->bias) out = out + job->bias[row];
    job->out[row] = out;
  }
}

AQ_INLINE void float_token(const int bits, const aq_linear_job *all, size_t token, size_t row_begin, size_t row_end) {
  aq_linear_job job = *all;
  job.x += token * job.cols;
  job.out += token * job.rows;
  const size_t size = aq_segment_cols(&job.view);
  whole_x x;
  for (size_t col = 0; col < job.cols; col += AQ_COLS) {
    const size_t n = aq_min_size(AQ_COLS, job.cols - col);
    x.blocks = (n - 1) / AQ_BLOCK + 1;
    __builtin_memset(x.units, 0, sizeof x.units);
    __builtin_memset(x.sums, 0, sizeof x.sums);
    for (size_t s = 0; s * size < n; s++)
      prepare_segment(job.x + col + s * size, aq_min_size(size, n - s * size), s, size, &x);
    if (size == AQ_BLOCK)
      float_rows(bits, 1, &job, &x, col, n, row_begin, row_end);
    else
      float_rows(bits, 0, &job, &x, col, n, row_begin, row_end);
  }
}

/* Activations in 8 bits ---------------------------------------------------------------------------------- */

/* Codes of x of a block of columns, zeros behind them, and by segment the sum of x less its zero point. */
typedef struct {
  _Alignas(64) uint8_t codes[AQ_COLS];
  float sums[AQ_BLOCKS + 16];
  __m512i zero; /* bytes */
} byte_x;

static void prepare_bytes(const uint8_t *codes, size_t n, int32_t zero, size_t size, byte_x *x) {
  __builtin_memset(x, 0, sizeof *x);
  __builtin_memcpy(x->codes, codes, n);
  x->zero = _mm512_set1_epi8((char)zero);
  for (size_t s = 0; s * size < n; s++) {
    int32_t sum = 0;
    for (size_t i = s * size; i < aq_min_size((s + 1) * size, n); i++) sum += codes[i] - zero;
    x->sums[s] = (float)sum;
  }
}

/* sum (x - zero) level over columns [begin, end), by lanes. `one`: of a block; `whole`: of whole blocks. */
AQ_INLINE __m512i segment_products(const int bits, const int one, const int whole, const int first, level_table table,
                                   const uint8_t *from, int there, const byte_x *x, size_t begin, size_t end) {
  __m512i sum = _mm512_setzero_si512(), more = sum;
  __m512i levels = levels_at(bits, first, table, from + begin / 8 * (size_t)bits, there);
  for (size_t i = begin;;) {
    if (!whole && end - i < AQ_BLOCK) levels = _mm512_maskz_mov_epi8(((__mmask64)1 << (end - i)) - 1, levels);
    sum = _mm512_dpbusd_epi32(sum, _mm512_load_si512(x->codes + i), levels);
    more = _mm512_dpbusd_epi32(more, x->zero, levels);
    i += AQ_BLOCK;
    if (one || i >= end) return _mm512_sub_epi32(sum, more);
    levels = levels_at(bits, 0, table, from + i / 8 * (size_t)bits, 1);
  }
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

/* sum (x - zero) level of sixteen segments from begin on; what is not there is 0. `one`: they are blocks. */
AQ_INLINE __m512i sixteen_products(const int bits, const int one, const int whole, level_table table,
                                   const uint8_t *from, int there, size_t n, const byte_x *x, size_t begin, size_t size) {
  __m512i quarters[4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; q++) {
    __m512i sums[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++, begin += size) {
      const size_t end = whole ? begin + (one ? AQ_BLOCK : size) : aq_min_size(begin + size, n);
      sums[k] = _mm512_setzero_si512();
      if (!whole && begin >= n) continue;
      sums[k] = segment_products(bits, one, whole, q + k == 0, table, from, begin + (size_t)there > 0, x, begin, end);
    }
    quarters[q] = add_within(sums);
  }
  return add_neighbours(add_neighbours(quarters[0], quarters[1]), add_neighbours(quarters[2], quarters[3]));
}

/* The terms of a row's segments, as in int8/scalar.c. */
AQ_INLINE void byte_row(const int bits, const int one, const aq_linear_job *job, level_table table, size_t row, size_t col,
                        size_t n, const byte_x *x, float *terms) {
  const aq_packed_view *view = &job->view;
  uint8_t copy[AQ_COLS / 8 * 3 + 64];
  const uint8_t *from = row_bytes(bits, job, row, col, n, copy);
  const size_t size = aq_segment_cols(view), count = (n - 1) / size + 1;
  const int same = view->groups == 1;
  const size_t first = row * view->groups + (same ? 0 : col / size);
  for (size_t s = 0; s < count; s += 16) {
    const size_t begin = s * size, end = begin + 16 * size;
    __m512i sums;
    for (size_t ahead = 0; ahead < 2 * size * (size_t)bits; ahead += 64)
      __builtin_prefetch(from + begin / 8 * (size_t)bits + AQ_AHEAD + ahead, 0, 2);
    if (end <= n)
      sums = sixteen_products(bits, one, 1, table, from, col > 0, n, x, begin, size);
    else
      sums = sixteen_products(bits, one, 0, table, from, col > 0, n, x, begin, size);
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
    prepare_bytes(job->codes + token * job->cols + col, n, job->x_zero[token], size, &x);
    for (size_t row = row_begin; row < row_end; row += AQ_W) {
      /* rows in the lanes: every row's terms are added up one after the other, the rows at once */
      const size_t rows = aq_min_size(AQ_W, row_end - row);
      float *out = job->out + token * job->rows + row, terms[AQ_W][AQ_BLOCKS + AQ_W];
      vf total = {0}, bias = {0};
      for (size_t r = 0; r < rows; r++)
        if (size == AQ_BLOCK)
          byte_row(bits, 1, job, table, row + r, col, n, &x, terms[r]);
        else
          byte_row(bits, 0, job, table, row + r, col, n, &x, terms[r]);
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

#define AQ_TOKENS {{float_token_2, float_token_3}, {byte_token_2, byte_token_3}}
