// What one GPU thread does, as a function of (launch arguments, block index, thread index). Needs
// neither torch nor CUDA; the kernels around it are in update_kernel.cuh. They compile for the CPU,
// too, where tests run them and compare with cpu_kernels.h bit for bit.
#pragma once

#include <cstdint>
#include <cstring>

#include "control.h"
#include "cpu_kernels.h"
#include "low_precision.h"
#include "maxva_math.h"

// Not forced inline on the host, where it would only make the tests slow to compile.
#if defined(__CUDACC__)
#define MAXVA_THREAD_CODE __host__ __device__ __forceinline__
#else
#define MAXVA_THREAD_CODE inline
#endif

namespace maxva::gpu {

constexpr int kThreads = 256;              // per block
constexpr int kVector = 4;                 // consecutive elements that a thread takes at a time
constexpr int kTile = kThreads * kVector;  // elements that a block takes at a time
constexpr int kUpdateChunk = 8 * kTile;    // elements per block: short, for an even tail
constexpr int kNormChunk = 32 * kTile;     // larger: the last block adds one sum per chunk
constexpr int kMaxTensors = 3000;          // per launch
constexpr int kMaxGroups = 500;

// Note [Launch arguments]
// What stays the same from step to step is uploaded once, as a plan: TensorEntry and Hyper tables
// and a block map. What may change every step, gradient addresses and learning rates, travels by
// value in the kernel's argument space (32,764 bytes from CUDA 12.1 on): no copy, nothing that has
// to outlive the call, and safe inside a captured graph.

// A device address and the type of the elements there.
struct TypedAddress {
  uint64_t address : 62;
  uint64_t dtype : 2;

  MAXVA_THREAD_CODE explicit operator bool() const { return address != 0; }
  MAXVA_THREAD_CODE char* data() const { return reinterpret_cast<char*>(uintptr_t{address}); }
  MAXVA_THREAD_CODE DType type() const { return static_cast<DType>(dtype); }
};

inline TypedAddress typed_address(const void* data, DType dtype) {
  return {reinterpret_cast<uintptr_t>(data), static_cast<uint64_t>(dtype)};
}

struct TensorEntry {
  void *theta, *master, *m, *u, *v, *w, *vmax;  // master and vmax may be null
  float* step;
  int64_t numel, first_block;  // first_block: among all blocks of the plan
  int64_t theta_dtype;         // DType
  int64_t group, index;        // index: position in the caller's lists
  Rounding rounding;
  // Compact states instead of m to vmax, else null; scale and maximum may be null, too.
  void* packed = nullptr;
  uint32_t* scale = nullptr;
  void* maximum = nullptr;
  int64_t row = 0;  // elements of a row of dimension 0

  // What is cut into chunks: whole blocks of compact states.
  MAXVA_THREAD_CODE int64_t work() const {
    return packed ? state_blocks(numel, row) * kStateBlock : numel;
  }

  // One per chunk.
  MAXVA_THREAD_CODE int64_t num_blocks() const {
    return (work() + kUpdateChunk - 1) / kUpdateChunk;
  }
};

struct BlockEntry {
  int32_t tensor, chunk;
};

struct LearningRate {
  double value;
  TypedAddress tensor;  // overrides value where not null
};

struct UpdateLaunch {
  const TensorEntry* tensors;
  const Hyper* hyper;
  const BlockEntry* blocks;   // of this launch's first block on
  const double* control;      // or null
  TypedAddress grad_scale;    // or null
  double* norms;              // [tensors, 2], kParameters
  SumsOfSquares* block_sums;  // one per block, kStates
  double* block_statistics;   // [blocks, kStatistics], or null: not collected
  int32_t first_tensor, first_group;
  LearningRate lr[kMaxGroups];  // of group first_group + k
  TypedAddress g[kMaxTensors];  // of tensor first_tensor + k
};

struct NormLaunch {
  const int64_t* numels;
  const BlockEntry* blocks;
  double* block_sums;  // of this launch's first block on
  double* all_block_sums;
  double* result;
  unsigned* finished;  // blocks that are done, in all launches; 0 before and after
  int64_t num_blocks;  // in all launches
  int64_t first_tensor;
  TypedAddress g[kMaxTensors];
};

static_assert(sizeof(UpdateLaunch) <= 32764 && sizeof(NormLaunch) <= 32764);

// Of an address where kVector elements of this many bytes move at once, in accesses of 16 bytes or
// fewer.
MAXVA_THREAD_CODE constexpr int vector_alignment(int element_size) {
  return element_size * kVector < 16 ? element_size * kVector : 16;
}

template <typename S>
struct alignas(vector_alignment(sizeof(S))) Vector {
  S x[kVector];
};

// A pointer that came out of memory: without this the compiler cannot know which space it is in.
template <typename S>
MAXVA_THREAD_CODE S* in_global_memory(S* data) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(data));
#endif
  return data;
}

