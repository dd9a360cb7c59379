// Forward: online softmax over blocks of keys (Dao et al., FlashAttention), a task per run of query tiles.
#pragma once

#include "cpu/_logits.h"
#include "params.h"

namespace accel::ACCEL_ISA::softmax {

using namespace pairs;

constexpr int FEW_ROWS = 4;  // of a task: decoding one token, also with a few query heads to a key head

template <typename T>
class Forward {
  static constexpr bool PAIRS = IN_PAIRS<T>;

 public:
  explicit Forward(const Params& p)
      : p(p),
        logits(p),
        group(p.heads / p.kv_heads),
        q(p.chunk_tiles * p.tile_rows, p.head_dim),
        q_few(FEW_ROWS, p.head_dim),
        k(BLOCK_KEYS, p.head_dim),
        v(BLOCK_KEYS, p.value_dim),
        v_summed(BLOCK_KEYS, v),
        weights(TILE_ROWS, BLOCK_KEYS),
        k_ld(spread(BLOCK_KEYS)),
        k_t(int64_t(k.padded) * k_ld),
        out(p.chunk_tiles * p.tile_rows, p.value_dim),
        top(p.chunk_tiles * p.tile_rows),
        total(p.chunk_tiles * p.tile_rows) {}

  void run(int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      // Early and late tiles take turns: with a causal mask they differ in work, and workers get runs of tasks.
      const int64_t turn = task % p.chunks, pair = task / p.chunks;
      chunk(pair / p.kv_heads, pair % p.kv_heads, turn % 2 ? p.chunks - 1 - turn / 2 : turn / 2);
    }
  }

 private:
  // Tile n of a kv head's query heads, one head after the other.
  const Tile& tile_of(int64_t b, int64_t n) const { return p.tiles[b * p.tiles_batch + n % p.tile_count]; }
  int64_t head_of(int64_t kv, int64_t n) const { return kv * group + n / p.tile_count; }

  void chunk(int64_t b, int64_t kv, int64_t index) {
    const int64_t first = p.chunk_edges[index], end = p.chunk_edges[index + 1];
    int low = int(p.keys), high = 0, rows = 0;
    for (int64_t n = first; n < end; ++n) rows += tile_of(b, n).count;
    const bool few = rows <= FEW_ROWS;
    q.forget();
    q_few.forget();
    for (int64_t n = first, packed = 0; n < end; ++n) {
      const Tile& tile = tile_of(b, n);
      const int64_t row = (n - first) * p.tile_rows;
      for (int i = 0; i < tile.count; ++i) {
        const T* src = row_of<T>(p.q, b, head_of(kv, n), tile.query + i);
        if (few) {
          q_few.pack(packed++, src, logits.factor());
        } else {
          pack_row<T>(q, row + i, src, logits.factor());
        }
        out.clear(row + i);
      }
      std::fill_n(top + row, p.tile_rows, NEG_INF);
      std::fill_n(total + row, p.tile_rows, 0.0f);
      for (int i = 0; i < 2; ++i)
        if (tile.first[i] < tile.end[i]) low = std::min(low, tile.first[i]), high = std::max(high, tile.end[i]);
    }
    for (int64_t block = low; block < high; block += BLOCK_KEYS) {
      const int count = int(std::min<int64_t>(BLOCK_KEYS, p.keys - block));
      bool packed = false;
      int few_row = 0;
      for (int64_t n = first; n < end; ++n) {
        const Tile& tile = tile_of(b, n);
        const int before = few_row;
        few_row += tile.count;
        const Span span = meet(tile, block, count);
        if (span.empty()) continue;
        if (few) {
          step_few(b, kv, head_of(kv, n), tile, before, (n - first) * p.tile_rows, block, span);
          continue;
        }
        if (!packed) {
          pack_block<T>(k, p.k, b, kv, block, count);
          transpose(k.at(0), k.ld, k_t, k_ld, vectors(count), k.padded);
          pack_block<T>(v, p.v, b, kv, block, count);
          v_summed.take(v, 0, vectors(count));
          packed = true;
        }
        step(b, head_of(kv, n), tile, (n - first) * p.tile_rows, block, span);
      }
    }
    for (int64_t n = first; n < end; ++n) finish(b, head_of(kv, n), tile_of(b, n), (n - first) * p.tile_rows);
  }

  void step(int64_t b, int64_t h, const Tile& tile, int64_t row, int64_t block, const Span& s) {
    logits.compute(q, row, k, k_t, k_ld, b, h, tile, block, s);
    logits.find_spoiled<Rows<PAIRS>>(nullptr, 0, v, tile.count, s);
    if (PAIRS && !p.dropout && !logits.any_spoiled()) {
      weights.begin(s.from);
      for (int i = 0; i < tile.count; ++i)
        weigh(logits.x + int64_t(i) * logits.ld, row + i, s, [&](auto weight) { weights.fill_row(i, s.from, s.to, weight); });
    } else {
      weigh_tile(b, h, tile, row, block, s);
      logits.spoil_pairs(logits.x);
      weights.take(logits.x, logits.ld, tile.count, s.from, s.to);
    }
    gemm<PAIRS>(weights.times(v_summed, s.from, s.to, out.at(row), out.ld, out.at(row)), tile.count, out.padded / W);
  }

