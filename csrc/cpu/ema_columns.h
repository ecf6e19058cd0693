#pragma once

#include <cstdint>

#include "../launch.h"

namespace dbmtl_fused::cpu {

template <class State>
struct EmaCoefficients {
  State decay, gain, inv_scale;
};

template <class State>
struct EmaColumns {
  State sq_norm;  // sum of the stored values' squares
  bool finite;    // false if an entry was kept because its update was not finite
};

// values[p] = decay * values[p] + gain * (grads[p] * inv_scale) for p < count, on this thread; grads may be null.
template <class State>
EmaColumns<State> ema_columns(State* values, const void* grads, DType grads_dtype, int64_t count,
                              const EmaCoefficients<State>& coefficients);

}  // namespace dbmtl_fused::cpu