// `vector` says that the address allows one wide access (two for double).
template <typename S>
MAXVA_THREAD_CODE Vector<S> load(const void* list, int offset, int n, bool vector) {
  const S* from = in_global_memory(static_cast<const S*>(list) + offset);
  if (vector && n == kVector) return *reinterpret_cast<const Vector<S>*>(from);
  Vector<S> result;
  for (int k = 0; k < kVector; ++k) result.x[k] = k < n ? from[k] : S{};
  return result;
}

template <typename S>
MAXVA_THREAD_CODE void store(const Vector<S>& values, void* list, int offset, int n, bool vector) {
  S* to = in_global_memory(static_cast<S*>(list) + offset);
  if (vector && n == kVector) {
    *reinterpret_cast<Vector<S>*>(to) = values;
    return;
  }
  for (int k = 0; k < kVector; ++k) {
    if (k < n) to[k] = values.x[k];
  }
}

MAXVA_THREAD_CODE bool allows_vector(const void* data, int element_size) {
  return reinterpret_cast<uintptr_t>(data) % vector_alignment(element_size) == 0;
}

// A list whose element type is known at run time only.
struct AnyList {
  char* data;
  DType dtype;
  bool vector;
};

MAXVA_THREAD_CODE AnyList any_list(char* tensor, DType dtype, int64_t first_element) {
  char* data = tensor + first_element * size_of(dtype);
  return {data, dtype, allows_vector(data, size_of(dtype))};
}

template <typename T, typename S>
MAXVA_THREAD_CODE Vector<T> converted(const Vector<S>& from) {
  Vector<T> result;
  for (int k = 0; k < kVector; ++k) result.x[k] = static_cast<T>(to_compute(from.x[k]));
  return result;
}

template <typename T>
MAXVA_THREAD_CODE Vector<T> load_any(const AnyList& list, int offset, int n, bool vector) {
  switch (list.dtype) {
    case DType::kFloat64: return converted<T>(load<double>(list.data, offset, n, vector));
    case DType::kBFloat16: return converted<T>(load<BFloat16>(list.data, offset, n, vector));
    case DType::kFloat16: return converted<T>(load<Float16>(list.data, offset, n, vector));
    default: return converted<T>(load<float>(list.data, offset, n, vector));
  }
}

template <typename S, typename T>
MAXVA_THREAD_CODE void store_as(const Vector<T>& values, const AnyList& list, int offset, int n,
                                bool vector) {
  Vector<S> packed;
  for (int k = 0; k < kVector; ++k) {
    from_compute(static_cast<decltype(to_compute(S{}))>(values.x[k]), packed.x[k]);
  }
  store(packed, list.data, offset, n, vector);
}

template <typename T>
MAXVA_THREAD_CODE void store_any(const Vector<T>& values, const AnyList& list, int offset, int n,
                                 bool vector) {
  switch (list.dtype) {
    case DType::kFloat64: return store_as<double>(values, list, offset, n, vector);
    case DType::kBFloat16: return store_as<BFloat16>(values, list, offset, n, vector);
    case DType::kFloat16: return store_as<Float16>(values, list, offset, n, vector);
    default: return store_as<float>(values, list, offset, n, vector);
  }
}

