// balance_: EMA, norms, weights and weighted sum of a ready gradient matrix, in one launch.
//
// Math      ema = beta * ema + (1 - beta) * grads;   w_t = alpha / (|ema_t| + eps);   out = sum_t w_t ema_t
// Traffic   fp32: phase 1 reads 8TP and writes 4TP bytes, phase 2 reads 4TP and writes 4P: together 4 (4T + 1) P, less
//           what phase 2 finds on the chip. The first units of phase 1 stay in shared memory, the rest passes through
//           the second-level cache, and phase 2 walks backwards, so that it meets what came last first. Gradients and
//           out are evicted first, the buffer is not.
// Parallel  as many blocks as run at once, a warp per unit of columns (see plan.h), with all rows, in both phases: a
//           thread reads in phase 2 what it wrote in phase 1.
// Sync      one grid barrier; two launches where a grid cannot wait for itself.
// Numerics  partials are keyed by (row, block) and summed in block order: bits depend on the grid, not on the run.
// Limits    ema, grads and out must not overlap.
#include "ema.cuh"
#include "launch.h"
#include "weighted_sum.cuh"
#include "weights.cuh"

namespace dbmtl_fused::cuda {
namespace {

constexpr int kMaxWarps = kBalanceThreads / kWarp;

// Bytes that one lane has in flight: half of its registers, or a quarter where the work on them takes more.
template <class State>
constexpr int kBytesInFlight = kIsRounded<State> ? 128 : 256;

enum Phase : uint8_t { kEma = 1, kSum = 2 };

template <class State>
struct Parameters {
  Balance<State> balance;
  int64_t units;
  int64_t kept;             // words of state of every thread in shared memory
  RealOf<State>* partials;  // (T, grid)
  RealOf<State>* weights;   // (grid, T) if there are more than kSharedTasks
  bool aligned;
  int phases;
};

// The units of one warp, and its words in shared memory.
template <class State, int kSlots>
struct Walk {
  static constexpr int kGroups = balance_groups(kSlots, sizeof(State));
  static constexpr int kUnit = kSpan<State> * kGroups;
  using Word = Lane<State, kColumns<State>>;

  const Parameters<State>& args;
  Word* shared;

  DBMTL_DEVICE int64_t unit(int64_t step) const {
    const int64_t warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
    return blockIdx.x + (step * warps + warp) * gridDim.x;
  }
  // Steps of this warp until `units`.
  DBMTL_DEVICE int64_t steps(int64_t units) const {
    const int64_t first = unit(0), each = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
    return first < units ? (units - first + each - 1) / each : 0;
  }
  // The lane's place of a span that was among the first, or null.
  DBMTL_DEVICE Word* kept(int64_t step, int64_t t, int group) const {
    const int64_t index = (step * args.balance.T + t) * kGroups + group;
    return index < args.kept ? shared + index * blockDim.x + threadIdx.x : nullptr;
  }
  // Units of which all warps read and write whole words.
  DBMTL_DEVICE int64_t aligned_units() const { return args.aligned ? args.balance.P / kUnit : 0; }
  // What a row's rounding starts from.
  DBMTL_DEVICE uint32_t key(int64_t t) const {
    if constexpr (kIsRounded<State>) return rounding_key(static_cast<uint64_t>(*args.balance.seed + t));
    return 0;
  }
  // Steps of which something is kept.
  DBMTL_DEVICE int64_t kept_steps() const {
    const int64_t each = args.balance.T * kGroups;
    return (args.kept + each - 1) / each;
  }
};

// --- Phase 1

// One unit by whole words, rows `first_row` to `first_row + kSlots`.
template <int kSlots, class State, class Element>
DBMTL_DEVICE bool ema_unit(const Walk<State, kSlots>& walk, int64_t step, int64_t first_row,
                           const EmaCoefficients<RealOf<State>>& coefficients, const Element* grads,
                           CompensatedSum<RealOf<State>> (&sums)[kSlots]) {
  constexpr int kGroups = Walk<State, kSlots>::kGroups;
  constexpr int kBytes = kGroups * kColumns<State> * static_cast<int>(sizeof(State) + sizeof(Element));
  constexpr int kWanted = kBytesInFlight<State> / kBytes > 1 ? kBytesInFlight<State> / kBytes : 1;
  constexpr int kRows = kWanted < kSlots ? kWanted : kSlots;
  const Balance<State>& args = walk.args.balance;
  const Places<true, kColumns<State>> places{static_cast<int>(threadIdx.x) % kWarp, kSpan<State>};
  const int64_t column = walk.unit(step) * walk.kUnit;
  const auto exists = [&](int slot) { return slot < kSlots && first_row + slot < args.T; };
  bool within_limit = true;

#pragma unroll
  for (int first = 0; first < kSlots; first += kRows) {
    EmaLane<State, Element> lanes[kRows][kGroups];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t t = first_row + first + i;
      if (!exists(first + i)) continue;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int64_t span = column + group * kSpan<State>;
        lanes[i][group].load(places, args.ema + t * args.ema_stride + span, grads + t * args.grads_stride + span);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t t = first_row + first + i;
      if (!exists(first + i)) continue;
      const uint32_t key = walk.key(t);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int64_t span = column + group * kSpan<State>;
        EmaLane<State, Element>& lane = lanes[i][group];
        within_limit &= lane.update(places, coefficients, key, span);
        sums[first + i] += lane.squares(places);
        places.template store<Cache::kKeep>(args.ema + t * args.ema_stride + span, lane.values);
        if (auto* const word = walk.kept(step, t, group)) *word = lane.values;
      }
    }
  }
  return within_limit;
}

