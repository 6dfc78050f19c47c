/**
 * The kernels' functions as both runtimes and WebAssembly need them: one entry a symbol, the C declaration
 * beside it. A test compares this table with kernels/include/arrowquant.h.
 */

/** `AQ_ABI_VERSION` that this table was written for. */
export const ABI_VERSION = 3;

/** `in`: const pointer or null; `out`: pointer written by the callee or null; `inout`: read, too. */
export type ParameterKind = "in" | "out" | "inout" | "usize" | "i32" | "f32" | "f64";

export interface SymbolDeclaration {
  readonly parameters: readonly ParameterKind[];
  readonly result: "i32";
}

export const SYMBOLS = {
  // int32_t aq_abi_version(void)
  aq_abi_version: { parameters: [], result: "i32" },
  // int32_t aq_best_isa(void)
  aq_best_isa: { parameters: [], result: "i32" },
  // int32_t aq_isa_supported(int32_t isa)
  aq_isa_supported: { parameters: ["i32"], result: "i32" },
  // int32_t aq_packed_words(size_t cols, int32_t bits, uint64_t *words)
  aq_packed_words: { parameters: ["usize", "i32", "out"], result: "i32" },
  // int32_t aq_group_count(size_t cols, size_t group_size, uint64_t *groups)
  aq_group_count: { parameters: ["usize", "usize", "out"], result: "i32" },
  // int32_t aq_pack_codes(const uint8_t *codes, size_t rows, size_t cols, int32_t bits, uint32_t *packed,
  //                       int32_t isa, int32_t threads)
  aq_pack_codes: { parameters: ["in", "usize", "usize", "i32", "out", "i32", "i32"], result: "i32" },
  // int32_t aq_unpack_codes(const uint32_t *packed, size_t rows, size_t cols, int32_t bits, uint8_t *codes,
  //                         int32_t isa, int32_t threads)
  aq_unpack_codes: { parameters: ["in", "usize", "usize", "i32", "out", "i32", "i32"], result: "i32" },
  // int32_t aq_quantize_round(const void *weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
  //                           size_t group_size, int32_t zero_point_kind, uint32_t *packed, uint16_t *scale,
  //                           uint16_t *zero_point, int32_t isa, int32_t threads)
  aq_quantize_round: {
    parameters: ["in", "i32", "usize", "usize", "i32", "usize", "i32", "out", "out", "out", "i32", "i32"],
    result: "i32",
  },
  // int32_t aq_quantize_clip(const void *weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
  //                          size_t group_size, int32_t zero_point_kind, const float *column_weights,
  //                          uint32_t *packed, uint16_t *scale, uint16_t *zero_point, int32_t isa, int32_t threads)
  aq_quantize_clip: {
    parameters: [
      "in",
      "i32",
      "usize",
      "usize",
      "i32",
      "usize",
      "i32",
      "in",
      "out",
      "out",
      "out",
      "i32",
      "i32",
    ],
    result: "i32",
  },
  // int32_t aq_dequantize(const uint32_t *packed, const uint16_t *scale, const uint16_t *zero_point, size_t rows,
  //                       size_t cols, int32_t bits, size_t group_size, void *out, int32_t dtype, int32_t isa,
  //                       int32_t threads)
  aq_dequantize: {
    parameters: ["in", "in", "in", "usize", "usize", "i32", "usize", "out", "i32", "i32", "i32"],
    result: "i32",
  },
  // int32_t aq_two_level_sizes(size_t cols, size_t group_size, int32_t scale_bits, uint64_t *sizes)
  aq_two_level_sizes: { parameters: ["usize", "usize", "i32", "out"], result: "i32" },
  // int32_t aq_quantize_two_level(const void *weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
  //      size_t group_size, int32_t scale_bits, int32_t search, const float *column_weights, uint32_t *packed,
  //      uint8_t *sub_scale, uint8_t *sub_min, uint16_t *super_scale, uint16_t *super_min, int32_t isa,
  //      int32_t threads)
  aq_quantize_two_level: {
    parameters: [
      "in",
      "i32",
      "usize",
      "usize",
      "i32",
      "usize",
      "i32",
      "i32",
      "in",
      "out",
      "out",
      "out",
      "out",
      "out",
      "i32",
      "i32",
    ],
    result: "i32",
  },
  // int32_t aq_fit_two_level(const float *scale, const float *minimum, const float *group_weights, size_t rows,
  //      size_t cols, size_t group_size, int32_t scale_bits, uint8_t *sub_scale, uint8_t *sub_min, uint16_t
  //      *super_scale, uint16_t *super_min)
  aq_fit_two_level: {
    parameters: ["in", "in", "in", "usize", "usize", "usize", "i32", "out", "out", "out", "out"],
    result: "i32",
  },
  // int32_t aq_dequantize_two_level(const uint32_t *packed, const uint8_t *sub_scale, const uint8_t *sub_min,
  //      const uint16_t *super_scale, const uint16_t *super_min, size_t rows, size_t cols, int32_t bits, size_t
  //      group_size, int32_t scale_bits, void *out, int32_t dtype, int32_t isa, int32_t threads)
  aq_dequantize_two_level: {
    parameters: [
      "in",
      "in",
      "in",
      "in",
      "in",
      "usize",
      "usize",
      "i32",
      "usize",
      "i32",
      "out",
      "i32",
      "i32",
      "i32",
    ],
    result: "i32",
  },
  // int32_t aq_two_level_error_statistics(const void *weights, int32_t dtype, const uint32_t *packed, const
  //      uint8_t *sub_scale, const uint8_t *sub_min, const uint16_t *super_scale, const uint16_t *super_min,
  //      size_t rows, size_t cols, int32_t bits, size_t group_size, int32_t scale_bits, double *statistics,
  //      int32_t isa, int32_t threads)
  aq_two_level_error_statistics: {
    parameters: [
      "in",
      "i32",
      "in",
      "in",
      "in",
      "in",
      "in",
      "usize",
      "usize",
      "i32",
      "usize",
      "i32",
      "out",
      "i32",
      "i32",
    ],
    result: "i32",
  },
  // int32_t aq_convert(const void *in, int32_t in_dtype, void *out, int32_t out_dtype, size_t n, int32_t isa,
  //                    int32_t threads)
  aq_convert: { parameters: ["in", "i32", "out", "i32", "usize", "i32", "i32"], result: "i32" },
  // int32_t aq_error_statistics(const void *a, int32_t a_dtype, const void *b, int32_t b_dtype, size_t n,
  //                             double *statistics, int32_t isa, int32_t threads)
  aq_error_statistics: {
    parameters: ["in", "i32", "in", "i32", "usize", "out", "i32", "i32"],
    result: "i32",
  },
  // int32_t aq_packed_error_statistics(const void *weights, int32_t dtype, const uint32_t *packed,
  //                                    const uint16_t *scale, const uint16_t *zero_point, size_t rows, size_t cols,
  //                                    int32_t bits, size_t group_size, double *statistics, int32_t isa,
  //                                    int32_t threads)
  aq_packed_error_statistics: {
    parameters: ["in", "i32", "in", "in", "in", "usize", "usize", "i32", "usize", "out", "i32", "i32"],
    result: "i32",
  },
  // int32_t aq_find_nonfinite(const void *values, int32_t dtype, size_t n, uint64_t *index, int32_t isa,
  //                           int32_t threads)
  aq_find_nonfinite: { parameters: ["in", "i32", "usize", "out", "i32", "i32"], result: "i32" },
  // int32_t aq_linear(const float *x, size_t tokens, const void *weights, int32_t dtype, const float *bias,
  //                   size_t rows, size_t cols, float *out, int32_t isa, int32_t threads)
  aq_linear: {
    parameters: ["in", "usize", "in", "i32", "in", "usize", "usize", "out", "i32", "i32"],
    result: "i32",
  },
  // int32_t aq_linear_packed(const float *x, size_t tokens, const uint32_t *packed, const uint16_t *scale,
  //                          const uint16_t *zero_point, const float *bias, size_t rows, size_t cols, int32_t
  //                          bits, size_t group_size, float *out, int32_t isa, int32_t threads)
  aq_linear_packed: {
    parameters: [
      "in",
      "usize",
      "in",
      "in",
      "in",
      "in",
      "usize",
      "usize",
      "i32",
      "usize",
      "out",
      "i32",
      "i32",
    ],
    result: "i32",
  },
  // int32_t aq_linear_two_level(const float *x, size_t tokens, const uint32_t *packed, const uint8_t
  //      *sub_scale, const uint8_t *sub_min, const uint16_t *super_scale, const uint16_t *super_min, const
  //      float *bias, size_t rows, size_t cols, int32_t bits, size_t group_size, int32_t scale_bits, float
  //      *out, int32_t isa, int32_t threads)
  aq_linear_two_level: {
    parameters: [
      "in",
      "usize",
      "in",
      "in",
      "in",
      "in",
      "in",
      "in",
      "usize",
      "usize",
      "i32",
      "usize",
      "i32",
      "out",
      "i32",
      "i32",
    ],
    result: "i32",
  },
  // int32_t aq_quantize_activations(const float *x, size_t tokens, size_t cols, int32_t bits, int32_t kind,
  //                                 uint8_t *codes, float *scale, int32_t *zero_point, int32_t isa, int32_t
  //                                 threads)
  aq_quantize_activations: {
    parameters: ["in", "usize", "usize", "i32", "i32", "out", "inout", "inout", "i32", "i32"],
    result: "i32",
  },
  // int32_t aq_linear_packed_int8(const uint8_t *codes, const float *x_scale, const int32_t *x_zero_point, size_t
  //                               tokens, const uint32_t *packed, const uint16_t *scale, const uint16_t
  //                               *zero_point, const float *bias, size_t rows, size_t cols, int32_t bits, size_t
  //                               group_size, float *out, int32_t isa, int32_t threads)
  aq_linear_packed_int8: {
    parameters: [
      "in",
      "in",
      "in",
      "usize",
      "in",
      "in",
      "in",
      "in",
      "usize",
      "usize",
      "i32",
      "usize",
      "out",
      "i32",
      "i32",
    ],
    result: "i32",
  },
  // int32_t aq_rms_norm(const float *x, size_t rows, size_t cols, const float *weight, float epsilon, float
  //                     *out, int32_t isa, int32_t threads)
  aq_rms_norm: { parameters: ["in", "usize", "usize", "in", "f32", "out", "i32", "i32"], result: "i32" },
  // int32_t aq_layer_norm(const float *x, size_t rows, size_t cols, const float *weight, const float *bias,
  //                       float epsilon, float *out, int32_t isa, int32_t threads)
  aq_layer_norm: {
    parameters: ["in", "usize", "usize", "in", "in", "f32", "out", "i32", "i32"],
    result: "i32",
  },
  // int32_t aq_softmax(const float *x, size_t rows, size_t cols, float *out, int32_t isa, int32_t threads)
  aq_softmax: { parameters: ["in", "usize", "usize", "out", "i32", "i32"], result: "i32" },
  // int32_t aq_attention(const float *q, const float *k, const float *v, const uint8_t *key_mask, size_t batch,
  //                      size_t tokens, size_t heads, size_t kv_heads, size_t head_size, float scale, float
  //                      *out, int32_t isa, int32_t threads)
  aq_attention: {
    parameters: [
      "in",
      "in",
      "in",
      "in",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "f32",
      "out",
      "i32",
      "i32",
    ],
    result: "i32",
  },
  // int32_t aq_rotary(float *x, const int32_t *positions, size_t rows, size_t heads, size_t head_size, double
  //                   theta, int32_t isa, int32_t threads)
  aq_rotary: { parameters: ["inout", "in", "usize", "usize", "usize", "f64", "i32", "i32"], result: "i32" },
  // int32_t aq_silu_multiply(const float *gate, const float *up, size_t n, float *out, int32_t isa, int32_t
  //                          threads)
  aq_silu_multiply: { parameters: ["in", "in", "usize", "out", "i32", "i32"], result: "i32" },
  // int32_t aq_silu(const float *x, size_t n, float *out, int32_t isa, int32_t threads)
  aq_silu: { parameters: ["in", "usize", "out", "i32", "i32"], result: "i32" },
  // int32_t aq_gelu_tanh(const float *x, size_t n, float *out, int32_t isa, int32_t threads)
  aq_gelu_tanh: { parameters: ["in", "usize", "out", "i32", "i32"], result: "i32" },
  // int32_t aq_modulate(const float *x, const float *scale, const float *shift, size_t stride, size_t batch,
  //                     size_t tokens, size_t cols, float *out, int32_t isa, int32_t threads)
  aq_modulate: {
    parameters: ["in", "in", "in", "usize", "usize", "usize", "usize", "out", "i32", "i32"],
    result: "i32",
  },
  // int32_t aq_gate_add(const float *residual, const float *gate, const float *x, size_t stride, size_t batch,
  //                     size_t tokens, size_t cols, float *out, int32_t isa, int32_t threads)
  aq_gate_add: {
    parameters: ["in", "in", "in", "usize", "usize", "usize", "usize", "out", "i32", "i32"],
    result: "i32",
  },
  // int32_t aq_add(const float *a, const float *b, size_t n, float *out, int32_t isa, int32_t threads)
  aq_add: { parameters: ["in", "in", "usize", "out", "i32", "i32"], result: "i32" },
  // int32_t aq_patchify(const float *images, size_t batch, size_t channels, size_t height, size_t width, size_t
  //                     patch, float *out, int32_t threads)
  aq_patchify: {
    parameters: ["in", "usize", "usize", "usize", "usize", "usize", "out", "i32"],
    result: "i32",
  },
  // int32_t aq_unpatchify(const float *tokens, size_t batch, size_t channels, size_t height, size_t width, size_t
  //                       patch, float *out, int32_t threads)
  aq_unpatchify: {
    parameters: ["in", "usize", "usize", "usize", "usize", "usize", "out", "i32"],
    result: "i32",
  },
  // int32_t aq_timestep_embedding(const float *timesteps, size_t n, size_t channels, int32_t cosines_first, double
  //                               downscale_freq_shift, double max_period, float *out)
  aq_timestep_embedding: { parameters: ["in", "usize", "usize", "i32", "f64", "f64", "out"], result: "i32" },
  // int32_t aq_solver_work(size_t cols, size_t group_size, int32_t threads, uint64_t *floats)
  aq_solver_work: { parameters: ["usize", "usize", "i32", "out"], result: "i32" },
  // int32_t aq_accumulate_moment(const float *x, const float *y, const float *weight, size_t tokens, size_t rows,
  //                              size_t cols, float *out, int32_t isa, int32_t threads)
  aq_accumulate_moment: {
    parameters: ["in", "in", "in", "usize", "usize", "usize", "inout", "i32", "i32"],
    result: "i32",
  },
  // int32_t aq_factor_moment(float *m, size_t n, float *pivots, float *work, int32_t isa, int32_t threads)
  aq_factor_moment: { parameters: ["inout", "usize", "out", "out", "i32", "i32"], result: "i32" },
  // int32_t aq_solve_moment(const float *factor, const float *pivots, size_t n, float *b, size_t rows, float *work,
  //                         int32_t isa, int32_t threads)
  aq_solve_moment: {
    parameters: ["in", "in", "usize", "inout", "usize", "out", "i32", "i32"],
    result: "i32",
  },
  // int32_t aq_clipped_grids(const float *weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
  //                 int32_t zero_point_kind, float ratio, float *scale, float *zero_point, int32_t threads)
  aq_clipped_grids: {
    parameters: ["in", "usize", "usize", "i32", "usize", "i32", "f32", "out", "out", "i32"],
    result: "i32",
  },
  // int32_t aq_quantize_feedback(const float *weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
  //                              const float *scale, const float *zero_point, const float *factor,
  //                              const int32_t *order, uint8_t *codes, float *work, int32_t isa, int32_t threads)
  aq_quantize_feedback: {
    parameters: [
      "in",
      "usize",
      "usize",
      "i32",
      "usize",
      "in",
      "in",
      "in",
      "in",
      "out",
      "out",
      "i32",
      "i32",
    ],
    result: "i32",
  },
  // int32_t aq_refine_codes(const float *weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
  //                         int32_t zero_point_kind, const float *moment, int32_t refit, int32_t rounds,
  //                         uint8_t *codes, float *scale, float *zero_point, double *objective, float *work,
  //                         int32_t isa, int32_t threads)
  aq_refine_codes: {
    parameters: [
      "in",
      "usize",
      "usize",
      "i32",
      "usize",
      "i32",
      "in",
      "i32",
      "i32",
      "inout",
      "inout",
      "inout",
      "out",
      "out",
      "i32",
      "i32",
    ],
    result: "i32",
  },
  // int32_t aq_transpose(const float *in, size_t rows, size_t cols, float *out, int32_t isa, int32_t
  //   threads)
  aq_transpose: { parameters: ["in", "usize", "usize", "out", "i32", "i32"], result: "i32" },
  // int32_t aq_packed_gradient(const float *dw, const uint32_t *packed, const uint16_t *scale, const
  //   uint16_t *zero_point, size_t rows, size_t cols, int32_t bits, size_t group_size, float *dscale,
  //   float *dzero, int32_t isa, int32_t threads)
  aq_packed_gradient: {
    parameters: ["in", "in", "in", "in", "usize", "usize", "i32", "usize", "out", "out", "i32", "i32"],
    result: "i32",
  },
  // int32_t aq_rms_norm_backward(const float *x, const float *dy, size_t rows, size_t cols, const float
  //   *weight, float epsilon, float *dx, int32_t isa, int32_t threads)
  aq_rms_norm_backward: {
    parameters: ["in", "in", "usize", "usize", "in", "f32", "out", "i32", "i32"],
    result: "i32",
  },
  // int32_t aq_layer_norm_backward(const float *x, const float *dy, size_t rows, size_t cols, const
  //   float *weight, float epsilon, float *dx, int32_t isa, int32_t threads)
  aq_layer_norm_backward: {
    parameters: ["in", "in", "usize", "usize", "in", "f32", "out", "i32", "i32"],
    result: "i32",
  },
  // int32_t aq_attention_backward(const float *q, const float *k, const float *v, const float *out,
  //   const float *dout, const uint8_t *key_mask, size_t batch, size_t tokens, size_t heads, size_t
  //   kv_heads, size_t head_size, float scale, float *dq, float *dk, float *dv, int32_t isa, int32_t
  //   threads)
  aq_attention_backward: {
    parameters: [
      "in",
      "in",
      "in",
      "in",
      "in",
      "in",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "f32",
      "out",
      "out",
      "out",
      "i32",
      "i32",
    ],
    result: "i32",
  },
  // int32_t aq_silu_multiply_backward(const float *gate, const float *up, const float *dy, size_t n,
  //   float *dgate, float *dup, int32_t isa, int32_t threads)
  aq_silu_multiply_backward: {
    parameters: ["in", "in", "in", "usize", "out", "out", "i32", "i32"],
    result: "i32",
  },
  // int32_t aq_silu_backward(const float *x, const float *dy, size_t n, float *dx, int32_t isa, int32_t
  //   threads)
  aq_silu_backward: { parameters: ["in", "in", "usize", "out", "i32", "i32"], result: "i32" },
  // int32_t aq_gelu_tanh_backward(const float *x, const float *dy, size_t n, float *dx, int32_t isa,
  //   int32_t threads)
  aq_gelu_tanh_backward: { parameters: ["in", "in", "usize", "out", "i32", "i32"], result: "i32" },
  // int32_t aq_column_sums(const float *a, const float *b, size_t batch, size_t tokens, size_t cols,
  //   size_t stride, float *out, int32_t isa, int32_t threads)
  aq_column_sums: {
    parameters: ["in", "in", "usize", "usize", "usize", "usize", "inout", "i32", "i32"],
    result: "i32",
  },
  // int32_t aq_adam_step(float *values, const float *gradients, float *first, float *second, size_t n,
  //   double rate, double beta1, double beta2, double epsilon, int32_t step, int32_t isa, int32_t threads)
  aq_adam_step: {
    parameters: ["inout", "in", "inout", "inout", "usize", "f64", "f64", "f64", "f64", "i32", "i32", "i32"],
    result: "i32",
  },
  // int32_t aq_projected_gradient_step(float *values, const float *gradients, const float *low, const
  //   float *high, size_t n, float rate, int32_t isa, int32_t threads)
  aq_projected_gradient_step: {
    parameters: ["inout", "in", "in", "in", "usize", "f32", "i32", "i32"],
    result: "i32",
  },
} as const satisfies Record<string, SymbolDeclaration>;

