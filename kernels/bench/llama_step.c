/* llama_step.c: a step of llama.cpp's library for the bench: one pass over a diffusion model's positions, all
 * logits wanted. Structures that the library takes by value are larger here than there: defaults are filled
 * in by the library itself, and only their first fields, which have stood for years, are set. The bench
 * compiles it when it runs. */
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include "../include/arrowquant.h"

typedef struct {
  uint32_t n_ctx, n_batch, n_ubatch, rest[509];
} parameters;

typedef struct { /* llama_batch */
  int32_t n_tokens;
  int32_t *token;
  float *embd;
  int32_t *pos;
  int32_t *n_seq_id;
  int32_t **seq_id;
  int8_t *logits;
} batch_of;

typedef struct {
  void *library, *model, *context;
  batch_of batch;
} session;

static void be_quiet(int level, const char *text, void *data) {
  (void)level;
  (void)text;
  (void)data;
}

/* Functions of the library by name; a cast of dlsym's result is not ISO C. */
#define FOUND(result, name, ...)                                        \
  result (*name)(__VA_ARGS__) = 0;                                      \
  do {                                                                  \
    void *found = dlsym(library, #name);                                \
    if (!found) return -1;                                              \
    __builtin_memcpy(&name, &found, sizeof name);                       \
  } while (0)

/* Opens a model: 0, or -1 where the library lacks something, -2 where it refuses the model. `opened` is given
 * to llama_step and llama_close. */
AQ_API int32_t llama_open(const char *ggml, const char *llama, const char *folder, const char *path, int32_t tokens,
                          int32_t threads, void **opened) {
  void *library = dlopen(ggml, RTLD_NOW | RTLD_GLOBAL);
  if (!library) return -1;
  FOUND(void, ggml_backend_load_all_from_path, const char *);
  library = dlopen(llama, RTLD_NOW | RTLD_GLOBAL);
  if (!library) return -1;
  FOUND(void, llama_log_set, void (*)(int, const char *, void *), void *);
  FOUND(parameters, llama_model_default_params, void);
  FOUND(parameters, llama_context_default_params, void);
  FOUND(void *, llama_model_load_from_file, const char *, parameters);
  FOUND(void *, llama_init_from_model, void *, parameters);
  FOUND(void, llama_set_n_threads, void *, int32_t, int32_t);
  FOUND(batch_of, llama_batch_init, int32_t, int32_t, int32_t);
  llama_log_set(be_quiet, 0);
  ggml_backend_load_all_from_path(folder);
  session *s = calloc(1, sizeof *s);
  if (!s) return -1;
  s->library = library;
  s->model = llama_model_load_from_file(path, llama_model_default_params());
  if (!s->model) return free(s), -2;
  parameters context = llama_context_default_params();
  context.n_ctx = context.n_batch = context.n_ubatch = (uint32_t)tokens;
  s->context = llama_init_from_model(s->model, context);
  if (!s->context) return free(s), -2;
  llama_set_n_threads(s->context, threads, threads);
  s->batch = llama_batch_init(tokens, 0, 1);
  for (int32_t i = 0; i < tokens; i++) {
    s->batch.pos[i] = i;
    s->batch.n_seq_id[i] = 1;
    s->batch.seq_id[i][0] = 0;
    s->batch.logits[i] = 1;
  }
  s->batch.n_tokens = tokens;
  *opened = s;
  return 0;
}

/* Runs the tokens that llama_open was told of and copies `count` logits. 0, or what the library says. */
AQ_API int32_t llama_step(void *const *opened, const int32_t *tokens, float *logits, int64_t count) {
  session *s = *opened;
  void *library = s->library;
  FOUND(int32_t, llama_decode, void *, batch_of);
  FOUND(float *, llama_get_logits, void *);
  for (int32_t i = 0; i < s->batch.n_tokens; i++) s->batch.token[i] = tokens[i];
  const int32_t status = llama_decode(s->context, s->batch);
  if (status == 0 && count > 0) __builtin_memcpy(logits, llama_get_logits(s->context), (size_t)count * sizeof *logits);
  return status;
}

AQ_API int32_t llama_close(void **opened) {
  session *s = *opened;
  void *library = s->library;
  FOUND(void, llama_batch_free, batch_of);
  FOUND(void, llama_free, void *);
  FOUND(void, llama_model_free, void *);
  llama_batch_free(s->batch);
  llama_free(s->context);
  llama_model_free(s->model);
  free(s);
  *opened = 0;
  return 0;
}
