// The sums over chunks, and their gradients, a panel of the values at a time: what each chunk sees is put down on the way.
#pragma once

#include "cpu/linear/gau_attention/weights.h"
#include "params.h"

namespace accel::ACCEL_ISA::flash {

using namespace gau;
using flash_mix::BackwardParams, flash_mix::Chunk, flash_mix::Params, flash_mix::Sequence, flash_mix::Task;

constexpr int BLOCK_ROWS = 256;  // tokens handled together
static_assert(BLOCK_ROWS == BLOCK_KEYS);

inline int width_of(const Params& p, int panel) { return std::min(p.panel, p.pairs.value_dim - panel * p.panel); }

// Starts to bring a part of a row some rows behind row i of `count` into the cache: packing waits for memory, not for work.
template <typename T>
void fetch_later(const T* row, const Strided& x, int i, int count, int width) {
  if (i + 8 < count) fetch(row + 8 * x.token, width * int(sizeof(T)));
}

inline bool hidden(const Params& p, const Chunk& c, int64_t at) {
  return p.key_mask && !p.key_mask[c.batch * p.tokens + c.first + at];
}

// Sums that are put down as second operands of products, which add up over their rows; where they are rounded, in one part
// or two.
template <bool PAIRS>
class SummedSlots {
 public:
  SummedSlots(float* data, int panels, int rows, int columns, int parts)
      : parts(PAIRS ? parts : 1),
        ld(PAIRS ? spread(2 * vectors(words_of<true>(columns))) : spread(columns)),
        data_(data),
        panels_(panels),
        lines_(PAIRS ? (rows + 1) / 2 : rows) {}

  void write(int64_t slot, int panel, const Words<>& from, int rows) {
    for (int part = 0; part < parts; ++part) {
      float* dst = place(slot, panel, part);
      for (int i = 0; i < rows; i += PAIRS ? 2 : 1, dst += ld)
        for (int j = 0; j < from.padded; j += W) {
          vf x = load(from.at(i) + j), y{};
          if (!PAIRS) {
            store(dst + j, x);
            continue;
          }
          if (i + 1 < rows) y = load(from.at(i + 1) + j);
          if (part) x = rest_of(x), y = rest_of(y);
          store_mated(dst + j, x, y);
        }
    }
  }

  const float* at(int64_t slot, int panel, int part) const { return place(slot, panel, part); }

  const int parts;
  const int ld;

 private:
  float* place(int64_t slot, int panel, int part) const {
    return data_ + ((slot * panels_ + panel) * parts + part) * lines_ * ld;
  }

  float* const data_;
  const int panels_;
  const int64_t lines_;
};

// The same as rows of words.
template <bool PAIRS>
class Slots {
 public:
  Slots(float* data, int panels, int rows, int columns)
      : data_(data), panels_(panels), rows_(rows), words_(vectors(words_of<PAIRS>(columns))), row_(round_up(words_of<PAIRS>(columns), 16)) {}

  void write(int64_t slot, int panel, const Words<>& from) {
    for (int i = 0; i < rows_; ++i) {
      float* dst = at(slot, panel, i);
      if constexpr (PAIRS) {
        for (int j = 0; j < from.padded; j += 2 * W)
          store_halves(dst + j / 2, load(from.at(i) + j), j + W < from.padded ? load(from.at(i) + j + W) : vf{});
      } else {
        std::copy_n(from.at(i), words_, dst);
      }
    }
  }

  void read(int64_t slot, int panel, const Words<PAIRS>& to) const {
    for (int i = 0; i < rows_; ++i) std::copy_n(at(slot, panel, i), words_, to.at(i));
  }

 private:
  float* at(int64_t slot, int panel, int row) const {
    return data_ + ((slot * panels_ + panel) * rows_ + row) * row_;
  }

  float* const data_;
  const int panels_, rows_, words_;
  const int64_t row_;
};

// Rows of a block of tokens with a panel of wide ones, which are added up over the tokens.
template <typename T>
class Walk {
  static constexpr bool PAIRS = IN_PAIRS<T>;

 public:
  // The sum is (lin_dim, panel), or turned round.
  Walk(const Params& p, bool turned)
      : p(p),
        turned(turned),
        size(p.pairs.value_dim),
        panels(p.panels),
        narrow(BLOCK_ROWS, p.lin_dim),
        wide(BLOCK_ROWS, p.panel),
        narrow_summed(BLOCK_ROWS, narrow),
        wide_summed(BLOCK_ROWS, wide),
        sum(turned ? wide.columns() : p.lin_dim, turned ? p.lin_dim : wide.columns()) {}

 protected:
  void begin(const float* from) {
    for (int i = 0; i < rows(); ++i) sum.clear(i);
    if (from) each([&](float& x, int64_t at) { x = from[at]; });
  }
  void end(float* to) {
    each([&](float& x, int64_t at) { to[at] = x; });
  }
  void add_numbers(const float* from) {
    each([&](float& x, int64_t at) { x += from[at]; });
  }

  // sum += mul · narrowᵀ · wide, over `count` tokens; in fp32 the factor is in `narrow` already.
  void add(int count, float mul) {
    if (PAIRS && count % 2) narrow.clear(count), wide.clear(count), ++count;
    narrow_summed.take(narrow, 0, count), wide_summed.take(wide, 0, count);
    const Summed<PAIRS>&a = turned ? wide_summed : narrow_summed, &b = turned ? narrow_summed : wide_summed;
    gemm<PAIRS>({a.at(0), 1, a.ld, b.at(0), b.ld, sum.at(0), sum.ld, sum.at(0), sum.ld, PAIRS ? count / 2 : count, mul},
                rows(), sum.padded / W);
  }

  int rows() const { return turned ? width : p.lin_dim; }

