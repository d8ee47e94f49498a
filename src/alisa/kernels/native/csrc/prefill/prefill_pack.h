// Keys and values in pairs of bfloat16, in the order in which a strip reads them.
#pragma once

#include "prefill_strip.h"

namespace alisa::avx512_bf16 {

// Rows of 16 words become columns.
inline void transpose(__m512i (&x)[kLanes]) {
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

// Keys as [pair of values][key], 0 after the last key and the last value.
inline void pack_keys(const Heads& k, int kv_head, int first, int count, int head_dim, uint32_t* packed) {
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

// Values as [pair of keys][value], 0 after the last key and the last value.
inline void pack_values(const Heads& v, int kv_head, int first, int count, int head_dim, uint32_t* packed) {
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

}  // namespace alisa::avx512_bf16
