// Window attention on the CPU: forward, and a backward that recomputes the probabilities.
//
// One (window, head) at a time: its rows of q, k and v are gathered into packed fp32 (roll, padding and partition are
// only addresses), logits and probabilities of a block of rows live in the cache, results are scattered back.
// Logits are kept in units of log2(e), so that the softmax needs 2^x only.

#include "params.h"

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/_gemm.h"
#include "cpu/_philox.h"
#include "cpu/_scratch.h"
#include "cpu/_table.h"

namespace accel::ACCEL_ISA::window {

constexpr float NORM_EPS = 1e-12f;

int width() { return W; }

namespace {

// Rows of logits handled together: all of a small window, else as many as keep the block near the first-level cache.
int rows_at_once(int64_t tokens, int64_t ld) {
  int64_t rows = std::max<int64_t>(12, 4096 / ld);
  return int(tokens <= 64 ? tokens : std::min(tokens, rows));
}

// Where the tokens of a window lie: the memory row of each, −1 for a padded one, and its mask region.
class Window {
 public:
  explicit Window(const Params& p) : p_(p), rows_(size_t(p.tokens)), labels_(size_t(p.tokens)) {
    for (int axis = 0; axis < 3; ++axis) axes_[axis].resize(size_t(p.window[axis]));
  }

  void move_to(int64_t index) {
    if (index == index_) return;
    index_ = index;
    const int64_t image = index / p_.windows, rest = index % p_.windows;
    place(0, rest / (p_.count[1] * p_.count[2]));
    place(1, rest / p_.count[2] % p_.count[1]);
    place(2, rest % p_.count[2]);
    size_t n = 0;
    masked_ = false;
    for (const Place& z : axes_[0])
      for (const Place& y : axes_[1]) {
        const int64_t line = ((image * p_.size[0] + z.at) * p_.size[1] + y.at) * p_.size[2];
        for (const Place& x : axes_[2]) {
          rows_[n] = z.at >= 0 && y.at >= 0 && x.at >= 0 ? line + x.at : -1;
          labels_[n] = z.region * 4 + y.region * 2 + x.region;
          masked_ |= labels_[n] != labels_[0];
          ++n;
        }
      }
  }

  int64_t row(int n) const { return rows_[size_t(n)]; }
  int label(int n) const { return labels_[size_t(n)]; }
  bool masked() const { return masked_; }

 private:
  struct Place {
    int64_t at;  // coordinate on the map, −1 for padding
    int region;
  };

  void place(int axis, int64_t window) {
    const int64_t shift = p_.shift[axis], size = p_.size[axis], padded = p_.padded[axis];
    int64_t rolled = window * p_.window[axis];
    for (Place& place : axes_[axis]) {
      place.region = shift > 0 && rolled >= padded - shift;
      if (p_.roll_first) {
        place.at = rolled < size ? (rolled + shift) % size : -1;
      } else {
        const int64_t at = (rolled + shift) % padded;
        place.at = at < size ? at : -1;
      }
      ++rolled;
    }
  }

  const Params& p_;
  int64_t index_ = -1;
  std::vector<Place> axes_[3];
  std::vector<int64_t> rows_;
  std::vector<int> labels_;
  bool masked_ = false;
};

// Everything a worker needs to compute the probabilities of one (window, head).
template <typename T>
class Core {
 public:
  explicit Core(const Params& p)
      : p(p),
        D(p.head_dim),
        Dp(int(padded_to(p.head_dim, W))),
        N(p.tokens),
        ld(int(padded_to(p.tokens, W))),
        body(p.tokens > 1 && p.tokens % W == 1 ? p.tokens - 1 : ld),
        block(rows_at_once(p.tokens, ld)),
        channels(int64_t(p.heads) * p.head_dim),
        window(p),
        q(int64_t(ld) * Dp),
        k(int64_t(ld) * Dp),
        v(int64_t(ld) * Dp),
        k_t(int64_t(Dp) * ld),
        logits(int64_t(block) * ld),
        q_inverse(ld),
        k_inverse(ld),
        row_max(ld + W),
        row_sum(ld + W),
        mask_(8 * int64_t(ld)),
        last_(padded_to(block, W)) {
    std::fill(last_.data(), last_.end(), -std::numeric_limits<float>::infinity());
    for (float* rows : {q.data(), k.data(), v.data()})  // rows from N to ld stay zero for the transpositions
      std::fill(rows + int64_t(N) * Dp, rows + int64_t(ld) * Dp, 0.0f);
    std::fill(row_sum.data(), row_sum + ld, 1.0f);
    std::fill(row_max.data(), row_max + ld, 0.0f);
  }

