/* arrowquant.h: the ABI of the CPU kernels.
 *
 * Every function returns AQ_OK or a negative AQ_E_*. Buffers belong to the caller; nothing is allocated for
 * or kept from it. No function but aq_catch_signals prints, exits or keeps state, so all may run at once.
 * Outputs must not overlap inputs unless a function says so. A count of zero is fine before any pointer is
 * looked at. On an error the outputs are unspecified.
 *
 * Words (see docs/format.md): codes are unsigned integers of `bits` bits, `w = s * (q - z)` in float32
 * arithmetic (subtract, then multiply). A group is `group_size` consecutive weights of one row; 0 means the
 * whole row; the last group of a row is shorter when the size does not divide `cols`. Scales and zero points
 * are IEEE half floats, [rows, groups]. Packed codes are a little-endian bit stream per row in uint32 words,
 * least significant bits first, [rows, words]; unused bits at a row's end are zero.
 *
 * `isa` chooses the instruction set, `threads` how many threads share the rows. `threads` never changes a
 * byte of any result. Neither does `isa`, except in the functions that run a model in floats (from aq_linear
 * to aq_add, without those of 8-bit activations): there the instruction sets round differently, within a few
 * units in the last place of the terms that are added up.
 */
#ifndef ARROWQUANT_H
#define ARROWQUANT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define AQ_ABI_VERSION 10

#define AQ_OK 0
#define AQ_E_ARGUMENT (-1)  /* a null pointer or an unknown enumerator */
#define AQ_E_SHAPE (-2)     /* a size that is not allowed or overflows */
#define AQ_E_VALUE (-3)     /* a code above 2^bits - 1, a negative or non-finite column weight */
#define AQ_E_NONFINITE (-4) /* NaN or infinity among the weights */
#define AQ_E_RANGE (-5)     /* weights too large for a half-precision scale */
#define AQ_E_ISA (-6)       /* instruction set not in this build or not on this processor */
#define AQ_E_STOPPED (-100) /* less the number of the signal that came: see aq_catch_signals */

/* Element types. */
#define AQ_F32 0
#define AQ_F16 1
#define AQ_BF16 2
#define AQ_F8_E4M3 3 /* e4m3fn: no infinity, overflow becomes NaN */
#define AQ_F8_E5M2 4
#define AQ_F64 5

/* Instruction sets. */
#define AQ_ISA_BEST 0
#define AQ_ISA_SCALAR 1
#define AQ_ISA_AVX2 2   /* AVX2, FMA and F16C */
#define AQ_ISA_AVX512 3 /* AVX-512 F, BW, DQ, VL */
#define AQ_ISA_NEON 4
#define AQ_ISA_SIMD128 5 /* WebAssembly */
#define AQ_ISA_AVX512_VNNI 6 /* AQ_ISA_AVX512 with VNNI for 8-bit activations */
#define AQ_ISA_NEON_DOT 7    /* AQ_ISA_NEON with UDOT for 8-bit activations */
#define AQ_ISA_AVX512_VBMI 8 /* AQ_ISA_AVX512_VNNI with VBMI for trellis codes */

/* Zero points. */
#define AQ_ZERO_POINT_REAL 0      /* any half float */
#define AQ_ZERO_POINT_INTEGER 1   /* a whole number in [0, 2^bits - 1] */
#define AQ_ZERO_POINT_SYMMETRIC 2 /* fixed at 2^(bits - 1), not stored: pass a null pointer */
/* In place of zero points: offsets that are half floats, w = scale * q + offset. Only to quantize; the other
 * functions take such a matrix as one with two-level scales of AQ_OFFSET_BITS. */
#define AQ_ZERO_POINT_OFFSET 3

#define AQ_MAX_THREADS 64

/* Error statistics of b against a, in float64. */
#define AQ_STATISTICS 6
/* [0] sum a^2  [1] sum b^2  [2] sum a*b  [3] sum (a-b)^2  [4] max |a-b|  [5] max |a| */

#if defined(_WIN32)
#define AQ_API __declspec(dllexport)
#else
#define AQ_API __attribute__((visibility("default")))
#endif

/* Before a pointer: read and written. A pointer without it is read if it is const, and else written only. */
#define AQ_INOUT

/* AQ_ABI_VERSION of the library. */
AQ_API int32_t aq_abi_version(void);

/* The fastest instruction set of this build that the processor and its operating system support. */
AQ_API int32_t aq_best_isa(void);

/* 1 if `isa` can be passed to the functions below, else 0. */
AQ_API int32_t aq_isa_supported(int32_t isa);

