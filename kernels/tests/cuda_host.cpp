/* cuda_host.cpp: the CUDA kernels' threads, run one after the other on the host, against the scalar oracle to the bit (products
 * within a derived tolerance). What is compared is the code in the headers of kernels/cuda that the kernels call, with their indices, tails
 * and guard bytes; launches, shuffles, shared memory and tensor cores are not in it, they need a device (cuda.cu).
 * Prints what it ran; exit status 1 on a difference. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "../cuda/adam.h"
#include "../cuda/product.h"
#include "../cuda/quantize.h"
#include "../cuda/statistics.h"
#include "cuda_cases.h"

/* The block of clip_tiles, thread after thread between the barriers. */
static int32_t run_tiles(const aq_quantize_view &view) {
  const size_t units = view.layout.rows * view.layout.groups;
  std::vector<float> memory(aq_tile_bytes(view.layout, view.column_weights != 0) / sizeof(float));
  const aq_tile tile = aq_tile_in(memory.data(), view.layout, view.column_weights != 0);
  int32_t faults = 0;
  for (size_t base = 0; base < units; base += tile.groups) {
    int32_t fault = 0;
    for (size_t c = 0; c < tile.groups * tile.group_chunks; c++)
      fault |= aq_load_tile_chunk(view, tile, base, units, c);
    for (size_t g = 0; g < tile.groups; g++) fault |= aq_search_tile_group(view, tile, base, units, g);
    faults |= fault;
    if (fault) continue;
    for (size_t c = 0; c < tile.groups * tile.group_chunks; c++) aq_write_tile_chunk(view, tile, base, units, c);
  }
  return faults;
}

/* The lanes of round_groups. */
static int32_t run_round(const aq_quantize_view &view) {
  const int lanes = aq_group_lanes(view.layout);
  int32_t faults = 0;
  for (size_t unit = 0; unit < view.layout.rows * view.layout.groups; unit++) {
    const aq_group_place place = aq_place_group(view.layout, unit);
    float values[32][AQ_CHUNK];
    size_t n[32];
    aq_range ranges[32];
    for (int lane = 0; lane < lanes; lane++) {
      n[lane] = aq_load_lane(view, place, (size_t)lane, values[lane]);
      ranges[lane] = aq_chunk_range(values[lane], n[lane]);
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      aq_range before[32];
      memcpy(before, ranges, sizeof before);
      for (int lane = 0; lane < lanes; lane++) ranges[lane] = aq_joined_range(before[lane], before[lane ^ distance]);
    }
    for (int lane = 0; lane < lanes; lane++) {
      aq_grid grid;
      if (!ranges[lane].finite) {
        faults |= AQ_FAULT_NONFINITE;
      } else if (aq_round_grid(ranges[lane].minimum, ranges[lane].maximum, view.layout.bits, view.zero_point_kind,
                               &grid) != AQ_OK) {
        faults |= AQ_FAULT_RANGE;
      } else {
        aq_write_lane(view, place, (size_t)lane, values[lane], n[lane], grid);
        if (lane == 0) aq_write_grid(view, unit, grid);
      }
    }
  }
  return faults;
}

/* Threads of few_tokens, added up as its warps do. */
template <int BITS, int TOKENS, int ROWS>
static void run_product(const aq_product_view &view) {
  const size_t rows = view.matrix.layout.rows;
  for (size_t row = 0; row < rows; row += ROWS)
    for (size_t token = 0; token < view.tokens; token += TOKENS) {
      float total[TOKENS][ROWS] = {};
      for (size_t thread = 0; thread < AQ_PRODUCT_THREADS; thread++) {
        float sums[TOKENS][ROWS] = {};
        if (BITS == 3)
          aq_add_chunk_products<TOKENS, ROWS>(view, token, row, thread, AQ_PRODUCT_THREADS, sums);
        else
          aq_add_word_products<BITS == 3 ? 4 : BITS, TOKENS, ROWS>(view, token, row, thread, AQ_PRODUCT_THREADS, sums);
        for (int t = 0; t < TOKENS; t++)
          for (int r = 0; r < ROWS; r++) total[t][r] += sums[t][r];
      }
      for (int t = 0; t < TOKENS; t++)
        for (int r = 0; r < ROWS; r++)
          if (token + (size_t)t < view.tokens && row + (size_t)r < rows)
            view.out[(token + (size_t)t) * rows + row + (size_t)r] =
                total[t][r] + (view.bias ? view.bias[row + (size_t)r] : 0.0f);
    }
}