  // Gather q, k, v of the window's head; cosine attention normalises q and k. The transposed k, which only makes
  // logits, carries the scale and log2(e).
  void gather(int64_t index, int h) {
    window.move_to(index);
    head = h;
    const float* fill = p.qkv_bias ? p.qkv_bias + int64_t(h) * D : nullptr;
    const T* base = static_cast<const T*>(p.qkv) + int64_t(h) * D;
    scale = p.head_scale ? p.head_scale[h] : p.scale;
    for (int n = 0; n < N; ++n) {
      int64_t row = window.row(n);
      if (row >= 0) {
        const T* token = base + row * 3 * channels;
        load_row(token, q + int64_t(n) * Dp, D, Dp);
        load_row(token + channels, k + int64_t(n) * Dp, D, Dp);
        load_row(token + 2 * channels, v + int64_t(n) * Dp, D, Dp);
      } else {
        fill_row(fill, 0, q + int64_t(n) * Dp);
        fill_row(fill, 1, k + int64_t(n) * Dp);
        fill_row(fill, 2, v + int64_t(n) * Dp);
      }
    }
    if (p.head_scale)
      for (int n = 0; n < N; ++n) {
        q_inverse[n] = normalize(q + int64_t(n) * Dp);
        k_inverse[n] = normalize(k + int64_t(n) * Dp);
      }
    transpose(k, Dp, k_t, ld, ld, Dp, scale * LOG2_E);
    if (window.masked()) fill_mask();
  }

  // logits[0..rows) = 2^(logit − max) for query rows from `first` on; row_max and row_sum are set, nothing is divided.
  void weights(int first, int rows) {
    const float* bias = p.logit_bias + head * p.bias_head_stride + int64_t(first) * ld;
    gemm({q + int64_t(first) * Dp, Dp, 1, k_t, ld, logits, ld, bias, ld, D}, rows, body / W);
    if (body < N) last_logits(first, rows, bias);
    for (int i = 0; i < rows; ++i) {
      float* row = logits + int64_t(i) * ld;
      const float* mask = window.masked() ? mask_ + int64_t(window.label(first + i)) * ld : nullptr;
      if (body == 3 * W) {
        softmax_row<3>(row, mask, first + i, last_[i]);
      } else if (body == 4 * W) {
        softmax_row<4>(row, mask, first + i, last_[i]);
      } else {
        softmax_row<0>(row, mask, first + i, last_[i]);
      }
    }
    if (body < N) last_weights(first, rows);
  }

  // Keep factor (0 or 1/(1−p)) of a weight.
  float keep(int64_t index, int i, int j) const {
    uint64_t position = ((uint64_t(index) * p.heads + head) * N + i) * N + j;
    return philox(p.seed, position) >= p.drop_below ? p.keep_scale : 0.0f;
  }

  const Params& p;
  const int D, Dp, N, ld;
  const int body;  // columns of logits computed as whole vectors: not the last of 49, which would cost a vector a row
  const int block;
  const int64_t channels;
  Window window;
  Buffer q, k, v, k_t, logits;
  Buffer q_inverse, k_inverse;  // 1 / norm of cosine attention, 0 for a zero vector
  Buffer row_max, row_sum;
  int head = 0;
  float scale = 1.0f;

 private:
  void fill_row(const float* fill, int which, float* dst) const {
    for (int d = 0; d < Dp; ++d) dst[d] = fill && d < D ? fill[which * channels + d] : 0.0f;
  }

  // Divide a row by its norm and return 1 / norm.
  float normalize(float* row) const {
    vf squares{};
    for (int d = 0; d < Dp; d += W) squares += load(row + d) * load(row + d);
    float norm = std::sqrt(sum_lanes(squares)[0]);
    float inverse = norm == 0.0f ? 0.0f : 1.0f / std::max(norm, NORM_EPS);
    for (int d = 0; d < Dp; d += W) store(row + d, load(row + d) * inverse);
    return inverse;
  }

  // Row `label` of the mask: what a query of that region adds to each key.
  void fill_mask() {
    for (int label = 0; label < 8; ++label)
      for (int n = 0; n < N; ++n)
        mask_[int64_t(label) * ld + n] = window.label(n) == label ? 0.0f : p.mask_value * LOG2_E;
    for (int label = 0; label < 8; ++label)
      std::fill(mask_ + int64_t(label) * ld + N, mask_ + int64_t(label + 1) * ld, 0.0f);
  }

