// What the binding hands to a kernel: plain pointers and sizes, no torch type.
#pragma once

#include "cpu/linear/gau_attention/params.h"

namespace accel::flash_mix {

using namespace accel::pairs;
using gau_attention::Activation;

// Tokens [first, first + count) of a batch entry that see each other.
struct Chunk {
  int64_t sequence, batch, first;
  int count;
  bool whole;  // none of its sequence has more; only such chunks enter a state that goes out
};

struct Sequence {
  int64_t first, end;  // chunks
  float scale;         // of the linear part
};

// A block of queries of a chunk.
struct Task {
  int64_t chunk;
  int block;
};

struct Params {
  PairParams pairs;  // those of a chunk that no other is longer than; `mask` is set by the kernels, chunk by chunk
  Activation activation;
  bool causal;
  int lin_dim;
  int panel, panels;  // columns of values that are multiplied at a time, and how often there are as many or fewer
  int64_t tokens;  // T
  Strided lin_q, lin_k, gate, out;  // the data of gate null if there is none
  Strided sums;                     // the output before the gate; data null if nobody wants it
  const uint8_t* key_mask;          // (B, T) or null
  const Sequence* sequences;
  const Chunk* chunks;
  const Task* tasks;
  const float* state;  // (N, lin_dim, E) or null: the sums before the first chunks
  float* state_out;    // after the last whole ones, or null
  // The sum that each chunk sees or, without order, each sequence, panel by panel. What it is made of is found to be
  // finite panel by panel as well: bad[chunk][panel].
  float* states;
  int state_parts;  // of which each is kept, where it is rounded
  char* bad;
  const char* lost;  // chunks whose queries see something in the sum that is not finite
};

struct BackwardParams : PairSums {
  Params forward;
  Strided grad_out;
  Strided grad_quad_q, grad_quad_k, grad_lin_q, grad_lin_k, grad_v, grad_gate;  // the data of the last may be null
  const float* grad_state;    // (N, lin_dim, E) or null
  float* grad_initial_state;  // the same
  float* grad_states;         // of the sum that each chunk, or sequence, adds to
  char* grad_bad;
  const char* grad_lost;  // chunks whose keys meet something in it that is not finite
};

}  // namespace accel::flash_mix

ACCEL_DECLARE(flash_mix, flash,
  void flash_mix_states(const Params& p, int64_t from, int64_t to);
  void flash_mix_forward(const Params& p, int64_t from, int64_t to);
  void flash_mix_grad_states(const BackwardParams& b, int64_t from, int64_t to);
  void flash_mix_backward(const BackwardParams& b, int64_t from, int64_t to);
)
