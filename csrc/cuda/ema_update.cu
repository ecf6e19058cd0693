// ema_update_: one task's gradients, wherever they are, into its row of the EMA.
//
// Math      row = beta * row + (1 - beta) * (g * inv_scale), or row + (1 - beta) * ... if accumulate, or row if beta is
//           1; the partials of the chunks touched; sq_norm = sum of all partials
// Traffic   fp32: 12 bytes a column of the listed parameters (10 with 16-bit gradients, 8 if beta is 1), 24 a chunk for
//           the table, and 4C for the sum. Pointers travel with the launch.
// Parallel  a block per chunk of up to kChunk columns, a warp per span; no search: the table names a chunk's slot.
// Sync      none but a counter of blocks done; the last block sums the partials and resets it.
// Numerics  a chunk's partial depends on its columns alone, the sum on all partials in a fixed order: no bit depends on
//           which gradients share a launch, nor on how they are aligned.
// Limits    no slot twice in one call; calls that share `arrivals` must follow one another.
#include "ema.cuh"
#include "launch.h"

namespace dbmtl_fused::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// What there are registers for.
template <class State>
constexpr int kBlocksPerSm = kIsRounded<State> ? 3 : 4;

// Bytes that one lane has in flight.
constexpr int kBytesInFlight = 128;

// A gradient's address, as if it began at the row's first column, in the lower 56 bits; above, what it is.
enum Tag : uint8_t { kNotListed, kNone, kDType };

uint64_t tagged(const Gradient& gradient) {
  const auto tag = [](int kind) { return static_cast<uint64_t>(kind) << 56; };
  if (gradient.data == nullptr) return tag(kNone);
  const auto first_column =
      static_cast<uint64_t>(reinterpret_cast<uintptr_t>(gradient.data)) - gradient.start * size_of(gradient.dtype);
  return tag(kDType + static_cast<int>(gradient.dtype)) | (first_column & (~uint64_t{0} >> 8));
}

template <int kSlots>
struct Pointers {
  uint64_t tagged[kSlots];
};

template <class State>
struct Parameters {
  using Real = RealOf<State>;

  State* row;            // (P,)
  const int64_t* table;  // (C, 3)
  EmaUpdateLaunch window;
  const Real* beta;
  const Real* inv_scale;
  const int64_t* seed;
  Real* partials;  // (C,)
  int64_t C;
  Real* sq_norm;
  float* found_inf;
  int32_t* arrivals;
  bool accumulate;
};

// Whole spans of this warp from `first` on, by whole words; `first` comes back as the first one that is not.
template <class State, class Element>
DBMTL_DEVICE bool ema_spans(int64_t& first, int64_t whole, State* row, const Element* gradient, int64_t start,
                            const EmaCoefficients<RealOf<State>>& coefficients, uint32_t key, RealOf<State>& sum) {
  constexpr int kPerWarp = static_cast<int>(kChunk / kSpan<State> / kWarps);
  constexpr int kBytes =
      kColumns<State> * static_cast<int>(sizeof(State) + (kHasGradient<Element> ? sizeof(Element) : 0));
  constexpr int kWanted = kBytesInFlight / kBytes > 1 ? kBytesInFlight / kBytes : 1;
  constexpr int kBatch = kWanted < kPerWarp ? kWanted : kPerWarp;
  const Places<true, kColumns<State>> places{static_cast<int>(threadIdx.x) % kWarp, kSpan<State>};
  bool within_limit = true;
  while (first < whole) {
    EmaLane<State, Element> lanes[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t offset = (first + i * kWarps) * kSpan<State>;
      if (first + i * kWarps < whole) lanes[i].load(places, row + offset, gradient + offset);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first >= whole) continue;
      const int64_t offset = first * kSpan<State>;
      first += kWarps;
      within_limit &= lanes[i].update(places, coefficients, key, start + offset);
      sum += lanes[i].squares(places);
      places.template store<Cache::kKeep>(row + offset, lanes[i].values);
    }
  }
  return within_limit;
}