  // last_[i] = logit of row i and the last key.
  void last_logits(int first, int rows, const float* bias) {
    const float* key = k + int64_t(N - 1) * Dp;
    for (int i = 0; i < rows; ++i) {
      const float* query = q + int64_t(first + i) * Dp;
      vf dot{};
      for (int d = 0; d < Dp; d += W) dot += load(query + d) * load(key + d);
      float logit = sum_lanes(dot)[0] * (scale * LOG2_E) + bias[int64_t(i) * ld + N - 1];
      if (window.masked()) logit += mask_[int64_t(window.label(first + i)) * ld + N - 1];
      last_[i] = logit;
    }
  }

  // The last key's weights, a vector of rows at a time, once the rows' maxima are known.
  void last_weights(int first, int rows) {
    for (int i = 0; i < rows; i += W) {
      vf weight = exp2_nonpositive(load(last_ + i) - load(row_max + first + i));
      store(last_ + i, weight);
      store(row_sum + first + i, load(row_sum + first + i) + weight);
    }
    for (int i = 0; i < rows; ++i) logits[int64_t(i) * ld + N - 1] = last_[i];
  }

  // The first `body` columns of a row; `at_least` is a logit the maximum must cover. NV > 0: they are that many
  // vectors, and stay in registers.
  template <int NV>
  void softmax_row(float* row, const float* mask, int n, float at_least) {
    if constexpr (NV > 0) {
      vf x[NV];
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) x[i] = load(row + i * W);
      if (mask) {
#pragma GCC unroll 4
        for (int i = 0; i < NV; ++i) x[i] += load(mask + i * W);
      }
      vf top = splat(at_least);
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) top = max(x[i], top);
      top = max_lanes(top);
      vf sum{};
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) {
        x[i] = exp2_nonpositive(x[i] - top);
        sum += x[i];
        store(row + i * W, x[i]);
      }
      row_max[n] = top[0];
      row_sum[n] = sum_lanes(sum)[0];
    } else {
      vf top = splat(at_least);
      for (int j = 0; j < body; j += W) {
        vf x = load(row + j);
        if (mask) {
          x += load(mask + j);
          store(row + j, x);
        }
        top = max(x, top);
      }
      top = max_lanes(top);
      vf sum{};
      for (int j = 0; j < body; j += W) {
        vf x = exp2_nonpositive(load(row + j) - top);
        store(row + j, x);
        sum += x;
      }
      row_max[n] = top[0];
      row_sum[n] = sum_lanes(sum)[0];
    }
  }

  Buffer mask_;
  Buffer last_;  // logits, then weights, of the last key where it is not in the body; −∞ otherwise
};

template <typename T>
void forward(const Params& p, int64_t from, int64_t to) {
  Core<T> core(p);
  const int N = core.N, D = core.D, Dp = core.Dp, ld = core.ld;
  Buffer o(int64_t(core.block) * Dp);
  for (int64_t task = from; task < to; ++task) {
    int64_t index = task / p.heads;
    int h = int(task % p.heads);
    core.gather(index, h);
    T* base = static_cast<T*>(p.out) + int64_t(h) * D;
    for (int first = 0; first < N; first += core.block) {
      int rows = std::min(core.block, N - first);
      core.weights(first, rows);
      if (p.dropout)
        for (int i = 0; i < rows; ++i)
          for (int j = 0; j < N; ++j) core.logits[int64_t(i) * ld + j] *= core.keep(index, first + i, j);
      gemm({core.logits, ld, 1, core.v, Dp, o, Dp, nullptr, 0, N}, rows, Dp / W);
      for (int i = 0; i < rows; ++i) {
        int64_t row = core.window.row(first + i);
        if (row >= 0) store_row(base + row * core.channels, o + int64_t(i) * Dp, D, 1.0f / core.row_sum[first + i]);
      }
    }
    float* lse = p.lse + task * N;
    for (int n = 0; n < ld; n += W)
      store(core.row_max + n, (load(core.row_max + n) + log2_positive(load(core.row_sum + n))) * LN_2);
    std::memcpy(lse, core.row_max, size_t(N) * sizeof(float));
  }
}

// Gradient through x / max(|x|, eps), given the normalised row and 1 / max(|x|, eps); padded is a multiple of W.
void through_norm(float* grad, const float* unit, float inverse, int padded) {
  vf dot{};
  for (int d = 0; d < padded; d += W) dot += load(grad + d) * load(unit + d);
  float along = inverse < 1.0f / NORM_EPS ? sum_lanes(dot)[0] : 0.0f;
  for (int d = 0; d < padded; d += W) store(grad + d, (load(grad + d) - load(unit + d) * along) * inverse);
}

