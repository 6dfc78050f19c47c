/* tensor.h: products on tensor cores - moments and linear layers of more than one token - against sums in
 * float64; included by cuda.cu. Parts in bfloat16 lose at most 2^-16 of a number, and of a product of two low
 * parts; what is cut off in sums is less than 2^-18 of the magnitudes. */

#define PARTS_LARGEST (3.0 / 65536 + 1.0 / 262144) /* of the sum of the products' magnitudes */
#define PARTS_RMS (1.0 / 131072)                   /* of the root of the sum of their squares; a low part left out is 200 times it */

template <class T>
static device_bytes on_device(const std::vector<T> &values) {
  return device_bytes(values.data(), values.size() * sizeof(T));
}

static std::vector<float> normal_values(size_t n, float factor) {
  std::vector<float> values(n);
  for (float &value : values) value = factor * gaussian();
  return values;
}

#define BOTH(what, oracle, device)                    \
  do {                                                \
    expect_status(what, where, oracle, AQ_OK);        \
    expect_status(what " on a device", where, device, AQ_OK); \
  } while (0)

/* Sums of products that begin at what an array has, and the device's copy of it. */
struct sums_out {
  std::vector<double> sum, magnitude, squares;
  device_bytes own;
  explicit sums_out(const std::vector<float> &from)
      : sum(from.begin(), from.end()), magnitude(sum), squares(sum), own(on_device(from)) {
    for (size_t i = 0; i < from.size(); i++) {
      magnitude[i] = fabs(sum[i]);
      squares[i] = sum[i] * sum[i];
    }
  }
  void add(size_t i, double a, double b) {
    sum[i] += a * b;
    magnitude[i] += fabs(a * b);
    squares[i] += a * b * a * b;
  }
  std::vector<float> compare(const char *what, const char *where) const {
    bytes made(own.size + GUARD);
    require(aq_cuda_download(own.handle, 0, made.data(), made.size(), stream), "download");
    expect_guard(what, where, made.data(), own.size);
    std::vector<float> actual(sum.size());
    memcpy(actual.data(), made.data(), own.size);
    double errors = 0, power = 0;
    size_t wrong = 0;
    for (size_t i = 0; i < sum.size(); i++) {
      const double error = (double)actual[i] - sum[i];
      wrong += !(fabs(error) <= PARTS_LARGEST * magnitude[i]);
      errors += error * error;
      power += squares[i];
    }
    expect(wrong == 0, what, where);
    if (sum.size() > 500) expect(sqrt(errors) <= PARTS_RMS * sqrt(power), what, "its root mean square");
    return actual;
  }
};

/* Blocks on the diagonal, or with y of another width all of y^T x. */
static void run_moment(size_t tokens, size_t rows, size_t cols, size_t block, bool crossed, bool weighted) {
  char where[120];
  snprintf(where, sizeof where, "%zu tokens, %zu x %zu, block %zu, crossed %d, weighted %d", tokens, rows, cols, block, crossed, weighted);
  const std::vector<float> x = normal_values(tokens * cols, 1.0f), y = crossed ? normal_values(tokens * rows, 2.0f) : x;
  std::vector<float> weight(tokens);
  for (float &value : weight) value = 0.25f + (float)(random_bits() % 4);
  std::vector<float> begin;
  for (size_t first = 0; first < cols; first += block) {
    const size_t n = cols - first < block ? cols - first : block, height = rows == cols ? n : rows;
    const std::vector<float> own = normal_values(height * n, 1.0f);
    for (size_t i = 0; i < height * n; i++) begin.push_back(crossed || i / n <= i % n ? own[i] : own[i % n * n + i / n]);
  }
  sums_out out(begin);
  for (size_t first = 0, at = 0; first < cols; first += block) {
    const size_t n = cols - first < block ? cols - first : block, height = rows == cols ? n : rows;
    for (size_t t = 0; t < tokens; t++)
      for (size_t i = 0; i < height; i++)
        for (size_t j = 0; j < n; j++) {
          const float left = y[t * rows + first + i];
          out.add(at + i * n + j, weighted ? weight[t] * left : left, x[t * cols + first + j]);
        }
    at += height * n;
  }
  const device_bytes own_x = on_device(x), own_y(crossed ? y.data() : 0, y.size() * 4),
                     own_weight(weighted ? weight.data() : 0, weight.size() * 4);
  expect_status("moment", where,
                aq_cuda_accumulate_moment(own_x.handle, own_y.handle, own_weight.handle, tokens, rows, cols, block, out.own.handle, stream),
                AQ_OK);
  const std::vector<float> actual = out.compare("moment", where);
  if (crossed) return;
  for (size_t first = 0, at = 0; first < cols; first += block) {
    const size_t n = cols - first < block ? cols - first : block;
    bool is_symmetric = true;
    for (size_t i = 0; i < n; i++)
      for (size_t j = 0; j < i; j++) is_symmetric &= actual[at + i * n + j] == actual[at + j * n + i];
    expect(is_symmetric, "a moment is symmetric", where);
    at += n * n;
  }
}

