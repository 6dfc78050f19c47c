/* cuda.cu: every kernel of the CUDA library against the scalar oracle, on a device or, built with the emulator's headers, on the
 * host. Prints what it ran; exit status 1 on a difference, 77 without a device. */
#include "cuda_cases.h"
#include "cuda_device.h"
#include "cuda_gradient_cases.h"
#include "cuda_model_cases.h"
#include "cuda_solver_cases.h"

static size_t groups_of(const quantize_case &c) {
  uint64_t groups = 0;
  aq_group_count(c.cols, c.group_size, &groups);
  return (size_t)groups;
}

static size_t words_of(size_t cols, int32_t bits) {
  uint64_t words = 0;
  aq_packed_words(cols, bits, &words);
  return (size_t)words;
}

struct device_library {
  bool tensor_cores;
  int32_t quantize(const quantize_case &c, const void *weights, const float *column_weights, uint32_t *packed,
                   uint16_t *scale, uint16_t *zero) const {
    const size_t groups = c.rows * groups_of(c) * 2;
    const device_bytes w(weights, c.rows * c.cols * width_of(c.dtype)), h(c.clip == 2 ? column_weights : 0, c.cols * 4),
        p(packed, c.rows * words_of(c.cols, c.bits) * 4), s(scale, groups), z(zero, groups);
    const int32_t status =
        c.clip ? aq_cuda_quantize_clip(w.handle, c.dtype, c.rows, c.cols, c.bits, c.group_size, c.kind, h.handle,
                                       p.handle, s.handle, z.handle, stream)
               : aq_cuda_quantize_round(w.handle, c.dtype, c.rows, c.cols, c.bits, c.group_size, c.kind, p.handle,
                                        s.handle, z.handle, stream);
    p.read(packed, 1);
    s.read(scale, 1);
    z.read(zero, 1);
    return status;
  }
  int32_t pack(const uint8_t *codes, size_t rows, size_t cols, int32_t bits, uint32_t *packed) const {
    const device_bytes c(codes, rows * cols), p(packed, rows * words_of(cols, bits) * 4);
    const int32_t status = aq_cuda_pack_codes(c.handle, rows, cols, bits, p.handle, stream);
    p.read(packed, 1);
    return status;
  }
  int32_t unpack(const uint32_t *packed, size_t rows, size_t cols, int32_t bits, uint8_t *codes) const {
    const device_bytes p(packed, rows * words_of(cols, bits) * 4), c(codes, rows * cols);
    const int32_t status = aq_cuda_unpack_codes(p.handle, rows, cols, bits, c.handle, stream);
    c.read(codes, 1);
    return status;
  }
  int32_t dequantize(const quantize_case &c, const uint32_t *packed, const uint16_t *scale, const uint16_t *zero,
                     void *out, int32_t dtype) const {
    const size_t groups = c.rows * groups_of(c) * 2;
    const device_bytes p(packed, c.rows * words_of(c.cols, c.bits) * 4), s(scale, groups), z(zero, groups),
        o(out, c.rows * c.cols * width_of(dtype));
    const int32_t status = aq_cuda_dequantize(p.handle, s.handle, z.handle, c.rows, c.cols, c.bits, c.group_size,
                                              o.handle, dtype, stream);
    o.read(out, 1);
    return status;
  }
  int32_t linear(const quantize_case &c, const float *x, size_t tokens, const uint32_t *packed, const uint16_t *scale,
                 const uint16_t *zero, const float *bias, float *out) const {
    const size_t groups = c.rows * groups_of(c) * 2;
    const device_bytes a(x, tokens * c.cols * 4), p(packed, c.rows * words_of(c.cols, c.bits) * 4), s(scale, groups),
        z(zero, groups), b(bias, c.rows * 4), o(out, tokens * c.rows * 4);
    const int32_t status = (tensor_cores ? aq_cuda_linear_packed_bf16 : aq_cuda_linear_packed)(
        a.handle, tokens, p.handle, s.handle, z.handle, b.handle, c.rows, c.cols, c.bits, c.group_size, o.handle, stream);
    o.read(out, 1);
    return status;
  }
  int32_t statistics(const float *a, const float *b, size_t n, double *sums) const {
    const device_bytes x(a, 4 * n), y(b, 4 * n);
    return aq_cuda_error_statistics(x.handle, AQ_F32, y.handle, AQ_F32, n, sums, stream);
  }
  int32_t packed_statistics(const quantize_case &c, const float *weights, const uint32_t *packed, const uint16_t *scale,
                            const uint16_t *zero, double *sums) const {
    const size_t groups = c.rows * groups_of(c) * 2;
    const device_bytes w(weights, c.rows * c.cols * 4), p(packed, c.rows * words_of(c.cols, c.bits) * 4),
        s(scale, groups), z(zero, groups);
    return aq_cuda_packed_error_statistics(w.handle, AQ_F32, p.handle, s.handle, z.handle, c.rows, c.cols, c.bits,
                                           c.group_size, sums, stream);
  }
  int32_t adam(float *p, const float *g, float *m, float *v, size_t n, const adam_settings &s, int32_t step) const {
    const device_bytes parameters(p, 4 * n), gradient(g, 4 * n), first(m, 4 * n), second(v, 4 * n);
    const int32_t status = aq_cuda_adam_step(parameters.handle, gradient.handle, first.handle, second.handle, n,
                                             s.learning_rate, s.beta1, s.beta2, s.epsilon, step, stream);
    parameters.read(p, 0);
    first.read(m, 0);
    second.read(v, 0);
    return status;
  }
};