template <typename T>
class Backward {
 public:
  explicit Backward(const BackwardParams& b)
      : b(b),
        p(b.forward),
        core(p),
        N(core.N),
        D(core.D),
        Dp(core.Dp),
        ld(core.ld),
        block(core.block),
        v_t(int64_t(Dp) * ld),
        grad_o(int64_t(block) * Dp),
        grad_logits(int64_t(block) * ld),
        grad_q(int64_t(block) * Dp),
        grad_k(int64_t(ld) * Dp),
        grad_v(int64_t(ld) * Dp),
        grad_bias(b.want_table || b.want_dense ? b.group_heads * N * ld : 0),
        keep(p.dropout ? int64_t(block) * ld : 0) {}

  void run(int64_t task) {
    const int64_t group = task / b.chunks, chunk = task % b.chunks, total = p.batch * p.windows;
    const int64_t begin = total * chunk / b.chunks, end = total * (chunk + 1) / b.chunks;
    const int from = int(group * b.group_heads), to = std::min(p.heads, int(from + b.group_heads));
    std::fill(grad_bias.data(), grad_bias.end(), 0.0f);
    grad_scale.assign(size_t(to - from), 0.0);
    if (b.part_qkv_bias)
      for (int h = from; h < to; ++h) std::fill_n(b.part_qkv_bias + (h * b.chunks + chunk) * 3 * D, 3 * D, 0.0f);
    for (int64_t index = begin; index < end; ++index)
      for (int h = from; h < to; ++h) {
        core.gather(index, h);
        part_fill = b.part_qkv_bias ? b.part_qkv_bias + (h * b.chunks + chunk) * 3 * D : nullptr;
        window(index, h, h - from);
      }
    for (int h = from; h < to; ++h) {
      const int64_t part = h * b.chunks + chunk;
      if (b.part_head_scale) b.part_head_scale[part] = float(grad_scale[size_t(h - from)]);
      finish_bias(grad_bias + int64_t(h - from) * N * ld, part);
    }
  }

 private:
  // One (window, head) that has been gathered; `slot` is the head's place in the task.
  void window(int64_t index, int h, int slot) {
    transpose(core.v, Dp, v_t, ld, ld, Dp, 1.0f);
    for (int first = 0; first < N; first += block) {
      const int rows = std::min(block, N - first);
      const float* init_k = first ? grad_k.data() : nullptr;
      const float* init_v = first ? grad_v.data() : nullptr;
      core.weights(first, rows);
      load_grad_out(h, first, rows);
      gemm({grad_o, Dp, 1, v_t, ld, grad_logits, ld, nullptr, 0, D}, rows, ld / W);
      for (int i = 0; i < rows; ++i) through_softmax(index, first + i, i);
      if (b.want_table || b.want_dense) {
        float* sum = grad_bias + (int64_t(slot) * N + first) * ld;
        for (int64_t e = 0; e < int64_t(rows) * ld; e += W) store(sum + e, load(sum + e) + load(grad_logits + e));
      }
      gemm({core.logits, 1, ld, grad_o, Dp, grad_v, Dp, init_v, Dp, rows}, N, Dp / W);
      gemm({grad_logits, 1, ld, core.q + int64_t(first) * Dp, Dp, grad_k, Dp, init_k, Dp, rows}, N, Dp / W);
      gemm({grad_logits, ld, 1, core.k, Dp, grad_q, Dp, nullptr, 0, N}, rows, Dp / W);
      for (int i = 0; i < rows; ++i) {
        float* row = grad_q + int64_t(i) * Dp;
        if (p.head_scale) {
          // row holds Σ_j dlogit · k̂_j: its product with q̂ is the gradient of the scale
          const float* unit = core.q + int64_t(first + i) * Dp;
          vf dot{};
          for (int d = 0; d < Dp; d += W) dot += load(row + d) * load(unit + d);
          grad_scale[size_t(slot)] += double(sum_lanes(dot)[0]);
          through_norm(row, unit, core.q_inverse[first + i], Dp);
        }
        emit(h, first + i, 0, row, core.scale);
      }
    }
    for (int n = 0; n < N; ++n) {
      float* row = grad_k + int64_t(n) * Dp;
      if (p.head_scale) through_norm(row, core.k + int64_t(n) * Dp, core.k_inverse[n], Dp);
      emit(h, n, 1, row, core.scale);
      emit(h, n, 2, grad_v + int64_t(n) * Dp, 1.0f);
    }
  }

