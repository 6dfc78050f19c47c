/* neon.h: primitives of Arm's Advanced SIMD, part of every AArch64 processor, four lanes. */
#ifndef AQ_NEON_H
#define AQ_NEON_H

#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>

#include "../packed.h"

#define AQ_W 4
#define AQ_D 2
#define AQ_CLIP_UNROLL 4
#define AQ_MR 12
#define AQ_TM 12
#define AQ_UNPACK_BYTES(bits) ((bits) == 8 ? 8 : 4)

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(16)));
typedef double vd __attribute__((vector_size(16)));

/* The ...nm forms give the number when the other is NaN, as the oracle's comparisons do. */
AQ_INLINE vf v_min(vf a, vf b) { return (vf)vminnmq_f32((float32x4_t)a, (float32x4_t)b); }
AQ_INLINE vf v_max(vf a, vf b) { return (vf)vmaxnmq_f32((float32x4_t)a, (float32x4_t)b); }
AQ_INLINE vf v_round(vf x) { return (vf)vrndnq_f32((float32x4_t)x); }
AQ_INLINE vf v_sqrt(vf x) { return (vf)vsqrtq_f32((float32x4_t)x); }
AQ_INLINE vi v_round_to_int(vf x) { return (vi)vcvtnq_s32_f32((float32x4_t)x); }
AQ_INLINE vu v_half_bits(vf x) {
  return (vu)vmovl_u16(vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
}
AQ_INLINE vf v_half_value(vu bits) {
  return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32((uint32x4_t)bits)));
}

AQ_INLINE void v_transpose(vf r[4]) {
  const float32x4x2_t a = vtrnq_f32((float32x4_t)r[0], (float32x4_t)r[1]);
  const float32x4x2_t b = vtrnq_f32((float32x4_t)r[2], (float32x4_t)r[3]);
  r[0] = (vf)vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  r[1] = (vf)vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  r[2] = (vf)vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  r[3] = (vf)vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

AQ_INLINE void v_unpack(const uint8_t *bytes, int32_t bits, vf *out) {
  uint32x4_t low, high;
  if (bits == 8) {
    const uint16x8_t wide = vmovl_u8(vld1_u8(bytes));
    low = vmovl_u16(vget_low_u16(wide));
    high = vmovl_u16(vget_high_u16(wide));
  } else {
    uint32_t word;
    __builtin_memcpy(&word, bytes, 4);
    const int32x4_t lanes = {0, -1, -2, -3};
    const int32x4_t shifts = vmulq_n_s32(lanes, bits);
    const uint32x4_t mask = vdupq_n_u32((1u << bits) - 1);
    low = vandq_u32(vshlq_u32(vdupq_n_u32(word), shifts), mask);
    high = vandq_u32(vshlq_u32(vdupq_n_u32(word >> (4 * bits)), shifts), mask);
  }
  out[0] = (vf)vcvtq_f32_u32(low);
  out[1] = (vf)vcvtq_f32_u32(high);
}

AQ_INLINE vd d_load(const float *p) { return (vd)vcvt_f64_f32(vld1_f32(p)); }
AQ_INLINE vd d_abs(vd x) { return (vd)vabsq_f64((float64x2_t)x); }
AQ_INLINE vd d_max(vd a, vd b) { return (vd)vmaxnmq_f64((float64x2_t)a, (float64x2_t)b); }

AQ_INLINE vf v_splat(float x) { return (vf)vdupq_n_f32(x); }
AQ_INLINE vf v_fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#define v_exact_fma v_fma

AQ_INLINE vf v_load_half(const uint16_t *p) { return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

AQ_INLINE vf v_load_levels(const int8_t *p) {
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  return (vf)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four))))));
}

#define AQ_OWN_FOUR_LEVELS
AQ_INLINE void v_load_four_levels(const int8_t *p, vf out[4]) {
  const int8x16_t levels = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(levels)), high = vmovl_high_s8(levels);
  out[0] = (vf)vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
  out[1] = (vf)vcvtq_f32_s32(vmovl_high_s16(low));
  out[2] = (vf)vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
  out[3] = (vf)vcvtq_f32_s32(vmovl_high_s16(high));
}

/* Four bytes into lanes, and numbers up to 255 back; four times 12 bits from a byte boundary into lanes, with
 * bits above. */
AQ_INLINE vu v_widen_bytes(const uint8_t *p) { return (vu){p[0], p[1], p[2], p[3]}; }
AQ_INLINE void v_narrow_bytes(uint8_t *p, vi codes) {
  const uint16x4_t words = vmovn_u32((uint32x4_t)codes);
  const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0);
  __builtin_memcpy(p, &four, 4);
}
AQ_INLINE vu v_widen_triples(const uint8_t *p) {
  return (vu){p[0] | (uint32_t)p[1] << 8, (uint32_t)p[1] >> 4 | (uint32_t)p[2] << 4, p[3] | (uint32_t)p[4] << 8,
              (uint32_t)p[4] >> 4 | (uint32_t)p[5] << 4};
}

#endif
