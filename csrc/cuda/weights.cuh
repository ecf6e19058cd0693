// The O(T) arithmetic between the two phases, by every block for itself.
//
// Math      norms = sqrt(sq_norms);   weights = alpha(norms) / (norms + eps), 1 if alpha is none, NaN if found_inf
// Traffic   none but T numbers; block 0 writes the results.
// Parallel  a thread per task; alpha is worked out by every thread, but for the median, whose ranks are counted.
// Sync      block barriers.
// Numerics  square roots and quotients round to nearest; the mean adds in task order.
// Limits    any T; O(T^2) comparisons for the median.
#pragma once

#include "common.cuh"

namespace dbmtl_fused::cuda {

// NaNs come last, as in torch.sort.
template <class Real>
DBMTL_DEVICE bool below(Real a, Real b) {
  return a < b || (isnan(b) && !isnan(a));
}

template <class Real>
DBMTL_DEVICE Real median(const Real* norms, int64_t T) {
  __shared__ Real middle[2];
  for (int64_t t = threadIdx.x; t < T; t += blockDim.x) {
    int64_t rank = 0;
    for (int64_t s = 0; s < T; ++s) rank += below(norms[s], norms[t]) || (s < t && !below(norms[t], norms[s]));
    if (rank == (T - 1) / 2) middle[0] = norms[t];
    if (rank == T / 2) middle[1] = norms[t];
  }
  __syncthreads();
  return (middle[0] + middle[1]) / 2;
}

template <class Real>
DBMTL_DEVICE Real alpha_of(const Real* norms, int64_t T, const Weighting<Real>& weighting) {
  Real result = norms[0];
  switch (weighting.alpha) {
    case Alpha::kMax:
      for (int64_t t = 1; t < T; ++t)
        if (norms[t] > result || isnan(norms[t])) result = norms[t];
      return result;
    case Alpha::kMin:
      for (int64_t t = 1; t < T; ++t)
        if (norms[t] < result || isnan(norms[t])) result = norms[t];
      return result;
    case Alpha::kMean:
      for (int64_t t = 1; t < T; ++t) result += norms[t];
      return result / static_cast<Real>(T);
    case Alpha::kMedian:
      return median(norms, T);
    case Alpha::kConstant:
      return static_cast<Real>(weighting.alpha_constant);
    case Alpha::kNone:
      return 1;
  }
  return result;
}

// Turns `weights`, (T,) of this block alone, from squared norms into scale * weights; returns alpha. Every thread of
// the block must come, and may read `weights` afterwards.
template <class Real>
DBMTL_DEVICE Real compute_weights(Real* weights, int64_t T, bool found_inf, Real scale,
                                  const Weighting<Real>& weighting) {
  __syncthreads();
  for (int64_t t = threadIdx.x; t < T; t += blockDim.x) weights[t] = sqrt(weights[t]);
  __syncthreads();
  const Real alpha = alpha_of(weights, T, weighting);
  __syncthreads();
  for (int64_t t = threadIdx.x; t < T; t += blockDim.x) {
    const Real norm = weights[t];
    const Real balanced = weighting.alpha == Alpha::kNone ? 1 : alpha / (norm + static_cast<Real>(weighting.eps));
    const Real weight = found_inf ? static_cast<Real>(NAN) : balanced;
    weights[t] = scale * weight;
    if (blockIdx.x == 0) {
      weighting.norms[t] = norm;
      weighting.weights[t] = weight;
    }
  }
  __syncthreads();
  return alpha;
}

}  // namespace dbmtl_fused::cuda