static void run_tensor_linear(size_t tokens, size_t rows, size_t cols, int pattern) {
  char where[120];
  snprintf(where, sizeof where, "%zu tokens, %zu x %zu, pattern %d", tokens, rows, cols, pattern);
  std::vector<float> x = normal_values(tokens * cols, 1.0f), w(rows * cols), b = normal_values(rows, 1.0f);
  fill(w.data(), w.size(), pattern);
  for (int32_t dtype : {AQ_F32, AQ_BF16}) {
    bytes stored(rows * cols * dtype_bytes(dtype));
    aq_convert(w.data(), AQ_F32, stored.data(), dtype, rows * cols, AQ_ISA_SCALAR, 1);
    std::vector<float> read(rows * cols);
    aq_convert(stored.data(), dtype, read.data(), AQ_F32, rows * cols, AQ_ISA_SCALAR, 1);
    std::vector<float> begin(tokens * rows);
    for (size_t i = 0; i < begin.size(); i++) begin[i] = b[i % rows];
    sums_out out(begin);
    for (size_t t = 0; t < tokens; t++)
      for (size_t row = 0; row < rows; row++)
        for (size_t k = 0; k < cols; k++) out.add(t * rows + row, x[t * cols + k], read[row * cols + k]);
    const device_bytes own_x = on_device(x), own_w = on_device(stored), own_b = on_device(b);
    expect_status("linear in parts", where,
                  aq_cuda_linear(own_x.handle, tokens, own_w.handle, dtype, own_b.handle, rows, cols, out.own.handle, stream), AQ_OK);
    out.compare("linear in parts", where);
  }
}

/* What has no finite parts: infinity stays infinite or NaN, the largest number finite, and a zero takes no
 * part. */
static void run_extreme_values(void) {
  const char *where = "extreme values";
  std::vector<float> x(64), w(32);
  for (size_t k = 0; k < 32; k++) w[k] = k ? 0.0f : 0.5f;
  x[0] = 3.4028235e38f;
  x[32] = INFINITY;
  const device_bytes own_x = on_device(x), own_w = on_device(w);
  const std::vector<float> none(2);
  const device_bytes out = on_device(none);
  expect_status("linear in parts", where, aq_cuda_linear(own_x.handle, 2, own_w.handle, AQ_F32, 0, 1, 32, out.handle, stream), AQ_OK);
  std::vector<float> made(2);
  require(aq_cuda_download(out.handle, 0, made.data(), 8, stream), "download");
  expect(fabs(made[0] / 1.70141173e38f - 1) < 1e-4, "the largest number", where);
  expect(!(made[1] - made[1] == 0), "infinity", where);
}

static void run_tensor_products(void) {
  run_moment(1, 1, 1, 1000, true, false);
  run_moment(40, 17, 17, 5, false, false);
  run_moment(70, 31, 33, 33, true, true);
  run_moment(33, 96, 96, 64, true, false);
  run_moment(100, 200, 200, 200, false, true);
  run_moment(20000, 2, 2, 2, false, false); /* what tensor cores cut off adds up */
  run_tensor_linear(2, 1, 1, GAUSSIAN);
  run_tensor_linear(65, 67, 64, HEAVY);
  run_tensor_linear(3, 130, 97, OFFSET);
  run_tensor_linear(9, 70, 128, VANISHING);
  if (!quick) { /* large tiles, and more rows of them than a band has */
    run_moment(65, 1100, 1100, 1100, false, false);
    run_tensor_linear(1200, 130, 160, GAUSSIAN);
  }
  run_tensor_linear(130, 270, 96, GAUSSIAN);
  run_extreme_values();
}
