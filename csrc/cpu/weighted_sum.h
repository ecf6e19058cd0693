#pragma once

#include <cstdint>

#include "launch.h"

namespace dbmtl_fused::cpu {

// In which each thread goes through its columns: first to those that are still in its cache.
enum class Order : uint8_t { kForwards, kBackwards };

// out[p] = sum over t < T of weights[t] * rows[t * stride + p], plus out[p] if accumulate, for p < P, on all threads.
// Dealt by whole chunks with grain chunk_grain(T), like phase 1 of balance_. `partials`, unless null, gets the squared
// norm of every chunk of out before it is rounded.
template <class State>
void weighted_sum(const State* rows, int64_t stride, int64_t T, int64_t P, const RealOf<State>* weights,
                  bool accumulate, void* out, DType out_dtype, RealOf<State>* partials, Order order,
                  ParallelFor parallel_for);

// Chunks of T rows that are worth a thread: with fewer, waking it costs more than it saves.
constexpr int64_t chunk_grain(int64_t T) { return ceil_div(8, T); }

}  // namespace dbmtl_fused::cpu
