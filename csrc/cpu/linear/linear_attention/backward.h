// Backward. With g = dy / den and c = −g · (Σ w v) / den (or g = dy, c = 0), P_ij = g_i · v_j + c_i is the gradient of a
// weight, and of the state S that a row sees that of g_i. In half precision the sum in c is made again: from a rounded output
// it would not do for rows of little weight, whose 1 / den is large. One pass from the first token to the last gives the gradients
// of queries, one from the last to the first those of keys and values.
//
// With pairs of bf16 the products that make gradients of queries take P and S as they are: in a row of little weight g
// is large, and what comes out small beside its terms.
#pragma once

#include "decay_gradient.h"

namespace accel::ACCEL_ISA::linear {

template <bool PAIRS>
class Backward {
 public:
  explicit Backward(const BackwardParams& b)
      : b(b),
        p(b.forward),
        tile(p),
        of_decay(b, tile),
        again(p.dtype != Dtype::f32),
        g(p.values),
        early_q(tile.decay.any() ? p.features : 0),
        of_keys(CHUNK, p.features),
        of_values(CHUNK, p.values),
        state_t(p.values, p.features, p.features),
        grad(p.features, p.values, p.features),
        grad_t(int64_t(g.padded) * tile.k.ld),
        k_t(int64_t(tile.k.padded) * tile.ld),
        v_t(int64_t(g.padded) * tile.ld),
        of_weights(CHUNK * tile.ld) {}

  // What each run of queries adds to the gradient of the state before it.
  void states(int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const int64_t slot = task / p.state_heads, hs = task % p.state_heads;
      const Segment& s = p.query_segments[slot];
      if (p.causal && s.first) continue;
      grad.clear();
      bool lost = false;
      for (int64_t t = last_chunk(s); t >= s.from; t -= CHUNK) {
        const int count = int(std::min<int64_t>(CHUNK, s.to - t));
        tile.decay.begin(s.batch, hs, t, count);
        grad.shrink(tile.decay.whole);
        for (int64_t n = 0; n < tile.group; ++n) {
          load_rows(s.batch, hs * tile.group + n, t, count, s.before(t), true);
          lost |= last_bad_row() >= 0;
          remember(count);
        }
      }
      float* dst = slot_of(p, b.grad_states, slot, hs);
      grad.write(dst, dst + int64_t(p.features) * p.values);
      b.grad_states.lost[slot * p.state_heads + hs] = lost;
    }
  }

  // From these the gradient of the state where each run ends; without order, that of the state of all keys.
  void join(int64_t from, int64_t to) {
    const Ends ends{b.grad_kv, b.grad_k_sum, b.grad_initial_kv, b.grad_initial_k_sum};
    for (int64_t task = from; task < to; ++task)
      join_runs(p, p.query_segments, p.first_query_segment, b.grad_states, ends, task, true);
  }

