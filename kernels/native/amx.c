// AMX instructions, matrix products built on them, and a self-check of this machine.
// Source: Intel's Architecture Instruction Set Extensions Programming Reference, chapter 3.
//
// This was developed without an AMX machine: tests/kernels/tile_trap.c emulates the instructions, and on AMX
// machines a child process runs the self-check before AMX is used.

#include "amx.h"

int amx_usable;

// If the header exists, the compiler and its assembler support the instructions.
#if defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define HAS_AMX
#endif
#endif

#ifdef HAS_AMX

#include <cpuid.h>
#include <errno.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

// GCC 12's intrinsics do not declare which memory they read, so that the compiler could move writes
// past them. These macros do.
#define TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t ::: "memory")
#define TILE_LOAD(t, from, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"(stride) : "memory")
#define TILE_STORE(t, to, stride) \
  __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"(stride) : "memory")
#define TILE_DOT(c, a, b) \
  __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory")

INLINE void load_config(const AmxConfig *config) {
  __asm__ volatile("ldtilecfg %0" ::"m"(*config) : "memory");
}

INLINE void store_config(AmxConfig *config) {
  __asm__ volatile("sttilecfg %0" : "=m"(*config)::"memory");
}

// Palette 1; every tile has 16 rows of 64 bytes.
static const AmxConfig ours = {{[0] = 1,   [16] = 64, [18] = 64, [20] = 64, [22] = 64, [24] = 64,
                                [26] = 64, [28] = 64, [30] = 64, [48] = 16, [49] = 16, [50] = 16,
                                [51] = 16, [52] = 16, [53] = 16, [54] = 16, [55] = 16}};

// oneDNN runs torch's products on these threads too, and may configure its tiles once per thread. So
// the previous configuration must be restored. Tile contents need not be preserved.
void amx_begin(AmxConfig *before) {
  store_config(before);
  load_config(&ours);
}

void amx_end(const AmxConfig *before) {
  if (before->bytes[0])
    load_config(before);
  else
    __asm__ volatile("tilerelease" ::: "memory");
}

// Computes R x Z tiles of C, in tiles 0 to 3; A is in 4 and 5, B in 6 and 7. R and Z are 1 or 2.
INLINE void block(const int R, const int Z, long k, const bf16 *a, long a_stride, const bf16 *b,
                  long b_stride, float *c, long c_stride, int adds) {
  long a_bytes = 2 * a_stride, b_bytes = 4 * b_stride, c_bytes = 4 * c_stride;
  float *below = c + AMX_ROWS * c_stride;
  if (adds) {
    TILE_LOAD(0, c, c_bytes);
    if (Z > 1) TILE_LOAD(1, c + 16, c_bytes);
    if (R > 1) TILE_LOAD(2, below, c_bytes);
    if (R > 1 && Z > 1) TILE_LOAD(3, below + 16, c_bytes);
  } else {
    TILE_ZERO(0);
    if (Z > 1) TILE_ZERO(1);
    if (R > 1) TILE_ZERO(2);
    if (R > 1 && Z > 1) TILE_ZERO(3);
  }
  for (long at = 0; at < k; at += AMX_DEPTH) {
    TILE_LOAD(4, a + at, a_bytes);
    TILE_LOAD(6, b + at * b_stride, b_bytes);
    TILE_DOT(0, 4, 6);
    if (Z > 1) {
      TILE_LOAD(7, b + at * b_stride + 32, b_bytes);
      TILE_DOT(1, 4, 7);
    }
    if (R > 1) {
      TILE_LOAD(5, a + AMX_ROWS * a_stride + at, a_bytes);
      TILE_DOT(2, 5, 6);
    }
    if (R > 1 && Z > 1) TILE_DOT(3, 5, 7);
  }
  TILE_STORE(0, c, c_bytes);
  if (Z > 1) TILE_STORE(1, c + 16, c_bytes);
  if (R > 1) TILE_STORE(2, below, c_bytes);
  if (R > 1 && Z > 1) TILE_STORE(3, below + 16, c_bytes);
}

// Rescales all rows before the first block, because a tile load of data just written stalls. Most
// rows' maximum has not changed, so that their factor is 1.
static void fade_rows(long m, long n, float *c, long c_stride, const float *fade) {
  for (long r = 0; r < m; r++)
    for (long i = 0; i < n && fade[r] != 1; i += 16) {
      float *at = c + r * c_stride + i;
      _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), _mm512_set1_ps(fade[r])));
    }
}

void amx_product(long m, long n, long k, const bf16 *a, long a_stride, const bf16 *b, long b_stride,
                 float *c, long c_stride, const float *fade) {
  if (fade) fade_rows(m, n, c, c_stride, fade);
  for (long i = 0; i < n; i += 32)
    for (long r = 0; r < m; r += 2 * AMX_ROWS) {
      const bf16 *rows = a + r * a_stride, *columns = b + 2 * i;
      float *to = c + r * c_stride + i;
      switch ((m - r > AMX_ROWS ? 2 : 0) + (n - i > 16)) {
        case 3: block(2, 2, k, rows, a_stride, columns, b_stride, to, c_stride, fade != 0); break;
        case 2: block(2, 1, k, rows, a_stride, columns, b_stride, to, c_stride, fade != 0); break;
        case 1: block(1, 2, k, rows, a_stride, columns, b_stride, to, c_stride, fade != 0); break;
        case 0: block(1, 1, k, rows, a_stride, columns, b_stride, to, c_stride, fade != 0); break;
      }
    }
}

