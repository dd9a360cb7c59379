// The gradient of log_decay, chunk by chunk. A token's decay is in the weight of every query from it on with every key
// before it, and each such pair is counted where it is met: what the state before a chunk gives by way of the state
// behind it passes all its tokens, W = ⟨state before, gradient of the state behind⟩ · the chunk's decay; a query meets the
// state before its chunk, and a key the gradient behind; and both may be in one. No sum is longer than a chunk. The
// differences over all tokens of ⟨q, dq⟩ and ⟨k, dk⟩ are the same number, but drift with the length of the sequence.
//
// Queries are visited from the first token on and keys from the last, so that one of the two states has to be made
// again: that before each chunk, from what the queries' pass kept at the first chunk of every STRETCH.
#pragma once

#include "tile.h"

namespace accel::ACCEL_ISA::linear {

template <bool PAIRS>
class DecayGradient {
 public:
  DecayGradient(const BackwardParams& b, Tile<PAIRS>& tile)
      : b(b),
        p(b.forward),
        tile(tile),
        state_(wanted() ? p.features : 0, p.values, p.features),
        before_(wanted() ? STRETCH * vectors(p.features) : 0, p.values),
        sums_before_(wanted() ? STRETCH * vectors(p.features) : 0) {}

  bool wanted() const { return b.grad_decay; }

  // --- in the pass over queries ---

  // Before the chunk that begins at t; `state_t` is the state there, turned.
  void begin_queries(const Segment& s, int64_t hs, int64_t t, const State<PAIRS>& state_t) {
    if (!wanted()) return;
    std::fill_n(each_, CHUNK, 0.0);
    const int64_t chunk = (t - s.from) / CHUNK;
    if (chunk == 0 || chunk % STRETCH) return;
    float* at = kept(s, hs, chunk / STRETCH);
    state_t.write(at, at + int64_t(p.features) * p.values);
  }

  // Query i of the chunk times what the state before it gives to its gradient.
  void query(int i, float along) { each_[i] += double(along); }

  void end_queries(int64_t batch, int64_t hs, int64_t t, int count) {
    if (!wanted()) return;
    double sum = 0.0;
    float* to = grad_at(batch, hs, t);
    for (int i = count - 1; i >= 0; --i) to[i] = float(sum += each_[i]);
  }

  // --- in the pass over keys ---

  // Before the keys of a chunk are loaded; `grad` is the gradient of the state behind it. Chunks come last to first.
  void begin_keys(const Segment& s, int64_t hs, int64_t t, const State<PAIRS>& grad, bool lost) {
    if (!wanted()) return;
    const int64_t chunk = (t - s.from) / CHUNK;
    if (chunk % STRETCH == STRETCH - 1 || t + CHUNK >= s.to) make_again(s, hs, chunk / STRETCH);
    through_ = lost ? NOT_A_NUMBER : through(int(chunk % STRETCH), grad);
  }

  // The chunk's keys are loaded and `of_keys` is what the gradient behind it gives to theirs.
  void keys(const Words<>& of_keys, int count) {
    double sum = through_ * double(tile.decay.whole);
    for (int j = 0; j < count; ++j) {
      each_[j] = sum;
      sum += double(tile.dot(tile.k.at(j), of_keys.at(j), of_keys.padded));
    }
  }

  // Pairs within the chunk: `weights` with decay, and `of_weights` whose gradients they are but for c. A query with its
  // own key depends on no decay, and is left out rather than taken away again.
  void pairs(const float* weights, const float* of_weights, const float* c, int count) {
    float of_key[CHUNK] = {};
    double of_query[CHUNK] = {};
    for (int i = 1; i < count; ++i) {
      const float *w = weights + i * tile.ld, *of = of_weights + i * tile.ld;
      vf sum{};
      for (int j = 0; j < i; j += W) {
        const vf x = load(w + j) * (load(of + j) + c[i]);
        const vf y = Tile<PAIRS>::lanes() + j < i ? x : vf{};
        store(of_key + j, load(of_key + j) + y);
        sum += y;
      }
      of_query[i] = double(sum_lanes(sum)[0]);
    }
    double sum = 0.0;
    for (int i = count - 1; i >= 0; --i) each_[i] += sum += of_query[i] - double(of_key[i]);
  }

  void end_keys(int64_t batch, int64_t hs, int64_t t, int count) {
    if (!wanted()) return;
    float* to = grad_at(batch, hs, t);
    for (int j = 0; j < count; ++j) to[j] += float(each_[j]);
  }

 private:
  float* grad_at(int64_t batch, int64_t hs, int64_t t) const {
    return b.grad_decay + (batch * p.state_heads + hs) * p.keys + t;
  }

  float* kept(const Segment& s, int64_t hs, int64_t stretch) const {
    return b.kept + ((s.kept + stretch - 1) * p.state_heads + hs) * (int64_t(p.features) * p.values + p.features);
  }

  // The states before the chunks of a stretch.
  void make_again(const Segment& s, int64_t hs, int64_t stretch) {
    if (stretch == 0) {
      begin_state(p, s, hs, state_, false);
    } else {
      const float* at = kept(s, hs, stretch);
      state_.read(at, at + int64_t(p.features) * p.values, true);
    }
    const int64_t from = s.from + stretch * STRETCH * CHUNK;
    for (int n = 0; n < STRETCH; ++n) {
      const int64_t t = from + n * CHUNK;
      for (int d = 0; d < p.features; ++d) std::copy_n(state_.main.at(d), before_.padded, row_before(n, d));
      std::copy_n(state_.sum.data(), vectors(p.features), sums_before_ + n * vectors(p.features));
      if (n + 1 == STRETCH || t + CHUNK >= s.to) return;
      tile.load_keys(s.batch, hs, t, CHUNK, s.after(t));
      state_.shrink(tile.decay.whole);
      tile.accumulate(tile.keys_at_end(), tile.v, state_.main, CHUNK);
      if (p.normalize) tile.add_rows(tile.keys_at_end(), nullptr, state_.sum, CHUNK);
    }
  }

  float* row_before(int n, int d) const { return before_.at(int64_t(n) * vectors(p.features) + d); }

  // What passes chunk n of the stretch, but for its decay.
  double through(int n, const State<PAIRS>& grad) const {
    double sum = 0.0;
    for (int d = 0; d < p.features; ++d) sum += double(tile.dot(row_before(n, d), grad.main.at(d), grad.main.padded));
    if (p.normalize) sum += double(tile.dot(sums_before_ + n * vectors(p.features), grad.sum, vectors(p.features)));
    return sum;
  }

  const BackwardParams& b;
  const Params& p;
  Tile<PAIRS>& tile;
  State<PAIRS> state_;
  Words<> before_;
  Buffer sums_before_;
  double each_[CHUNK], through_ = 0.0;
};

}  // namespace accel::ACCEL_ISA::linear
