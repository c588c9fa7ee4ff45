// Where ranks on one machine wait for each other, in memory that they share.

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "kernels.h"

// A wait is mostly for the other's share of the same work: to be woken takes longer than that.
enum { SPINS = 16384 };

// A rank's, on a line of the cache of its own.
typedef struct {
  _Atomic uint32_t turn;      // the latest that it has come to
  _Atomic uint32_t sleepers;  // ranks that wait to be woken for it
  char rest[56];
} Place;

static int has_come(Place *place, uint32_t turn) {
  return (int32_t)(atomic_load_explicit(&place->turn, memory_order_acquire) - turn) >= 0;
}

static void sleep_until(Place *place, uint32_t turn) {
  struct timespec second = {1, 0};  // whatever happens, it looks again
  atomic_fetch_add(&place->sleepers, 1);
  for (;;) {
    uint32_t seen = atomic_load(&place->turn);
    if ((int32_t)(seen - turn) >= 0) break;
    syscall(SYS_futex, &place->turn, FUTEX_WAIT, seen, &second, NULL, 0);
  }
  atomic_fetch_sub(&place->sleepers, 1);
}

// Returns when all `size` ranks have come to `turn`, which counts up by one, modulo 2^32. What they
// wrote before, this rank may read then.
EXPORT void octavo_meet(Place *places, long rank, long size, long turn, int threads) {
  (void)threads;
  uint32_t now = (uint32_t)turn;
  atomic_store(&places[rank].turn, now);
  if (atomic_load(&places[rank].sleepers))
    syscall(SYS_futex, &places[rank].turn, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
  for (long r = 0; r < size; r++) {
    int left = SPINS;
    while (!has_come(places + r, now) && left--) _mm_pause();
    if (!has_come(places + r, now)) sleep_until(places + r, now);
  }
}