template <int kSlots, class State, class Element>
DBMTL_DEVICE void ema_phase(const Walk<State, kSlots>& walk, const Element* grads, RealOf<State> (*warp_sums)[kSlots]) {
  using Real = RealOf<State>;
  constexpr int kGroups = Walk<State, kSlots>::kGroups;
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Balance<State>& args = walk.args.balance;
  const Real beta = *args.beta;
  const EmaCoefficients<Real> coefficients{beta, 1 - beta, 1};
  const int64_t aligned = walk.steps(walk.aligned_units()), all = walk.steps(walk.args.units);
  bool within_limit = true;

#pragma unroll 1
  for (int64_t first_row = 0; first_row < args.T; first_row += kSlots) {
    CompensatedSum<Real> sums[kSlots];
#pragma unroll 1
    for (int64_t step = 0; step < aligned; ++step)
      within_limit &= ema_unit(walk, step, first_row, coefficients, grads, sums);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const Real sum = warp_sum(sums[slot].total);
      if (lane == 0) warp_sums[warp][slot] = sum;
    }

    const int rows = static_cast<int>(args.T - first_row < kSlots ? args.T - first_row : kSlots);
#pragma unroll 1
    for (int slot = 0; slot < rows && aligned < all; ++slot) {
      const int64_t t = first_row + slot;
      CompensatedSum<Real> loose;
      within_limit &= ema_loose(
          aligned * kGroups, 1, all * kGroups, args.P, args.ema + t * args.ema_stride, grads + t * args.grads_stride,
          coefficients, walk.key(t), 0,
          [&](int64_t span) { return walk.unit(span / kGroups) * walk.kUnit + span % kGroups * kSpan<State>; },
          [&](int64_t span, const auto& values) {
            if (auto* const word = walk.kept(span / kGroups, t, static_cast<int>(span % kGroups))) *word = values;
          },
          loose);
      const Real sum = warp_sum(loose.total);
      if (lane == 0) warp_sums[warp][slot] += sum;
    }

    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(rows)) {
      Real sum = 0;
      for (unsigned i = 0; i < blockDim.x / kWarp; ++i) sum += warp_sums[i][threadIdx.x];
      walk.args.partials[(first_row + threadIdx.x) * gridDim.x + blockIdx.x] = sum;
    }
    __syncthreads();
  }
  raise_flag(args.found_inf, !within_limit);
}

// --- Phase 2

template <class State, int kSlots, bool kKept>
struct Rows {
  const Walk<State, kSlots>& walk;
  int64_t step;
  int first_group;

  template <class Places>
  DBMTL_DEVICE void operator()(const Places& places, Lane<State, kColumns<State>>& lane, int64_t t, int group) const {
    const Balance<State>& args = walk.args.balance;
    group += first_group;
    if constexpr (kKept)
      if (const auto* const word = walk.kept(step, t, group)) {
        lane = *word;
        return;
      }
    const int64_t span = walk.unit(step) * walk.kUnit + group * kSpan<State>;
    places.template load<Cache::kEvictFirst>(lane, args.ema + t * args.ema_stride + span);
  }
};

// kRows rows of kGroups spans in flight.
template <bool kAligned, bool kKept, int kRows, int kGroups, int kSlots, class State>
DBMTL_DEVICE void sum_groups(const Walk<State, kSlots>& walk, int64_t step, int first_group,
                             const RealOf<State>* weights) {
  const Balance<State>& args = walk.args.balance;
  const int64_t column = walk.unit(step) * walk.kUnit + first_group * kSpan<State>;
  const Rows<State, kSlots, kKept> rows{walk, step, first_group};
  WeightedSum<State, kRows, kGroups, false> sum;
  sum.template load<kAligned>(args.T, args.P, column, 0, rows);
  sum.template finish<kAligned>(args.T, args.P, column, weights, false, args.out, args.out_dtype, rows);
}