/* on 1: of SIGHUP, SIGINT and SIGTERM those that the process handles are caught from now on. The first one
 * makes running kernels, and all that are called later, return AQ_E_STOPPED less its number, within some
 * milliseconds; then the process's own handler is called. The second one ends the process at once, as a shell
 * reports it: 128 plus its number. on 0: as before; the signal is forgotten. Calls nest. Without signals
 * (WebAssembly) nothing. Returns the number of signals that are caught. */
AQ_API int32_t aq_catch_signals(int32_t on);

/* AQ_OK, or what kernels that were called now would return. */
AQ_API int32_t aq_stop_status(void);

/* words[0] = uint32 words of one packed row. */
AQ_API int32_t aq_packed_words(size_t cols, int32_t bits, uint64_t *words);

/* groups[0] = groups of one row. */
AQ_API int32_t aq_group_count(size_t cols, size_t group_size, uint64_t *groups);

/* codes u8[rows, cols] -> packed u32[rows, words]. AQ_E_VALUE if a code is above 2^bits - 1. */
AQ_API int32_t aq_pack_codes(const uint8_t *codes, size_t rows, size_t cols, int32_t bits, uint32_t *packed,
                             int32_t isa, int32_t threads);

/* packed u32[rows, words] -> codes u8[rows, cols]. */
AQ_API int32_t aq_unpack_codes(const uint32_t *packed, size_t rows, size_t cols, int32_t bits, uint8_t *codes,
                               int32_t isa, int32_t threads);

/* Round to nearest on each group's minimum and maximum. weights[rows, cols] of `dtype`. */
AQ_API int32_t aq_quantize_round(const void *weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
                                 size_t group_size, int32_t zero_point_kind, uint32_t *packed, uint16_t *scale,
                                 uint16_t *zero_point, int32_t isa, int32_t threads);

/* Search of clipped ranges, then weighted least squares of scale and zero point; never a larger weighted
 * error than aq_quantize_round's. column_weights f32[cols], finite and >= 0, or null for all ones. */
AQ_API int32_t aq_quantize_clip(const void *weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
                                size_t group_size, int32_t zero_point_kind, const float *column_weights,
                                uint32_t *packed, uint16_t *scale, uint16_t *zero_point, int32_t isa,
                                int32_t threads);

/* out[rows, cols] of `dtype` (F32, F16 or BF16). zero_point null: symmetric. */
AQ_API int32_t aq_dequantize(const uint32_t *packed, const uint16_t *scale, const uint16_t *zero_point, size_t rows,
                             size_t cols, int32_t bits, size_t group_size, void *out, int32_t dtype, int32_t isa,
                             int32_t threads);

/* Two-level scales. A superblock is 256 consecutive weights of a row (the last of a row may be shorter), in
 * groups of `group_size` (16, 32, 64 or 128). A group has a sub-scale and a sub-minimum, unsigned codes of
 * `scale_bits` (4, 6 or 8) bits; a superblock has two half floats. In float32, each product rounded:
 *
 *     w = (super_scale * sub_scale) * q - super_min * sub_min
 *
 * Super scales are [rows, superblocks], sub-codes a bit stream per row, least significant bits first, in
 * whole bytes, [rows, sub-bytes].
 *
 * Where a function reads such a matrix, scale_bits may be AQ_OFFSET_BITS: the sub-codes are then half floats,
 * the scale and the offset of AQ_ZERO_POINT_OFFSET, w = scale * q + offset, and the super scales do not
 * count. */
#define AQ_OFFSET_BITS 16

/* sizes[0] = bytes of a row's sub-scales (and of its sub-minima), sizes[1] = superblocks of a row. */
AQ_API int32_t aq_two_level_sizes(size_t cols, size_t group_size, int32_t scale_bits, uint64_t *sizes);

/* search 0: minimum and maximum, rounded so that codes cover the group. Else a search with the objective
 * of ggml's Q2_K: squared error weighted by column weight * sqrt(mean of the superblock's squares + w^2).
 * column_weights f32[cols], finite and >= 0, or null for all ones; only the search uses them. */
AQ_API int32_t aq_quantize_two_level(const void *weights, int32_t dtype, size_t rows, size_t cols, int32_t bits,
                                     size_t group_size, int32_t scale_bits, int32_t search,
                                     const float *column_weights, uint32_t *packed, uint8_t *sub_scale,
                                     uint8_t *sub_min, uint16_t *super_scale, uint16_t *super_min, int32_t isa,
                                     int32_t threads);

/* Two levels for given real scales and minima f32[rows, groups] (w = scale q - minimum), by least squares
 * with group_weights f32[rows, groups], finite and >= 0, or null for all ones. Values whose sign is not that
 * of their superblock's weighted sum become 0. */
