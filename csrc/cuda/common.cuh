// What every kernel here uses: element types, vectors of columns and how they go through memory, reductions, launches.
//
// A *span* is what one warp touches at a time: 32 * kColumns<State> columns, of which each lane has kColumns<State>.
// With both sides aligned a lane's columns are adjacent and travel in words of up to 16 bytes; otherwise a lane's
// columns are 32 apart, so that single elements still leave as whole cache lines. Where no bit may depend on that,
// columns move between lanes before they are added up (ema.cuh).
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../launch.h"
#include "../rounding.h"

#define DBMTL_DEVICE __device__ __forceinline__

// Dynamic shared memory of the kernel, as a `Type*` called `name`.
#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(Type, name)                        \
  extern __shared__ __align__(16) unsigned char shared[]; \
  Type* const name = reinterpret_cast<Type*>(shared)
#endif

namespace dbmtl_fused::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffU;

// The widest access of a lane.
constexpr int kWordBytes = 16;

// Columns of a lane in one span: one word of state.
template <class State>
constexpr int kColumns = kWordBytes / static_cast<int>(sizeof(State));

template <class State>
constexpr int kSpan = kWarp * kColumns<State>;

struct Float16 {
  uint16_t bits;
};

// Stands for the element type of a missing gradient: its columns only decay (adding zeros would turn -0 into 0).
struct NoGradient {};
template <class Element>
constexpr bool kHasGradient = !std::is_same_v<Element, NoGradient>;

// body(Element{}) for the element type behind `dtype`.
template <class Body>
DBMTL_DEVICE void with_element_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
    case DType::kFloat64:
      return body(double{});
  }
}

DBMTL_DEVICE float widen(float value) { return value; }
DBMTL_DEVICE double widen(double value) { return value; }
DBMTL_DEVICE float widen(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
DBMTL_DEVICE float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

// Rounded to nearest even; like torch, from double to 16 bits by way of float.
template <class Element, class Real>
DBMTL_DEVICE Element narrow(Real value) {
  if constexpr (std::is_same_v<Element, BFloat16>)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(value)))};
  else if constexpr (std::is_same_v<Element, Float16>)
    return {__half_as_ushort(__float2half_rn(static_cast<float>(value)))};
  else
    return static_cast<Element>(value);
}

// --- Memory

template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

constexpr int word_bytes(int bytes) { return bytes < kWordBytes ? bytes : kWordBytes; }

// Whether memory that is read once, or written and not read again, may make room for what is.
enum class Cache : uint8_t { kKeep, kEvictFirst };

// One lane's columns of a span.
template <class Element, int kCount>
struct alignas(word_bytes(kCount * sizeof(Element))) Lane {
  Element at[kCount];
};

template <Cache kCache, int kBytes>
DBMTL_DEVICE void load_bytes(void* to, const void* from) {
  using Word = typename WordOf<word_bytes(kBytes)>::type;
#pragma unroll
  for (int i = 0; i < kBytes / static_cast<int>(sizeof(Word)); ++i) {
    const Word* const word = static_cast<const Word*>(from) + i;
    static_cast<Word*>(to)[i] = kCache == Cache::kEvictFirst ? __ldcs(word) : *word;
  }
}

template <Cache kCache, int kBytes>
DBMTL_DEVICE void store_bytes(void* to, const void* from) {
  using Word = typename WordOf<word_bytes(kBytes)>::type;
#pragma unroll
  for (int i = 0; i < kBytes / static_cast<int>(sizeof(Word)); ++i) {
    Word* const target = static_cast<Word*>(to) + i;
    const Word word = static_cast<const Word*>(from)[i];
    if constexpr (kCache == Cache::kEvictFirst)
      __stcs(target, word);
    else
      *target = word;
  }
}

// Where a lane's columns of a span are. kAligned: adjacent, and all of them exist; the addresses of all arrays involved
// are multiples of what a lane has there, or of kWordBytes. Otherwise only the first `left` columns of the span exist.
template <bool kAligned, int kCount>
struct Places {
  int lane;
  int64_t left;

  DBMTL_DEVICE int column(int i) const { return kAligned ? lane * kCount + i : i * kWarp + lane; }
  DBMTL_DEVICE bool exists(int i) const { return kAligned || column(i) < left; }

