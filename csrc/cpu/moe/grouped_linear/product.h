// Products of grouped rows with the weights of their expert, a block at a time, handed to an epilogue in fp32.
#pragma once

#include "pack.h"

namespace accel::ACCEL_ISA::moe {

// The next task, null where none is left.
inline const Task* claim(const Tasks& tasks) {
  const int64_t i = tasks.next->fetch_add(1, std::memory_order_relaxed);
  return i < tasks.count ? tasks.list + i : nullptr;
}

// out[r · ldo + o] = row o of `w` times row r of `x`, rows [0, O) and [0, R); `x` holds steps. `w` is read as it lies in
// memory, few rows at a time, which is fastest in one stream.
template <typename T, int O, int R>
inline void dots(const T* w, int64_t ldw, int64_t depth, const float* x, int64_t ldx, float* out, int64_t ldo) {
  constexpr int CHAINS = O * R >= 4 ? 1 : 4 / (O * R);  // sums that do not wait for one another
  vf acc[O][R][CHAINS];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < CHAINS; ++c) acc[o][r][c] = vf{};
  const auto step = [&](auto load_weights, int64_t i, int c) {
    const float* at = x + i / (2 * W) * STEP_FLOATS<T>;
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      vf a, b{};
      load_weights(w + o * ldw, a, b);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[o][r][c] = multiply_add_step<T>(acc[o][r][c], a, b, at + r * ldx);
    }
  };
  const auto whole = [&](int64_t i, int c) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o)
      for (size_t line = 0; line < 2 * W * sizeof(T); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(w + o * ldw + i) + O * STREAM_AHEAD + line, 0, 2);
    step([i](const T* row, vf& a, vf& b) { load_step(row + i, a, b); }, i, c);
  };
  int64_t i = 0;
  for (; i + CHAINS * 2 * W <= depth; i += CHAINS * 2 * W)
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) whole(i + c * 2 * W, c);
  for (; i + 2 * W <= depth; i += 2 * W) whole(i, 0);
  if (i < depth) step([depth](const T* row, vf& a, vf& b) { load_last_step(row, depth, a, b); }, i, 0);
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vf all = acc[o][r][0];
#pragma GCC unroll 4
      for (int c = 1; c < CHAINS; ++c) all += acc[o][r][c];
      out[r * ldo + o] = sum_lanes(all)[0];
    }
}

template <typename T, int R>
inline void dot_rows(const T* w, int64_t ldw, int64_t depth, int outputs, const float* x, int64_t ldx, float* out,
                     int64_t ldo) {
  constexpr int O = R >= 4 && W == 16 ? 2 : 1;  // two read x half as often
  int o = 0;
  for (; o + O <= outputs; o += O) dots<T, O, R>(w + o * ldw, ldw, depth, x, ldx, out + o, ldo);
  for (; o < outputs; ++o) dots<T, 1, R>(w + o * ldw, ldw, depth, x, ldx, out + o, ldo);
}

template <typename T, int R = int(FEW_ROWS)>
inline void dot_few(int rows, const T* w, int64_t ldw, int64_t depth, int outputs, const float* x, int64_t ldx,
                    float* out, int64_t ldo) {
  if constexpr (R > 1) {
    if (rows < R) return dot_few<T, R - 1>(rows, w, ldw, depth, outputs, x, ldx, out, ldo);
  }
  dot_rows<T, R>(w, ldw, depth, outputs, x, ldx, out, ldo);
}

// For each task, epilogue(task, tile, ld, second): row i of the task's product is at tile + i · ld, the columns that begin
// `p.second` behind the others at `second` floats behind them. `Source` is where weights come from.
template <typename T, template <typename> class Source = Stored>
class Products {
 public:
  explicit Products(const Product& p)
      : p(p),
        x(p.x),
        spans(p.second ? 2 : 1),
        width(int(TASK_COLUMNS / spans)),
        words(words_of<T>(p.depth)),
        rows(most_rows(p.tasks)),
        panels(p.transposed || rows > FEW_ROWS),
        tile_ld(spread(spans * width)),
        tile(vectors(rows) * tile_ld),
        turned(panels && !p.transposed ? width * int64_t(spread(rows)) : 0),
        rows_packed(panels ? vectors(rows) * int64_t(spread(CHUNK)) : 0),
        rows_turned(panels && !p.transposed ? CHUNK * int64_t(spread(rows)) : 0),
        weights(!panels ? 0 : p.transposed ? CHUNK * int64_t(spread(width)) : BLOCK * int64_t(spread(CHUNK))),
        two_rows(2 * vectors(width)),
        steps(p.transposed ? 0 : std::min<int64_t>(rows, FEW_ROWS) * steps_ld()) {}

  template <typename Epilogue>
  void run(Epilogue epilogue) {
    while (const Task* task = claim(p.tasks)) {
      const Source<T> source(p, task->expert);
      const int offset = vectors(int(task->columns));
      few_ready = false;
      for (int s = 0; s < spans; ++s) {
        const int64_t column = task->column + s * p.second;
        if (p.transposed)
          many_transposed(*task, source, column, tile + s * offset);
        else if (task->rows <= FEW_ROWS)
          few(*task, source, column, tile + s * offset);
        else
          many(*task, source, column, tile + s * offset);
      }
      epilogue(*task, tile.data(), tile_ld, offset);
    }
  }