AQ_API int32_t aq_fit_two_level(const float *scale, const float *minimum, const float *group_weights, size_t rows,
                                size_t cols, size_t group_size, int32_t scale_bits, uint8_t *sub_scale,
                                uint8_t *sub_min, uint16_t *super_scale, uint16_t *super_min);

/* Symmetric grids under two levels of scales, w = d v (q - z) with a half float d a superblock and a whole
 * number v a group, as ggml's Q3_K and Q6_K have them; stored as two levels of `scale_bits` 8, of which the
 * minimum is z times the scale. bits 3: v to 31, codes to 7, z = 4, or 3 for a group whose scale is negative
 * (its codes are turned round); sub_min = z v, super_min = d. bits 8: v to 127, codes of 6 bits, z = 32;
 * sub_min = v, super_min = 32 d. scale f32[rows, groups] is what the search begins with, negative scales as
 * well; null: each group's range. weights [rows, cols] of `dtype` null: only the levels nearest to `scale`
 * are found; else codes are packed, and codes and levels are chosen for each other by squared error times
 * column weight. AQ_E_NONFINITE for a scale that is NaN or infinite, AQ_E_RANGE where a half float would be
 * infinite; weights must be finite. */
AQ_API int32_t aq_quantize_symmetric_levels(const void *weights, int32_t dtype, const float *scale,
                                            const float *column_weights, size_t rows, size_t cols, int32_t bits,
                                            size_t group_size, int32_t scale_bits, uint32_t *packed,
                                            uint8_t *sub_scale, uint8_t *sub_min, uint16_t *super_scale,
                                            uint16_t *super_min, int32_t isa, int32_t threads);

/* out[rows, cols] of `dtype` (F32, F16 or BF16). */
AQ_API int32_t aq_dequantize_two_level(const uint32_t *packed, const uint8_t *sub_scale, const uint8_t *sub_min,
                                       const uint16_t *super_scale, const uint16_t *super_min, size_t rows,
                                       size_t cols, int32_t bits, size_t group_size, int32_t scale_bits, void *out,
                                       int32_t dtype, int32_t isa, int32_t threads);

/* Trellis codes: of the packed words above, bit for bit, with bits 2 or 3 (else AQ_E_ARGUMENT), but the level
 * of a code depends on those before it: an entry of the table for the window of bits + 6 bits that ends with
 * the code, zeros in front of the row. Groups have half floats scale and offset, [rows, groups], and no part
 * in the windows.
 *
 *     w = scale * level + offset                               float32: the product is exact, the sum rounded
 *
 * levels f32[2^(bits + 6)] by window: multiples of 1/32 within +-63/32. */
AQ_API int32_t aq_trellis_table(int32_t bits, float *levels);

/* out[rows, cols] of `dtype` (F32, F16 or BF16). */
AQ_API int32_t aq_dequantize_trellis(const uint32_t *packed, const uint16_t *scale, const uint16_t *offset, size_t rows,
                                     size_t cols, int32_t bits, size_t group_size, void *out, int32_t dtype,
                                     int32_t isa, int32_t threads);

/* As aq_packed_error_statistics. */
AQ_API int32_t aq_trellis_error_statistics(const void *weights, int32_t dtype, const uint32_t *packed,
                                           const uint16_t *scale, const uint16_t *offset, size_t rows, size_t cols,
                                           int32_t bits, size_t group_size, double *statistics, int32_t isa,
                                           int32_t threads);

/* Types of ggml with blocks of codes, by their numbers there. */
#define AQ_GGML_Q4_0 2
#define AQ_GGML_Q4_1 3
#define AQ_GGML_Q8_0 8
#define AQ_GGML_Q2_K 10
#define AQ_GGML_Q3_K 11
#define AQ_GGML_Q4_K 12
#define AQ_GGML_Q6_K 14
#define AQ_GGML_Q2_0 42

/* blocks u8[rows, bytes of a row]: the matrix as ggml stores it, with the same weights when they are
 * dequantized. AQ_E_SHAPE where the type has no such grid: other columns, groups, or codes. Q4_1 rounds
 * -scale * zero point to half precision. */
AQ_API int32_t aq_ggml_blocks(const uint32_t *packed, const uint16_t *scale, const uint16_t *zero_point, size_t rows,
                              size_t cols, int32_t bits, size_t group_size, int32_t type, uint8_t *blocks, int32_t isa,
                              int32_t threads);

/* The same with two-level scales: K-types, or Q4_1 out of offsets. */
AQ_API int32_t aq_ggml_two_level_blocks(const uint32_t *packed, const uint8_t *sub_scale, const uint8_t *sub_min,
                                        const uint16_t *super_scale, const uint16_t *super_min, size_t rows,
                                        size_t cols, int32_t bits, size_t group_size, int32_t scale_bits, int32_t type,
                                        uint8_t *blocks, int32_t isa, int32_t threads);

