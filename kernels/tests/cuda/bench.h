/* bench.h: what the kernels of a device take at the shapes of Dream 7B, by the device's own clock, each
 * beside a copy within its memory and the peak of products in bfloat16; included by cuda.cu. No result is
 * looked at here: the driver's cases do that. */
#include "cublas.h"

/* A buffer of the device; of zeros, or of repeated values. */
struct bench_buffer {
  aq_cuda_buffer handle;
  bench_buffer(size_t size, const std::vector<uint8_t> &values = bytes(1 << 20)) : handle(0) {
    uint64_t made = 0;
    require(aq_cuda_allocate(size, &made, stream), "allocate");
    handle = (aq_cuda_buffer)made;
    for (size_t at = 0; at < size; at += values.size())
      require(aq_cuda_upload(values.data(), values.size() < size - at ? values.size() : size - at, handle, at, stream), "upload");
  }
  bench_buffer(const bench_buffer &) = delete;
  ~bench_buffer() { require(aq_cuda_free(handle), "free"); }
};

static bytes repeated(float factor) {
  const std::vector<float> values = normal_values(1 << 18, factor);
  return bytes((const uint8_t *)values.data(), (const uint8_t *)(values.data() + values.size()));
}

template <class T>
static bytes constants(T value) {
  const std::vector<T> values((1 << 20) / sizeof(T), value);
  return bytes((const uint8_t *)values.data(), (const uint8_t *)(values.data() + values.size()));
}

static bool is_small;
static double copy_rate;    /* bytes a second */
static double bfloat_peak; /* operations a second of dense products; 0 where it is not known */

/* Of tensor cores: multiprocessors, their highest clock, and operations of one in a cycle. */
static double peak_of_device(void) {
  cudaDeviceProp device;
  int kilohertz = 0;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, 0) != cudaSuccess) return 0;
  const double each = device.major == 9 ? 4096 : device.major == 8 && device.minor == 0 ? 2048 : 0;
  return each * device.multiProcessorCount * kilohertz * 1e3;
}

static void print_rates(const char *what, double milliseconds, double moved, double flops) {
  const double seconds = milliseconds * 1e-3;
  printf("%-44s %9.3f ms %8.0f GB/s %5.2f of copy %8.2f TFLOP/s", what, milliseconds, moved / seconds * 1e-9,
         copy_rate > 0 ? moved / seconds / copy_rate : 1.0, flops / seconds * 1e-12);
  if (bfloat_peak > 0 && flops > 0) printf(" %5.1f %% of bfloat16 peak", 100 * flops / seconds / bfloat_peak);
  printf("\n");
}

/* A goal of docs/cuda.md, and whether this run meets it; NAN: it could not be measured. */
static void print_goal(const char *what, double measured, double least) {
  const char *outcome = is_small ? "small sizes, no figure" : !(measured == measured) ? "not run" : measured >= least ? "met" : "missed";
  printf("GOAL %-64s wanted %6.2f, got %6.2f: %s\n", what, least, measured, outcome);
}

/* Median milliseconds of a call, and what they mean: bytes that it cannot do without, floating-point
 * operations. */
template <class Call>
static double bench(const char *what, double moved, double flops, const Call &call) {
  double each[9];
  require(call(), what);
  for (double &milliseconds : each) {
    require(aq_cuda_begin_timing(stream), "timing");
    require(call(), what);
    require(aq_cuda_end_timing(stream, &milliseconds), "timing");
  }
  std::sort(each, each + 9);
  print_rates(what, each[4], moved, flops);
  return moved / (each[4] * 1e-3);
}

static void bench_linear(size_t tokens, size_t rows, size_t cols, const bench_buffer &x, const bench_buffer &out) {
  const double n = (double)rows * (double)cols, flops = 2.0 * n * (double)tokens;
  char what[80];
  const bench_buffer weights(rows * cols * 4, repeated(0.1f)), halves(rows * cols / 64 * 2, constants<uint16_t>(0x2c00));
  for (int32_t dtype : {AQ_F32, AQ_BF16}) {
    snprintf(what, sizeof what, "linear, %zu tokens, %zu x %zu, %s", tokens, rows, cols, dtype == AQ_F32 ? "float32" : "bfloat16");
    const double moved = n * (dtype == AQ_F32 ? 4 : 2), seconds = moved / bench(what, moved, flops, [&] {
      return aq_cuda_linear(x.handle, tokens, weights.handle, dtype, 0, rows, cols, out.handle, stream);
    });
    if (tokens > 256 && dtype == AQ_BF16)
      print_goal("products of 4096 tokens, weights in bfloat16, of the peak", bfloat_peak > 0 ? flops / seconds / bfloat_peak : NAN, 0.4);
  }
  for (int32_t bits : {4, 2}) {
    snprintf(what, sizeof what, "linear, %zu tokens, %zu x %zu, %d bits", tokens, rows, cols, (int)bits);
    const double rate = bench(what, n * bits / 8 + n / 64 * 4, flops, [&] {
      return aq_cuda_linear_packed(x.handle, tokens, weights.handle, halves.handle, halves.handle, 0, rows, cols, bits, 64, out.handle, stream);
    });
    snprintf(what, sizeof what, "products of one token, weights of %d bits, of the bandwidth", (int)bits);
    if (tokens == 1) print_goal(what, rate / copy_rate, 0.7);
  }
}

