// Random bits of stochastic rounding, as dbmtl_fused/rounding.py defines them. A Word is uint32_t or a vector of it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DBMTL_INLINE __host__ __device__ __forceinline__
#else
#define DBMTL_INLINE inline __attribute__((always_inline))
#endif

#if defined(__GNUC__) && !defined(__clang__)
// "The ABI for passing vectors changes with AVX-512": every function that takes one is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace dbmtl_fused {

// All of the mixing but the last step, which leaves the upper half of the word as it is.
template <class Word>
DBMTL_INLINE Word mix_upper(const Word& input) {
  Word word = (input ^ (input >> 16)) * 0x7feb352dU;
  word ^= word >> 15;
  return word * 0x846ca68bU;
}

DBMTL_INLINE uint32_t mix(uint32_t input) {
  const uint32_t word = mix_upper(input);
  return word ^ (word >> 16);
}

// What a row's seed adds to its columns.
DBMTL_INLINE uint32_t rounding_key(uint64_t seed) {
  return mix(static_cast<uint32_t>(seed) ^ mix(static_cast<uint32_t>(seed >> 32) + 0x9e3779b9U));
}

// Uniform in [0, 2^16), from both halves of the column's number.
template <class Word>
DBMTL_INLINE Word random_bits(const Word& low, const Word& high, uint32_t key) {
  return mix_upper<Word>(low ^ high ^ key) >> 16;
}

}  // namespace dbmtl_fused
