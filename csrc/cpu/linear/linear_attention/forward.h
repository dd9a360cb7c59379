// Forward: each run of tokens from the state where it begins; the states of runs that follow others are made first.
#pragma once

#include "tile.h"

namespace accel::ACCEL_ISA::linear {

template <bool PAIRS>
class Forward {
 public:
  explicit Forward(const Params& p)
      : p(p),
        tile(p),
        state(p.features, p.values, p.features),
        out(CHUNK, p.values),
        k_t(int64_t(tile.k.padded) * tile.ld) {}

  // What each run of keys adds to the state, into its slot.
  void states(int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const Segment& s = p.key_segments[task / p.state_heads];
      const int64_t hs = task % p.state_heads, slot = task / p.state_heads;
      if (p.causal && s.last) continue;  // what comes after it is not computed from a slot
      state.clear();
      bool lost = false;
      for (int64_t t = s.from; t < s.to; t += CHUNK) {
        const int count = int(std::min<int64_t>(CHUNK, s.to - t));
        tile.load_keys(s.batch, hs, t, count, s.after(t));
        remember(count);
        lost |= tile.first_bad_key() < CHUNK;
      }
      float* dst = slot_of(p, p.states, slot, hs);
      state.write(dst, dst + int64_t(p.features) * p.values);
      p.states.lost[slot * p.state_heads + hs] = lost;
    }
  }

  // From what runs add to the state where each begins; without order, the state of all keys.
  void join(int64_t from, int64_t to) {
    const Ends ends{p.kv, p.k_sum, p.kv_out, p.k_sum_out};
    for (int64_t task = from; task < to; ++task)
      join_runs(p, p.key_segments, p.first_key_segment, p.states, ends, task, false);
  }

  void run(int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) segment(p.query_segments[task / p.state_heads], task % p.state_heads);
  }

 private:
  void segment(const Segment& s, int64_t hs) {
    bool lost = begin_state(p, s, hs, state, false);
    if (!p.causal) second = state.second();
    for (int64_t t = s.from; t < s.to; t += CHUNK) {
      const int count = int(std::min<int64_t>(CHUNK, s.to - t));
      int bad = lost ? 0 : CHUNK;
      if (p.causal) {
        tile.load_keys(s.batch, hs, t, count, s.after(t));
        tile.k.turn(k_t, tile.ld, count);
        second = state.second();
        bad = std::min(bad, tile.first_bad_key());
      }
      for (int64_t g = 0; g < tile.group; ++g) rows(s, hs * tile.group + g, t, count, bad);
      if (p.causal) remember(count);
      lost |= bad < CHUNK;
    }
    if (!p.causal || !s.last) return;
    if (lost) state.spoil();
    state.write(kv_of(p, p.kv_out, s.sequence, hs), sum_of(p, p.k_sum_out, s.sequence, hs));
  }

  // The chunk's keys enter the state.
  void remember(int count) {
    Rows<PAIRS>& keys = tile.keys_at_end();
    state.shrink(tile.decay.whole);
    tile.accumulate(keys, tile.v, state.main, count);
    if (p.normalize) tile.add_rows(keys, nullptr, state.sum, count);
  }

  // Output rows of a chunk of queries; those from `bad` on see something that is not finite.
  void rows(const Segment& s, int64_t h, int64_t t, int count, int bad) {
    const int64_t b = s.batch;
    tile.load_queries(b, h, t, count, s.after(t));
    tile.cross(tile.q, second, state.second_ld, out, count);
    float den[CHUNK];
    if (p.normalize)
      for (int i = 0; i < count; ++i) den[i] = tile.dot(tile.q.at(i), state.sum, tile.q.padded);
    if (tile.decay.any()) {
      tile.scale_rows(out, tile.decay.from_start, count);
      if (p.normalize)
        for (int i = 0; i < count; ++i) den[i] *= tile.decay.from_start[i];
    }
    if (p.causal) {
      tile.lower(tile.q, k_t, tile.weights, count);
      tile.decayed(tile.weights, count, nullptr, [&](int i, float sum) {
        if (p.normalize) den[i] += sum;
      });
      tile.add_lower(tile.weights, tile.v, out, count);
    }
    for (int i = 0; i < count; ++i) {
      float mul = 1.0f;
      if (p.normalize) {
        den[i] += p.eps;
        if (p.den) p.den[(b * p.heads + h) * p.queries + t + i] = den[i];
        mul = den[i] == 0.0f ? 0.0f : 1.0f / den[i];
      }
      if (i >= bad || tile.q.bad(i)) mul = NOT_A_NUMBER;
      tile.put(p.out, b, h, t + i, out.at(i), p.values, mul);
    }
  }

  const Params& p;
  Tile<PAIRS> tile;
  State<PAIRS> state;
  const float* second = nullptr;  // operand, which is the state before the chunk
  Words<> out;
  Buffer k_t;
};

}  // namespace accel::ACCEL_ISA::linear
