// Prefill attention with AVX512-BF16, in the manner of flash attention (arXiv 2307.08691): blocks of keys, a running
// maximum, no matrix of scores in memory. CMakeLists.txt gives this file its own compiler flags.
//
// A row is one head of one token; the rows of a KV head's query heads share its packed keys and values. Six rows and 64 keys
// are worked on at a time: their 24 vectors of scores stay in registers from the first product to the weights, which go
// through L1 as bfloat16. A row's result depends on the row and the blocks of keys only, not on what shares its tile.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "prefill.h"

namespace alisa {
namespace {

constexpr int kLanes = 16;
constexpr int kRows = 6;  // a strip: 6 x 4 sums, 4 operands and a broadcast fill the 32 registers
constexpr int kStrips = 8;
constexpr int kTile = kRows * kStrips;  // its queries, sums and one packed block fit L1
constexpr int kVectors = kKeyBlock / kLanes;
constexpr int kKeyPairs = kKeyBlock / 2;

// The maximum that weights are relative to moves only when a score exceeds it by this power of two: most blocks then
// rescale nothing, and neither float32 sums nor bfloat16 weights lose a bit by it.
constexpr float kSlack = 8.0F;
constexpr float kLog2E = 1.44269504088896341F;
constexpr float kLn2 = 0.69314718055994531F;

using F = __m512;

ALISA_INLINE F pair_products(F sums, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }
ALISA_INLINE __m512i load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
ALISA_INLINE __mmask16 first_lanes(int count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xFFFF : count <= 0 ? 0 : (1U << count) - 1U);
}

// 2^x to 1e-7, 0 for -inf: a polynomial in the fraction of x (minimax in relative error over [0, 1]), scaled by its floor.
ALISA_INLINE F exp2_of(F x) {
  const F fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  F p = _mm512_set1_ps(0.0018775767F);
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.00898934F));
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.055826318F));
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.24015361F));
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.6931531F));
  p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(0.99999994F));
  return _mm512_scalef_ps(p, x);
}

struct Scratch {
  uint32_t* q;        // [kTile, pairs]
  uint32_t* weights;  // [kRows, kKeyPairs]
  float* sums;        // [kTile, width]
  float* totals;      // [kTile, kLanes]: partial sums of the weights
  float* maxima;      // [kTile], in powers of two
  int* visible;       // [kTile]: keys that the row sees

  Scratch(const PrefillTask& task, uint32_t* memory) {
    sums = reinterpret_cast<float*>(memory);
    totals = sums + kTile * task.width();
    weights = reinterpret_cast<uint32_t*>(totals + kTile * kLanes);
    maxima = reinterpret_cast<float*>(weights + kRows * kKeyPairs);
    visible = reinterpret_cast<int*>(maxima + kTile);
    q = reinterpret_cast<uint32_t*>(visible + kTile);
  }
  static size_t words(const PrefillTask& task) {
    return static_cast<size_t>(kTile) * (task.width() + kLanes + 2 + task.pairs()) + kRows * kKeyPairs;
  }
};

size_t key_words(const PrefillTask& task) { return static_cast<size_t>(task.pairs()) * kKeyBlock; }
size_t block_words(const PrefillTask& task) { return key_words(task) + static_cast<size_t>(kKeyPairs) * task.width(); }

// Rows of 16 words become columns.
void transpose(__m512i (&x)[kLanes]) {
  __m512i y[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x44);
    const __m512i high = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xEE);
    const __m512i low2 = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x44);
    const __m512i high2 = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xEE);
    y[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(low, low2, 0xDD);
    y[i + 8] = _mm512_shuffle_i32x4(high, high2, 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xDD);
  }
  for (int i = 0; i < kLanes; ++i) x[i] = y[i];
}