/* Some threads' sums, added up. */
template <class Add>
static int32_t run_sums(size_t chunks, double *statistics, Add add) {
  const size_t threads = 96;
  for (int i = 0; i < AQ_STATISTICS; i++) statistics[i] = 0.0;
  for (size_t thread = 0; thread < threads; thread++) {
    aq_error_sums sums = {};
    for (size_t i = thread; i < chunks; i += threads) add(i, &sums);
    statistics[0] += sums.aa;
    statistics[1] += sums.bb;
    statistics[2] += sums.ab;
    statistics[3] += sums.dd;
    if (sums.max_difference > statistics[4]) statistics[4] = sums.max_difference;
    if (sums.max_a > statistics[5]) statistics[5] = sums.max_a;
  }
  return AQ_OK;
}

static float bfloat_product(uint16_t a, uint16_t b) { return aq_float_from_bfloat(a) * aq_float_from_bfloat(b); }

/* Blocks of many_tokens, with loops in place of the tensor cores. */
static void run_tiles_product(const aq_product_view &view) {
  const aq_layout &layout = view.matrix.layout;
  std::vector<uint16_t> x(AQ_TILE * AQ_TILE_PITCH), w(AQ_TILE * AQ_TILE_PITCH);
  for (size_t row = 0; row < layout.rows; row += AQ_TILE)
    for (size_t token = 0; token < view.tokens; token += AQ_TILE) {
      std::vector<float> sums(AQ_TILE * AQ_TILE, 0.0f);
      for (size_t col = 0; col < layout.cols; col += AQ_TILE_DEPTH) {
        for (unsigned thread = 0; thread < AQ_TILE_THREADS; thread++) {
          aq_fetched next;
          aq_fetch_step(view, token, row, col, thread, &next);
          aq_commit_step(next, layout.bits, thread, x.data(), w.data());
        }
        for (size_t t = 0; t < AQ_TILE; t++)
          for (size_t r = 0; r < AQ_TILE; r++)
            for (size_t k = 0; k < AQ_TILE_DEPTH; k++)
              sums[t * AQ_TILE + r] += bfloat_product(x[t * AQ_TILE_PITCH + k], w[r * AQ_TILE_PITCH + k]);
      }
      for (size_t t = 0; t < AQ_TILE && token + t < view.tokens; t++)
        for (size_t r = 0; r < AQ_TILE && row + r < layout.rows; r++)
          view.out[(token + t) * layout.rows + row + r] = sums[t * AQ_TILE + r] + (view.bias ? view.bias[row + r] : 0.0f);
    }
}