// Of this block's chunk, if its slot is listed.
template <class State, int kSlots>
DBMTL_DEVICE void update_chunk(const Parameters<State>& args, const Pointers<kSlots>& pointers) {
  using Real = RealOf<State>;
  const int64_t chunk = args.window.first_chunk + blockIdx.x;
  const int64_t* const entry = args.table + 3 * chunk;
  const int64_t slot = entry[0] - args.window.first_slot, start = entry[1], numel = entry[2];
  if (slot < 0 || slot >= args.window.num_slots) return;
  const uint64_t tagged = pointers.tagged[slot];
  const int tag = static_cast<int>(tagged >> 56);
  if (tag == kNotListed) return;

  const Real beta = *args.beta;
  const EmaCoefficients<Real> coefficients{args.accumulate ? Real{1} : beta, 1 - beta, *args.inv_scale};
  uint32_t key = 0;
  if constexpr (kIsRounded<State>) key = rounding_key(static_cast<uint64_t>(*args.seed));
  const int64_t first_column = static_cast<int64_t>(tagged << 8) >> 8;

  State* const row = args.row + start;
  bool within_limit = true;
  Real sum = 0;
  const auto update = [&](auto element) {
    using Element = decltype(element);
    const auto* const grads =
        reinterpret_cast<const Element*>(first_column + start * static_cast<int64_t>(sizeof(Element)));
    const bool aligned = is_aligned(row, kWordBytes) &&
                         (!kHasGradient<Element> || is_aligned(grads, lane_bytes<State>(sizeof(Element))));
    int64_t span = threadIdx.x / kWarp;
    within_limit = ema_spans(span, aligned ? numel / kSpan<State> : 0, row, grads, start, coefficients, key, sum);
    within_limit &= ema_loose(
        span, kWarps, ceil_div(numel, kSpan<State>), numel, row, grads, coefficients, key, start,
        [](int64_t span) { return span * kSpan<State>; }, [](int64_t, const auto&) {}, sum);
  };
  if (tag == kNone || beta == 1)  // not 0 * g: the gradient may be infinite
    update(NoGradient{});
  else
    with_element_type(static_cast<DType>(tag - kDType), update);

  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) args.partials[chunk] = sum;
  raise_flag(args.found_inf, !within_limit);
}

template <class State, int kSlots>
__global__ __launch_bounds__(kThreads, kBlocksPerSm<State>) void ema_update_kernel(
    const __grid_constant__ Parameters<State> args, const __grid_constant__ Pointers<kSlots> pointers) {
  if (args.window.num_chunks > 0) update_chunk(args, pointers);
  if (!arrive(args.arrivals)) return;
  const auto sum = sum_partials<kThreads>(args.partials, args.C);
  if (threadIdx.x == 0) {
    *args.sq_norm = sum;
    *args.arrivals = 0;
  }
}

template <int kSlots, class State>
cudaError_t launch_window(const Parameters<State>& parameters, const EmaUpdate<State>& args, const Chunks& chunks,
                          cudaStream_t stream) {
  const EmaUpdateLaunch& window = parameters.window;
  Pointers<kSlots> pointers{};
  for (int64_t i = 0; i < args.num_gradients; ++i) {
    const int64_t slot = chunks.slots[i] - window.first_slot;
    if (slot >= 0 && slot < window.num_slots) pointers.tagged[slot] = tagged(args.gradients[i]);
  }
  const int64_t grid = window.num_chunks > 0 ? window.num_chunks : 1;
  return launch(grid, kThreads, 0, false, stream, ema_update_kernel<State, kSlots>, parameters, pointers);
}

}  // namespace

template <class State>
cudaError_t launch_ema_update(const EmaUpdate<State>& args, const Chunks& chunks, cudaStream_t stream) {
  Parameters<State> parameters{args.row,        chunks.table,   {},     args.beta,    args.inv_scale,
                               args.seed,       args.partials,  args.C, args.sq_norm, args.found_inf,
                               chunks.arrivals, args.accumulate};
  for (const EmaUpdateLaunch& window : plan_ema_update(args.gradients, chunks.slots, args.num_gradients)) {
    parameters.window = window;
    const auto launch_smallest = window.num_slots <= kPointerBlocks[0]   ? launch_window<kPointerBlocks[0], State>
                                 : window.num_slots <= kPointerBlocks[1] ? launch_window<kPointerBlocks[1], State>
                                                                         : launch_window<kPointerBlocks[2], State>;
    if (const cudaError_t error = launch_smallest(parameters, args, chunks, stream)) return error;
  }
  return cudaSuccess;
}

template cudaError_t launch_ema_update(const EmaUpdate<float>&, const Chunks&, cudaStream_t);
template cudaError_t launch_ema_update(const EmaUpdate<double>&, const Chunks&, cudaStream_t);
template cudaError_t launch_ema_update(const EmaUpdate<BFloat16>&, const Chunks&, cudaStream_t);

}  // namespace dbmtl_fused::cuda
