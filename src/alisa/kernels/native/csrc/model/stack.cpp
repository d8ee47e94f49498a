// See stack.h.
#include "stack.h"

#include <algorithm>
#include <array>

namespace alisa {
namespace {

// Up to this many floats in a row of all tokens, every thread makes all of them ready for itself.
constexpr int64_t kOwnRows = 1 << 16;

// Products of one call.
constexpr int kMostProducts = 5;

using Counters = std::array<std::atomic<int64_t>, kMostProducts>;

struct Place {
  uint8_t* base;
  size_t stride;  // bytes
  uint8_t* at(int64_t row) const { return base + static_cast<size_t>(row) * stride; }
};

}  // namespace

// One thread of a call.
class Stack::Worker {
 public:
  Worker(const Stack& stack, int rank, int size, Barrier& barrier, Counters& counters, float* scratch)
      : isa_(stack.isa_), shape_(stack.shape_), rank_(rank), size_(size), barrier_(barrier), counters_(counters),
        bytes_(stack.shape_.dtype == Dtype::kFloat32 ? 4 : 2), sums_(scratch), rows_(scratch + kSumFloats) {}

  // Floats of scratch: sums, and rows of `width` floats.
  static size_t floats(int width) { return kSumFloats + 4 * static_cast<size_t>(width); }

  void wait() { barrier_.wait(); }
  bool is_first() const { return rank_ == 0; }
  Range share_of(int64_t count) const { return range_of(count, rank_, size_); }
  float* row(int number, int width) { return rows_ + static_cast<size_t>(number) * width; }
  size_t value_bytes() const { return bytes_; }

  void widen(const void* x, int count, float* out) const { isa_.widen(shape_.dtype, x, count, out); }
  void narrow(const float* x, int count, void* out) const { isa_.narrow(shape_.dtype, x, count, out); }
  void norm(const Norm& norm, const float* x, float* out) const { isa_.norm(norm, shape_.dtype, x, out); }
  void add(const float* y, float* x) const { isa_.add(shape_.dtype, y, shape_.residual_scale, x, shape_.hidden_size); }
  void prepare(const Matrix& matrix, const float* x, int64_t token, const Inputs& inputs) const {
    isa_.prepare(matrix.format, x, matrix.num_in, 0, token, inputs);
  }

  // Outputs as floats, rounded, [N, num_out].
  void to_floats(const Matrix& matrix, const Inputs& inputs, float* out) {
    multiply(matrix, inputs, [&](int count, const Tile& tile, float* sums) {
      float* place = out + static_cast<size_t>(tile.first) * matrix.num_out + tile.panel * kLanes + tile.first_lane;
      for (int64_t token = tile.first; token < tile.last; ++token, sums += kLanes, place += matrix.num_out) {
        isa_.round_to(shape_.dtype, sums, count);
        std::copy_n(sums, count, place);
      }
    });
  }

  // Outputs in the model's dtype.
  void to_rows(const Matrix& matrix, const Inputs& inputs, const Place& out) {
    multiply(matrix, inputs, [&](int count, const Tile& tile, float* sums) {
      const size_t column = static_cast<size_t>(tile.panel * kLanes + tile.first_lane) * bytes_;
      for (int64_t token = tile.first; token < tile.last; ++token, sums += kLanes) {
        narrow(sums, count, out.at(token) + column);
      }
    });
  }

  // Outputs through the activation, as the inputs of `next`.
  void to_activated(const Matrix& matrix, const Inputs& inputs, const Matrix& next, const Inputs& out) {
    // Panels are groups of the next product, and a group has one step: they are not taken apart.
    const Share share = {rank_, size_, &counters_[product_++]};
    multiply_share(isa_, matrix, inputs, share, true, sums_, [&](const Tile& tile, float* sums) {
      const int count = matrix.num_rows(tile.panel);
      float* other = matrix.parts > 1 ? sums + static_cast<size_t>(kMostBlockTokens) * kLanes : nullptr;
      for (int64_t token = tile.first; token < tile.last; ++token, sums += kLanes) {
        isa_.round_to(shape_.dtype, sums, count);
        if (other != nullptr) isa_.round_to(shape_.dtype, other, count);
        isa_.activate(shape_.activation, shape_.dtype, sums, other, count);
        isa_.prepare(next.format, sums, count, tile.panel, token, out);
        if (other != nullptr) other += kLanes;
      }
    });
  }

