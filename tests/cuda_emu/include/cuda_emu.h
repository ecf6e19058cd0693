// cuda_emu.h -- run CUDA C++ kernels on the CPU, to check results.  C++17, g++ or clang, Linux.
// A CUDA thread is a fiber (own stack, hand-written switch; ucontext elsewhere).  A block runs on one OS thread, so
// __shared__ (= thread_local) is per block; a cooperative launch gives every block an OS thread of its own.
// A barrier some thread never reaches, a warp collective some named lane never reaches, and a grid.sync some block
// never reaches abort with file:line instead of hanging.  CUDA_EMU_SEED=n shuffles the order in which threads run.
// Under -fsanitize=address|undefined|thread the sanitizers see CUDA threads: out-of-bounds, misaligned, data races.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#if !defined(__x86_64__) || defined(CUDA_EMU_UCONTEXT)
#define CUDA_EMU_UC 1
#include <ucontext.h>
#endif
#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
#define CUDA_EMU_ASAN 1
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__) || __has_feature(thread_sanitizer)
#define CUDA_EMU_TSAN 1
#include <sanitizer/tsan_interface.h>
#define EMU_TSAN(x) x
#define EMU_QUIET __attribute__((noinline, no_sanitize("thread")))
#else
#define EMU_TSAN(x)
#define EMU_QUIET
#endif
#include "cuda_emu_types.h"

#define CUDART_VERSION 0

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#define __global__
#define __device__
#define __host__
#define __shared__ thread_local
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

inline thread_local uint3 threadIdx{}, blockIdx{};
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_emu {
[[noreturn]] inline void die(const char* what, const char* file, int line, const char* more = "") {
  std::fprintf(stderr, "cuda_emu: %s at %s:%d: block (%u,%u,%u) thread (%u,%u,%u) %s\n", what, file ? file : "?", line,
               blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, more);
  std::abort();
}
// ---- fibers ----------------------------------------------------------------------------------------------
constexpr size_t kStack = 128 << 10;
enum class St : uint8_t { Ready, Bar, Warp, Grid, Done };
struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;  // nullptr: the scheduler
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake = nullptr;  // AddressSanitizer
  void* tsan = nullptr;
  uint3 tid{};
  St st = St::Done;
  const char* file = nullptr;
  int line = 0;  // where it waits
#ifdef CUDA_EMU_UC
  ucontext_t uc;
#endif
};
#ifndef CUDA_EMU_UC
extern "C" void cuda_emu_switch(void** save, void* to) __attribute__((visibility("hidden")));
__asm__(R"(
.pushsection .text.cuda_emu_switch,"axG",@progbits,cuda_emu_switch,comdat
.weak cuda_emu_switch
.hidden cuda_emu_switch
.type cuda_emu_switch,@function
cuda_emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size cuda_emu_switch,.-cuda_emu_switch
.popsection
)");
#endif
struct Warp;
using Combine = void (*)(Warp&, unsigned mask);  // the last lane to arrive works out res[] for every lane
struct Warp {
  uint64_t in[32], res[32];
  unsigned src[32], mask[32];
  Combine op[32];
  unsigned waiting, live;
};
struct Grid {  // the grid-wide barrier
  std::mutex m;
  std::condition_variable cv;
  unsigned n = 0, in = 0, gone = 0, gen = 0;
  void wait(const char* f, int l) {
    std::unique_lock<std::mutex> k(m);
    unsigned g = gen;
    if (!gone && ++in == n) {
      in = 0;
      ++gen;
      cv.notify_all();
      return;
    }
    cv.wait(k, [&] { return gen != g || gone; });
    if (gen == g) die("deadlock: grid.sync() that another block ended without reaching", f, l);
  }
  void leave() {
    std::lock_guard<std::mutex> k(m);
    ++gone;
    cv.notify_all();
  }
};
void put_stack(char*);
struct Block {
  Fiber main, *cur = nullptr, *fib = nullptr;
  Warp* warps = nullptr;
  unsigned worder[32], lorder[32], nthreads = 0, live = 0;
  const std::function<void()>* body = nullptr;
  uint64_t rng = 0;
  Grid* grid = nullptr;
  char* smem = nullptr;
  size_t smem_bytes = 0;
  char start_tag = 0, bar_tag = 0, end_tag = 0;
  explicit Block(unsigned n) : fib(new Fiber[n]), warps(new Warp[(n + 31) / 32]), nthreads(n) {
    for (unsigned i = 0; i < 32; ++i) lorder[i] = i;
  }
  ~Block() {
    for (unsigned i = 0; i < nthreads; ++i) {
      if (fib[i].stack) put_stack(fib[i].stack);
      EMU_TSAN(if (fib[i].tsan) __tsan_destroy_fiber(fib[i].tsan);)
    }
    delete[] fib;
    delete[] warps;
  }
};
inline thread_local Block* B = nullptr;
inline unsigned flat_tid() { return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x; }