MAXVA_THREAD_CODE double scalar_at(TypedAddress scalar) {
  switch (scalar.type()) {
    case DType::kFloat64: return *reinterpret_cast<const double*>(scalar.data());
    case DType::kBFloat16: return to_compute(*reinterpret_cast<const BFloat16*>(scalar.data()));
    case DType::kFloat16: return to_compute(*reinterpret_cast<const Float16*>(scalar.data()));
    default: return *reinterpret_cast<const float*>(scalar.data());
  }
}

// What the threads of one block share: the scalars, and the lists at the chunk's first element.
template <typename T>
struct StepState {
  Scalars<T> scalars;
  T grad_scale;
  bool unscale, has_master;
  AnyList g;
  AnyList moved;  // what the update moves: the master weights, else theta itself
  AnyList theta;
  RandomBits random;
};

template <typename T>
struct BlockState : StepState<T> {
  T *m, *u, *v, *w, *vmax;
  bool m_vector, u_vector, v_vector, w_vector, vmax_vector;
  bool aligned;   // every list but g allows wide accesses
  int n;          // elements; 0 where the step is skipped
  int64_t first;  // index of the first element in its tensor
};

// One thread's share of the sums of statistics.h; counts are exact in float.
template <typename T>
struct ThreadStatistics {
  double gradient_squares = 0;
  T one_minus_beta = 0, at_beta_min = 0, at_beta_max = 0, step_size = 0;
};

// What of a chunk's state does not depend on how states are kept.
template <typename T>
MAXVA_THREAD_CODE void prepare_step(const UpdateLaunch& launch, const BlockEntry& where,
                                    int64_t first, Phase phase, StepState<T>& block) {
  const TensorEntry& tensor = launch.tensors[where.tensor];
  const Hyper& hyper = launch.hyper[tensor.group];
  const LearningRate& lr = launch.lr[tensor.group - launch.first_group];
  double trust = 1.0;
  if (phase == Phase::kParameters) {
    const double* norms = launch.norms + 2 * tensor.index;
    trust = trust_ratio(hyper, norms[0], norms[1]);
  }
  const double t = *tensor.step + 1.0;
  block.scalars = make_scalars<T>(hyper, lr.tensor ? scalar_at(lr.tensor) : lr.value, t,
                                  launch.control ? launch.control[kClipFactor] : 1.0, trust,
                                  tensor.packed != nullptr);
  block.random = make_random_bits(tensor.rounding, tensor.numel, t);
  block.unscale = static_cast<bool>(launch.grad_scale);
  block.grad_scale = block.unscale ? static_cast<T>(scalar_at(launch.grad_scale)) : T(1);

  const TypedAddress g = launch.g[where.tensor - launch.first_tensor];
  block.g = any_list(g.data(), g.type(), first);
  block.theta =
      any_list(static_cast<char*>(tensor.theta), static_cast<DType>(tensor.theta_dtype), first);
  block.has_master = tensor.master != nullptr;
  block.moved = block.has_master
                    ? any_list(static_cast<char*>(tensor.master), DType::kFloat32, first)
                    : block.theta;
}

// Stores moved parameters; random() gives their random words, and vector(list) says whether a list
// is accessed kVector elements at once.
template <typename T, typename Random, typename Vectors>
MAXVA_THREAD_CODE void store_moved(const Vector<T>& theta, const StepState<T>& block, int offset,
                                   int n, const Random& random, const Vectors& vector) {
  // lr = 0 keeps the bits; a NaN's would not survive the conversion
  if (block.scalars.eta == T(0)) return;
  if (block.random.on) {  // then there are no master weights
    const PhiloxWords words = random();
    Vector<BFloat16> rounded;
    for (int k = 0; k < kVector; ++k) {
      from_compute(static_cast<float>(theta.x[k]), words.x[k], rounded.x[k]);
    }
    store(rounded, block.moved.data, offset, n, vector(block.moved));
    return;
  }
  store_any(theta, block.moved, offset, n, vector(block.moved));
  if (block.has_master) store_any(theta, block.theta, offset, n, vector(block.theta));
}