/* As aq_packed_error_statistics. */
AQ_API int32_t aq_two_level_error_statistics(const void *weights, int32_t dtype, const uint32_t *packed,
                                             const uint8_t *sub_scale, const uint8_t *sub_min,
                                             const uint16_t *super_scale, const uint16_t *super_min, size_t rows,
                                             size_t cols, int32_t bits, size_t group_size, int32_t scale_bits,
                                             double *statistics, int32_t isa, int32_t threads);

/* Element-wise conversion, round to nearest even, NaN stays NaN. */
AQ_API int32_t aq_convert(const void *in, int32_t in_dtype, void *out, int32_t out_dtype, size_t n, int32_t isa,
                          int32_t threads);

/* statistics f64[AQ_STATISTICS] of b against a. */
AQ_API int32_t aq_error_statistics(const void *a, int32_t a_dtype, const void *b, int32_t b_dtype, size_t n,
                                   double *statistics, int32_t isa, int32_t threads);

/* statistics f64[AQ_STATISTICS] of the packed tensor's weights against weights[rows, cols], without ever
 * holding the dequantized matrix. */
AQ_API int32_t aq_packed_error_statistics(const void *weights, int32_t dtype, const uint32_t *packed,
                                          const uint16_t *scale, const uint16_t *zero_point, size_t rows, size_t cols,
                                          int32_t bits, size_t group_size, double *statistics, int32_t isa,
                                          int32_t threads);

/* index[0] = position of the first NaN or infinity, n if there is none. */
AQ_API int32_t aq_find_nonfinite(const void *values, int32_t dtype, size_t n, uint64_t *index, int32_t isa,
                                 int32_t threads);

/* Models ----------------------------------------------------------------------------------------------------
 *
 * Tensors are float32, row-major. A token's results do not depend on the other tokens of the call, with one
 * exception: aq_linear and aq_linear_packed take another order of additions when there is a single token.
 */

/* out[t, n] = sum_k x[t, k] weights[n, k] + bias[n]. x f32[tokens, cols], weights [rows, cols] of `dtype`
 * (F32, F16 or BF16), bias f32[rows] or null, out f32[tokens, rows]. */
AQ_API int32_t aq_linear(const float *x, size_t tokens, const void *weights, int32_t dtype, const float *bias,
                         size_t rows, size_t cols, float *out, int32_t isa, int32_t threads);

/* The same with packed weights, without ever holding the dequantized matrix. zero_point null: symmetric. */
AQ_API int32_t aq_linear_packed(const float *x, size_t tokens, const uint32_t *packed, const uint16_t *scale,
                                const uint16_t *zero_point, const float *bias, size_t rows, size_t cols, int32_t bits,
                                size_t group_size, float *out, int32_t isa, int32_t threads);

/* The same with two-level scales. */
AQ_API int32_t aq_linear_two_level(const float *x, size_t tokens, const uint32_t *packed, const uint8_t *sub_scale,
                                   const uint8_t *sub_min, const uint16_t *super_scale, const uint16_t *super_min,
                                   const float *bias, size_t rows, size_t cols, int32_t bits, size_t group_size,
                                   int32_t scale_bits, float *out, int32_t isa, int32_t threads);

/* The same with trellis codes. */
AQ_API int32_t aq_linear_trellis(const float *x, size_t tokens, const uint32_t *packed, const uint16_t *scale,
                                 const uint16_t *offset, const float *bias, size_t rows, size_t cols, int32_t bits,
                                 size_t group_size, float *out, int32_t isa, int32_t threads);

/* 8-bit activations, x = x_scale (code - x_zero_point) with whole codes and zero points in [0, 2^bits - 1],
 * bits 2..8, one scale and zero point a token. */
/* scale and zero_point are given, scale normal; what lies beyond is clipped */
#define AQ_ACTIVATIONS_STATIC 0
/* scale and zero_point are computed from each token's range, extended to 0 */
#define AQ_ACTIVATIONS_PER_TOKEN 1

/* x f32[tokens, cols] -> codes u8[tokens, cols], nearest, ties to even; scale f32[tokens], zero_point
 * i32[tokens], both read or written by `kind`. AQ_E_NONFINITE if x has NaN or infinity, AQ_E_VALUE if a given
 * scale or zero point is out of range. */
AQ_API int32_t aq_quantize_activations(const float *x, size_t tokens, size_t cols, int32_t bits, int32_t kind,
                                       uint8_t *codes, AQ_INOUT float *scale, AQ_INOUT int32_t *zero_point,
                                       int32_t isa, int32_t threads);

