/* cuda.cu: the kernels of the CUDA library against the scalar oracle, to the bit or within tolerances, on
 * awkward shapes; on a device or, built with the emulator's headers, on the host. Exit status 77 without a
 * device.
 *
 *     driver [seed] [share | quick]
 *     driver bench [small]             timings alone */
#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "../include/arrowquant_cuda.h"
#include "harness.h"

typedef std::vector<uint8_t> bytes;

static aq_cuda_stream stream;

static void require(int32_t status, const char *what) {
  if (status == AQ_OK) return;
  uint8_t text[256];
  aq_cuda_describe_status(status, text, sizeof text);
  printf("FAILED %s: status %d, %s\n", what, (int)status, (const char *)text);
  exit(1);
}

/* A buffer of the device with GUARD bytes behind its contents that no kernel may touch. Of null it is the
 * handle 0. */
struct device_bytes {
  aq_cuda_buffer handle;
  size_t size;
  device_bytes(const void *from, size_t n) : handle(0), size(n) {
    if (!from) return;
    uint64_t made = 0;
    require(aq_cuda_allocate(n + GUARD, &made, stream), "allocate");
    handle = (aq_cuda_buffer)made;
    require(aq_cuda_upload(from, n, handle, 0, stream), "upload");
    const bytes guard(GUARD, 0xa5);
    require(aq_cuda_upload(guard.data(), GUARD, handle, n, stream), "upload");
  }
  device_bytes(const device_bytes &) = delete;
  ~device_bytes() { require(aq_cuda_free(handle), "free"); }
};

/* An output: the oracle's, and one of the device that no kernel has written. */
struct output {
  bytes expected;
  device_bytes own;
  explicit output(size_t size) : expected(size, 0xa5), own(bytes(size, 0xcd).data(), size) {}
  template <class T>
  T *of() {
    return (T *)expected.data();
  }
  /* After a fault only the guard counts. */
  void compare(const char *kernel, const char *where, bool whole) const {
    bytes actual(own.size + GUARD);
    require(aq_cuda_download(own.handle, 0, actual.data(), actual.size(), stream), "download");
    if (whole) expect_bytes(kernel, where, expected.data(), actual.data(), own.size);
    expect_guard(kernel, where, actual.data(), own.size);
  }
};

/* Inputs ----------------------------------------------------------------------------------------------- */

enum { NOT_FINITE = PATTERNS, HUGE_VALUES, ALL_PATTERNS }; /* these two have a fault */

static std::vector<float> values_of(size_t n, int pattern) {
  std::vector<float> w(n);
  fill(w.data(), n, pattern);
  if (pattern == NOT_FINITE) w[random_bits() % n] = random_bits() % 2 ? NAN : -INFINITY;
  if (pattern == HUGE_VALUES) w[random_bits() % n] = 3e38f;
  return w;
}

/* One in twelve has a fault. */
static int random_pattern(void) {
  return random_bits() % 12 ? (int)(random_bits() % NOT_FINITE) : NOT_FINITE + (int)(random_bits() % 2);
}

/* A matrix and how its groups are searched: 0 range only, 1 search, 2 search with column weights. */
struct matrix_case {
  size_t rows, cols;
  int32_t bits;
  size_t group_size;
  int32_t dtype;
  int pattern, search;
};

/* The matrix of a case, for the oracle and on the device. */
struct inputs {
  bytes weights;
  std::vector<float> column_weights;
  device_bytes own_weights, own_column_weights;
  explicit inputs(const matrix_case &c)
      : weights(made(c)), column_weights(columns(c)), own_weights(weights.data(), weights.size()),
        own_column_weights(c.search == 2 ? column_weights.data() : 0, 4 * c.cols) {}
  const float *columns_or_null(const matrix_case &c) const { return c.search == 2 ? column_weights.data() : 0; }

  static bytes made(const matrix_case &c) {
    const std::vector<float> values = values_of(c.rows * c.cols, c.pattern);
    bytes b(values.size() * dtype_bytes(c.dtype));
    aq_convert(values.data(), AQ_F32, b.data(), c.dtype, values.size(), AQ_ISA_SCALAR, 1);
    return b;
  }
  static std::vector<float> columns(const matrix_case &c) {
    std::vector<float> h(c.cols);
    for (float &value : h) value = random_bits() % 4 ? expf(2.0f * gaussian()) : 0.0f;
    if (random_bits() % 2)
      for (size_t i = 0; i < c.cols && i < 300; i++) h[i] = 0.0f;
    if (random_bits() % 50 == 0) h[random_bits() % c.cols] = -1.0f;
    return h;
  }
};

