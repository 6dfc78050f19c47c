/* mma.h of the emulator: fragments of 16 x 16 and their products. Which lane has which element is as
 * unspecified as on a device. Sums are cut off toward zero after eight products, a bound of what tensor cores
 * do. */
#ifndef AQ_EMULATED_MMA
#define AQ_EMULATED_MMA

#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace nvcuda {
namespace wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major };

/* Eight elements of a lane: line lane / 2 - a row of a and of sums, a column of b - of which it has one
 * half. */
template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16, "as much as is emulated");
  static constexpr int num_elements = 8;
  T x[8];
};

typedef fragment<matrix_a, 16, 16, 16, __nv_bfloat16, row_major> fragment_a;
typedef fragment<matrix_b, 16, 16, 16, __nv_bfloat16, col_major> fragment_b;
typedef fragment<accumulator, 16, 16, 16, float> fragment_sums;

inline unsigned lane(void) { return threadIdx.x % 32; }

inline void check_place(const void *at, unsigned pitch, size_t size) {
  if ((uintptr_t)at % 32 || pitch * size % 16) emulator::stop("a fragment at a wrong place");
}

inline void fill_fragment(fragment_sums &sums, float value) {
  for (float &x : sums.x) x = value;
}

template <class Use, class Layout>
inline void load_matrix_sync(fragment<Use, 16, 16, 16, __nv_bfloat16, Layout> &f, const __nv_bfloat16 *from, unsigned pitch) {
  check_place(from, pitch, sizeof *from);
  memcpy(f.x, from + lane() / 2 * pitch + lane() % 2 * 8, sizeof f.x);
  emulator::wait(emulator::AT_WARP);
}

inline void store_matrix_sync(float *to, const fragment_sums &f, unsigned pitch, layout_t) {
  check_place(to, pitch, sizeof *to);
  memcpy(to + lane() / 2 * pitch + lane() % 2 * 8, f.x, sizeof f.x);
  emulator::wait(emulator::AT_WARP);
}

inline float cut_off(double value) {
  const float nearest = (float)value;
  return fabs((double)nearest) > fabs(value) ? nextafterf(nearest, 0.0f) : nearest;
}

inline void mma_sync(fragment_sums &out, const fragment_a &a, const fragment_b &b, const fragment_sums &in) {
  struct both {
    fragment_a a;
    fragment_b b;
  };
  const emulator::exchange<both> all({a, b});
  const unsigned row = lane() / 2, first = lane() % 2 * 8;
  const fragment_sums before = in;
  for (unsigned half = 0; half < 2; half++) {
    const fragment_a left = all.of(row * 2 + half).a;
    for (unsigned i = 0; i < 8; i++) {
      const fragment_b right = all.of((first + i) * 2 + half).b;
      double sum = half ? (double)out.x[i] : (double)before.x[i];
      for (unsigned k = 0; k < 8; k++) sum += left.x[k].value() * right.x[k].value();
      out.x[i] = cut_off(sum);
    }
  }
}

}  // namespace wmma
}  // namespace nvcuda

#endif