/* Such codes and back in float32, out f32[tokens, cols]: scale and zero_point are given, the same for all
 * tokens, or, per token, of the smallest scale whose range covers the token's. out may be x. Status as
 * above. */
AQ_API int32_t aq_round_activations(const float *x, size_t tokens, size_t cols, int32_t bits, int32_t kind, float scale,
                                    int32_t zero_point, float *out, int32_t isa, int32_t threads);

/* aq_linear_packed of such codes, by integer products; out f32[tokens, rows], the same bytes on every
 * instruction set. x_zero_point within 0..255 (else AQ_E_VALUE). */
AQ_API int32_t aq_linear_packed_int8(const uint8_t *codes, const float *x_scale, const int32_t *x_zero_point,
                                     size_t tokens, const uint32_t *packed, const uint16_t *scale,
                                     const uint16_t *zero_point, const float *bias, size_t rows, size_t cols,
                                     int32_t bits, size_t group_size, float *out, int32_t isa, int32_t threads);

/* The same with trellis codes. */
AQ_API int32_t aq_linear_trellis_int8(const uint8_t *codes, const float *x_scale, const int32_t *x_zero_point,
                                      size_t tokens, const uint32_t *packed, const uint16_t *scale,
                                      const uint16_t *offset, const float *bias, size_t rows, size_t cols,
                                      int32_t bits, size_t group_size, float *out, int32_t isa, int32_t threads);

/* x / sqrt(mean(x^2) + epsilon) * weight, by rows. weight f32[cols], null: ones. out may be x. */
AQ_API int32_t aq_rms_norm(const float *x, size_t rows, size_t cols, const float *weight, float epsilon, float *out,
                           int32_t isa, int32_t threads);

/* (x - mean) / sqrt(variance + epsilon) * weight + bias, by rows. weight null: ones; bias null: zeros. out
 * may be x. */
AQ_API int32_t aq_layer_norm(const float *x, size_t rows, size_t cols, const float *weight, const float *bias,
                             float epsilon, float *out, int32_t isa, int32_t threads);

/* softmax(scale q k^T) v for every head, over all keys of a batch item that key_mask does not switch off.
 * Memory does not grow with tokens. q f32[batch, tokens, heads, head_size]; k and v f32[batch, tokens,
 * kv_heads, head_size], heads a multiple of kv_heads; key_mask u8[batch, tokens], 0 where not attended to, or
 * null. With a block > 0 a query sees the keys up to the end of its own block of so many tokens, with 0 all.
 * out like q; zeros where a query has no key. */
AQ_API int32_t aq_attention(const float *q, const float *k, const float *v, const uint8_t *key_mask, size_t batch,
                            size_t tokens, size_t heads, size_t kv_heads, size_t head_size, size_t block, float scale,
                            float *out, int32_t isa, int32_t threads);

/* Rotary embedding in place, halves rotated: pairs (x[i], x[i + head_size/2]) turn by positions[row]
 * theta^(-2i/head_size), an angle computed in double. x f32[rows, heads, head_size], head_size even,
 * positions i32[rows] within +-AQ_MAX_POSITION (else AQ_E_VALUE). */
#define AQ_MAX_POSITION 1048576
AQ_API int32_t aq_rotary(AQ_INOUT float *x, const int32_t *positions, size_t rows, size_t heads, size_t head_size,
                         double theta, int32_t isa, int32_t threads);

/* silu(gate) * up, silu(x) = x / (1 + exp(-x)). out may be gate or up. */
AQ_API int32_t aq_silu_multiply(const float *gate, const float *up, size_t n, float *out, int32_t isa, int32_t threads);

/* out may be x. */
AQ_API int32_t aq_silu(const float *x, size_t n, float *out, int32_t isa, int32_t threads);

/* x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). out may be x. */
AQ_API int32_t aq_gelu_tanh(const float *x, size_t n, float *out, int32_t isa, int32_t threads);

/* x (1 + scale) + shift. x f32[batch, tokens, cols]; scale and shift f32[batch, cols], `stride` floats from
 * one batch item to the next. out may be x. */
AQ_API int32_t aq_modulate(const float *x, const float *scale, const float *shift, size_t stride, size_t batch,
                           size_t tokens, size_t cols, float *out, int32_t isa, int32_t threads);

/* residual + gate x. x and residual f32[batch, tokens, cols]; gate f32[batch, cols], `stride` floats from one
 * batch item to the next. out may be residual or x. */
AQ_API int32_t aq_gate_add(const float *residual, const float *gate, const float *x, size_t stride, size_t batch,
                           size_t tokens, size_t cols, float *out, int32_t isa, int32_t threads);

/* a + b. out may be a or b. */
AQ_API int32_t aq_add(const float *a, const float *b, size_t n, float *out, int32_t isa, int32_t threads);