EMU_QUIET inline void jump(Fiber& from, Fiber& to) {
#ifdef CUDA_EMU_ASAN
  __sanitizer_start_switch_fiber(&from.fake, to.stack ? to.stack : to.bottom, to.stack ? kStack : to.size);
#endif
  EMU_TSAN(__tsan_switch_to_fiber(to.tsan, 1);)  // 1: the switch itself orders nothing; only barriers do
#ifdef CUDA_EMU_UC
  swapcontext(&from.uc, &to.uc);
#else
  cuda_emu_switch(&from.sp, to.sp);
#endif
#ifdef CUDA_EMU_ASAN
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}
EMU_QUIET inline void park(St s, const char* f, int l) {
  Fiber* me = B->cur;
  me->st = s;
  me->file = f;
  me->line = l;
  jump(*me, B->main);  // the scheduler sets threadIdx before it resumes a thread
}
EMU_QUIET inline void finish_warp(Warp& w, unsigned base, unsigned mask) {
  if (!mask) return;
  w.op[__builtin_ctz(mask)](w, mask);
  for (unsigned m = mask; m; m &= m - 1) B->fib[base + __builtin_ctz(m)].st = St::Ready;
  w.waiting &= ~mask;
}
EMU_QUIET inline void thread_ended(Fiber* me) {
  unsigned t = unsigned(me - B->fib);
  Warp& w = B->warps[t / 32];
  me->st = St::Done;
  --B->live;
  w.live &= ~(1u << (t & 31));
  for (unsigned m = w.waiting; m; m &= m - 1) {  // a collective that only waited for this lane
    unsigned l = __builtin_ctz(m);
    if ((w.waiting >> l & 1) && (w.mask[l] & w.live & ~w.waiting) == 0) finish_warp(w, t & ~31u, w.mask[l] & w.live);
  }
}
inline void entry() {
  Block* b = B;
  Fiber* me = b->cur;
#ifdef CUDA_EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &b->main.bottom, &b->main.size);
#endif
  for (;;) {  // the fiber serves again in the next block
    EMU_TSAN(__tsan_acquire(&b->start_tag);)
    (*b->body)();
    EMU_TSAN(__tsan_release(&b->end_tag);)
    thread_ended(me);
    jump(*me, b->main);
  }
}
struct Stacks {  // kept between launches, but not under a sanitizer, whose shadow would be stale
  std::mutex m;
  std::vector<char*> free;
  char* get() {
    {
      std::lock_guard<std::mutex> k(m);
      if (!free.empty()) {
        char* p = free.back();
        free.pop_back();
        return p;
      }
    }
    char* p = (char*)mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == (char*)MAP_FAILED) {
      std::perror("cuda_emu: mmap");
      std::abort();
    }
    mprotect(p, 4096, PROT_NONE);  // a guard page
    return p;
  }
  void put(char* p) {
#if defined(CUDA_EMU_ASAN) || defined(CUDA_EMU_TSAN)
    munmap(p, kStack);
#else
    std::lock_guard<std::mutex> k(m);
    free.push_back(p);
#endif
  }
};
inline Stacks& stacks() {
  static Stacks* s = new Stacks;
  return *s;
}
inline void put_stack(char* p) { stacks().put(p); }
inline void arm(Fiber& f) {
  if (f.stack) return;
  f.stack = stacks().get();
  EMU_TSAN(f.tsan = __tsan_create_fiber(0);)
#ifdef CUDA_EMU_UC
  getcontext(&f.uc);
  f.uc.uc_stack.ss_sp = f.stack;
  f.uc.uc_stack.ss_size = kStack;
  f.uc.uc_link = nullptr;
  makecontext(&f.uc, (void (*)())entry, 0);
#else
  void** sp = (void**)(f.stack + kStack);
  *--sp = nullptr;  // entry() never returns; this keeps its stack 16-byte aligned
  *--sp = (void*)&entry;
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  f.sp = sp;
#endif
}
EMU_QUIET inline void all_waiting() {  // nothing can run: every live thread waits
  Block& b = *B;
  Fiber *bar = nullptr, *wrp = nullptr, *grd = nullptr;
  unsigned nb = 0, nw = 0, ng = 0;
  for (unsigned i = 0; i < b.nthreads; ++i) {
    Fiber& f = b.fib[i];
    if (f.st == St::Bar) {
      threadIdx = f.tid;
      if (bar && (bar->line != f.line || std::strcmp(bar->file, f.file)))
        die("threads of one block wait at different barriers; this one", f.file, f.line);
      bar = &f;
      ++nb;
    }
    if (f.st == St::Warp) wrp = &f, ++nw;
    if (f.st == St::Grid) grd = &f, ++ng;
  }
  char more[120];
  std::snprintf(more, sizeof more,
                "(of %u threads %u ended, %u at __syncthreads, %u in a warp collective, %u at grid.sync)", b.nthreads,
                b.nthreads - b.live, nb, nw, ng);
  if (wrp) {
    threadIdx = wrp->tid;
    die("deadlock: warp collective that a named lane never reaches", wrp->file, wrp->line, more);
  }
  if (bar && nb < b.nthreads) {
    threadIdx = bar->tid;
    die("barrier that not every thread reaches", bar->file, bar->line, more);
  }
  if (grd && ng < b.nthreads) {
    threadIdx = grd->tid;
    die("grid.sync that not every thread reaches", grd->file, grd->line, more);
  }
  if (grd) {
    EMU_TSAN(__tsan_acquire(&b.bar_tag); __tsan_release(b.grid);) b.grid->wait(grd->file, grd->line);
    EMU_TSAN(__tsan_acquire(b.grid); __tsan_release(&b.bar_tag);)
  }
  for (unsigned i = 0; i < b.nthreads; ++i) b.fib[i].st = St::Ready;
}
EMU_QUIET inline void shuffle(Block& b, unsigned* a, unsigned n) {
  for (unsigned i = n - 1; i > 0; --i) {
    b.rng ^= b.rng << 13;
    b.rng ^= b.rng >> 7;
    b.rng ^= b.rng << 17;
    unsigned j = unsigned(b.rng % (i + 1)), t = a[i];
    a[i] = a[j];
    a[j] = t;
  }
}
EMU_QUIET inline void run_block(uint3 bi) {
  Block& b = *B;
  blockIdx = bi;
  b.live = b.nthreads;
  std::memset(b.warps, 0, sizeof(Warp) * ((b.nthreads + 31) / 32));
  if (b.smem_bytes) std::memset(b.smem, 0xff, b.smem_bytes);  // NaNs: a read before any write shows
  for (unsigned i = 0; i < b.nthreads; ++i) {
    Fiber& f = b.fib[i];
    f.tid = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    f.st = St::Ready;
    b.worder[i / 32] = i / 32;
    b.warps[i / 32].live |= 1u << (i & 31);
    arm(f);
  }
  EMU_TSAN(b.main.tsan = __tsan_get_current_fiber(); __tsan_release(&b.start_tag);)
  while (b.live) {
    bool ran = false;
    const unsigned nw = (b.nthreads + 31) / 32;
    if (b.rng) shuffle(b, b.worder, nw);
    for (unsigned k = 0; k < nw; ++k)  // a warp runs as far ahead of the others as the barriers let it
      for (bool again = true; again;) {
        again = false;
        if (b.rng) shuffle(b, b.lorder, 32);
        for (unsigned j = 0; j < 32; ++j) {
          unsigned i = b.worder[k] * 32 + b.lorder[j];
          if (i >= b.nthreads || b.fib[i].st != St::Ready) continue;
          ran = again = true;
          b.cur = &b.fib[i];
          threadIdx = b.fib[i].tid;
          jump(b.main, b.fib[i]);
        }
      }
    if (!ran) all_waiting();
  }
  EMU_TSAN(__tsan_acquire(&b.end_tag);)
}
inline void barrier(St kind, const char* f, int l) {
  if (kind == St::Grid && !B->grid) die("grid.sync() in a launch that is not cooperative", f, l);
  EMU_TSAN(__tsan_release(&B->bar_tag);)
  park(kind, f, l);
  EMU_TSAN(__tsan_acquire(&B->bar_tag);)
}
// ---- warp collectives --------------------------------------------------------------------------------------
EMU_QUIET inline void op_shfl(Warp& w, unsigned mask) {
  for (unsigned m = mask; m; m &= m - 1) {
    unsigned i = __builtin_ctz(m);
    w.res[i] = (mask >> w.src[i] & 1) ? w.in[w.src[i]] : ~0ull;  // a lane outside the mask: undefined, hence NaN
  }
}
EMU_QUIET inline void op_ballot(Warp& w, unsigned mask) {
  uint64_t r = 0;
  for (unsigned m = mask; m; m &= m - 1) r |= uint64_t(w.in[__builtin_ctz(m)] != 0) << __builtin_ctz(m);
  for (unsigned m = mask; m; m &= m - 1) w.res[__builtin_ctz(m)] = r;
}
EMU_QUIET inline uint64_t collective(unsigned mask, uint64_t v, unsigned src, Combine op, const char* f, int l) {
  unsigned t = flat_tid(), lane = t & 31;
  Warp& w = B->warps[t / 32];
  if (!(mask >> lane & 1)) die("warp collective called by a lane that its mask leaves out", f, l);
  w.in[lane] = v;
  w.src[lane] = src;
  w.mask[lane] = mask;
  w.op[lane] = op;
  w.waiting |= 1u << lane;
  unsigned need = mask & w.live;
  if ((need & ~w.waiting) == 0) {
    for (unsigned m = need; m; m &= m - 1)
      if (w.mask[__builtin_ctz(m)] != mask || w.op[__builtin_ctz(m)] != op)
        die("lanes of one warp in different collectives, or with different masks", f, l);
    finish_warp(w, t & ~31u, need);
  } else {
    park(St::Warp, f, l);
  }
  return w.res[lane];
}
template <class T>
uint64_t bits(T v) {
  static_assert(sizeof(T) <= 8, "");
  uint64_t u = 0;
  std::memcpy(&u, &v, sizeof v);
  return u;
}
template <class T>
T unbits(uint64_t u) {
  T v;
  std::memcpy((void*)&v, &u, sizeof v);
  return v;
}
// ---- launch --------------------------------------------------------------------------------------------------
constexpr int kWorkers = 0 EMU_TSAN(+4);  // races between blocks show only between OS threads
inline int env(const char* n, int d) {
  const char* s = std::getenv(n);
  return s ? std::atoi(s) : d;
}
inline void launch(dim3 grid, dim3 block, size_t smem, bool coop, const std::function<void()>& body) {
  const unsigned nb = grid.x * grid.y * grid.z, nthr = block.x * block.y * block.z;
  const int seed = env("CUDA_EMU_SEED", 0),
            workers = env("CUDA_EMU_THREADS", kWorkers ? kWorkers : int(std::thread::hardware_concurrency()));
  Grid g;
  g.n = nb;
  const unsigned nt = coop ? nb : std::min(nb, unsigned(std::max(1, workers)));
  auto work = [&](unsigned me) {
    Block b(nthr);
    void* mem = nullptr;  // exactly smem bytes: AddressSanitizer sees the first byte past them
    if (smem && posix_memalign(&mem, 128, smem)) die("no memory for shared memory", "?", 0);
    b.smem = (char*)mem;
    b.smem_bytes = smem;
    b.body = &body;
    b.grid = coop ? &g : nullptr;
    b.rng = seed ? uint64_t(seed) * 0x9e3779b97f4a7c15ull + me * 77 + 1 : 0;
    B = &b;
    blockDim = block;
    gridDim = grid;
    if (coop) {
      run_block({me % grid.x, me / grid.x % grid.y, me / (grid.x * grid.y)});
      g.leave();
    } else
      for (unsigned i = me; i < nb; i += nt) run_block({i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)});
    std::free(mem);
    B = nullptr;
  };
  std::vector<std::thread> ts;
  for (unsigned i = 0; i < nt; ++i) ts.emplace_back(work, i);
  for (auto& t : ts) t.join();
}
}  // namespace cuda_emu
#include "cuda_emu_api.h"
