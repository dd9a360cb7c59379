// Forward: a block of queries with the sum its chunk sees, then with the keys of its chunk.
#pragma once

#include "block.h"

namespace accel::ACCEL_ISA::flash {

template <typename T>
class Forward : Block<T> {
  static constexpr bool PAIRS = IN_PAIRS<T>;
  using Base = Block<T>;
  using Base::bad_values, Base::c, Base::first_row, Base::id, Base::k, Base::logits, Base::p, Base::pairs, Base::panels,
      Base::rows, Base::size, Base::spans, Base::tiles, Base::v;

 public:
  explicit Forward(const Params& p)
      : Base(p),
        weights_in_fp32(PAIRS ? 0 : int64_t(BLOCK_ROWS) * Base::ld),
        v_summed(BLOCK_KEYS, v),
        lin_q(BLOCK_ROWS, p.lin_dim),
        slots(p.states, panels, p.lin_dim, p.panel, p.state_parts),
        out(int64_t(Base::several ? panels : 1) * BLOCK_ROWS, p.panel),
        spoiled(BLOCK_ROWS) {
    for (int64_t n = 0; n < pairs.chunk_tiles; ++n) weights.emplace_back(pairs.tile_rows, BLOCK_KEYS);
  }

  void run(int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      Base::enter(p.tasks[task].chunk);
      if (Base::find_tiles(p.tasks[task].block)) block();
    }
  }

 private:
  void block() {
    Base::pack_queries();
    lin_q.forget();
    spoiled.forget();
    const float scale = p.sequences[c.sequence].scale;
    for (int i = 0; i < rows; ++i) {
      pack_row<T>(lin_q, i, row_of<T>(p.lin_q, c.batch, 0, c.first + first_row + i), scale);
      if (p.lost[id] || lin_q.bad(i)) spoiled.mark(i);
    }
    const int end = Base::keys_end();
    for (int at = 0; at < end; at += BLOCK_KEYS) {
      const int count = std::min(BLOCK_KEYS, end - at);
      Base::pack_keys(at, count);
      Base::find_spans(at, count);
      for (size_t n = 0; n < tiles.size(); ++n) {
        if (spans[n].empty()) continue;
        find_logits(n, at);
        take_weights<PAIRS>(logits, p.activation, id, 0, tiles[n], weights[n], at, spans[n]);
      }
      bad_values.forget();
      for (int panel = 0; panel < panels; ++panel) add_panel(panel, at, count, at + count == end, scale);
      if (bad_values.any_bad()) find_spoiled(at);
    }
    if (!spoiled.any_bad()) return;
    for (int i = 0; i < rows; ++i)
      if (spoiled.bad(i)) Base::spoil(p.out, first_row + i, size), Base::spoil(p.sums, first_row + i, size);
  }

  void add_panel(int panel, int at, int count, bool last, float scale) {
    const int width = width_of(p, panel);
    float* made = out.at(Base::several ? int64_t(panel) * BLOCK_ROWS : 0);
    if (at == 0) {
      for (int part = 0; part < slots.parts; ++part)
        gemm<PAIRS>({lin_q.at(0), lin_q.ld, 1, slots.at(Base::seen_from, panel, part), slots.ld, made, out.ld,
                     part ? made : nullptr, out.ld, lin_q.words, scale},
                    rows, vectors(width) / W);
    }
    Base::pack_values(at, count, panel);
    v_summed.take(v, 0, vectors(count));
    for (size_t n = 0; n < tiles.size(); ++n) {
      const Span& s = spans[n];
      if (s.empty()) continue;
      float* to = made + int64_t(Base::row_in_block(tiles[n])) * out.ld;
      gemm<PAIRS>(weights[n].times(v_summed, s.from, s.to, to, out.ld, to), tiles[n].count, vectors(width) / W);
    }
    if (last) finish(panel, made, width);
  }

  void finish(int panel, const float* made, int width) {
    for (int i = 0; i < rows; ++i, made += out.ld) {
      const int64_t t = c.first + first_row + i;
      T* dst = const_cast<T*>(row_of<T>(p.out, c.batch, 0, t)) + panel * p.panel;
      if (p.sums.data) store_row(const_cast<T*>(row_of<T>(p.sums, c.batch, 0, t)) + panel * p.panel, made, width, 1.0f);
      if (!p.gate.data) {
        store_row(dst, made, width, 1.0f);
        continue;
      }
      const T* gate = row_of<T>(p.gate, c.batch, 0, t) + panel * p.panel;
      fetch_later(gate, p.gate, i, rows, width);
      int e = 0;
      for (; e + W <= width; e += W) store(dst + e, load(made + e) * load(gate + e));
      for (; e < width; ++e) from_float(made[e] * to_float(gate[e]), dst + e);
    }
  }

  void find_logits(size_t n, int at) {
    // pairs of bf16 lie elsewhere, and the place of one tile's logits will do for all
    if constexpr (!PAIRS) logits.x = weights_in_fp32 + int64_t(Base::row_in_block(tiles[n])) * Base::ld;
    Base::find_logits(n, at);
  }

  // Rows that see a value which is not finite; only the logits tell, made again.
  void find_spoiled(int at) {
    for (size_t n = 0; n < tiles.size(); ++n) {
      if (spans[n].empty()) continue;
      find_logits(n, at);
      logits.template find_spoiled<Marks>(nullptr, 0, bad_values, tiles[n].count, spans[n]);
      for (int64_t pair : logits.spoiled()) spoiled.mark(Base::row_in_block(tiles[n]) + pair / Base::ld);
    }
  }

  std::deque<Weights<PAIRS>> weights;  // of the tiles
  Buffer weights_in_fp32;              // where they lie then
  Summed<PAIRS> v_summed;
  Rows<PAIRS> lin_q;
  SummedSlots<PAIRS> slots;
  Words<> out;
  Marks spoiled;
};

}  // namespace accel::ACCEL_ISA::flash
