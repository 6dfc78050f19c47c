/* mma.h of the emulator: the matrix fragments that kernels/cuda/moment.cu uses. Which element is in which lane is nobody's
 * business but this file's, as on a device. */
#ifndef AQ_EMULATED_MMA
#define AQ_EMULATED_MMA

#include "cuda_runtime.h"

namespace nvcuda {
namespace wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
namespace precision {
struct tf32 {};
}
enum layout_t { mem_row_major, mem_col_major };

/* Only 16 x 16 x 8 of tf32: a factor has four elements a lane, a sum eight. */
template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 8, "the shape that is used");
  static constexpr int rows = std::is_same<Use, matrix_b>::value ? K : M;
  static constexpr int cols = std::is_same<Use, matrix_a>::value ? K : N;
  static constexpr int num_elements = rows * cols / 32;
  static constexpr bool by_rows = std::is_same<Layout, row_major>::value;
  float x[num_elements];
};

inline float __float_to_tf32(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = (bits + 0x1000u) & ~0x1fffu; /* to nearest, ties away */
  memcpy(&value, &bits, 4);
  return value;
}

template <class F>
inline void fill_fragment(F &f, float value) {
  for (float &x : f.x) x = value;
}

template <class F>
inline void load_matrix_sync(F &f, const float *from, unsigned pitch) {
  for (int i = 0; i < F::num_elements; i++) {
    const unsigned e = threadIdx.x % 32 * F::num_elements + (unsigned)i, row = e / F::cols, col = e % F::cols;
    f.x[i] = F::by_rows ? from[row * pitch + col] : from[col * pitch + row];
  }
  __syncwarp();
}

template <class F>
inline void store_matrix_sync(float *to, const F &f, unsigned pitch, layout_t) {
  for (int i = 0; i < F::num_elements; i++) {
    const unsigned e = threadIdx.x % 32 * F::num_elements + (unsigned)i;
    to[e / F::cols * pitch + e % F::cols] = f.x[i];
  }
  __syncwarp();
}

template <class D, class A, class B, class C>
inline void mma_sync(D &d, const A &a, const B &b, const C &c) {
  A left[32];
  B right[32];
  emulator::gather(a, left);
  emulator::gather(b, right);
  for (int i = 0; i < D::num_elements; i++) {
    const unsigned e = threadIdx.x % 32 * D::num_elements + (unsigned)i, row = e / D::cols, col = e % D::cols;
    float sum = c.x[i];
    for (unsigned k = 0; k < A::cols; k++) {
      const unsigned l = row * A::cols + k, r = k * B::cols + col;
      sum += left[l / A::num_elements].x[l % A::num_elements] * right[r / B::num_elements].x[r % B::num_elements];
    }
    d.x[i] = sum;
  }
}

}  // namespace wmma
}  // namespace nvcuda

#endif
