// A fibre: a stack and the place where it stands still. Sanitizers are told of every switch, or they would take the
// new stack for a corrupted one. Included by runtime.cpp alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(ACCEL_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(ACCEL_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace accel::host {

// Pages from the system, zeroed. ThreadSanitizer forgets what it knew of an address when it is mapped anew.
inline char* map_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return pages == MAP_FAILED ? nullptr : static_cast<char*>(pages);
}

struct Fibre {
#if defined(ACCEL_TSAN)  // which touches four bytes for each of a new stack
  static constexpr size_t size = size_t{64} << 10;
#else
  static constexpr size_t size = size_t{256} << 10;
#endif
  static constexpr size_t guard = 4096;  // the lowest page faults on overflow

  char* stack = nullptr;
  void* asan = nullptr;  // its fake stack while it stands still
  void* tsan = nullptr;
#if defined(__x86_64__)
  void* at = nullptr;
#else
  ucontext_t at;
#endif
};

#if defined(__x86_64__)
// Saves what the ABI says a call keeps, and the stack pointer. swapcontext would make a system call each time.
extern "C" void accel_host_switch(void** from, void* to);
asm(R"(
  .text
  .globl accel_host_switch
  .type accel_host_switch, @function
accel_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size accel_host_switch, .-accel_host_switch
)");
#endif

#if defined(ACCEL_TSAN)
// A number that ThreadSanitizer gives anew would carry the clock of its old owner into the next block and hide races
// between the two. So what is done with stays until the launch ends or there are too many.
struct TsanFibers {
  static constexpr int most = 4096;  // of about 8000
  void* kept[most];
  int count = 0;

  void drop() {
    while (count) __tsan_destroy_fiber(kept[--count]);
  }
  void make_room(int threads) {  // between blocks
    if (count + threads > most) drop();
  }
  void* fresh() { return kept[count++] = __tsan_create_fiber(0); }
};
inline TsanFibers tsan_fibers;
#endif

// Makes `fibre` ready to run `entry`, which must never return.
inline bool prepare(Fibre& fibre, void (*entry)()) {
#if defined(ACCEL_TSAN)  // fresh pages, or the block before would seem to race on its old stack
  if (fibre.stack) munmap(fibre.stack, Fibre::size);
  fibre.stack = nullptr;
  fibre.tsan = tsan_fibers.fresh();
#endif
  if (!fibre.stack) {
    fibre.stack = map_pages(Fibre::size);
    if (!fibre.stack) return false;
    mprotect(fibre.stack, Fibre::guard, PROT_NONE);
  }
#if defined(ACCEL_ASAN)  // frames that were left for good may have poisoned it
  __asan_unpoison_memory_region(fibre.stack + Fibre::guard, Fibre::size - Fibre::guard);
  fibre.asan = nullptr;
#endif
#if defined(__x86_64__)
  auto* top = reinterpret_cast<uint64_t*>(fibre.stack + Fibre::size) - 3;
  *top-- = 0;  // a return address, never used: entry begins with the stack as after a call, 8 past a multiple of 16
  *top = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fibre.at = top;
#else
  getcontext(&fibre.at);
  fibre.at.uc_stack.ss_sp = fibre.stack + Fibre::guard;
  fibre.at.uc_stack.ss_size = Fibre::size - Fibre::guard;
  fibre.at.uc_link = nullptr;
  makecontext(&fibre.at, entry, 0);
#endif
  return true;
}

// What a fibre does first thing on its own stack; it learns the true bounds of the stack it was started from.
inline void arrived([[maybe_unused]] Fibre& fibre, [[maybe_unused]] const void** bottom,
                    [[maybe_unused]] size_t* size) {
#if defined(ACCEL_ASAN)
  __sanitizer_finish_switch_fiber(fibre.asan, bottom, size);
#endif
}

// Leaves `from` standing and goes on in `to`, whose stack has the given bounds; `last`: `from` will never go on.
inline void switch_to(Fibre& from, Fibre& to, [[maybe_unused]] const void* bottom, [[maybe_unused]] size_t size,
                      [[maybe_unused]] bool last = false) {
#if defined(ACCEL_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.asan, bottom, size);
#endif
#if defined(ACCEL_TSAN)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  accel_host_switch(&from.at, to.at);
#else
  swapcontext(&from.at, &to.at);
#endif
  const void* old_bottom = nullptr;
  size_t old_size = 0;
  arrived(from, &old_bottom, &old_size);
}

}  // namespace accel::host
