// The layers of a decoder, but for attention: everything from what attention found in one layer to the queries, keys and
// values of the next, in one call on one team of threads. `alisa.model.decoder` has the same in torch, operator by operator;
// rows are rounded to the model's dtype where those would store them.
//
//   out product | sum, norm | up product, activation | down product | sum, norm | q, k and v | head norms, rotation
//
// Between products the threads meet. Where few tokens are under way each thread makes all rows ready for itself: what another
// has written costs more to fetch from its cache, and to wait for.
#pragma once

#include <mutex>
#include <vector>

#include "layer_attention.h"
#include "products.h"

namespace alisa {

struct LayerWeights {
  Norm attn_norm;
  Norm attn_post_norm;
  Norm mlp_norm;
  Norm mlp_post_norm;
  Norm q_norm;  // of each head, or of all of them together
  Norm k_norm;
  Matrix q;
  Matrix kv;
  Matrix out;
  Matrix up;  // two parts where the MLP is gated
  Matrix down;
  bool has_mlp;  // false: its output is made elsewhere
  int rotation;  // which of the step's tables; -1: none
};

struct StackShape {
  Dtype dtype;
  int hidden_size;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int ffn_size;
  Activation activation;
  bool norms_after_sum;    // instead of before attention and MLP
  bool parallel_residual;  // attention and MLP read the same input
  float residual_scale;
  float query_factor;
  Norm final_norm;
};

// Where a step's rows are, all in the model's dtype.
struct StackStep {
  int64_t num_tokens;  // N
  void* x;             // [N, C]: what goes from layer to layer
  void* normed;        // [N, C]: what q, k and v are projected from; what an MLP that is made elsewhere reads; the result
  void* q;             // [N, H, D]
  void* kv;            // [N, 2, G, D]
  std::vector<RotationTable> rotations;
};

class Stack {
 public:
  Stack(const ModelIsa& isa, const StackShape& shape, std::vector<LayerWeights> layers)
      : isa_(isa), shape_(shape), layers_(std::move(layers)) {}

  // The rest of layer `after`, and the beginning of the next, or the final norm. `after` -1 begins the first layer.
  // `attended` [N, H, D] in the model's dtype. Where the MLP is made elsewhere this ends with its input in `normed`, and
  // `after_mlp` [N, C] goes on.
  void run(const StackStep& step, int after, const void* attended, const void* mlp_out, const Threads& threads);
  // All layers, where no MLP is made elsewhere.
  void run_all(const StackStep& step, LayerAttention& attention, const Threads& threads);
  // K and V of tokens whose layer input [N, C] is known, into [N, 2, G, D].
  void project_kv(int layer, const void* hidden, const RotationTable* rotation, int64_t num_tokens, void* kv,
                  const Threads& threads);

 private:
  class Worker;

  const ModelIsa& isa_;
  const StackShape shape_;
  const std::vector<LayerWeights> layers_;

  std::mutex mutex_;
  InputBuffer shared_;
  InputBuffer activated_;
  Buffer products_;
  std::vector<InputBuffer> own_;
  std::vector<Buffer> scratch_;
};

}  // namespace alisa
