// Vectors, and the conversions between elements in memory and vectors of Real: float or double.
//
// Loops are written for vectors of kBytes and compiled for each instruction set with its own. What goes element by
// element has the same bits in all of them (-ffp-contract=off: no fused multiply-add); a sum has, if its number of
// lanes is fixed.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../launch.h"
#include "../rounding.h"
#include "isa.h"

namespace dbmtl_fused::cpu {

struct Float16 {
  uint16_t bits;
};

// body(Element{}) for the element type behind `dtype`.
template <class Body>
auto with_element_type(DType dtype, const Body& body) {
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
  __builtin_unreachable();
}

template <class Real>
using BitsOf = std::conditional_t<sizeof(Real) == 4, uint32_t, uint64_t>;

template <class Element, int kCount>
struct VectorOf {
  typedef Element type __attribute__((vector_size(kCount * sizeof(Element))));
};
template <class Element, int kCount>
using Vector = typename VectorOf<Element, kCount>::type;

// Loops::run<kBytes>(arguments...), compiled for and run with the widest vectors isa() allows. What `run` calls must be
// DBMTL_INLINE, or it stays at the compiler's baseline.
#if defined(__x86_64__)
template <class Loops, class... Arguments>
__attribute__((target("avx2"))) auto run_avx2(Arguments... arguments) {
  return Loops::template run<32>(arguments...);
}

template <class Loops, class... Arguments>
__attribute__((target("avx512f"))) auto run_avx512f(Arguments... arguments) {
  return Loops::template run<64>(arguments...);
}
#endif

template <class Loops, class... Arguments>
auto run_widest(Arguments... arguments) {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512f) return run_avx512f<Loops>(arguments...);
  if (isa() == Isa::kAvx2) return run_avx2<Loops>(arguments...);
#endif
  return Loops::template run<16>(arguments...);
}

// What is summed column by column is summed in so many bytes of lanes, on every instruction set: two of the widest
// vectors, so that their sums run side by side.
constexpr int kStepBytes = 128;
template <class Real>
constexpr int kStep = kStepBytes / static_cast<int>(sizeof(Real));