// Keys as [pair of values][key], 0 behind the last key and the last value.
void pack_keys(const Heads& k, int kv_head, int first, int count, int head_dim, uint32_t* packed) {
  const int pairs = (head_dim + 1) / 2;
  for (int key = 0; key < kKeyBlock; key += kLanes) {
    for (int pair = 0; pair < pairs; pair += kLanes) {
      const int left = head_dim - 2 * pair;
      const auto mask = static_cast<__mmask32>(left >= 2 * kLanes ? 0xFFFFFFFFU : (1U << left) - 1U);
      __m512i words[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        words[i] = key + i < count ? _mm512_maskz_loadu_epi16(mask, k.at(first + key + i, kv_head) + 2 * pair)
                                   : _mm512_setzero_si512();
      }
      transpose(words);
      const int columns = pairs - pair < kLanes ? pairs - pair : kLanes;
      for (int i = 0; i < columns; ++i) _mm512_storeu_si512(packed + (pair + i) * kKeyBlock + key, words[i]);
    }
  }
}

// Values as [pair of keys][value], 0 behind the last key and the last value.
void pack_values(const Heads& v, int kv_head, int first, int count, int head_dim, uint32_t* packed) {
  const int width = round_up(head_dim, kPad);
  for (int key = 0; key < kKeyBlock; key += 2) {
    for (int i = 0; i < width; i += kLanes) {
      const __mmask16 mask = first_lanes(head_dim - i);
      const __mmask16 even = key < count ? mask : 0;
      const __mmask16 odd = key + 1 < count ? mask : 0;
      const uint16_t* values = v.at(first + key, kv_head) + i;
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even, values));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, values + v.token_stride));
      _mm512_storeu_si512(packed + key / 2 * width + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

void pack(const PrefillTask& task, int kv_head, int block, uint32_t* packed) {
  const int first = block * kKeyBlock;
  const int count = task.num_keys - first < kKeyBlock ? task.num_keys - first : kKeyBlock;
  pack_keys(task.k, kv_head, first, count, task.head_dim, packed);
  pack_values(task.v, kv_head, first, count, task.head_dim, packed + key_words(task));
}

// Products of a strip of queries with the first `kUsed` vectors of a packed block of keys.
template <int kUsed>
ALISA_INLINE void products(const uint32_t* q, const uint32_t* keys, int pairs, F (&scores)[kRows][kUsed]) {
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < kUsed; ++i) scores[row][i] = _mm512_setzero_ps();
  }
  for (int pair = 0; pair < pairs; ++pair) {
    __m512i operand[kUsed];
    for (int i = 0; i < kUsed; ++i) operand[i] = load_words(keys + pair * kKeyBlock + i * kLanes);
    for (int row = 0; row < kRows; ++row) {
      const __m512i query = _mm512_set1_epi32(static_cast<int>(q[row * pairs + pair]));
      for (int i = 0; i < kUsed; ++i) scores[row][i] = pair_products(scores[row][i], query, operand[i]);
    }
  }
}

template <int kUsed>
ALISA_INLINE F largest(const F (&x)[kUsed]) {
  F most = x[0];
  for (int i = 1; i < kUsed; ++i) most = _mm512_max_ps(most, x[i]);
  return most;
}

// The row's weights are relative to a larger maximum from here on.
void raise_maximum(float* sums, float* totals, float& maximum, float raised, int width) {
  float factor[kLanes];
  const F scale = exp2_of(_mm512_set1_ps(maximum - raised));
  _mm512_storeu_ps(factor, scale);
  for (int i = 0; i < width; i += kLanes) _mm512_storeu_ps(sums + i, _mm512_mul_ps(_mm512_loadu_ps(sums + i), scale));
  _mm512_storeu_ps(totals, _mm512_mul_ps(_mm512_loadu_ps(totals), scale));
  maximum = raised;
}