/* Mixtures of experts: softmax over each row of logits f32[rows, experts] in float64 plus bias f32[experts]
 * (null: zeros), and of these the per_token largest, of equals the first, NaN and -infinity last: expert
 * i32[rows, per_token], each once, and weight f32[rows, per_token], the largest first. logits is overwritten.
 * per_token <= experts (else AQ_E_SHAPE). */
AQ_API int32_t aq_choose_experts(AQ_INOUT float *logits, const float *bias, size_t rows, size_t experts,
                                 size_t per_token, int32_t *expert, float *weight, int32_t threads);

/* Row place[i] of x f32[rows, cols] -> row i of out f32[count, cols]; a place is below rows (else AQ_E_VALUE,
 * as below). */
AQ_API int32_t aq_gather_rows(const float *x, const int32_t *place, size_t count, size_t rows, size_t cols, float *out,
                              int32_t threads);

/* Each row of x f32[rows, cols] times its factor, in place. */
AQ_API int32_t aq_scale_rows(AQ_INOUT float *x, const float *factor, size_t rows, size_t cols, int32_t threads);

/* Row i of x f32[count, cols] is added to row place[i] of out f32[rows, cols]; no place is there twice. */
AQ_API int32_t aq_add_rows(const float *x, const int32_t *place, size_t count, size_t rows, size_t cols,
                           AQ_INOUT float *out, int32_t threads);

/* images f32[batch, channels, height, width] -> out f32[batch, height/patch, width/patch, channels, patch,
 * patch]. patch divides height and width (else AQ_E_SHAPE). */
AQ_API int32_t aq_patchify(const float *images, size_t batch, size_t channels, size_t height, size_t width,
                           size_t patch, float *out, int32_t threads);

/* tokens f32[batch, height/patch, width/patch, patch, patch, channels] -> out f32[batch, channels, height,
 * width]. */
AQ_API int32_t aq_unpatchify(const float *tokens, size_t batch, size_t channels, size_t height, size_t width,
                             size_t patch, float *out, int32_t threads);

/* diffusers' sinusoidal embedding: out f32[n, channels], with half = channels / 2, holds sin(a_i) in the
 * first half and cos(a_i) in the second, or cosines_first, and a zero behind them if channels is odd; a_i = t
 * max_period^(-i / (half - downscale_freq_shift)), rounded as PyTorch's float32 does, its sine and cosine in
 * double. timesteps f32[n] within +-AQ_MAX_POSITION, max_period >= 1, downscale_freq_shift < half (else
 * AQ_E_VALUE). */
AQ_API int32_t aq_timestep_embedding(const float *timesteps, size_t n, size_t channels, int32_t cosines_first,
                                     double downscale_freq_shift, double max_period, float *out);

/* Products --------------------------------------------------------------------------------------------------
 *
 * c[i, j] += sum_k a[i, k] b[k, j]: a f32[rows, k], b f32[k, cols], c f32[rows, cols]. Every element is one
 * chain of fused multiply-adds, k ascending: neither `isa` nor `threads` changes a byte. */
AQ_API int32_t aq_multiply(const float *a, const float *b, size_t rows, size_t k, size_t cols, AQ_INOUT float *c,
                           int32_t isa, int32_t threads);

/* Solvers ---------------------------------------------------------------------------------------------------
 *
 * A layer's codes against the second moment of its inputs: small weight errors are not the aim, but a small
 * tr(D M D^T), D the error and M[cols, cols] = sum of weight x x^T. Matrices are float32, row-major; scales
 * and zero points are float32 here, [rows, groups], and codes bytes. Neither `isa` nor `threads` changes a
 * byte. `work` is what aq_solver_work asks for, aligned to 8 bytes. */
#define AQ_MAX_SOLVER_COLS 65536

/* floats[0] = float32 elements of `work`, enough for each function below with these arguments. */
AQ_API int32_t aq_solver_work(size_t cols, size_t group_size, int32_t threads, uint64_t *floats);

/* out[i, j] += sum_t weight[t] y[t, i] x[t, j]. x f32[tokens, cols], y f32[tokens, rows], weight f32[tokens]
 * or null for ones, out f32[rows, cols]. y null: x itself, rows = cols, out symmetric. block < cols, which
 * needs rows = cols: only the blocks of as many columns on the diagonal, one after the other, the last may be
 * smaller. */
AQ_API int32_t aq_accumulate_moment(const float *x, const float *y, const float *weight, size_t tokens, size_t rows,
                                    size_t cols, size_t block, AQ_INOUT float *out, int32_t isa, int32_t threads);

/* M = U diag(pivots) U^T with U unit upper triangular: m f32[n, n] becomes U (of M only the upper triangle is
 * read), pivots f32[n]. AQ_E_VALUE where a pivot is not positive; m is lost then. */
