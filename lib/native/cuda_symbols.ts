/**
 * The CUDA library's functions, one entry a symbol, the C declaration beside it. A test compares this table with
 * kernels/include/arrowquant_cuda.h. Handles of buffers and streams are counts to the FFI (`usize`).
 */
import type { SymbolTable } from "./symbols.ts";

/** `AQ_CUDA_ABI_VERSION` that this table was written for. */
export const CUDA_ABI_VERSION = 2;

export const CUDA_SYMBOLS = {
  // int32_t aq_cuda_abi_version(void)
  aq_cuda_abi_version: { parameters: [], result: "i32" },
  // int32_t aq_cuda_device_count(int32_t *count)
  aq_cuda_device_count: { parameters: ["out"], result: "i32" },
  // int32_t aq_cuda_describe_device(int32_t device, uint8_t *text, size_t bytes)
  aq_cuda_describe_device: { parameters: ["i32", "out", "usize"], result: "i32" },
  // int32_t aq_cuda_describe_status(int32_t status, uint8_t *text, size_t bytes)
  aq_cuda_describe_status: { parameters: ["i32", "out", "usize"], result: "i32" },
  // int32_t aq_cuda_create_stream(int32_t device, uint64_t *stream)
  aq_cuda_create_stream: { parameters: ["i32", "out"], result: "i32" },
  // int32_t aq_cuda_free_stream(aq_cuda_stream stream)
  aq_cuda_free_stream: { parameters: ["usize"], result: "i32" },
  // int32_t aq_cuda_synchronize(aq_cuda_stream stream)
  aq_cuda_synchronize: { parameters: ["usize"], result: "i32" },
  // int32_t aq_cuda_begin_timing(aq_cuda_stream stream)
  aq_cuda_begin_timing: { parameters: ["usize"], result: "i32" },
  // int32_t aq_cuda_end_timing(aq_cuda_stream stream, double *milliseconds)
  aq_cuda_end_timing: { parameters: ["usize", "out"], result: "i32" },
  // int32_t aq_cuda_allocate(size_t bytes, uint64_t *buffer, aq_cuda_stream stream)
  aq_cuda_allocate: { parameters: ["usize", "out", "usize"], result: "i32" },
  // int32_t aq_cuda_free(aq_cuda_buffer buffer)
  aq_cuda_free: { parameters: ["usize"], result: "i32" },
  // int32_t aq_cuda_upload(const void *data, size_t bytes, aq_cuda_buffer buffer, size_t offset, aq_cuda_stream
  //     stream)
  aq_cuda_upload: { parameters: ["in", "usize", "usize", "usize", "usize"], result: "i32" },
  // int32_t aq_cuda_download(aq_cuda_buffer buffer, size_t offset, void *data, size_t bytes, aq_cuda_stream stream)
  aq_cuda_download: { parameters: ["usize", "usize", "out", "usize", "usize"], result: "i32" },
  // int32_t aq_cuda_copy(aq_cuda_buffer from, aq_cuda_buffer to, size_t bytes, aq_cuda_stream stream)
  aq_cuda_copy: { parameters: ["usize", "usize", "usize", "usize"], result: "i32" },
  // int32_t aq_cuda_clear(aq_cuda_buffer buffer, aq_cuda_stream stream)
  aq_cuda_clear: { parameters: ["usize", "usize"], result: "i32" },
  // int32_t aq_cuda_pack_codes(aq_cuda_buffer codes, size_t rows, size_t cols, int32_t bits, aq_cuda_buffer packed,
  //     aq_cuda_stream stream)
  aq_cuda_pack_codes: { parameters: ["usize", "usize", "usize", "i32", "usize", "usize"], result: "i32" },
  // int32_t aq_cuda_unpack_codes(aq_cuda_buffer packed, size_t rows, size_t cols, int32_t bits, aq_cuda_buffer codes,
  //     aq_cuda_stream stream)
  aq_cuda_unpack_codes: { parameters: ["usize", "usize", "usize", "i32", "usize", "usize"], result: "i32" },
  // int32_t aq_cuda_quantize_round(aq_cuda_buffer weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
  //     size_t group_size, int32_t zero_point_kind, aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer
  //     zero_point, aq_cuda_stream stream)
  aq_cuda_quantize_round: {
    parameters: ["usize", "i32", "usize", "usize", "i32", "usize", "i32", "usize", "usize", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_quantize_clip(aq_cuda_buffer weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
  //     size_t group_size, int32_t zero_point_kind, aq_cuda_buffer column_weights, aq_cuda_buffer packed,
  //     aq_cuda_buffer scale, aq_cuda_buffer zero_point, aq_cuda_stream stream)
  aq_cuda_quantize_clip: {
    parameters: [
      "usize",
      "i32",
      "usize",
      "usize",
      "i32",
      "usize",
      "i32",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
    ],
    result: "i32",
  },
  // int32_t aq_cuda_dequantize(aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer zero_point, size_t rows,
  //     size_t cols, int32_t bits, size_t group_size, aq_cuda_buffer out, int32_t dtype, aq_cuda_stream stream)
  aq_cuda_dequantize: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "i32", "usize", "usize", "i32", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_quantize_two_level(aq_cuda_buffer weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
  //     size_t group_size, int32_t scale_bits, int32_t search, aq_cuda_buffer column_weights, aq_cuda_buffer packed,
  //     aq_cuda_buffer sub_scale, aq_cuda_buffer sub_min, aq_cuda_buffer super_scale, aq_cuda_buffer super_min,
  //     aq_cuda_stream stream)
  aq_cuda_quantize_two_level: {
    parameters: [
      "usize",
      "i32",
      "usize",
      "usize",
      "i32",
      "usize",
      "i32",
      "i32",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
    ],
    result: "i32",
  },
  // int32_t aq_cuda_dequantize_two_level(aq_cuda_buffer packed, aq_cuda_buffer sub_scale, aq_cuda_buffer sub_min,
  //     aq_cuda_buffer super_scale, aq_cuda_buffer super_min, size_t rows, size_t cols, int32_t bits, size_t
  //     group_size, int32_t scale_bits, aq_cuda_buffer out, int32_t dtype, aq_cuda_stream stream)
  aq_cuda_dequantize_two_level: {
    parameters: [
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "i32",
      "usize",
      "i32",
      "usize",
      "i32",
      "usize",
    ],
    result: "i32",
  },
  // int32_t aq_cuda_error_statistics(aq_cuda_buffer a, int32_t a_dtype, aq_cuda_buffer b, int32_t b_dtype, size_t n,
  //     double *statistics, aq_cuda_stream stream)
  aq_cuda_error_statistics: {
    parameters: ["usize", "i32", "usize", "i32", "usize", "out", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_packed_error_statistics(aq_cuda_buffer weights, int32_t dtype, aq_cuda_buffer packed,
  //     aq_cuda_buffer scale, aq_cuda_buffer zero_point, size_t rows, size_t cols, int32_t bits, size_t group_size,
  //     double *statistics, aq_cuda_stream stream)
  aq_cuda_packed_error_statistics: {
    parameters: ["usize", "i32", "usize", "usize", "usize", "usize", "usize", "i32", "usize", "out", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_accumulate_moment(aq_cuda_buffer x, aq_cuda_buffer weight, size_t tokens, size_t cols,
  //     aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_accumulate_moment: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_quantize_feedback(aq_cuda_buffer weights, size_t rows, size_t cols, int32_t bits, size_t
  //     group_size, aq_cuda_buffer scale, aq_cuda_buffer zero_point, aq_cuda_buffer factor, aq_cuda_buffer order,
  //     aq_cuda_buffer codes, aq_cuda_stream stream)
  aq_cuda_quantize_feedback: {
    parameters: [
      "usize",
      "usize",
      "usize",
      "i32",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
    ],
    result: "i32",
  },
  // int32_t aq_cuda_linear_packed(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
  //     aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols, int32_t bits, size_t group_size,
  //     aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_linear_packed: {
    parameters: [
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "i32",
      "usize",
      "usize",
      "usize",
    ],
    result: "i32",
  },
  // int32_t aq_cuda_linear_packed_bf16(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
  //     aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols, int32_t bits, size_t group_size,
  //     aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_linear_packed_bf16: {
    parameters: [
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "i32",
      "usize",
      "usize",
      "usize",
    ],
    result: "i32",
  },
  // int32_t aq_cuda_quantize_activations(aq_cuda_buffer x, size_t tokens, size_t cols, int32_t bits, int32_t kind,
  //     aq_cuda_buffer codes, aq_cuda_buffer scale, aq_cuda_buffer zero_point, aq_cuda_stream stream)
  aq_cuda_quantize_activations: {
    parameters: ["usize", "usize", "usize", "i32", "i32", "usize", "usize", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_linear_packed_int8(aq_cuda_buffer codes, aq_cuda_buffer x_scale, aq_cuda_buffer x_zero_point,
  //     size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer zero_point, aq_cuda_buffer bias,
  //     size_t rows, size_t cols, int32_t bits, size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_linear_packed_int8: {
    parameters: [
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "i32",
      "usize",
      "usize",
      "usize",
    ],
    result: "i32",
  },
  // int32_t aq_cuda_linear_cublas(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer weights, size_t rows, size_t cols,
  //     aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_linear_cublas: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_linear(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer weights, int32_t dtype, aq_cuda_buffer
  //     bias, size_t rows, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_linear: {
    parameters: ["usize", "usize", "usize", "i32", "usize", "usize", "usize", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_rms_norm(aq_cuda_buffer x, size_t rows, size_t cols, aq_cuda_buffer weight, float epsilon,
  //     aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_rms_norm: {
    parameters: ["usize", "usize", "usize", "usize", "f32", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_layer_norm(aq_cuda_buffer x, size_t rows, size_t cols, aq_cuda_buffer weight, aq_cuda_buffer
  //     bias, float epsilon, aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_layer_norm: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "f32", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_softmax(aq_cuda_buffer x, size_t rows, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_softmax: { parameters: ["usize", "usize", "usize", "usize", "usize"], result: "i32" },
  // int32_t aq_cuda_top_one(aq_cuda_buffer x, size_t rows, size_t cols, aq_cuda_buffer index, aq_cuda_buffer
  //     probability, aq_cuda_stream stream)
  aq_cuda_top_one: { parameters: ["usize", "usize", "usize", "usize", "usize", "usize"], result: "i32" },
  // int32_t aq_cuda_attention(aq_cuda_buffer q, aq_cuda_buffer k, aq_cuda_buffer v, aq_cuda_buffer key_mask, size_t
  //     batch, size_t tokens, size_t heads, size_t kv_heads, size_t head_size, float scale, aq_cuda_buffer out,
  //     aq_cuda_stream stream)
  aq_cuda_attention: {
    parameters: [
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "f32",
      "usize",
      "usize",
    ],
    result: "i32",
  },
  // int32_t aq_cuda_rotary(aq_cuda_buffer x, aq_cuda_buffer positions, size_t rows, size_t heads, size_t head_size,
  //     double theta, aq_cuda_stream stream)
  aq_cuda_rotary: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "f64", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_embed_tokens(aq_cuda_buffer table, int32_t dtype, size_t vocabulary, size_t cols, aq_cuda_buffer
  //     tokens, size_t n, aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_embed_tokens: {
    parameters: ["usize", "i32", "usize", "usize", "usize", "usize", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_silu(aq_cuda_buffer x, size_t n, aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_silu: { parameters: ["usize", "usize", "usize", "usize"], result: "i32" },
  // int32_t aq_cuda_gelu_tanh(aq_cuda_buffer x, size_t n, aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_gelu_tanh: { parameters: ["usize", "usize", "usize", "usize"], result: "i32" },
  // int32_t aq_cuda_silu_multiply(aq_cuda_buffer gate, aq_cuda_buffer up, size_t n, aq_cuda_buffer out,
  //     aq_cuda_stream stream)
  aq_cuda_silu_multiply: { parameters: ["usize", "usize", "usize", "usize", "usize"], result: "i32" },
  // int32_t aq_cuda_add(aq_cuda_buffer a, aq_cuda_buffer b, size_t n, aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_add: { parameters: ["usize", "usize", "usize", "usize", "usize"], result: "i32" },
  // int32_t aq_cuda_modulate(aq_cuda_buffer x, aq_cuda_buffer scale, aq_cuda_buffer shift, size_t scale_offset,
  //     size_t shift_offset, size_t stride, size_t batch, size_t tokens, size_t cols, aq_cuda_buffer out,
  //     aq_cuda_stream stream)
  aq_cuda_modulate: {
    parameters: [
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
    ],
    result: "i32",
  },
  // int32_t aq_cuda_gate_add(aq_cuda_buffer residual, aq_cuda_buffer gate, size_t gate_offset, aq_cuda_buffer x,
  //     size_t stride, size_t batch, size_t tokens, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_gate_add: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "usize", "usize", "usize", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_patchify(aq_cuda_buffer images, size_t batch, size_t channels, size_t height, size_t width,
  //     size_t patch, aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_patchify: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "usize", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_unpatchify(aq_cuda_buffer tokens, size_t batch, size_t channels, size_t height, size_t width,
  //     size_t patch, aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_unpatchify: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "usize", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_timestep_embedding(aq_cuda_buffer times, size_t n, size_t channels, int32_t cosines_first, double
  //     downscale_freq_shift, double max_period, aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_timestep_embedding: {
    parameters: ["usize", "usize", "usize", "i32", "f64", "f64", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_token_kl(aq_cuda_buffer full, aq_cuda_buffer other, aq_cuda_buffer weights, size_t rows, size_t
  //     cols, aq_cuda_buffer kl, aq_cuda_buffer gradient, aq_cuda_stream stream)
  aq_cuda_token_kl: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "usize", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_squared_errors(aq_cuda_buffer full, aq_cuda_buffer other, aq_cuda_buffer weights, size_t rows,
  //     size_t cols, aq_cuda_buffer sums, aq_cuda_buffer gradient, aq_cuda_stream stream)
  aq_cuda_squared_errors: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "usize", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_transpose(aq_cuda_buffer in, size_t rows, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_transpose: { parameters: ["usize", "usize", "usize", "usize", "usize"], result: "i32" },
  // int32_t aq_cuda_packed_gradient(aq_cuda_buffer dw, aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer
  //     zero_point, size_t rows, size_t cols, int32_t bits, size_t group_size, aq_cuda_buffer dscale, aq_cuda_buffer
  //     dzero, aq_cuda_stream stream)
  aq_cuda_packed_gradient: {
    parameters: [
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "i32",
      "usize",
      "usize",
      "usize",
      "usize",
    ],
    result: "i32",
  },
  // int32_t aq_cuda_rms_norm_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t rows, size_t cols, aq_cuda_buffer
  //     weight, float epsilon, aq_cuda_buffer dx, aq_cuda_stream stream)
  aq_cuda_rms_norm_backward: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "f32", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_layer_norm_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t rows, size_t cols, aq_cuda_buffer
  //     weight, float epsilon, aq_cuda_buffer dx, aq_cuda_stream stream)
  aq_cuda_layer_norm_backward: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "f32", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_attention_backward(aq_cuda_buffer q, aq_cuda_buffer k, aq_cuda_buffer v, aq_cuda_buffer out,
  //     aq_cuda_buffer dout, aq_cuda_buffer key_mask, size_t batch, size_t tokens, size_t heads, size_t kv_heads,
  //     size_t head_size, float scale, aq_cuda_buffer dq, aq_cuda_buffer dk, aq_cuda_buffer dv, aq_cuda_stream
  //     stream)
  aq_cuda_attention_backward: {
    parameters: [
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "usize",
      "f32",
      "usize",
      "usize",
      "usize",
      "usize",
    ],
    result: "i32",
  },
  // int32_t aq_cuda_silu_multiply_backward(aq_cuda_buffer gate, aq_cuda_buffer up, aq_cuda_buffer dy, size_t n,
  //     aq_cuda_buffer dgate, aq_cuda_buffer dup, aq_cuda_stream stream)
  aq_cuda_silu_multiply_backward: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_silu_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t n, aq_cuda_buffer dx, aq_cuda_stream
  //     stream)
  aq_cuda_silu_backward: { parameters: ["usize", "usize", "usize", "usize", "usize"], result: "i32" },
  // int32_t aq_cuda_gelu_tanh_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t n, aq_cuda_buffer dx,
  //     aq_cuda_stream stream)
  aq_cuda_gelu_tanh_backward: { parameters: ["usize", "usize", "usize", "usize", "usize"], result: "i32" },
  // int32_t aq_cuda_column_sums(aq_cuda_buffer a, aq_cuda_buffer b, size_t batch, size_t tokens, size_t cols, size_t
  //     stride, aq_cuda_buffer out, aq_cuda_stream stream)
  aq_cuda_column_sums: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "usize", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_projected_gradient_step(aq_cuda_buffer values, aq_cuda_buffer gradients, aq_cuda_buffer low,
  //     aq_cuda_buffer high, size_t n, float rate, aq_cuda_stream stream)
  aq_cuda_projected_gradient_step: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "f32", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_adam_step(aq_cuda_buffer parameters, aq_cuda_buffer gradient, aq_cuda_buffer first,
  //     aq_cuda_buffer second, size_t n, double learning_rate, double beta1, double beta2, double epsilon, int32_t
  //     step, aq_cuda_stream stream)
  aq_cuda_adam_step: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "f64", "f64", "f64", "f64", "i32", "usize"],
    result: "i32",
  },
} as const satisfies SymbolTable;
