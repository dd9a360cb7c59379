// What the headers ask of the scheduler in runtime.cpp, which is compiled without instrumentation so that sanitizers
// see the kernel's accesses and not the shim's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace accel::host {

using Site = std::source_location;

constexpr size_t shared_limit = 227 << 10;  // of a block, as on an H100

// Where the running thread is. One launch runs at a time, on one thread of the operating system.
struct Place {
  uint3 thread, block;
  int lane;  // within its warp
};

extern Place* here;
extern dim3 grid_size, block_size;

// Computes every lane's result from every lane's input; both are null for lanes outside the mask.
using Resolve = void (*)(unsigned mask, const void* const* in, void* const* out);

// Waits until all lanes of `mask` are at this site. `orders`: what they wrote before is seen by all afterwards.
void warp_collective(const char* name, unsigned mask, bool orders, Resolve, const void* in, void* out, const Site&);

enum class Vote { none, any, all, count };

// Waits for the whole block; returns the vote over `predicate`.
int block_barrier(const char* name, Vote, int predicate, const Site&);

void* shared_array(const void* key, const char* name, size_t bytes, const Site&);
void* dynamic_shared();

// Asynchronous copies: `copy` runs at once or when the group is waited for, as the run was set up.
using Copy = void (*)(void* to, const void* from);
void async_copy(Copy, void* to, const void* from, const Site&);
void async_commit();
void async_wait(int groups_left);

// A place where another thread may take over, in seeded runs.
void maybe_yield();

// Ends the launch with an error that names the thread. Never comes back.
[[noreturn]] void fail(const char* name, const Site&, const char* format, ...) __attribute__((format(printf, 3, 4)));
// The same from inside a Resolve, for the lane given.
void fail_lane(int lane, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Runs `body(context)` for every thread of the grid; 0, or the code that CUDA gives for what went wrong.
int run_grid(dim3 grid, dim3 block, size_t shared, void (*body)(void*), void* context);

}  // namespace accel::host

extern "C" {
// seed 0: warps, lanes and blocks in ascending order. async: 0 copies land when waited for, 1 at once, 2 at random.
void accel_host_setup(uint64_t seed, int async);
const char* accel_host_error();  // of the last launch that failed; empty if none did
}
