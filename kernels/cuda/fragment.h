/* fragment.h: what a device has and C has not, a function each: asynchronous copies to shared memory, the multiplication of
 * bfloat16 fragments by a warp's tensor cores (PTX ISA, mma.m16n8k16), and codes into such fragments. The emulator of
 * kernels/tests has the same functions in C.
 *
 *     A, 16 rows by 16 k      lane l = 4 g + t: a[0] (g; 2t, 2t+1)  a[1] (g+8; 2t, 2t+1)  a[2] (g; 2t+8, 2t+9)  a[3] (g+8; 2t+8, 2t+9)
 *     B, 16 k by 8 columns    b[0] (2t, 2t+1; g)  b[1] (2t+8, 2t+9; g)
 *     C, 16 rows by 8 columns c[0] (g; 2t)  c[1] (g; 2t+1)  c[2] (g+8; 2t)  c[3] (g+8; 2t+1)
 */
#ifndef AQ_CUDA_FRAGMENT_H
#define AQ_CUDA_FRAGMENT_H

#include "context.h"

/* Sixteen bytes of device memory into shared memory, zeros if not `there`; both addresses are multiples of sixteen. They arrive
 * with the group that aq_commit_copies closes. */
static __device__ __forceinline__ void aq_copy16(void *shared, const void *from, bool there) {
#if defined(AQ_EMULATED)
  emulator::current->copies.push_back({shared, there ? from : 0, 16, emulator::current->committed});
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"((unsigned)__cvta_generic_to_shared(shared)), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
#endif
}

static __device__ __forceinline__ void aq_commit_copies(void) {
#if defined(AQ_EMULATED)
  emulator::current->committed++;
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

/* Waits for this thread's groups but the last PENDING; other threads' need a barrier behind it. */
template <int PENDING>
static __device__ __forceinline__ void aq_wait_copies(void) {
#if defined(AQ_EMULATED)
  emulator::arrive(PENDING);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
#endif
}

/* c += a b, all lanes of a warp together. */
static __device__ __forceinline__ void aq_multiply_fragments(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#if defined(AQ_EMULATED)
  emulator::multiply_bfloat(c, a, b);
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

/* Two bfloat16 values times `factor` plus `term`, bfloat16 twice each. */
static __device__ __forceinline__ uint32_t aq_bfloats_fma(uint32_t values, uint32_t factor, uint32_t term) {
#if defined(AQ_EMULATED)
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float v = aq_float_from_bfloat((uint16_t)(values >> shift)), f = aq_float_from_bfloat((uint16_t)(factor >> shift));
    result |= (uint32_t)aq_bfloat_from_float(v * f + aq_float_from_bfloat((uint16_t)(term >> shift))) << shift;
  }
  return result;
#else
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(result) : "r"(values), "r"(factor), "r"(term));
  return result;
#endif
}

/* Codes 0..7 of a chunk as whole bfloat16 numbers, pairs (0, 4), (1, 5), (2, 6), (3, 7). Up to four bits a code is put under the
 * exponent of 128, whose mantissa counts in ones, and 128 is taken away; every step is exact. */
template <int BITS>
static __device__ __forceinline__ void aq_bfloats_of_codes(const uint32_t *words, unsigned chunk, uint32_t pairs[4]) {
  const uint32_t one = 0x3f803f80u, minus_128 = 0xc300c300u, exponent = 0x43004300u;
  if (BITS == 2) {
    const uint32_t c = ((const uint16_t *)words)[chunk], y = (c & 0xffu) | (c & 0xff00u) << 8;
#pragma unroll
    for (int j = 0; j < 4; j++) pairs[j] = aq_bfloats_fma((y >> 2 * j & 0x00030003u) | exponent, one, minus_128);
  } else if (BITS == 3) {
    const uint8_t *bytes = (const uint8_t *)words + 3 * chunk;
    const uint32_t c = bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16;
    const uint32_t y = (c & 0xfffu) | (c & 0xfff000u) << 4;
#pragma unroll
    for (int j = 0; j < 4; j++) pairs[j] = aq_bfloats_fma((y >> 3 * j & 0x00070007u) | exponent, one, minus_128);
  } else if (BITS == 4) {
    const uint32_t c = words[chunk];
#pragma unroll
    for (int j = 0; j < 4; j++) pairs[j] = aq_bfloats_fma((c >> 4 * j & 0x000f000fu) | exponent, one, minus_128);
  } else { /* under the exponent of 2^23; eight bits are a bfloat16's mantissa, so that cutting off is exact */
    const uint32_t low = words[2 * chunk], high = words[2 * chunk + 1];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint32_t a = aq_float_bits(aq_bits_float(0x4b000000u | (low >> 8 * j & 0xffu)) - 8388608.0f);
      const uint32_t b = aq_float_bits(aq_bits_float(0x4b000000u | (high >> 8 * j & 0xffu)) - 8388608.0f);
      pairs[j] = a >> 16 | (b & 0xffff0000u);
    }
  }
}

/* Where column j of a chunk is among the pairs above. */
static __device__ __forceinline__ unsigned aq_paired_place(unsigned j) { return j < 4 ? 2 * j : 2 * (j - 4) + 1; }

#endif