  // Keys and values read where they lie; a value of weight 0 is not touched.
  void step_few(int64_t b, int64_t kv, int64_t h, const Tile& tile, int64_t q_row, int64_t row, int64_t block,
                const Span& s) {
    logits.template compute_few<T>(q_few, q_row, kv, b, h, tile, block, s);
    weigh_tile(b, h, tile, row, block, s);
    for (int i = 0; i < tile.count; ++i) {
      const float* weight = logits.x + int64_t(i) * logits.ld;
      float* o = out.at(row + i);
      const T* values = row_of<T>(p.v, b, kv, block);
      for (int j = s.live_from; j < s.live_to; ++j) {
        if (weight[j] == 0.0f) continue;
        const T* value = values + j * p.v.token;
        int e = 0;
        for (; e + W <= p.value_dim; e += W) store(o + e, load(o + e) + load(value + e) * weight[j]);
        for (; e < p.value_dim; ++e) o[e] += to_float(value[e]) * weight[j];
      }
    }
  }

  void weigh_tile(int64_t b, int64_t h, const Tile& tile, int64_t row, int64_t block, const Span& s) {
    for (int i = 0; i < tile.count; ++i) {
      float* x = logits.x + int64_t(i) * logits.ld;
      weigh(x, row + i, s, [&](auto weight) {
        for (int j = s.from; j < s.to; j += W) store(x + j, weight(j));
      });
    }
    if (!p.dropout) return;
    for (int i = 0; i < tile.count; ++i)
      for (int j = s.live_from; j < s.live_to; ++j)
        logits.x[int64_t(i) * logits.ld + j] *= logits.keep(b, h, tile.query + i, block + j);
  }

  // Logits of a row to weights 2^(x − top); what was summed so far is brought to the new top. keep(weight) has to call
  // weight(j) for every vector of the span, once.
  template <typename Keep>
  void weigh(const float* x, int64_t row, const Span& s, Keep keep) {
    vf most = load(x + s.from), other = most;  // two chains, or the maximum's latency would show
    int j = s.from + W;
    for (; j + W < s.to; j += 2 * W) most = max(load(x + j), most), other = max(load(x + j + W), other);
    if (j < s.to) most = max(load(x + j), most);
    most = max(most, other);
    vf now = max(max_lanes(most), splat(top[row]));
    if (now[0] == NEG_INF) {  // nothing is seen, or nothing but NaN, which a maximum may pass over
      if (std::none_of(x + s.from, x + s.to, [](float y) { return y != y; })) {
        keep([](int) { return vf{}; });
        return;
      }
      now = splat(NOT_A_NUMBER);
    }
    vf sum{};
    keep([&](int j) {
      const vf y = exp2_nonpositive(load(x + j) - now);
      sum += y;
      return y;
    });
    if (now[0] != top[row]) {
      const vf shrink = exp2_nonpositive(splat(top[row]) - now);
      total[row] *= shrink[0];
      float* o = out.at(row);
      for (int e = 0; e < out.padded; e += W) store(o + e, load(o + e) * shrink);
      top[row] = now[0];
    }
    total[row] += sum_lanes(sum)[0];
  }

  void finish(int64_t b, int64_t h, const Tile& tile, int64_t row) {
    for (int i = 0; i < tile.count; ++i, ++row) {
      const int64_t at = (b * p.heads + h) * p.queries + tile.query + i;
      float most = top[row], sum = total[row], shrink = 1.0f;
      if (p.sinks) {
        const float sink = p.sinks[h] * LOG2_E, whole = std::max(most, sink);
        if (whole != NEG_INF) {
          shrink = std::exp2(most - whole);
          sum = sum * shrink + std::exp2(sink - whole);
          most = whole;
        }
      }
      const float rest = std::log2(sum);
      p.lse[at] = most <= LEAST ? most : (most + rest) * LN_2;
      if (p.peak) p.peak[at] = most, p.peak[p.batch * p.heads * p.queries + at] = rest;
      T* dst = static_cast<T*>(p.out.data) + b * p.out.batch + h * p.out.head + (tile.query + i) * p.out.token;
      store_row(dst, out.at(row), p.value_dim, most == NEG_INF ? 0.0f : shrink / sum);
    }
  }

  const Params& p;
  Logits logits;
  const int64_t group;
  Rows<PAIRS> q;
  Rows<> q_few;
  Rows<PAIRS> k, v;
  Summed<PAIRS> v_summed;
  Weights<PAIRS> weights;
  const int k_ld;
  Buffer k_t;
  Rows<> out;
  Buffer top, total;
};

}  // namespace accel::ACCEL_ISA::softmax