// Operands of the self-check: small integers, so that every sum is exact.
enum { MAX_SIZE = 128, MAX_ROWS = 64 };
static bf16 check_a[MAX_ROWS * MAX_SIZE], check_b[MAX_SIZE * MAX_SIZE];
static float check_c[MAX_ROWS * MAX_SIZE];

static int a_number(long r, long i) { return (r * 7 + i * 5) % 13 - 6; }
static int b_number(long i, long j) { return (i * 3 + j * 11) % 17 - 8; }
static float c_number(long r, long j) { return (r + 2 * j) % 19 - 9; }

static bf16 narrow(float x) {
  union {
    float number;
    uint32_t bits;
  } each = {x};
  return each.bits >> 16;
}

// Returns whether C = A B and C = fade C + A B are exact.
static int multiplies(long m, long n, long k) {
  float fade[MAX_ROWS];
  for (long r = 0; r < m; r++) fade[r] = r % 3 ? 0.5f : 1;
  for (long i = 0; i < k; i++) {
    for (long r = 0; r < m; r++) check_a[r * k + i] = narrow(a_number(r, i));
    for (long j = 0; j < n; j++) check_b[i / 2 * 2 * n + 2 * j + i % 2] = narrow(b_number(i, j));
  }
  for (int adds = 0; adds < 2; adds++) {
    for (long r = 0; r < m; r++)
      for (long j = 0; j < n; j++) check_c[r * n + j] = c_number(r, j);
    amx_product(m, n, k, check_a, k, check_b, n, check_c, n, adds ? fade : 0);
    for (long r = 0; r < m; r++)
      for (long j = 0; j < n; j++) {
        float expected = adds ? c_number(r, j) * fade[r] : 0;
        for (long i = 0; i < k; i++) expected += a_number(r, i) * b_number(i, j);
        if (check_c[r * n + j] != expected) return 0;
      }
  }
  return 1;
}

// Checks blocks of all shapes, and that a previous configuration (none, or another) is restored.
static int computes(void) {
  static const AmxConfig other = {{[0] = 1, [16] = 32, [48] = 8}};
  AmxConfig before, after;
  for (int configured = 0; configured < 2; configured++) {
    if (configured) load_config(&other);
    amx_begin(&before);
    int right = configured || (multiplies(64, 32, 128) && multiplies(37, 48, 96));
    right = right && multiplies(5, 16, 32);
    amx_end(&before);
    store_config(&after);
    if (!right || __builtin_memcmp(&before, &after, sizeof before)) return 0;
  }
  return 1;
}

#ifdef OCTAVO_TRAPPED_AMX
enum { TRAPPED = 1 };  // built for tests/kernels/tile_trap.c, which handles SIGILL
#else
enum { TRAPPED = 0 };
#endif

// Returns whether the CPU has AMX and Linux, which requires a request, permits its use.
static int permitted(void) {
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
  enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  return d & AMX_BF16 && d & AMX_TILE &&
         syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

// Returns whether child `pid` exits with status 0 within about two seconds.
static int succeeds(pid_t pid) {
  const struct timespec pause = {0, 200000};
  int status = -1;
  for (int i = 0; i < 10000; i++) {
    if (waitpid(pid, &status, __WALL | WNOHANG) == pid) return status == 0;
    nanosleep(&pause, 0);
  }
  kill(pid, SIGKILL);
  while (waitpid(pid, &status, __WALL) < 0 && errno == EINTR) continue;
  return 0;
}

// Returns 1 if AMX products are exact on this machine, 0 if there is no AMX or no child could be
// started, -1 if they are wrong. The check runs in a child, which it may crash. The child is created
// by plain clone, so that no fork handlers of other libraries run, and without an exit signal, so that
// no other code waits for it. All signals are blocked; a blocked signal caused by an instruction kills
// the child.
EXPORT int octavo_check_amx(void) {
  if (!TRAPPED && !permitted()) return 0;
  sigset_t all, before;
  sigfillset(&all);
  if (TRAPPED) sigdelset(&all, SIGILL);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pid_t pid = syscall(SYS_clone, 0, 0, 0, 0, 0);
  if (pid == 0) {
    prctl(PR_SET_DUMPABLE, 0);  // a crash here is expected: no core file
    _exit(computes() ? 0 : 1);
  }
  pthread_sigmask(SIG_SETMASK, &before, 0);
  if (pid < 0) return 0;
  amx_usable = succeeds(pid);
  return amx_usable ? 1 : -1;
}

#else

void amx_begin(AmxConfig *before) { (void)before; }
void amx_end(const AmxConfig *before) { (void)before; }
void amx_product(long m, long n, long k, const bf16 *a, long a_stride, const bf16 *b, long b_stride,
                 float *c, long c_stride, const float *fade) {}
EXPORT int octavo_check_amx(void) { return 0; }

#endif
