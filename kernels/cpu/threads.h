/* threads.h: work shared out over threads. Every unit writes its own outputs, so the split is invisible. */
#ifndef AQ_THREADS_H
#define AQ_THREADS_H

#include "packed.h"
#include "stop.h"

/* Work is counted in elements of the functions that quantize, which take some nanoseconds each: starting a
 * thread costs 50 to 100 microseconds. This many multiply-adds, or elements of a pass over float32, take as
 * long as one. */
#define AQ_CHEAP 16

static inline size_t aq_work(double elements) { return elements < 0x1p31 ? (size_t)elements : (size_t)0x7fffffff; }

/* Runs units [begin, end). A thread's share comes in several calls where it takes long. */
typedef int32_t (*aq_part_function)(const void *context, size_t begin, size_t end);

/* How many of `threads` the work in `units` parts is worth. */
size_t aq_thread_count(size_t units, size_t work, int32_t threads);

/* Runs units [0, units) split into contiguous ranges, one a thread; the status of the first range that
 * failed. Stops between calls when a signal says so. */
int32_t aq_run_units(aq_part_function run, const void *context, size_t units, size_t work, int32_t threads);

#endif