// Run by one thread of the block.
template <typename T>
MAXVA_THREAD_CODE void prepare_block(const UpdateLaunch& launch, int64_t block_index, Phase phase,
                                     BlockState<T>& block) {
  block.n = 0;
  block.aligned = false;
  if (skips(launch.control)) return;
  const BlockEntry where = launch.blocks[block_index];
  const TensorEntry& tensor = launch.tensors[where.tensor];
  const int64_t first = int64_t{where.chunk} * kUpdateChunk;
  const int64_t rest = tensor.numel - first;
  block.n = static_cast<int>(rest < kUpdateChunk ? rest : kUpdateChunk);
  block.first = first;

  prepare_step(launch, where, first, phase, block);
  const auto state = [&](void* list, T*& data, bool& vector) {
    data = list ? static_cast<T*>(list) + first : nullptr;
    vector = allows_vector(data, sizeof(T));
  };
  state(tensor.m, block.m, block.m_vector);
  state(tensor.u, block.u, block.u_vector);
  state(tensor.v, block.v, block.v_vector);
  state(tensor.w, block.w, block.w_vector);
  state(tensor.vmax, block.vmax, block.vmax_vector);
  block.aligned = block.m_vector && block.u_vector && block.v_vector && block.w_vector &&
                  block.vmax_vector && block.moved.vector && block.theta.vector;
}

// Makes the compiler read BlockState again: kept in registers from one element to the next, its
// fields would crowd out the elements.
MAXVA_THREAD_CODE void forget_block_state() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}

// One thread's `n` elements from `i` on. kAligned: n is kVector and block.aligned holds, so that
// all loads but g's are straight-line code. g, whose type and alignment are the caller's, comes
// last: its conversion waits for its own load only when all the others are under way.
template <Algorithm kAlgorithm, bool kAmsgrad, Phase kPhase, bool kCollect, bool kAligned,
          typename T>
MAXVA_THREAD_CODE void update_vector(const BlockState<T>& block, int i, int n, SumsOfSquares& sums,
                                     ThreadStatistics<T>& statistics) {
  using Ops = FusedMultiplyAdd;
  constexpr bool kMovesStates = kPhase != Phase::kParameters;
  forget_block_state();
  Vector<T> m = load<T>(block.m, i, n, kAligned || block.m_vector);
  Vector<T> v = load<T>(block.v, i, n, kAligned || block.v_vector);
  Vector<T> w = load<T>(block.w, i, n, kAligned || block.w_vector);
  Vector<T> u{}, vmax{};
  if constexpr (kMovesStates) u = load<T>(block.u, i, n, kAligned || block.u_vector);
  if constexpr (kAmsgrad) vmax = load<T>(block.vmax, i, n, kAligned || block.vmax_vector);
  Vector<T> theta = load_any<T>(block.moved, i, n, kAligned || block.moved.vector);
  Vector<T> g = load_any<T>(block.g, i, n, block.g.vector);
  if (block.unscale) {
    for (int k = 0; k < kVector; ++k) g.x[k] = g.x[k] / block.grad_scale;
    // kStates leaves the scaled gradient for kParameters, which writes it back
    if constexpr (kPhase != Phase::kStates) store_any(g, block.g, i, n, block.g.vector);
  }
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int k = 0; k < kVector; ++k) {
    forget_block_state();
    const Scalars<T>& s = block.scalars;
    const T gk = observed_gradient<Ops>(g.x[k], theta.x[k], s);
    if constexpr (kMovesStates) {
      const T c = observe<Ops>(gk, u.x[k], v.x[k], w.x[k], s);
      if (kCollect && k < n) {
        statistics.gradient_squares += double(g.x[k]) * double(g.x[k]);
        statistics.one_minus_beta += c;
        statistics.at_beta_min += c == s.c_max ? T(1) : T(0);
        statistics.at_beta_max += c == s.c_min ? T(1) : T(0);
      }
      track_maximum<kAmsgrad>(v.x[k], w.x[k], vmax.x[k]);
    }
    const Normalizer<Ops, T> normalize = normalizer<kAmsgrad, Ops>(v.x[k], w.x[k], vmax.x[k], s);
    if constexpr (kMovesStates) accumulate_momentum<kAlgorithm, Ops>(gk, m.x[k], normalize, s);
    const T step = direction<kAlgorithm, Ops>(gk, m.x[k], normalize, s);
    if constexpr (kPhase == Phase::kStates) {
      const double update = layer_update<Ops>(theta.x[k], step, s);
      if (k < n) {
        sums.theta += double(theta.x[k]) * double(theta.x[k]);
        sums.update += update * update;
      }
    } else {
      theta.x[k] = moved_parameter<Ops>(theta.x[k], step, s);
      if (kCollect && k < n) statistics.step_size += step_length(step, s);
    }
  }
  forget_block_state();
  if constexpr (kMovesStates) {
    store(m, block.m, i, n, kAligned || block.m_vector);
    store(u, block.u, i, n, kAligned || block.u_vector);
    store(v, block.v, i, n, kAligned || block.v_vector);
    store(w, block.w, i, n, kAligned || block.w_vector);
    if constexpr (kAmsgrad) store(vmax, block.vmax, i, n, kAligned || block.vmax_vector);
  }
  if constexpr (kPhase != Phase::kStates) {
    store_moved(
        theta, block, i, n, [&] { return block.random.four_words(block.first + i); },
        [](const AnyList& list) { return kAligned || list.vector; });
  }
}

