// See bind_model.h.
#include "bind_model.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "products.h"
#include "stack.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using alisa::Dtype;
using alisa::Matrix;
using alisa::Norm;
using alisa::Threads;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const alisa::ModelIsa& isa_named(const std::string& name) {
  const alisa::ModelIsa* isa = alisa::find_model_isa(name.c_str());
  if (isa == nullptr) throw std::invalid_argument("this CPU or build has no " + name + " layers");
  return *isa;
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const char* name : {"avx512_bf16", "avx512_vnni", "avx2", "portable"}) {
    if (alisa::find_model_isa(name) != nullptr) names.emplace_back(name);
  }
  return names;
}

}  // namespace

void bind_model(nb::module_& m) {
  m.def("model_isa_names", isa_names, "Instruction sets with layers that this CPU can run, fastest first.");
  nb::class_<Norm>(m, "Norm").def(
      "__init__",
      [](Norm* self, uintptr_t weight, uintptr_t bias, int count, float eps) {
        new (self) Norm{at<const float>(weight), at<const float>(bias), count, eps};
      },
      "weight"_a, "bias"_a, "count"_a, "eps"_a, "Float32 weights (0: there is no norm) and bias (0: an RMS norm).");
  nb::class_<Matrix>(m, "Matrix")
      .def(
          "__init__",
          [](Matrix* self, int format, uintptr_t codes, uintptr_t scales, uintptr_t ranges, uintptr_t bias, int num_in,
             int num_out, int parts) {
            new (self) Matrix{static_cast<alisa::WeightFormat>(format), at<const uint8_t>(codes), at<const float>(scales),
                              at<const uint16_t>(ranges), at<const float>(bias), num_in, num_out, parts};
          },
          "format"_a, "codes"_a, "scales"_a, "ranges"_a, "bias"_a, "num_in"_a, "num_out"_a, "parts"_a)
      .def_prop_ro("num_in", [](const Matrix& self) { return self.num_in; })
      .def_prop_ro("num_out", [](const Matrix& self) { return self.num_out; });

  nb::class_<alisa::ProductWorkspace>(m, "ProductWorkspace")
      .def(nb::init<>())
      .def(
          "multiply",
          [](alisa::ProductWorkspace& self, const std::string& isa, const Threads& threads, const Matrix& matrix, uintptr_t x,
             int dtype, size_t x_stride, int64_t num_tokens, int out_dtype, uintptr_t out) {
            const alisa::ModelIsa& kernels = isa_named(isa);
            const nb::gil_scoped_release unlocked;
            self.multiply(kernels, matrix, static_cast<Dtype>(dtype), at<const void>(x), x_stride, num_tokens,
                          static_cast<Dtype>(out_dtype), at<void>(out), threads);
          },
          "isa"_a, "threads"_a, "matrix"_a, "x"_a, "dtype"_a, "x_stride"_a, "num_tokens"_a, "out_dtype"_a, "out"_a);

  nb::class_<alisa::LayerWeights>(m, "LayerWeights")
      .def(
          "__init__",
          [](alisa::LayerWeights* self, const Norm& attn_norm, const Norm& attn_post_norm, const Norm& mlp_norm,
             const Norm& mlp_post_norm, const Norm& q_norm, const Norm& k_norm, const Matrix& q, const Matrix& kv,
             const Matrix& out, const Matrix* up, const Matrix* down, int rotation) {
            new (self) alisa::LayerWeights{attn_norm, attn_post_norm, mlp_norm, mlp_post_norm, q_norm, k_norm, q, kv, out,
                                           up == nullptr ? Matrix{} : *up, down == nullptr ? Matrix{} : *down,
                                           up != nullptr, rotation};
          },
          "attn_norm"_a, "attn_post_norm"_a, "mlp_norm"_a, "mlp_post_norm"_a, "q_norm"_a, "k_norm"_a, "q"_a, "kv"_a, "out"_a,
          "up"_a.none(), "down"_a.none(), "rotation"_a);

  nb::class_<alisa::StackShape>(m, "StackShape")
      .def(
          "__init__",
          [](alisa::StackShape* self, int dtype, int hidden_size, int num_heads, int num_kv_heads, int head_dim, int ffn_size,
             int activation, bool norms_after_sum, bool parallel_residual, float residual_scale, float query_factor,
             const Norm& final_norm) {
            new (self) alisa::StackShape{static_cast<Dtype>(dtype), hidden_size, num_heads, num_kv_heads, head_dim, ffn_size,
                                         static_cast<alisa::Activation>(activation), norms_after_sum, parallel_residual,
                                         residual_scale, query_factor, final_norm};
          },
          "dtype"_a, "hidden_size"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "ffn_size"_a, "activation"_a,
          "norms_after_sum"_a, "parallel_residual"_a, "residual_scale"_a, "query_factor"_a, "final_norm"_a);

  nb::class_<alisa::RotationTable>(m, "RotationTable")
      .def(
          "__init__",
          [](alisa::RotationTable* self, uintptr_t cos, uintptr_t sin, int width) {
            new (self) alisa::RotationTable{at<const float>(cos), at<const float>(sin), width};
          },
          "cos"_a, "sin"_a, "width"_a);

  nb::class_<alisa::StackStep>(m, "StackStep")
      .def(
          "__init__",
          [](alisa::StackStep* self, int64_t num_tokens, uintptr_t x, uintptr_t normed, uintptr_t q, uintptr_t kv,
             std::vector<alisa::RotationTable> rotations) {
            new (self) alisa::StackStep{num_tokens, at<void>(x), at<void>(normed), at<void>(q), at<void>(kv),
                                        std::move(rotations)};
          },
          "num_tokens"_a, "x"_a, "normed"_a, "q"_a, "kv"_a, "rotations"_a);

  nb::class_<alisa::LayerAttention>(m, "LayerAttention");
  nb::class_<alisa::Stack>(m, "Stack")
      .def(
          "__init__",
          [](alisa::Stack* self, const std::string& isa, const alisa::StackShape& shape,
             std::vector<alisa::LayerWeights> layers) { new (self) alisa::Stack(isa_named(isa), shape, std::move(layers)); },
          "isa"_a, "shape"_a, "layers"_a)
      .def(
          "run",
          [](alisa::Stack& self, const Threads& threads, const alisa::StackStep& step, int after, uintptr_t attended,
             uintptr_t mlp_out) {
            const nb::gil_scoped_release unlocked;
            self.run(step, after, at<const void>(attended), at<const void>(mlp_out), threads);
          },
          "threads"_a, "step"_a, "after"_a, "attended"_a, "mlp_out"_a)
      .def(
          "run_all",
          [](alisa::Stack& self, const Threads& threads, const alisa::StackStep& step, alisa::LayerAttention& attention) {
            const nb::gil_scoped_release unlocked;
            self.run_all(step, attention, threads);
          },
          "threads"_a, "step"_a, "attention"_a)
      .def(
          "project_kv",
          [](alisa::Stack& self, const Threads& threads, int layer, uintptr_t hidden, const alisa::RotationTable* rotation,
             int64_t num_tokens, uintptr_t kv) {
            const nb::gil_scoped_release unlocked;
            self.project_kv(layer, at<const void>(hidden), rotation, num_tokens, at<void>(kv), threads);
          },
          "threads"_a, "layer"_a, "hidden"_a, "rotation"_a.none(), "num_tokens"_a, "kv"_a);
}
