/* cuda_runtime.h of the emulator: as much of CUDA as the kernels use, on the host, so that the library's
 * own sources - launches, shared memory, shuffles, barriers - run without a device and under the host's
 * sanitizers.
 *
 * A block's threads are fibers of one host thread. Between two barriers each runs until it waits, in an
 * order that changes; in some blocks all warps keep step, in others each runs as far as it can before the
 * next one does. So a missing barrier gives wrong results. Threads that wait for ones that never come end
 * the program, and so do lanes of a warp that meet at different barriers. Shared memory of a dynamic size
 * begins as NaN.
 *
 * What a stream has to copy waits until its next launch or until somebody waits for it: as late as a device
 * may do it, so that an event that is not waited for, or memory that is used again too soon, gives wrong
 * results.
 *
 * AQ_EMULATED_BYTES in the environment is the device's memory, 1 GiB by default; AQ_EMULATED_LAUNCHES and
 * AQ_EMULATED_COPIES are the numbers of launches and of copies from the host after which the device is lost;
 * AQ_EMULATED_PINNED is the most bytes of the host that can be pinned at once; AQ_EMULATED_FAILS is the one
 * allocation that fails, counted from when the variable changed.
 *
 * What this does not show: speed, limits of a device, races within one order of threads, the devices' own
 * arithmetic. */
#ifndef AQ_EMULATED
#define AQ_EMULATED

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <deque>
#include <functional>
#include <map>
#include <set>
#include <type_traits>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

inline struct one_dimension {
  unsigned x;
} threadIdx, blockIdx, blockDim, gridDim;

/* Fibers ----------------------------------------------------------------------------------------------- */

#if defined(__x86_64__)
/* Leaves one stack for another, with what a call keeps: swapcontext would ask the system each time. */
extern "C" void aq_emulator_switch(void **from, void *to);
__asm__(
    ".weak aq_emulator_switch\n"
    "aq_emulator_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n");
#else
#include <ucontext.h>
#endif

