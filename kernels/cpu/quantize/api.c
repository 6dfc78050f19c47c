/* api.c: the functions of arrowquant.h: argument checks, choice of instruction set, rows over threads. */
#include "../kernels.h"

#if !defined(AQ_NO_THREADS)
#include <pthread.h>
#endif
#if defined(AQ_BUILD_AVX2)
#include <cpuid.h>
#endif
#if defined(AQ_BUILD_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

/* Instruction sets ------------------------------------------------------------------------------------------------ */

#if defined(AQ_BUILD_AVX2)
/* __builtin_cpu_supports also asks, through XGETBV, whether the system saves the registers; not every compiler
 * lets it name F16C, whose registers are AVX's. CPUID is remembered: under a hypervisor it takes microseconds. */
static int has_f16c_and_fma(void) {
  static _Atomic int answer; /* 0: not asked yet */
  int known = answer;
  if (known == 0) {
    unsigned eax, ebx, ecx, edx;
    __cpuid(1, eax, ebx, ecx, edx);
    known = (ecx & bit_F16C) != 0 && (ecx & bit_FMA) != 0 ? 1 : -1;
    answer = known;
  }
  return known > 0;
}
#endif

#if defined(AQ_BUILD_AVX512)
static int has_avx512(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(AQ_BUILD_NEON)
/* Arm's dot product of bytes; every Mac with such a processor has it. */
static int has_byte_dot(void) {
#if defined(__APPLE__)
  return 1;
#elif defined(__linux__)
  return (getauxval(AT_HWCAP) & (1ul << 20)) != 0; /* HWCAP_ASIMDDP */
#else
  return 0;
#endif
}
#endif

static const aq_kernels *kernels_of(int32_t isa) {
  switch (isa) {
    case AQ_ISA_SCALAR: return &aq_kernels_scalar;
#if defined(AQ_BUILD_AVX2)
    case AQ_ISA_AVX2:
      return __builtin_cpu_supports("avx2") && has_f16c_and_fma() ? &aq_kernels_avx2 : 0;
#endif
#if defined(AQ_BUILD_AVX512)
    case AQ_ISA_AVX512: return has_avx512() ? &aq_kernels_avx512 : 0;
    case AQ_ISA_AVX512_VNNI: return has_avx512() && __builtin_cpu_supports("avx512vnni") ? &aq_kernels_avx512 : 0;
#endif
#if defined(AQ_BUILD_NEON)
    case AQ_ISA_NEON: return &aq_kernels_neon;
    case AQ_ISA_NEON_DOT: return has_byte_dot() ? &aq_kernels_neon : 0;
#endif
#if defined(AQ_BUILD_SIMD128)
    case AQ_ISA_SIMD128: return &aq_kernels_simd128;
#endif
    default: return 0;
  }
}

int32_t aq_abi_version(void) { return AQ_ABI_VERSION; }

int32_t aq_best_isa(void) {
  static const int32_t fastest_first[] = {AQ_ISA_AVX512_VNNI, AQ_ISA_AVX512, AQ_ISA_AVX2,
                                          AQ_ISA_NEON_DOT, AQ_ISA_NEON, AQ_ISA_SIMD128};
  for (size_t i = 0; i < sizeof fastest_first / sizeof *fastest_first; i++)
    if (kernels_of(fastest_first[i])) return fastest_first[i];
  return AQ_ISA_SCALAR;
}

int32_t aq_isa_supported(int32_t isa) { return isa == AQ_ISA_BEST || kernels_of(isa) != 0; }

const aq_kernels *aq_choose_kernels(int32_t isa) { return kernels_of(isa == AQ_ISA_BEST ? aq_best_isa() : isa); }

/* Sizes ------------------------------------------------------------------------------------------------------------- */

static int bits_allowed(int32_t bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }

static int group_size_allowed(size_t size) {
  return size == 0 || size == 16 || size == 32 || size == 64 || size == 128 || size == 256;
}

/* So that no element count times eight bytes wraps. */
int aq_counts_allowed(size_t rows, size_t cols) { return cols == 0 || rows <= SIZE_MAX / 16 / cols; }

static size_t words_of(size_t cols, int32_t bits) { return (cols * (size_t)bits + 31) / 32; }

int32_t aq_packed_words(size_t cols, int32_t bits, uint64_t *words) {
  if (!words || !bits_allowed(bits)) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(1, cols)) return AQ_E_SHAPE;
  *words = words_of(cols, bits);
  return AQ_OK;
}