AQ_API int32_t aq_factor_moment(AQ_INOUT float *m, size_t n, float *pivots, float *work, int32_t isa, int32_t threads);

/* b f32[rows, n] becomes b M^-1, M by its factor and pivots. */
AQ_API int32_t aq_solve_moment(const float *factor, const float *pivots, size_t n, AQ_INOUT float *b, size_t rows,
                               int32_t isa, int32_t threads);

/* Scales and zero points from each group's range, shrunk by ratio in (0, 1]. */
AQ_API int32_t aq_clipped_grids(const float *weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                       int32_t zero_point_kind, float ratio, float *scale, float *zero_point, int32_t threads);

/* Error feedback: columns in the order of `order` (a permutation, i32[cols]), each rounded after it has taken
 * over the errors of those before it. factor: U of the moment in that order, pivots f32[cols] beside it.
 * block: columns of each block on the diagonal, one after the other, as aq_accumulate_moment makes them; cols
 * where there is one; a multiple of the group size where a row has several groups. A block's columns keep
 * their places among the blocks. codes u8[rows, cols]; objective f64[rows]: what the moment makes of the
 * errors. */
AQ_API int32_t aq_quantize_feedback(const float *weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                                    const float *scale, const float *zero_point, size_t block, const float *factor,
                                    const float *pivots, const int32_t *order, uint8_t *codes, double *objective,
                                    float *work, int32_t isa, int32_t threads);

/* `rounds` times, a group of columns after the other: its scale and zero point by least squares given all
 * other weights, to half floats (where `refit` is not 0), then coordinate descent over its codes. Steps that
 * would not lower a row's objective are not taken. The one group of a whole row is refitted before its codes
 * descend. `sweeps`: how often a round goes through a few groups before the next ones; it costs little beside
 * a round. moment: blocks as for aq_quantize_feedback. codes, scale and zero_point in and out; objective
 * f64[rows] of what is left. */
AQ_API int32_t aq_refine_codes(const float *weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                               int32_t zero_point_kind, size_t block, const float *moment, int32_t refit,
                               int32_t rounds, int32_t sweeps, AQ_INOUT uint8_t *codes, AQ_INOUT float *scale,
                               AQ_INOUT float *zero_point, double *objective, float *work, int32_t isa,
                               int32_t threads);

/* Trellis codes: weight j of a row is scale table[window] + offset. The window is code j on top of the codes
 * before it: three of 2 bits or two of 3, so that table has 2^(bits + 6) entries; codes in front of the row
 * are 0. bits 2 or 3, scale and offset f32[rows, groups]. The search keeps a survivor for each window, or one
 * with survivors 1 (0: all of them), each of which feeds its own errors back to later columns; columns are
 * decided 16 at a time, behind which as many were searched. factor and pivots: U of the moment, columns in
 * their own order, block as for aq_quantize_feedback, a multiple of 32. codes u8[rows, cols]; objective
 * f64[rows]. */
AQ_API int32_t aq_search_trellis(const float *weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                                 const float *table, int32_t survivors, const float *scale, const float *offset,
                                 size_t block, const float *factor, const float *pivots, uint8_t *codes,
                                 double *objective, float *work, int32_t isa, int32_t threads);

/* What is fitted to trellis codes by least squares. */
#define AQ_REFIT_NOTHING 0
#define AQ_REFIT_LINES 1 /* scales and offsets */
#define AQ_REFIT_SCALES 2 /* scales; offsets stay as they are */

/* As aq_refine_codes for trellis codes: least squares as `refit` says (AQ_REFIT_*), and descent over codes,
 * each of which is in several windows. */
AQ_API int32_t aq_settle_trellis(const float *weights, size_t rows, size_t cols, int32_t bits, size_t group_size,
                                 const float *table, size_t block, const float *moment, int32_t refit, int32_t rounds,
                                 AQ_INOUT uint8_t *codes, AQ_INOUT float *scale, AQ_INOUT float *offset,
                                 double *objective, float *work, int32_t isa, int32_t threads);

/* Rotations: signs from a seed, then Hadamard transforms of blocks, each of the largest power of two that
 * divides `rows`; `inverse` is the transform and then the signs. Lengths stay. For each item of the batch
 * x[rows, cols] and out likewise, along the rows, in blocks of 2^k:
 *
 *     out[i] = 2^(-k / 2) sum over j of the block of i of (-1)^popcount(i & j & (2^k - 1)) sign(j) x[j]
 *
 * sign(j) is -1 where the highest bit of the hash of j * 0x9e3779b1 + seed is set, in 32 bits: h ^= h >> 16;
 * h *= 0x85ebca6b; h ^= h >> 13; h *= 0xc2b2ae35; h ^= h >> 16. Every instruction set adds in the same order.
 * Sums within a block may overflow where the result would not, and one NaN or infinity makes a whole block
 * NaN or infinite. out may be x. */