static size_t words_of(const matrix_case &c) {
  uint64_t words = 0;
  aq_packed_words(c.cols, c.bits, &words);
  return (size_t)words;
}

/* Cases ------------------------------------------------------------------------------------------------ */

static void run_plain(const matrix_case &c, int32_t kind) {
  const char *kernel = c.search == 0 ? "round" : c.search == 1 ? "clip" : "clip, column weights";
  char where[160];
  snprintf(where, sizeof where, "%zux%zu, %d bits, group %zu, kind %d, dtype %d, pattern %d", c.rows, c.cols, c.bits,
           c.group_size, kind, c.dtype, c.pattern);
  uint64_t groups = 0;
  aq_group_count(c.cols, c.group_size, &groups);
  const inputs in(c);
  output packed(c.rows * words_of(c) * 4), scale(c.rows * groups * 2), zero(c.rows * groups * 2);
  const bool symmetric = kind == AQ_ZERO_POINT_SYMMETRIC;
  uint16_t *oracle_zero = symmetric ? 0 : zero.of<uint16_t>();
  const aq_cuda_buffer w = in.own_weights.handle, h = in.own_column_weights.handle, p = packed.own.handle,
                       s = scale.own.handle, z = symmetric ? 0 : zero.own.handle;
  const int32_t status =
      c.search ? aq_quantize_clip(in.weights.data(), c.dtype, c.rows, c.cols, c.bits, c.group_size, kind,
                                  in.columns_or_null(c), packed.of<uint32_t>(), scale.of<uint16_t>(), oracle_zero,
                                  AQ_ISA_SCALAR, 1)
               : aq_quantize_round(in.weights.data(), c.dtype, c.rows, c.cols, c.bits, c.group_size, kind,
                                   packed.of<uint32_t>(), scale.of<uint16_t>(), oracle_zero, AQ_ISA_SCALAR, 1);
  expect_status(kernel, where,
                c.search ? aq_cuda_quantize_clip(w, c.dtype, c.rows, c.cols, c.bits, c.group_size, kind, h, p, s, z, stream)
                         : aq_cuda_quantize_round(w, c.dtype, c.rows, c.cols, c.bits, c.group_size, kind, p, s, z, stream),
                status);
  packed.compare(kernel, where, status == AQ_OK);
  scale.compare(kernel, where, status == AQ_OK);
  if (!symmetric) zero.compare(kernel, where, status == AQ_OK);
}

static void run_two_level(const matrix_case &c, int32_t scale_bits) {
  const char *kernel = c.search ? "two levels, search" : "two levels, range";
  char where[160];
  snprintf(where, sizeof where, "%zux%zu, %d bits, group %zu, %d scale bits, dtype %d, pattern %d, search %d", c.rows, c.cols,
           c.bits, c.group_size, scale_bits, c.dtype, c.pattern, c.search);
  uint64_t sizes[2] = {0, 0};
  aq_two_level_sizes(c.cols, c.group_size, scale_bits, sizes);
  const inputs in(c);
  output packed(c.rows * words_of(c) * 4), sub_scale(c.rows * sizes[0]), sub_min(c.rows * sizes[0]),
      super_scale(c.rows * sizes[1] * 2), super_min(c.rows * sizes[1] * 2);
  const int32_t status = aq_quantize_two_level(
      in.weights.data(), c.dtype, c.rows, c.cols, c.bits, c.group_size, scale_bits, c.search > 0, in.columns_or_null(c),
      packed.of<uint32_t>(), sub_scale.of<uint8_t>(), sub_min.of<uint8_t>(), super_scale.of<uint16_t>(),
      super_min.of<uint16_t>(), AQ_ISA_SCALAR, 1);
  expect_status(kernel, where,
                aq_cuda_quantize_two_level(in.own_weights.handle, c.dtype, c.rows, c.cols, c.bits, c.group_size, scale_bits,
                                           c.search > 0, in.own_column_weights.handle, packed.own.handle,
                                           sub_scale.own.handle, sub_min.own.handle, super_scale.own.handle,
                                           super_min.own.handle, stream),
                status);
  for (const output *out : {&packed, &sub_scale, &sub_min, &super_scale, &super_min})
    out->compare(kernel, where, status == AQ_OK);
}

