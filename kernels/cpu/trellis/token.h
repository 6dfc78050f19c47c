/* trellis/token.h: a token alone on trellis codes, over vectors of AQ_W floats: blocks of columns, and the
 * order in which rows' terms are added up. Included once by an instruction set.
 *
 * Expected of the including file, beside isa/<set>.h and isa/lanes.h:
 *   AQ_COLS: columns of x held at once, a multiple of AQ_SEGMENT
 *   AQ_ROOM: bytes that may be read behind the codes of as many columns
 *   float_x, prepare_floats(bits, x, n, size, floats): activations of n columns in segments of `size`
 *   float_row(bits, job, from, row, col, n, floats): sum of x w over columns [col, col + n) of a row, whose
 *     bytes are `from`
 *   byte_x, prepare_bytes(bits, codes, n, zero, size, bytes): 8-bit ones
 *   byte_row(bits, job, from, row, col, n, bytes, terms): the terms of its segments, as in int8/scalar.c */

/* A row's bytes from column `col` on, for n columns: AQ_ROOM bytes behind them, and the byte before, can be
 * read in the matrix, or in the copy. */
AQ_INLINE const uint8_t *row_bytes(const int bits, const aq_linear_job *job, size_t row, size_t col, size_t n,
                                   uint8_t copy[AQ_COLS / 8 * 3 + AQ_ROOM + 1]) {
  const size_t bytes = 4 * job->view.words, at = col / 8 * (size_t)bits, own = (n * (size_t)bits + 7) / 8;
  const uint8_t *from = (const uint8_t *)(job->view.packed + row * job->view.words) + at;
  if (row + col > 0 && (job->rows - row) * bytes - at >= own + AQ_ROOM) return from;
  __builtin_memset(copy, 0, own + AQ_ROOM + 1);
  const size_t before = col > 0;
  __builtin_memcpy(copy + 1 - before, from - before, before + own);
  return copy + 1;
}

AQ_INLINE void float_token(const int bits, const aq_linear_job *all, size_t token, size_t row_begin, size_t row_end) {
  aq_linear_job job = *all;
  job.x += token * job.cols;
  job.out += token * job.rows;
  float_x x;
  for (size_t col = 0; col < job.cols; col += AQ_COLS) {
    const size_t n = aq_min_size(AQ_COLS, job.cols - col);
    prepare_floats(bits, job.x + col, n, aq_segment_cols(&job.view), &x);
    for (size_t row = row_begin; row < row_end; row++) {
      uint8_t copy[AQ_COLS / 8 * 3 + AQ_ROOM + 1];
      const uint8_t *from = row_bytes(bits, &job, row, col, n, copy);
      float out = float_row(bits, &job, from, row, col, n, &x);
      if (col > 0) out = job.out[row] + out;
      if (col + n == job.cols && job.bias) out = out + job.bias[row];
      job.out[row] = out;
    }
  }
}

AQ_INLINE void byte_token(const int bits, const aq_linear_job *job, size_t token, size_t row_begin, size_t row_end) {
  const size_t size = aq_segment_cols(&job->view);
  byte_x x;
  for (size_t col = 0; col < job->cols; col += AQ_COLS) {
    const size_t n = aq_min_size(AQ_COLS, job->cols - col), count = (n - 1) / size + 1;
    prepare_bytes(bits, job->codes + token * job->cols + col, n, job->x_zero[token], size, &x);
    for (size_t row = row_begin; row < row_end; row += AQ_W) {
      /* rows in the lanes: every row's terms are added up one after the other, the rows at once */
      const size_t rows = aq_min_size(AQ_W, row_end - row);
      float *out = job->out + token * job->rows + row, terms[AQ_W][AQ_COLS / 64 + AQ_W];
      vf total = {0}, bias = {0};
      for (size_t r = 0; r < rows; r++) {
        uint8_t copy[AQ_COLS / 8 * 3 + AQ_ROOM + 1];
        byte_row(bits, job, row_bytes(bits, job, row + r, col, n, copy), row + r, col, n, &x, terms[r]);
      }
      if (col > 0) __builtin_memcpy(&total, out, rows * sizeof(float));
      for (size_t s = 0; s < count; s += AQ_W) {
        vf columns[AQ_W];
        for (size_t r = 0; r < AQ_W; r++) columns[r] = r < rows ? v_load(terms[r] + s) : (vf){0};
        v_transpose(columns);
        for (size_t i = 0; i < aq_min_size(AQ_W, count - s); i++) total = total + columns[i];
      }
      if (col + n == job->cols) {
        total = total * job->x_scale[token];
        if (job->bias) {
          __builtin_memcpy(&bias, job->bias + row, rows * sizeof(float));
          total = total + bias;
        }
      }
      __builtin_memcpy(out, &total, rows * sizeof(float));
    }
  }
}

#define AQ_TOKEN(what, bits)                                                                                     \
  static void what##_token_##bits(const aq_linear_job *job, size_t token, size_t row_begin, size_t row_end) {    \
    what##_token(bits, job, token, row_begin, row_end);                                                          \
  }
AQ_TOKEN(float, 2)
AQ_TOKEN(float, 3)
AQ_TOKEN(byte, 2)
AQ_TOKEN(byte, 3)

#define AQ_TOKENS {{float_token_2, float_token_3}, {byte_token_2, byte_token_3}}
