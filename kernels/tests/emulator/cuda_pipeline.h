/* cuda_pipeline.h of the emulator: a thread's copies into shared memory happen when it waits for them, and
 * not before, so that a wait that is missing or too early shows. */
#ifndef AQ_EMULATED_PIPELINE
#define AQ_EMULATED_PIPELINE

#include <cuda_runtime.h>

#include <deque>

namespace emulator {

struct pending_copy {
  void *to;
  const void *from;
  size_t bytes, group;
};

struct copies_of_thread {
  std::deque<pending_copy> waiting;
  size_t groups; /* committed */
};

inline copies_of_thread copies[1024];

}  // namespace emulator

inline void __pipeline_memcpy_async(void *to, const void *from, size_t bytes) {
  if ((uintptr_t)to % bytes || (uintptr_t)from % bytes || (bytes != 4 && bytes != 8 && bytes != 16))
    emulator::stop("an asynchronous copy of a wrong size or place");
  emulator::copies_of_thread &own = emulator::copies[threadIdx.x];
  own.waiting.push_back({to, from, bytes, own.groups});
}

inline void __pipeline_commit(void) { emulator::copies[threadIdx.x].groups++; }

/* Waits for all groups but the last `prior`. */
inline void __pipeline_wait_prior(size_t prior) {
  emulator::copies_of_thread &own = emulator::copies[threadIdx.x];
  while (!own.waiting.empty() && own.waiting.front().group + prior < own.groups) {
    const emulator::pending_copy &copy = own.waiting.front();
    memcpy(copy.to, copy.from, copy.bytes);
    own.waiting.pop_front();
  }
}

#endif
