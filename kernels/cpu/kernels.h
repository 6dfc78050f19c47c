/* kernels.h: what an instruction set implements. Each implementation file (scalar.c, avx2.c, ...) fills one
 * aq_kernels; api.c and model_api.c check arguments, split rows over threads and call through it. */
#ifndef AQ_KERNELS_H
#define AQ_KERNELS_H

#include "../include/arrowquant.h"
#include "../arithmetic/group.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed words are little-endian, and so must the processor be"
#endif

/* Columns that a kernel holds at once: a multiple of every group size and of the 32 codes that fill whole words
 * at any width. Sums over longer groups are sums of segments' sums, in every instruction set. */
#define AQ_SEGMENT 256

/* Lanes of the float64 sums: element i of a run belongs to lane i mod 8. */
#define AQ_SUM_LANES 8

/* Clipped ranges tried by aq_quantize_clip, and rounds of least squares after the best of them. */
#define AQ_CLIP_STEPS 12
#define AQ_REFITS 5

typedef struct {
  const void *weights;
  int32_t dtype;
  size_t cols;
  int32_t bits;
  size_t group_size; /* 1..cols */
  size_t groups;     /* of one row */
  size_t words;      /* of one packed row */
  int32_t zero_point_kind;
  int32_t clip; /* search, or round to nearest only */
  const float *column_weights;
  uint32_t *packed;
  uint16_t *scale;
  uint16_t *zero_point; /* null when symmetric */
} aq_quantize_job;

/* Two-level scales of a packed matrix (two_level.h); scale_bits 0: it has plain ones. */
typedef struct {
  int32_t scale_bits;
  const uint8_t *sub_scale, *sub_min;
  const uint16_t *super_scale, *super_min;
  size_t super_groups; /* groups of a superblock */
  size_t supers;       /* superblocks of a row */
  size_t sub_bytes;    /* bytes of a row's sub-scales */
} aq_two_level_view;

typedef struct aq_two_level_job aq_two_level_job; /* two_level.h */

typedef struct {
  const uint32_t *packed;
  const uint16_t *scale;
  const uint16_t *zero_point; /* null when symmetric */
  size_t cols;
  int32_t bits;
  size_t group_size;
  size_t groups;
  size_t words;
  int32_t stream; /* the result is larger than any cache: store past them */
  aq_two_level_view two_level;
} aq_packed_view;

/* The sums behind the statistics of arrowquant.h, by lane, and the two maxima. */
typedef struct {
  double aa[AQ_SUM_LANES], bb[AQ_SUM_LANES], ab[AQ_SUM_LANES], dd[AQ_SUM_LANES];
  float max_difference, max_a;
} aq_sums;

typedef struct aq_model_kernels aq_model_kernels;   /* model.h */
typedef struct aq_solver_kernels aq_solver_kernels; /* solver.h */

typedef struct {
  /* Quantizes rows [row_begin, row_end). */
  int32_t (*quantize_rows)(const aq_quantize_job *job, size_t row_begin, size_t row_end);
  int32_t (*quantize_two_level)(const aq_two_level_job *job, size_t row_begin, size_t row_end);
  /* out[0..n) = weights of `row` from column `col`, a multiple of AQ_SEGMENT; n <= AQ_SEGMENT unless at the end. */
  void (*dequantize)(const aq_packed_view *view, size_t row, size_t col, size_t n, float *out);
  int32_t (*pack_row)(const uint8_t *codes, size_t cols, int32_t bits, uint32_t *packed);
  void (*unpack_row)(const uint32_t *packed, size_t cols, int32_t bits, uint8_t *codes);
  /* out[0..n) = elements [first, first + n) of `in` as float32. */
  void (*load)(const void *in, int32_t dtype, size_t first, size_t n, float *out);
  void (*store)(const float *in, size_t n, void *out, int32_t dtype, size_t first);
  void (*accumulate)(const float *a, const float *b, size_t n, aq_sums *sums);
  const aq_model_kernels *model;
  const aq_solver_kernels *solver;
} aq_kernels;

extern const aq_kernels aq_kernels_scalar;
#if defined(AQ_BUILD_AVX2)
extern const aq_kernels aq_kernels_avx2;
#endif
#if defined(AQ_BUILD_AVX512)
extern const aq_kernels aq_kernels_avx512;
#endif
#if defined(AQ_BUILD_NEON)
extern const aq_kernels aq_kernels_neon;
#endif
#if defined(AQ_BUILD_SIMD128)
extern const aq_kernels aq_kernels_simd128;
#endif

/* Shared by the API's files; defined in api.c. */
typedef int32_t (*aq_part_function)(const void *context, size_t begin, size_t end);
const aq_kernels *aq_choose_kernels(int32_t isa); /* null: not in this build or not on this processor */
int aq_counts_allowed(size_t rows, size_t cols);
int32_t aq_view_packed(const uint32_t *packed, const uint16_t *scale, const uint16_t *zero_point, size_t rows,
                       size_t cols, int32_t bits, size_t group_size, aq_packed_view *view);
int32_t aq_view_two_level(const uint32_t *packed, const uint8_t *sub_scale, const uint8_t *sub_min,
                          const uint16_t *super_scale, const uint16_t *super_min, size_t rows, size_t cols,
                          int32_t bits, size_t group_size, int32_t scale_bits, aq_packed_view *view);
int32_t aq_dequantize_view(const aq_kernels *kernels, const aq_packed_view *view, size_t rows, void *out,
                           int32_t dtype, int32_t threads);
int32_t aq_view_statistics(const aq_kernels *kernels, const aq_packed_view *view, size_t rows, const void *weights,
                           int32_t dtype, double *statistics, int32_t threads);
/* How many threads `elements` of work, in `units` parts, are worth. */
size_t aq_thread_count(size_t units, size_t elements, int32_t threads);
/* Runs units [0, units) split into contiguous ranges. Every unit writes its own outputs, so the split is invisible. */
int32_t aq_run_units(aq_part_function run, const void *context, size_t units, size_t elements, int32_t threads);

/* Bytes of one element of a dtype, 0 if it is none. */
static inline size_t aq_dtype_bytes(int32_t dtype) {
  switch (dtype) {
    case AQ_F32: return 4;
    case AQ_F16:
    case AQ_BF16: return 2;
    case AQ_F8_E4M3:
    case AQ_F8_E5M2: return 1;
    case AQ_F64: return 8;
    default: return 0;
  }
}

#define AQ_INLINE static inline __attribute__((always_inline))

AQ_INLINE size_t aq_min_size(size_t a, size_t b) { return a < b ? a : b; }

#endif
