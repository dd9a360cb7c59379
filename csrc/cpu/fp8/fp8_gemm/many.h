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
        panels(p.turned ? 0 : PANELS + (CHUNK + 1) * turned_ld),
        weights(p.turned ? CHUNK * int64_t(tile_ld) : BLOCK * int64_t(LD)),
        of_rows(vectors(rows)),
        of_columns(vectors(int(p.task_columns))) {}

  void run() {
    for (Task task; claim(p, task);) {
      begin(task);
      if (p.turned) {
        for (int64_t c = 0; c < p.count; ++c) add_turned(p.chunks[c], c == 0);
      } else {
        for (int64_t c = 0; c < p.count;) c = add(c);
        transpose(turned, turned_ld, tile, tile_ld, vectors(t.columns), vectors(t.rows));
      }
      finish_tile(p, t, tile, tile_ld);
    }
  }

 private:
  static constexpr bool PAIRS = PAIRS_OF<A>;
  static constexpr int BLOCK = 48;         // rows of b that meet a panel
  static constexpr int LD = 144;           // words of a chunk, an odd number of cache lines
  static constexpr int64_t PANELS = 1 << 16;  // words of a that meet them before the next block of b: 256 KB

  void begin(const Task& task) {
    t = task;
    for (int i = 0; i < t.rows; ++i)
      a_scales[i] = p.a_scale ? scales_of(p.a_scale, t.row + i, p.a_rows, p.scales) : nullptr;
    for (int o = 0; o < t.columns; ++o) b_scales[o] = scales_of(p.b_scale, t.column + o, p.b_rows, p.scales);
    if (p.turned) return;
    for (int o = t.columns; o < vectors(t.columns); ++o)
      std::fill_n(turned + int64_t(o) * turned_ld, vectors(t.rows), 0.0f);
  }

  // The scales of a chunk, 1 behind the last of the task.
  void take_a_scales(const Chunk& chunk, float* to) const {
    for (int i = 0; i < vectors(t.rows); ++i) to[i] = i < t.rows && p.a_scale ? a_scales[i][chunk.scale] : 1.0f;
  }
  void take_b_scales(const Chunk& chunk, int from, int count) const {
    for (int o = 0; o < vectors(count); ++o) of_columns[o] = o < count ? b_scales[from + o][chunk.scale] : 1.0f;
  }

  const A* row_of_a(int64_t i, const Chunk& chunk) const {
    return static_cast<const A*>(p.a) + (t.row + i) * p.depth + chunk.from;
  }

  // --- b as it lies: its rows broadcast, those of a turned into columns of panels; columns × rows, turned back at the end ---

  static int words_of(const Chunk& chunk) { return int(round_up(chunk.count, 2 * W)) / (PAIRS ? 2 : 1); }

  // Adds the products of chunks from `first` on, of as many as there is room for, and gives the next one. All of them meet
  // a block of b before the next block, whose rows are read in runs that the memory can serve.
  int64_t add(int64_t first) {
    const int64_t end = pack_panels(first);
    for (int o = 0; o < t.columns; o += BLOCK) {
      const int some = std::min(BLOCK, t.columns - o);
      const float* panel = panels;
      for (int64_t c = first; c < end; ++c) {
        const Chunk& chunk = p.chunks[c];
        const int words = words_of(chunk);
        // soon wanted: what follows in each row, or what the next block begins with
        const int64_t next = c + 1 < end ? chunk.count : BLOCK * p.depth + p.chunks[first].from - chunk.from;
        const F* row = static_cast<const F*>(p.b) + (t.column + o) * p.depth + chunk.from;
        for (int i = 0; i < some; ++i, row += p.depth) {
          fetch(row + next, chunk.count);
          fp8::pack_steps<PAIRS>(row, chunk.count, weights + i * LD);
        }
        take_b_scales(chunk, o, some);
        float* const to = turned + int64_t(o) * turned_ld;
        Gemm g{weights, LD, 1, panel, turned_ld, to, turned_ld, c ? to : nullptr, turned_ld, words};
        panel += int64_t(words) * turned_ld;
        g.of_rows = of_columns, g.of_columns = panel;
        gemm<PAIRS, true>(g, some, vectors(t.rows) / W);
        panel += turned_ld;
      }
    }
    return end;
  }

  // Of each chunk the rows of a, turned, and a row of their scales.
  int64_t pack_panels(int64_t first) {
    if (first == packed_first && t.row == packed_row) return packed_end;
    const int padded = vectors(t.rows);
    float* panel = panels;
    int64_t c = first;
    for (; c < p.count && panel < panels + PANELS; ++c) {
      const Chunk& chunk = p.chunks[c];
      const int words = words_of(chunk);
      for (int i = 0; i < t.rows; ++i) fp8::pack_steps<PAIRS>(row_of_a(i, chunk), chunk.count, rows_packed + i * LD);
      for (int i = t.rows; i < padded; ++i) std::fill_n(rows_packed + i * LD, words, 0.0f);
      transpose(rows_packed, LD, panel, turned_ld, padded, words);
      panel += int64_t(words) * turned_ld;
      take_a_scales(chunk, panel);
      panel += turned_ld;
    }
    packed_first = first, packed_row = t.row, packed_end = c;
    return c;
  }

  // --- b turned: rows of a broadcast, those of b decoded into a panel ---

  void add_turned(const Chunk& chunk, bool first) {
    take_a_scales(chunk, of_rows), take_b_scales(chunk, 0, t.columns);
    for (int i = 0; i < t.rows; ++i) pack_in_order<PAIRS>(row_of_a(i, chunk), chunk.count, rows_packed + i * LD);
    const int words = PAIRS ? (chunk.count + 1) / 2 : chunk.count;
    for (int k = 0; k < words; ++k) pack_turned(chunk, PAIRS ? 2 * k : k, weights + k * int64_t(tile_ld));
    Gemm g{rows_packed, LD, 1, weights, tile_ld, tile, tile_ld, first ? nullptr : tile.data(), tile_ld, words};
    g.of_rows = of_rows, g.of_columns = of_columns;
    gemm<PAIRS, true>(g, t.rows, vectors(t.columns) / W);
  }

  // A row of words: row k of the chunk or, in pairs, that and the next one.
  void pack_turned(const Chunk& chunk, int k, float* dst) const {
    const F* const row = static_cast<const F*>(p.b) + (chunk.from + k) * p.outputs + t.column;
    fetch(row + AHEAD * p.outputs, t.columns);
    if (PAIRS) fetch(row + (AHEAD + 1) * p.outputs, t.columns);
    for (int j = 0; j < t.columns; j += STEP) {
      vf x[4], mate[4]{};
      load_in_order(row + j, t.columns - j, x);
      if (PAIRS && k + 1 < chunk.count) load_in_order(row + p.outputs + j, t.columns - j, mate);
      for (int v = 0; v < 4 && j + v * W < t.columns; ++v)
        PAIRS ? store_mated(dst + j + v * W, x[v], mate[v]) : store(dst + j + v * W, x[v]);
    }
  }

  static constexpr int64_t AHEAD = 16;  // rows that are fetched before they are read

  const Params& p;
  const int rows, tile_ld, turned_ld;
  Buffer tile;         // rows × columns
  Buffer turned;       // columns × rows
  Buffer rows_packed;  // a chunk of each row of a
  Buffer panels;       // chunks of them turned
  Buffer weights;      // a chunk of b
  Buffer of_rows, of_columns;  // scales of a chunk
  const float* a_scales[TASK_ROWS];
  const float* b_scales[TASK_COLUMNS];
  int64_t packed_first = -1, packed_row = -1, packed_end = 0;
  Task t;
};

}  // namespace accel::ACCEL_ISA::fp8
