// Window attention on the CPU: forward, and a backward that recomputes the probabilities.
//
// One (window, head) at a time: its rows of q, k and v are gathered into packed operands, logits and probabilities of a
// block of rows live in the cache, results are scattered back.
// Logits are kept in units of log2(e), so that the softmax needs 2^x only.

#include "backward.h"
#include "forward.h"

namespace accel::ACCEL_ISA::window {

int width() { return W; }

// Logit bias of heads [from, to): from a table (rows, H) or a dense (H, N, N) bias, or one head of zeros.
void expand_bias(const Params& p, const float* table, const float* dense, float* out, int64_t from, int64_t to) {
  const int N = p.tokens, ld = int(padded_to(N, W));
  const TableIndex index(p.window);
  const int64_t rows = table ? index.rows() : 0;
  std::vector<float> column(size_t(rows) + W), row(size_t(ld) + W);
  for (int64_t h = from; h < to; ++h) {
    // The head's column back to front: the keys of a window's line then read it forwards, whole vectors at a time.
    for (int64_t r = 0; r < rows; ++r) column[size_t(rows - 1 - r)] = table[r * p.heads + h] * LOG2_E;
    for (int i = 0; i < N; ++i) {
      if (table) {
        index.for_each_line(i, 0, N, [&](int64_t j, int64_t first, int64_t count) {
          const float* line = column.data() + (rows - 1 - first);
          for (int64_t x = 0; x < count; x += W) store(row.data() + j + x, load(line + x));
        });
      } else {
        for (int j = 0; j < N; ++j) row[size_t(j)] = dense ? dense[(h * N + i) * N + j] * LOG2_E : 0.0f;
      }
      std::fill(row.begin() + N, row.begin() + ld, -std::numeric_limits<float>::infinity());
      std::memcpy(out + (h * N + i) * ld, row.data(), size_t(ld) * sizeof(float));
    }
  }
}

namespace {

// Whether bf16 can hold what padded tokens do: their q, k and v are those of a bias that may be fp32.
bool holds_padding(const Params& p) {
  if (!p.qkv_bias || std::equal(p.size, p.size + 3, p.padded)) return true;
  return std::all_of(p.qkv_bias, p.qkv_bias + 3 * int64_t(p.heads) * p.head_dim, [](float x) {
    bf16 rounded;
    from_float(x, &rounded);
    return to_float(rounded) == x;
  });
}

// f(T, whether in pairs): cosine attention divides q and k by their norms, and rounding those would move its logits.
template <typename F>
void choose(const Params& p, F f) {
  if (p.dtype == Dtype::f32) f(float{}, std::false_type{});
  if (p.dtype == Dtype::f16) f(fp16{}, std::false_type{});
  if (p.dtype != Dtype::bf16) return;
  if constexpr (IN_PAIRS<bf16>) {
    if (!p.head_scale && holds_padding(p)) return f(bf16{}, std::true_type{});
  }
  f(bf16{}, std::false_type{});
}

}  // namespace

void window_attention_forward(const Params& p, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  choose(p, [&](auto element, auto pairs) { forward<decltype(element), pairs()>(p, from, to); });
}

void window_attention_backward(const BackwardParams& p, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  choose(p.forward, [&](auto element, auto pairs) {
    Backward<decltype(element), pairs()> backward(p);
    for (int64_t task = from; task < to; ++task) backward.run(task);
  });
}

}  // namespace accel::ACCEL_ISA::window
