// The O(T) arithmetic between the two phases.
#pragma once

#include <cstdint>

#include "../launch.h"

namespace dbmtl_fused::cpu {

// Sum in index order, in double, rounded once: the squared norm of a row from those of its chunks.
template <class Real>
Real sum_in_order(const Real* partials, int64_t count);

// Fills weighting.norms and weighting.weights from squared norms, shape (T,); returns alpha.
template <class Real>
Real compute_weights(const Real* sq_norms, int64_t T, bool found_inf, const Weighting<Real>& weighting);

}  // namespace dbmtl_fused::cpu
