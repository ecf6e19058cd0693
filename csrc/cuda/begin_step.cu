// begin_step: from T losses, what their backward passes start from and each row's coefficient of the EMA.
//
// Math      seeds[t] = scale / micro_batches / (max(losses[t], 0) + log_eps), without the last factor unless log;
//           betas[t] = beta / (step + 1)^beta_sigma;   inv_scale = 1 / scale;   found_inf = whether any loss is
//           unusable (kept if none is and accumulate). NaN and 1 for unusable losses, 0 and 1 for tasks that are not
//           active. All betas and inv_scale are 1 if scale vanishes.
// Traffic   fp32: 13 T bytes; it is the launch that costs.
// Parallel  one block; one of its threads has the coefficient, as consumer GPUs have float64 for few.
// Sync      one barrier, after that thread has written what does not depend on the losses.
// Numerics  every division and the sum rounded once, subnormals kept: the bits of seeds and inv_scale are torch's on a
//           CPU. The coefficient in float64, to 2 ulp of the power and exactly beta where that is 1, then rounded once.
// Limits    what is read and what is written must not overlap.
#include <limits>

#include "common.cuh"
#include "launch.h"

namespace dbmtl_fused::cuda {
namespace {

constexpr int kThreads = 128;

template <class Loss, class Real>
__global__ __launch_bounds__(kThreads) void begin_step_kernel(const __grid_constant__ BeginStep<Loss, Real> args) {
  __shared__ Real beta;
  const Loss scale = *args.scale;
  if (threadIdx.x == 0) {
    beta = static_cast<Real>(args.beta / pow(static_cast<double>(*args.step + 1), args.beta_sigma));
    const Real factor = static_cast<Real>(scale);
    const bool vanishes = fabs(factor) < std::numeric_limits<Real>::min();
    *args.inv_scale = vanishes ? 1 : 1 / factor;
    if (vanishes) beta = 1;
    if (!args.accumulate) *args.found_inf = 0;
  }
  __syncthreads();

  const Loss derivative = scale / static_cast<Loss>(args.micro_batches);
  bool found = false;
  for (int64_t t = threadIdx.x; t < args.T; t += blockDim.x) {
    const Loss loss = args.losses[t];
    const bool active = args.active == nullptr || args.active[t];
    const bool usable = isfinite(loss) && (!args.log || loss >= -static_cast<Loss>(kNegativeLossTolerance));
    const Loss seed =
        args.log ? derivative / ((loss > 0 ? loss : Loss{0}) + static_cast<Loss>(args.log_eps)) : derivative;
    args.seeds[t] = !active ? 0 : usable ? seed : static_cast<Loss>(NAN);
    args.betas[t] = active && usable ? beta : 1;
    found |= active && !usable;
  }
  raise_flag(args.found_inf, found);
}

}  // namespace

template <class Loss, class Real>
cudaError_t launch_begin_step(const BeginStep<Loss, Real>& args, cudaStream_t stream) {
  return launch(1, kThreads, 0, false, stream, begin_step_kernel<Loss, Real>, args);
}

template cudaError_t launch_begin_step(const BeginStep<float, float>&, cudaStream_t);
template cudaError_t launch_begin_step(const BeginStep<float, double>&, cudaStream_t);
template cudaError_t launch_begin_step(const BeginStep<double, float>&, cudaStream_t);
template cudaError_t launch_begin_step(const BeginStep<double, double>&, cudaStream_t);

}  // namespace dbmtl_fused::cuda