// Run by every thread of the block. Returns this thread's sums of squares in kStates, else 0; with
// kCollect adds to `statistics` what the phase knows of them.
template <Algorithm kAlgorithm, bool kAmsgrad, Phase kPhase, bool kCollect, typename T>
MAXVA_THREAD_CODE SumsOfSquares update_thread(const BlockState<T>& block, int thread,
                                              ThreadStatistics<T>& statistics) {
  SumsOfSquares sums{0, 0};
  int i = thread * kVector;
  if (block.aligned) {
    for (; i + kVector <= block.n; i += kTile) {
      update_vector<kAlgorithm, kAmsgrad, kPhase, kCollect, true>(block, i, kVector, sums,
                                                                  statistics);
    }
  }
  for (; i < block.n; i += kTile) {
    const int n = block.n - i < kVector ? block.n - i : kVector;
    update_vector<kAlgorithm, kAmsgrad, kPhase, kCollect, false>(block, i, n, sums, statistics);
  }
  return sums;
}

template <typename S>
MAXVA_THREAD_CODE void add_squares(const Vector<S>& x, double& sum) {
  for (int k = 0; k < kVector; ++k) {
    const double value = to_compute(x.x[k]);
    sum += value * value;
  }
}

template <typename S>
MAXVA_THREAD_CODE double sum_of_squares(const AnyList& g, int elements, int thread) {
  constexpr int kInFlight = 4;  // loads under way at a time
  double sum = 0;
  int i = thread * kVector;
  if (g.vector) {
    for (; i + (kInFlight - 1) * kTile + kVector <= elements; i += kInFlight * kTile) {
      Vector<S> x[kInFlight];
      for (int j = 0; j < kInFlight; ++j) x[j] = load<S>(g.data, i + j * kTile, kVector, true);
      for (int j = 0; j < kInFlight; ++j) add_squares(x[j], sum);
    }
  }
  for (; i < elements; i += kTile) {
    const int n = elements - i < kVector ? elements - i : kVector;
    add_squares(load<S>(g.data, i, n, g.vector), sum);
  }
  return sum;
}

// One thread's share of its block's chunk.
MAXVA_THREAD_CODE double norm_thread(const NormLaunch& launch, int64_t block_index, int thread) {
  const BlockEntry where = launch.blocks[block_index];
  const TypedAddress tensor = launch.g[where.tensor - launch.first_tensor];
  const int64_t first = int64_t{where.chunk} * kNormChunk;
  const int64_t rest = launch.numels[where.tensor] - first;
  const int n = static_cast<int>(rest < kNormChunk ? rest : kNormChunk);
  const AnyList g = any_list(tensor.data(), tensor.type(), first);
  switch (g.dtype) {
    case DType::kFloat64: return sum_of_squares<double>(g, n, thread);
    case DType::kBFloat16: return sum_of_squares<BFloat16>(g, n, thread);
    case DType::kFloat16: return sum_of_squares<Float16>(g, n, thread);
    default: return sum_of_squares<float>(g, n, thread);
  }
}

}  // namespace maxva::gpu
