// Barrier of the ranks on one machine, in shared memory.

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "kernels.h"

// Spins before sleeping: ranks mostly arrive together, and a wake-up takes longer than the wait.
enum { SPINS = 16384 };

// State of a rank, on its own cache line.
typedef struct {
  _Atomic uint32_t turn;      // latest turn that it has reached
  _Atomic uint32_t sleepers;  // ranks that sleep until it advances
  char rest[56];
} RankState;

static int has_reached(RankState *state, uint32_t turn) {
  return (int32_t)(atomic_load_explicit(&state->turn, memory_order_acquire) - turn) >= 0;
}

static void sleep_until(RankState *state, uint32_t turn) {
  struct timespec second = {1, 0};  // recheck, in case of a lost wake-up
  atomic_fetch_add(&state->sleepers, 1);
  for (;;) {
    uint32_t seen = atomic_load(&state->turn);
    if ((int32_t)(seen - turn) >= 0) break;
    syscall(SYS_futex, &state->turn, FUTEX_WAIT, seen, &second, NULL, 0);
  }
  atomic_fetch_sub(&state->sleepers, 1);
}

// Returns when all `size` ranks have reached `turn`, which increases by one per call, modulo 2^32.
// Their earlier writes are then visible to this rank.
EXPORT void octavo_meet(RankState *states, long rank, long size, long turn, int threads) {
  (void)threads;
  uint32_t now = (uint32_t)turn;
  atomic_store(&states[rank].turn, now);
  if (atomic_load(&states[rank].sleepers))
    syscall(SYS_futex, &states[rank].turn, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
  for (long r = 0; r < size; r++) {
    int left = SPINS;
    while (!has_reached(states + r, now) && left--) _mm_pause();
    if (!has_reached(states + r, now)) sleep_until(states + r, now);
  }
}
