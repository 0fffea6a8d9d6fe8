// Stands in for CUDA's header of this name, so that a C++ compiler builds the kernels of csrc/*.cu
// and a launch runs them here: block after block, every thread of a block a fiber that runs up to
// where threads wait for each other. Waiting for one that never comes ends the program. Blocks,
// warps and lanes go forwards and backwards in turns, and warps as far apart as barriers allow:
// what depends on their order does not come out right.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <source_location>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__ &  // one object for all threads
#define __launch_bounds__(...)

using cudaStream_t = void*;
using cudaError_t = int;

namespace maxva::on_host {

using Place = std::source_location;

struct Index {
  unsigned x;
};

inline Index thread_index, block_index;

// The threads of the block that runs.
class Threads {
 public:
  void run(unsigned threads, const std::function<void()>& kernel, bool backwards) {
    kernel_ = &kernel;
    while (threads_.size() < threads) threads_.push_back(std::make_unique<Thread>());
    size_ = threads;
    for (unsigned k = 0; k < size_; ++k) start(*threads_[k]);
    const unsigned warps = (size_ + kLanes - 1) / kLanes;
    do {
      // a warp goes as far as it can before the next begins
      for (unsigned k = 0; k < warps; ++k) run_warp(backwards ? warps - 1 - k : k, backwards);
      if (all(0, size_, At::kEnd)) return;
    } while (release(0, size_, At::kBarrier));
    deadlock();
  }

  void barrier(Place place) { wait(At::kBarrier, place); }

  // What lane `from` of the thread's warp brings.
  template <typename T>
  T exchange(T x, unsigned from, Place place) {
    const unsigned first = thread_index.x / kLanes * kLanes;
    Thread& self = *threads_[thread_index.x];
    // two in turns: a lane can be one exchange ahead of one that has still to read
    const unsigned turn = ++self.exchanges % 2;
    std::memcpy(&self.brings[turn], &x, sizeof x);
    wait(At::kExchange, place);
    std::memcpy(&x, &threads_[first + from]->brings[turn], sizeof x);
    return x;
  }

  static constexpr unsigned kLanes = 32;

 private:
  enum class At { kWork, kExchange, kBarrier, kEnd };

  struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(size_t{32} << 10);
    At at;
    Place place;
    unsigned exchanges;
    uint64_t brings[2];
  };

  void start(Thread& thread);
  static void body();

  void run_warp(unsigned warp, bool backwards) {
    const unsigned first = warp * kLanes, lanes = std::min(kLanes, size_ - first);
    do {
      for (unsigned k = 0; k < lanes; ++k) go_on(first + (backwards ? lanes - 1 - k : k));
    } while (lanes == kLanes && release(first, lanes, At::kExchange));
  }

  void go_on(unsigned k) {
    if (threads_[k]->at != At::kWork) return;
    thread_index = {k};
    swapcontext(&scheduler_, &threads_[k]->context);
  }

  void wait(At at, Place place) {
    Thread& self = *threads_[thread_index.x];
    self.at = at, self.place = place;
    swapcontext(&self.context, &scheduler_);
  }

  bool all(unsigned first, unsigned count, At at) const {
    for (unsigned k = first; k < first + count; ++k) {
      if (threads_[k]->at != at) return false;
    }
    return true;
  }

  // Lets those go on who all wait for each other at one place.
  bool release(unsigned first, unsigned count, At at) {
    if (!all(first, count, at)) return false;
    for (unsigned k = first; k < first + count; ++k) {
      if (threads_[k]->place.line() != threads_[first]->place.line()) return false;
    }
    for (unsigned k = first; k < first + count; ++k) threads_[k]->at = At::kWork;
    return true;
  }

  [[noreturn]] void deadlock() const {
    for (unsigned k = 0; k < size_; ++k) {
      const Thread& thread = *threads_[k];
      std::fprintf(stderr, "block %u, thread %u waits at %s:%u\n", block_index.x, k,
                   thread.at == At::kEnd ? "its end" : thread.place.file_name(),
                   thread.at == At::kEnd ? 0 : thread.place.line());
    }
    std::exit(1);
  }

  std::vector<std::unique_ptr<Thread>> threads_;
  unsigned size_ = 0;
  const std::function<void()>* kernel_ = nullptr;
  ucontext_t scheduler_;
};

inline Threads threads;

inline void Threads::body() {
  (*threads.kernel_)();
  threads.wait(At::kEnd, Place::current());
}

inline void Threads::start(Thread& thread) {
  thread.at = At::kWork, thread.exchanges = 0;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.data();
  thread.context.uc_stack.ss_size = thread.stack.size();
  thread.context.uc_link = nullptr;  // a thread that has ended is not gone on with
  makecontext(&thread.context, &Threads::body, 0);
}

}  // namespace maxva::on_host

#define threadIdx maxva::on_host::thread_index
#define blockIdx maxva::on_host::block_index

inline void __syncthreads(maxva::on_host::Place place = maxva::on_host::Place::current()) {
  maxva::on_host::threads.barrier(place);
}

// All lanes take part in every exchange of the kernels.
template <typename T>
T __shfl_sync(unsigned, T x, int lane,
              maxva::on_host::Place place = maxva::on_host::Place::current()) {
  return maxva::on_host::threads.exchange(x, unsigned(lane) % 32, place);
}

template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask,
                  maxva::on_host::Place place = maxva::on_host::Place::current()) {
  return maxva::on_host::threads.exchange(x, (threadIdx.x % 32) ^ unsigned(mask), place);
}

// From beyond the last lane comes the lane's own.
template <typename T>
T __shfl_down_sync(unsigned, T x, unsigned by,
                   maxva::on_host::Place place = maxva::on_host::Place::current()) {
  const unsigned lane = threadIdx.x % 32;
  return maxva::on_host::threads.exchange(x, lane + by < 32 ? lane + by : lane, place);
}

inline void __threadfence() {}

inline unsigned atomicAdd(unsigned* at, unsigned x) { return std::exchange(*at, *at + x); }

template <typename T>
T __ldcg(const T* at) {
  return *at;
}

template <typename... Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params...), unsigned blocks, unsigned threads,
                             void** args, size_t, cudaStream_t) {
  static unsigned launches = 0;
  const bool backwards = ++launches % 2 == 0;
  const auto of_thread = [&]<size_t... k>(std::index_sequence<k...>) {
    kernel(*static_cast<std::remove_reference_t<Params>*>(args[k])...);
  };
  const std::function<void()> body = [&] { of_thread(std::index_sequence_for<Params...>{}); };
  for (unsigned k = 0; k < blocks; ++k) {
    blockIdx = {backwards ? blocks - 1 - k : k};
    maxva::on_host::threads.run(threads, body, (k + launches) % 2);
  }
  return 0;
}