  void queries(int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task)
      query_segment(p.query_segments[task / p.state_heads], task % p.state_heads);
  }

  void keys(int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task)
      key_segment(p.key_segments[task / p.state_heads], task % p.state_heads);
  }

 private:
  static int64_t last_chunk(const Segment& s) {
    return s.to > s.from ? s.from + (s.to - s.from - 1) / CHUNK * CHUNK : s.from - 1;
  }

  float inverse_of_den(int64_t row) const {
    return !p.normalize ? 1.0f : p.den[row] == 0.0f ? 0.0f : 1.0f / p.den[row];
  }

  // Queries, g and c of a chunk; c only where that was made before. `next`: see Tile::load_keys.
  void load_rows(int64_t batch, int64_t h, int64_t t, int count, int64_t next, bool with_c) {
    tile.load_queries(batch, h, t, count, next);
    const int64_t row = (batch * p.heads + h) * p.queries + t;
    const Strided& from = b.grad_out.data ? b.grad_out : p.out;  // whose values nobody looks at
    tile.pack(g, Map::identity, from, batch, h, t, count, [&](int) { return b.grad_out.data != nullptr; },
              [&](int i) { return inverse_of_den(row + i); });
    tile.fetch_rows(from, batch, h, next, p.queries, p.values);
    for (int i = 0; i < count; ++i) {
      c[i] = b.grad_out.data && p.normalize && with_c ? b.by_sum[row + i] : 0.0f;
      if (!std::isfinite(c[i])) g.spoil(i), c[i] = 0.0f;
    }
    g.round(count, true);
  }

  bool bad(int i) const { return g.bad(i) || tile.q.bad(i); }
  int last_bad_row() const {
    for (int i = CHUNK - 1; i >= 0; --i)
      if (bad(i)) return i;
    return -1;
  }

  // The chunk's rows enter the gradient of what was before it, whose decay over the chunk is counted already.
  void remember(int count) {
    Rows<PAIRS>& from = tile.decay.any() ? early_q : tile.q;
    if (tile.decay.any()) tile.shrunk(tile.q, tile.decay.from_start, early_q, count);
    tile.accumulate(from, g, grad.main, count);
    if (p.normalize) tile.add_rows(from, c, grad.sum, count);
  }

  void query_segment(const Segment& s, int64_t hs) {
    bool lost = begin_state(p, s, hs, state_t, true);
    for (int64_t t = s.from; t < s.to; t += CHUNK) {
      const int count = int(std::min<int64_t>(CHUNK, s.to - t));
      int spoilt = lost ? 0 : CHUNK;
      of_decay.begin_queries(s, hs, t, state_t);
      if (p.causal) {
        tile.load_keys(s.batch, hs, t, count, s.after(t));
        tile.v.turn(v_t, tile.ld, count);
        if (again && p.normalize) tile.k.turn(k_t, tile.ld, count);
        spoilt = std::min(spoilt, tile.first_bad_key());
      }
      for (int64_t n = 0; n < tile.group; ++n) query_rows(s, hs * tile.group + n, t, count, spoilt);
      of_decay.end_queries(s.batch, hs, t, count);
      if (p.causal) {
        state_t.shrink(tile.decay.whole);
        tile.accumulate(tile.v, tile.keys_at_end(), state_t.main, count);
        if (p.normalize) tile.add_rows(tile.keys_at_end(), nullptr, state_t.sum, count);
      }
      lost |= spoilt < CHUNK;
    }
  }

  void query_rows(const Segment& s, int64_t h, int64_t t, int count, int spoilt) {
    const int64_t batch = s.batch;
    load_rows(batch, h, t, count, s.after(t), false);
    Words<>& rows = of_keys;  // (count, F)
    tile.cross_exact(g, state_t.main.at(0), state_t.main.ld, rows, count);
    if (tile.decay.any()) tile.scale_rows(rows, tile.decay.from_start, count);
    if (p.causal) tile.lower(g, v_t, of_weights, count);
    if (p.normalize) {
      find_c(batch, h, t, rows, count);
      for (int i = 0; i < count; ++i) {
        const float mul = tile.decay.any() ? c[i] * tile.decay.from_start[i] : c[i];
        for (int d = 0; d < rows.padded; d += W) store(rows.at(i) + d, load(rows.at(i) + d) + load(state_t.sum + d) * mul);
      }
    }
    if (of_decay.wanted())
      for (int i = 0; i < count; ++i)
        of_decay.query(i, i >= spoilt || bad(i) ? NOT_A_NUMBER : tile.dot(tile.q.at(i), rows.at(i), rows.padded));
    if (p.causal) {
      tile.decayed(of_weights, count, p.normalize ? c : nullptr, [](int, float) {});
      tile.add_lower_exact(of_weights, tile.k, rows, count);
    }
    for (int i = 0; i < count; ++i) {
      const float mul = i >= spoilt || bad(i) ? NOT_A_NUMBER : p.scale;
      if (b.part_q) {
        store_row(b.part_q + ((batch * p.heads + h) * p.queries + t + i) * p.features, rows.at(i), p.features, mul);
      } else {
        store_through_map(b.grad_q, p.q, batch, h, t + i, rows.at(i), mul);
      }
    }
  }

  // c of a chunk whose g · v stand in of_weights, and to whose features g gives `rows` by way of the state.
  void find_c(int64_t batch, int64_t h, int64_t t, const Words<>& rows, int count) {
    const int64_t row = (batch * p.heads + h) * p.queries + t;
    if (!again) {
      for (int i = 0; i < count; ++i) {
        load_row(row_of<float>(p.out, batch, h, t + i), y, p.values, g.padded);
        c[i] = -tile.dot(g.at(i), y, g.padded);
        if (!std::isfinite(c[i])) g.spoil(i), c[i] = 0.0f;
        b.by_sum[row + i] = bad(i) ? NOT_A_NUMBER : c[i];
      }
      return;
    }
    if (p.causal) {
      tile.lower(tile.q, k_t, tile.weights, count);
      tile.decayed(tile.weights, count, nullptr, [](int, float) {});
    }
    for (int i = 0; i < count; ++i) {
      float along = tile.dot(tile.q.at(i), rows.at(i), rows.padded);
      if (p.causal) {
        const float *w = tile.weights + i * tile.ld, *of = of_weights + i * tile.ld;
        along += tile.dot(w, of, int(round_up(i + 1, W)));
      }
      c[i] = -along * inverse_of_den(row + i);
      b.by_sum[row + i] = bad(i) ? NOT_A_NUMBER : c[i];
    }
  }

  // A row of `to` = mul · gradient of its features · the map's slope at the same row of `at`.
  void store_through_map(const Strided& to, const Strided& at, int64_t batch, int64_t h, int64_t t,
                         const float* of_features, float mul) const {
    with_type<PAIRS>(p.dtype, [&](auto of) {
      auto* dst = row_of<decltype(of)>(to, batch, h, t);
      const auto* x = row_of<decltype(of)>(at, batch, h, t);
      with_map(p.map, [&](auto map) {
        int d = 0;
        for (; d + W <= p.features; d += W) store(dst + d, load(of_features + d) * mul * map.slope(load(x + d)));
        if (d == p.features) return;
        float tail[W];
        load_row(x + d, tail, p.features - d, W);
        store(tail, load(of_features + d) * mul * map.slope(load(tail)));
        store_row(dst + d, tail, p.features - d, 1.0f);
      });
    });
  }

  void key_segment(const Segment& s, int64_t hs) {
    bool lost = false;
    if (p.causal && s.last) {
      grad.read(kv_of(p, b.grad_kv, s.sequence, hs), sum_of(p, b.grad_k_sum, s.sequence, hs), false);
    } else {
      const float* from = slot_of(p, b.grad_states, s.slot, hs);
      grad.read(from, from + int64_t(p.features) * p.values, false);
      lost = b.grad_states.lost[s.slot * p.state_heads + hs];
    }
    for (int64_t t = last_chunk(s); t >= s.from; t -= CHUNK) {
      const int count = int(std::min<int64_t>(CHUNK, s.to - t));
      of_decay.begin_keys(s, hs, t, grad, lost);
      tile.load_keys(s.batch, hs, t, count, s.before(t));
      Words<>&dk = of_keys, &dv = of_values;
      tile.cross(tile.keys_at_end(), grad.second(), grad.second_ld, dv, count);
      grad.turn(grad_t, tile.k.ld);
      tile.cross(tile.v, grad_t, tile.k.ld, dk, count);
      if (p.normalize)
        for (int j = 0; j < count; ++j)
          for (int d = 0; d < dk.padded; d += W) store(dk.at(j) + d, load(dk.at(j) + d) + load(grad.sum + d));
      if (tile.decay.any()) tile.scale_rows(dk, tile.decay.to_end, count);
      if (of_decay.wanted()) of_decay.keys(dk, count);
      int spoilt = lost ? CHUNK : 0;  // keys before this one
      if (p.causal) {
        grad.shrink(tile.decay.whole);
        tile.k.turn(k_t, tile.ld, count);
        tile.v.turn(v_t, tile.ld, count);
        for (int64_t n = 0; n < tile.group; ++n) {
          load_rows(s.batch, hs * tile.group + n, t, count, s.before(t), true);
          spoilt = std::max(spoilt, last_bad_row() + 1);
          tile.lower(tile.q, k_t, tile.weights, count);
          tile.decayed(tile.weights, count, nullptr, [](int, float) {});
          tile.add_upper(tile.weights, g, dv, count);
          tile.lower(g, v_t, of_weights, count);
          if (of_decay.wanted()) of_decay.pairs(tile.weights, of_weights, c, count);
          tile.decayed(of_weights, count, p.normalize ? c : nullptr, [](int, float) {});
          tile.add_upper(of_weights, tile.q, dk, count);
          remember(count);
        }
        of_decay.end_keys(s.batch, hs, t, count);
      }
      for (int j = 0; j < count; ++j) store_key(s.batch, hs, t + j, j, j < spoilt || tile.k.bad(j) || tile.v.bad(j));
      lost |= spoilt > 0;
    }
    if (!p.causal || !s.first) return;
    if (lost) grad.spoil();
    grad.write(kv_of(p, b.grad_initial_kv, s.sequence, hs), sum_of(p, b.grad_initial_k_sum, s.sequence, hs));
  }

  void store_key(int64_t batch, int64_t hs, int64_t t, int j, bool lost) {
    if (tile.hidden(batch, t)) of_keys.clear(j), of_values.clear(j), lost = false;
    const float mul = lost ? NOT_A_NUMBER : 1.0f;
    const int64_t at = (batch * p.state_heads + hs) * p.keys + t;
    if (b.part_k) {
      store_row(b.part_k + at * p.features, of_keys.at(j), p.features, mul);
    } else {
      store_through_map(b.grad_k, p.k, batch, hs, t, of_keys.at(j), mul);
    }
    if (b.part_v) {
      store_row(b.part_v + at * p.values, of_values.at(j), p.values, mul);
    } else {
      tile.put(b.grad_v, batch, hs, t, of_values.at(j), p.values, mul);
    }
  }

  const BackwardParams& b;
  const Params& p;
  Tile<PAIRS> tile;
  DecayGradient<PAIRS> of_decay;
  const bool again;  // the sum in c is made again
  Rows<PAIRS> g, early_q;
  Words<> of_keys, of_values;
  float c[CHUNK];
  float y[512];
  State<PAIRS> state_t, grad;
  Buffer grad_t, k_t, v_t, of_weights;
};

