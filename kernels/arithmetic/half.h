/* half.h: element types and scalar conversions between float32 and the narrow ones, round to nearest even.
 * NaN keeps its sign and upper payload and becomes quiet, as F16C and FCVT do, so every instruction set
 * agrees. */
#ifndef AQ_HALF_H
#define AQ_HALF_H

#include "../include/arrowquant.h"

/* How the functions of this folder are declared: CUDA compiles the same definitions for the device. */
#if !defined(AQ_FUNCTION)
#define AQ_FUNCTION static inline
#endif

AQ_FUNCTION uint32_t aq_float_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

AQ_FUNCTION float aq_bits_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

/* Adding 0.5 ulp of the target's smallest normal exponent aligns a subnormal result at bit 0 of the sum. */
AQ_FUNCTION uint16_t aq_half_from_float(float value) {
  uint32_t bits = aq_float_bits(value);
  uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* rounds to 65536 or more */
  if (magnitude < 0x38800000u) {                                    /* below 2^-14: subnormal */
    float aligned = aq_bits_float(magnitude) + 0.5f;
    return (uint16_t)(sign | (aq_float_bits(aligned) - 0x3f000000u));
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

AQ_FUNCTION float aq_float_from_half(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
  uint32_t magnitude = half & 0x7fffu;
  if (magnitude > 0x7c00u) return aq_bits_float(sign | 0x7fc00000u | (magnitude << 13));
  if (magnitude == 0x7c00u) return aq_bits_float(sign | 0x7f800000u);
  if (magnitude < 0x400u) {
    float scaled = (float)magnitude * 0x1p-24f;
    return aq_bits_float(sign | aq_float_bits(scaled));
  }
  return aq_bits_float(sign | ((magnitude << 13) + 0x38000000u));
}

AQ_FUNCTION uint16_t aq_bfloat_from_float(float value) {
  uint32_t bits = aq_float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

AQ_FUNCTION float aq_float_from_bfloat(uint16_t bfloat) { return aq_bits_float((uint32_t)bfloat << 16); }

/* e5m2 is the upper byte of a half float, so its reading is the half's. */
AQ_FUNCTION float aq_float_from_e5m2(uint8_t code) { return aq_float_from_half((uint16_t)(code << 8)); }

AQ_FUNCTION uint8_t aq_e5m2_from_float(float value) {
  uint32_t bits = aq_float_bits(value);
  uint32_t sign = (bits >> 24) & 0x80u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint8_t)(sign | 0x7fu);
  if (magnitude >= 0x47700000u) return (uint8_t)(sign | 0x7cu); /* 61440 and more round to infinity */
  if (magnitude < 0x38800000u) {                                 /* below 2^-14, step 2^-16 */
    float aligned = aq_bits_float(magnitude) + 128.0f;
    return (uint8_t)(sign | (aq_float_bits(aligned) - 0x43000000u));
  }
  uint32_t rounded = magnitude + 0xfffffu + ((magnitude >> 21) & 1u);
  return (uint8_t)(sign | ((rounded - 0x38000000u) >> 21));
}

/* e4m3fn: exponent bias 7, no infinity, 0x7f and 0xff are NaN, largest 448. Overflow becomes NaN. */
AQ_FUNCTION float aq_float_from_e4m3(uint8_t code) {
  uint32_t sign = (uint32_t)(code & 0x80u) << 24;
  uint32_t magnitude = code & 0x7fu;
  if (magnitude == 0x7fu) return aq_bits_float(sign | 0x7fc00000u);
  if (magnitude < 8u) {
    float scaled = (float)magnitude * 0x1p-9f;
    return aq_bits_float(sign | aq_float_bits(scaled));
  }
  return aq_bits_float(sign | ((magnitude << 20) + 0x3c000000u));
}

AQ_FUNCTION uint8_t aq_e4m3_from_float(float value) {
  uint32_t bits = aq_float_bits(value);
  uint32_t sign = (bits >> 24) & 0x80u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x43e80000u) return (uint8_t)(sign | 0x7fu); /* above 464, NaN included */
  if (magnitude < 0x3c800000u) {                                /* below 2^-6, step 2^-9 */
    float aligned = aq_bits_float(magnitude) + 16384.0f;
    return (uint8_t)(sign | (aq_float_bits(aligned) - 0x46800000u));
  }
  uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
  return (uint8_t)(sign | ((rounded - 0x3c000000u) >> 20));
}

/* Round to odd: a later rounding to 22 bits or fewer then gives what one rounding of the double would. */
AQ_FUNCTION float aq_float_from_double_odd(double value) {
  float nearest = (float)value;
  if ((double)nearest == value || value != value || nearest - nearest != 0.0f) return nearest;
  uint32_t bits = aq_float_bits(nearest);
  double magnitude = value < 0 ? -value : value;
  double rounded = nearest < 0 ? -(double)nearest : (double)nearest;
  if (rounded > magnitude) bits -= 1; /* toward zero */
  return aq_bits_float(bits | 1u);
}

/* An element as float32. */
AQ_FUNCTION float aq_load_element(const void *in, int32_t dtype, size_t i) {
  switch (dtype) {
    case AQ_F32: return ((const float *)in)[i];
    case AQ_F16: return aq_float_from_half(((const uint16_t *)in)[i]);
    case AQ_BF16: return aq_float_from_bfloat(((const uint16_t *)in)[i]);
    case AQ_F8_E4M3: return aq_float_from_e4m3(((const uint8_t *)in)[i]);
    case AQ_F8_E5M2: return aq_float_from_e5m2(((const uint8_t *)in)[i]);
    default: return (float)((const double *)in)[i];
  }
}

/* Bytes of one element of a dtype, 0 for an unknown one. */
static inline size_t aq_dtype_bytes(int32_t dtype) {
  switch (dtype) {
    case AQ_F32: return 4;
    case AQ_F16:
    case AQ_BF16: return 2;
    case AQ_F8_E4M3:
    case AQ_F8_E5M2: return 1;
    case AQ_F64: return 8;
    default: return 0;
  }
}

#endif