// Weights of one strip on the first 16 * kUsed keys of a block, as bfloat16 in scratch.weights.
template <int kUsed>
void weigh(const Scratch& scratch, int strip, const uint32_t* keys, int first_key, bool hides, int pairs, int width, F scale) {
  F scores[kRows][kUsed];
  const int first = strip * kRows;
  products<kUsed>(scratch.q + first * pairs, keys, pairs, scores);
  for (int row = 0; row < kRows; ++row) {
    F (&x)[kUsed] = scores[row];
    if (hides) {
      for (int i = 0; i < kUsed; ++i) {
        const __mmask16 seen = first_lanes(scratch.visible[first + row] - first_key - i * kLanes);
        x[i] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, x[i]);
      }
    }
    float& maximum = scratch.maxima[first + row];
    const F limit = _mm512_set1_ps(maximum + kSlack);
    const F most = _mm512_mul_ps(largest(x), scale);
    float* totals = scratch.totals + (first + row) * kLanes;
    if (_mm512_cmp_ps_mask(most, limit, _CMP_GT_OQ) != 0) {
      raise_maximum(scratch.sums + (first + row) * width, totals, maximum, _mm512_reduce_max_ps(most), width);
    }
    const F negative = _mm512_set1_ps(-maximum);
    for (int i = 0; i < kUsed; ++i) x[i] = exp2_of(_mm512_fmadd_ps(x[i], scale, negative));
    F total = _mm512_loadu_ps(totals);
    for (int i = 0; i < kUsed; ++i) total = _mm512_add_ps(total, x[i]);
    _mm512_storeu_ps(totals, total);
    for (int i = 0; i < kUsed; i += 2) {
      _mm512_storeu_si512(scratch.weights + row * kKeyPairs + i * (kLanes / 2), (__m512i)_mm512_cvtne2ps_pbh(x[i + 1], x[i]));
    }
  }
}

// Sums of one strip have grown by weights x values, for 16 * kUsed values of a head.
template <int kUsed>
ALISA_INLINE void add_values(const uint32_t* weights, const uint32_t* values, int key_pairs, int width, float* sums) {
  F sum[kRows][kUsed];
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < kUsed; ++i) sum[row][i] = _mm512_loadu_ps(sums + row * width + i * kLanes);
  }
  for (int pair = 0; pair < key_pairs; ++pair) {
    __m512i operand[kUsed];
    for (int i = 0; i < kUsed; ++i) operand[i] = load_words(values + pair * width + i * kLanes);
    for (int row = 0; row < kRows; ++row) {
      const __m512i weight = _mm512_set1_epi32(static_cast<int>(weights[row * kKeyPairs + pair]));
      for (int i = 0; i < kUsed; ++i) sum[row][i] = pair_products(sum[row][i], weight, operand[i]);
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < kUsed; ++i) _mm512_storeu_ps(sums + row * width + i * kLanes, sum[row][i]);
  }
}

void add_all_values(const uint32_t* weights, const uint32_t* values, int key_pairs, int width, float* sums) {
  int i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) add_values<4>(weights, values + i, key_pairs, width, sums + i);
  switch ((width - i) / kLanes) {
    case 3: add_values<3>(weights, values + i, key_pairs, width, sums + i); break;
    case 2: add_values<2>(weights, values + i, key_pairs, width, sums + i); break;
    case 1: add_values<1>(weights, values + i, key_pairs, width, sums + i); break;
    default: break;
  }
}

// Queries of a tile copied to consecutive memory, and what they start from; returns the most keys that a row sees.
int open_rows(const PrefillTask& task, int kv_head, int tile, const Scratch& scratch) {
  const int group = task.group();
  const int width = task.width();
  const int rows = task.num_queries * group;
  const int pairs = task.pairs();
  int most = 0;
  for (int i = 0; i < kTile; ++i) {
    const int row = tile * kTile + i;
    uint32_t* query = scratch.q + i * pairs;
    float* sums = scratch.sums + i * width;
    float* totals = scratch.totals + i * kLanes;
    query[pairs - 1] = 0;
    for (int j = 0; j < width; j += kLanes) _mm512_storeu_ps(sums + j, _mm512_setzero_ps());
    _mm512_storeu_ps(totals, _mm512_setzero_ps());
    scratch.maxima[i] = -INFINITY;
    if (row >= rows) {
      // Nobody reads what becomes of these.
      for (int pair = 0; pair < pairs; ++pair) query[pair] = 0;
      scratch.visible[i] = scratch.visible[i - 1];
      continue;
    }
    const int token = row / group;
    const int head = kv_head * group + row % group;
    std::memcpy(query, task.q.at(token, head), static_cast<size_t>(task.head_dim) * sizeof(uint16_t));
    scratch.visible[i] = task.causal ? token + 1 : task.num_keys;
    if (scratch.visible[i] > most) most = scratch.visible[i];
    if (task.before != nullptr) {
      const size_t at = static_cast<size_t>(token) * task.num_heads + head;
      std::memcpy(sums, task.before + at * task.head_dim, static_cast<size_t>(task.head_dim) * sizeof(float));
      scratch.maxima[i] = task.log_sum_exp[at] * kLog2E;
      totals[0] = 1.0F;
    }
  }
  return most;
}