  template <Cache kCache, class Element>
  DBMTL_DEVICE void load(Lane<Element, kCount>& to, const Element* span) const {
    if constexpr (kAligned) {
      load_bytes<kCache, sizeof(to)>(&to, span + column(0));
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        to.at[i] = Element{};
        if (exists(i)) load_bytes<kCache, sizeof(Element)>(&to.at[i], span + column(i));
      }
    }
  }

  template <Cache kCache, class Element>
  DBMTL_DEVICE void store(Element* span, const Lane<Element, kCount>& from) const {
    if constexpr (kAligned) {
      store_bytes<kCache, sizeof(from)>(span + column(0), &from);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (exists(i)) store_bytes<kCache, sizeof(Element)>(span + column(i), &from.at[i]);
    }
  }
};

// What a lane's columns of an array must be aligned to.
template <class State>
__host__ __device__ constexpr int64_t lane_bytes(int64_t element_bytes) {
  const int64_t bytes = kColumns<State> * element_bytes;
  return bytes < kWordBytes ? bytes : kWordBytes;
}

inline __host__ __device__ bool is_aligned(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0;
}

// Whether lanes can use whole words in every row of a matrix.
template <class State>
bool rows_are_aligned(const void* data, int64_t element_bytes, int64_t stride, int64_t T) {
  const int64_t bytes = lane_bytes<State>(element_bytes);
  return is_aligned(data, bytes) && (T == 1 || stride * element_bytes % bytes == 0);
}

// --- Reductions, in an order that depends on nothing but the number of threads

// A long sum, of which a plain one would lose the small (Kahan): off by little more than one rounding of the sum of
// absolute values. One that overflows is NaN.
template <class Real>
struct CompensatedSum {
  Real total = 0;
  Real excess = 0;  // what total has too much

  DBMTL_DEVICE void operator+=(Real value) {
    const Real due = value - excess;
    const Real next = total + due;
    excess = (next - total) - due;
    total = next;
  }
};

template <class Real>
DBMTL_DEVICE Real warp_sum(Real value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// The sums of kCount values each, a power of two, over all lanes. Lanes exchange halves of what they have: as many
// shuffles as there are values, not five times as many. Lane l then has the sums from number l * kCount / kWarp on.
template <int kCount, int kDistance = kWarp / 2, class Real, int kSize>
DBMTL_DEVICE void warp_sums(Real (&values)[kSize]) {
  constexpr int kHalf = kCount > 1 ? kCount / 2 : 0;
  const bool upper = threadIdx.x & kDistance;
#pragma unroll
  for (int i = 0; i < (kHalf > 0 ? kHalf : 1); ++i) {
    const Real sent = upper ? values[i] : values[i + kHalf];
    if (upper) values[i] = values[i + kHalf];
    values[i] += __shfl_xor_sync(kAllLanes, sent, kDistance);
  }
  if constexpr (kDistance > 1) warp_sums<(kHalf > 0 ? kHalf : 1), kDistance / 2>(values);
}

// Of all threads of the block, at most kThreads of them; only thread 0 gets it. May be called again after a
// __syncthreads().
template <int kThreads, class Real>
DBMTL_DEVICE Real block_sum(Real value) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ Real sums[kWarps];
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  Real total = 0;
  if (threadIdx.x == 0)
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp)
      if (warp * kWarp < blockDim.x) total += sums[warp];
  return total;
}

// Whether this block is the last one to come here. It sees what the others wrote before they came: their first threads,
// or all of them before a barrier.
DBMTL_DEVICE bool arrive(int32_t* arrivals) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();  // this block's partials before its arrival
    last = atomicAdd(arrivals, 1) == static_cast<int32_t>(gridDim.x) - 1;
    __threadfence();  // the others' arrivals before their partials
  }
  __syncthreads();
  return last;
}

// Of what all blocks wrote, by one of at most kThreads threads; only thread 0 gets it.
template <int kThreads, class Real>
DBMTL_DEVICE Real sum_partials(const Real* partials, int64_t count) {
  constexpr int kBatch = 8;
  Real sum = 0;
  for (int64_t first = threadIdx.x; first < count; first += kBatch * blockDim.x) {
    Real values[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t c = first + i * static_cast<int64_t>(blockDim.x);
      values[i] = c < count ? __ldcg(partials + c) : 0;  // past the first-level cache: other blocks wrote them
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) sum += values[i];
  }
  return block_sum<kThreads>(sum);
}

// Raises the flag if any lane of the warp asks for it.
DBMTL_DEVICE void raise_flag(float* flag, bool raise) {
  if (__any_sync(kAllLanes, raise) && threadIdx.x % kWarp == 0) atomicExch(flag, 1.0F);
}

// --- Launches

template <class... Parameters, class... Arguments>
cudaError_t launch(int64_t grid, int threads, int64_t shared_bytes, bool cooperative, cudaStream_t stream,
                   void (*kernel)(Parameters...), const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace dbmtl_fused::cuda
