// What forward and backward of a chunk's blocks hold alike: its tiles of queries, its keys, and the logits of both.
#pragma once

#include <deque>

#include "states.h"

namespace accel::ACCEL_ISA::flash {

template <typename T>
class Block {
  static constexpr bool PAIRS = IN_PAIRS<T>;

 protected:
  explicit Block(const Params& p)
      : p(p),
        pairs(p.pairs),
        size(p.pairs.value_dim),
        panels(p.panels),
        several(p.pairs.keys > BLOCK_KEYS),
        logits(pairs),
        q(BLOCK_ROWS, p.pairs.head_dim),
        k(BLOCK_KEYS, p.pairs.head_dim),
        v(BLOCK_KEYS, p.panel),
        ld(logits.ld),
        k_t(int64_t(k.padded) * ld),
        shown(size_t(vectors(int(p.pairs.keys)))),
        bad_values(BLOCK_KEYS) {}

  void enter(int64_t index) {
    id = index, c = p.chunks[index];
    seen_from = p.causal ? id : c.sequence;
    pairs.mask = nullptr;
    if (!p.key_mask && c.count == pairs.keys) return;
    // of a shorter chunk the keys behind it are hidden, in case that no rule does so
    for (int64_t j = 0; j < int64_t(shown.size()); ++j) shown[size_t(j)] = j < c.count && !hidden(p, c, j);
    pairs.mask = shown.data();
    pairs.mask_stride[0] = pairs.mask_stride[1] = pairs.mask_stride[2] = 0, pairs.mask_stride[3] = 1;
  }

  // The tiles of a block of queries; false if the chunk ends before it.
  bool find_tiles(int block) {
    tiles.clear();
    rows = 0;
    for (int n = pairs.chunk_edges[block]; n < pairs.chunk_edges[block + 1]; ++n) {
      Tile tile = pairs.tiles[n];
      if (tile.query >= c.count) break;
      tile.count = std::min(tile.count, c.count - tile.query);
      if (tiles.empty()) first_row = tile.query;
      rows += tile.count;
      tiles.push_back(tile);
    }
    return !tiles.empty();
  }

  int row_in_block(const Tile& tile) const { return tile.query - first_row; }

  int keys_end() const {
    int end = 0;
    for (const Tile& tile : tiles) end = std::max(end, tile.end[0]);
    return std::min(end, c.count);
  }

  void pack_queries() {
    q.forget();
    for (int i = 0; i < rows; ++i) pack_row<T>(q, i, row_of<T>(pairs.q, c.batch, 0, c.first + first_row + i), logits.factor());
  }

  // Keys [at, at + count) of the chunk.
  void pack_keys(int at, int count) {
    k.forget();
    for (int j = 0; j < count; ++j) {
      if (hidden(p, c, at + j)) {
        k.clear(j);
      } else {
        pack_row<T>(k, j, row_of<T>(pairs.k, c.batch, 0, c.first + at + j), 1.0f);
      }
    }
    for (int j = count; j < vectors(count); ++j) k.clear(j);
    transpose(k.at(0), k.ld, k_t, ld, vectors(count), k.padded);
  }

  // A panel of the values of these keys, zeros behind them.
  void pack_values(int at, int count, int panel) {
    const int width = width_of(p, panel);
    for (int j = 0; j < count; ++j) {
      if (hidden(p, c, at + j)) {
        v.clear(j);
        continue;
      }
      const T* src = row_of<T>(pairs.v, c.batch, 0, c.first + at + j) + panel * p.panel;
      fetch_later(src, pairs.v, j, count, width);
      if (!pack_panel<T>(src, nullptr, v.at(j), width)) bad_values.mark(j);
    }
    for (int j = count; j < vectors(count); ++j) v.clear(j);
  }

  // Where the tiles meet keys [at, at + count); false if none does.
  bool find_spans(int at, int count) {
    spans.clear();
    bool some = false;
    for (const Tile& tile : tiles) some |= !spans.emplace_back(meet(tile, at, count)).empty();
    return some;
  }

  void find_logits(size_t n, int at) {
    logits.compute(q, row_in_block(tiles[n]), k, k_t, ld, id, 0, tiles[n], at, spans[n]);
  }

  // A row of NaN in place of what stands there.
  void spoil(const Strided& x, int64_t at, int n) const {
    if (!x.data) return;
    T* dst = const_cast<T*>(row_of<T>(x, c.batch, 0, c.first + at));
    for (int d = 0; d < n; ++d) from_float(NOT_A_NUMBER, dst + d);
  }

  const Params& p;
  PairParams pairs;  // whose mask is the chunk's
  const int size, panels;
  const bool several;  // blocks of keys to a chunk
  Logits logits;
  Rows<PAIRS> q, k;
  Words<PAIRS> v;  // a panel
  const int ld;
  Buffer k_t;
  std::vector<uint8_t> shown;
  Marks bad_values;

  int64_t id = 0;
  Chunk c{};
  int64_t seen_from = 0;  // the slot of the sum that its queries see, and of that which its keys enter
  std::vector<Tile> tiles;
  std::vector<Span> spans;
  int first_row = 0, rows = 0;
};

}  // namespace accel::ACCEL_ISA::flash