void close_rows(const PrefillTask& task, int kv_head, int tile, const Scratch& scratch) {
  const int group = task.group();
  const int width = task.width();
  const int rows = task.num_queries * group;
  for (int i = 0; i < kTile && tile * kTile + i < rows; ++i) {
    const int row = tile * kTile + i;
    const size_t at = static_cast<size_t>(row / group) * task.num_heads + kv_head * group + row % group;
    const float total = _mm512_reduce_add_ps(_mm512_loadu_ps(scratch.totals + i * kLanes));
    const F inverse = _mm512_set1_ps(1.0F / total);
    task.log_sum_exp[at] = scratch.maxima[i] * kLn2 + std::log(total);
    for (int j = 0; j < width; j += kLanes) {
      const F mean = _mm512_mul_ps(_mm512_loadu_ps(scratch.sums + i * width + j), inverse);
      const __mmask16 mask = first_lanes(task.head_dim - j);
      const size_t place = at * task.head_dim + j;
      if (task.after != nullptr) {
        _mm512_mask_storeu_ps(task.after + place, mask, mean);
      } else {
        _mm256_mask_storeu_epi16(task.out + place, mask, (__m256i)_mm512_cvtneps_pbh(mean));
      }
    }
  }
}

void attend(const PrefillTask& task, int kv_head, int tile, const uint32_t* packed, uint32_t* memory) {
  const Scratch scratch(task, memory);
  const int pairs = task.pairs();
  const int width = task.width();
  const F scale = _mm512_set1_ps(kLog2E / std::sqrt(static_cast<float>(task.head_dim)));
  const int most = open_rows(task, kv_head, tile, scratch);
  for (int first = 0; first < most; first += kKeyBlock) {
    const uint32_t* keys = packed + static_cast<size_t>(first / kKeyBlock) * block_words(task);
    for (int strip = 0; strip < kStrips; ++strip) {
      // Rows of a strip see ever more keys.
      const int least_seen = scratch.visible[strip * kRows] - first;
      const int most_seen = scratch.visible[strip * kRows + kRows - 1] - first;
      if (most_seen <= 0) continue;
      const bool hides = least_seen < kKeyBlock;
      if (most_seen > kKeyBlock / 2) {
        weigh<kVectors>(scratch, strip, keys, first, hides, pairs, width, scale);
      } else {
        weigh<kVectors / 2>(scratch, strip, keys, first, hides, pairs, width, scale);
      }
      const int key_pairs = most_seen > kKeyBlock / 2 ? kKeyPairs : kKeyPairs / 2;
      add_all_values(scratch.weights, keys + key_words(task), key_pairs, width, scratch.sums + strip * kRows * width);
    }
  }
  close_rows(task, kv_head, tile, scratch);
}

// Tokens whose weights are summed together: enough to be worth packing the keys that they share.
constexpr int kMassTokens = 32;

struct MassScratch {
  float* mass;      // [kMassTokens, kKeyBlock]
  uint32_t* keys;   // one packed block
  uint32_t* q;      // [kRows, pairs]

