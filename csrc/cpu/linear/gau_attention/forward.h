// Forward: the weights of a few tiles of queries and a block of keys are made once and meet the values in panels.
#pragma once

#include <deque>

#include "weights.h"

namespace accel::ACCEL_ISA::gau {

constexpr int FEW_ROWS = 4;  // of a task: decoding, where packing keys and values would cost more than the products

template <typename T>
class Forward {
  static constexpr bool PAIRS = IN_PAIRS<T>;

 public:
  explicit Forward(const Params& p)
      : p(p),
        group(p.heads / p.kv_heads),
        logits(p),
        q(p.chunk_tiles * p.tile_rows, p.head_dim),
        q_few(FEW_ROWS, p.head_dim),
        k(BLOCK_KEYS, p.head_dim),
        k_t(int64_t(k.padded) * logits.ld),
        tiles(PAIRS ? 0 : p.chunk_tiles * p.tile_rows * logits.ld),
        v(BLOCK_KEYS, PANEL),
        v_summed(BLOCK_KEYS, v),
        out(p.chunk_tiles * p.tile_rows, p.value_dim),
        bad_values(BLOCK_KEYS),
        spoiled(p.chunk_tiles * p.tile_rows) {
    for (int64_t n = 0; n < p.chunk_tiles; ++n) weights.emplace_back(p.tile_rows, BLOCK_KEYS);
  }

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
    spoiled.forget();
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
      for (int i = 0; i < 2; ++i)
        if (tile.first[i] < tile.end[i]) low = std::min(low, tile.first[i]), high = std::max(high, tile.end[i]);
    }
    for (int64_t at = low; at < high; at += BLOCK_KEYS) {
      const int count = int(std::min<int64_t>(BLOCK_KEYS, p.keys - at));
      if (!few) {
        block(b, kv, first, end, at, count);
        continue;
      }
      for (int64_t n = first, packed = 0; n < end; packed += tile_of(b, n++).count)
        step_few(b, kv, head_of(kv, n), tile_of(b, n), packed, (n - first) * p.tile_rows, at,
                 meet(tile_of(b, n), at, count));
    }
    for (int64_t n = first; n < end; ++n) finish(b, head_of(kv, n), tile_of(b, n), (n - first) * p.tile_rows);
  }

  void block(int64_t b, int64_t kv, int64_t first, int64_t end, int64_t keys, int count) {
    spans.clear();
    int from = count, to = 0;
    for (int64_t n = first; n < end; ++n) {
      const Span& s = spans.emplace_back(meet(tile_of(b, n), keys, count));
      if (!s.empty()) from = std::min(from, s.from), to = std::max(to, s.to);
    }
    if (from >= to) return;
    pack_block<T>(k, p.k, b, kv, keys, count);
    transpose(k.at(0), k.ld, k_t, logits.ld, vectors(count), k.padded);
    for (int64_t n = first; n < end; ++n) {
      const Span& s = spans[size_t(n - first)];
      if (s.empty()) continue;
      find_logits(b, kv, first, n, keys);
      take_weights<PAIRS>(logits, p.activation, b, head_of(kv, n), tile_of(b, n), weights[size_t(n - first)], keys, s);
    }
    bad_values.forget();
    for (int panel = 0; panel < panels_of(p.value_dim); ++panel) {
      const int width = panel_width(p.value_dim, panel);
      pack_values(b, kv, keys, from, std::min(to, count), panel * PANEL, width);
      for (int j = count; j < to; ++j) v.clear(j);
      v_summed.take(v, 0, to);
      for (int64_t n = first; n < end; ++n) {
        const Span& s = spans[size_t(n - first)];
        if (s.empty()) continue;
        float* to_add = out.at((n - first) * p.tile_rows) + panel * PANEL;
        gemm<PAIRS>(weights[size_t(n - first)].times(v_summed, s.from, s.to, to_add, out.ld, to_add),
                    tile_of(b, n).count, vectors(width) / W);
      }
    }
    if (!bad_values.any_bad()) return;
    for (int64_t n = first; n < end; ++n) {
      const Span& s = spans[size_t(n - first)];
      if (s.empty()) continue;
      find_logits(b, kv, first, n, keys);  // again: only they tell who sees what
      for (int i = 0; i < tile_of(b, n).count; ++i)
        for (int j = s.live_from; j < s.live_to; ++j)
          if (bad_values.bad(j) && logits.x[int64_t(i) * logits.ld + j] != NEG_INF)
            spoiled.mark((n - first) * p.tile_rows + i);
    }
  }

  // Keys and values read where they lie; a value that is not seen is not touched.
  void step_few(int64_t b, int64_t kv, int64_t h, const Tile& tile, int64_t q_row, int64_t row, int64_t keys,
                const Span& s) {
    if (s.empty()) return;
    place(row);
    logits.template compute_few<T>(q_few, q_row, kv, b, h, tile, keys, s);
    seen.assign(size_t(tile.count) * BLOCK_KEYS, 0);
    for (int i = 0; i < tile.count; ++i)
      for (int j = s.live_from; j < s.live_to; ++j)
        seen[size_t(i) * BLOCK_KEYS + size_t(j)] = logits.x[int64_t(i) * logits.ld + j] != NEG_INF;
    weigh_tile(logits, p.activation, b, h, tile, keys, s);
    for (int i = 0; i < tile.count; ++i) {
      float* made = out.at(row + i);
      vf check{};
      float rest = 0.0f;
      for (int j = s.live_from; j < s.live_to; ++j) {
        if (!seen[size_t(i) * BLOCK_KEYS + size_t(j)]) continue;
        const T* value = row_of<T>(p.v, b, kv, keys + j);
        const float weight = logits.x[int64_t(i) * logits.ld + j];
        int e = 0;
        for (; e + W <= p.value_dim; e += W) {
          const vf x = load(value + e);
          check += x * 0.0f;
          store(made + e, load(made + e) + x * weight);
        }
        for (; e < p.value_dim; ++e) rest += to_float(value[e]) * 0.0f, made[e] += to_float(value[e]) * weight;
      }
      if (!(sum_lanes(check)[0] + rest == 0.0f)) spoiled.mark(row + i);
    }
  }

  void find_logits(int64_t b, int64_t kv, int64_t first, int64_t n, int64_t keys) {
    const int64_t row = (n - first) * p.tile_rows;
    place(row);
    logits.compute(q, row, k, k_t, logits.ld, b, head_of(kv, n), tile_of(b, n), keys, spans[size_t(n - first)]);
  }

  // Logits of the tile that begins at `row` become its weights where they lie. Pairs lie elsewhere, and the place of one
  // tile's logits will do for all.
  void place(int64_t row) {
    if constexpr (!PAIRS) logits.x = tiles + row * logits.ld;
  }

  void pack_values(int64_t b, int64_t kv, int64_t keys, int from, int to, int column, int width) {
    for (int j = from; j < to; ++j) {
      const T* src = row_of<T>(p.v, b, kv, keys + j) + column;
      if (j + 8 < to) fetch(src + 8 * p.v.token, width * int(sizeof(T)));  // packing waits for memory, not for work
      if (!pack_panel<T>(src, nullptr, v.at(j), width)) bad_values.mark(j);
    }
  }

  void finish(int64_t b, int64_t h, const Tile& tile, int64_t row) {
    for (int i = 0; i < tile.count; ++i, ++row) {
      float* made = out.at(row);
      if (spoiled.bad(row)) std::fill_n(made, p.value_dim, NOT_A_NUMBER);
      T* dst = const_cast<T*>(row_of<T>(p.out, b, h, tile.query + i));
      if (p.sums.data) store_row(const_cast<T*>(row_of<T>(p.sums, b, h, tile.query + i)), made, p.value_dim, 1.0f);
      if (!p.gate.data) {
        store_row(dst, made, p.value_dim, 1.0f);
        continue;
      }
      const T* gate = row_of<T>(p.gate, b, h, tile.query + i);
      int e = 0;
      for (; e + W <= p.value_dim; e += W) store(dst + e, load(made + e) * load(gate + e));
      for (; e < p.value_dim; ++e) from_float(made[e] * to_float(gate[e]), dst + e);
    }
  }

  const Params& p;
  const int64_t group;
  Logits logits;
  Rows<PAIRS> q;
  Rows<> q_few;
  Rows<PAIRS> k;
  Buffer k_t;
  std::deque<Weights<PAIRS>> weights;  // of the tiles of a chunk
  Buffer tiles;                        // where they lie in fp32
  Words<PAIRS> v;                      // one panel
  Summed<PAIRS> v_summed;
  Rows<> out;
  Marks bad_values, spoiled;  // keys of the block; rows that see such
  std::vector<Span> spans;
  std::vector<char> seen;  // of a few rows
};

}  // namespace accel::ACCEL_ISA::gau