template <int kSlots, class State>
DBMTL_DEVICE void sum_phase(const Walk<State, kSlots>& walk, RealOf<State>* shared_weights) {
  using Real = RealOf<State>;
  const Balance<State>& args = walk.args.balance;
  Real* const weights = args.T <= kSharedTasks ? shared_weights : walk.args.weights + blockIdx.x * args.T;
  for (int64_t t = threadIdx.x / kWarp; t < args.T; t += blockDim.x / kWarp) {
    Real sum = 0;  // past the first-level cache: other blocks wrote the partials
    for (unsigned block = threadIdx.x % kWarp; block < gridDim.x; block += kWarp)
      sum += __ldcg(walk.args.partials + t * gridDim.x + block);
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) weights[t] = sum;
  }
  compute_weights(weights, args.T, __ldcg(args.found_inf) != 0, Real{1}, args.weighting);

  constexpr int kGroups = Walk<State, kSlots>::kGroups;
  const int64_t aligned = walk.steps(walk.aligned_units());
  int64_t step = walk.steps(walk.args.units) - 1;
#pragma unroll 1
  for (; step >= aligned; --step)
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) sum_groups<false, true, kSlots, 1>(walk, step, group, weights);
#pragma unroll 1
  for (const int64_t kept = walk.kept_steps(); step >= kept; --step)
    sum_groups<true, false, kSlots, kGroups>(walk, step, 0, weights);
#pragma unroll 1
  for (; step >= 0; --step) sum_groups<true, true, kSlots, kGroups>(walk, step, 0, weights);
}

template <class State, int kSlots>
__global__ __launch_bounds__(kBalanceThreads, 1) void balance_kernel(const __grid_constant__ Parameters<State> args) {
  using Word = Lane<State, kColumns<State>>;
  DYNAMIC_SHARED(Word, words);
  __shared__ RealOf<State> weights[kSharedTasks];
  __shared__ RealOf<State> warp_sums[kMaxWarps][kSlots];
  const Walk<State, kSlots> walk{args, words};
  if (args.phases & kEma)
    with_element_type(args.balance.grads_dtype, [&](auto element) {
      ema_phase(walk, static_cast<const decltype(element)*>(args.balance.grads), warp_sums);
    });
  if (args.phases == (kEma | kSum)) cooperative_groups::this_grid().sync();
  if (args.phases & kSum) sum_phase(walk, weights);
}

template <class State, int kSlots = kMaxSlots>
auto kernel_for(int slots) {
  if constexpr (kSlots > 1)
    if (slots != kSlots) return kernel_for<State, kSlots - 1>(slots);
  return balance_kernel<State, kSlots>;
}

}  // namespace

template <class State>
cudaError_t launch_balance(const Balance<State>& args, const BalancePlan& plan, RealOf<State>* workspace,
                           cudaStream_t stream) {
  const bool aligned = rows_are_aligned<State>(args.ema, sizeof(State), args.ema_stride, args.T) &&
                       rows_are_aligned<State>(args.grads, size_of(args.grads_dtype), args.grads_stride, args.T) &&
                       rows_are_aligned<State>(args.out, size_of(args.out_dtype), 0, 1);
  Parameters<State> parameters{args,    plan.units, plan.kept, workspace, workspace + args.T * plan.grid,
                               aligned, kEma | kSum};
  const auto kernel = kernel_for<State>(plan.slots);
  const auto run = [&](int phases) {
    parameters.phases = phases;
    return launch(plan.grid, plan.threads, plan.shared_bytes, plan.cooperative, stream, kernel, parameters);
  };
  // The same for every call: another thread may be about to launch.
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(plan.shared_limit)))
    return error;
  if (plan.cooperative) return run(kEma | kSum);
  if (const cudaError_t error = run(kEma)) return error;
  return run(kSum);
}

template cudaError_t launch_balance(const Balance<float>&, const BalancePlan&, float*, cudaStream_t);
template cudaError_t launch_balance(const Balance<double>&, const BalancePlan&, double*, cudaStream_t);
template cudaError_t launch_balance(const Balance<BFloat16>&, const BalancePlan&, float*, cudaStream_t);

}  // namespace dbmtl_fused::cuda
