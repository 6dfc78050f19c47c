/* step.h: a denoising step of Dream 7B by the library's calls, one behind the other as the product makes
 * them, beside cuBLAS's products of the same sizes in bfloat16 alone; included by bench.h. Blocks are alike:
 * one is run as often as the model has it, with weights larger than any cache. */

struct step_sizes {
  size_t tokens, width, inner, heads, kv_heads, head_size, vocabulary, blocks;
};

/* A linear layer's weights: of 4 or 2 bits in groups of 64, or bfloat16. */
struct step_layer {
  size_t rows, cols;
  int32_t bits;
  bench_buffer weights, halves;
  step_layer(size_t rows, size_t cols, int32_t bits)
      : rows(rows), cols(cols), bits(bits), weights(rows * cols * (size_t)bits / 8, constants<uint16_t>(0x3c3d)),
        halves(rows * (cols / 64 + 1) * 2, constants<uint16_t>(0x2c00)) {}
  int32_t run(const bench_buffer &x, size_t tokens, const bench_buffer &out) const {
    return bits == 16 ? aq_cuda_linear(x.handle, tokens, weights.handle, AQ_BF16, 0, rows, cols, out.handle, stream)
                      : aq_cuda_linear_packed(x.handle, tokens, weights.handle, halves.handle, halves.handle, 0, rows, cols, bits, 64,
                                              out.handle, stream);
  }
};

/* The first status that is not AQ_OK. */
static int32_t first_fault(std::initializer_list<int32_t> statuses) {
  for (int32_t status : statuses)
    if (status != AQ_OK) return status;
  return AQ_OK;
}

struct step_model {
  step_sizes s;
  step_layer q, k, v, o, gate, up, down, head;
  bench_buffer x, y, qs, ks, vs, wide, wider, logits, norm, positions;
  step_model(const step_sizes &s, int32_t bits)
      : s(s), q(s.heads * s.head_size, s.width, bits), k(s.kv_heads * s.head_size, s.width, bits), v(s.kv_heads * s.head_size, s.width, bits),
        o(s.width, s.heads * s.head_size, bits), gate(s.inner, s.width, bits), up(s.inner, s.width, bits), down(s.width, s.inner, bits),
        head(s.vocabulary, s.width, bits), x(s.tokens * s.width * 4, repeated(1.0f)), y(s.tokens * s.width * 4),
        qs(s.tokens * s.heads * s.head_size * 4), ks(s.tokens * s.kv_heads * s.head_size * 4), vs(s.tokens * s.kv_heads * s.head_size * 4),
        wide(s.tokens * s.inner * 4), wider(s.tokens * s.inner * 4), logits(s.tokens * s.vocabulary * 4), norm(s.width * 4, constants(0.1f)),
        positions(s.tokens * 4) {}

  int32_t normed(const bench_buffer &out) const {
    return aq_cuda_rms_norm(x.handle, s.tokens, s.width, norm.handle, 1e-6f, out.handle, stream);
  }
  int32_t turned(const bench_buffer &states, size_t heads) const {
    return aq_cuda_rotary(states.handle, positions.handle, s.tokens, heads, s.head_size, 1e6, stream);
  }
  int32_t block() const {
    return first_fault({normed(y), q.run(y, s.tokens, qs), k.run(y, s.tokens, ks), v.run(y, s.tokens, vs), turned(qs, s.heads),
                        turned(ks, s.kv_heads),
                        aq_cuda_attention(qs.handle, ks.handle, vs.handle, 0, 1, s.tokens, s.heads, s.kv_heads, s.head_size, 0, 0.09f,
                                          wide.handle, stream),
                        o.run(wide, s.tokens, y), aq_cuda_add(x.handle, y.handle, s.tokens * s.width, x.handle, stream), normed(y),
                        gate.run(y, s.tokens, wide), up.run(y, s.tokens, wider),
                        aq_cuda_silu_multiply(wide.handle, wider.handle, s.tokens * s.inner, wide.handle, stream),
                        down.run(wide, s.tokens, y), aq_cuda_add(x.handle, y.handle, s.tokens * s.width, x.handle, stream)});
  }
  int32_t run() const {
    int32_t status = AQ_OK;
    for (size_t i = 0; i < s.blocks && status == AQ_OK; i++) status = block();
    return status == AQ_OK ? first_fault({normed(y), head.run(y, s.tokens, logits)}) : status;
  }
  double weights() const {
    double all = 0;
    for (const step_layer *layer : {&q, &k, &v, &o, &gate, &up, &down}) all += (double)layer->rows * (double)layer->cols;
    return all * (double)s.blocks + (double)head.rows * (double)head.cols;
  }
  /* Milliseconds of cuBLAS for the products alone; 0 without it. */
  double cublas() const {
    double all = 0;
    for (const step_layer *layer : {&q, &k, &v, &o, &gate, &up, &down, &head}) {
      const double one = cublas_milliseconds(s.tokens, layer->rows, layer->cols);
      if (one <= 0) return 0;
      all += layer == &head ? one : one * (double)s.blocks;
    }
    return all;
  }
};

static void bench_step(const step_sizes &sizes) {
  double others = 0;
  for (int32_t bits : {16, 4, 2}) {
    const step_model model(sizes, bits);
    char what[80], goal[80];
    if (bits == 16) {
      others = model.cublas();
      if (others > 0) print_rates("cuBLAS, the step's products, bfloat16", others, 2 * model.weights(), 2 * model.weights() * (double)sizes.tokens);
    }
    snprintf(what, sizeof what, "a denoising step of %zu positions, %d bits", sizes.tokens, (int)bits);
    const double moved = model.weights() * bits / 8, milliseconds = moved / bench(what, moved, 2 * model.weights() * (double)sizes.tokens,
                                                                                  [&] { return model.run(); }) * 1e3;
    snprintf(goal, sizeof goal, "a denoising step, %d bits, of cuBLAS's products in bfloat16", (int)bits);
    print_goal(goal, others > 0 ? others / milliseconds : NAN, 0.6);
  }
}
