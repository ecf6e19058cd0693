// Entry points of the CUDA kernels. Nothing here waits for the device; all of it can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../launch.h"
#include "plan.h"

namespace dbmtl_fused::cuda {

// What ema_update_ needs besides what every backend gets.
struct Chunks {
  const int64_t* table;  // (C, 3) of (slot, start, numel), on the device
  const int64_t* slots;  // of every gradient, on the host
  int32_t* arrivals;     // on the device, 0
};

template <class Loss, class Real>
cudaError_t launch_begin_step(const BeginStep<Loss, Real>& args, cudaStream_t stream);

template <class State>
cudaError_t launch_ema_update(const EmaUpdate<State>& args, const Chunks& chunks, cudaStream_t stream);

// `workspace` has as many numbers as the plan says, in any state; `arrivals`, on the device, is 0.
template <class State>
cudaError_t launch_combine(const Combine<State>& args, const CombinePlan& plan, RealOf<State>* workspace,
                           int32_t* arrivals, cudaStream_t stream);

template <class State>
cudaError_t launch_gram(const Gram<State>& args, const GramPlan& plan, RealOf<State>* workspace, int32_t* arrivals,
                        cudaStream_t stream);

template <class State>
cudaError_t launch_balance(const Balance<State>& args, const BalancePlan& plan, RealOf<State>* workspace,
                           cudaStream_t stream);

}  // namespace dbmtl_fused::cuda
