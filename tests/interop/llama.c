/* llama.c: llama.cpp's library as a reader of GGUF files, for tests; a process of its own, because ggml aborts.
 *
 *   llama BINS logits MODEL TOKENS BATCH OUT   f32 logits of every position; TOKENS: i32[batch, tokens]
 *   llama BINS tokenize MODEL TEXT SPECIAL     ids on stdout
 *   llama BINS dequantize MODEL OUT            f32 weights of every tensor, and "name type sizes" on stdout
 *
 * Declarations as in llama.h, ggml.h and gguf.h of the version that package.json pins (llama.cpp v0.5.0). */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct llama_model_params {
  void *devices, *overrides;
  int32_t n_gpu_layers, split_mode, load_mode, lazy_mode, main_gpu;
  const float *tensor_split;
  void *progress, *progress_data, *kv_overrides;
  bool vocab_only, check_tensors, use_extra_bufts, no_host, no_alloc, load_mtp;
};
struct llama_context_params {
  uint32_t n_ctx, n_batch, n_ubatch, n_seq_max, n_rs_seq, n_outputs_max, n_outputs_max_per_seq;
  int32_t n_threads, n_threads_batch;
  int32_t ctx_type, rope_scaling, pooling, attention, flash_attn;
  float rope_base, rope_scale, yarn_ext, yarn_attn, yarn_fast, yarn_slow;
  uint32_t yarn_orig;
  float defrag;
  void *cb_eval, *cb_eval_data;
  int32_t type_k, type_v;
  void *abort, *abort_data;
  bool embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified;
  void *samplers;
  size_t n_samplers;
  void *ctx_other;
};
struct llama_batch {
  int32_t n_tokens, *token;
  float *embd;
  int32_t *pos, *n_seq_id, **seq_id;
  int8_t *logits;
};
struct gguf_init_params {
  bool no_alloc;
  void **ctx;
};
struct ggml_type_traits {
  const char *name;
  int64_t block, interleave;
  size_t size;
  bool is_quantized;
  void (*to_float)(const void *, float *, int64_t);
  void (*from_float)(const float *, void *, int64_t);
};

void ggml_backend_load_all_from_path(const char *);
void llama_log_set(void *, void *);
void llama_backend_init(void);
struct llama_model_params llama_model_default_params(void);
struct llama_context_params llama_context_default_params(void);
void *llama_model_load_from_file(const char *, struct llama_model_params);
void *llama_init_from_model(void *, struct llama_context_params);
const void *llama_model_get_vocab(const void *);
int32_t llama_vocab_n_tokens(const void *);
int32_t llama_tokenize(const void *, const char *, int32_t, int32_t *, int32_t, bool, bool);
struct llama_batch llama_batch_init(int32_t, int32_t, int32_t);
int32_t llama_decode(void *, struct llama_batch);
float *llama_get_logits(void *);
void *gguf_init_from_file(const char *, struct gguf_init_params);
int64_t gguf_get_n_tensors(const void *);
const char *gguf_get_tensor_name(const void *, int64_t);
int32_t gguf_get_tensor_type(const void *, int64_t);
void *ggml_get_tensor(void *, const char *);
void *ggml_get_data(const void *);
int64_t ggml_nelements(const void *);
const struct ggml_type_traits *ggml_get_type_traits(int32_t);

static int fail(const char *what) {
  fprintf(stderr, "%s\n", what);
  return 1;
}

static void log_errors(int level, const char *text, void *data) {
  (void)data;
  if (level >= 4) fputs(text, stderr);
}

static int logits(void *model, const char *tokens_path, int batch, const char *out_path) {
  FILE *file = fopen(tokens_path, "rb");
  if (file == NULL) return fail("no tokens");
  static int32_t ids[1 << 16];
  const int total = (int)fread(ids, 4, 1 << 16, file), tokens = total / batch;
  fclose(file);
  struct llama_context_params p = llama_context_default_params();
  p.n_ctx = p.n_batch = p.n_ubatch = (uint32_t)tokens;
  p.n_threads = p.n_threads_batch = 1;
  p.flash_attn = 0; /* which rounds to half precision */
  void *context = llama_init_from_model(model, p);
  if (context == NULL) return fail("no context");
  const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
  FILE *out = fopen(out_path, "wb");
  for (int b = 0; b < batch; b++) {
    struct llama_batch one = llama_batch_init(tokens, 0, 1);
    one.n_tokens = tokens;
    for (int i = 0; i < tokens; i++) {
      one.token[i] = ids[b * tokens + i];
      one.pos[i] = i;
      one.n_seq_id[i] = 1;
      one.seq_id[i][0] = 0;
      one.logits[i] = 1;
    }
    if (llama_decode(context, one) != 0) return fail("decode failed");
    fwrite(llama_get_logits(context), 4, (size_t)tokens * vocabulary, out);
  }
  return fclose(out);
}

static int tokenize(void *model, const char *text, bool special) {
  int32_t ids[4096];
  const int n = llama_tokenize(llama_model_get_vocab(model), text, (int32_t)strlen(text), ids, 4096, false, special);
  for (int i = 0; i < n; i++) printf("%d ", ids[i]);
  return 0;
}

static int dequantize(const char *path, const char *out_path) {
  void *tensors = NULL;
  void *file = gguf_init_from_file(path, (struct gguf_init_params){false, &tensors});
  if (file == NULL) return fail("not a GGUF file");
  FILE *out = fopen(out_path, "wb");
  for (int64_t i = 0; i < gguf_get_n_tensors(file); i++) {
    const char *name = gguf_get_tensor_name(file, i);
    const struct ggml_type_traits *traits = ggml_get_type_traits(gguf_get_tensor_type(file, i));
    void *tensor = ggml_get_tensor(tensors, name);
    const int64_t n = ggml_nelements(tensor);
    float *values = malloc((size_t)n * 4);
    if (gguf_get_tensor_type(file, i) == 0) memcpy(values, ggml_get_data(tensor), (size_t)n * 4);
    else traits->to_float(ggml_get_data(tensor), values, n);
    fwrite(values, 4, (size_t)n, out);
    free(values);
    printf("%s %s %lld\n", name, traits->name, (long long)n);
  }
  return fclose(out);
}

int main(int count, char **args) {
  if (count < 4) return fail("arguments");
  llama_log_set((void *)log_errors, NULL);
  ggml_backend_load_all_from_path(args[1]);
  if (strcmp(args[2], "dequantize") == 0) return dequantize(args[3], args[4]);
  llama_backend_init();
  struct llama_model_params p = llama_model_default_params();
  p.check_tensors = true;
  p.use_extra_bufts = false;
  void *model = llama_model_load_from_file(args[3], p);
  if (model == NULL) return fail("the model does not load");
  if (strcmp(args[2], "tokenize") == 0) return tokenize(model, args[4], args[5][0] == '1');
  return logits(model, args[4], atoi(args[5]), args[6]);
}
