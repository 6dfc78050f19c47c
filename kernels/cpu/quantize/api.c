/* quantize/api.c: the functions of arrowquant.h that quantize, dequantize and pack codes. */
#include "../dispatch.h"
#include "../threads.h"

/* Codes -------------------------------------------------------------------------------------------------- */

typedef struct {
  const aq_quantize_kernels *kernels;
  const uint8_t *codes; /* packed from these, or: */
  uint8_t *unpacked;
  const uint32_t *packed;
  uint32_t *packed_out;
  size_t cols, words;
  int32_t bits;
} codes_job;

static int32_t run_codes(const void *context, size_t begin, size_t end) {
  const codes_job *job = context;
  for (size_t row = begin; row < end; row++) {
    const size_t code = row * job->cols, word = row * job->words;
    if (!job->codes) {
      job->kernels->unpack_row(job->packed + word, job->cols, job->bits, job->unpacked + code);
      continue;
    }
    const int32_t status = job->kernels->pack_row(job->codes + code, job->cols, job->bits, job->packed_out + word);
    if (status != AQ_OK) return status;
  }
  return AQ_OK;
}

static int32_t codes(codes_job *job, int some, size_t rows, int32_t isa, int32_t threads) {
  if (rows == 0 || job->cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!some || !aq_bits_allowed(job->bits)) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(rows, job->cols)) return AQ_E_SHAPE;
  job->kernels = kernels->quantize;
  job->words = aq_words_of(job->cols, job->bits);
  return aq_run_units(run_codes, job, rows, rows * job->cols, threads);
}

int32_t aq_pack_codes(const uint8_t *from, size_t rows, size_t cols, int32_t bits, uint32_t *packed, int32_t isa,
                      int32_t threads) {
  codes_job job = {.codes = from, .packed_out = packed, .cols = cols, .bits = bits};
  return codes(&job, from && packed, rows, isa, threads);
}

int32_t aq_unpack_codes(const uint32_t *packed, size_t rows, size_t cols, int32_t bits, uint8_t *to, int32_t isa,
                        int32_t threads) {
  codes_job job = {.unpacked = to, .packed = packed, .cols = cols, .bits = bits};
  return codes(&job, to && packed, rows, isa, threads);
}

/* Quantize ----------------------------------------------------------------------------------------------- */

typedef struct {
  const aq_quantize_kernels *kernels;
  aq_quantize_job job;
} quantize_context;

static int32_t quantize_rows(const void *context, size_t begin, size_t end) {
  const quantize_context *c = context;
  return c->kernels->quantize_rows(&c->job, begin, end);
}

static int32_t quantize(const void *weights, int32_t dtype, size_t rows, size_t cols, int32_t bits, size_t group_size,
                        int32_t zero_point_kind, int32_t clip, const float *column_weights, uint32_t *packed,
                        uint16_t *scale, uint16_t *zero_point, int32_t isa, int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!weights || !packed || !scale || !aq_bits_allowed(bits) || !aq_dtype_bytes(dtype)) return AQ_E_ARGUMENT;
  if (!aq_grid_kind_allowed(zero_point_kind)) return AQ_E_ARGUMENT;
  if ((zero_point == 0) != (zero_point_kind == AQ_ZERO_POINT_SYMMETRIC)) return AQ_E_ARGUMENT;
  const size_t size = aq_group_columns(group_size, cols);
  if (size == 0 || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  if (!aq_column_weights_allowed(column_weights, cols)) return AQ_E_VALUE;
  const quantize_context context = {
      kernels->quantize,
      {.weights = weights, .dtype = dtype, .cols = cols, .bits = bits, .group_size = size,
       .groups = (cols - 1) / size + 1, .words = aq_words_of(cols, bits), .zero_point_kind = zero_point_kind,
       .clip = clip, .column_weights = column_weights, .packed = packed, .scale = scale, .zero_point = zero_point}};
  const int32_t status = aq_run_units(quantize_rows, &context, rows, rows * cols, threads);
  return status == AQ_OK || status <= AQ_E_STOPPED ? status : aq_weights_fault(weights, dtype, rows * cols, isa, threads);
}

int32_t aq_quantize_round(const void *weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
                          size_t group_size, int32_t zero_point_kind, uint32_t *packed, uint16_t *scale,
                          uint16_t *zero_point, int32_t isa, int32_t threads) {
  return quantize(weights, dtype, rows, cols, bits, group_size, zero_point_kind, 0, 0, packed, scale, zero_point, isa,
                  threads);
}

int32_t aq_quantize_clip(const void *weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
                         size_t group_size, int32_t zero_point_kind, const float *column_weights, uint32_t *packed,
                         uint16_t *scale, uint16_t *zero_point, int32_t isa, int32_t threads) {
  return quantize(weights, dtype, rows, cols, bits, group_size, zero_point_kind, 1, column_weights, packed, scale,
                  zero_point, isa, threads);
}

/* Dequantize --------------------------------------------------------------------------------------------- */

typedef struct {
  const aq_quantize_kernels *kernels;
  aq_packed_view view;
  void *out;
  int32_t dtype;
} dequantize_context;

/* Results from here on do not stay in a last-level cache anyway. */
#define AQ_STREAM_BYTES ((size_t)32 << 20)

static int32_t dequantize_rows(const void *context, size_t begin, size_t end) {
  const dequantize_context *c = context;
  const size_t cols = c->view.cols;
  for (size_t row = begin; row < end; row++) {
    if (c->dtype == AQ_F32) {
      c->kernels->dequantize(&c->view, row, 0, cols, (float *)c->out + row * cols);
      continue;
    }
    for (size_t col = 0; col < cols; col += AQ_SEGMENT) {
      float segment[AQ_SEGMENT];
      const size_t n = aq_min_size(AQ_SEGMENT, cols - col);
      c->kernels->dequantize(&c->view, row, col, n, segment);
      c->kernels->store(segment, n, c->out, c->dtype, row * cols + col);
    }
  }
  if (c->view.stream) __atomic_thread_fence(__ATOMIC_SEQ_CST); /* such stores are not ordered by themselves */
  return AQ_OK;
}

int32_t aq_dequantize_view(const aq_quantize_kernels *kernels, const aq_packed_view *view, size_t rows, void *out,
                           int32_t dtype, int32_t threads) {
  if (!out || (dtype != AQ_F32 && dtype != AQ_F16 && dtype != AQ_BF16)) return AQ_E_ARGUMENT;
  const size_t elements = rows * view->cols;
  dequantize_context context = {.kernels = kernels, .view = *view, .out = out, .dtype = dtype};
  context.view.stream = dtype == AQ_F32 && elements * sizeof(float) >= AQ_STREAM_BYTES;
  return aq_run_units(dequantize_rows, &context, rows, elements, threads);
}

int32_t aq_dequantize(const uint32_t *packed, const uint16_t *scale, const uint16_t *zero_point, size_t rows,
                      size_t cols, int32_t bits, size_t group_size, void *out, int32_t dtype, int32_t isa,
                      int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  aq_packed_view view;
  const int32_t status = aq_view_packed(packed, scale, zero_point, rows, cols, bits, group_size, &view);
  return status == AQ_OK ? aq_dequantize_view(kernels->quantize, &view, rows, out, dtype, threads) : status;
}
