// gram: inner products of all pairs of rows.
//
// Math      out[s, t] = sum_p ema[s, p] * ema[t, p]
// Traffic   fp32: reads 4TP bytes up to T = 32 (other state: T = 20). Beyond, there are more tiles of out than warps of
//           a block, and rows are read again for the others: ceil(tiles / 12) times, T^2 / 128 tiles. Warps that share
//           rows meet them in the first-level cache. The workspace is about 2 T^2 bytes a block.
// Parallel  a block on each multiprocessor, its warps dealt to the tiles (see plan.h) and then to units of columns. A
//           thread has its columns of two blocks of rows, or of one, and a sum for each of their products.
// Sync      a counter of blocks done; the last block sums what they left in the workspace and resets it. Warps on
//           different tiles wait for each other after every chain, so that none runs away from what is in the cache.
// Numerics  multiply-adds: nothing here has to equal the reference bit for bit. A thread adds up kChain products and a
//           warp its lanes' sums plainly, everything after that is compensated: at most 24 eps off, relative to
//           sum_p |ema[s, p]| |ema[t, p]|, whatever P. The order is fixed: bits depend on the grid and on how rows are
//           aligned, not on the run. Both triangles are written from the same numbers.
// Limits    out and ema must not overlap; calls that share `arrivals` must follow one another.
#include "common.cuh"
#include "launch.h"

namespace dbmtl_fused::cuda {
namespace {

// Products that a thread adds up plainly.
constexpr int kChain = 32;

// Rows of the right block that a thread has at a time, and columns where they do not go by whole words.
constexpr int kBatch = 4;
constexpr int kLoose = 4;

template <class State>
struct Parameters {
  Gram<State> gram;
  int64_t tiles;
  int tiles_at_once;
  int64_t units;
  int64_t aligned_units;    // those that go by whole words
  RealOf<State>* partials;  // (tiles, entries, grid)
  int32_t* arrivals;
};

// Tiles are numbered along the rows of the upper triangle.
struct Place {
  int64_t left = 0, right = 0;  // blocks of rows

  DBMTL_DEVICE Place(int64_t tile, int64_t blocks) {
    for (; tile >= blocks - left; ++left) tile -= blocks - left;
    right = left + tile;
  }
};

// Sums of products of a block of rows and another, over one lane's columns.
template <class State, int kRows>
struct Tile {
  static constexpr int kCount = kColumns<State>;
  static constexpr int kGroups = gram_groups(kRows, sizeof(State));
  static constexpr int kUnit = kSpan<State> * kGroups;
  static constexpr int kEntries = gram_entries(kRows);
  using Real = RealOf<State>;

  const Gram<State>& args;
  int64_t left, right;    // first rows
  Real sums[kEntries]{};  // (kRows, kRows) of them

  template <bool kAligned>
  DBMTL_DEVICE void add(int64_t column) {
    if constexpr (kRows == max_gram_rows(sizeof(State)))
      if (left != right) return add<kAligned, false>(column);
    add<kAligned, true>(column);
  }

 private:
  // kDiagonal: a block with itself, of which the upper triangle is enough.
  template <bool kAligned, bool kDiagonal>
  DBMTL_DEVICE void add(int64_t column) {
    constexpr int kSpans = kAligned ? kGroups : 1;
    constexpr int kWidth = kAligned ? kCount : kCount < kLoose ? kCount : kLoose;
#pragma unroll 1
    for (const int64_t end = column + kUnit; column < end; column += kSpans * kWidth * kWarp) {
      Lane<State, kWidth> lefts[kSpans][kRows];
      load<kAligned>(lefts, left, column);
      if constexpr (kDiagonal) {
        multiply<true>(lefts, lefts, 0);
      } else {
#pragma unroll
        for (int first = 0; first < kRows; first += kBatch) {
          Lane<State, kWidth> rights[kSpans][kBatch];
          load<kAligned>(rights, right + first, column);
          multiply<false>(lefts, rights, first);
        }
      }
    }
  }

  // The last row stands in for those beyond it.
  template <bool kAligned, int kSpans, int kNumber, int kWidth>
  DBMTL_DEVICE void load(Lane<State, kWidth> (&rows)[kSpans][kNumber], int64_t first, int64_t column) const {
#pragma unroll
    for (int i = 0; i < kNumber; ++i) {
      const int64_t t = first + i < args.T ? first + i : args.T - 1;
#pragma unroll
      for (int span = 0; span < kSpans; ++span) {
        const int64_t start = column + span * kWidth * kWarp;
        const Places<kAligned, kWidth> places{static_cast<int>(threadIdx.x) % kWarp, args.P - start};
        places.template load<Cache::kKeep>(rows[span][i], args.ema + t * args.ema_stride + start);
      }
    }
  }

