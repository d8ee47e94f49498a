// float16 by its bits, one value at a time: for the scales inside a row, and where the CPU has no instruction for it.
#pragma once

#include <cstdint>
#include <cstring>

namespace alisa::ALISA_ISA {

// Nearest float16, ties to even.
inline uint16_t float16_bits(float x) {
  uint32_t raw;
  std::memcpy(&raw, &x, sizeof(raw));
  const uint32_t sign = (raw >> 16) & 0x8000U;
  raw &= 0x7fffffffU;
  if (raw > 0x7f800000U) return static_cast<uint16_t>(sign | 0x7e00U);   // not a number
  if (raw >= 0x477ff000U) return static_cast<uint16_t>(sign | 0x7c00U);  // rounds to infinity
  if (raw < 0x38800000U) {
    // Subnormal: adding 0.5 leaves the multiples of 2^-24 in the low bits, rounded as the hardware rounds.
    float magnitude;
    std::memcpy(&magnitude, &raw, sizeof(magnitude));
    magnitude += 0.5F;
    std::memcpy(&raw, &magnitude, sizeof(raw));
    return static_cast<uint16_t>(sign | (raw - 0x3f000000U));
  }
  raw += 0xfffU + ((raw >> 13) & 1U);
  return static_cast<uint16_t>(sign | ((raw - 0x38000000U) >> 13));
}

// Its value as a float32.
inline float float16_value(uint16_t half) {
  uint32_t raw = static_cast<uint32_t>(half & 0x7fffU) << 13;
  float magnitude;
  std::memcpy(&magnitude, &raw, sizeof(magnitude));
  magnitude *= 0x1p112F;
  return half & 0x8000U ? -magnitude : magnitude;
}

}  // namespace alisa::ALISA_ISA