/* 8-bit activations: they are rounded, then multiplied with packed weights. */
static void bench_int8(size_t tokens, size_t rows, size_t cols, const bench_buffer &x, const bench_buffer &out) {
  const double n = (double)rows * (double)cols, values = (double)tokens * (double)cols;
  char what[80];
  const bench_buffer weights(rows * cols / 2, repeated(0.1f)), halves(rows * cols / 64 * 2, constants<uint16_t>(0x2c00));
  const bench_buffer codes(tokens * cols), scale(tokens * 4), zero(tokens * 4);
  snprintf(what, sizeof what, "activations to 8 bits, %zu tokens of %zu", tokens, cols);
  bench(what, 5.0 * values, 0, [&] {
    return aq_cuda_quantize_activations(x.handle, tokens, cols, 8, AQ_ACTIVATIONS_PER_TOKEN, codes.handle, scale.handle, zero.handle, stream);
  });
  for (int32_t bits : {4, 2}) {
    snprintf(what, sizeof what, "8-bit linear, %zu tokens, %zu x %zu, %d bits", tokens, rows, cols, (int)bits);
    bench(what, n * bits / 8 + n / 64 * 4 + values, 2.0 * n * (double)tokens, [&] {
      return aq_cuda_linear_packed_int8(codes.handle, scale.handle, zero.handle, tokens, weights.handle, halves.handle, halves.handle, 0, rows,
                                        cols, bits, 64, out.handle, stream);
    });
  }
}

static void bench_solver(size_t n, size_t tokens) {
  const double square = (double)n * (double)n, cube = square * (double)n;
  const bench_buffer x(tokens * n * 4, repeated(1.0f)), moment(n * n * 4), other(n * n * 4, repeated(0.1f)), pivots(n * 4, constants(1.0f));
  bench("product", 12.0 * square, 2.0 * square * (double)tokens,
        [&] { return aq_cuda_multiply(x.handle, other.handle, tokens, n, n, x.handle, stream); });
  const double triangle = square * (double)tokens, seconds = 4.0 * square / bench("moment, its upper triangle", 4.0 * square, triangle, [&] {
    return aq_cuda_accumulate_moment(x.handle, 0, 0, tokens, n, n, n, moment.handle, stream);
  });
  print_goal("second moments of 4096 tokens, of the peak", bfloat_peak > 0 ? triangle / seconds / bfloat_peak : NAN, 0.4);
  std::vector<float> unit(n * n);
  for (size_t i = 0; i < n; i++) unit[i * n + i] = 1.0f;
  const bench_buffer factor(n * n * 4, bytes((uint8_t *)unit.data(), (uint8_t *)(unit.data() + n * n)));
  bench("factor of a moment", 4.0 * square, cube / 3.0, [&] { return aq_cuda_factor_moment(factor.handle, n, pivots.handle, stream); });
  bench("rows times the inverse", 8.0 * square, 2.0 * cube,
        [&] { return aq_cuda_solve_moment(factor.handle, pivots.handle, n, other.handle, n, stream); });
  std::vector<int32_t> order(n);
  for (size_t k = 0; k < n; k++) order[k] = (int32_t)k;
  const bench_buffer columns(n * 4, bytes((uint8_t *)order.data(), (uint8_t *)(order.data() + n)));
  const bench_buffer weights(n * n * 4, repeated(0.1f)), scale(n * n / 64 * 4, constants(0.1f)), zero(n * n / 64 * 4, constants(1.5f));
  const bench_buffer codes(n * n), objective(n * 8);
  bench("feedback, 2 bits, group 64", 4.0 * square, cube, [&] {
    return aq_cuda_quantize_feedback(weights.handle, n, n, 2, 64, scale.handle, zero.handle, n, factor.handle, pivots.handle,
                                     columns.handle, codes.handle, objective.handle, stream);
  });
  bench("refits and descent, a round", 4.0 * square, 4.0 * cube, [&] {
    return aq_cuda_refine_codes(weights.handle, n, n, 2, 64, AQ_ZERO_POINT_REAL, n, factor.handle, 1, 1, 1, codes.handle, scale.handle,
                                zero.handle, objective.handle, stream);
  });
  const bench_buffer table(1024, constants(0.5f));
  const size_t rows = is_small ? 4 : 256;
  bench("trellis search, 2 bits, 256 rows", 4.0 * (double)(rows * n), 0, [&] {
    return aq_cuda_search_trellis(weights.handle, rows, n, 2, 64, table.handle, 0, scale.handle, zero.handle, n, factor.handle,
                                  pivots.handle, codes.handle, objective.handle, stream);
  });
}

