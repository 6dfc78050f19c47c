/* quantize/ggml.c: blocks of ggml (ggml-common.h) out of packed matrices whose grid is a type's own, so that
 * its dequantized weights are ours. Half floats are copied; groups wider than a block repeat their scale. */
#include "../dispatch.h"
#include "../threads.h"

/* A block: its codes, its place, and its bytes, all 0. */
typedef struct {
  const aq_packed_view *view;
  size_t row, col;
  const uint8_t *codes;
  uint8_t *out;
} block;

typedef struct {
  size_t weights, bytes;
  int is_two_level;
  void (*store)(const block *b);
} block_type;

static void put_half(uint8_t *out, uint16_t half) { __builtin_memcpy(out, &half, 2); }

static size_t group_of(const block *b, size_t col) { return col / b->view->group_size; }
static uint16_t scale_of(const block *b) { return b->view->scale[b->row * b->view->groups + group_of(b, b->col)]; }

/* Nibbles of 32 codes: element j low, j + 16 high. */
static void put_nibbles(uint8_t *out, const uint8_t *codes, uint8_t shift) {
  for (size_t j = 0; j < 16; j++) out[j] = (uint8_t)((codes[j] + shift) | (codes[j + 16] + shift) << 4);
}

/* s (q - 2^(b-1)) = d (q' - 8) with q' = q + 8 - 2^(b-1), for 2 to 4 bits. */
static void store_q4_0(const block *b) {
  put_half(b->out, scale_of(b));
  put_nibbles(b->out + 2, b->codes, (uint8_t)(8 - (1 << (b->view->bits - 1))));
}

/* s q + beta; or s (q - z) = d q + m with m = -s z, rounded to half precision. */
static void store_q4_1(const block *b) {
  const aq_packed_view *v = b->view;
  put_nibbles(b->out + 4, b->codes, 0);
  if (v->two_level.scale_bits != 0) {
    const size_t at = b->row * v->two_level.sub_bytes + 2 * group_of(b, b->col);
    __builtin_memcpy(b->out, v->two_level.sub_scale + at, 2);
    __builtin_memcpy(b->out + 2, v->two_level.sub_min + at, 2);
    return;
  }
  const size_t group = b->row * v->groups + group_of(b, b->col);
  const float zero = v->zero_point ? aq_float_from_half(v->zero_point[group]) : (float)(1 << (v->bits - 1));
  put_half(b->out, v->scale[group]);
  put_half(b->out + 2, aq_half_from_float(-aq_float_from_half(v->scale[group]) * zero));
}

static void store_q8_0(const block *b) {
  put_half(b->out, scale_of(b));
  for (size_t j = 0; j < 32; j++) b->out[2 + j] = (uint8_t)(b->codes[j] - 128);
}

/* s (q - 2) = d (q' - 1) with d = -s and q' = 3 - q. */
static void store_q2_0(const block *b) {
  put_half(b->out, scale_of(b) ^ 0x8000);
  for (size_t j = 0; j < 16; j++) {
    const uint8_t *q = b->codes + 4 * j;
    b->out[2 + j] = (uint8_t)~(q[0] | q[1] << 2 | q[2] << 4 | q[3] << 6);
  }
}

/* Two levels. -------------------------------------------------------------------------------------------- */

static size_t super_of(const block *b) { return b->row * b->view->two_level.supers + b->col / AQ_SEGMENT; }

/* Sub-codes of the group of the block's weight `i`. */
static uint8_t sub_code(const block *b, const uint8_t *stream, size_t i) {
  const aq_two_level_view *t = &b->view->two_level;
  return (uint8_t)aq_read_sub_code(stream + b->row * t->sub_bytes, group_of(b, b->col + i), t->scale_bits);
}
static uint8_t sub_scale(const block *b, size_t i) { return sub_code(b, b->view->two_level.sub_scale, i); }
static uint8_t sub_min(const block *b, size_t i) { return sub_code(b, b->view->two_level.sub_min, i); }

/* The low two bits of 256 codes: byte 32 n + l holds weights 128 n + l + 32 j at bits 2 j. */
static void put_pairs(uint8_t *out, const uint8_t *codes) {
  for (size_t n = 0; n < 2; n++)
    for (size_t l = 0; l < 32; l++) {
      const uint8_t *q = codes + 128 * n + l;
      out[32 * n + l] = (uint8_t)((q[0] & 3) | (q[32] & 3) << 2 | (q[64] & 3) << 4 | (q[96] & 3) << 6);
    }
}