struct host_library {
  bool many;
  int32_t quantize(const quantize_case &c, const void *weights, const float *column_weights, uint32_t *packed,
                   uint16_t *scale, uint16_t *zero) const {
    const aq_quantize_view view = {aq_layout_of(c.rows, c.cols, c.bits, c.group_size),
                                   weights,
                                   c.dtype,
                                   c.kind,
                                   c.clip == 2 ? column_weights : 0,
                                   packed,
                                   scale,
                                   zero};
    if (view.layout.group_size <= AQ_SEGMENT) return aq_status_of_faults(c.clip ? run_tiles(view) : run_round(view));
    int32_t faults = 0;
    for (size_t unit = 0; unit < c.rows * view.layout.groups; unit++)
      faults |= aq_quantize_long_group(view, unit, c.clip != 0, aq_single{1, 0});
    return aq_status_of_faults(faults);
  }
  int32_t pack(const uint8_t *codes, size_t rows, size_t cols, int32_t bits, uint32_t *packed) const {
    const aq_layout layout = aq_layout_of(rows, cols, bits, 0);
    int32_t status = AQ_OK;
    for (size_t i = 0; i < rows * layout.chunks; i++)
      if (aq_pack_thread(layout, codes, packed, i) != AQ_OK) status = AQ_E_VALUE;
    return status;
  }
  int32_t unpack(const uint32_t *packed, size_t rows, size_t cols, int32_t bits, uint8_t *codes) const {
    const aq_layout layout = aq_layout_of(rows, cols, bits, 0);
    for (size_t i = 0; i < rows * layout.chunks; i++) aq_unpack_thread(layout, packed, codes, i);
    return AQ_OK;
  }
  int32_t dequantize(const quantize_case &c, const uint32_t *packed, const uint16_t *scale, const uint16_t *zero,
                     void *out, int32_t dtype) const {
    const aq_packed_matrix matrix = {aq_layout_of(c.rows, c.cols, c.bits, c.group_size), packed, scale, zero};
    for (size_t i = 0; i < c.rows * matrix.layout.chunks; i++) aq_dequantize_thread(matrix, out, dtype, i);
    return AQ_OK;
  }
  int32_t linear(const quantize_case &c, const float *x, size_t tokens, const uint32_t *packed, const uint16_t *scale,
                 const uint16_t *zero, const float *bias, float *out) const {
    const aq_product_view view = {{aq_layout_of(c.rows, c.cols, c.bits, c.group_size), packed, scale, zero},
                                  x, tokens, bias, out};
    if (many) {
      run_tiles_product(view);
      return AQ_OK;
    }
    switch (c.bits) {
      case 2: tokens == 1 ? run_product<2, 1, 4>(view) : run_product<2, 4, 2>(view); break;
      case 3: tokens == 1 ? run_product<3, 1, 4>(view) : run_product<3, 4, 2>(view); break;
      case 4: tokens == 1 ? run_product<4, 1, 4>(view) : run_product<4, 4, 2>(view); break;
      default: tokens == 1 ? run_product<8, 1, 4>(view) : run_product<8, 4, 2>(view); break;
    }
    return AQ_OK;
  }
  int32_t statistics(const float *a, const float *b, size_t n, double *sums) const {
    const aq_flat_pair pair = {a, b, AQ_F32, AQ_F32, n};
    return run_sums(aq_flat_chunks(n), sums, [&](size_t i, aq_error_sums *own) { aq_add_flat_errors(pair, i, own); });
  }
  int32_t packed_statistics(const quantize_case &c, const float *weights, const uint32_t *packed, const uint16_t *scale,
                            const uint16_t *zero, double *sums) const {
    const aq_packed_matrix matrix = {aq_layout_of(c.rows, c.cols, c.bits, c.group_size), packed, scale, zero};
    return run_sums(c.rows * matrix.layout.chunks, sums, [&](size_t i, aq_error_sums *own) {
      aq_add_packed_errors(weights, AQ_F32, matrix, i, own);
    });
  }
  int32_t adam(float *p, const float *g, float *m, float *v, size_t n, const adam_settings &s, int32_t step) const {
    const aq_adam_factors factors = aq_adam_factors_of(s.learning_rate, s.beta1, s.beta2, s.epsilon, step);
    for (size_t i = 0; i < n; i++) aq_adam_element(factors, g[i], p + i, m + i, v + i);
    return AQ_OK;
  }
};

int main(int argc, char **argv) {
  start(argc > 1 ? strtoull(argv[1], 0, 10) : 1);
  const int quick = argc > 2 && strcmp(argv[2], "quick") == 0;
  run_shared_cases(host_library{false}, host_library{true}, quick);
  return finish("on the host");
}
