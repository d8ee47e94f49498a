// See bind_sketch_step.h.
#include "bind_sketch_step.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "sketch_step.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_sketch_step(nb::module_& m) {
  nb::class_<alisa::SketchLayer>(m, "SketchLayer")
      .def(
          "__init__",
          [](alisa::SketchLayer* self, uintptr_t rows, uintptr_t key_codes, uintptr_t key_ranges, uintptr_t value_codes,
             uintptr_t value_ranges) {
            new (self) alisa::SketchLayer{at<uint8_t>(rows), at<uint8_t>(key_codes), at<uint16_t>(key_ranges),
                                          at<uint8_t>(value_codes), at<uint16_t>(value_ranges)};
          },
          "rows"_a, "key_codes"_a, "key_ranges"_a, "value_codes"_a, "value_ranges"_a);
  nb::class_<alisa::SketchStep>(m, "SketchStep")
      .def(
          "__init__",
          [](alisa::SketchStep* self, const std::string& isa, const alisa::SketchTask& sketch, const alisa::DecodeTask& attend,
             uintptr_t older_ends, uintptr_t older_counts, uintptr_t row_counts, uintptr_t positions, uintptr_t slots,
             uintptr_t new_slots, uintptr_t new_ids, uintptr_t table, size_t table_stride,
             uintptr_t table_rows, uintptr_t shares, uintptr_t out) {
            const alisa::Isa* kernels = alisa::find_isa(isa.c_str());
            if (kernels == nullptr) throw std::invalid_argument("this CPU or build has no " + isa + " kernels");
            const alisa::SelectTask<float> chosen = {nullptr,
                                                     0,
                                                     nullptr,
                                                     at<const int32_t>(older_ends),
                                                     at<const int32_t>(older_counts),
                                                     at<const int32_t>(row_counts),
                                                     sketch.num_seqs * sketch.num_sets,
                                                     attend.num_slots,
                                                     at<int32_t>(positions)};
            new (self) alisa::SketchStep(
                *kernels, {sketch, attend, chosen, at<int32_t>(slots), at<const int64_t>(new_slots), at<const int64_t>(new_ids),
                           at<const int32_t>(table), table_stride, at<const int64_t>(table_rows),
                           at<float>(shares), at<void>(out)});
          },
          "isa"_a, "sketch"_a, "attend"_a, "older_ends"_a, "older_counts"_a, "row_counts"_a, "positions"_a, "slots"_a,
          "new_slots"_a, "new_ids"_a, "table"_a, "table_stride"_a, "table_rows"_a,
          "shares"_a, "out"_a);
  nb::class_<alisa::SketchStepper>(m, "SketchStepper")
      .def(nb::init<>())
      .def(
          "run",
          [](alisa::SketchStepper& self, const alisa::Threads& threads, const alisa::SketchStep& step,
             const alisa::SketchLayer& layer, uintptr_t q, uintptr_t k, uintptr_t v, size_t k_stride, size_t v_stride) {
            const nb::gil_scoped_release unlocked;
            return self.run(step, layer, {at<const void>(q), at<const void>(k), at<const void>(v), k_stride, v_stride}, threads)
                .chose();
          },
          "threads"_a, "step"_a, "layer"_a, "q"_a, "k"_a, "v"_a, "k_stride"_a, "v_stride"_a);
  nb::class_<alisa::SketchAttention, alisa::LayerAttention>(m, "SketchAttention")
      .def(
          "__init__",
          [](alisa::SketchAttention* self, alisa::SketchStepper& stepper, const std::vector<const alisa::SketchStep*>& steps,
             const std::vector<const alisa::SketchLayer*>& places, uintptr_t q, uintptr_t k, uintptr_t v, size_t k_stride,
             size_t v_stride) {
            std::vector<alisa::SketchAttention::Layer> layers;
            for (size_t i = 0; i < steps.size(); ++i) layers.push_back({steps[i], *places[i]});
            new (self) alisa::SketchAttention(
                stepper, std::move(layers),
                {at<const void>(q), at<const void>(k), at<const void>(v), k_stride, v_stride});
          },
          "stepper"_a, "steps"_a, "places"_a, "q"_a, "k"_a, "v"_a, "k_stride"_a, "v_stride"_a)
      .def_prop_ro("seconds", &alisa::SketchAttention::seconds)
      .def_prop_ro("chose", &alisa::SketchAttention::chose);
}
