// The Python module `alisa.kernels._native`: addresses and sizes in, results written where they point. It knows nothing of
// torch, so one build serves every version of it; alisa/kernels/native/*.py check dtypes, shapes and strides.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "workspace.h"
#include "bind_model.h"
#include "bind_prefill.h"
#include "bind_sketch_step.h"
#include "fixed_attention.h"
#include "isa.h"
#include "prefill.h"
#include "row_io.h"
#include "select.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using alisa::Dtype;
using alisa::RowLayout;
using alisa::Threads;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const alisa::Isa& isa_named(const std::string& name) {
  const alisa::Isa* isa = alisa::find_isa(name.c_str());
  if (isa == nullptr) throw std::invalid_argument("this CPU or build has no " + name + " kernels");
  return *isa;
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const char* name : {"avx512_vnni", "avx512", "avx2", "portable"}) {
    if (alisa::find_isa(name) != nullptr) names.emplace_back(name);
  }
  return names;
}

std::vector<std::string> prefill_isa_names() {
  std::vector<std::string> names;
  for (const char* name : {"avx512_bf16", "avx2"}) {
    if (alisa::find_prefill(name) != nullptr) names.emplace_back(name);
  }
  return names;
}

}  // namespace

NB_MODULE(_native, m) {
  nb::class_<Threads>(m, "Threads")
      .def(
          "__init__",
          [](Threads* self, uintptr_t entry, int count, uintptr_t team_size, uintptr_t team_rank) {
            new (self) Threads{reinterpret_cast<alisa::ParallelEntry>(entry), count,
                               reinterpret_cast<alisa::TeamQuestion>(team_size), reinterpret_cast<alisa::TeamQuestion>(team_rank)};
          },
          "entry"_a, "count"_a, "team_size"_a, "team_rank"_a,
          "GOMP_parallel of the OpenMP runtime that torch has loaded (0: none), how many threads, and the runtime's "
          "omp_get_num_threads and omp_get_thread_num.");
  nb::class_<RowLayout>(m, "RowLayout")
      .def(
          "__init__", [](RowLayout* self, int dtype, int num_kv_heads, int head_dim, int parts) {
            new (self) RowLayout{static_cast<Dtype>(dtype), num_kv_heads, head_dim, parts};
          },
          "dtype"_a, "num_kv_heads"_a, "head_dim"_a, "parts"_a)
      .def_prop_ro("row_bytes", [](const RowLayout& self) { return self.row_bytes(); });

  nb::class_<alisa::SketchTask>(m, "SketchTask")
      .def(
          "__init__",
          [](alisa::SketchTask* self, int bits, int num_kv_heads, int head_dim, uintptr_t q, int q_dtype, uintptr_t codes,
             uintptr_t ranges, uintptr_t starts, uintptr_t lengths, int num_seqs, int num_heads, int num_sets, int width,
             int parts, float softcap, int value_bits, uintptr_t value_codes, uintptr_t value_ranges, uintptr_t rest) {
            new (self) alisa::SketchTask{};
            self->layout = {bits, num_kv_heads, head_dim};
            self->parts = parts;
            self->softcap = softcap;
            self->q = at<const void>(q);
            self->q_dtype = static_cast<Dtype>(q_dtype);
            self->codes = at<const uint8_t>(codes);
            self->ranges = at<const uint16_t>(ranges);
            self->starts = at<const int64_t>(starts);
            self->lengths = at<const int32_t>(lengths);
            self->num_seqs = num_seqs;
            self->num_heads = num_heads;
            self->num_sets = num_sets;
            self->width = width;
            self->value_layout = {value_bits, num_kv_heads, head_dim};
            self->value_codes = at<const uint8_t>(value_codes);
            self->value_ranges = at<const uint16_t>(value_ranges);
            self->rest = at<float>(rest);
          },
          "bits"_a, "num_kv_heads"_a, "head_dim"_a, "q"_a, "q_dtype"_a, "codes"_a, "ranges"_a, "starts"_a, "lengths"_a,
          "num_seqs"_a, "num_heads"_a, "num_sets"_a, "width"_a, "parts"_a, "softcap"_a, "value_bits"_a = 0, "value_codes"_a = 0, "value_ranges"_a = 0,
          "rest"_a = 0, "A query, the part of a sketch that it asks, and that of the values where there is one.");

  m.attr("PIECE_COLUMNS") = alisa::kBlock;
  nb::class_<alisa::DecodeTask>(m, "DecodeTask")
      .def(
          "__init__",
          [](alisa::DecodeTask* self, const RowLayout& layout, uintptr_t q, int q_dtype, uintptr_t rows, size_t row_stride,
             uintptr_t slots, uintptr_t entries, uintptr_t counts, int num_seqs, int num_heads, int num_sets, int num_slots,
             uintptr_t out, uintptr_t mass, uintptr_t log_sum_exp, float softcap) {
            new (self) alisa::DecodeTask{};
            self->q = at<const void>(q);
            self->q_dtype = static_cast<Dtype>(q_dtype);
            self->rows = at<const uint8_t>(rows);
            self->row_stride = row_stride;
            self->layout = layout;
            self->slots = at<const int32_t>(slots);
            self->entries = at<const int32_t>(entries);
            self->counts = at<const int32_t>(counts);
            self->num_seqs = num_seqs;
            self->num_heads = num_heads;
            self->num_sets = num_sets;
            self->num_slots = num_slots;
            self->out = at<void>(out);
            self->mass = at<float>(mass);
            self->log_sum_exp = at<float>(log_sum_exp);
            self->softcap = softcap;
          },
          "layout"_a, "q"_a, "q_dtype"_a, "rows"_a, "row_stride"_a, "slots"_a, "entries"_a, "counts"_a, "num_seqs"_a,
          "num_heads"_a, "num_sets"_a, "num_slots"_a, "out"_a, "mass"_a, "log_sum_exp"_a, "softcap"_a, "Queries, what they attend to, and results.");
  nb::class_<alisa::Pieces>(m, "Pieces").def(nb::init<>());

  nb::class_<alisa::Workspace> workspace(m, "Workspace");
  workspace.def(nb::init<>())
      .def(
          "decode",
          [](alisa::Workspace& self, const std::string& isa, const Threads& threads, const alisa::DecodeTask& task) {
            const alisa::Isa& kernels = isa_named(isa);
            const nb::gil_scoped_release unlocked;
            self.decode(kernels, task, threads);
          },
          "isa"_a, "threads"_a, "task"_a)
      .def(
          "decode_piece",
          [](alisa::Workspace& self, const std::string& isa, const Threads& threads, const alisa::DecodeTask& task,
             alisa::Pieces& pieces, uintptr_t begins, uintptr_t ends) {
            const alisa::Isa& kernels = isa_named(isa);
            const nb::gil_scoped_release unlocked;
            self.decode_piece(kernels, task, pieces, at<const int32_t>(begins), at<const int32_t>(ends), threads);
          },
          "isa"_a, "threads"_a, "task"_a, "pieces"_a, "begins"_a, "ends"_a)
      .def(
          "decode_end",
          [](alisa::Workspace& self, const std::string& isa, const Threads& threads, const alisa::DecodeTask& task,
             alisa::Pieces& pieces) {
            const alisa::Isa& kernels = isa_named(isa);
            const nb::gil_scoped_release unlocked;
            self.decode_end(kernels, task, pieces, threads);
          },
          "isa"_a, "threads"_a, "task"_a, "pieces"_a)
      .def(
          "encode",
          [](alisa::Workspace& self, const std::string& isa, const Threads& threads, const RowLayout& layout, uintptr_t k,
             uintptr_t v, int dtype, size_t k_stride, size_t v_stride, uintptr_t rows, size_t row_stride, uintptr_t slots,
             int64_t num_tokens) {
            const alisa::Isa& kernels = isa_named(isa);
            const alisa::EncodeTask task = {at<const void>(k),  at<const void>(v), static_cast<Dtype>(dtype),
                                            k_stride,           v_stride,          at<uint8_t>(rows),
                                            row_stride,         layout,            at<const int64_t>(slots)};
            const nb::gil_scoped_release unlocked;
            self.encode(kernels, task, num_tokens, threads);
          },
          "isa"_a, "threads"_a, "layout"_a, "k"_a, "v"_a, "dtype"_a, "k_stride"_a, "v_stride"_a, "rows"_a, "row_stride"_a,
          "slots"_a, "num_tokens"_a)
      .def(
          "sketch_scores",
          [](alisa::Workspace& self, const std::string& isa, const Threads& threads, const alisa::SketchTask& task,
             uintptr_t out) {
            const alisa::Isa& kernels = isa_named(isa);
            alisa::SketchTask scored = task;
            scored.out = at<float>(out);
            const nb::gil_scoped_release unlocked;
            self.sketch_scores(kernels, scored, threads);
          },
          "isa"_a, "threads"_a, "task"_a, "out"_a)
      .def(
          "sketch_select",
          [](alisa::Workspace& self, const std::string& isa, const Threads& threads, const alisa::SketchTask& task,
             uintptr_t older_ends, uintptr_t older_counts, uintptr_t counts, int num_slots, uintptr_t coverages,
             uintptr_t positions, uintptr_t chosen_counts, uintptr_t shares) {
            const alisa::Isa& kernels = isa_named(isa);
            const alisa::SelectTask<float> chosen = {nullptr,
                                                     0,
                                                     nullptr,
                                                     at<const int32_t>(older_ends),
                                                     at<const int32_t>(older_counts),
                                                     at<const int32_t>(counts),
                                                     task.num_seqs * task.num_sets,
                                                     num_slots,
                                                     at<int32_t>(positions)};
            const nb::gil_scoped_release unlocked;
            self.sketch_select(kernels, task, chosen, at<const double>(coverages), at<int32_t>(chosen_counts), at<float>(shares),
                               threads);
          },
          "isa"_a, "threads"_a, "task"_a, "older_ends"_a, "older_counts"_a, "counts"_a, "num_slots"_a, "coverages"_a,
          "positions"_a, "chosen_counts"_a, "shares"_a)
      .def(
          "sketch_append",
          [](alisa::Workspace& self, const std::string& isa, const Threads& threads, int bits, int num_kv_heads, int head_dim,
             uintptr_t keys, int dtype, size_t stride, uintptr_t codes, uintptr_t ranges, uintptr_t ids, int64_t num_tokens) {
            const alisa::Isa& kernels = isa_named(isa);
            const alisa::SketchAppendTask task = {
                {bits, num_kv_heads, head_dim}, at<const void>(keys),  static_cast<Dtype>(dtype), stride,
                at<uint8_t>(codes),             at<uint16_t>(ranges), at<const int64_t>(ids)};
            const nb::gil_scoped_release unlocked;
            self.sketch_append(kernels, task, num_tokens, threads);
          },
          "isa"_a, "threads"_a, "bits"_a, "num_kv_heads"_a, "head_dim"_a, "keys"_a, "dtype"_a, "stride"_a, "codes"_a,
          "ranges"_a, "ids"_a, "num_tokens"_a)
      .def(
          "mean_add",
          [](alisa::Workspace& self, const std::string& isa, uintptr_t sums, int num_kv_heads, int head_dim, uintptr_t values,
             int dtype, size_t stride, uintptr_t req_index, int64_t num_tokens) {
            const alisa::Isa& kernels = isa_named(isa);
            const nb::gil_scoped_release unlocked;
            self.mean_add(kernels, {at<double>(sums), num_kv_heads, head_dim, at<const void>(values), static_cast<Dtype>(dtype),
                                    stride, at<const int64_t>(req_index), num_tokens});
          },
          "isa"_a, "sums"_a, "num_kv_heads"_a, "head_dim"_a, "values"_a, "dtype"_a, "stride"_a, "req_index"_a, "num_tokens"_a)
      .def(
          "mean_blend",
          [](alisa::Workspace& self, const std::string& isa, const Threads& threads, uintptr_t sums, int num_kv_heads,
             int head_dim, int num_heads, uintptr_t read, uintptr_t out, int dtype, uintptr_t shares, uintptr_t req_index,
             uintptr_t lengths, int num_seqs) {
            const alisa::Isa& kernels = isa_named(isa);
            const nb::gil_scoped_release unlocked;
            self.mean_blend(kernels,
                            {at<const double>(sums), num_kv_heads, head_dim, num_heads, at<const void>(read), at<void>(out),
                             static_cast<Dtype>(dtype), at<const float>(shares), at<const int64_t>(req_index),
                             at<const int32_t>(lengths)},
                            num_seqs, threads);
          },
          "isa"_a, "threads"_a, "sums"_a, "num_kv_heads"_a, "head_dim"_a, "num_heads"_a, "read"_a, "out"_a, "dtype"_a,
          "shares"_a, "req_index"_a, "lengths"_a, "num_seqs"_a)
      .def(
          "rest_blend",
          [](alisa::Workspace& self, const std::string& isa, const Threads& threads, int head_dim, int num_heads, uintptr_t read,
             uintptr_t out, int dtype, uintptr_t shares, uintptr_t rest, int num_seqs) {
            const alisa::Isa& kernels = isa_named(isa);
            const nb::gil_scoped_release unlocked;
            self.rest_blend(kernels,
                            {num_heads, head_dim, at<const void>(read), at<void>(out), static_cast<Dtype>(dtype),
                             at<const float>(shares), at<const float>(rest)},
                            num_seqs, threads);
          },
          "isa"_a, "threads"_a, "head_dim"_a, "num_heads"_a, "read"_a, "out"_a, "dtype"_a, "shares"_a, "rest"_a, "num_seqs"_a);
  bind_prefill(workspace);
  bind_model(m);
  bind_sketch_step(m);
  nb::class_<alisa::FixedAttention, alisa::LayerAttention>(m, "FixedAttention")
      .def(
          "__init__",
          [](alisa::FixedAttention* self, alisa::Workspace& workspace, const std::string& isa, const alisa::DecodeTask& attend,
             uintptr_t k, uintptr_t v, size_t k_stride, size_t v_stride, uintptr_t slots, int64_t num_tokens,
             const std::vector<uintptr_t>& layers) {
            const alisa::EncodeTask rows = {at<const void>(k),  at<const void>(v), attend.q_dtype,
                                            k_stride,           v_stride,          nullptr,
                                            attend.row_stride,  attend.layout,     at<const int64_t>(slots)};
            std::vector<uint8_t*> places;
            for (const uintptr_t layer : layers) places.push_back(at<uint8_t>(layer));
            new (self) alisa::FixedAttention(workspace, isa_named(isa), rows, num_tokens, attend, std::move(places));
          },
          "workspace"_a, "isa"_a, "attend"_a, "k"_a, "v"_a, "k_stride"_a, "v_stride"_a, "slots"_a,
          "num_tokens"_a, "layers"_a)
      .def_prop_ro("seconds", &alisa::FixedAttention::seconds);

  m.def(
      "activate",
      [](const std::string& isa, const Threads& threads, int kind, int dtype, uintptr_t x, uintptr_t out, int width, bool gated,
         int64_t num_tokens) {
        const alisa::Isa& kernels = isa_named(isa);
        const alisa::ActivationTask task = {static_cast<alisa::Activation>(kind), static_cast<Dtype>(dtype), at<const void>(x),
                                            at<void>(out), width, gated, num_tokens};
        const nb::gil_scoped_release unlocked;
        alisa::activate(kernels, task, threads);
      },
      "isa"_a, "threads"_a, "kind"_a, "dtype"_a, "x"_a, "out"_a, "width"_a, "gated"_a, "num_tokens"_a);
  m.def(
      "turn",
      [](const std::string& isa, const Threads& threads, uintptr_t heads, uintptr_t out, int dtype, size_t stride, int num_heads,
         int num_kv_heads, int head_dim, uintptr_t matrices, uintptr_t shifts, int64_t num_tokens) {
        const alisa::Isa& kernels = isa_named(isa);
        const alisa::TurnTask task = {at<const void>(heads), at<void>(out), static_cast<Dtype>(dtype), stride, num_heads,
                                      num_kv_heads, head_dim, at<const float>(matrices), at<const float>(shifts)};
        const nb::gil_scoped_release unlocked;
        alisa::turn(kernels, task, num_tokens, threads);
      },
      "isa"_a, "threads"_a, "heads"_a, "out"_a, "dtype"_a, "stride"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a,
      "matrices"_a, "shifts"_a, "num_tokens"_a);
  m.def(
      "select",
      [](const Threads& threads, uintptr_t scores, bool wide, size_t stride, uintptr_t starts, uintptr_t older_ends,
         uintptr_t older_counts, uintptr_t counts, int num_seqs, int num_slots, uintptr_t positions) {
        const nb::gil_scoped_release unlocked;
        const auto run = [&](auto* typed) {
          using Score = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
          alisa::select_positions<Score>({typed, stride, at<const int64_t>(starts), at<const int32_t>(older_ends),
                                          at<const int32_t>(older_counts), at<const int32_t>(counts), num_seqs, num_slots,
                                          at<int32_t>(positions)},
                                         threads);
        };
        if (wide) {
          run(at<const double>(scores));
        } else {
          run(at<const float>(scores));
        }
      },
      "threads"_a, "scores"_a, "wide"_a, "stride"_a, "starts"_a, "older_ends"_a, "older_counts"_a, "counts"_a,
      "num_seqs"_a, "num_slots"_a, "positions"_a);
  m.def(
      "observe",
      [](uintptr_t sums, uintptr_t buckets, uintptr_t sum_starts, uintptr_t bucket_starts, uintptr_t positions,
         uintptr_t counts, uintptr_t mass, int num_seqs, int num_slots) {
        const nb::gil_scoped_release unlocked;
        alisa::observe_mass({at<double>(sums), at<float>(buckets), at<const int64_t>(sum_starts),
                             at<const int64_t>(bucket_starts), at<const int32_t>(positions), at<const int32_t>(counts),
                             at<const float>(mass), num_seqs, num_slots});
      },
      "sums"_a, "buckets"_a, "sum_starts"_a, "bucket_starts"_a, "positions"_a, "counts"_a, "mass"_a, "num_seqs"_a,
      "num_slots"_a);
  m.def(
      "move_rows",
      [](bool write, int file, uintptr_t offsets, uintptr_t memory, size_t stride, uintptr_t rows, size_t count,
         size_t row_bytes) {
        const alisa::RowIo task = {file,  at<const int64_t>(offsets), at<uint8_t>(memory), stride, at<const int64_t>(rows),
                                   count, row_bytes};
        const nb::gil_scoped_release unlocked;
        return write ? alisa::write_rows(task) : alisa::read_rows(task);
      },
      "write"_a, "file"_a, "offsets"_a, "memory"_a, "stride"_a, "rows"_a, "count"_a, "row_bytes"_a);
  m.def("prefill_isa_names", prefill_isa_names, "Instruction sets with prefill kernels that this CPU can run, fastest first.");
  m.def("isa_names", isa_names, "Instruction sets that this CPU can run, fastest first.");
}
