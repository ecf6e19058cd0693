// combine: squared norms to weights, and the weighted sum of the rows.
//
// Math      w_t = preference_t alpha / (sqrt(sq_norm_t) + eps);   out = scale * sum_t w_t ema[t]   (+ out if
//           accumulate);   out_sq_norm = sum_p out[p]^2;   step + 1 unless found_inf
// Traffic   fp32: 4 (T + 1) P bytes; 4P more if accumulate.
// Parallel  a warp per unit of columns, units dealt to the blocks in turn; the first one's rows are on their way while
//           the block works out the weights.
// Sync      none but a counter of blocks done: each works out all weights, block 0 writes them down; the last block
//           sums the blocks' squares, counts the step and resets the counter.
// Numerics  scale multiplies the weights, with one rounding; the rest in weights.cuh and weighted_sum.cuh. A thread's
//           squares are summed with compensation, the blocks' in their order: bits of out_sq_norm depend on the grid
//           and on how the rows are aligned, not on the run.
// Limits    ema and out must not overlap; calls that share `arrivals` must follow one another.
#include "launch.h"
#include "weighted_sum.cuh"
#include "weights.cuh"

namespace dbmtl_fused::cuda {
namespace {

// Of any number: as many as there are registers for.
template <class State>
constexpr int kRowsInFlight = kIsRounded<State> ? 8 : 4;

template <class State>
struct Rows {
  const State* span;  // of the first row and group
  int64_t stride;

  template <class Places>
  DBMTL_DEVICE void operator()(const Places& places, Lane<State, kColumns<State>>& lane, int64_t t, int group) const {
    places.template load<Cache::kEvictFirst>(lane, span + t * stride + group * kSpan<State>);
  }
};

// kTasks: T, or 0 for any.
template <class State, int kTasks>
__global__ __launch_bounds__(kCombineThreads, combine_blocks_per_sm(sizeof(State))) void combine_kernel(
    const __grid_constant__ Combine<State> args, int64_t units, bool aligned, RealOf<State>* workspace,
    int32_t* arrivals) {
  using Real = RealOf<State>;
  using Sum = WeightedSum<State, (kTasks > 0 ? kTasks : kRowsInFlight<State>), combine_groups(kTasks), (kTasks > 0)>;
  __shared__ Real shared_weights[kSharedTasks];
  const int64_t T = kTasks > 0 ? kTasks : args.T, P = args.P;
  Real* const partials = workspace;  // (grid,)
  Real* const weights = T <= kSharedTasks ? shared_weights : workspace + gridDim.x + blockIdx.x * T;

  const int64_t step = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  const int64_t aligned_units = aligned ? P / Sum::kUnit : 0;
  int64_t unit = blockIdx.x + static_cast<int64_t>(threadIdx.x / kWarp) * gridDim.x;
  const auto rows_of = [&](int64_t column) { return Rows<State>{args.ema + column, args.ema_stride}; };
  Sum sum;
  CompensatedSum<Real> squares;

  bool loaded = unit < aligned_units;
  if (loaded) sum.template load<true>(T, P, unit * Sum::kUnit, 0, rows_of(unit * Sum::kUnit));

  for (int64_t t = threadIdx.x; t < T; t += blockDim.x) weights[t] = args.sq_norms[t];
  const Real alpha = compute_weights(weights, T, *args.found_inf != 0, *args.scale, args.weighting);
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.alpha_value = alpha;

#pragma unroll 1
  for (; unit < aligned_units; unit += step) {
    const int64_t column = unit * Sum::kUnit;
    if (!loaded) sum.template load<true>(T, P, column, 0, rows_of(column));
    loaded = false;
    squares +=
        sum.template finish<true>(T, P, column, weights, args.accumulate, args.out, args.out_dtype, rows_of(column));
  }
#pragma unroll 1
  for (; unit < units; unit += step)
#pragma unroll 1
    for (int group = 0; group < combine_groups(kTasks); ++group) {
      const int64_t column = unit * Sum::kUnit + group * kSpan<State>;
      WeightedSum<State, 4, 1, false> loose;  // of args.T: where T is known, it takes more registers than there are
      loose.template load<false>(args.T, P, column, 0, rows_of(column));
      squares += loose.template finish<false>(args.T, P, column, weights, args.accumulate, args.out, args.out_dtype,
                                              rows_of(column));
    }

  const Real partial = block_sum<kCombineThreads>(squares.total);
  if (threadIdx.x == 0) partials[blockIdx.x] = partial;
  if (!arrive(arrivals)) return;
  const Real sq_norm = sum_partials<kCombineThreads>(partials, gridDim.x);
  if (threadIdx.x == 0) {
    *args.out_sq_norm = sq_norm;
    if (args.step != nullptr && *args.found_inf == 0) ++*args.step;
    *arrivals = 0;
  }
}

template <class State, int kTasks = combine_rows(kMaxCombineRows, sizeof(State))>
auto kernel_for(int rows) {
  if constexpr (kTasks > 0)
    if (rows != kTasks) return kernel_for<State, kTasks - 1>(rows);
  return combine_kernel<State, kTasks>;
}

}  // namespace

template <class State>
cudaError_t launch_combine(const Combine<State>& args, const CombinePlan& plan, RealOf<State>* workspace,
                           int32_t* arrivals, cudaStream_t stream) {
  const bool aligned = rows_are_aligned<State>(args.ema, sizeof(State), args.ema_stride, args.T) &&
                       rows_are_aligned<State>(args.out, size_of(args.out_dtype), 0, 1);
  return launch(plan.grid, plan.threads, 0, false, stream, kernel_for<State>(plan.rows), args, plan.units, aligned,
                workspace, arrivals);
}

template cudaError_t launch_combine(const Combine<float>&, const CombinePlan&, float*, int32_t*, cudaStream_t);
template cudaError_t launch_combine(const Combine<double>&, const CombinePlan&, double*, int32_t*, cudaStream_t);
template cudaError_t launch_combine(const Combine<BFloat16>&, const CombinePlan&, float*, int32_t*, cudaStream_t);

}  // namespace dbmtl_fused::cuda