int32_t aq_group_count(size_t cols, size_t group_size, uint64_t *groups) {
  if (!groups) return AQ_E_ARGUMENT;
  if (!group_size_allowed(group_size)) return AQ_E_SHAPE;
  *groups = cols == 0 ? 0 : group_size == 0 ? 1 : (cols - 1) / group_size + 1;
  return AQ_OK;
}

/* Threads ----------------------------------------------------------------------------------------------------------- */

#if !defined(AQ_NO_THREADS)
typedef struct {
  aq_part_function run;
  const void *context;
  size_t begin, end;
  int32_t status;
} part;

static void *run_part(void *argument) {
  part *p = argument;
  p->status = p->run(p->context, p->begin, p->end);
  return 0;
}
#endif

/* Below this many elements for each thread, starting one costs more than it saves. */
#define AQ_ELEMENTS_PER_THREAD 16384

size_t aq_thread_count(size_t units, size_t elements, int32_t threads) {
#if defined(AQ_NO_THREADS)
  (void)units;
  (void)elements;
  (void)threads;
  return 1;
#else
  const size_t wanted = threads < 1 ? 1 : aq_min_size((size_t)threads, AQ_MAX_THREADS);
  return aq_min_size(aq_min_size(wanted, units), elements / AQ_ELEMENTS_PER_THREAD + 1);
#endif
}

int32_t aq_run_units(aq_part_function run, const void *context, size_t units, size_t elements, int32_t threads) {
#if !defined(AQ_NO_THREADS)
  const size_t count = aq_thread_count(units, elements, threads);
  if (count > 1) {
    part parts[AQ_MAX_THREADS];
    pthread_t handles[AQ_MAX_THREADS];
    int started[AQ_MAX_THREADS];
    for (size_t i = 0; i < count; i++) {
      parts[i] = (part){run, context, units * i / count, units * (i + 1) / count, AQ_OK};
      started[i] = i > 0 && pthread_create(&handles[i], 0, run_part, &parts[i]) == 0;
    }
    int32_t status = AQ_OK;
    for (size_t i = 0; i < count; i++) {
      if (started[i])
        pthread_join(handles[i], 0);
      else
        run_part(&parts[i]); /* the caller's own share, and that of a thread that did not start */
      if (status == AQ_OK) status = parts[i].status;
    }
    return status;
  }
#endif
  (void)elements;
  (void)threads;
  return run(context, 0, units);
}

/* Codes ------------------------------------------------------------------------------------------------------------- */

typedef struct {
  const aq_kernels *kernels;
  const uint8_t *codes_in;
  uint8_t *codes_out;
  const uint32_t *packed_in;
  uint32_t *packed_out;
  size_t cols, words;
  int32_t bits;
} codes_job;

static int32_t pack_rows(const void *context, size_t begin, size_t end) {
  const codes_job *job = context;
  for (size_t row = begin; row < end; row++) {
    const int32_t status =
        job->kernels->pack_row(job->codes_in + row * job->cols, job->cols, job->bits, job->packed_out + row * job->words);
    if (status != AQ_OK) return status;
  }
  return AQ_OK;
}

static int32_t unpack_rows(const void *context, size_t begin, size_t end) {
  const codes_job *job = context;
  for (size_t row = begin; row < end; row++)
    job->kernels->unpack_row(job->packed_in + row * job->words, job->cols, job->bits, job->codes_out + row * job->cols);
  return AQ_OK;
}

int32_t aq_pack_codes(const uint8_t *codes, size_t rows, size_t cols, int32_t bits, uint32_t *packed, int32_t isa,
                      int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  const aq_kernels *kernels = aq_choose_kernels(isa);
  if (!kernels) return AQ_E_ISA;
  if (!codes || !packed || !bits_allowed(bits)) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  const codes_job job = {kernels, codes, 0, 0, packed, cols, words_of(cols, bits), bits};
  return aq_run_units(pack_rows, &job, rows, rows * cols, threads);
}