static void run_shapes(void) {
  for (size_t cols : {1,  7,   8,   15,  16,  17,  31,  32,  33,  63,  64,  65,
                      100, 127, 128, 160, 255, 256, 257, 300, 512, 777, 1000, 1030})
    for (size_t group_size : {0, 16, 32, 64, 128, 256})
      for (int32_t bits : {2, 3, 4, 8})
        for (int search = 0; search < 3; search++) {
          for (int32_t kind = 0; kind <= AQ_ZERO_POINT_OFFSET; kind++)
            if (!passed_over(1))
              run_plain({1 + random_bits() % 37, cols, bits, group_size, (int32_t)(random_bits() % 6), random_pattern(), search},
                        kind);
          for (int32_t scale_bits : {4, 6})
            if (group_size != 0 && group_size <= 128 && !passed_over(1))
              run_two_level(
                  {1 + random_bits() % 23, cols, bits, group_size, (int32_t)(random_bits() % 6), random_pattern(), search},
                  scale_bits);
        }
  /* every pattern and type with vectors of whole chunks, and more groups than a tile holds */
  for (int pattern = 0; pattern < ALL_PATTERNS; pattern++)
    for (int32_t dtype = AQ_F32; dtype <= AQ_F64; dtype++) {
      run_plain({67, 512, 4, 32, dtype, pattern, pattern % 3}, AQ_ZERO_POINT_REAL);
      run_two_level({20, 512, 4, 32, dtype, pattern, pattern % 3}, 6);
    }
  /* rows of many segments */
  for (int search = 0; search < 3; search++) run_plain({3, 9000, 2, 0, AQ_BF16, GAUSSIAN, search}, AQ_ZERO_POINT_REAL);
}

#include "cuda/tensor.h"
#include "cuda/solver.h"
#include "cuda/copies.h"
#include "cuda/forward.h"
#include "cuda/dequantize.h"
#include "cuda/int8.h"
#include "cuda/levels.h"
#include "cuda/trellis.h"
#include "cuda/trellis_solver.h"
#include "cuda/backward.h"
#include "cuda/experts.h"
#include "cuda/memory.h"
#include "cuda/bench.h"

/* A wrong call gets a status, and nothing else happens. */
static void run_refusals(void) {
  const std::vector<float> values(64);
  const device_bytes b(values.data(), 4 * values.size());
  const char *kernel = "refusals";
  const auto quantized = [](aq_cuda_buffer weights, size_t rows, size_t cols, int32_t bits, aq_cuda_buffer out) {
    return aq_cuda_quantize_round(weights, AQ_F32, rows, cols, bits, 0, AQ_ZERO_POINT_REAL, out, out, out, stream);
  };
  expect_status(kernel, "no handle", quantized(0, 1, 8, 4, b.handle), AQ_E_ARGUMENT);
  expect_status(kernel, "a stream as a buffer", quantized(stream, 1, 8, 4, b.handle), AQ_E_ARGUMENT);
  expect_status(kernel, "too small", quantized(b.handle, 1, 100000, 4, b.handle), AQ_E_SHAPE);
  expect_status(kernel, "five bits", quantized(b.handle, 1, 8, 5, b.handle), AQ_E_ARGUMENT);
  expect_status(kernel, "no rows", quantized(0, 0, 8, 4, 0), AQ_OK);
  expect_status(kernel, "copy of more than there is", aq_cuda_copy(b.handle, b.handle, 1000, stream), AQ_E_SHAPE);
  expect_status(kernel, "upload past the end", aq_cuda_upload(values.data(), 256, b.handle, SIZE_MAX, stream), AQ_E_SHAPE);
  uint64_t none = 1;
  expect_status(kernel, "more than there is", aq_cuda_allocate((size_t)1 << 50, &none, stream), AQ_E_MEMORY);
  expect_status(kernel, "and goes on", quantized(b.handle, 1, 8, 4, b.handle), AQ_OK);
}

int main(int argc, char **argv) {
  uint8_t text[512];
  if (aq_cuda_describe_device(0, text, sizeof text) != AQ_OK) {
    printf("skipped: %s\n", (const char *)text);
    return 77;
  }
  printf("%s\n", (const char *)text);
  const bool is_bench = argc > 1 && strcmp(argv[1], "bench") == 0;
  begin(is_bench ? 1 : argc, argv);
  if (!is_bench) run_memory();
  uint64_t made = 0;
  require(aq_cuda_create_stream(0, &made), "create a stream");
  stream = (aq_cuda_stream)made;
  if (is_bench) {
    run_bench(argc > 2);
    return 0;
  }
  run_shapes();
  run_copies();
  run_tensor_products();
  run_solvers();
  run_forward();
  run_dequantize();
  run_int8();
  run_levels();
  run_trellis_shapes();
  run_trellis_solvers();
  run_backward();
  run_mixtures();
  run_refusals();
  require(aq_cuda_free_stream(stream), "free the stream");
  return finish();
}