  void load_grad_out(int h, int first, int rows) {
    const T* base = static_cast<const T*>(b.grad_out) + int64_t(h) * D;
    for (int i = 0; i < rows; ++i) {
      const int64_t token = core.window.row(first + i);
      float* row = grad_o + int64_t(i) * Dp;
      if (token >= 0) {
        load_row(base + token * core.channels, row, D, Dp);
      } else {
        std::fill(row, row + Dp, 0.0f);  // the output of a padded token is thrown away
      }
    }
  }

  // Row i of the block: weights become probabilities (after dropout), their gradients those of the logits.
  void through_softmax(int64_t index, int n, int i) {
    float* weight = core.logits + int64_t(i) * ld;
    float* grad = grad_logits + int64_t(i) * ld;
    float* kept = keep + int64_t(p.dropout ? i : 0) * ld;
    const float inverse = 1.0f / core.row_sum[n];
    for (int j = N; j < ld; ++j) weight[j] = 0.0f;  // no key there
    if (p.dropout) {
      for (int j = 0; j < N; ++j) kept[j] = core.keep(index, n, j);
      for (int j = N; j < ld; ++j) kept[j] = 0.0f;
      for (int j = 0; j < ld; j += W) store(grad + j, load(grad + j) * load(kept + j));
    }
    vf dot{};
    for (int j = 0; j < ld; j += W) {
      vf w = load(weight + j) * inverse;
      store(weight + j, w);
      dot += w * load(grad + j);
    }
    dot = sum_lanes(dot);
    for (int j = 0; j < ld; j += W) store(grad + j, load(weight + j) * (load(grad + j) - dot));
    if (p.dropout)
      for (int j = 0; j < ld; j += W) store(weight + j, load(weight + j) * load(kept + j));
  }

  // Write a finished gradient row to its token, or add it to what padded tokens hold.
  void emit(int h, int n, int which, const float* row, float mul) {
    const int64_t token = core.window.row(n), C = core.channels;
    if (token >= 0) {
      store_row(static_cast<T*>(b.grad_qkv) + (token * 3 + which) * C + int64_t(h) * D, row, D, mul);
    } else if (part_fill) {
      for (int d = 0; d < D; ++d) part_fill[which * D + d] += row[d] * mul;
    }
  }

  void finish_bias(const float* sum, int64_t part) {
    if (b.want_table) {
      float* out = b.part_bias + part * b.table_rows;
      std::fill(out, out + b.table_rows, 0.0f);
      TableIndex table(p.window);
      for (int i = 0; i < N; ++i)
        table.for_each_line(i, 0, N, [&](int64_t j, int64_t r, int64_t count) {
          for (int64_t x = 0; x < count; ++x) out[r - x] += sum[int64_t(i) * ld + j + x];
        });
    } else if (b.want_dense) {
      for (int i = 0; i < N; ++i)
        std::memcpy(b.part_bias + (part * N + i) * N, sum + int64_t(i) * ld, size_t(N) * sizeof(float));
    }
  }

  const BackwardParams& b;
  const Params& p;
  Core<T> core;
  const int N, D, Dp, ld, block;
  Buffer v_t, grad_o, grad_logits, grad_q, grad_k, grad_v;
  Buffer grad_bias;  // (heads of the task, N, ld)
  Buffer keep;
  std::vector<double> grad_scale;
  float* part_fill = nullptr;
};

}  // namespace

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

void window_attention_forward(const Params& p, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  if (p.dtype == Dtype::f32) forward<float>(p, from, to);
  if (p.dtype == Dtype::bf16) forward<bf16>(p, from, to);
  if (p.dtype == Dtype::f16) forward<fp16>(p, from, to);
}

template <typename T>
static void run_backward(const BackwardParams& p, int64_t from, int64_t to) {
  Backward<T> backward(p);
  for (int64_t task = from; task < to; ++task) backward.run(task);
}

void window_attention_backward(const BackwardParams& p, int64_t from, int64_t to) {
  [[maybe_unused]] FlushSubnormals flush;
  if (p.forward.dtype == Dtype::f32) run_backward<float>(p, from, to);
  if (p.forward.dtype == Dtype::bf16) run_backward<bf16>(p, from, to);
  if (p.forward.dtype == Dtype::f16) run_backward<fp16>(p, from, to);
}

}  // namespace accel::ACCEL_ISA::window
