// See bind_prefill.h.
#include "bind_prefill.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <optional>
#include <stdexcept>
#include <tuple>

#include "prefill.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using alisa::Threads;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Address, and the strides from one token and from one head to the next, in values.
alisa::Heads heads_at(const std::tuple<uintptr_t, size_t, size_t>& place) {
  return {at<const uint16_t>(std::get<0>(place)), std::get<1>(place), std::get<2>(place)};
}

const alisa::PrefillIsa& prefill_isa(const char* name) {
  const alisa::PrefillIsa* isa = alisa::find_prefill(name);
  if (isa == nullptr) throw std::invalid_argument("this CPU or build has no such prefill kernels");
  return *isa;
}

}  // namespace

void bind_prefill(nb::class_<alisa::Workspace>& workspace) {
  workspace
      .def(
          "prefill",
          [](alisa::Workspace& self, const char* isa, const Threads& threads, std::tuple<uintptr_t, size_t, size_t> q,
             std::tuple<uintptr_t, size_t, size_t> k, std::tuple<uintptr_t, size_t, size_t> v, int num_queries, int num_keys,
             int num_heads, int num_kv_heads, int head_dim, int ahead, std::optional<int> hidden, float softcap,
             uintptr_t before, uintptr_t after, uintptr_t out, uintptr_t log_sum_exp, uintptr_t chosen, int chosen_stride) {
            const alisa::PrefillIsa& kernels = prefill_isa(isa);
            const alisa::PrefillTask task = {heads_at(q),          heads_at(k),      heads_at(v),         num_queries,
                                             num_keys,             num_heads,        num_kv_heads,        head_dim,
                                             ahead,                hidden.value_or(alisa::kNothingHidden), softcap,
                                             at<const float>(before), at<float>(after), at<uint16_t>(out),
                                             at<float>(log_sum_exp), at<const uint8_t>(chosen), chosen_stride};
            const nb::gil_scoped_release unlocked;
            self.prefill(kernels, task, threads);
          },
          "isa"_a, "threads"_a, "q"_a, "k"_a, "v"_a, "num_queries"_a, "num_keys"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a,
          "ahead"_a, "hidden"_a.none(), "softcap"_a, "before"_a, "after"_a, "out"_a, "log_sum_exp"_a,
          "chosen"_a, "chosen_stride"_a)
      .def(
          "prefill_mass",
          [](alisa::Workspace& self, const char* isa, const Threads& threads, std::tuple<uintptr_t, size_t, size_t> q,
             std::tuple<uintptr_t, size_t, size_t> k, int num_queries, int num_keys, int num_heads, int num_kv_heads,
             int head_dim, int num_sets, int ahead, float softcap, uintptr_t log_sum_exp, uintptr_t mass) {
            const alisa::PrefillIsa& kernels = prefill_isa(isa);
            const alisa::MassTask task = {heads_at(q),  heads_at(k), num_queries, num_keys,
                                          num_heads,    num_kv_heads, head_dim,   num_sets,
                                          ahead,        softcap, at<const float>(log_sum_exp), at<float>(mass)};
            const nb::gil_scoped_release unlocked;
            self.prefill_mass(kernels, task, threads);
          },
          "isa"_a, "threads"_a, "q"_a, "k"_a, "num_queries"_a, "num_keys"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a,
          "num_sets"_a, "ahead"_a, "softcap"_a, "log_sum_exp"_a, "mass"_a)
      .def(
          "prefill_means",
          [](alisa::Workspace& self, const char* isa, const Threads& threads, std::tuple<uintptr_t, size_t, size_t> k, int num_blocks,
             int num_kv_heads, int head_dim, uintptr_t means) {
            const alisa::PrefillIsa& kernels = prefill_isa(isa);
            const alisa::MeansTask task = {heads_at(k), num_blocks, num_kv_heads, head_dim, at<uint16_t>(means)};
            const nb::gil_scoped_release unlocked;
            self.prefill_means(kernels, task, threads);
          },
          "isa"_a, "threads"_a, "k"_a, "num_blocks"_a, "num_kv_heads"_a, "head_dim"_a, "means"_a)
      .def(
          "prefill_choose",
          [](alisa::Workspace& self, const char* isa, const Threads& threads, std::tuple<uintptr_t, size_t, size_t> q,
             std::tuple<uintptr_t, size_t, size_t> means, int num_queries, int first_block, int num_heads, int num_kv_heads,
             int head_dim, float softcap, float alpha, uintptr_t chosen, int chosen_stride) {
            const alisa::PrefillIsa& kernels = prefill_isa(isa);
            const alisa::ChoiceTask task = {heads_at(q), heads_at(means), num_queries, first_block, num_heads, num_kv_heads,
                                            head_dim,    softcap,         alpha,       at<uint8_t>(chosen), chosen_stride};
            const nb::gil_scoped_release unlocked;
            self.prefill_choose(kernels, task, threads);
          },
          "isa"_a, "threads"_a, "q"_a, "means"_a, "num_queries"_a, "first_block"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a,
          "softcap"_a, "alpha"_a, "chosen"_a, "chosen_stride"_a);
}
