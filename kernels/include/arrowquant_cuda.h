/* arrowquant_cuda.h: the ABI of the CUDA kernels, a library of its own. Words, layouts, element types and error codes are
 * arrowquant.h's.
 *
 * Every function returns AQ_OK or a negative code; none prints, exits or keeps state outside what its caller created. Without a
 * device or a driver the library loads, and whatever needs one returns AQ_E_DEVICE.
 *
 * Matrices are in buffers of a device, opaque handles that are freed explicitly; a stream is the order in which work on them is
 * done, and holds a little memory of its own. A stream and the buffers used with it are one device's. One stream is not used by
 * two threads at once, and a handle not after it was freed. A buffer smaller than the shape says is AQ_E_SHAPE. A count of zero
 * is fine before any handle is looked at. Buffers of one call must not be the same unless a function says so.
 *
 * Functions marked "waits" return when their result is there; the others only put work on the stream, and a failure of that
 * work shows in the next function that waits. */
#ifndef ARROWQUANT_CUDA_H
#define ARROWQUANT_CUDA_H

#include "arrowquant.h"

#ifdef __cplusplus
extern "C" {
#endif

#define AQ_CUDA_ABI_VERSION 2

#define AQ_E_DEVICE (-100) /* no device, no driver, or a driver older than the runtime */
#define AQ_E_MEMORY (-101) /* the device or the host has no room left */
#define AQ_E_LIBRARY (-102) /* cuBLAS is not on this machine, or refuses */
#define AQ_E_CUDA (-1000)  /* minus the number of the CUDA runtime's error: see aq_cuda_describe_status */

typedef size_t aq_cuda_buffer; /* 0: none */
typedef size_t aq_cuda_stream;

/* AQ_CUDA_ABI_VERSION of the library. */
AQ_API int32_t aq_cuda_abi_version(void);

/* count[0] = devices, 0 with AQ_E_DEVICE. */
AQ_API int32_t aq_cuda_device_count(int32_t *count);

/* One line without its end, zero-terminated and cut to `bytes`: the device's name, architecture and memory, or "no device: "
 * and the reason, with AQ_E_DEVICE. */
AQ_API int32_t aq_cuda_describe_device(int32_t device, uint8_t *text, size_t bytes);

/* The same for a status that another function returned. */
AQ_API int32_t aq_cuda_describe_status(int32_t status, uint8_t *text, size_t bytes);

/* stream[0] = a new stream of `device`. */
AQ_API int32_t aq_cuda_create_stream(int32_t device, uint64_t *stream);

/* Waits, then frees the stream. */
AQ_API int32_t aq_cuda_free_stream(aq_cuda_stream stream);

/* Waits for all work put on the stream. */
AQ_API int32_t aq_cuda_synchronize(aq_cuda_stream stream);

/* Time by the device's own clock between two places of a stream: the first call marks one, the second the other and waits.
 * Of one stream one measurement at a time. */
AQ_API int32_t aq_cuda_begin_timing(aq_cuda_stream stream);
AQ_API int32_t aq_cuda_end_timing(aq_cuda_stream stream, double *milliseconds);

/* buffer[0] = a new buffer of the stream's device, its bytes unspecified. */
AQ_API int32_t aq_cuda_allocate(size_t bytes, uint64_t *buffer, aq_cuda_stream stream);

/* Frees a buffer after the work of its device; 0 is fine. */
AQ_API int32_t aq_cuda_free(aq_cuda_buffer buffer);

/* bytes of `data` -> buffer from `offset`. Waits. */
AQ_API int32_t aq_cuda_upload(const void *data, size_t bytes, aq_cuda_buffer buffer, size_t offset,
                              aq_cuda_stream stream);

/* buffer from `offset` -> bytes of `data`. Waits. */
AQ_API int32_t aq_cuda_download(aq_cuda_buffer buffer, size_t offset, void *data, size_t bytes, aq_cuda_stream stream);

/* buffer to buffer, both from their beginning: the bandwidth that others are measured by. */
AQ_API int32_t aq_cuda_copy(aq_cuda_buffer from, aq_cuda_buffer to, size_t bytes, aq_cuda_stream stream);

/* All bytes of a buffer to zero. */
AQ_API int32_t aq_cuda_clear(aq_cuda_buffer buffer, aq_cuda_stream stream);

/* aq_pack_codes. Waits. */
AQ_API int32_t aq_cuda_pack_codes(aq_cuda_buffer codes, size_t rows, size_t cols, int32_t bits, aq_cuda_buffer packed,
                                  aq_cuda_stream stream);

/* aq_unpack_codes. */
AQ_API int32_t aq_cuda_unpack_codes(aq_cuda_buffer packed, size_t rows, size_t cols, int32_t bits,
                                    aq_cuda_buffer codes, aq_cuda_stream stream);

/* aq_quantize_round, to the bit. zero_point 0: symmetric. Waits. */
AQ_API int32_t aq_cuda_quantize_round(aq_cuda_buffer weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
                                      size_t group_size, int32_t zero_point_kind, aq_cuda_buffer packed,
                                      aq_cuda_buffer scale, aq_cuda_buffer zero_point, aq_cuda_stream stream);

/* aq_quantize_clip, to the bit; column_weights 0: all ones. Waits. */
AQ_API int32_t aq_cuda_quantize_clip(aq_cuda_buffer weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
                                     size_t group_size, int32_t zero_point_kind, aq_cuda_buffer column_weights,
                                     aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer zero_point,
                                     aq_cuda_stream stream);

/* aq_dequantize, to the bit. */
AQ_API int32_t aq_cuda_dequantize(aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer zero_point, size_t rows,
                                  size_t cols, int32_t bits, size_t group_size, aq_cuda_buffer out, int32_t dtype,
                                  aq_cuda_stream stream);

/* aq_quantize_two_level, to the bit; column_weights 0: all ones. Waits. */
AQ_API int32_t aq_cuda_quantize_two_level(aq_cuda_buffer weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
                                          size_t group_size, int32_t scale_bits, int32_t search,
                                          aq_cuda_buffer column_weights, aq_cuda_buffer packed,
                                          aq_cuda_buffer sub_scale, aq_cuda_buffer sub_min, aq_cuda_buffer super_scale,
                                          aq_cuda_buffer super_min, aq_cuda_stream stream);

/* aq_dequantize_two_level, to the bit. */
AQ_API int32_t aq_cuda_dequantize_two_level(aq_cuda_buffer packed, aq_cuda_buffer sub_scale, aq_cuda_buffer sub_min,
                                            aq_cuda_buffer super_scale, aq_cuda_buffer super_min, size_t rows,
                                            size_t cols, int32_t bits, size_t group_size, int32_t scale_bits,
                                            aq_cuda_buffer out, int32_t dtype, aq_cuda_stream stream);

/* aq_error_statistics with sums in another order, the same in every call; statistics f64[AQ_STATISTICS] of the host. Waits. */
AQ_API int32_t aq_cuda_error_statistics(aq_cuda_buffer a, int32_t a_dtype, aq_cuda_buffer b, int32_t b_dtype, size_t n,
                                        double *statistics, aq_cuda_stream stream);

/* aq_packed_error_statistics likewise. Waits. */
AQ_API int32_t aq_cuda_packed_error_statistics(aq_cuda_buffer weights, int32_t dtype, aq_cuda_buffer packed,
                                               aq_cuda_buffer scale, aq_cuda_buffer zero_point, size_t rows,
                                               size_t cols, int32_t bits, size_t group_size, double *statistics,
                                               aq_cuda_stream stream);

/* out[i, j] += sum_t weight[t] x[t, i] x[t, j]: aq_accumulate_moment without `y`. Tensor cores, each float32 factor as the sum of
 * two TF32 numbers, sums in float32. */
AQ_API int32_t aq_cuda_accumulate_moment(aq_cuda_buffer x, aq_cuda_buffer weight, size_t tokens, size_t cols,
                                         aq_cuda_buffer out, aq_cuda_stream stream);

/* aq_quantize_feedback, to the bit: blocks of columns, each block's errors put on the columns behind it. Of several faults that the
 * data have, AQ_E_VALUE comes first. Waits. */
AQ_API int32_t aq_cuda_quantize_feedback(aq_cuda_buffer weights, size_t rows, size_t cols, int32_t bits,
                                         size_t group_size, aq_cuda_buffer scale, aq_cuda_buffer zero_point,
                                         aq_cuda_buffer factor, aq_cuda_buffer order, aq_cuda_buffer codes,
                                         aq_cuda_stream stream);

/* aq_linear_packed, bound by memory at one token: codes are exact, x is float32, its products are added up in float32 by tensor
 * cores where rows are whole runs of sixteen bytes and groups multiples of 32 columns, else without them. bias 0: none. */
AQ_API int32_t aq_cuda_linear_packed(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
                                     aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols,
                                     int32_t bits, size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream);

/* The same with x rounded to bfloat16, which is faster from a few tokens on. */
AQ_API int32_t aq_cuda_linear_packed_bf16(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
                                          aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols,
                                          int32_t bits, size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream);

/* aq_quantize_activations, to the bit. Waits. */
AQ_API int32_t aq_cuda_quantize_activations(aq_cuda_buffer x, size_t tokens, size_t cols, int32_t bits, int32_t kind,
                                            aq_cuda_buffer codes, aq_cuda_buffer scale, aq_cuda_buffer zero_point,
                                            aq_cuda_stream stream);

/* aq_linear_packed_int8, to the bit, by dot products of four bytes. bias 0: none. Waits. */
AQ_API int32_t aq_cuda_linear_packed_int8(aq_cuda_buffer codes, aq_cuda_buffer x_scale, aq_cuda_buffer x_zero_point,
                                          size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
                                          aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols,
                                          int32_t bits, size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream);

/* For comparisons: cuBLAS's out[t, n] = sum_k x[t, k] weights[n, k], everything bfloat16, sums in float32. The library is looked for when
 * this is called first: AQ_E_LIBRARY without it. */
AQ_API int32_t aq_cuda_linear_cublas(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer weights, size_t rows, size_t cols,
                                     aq_cuda_buffer out, aq_cuda_stream stream);

/* Models: the functions of arrowquant.h, within a few units in the last place of the terms that are added up; buffers may be the same
 * where they say so there. Those that look at numbers for being in range wait; the others do not. ------------------------- */

/* aq_linear; sums in float32, no tensor cores. bias 0: none. */
AQ_API int32_t aq_cuda_linear(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer weights, int32_t dtype, aq_cuda_buffer bias,
                              size_t rows, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream);

/* aq_rms_norm. weight 0: ones. */
AQ_API int32_t aq_cuda_rms_norm(aq_cuda_buffer x, size_t rows, size_t cols, aq_cuda_buffer weight, float epsilon,
                                aq_cuda_buffer out, aq_cuda_stream stream);

/* aq_layer_norm. weight 0: ones; bias 0: zeros. */
AQ_API int32_t aq_cuda_layer_norm(aq_cuda_buffer x, size_t rows, size_t cols, aq_cuda_buffer weight, aq_cuda_buffer bias,
                                  float epsilon, aq_cuda_buffer out, aq_cuda_stream stream);

/* aq_softmax. */
AQ_API int32_t aq_cuda_softmax(aq_cuda_buffer x, size_t rows, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream);

/* Of each row of x f32[rows, cols] the largest's first position, index i32[rows], and its part of the softmax, probability
 * f32[rows]. NaN is passed over. */
AQ_API int32_t aq_cuda_top_one(aq_cuda_buffer x, size_t rows, size_t cols, aq_cuda_buffer index,
                               aq_cuda_buffer probability, aq_cuda_stream stream);

/* aq_attention for heads of up to 256 elements (else AQ_E_SHAPE). key_mask 0: all keys. */
AQ_API int32_t aq_cuda_attention(aq_cuda_buffer q, aq_cuda_buffer k, aq_cuda_buffer v, aq_cuda_buffer key_mask,
                                 size_t batch, size_t tokens, size_t heads, size_t kv_heads, size_t head_size, float scale,
                                 aq_cuda_buffer out, aq_cuda_stream stream);

/* aq_rotary. Waits. */
AQ_API int32_t aq_cuda_rotary(aq_cuda_buffer x, aq_cuda_buffer positions, size_t rows, size_t heads, size_t head_size,
                              double theta, aq_cuda_stream stream);

/* out[i] = row tokens[i] of the table [vocabulary, cols] of `dtype` (F32, F16 or BF16) as float32; tokens i32[n], AQ_E_VALUE where one
 * is no row. Waits. */
AQ_API int32_t aq_cuda_embed_tokens(aq_cuda_buffer table, int32_t dtype, size_t vocabulary, size_t cols,
                                    aq_cuda_buffer tokens, size_t n, aq_cuda_buffer out, aq_cuda_stream stream);

AQ_API int32_t aq_cuda_silu(aq_cuda_buffer x, size_t n, aq_cuda_buffer out, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_gelu_tanh(aq_cuda_buffer x, size_t n, aq_cuda_buffer out, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_silu_multiply(aq_cuda_buffer gate, aq_cuda_buffer up, size_t n, aq_cuda_buffer out,
                                     aq_cuda_stream stream);
AQ_API int32_t aq_cuda_add(aq_cuda_buffer a, aq_cuda_buffer b, size_t n, aq_cuda_buffer out, aq_cuda_stream stream);

/* aq_modulate and aq_gate_add; offsets in floats, where a pointer into a row would be. */
AQ_API int32_t aq_cuda_modulate(aq_cuda_buffer x, aq_cuda_buffer scale, aq_cuda_buffer shift, size_t scale_offset,
                                size_t shift_offset, size_t stride, size_t batch, size_t tokens, size_t cols,
                                aq_cuda_buffer out, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_gate_add(aq_cuda_buffer residual, aq_cuda_buffer gate, size_t gate_offset, aq_cuda_buffer x,
                                size_t stride, size_t batch, size_t tokens, size_t cols, aq_cuda_buffer out,
                                aq_cuda_stream stream);

/* aq_patchify and aq_unpatchify, to the bit. */
AQ_API int32_t aq_cuda_patchify(aq_cuda_buffer images, size_t batch, size_t channels, size_t height, size_t width,
                                size_t patch, aq_cuda_buffer out, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_unpatchify(aq_cuda_buffer tokens, size_t batch, size_t channels, size_t height, size_t width,
                                  size_t patch, aq_cuda_buffer out, aq_cuda_stream stream);

/* aq_timestep_embedding. Waits. */
AQ_API int32_t aq_cuda_timestep_embedding(aq_cuda_buffer times, size_t n, size_t channels, int32_t cosines_first,
                                          double downscale_freq_shift, double max_period, aq_cuda_buffer out,
                                          aq_cuda_stream stream);

/* Step KL ------------------------------------------------------------------------------------------------------------------ */

/* kl f64[rows] = KL(softmax(full) || softmax(other)) of each row of the logits f32[rows, cols], in nats and double; gradient
 * f32[rows, cols], or 0, = weights[row] times its slope along `other`. weights f32[rows], 0: ones. */
AQ_API int32_t aq_cuda_token_kl(aq_cuda_buffer full, aq_cuda_buffer other, aq_cuda_buffer weights, size_t rows,
                                size_t cols, aq_cuda_buffer kl, aq_cuda_buffer gradient, aq_cuda_stream stream);

/* sums f64[rows] = weights[row] sum (other - full)^2, the step KL of images; gradient likewise. */
AQ_API int32_t aq_cuda_squared_errors(aq_cuda_buffer full, aq_cuda_buffer other, aq_cuda_buffer weights, size_t rows,
                                      size_t cols, aq_cuda_buffer sums, aq_cuda_buffer gradient, aq_cuda_stream stream);

/* Gradients: the functions of arrowquant.h. Those of elements, of columns and the steps give the CPU's bits. -------------------- */

AQ_API int32_t aq_cuda_transpose(aq_cuda_buffer in, size_t rows, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_packed_gradient(aq_cuda_buffer dw, aq_cuda_buffer packed, aq_cuda_buffer scale,
                                       aq_cuda_buffer zero_point, size_t rows, size_t cols, int32_t bits,
                                       size_t group_size, aq_cuda_buffer dscale, aq_cuda_buffer dzero,
                                       aq_cuda_stream stream);
AQ_API int32_t aq_cuda_rms_norm_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t rows, size_t cols,
                                         aq_cuda_buffer weight, float epsilon, aq_cuda_buffer dx,
                                         aq_cuda_stream stream);
AQ_API int32_t aq_cuda_layer_norm_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t rows, size_t cols,
                                           aq_cuda_buffer weight, float epsilon, aq_cuda_buffer dx,
                                           aq_cuda_stream stream);

/* Heads of up to 256 elements. */
AQ_API int32_t aq_cuda_attention_backward(aq_cuda_buffer q, aq_cuda_buffer k, aq_cuda_buffer v, aq_cuda_buffer out,
                                          aq_cuda_buffer dout, aq_cuda_buffer key_mask, size_t batch, size_t tokens,
                                          size_t heads, size_t kv_heads, size_t head_size, float scale,
                                          aq_cuda_buffer dq, aq_cuda_buffer dk, aq_cuda_buffer dv,
                                          aq_cuda_stream stream);
AQ_API int32_t aq_cuda_silu_multiply_backward(aq_cuda_buffer gate, aq_cuda_buffer up, aq_cuda_buffer dy, size_t n,
                                              aq_cuda_buffer dgate, aq_cuda_buffer dup, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_silu_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t n, aq_cuda_buffer dx,
                                     aq_cuda_stream stream);
AQ_API int32_t aq_cuda_gelu_tanh_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t n, aq_cuda_buffer dx,
                                          aq_cuda_stream stream);
AQ_API int32_t aq_cuda_column_sums(aq_cuda_buffer a, aq_cuda_buffer b, size_t batch, size_t tokens, size_t cols,
                                   size_t stride, aq_cuda_buffer out, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_projected_gradient_step(aq_cuda_buffer values, aq_cuda_buffer gradients, aq_cuda_buffer low,
                                               aq_cuda_buffer high, size_t n, float rate, aq_cuda_stream stream);

/* aq_adam_step; an infinite rate or epsilon is AQ_E_VALUE, too. */
AQ_API int32_t aq_cuda_adam_step(aq_cuda_buffer parameters, aq_cuda_buffer gradient, aq_cuda_buffer first,
                                 aq_cuda_buffer second, size_t n, double learning_rate, double beta1, double beta2,
                                 double epsilon, int32_t step, aq_cuda_stream stream);

#ifdef __cplusplus
}
#endif
#endif