// Gradients of the heads that read one head of q (which 0), k (1) or v (2), summed up in their order.
inline void sum_heads(const BackwardParams& b, int which, int64_t from, int64_t to) {
  const Params& p = b.forward;
  const Strided& x = which == 0 ? p.q : which == 1 ? p.k : p.v;
  const Strided& grad = which == 0 ? b.grad_q : which == 1 ? b.grad_k : b.grad_v;
  const float* part = which == 0 ? b.part_q : which == 1 ? b.part_k : b.part_v;
  const int64_t readers = which == 0 ? p.heads : p.state_heads, tokens = which == 0 ? p.queries : p.keys;
  const int size = which == 2 ? p.values : p.features;
  const Map map = which == 2 ? Map::identity : p.map;
  std::vector<float> source(size_t(vectors(size))), sum(source.size());
  for (int64_t row = from; row < to; ++row) {
    const int64_t t = row % tokens, head = row / tokens % (readers / x.share), batch = row / tokens / (readers / x.share);
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t n = 0; n < x.share; ++n) {
      const float* at = part + ((batch * readers + head * x.share + n) * tokens + t) * size;
      for (int d = 0; d < size; ++d) sum[size_t(d)] += at[d];
    }
    with_type<false>(p.dtype, [&](auto of) {
      load_row(row_of<decltype(of)>(x, batch, head * x.share, t), source.data(), size, vectors(size));
    });
    with_map(map, [&](auto of) {
      for (int d = 0; d < size; d += W)
        store(sum.data() + d, load(sum.data() + d) * of.slope(load(source.data() + d)));
    });
    with_type<false>(p.dtype, [&](auto of) {
      store_row(row_of<decltype(of)>(grad, batch, head * x.share, t), sum.data(), size, 1.0f);
    });
  }
}

}  // namespace accel::ACCEL_ISA::linear
