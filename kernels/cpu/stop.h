/* stop.h: whether a signal asks running kernels to stop. */
#ifndef AQ_STOP_H
#define AQ_STOP_H

#include "packed.h"

#if defined(__unix__) || defined(__APPLE__)
#define AQ_HAS_SIGNALS
#include <stdatomic.h>
/* The number of the signal that came; 0: none. */
extern _Atomic int32_t aq_stop_signal;

/* AQ_OK, or the status to leave with. A relaxed load: loops of some milliseconds may ask each time around. */
static inline int32_t aq_stopped(void) {
  const int32_t signal = atomic_load_explicit(&aq_stop_signal, memory_order_relaxed);
  return signal ? AQ_E_STOPPED - signal : AQ_OK;
}
#else
static inline int32_t aq_stopped(void) { return AQ_OK; }
#endif

#endif
