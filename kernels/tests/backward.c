/* backward.c: every function that computes gradients or follows them gives the same bytes on every
 * instruction set of this build and for any number of threads, never writes past the end of an output, takes
 * counts of zero, and refuses what the header says. That the gradients are right is checked by central
 * differences: tests/models/backward_test.ts. */
#include "harness.h"

#define OUTPUTS 3

typedef struct {
  size_t rows, cols;
  float *x, *y, *z, *u, *v; /* rows x cols each */
  uint8_t *mask;
  uint32_t *packed;
  uint16_t *scale, *zero;
  int32_t bits;
  size_t group_size;
} inputs;

/* Outputs and how long each is. */
typedef int32_t (*function)(const inputs *in, float *out[OUTPUTS], int32_t isa, int32_t threads);

#define RUN(name, call)                                                                            \
  static int32_t run_##name(const inputs *in, float *out[OUTPUTS], int32_t isa, int32_t threads) { \
    return call;                                                                                   \
  }
RUN(transpose, aq_transpose(in->x, in->rows, in->cols, out[0], isa, threads))
RUN(packed, aq_packed_gradient(in->x, in->packed, in->scale, in->zero, in->rows, in->cols, in->bits, in->group_size,
             out[0], out[1], isa, threads))
RUN(rms, aq_rms_norm_backward(in->x, in->y, in->rows, in->cols, in->z, 1e-6f, out[0], isa, threads))
RUN(layer, aq_layer_norm_backward(in->x, in->y, in->rows, in->cols, 0, 1e-6f, out[0], isa, threads))
/* cols = 2 heads of half as many numbers, sharing one of k and v */
static int32_t run_attention(const inputs *in, float *out[OUTPUTS], int32_t isa, int32_t threads) {
  if (in->cols % 2) return AQ_OK;
  return aq_attention_backward(in->x, in->y, in->z, in->u, in->v, in->mask, 1, in->rows, 2, 1, in->cols / 2, 0.3f,
                               out[0], out[1], out[2], isa, threads);
}
RUN(silu, aq_silu_backward(in->x, in->y, in->rows * in->cols, out[0], isa, threads))
RUN(gelu, aq_gelu_tanh_backward(in->x, in->y, in->rows * in->cols, out[0], isa, threads))
RUN(silu_multiply, aq_silu_multiply_backward(in->x, in->y, in->z, in->rows * in->cols, out[0], out[1], isa, threads))
static int32_t run_columns(const inputs *in, float *out[OUTPUTS], int32_t isa, int32_t threads) {
  const int32_t status = aq_column_sums(in->x, in->y, 1, in->rows, in->cols, in->cols, out[0], isa, threads);
  return status != AQ_OK ? status : aq_column_sums(in->x, 0, in->rows, 1, in->cols, in->cols, out[1], isa, threads);
}
static int32_t run_adam(const inputs *in, float *out[OUTPUTS], int32_t isa, int32_t threads) {
  const size_t n = in->rows * in->cols;
  memcpy(out[0], in->x, n * 4);
  memset(out[1], 0, n * 4);
  memset(out[2], 0, n * 4);
  for (int32_t step = 1; step <= 3; step++) {
    const int32_t status =
        aq_adam_step(out[0], step == 2 ? in->y : in->z, out[1], out[2], n, 0.01, 0.9, 0.999, 1e-8, step, isa, threads);
    if (status != AQ_OK) return status;
  }
  return AQ_OK;
}

static const struct {
  const char *name;
  function run;
} functions[] = {
    {"transpose", run_transpose},   {"packed gradient", run_packed}, {"RMS norm", run_rms},
    {"layer norm", run_layer},      {"attention", run_attention},    {"SiLU", run_silu},
    {"GELU", run_gelu},             {"SiLU times up", run_silu_multiply}, {"column sums", run_columns},
    {"Adam", run_adam},
};

static void check(const inputs *in) {
  const size_t n = in->rows * in->cols;
  char where[80];
  for (size_t f = 0; f < COUNT(functions); f++) {
    float *expected[OUTPUTS], *out[OUTPUTS];
    for (int k = 0; k < OUTPUTS; k++) expected[k] = guarded(n * 4);
    expect_status(functions[f].name, "scalar", functions[f].run(in, expected, AQ_ISA_SCALAR, 1), AQ_OK);
    for (int32_t isa = AQ_ISA_SCALAR; isa <= AQ_ISA_SIMD128; isa++)
      for (size_t t = 0; t < THREAD_COUNTS && aq_isa_supported(isa); t++) {
        snprintf(where, sizeof where, "%s, %d threads, %zu x %zu", isa_names[isa], thread_counts[t], in->rows,
                 in->cols);
        for (int k = 0; k < OUTPUTS; k++) out[k] = guarded(n * 4);
        expect_status(functions[f].name, where, functions[f].run(in, out, isa, thread_counts[t]), AQ_OK);
        for (int k = 0; k < OUTPUTS; k++) expect_output(functions[f].name, where, expected[k], out[k], n * 4);
      }
  }
}

