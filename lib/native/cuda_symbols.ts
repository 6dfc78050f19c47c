/**
 * The CUDA library's functions, one entry a symbol, the C declaration beside it. A test compares this table with
 * kernels/include/arrowquant_cuda.h. Handles of buffers and streams are counts to the FFI (`usize`).
 */
import type { SymbolTable } from "./symbols.ts";

/** `AQ_CUDA_ABI_VERSION` that this table was written for. */
export const CUDA_ABI_VERSION = 1;

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
  // int32_t aq_cuda_allocate(size_t bytes, uint64_t *buffer, aq_cuda_stream stream)
  aq_cuda_allocate: { parameters: ["usize", "out", "usize"], result: "i32" },
  // int32_t aq_cuda_free(aq_cuda_buffer buffer)
  aq_cuda_free: { parameters: ["usize"], result: "i32" },
  // int32_t aq_cuda_upload(const void *data, size_t bytes, aq_cuda_buffer buffer, size_t offset,
  //     aq_cuda_stream stream)
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
  // int32_t aq_cuda_unpack_codes(aq_cuda_buffer packed, size_t rows, size_t cols, int32_t bits,
  //     aq_cuda_buffer codes, aq_cuda_stream stream)
  aq_cuda_unpack_codes: { parameters: ["usize", "usize", "usize", "i32", "usize", "usize"], result: "i32" },
  // int32_t aq_cuda_quantize_round(aq_cuda_buffer weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
  //     size_t group_size, int32_t zero_point_kind, aq_cuda_buffer packed,
  //     aq_cuda_buffer scale, aq_cuda_buffer zero_point, aq_cuda_stream stream)
  aq_cuda_quantize_round: {
    parameters: ["usize", "i32", "usize", "usize", "i32", "usize", "i32", "usize", "usize", "usize", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_quantize_clip(aq_cuda_buffer weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
  //     size_t group_size, int32_t zero_point_kind, aq_cuda_buffer column_weights,
  //     aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer zero_point,
  //     aq_cuda_stream stream)
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
  //     size_t cols, int32_t bits, size_t group_size, aq_cuda_buffer out, int32_t dtype,
  //     aq_cuda_stream stream)
  aq_cuda_dequantize: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "i32", "usize", "usize", "i32", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_error_statistics(aq_cuda_buffer a, int32_t a_dtype, aq_cuda_buffer b, int32_t b_dtype, size_t n,
  //     double *statistics, aq_cuda_stream stream)
  aq_cuda_error_statistics: {
    parameters: ["usize", "i32", "usize", "i32", "usize", "out", "usize"],
    result: "i32",
  },
  // int32_t aq_cuda_packed_error_statistics(aq_cuda_buffer weights, int32_t dtype, aq_cuda_buffer packed,
  //     aq_cuda_buffer scale, aq_cuda_buffer zero_point, size_t rows,
  //     size_t cols, int32_t bits, size_t group_size, double *statistics,
  //     aq_cuda_stream stream)
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
  // int32_t aq_cuda_linear_packed(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
  //     aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols,
  //     int32_t bits, size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream)
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
  //     aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols,
  //     int32_t bits, size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream)
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
  // int32_t aq_cuda_adam_step(aq_cuda_buffer parameters, aq_cuda_buffer gradient, aq_cuda_buffer first,
  //     aq_cuda_buffer second, size_t n, double learning_rate, double beta1, double beta2,
  //     double epsilon, int32_t step, aq_cuda_stream stream)
  aq_cuda_adam_step: {
    parameters: ["usize", "usize", "usize", "usize", "usize", "f64", "f64", "f64", "f64", "i32", "usize"],
    result: "i32",
  },
} as const satisfies SymbolTable;
