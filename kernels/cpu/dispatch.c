/* dispatch.c: the one table of instruction sets, and the choice of a slot. */
#include "dispatch.h"

#if defined(AQ_BUILD_AVX2)
#include <cpuid.h>
#endif
#if defined(AQ_BUILD_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

static int always(void) { return 1; }

#if defined(AQ_BUILD_AVX2)
/* __builtin_cpu_supports also asks, through XGETBV, whether the system saves the registers; not every
 * compiler lets it name F16C, whose registers are AVX's. */
static int has_avx2(void) {
  unsigned eax, ebx, ecx, edx;
  __cpuid(1, eax, ebx, ecx, edx);
  return (ecx & bit_F16C) != 0 && (ecx & bit_FMA) != 0 && __builtin_cpu_supports("avx2");
}
#endif

#if defined(AQ_BUILD_AVX512)
static int has_avx512(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static int has_avx512_vnni(void) { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

static int has_avx512_vbmi(void) { return has_avx512_vnni() && __builtin_cpu_supports("avx512vbmi"); }
#endif

#if defined(AQ_BUILD_NEON)
/* Arm's dot product of bytes; every Mac with such a processor has it. */
static int has_byte_dot(void) {
#if defined(__APPLE__)
  return 1;
#elif defined(__linux__)
  return (getauxval(AT_HWCAP) & (1ul << 20)) != 0; /* HWCAP_ASIMDDP */
#else
  return 0;
#endif
}
#endif

/* Quantizing, forward passes and solvers come as one set: one unit in isa/ compiles their vector.h. Two sets
 * have faster products of 8-bit activations than the one they extend. Gradients are plain loops: only x86's
 * wider sets compile them again. */
#define AQ_SLOT_OF(test, set, int8_set, backward_set, levels_set, tokens)                                 \
  {                                                                                                       \
    test, &aq_quantize_##set, aq_two_level_##set, &aq_forward_##set, &aq_rows_##set, &aq_trellis_##set,   \
        &aq_product_##set, &aq_int8_##int8_set, &aq_backward_##backward_set,                              \
        {aq_levels_2_##levels_set, aq_levels_3_##levels_set}, tokens                                      \
  }
#define AQ_SLOT(...) AQ_SLOT_OF(__VA_ARGS__, 0)
#define AQ_DECLARE(set)                               \
  extern const aq_quantize_kernels aq_quantize_##set; \
  extern aq_two_level_function aq_two_level_##set;    \
  extern const aq_forward_kernels aq_forward_##set;   \
  extern const aq_row_kernels aq_rows_##set;          \
  extern const aq_trellis_kernels aq_trellis_##set;   \
  extern const aq_product_kernels aq_product_##set;   \
  extern const aq_int8_kernels aq_int8_##set;         \
  extern const aq_backward_kernels aq_backward_##set;

AQ_DECLARE(scalar)
extern aq_levels_function aq_levels_2_scalar, aq_levels_3_scalar;
#if defined(AQ_BUILD_AVX2)
AQ_DECLARE(avx2)
extern aq_levels_function aq_levels_2_avx2, aq_levels_3_avx2;
extern const aq_trellis_tokens aq_tokens_avx2;
#endif
#if defined(AQ_BUILD_AVX512)
AQ_DECLARE(avx512)
AQ_DECLARE(avx512_vnni)
extern aq_levels_function aq_levels_2_avx512, aq_levels_3_avx512, aq_levels_2_avx512_vbmi, aq_levels_3_avx512_vbmi;
extern const aq_trellis_tokens aq_tokens_avx512, aq_tokens_avx512_vnni, aq_tokens_avx512_vbmi;
#endif
#if defined(AQ_BUILD_NEON)
AQ_DECLARE(neon)
AQ_DECLARE(neon_dot)
extern aq_levels_function aq_levels_2_neon, aq_levels_3_neon;
#endif
#if defined(AQ_BUILD_SIMD128)
AQ_DECLARE(simd128)
extern aq_levels_function aq_levels_2_simd128, aq_levels_3_simd128;
#endif

static const aq_kernels slots[] = {
    [AQ_ISA_SCALAR] = AQ_SLOT(always, scalar, scalar, scalar, scalar),
#if defined(AQ_BUILD_AVX2)
    [AQ_ISA_AVX2] = AQ_SLOT_OF(has_avx2, avx2, avx2, avx2, avx2, &aq_tokens_avx2),
#endif
#if defined(AQ_BUILD_AVX512)
    [AQ_ISA_AVX512] = AQ_SLOT_OF(has_avx512, avx512, avx512, avx512, avx512, &aq_tokens_avx512),
    [AQ_ISA_AVX512_VNNI] = AQ_SLOT_OF(has_avx512_vnni, avx512, avx512_vnni, avx512, avx512,
                                      &aq_tokens_avx512_vnni),
    [AQ_ISA_AVX512_VBMI] = AQ_SLOT_OF(has_avx512_vbmi, avx512, avx512_vnni, avx512, avx512_vbmi,
                                      &aq_tokens_avx512_vbmi),
#endif
#if defined(AQ_BUILD_NEON)
    [AQ_ISA_NEON] = AQ_SLOT(always, neon, neon, scalar, neon),
    [AQ_ISA_NEON_DOT] = AQ_SLOT(has_byte_dot, neon, neon_dot, scalar, neon),
#endif
#if defined(AQ_BUILD_SIMD128)
    [AQ_ISA_SIMD128] = AQ_SLOT(always, simd128, simd128, scalar, simd128),
#endif
};

static const aq_kernels *slot_of(int32_t isa) {
  /* 1: supported, -1: not, 0: not asked yet. Under a hypervisor CPUID takes microseconds. */
  static _Atomic signed char known[sizeof slots / sizeof *slots];
  if (isa < 0 || (size_t)isa >= sizeof slots / sizeof *slots) return 0;
  if (known[isa] == 0) known[isa] = slots[isa].supported && slots[isa].supported() ? 1 : -1;
  return known[isa] > 0 ? &slots[isa] : 0;
}

int32_t aq_abi_version(void) { return AQ_ABI_VERSION; }

int32_t aq_best_isa(void) {
  static const int32_t fastest_first[] = {AQ_ISA_AVX512_VBMI, AQ_ISA_AVX512_VNNI, AQ_ISA_AVX512, AQ_ISA_AVX2,
                                          AQ_ISA_NEON_DOT, AQ_ISA_NEON, AQ_ISA_SIMD128};
  for (size_t i = 0; i < sizeof fastest_first / sizeof *fastest_first; i++)
    if (slot_of(fastest_first[i])) return fastest_first[i];
  return AQ_ISA_SCALAR;
}

int32_t aq_isa_supported(int32_t isa) { return isa == AQ_ISA_BEST || slot_of(isa) != 0; }

const aq_kernels *aq_choose_kernels(int32_t isa) { return slot_of(isa == AQ_ISA_BEST ? aq_best_isa() : isa); }
