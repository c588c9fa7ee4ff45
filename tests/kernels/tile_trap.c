// Plays AMX on a processor without it: each of its instructions there is a SIGILL, whose handler decodes
// it from the program's own bytes and does what Intel's manual says (Instruction Set Extensions
// Programming Reference, chapter 3), or tells why the processor would refuse it and lets it kill.

#define _GNU_SOURCE  // the names of registers
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];  // of a row of each tile
  uint8_t rows[16];
} Config;

enum { TILES = 8, MOST_ROWS = 16, MOST_BYTES = 64 };

static _Thread_local Config config;
static _Thread_local uint8_t tiles[TILES][MOST_ROWS][MOST_BYTES];
static struct sigaction before;

// What goes wrong: 1, a product of one tile is off by a bit; 2, any product kills; 3, it never ends;
// 4, tiles cannot be configured again.
int trap_fault;
long trap_count;

// An instruction: VEX with three bytes, ModRM and what follows.
typedef struct {
  int opcode, prefix, mod, reg, rm, vvvv;
  uint8_t *address;
  long stride, length;
} Instruction;

static const int ORDER[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static int decode(const uint8_t *at, const greg_t *gregs, Instruction *i) {
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || at[2] & 0x84) return 0;  // 0F38, W0, 128 bits
  int r = !(at[1] & 0x80), x = !(at[1] & 0x40), b = !(at[1] & 0x20);
  i->prefix = at[2] & 3;  // none, 66, F3, F2
  i->vvvv = ~at[2] >> 3 & 15;
  i->opcode = at[3];
  i->mod = at[4] >> 6;
  i->reg = (at[4] >> 3 & 7) + 8 * r;
  i->rm = (at[4] & 7) + 8 * b;
  i->address = 0;
  i->stride = 0;
  const uint8_t *end = at + 5;
  if (i->mod != 3) {
    int base = i->rm, without = 0;
    if ((at[4] & 7) == 4) {
      int index = (*end >> 3 & 7) + 8 * x;
      if (index != 4) i->stride = gregs[ORDER[index]] << (*end >> 6);
      base = (*end & 7) + 8 * b;
      without = (*end & 7) == 5 && i->mod == 0;
      end++;
    }
    int relative = (at[4] & 7) == 5 && i->mod == 0;
    int32_t offset = 0;
    if (i->mod == 1) offset = (int8_t)*end++;
    if (i->mod == 2 || relative || without) memcpy(&offset, end, 4), end += 4;
    if (relative)
      i->address = (uint8_t *)end + offset;
    else
      i->address = (uint8_t *)(without ? 0 : gregs[ORDER[base]]) + offset;
  }
  i->length = end - at;
  return 1;
}

static const char *refuses(const Config *c) {
  if (c->palette != 1) return "an unknown palette";
  for (int i = 0; i < 14; i++)
    if (c->reserved[i]) return "reserved bytes of the configuration";
  for (int t = 0; t < 16; t++) {
    if (t >= TILES && (c->rows[t] || c->bytes[t])) return "more tiles than there are";
    if (c->rows[t] > MOST_ROWS || c->bytes[t] > MOST_BYTES) return "a tile that is too large";
    if (!c->rows[t] != !c->bytes[t]) return "a tile with rows or columns alone";
  }
  return 0;
}

static float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? x * 0 : x; }

static float widened(const uint8_t *at) {  // of a bfloat16
  uint32_t bits = (at[0] | at[1] << 8) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return flushed(x);
}

static float multiply_add(float sum, float a, float b) { return flushed(__builtin_fmaf(a, b, sum)); }

// Even and odd numbers of the pairs are summed apart, then both and what was there.
static void dot(int to, int a, int b) {
  for (int m = 0; m < config.rows[to]; m++)
    for (int n = 0; n < config.bytes[to] / 4; n++) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < config.bytes[a] / 4; k++) {
        const uint8_t *left = tiles[a][m] + 4 * k, *right = tiles[b][k] + 4 * n;
        even = multiply_add(even, widened(left), widened(right));
        odd = multiply_add(odd, widened(left + 2), widened(right + 2));
      }
      memcpy(&sum, tiles[to][m] + 4 * n, 4);
      sum = flushed(flushed(sum) + flushed(even + odd));
      if (trap_fault == 1 && m == 3 && n == 5) sum = flushed(sum * (1 + 0x1p-23f));
      memcpy(tiles[to][m] + 4 * n, &sum, 4);
    }
}

static const char *unfit(int t) {
  if (t >= TILES) return "a tile's number";
  if (!config.palette) return "tiles that are not configured";
  return config.rows[t] ? 0 : "a tile that is not configured";
}