/* What only a device can run ------------------------------------------------------------------------------------------- */

/* Against double. A factor split into two TF32 numbers keeps 2^-21 of itself, the product of the smaller parts (2^-22) is left
 * out; a tensor core's sums lose up to 2^-23 a term over AQ_MOMENT_TOKENS = 256 terms, thrice, and the parts' sums 2^-24 each. */
static void run_moment(void) {
  for (size_t cols : {1, 15, 64, 65, 200})
    for (size_t tokens : {1, 16, 255, 256, 1000})
      for (int weighted = 0; weighted < 2; weighted++) {
        const std::vector<float> x = values_of(tokens * cols, GAUSSIAN);
        std::vector<float> weight(tokens), out(cols * cols + GUARD / 4);
        for (float &h : weight) h = fabsf(gaussian());
        for (size_t i = 0; i < cols; i++)
          for (size_t j = 0; j <= i; j++) out[i * cols + j] = out[j * cols + i] = gaussian();
        const std::vector<float> before = out;
        const device_bytes a(x.data(), 4 * x.size()), h(weighted ? weight.data() : 0, 4 * tokens),
            o(out.data(), 4 * cols * cols);
        require(aq_cuda_accumulate_moment(a.handle, h.handle, tokens, cols, o.handle, stream), "moment");
        o.read(out.data(), 1);
        const std::string where = std::to_string(tokens) + " tokens, " + std::to_string(cols) + " columns" +
                                  (weighted ? ", weighted" : "");
        for (size_t i = 0; i < cols; i++)
          for (size_t j = 0; j < cols; j++) {
            double sum = before[i * cols + j], terms = fabs(sum);
            for (size_t t = 0; t < tokens; t++) {
              const double term = (weighted ? (double)weight[t] : 1.0) * x[t * cols + i] * x[t * cols + j];
              sum += term;
              terms += fabs(term);
            }
            const double tolerance = terms * (0x1p-19 + 3 * 256 * 0x1p-23 + (double)(tokens / 256 + 2) * 0x1p-24);
            check_near("second moment", where, sum, out[i * cols + j], tolerance);
            ran["second moment, symmetry"]++;
            if (out[i * cols + j] != out[j * cols + i]) failed("second moment, symmetry", where, "not symmetric");
          }
        const bytes guard(GUARD, 0xa5);
        ran["second moment, guard"]++;
        if (memcmp(out.data() + cols * cols, guard.data(), GUARD)) failed("second moment, guard", where, "wrote past the end");
      }
}

/* What a wrong call gets: a status, and nothing else happens. */
static void run_refusals(void) {
  const std::vector<float> values(64);
  const device_bytes b(values.data(), 4 * values.size());
  const char *kernel = "refusals";
  check_status(kernel, "no handle", AQ_E_ARGUMENT, aq_cuda_unpack_codes(0, 1, 8, 4, b.handle, stream));
  check_status(kernel, "a stream as a buffer", AQ_E_ARGUMENT, aq_cuda_unpack_codes(stream, 1, 8, 4, b.handle, stream));
  check_status(kernel, "too small", AQ_E_SHAPE, aq_cuda_unpack_codes(b.handle, 1, 100000, 4, b.handle, stream));
  check_status(kernel, "five bits", AQ_E_ARGUMENT, aq_cuda_unpack_codes(b.handle, 1, 8, 5, b.handle, stream));
  check_status(kernel, "no rows", AQ_OK, aq_cuda_unpack_codes(0, 0, 8, 4, 0, stream));
  check_status(kernel, "upload past the end", AQ_E_SHAPE, aq_cuda_upload(values.data(), 256, b.handle, SIZE_MAX, stream));
  uint64_t none = 1;
  check_status(kernel, "more than there is", AQ_E_MEMORY, aq_cuda_allocate((size_t)1 << 50, &none, stream));
  check_status(kernel, "and goes on", AQ_OK, aq_cuda_clear(b.handle, stream));
}

int main(int argc, char **argv) {
  uint8_t text[512];
  if (aq_cuda_describe_device(0, text, sizeof text) != AQ_OK) {
    printf("skipped: %s\n", (const char *)text);
    return 77;
  }
  printf("%s\n", (const char *)text);
  start(argc > 1 ? strtoull(argv[1], 0, 10) : 1);
  const int quick = argc > 2 && strcmp(argv[2], "quick") == 0;
  uint64_t made = 0;
  require(aq_cuda_create_stream(0, &made), "create a stream");
  stream = (aq_cuda_stream)made;
  run_shared_cases(device_library{false}, device_library{true}, quick);
  run_moment();
  run_two_level(quick);
  run_feedback(quick);
  run_int8(quick);
  run_model();
  run_gradients();
  run_refusals();
  require(aq_cuda_synchronize(stream), "synchronize");
  require(aq_cuda_free_stream(stream), "free the stream");
  return finish("on the device");
}