  const Params& p;
  const bool turned;
  const int size, panels;
  int panel = 0, width = 0;
  Rows<PAIRS> narrow;
  struct Wide : Words<PAIRS> {
    using Words<PAIRS>::Words;
    int columns() const { return this->size; }
  } wide;
  Summed<PAIRS> narrow_summed, wide_summed;
  Words<> sum;

 private:
  // f(number of the sum, its place in (lin_dim, E))
  template <typename F>
  void each(F f) {
    for (int d = 0; d < p.lin_dim; ++d)
      for (int e = 0; e < width; ++e)
        f(turned ? sum.at(e)[d] : sum.at(d)[e], int64_t(d) * size + panel * p.panel + e);
  }
};

// Sums of keys times values. A task is a sequence and a panel.
template <typename T>
class States : Walk<T> {
  static constexpr bool PAIRS = IN_PAIRS<T>;
  using Base = Walk<T>;
  using Base::narrow, Base::p, Base::panel, Base::panels, Base::size, Base::sum, Base::turned, Base::wide, Base::width;

 public:
  States(const Params& p, bool turned)
      : Base(p, turned), slots(p.states, panels, turned ? wide.columns() : p.lin_dim, turned ? p.lin_dim : wide.columns(), p.state_parts) {}

  void run(int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      panel = int(task % panels), width = width_of(p, panel);
      sequence(task / panels);
    }
  }

 private:
  void sequence(int64_t n) {
    const Sequence& s = p.sequences[n];
    const int64_t place = n * p.lin_dim * size;
    Base::begin(p.state ? p.state + place : nullptr);
    for (int64_t c = s.first; c < s.end; ++c) {
      if (p.causal) slots.write(c, panel, sum, Base::rows());
      const bool seen = !p.causal || c + 1 < s.end || (p.state_out && p.chunks[c].whole);
      p.bad[c * panels + panel] = seen && add_chunk(p.chunks[c]);
    }
    if (!p.causal) slots.write(n, panel, sum, Base::rows());
    if (p.state_out) Base::end(p.state_out + place);
  }

  // Whether something was not finite.
  bool add_chunk(const Chunk& c) {
    bool bad = false;
    for (int64_t at = 0; at < c.count; at += BLOCK_ROWS) {
      const int count = int(std::min<int64_t>(BLOCK_ROWS, c.count - at));
      narrow.forget();
      for (int i = 0; i < count; ++i) {
        if (hidden(p, c, at + i)) {
          narrow.clear(i), wide.clear(i);
          continue;
        }
        pack_row<T>(narrow, i, row_of<T>(p.lin_k, c.batch, 0, c.first + at + i), 1.0f);
        const T* v = row_of<T>(p.pairs.v, c.batch, 0, c.first + at + i) + panel * p.panel;
        fetch_later(v, p.pairs.v, i, count, width);
        bad |= !pack_panel<T>(v, nullptr, wide.at(i), width);
      }
      bad |= narrow.any_bad();
      Base::add(count, 1.0f);
    }
    return bad;
  }

  SummedSlots<PAIRS> slots;
};

// Sums of queries times upstream gradients times gates, from the last chunk to the first.
template <typename T>
class GradStates : Walk<T> {
  static constexpr bool PAIRS = IN_PAIRS<T>;
  using Base = Walk<T>;
  using Base::narrow, Base::p, Base::panel, Base::panels, Base::size, Base::sum, Base::wide, Base::width;

 public:
  explicit GradStates(const BackwardParams& b)
      : Base(b.forward, false), b(b), slots(b.grad_states, panels, p.lin_dim, wide.columns()) {}

  void run(int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      panel = int(task % panels), width = width_of(p, panel);
      sequence(task / panels);
    }
  }

 private:
  void sequence(int64_t n) {
    const Sequence& s = p.sequences[n];
    const int64_t place = n * p.lin_dim * size;
    const float* behind = b.grad_state ? b.grad_state + place : nullptr;
    const bool part = s.end > s.first && !p.chunks[s.end - 1].whole;  // it sees the state that goes out, too
    Base::begin(part ? nullptr : behind);
    for (int64_t c = s.end - 1; c >= s.first; --c) {
      if (p.causal) slots.write(c, panel, sum);
      const bool wanted = !p.causal || c > s.first || b.grad_initial_state;
      b.grad_bad[c * panels + panel] = wanted && add_chunk(p.chunks[c], s.scale);
      if (part && c == s.end - 1 && behind) Base::add_numbers(behind);
    }
    if (!p.causal) slots.write(n, panel, sum);
    if (b.grad_initial_state) Base::end(b.grad_initial_state + place);
  }

  bool add_chunk(const Chunk& c, float scale) {
    bool bad = false;
    for (int64_t at = 0; at < c.count; at += BLOCK_ROWS) {
      const int count = int(std::min<int64_t>(BLOCK_ROWS, c.count - at));
      narrow.forget();
      for (int i = 0; i < count; ++i) {
        const int64_t t = c.first + at + i;
        pack_row<T>(narrow, i, row_of<T>(p.lin_q, c.batch, 0, t), scale);
        const T* gate = p.gate.data ? row_of<T>(p.gate, c.batch, 0, t) + panel * p.panel : nullptr;
        const T* src = row_of<T>(b.grad_out, c.batch, 0, t) + panel * p.panel;
        fetch_later(src, b.grad_out, i, count, width);
        if (gate) fetch_later(gate, p.gate, i, count, width);
        bad |= !pack_panel<T>(src, gate, wide.at(i), width);
      }
      bad |= narrow.any_bad();
      Base::add(count, scale);
    }
    return bad;
  }

  const BackwardParams& b;
  Slots<PAIRS> slots;
};

}  // namespace accel::ACCEL_ISA::flash