static void store_q2_k(const block *b) {
  for (size_t j = 0; j < 16; j++) b->out[j] = (uint8_t)(sub_scale(b, 16 * j) | sub_min(b, 16 * j) << 4);
  put_pairs(b->out + 16, b->codes);
  put_half(b->out + 80, b->view->two_level.super_scale[super_of(b)]);
  put_half(b->out + 82, b->view->two_level.super_min[super_of(b)]);
}

static void store_q4_k(const block *b) {
  put_half(b->out, b->view->two_level.super_scale[super_of(b)]);
  put_half(b->out + 2, b->view->two_level.super_min[super_of(b)]);
  for (size_t j = 0; j < 4; j++) {
    const uint8_t scale[] = {sub_scale(b, 32 * j), sub_scale(b, 32 * (j + 4))};
    const uint8_t min[] = {sub_min(b, 32 * j), sub_min(b, 32 * (j + 4))};
    b->out[4 + j] = (uint8_t)(scale[0] | scale[1] >> 4 << 6);
    b->out[8 + j] = (uint8_t)(min[0] | min[1] >> 4 << 6);
    b->out[12 + j] = (uint8_t)((scale[1] & 15) | (min[1] & 15) << 4);
  }
  for (size_t n = 0; n < 4; n++)
    for (size_t l = 0; l < 32; l++) {
      const uint8_t *q = b->codes + 64 * n + l;
      b->out[16 + 32 * n + l] = (uint8_t)(q[0] | q[32] << 4);
    }
}

/* Whether a group's weights are all 0. Their codes become those of 0: another code times 0 may be -0. */
static int is_zero(const block *b, uint8_t scale) {
  return scale == 0 || (b->view->two_level.super_scale[super_of(b)] & 0x7fff) == 0;
}

/* d v (q - z) with z = 4, or z = 3 where the scale is negative: there d (-v) (q' - 4) with q' = 7 - q. */
static void store_q3_k(const block *b) {
  uint8_t codes[AQ_SEGMENT];
  for (size_t j = 0; j < 16; j++) {
    const uint8_t v = sub_scale(b, 16 * j), is_turned = sub_min(b, 16 * j) < 4 * v;
    const uint8_t sub = (uint8_t)(32 + (is_turned ? -v : v)), keep = is_zero(b, v) ? 0 : 7;
    const uint8_t turn = keep == 0 ? 4 : is_turned ? 7 : 0;
    for (size_t i = 16 * j; i < 16 * j + 16; i++) codes[i] = (uint8_t)((b->codes[i] & keep) ^ turn);
    b->out[96 + j % 8] |= (uint8_t)((sub & 15) << (j < 8 ? 0 : 4));
    b->out[104 + j % 4] |= (uint8_t)(sub >> 4 << 2 * (j / 4));
  }
  put_pairs(b->out + 32, codes);
  for (size_t l = 0; l < 32; l++) {
    uint32_t high = 0;
    for (size_t k = 0; k < 8; k++) high |= (uint32_t)(codes[32 * k + l] >> 2) << k;
    b->out[l] = (uint8_t)high;
  }
  put_half(b->out + 108, b->view->two_level.super_scale[super_of(b)]);
}

/* d v (q - 32). */
static void store_q6_k(const block *b) {
  uint8_t codes[AQ_SEGMENT];
  for (size_t j = 0; j < 16; j++) {
    const uint8_t v = sub_scale(b, 16 * j), keep = is_zero(b, v) ? 0 : 63, set = keep == 0 ? 32 : 0;
    for (size_t i = 16 * j; i < 16 * j + 16; i++) codes[i] = (uint8_t)((b->codes[i] & keep) | set);
    b->out[192 + j] = v;
  }
  for (size_t n = 0; n < 2; n++)
    for (size_t l = 0; l < 32; l++) {
      const uint8_t *q = codes + 128 * n + l;
      b->out[64 * n + l] = (uint8_t)((q[0] & 15) | (q[64] & 15) << 4);
      b->out[64 * n + 32 + l] = (uint8_t)((q[32] & 15) | (q[96] & 15) << 4);
      b->out[128 + 32 * n + l] = (uint8_t)(q[0] >> 4 | q[32] >> 4 << 2 | q[64] >> 4 << 4 | q[96] >> 4 << 6);
    }
  put_half(b->out + 208, b->view->two_level.super_scale[super_of(b)]);
}

/* -------------------------------------------------------------------------------------------------------- */

