// The O(T) arithmetic between the two phases.
#pragma once

#include <cstdint>

#include "../launch.h"

namespace dbmtl_fused::cpu {

// Sum in index order, in double, rounded once: the squared norm of a row from those of its chunks.
template <class State>
State sum_in_order(const State* partials, int64_t count);

// Fills weighting.norms and weighting.weights from squared norms, shape (T,); returns alpha.
template <class State>
State compute_weights(const State* sq_norms, int64_t T, bool found_inf, const Weighting<State>& weighting);

}  // namespace dbmtl_fused::cpu
