// The device functions and the part of the CUDA runtime API that kernels and their launchers use.
#pragma once
#define EMU_AT const char *f_ = __builtin_FILE(), int l_ = __builtin_LINE()
// ---- device functions --------------------------------------------------------------------------------------
inline void __syncthreads(EMU_AT) { cuda_emu::barrier(cuda_emu::St::Bar, f_, l_); }
inline unsigned __ballot_sync(unsigned m, int p, EMU_AT) {
  return unsigned(cuda_emu::collective(m, p != 0, 0, cuda_emu::op_ballot, f_, l_));
}
inline int __any_sync(unsigned m, int p, EMU_AT) { return __ballot_sync(m, p, f_, l_) != 0; }
template <class T>
T __shfl_sync(unsigned m, T v, int src, int width = 32, EMU_AT) {
  unsigned lane = cuda_emu::flat_tid() & 31, base = lane & ~unsigned(width - 1);
  return cuda_emu::unbits<T>(cuda_emu::collective(m, cuda_emu::bits(v), base | (unsigned(src) & unsigned(width - 1)),
                                                  cuda_emu::op_shfl, f_, l_));
}
template <class T>
T __shfl_xor_sync(unsigned m, T v, int x, int width = 32, EMU_AT) {
  unsigned lane = cuda_emu::flat_tid() & 31, s = lane ^ unsigned(x);
  if (s >= (lane & ~unsigned(width - 1)) + unsigned(width)) s = lane;
  return cuda_emu::unbits<T>(cuda_emu::collective(m, cuda_emu::bits(v), s, cuda_emu::op_shfl, f_, l_));
}
namespace cuda_emu {
template <class T, class F>
T rmw(T* p, F f) {
  using U = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  U o = __atomic_load_n((U*)p, __ATOMIC_RELAXED), n;
  do {
    T t;
    std::memcpy((void*)&t, &o, sizeof t);
    t = f(t);
    std::memcpy(&n, &t, sizeof n);
  } while (!__atomic_compare_exchange_n((U*)p, &o, n, true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
  T r;
  std::memcpy((void*)&r, &o, sizeof r);
  return r;
}
template <class T>
using same = std::common_type_t<T>;
}  // namespace cuda_emu
template <class T>
T atomicAdd(T* p, cuda_emu::same<T> v) {
  return cuda_emu::rmw(p, [=](T o) { return T(o + v); });
}
template <class T>
T atomicExch(T* p, cuda_emu::same<T> v) {
  return cuda_emu::rmw(p, [=](T) { return v; });
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}
inline unsigned __float_as_uint(float f) { return cuda_emu::unbits<unsigned>(cuda_emu::bits(f)); }
inline float __uint_as_float(unsigned u) { return cuda_emu::unbits<float>(cuda_emu::bits(u)); }
using std::copysign;
using std::fabs;
using std::fma;
using std::isfinite;
using std::isnan;
using std::signbit;
using std::sqrt;
// ---- runtime API ---------------------------------------------------------------------------------------------
using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 720
};
enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore = 0, cudaLaunchAttributeCooperative = 2 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchAttributeValue {
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
namespace cuda_emu {
inline int sms() {
  static int n = env("CUDA_EMU_SMS", 4);
  return n;
}  // and one block fits on each, whatever its size
template <class... P>
cudaError_t go(dim3 g, dim3 b, size_t smem, bool coop, void (*k)(P...), std::tuple<std::decay_t<P>...> a) {
  if (!g.x || !g.y || !g.z || g.y > 65535 || g.z > 65535 || !b.x || !b.y || !b.z || b.z > 64 ||
      b.x * b.y * b.z > 1024 || smem > 227 * 1024)
    return cudaErrorInvalidConfiguration;
  if (coop && g.x * g.y * g.z > unsigned(sms())) return cudaErrorCooperativeLaunchTooLarge;
  launch(g, b, smem, coop, [&] { std::apply(k, a); });  // every thread gets its own copy of by-value parameters
  return cudaSuccess;
}
}  // namespace cuda_emu
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*k)(P...), A&&... a) {
  bool coop = false;
  for (unsigned i = 0; i < c->numAttrs; ++i)
    coop |= c->attrs[i].id == cudaLaunchAttributeCooperative && c->attrs[i].val.cooperative;
  return cuda_emu::go(c->gridDim, c->blockDim, c->dynamicSmemBytes, coop, k,
                      std::tuple<std::decay_t<P>...>(std::forward<A>(a)...));
}
template <class K>
cudaError_t cudaFuncSetAttribute(K, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  *v = a == cudaDevAttrMultiProcessorCount ? cuda_emu::sms()
       : a == cudaDevAttrCooperativeLaunch ? cuda_emu::env("CUDA_EMU_COOPERATIVE", 1)
                                           : cuda_emu::env("CUDA_EMU_SHARED_BYTES", 227 * 1024);
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess                          ? "no error"
         : e == cudaErrorCooperativeLaunchTooLarge ? "too many blocks in cooperative launch"
                                                   : "invalid configuration argument";
}
// ---- cooperative groups ----------------------------------------------------------------------------------------
namespace cooperative_groups {
struct grid_group {
  void sync(EMU_AT) const { cuda_emu::barrier(cuda_emu::St::Grid, f_, l_); }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups
#define DYNAMIC_SHARED(Type, name) Type* const name = reinterpret_cast<Type*>(cuda_emu::B->smem)
