/* dequantize.cu: the weights of packed matrices on grids of one and of two levels; a thread has a chunk. */
#include "packed.h"

template <int DTYPE>
AQ_DEVICE uint16_t half_of(float value) {
  return DTYPE == AQ_F16 ? aq_half_from_float(value) : aq_bfloat_from_float(value);
}

/* Sixteen bytes to an address that is a multiple of sixteen. */
AQ_DEVICE void write16(void *to, const aq_words4 &v) {
#if defined(__CUDA_ARCH__)
  *(uint4 *)to = make_uint4(v.at[0], v.at[1], v.at[2], v.at[3]);
#else
  __builtin_memcpy(to, &v, sizeof v);
#endif
}

/* n weights of a chunk, the first of which is element `first`; whole chunks of rows of whole chunks at
 * once. */
template <int DTYPE>
AQ_DEVICE void store_chunk(const float values[AQ_CHUNK], size_t n, void *out, size_t first) {
  if (n == AQ_CHUNK && first % AQ_CHUNK == 0) {
    aq_words4 words;
    if (DTYPE == AQ_F32) {
      for (int half = 0; half < 2; half++) {
        for (int k = 0; k < 4; k++) words.at[k] = aq_float_bits(values[4 * half + k]);
        write16((float *)out + first + 4 * half, words);
      }
    } else {
      for (int k = 0; k < 4; k++)
        words.at[k] = (uint32_t)half_of<DTYPE>(values[2 * k]) | (uint32_t)half_of<DTYPE>(values[2 * k + 1]) << 16;
      write16((uint16_t *)out + first, words);
    }
    return;
  }
  for (size_t k = 0; k < n; k++) {
    if (DTYPE == AQ_F32)
      ((float *)out)[first + k] = values[k];
    else
      ((uint16_t *)out)[first + k] = half_of<DTYPE>(values[k]);
  }
}

template <int DTYPE>
struct plain_weights {
  aq_weights_view view;
  void *out;
  __device__ void operator()(size_t i) const {
    const size_t cols = view.layout.cols, row = aq_quotient(i, view.layout.chunks), chunk = i - row * view.layout.chunks;
    const size_t begin = chunk * AQ_CHUNK, n = aq_smaller(AQ_CHUNK, cols - begin);
    float values[AQ_CHUNK];
    aq_load_weights(view, row, chunk, n, values);
    store_chunk<DTYPE>(values, n, out, row * cols + begin);
  }
};

static int32_t dequantize(const aq_stream_state *on, const aq_weights_view &view, aq_cuda_buffer out, int32_t dtype) {
  if (dtype != AQ_F32 && dtype != AQ_F16 && dtype != AQ_BF16) return AQ_E_ARGUMENT;
  int32_t status = AQ_OK;
  const size_t rows = view.layout.rows, chunks = rows * view.layout.chunks;
  void *to = aq_cuda_memory(out, rows * view.layout.cols, aq_dtype_bytes(dtype), on, &status);
  if (status != AQ_OK) return status;
  switch (dtype) {
    case AQ_F32: return aq_run_elements(on, plain_weights<AQ_F32>{view, to}, chunks);
    case AQ_F16: return aq_run_elements(on, plain_weights<AQ_F16>{view, to}, chunks);
    default: return aq_run_elements(on, plain_weights<AQ_BF16>{view, to}, chunks);
  }
}

int32_t aq_cuda_dequantize(aq_cuda_buffer packed, aq_cuda_buffer scale, aq_cuda_buffer zero_point, size_t rows,
                           size_t cols, int32_t bits, size_t group_size, aq_cuda_buffer out, int32_t dtype,
                           aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  aq_weights_view view;
  status = aq_view_one_level(on, packed, scale, zero_point, rows, cols, bits, group_size, &view);
  return status == AQ_OK ? dequantize(on, view, out, dtype) : status;
}

int32_t aq_cuda_dequantize_two_level(aq_cuda_buffer packed, aq_cuda_buffer sub_scale, aq_cuda_buffer sub_min,
                                     aq_cuda_buffer super_scale, aq_cuda_buffer super_min, size_t rows, size_t cols,
                                     int32_t bits, size_t group_size, int32_t scale_bits, aq_cuda_buffer out,
                                     int32_t dtype, aq_cuda_stream stream) {
  if (rows == 0 || cols == 0) return AQ_OK;
  int32_t status;
  const aq_stream_state *on = aq_cuda_use(stream, &status);
  if (!on) return status;
  aq_weights_view view;
  status = aq_view_two_levels(on, packed, sub_scale, sub_min, super_scale, super_min, rows, cols, bits, group_size,
                              scale_bits, &view);
  return status == AQ_OK ? dequantize(on, view, out, dtype) : status;
}
