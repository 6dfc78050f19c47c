/* arrowquant_cuda.h: the ABI of the CUDA kernels, a separate library. Words, layouts, element types and
 * error codes are arrowquant.h's.
 *
 * Every function returns AQ_OK or a negative code; none prints, exits or keeps state outside what its
 * caller created. Without a device or a driver the library loads, and whatever needs one returns
 * AQ_E_DEVICE.
 *
 * Matrices are in buffers of a device, opaque handles that are freed explicitly; a stream is the order in
 * which work on them is done, and holds a little memory itself. A stream and the buffers used with it
 * are one device's. One stream is not used by two threads at once, and a handle not after it was freed. A
 * buffer smaller than the shape says is AQ_E_SHAPE. A count of zero is fine before any handle is looked
 * at. Buffers of one call must not be the same unless a function says so.
 *
 * Functions marked "waits" return when their result is there; the others only put work on the stream, and a
 * failure of that work shows in the next function that waits. */
#ifndef ARROWQUANT_CUDA_H
#define ARROWQUANT_CUDA_H

#include "arrowquant.h"

#ifdef __cplusplus
extern "C" {
#endif

#define AQ_CUDA_ABI_VERSION 10

#define AQ_E_DEVICE (-100) /* no device, no driver, or a driver older than the runtime */
#define AQ_E_MEMORY (-101) /* the device or the host has no room left */
#define AQ_E_UNSUPPORTED (-102) /* sizes that no kernel of the device has, and the CPU's function does */
#define AQ_E_CUDA (-1000)  /* minus the number of the CUDA runtime's error: see aq_cuda_describe_status */

typedef size_t aq_cuda_buffer; /* 0: none */
typedef size_t aq_cuda_stream;

/* AQ_CUDA_ABI_VERSION of the library. */
AQ_API int32_t aq_cuda_abi_version(void);

/* count[0] = devices, 0 with AQ_E_DEVICE. */
AQ_API int32_t aq_cuda_device_count(int32_t *count);

/* One line without its end, zero-terminated and cut to `bytes`: the device's name, architecture and
 * memory, or "no device: " and the reason, with AQ_E_DEVICE. */
AQ_API int32_t aq_cuda_describe_device(int32_t device, uint8_t *text, size_t bytes);

/* The same for a status that another function returned. */
AQ_API int32_t aq_cuda_describe_status(int32_t status, uint8_t *text, size_t bytes);

/* stream[0] = a new stream of `device`. */
AQ_API int32_t aq_cuda_create_stream(int32_t device, uint64_t *stream);

/* Waits, then frees the stream. */
AQ_API int32_t aq_cuda_free_stream(aq_cuda_stream stream);

/* Time by the device's own clock between two places of a stream: the first call marks one, the second the
 * other and waits. Of one stream one measurement at a time. */
AQ_API int32_t aq_cuda_begin_timing(aq_cuda_stream stream);
AQ_API int32_t aq_cuda_end_timing(aq_cuda_stream stream, double *milliseconds);

/* buffer[0] = a new buffer of the stream's device, its bytes unspecified. */
AQ_API int32_t aq_cuda_allocate(size_t bytes, uint64_t *buffer, aq_cuda_stream stream);

/* part[0] = a handle of `bytes` of a buffer from `offset` on, a multiple of sixteen; it is freed before the
 * buffer. */
AQ_API int32_t aq_cuda_part(aq_cuda_buffer buffer, size_t offset, size_t bytes, uint64_t *part);

/* Frees a buffer after the work of its device, or a part; 0 is fine. */
AQ_API int32_t aq_cuda_free(aq_cuda_buffer buffer);

/* bytes of `data`, which may change afterwards, -> buffer from `offset`. Goes on while the work before it
 * does; the stream keeps memory for that, of the host and the device, if there is room. */
AQ_API int32_t aq_cuda_upload(const void *data, size_t bytes, aq_cuda_buffer buffer, size_t offset,
                              aq_cuda_stream stream);

/* buffer from `offset` -> bytes of `data`. Waits. */
AQ_API int32_t aq_cuda_download(aq_cuda_buffer buffer, size_t offset, void *data, size_t bytes, aq_cuda_stream stream);

/* buffer to buffer, both from their beginning: the bandwidth that others are measured by. */
AQ_API int32_t aq_cuda_copy(aq_cuda_buffer from, aq_cuda_buffer to, size_t bytes, aq_cuda_stream stream);

/* aq_quantize_round, to the bit. zero_point 0: symmetric. Waits. */
AQ_API int32_t aq_cuda_quantize_round(aq_cuda_buffer weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
                                      size_t group_size, int32_t zero_point_kind, aq_cuda_buffer packed,
                                      aq_cuda_buffer scale, aq_cuda_buffer zero_point, aq_cuda_stream stream);

/* aq_quantize_clip, to the bit; column_weights 0: all ones. Waits. */
AQ_API int32_t aq_cuda_quantize_clip(aq_cuda_buffer weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
                                     size_t group_size, int32_t zero_point_kind, aq_cuda_buffer column_weights,
                                     aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer zero_point,
                                     aq_cuda_stream stream);

/* aq_quantize_two_level, to the bit; column_weights 0: all ones. Waits. */
AQ_API int32_t aq_cuda_quantize_two_level(aq_cuda_buffer weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
                                          size_t group_size, int32_t scale_bits, int32_t search,
                                          aq_cuda_buffer column_weights, aq_cuda_buffer packed,
                                          aq_cuda_buffer sub_scale, aq_cuda_buffer sub_min, aq_cuda_buffer super_scale,
                                          aq_cuda_buffer super_min, aq_cuda_stream stream);

/* aq_fit_two_level, to the bit; group_weights 0: all ones. Waits. */
AQ_API int32_t aq_cuda_fit_two_level(aq_cuda_buffer scale, aq_cuda_buffer minimum, aq_cuda_buffer group_weights,
                                     size_t rows, size_t cols, size_t group_size, int32_t scale_bits,
                                     aq_cuda_buffer sub_scale, aq_cuda_buffer sub_min, aq_cuda_buffer super_scale,
                                     aq_cuda_buffer super_min, aq_cuda_stream stream);

/* aq_quantize_symmetric_levels, to the bit; handles may be 0 where pointers may be null. Waits. */
AQ_API int32_t aq_cuda_quantize_symmetric_levels(aq_cuda_buffer weights, int32_t dtype, aq_cuda_buffer scale,
                                                 aq_cuda_buffer column_weights, size_t rows, size_t cols, int32_t bits,
                                                 size_t group_size, int32_t scale_bits, aq_cuda_buffer packed,
                                                 aq_cuda_buffer sub_scale, aq_cuda_buffer sub_min,
                                                 aq_cuda_buffer super_scale, aq_cuda_buffer super_min,
                                                 aq_cuda_stream stream);

/* aq_dequantize, to the bit. zero_point 0: symmetric. */
AQ_API int32_t aq_cuda_dequantize(aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer zero_point, size_t rows,
                                  size_t cols, int32_t bits, size_t group_size, aq_cuda_buffer out, int32_t dtype,
                                  aq_cuda_stream stream);

/* aq_dequantize_two_level, to the bit. */
AQ_API int32_t aq_cuda_dequantize_two_level(aq_cuda_buffer packed, aq_cuda_buffer sub_scale, aq_cuda_buffer sub_min,
                                            aq_cuda_buffer super_scale, aq_cuda_buffer super_min, size_t rows,
                                            size_t cols, int32_t bits, size_t group_size, int32_t scale_bits,
                                            aq_cuda_buffer out, int32_t dtype, aq_cuda_stream stream);

/* aq_dequantize_trellis, to the bit. */
AQ_API int32_t aq_cuda_dequantize_trellis(aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer offset, size_t rows,
                                          size_t cols, int32_t bits, size_t group_size, aq_cuda_buffer out,
                                          int32_t dtype, aq_cuda_stream stream);

/* aq_linear_trellis; bias 0: none. Sums are rounded in another order than the CPU's, always the same one;
 * those of more than eight tokens are made on tensor cores, as aq_cuda_linear's. */
AQ_API int32_t aq_cuda_linear_trellis(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
                                      aq_cuda_buffer offset, aq_cuda_buffer bias, size_t rows, size_t cols, int32_t bits,
                                      size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream);

/* aq_rotate, to the bit. out may be x. */
AQ_API int32_t aq_cuda_rotate(aq_cuda_buffer x, size_t batch, size_t rows, size_t cols, int32_t seed, int32_t inverse,
                              aq_cuda_buffer out, aq_cuda_stream stream);

/* aq_quantize_activations, to the bit. Waits. */
AQ_API int32_t aq_cuda_quantize_activations(aq_cuda_buffer x, size_t tokens, size_t cols, int32_t bits, int32_t kind,
                                            aq_cuda_buffer codes, aq_cuda_buffer scale, aq_cuda_buffer zero_point,
                                            aq_cuda_stream stream);

/* aq_round_activations, to the bit. Waits. */
AQ_API int32_t aq_cuda_round_activations(aq_cuda_buffer x, size_t tokens, size_t cols, int32_t bits, int32_t kind,
                                         float scale, int32_t zero_point, aq_cuda_buffer out, aq_cuda_stream stream);

/* aq_linear_packed_int8, to the bit; zero points are not looked at. */
AQ_API int32_t aq_cuda_linear_packed_int8(aq_cuda_buffer codes, aq_cuda_buffer x_scale, aq_cuda_buffer x_zero_point,
                                          size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
                                          aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols,
                                          int32_t bits, size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream);

/* aq_linear_trellis_int8, to the bit; zero points are not looked at. */
AQ_API int32_t aq_cuda_linear_trellis_int8(aq_cuda_buffer codes, aq_cuda_buffer x_scale, aq_cuda_buffer x_zero_point,
                                           size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
                                           aq_cuda_buffer offset, aq_cuda_buffer bias, size_t rows, size_t cols,
                                           int32_t bits, size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream);

/* Products and solvers -------------------------------------------------------------------------------------
 *
 * The functions of arrowquant.h of the same names, to the bit; what they need of `work` the stream keeps. */
AQ_API int32_t aq_cuda_multiply(aq_cuda_buffer a, aq_cuda_buffer b, size_t rows, size_t k, size_t cols, aq_cuda_buffer c,
                                aq_cuda_stream stream);

/* y 0: x itself; weight 0: ones. Blocks of more than one column are sums of products on tensor cores, within
 * 5e-5 of the sum of the products' magnitudes; the diagonal is the CPU's to the bit. */
AQ_API int32_t aq_cuda_accumulate_moment(aq_cuda_buffer x, aq_cuda_buffer y, aq_cuda_buffer weight, size_t tokens,
                                         size_t rows, size_t cols, size_t block, aq_cuda_buffer out,
                                         aq_cuda_stream stream);

/* Waits. */
AQ_API int32_t aq_cuda_factor_moment(aq_cuda_buffer m, size_t n, aq_cuda_buffer pivots, aq_cuda_stream stream);

AQ_API int32_t aq_cuda_solve_moment(aq_cuda_buffer factor, aq_cuda_buffer pivots, size_t n, aq_cuda_buffer b,
                                    size_t rows, aq_cuda_stream stream);

/* Waits. */
AQ_API int32_t aq_cuda_clipped_grids(aq_cuda_buffer weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                                     int32_t zero_point_kind, float ratio, aq_cuda_buffer scale,
                                     aq_cuda_buffer zero_point, aq_cuda_stream stream);

/* Waits. */
AQ_API int32_t aq_cuda_quantize_feedback(aq_cuda_buffer weights, size_t rows, size_t cols, int32_t bits,
                                         size_t group_size, aq_cuda_buffer scale, aq_cuda_buffer zero_point,
                                         size_t block, aq_cuda_buffer factor, aq_cuda_buffer pivots,
                                         aq_cuda_buffer order, aq_cuda_buffer codes, aq_cuda_buffer objective,
                                         aq_cuda_stream stream);

/* Waits. */
AQ_API int32_t aq_cuda_refine_codes(aq_cuda_buffer weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                                    int32_t zero_point_kind, size_t block, aq_cuda_buffer moment, int32_t refit,
                                    int32_t rounds, int32_t sweeps, aq_cuda_buffer codes, aq_cuda_buffer scale,
                                    aq_cuda_buffer zero_point, aq_cuda_buffer objective, aq_cuda_stream stream);

/* Waits. */
AQ_API int32_t aq_cuda_search_trellis(aq_cuda_buffer weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                                      aq_cuda_buffer table, int32_t survivors, aq_cuda_buffer scale,
                                      aq_cuda_buffer offset, size_t block, aq_cuda_buffer factor, aq_cuda_buffer pivots,
                                      aq_cuda_buffer codes, aq_cuda_buffer objective, aq_cuda_stream stream);

/* Waits. */
AQ_API int32_t aq_cuda_settle_trellis(aq_cuda_buffer weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                                      aq_cuda_buffer table, size_t block, aq_cuda_buffer moment, int32_t refit,
                                      int32_t rounds, aq_cuda_buffer codes, aq_cuda_buffer scale,
                                      aq_cuda_buffer offset, aq_cuda_buffer objective, aq_cuda_stream stream);

/* Forward passes ------------------------------------------------------------------------------------------
 *
 * The functions of arrowquant.h of the same names, within tolerances: another order of additions,
 * exponentials in float32, and linear layers of more than one token on tensor cores, within 5e-5 of the
 * products' magnitudes. Handles may be 0 where pointers may be null. aq_cuda_attention is AQ_E_UNSUPPORTED
 * for heads of more than 256 numbers; aq_cuda_rotary waits. */
AQ_API int32_t aq_cuda_linear(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer weights, int32_t dtype,
                              aq_cuda_buffer bias, size_t rows, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_linear_packed(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed, aq_cuda_buffer scale,
                                     aq_cuda_buffer zero_point, aq_cuda_buffer bias, size_t rows, size_t cols,
                                     int32_t bits, size_t group_size, aq_cuda_buffer out, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_linear_two_level(aq_cuda_buffer x, size_t tokens, aq_cuda_buffer packed,
                                        aq_cuda_buffer sub_scale, aq_cuda_buffer sub_min, aq_cuda_buffer super_scale,
                                        aq_cuda_buffer super_min, aq_cuda_buffer bias, size_t rows, size_t cols,
                                        int32_t bits, size_t group_size, int32_t scale_bits, aq_cuda_buffer out,
                                        aq_cuda_stream stream);
AQ_API int32_t aq_cuda_rms_norm(aq_cuda_buffer x, size_t rows, size_t cols, aq_cuda_buffer weight, float epsilon,
                                aq_cuda_buffer out, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_layer_norm(aq_cuda_buffer x, size_t rows, size_t cols, aq_cuda_buffer weight,
                                  aq_cuda_buffer bias, float epsilon, aq_cuda_buffer out, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_attention(aq_cuda_buffer q, aq_cuda_buffer k, aq_cuda_buffer v, aq_cuda_buffer key_mask,
                                 size_t batch, size_t tokens, size_t heads, size_t kv_heads, size_t head_size,
                                 size_t block, float scale, aq_cuda_buffer out, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_rotary(aq_cuda_buffer x, aq_cuda_buffer positions, size_t rows, size_t heads, size_t head_size,
                              double theta, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_silu_multiply(aq_cuda_buffer gate, aq_cuda_buffer up, size_t n, aq_cuda_buffer out,
                                     aq_cuda_stream stream);
AQ_API int32_t aq_cuda_silu(aq_cuda_buffer x, size_t n, aq_cuda_buffer out, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_gelu_tanh(aq_cuda_buffer x, size_t n, aq_cuda_buffer out, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_modulate(aq_cuda_buffer x, aq_cuda_buffer scale, aq_cuda_buffer shift, size_t stride,
                                size_t batch, size_t tokens, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_gate_add(aq_cuda_buffer residual, aq_cuda_buffer gate, aq_cuda_buffer x, size_t stride,
                                size_t batch, size_t tokens, size_t cols, aq_cuda_buffer out, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_add(aq_cuda_buffer a, aq_cuda_buffer b, size_t n, aq_cuda_buffer out, aq_cuda_stream stream);

/* To the bit. A place that is too large is no error: the row it would give is zeros, the one it would change
 * is not there. */
AQ_API int32_t aq_cuda_choose_experts(aq_cuda_buffer logits, aq_cuda_buffer bias, size_t rows, size_t experts,
                                      size_t per_token, aq_cuda_buffer expert, aq_cuda_buffer weight,
                                      aq_cuda_stream stream);
AQ_API int32_t aq_cuda_gather_rows(aq_cuda_buffer x, aq_cuda_buffer place, size_t count, size_t rows, size_t cols,
                                   aq_cuda_buffer out, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_scale_rows(aq_cuda_buffer x, aq_cuda_buffer factor, size_t rows, size_t cols,
                                  aq_cuda_stream stream);
AQ_API int32_t aq_cuda_add_rows(aq_cuda_buffer x, aq_cuda_buffer place, size_t count, size_t rows, size_t cols,
                                aq_cuda_buffer out, aq_cuda_stream stream);

AQ_API int32_t aq_cuda_patchify(aq_cuda_buffer images, size_t batch, size_t channels, size_t height, size_t width,
                                size_t patch, aq_cuda_buffer out, aq_cuda_stream stream);
AQ_API int32_t aq_cuda_unpatchify(aq_cuda_buffer tokens, size_t batch, size_t channels, size_t height, size_t width,
                                  size_t patch, aq_cuda_buffer out, aq_cuda_stream stream);

/* Gradients -----------------------------------------------------------------------------------------------
 *
 * The functions of arrowquant.h of the same names, to the bit. aq_cuda_attention_backward is AQ_E_UNSUPPORTED
 * for heads of more than 256 numbers. */
AQ_API int32_t aq_cuda_transpose(aq_cuda_buffer in, size_t rows, size_t cols, aq_cuda_buffer out,
                                 aq_cuda_stream stream);
AQ_API int32_t aq_cuda_packed_gradient(aq_cuda_buffer dw, aq_cuda_buffer packed, aq_cuda_buffer scale,
                                       aq_cuda_buffer zero_point, size_t rows, size_t cols, int32_t bits,
                                       size_t group_size, aq_cuda_buffer dscale, aq_cuda_buffer dzero,
                                       aq_cuda_stream stream);
AQ_API int32_t aq_cuda_trellis_gradient(aq_cuda_buffer dw, aq_cuda_buffer packed, size_t rows, size_t cols, int32_t bits,
                                        size_t group_size, aq_cuda_buffer dscale, aq_cuda_buffer doffset,
                                        aq_cuda_stream stream);
AQ_API int32_t aq_cuda_rms_norm_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t rows, size_t cols,
                                         aq_cuda_buffer weight, float epsilon, aq_cuda_buffer dx,
                                         aq_cuda_stream stream);
AQ_API int32_t aq_cuda_layer_norm_backward(aq_cuda_buffer x, aq_cuda_buffer dy, size_t rows, size_t cols,
                                           aq_cuda_buffer weight, float epsilon, aq_cuda_buffer dx,
                                           aq_cuda_stream stream);
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
AQ_API int32_t aq_cuda_adam_step(aq_cuda_buffer values, aq_cuda_buffer gradients, aq_cuda_buffer first,
                                 aq_cuda_buffer second, size_t n, double rate, double beta1, double beta2,
                                 double epsilon, int32_t step, aq_cuda_stream stream);

#ifdef __cplusplus
}
#endif
#endif