export type SymbolName = keyof typeof SYMBOLS;

/** A buffer handed to a kernel: always the view itself, never a pointer kept from an earlier call. */
export type NativeBuffer = ArrayBufferView<ArrayBufferLike> | null;

/** What `size()` of an opened library made of a count. */
export type NativeSize = number | bigint;

type ArgumentOf<Kind extends ParameterKind> = Kind extends "in" | "out" | "inout" ? NativeBuffer
  : Kind extends "usize" ? NativeSize
  : number;

type Arguments<Kinds extends readonly ParameterKind[]> = {
  -readonly [Index in keyof Kinds]: ArgumentOf<Kinds[Index]>;
};

/** A library's functions by their C names. */
export type SymbolTable = Readonly<Record<string, SymbolDeclaration>>;

/** The functions of an opened library, with the parameters of its table. */
export type CallsOf<Table extends SymbolTable> = {
  readonly [Name in keyof Table]: (...args: Arguments<Table[Name]["parameters"]>) => number;
};

/** The functions of the CPU's library. */
export type NativeCalls = CallsOf<typeof SYMBOLS>;

/** The CPU's library as one runtime opened it. */
export type OpenedLibrary = OpenedSymbols<typeof SYMBOLS>;

/** A library as one runtime opened it. */
export interface OpenedSymbols<Table extends SymbolTable> {
  readonly calls: CallsOf<Table>;
  /** A count as the runtime's FFI takes it fastest: a number in Bun and WebAssembly, a bigint in Deno. */
  size(count: number): NativeSize;
  close(): void;
}