namespace emulator {

#define AQ_FIBER_STACK ((size_t)256 << 10)

#if defined(__x86_64__)
struct place {
  void *stack;
};
inline void change(place &from, place &to) { aq_emulator_switch(&from.stack, to.stack); }
inline void begin_at(place &at, uint8_t *stack, void (*enter)(void)) {
  void **top = (void **)(stack + AQ_FIBER_STACK - 64); /* a multiple of sixteen, as before a call */
  *--top = 0;                                          /* where it would return to */
  *--top = (void *)enter;
  at.stack = top - 6;
}
#else
struct place {
  ucontext_t context;
};
inline void change(place &from, place &to) { swapcontext(&from.context, &to.context); }
inline void begin_at(place &at, uint8_t *stack, void (*enter)(void)) {
  getcontext(&at.context);
  at.context.uc_stack.ss_sp = stack;
  at.context.uc_stack.ss_size = AQ_FIBER_STACK;
  at.context.uc_link = 0;
  makecontext(&at.context, enter, 0);
}
#endif

enum waiting { READY, AT_WARP, AT_BLOCK, DONE };
enum warp_barrier { SYNC, EXCHANGE };

struct fiber {
  place at;
  unsigned thread, turn;
  waiting state;
  warp_barrier barrier; /* the last one, and how many there were */
  size_t barriers;
};

#define AQ_SHARED_LIMIT ((size_t)227 << 10)

struct stack_list : std::vector<uint8_t *> {
  ~stack_list() {
    for (uint8_t *stack : *this) free(stack);
  }
};

inline std::vector<fiber> fibers;
inline stack_list stacks;
inline place scheduler;
inline fiber *current;
inline const std::function<void()> *body;
inline uint64_t order;
inline unsigned block_votes;
alignas(128) inline uint8_t dynamic[AQ_SHARED_LIMIT];
inline uint8_t exchanged[32][2][32][64]; /* [warp][turn][lane] */

[[noreturn]] inline void stop(const char *why) {
  fprintf(stderr, "CUDA emulator: %s (block %u, thread %u)\n", why, blockIdx.x, threadIdx.x);
  abort();
}

inline void enter(void) {
  (*body)();
  current->state = DONE;
  change(current->at, scheduler);
}

inline void wait(waiting state) {
  fiber *own = current;
  own->state = state;
  change(own->at, scheduler);
}

inline void wait_for_warp(warp_barrier barrier) {
  current->barrier = barrier;
  current->barriers++;
  wait(AT_WARP);
}

/* Those at a barrier go on once all that are left of the warp or block are there. */
inline bool release(size_t begin, size_t end, waiting state) {
  size_t there = 0;
  for (size_t i = begin; i < end; i++) {
    if (fibers[i].state != state && fibers[i].state != DONE) return false;
    there += fibers[i].state == state;
  }
  const fiber *first = 0;
  for (size_t i = begin; i < end && there; i++) {
    if (fibers[i].state != state) continue;
    if (!first) first = &fibers[i];
    if (state == AT_WARP && (fibers[i].barrier != first->barrier || fibers[i].barriers != first->barriers))
      stop("lanes of a warp at different barriers");
    fibers[i].state = READY;
  }
  return there > 0;
}

inline void run_block(size_t threads) {
  for (size_t i = 0; i < threads; i++) {
    fiber &f = fibers[i];
    f.thread = (unsigned)i;
    f.turn = 0;
    f.barriers = 0;
    f.state = READY;
    begin_at(f.at, stacks[i], enter);
  }
  order = order * 6364136223846793005u + 1442695040888963407u;
  const bool far = order >> 62 & 1; /* a warp runs as far as it can, or all keep step */
  for (size_t left = threads; left > 0;) {
    bool moved = false;
    order = order * 6364136223846793005u + 1442695040888963407u;
    const size_t warps = (threads - 1) / 32 + 1, first = (size_t)(order >> 33);
    const bool backwards = order >> 63;
    for (size_t w = 0; w < warps; w++) {
      const size_t warp = (backwards ? first % warps + warps - w : first + w) % warps * 32;
      const size_t lanes = warp + 32 < threads ? 32 : threads - warp;
      for (bool again = true; again;) {
        again = false;
        for (size_t k = 0; k < lanes; k++) {
          fiber &f = fibers[warp + (backwards ? first % lanes + lanes - k : first + k) % lanes];
          if (f.state != READY) continue;
          moved = again = true;
          current = &f;
          threadIdx.x = f.thread;
          change(scheduler, f.at);
          if (f.state == DONE) left--;
        }
        const bool released = release(warp, warp + lanes, AT_WARP);
        moved |= released;
        again = far && released;
      }
    }
    moved |= release(0, threads, AT_BLOCK);
    if (!moved && left > 0) stop("threads wait for others that do not come");
  }
}

/* A number of the environment. */
inline size_t setting(const char *name, size_t otherwise) {
  const char *value = getenv(name);
  return value ? (size_t)strtoull(value, 0, 10) : otherwise;
}

inline size_t launches, copies_up;
inline bool lost(void) {
  return launches > setting("AQ_EMULATED_LAUNCHES", SIZE_MAX) || copies_up > setting("AQ_EMULATED_COPIES", SIZE_MAX);
}

/* What a stream has still to do, in order. */
struct stream {
  std::deque<std::function<void()>> waiting;
  size_t put, done; /* so far */
  void add(const std::function<void()> &work) { waiting.push_back(work), put++; }
  void run(size_t until) {
    while (done < until) {
      const std::function<void()> work = waiting.front();
      waiting.pop_front();
      done++;
      work();
    }
  }
};
inline std::set<stream *> streams;
inline void run_all(void) {
  for (stream *own : streams) own->run(own->put);
}

/* A place in a stream, and the time at which it was reached. */
struct event {
  stream *on;
  size_t at;
  double milliseconds;
  void wait(void) {
    if (on) on->run(at);
  }
};

inline void launch(stream *on, unsigned blocks, size_t threads, size_t shared, const std::function<void()> &run) {
  if (threads == 0 || threads > 1024 || shared > AQ_SHARED_LIMIT || blocks == 0) stop("a launch that no device takes");
  on->run(on->put);
  launches++;
  if (lost()) return;
  if (fibers.size() < threads) fibers.resize(1024);
  while (stacks.size() < threads) stacks.push_back((uint8_t *)aligned_alloc(64, AQ_FIBER_STACK));
  body = &run;
  gridDim.x = blocks;
  blockDim.x = (unsigned)threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
    block_votes = 0;
    memset(dynamic, 0xff, shared);
    run_block(threads);
  }
  body = 0;
}

/* What a lane of the own warp has; `at` is the same in all lanes' calls before the next exchange. Two places
 * take turns: whoever writes one again has met all others in between. */
template <class T>
struct exchange {
  static_assert(sizeof(T) <= 64, "exchanged at once");
  uint8_t (*lanes)[64];
  explicit exchange(const T &own) {
    lanes = exchanged[threadIdx.x / 32][current->turn++ % 2];
    memcpy(lanes[threadIdx.x % 32], &own, sizeof(T));
    wait_for_warp(EXCHANGE);
  }
  T of(unsigned lane) const {
    T value;
    memcpy(&value, lanes[lane], sizeof(T));
    return value;
  }
};

}  // namespace emulator

inline void __syncthreads(void) { emulator::wait(emulator::AT_BLOCK); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulator::wait_for_warp(emulator::SYNC); }
inline int __syncthreads_or(int vote) {
  if (vote) emulator::block_votes = 1;
  __syncthreads();
  const int any = (int)emulator::block_votes;
  __syncthreads();
  emulator::block_votes = 0;
  __syncthreads();
  return any;
}

template <class T>
inline T __shfl_sync(unsigned, T value, int lane) {
  return emulator::exchange<T>(value).of((unsigned)lane % 32);
}

template <class T>
inline T __shfl_xor_sync(unsigned, T value, int distance) {
  return emulator::exchange<T>(value).of((threadIdx.x % 32) ^ (unsigned)distance);
}

inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  const emulator::exchange<unsigned> all(value);
  unsigned any = 0;
  for (unsigned lane = 0; lane < 32; lane++) any |= all.of(lane);
  return any;
}

template <class T>
inline T atomicOr(T *at, T value) {
  const T before = *at;
  *at |= value;
  return before;
}

/* Products of bytes and their sum. */
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t sum) {
  for (int k = 0; k < 4; k++) sum += (a >> 8 * k & 255) * (b >> 8 * k & 255);
  return sum;
}
inline int __clz(int value) { return value ? __builtin_clz((unsigned)value) : 32; }

/* Runtime ---------------------------------------------------------------------------------------------- */

typedef int cudaError_t;
enum {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInitializationError = 3,
  cudaErrorInsufficientDriver = 35,
  cudaErrorDevicesUnavailable = 46,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};
enum { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum { cudaDevAttrClockRate = 13 };
enum { cudaHostAllocDefault = 0, cudaEventDisableTiming = 2 };
enum { cudaStreamNonBlocking = 1, cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
typedef emulator::stream *cudaStream_t;
typedef emulator::event *cudaEvent_t;
struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  size_t totalGlobalMem;
};

inline const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory"
         : error == cudaErrorLaunchFailure  ? "the device was lost"
                                            : "emulated error";
}
inline cudaError_t cudaGetLastError(void) { return emulator::lost() ? cudaErrorLaunchFailure : cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int *version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int *version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int) {
  *properties = {"emulator on the host, no GPU", 0, 0, 1, (size_t)1 << 30};
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, int, int) { return *value = 0, cudaSuccess; }
/* Whether this allocation is the one that fails. */
inline bool allocation_fails(void) {
  static size_t named, count;
  const size_t now = emulator::setting("AQ_EMULATED_FAILS", 0);
  if (now != named) named = now, count = 0;
  return now > 0 && ++count == now;
}
/* Allocations have their size in front. */
inline size_t allocated;
inline cudaError_t cudaMalloc(void **data, size_t bytes) {
  if (allocation_fails()) return cudaErrorMemoryAllocation;
  if (bytes > emulator::setting("AQ_EMULATED_BYTES", (size_t)1 << 30) - allocated) return cudaErrorMemoryAllocation;
  uint8_t *block = (uint8_t *)aligned_alloc(256, 256 + (bytes + 255) / 256 * 256);
  if (!block) return cudaErrorMemoryAllocation;
  allocated += bytes;
  memcpy(block, &bytes, sizeof bytes);
  *data = memset(block + 256, 0xff, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void *data) {
  if (!data) return cudaSuccess;
  emulator::run_all();
  size_t bytes;
  memcpy(&bytes, (uint8_t *)data - 256, sizeof bytes);
  allocated -= bytes;
  free((uint8_t *)data - 256);
  return cudaSuccess;
}
inline std::map<const uint8_t *, size_t> pinned;
inline cudaError_t cudaHostAlloc(void **data, size_t bytes, unsigned) {
  *data = bytes <= emulator::setting("AQ_EMULATED_PINNED", SIZE_MAX) && !allocation_fails() ? malloc(bytes) : 0;
  if (*data) pinned[(const uint8_t *)*data] = bytes;
  return *data ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFreeHost(void *data) {
  emulator::run_all();
  pinned.erase((const uint8_t *)data);
  return free(data), cudaSuccess;
}
inline bool is_pinned(const void *data) {
  auto above = pinned.upper_bound((const uint8_t *)data);
  return above != pinned.begin() && (const uint8_t *)data < std::prev(above)->first + std::prev(above)->second;
}
/* Copies to and from memory that is not pinned are done when the call returns. */
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, cudaStream_t on) {
  emulator::copies_up += kind == cudaMemcpyHostToDevice;
  if (emulator::lost()) return cudaErrorLaunchFailure;
  on->add([=] { memcpy(to, from, bytes); });
  const bool waits = kind != cudaMemcpyDeviceToDevice && !is_pinned(kind == cudaMemcpyHostToDevice ? from : to);
  if (waits) on->run(on->put);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t on) {
  return on->add([=] { memset(to, value, bytes); }), cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *on, unsigned) {
  emulator::streams.insert(*on = new emulator::stream());
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t on) { return on->run(on->put), cudaGetLastError(); }
inline cudaError_t cudaStreamDestroy(cudaStream_t on) {
  on->run(on->put);
  emulator::streams.erase(on);
  return delete on, cudaSuccess;
}
template <class F>
inline cudaError_t cudaFuncSetAttribute(F *, int, int bytes) {
  return (size_t)bytes > AQ_SHARED_LIMIT ? cudaErrorInvalidValue : cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
  return *event = new emulator::event(), cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return emulator::run_all(), delete event, cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) { return event->wait(), cudaGetLastError(); }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t on) {
  on->add([=] {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->milliseconds = (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
  });
  event->on = on;
  event->at = on->put;
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t on, cudaEvent_t event, unsigned) {
  return on->add([place = *event]() mutable { place.wait(); }), cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
  return *milliseconds = (float)(to->milliseconds - from->milliseconds), cudaSuccess;
}

#endif