  template <bool kDiagonal, int kSpans, int kRights, int kWidth>
  DBMTL_DEVICE void multiply(const Lane<State, kWidth> (&lefts)[kSpans][kRows],
                             const Lane<State, kWidth> (&rights)[kSpans][kRights], int first) {
#pragma unroll
    for (int span = 0; span < kSpans; ++span)
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
#pragma unroll
        for (int t = 0; t < kRights; ++t)
#pragma unroll
          for (int s = 0; s < (kDiagonal ? t + 1 : kRows); ++s) {
            Real& sum = sums[s * kRows + first + t];
            sum = fma(widen(lefts[span][s].at[i]), widen(rights[span][t].at[i]), sum);
          }
  }
};

// What all warps of this block make of their tiles, pass by pass, into the workspace.
template <class State, int kRows>
DBMTL_DEVICE void sum_tiles(const Parameters<State>& args) {
  using Block = Tile<State, kRows>;
  using Real = RealOf<State>;
  constexpr int kEntries = Block::kEntries, kUnits = kChain / (Block::kCount * Block::kGroups);
  constexpr int kOwn = kEntries > kWarp ? kEntries / kWarp : 1, kOwners = kWarp * kOwn / kEntries;  // see warp_sums
  __shared__ Real sums[gram_threads(kRows) / kWarp][kEntries];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int team = warp / args.tiles_at_once, teams = blockDim.x / kWarp / args.tiles_at_once;
  const int64_t grid = gridDim.x, step = kUnits * teams * grid;

#pragma unroll 1
  for (int64_t first = 0; first < args.tiles; first += args.tiles_at_once) {
    const int64_t tile = first + warp % args.tiles_at_once;
    const int64_t end = tile < args.tiles ? args.units : 0;  // nothing is left for some warps in the last pass
    const Place place(tile < args.tiles ? tile : 0, ceil_div(args.gram.T, kRows));
    CompensatedSum<Real> totals[kOwn];
#pragma unroll 1
    for (int64_t start = blockIdx.x; start < args.units; start += step) {  // the same for all warps
      Block chain{args.gram, place.left * kRows, place.right * kRows};
#pragma unroll 1
      for (int i = 0; i < kUnits; ++i) {
        const int64_t unit = start + (i * teams + team) * grid;
        if (unit >= end) break;
        if (unit < args.aligned_units)
          chain.template add<true>(unit * Block::kUnit);
        else
          chain.template add<false>(unit * Block::kUnit);
      }
      warp_sums<kEntries>(chain.sums);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) totals[i] += chain.sums[i];
      if (args.tiles_at_once > 1) __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (lane % kOwners == 0) sums[warp][lane * kEntries / kWarp + i] = totals[i].total;
    __syncthreads();
    const int64_t tiles = args.tiles - first < args.tiles_at_once ? args.tiles - first : args.tiles_at_once;
    for (int entry = threadIdx.x; entry < tiles * kEntries; entry += blockDim.x) {
      CompensatedSum<Real> total;
      for (int i = 0; i < teams; ++i) total += sums[i * args.tiles_at_once + entry / kEntries][entry % kEntries];
      args.partials[(first * kEntries + entry) * grid + blockIdx.x] = total.total;
    }
    __syncthreads();
  }
}

// A warp for every entry of the upper triangle.
template <class State, int kRows>
DBMTL_DEVICE void write_sums(const Parameters<State>& args) {
  using Real = RealOf<State>;
  const int64_t T = args.gram.T, blocks = ceil_div(T, kRows), grid = gridDim.x;
  for (int64_t i = threadIdx.x / kWarp; i < T * T; i += blockDim.x / kWarp) {
    const int64_t s = i / T, t = i % T, left = s / kRows, right = t / kRows;
    if (s > t) continue;
    const int64_t tile = left * blocks - left * (left - 1) / 2 + right - left;
    const int64_t entry = tile * gram_entries(kRows) + s % kRows * kRows + t % kRows;
    CompensatedSum<Real> sum;
    for (int64_t block = threadIdx.x % kWarp; block < grid; block += kWarp)
      sum += __ldcg(args.partials + entry * grid + block);  // past the first-level cache: other blocks wrote them
    const Real total = warp_sum(sum.total);
    if (threadIdx.x % kWarp == 0) args.gram.out[s * T + t] = args.gram.out[t * T + s] = total;
  }
}

template <class State, int kRows>
__global__ __launch_bounds__(gram_threads(kRows), 1) void gram_kernel(const __grid_constant__ Parameters<State> args) {
  sum_tiles<State, kRows>(args);
  if (!arrive(args.arrivals)) return;
  write_sums<State, kRows>(args);
  if (threadIdx.x == 0) *args.arrivals = 0;
}

template <class State, int kRows = max_gram_rows(sizeof(State))>
auto kernel_for(int rows) {
  if constexpr (kRows > 1)
    if (rows != kRows) return kernel_for<State, (kRows > kMaxSmallGram ? kMaxSmallGram : kRows - 1)>(rows);
  return gram_kernel<State, kRows>;
}

}  // namespace

template <class State>
cudaError_t launch_gram(const Gram<State>& args, const GramPlan& plan, RealOf<State>* workspace, int32_t* arrivals,
                        cudaStream_t stream) {
  const bool aligned = rows_are_aligned<State>(args.ema, sizeof(State), args.ema_stride, args.T);
  const int64_t aligned_units =
      aligned ? args.P / unit_columns(sizeof(State), gram_groups(plan.rows, sizeof(State))) : 0;
  const Parameters<State> parameters{args,      plan.tiles, plan.tiles_at_once, plan.units, aligned_units,
                                     workspace, arrivals};
  return launch(plan.grid, plan.threads, 0, false, stream, kernel_for<State>(plan.rows), parameters);
}

template cudaError_t launch_gram(const Gram<float>&, const GramPlan&, float*, int32_t*, cudaStream_t);
template cudaError_t launch_gram(const Gram<double>&, const GramPlan&, double*, int32_t*, cudaStream_t);
template cudaError_t launch_gram(const Gram<BFloat16>&, const GramPlan&, float*, int32_t*, cudaStream_t);

}  // namespace dbmtl_fused::cuda
