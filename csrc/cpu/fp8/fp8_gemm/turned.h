// Products with b turned: rows of a are broadcast, those of b decoded into a panel.
#pragma once

#include "tasks.h"

namespace accel::ACCEL_ISA::fp8 {

template <typename A, typename F>
class Turned {
 public:
  explicit Turned(const Params& p)
      : p(p),
        ld(spread(p.task_columns)),
        tile(vectors(int(p.block_rows())) * int64_t(ld)),
        rows(vectors(int(p.block_rows())) * int64_t(CHUNK_LD)),
        panel(CHUNK * int64_t(ld)),
        of_rows(vectors(int(p.block_rows()))),
        of_columns(vectors(int(p.task_columns))) {}

  void run() {
    for (Task task; claim(p, task);) {
      t = task;
      for (int64_t c = 0; c < p.count; ++c) add(p.chunks[c], c == 0);
      finish_tile(p, t, tile, ld);
    }
  }

 private:
  static constexpr bool PAIRS = PAIRS_OF<A>;

  void add(const Chunk& chunk, bool first) {
    take_scales(chunk);
    for (int i = 0; i < t.rows; ++i)
      pack_words(static_cast<const A*>(p.a) + (t.row + i) * p.depth + chunk.from, chunk.count, rows + i * CHUNK_LD);
    const int words = PAIRS ? (chunk.count + 1) / 2 : chunk.count;
    for (int k = 0; k < words; ++k) pack_panel(chunk, PAIRS ? 2 * k : k, panel + k * int64_t(ld));
    Gemm g{rows, CHUNK_LD, 1, panel, ld, tile, ld, first ? nullptr : tile.data(), ld, words};
    g.of_rows = of_rows, g.of_columns = of_columns;
    const int width = vectors(t.columns) / W;
    const F* const next = static_cast<const F*>(p.b) + (chunk.from + chunk.count) * p.outputs + t.column;
    Ahead ahead(next, p.outputs, t.columns, chunk.count, gemm_calls(t.rows, width, words));
    gemm<PAIRS, true>(g, t.rows, width, [&] { ahead(); });
  }

  // 1 behind the last of the task.
  void take_scales(const Chunk& chunk) {
    for (int i = 0; i < vectors(t.rows); ++i)
      of_rows[i] = p.a_scale && i < t.rows ? scales_of(p.a_scale, t.row + i, p.a_rows, p.scales)[chunk.scale] : 1.0f;
    for (int o = 0; o < vectors(t.columns); ++o)
      of_columns[o] = o < t.columns ? scales_of(p.b_scale, t.column + o, p.b_rows, p.scales)[chunk.scale] : 1.0f;
  }

  // Words in the order of their elements.
  template <typename T>
  static void pack_words(const T* src, int count, float* dst) {
    for (int i = 0; i < count; i += STEP, dst += STEP_VECTORS<PAIRS> * W) {
      vf x[STEP_VECTORS<PAIRS>];
      if constexpr (PAIRS)
        load_words<PAIRS>(src + i, count - i, x);
      else
        load_in_order(src + i, count - i, x);
      for (int v = 0; v < STEP_VECTORS<PAIRS>; ++v) store(dst + v * W, x[v]);
    }
  }

  // A row of words: row k of the chunk or, in pairs, that and the next one.
  void pack_panel(const Chunk& chunk, int k, float* dst) const {
    const F* const row = static_cast<const F*>(p.b) + (chunk.from + k) * p.outputs + t.column;
    for (int j = 0; j < t.columns; j += STEP) {
      vf x[4];
      if constexpr (PAIRS) {
        const vh2 next = k + 1 < chunk.count ? load_pairs(row + p.outputs + j, t.columns - j) : vh2{};
        vh2 mated[2];
        mate_codes(load_pairs(row + j, t.columns - j), next, mated);
        for (int i = 0; i < 2; ++i) decode_pairs<F>(mated[i], x + 2 * i);
      } else {
        load_in_order(row + j, t.columns - j, x);
      }
      for (int v = 0; v < 4 && j + v * W < t.columns; ++v) store(dst + j + v * W, x[v]);
    }
  }

  const Params& p;
  const int ld;
  Buffer tile;                 // rows × columns
  Buffer rows;                 // a chunk of each row of a
  Buffer panel;                // a chunk of b
  Buffer of_rows, of_columns;  // scales of a chunk
  Task t;
};

}  // namespace accel::ACCEL_ISA::fp8