  MassScratch(const MassTask& task, uint32_t* memory) {
    mass = reinterpret_cast<float*>(memory);
    keys = memory + kMassTokens * kKeyBlock;
    q = keys + task.pairs() * kKeyBlock;
  }
  static size_t words(const MassTask& task) {
    return static_cast<size_t>(kMassTokens + task.pairs()) * kKeyBlock + static_cast<size_t>(kRows) * task.pairs();
  }
};

// Weights of the rows of one KV head, added up for each token in scratch.mass.
void add_mass(const MassTask& task, int kv_head, int first_token, int num_tokens, int first_key, const MassScratch& scratch) {
  const int group = task.group();
  const int pairs = task.pairs();
  const F scale = _mm512_set1_ps(kLog2E / std::sqrt(static_cast<float>(task.head_dim)));
  const int rows = num_tokens * group;
  for (int strip = 0; strip < rows; strip += kRows) {
    const int count = rows - strip < kRows ? rows - strip : kRows;
    for (int i = 0; i < count; ++i) {
      uint32_t* query = scratch.q + i * pairs;
      const int row = strip + i;
      query[pairs - 1] = 0;
      std::memcpy(query, task.q.at(first_token + row / group, kv_head * group + row % group),
                  static_cast<size_t>(task.head_dim) * sizeof(uint16_t));
    }
    F scores[kRows][kVectors];
    products<kVectors>(scratch.q, scratch.keys, pairs, scores);
    for (int i = 0; i < count; ++i) {
      const int token = (strip + i) / group;
      const int head = kv_head * group + (strip + i) % group;
      const size_t at = static_cast<size_t>(first_token + token) * task.num_heads + head;
      const F negative = _mm512_set1_ps(-task.log_sum_exp[at] * kLog2E);
      const int seen = task.ahead + first_token + token + 1 - first_key;
      float* mass = scratch.mass + token * kKeyBlock;
      for (int j = 0; j < kVectors; ++j) {
        const F weight = exp2_of(_mm512_fmadd_ps(scores[i][j], scale, negative));
        const F sum = _mm512_loadu_ps(mass + j * kLanes);
        _mm512_storeu_ps(mass + j * kLanes, _mm512_mask_add_ps(sum, first_lanes(seen - j * kLanes), sum, weight));
      }
    }
  }
}

void mass(const MassTask& task, int tile, int block, uint32_t* memory) {
  const MassScratch scratch(task, memory);
  const int first_token = tile * kMassTokens;
  const int num_tokens = task.num_queries - first_token < kMassTokens ? task.num_queries - first_token : kMassTokens;
  const int first_key = block * kKeyBlock;
  const int num_keys = task.num_keys - first_key < kKeyBlock ? task.num_keys - first_key : kKeyBlock;
  // Rows of the last strip that no token fills: defined, though nobody looks at what becomes of them.
  std::memset(scratch.q, 0, static_cast<size_t>(kRows) * task.pairs() * sizeof(uint32_t));
  for (int kv_head = 0; kv_head < task.num_kv_heads; ++kv_head) {
    const bool opens = kv_head == 0 || task.num_sets > 1;
    const bool closes = kv_head == task.num_kv_heads - 1 || task.num_sets > 1;
    if (opens) std::memset(scratch.mass, 0, sizeof(float) * kMassTokens * kKeyBlock);
    pack_keys(task.k, kv_head, first_key, num_keys, task.head_dim, scratch.keys);
    add_mass(task, kv_head, first_token, num_tokens, first_key, scratch);
    if (!closes) continue;
    const int set = task.num_sets > 1 ? kv_head : 0;
    for (int token = 0; token < num_tokens; ++token) {
      const size_t row = static_cast<size_t>(first_token + token) * task.num_sets + set;
      std::memcpy(task.mass + row * task.num_keys + first_key, scratch.mass + token * kKeyBlock, sizeof(float) * num_keys);
    }
  }
}

}  // namespace

const PrefillIsa kPrefillAvx512Bf16 = {kTile, block_words, Scratch::words, pack, attend, kMassTokens, MassScratch::words, mass};

}  // namespace alisa
