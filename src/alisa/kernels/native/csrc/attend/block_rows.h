// The rows of one block, and when they are asked for.
#pragma once

#include "task.h"

namespace alisa::ALISA_ISA {

// The rows of one block for one index set, and the heads that read them.
struct BlockRows {
  const uint8_t* row[kBlock + kPanel];
  int count;
  int first_kv_head;
  int num_kv_heads;
};

inline BlockRows block_rows(const DecodeTask& task, int seq, int set, int block) {
  BlockRows rows;
  const int first = block * kBlock;
  const int left = task.counts[seq] - first;
  rows.count = left < kBlock ? left : kBlock;
  const int32_t* slots = task.slots + (static_cast<size_t>(task.entry(seq)) * task.num_sets + set) * task.num_slots + first;
  for (int i = 0; i < rows.count; ++i) rows.row[i] = task.rows + static_cast<size_t>(slots[i]) * task.row_stride;
  // The last panel is filled up with its last row, whose weight counts once.
  for (int i = rows.count; i < round_up(rows.count, kPanel); ++i) rows.row[i] = rows.row[rows.count - 1];
  const bool shared = task.num_sets == 1;
  rows.first_kv_head = shared ? 0 : set;
  rows.num_kv_heads = shared ? task.layout.num_kv_heads : 1;
  return rows;
}

// Asks for the chunks (K or V of the heads of a row that one index set reads) that follow while a panel is at work. Rows lie
// anywhere, so the hardware cannot foresee the next one; how much it needs to be told depends on how long a chunk is. Chunks
// of K and V are taken to be as long as those of K: where V is shorter, a few bytes too many are asked for.
class Ahead {
 public:
  Ahead(const RowLayout& layout, int num_kv_heads)
      : values_at_(layout.values_at()),
        value_head_bytes_(layout.values().head_bytes()),
        head_bytes_(layout.keys().head_bytes()),
        chunk_bytes_(head_bytes_ * static_cast<size_t>(num_kv_heads)) {
    // Bytes in flight ahead of the reader: enough for the latency of DRAM, and little enough to stay in L2.
    constexpr size_t kAheadBytes = 32768;
    const size_t distance = kAheadBytes / chunk_bytes_;
    distance_ = distance < kPanel ? kPanel : distance > kBlock / 2 ? kBlock / 2 : static_cast<int>(distance);
  }

  // The panel whose first chunk is `chunk` begins.
  void begin(const BlockRows& rows, const BlockRows& next, int chunk) {
    for (int r = 0; r < kPanel; ++r) {
      chunk_[r] = chunk_after(rows, next, chunk + r);
      if (head_by_head()) continue;
      // Short pieces, as with one index set per head, in full; of long ones each page with one line: once there, the
      // hardware runs ahead by itself, and asking for every line of float32 rows made them a quarter slower.
      const size_t step = chunk_bytes_ <= kShort ? 64 : 4096;
      for (size_t at = 0; at < chunk_bytes_; at += step) __builtin_prefetch(chunk_[r] + at, 0, 2);
    }
  }

  // Head `index` of the panel is next. Inlined by force: a function that only prefetches has no effect in the eyes of GCC,
  // which then drops the call.
  ALISA_INLINE void advance(int index) const {
    if (!head_by_head()) return;
    const size_t first = static_cast<size_t>(index) * head_bytes_;
    for (const uint8_t* chunk : chunk_) {
      for (size_t at = 0; at < head_bytes_; at += 64) __builtin_prefetch(chunk + first + at, 0, 3);
    }
  }

 private:
  // The chunk that is read `distance_` chunks after chunk `at`; those of a block are its K, then its V.
  const uint8_t* chunk_after(const BlockRows& rows, const BlockRows& next, int at) const {
    const auto first_head = static_cast<size_t>(rows.first_kv_head);
    int chunk = at + distance_;
    const int count = round_up(rows.count, kPanel);
    if (chunk < count) return rows.row[chunk] + first_head * head_bytes_;
    chunk -= count;
    if (chunk < count) return rows.row[chunk] + values_at_ + first_head * value_head_bytes_;
    chunk -= count;
    const int next_count = round_up(next.count, kPanel);
    return next.row[chunk < next_count ? chunk : next_count - 1] + first_head * head_bytes_;
  }

  static constexpr size_t kShort = 512;
  static constexpr size_t kLong = 8192;
  // Between the two every line is asked for, a head at a time: spread over the work, requests never queue up.
  bool head_by_head() const { return chunk_bytes_ > kShort && chunk_bytes_ <= kLong; }

  size_t values_at_;
  size_t value_head_bytes_;
  size_t head_bytes_;   // of K
  size_t chunk_bytes_;  // of K of a row
  int distance_;        // chunks
  const uint8_t* chunk_[kPanel];
};

}  // namespace alisa::ALISA_ISA
