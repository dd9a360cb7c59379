// The scheduler: blocks one after another, each thread of a block a fibre. A fibre runs until it reaches a collective
// and stands there; when all that the collective waits for have come, the scheduler computes it and lets them go on.
// What can no longer come is an error with names, never a hang.

#include "runtime.h"

#include <cstdarg>
#include <utility>

#include "block.h"

namespace accel::host {
namespace {

// --- running lanes ---

void enter() {
  arrived(running->fibre, &main_bottom, &main_size);
  acquire(start_tag);
  kernel(kernel_context);
  release(end_tag);
  running->state = State::done;
  switch_to(running->fibre, scheduler, main_bottom, main_size, true);
  __builtin_unreachable();
}

void stand(State why) {
  running->state = why;
  switch_to(running->fibre, scheduler, main_bottom, main_size);
}

void resume(Lane& lane) {
  running = &lane;
  here = &lane;
  switch_to(scheduler, lane.fibre, lane.fibre.stack + Fibre::guard, Fibre::size - Fibre::guard);
  here = nullptr;
}

// Completes the collectives of a warp whose lanes have all come.
void resolve_warp(int w) {
  Lane* lanes = block.lanes + w * warp;
  int count = block.threads - w * warp < warp ? block.threads - w * warp : warp;
  unsigned seen = 0;
  for (int i = 0; i < count && !failed; ++i) {
    Lane& first = lanes[i];
    if (first.state != State::at_warp || (seen >> i & 1)) continue;
    const void* in[warp] = {};
    void* out[warp] = {};
    bool complete = true;
    for (int j = 0; j < warp && !failed; ++j) {
      if (!(first.mask >> j & 1)) continue;
      if (j >= count || lanes[j].state == State::done) {
        if (!begin_message()) return;
        say_where(first.name, first.site);
        say(": mask 0x%08x names lane %d, which %s; ", first.mask, j, j >= count ? "is not there" : "has exited");
        say_who(first);
        return;
      }
      const Lane& other = lanes[j];
      complete = complete && other.state == State::at_warp && same_site(first, other) && other.mask == first.mask;
      in[j] = other.in;
      out[j] = other.out;
    }
    if (!complete) continue;
    if (first.resolve) first.resolve(first.mask, in, out);
    for (int j = 0; j < count; ++j)
      if (first.mask >> j & 1) lanes[j].state = State::ready;
    seen |= first.mask;
  }
}

bool step(int w) {  // whether a lane of the warp ran
  int lanes[warp], count = 0;
  for (int i = w * warp; i < block.threads && i < (w + 1) * warp; ++i)
    if (block.lanes[i].state == State::ready) lanes[count++] = i;
  if (seed) shuffle(lanes, count);
  for (int i = 0; i < count && !failed; ++i) resume(block.lanes[lanes[i]]);
  if (count && !failed) resolve_warp(w);
  return count > 0;
}

bool release_barrier() {
  const Lane& first = block.lanes[0];
  int count = 0;
  for (int i = 0; i < block.threads; ++i) {
    const Lane& lane = block.lanes[i];
    if (lane.state != State::at_block || !same_site(first, lane)) return false;
    count += lane.predicate != 0;
  }
  bool all = count == block.threads;
  int verdict = first.vote == Vote::any ? count > 0 : first.vote == Vote::all ? all : count;
  block.phase ^= 1;
  for (int i = 0; i < block.threads; ++i) {
    block.lanes[i].verdict = verdict;
    block.lanes[i].state = State::ready;
  }
  return true;
}

bool all_done() {
  for (int i = 0; i < block.threads; ++i)
    if (block.lanes[i].state != State::done) return false;
  return true;
}

// --- one block ---

bool check_red_zones() {
  for (int i = 0; i < block.count; ++i) {
    const Array& a = block.arrays[i];
    unpoison(a.begin - red_zone, a.bytes + 2 * red_zone);
    for (size_t j = 0; j < red_zone; ++j) {
      bool below = static_cast<unsigned char>(arena[a.begin - 1 - j]) != red;
      bool above = static_cast<unsigned char>(arena[a.begin + a.bytes + j]) != red;
      if (!below && !above) continue;
      if (begin_message())
        say("shared memory %s of %zu bytes was written %zu bytes %s it, in block (%u,%u,%u)", a.name, a.bytes, j + 1,
            below ? "before" : "past", block.lanes[0].block.x, block.lanes[0].block.y, block.lanes[0].block.z);
      return false;
    }
  }
  return true;
}

size_t add_array(const void* key, const char* name, size_t bytes) {
  size_t begin = (block.used + red_zone + 15) / 16 * 16;
  block.used = begin + bytes + red_zone;
  block.arrays[block.count++] = {key, name, begin, bytes};
  unpoison(begin - red_zone, bytes + 2 * red_zone);
  fill(begin - red_zone, red, red_zone);
  fill(begin, fresh, bytes);
  fill(begin + bytes, red, red_zone);
  poison(begin - red_zone, red_zone);
  poison(begin + bytes, red_zone);
  return begin;
}

bool start_block(uint3 index) {
#if defined(ACCEL_TSAN)
  if (arena) munmap(arena, arena_size);
  arena = nullptr;
#endif
  if (!arena) arena = map_pages(arena_size);
  if (!tags) tags = map_pages(tags_size);
  if (!arena || !tags) return false;
  first_tag = (first_tag + tags_of_block) % (tags_size - tags_of_block);
  block.count = 0;
  block.used = 0;
  block.phase = 0;
  add_array(nullptr, "(dynamic)", dynamic_bytes);
  block.threads = int(block_size.x * block_size.y * block_size.z);
#if defined(ACCEL_TSAN)
  tsan_fibers.make_room(block.threads);
#endif
  block.warps = (block.threads + warp - 1) / warp;
  for (int w = 0; w < block.warps; ++w) {
    block.order[w] = w;
    for (unsigned& mask : block.masks[w]) mask = 0;
  }
  if (seed) shuffle(block.order, block.warps);
  for (int i = 0; i < block.threads; ++i) {
    Lane& lane = block.lanes[i];
    unsigned x = unsigned(i) % block_size.x, rest = unsigned(i) / block_size.x;
    lane.thread = {x, rest % block_size.y, rest / block_size.y};
    lane.block = index;
    lane.lane = i % warp;
    lane.state = State::ready;
    lane.phases = 0;
    lane.pendings = lane.group = 0;
    if (!prepare(lane.fibre, enter)) return false;
  }
  release(start_tag);
  return true;
}

void run_block(uint3 index) {
  if (!start_block(index)) {
    if (begin_message()) say("no memory for the fibres of a block of %u threads", unsigned(block.threads));
    return;
  }
  while (!failed) {
    bool ran = false;
    for (int w = 0; w < block.warps && !ran && !failed; ++w) ran = step(block.order[w]);
    if (seed && draw(16) == 0) shuffle(block.order, block.warps);
    if (ran || failed) continue;
    if (all_done()) break;
    if (!release_barrier()) explain_standstill();
    if (seed) shuffle(block.order, block.warps);
  }
  if (!failed) check_red_zones();
}

}  // namespace

Place* here;
dim3 grid_size, block_size;

void warp_collective(const char* name, unsigned mask, bool orders, Resolve resolve, const void* in, void* out,
                     const Site& site) {
  Lane& lane = *running;
  if (!(mask >> lane.lane & 1)) fail(name, site, "mask 0x%08x leaves out the lane that calls", mask);
  lane.name = name;
  lane.site = site;
  lane.mask = mask;
  lane.resolve = resolve;
  lane.in = in;
  lane.out = out;
  if (!orders) return stand(State::at_warp);
  int w = int(&lane - block.lanes) / warp, m = mask_number(w, mask);
  if (m < 0) fail(name, site, "more than %d different masks in a warp", max_masks);
  char& meeting = tag(w * max_masks + m, lane.phases >> m & 1);
  release(meeting);
  stand(State::at_warp);
  acquire(meeting);
  lane.phases ^= 1u << m;
}

int block_barrier(const char* name, Vote vote, int predicate, const Site& site) {
  Lane& lane = *running;
  lane.name = name;
  lane.site = site;
  lane.vote = vote;
  lane.predicate = predicate;
  char& meeting = tag(warp * max_masks, block.phase);
  release(meeting);
  stand(State::at_block);
  acquire(meeting);
  return lane.verdict;
}

void* shared_array(const void* key, const char* name, size_t bytes, const Site& site) {
  size_t total = bytes;
  for (int i = 0; i < block.count; ++i) {
    if (block.arrays[i].key == key) return arena + block.arrays[i].begin;
    if (i) total += block.arrays[i].bytes;
  }
  if (total > static_limit || total + dynamic_bytes > shared_limit || block.count == 64)
    fail(name, site, "shared memory is exhausted: %zu bytes static, %zu dynamic", total, dynamic_bytes);
  return arena + add_array(key, name, bytes);
}

void* dynamic_shared() { return arena + block.arrays[0].begin; }

void async_copy(Copy copy, void* to, const void* from, const Site& site) {
  Lane& lane = *running;
  if (async_mode == 1 || (async_mode == 2 && draw(2))) return copy(to, from);
  if (lane.pendings == 64) fail("cp_async", site, "more than 64 copies of a thread in flight");
  lane.pending[lane.pendings++] = {copy, to, from, lane.group};
}

void async_commit() { ++running->group; }

void async_wait(int groups_left) {
  Lane& lane = *running;
  int kept = 0;
  for (int i = 0; i < lane.pendings; ++i) {
    Pending p = lane.pending[i];
    if (p.group < lane.group - groups_left)
      p.copy(p.to, p.from);
    else
      lane.pending[kept++] = p;
  }
  lane.pendings = kept;
}

void maybe_yield() {
  if (seed && draw(4) == 0) stand(State::ready);
}

void fail(const char* name, const Site& site, const char* format, ...) {
  if (begin_message()) {
    say_where(name, site);
    say(": ");
    va_list arguments;
    va_start(arguments, format);
    say(format, arguments);
    va_end(arguments);
    say("; ");
    say_who(*running);
    release(end_tag);
  }
  for (;;) stand(State::done);
}

void fail_lane(int lane, const char* format, ...) {
  if (!begin_message()) return;
  const Lane& at = block.lanes[(running - block.lanes) / warp * warp + lane];
  say_where(at.name, at.site);
  say(": ");
  va_list arguments;
  va_start(arguments, format);
  say(format, arguments);
  va_end(arguments);
  say("; ");
  say_who(at);
}

int run_grid(dim3 grid, dim3 size, size_t shared, void (*body)(void*), void* context) {
  constexpr int invalid = 9, broken = 719;  // cudaErrorInvalidConfiguration, cudaErrorLaunchFailure
  uint64_t threads = uint64_t{size.x} * size.y * size.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  failed = false;
  message[0] = 0;
  if (!blocks || !threads || threads > max_threads || size.z > 64 || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535 || shared > shared_limit) {
    begin_message();
    say("no such launch: grid (%u,%u,%u), block (%u,%u,%u), %zu bytes of shared memory", grid.x, grid.y, grid.z, size.x,
        size.y, size.z, shared);
    return invalid;
  }
  grid_size = grid;
  block_size = size;
  dynamic_bytes = shared;
  kernel = body;
  kernel_context = context;
  state = seed * 0x2545F4914F6CDD1Du;
#if defined(ACCEL_TSAN)
  scheduler.tsan = __tsan_get_current_fiber();
#endif
  // A random order of blocks without a list of them: start anywhere, take steps that share no factor with the count.
  uint64_t first = 0, stride = 1;
  if (seed && blocks > 1) {
    first = draw(unsigned(blocks < 0xFFFFFFFF ? blocks : 0xFFFFFFFF));
    auto shares_a_factor = [&](uint64_t a) {
      for (uint64_t b = blocks; b;) a = std::exchange(b, a % b);
      return a != 1;
    };
    for (stride = 1 + draw(unsigned(blocks < 0xFFFFFFFF ? blocks : 0xFFFFFFFF)); shares_a_factor(stride);) ++stride;
  }
  uint64_t at = first;
  for (uint64_t i = 0; i < blocks && !failed; ++i, at = (at + stride) % blocks)
    run_block({unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y)});
  acquire(end_tag);
#if defined(ACCEL_TSAN)
  tsan_fibers.drop();
#endif
  return failed ? broken : 0;
}

}  // namespace accel::host

void accel_host_setup(uint64_t seed, int async) {
  accel::host::seed = seed;
  accel::host::async_mode = async;
}

const char* accel_host_error() { return accel::host::message; }
