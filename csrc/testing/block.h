// The block that runs: its lanes, its shared memory, and the words to report on them. Part of runtime.cpp.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <utility>

#include "fibre.h"
#include "runtime.h"

namespace accel::host {
namespace {

constexpr int max_threads = 1024, warp = 32, max_masks = 8;
constexpr size_t static_limit = 48 << 10, red_zone = 64;
constexpr unsigned char fresh = 0xFF, red = 0xA5;  // 0xFF...: NaN as a float, -1 as an integer

enum class State { ready, at_warp, at_block, done };

struct Pending {
  Copy copy;
  void* to;
  const void* from;
  int group;
};

struct Lane : Place {
  Fibre fibre;
  State state;
  // of the collective it stands at
  const char* name;
  Site site;
  unsigned mask;
  Resolve resolve;
  const void* in;
  void* out;
  Vote vote;
  int predicate, verdict;
  unsigned phases;  // of its warp's barriers, a bit for each mask
  // no container: memory that goes round between fibres would look like a race
  Pending pending[64];
  int pendings, group;
};

struct Array {
  const void* key;
  const char* name;
  size_t begin, bytes;
};

struct Block {
  Lane lanes[max_threads];
  int threads, warps;
  int order[warp];  // of warps, the first that can go on does
  Array arrays[64];
  int count;
  size_t used;
  int phase;  // of its barriers
  unsigned masks[warp][max_masks];  // with which each warp synchronised
};

Block block;
Fibre scheduler;
Lane* running;
const void* main_bottom;
size_t main_size;
char* arena;
size_t dynamic_bytes;
void (*kernel)(void*);
void* kernel_context;
uint64_t seed, state;
int async_mode;
bool failed;
char message[4096];
char start_tag, end_tag;

constexpr size_t arena_size = shared_limit + 66 * (2 * red_zone + 16);

// Where ThreadSanitizer's clocks of a barrier meet. Two in turn: with one, a thread that is already at the next barrier
// would tell a thread that has not yet left this one what it did in between. A pair for each mask of a warp, since the
// threads of one mask need not have been at the same barriers with another. New ones for every block: the clocks of old
// ones would order blocks.
constexpr size_t tags_of_block = (warp * max_masks + 1) * 2 * 8, tags_size = size_t{64} << 20;
char* tags;
size_t first_tag;
char& tag(int owner, int phase) { return tags[first_tag + size_t(owner * 2 + phase) * 8]; }

int mask_number(int w, unsigned mask) {
  for (int m = 0; m < max_masks; ++m) {
    if (block.masks[w][m] == 0) block.masks[w][m] = mask;
    if (block.masks[w][m] == mask) return m;
  }
  return -1;
}

unsigned draw(unsigned below) {  // splitmix64
  uint64_t x = (state += 0x9E3779B97F4A7C15u);
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return unsigned((x ^ (x >> 31)) >> 32) % below;
}

template <class T>
void shuffle(T* x, int n) {
  for (int i = n - 1; i > 0; --i) std::swap(x[i], x[draw(unsigned(i) + 1)]);
}

void release([[maybe_unused]] char& tag) {
#if defined(ACCEL_TSAN)
  __tsan_release(&tag);
#endif
}

void acquire([[maybe_unused]] char& tag) {
#if defined(ACCEL_TSAN)
  __tsan_acquire(&tag);
#endif
}

void poison([[maybe_unused]] size_t begin, [[maybe_unused]] size_t bytes) {
#if defined(ACCEL_ASAN)
  __asan_poison_memory_region(arena + begin, bytes);
#endif
}

void unpoison([[maybe_unused]] size_t begin, [[maybe_unused]] size_t bytes) {
#if defined(ACCEL_ASAN)
  __asan_unpoison_memory_region(arena + begin, bytes);
#endif
}

void fill(size_t begin, unsigned char value, size_t bytes) {  // memset would be watched by ThreadSanitizer
  auto* p = reinterpret_cast<volatile unsigned char*>(arena + begin);
  for (size_t i = 0; i < bytes; ++i) p[i] = value;
}

// --- messages: the first failure counts ---

void say(const char* format, va_list arguments) {
  size_t used = strlen(message);
  vsnprintf(message + used, sizeof message - used, format, arguments);
}

__attribute__((format(printf, 1, 2))) void say(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  say(format, arguments);
  va_end(arguments);
}

const char* file_of(const Site& site) {
  const char* slash = strrchr(site.file_name(), '/');
  return slash ? slash + 1 : site.file_name();
}

void say_where(const char* name, const Site& site) {
  say("%s:%u:%u %s", file_of(site), unsigned(site.line()), unsigned(site.column()), name);
}

void say_who(const Lane& lane) {
  say("thread (%u,%u,%u) of block (%u,%u,%u), warp %d lane %d", lane.thread.x, lane.thread.y, lane.thread.z,
      lane.block.x, lane.block.y, lane.block.z, int(&lane - block.lanes) / warp, lane.lane);
}

bool begin_message() {
  if (failed) return false;
  failed = true;
  message[0] = 0;
  return true;
}

bool same_site(const Lane& a, const Lane& b) {
  return a.site.line() == b.site.line() && a.site.column() == b.site.column() && a.name == b.name &&
         !strcmp(a.site.file_name(), b.site.file_name());
}

// Nobody can go on: who stands where. One line for all that stand at the same place with the same mask.
void explain_standstill() {
  if (!begin_message()) return;
  say("no thread can go on:");
  bool told[max_threads] = {};
  for (int i = 0; i < block.threads; ++i) {
    const Lane& first = block.lanes[i];
    if (told[i]) continue;
    int alike = 0;
    for (int j = i; j < block.threads; ++j) {
      const Lane& lane = block.lanes[j];
      bool both_done = first.state == State::done && lane.state == State::done;
      bool both_wait = first.state != State::done && first.state == lane.state && same_site(first, lane);
      if (told[j] || !(both_done || (both_wait && (first.state == State::at_block || first.mask == lane.mask)))) continue;
      told[j] = true;
      ++alike;
    }
    say("\n  %d threads ", alike);
    if (first.state == State::done) {
      say("have exited");
    } else {
      say("wait at ");
      say_where(first.name, first.site);
      if (first.state == State::at_warp) say(" with mask 0x%08x", first.mask);
    }
    say(", the first of them ");
    say_who(first);
  }
}

}  // namespace
}  // namespace accel::host