static const block_type types[] = {
    [AQ_GGML_Q4_0] = {32, 18, 0, store_q4_0},  [AQ_GGML_Q4_1] = {32, 20, 0, store_q4_1},
    [AQ_GGML_Q8_0] = {32, 34, 0, store_q8_0},  [AQ_GGML_Q2_K] = {256, 84, 1, store_q2_k},
    [AQ_GGML_Q3_K] = {256, 110, 1, store_q3_k}, [AQ_GGML_Q4_K] = {256, 144, 1, store_q4_k},
    [AQ_GGML_Q6_K] = {256, 210, 1, store_q6_k}, [AQ_GGML_Q2_0] = {64, 18, 0, store_q2_0},
};

typedef struct {
  const aq_quantize_kernels *kernels;
  const block_type *type;
  aq_packed_view view;
  uint8_t *out;
} blocks_context;

static int32_t store_rows(const void *context, size_t begin, size_t end) {
  const blocks_context *c = context;
  const aq_packed_view *view = &c->view;
  const size_t weights = c->type->weights, bytes = c->type->bytes;
  for (size_t row = begin; row < end; row++) {
    uint8_t codes[AQ_SEGMENT], *out = c->out + row * (view->cols / weights * bytes);
    for (size_t col = 0; col < view->cols; col += AQ_SEGMENT) {
      const size_t n = aq_min_size(AQ_SEGMENT, view->cols - col);
      c->kernels->unpack_row(view->packed + row * view->words + col / 32 * (size_t)view->bits, n, view->bits, codes);
      for (size_t i = 0; i < n; i += weights, out += bytes) {
        __builtin_memset(out, 0, bytes);
        c->type->store(&(block){view, row, col + i, codes + i, out});
      }
    }
  }
  return AQ_OK;
}

/* Whether a type has a matrix's grid: its columns, its groups, and its codes. */
static int holds(const block_type *t, int32_t type, const aq_packed_view *v) {
  const size_t shared = t->is_two_level ? type == AQ_GGML_Q4_K ? 32 : 16 : t->weights;
  const int32_t scale_bits = v->two_level.scale_bits;
  if (v->cols % t->weights != 0 || (v->group_size % shared != 0 && v->group_size != v->cols)) return 0;
  switch (type) {
    case AQ_GGML_Q2_0: return scale_bits == 0 && v->bits == 2;
    case AQ_GGML_Q4_0: return scale_bits == 0 && v->bits <= 4;
    case AQ_GGML_Q8_0: return scale_bits == 0 && v->bits == 8;
    case AQ_GGML_Q4_1: return (scale_bits == 0 || scale_bits == AQ_OFFSET_BITS) && v->bits <= 4;
    case AQ_GGML_Q2_K: return scale_bits == 4 && v->bits == 2;
    case AQ_GGML_Q3_K: return scale_bits == 8 && v->bits == 3;
    case AQ_GGML_Q4_K: return (scale_bits == 4 || scale_bits == 6) && v->bits <= 4;
    default: return scale_bits == 8 && v->bits == 8;
  }
}

static int32_t store(aq_packed_view *view, size_t rows, int32_t type, uint8_t *out, const aq_kernels *kernels,
                     int32_t threads) {
  if (!out || type < 0 || (size_t)type >= sizeof types / sizeof *types || !types[type].store) return AQ_E_ARGUMENT;
  if (!holds(&types[type], type, view)) return AQ_E_SHAPE;
  const blocks_context context = {kernels->quantize, &types[type], *view, out};
  return aq_run_units(store_rows, &context, rows, rows * view->cols, threads);
}

int32_t aq_ggml_blocks(const uint32_t *packed, const uint16_t *scale, const uint16_t *zero_point, size_t rows,
                       size_t cols, int32_t bits, size_t group_size, int32_t type, uint8_t *blocks, int32_t isa,
                       int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  aq_packed_view view;
  const int32_t status = aq_view_packed(packed, scale, zero_point, rows, cols, bits, group_size, &view);
  return status == AQ_OK ? store(&view, rows, type, blocks, kernels, threads) : status;
}

int32_t aq_ggml_two_level_blocks(const uint32_t *packed, const uint8_t *sub_scale, const uint8_t *sub_min,
                                 const uint16_t *super_scale, const uint16_t *super_min, size_t rows, size_t cols,
                                 int32_t bits, size_t group_size, int32_t scale_bits, int32_t type, uint8_t *blocks,
                                 int32_t isa, int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  aq_packed_view view;
  const int32_t status = aq_view_two_level(packed, sub_scale, sub_min, super_scale, super_min, rows, cols, bits,
                                           group_size, scale_bits, &view);
  return status == AQ_OK ? store(&view, rows, type, blocks, kernels, threads) : status;
}
