// The plain values that cross the borders inside the native code: what a decode-attention call is asked to do, and how
// it was cut into pieces. Files compiled for one instruction set include this one and nothing of the standard library
// that could leave an inline function behind: the linker keeps one copy of those, and it must run on every CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace alisa {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kInt4 = 4, kK8V4 = 5 };

// Rows that share one table of weights. Each row is read once, so nothing has to stay in a cache between the passes; 64
// is where the softmax over a block stops showing in the profile (it is vectorised over the rows of a block).
constexpr int kBlock = 64;

// Blocks of a sequence that become one partial result: an item of work, and a place where a sum is cut. A constant, because
// the last bits of a sum tell where it was cut: a sequence is to get the same ones whatever company and threads it has.
constexpr int kItemBlocks = 4;
constexpr int kSketchItemBlocks = 8;

// Rows that are read side by side. They share each load of the query and of the accumulators, which together are as large
// as an L1 cache: eight rows were 10 % faster than four, sixteen no faster than eight.
constexpr int kPanel = 8;

// Every vector length used divides this: one padding for all instruction sets.
constexpr int kPad = 16;

// Never left behind as a function of its own: a copy compiled for AVX-512 must not serve another file.
#define ALISA_INLINE __attribute__((always_inline)) inline

ALISA_INLINE constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

// Bytes of the row of one token:
//
//   float  [ K: G heads x D values    ][ V: G x D         ]
//   coded  [ K: G heads x P x codes   ][ V: G x P x codes ][ (scale, minimum) float16 pairs: G x P of K, then G x P of V ]
//
// A head is in P equal parts with a range each; several parts are whole vectors (64 values), so that only a head in one part
// is ever padded. int8: N bytes of codes for each part of N values. int4: ceil(N / 2) bytes, byte i holds code i (low) and code
// i + ceil(N / 2) (high), so that a vector of bytes gives two runs of consecutive values without a shuffle. k8v4: K as int8, V
// as int4, and a byte that fills up if there is an odd number of them. value = minimum + scale * code.

// K or V of a row.
struct HalfLayout {
  Dtype dtype;
  int num_kv_heads;  // G
  int head_dim;      // D
  int parts;         // P

  ALISA_INLINE constexpr int planes() const { return dtype == Dtype::kInt4 ? 2 : 1; }
  ALISA_INLINE constexpr int part_dim() const { return head_dim / parts; }
  // Values in one plane of a part, and the same in padded float buffers, where the parts of a head lie one after the other.
  ALISA_INLINE constexpr int plane_len() const { return (part_dim() + planes() - 1) / planes(); }
  ALISA_INLINE constexpr int plane_stride() const { return round_up(plane_len(), kPad); }
  ALISA_INLINE constexpr int part_stride() const { return planes() * plane_stride(); }
  ALISA_INLINE constexpr int head_stride() const { return parts * part_stride(); }
  // Asked for in inner loops: no division by the parts, of which several have whole bytes each.
  ALISA_INLINE constexpr size_t head_bytes() const {
    switch (dtype) {
      case Dtype::kFloat32: return static_cast<size_t>(head_dim) * 4;
      case Dtype::kBFloat16:
      case Dtype::kFloat16: return static_cast<size_t>(head_dim) * 2;
      default: return static_cast<size_t>((head_dim + planes() - 1) / planes());
    }
  }
  ALISA_INLINE constexpr size_t part_bytes() const { return head_bytes() / static_cast<size_t>(parts); }
  ALISA_INLINE constexpr size_t bytes() const { return head_bytes() * static_cast<size_t>(num_kv_heads); }
};

struct RowLayout {
  Dtype dtype;
  int num_kv_heads;  // G
  int head_dim;      // D
  int parts = 1;     // P, of coded rows

  ALISA_INLINE constexpr bool coded() const { return dtype == Dtype::kInt8 || dtype == Dtype::kInt4 || dtype == Dtype::kK8V4; }
  ALISA_INLINE constexpr HalfLayout keys() const {
    return {dtype == Dtype::kK8V4 ? Dtype::kInt8 : dtype, num_kv_heads, head_dim, parts};
  }
  ALISA_INLINE constexpr HalfLayout values() const {
    return {dtype == Dtype::kK8V4 ? Dtype::kInt4 : dtype, num_kv_heads, head_dim, parts};
  }
  // Parts of all heads of K, or of V: each has a pair.
  ALISA_INLINE constexpr int num_pairs() const { return num_kv_heads * parts; }
  // Where V begins, and where the pairs of a coded row do.
  ALISA_INLINE constexpr size_t values_at() const { return keys().bytes(); }
  ALISA_INLINE constexpr size_t pairs_at() const { return (values_at() + values().bytes() + 1) / 2 * 2; }
  ALISA_INLINE constexpr size_t row_bytes() const { return pairs_at() + (coded() ? static_cast<size_t>(num_pairs()) * 8 : 0); }
};

// A run of blocks of one sequence, worked on by one thread. It lies within one partial result and begins it, or goes on
// where an earlier call stopped. In decode attention each query is a sequence of its own here, and several of them may
// read the same slots.
struct Item {
  int seq;
  int first_block;  // of the sequence
  int num_blocks;
};

// Where the blocks and the partial results of each sequence begin among those of all of them.
struct Grid {
  const size_t* first_block;  // [B + 1]
  const int* first_partial;   // [B + 1]
};