// Over those lanes, by halves.
template <class Real, class Vectors>
DBMTL_INLINE Real sum_lanes(const Vectors& vectors) {
  static_assert(sizeof(vectors) == kStepBytes);
  Real sums[kStep<Real>];
  std::memcpy(sums, vectors, kStepBytes);
  for (int half = kStep<Real> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

template <class VectorType>
DBMTL_INLINE VectorType load_bits(const void* from) {
  VectorType bits;
  std::memcpy(&bits, from, sizeof(bits));  // any alignment is legal
  return bits;
}

template <class VectorType>
DBMTL_INLINE void store_bits(void* to, const VectorType& bits) {
  std::memcpy(to, &bits, sizeof(bits));
}

constexpr int kStreamed = 16;

// The same past the caches, where the target is aligned to kStreamed bytes; without reading first what it overwrites.
// Other threads see it after finish_streams().
template <class VectorType>
DBMTL_INLINE void stream_bits(void* to, const VectorType& bits) {
#if defined(__x86_64__)
  if constexpr (sizeof(bits) % kStreamed == 0) {
    __m128i parts[sizeof(bits) / kStreamed];
    std::memcpy(parts, &bits, sizeof(bits));
    for (const __m128i& part : parts) {
      _mm_stream_si128(static_cast<__m128i*>(to), part);
      to = static_cast<char*>(to) + kStreamed;
    }
    return;
  }
#endif
  store_bits(to, bits);
}

DBMTL_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Fetches kBytes into the first-level cache, from kAhead bytes after `from`. May point anywhere.
template <int kAhead, int kBytes>
DBMTL_INLINE void prefetch(const void* from) {
  constexpr int kCacheLine = 64;
  const auto address = reinterpret_cast<uintptr_t>(from) + kAhead;
  for (int line = 0; line < kBytes; line += kCacheLine)
    __builtin_prefetch(reinterpret_cast<const void*>(address + line));
}

template <int N>
DBMTL_INLINE Vector<float, N> floats_of(BFloat16, const Vector<uint16_t, N>& bits) {
  return reinterpret_cast<Vector<float, N>>(__builtin_convertvector(bits, Vector<uint32_t, N>) << 16);
}

template <int N>
DBMTL_INLINE Vector<float, N> floats_of(Float16, const Vector<uint16_t, N>& bits) {
  using Int = Vector<int32_t, N>;
  using Float = Vector<float, N>;
  const Int half = __builtin_convertvector(bits, Int);
  const Int magnitude = (half & 0x7fff) << 13;
  // Move the exponent from bias 15 to bias 127; infinities and NaNs keep theirs all ones.
  const Int normal = magnitude + (112 << 23);
  const Int special = magnitude + (224 << 23);
  // A subnormal half is the exact difference of two normal floats; subnormal floats would be slow, or flushed to zero.
  const Int two_to_minus_14 = Int{} + (113 << 23);
  const Int subnormal = reinterpret_cast<Int>(reinterpret_cast<Float>(magnitude + two_to_minus_14) -
                                              reinterpret_cast<Float>(two_to_minus_14));
  const Int finite = (half & 0x7c00) == 0 ? subnormal : normal;
  const Int unsigned_bits = (half & 0x7c00) == 0x7c00 ? special : finite;
  return reinterpret_cast<Float>(unsigned_bits | ((half & 0x8000) << 16));
}

template <int N>
DBMTL_INLINE Vector<uint16_t, N> bits_of(BFloat16, const Vector<float, N>& floats) {
  using Int = Vector<uint32_t, N>;
  const Int bits = reinterpret_cast<Int>(floats);
  const Int rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Int quiet_nan = Int{} + 0x7fc0;
  return __builtin_convertvector(floats == floats ? rounded : quiet_nan, Vector<uint16_t, N>);
}

template <int N>
DBMTL_INLINE Vector<uint16_t, N> bits_of(Float16, const Vector<float, N>& floats) {
  using Int = Vector<int32_t, N>;
  const Int bits = reinterpret_cast<Int>(floats);
  const Int magnitude = bits & 0x7fffffff;
  const Int normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14, adding 0.5 leaves the rounded subnormal half in the low bits of the sum.
  const Int one_half = Int{} + (126 << 23);
  const Int subnormal = reinterpret_cast<Int>(reinterpret_cast<Vector<float, N>>(magnitude) +
                                              reinterpret_cast<Vector<float, N>>(one_half)) -
                        one_half;
  const Int infinity = Int{} + 0x7c00;
  const Int quiet_nan = Int{} + 0x7e00;
  const Int special = magnitude > (255 << 23) ? quiet_nan : infinity;
  const Int finite = magnitude < (113 << 23) ? subnormal : normal;
  const Int half = (magnitude >= (143 << 23) ? special : finite) | ((bits >> 16) & 0x8000);
  return __builtin_convertvector(half, Vector<uint16_t, N>);
}

template <class Element>
constexpr bool kIsHalfWide = std::is_same_v<Element, BFloat16> || std::is_same_v<Element, Float16>;

// N elements of any type as Real; exact but for double to float.
template <class Real, int N, class Element>
DBMTL_INLINE Vector<Real, N> load(const Element* from) {
  if constexpr (kIsHalfWide<Element>)
    return __builtin_convertvector(floats_of<N>(Element{}, load_bits<Vector<uint16_t, N>>(from)), Vector<Real, N>);
  else
    return __builtin_convertvector(load_bits<Vector<Element, N>>(from), Vector<Real, N>);
}

// The reverse, rounded to nearest even; like torch, from double to 16 bits by way of float.
template <class Element, class Real, int N>
DBMTL_INLINE auto rounded_to(const Vector<Real, N>& values) {
  if constexpr (kIsHalfWide<Element>)
    return bits_of<N>(Element{}, __builtin_convertvector(values, Vector<float, N>));
  else
    return __builtin_convertvector(values, Vector<Element, N>);
}

template <class Real, int N, class Element>
DBMTL_INLINE void store(Element* to, const Vector<Real, N>& values) {
  store_bits(to, rounded_to<Element, Real, N>(values));
}

template <class Real, int N, class Element>
DBMTL_INLINE void stream(Element* to, const Vector<Real, N>& values) {
  stream_bits(to, rounded_to<Element, Real, N>(values));
}

// Finite floats rounded to what BFloat16 holds, down or up in magnitude as `random`, below 2^16, decides.
template <class Words, class Floats>
DBMTL_INLINE Floats round_by(const Words& random, const Floats& floats) {
  return reinterpret_cast<Floats>((reinterpret_cast<Words>(floats) + random) & 0xffff0000U);
}

// Values that Element holds exactly, NaNs with all their bits.
template <class Real, int N, class Element>
DBMTL_INLINE void store_exact(Element* to, const Vector<Real, N>& values) {
  if constexpr (std::is_same_v<Element, BFloat16>)
    store_bits(to, __builtin_convertvector(reinterpret_cast<Vector<uint32_t, N>>(values) >> 16, Vector<uint16_t, N>));
  else
    store_bits(to, values);
}

}  // namespace dbmtl_fused::cpu
