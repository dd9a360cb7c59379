// Products of many rows. Those of a stand side by side in panels, which all tasks read; a row of b is decoded once for a
// block of them and its words are broadcast. A chunk's products are added up before they meet their scales.
#pragma once

#include "tasks.h"

namespace accel::ACCEL_ISA::fp8 {

// Words of a chunk of a row: whole vectors, zeros behind the last element. In the order of steps, halves of which are told
// apart: the first 2·W elements make the first words.
template <bool PAIRS, typename T>
inline void pack_steps(const T* src, int count, float* dst) {
  constexpr int HALF = STEP_VECTORS<PAIRS> / 2;
  for (int i = 0; i < count; i += STEP, dst += 2 * HALF * W) {
    vf x[2 * HALF];
    load_words<PAIRS>(src + i, count - i, x);
    for (int v = 0; v < HALF; ++v) store(dst + v * W, x[2 * v]);
    if (count - i > 2 * W)
      for (int v = 0; v < HALF; ++v) store(dst + (HALF + v) * W, x[2 * v + 1]);
  }
}

template <bool PAIRS>
inline int words_of(const Chunk& chunk) {
  return int(round_up(chunk.count, 2 * W)) / (PAIRS ? 2 : 1);
}

// The rows of a, turned: for each block of them and each chunk its words, and a row of their scales.
template <typename A>
class Panels {
 public:
  static constexpr bool PAIRS = PAIRS_OF<A>;

  explicit Panels(const Params& p) : p(p), ld(spread(vectors(int(p.block_rows())))) {}

  int64_t words() const { return (CHUNK / (PAIRS ? 2 : 1) + 1) * int64_t(ld); }

  float* at(int64_t block, int64_t chunk) const { return p.panels + ((block - p.from_block) * p.count + chunk) * words(); }

  void pack(int64_t from, int64_t to) const {
    Buffer rows(vectors(int(p.block_rows())) * int64_t(CHUNK_LD));
    for (int64_t i = from; i < to; ++i) pack(p.from_block + i / p.count, i % p.count, rows);
  }

  const Params& p;
  const int ld;

 private:
  void pack(int64_t block, int64_t c, float* words) const {
    const Chunk& chunk = p.chunks[c];
    const int64_t row = p.row_of(block);
    const int rows = int(p.row_of(block + 1) - row), padded = vectors(rows), count = words_of<PAIRS>(chunk);
    float *panel = at(block, c), *scales = panel + int64_t(count) * ld;
    const A* src = static_cast<const A*>(p.a) + row * p.depth + chunk.from;
    for (int i = 0; i < rows; ++i, src += p.depth) pack_steps<PAIRS>(src, chunk.count, words + i * CHUNK_LD);
    for (int i = rows; i < padded; ++i) std::fill_n(words + i * CHUNK_LD, count, 0.0f);
    transpose(words, CHUNK_LD, panel, ld, padded, count);
    for (int i = 0; i < padded; ++i)
      scales[i] = p.a_scale && i < rows ? scales_of(p.a_scale, row + i, p.a_rows, p.scales)[chunk.scale] : 1.0f;
  }
};

template <typename A, typename F>
class Many {
 public:
  explicit Many(const Params& p)
      : p(p),
        panels(p),
        block(panels.ld <= 48 ? 24 : 48),
        together(PAIRS ? 2 : 1),
        ld(panels.ld),
        tile_ld(spread(p.task_columns)),
        tile(vectors(int(p.block_rows())) * int64_t(tile_ld)),
        turned(vectors(int(p.task_columns)) * int64_t(ld)),
        weights_ld(together * WORDS + 16),
        weights(block * int64_t(weights_ld)),
        of_columns(vectors(block)) {}

  void run() {
    for (Task task; claim(p, task);) {
      t = task;
      for (int o = 0; o < t.columns; ++o) scales[o] = scales_of(p.b_scale, t.column + o, p.b_rows, p.scales);
      for (int o = t.columns; o < vectors(t.columns); ++o)
        std::fill_n(turned + int64_t(o) * ld, vectors(t.rows), 0.0f);
      for (int64_t c = 0; c < p.count;) c = add(c);
      transpose(turned, ld, tile, tile_ld, vectors(t.columns), vectors(t.rows));
      finish_tile(p, t, tile, tile_ld);
    }
  }

 private:
  static constexpr bool PAIRS = PAIRS_OF<A>;
  static constexpr int WORDS = CHUNK / (PAIRS ? 2 : 1);  // of a chunk
  static constexpr int64_t CACHED = 5 << 14;  // words of panels that meet a block of b before the next one does: 320 KB

  // Adds the products of chunks from `first` on, of as many as a cache holds, and gives the next one.
  int64_t add(int64_t first) {
    const int64_t end = std::min(p.count, first + std::max<int64_t>(1, CACHED / panels.words() / together) * together);
    for (int o = 0; o < t.columns; o += block) {
      const int some = std::min(block, t.columns - o);
      const F* const rows = static_cast<const F*>(p.b) + (t.column + o) * p.depth;
      for (int64_t c = first; c < end; c += together) {
        const int64_t last = std::min(end, c + together);
        for (int i = 0; i < some; ++i) {
          const F* const row = rows + i * p.depth;
          for (int64_t j = c; j < last; ++j)
            pack_steps<PAIRS>(row + p.chunks[j].from, p.chunks[j].count, weights + i * weights_ld + (j - c) * WORDS);
        }
        // soon wanted: what follows in each row, or what the next block begins with
        const int64_t next = last < end ? p.chunks[last].from : block * p.depth + p.chunks[first].from;
        const int calls = int(last - c) * gemm_calls(some, vectors(t.rows) / W, WORDS);
        Ahead ahead(rows + next, p.depth, together * CHUNK, block, calls);
        for (int64_t j = c; j < last; ++j) multiply(j, weights + (j - c) * WORDS, o, some, ahead);
      }
    }
    return end;
  }

  void multiply(int64_t c, const float* rows, int o, int some, Ahead& ahead) {
    const Chunk& chunk = p.chunks[c];
    for (int i = 0; i < some; ++i) of_columns[i] = scales[o + i][chunk.scale];
    const float* const panel = panels.at(t.block, c);
    float* const to = turned + int64_t(o) * ld;
    const int words = words_of<PAIRS>(chunk);
    Gemm g{rows, weights_ld, 1, panel, ld, to, ld, c ? to : nullptr, ld, words};
    g.of_rows = of_columns, g.of_columns = panel + int64_t(words) * ld;
    gemm<PAIRS, true>(g, some, vectors(t.rows) / W, [&] { ahead(); });
  }

  const Params& p;
  const Panels<A> panels;
  const int block, together;  // rows of b that meet a panel, and chunks of them that are decoded before
  const int ld, tile_ld;
  Buffer tile;        // rows × columns
  Buffer turned;      // columns × rows
  const int weights_ld;
  Buffer weights;     // chunks of a block of b
  Buffer of_columns;  // scales of one
  const float* scales[TASK_COLUMNS];
  Task t;
};

}  // namespace accel::ACCEL_ISA::fp8