int32_t aq_unpack_codes(const uint32_t *packed, size_t rows, size_t cols, int32_t bits, uint8_t *codes, int32_t isa,
                        int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  const aq_kernels *kernels = aq_choose_kernels(isa);
  if (!kernels) return AQ_E_ISA;
  if (!codes || !packed || !bits_allowed(bits)) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  const codes_job job = {kernels, 0, codes, packed, 0, cols, words_of(cols, bits), bits};
  return aq_run_units(unpack_rows, &job, rows, rows * cols, threads);
}

/* Quantize ---------------------------------------------------------------------------------------------------------- */

typedef struct {
  const aq_kernels *kernels;
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
  const aq_kernels *kernels = aq_choose_kernels(isa);
  if (!kernels) return AQ_E_ISA;
  if (!weights || !packed || !scale || !bits_allowed(bits) || !aq_dtype_bytes(dtype)) return AQ_E_ARGUMENT;
  if (zero_point_kind < AQ_ZERO_POINT_REAL || zero_point_kind > AQ_ZERO_POINT_SYMMETRIC) return AQ_E_ARGUMENT;
  if ((zero_point == 0) != (zero_point_kind == AQ_ZERO_POINT_SYMMETRIC)) return AQ_E_ARGUMENT;
  if (!group_size_allowed(group_size) || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  if (column_weights)
    for (size_t i = 0; i < cols; i++)
      if (!(column_weights[i] >= 0.0f && column_weights[i] < __builtin_inff())) return AQ_E_VALUE;
  const size_t size = group_size == 0 ? cols : aq_min_size(group_size, cols);
  const quantize_context context = {kernels,
                                    {.weights = weights,
                                     .dtype = dtype,
                                     .cols = cols,
                                     .bits = bits,
                                     .group_size = size,
                                     .groups = (cols - 1) / size + 1,
                                     .words = words_of(cols, bits),
                                     .zero_point_kind = zero_point_kind,
                                     .clip = clip,
                                     .column_weights = column_weights,
                                     .packed = packed,
                                     .scale = scale,
                                     .zero_point = zero_point}};
  const int32_t status = aq_run_units(quantize_rows, &context, rows, rows * cols, threads);
  if (status == AQ_OK) return AQ_OK;
  /* Which group failed first depends on the split; which of the two faults the tensor has does not. */
  uint64_t index = 0;
  aq_find_nonfinite(weights, dtype, rows * cols, &index, isa, threads);
  return index < (uint64_t)rows * cols ? AQ_E_NONFINITE : AQ_E_RANGE;
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

/* Dequantize -------------------------------------------------------------------------------------------------------- */

typedef struct {
  const aq_kernels *kernels;
  aq_packed_view view;
  const void *weights; /* for statistics */
  void *out;           /* for dequantizing */
  int32_t dtype;
  size_t rows;
  aq_sums *parts;
} packed_context;

int32_t aq_view_packed(const uint32_t *packed, const uint16_t *scale, const uint16_t *zero_point, size_t rows,
                       size_t cols, int32_t bits, size_t group_size, aq_packed_view *view) {
  if (!packed || !scale || !bits_allowed(bits)) return AQ_E_ARGUMENT;
  if (!group_size_allowed(group_size) || !aq_counts_allowed(rows, cols)) return AQ_E_SHAPE;
  const size_t size = group_size == 0 ? cols : aq_min_size(group_size, cols);
  *view = (aq_packed_view){packed, scale, zero_point, cols, bits, size,
                           (cols - 1) / size + 1, words_of(cols, bits), 0, {0}};
  return AQ_OK;
}

/* Results from here on do not stay in a last-level cache anyway. */
#define AQ_STREAM_BYTES ((size_t)32 << 20)

static int32_t dequantize_rows(const void *context, size_t begin, size_t end) {
  const packed_context *c = context;
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

int32_t aq_dequantize_view(const aq_kernels *kernels, const aq_packed_view *view, size_t rows, void *out,
                           int32_t dtype, int32_t threads) {
  if (!out || (dtype != AQ_F32 && dtype != AQ_F16 && dtype != AQ_BF16)) return AQ_E_ARGUMENT;
  const size_t elements = rows * view->cols;
  packed_context context = {.kernels = kernels, .view = *view, .out = out, .dtype = dtype};
  context.view.stream = dtype == AQ_F32 && elements * sizeof(float) >= AQ_STREAM_BYTES;
  return aq_run_units(dequantize_rows, &context, rows, elements, threads);
}

int32_t aq_dequantize(const uint32_t *packed, const uint16_t *scale, const uint16_t *zero_point, size_t rows,
                      size_t cols, int32_t bits, size_t group_size, void *out, int32_t dtype, int32_t isa,
                      int32_t threads) {
  if (rows == 0 || cols == 0) return AQ_OK;
  const aq_kernels *kernels = aq_choose_kernels(isa);
  if (!kernels) return AQ_E_ISA;
  aq_packed_view view;
  const int32_t status = aq_view_packed(packed, scale, zero_point, rows, cols, bits, group_size, &view);
  return status == AQ_OK ? aq_dequantize_view(kernels, &view, rows, out, dtype, threads) : status;
}

/* Conversion -------------------------------------------------------------------------------------------------------- */

/* Elements of the unit that threads share out in flat arrays; a multiple of the sums' lanes. */
#define AQ_UNIT 4096

typedef struct {
  const aq_kernels *kernels;
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
  const flat_context context = {.kernels = aq_choose_kernels(isa), .a = in, .a_dtype = in_dtype, .out = out,
                                .out_dtype = out_dtype, .n = n};
  if (!context.kernels) return AQ_E_ISA;
  if (!in || !out || !aq_dtype_bytes(in_dtype) || !aq_dtype_bytes(out_dtype)) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(1, n)) return AQ_E_SHAPE;
  return aq_run_units(convert_units, &context, (n - 1) / AQ_UNIT + 1, n, threads);
}

typedef struct {
  const void *values;
  int32_t dtype;
  const aq_kernels *kernels;
  size_t n;
  uint64_t *index;
} find_context;

static uint64_t first_nonfinite(const find_context *c) {
  for (size_t i = 0; i < c->n; i += AQ_SEGMENT) {
    float segment[AQ_SEGMENT];
    const size_t n = aq_min_size(AQ_SEGMENT, c->n - i);
    uint32_t largest = 0;
    c->kernels->load(c->values, c->dtype, i, n, segment);
    for (size_t k = 0; k < n; k++) {
      const uint32_t magnitude = aq_float_bits(segment[k]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
    if (largest < 0x7f800000u) continue;
    for (size_t k = 0; k < n; k++)
      if ((aq_float_bits(segment[k]) & 0x7fffffffu) >= 0x7f800000u) return i + k;
  }
  return c->n;
}

int32_t aq_find_nonfinite(const void *values, int32_t dtype, size_t n, uint64_t *index, int32_t isa, int32_t threads) {
  (void)threads; /* bound by memory, and the first index wants an order */
  if (!index) return AQ_E_ARGUMENT;
  *index = 0;
  if (n == 0) return AQ_OK;
  const find_context context = {values, dtype, aq_choose_kernels(isa), n, index};
  if (!context.kernels) return AQ_E_ISA;
  if (!values || !aq_dtype_bytes(dtype)) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(1, n)) return AQ_E_SHAPE;
  *index = first_nonfinite(&context);
  return AQ_OK;
}

/* Error statistics -------------------------------------------------------------------------------------------------- */

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
  flat_context context = {.kernels = aq_choose_kernels(isa), .a = a, .b = b, .a_dtype = a_dtype, .b_dtype = b_dtype, .n = n,
                          .parts = parts};
  if (!context.kernels) return AQ_E_ISA;
  if (!a || !b || !aq_dtype_bytes(a_dtype) || !aq_dtype_bytes(b_dtype)) return AQ_E_ARGUMENT;
  if (!aq_counts_allowed(1, n)) return AQ_E_SHAPE;
  const size_t units = (n - 1) / AQ_UNIT + 1;
  context.part_elements = ((units - 1) / AQ_PARTS + 1) * AQ_UNIT;
  const size_t count = (n - 1) / context.part_elements + 1;
  const int32_t status = aq_run_units(flat_statistics, &context, count, n, threads);
  add_parts(parts, count, statistics);
  return status;
}

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

int32_t aq_view_statistics(const aq_kernels *kernels, const aq_packed_view *view, size_t rows, const void *weights,
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
  const aq_kernels *kernels = aq_choose_kernels(isa);
  if (!kernels) return AQ_E_ISA;
  aq_packed_view view;
  const int32_t status = aq_view_packed(packed, scale, zero_point, rows, cols, bits, group_size, &view);
  return status == AQ_OK ? aq_view_statistics(kernels, &view, rows, weights, dtype, statistics, threads) : status;
}
