// Products of many rows: a block of b is decoded once for all rows of a task, and a chunk's products are added up before they
// meet their scales. Where the processor multiplies pairs of bf16, codes are such numbers exactly.
#pragma once

#include "tasks.h"

namespace accel::ACCEL_ISA::fp8 {

template <typename A>
constexpr bool PAIRS_OF = IN_PAIRS<bf16> && (IS_CODE<A> || std::is_same_v<A, bf16>);

// The vectors of a step, or what an order other than its own makes of them, as words.
template <bool PAIRS>
inline void store_words(float* dst, vf a, vf b) {
  if constexpr (PAIRS) {
    store_halves(dst, a, b);
  } else {
    store(dst, a), store(dst + W, b);
  }
}

template <bool PAIRS>
constexpr int WORDS = PAIRS ? W : 2 * W;  // of two vectors

// Words of a chunk of a row: whole vectors, zeros behind the last element. In the order of steps, halves of which are told
// apart: the first 2·W elements make the first words.
template <bool PAIRS, typename T>
inline void pack_steps(const T* src, int count, float* dst) {
  for (int i = 0; i < count; i += STEP, dst += 2 * WORDS<PAIRS>) {
    vf x[4];
    load_step(src + i, count - i, x);
    for (int v = 0; v < 4; ++v) x[v] *= FACTOR<T>;
    store_words<PAIRS>(dst, x[0], x[2]);
    if (count - i > 2 * W) store_words<PAIRS>(dst + WORDS<PAIRS>, x[1], x[3]);
  }
}

template <bool PAIRS, typename T>
inline void pack_in_order(const T* src, int count, float* dst) {
  for (int i = 0; i < count; i += STEP, dst += 2 * WORDS<PAIRS>) {
    vf x[4];
    load_in_order(src + i, count - i, x);
    store_words<PAIRS>(dst, x[0], x[1]);
    if (count - i > 2 * W) store_words<PAIRS>(dst + WORDS<PAIRS>, x[2], x[3]);
  }
}

template <typename A, typename F>
class Many {
 public:
  explicit Many(const Params& p)
      : p(p),
        rows(int(std::min(p.rows, TASK_ROWS))),
        tile_ld(spread(p.task_columns)),
        turned_ld(spread(vectors(rows))),
        tile(vectors(rows) * int64_t(tile_ld)),
        turned(p.turned ? 0 : p.task_columns * turned_ld),
        rows_packed(vectors(rows) * int64_t(LD)),
        rows_turned(p.turned ? 0 : LD * int64_t(turned_ld)),
        weights(p.turned ? CHUNK * int64_t(tile_ld) : BLOCK * int64_t(LD)),
        of_rows(vectors(rows)),
        of_columns(vectors(int(p.task_columns))) {}

  void run() {
    for (Task task; claim(p, task);) {
      begin(task);
      for (int64_t c = 0; c < p.count; ++c) p.turned ? add_turned(p.chunks[c], c == 0) : add(p.chunks[c], c == 0);
      if (!p.turned) transpose(turned, turned_ld, tile, tile_ld, vectors(t.columns), vectors(t.rows));
      finish_tile(p, t, tile, tile_ld);
    }
  }

 private:
  static constexpr bool PAIRS = PAIRS_OF<A>;
  static constexpr int BLOCK = 48;  // rows of b that meet a panel
  static constexpr int LD = 144;    // words of a chunk, an odd number of cache lines

  void begin(const Task& task) {
    t = task;
    for (int i = 0; i < t.rows; ++i)
      a_scales[i] = p.a_scale ? scales_of(p.a_scale, t.row + i, p.a_rows, p.scales) : nullptr;
    for (int o = 0; o < t.columns; ++o) b_scales[o] = scales_of(p.b_scale, t.column + o, p.b_rows, p.scales);
    if (p.turned) return;
    for (int o = t.columns; o < vectors(t.columns); ++o)
      std::fill_n(turned + int64_t(o) * turned_ld, vectors(t.rows), 0.0f);
  }

