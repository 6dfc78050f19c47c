/* stop.c: the handler behind aq_catch_signals. */
#define _POSIX_C_SOURCE 200809L
#include "stop.h"

#if defined(AQ_HAS_SIGNALS)
#include <signal.h>
#include <time.h>
#include <unistd.h>

_Atomic int32_t aq_stop_signal;

static const int numbers[] = {SIGHUP, SIGINT, SIGTERM};
enum { COUNT = sizeof numbers / sizeof *numbers };
static struct sigaction before[COUNT];
static int caught[COUNT];
static int32_t depth;

/* Signals this soon after the first one are the same: a terminal and a launcher both send them. */
#define AQ_SAME_MILLISECONDS 100
static _Atomic int64_t first_at;

static int64_t milliseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void on_signal(int number, siginfo_t *info, void *context) {
  int32_t none = 0;
  if (!atomic_compare_exchange_strong(&aq_stop_signal, &none, number)) {
    if (milliseconds() - atomic_load(&first_at) < AQ_SAME_MILLISECONDS) return;
    _exit(128 + number);
  }
  atomic_store(&first_at, milliseconds());
  for (int i = 0; i < COUNT; i++) {
    if (numbers[i] != number) continue;
    if (before[i].sa_flags & SA_SIGINFO)
      before[i].sa_sigaction(number, info, context);
    else
      before[i].sa_handler(number);
  }
}

static int is_handled(const struct sigaction *action) {
  return (action->sa_flags & SA_SIGINFO) || (action->sa_handler != SIG_DFL && action->sa_handler != SIG_IGN);
}

int32_t aq_catch_signals(int32_t on) {
  int32_t count = 0;
  if (on)
    depth++;
  else if (depth == 0 || --depth > 0)
    return AQ_OK;
  for (int i = 0; i < COUNT; i++) {
    struct sigaction now;
    if (sigaction(numbers[i], 0, &now) != 0) continue;
    if (on) {
      if (!caught[i] && is_handled(&now)) {
        caught[i] = 1;
        before[i] = now;
        now.sa_sigaction = on_signal;
        now.sa_flags |= SA_SIGINFO;
        sigaction(numbers[i], &now, 0);
      }
      count += caught[i];
    } else {
      if (caught[i] && (now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_signal) sigaction(numbers[i], &before[i], 0);
      caught[i] = 0;
    }
  }
  if (!on) atomic_store(&aq_stop_signal, 0);
  return count;
}
#else
int32_t aq_catch_signals(int32_t on) {
  (void)on;
  return AQ_OK;
}
#endif

int32_t aq_stop_status(void) { return aq_stopped(); }