static void bench_quantizing(size_t rows, size_t cols) {
  const double n = (double)rows * (double)cols;
  const bench_buffer w(rows * cols * 2, constants<uint16_t>(0x3e00)), packed(rows * cols / 2), scale(rows * cols / 64 * 2), zero(rows * cols / 64 * 2);
  copy_rate = 0;
  copy_rate = bench("copy", 4.0 * n, 0, [&] {
    const bench_buffer &from = w;
    static const bench_buffer *to = new bench_buffer((size_t)n * 2);
    return aq_cuda_copy(from.handle, to->handle, (size_t)n * 2, stream);
  });
  const double moved = 2.5 * n + n / 16;
  const double round = bench("quantize, round, 4 bits, group 64", moved, 0, [&] {
    return aq_cuda_quantize_round(w.handle, AQ_BF16, rows, cols, 4, 64, AQ_ZERO_POINT_REAL, packed.handle, scale.handle, zero.handle, stream);
  });
  print_goal("round to nearest, of a copy's bandwidth", round / copy_rate, 0.8);
  const double rate = bench("quantize, clip, 4 bits, group 64", moved, 0, [&] {
    return aq_cuda_quantize_clip(w.handle, AQ_BF16, rows, cols, 4, 64, AQ_ZERO_POINT_REAL, 0, packed.handle, scale.handle, zero.handle, stream);
  });
  print_goal("clip search, 10^9 weights a second", rate / moved * n * 1e-9, 20);
  const bench_buffer sub_scale(rows * cols / 16), sub_min(rows * cols / 16), super_scale(rows * cols / 256 * 2 + rows * 2),
      super_min(rows * cols / 256 * 2 + rows * 2);
  bench("quantize, symmetric two levels, 3 bits", (2 + 3.0 / 8) * n + n / 8 + n / 64, 0, [&] {
    return aq_cuda_quantize_symmetric_levels(w.handle, AQ_BF16, 0, 0, rows, cols, 3, 16, 8, packed.handle, sub_scale.handle, sub_min.handle,
                                             super_scale.handle, super_min.handle, stream);
  });
}

static void bench_dequantizing(size_t rows, size_t cols) {
  const double n = (double)rows * (double)cols;
  const bench_buffer packed(rows * cols / 2, repeated(1.0f)), halves(rows * cols / 64 * 2, constants<uint16_t>(0x2c00)), out(rows * cols * 2);
  for (int32_t bits : {4, 2}) {
    char what[80];
    snprintf(what, sizeof what, "dequantize, %d bits, group 64, to bfloat16", (int)bits);
    const double rate = bench(what, n * (2 + bits / 8.0) + n / 16, 0, [&] {
      return aq_cuda_dequantize(packed.handle, halves.handle, halves.handle, rows, cols, bits, 64, out.handle, AQ_BF16, stream);
    });
    snprintf(what, sizeof what, "dequantizing, %d bits, of a copy's bandwidth", (int)bits);
    print_goal(what, rate / copy_rate, 0.8);
  }
}

/* The same product by cuBLAS. */
static void bench_cublas(size_t tokens, size_t rows, size_t cols) {
  char what[80];
  snprintf(what, sizeof what, "cuBLAS, %zu tokens, %zu x %zu, bfloat16", tokens, rows, cols);
  const double milliseconds = cublas_milliseconds(tokens, rows, cols), n = (double)rows * (double)cols;
  if (milliseconds > 0) print_rates(what, milliseconds, 2 * n, 2.0 * n * (double)tokens);
  else printf("%s: skipped, no libcublas.so\n", what);
}

#include "step.h"

/* Shapes of Dream 7B, or small ones to try the bench itself. What the goals of docs/cuda.md need comes
 * first. */
static void run_bench(bool small) {
  is_small = small;
  bfloat_peak = peak_of_device();
  printf("bfloat16 peak: %.0f TFLOP/s. Products of float32 numbers are three of parts there, with weights in bfloat16 two.\n",
         bfloat_peak * 1e-12);
  const size_t width = small ? 64 : 3584, inner = small ? 128 : 18944, tokens = small ? 32 : 4096;
  const size_t heads = small ? 1 : 28, kv_heads = small ? 1 : 4, head_size = small ? 64 : 128;
  bench_quantizing(small ? 64 : 16384, small ? 128 : 16384);
  bench_dequantizing(small ? 64 : 16384, small ? 128 : 16384);
  bench_step({small ? (size_t)8 : (size_t)256, width, inner, heads, kv_heads, head_size, small ? (size_t)64 : (size_t)152064,
              small ? (size_t)1 : (size_t)28});
  {
    const bench_buffer x(tokens * inner * 4, repeated(1.0f)), out(tokens * inner * 4);
    for (size_t count : {(size_t)1, small ? (size_t)8 : (size_t)256, tokens}) {
      bench_linear(count, inner, width, x, out);
      bench_cublas(count, inner, width);
      bench_int8(count, inner, width, x, out);
    }
    const double n = (double)tokens * (double)heads * 128;
    bench("attention", 8.0 * n, 4.0 * n * (double)tokens, [&] {
      return aq_cuda_attention(x.handle, x.handle, x.handle, 0, 1, tokens, heads, kv_heads, head_size, 0, 0.1f, out.handle, stream);
    });
  }
  bench_solver(width, tokens);
}