#define REFUSED(what, status, call) expect_status("refusals", what, call, status)

static void check_refusals(void) {
  float one[4] = {1, 1, 1, 1};
  REFUSED("nothing", AQ_OK, aq_transpose(0, 0, 5, 0, 99, 1));
  REFUSED("nothing", AQ_OK, aq_adam_step(0, 0, 0, 0, 0, 1, 2, 2, 0, 0, 99, 1));
  REFUSED("instruction set", AQ_E_ISA, aq_silu_backward(one, one, 4, one, 99, 1));
  REFUSED("null", AQ_E_ARGUMENT, aq_rms_norm_backward(one, 0, 1, 4, 0, 0, one, 0, 1));
  REFUSED("null", AQ_E_ARGUMENT, aq_silu_multiply_backward(one, 0, one, 4, one, one, 0, 1));
  REFUSED("heads", AQ_E_SHAPE, aq_attention_backward(one, one, one, one, one, 0, 1, 1, 3, 2, 1, 1, one, one, one, 0,
                                                     1));
  REFUSED("stride", AQ_E_SHAPE, aq_column_sums(one, 0, 1, 1, 4, 3, one, 0, 1));
  REFUSED("overflow", AQ_E_SHAPE, aq_transpose(one, SIZE_MAX / 2, SIZE_MAX / 2, one, 0, 1));
  REFUSED("beta", AQ_E_VALUE, aq_adam_step(one, one, one, one, 4, 1, 1.0, 0.9, 0, 1, 0, 1));
  REFUSED("step", AQ_E_VALUE, aq_adam_step(one, one, one, one, 4, 1, 0.9, 0.9, 0, 0, 0, 1));
  uint32_t word = 0;
  uint16_t half = 0;
  expect_status("group size", "refusals", aq_packed_gradient(one, &word, &half, &half, 1, 4, 2, 5, one, one, 0, 1),
                AQ_E_SHAPE);
  expect_status("symmetric", "refusals", aq_packed_gradient(one, &word, &half, 0, 1, 4, 2, 0, one, one, 0, 1),
                AQ_E_ARGUMENT);
}

int main(int argc, char **argv) {
  begin(argc, argv);
  static const size_t sizes[][2] = {{1, 1},   {1, 16},  {3, 7},    {2, 31},    {5, 32},
                                    {33, 34}, {65, 66}, {70, 300}, {257, 130}, {700, 512}};
  static const int32_t widths[] = {2, 3, 4, 8};
  static const size_t groups[] = {0, 16, 32, 64, 256};
  for (size_t i = 0; i < COUNT(sizes) - (quick ? 1 : 0); i++) {
    inputs in = {.rows = sizes[i][0], .cols = sizes[i][1], .bits = widths[i % 4], .group_size = groups[i % 5]};
    float **all[] = {&in.x, &in.y, &in.z, &in.u, &in.v};
    for (size_t k = 0; k < COUNT(all); k++) *all[k] = gaussians(in.rows * in.cols, 1);
    uint64_t words, count;
    aq_packed_words(in.cols, in.bits, &words);
    aq_group_count(in.cols, in.group_size, &count);
    in.packed = take(in.rows * words * 4);
    in.scale = take(in.rows * count * 2);
    in.zero = take(in.rows * count * 2);
    in.mask = i % 2 ? take(in.rows) : 0;
    for (size_t k = 0; in.mask && k < in.rows; k++) in.mask[k] = (uint8_t)(random_bits() % 3 > 0);
    const int32_t status = aq_quantize_round(in.x, AQ_F32, in.rows, in.cols, in.bits, in.group_size, AQ_ZERO_POINT_REAL,
                                             in.packed, in.scale, in.zero, AQ_ISA_SCALAR, 1);
    expect_status("quantize", "scalar", status, AQ_OK);
    check(&in);
    release();
  }
  check_refusals();
  return finish();
}