AQ_API int32_t aq_rotate(const float *x, size_t batch, size_t rows, size_t cols, int32_t seed, int32_t inverse,
                         float *out, int32_t threads);

/* Gradients -------------------------------------------------------------------------------------------------
 *
 * For a loss L, dy stands for dL/dy. Neither `isa` nor `threads` changes a byte of these functions' results.
 * A linear layer's are aq_linear of transposed matrices: dx = dy W, dW = dy^T x. A rotary embedding's is
 * itself with the positions' signs changed.
 */

/* in f32[rows, cols] -> out f32[cols, rows]. */
AQ_API int32_t aq_transpose(const float *in, size_t rows, size_t cols, float *out, int32_t isa, int32_t threads);

/* dw f32[rows, cols], the gradient of the weights s (q - z) -> dscale = sum dw (q - z) and dzero = -s sum dw
 * over each group, f32[rows, groups]. dzero may be null, and must be when zero_point is. */
AQ_API int32_t aq_packed_gradient(const float *dw, const uint32_t *packed, const uint16_t *scale,
                                  const uint16_t *zero_point, size_t rows, size_t cols, int32_t bits,
                                  size_t group_size, float *dscale, float *dzero, int32_t isa, int32_t threads);

/* The same of trellis codes: dscale = sum dw level and doffset = sum dw. */
AQ_API int32_t aq_trellis_gradient(const float *dw, const uint32_t *packed, size_t rows, size_t cols, int32_t bits,
                                   size_t group_size, float *dscale, float *doffset, int32_t isa, int32_t threads);

/* dx of aq_rms_norm at x. All f32[rows, cols]; dx may be dy. */
AQ_API int32_t aq_rms_norm_backward(const float *x, const float *dy, size_t rows, size_t cols, const float *weight,
                                    float epsilon, float *dx, int32_t isa, int32_t threads);

/* dx of aq_layer_norm at x; its bias does not matter. dx may be dy. */
AQ_API int32_t aq_layer_norm_backward(const float *x, const float *dy, size_t rows, size_t cols, const float *weight,
                                      float epsilon, float *dx, int32_t isa, int32_t threads);

/* dq, dk and dv of aq_attention; `out` is what it gave. Shapes as there. Memory does not grow with tokens. */
AQ_API int32_t aq_attention_backward(const float *q, const float *k, const float *v, const float *out,
                                     const float *dout, const uint8_t *key_mask, size_t batch, size_t tokens,
                                     size_t heads, size_t kv_heads, size_t head_size, float scale, float *dq,
                                     float *dk, float *dv, int32_t isa, int32_t threads);

/* dgate and dup of aq_silu_multiply. dgate may be gate or dy, dup may be up. */
AQ_API int32_t aq_silu_multiply_backward(const float *gate, const float *up, const float *dy, size_t n, float *dgate,
                                         float *dup, int32_t isa, int32_t threads);

/* dx may be x or dy. */
AQ_API int32_t aq_silu_backward(const float *x, const float *dy, size_t n, float *dx, int32_t isa, int32_t threads);

/* dx may be x or dy. */
AQ_API int32_t aq_gelu_tanh_backward(const float *x, const float *dy, size_t n, float *dx, int32_t isa,
                                     int32_t threads);

/* out[item, col] = sum over tokens of a (times b, if that is not null), in float64. a and b f32[batch,
 * tokens, cols]; out f32[batch, cols], `stride` floats from one batch item to the next. The gradient of a
 * bias, and of aq_modulate's scale and shift and aq_gate_add's gate. */
AQ_API int32_t aq_column_sums(const float *a, const float *b, size_t batch, size_t tokens, size_t cols, size_t stride,
                              AQ_INOUT float *out, int32_t isa, int32_t threads);

/* Adam's step number `step`, from 1 on (Kingma & Ba, arXiv 1412.6980): first = beta1 first + (1 - beta1) g,
 * second = beta2 second + (1 - beta2) g^2, values -= rate / (1 - beta1^step) first / (sqrt(second / (1 -
 * beta2^step)) + epsilon). AQ_E_VALUE unless the betas lie in [0, 1), epsilon >= 0 and step >= 1. */
AQ_API int32_t aq_adam_step(AQ_INOUT float *values, const float *gradients, AQ_INOUT float *first,
                            AQ_INOUT float *second, size_t n, double rate, double beta1, double beta2, double epsilon,
                            int32_t step, int32_t isa, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