struct DecodeTask {
  const void* q;  // [B, H, D]
  Dtype q_dtype;
  const uint8_t* rows;  // [R, row_stride]
  size_t row_stride;
  RowLayout layout;
  const int32_t* slots;    // [S, J, K]
  const int32_t* entries;  // [B], ascending: which of the S each query reads the beginning of; null: its own, and S is B
  const int32_t* counts;   // [B]
  int num_seqs;           // B
  int num_heads;          // H
  int num_sets;           // J
  int num_slots;          // K
  void* out;              // [B, H, D] in q_dtype
  float* mass;            // [B, J, K]; null: nobody asks
  float* log_sum_exp;     // [B, H]
  float softcap;          // scores s become softcap * tanh(s / softcap); 0: they stay as they are

  ALISA_INLINE int entry(int seq) const { return entries == nullptr ? seq : entries[seq]; }

  // The plan and its buffers, see workspace.cpp.
  const Item* items;
  Grid grid;
  float* weights;        // [blocks, H, kBlock]: exp(score - block_max)
  float* block_max;      // [blocks, H]: the running maximum when the block was weighted
  float* partial_out;    // [partials, H, values().head_stride()]
  float* partial_max;    // [partials, H]
  float* partial_sum;    // [partials, H]
  float* partial_shift;  // [partials, H, P]: what the minima of coded rows add to every dimension of a part of the output
};

// A low-bit copy of keys or values, `[T, G, ...]`: the codes of a head with a (step, minimum) float16 pair in a tensor of their own.
//
// value = minimum + step * code. Byte i holds the codes i, i + P, i + 2P, ... from its lowest bits up, P bytes for each head,
// so that a vector of bytes gives runs of consecutive codes by shifts alone (the int4 rows above are the same for 4 bits).
struct SketchLayout {
  int bits;  // 2, 4 or 8
  int num_kv_heads;
  int head_dim;

  ALISA_INLINE constexpr int planes() const { return 8 / bits; }
  ALISA_INLINE constexpr int code_bytes() const { return (head_dim + planes() - 1) / planes(); }  // P
  // Of a head in float buffers, where every plane is padded.
  ALISA_INLINE constexpr int plane_stride() const { return round_up(code_bytes(), kPad); }
  ALISA_INLINE constexpr int head_stride() const { return planes() * plane_stride(); }
};

// The largest number in a rounded query: two digits of eight bits, each with a sign (127 * 256 + 127).
constexpr float kQueryReach = 32639.0F;

// Tokens of a sketch that are scored together, and those of an item, which are weighed together: their scores stay near until
// their weights are known.
constexpr int kSketchBlock = 32;
constexpr int kSketchItemTokens = kSketchItemBlocks * kSketchBlock;

// Approximate attention weights of all tokens of some sequences, and with a sketch of the values what the tokens that are
// not read add to the output.
//
// A head may be in several parts with ranges of their own. They are heads here, in everything but `q`, `shares` and `rest`,
// those of a K/V head one after the other and each with all its query heads: only their scores are added up.
struct SketchTask {
  SketchLayout layout;
  int parts = 1;         // of a head of `q`
  float softcap = 0.0F;  // scores s become softcap * tanh(s / softcap); 0: they stay as they are
  const void* q;  // [B, H, D]
  Dtype q_dtype;
  const uint8_t* codes;    // [T, G, P]
  const uint16_t* ranges;  // [T, G, 2]
  const int64_t* starts;   // [B]: the first token of each sequence
  const int32_t* lengths;  // [B]
  int num_seqs;            // B
  int num_heads;           // H
  int num_sets;            // 1 or G
  int width;               // at least the longest sequence
  float* out;              // [B, num_sets, width]

  SketchLayout value_layout;
  const uint8_t* value_codes;    // [T, G, P]; null: there is no sketch of the values
  const uint16_t* value_ranges;  // [T, G, 2]
  float* rest;                   // [B, H, D]

  // The plan and its buffers, see workspace.cpp. Heads are padded to `heads()`.
  const Item* items;
  Grid grid;
  float* queries = nullptr;  // [B, floats of a query]; null: each item prepares its own
  float* weights;         // [blocks, H, kSketchBlock]: exp(score - partial_max), 0 after the last token
  float* partial_max;     // [partials, heads]
  float* partial_sum;     // [partials, heads]
  float* partial_factor;  // [partials, heads]: what makes weights those of the whole sequence
  float* partial_values;  // [partials, H, value_layout.head_stride()]: weights times steps times codes, of unread tokens
  float* partial_shift;   // [partials, heads]: weights times minima, what is added to every dimension

  ALISA_INLINE constexpr int heads() const { return round_up(num_heads, kPad); }
  ALISA_INLINE constexpr size_t block_floats() const { return static_cast<size_t>(num_heads) * kSketchBlock; }
  ALISA_INLINE constexpr bool completes() const { return value_codes != nullptr; }
  ALISA_INLINE constexpr int group() const { return num_heads / layout.num_kv_heads; }
  // The head of `q` that part `h` is of, and where in it the part begins.
  ALISA_INLINE constexpr int head_of(int h) const { return h / (parts * group()) * group() + h % group(); }
  ALISA_INLINE constexpr int offset_of(int h) const { return h / group() % parts * layout.head_dim; }
};

// New keys or values written into their sketch.
struct SketchAppendTask {
  SketchLayout layout;
  const void* vectors;  // [N, G, D]
  Dtype dtype;
  size_t stride;  // bytes from one token to the next
  uint8_t* codes;
  uint16_t* ranges;
  const int64_t* ids;  // [N]
};

// New tokens written as rows.
struct EncodeTask {
  const void* k;  // [N, G, D]
  const void* v;
  Dtype dtype;
  size_t k_stride;  // bytes from one token to the next
  size_t v_stride;
  uint8_t* rows;
  size_t row_stride;
  RowLayout layout;
  const int64_t* slots;  // [N]
};

}  // namespace alisa
