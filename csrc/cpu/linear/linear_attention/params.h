// What the binding hands to a kernel: plain pointers and sizes, no torch type.
#pragma once

#include <cstdint>

#include "cpu/_dtype.h"
#include "cpu/_isa.h"

namespace accel::linear_attention {

constexpr int CHUNK = 32;    // tokens whose pairs are looked at together
constexpr int STRETCH = 16;  // chunks whose states a backward holds, where it has to make them again

// (B, heads, tokens, size) with any strides, in elements, and the last axis contiguous. Output head h reads head h / share
// of q, state head s head s / share of k and v.
struct Strided {
  void* data;
  int64_t batch, head, token, share;
};

enum class Map : int { identity, elu1, relu, squared_relu, exp };

// A run of tokens of one sequence that one worker handles.
struct Segment {
  int64_t batch, sequence, from, to;
  int64_t slot;  // in causal order its own number, else that of the first run of its sequence on the other side
  bool first, last;  // of the runs of its sequence
  int64_t kept;      // states that were kept of the runs before it

  // Where the chunk after the one at t begins, in the one order or the other; below 0 if there is none.
  int64_t after(int64_t t) const { return t + CHUNK < to ? t + CHUNK : -1; }
  int64_t before(int64_t t) const { return t > from ? t - CHUNK : -1; }
};

// States (slots, Hs), each (F, E), then F numbers for the denominator; and whether something that is not finite went
// into each.
struct States {
  float* data;
  char* lost;
};

struct Params {
  int64_t batch, heads, state_heads, queries, keys, sequences;
  int features, values;  // F, E
  Dtype dtype;
  Map map;
  bool causal, normalize;
  bool keep_state;  // the caller gets the state: in fp32 from the first product on, as it is carried on from
  float scale, eps;
  Strided q, k, v;
  const float* decay;  // null: none
  int64_t decay_batch, decay_head, decay_token;  // strides; the last is 0 where a head has one for all tokens
  const uint8_t* key_mask;  // (B, S) or null
  const float* kv;          // (N, Hs, F, E) or null: the states before the first tokens
  const float* k_sum;
  // Runs of keys, and of queries, and the first one of each sequence, (N + 1). In causal order both are the same.
  const Segment *key_segments, *query_segments;
  const int64_t *first_key_segment, *first_query_segment;
  // Of each run of keys: the state where it begins; without order the first of a sequence has that of all its keys. Null
  // in causal order where every sequence is one run.
  States states;
  Strided out;
  float* den;  // (B, H, T) or null
  float* kv_out;
  float* k_sum_out;
};

struct BackwardParams {
  Params forward;
  Strided grad_out;         // data is null where nothing depends on the output
  const float* grad_kv;     // (N, Hs, F, E) or null
  const float* grad_k_sum;  // (N, Hs, F) or null
  Strided grad_q, grad_k, grad_v;
  float *part_q, *part_k, *part_v;  // (B, heads that read it, tokens, size) where several read one, else null
  float* by_sum;       // (B, H, T), the gradients of the denominators, made with those of queries; null if there are none
  States grad_states;  // of each run of queries: the gradient of the state where it ends; else as `states`
  float *grad_initial_kv, *grad_initial_k_sum;  // (N, Hs, F, E) and (N, Hs, F), or null
  float* grad_decay;  // (B, Hs, T), or null
  float* kept;        // with it: of each run the states, turned, before every STRETCH-th chunk but the first
};

}  // namespace accel::linear_attention

ACCEL_DECLARE(linear_attention, linear,
  void linear_attention_states(const Params& p, int64_t from, int64_t to);
  void linear_attention_join(const Params& p, int64_t from, int64_t to);
  void linear_attention_forward(const Params& p, int64_t from, int64_t to);
  void linear_attention_grad_states(const BackwardParams& p, int64_t from, int64_t to);
  void linear_attention_grad_join(const BackwardParams& p, int64_t from, int64_t to);
  void linear_attention_backward_q(const BackwardParams& p, int64_t from, int64_t to);
  void linear_attention_backward_k(const BackwardParams& p, int64_t from, int64_t to);
  void linear_attention_sum_heads(const BackwardParams& p, int which, int64_t from, int64_t to);
)
