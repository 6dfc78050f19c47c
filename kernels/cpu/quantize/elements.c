/* quantize/elements.c: the functions of arrowquant.h that convert elements, look for NaN and infinity, and
 * add up error statistics. */
#include "../dispatch.h"
#include "../threads.h"

/* Conversion --------------------------------------------------------------------------------------------- */

/* Elements of the unit that threads share out in flat arrays; a multiple of the sums' lanes. */
#define AQ_UNIT 4096

typedef struct {
  const aq_quantize_kernels *kernels;
  const void *a, *b;
  void *out;
  int32_t a_dtype, b_dtype, out_dtype;
  size_t n;
  aq_sums *parts;
  size_t part_elements;
} flat_context;

static int32_t convert_units(const void *context, size_t begin, size_t end) {
  const flat_context *c = context;
  const size_t first = begin * AQ_UNIT, stop = aq_min_size(end * AQ_UNIT, c->n);
  const size_t bytes = aq_dtype_bytes(c->a_dtype);
  if (c->a_dtype == c->out_dtype && (c->a_dtype == AQ_F32 || c->a_dtype == AQ_F64)) {
    __builtin_memcpy((char *)c->out + first * bytes, (const char *)c->a + first * bytes, (stop - first) * bytes);
    return AQ_OK;
  }
  if (c->out_dtype == AQ_F32) {
    c->kernels->load(c->a, c->a_dtype, first, stop - first, (float *)c->out + first);
    return AQ_OK;
  }
  if (c->a_dtype == AQ_F32) {
    c->kernels->store((const float *)c->a + first, stop - first, c->out, c->out_dtype, first);
    return AQ_OK;
  }
  for (size_t i = first; i < stop; i += AQ_SEGMENT) {
    float segment[AQ_SEGMENT];
    const size_t n = aq_min_size(AQ_SEGMENT, stop - i);
    if (c->a_dtype == AQ_F64) {
      for (size_t k = 0; k < n; k++) segment[k] = aq_float_from_double_odd(((const double *)c->a)[i + k]);
    } else {
      c->kernels->load(c->a, c->a_dtype, i, n, segment);
    }
    c->kernels->store(segment, n, c->out, c->out_dtype, i);
  }
  return AQ_OK;
}

int32_t aq_convert(const void *in, int32_t in_dtype, void *out, int32_t out_dtype, size_t n, int32_t isa,
                   int32_t threads) {
  if (n == 0) return AQ_OK;
  AQ_KERNELS(isa);
  const flat_context context = {.kernels = kernels->quantize, .a = in, .a_dtype = in_dtype, .out = out,
                                .out_dtype = out_dtype, .n = n};
  if (!in || !out || !aq_dtype_bytes(in_dtype) || !aq_dtype_bytes(out_dtype)) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(1, n)) return AQ_E_SHAPE;
  return aq_run_units(convert_units, &context, (n - 1) / AQ_UNIT + 1, n, threads);
}