 private:
  static constexpr int BLOCK = 48;  // rows of weights that meet a panel

  static int most_rows(const Tasks& tasks) {
    int64_t most = 0;
    for (int64_t i = 0; i < tasks.count; ++i) most = std::max(most, tasks.list[i].rows);
    return int(most);
  }

  int64_t steps_ld() const { return (p.depth + 2 * W - 1) / (2 * W) * STEP_FLOATS<T>; }

  // Weights read where they lie.
  void few(const Task& t, const Source<T>& source, int64_t column, float* made) {
    const int64_t ld = steps_ld();
    if (!few_ready)
      for (int64_t i = 0; i < t.rows; ++i) pack_steps(x.at(t.row + i), p.depth, steps + i * ld);
    few_ready = true;
    dot_few<T>(int(t.rows), source.row(column), source.ld(), p.depth, int(t.columns), steps, ld, made, tile_ld);
  }

  // Weights broadcast where they lie, the rows of x turned into columns of a panel: outputs × rows, turned back at the end.
  void many(const Task& t, const Source<T>& source, int64_t column, float* made) {
    const int rows = int(t.rows), padded = vectors(rows), ld = spread(padded), columns = int(t.columns);
    for (int64_t from = 0; from < words; from += CHUNK) {
      const int count = int(std::min<int64_t>(CHUNK, words - from));
      pack_rows(t, from, count);
      transpose(rows_packed, spread(CHUNK), rows_turned, ld, padded, vectors(count));
      for (int o = 0; o < columns; o += BLOCK) {
        const int some = std::min(BLOCK, columns - o);
        int64_t lda;
        const float* a = source.words(column + o, some, from, count, weights, lda);
        float* c = turned + int64_t(o) * ld;
        // soon wanted, and scattered: this chunk of the next block, or the next chunk of the first
        const bool last = o + some == columns;
        const int64_t row = last ? column : column + o + some, word = last ? from + count : from;
        const int rest = !last ? columns - o - some : word < words ? columns : 0;
        Ahead ahead(source.row(row) + word * PER_WORD<T>, source.ld() * int64_t(sizeof(T)),
                    CHUNK * PER_WORD<T> * int64_t(sizeof(T)), std::min(BLOCK, rest), gemm_calls(some, padded / W, count));
        gemm<IN_PAIRS<T>>({a, lda, 1, rows_turned, ld, c, ld, from ? c : nullptr, ld, count}, some, padded / W,
                          [&] { ahead(); });
      }
    }
    for (int o = columns; o < vectors(columns); ++o) std::fill_n(turned + int64_t(o) * ld, padded, 0.0f);
    transpose(turned, ld, made, tile_ld, vectors(columns), padded);
  }

  // Rows of x broadcast, rows of weights packed into a panel.
  void many_transposed(const Task& t, const Source<T>& source, int64_t column, float* made) {
    const int columns = int(t.columns), padded = vectors(columns), ld = spread(width);
    for (int64_t from = 0; from < words; from += CHUNK) {
      const int count = int(std::min<int64_t>(CHUNK, words - from));
      pack_rows(t, from, count);
      source.columns(from, count, column, columns, weights, ld, two_rows);
      const int64_t next = (from + count) * PER_WORD<T>;
      const int more = int(std::min<int64_t>(CHUNK * PER_WORD<T>, p.depth - next));
      Ahead ahead(source.row(next) + column, source.ld() * int64_t(sizeof(T)), columns * int64_t(sizeof(T)), more,
                  gemm_calls(int(t.rows), padded / W, count));
      gemm<IN_PAIRS<T>>({rows_packed, spread(CHUNK), 1, weights, ld, made, tile_ld, from ? made : nullptr, tile_ld, count},
                        int(t.rows), padded / W, [&] { ahead(); });
    }
  }

  // Words [from, from + count) of a task's rows; rows of zeros behind them up to whole vectors.
  void pack_rows(const Task& t, int64_t from, int count) {
    float* dst = rows_packed;
    for (int64_t i = 0; i < t.rows; ++i, dst += spread(CHUNK)) pack_row(x.at(t.row + i), p.depth, from, count, dst);
    for (int64_t i = t.rows; i < vectors(int(t.rows)); ++i, dst += spread(CHUNK)) std::fill_n(dst, vectors(count), 0.0f);
  }

  const Product& p;
  const RowsOf<T> x;
  const int spans, width;
  const int64_t words;
  const int rows;     // the most of a task
  const bool panels;  // whether any task multiplies those
  const int tile_ld;
  Buffer tile;         // the task's rows × the columns of both spans
  Buffer turned;       // outputs × rows
  Buffer rows_packed;  // a chunk of each row
  Buffer rows_turned;  // the same turned
  Buffer weights;      // a chunk of weights, where they have to be packed
  Buffer two_rows;
  Buffer steps;  // few rows, whole
  bool few_ready = false;
};

}  // namespace accel::ACCEL_ISA::moe