  void take_scales(const Chunk& chunk) {
    for (int i = 0; i < vectors(t.rows); ++i)
      of_rows[i] = i < t.rows && p.a_scale ? a_scales[i][chunk.scale] : 1.0f;
    for (int o = 0; o < vectors(t.columns); ++o) of_columns[o] = o < t.columns ? b_scales[o][chunk.scale] : 1.0f;
  }

  const A* row_of_a(int64_t i, const Chunk& chunk) const {
    return static_cast<const A*>(p.a) + (t.row + i) * p.depth + chunk.from;
  }

  // Rows of b broadcast, the rows of a turned into columns of a panel: columns × rows, turned back at the end.
  void add(const Chunk& chunk, bool first) {
    take_scales(chunk);
    const int words = int(round_up(chunk.count, 2 * W)) / (PAIRS ? 2 : 1), padded = vectors(t.rows);
    for (int i = 0; i < t.rows; ++i) fp8::pack_steps<PAIRS>(row_of_a(i, chunk), chunk.count, rows_packed + i * LD);
    for (int i = t.rows; i < padded; ++i) std::fill_n(rows_packed + i * LD, words, 0.0f);
    transpose(rows_packed, LD, rows_turned, turned_ld, padded, words);
    for (int o = 0; o < t.columns; o += BLOCK) {
      const int some = std::min(BLOCK, t.columns - o);
      const F* const from = static_cast<const F*>(p.b) + (t.column + o) * p.depth + chunk.from;
      for (int i = some; i < std::min(some + BLOCK, t.columns - o); ++i) fetch(from + i * p.depth, chunk.count);
      for (int i = 0; i < some; ++i) fp8::pack_steps<PAIRS>(from + i * p.depth, chunk.count, weights + i * LD);
      float* const c = turned + int64_t(o) * turned_ld;
      Gemm g{weights, LD, 1, rows_turned, turned_ld, c, turned_ld, first ? nullptr : c, turned_ld, words};
      g.of_rows = of_columns + o, g.of_columns = of_rows;
      gemm<PAIRS, true>(g, some, padded / W);
    }
  }

  // Rows of a broadcast, those of b decoded into a panel.
  void add_turned(const Chunk& chunk, bool first) {
    take_scales(chunk);
    const F* const from = static_cast<const F*>(p.b) + chunk.from * p.outputs + t.column;
    const int words = PAIRS ? (chunk.count + 1) / 2 : chunk.count;
    for (int i = 0; i < t.rows; ++i) pack_in_order<PAIRS>(row_of_a(i, chunk), chunk.count, rows_packed + i * LD);
    for (int k = 0; k < words; ++k) {
      const int row = PAIRS ? 2 * k : k;
      for (int j = 0; j < t.columns; j += STEP) {
        vf x[4], mate[4]{};
        load_in_order(from + row * p.outputs + j, t.columns - j, x);
        if (PAIRS && row + 1 < chunk.count) load_in_order(from + (row + 1) * p.outputs + j, t.columns - j, mate);
        for (int v = 0; v < 4 && j + v * W < t.columns; ++v) {
          float* const dst = weights + k * int64_t(tile_ld) + j + v * W;
          PAIRS ? store_mated(dst, x[v], mate[v]) : store(dst, x[v]);
        }
      }
    }
    Gemm g{rows_packed, LD, 1, weights, tile_ld, tile, tile_ld, first ? nullptr : tile.data(), tile_ld, words};
    g.of_rows = of_rows, g.of_columns = of_columns;
    gemm<PAIRS, true>(g, t.rows, vectors(t.columns) / W);
  }

  const Params& p;
  const int rows, tile_ld, turned_ld;
  Buffer tile;         // rows × columns
  Buffer turned;       // columns × rows
  Buffer rows_packed;  // a chunk of each row of a
  Buffer rows_turned;  // the same turned
  Buffer weights;      // a chunk of b
  Buffer of_rows, of_columns;  // scales of a chunk
  const float* a_scales[TASK_ROWS];
  const float* b_scales[TASK_COLUMNS];
  Task t;
};

}  // namespace accel::ACCEL_ISA::fp8