static uint64_t first_nonfinite(const aq_quantize_kernels *kernels, const void *values, int32_t dtype, size_t count) {
  for (size_t i = 0; i < count; i += AQ_SEGMENT) {
    float segment[AQ_SEGMENT];
    const size_t n = aq_min_size(AQ_SEGMENT, count - i);
    uint32_t largest = 0;
    kernels->load(values, dtype, i, n, segment);
    for (size_t k = 0; k < n; k++) {
      const uint32_t magnitude = aq_float_bits(segment[k]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
    if (largest < 0x7f800000u) continue;
    for (size_t k = 0; k < n; k++)
      if ((aq_float_bits(segment[k]) & 0x7fffffffu) >= 0x7f800000u) return i + k;
  }
  return count;
}

int32_t aq_find_nonfinite(const void *values, int32_t dtype, size_t n, uint64_t *index, int32_t isa, int32_t threads) {
  (void)threads; /* bound by memory, and the first index wants an order */
  if (!index) return AQ_E_ARGUMENT;
  *index = 0;
  if (n == 0) return AQ_OK;
  AQ_KERNELS(isa);
  if (!values || !aq_dtype_bytes(dtype)) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(1, n)) return AQ_E_SHAPE;
  const size_t step = (size_t)1 << 24;
  for (size_t at = 0; at < n; at += step) {
    const size_t count = aq_min_size(step, n - at);
    const size_t own = first_nonfinite(kernels->quantize, (const char *)values + at * aq_dtype_bytes(dtype), dtype, count);
    *index = at + own;
    if (own < count) return AQ_OK;
    const int32_t status = aq_stopped();
    if (status != AQ_OK) return status;
  }
  return AQ_OK;
}

int32_t aq_weights_fault(const void *weights, int32_t dtype, size_t n, int32_t isa, int32_t threads) {
  uint64_t index = 0;
  aq_find_nonfinite(weights, dtype, n, &index, isa, threads);
  return index < (uint64_t)n ? AQ_E_NONFINITE : AQ_E_RANGE;
}

/* Error statistics --------------------------------------------------------------------------------------- */

/* Parts into which a tensor's sums are split, whatever the number of threads; added up in order. */
#define AQ_PARTS 64

static double add_lanes(const double lanes[AQ_SUM_LANES]) {
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

static void add_parts(const aq_sums *parts, size_t count, double *statistics) {
  for (int i = 0; i < AQ_STATISTICS; i++) statistics[i] = 0.0;
  for (size_t i = 0; i < count; i++) {
    statistics[0] += add_lanes(parts[i].aa);
    statistics[1] += add_lanes(parts[i].bb);
    statistics[2] += add_lanes(parts[i].ab);
    statistics[3] += add_lanes(parts[i].dd);
    if (parts[i].max_difference > statistics[4]) statistics[4] = parts[i].max_difference;
    if (parts[i].max_a > statistics[5]) statistics[5] = parts[i].max_a;
  }
}

static int32_t flat_statistics(const void *context, size_t begin, size_t end) {
  const flat_context *c = context;
  for (size_t p = begin; p < end; p++) {
    const size_t stop = aq_min_size((p + 1) * c->part_elements, c->n);
    for (size_t i = p * c->part_elements; i < stop; i += AQ_SEGMENT) {
      float a[AQ_SEGMENT], b[AQ_SEGMENT];
      const size_t n = aq_min_size(AQ_SEGMENT, stop - i);
      c->kernels->load(c->a, c->a_dtype, i, n, a);
      c->kernels->load(c->b, c->b_dtype, i, n, b);
      c->kernels->accumulate(a, b, n, &c->parts[p]);
    }
  }
  return AQ_OK;
}

int32_t aq_error_statistics(const void *a, int32_t a_dtype, const void *b, int32_t b_dtype, size_t n,
                            double *statistics, int32_t isa, int32_t threads) {
  aq_sums parts[AQ_PARTS] = {0};
  if (!statistics) return AQ_E_ARGUMENT;
  add_parts(parts, 0, statistics);
  if (n == 0) return AQ_OK;
  AQ_KERNELS(isa);
  flat_context context = {.kernels = kernels->quantize, .a = a, .b = b, .a_dtype = a_dtype, .b_dtype = b_dtype, .n = n,
                          .parts = parts};
  if (!a || !b || !aq_dtype_bytes(a_dtype) || !aq_dtype_bytes(b_dtype)) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(1, n)) return AQ_E_SHAPE;
  const size_t units = (n - 1) / AQ_UNIT + 1;
  context.part_elements = ((units - 1) / AQ_PARTS + 1) * AQ_UNIT;
  const size_t count = (n - 1) / context.part_elements + 1;
  const int32_t status = aq_run_units(flat_statistics, &context, count, n, threads);
  add_parts(parts, count, statistics);
  return status;
}

typedef struct {
  const aq_quantize_kernels *kernels;
  aq_packed_view view;
  const void *weights;
  int32_t dtype;
  size_t rows;
  aq_sums *parts;
} packed_context;

static int32_t packed_statistics(const void *context, size_t begin, size_t end) {
  const packed_context *c = context;
  const size_t cols = c->view.cols, part_rows = (c->rows - 1) / AQ_PARTS + 1;
  for (size_t p = begin; p < end; p++) {
    const size_t stop = aq_min_size((p + 1) * part_rows, c->rows);
    for (size_t row = p * part_rows; row < stop; row++) {
      for (size_t col = 0; col < cols; col += AQ_SEGMENT) {
        float a[AQ_SEGMENT], b[AQ_SEGMENT];
        const size_t n = aq_min_size(AQ_SEGMENT, cols - col);
        c->kernels->load(c->weights, c->dtype, row * cols + col, n, a);
        c->kernels->dequantize(&c->view, row, col, n, b);
        c->kernels->accumulate(a, b, n, &c->parts[p]);
      }
    }
  }
  return AQ_OK;
}

int32_t aq_view_statistics(const aq_quantize_kernels *kernels, const aq_packed_view *view, size_t rows,
                           const void *weights,
                           int32_t dtype, double *statistics, int32_t threads) {
  if (!weights || !aq_dtype_bytes(dtype)) return AQ_E_ARGUMENT;
  aq_sums parts[AQ_PARTS] = {0};
  const packed_context context = {.kernels = kernels, .view = *view, .weights = weights, .dtype = dtype, .rows = rows,
                                  .parts = parts};
  const size_t part_rows = (rows - 1) / AQ_PARTS + 1, count = (rows - 1) / part_rows + 1;
  const int32_t status = aq_run_units(packed_statistics, &context, count, rows * view->cols, threads);
  add_parts(parts, count, statistics);
  return status;
}

int32_t aq_packed_error_statistics(const void *weights, int32_t dtype, const uint32_t *packed, const uint16_t *scale,
                                   const uint16_t *zero_point, size_t rows, size_t cols, int32_t bits,
                                   size_t group_size, double *statistics, int32_t isa, int32_t threads) {
  if (!statistics) return AQ_E_ARGUMENT;
  add_parts(0, 0, statistics);
  if (rows == 0 || cols == 0) return AQ_OK;
  AQ_KERNELS(isa);
  aq_packed_view view;
  const int32_t status = aq_view_packed(packed, scale, zero_point, rows, cols, bits, group_size, &view);
  return status == AQ_OK ? aq_view_statistics(kernels->quantize, &view, rows, weights, dtype, statistics,
                                              threads) : status;
}
