/* threads.c: threads.h over POSIX threads; one thread with AQ_NO_THREADS. */
#include "threads.h"

#if !defined(AQ_NO_THREADS)
#include <pthread.h>

#endif

typedef struct {
  aq_part_function run;
  const void *context;
  size_t begin, end, step;
  int32_t status;
} part;

static void *run_part(void *argument) {
  part *p = argument;
  p->status = aq_stopped();
  for (size_t at = p->begin; at < p->end && p->status == AQ_OK; at += p->step) {
    p->status = p->run(p->context, at, aq_min_size(p->end - at, p->step) + at);
    if (p->status == AQ_OK) p->status = aq_stopped();
  }
  return 0;
}

/* Below this many elements for each thread, starting one costs more than it saves. */
#define AQ_ELEMENTS_PER_THREAD 16384

/* Elements between two looks at the stop flag: some milliseconds. */
#define AQ_ELEMENTS_PER_LOOK (1 << 21)

size_t aq_thread_count(size_t units, size_t work, int32_t threads) {
#if defined(AQ_NO_THREADS)
  (void)units;
  (void)work;
  (void)threads;
  return 1;
#else
  const size_t wanted = threads < 1 ? 1 : aq_min_size((size_t)threads, AQ_MAX_THREADS);
  return aq_min_size(aq_min_size(wanted, units), work / AQ_ELEMENTS_PER_THREAD + 1);
#endif
}

int32_t aq_run_units(aq_part_function run, const void *context, size_t units, size_t work, int32_t threads) {
  const size_t looks = work / AQ_ELEMENTS_PER_LOOK + 1, step = (units - 1) / looks + 1;
#if !defined(AQ_NO_THREADS)
  const size_t count = aq_thread_count(units, work, threads);
  if (count > 1) {
    part parts[AQ_MAX_THREADS];
    pthread_t handles[AQ_MAX_THREADS];
    int started[AQ_MAX_THREADS];
    for (size_t i = 0; i < count; i++) {
      parts[i] = (part){run, context, units * i / count, units * (i + 1) / count, step, AQ_OK};
      started[i] = i > 0 && pthread_create(&handles[i], 0, run_part, &parts[i]) == 0;
    }
    int32_t status = AQ_OK;
    for (size_t i = 0; i < count; i++) {
      if (started[i])
        pthread_join(handles[i], 0);
      else
        run_part(&parts[i]); /* the caller's own share, and that of a thread that did not start */
      if (status == AQ_OK) status = parts[i].status;
    }
    return status;
  }
#endif
  (void)threads;
  part all = {run, context, 0, units, step, AQ_OK};
  run_part(&all);
  return all.status;
}