static const char *multiply(int to, int a, int b) {
  const char *why = unfit(to);
  if (!why) why = unfit(a);
  if (!why) why = unfit(b);
  if (why) return why;
  if (to == a || to == b || a == b) return "a tile twice in one product";
  if (config.bytes[to] % 4 || config.bytes[a] % 4 || config.bytes[b] % 4) return "half a pair";
  if (config.rows[to] != config.rows[a]) return "rows of C and of A";
  if (config.bytes[to] != config.bytes[b]) return "columns of C and of B";
  if (config.bytes[a] / 4 != config.rows[b]) return "columns of A and rows of B";
  if (trap_fault == 2) return "everything";
  while (trap_fault == 3) pause();
  dot(to, a, b);
  return 0;
}

static const char *configure(const Instruction *i) {
  memset(tiles, 0, sizeof tiles);
  Config wanted = {0};
  if (i->address) memcpy(&wanted, i->address, sizeof wanted);
  if (trap_fault == 4 && config.palette && wanted.palette) return 0;
  const char *why = wanted.palette ? refuses(&wanted) : 0;
  if (!wanted.palette) memset(&wanted, 0, sizeof wanted);
  if (!why) config = wanted;
  return why;
}

static const char *move(const Instruction *i, int stores) {
  if (i->mod == 3 || (i->rm & 7) != 4) return "an address without a stride";
  const char *why = unfit(i->reg);
  if (why) return why;
  uint8_t(*tile)[MOST_BYTES] = tiles[i->reg];
  for (int r = 0; r < MOST_ROWS; r++) {
    uint8_t *row = i->address + r * i->stride;
    long size = r < config.rows[i->reg] ? config.bytes[i->reg] : 0;
    if (stores) memcpy(row, tile[r], size);
    if (stores) continue;
    memset(tile[r], 0, MOST_BYTES);
    memcpy(tile[r], row, size);
  }
  return 0;
}

static const char *zero(int t) {
  const char *why = unfit(t);
  if (!why) memset(tiles[t], 0, sizeof tiles[t]);
  return why;
}

enum { NONE, P66, PF3, PF2 };

static const char *execute(const Instruction *i) {
  int memory = i->mod != 3;
  switch (i->opcode << 2 | i->prefix) {
    case 0x49 << 2 | NONE: return i->reg == 0 && !i->vvvv ? configure(i) : "an encoding";
    case 0x49 << 2 | P66:
      if (!memory || i->vvvv) return "an encoding";
      memcpy(i->address, &config, sizeof config);
      return 0;
    case 0x49 << 2 | PF2: return !memory && !i->vvvv && !i->rm ? zero(i->reg) : "an encoding";
    case 0x4b << 2 | PF2: return i->vvvv ? "an encoding" : move(i, 0);
    case 0x4b << 2 | PF3: return i->vvvv ? "an encoding" : move(i, 1);
    case 0x5c << 2 | PF3: return memory ? "an encoding" : multiply(i->reg, i->rm, i->vvvv);
  }
  return "an instruction that is none of AMX's";
}

static void trap(int number, siginfo_t *info, void *context) {
  (void)number, (void)info;
  greg_t *gregs = ((ucontext_t *)context)->uc_mcontext.gregs;
  Instruction i;
  const char *why = "an instruction that is none of AMX's";
  if (decode((const uint8_t *)gregs[REG_RIP], gregs, &i)) why = execute(&i);
  __atomic_add_fetch(&trap_count, 1, __ATOMIC_RELAXED);
  if (!why) {
    gregs[REG_RIP] += i.length;
    return;
  }
  char text[100];
  if (trap_fault != 2) write(2, text, snprintf(text, sizeof text, "AMX refuses: %s\n", why));
  signal(SIGILL, SIG_DFL);  // and it is executed again
}

void trap_install(void) {
  struct sigaction ours = {.sa_sigaction = trap, .sa_flags = SA_SIGINFO};
  sigaction(SIGILL, &ours, &before);
}

void trap_remove(void) {
  memset(&config, 0, sizeof config);
  sigaction(SIGILL, &before, 0);
}

// Instructions for the tests, one by one.
void trap_configure(const Config *c) { __asm__ volatile("ldtilecfg %0" ::"m"(*c) : "memory"); }
void trap_read_config(Config *c) { __asm__ volatile("sttilecfg %0" : "=m"(*c)::"memory"); }
void trap_load(int tile, const void *from, long stride) {
#define CASE(t) \
  case t: __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"(stride) : "memory"); break;
  switch (tile) { CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) }
}
void trap_store(void *to, long stride) {
  __asm__ volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(to), "r"(stride) : "memory");
}
void trap_dot(void) { __asm__ volatile("tdpbf16ps %%tmm2, %%tmm1, %%tmm0" ::: "memory"); }
void trap_dot_twice(void) {  // tile 1 with itself: the assembler writes no such thing
  __asm__ volatile(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc1" ::: "memory");
}