  // The heads of one row, `[heads, D]`: normed (each or all), turned, scaled.
  void finish_heads(uint8_t* place, int heads, const Norm& head_norm, const RotationTable* table, int64_t token, float factor,
                    float* values) {
    const int dim = shape_.head_dim;
    const int count = heads * dim;
    widen(place, count, values);
    if (head_norm.weight != nullptr) {
      for (int i = 0; i < count; i += head_norm.count) norm(head_norm, values + i, values + i);
    }
    if (table != nullptr) {
      for (int i = 0; i < count; i += dim) isa_.rotate(shape_.dtype, *table, token, values + i);
    }
    if (factor != 1.0F) {
      for (int i = 0; i < count; ++i) values[i] *= factor;
    }
    narrow(values, count, place);
  }

 private:
  template <class Write>
  void multiply(const Matrix& matrix, const Inputs& inputs, const Write& write) {
    const Share share = {rank_, size_, &counters_[product_++]};
    multiply_share(isa_, matrix, inputs, share, false, sums_, [&](const Tile& tile, float* sums) {
      const int count = std::min(tile.end_lane, matrix.num_rows(tile.panel)) - tile.first_lane;
      if (count > 0) write(count, tile, sums + tile.first_lane);
    });
  }

  const ModelIsa& isa_;
  const StackShape& shape_;
  const int rank_;
  const int size_;
  Barrier& barrier_;
  Counters& counters_;
  const size_t bytes_;
  float* const sums_;
  float* const rows_;
  int product_ = 0;
};

void Stack::run(const StackStep& step, int after, const void* attended, const void* mlp_out, const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int64_t tokens = step.num_tokens;
  const int hidden = shape_.hidden_size;
  const int q_size = shape_.num_heads * shape_.head_dim;
  const int kv_size = shape_.num_kv_heads * shape_.head_dim;
  const int width = round_up(std::max({hidden, q_size, kv_size}), kGroup);
  const LayerWeights* layer = after < 0 ? nullptr : &layers_[static_cast<size_t>(after)];
  const LayerWeights* next = static_cast<size_t>(after + 1) < layers_.size() ? &layers_[static_cast<size_t>(after + 1)] : nullptr;
  const bool resumes = mlp_out != nullptr;
  const bool stops = layer != nullptr && !layer->has_mlp && !resumes;
  // Rows of x are read and written by everybody then, the first thread's are kept.
  const bool own = tokens * width <= kOwnRows && (layer == nullptr || layer->has_mlp);

  const auto team = static_cast<size_t>(std::max(threads.count, 1));
  if (own_.size() < team) {
    own_.resize(team);
    scratch_.resize(team);
  }
  float* products = products_.room(static_cast<size_t>(tokens) * hidden);
  std::vector<float*> scratch(team);
  for (size_t rank = 0; rank < team; ++rank) {
    scratch[rank] = scratch_[rank].room(Worker::floats(width) + static_cast<size_t>(own ? tokens : 1) * width);
  }
  const auto inputs_of = [&](const Matrix& matrix, size_t rank) {
    InputBuffer& buffer = own ? own_[rank] : shared_;
    return buffer.room(matrix.format, matrix.num_in, tokens);
  };
  // Room for the largest first: what is asked for inside the team is there.
  for (size_t rank = 0; rank < (own ? team : 1); ++rank) {
    if (layer != nullptr && !resumes) {
      inputs_of(layer->out, rank);
      if (layer->has_mlp) inputs_of(layer->up, rank);
    }
    if (next != nullptr) inputs_of(next->q, rank);
  }
  Inputs activated = {};
  if (layer != nullptr && layer->has_mlp) activated = activated_.room(layer->down.format, layer->down.num_in, tokens);
  Counters counters = {};

  parallel_team(threads, [&](int rank, int size, Barrier& barrier) {
    float* memory = scratch[static_cast<size_t>(rank)];
    Worker worker(*this, rank, size, barrier, counters, memory);
    float* rows = memory + Worker::floats(width);
    const size_t bytes = worker.value_bytes();
    const Place x_rows = {static_cast<uint8_t*>(step.x), hidden * bytes};
    const Place normed = {static_cast<uint8_t*>(step.normed), hidden * bytes};
    const Range mine = own ? Range{0, tokens} : worker.share_of(tokens);
    const bool keeps = !own || worker.is_first();
    const auto prepared = [&] {
      if (!own) worker.wait();
    };
    const auto x_of = [&](int64_t token) { return rows + (own ? static_cast<size_t>(token) * width : 0); };
    float* changed = worker.row(0, width);

    if (layer != nullptr && !resumes) {
      const Inputs found = inputs_of(layer->out, static_cast<size_t>(rank));
      const Place attended_rows = {static_cast<uint8_t*>(const_cast<void*>(attended)), q_size * bytes};
      for (int64_t token = mine.first; token < mine.last; ++token) {
        worker.widen(attended_rows.at(token), q_size, changed);
        worker.prepare(layer->out, changed, token, found);
      }
      prepared();
      worker.to_floats(layer->out, found, products);
      worker.wait();

      const Inputs inputs = stops ? Inputs{} : inputs_of(layer->up, static_cast<size_t>(rank));
      for (int64_t token = mine.first; token < mine.last; ++token) {
        float* x = x_of(token);
        const float* y = products + static_cast<size_t>(token) * hidden;
        worker.widen(x_rows.at(token), hidden, x);
        if (layer->attn_post_norm.weight != nullptr) {
          worker.norm(layer->attn_post_norm, y, worker.row(1, width));
          y = worker.row(1, width);
        }
        const float* enters_mlp = x;
        const bool normed_before = layer->mlp_norm.weight != nullptr && !shape_.norms_after_sum;
        if (shape_.parallel_residual) {
          std::copy_n(x, hidden, changed);
          if (normed_before) worker.norm(layer->mlp_norm, x, changed);
          enters_mlp = changed;
        }
        worker.add(y, x);
        if (shape_.norms_after_sum && layer->attn_norm.weight != nullptr) worker.norm(layer->attn_norm, x, x);
        if (!shape_.parallel_residual && normed_before) {
          worker.norm(layer->mlp_norm, x, changed);
          enters_mlp = changed;
        }
        if (!own) worker.narrow(x, hidden, x_rows.at(token));
        if (stops) {
          worker.narrow(enters_mlp, hidden, normed.at(token));
        } else {
          worker.prepare(layer->up, enters_mlp, token, inputs);
        }
      }
      if (stops) return;
      prepared();
      worker.to_activated(layer->up, inputs, layer->down, activated);
      worker.wait();
      worker.to_floats(layer->down, activated, products);
      worker.wait();
    }

    const Inputs inputs = next == nullptr ? Inputs{} : inputs_of(next->q, static_cast<size_t>(rank));
    const Place mlp_rows = {static_cast<uint8_t*>(const_cast<void*>(mlp_out)), hidden * bytes};
    for (int64_t token = mine.first; token < mine.last; ++token) {
      float* x = x_of(token);
      if (layer == nullptr || !own) worker.widen(x_rows.at(token), hidden, x);
      if (layer != nullptr) {
        const float* y = products + static_cast<size_t>(token) * hidden;
        if (resumes) {
          worker.widen(mlp_rows.at(token), hidden, worker.row(1, width));
          y = worker.row(1, width);
        }
        if (layer->mlp_post_norm.weight != nullptr) {
          worker.norm(layer->mlp_post_norm, y, worker.row(2, width));
          y = worker.row(2, width);
        }
        worker.add(y, x);
        if (shape_.norms_after_sum && layer->mlp_norm.weight != nullptr) worker.norm(layer->mlp_norm, x, x);
        if (keeps) worker.narrow(x, hidden, x_rows.at(token));
      }
      const Norm none = {};
      const Norm& before = next == nullptr ? shape_.final_norm : shape_.norms_after_sum ? none : next->attn_norm;
      const float* enters = x;
      if (before.weight != nullptr) {
        worker.norm(before, x, changed);
        enters = changed;
      }
      if (keeps) worker.narrow(enters, hidden, normed.at(token));
      if (next != nullptr) worker.prepare(next->q, enters, token, inputs);
    }
    if (next == nullptr) return;
    prepared();
    const Place q_rows = {static_cast<uint8_t*>(step.q), q_size * bytes};
    const Place kv_rows = {static_cast<uint8_t*>(step.kv), 2 * kv_size * bytes};
    worker.to_rows(next->q, inputs, q_rows);
    worker.to_rows(next->kv, inputs, kv_rows);

    const RotationTable* table = next->rotation < 0 ? nullptr : &step.rotations[static_cast<size_t>(next->rotation)];
    if (table == nullptr && next->q_norm.weight == nullptr && shape_.query_factor == 1.0F) return;
    worker.wait();
    const bool joint = next->q_norm.weight != nullptr && next->q_norm.count > shape_.head_dim;
    const int q_units = joint ? 1 : shape_.num_heads;
    const int k_units = joint ? 1 : shape_.num_kv_heads;
    const Range units = worker.share_of(tokens * (q_units + k_units));
    for (int64_t unit = units.first; unit < units.last; ++unit) {
      const int64_t token = unit / (q_units + k_units);
      const int number = static_cast<int>(unit % (q_units + k_units));
      const size_t head_bytes = shape_.head_dim * bytes;
      if (number < q_units) {
        worker.finish_heads(q_rows.at(token) + number * head_bytes, shape_.num_heads / q_units, next->q_norm, table, token,
                            shape_.query_factor, changed);
      } else {
        worker.finish_heads(kv_rows.at(token) + (number - q_units) * head_bytes, shape_.num_kv_heads / k_units, next->k_norm,
                            table, token, 1.0F, changed);
      }
    }
  });
}

void Stack::run_all(const StackStep& step, LayerAttention& attention, const Threads& threads) {
  run(step, -1, nullptr, nullptr, threads);
  for (int layer = 0; layer < static_cast<int>(layers_.size()); ++layer) {
    run(step, layer, attention.attend(layer, threads), nullptr, threads);
  }
}

void Stack::project_kv(int layer, const void* hidden, const RotationTable* rotation, int64_t num_tokens, void* kv,
                       const Threads& threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const LayerWeights& weights = layers_[static_cast<size_t>(layer)];
  const int kv_size = shape_.num_kv_heads * shape_.head_dim;
  const int width = round_up(std::max(shape_.hidden_size, kv_size), kGroup);
  const Inputs inputs = shared_.room(weights.kv.format, shape_.hidden_size, num_tokens);
  const auto team = static_cast<size_t>(std::max(threads.count, 1));
  if (scratch_.size() < team) {
    own_.resize(team);
    scratch_.resize(team);
  }
  std::vector<float*> scratch(team);
  for (size_t rank = 0; rank < team; ++rank) scratch[rank] = scratch_[rank].room(Worker::floats(width));
  Counters counters = {};
  parallel_team(threads, [&](int rank, int size, Barrier& barrier) {
    Worker worker(*this, rank, size, barrier, counters, scratch[static_cast<size_t>(rank)]);
    const size_t bytes = worker.value_bytes();
    const Place rows = {static_cast<uint8_t*>(const_cast<void*>(hidden)), shape_.hidden_size * bytes};
    const Place kv_rows = {static_cast<uint8_t*>(kv), 2 * kv_size * bytes};
    float* row = worker.row(0, width);
    const Range mine = worker.share_of(num_tokens);
    for (int64_t token = mine.first; token < mine.last; ++token) {
      worker.widen(rows.at(token), shape_.hidden_size, row);
      worker.prepare(weights.kv, row, token, inputs);
    }
    worker.wait();
    worker.to_rows(weights.kv, inputs, kv_rows);
    worker.wait();
    for (int64_t token = mine.first; token < mine.last; ++token) {
      worker.finish_heads(kv_rows.at(token), shape_.num_kv_heads, weights.k_norm, rotation, token, 1.0F, row);
    }
  });
}

}  // namespace alisa
