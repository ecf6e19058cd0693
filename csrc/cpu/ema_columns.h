#pragma once

#include <cstdint>

#include "../launch.h"
#include "../rounding.h"

namespace dbmtl_fused::cpu {

template <class Real>
struct EmaCoefficients {
  Real decay, gain, inv_scale;
};

template <class Real>
struct EmaColumns {
  Real sq_norm;       // sum of the stored values' squares
  bool within_limit;  // false if an entry was kept because its update was beyond kEntryLimit, or NaN
};

// Where the random bits of rounded state come from.
struct Draws {
  uint32_t key;    // of the row
  int64_t column;  // that of values[0] in the row
};

// Of row t, if `seed` is that of row 0; null for state that is not rounded.
inline Draws draws_of(const int64_t* seed, int64_t t, int64_t column) {
  return {seed ? rounding_key(static_cast<uint64_t>(*seed) + static_cast<uint64_t>(t)) : 0, column};
}

// values[p] = decay * values[p] + gain * (grads[p] * inv_scale) for p < count, on this thread; grads may be null.
template <class State>
EmaColumns<RealOf<State>> ema_columns(State* values, const void* grads, DType grads_dtype, int64_t count,
                                      const EmaCoefficients<RealOf<State>>& coefficients, Draws draws);

}  // namespace dbmtl_fused::cpu
