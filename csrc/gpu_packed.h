// What one GPU thread does with compact states, as gpu_traversal.h.
// A warp takes one block of kStateBlock elements at a time, each of its lanes kVector of them.
#pragma once

#include "compact.h"
#include "gpu_traversal.h"

namespace maxva::gpu {

constexpr int kLanes = 32, kWarps = kThreads / kLanes;
constexpr int kStateBlocks = kUpdateChunk / kStateBlock;  // of a chunk, at most
static_assert(kLanes * kVector == kStateBlock && kTile == kWarps * kStateBlock);
static_assert(kStateBlocks <= kLanes * kWarps);  // see scales_of_iterations

// The device's own reciprocal and root, which are a bit or two off: instructions are what the step
// is bound by, and codes keep few digits. Divisors and squares below 2^-126 count as 0.
struct DeviceArithmetic : FusedMultiplyAdd {
#if defined(__CUDA_ARCH__)
  __device__ __forceinline__ static float reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
  }
  __device__ __forceinline__ static float divide(float a, float b) { return a * reciprocal(b); }
  __device__ __forceinline__ static float share(float a, float b) {
    const float r = reciprocal(b), q = a * r;
    return ::fma(::fma(-b, q, a), r, q);
  }
  __device__ __forceinline__ static bool divides(float x) { return !(x < 0x1p-126f); }
  __device__ __forceinline__ static float root(float x) {
    float result;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
  }
#endif
};

template <Packing kPacking>
using Word = std::conditional_t<kPacking == Packing::kInt8, uint32_t, uint64_t>;
template <Packing kPacking>
using Maximum = std::conditional_t<kPacking == Packing::kInt8, uint8_t, BFloat16>;

// What the threads of one block share beside StepState.
struct PackedState : StepState<float> {
  void *packed, *maximum;
  uint32_t* scale;  // of the chunk's first state block
  bool packed_vector, maximum_vector;
  CodeConstants constants;
  uint32_t round_keys[kPhiloxRounds][2];
  int64_t first_call;             // of the chunk's first element
  bool fast;                      // see move_lane
  bool whole_rows;                // all state blocks are whole
  int num_state_blocks;           // of the chunk; 0 where the step is skipped
  int64_t first_state_block;      // in its tensor
  int64_t first;                  // index of the first element in its tensor
  int64_t row, row_state_blocks;  // elements and blocks of a row
};

// Run by one thread of the block.
template <Packing kPacking>
MAXVA_THREAD_CODE void prepare_packed_block(const UpdateLaunch& launch, int64_t block_index,
                                            Phase phase, PackedState& block) {
  block.num_state_blocks = 0;
  if (skips(launch.control)) return;
  const BlockEntry where = launch.blocks[block_index];
  const TensorEntry& tensor = launch.tensors[where.tensor];
  block.row = tensor.row;
  block.row_state_blocks = blocks_of_row(tensor.row);
  block.whole_rows = tensor.row % kStateBlock == 0;
  block.first_state_block = int64_t{where.chunk} * kStateBlocks;
  const int64_t rest = state_blocks(tensor.numel, tensor.row) - block.first_state_block;
  block.num_state_blocks = static_cast<int>(rest < kStateBlocks ? rest : kStateBlocks);
  block.first = packed_block(block.first_state_block, block.row, block.row_state_blocks).first;
  prepare_step(launch, where, block.first, phase, block);
  const auto list = [&](void* data, int size, void*& at, bool& vector) {
    at = data ? static_cast<char*>(data) + block.first * size : nullptr;
    vector = allows_vector(at, size);
  };
  list(tensor.packed, sizeof(Word<kPacking>), block.packed, block.packed_vector);
  list(tensor.maximum, sizeof(Maximum<kPacking>), block.maximum, block.maximum_vector);
  block.scale = tensor.scale ? tensor.scale + block.first_state_block : nullptr;
  block.constants = CodeConstants{};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    block.round_keys[round][0] = block.random.key0 + static_cast<uint32_t>(round) * kPhiloxKeyStep0;
    block.round_keys[round][1] = block.random.key1 + static_cast<uint32_t>(round) * kPhiloxKeyStep1;
  }
  const int64_t first = block.first + block.random.offset;
  block.first_call = first / 4;
  const Scalars<float>& s = block.scalars;
  const bool plain = s.l2 == 0 && s.nesterov_x == 0 && s.eps_inside == 0 && s.eps >= 0x1p-100f &&
                     !block.unscale && s.eta != 0;
  const bool vectors = block.packed_vector && block.maximum_vector && block.moved.vector &&
                       block.g.vector && block.random.in_a_row && first % 4 == 0;
  block.fast = plain && vectors && !block.has_master && block.moved.dtype == DType::kFloat32 &&
               block.g.dtype == DType::kFloat32;
}

// Where a lane's elements are in the chunk.
struct Lane {
  int offset;
  int n;        // its elements, at most kVector
  bool vector;  // a multiple of kVector from the chunk's first element
  bool whole;   // vector, and the block of the states is whole
};

MAXVA_THREAD_CODE Lane find_lane(const PackedState& block, int index, int lane) {
  if (block.whole_rows) {
    return {index * kStateBlock + lane * kVector, kVector, true, true};
  }
  const PackedBlock at =
      packed_block(block.first_state_block + index, block.row, block.row_state_blocks);
  const int start = static_cast<int>(at.first - block.first), rest = at.n - lane * kVector;
  const bool vector = start % kVector == 0;
  return {start + lane * kVector,
          rest < 0         ? 0
          : rest < kVector ? rest
                           : kVector,
          vector, vector && at.n == kStateBlock};
}

// kInt8: the scales of the block that a warp moves in its iteration `lane`. A warp reads those of
// all its iterations at once, as a load in each would have it wait for memory.
MAXVA_THREAD_CODE uint32_t scales_of_iterations(const PackedState& block, int warp, int lane) {
  const int index = warp + lane * kWarps;
  return index < block.num_state_blocks ? in_global_memory(block.scale)[index] : 0;
}

// Has the second-level cache fetch what a lane will read of block `index`, `offset` elements from
// the chunk's first: a hint, and none where rows end in a shorter block.
template <Packing kPacking, bool kAmsgrad>
MAXVA_THREAD_CODE void prefetch_lane(const PackedState& block, int index, int offset) {
#if defined(__CUDA_ARCH__)
  if (!block.whole_rows || index >= block.num_state_blocks) return;
  const auto hint = [](const char* data) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(in_global_memory(data)));
  };
  hint(static_cast<const char*>(block.packed) + offset * sizeof(Word<kPacking>));
  if constexpr (kAmsgrad) {
    hint(static_cast<const char*>(block.maximum) + offset * sizeof(Maximum<kPacking>));
  }
  hint(block.moved.data + offset * sizeof(float));
  hint(block.g.data + offset * sizeof(float));
#endif
}

// A lane's elements between decoding and encoding; finish_lane makes r, sd and root of m, var and
// vmax.
struct LaneMoments {
  float m[kVector], mean[kVector], var[kVector], w[kVector], vmax[kVector], theta[kVector];
};

// What kInt8 scales blocks by, the largest magnitudes: of a lane, then of the warp.
struct Largest {
  float r = 0, mean = 0, sd = 0, root = 0;
};

MAXVA_THREAD_CODE float larger(float a, float b) {
#if defined(__CUDA_ARCH__)
  return ::fmaxf(a, ::fabsf(b));
#else
  return a > std::fabs(b) ? a : std::fabs(b);
#endif
}

template <Packing kPacking, Algorithm kAlgorithm>
MAXVA_THREAD_CODE void decode_element(Word<kPacking> word, uint32_t exponents,
                                      const CodeConstants& constants, int k, LaneMoments& lane) {
  if constexpr (kPacking == Packing::kInt8) {
    const float r = decoded_signed<0>(word, decoding_scale(exponents & 0xFFu), constants);
    const float mean = decoded_signed<1>(word, decoding_scale(exponents >> 8 & 0xFFu), constants);
    const float sd = decoded_unsigned(word, decoding_scale(exponents >> 16 & 0xFFu), constants);
    lane.m[k] = momentum<kAlgorithm>(r, mean, sd);
    lane.mean[k] = mean;
    lane.var[k] = sd * sd;
    lane.w[k] = unfolded(decoded_magnitude_at<3>(word, decoding_scale(127), constants), word);
  } else {
    const auto low = static_cast<uint32_t>(word), high = static_cast<uint32_t>(word >> 32);
    lane.m[k] = float_from_bits(low << 16);
    lane.mean[k] = float_from_bits(low & 0xFFFF0000u);
    lane.var[k] = float_from_bits(high << 16);
    lane.w[k] = unfolded(float_from_bits(high & 0x7FFF0000u), high);
  }
}

// Decodes and moves a lane's elements, states and parameters, in registers; `exponents` are the
// block's scales. With kStates nothing is to be stored: only the norms are wanted. kFast:
// block.fast holds, which means the common options in float32 and wide accesses to every list, and
// the block of states is whole.
template <Packing kPacking, Algorithm kAlgorithm, bool kAmsgrad, bool kStates, bool kCollect,
          bool kFast>
MAXVA_THREAD_CODE void move_lane(const PackedState& block, uint32_t exponents, const Lane& at,
                                 LaneMoments& lane, SumsOfSquares& sums,
                                 ThreadStatistics<float>& statistics) {
  using Ops = DeviceArithmetic;
  const int i = at.offset, n = kFast ? kVector : at.n;
  const auto vector = [&](bool list) { return kFast || (at.vector && list); };
  const auto words = load<Word<kPacking>>(block.packed, i, n, vector(block.packed_vector));
  Vector<Maximum<kPacking>> maxima{};
  if constexpr (kAmsgrad) {
    maxima = load<Maximum<kPacking>>(block.maximum, i, n, vector(block.maximum_vector));
  }
  const auto floats = [&](const AnyList& list) {
    return kFast ? load<float>(list.data, i, kVector, true)
                 : load_any<float>(list, i, n, vector(list.vector));
  };
  const Vector<float> theta = floats(block.moved);
  Vector<float> g = floats(block.g);
  if (!kFast && block.unscale) {
    for (int k = 0; k < kVector; ++k) g.x[k] = g.x[k] / block.grad_scale;
    // kStates leaves the scaled gradient for the phase that writes it back
    if constexpr (!kStates) store_any(g, block.g, i, n, vector(block.g.vector));
  }
  const CodeConstants constants = block.constants;
  Scalars<float> s = block.scalars;
  s.range = s.range_squared = 1.0f;
  if constexpr (kFast) s.l2 = s.nesterov_x = s.eps_inside = 0.0f;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int k = 0; k < kVector; ++k) {
    decode_element<kPacking, kAlgorithm>(words.x[k], exponents, constants, k, lane);
    float vmax = 0.0f;
    if constexpr (kAmsgrad) {
      if constexpr (kPacking == Packing::kInt8) {
        const float root = decoded_unsigned(uint32_t{maxima.x[k]} << 16,
                                            decoding_scale(exponents >> 24), constants);
        vmax = root * root;
      } else {
        vmax = to_compute(maxima.x[k]);
      }
    }
    const float gk = observed_gradient<Ops>(g.x[k], theta.x[k], s);
    const float c = observe_centered<Ops>(gk, lane.mean[k], lane.var[k], lane.w[k], s);
    if (kCollect && k < n) {
      statistics.gradient_squares += double(g.x[k]) * double(g.x[k]);
      statistics.one_minus_beta += c;
      statistics.at_beta_min += c == s.c_max ? 1.0f : 0.0f;
      statistics.at_beta_max += c == s.c_min ? 1.0f : 0.0f;
    }
    const float vhat = Ops::fma(lane.mean[k], lane.mean[k], lane.var[k]);
    track_maximum<kAmsgrad>(vhat, 1.0f, vmax);
    auto normalize = normalizer<kAmsgrad, Ops>(vhat, 1.0f, vmax, s);
    if constexpr (kFast) normalize.never_by_zero();
    accumulate_momentum<kAlgorithm, Ops>(gk, lane.m[k], normalize, s);
    const float step = direction<kAlgorithm, Ops>(gk, lane.m[k], normalize, s);
    lane.vmax[k] = vmax;
    if constexpr (kStates) {
      const double update = layer_update<Ops>(theta.x[k], step, s);
      if (k < n) {
        sums.theta += double(theta.x[k]) * double(theta.x[k]);
        sums.update += update * update;
      }
    } else {
      lane.theta[k] = moved_parameter<Ops>(theta.x[k], step, s);
      if (kCollect && k < n) statistics.step_size += step_length(step, s);
    }
  }
}

// Roots and units of kInt8. What has no code counts as 0 and is marked by a bit of `nan` (of the
// root: 16 bits higher), which the caller has set to 0.
template <Algorithm kAlgorithm, bool kAmsgrad>
MAXVA_THREAD_CODE Largest finish_lane(int n, LaneMoments& lane, uint32_t& nan) {
  using Ops = DeviceArithmetic;
  float *const r = lane.m, *const mean = lane.mean, *const sd = lane.var, *const root = lane.vmax;
  Largest largest;
  bool finite = true;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int k = 0; k < kVector; ++k) {
    sd[k] = Ops::root(sd[k]);
    r[k] = in_units<kAlgorithm, Ops>(r[k], mean[k], sd[k]);
    // mean is finite where its standard deviation is; 0 times what is not is NaN
    finite = finite && Ops::fma(r[k], 0.0f, sd[k]) < INFINITY;
    if constexpr (kAmsgrad) {
      root[k] = Ops::root(root[k]);
      finite = finite && root[k] < INFINITY;
    }
  }
  if (!finite) {
    for (int k = 0; k < kVector; ++k) {
      if (!(Ops::fma(r[k], 0.0f, sd[k]) < INFINITY)) {
        r[k] = mean[k] = sd[k] = 0.0f;
        nan |= 1u << k;
      }
      if (kAmsgrad && !(root[k] < INFINITY)) {
        root[k] = 0.0f;
        nan |= 0x10000u << k;
      }
    }
  }
  for (int k = 0; k < kVector; ++k) {
    if (k >= n) break;
    largest.r = larger(largest.r, r[k]);
    largest.mean = larger(largest.mean, mean[k]);
    largest.sd = larger(largest.sd, sd[k]);
    if constexpr (kAmsgrad) largest.root = larger(largest.root, root[k]);
  }
  return largest;
}

// The random words of a lane's elements where block.fast holds.
MAXVA_THREAD_CODE PhiloxWords fast_words(const PackedState& block, int offset) {
  const int64_t call = block.first_call + offset / kVector;
  return philox_rounds({{static_cast<uint32_t>(call), static_cast<uint32_t>(call >> 32),
                         block.random.parameter, block.random.t}},
                       [&](int round, uint32_t& key0, uint32_t& key1) {
                         key0 = block.round_keys[round][0];
                         key1 = block.round_keys[round][1];
                       });
}

// Encodes and stores a lane's elements; kInt8 with the scales of the whole block.
template <Packing kPacking, bool kAmsgrad, bool kFast>
MAXVA_THREAD_CODE void store_lane(const PackedState& block, int index, int lane_index,
                                  const Lane& at, const LaneMoments& lane, const Largest& largest,
                                  uint32_t nan) {
  using Ops = DeviceArithmetic;
  const int i = at.offset, n = kFast ? kVector : at.n;
  const auto vector = [&](bool list) { return kFast || (at.vector && list); };
  forget_block_state();  // random words made earlier would crowd out the elements
  const PhiloxWords random =
      kFast ? fast_words(block, i) : block.random.four_words(block.first + i);
  Vector<Word<kPacking>> words;
  Vector<Maximum<kPacking>> maxima;
  if constexpr (kPacking == Packing::kInt8) {
    const CodeConstants constants = block.constants;
    const uint32_t for_r = scale_exponent(bits_of(largest.r)),
                   for_mean = scale_exponent(bits_of(largest.mean)),
                   for_sd = scale_exponent(bits_of(largest.sd)),
                   for_root = scale_exponent(bits_of(largest.root));
    if (lane_index == 0) {
      in_global_memory(block.scale)[index] =
          for_r | for_mean << 8 | for_sd << 16 | (kAmsgrad ? for_root << 24 : 0);
    }
    for (int k = 0; k < kVector; ++k) {
      const uint32_t word = random.x[k];
      words.x[k] = packed_bytes(
          encoded_signed<1, Ops>(lane.m[k], inverse_scale(for_r), word, constants),
          encoded_signed<2, Ops>(lane.mean[k], inverse_scale(for_mean), word, constants),
          encoded_unsigned<Ops>(lane.var[k], inverse_scale(for_sd), word, constants),
          encoded_weight(lane.w[k], word, constants));
      if constexpr (kAmsgrad) {
        maxima.x[k] = static_cast<uint8_t>(
            encoded_unsigned<Ops>(lane.vmax[k], inverse_scale(for_root), word, constants) >> 24);
      }
    }
    if (nan != 0) {
      for (int k = 0; k < kVector; ++k) {
        if (nan >> k & 1u) words.x[k] |= kNotANumberCode >> 8;
        if (kAmsgrad && (nan >> (16 + k) & 1u)) maxima.x[k] = 0xFF;
      }
    }
  } else {
    for (int k = 0; k < kVector; ++k) {
      const uint32_t word = random.x[k];
      words.x[k] = uint64_t{second_half_of_word(lane.var[k], lane.w[k], word)} << 32 |
                   first_half_of_word(lane.m[k], lane.mean[k], word);
      if constexpr (kAmsgrad) from_compute(lane.vmax[k], window<3>(word), maxima.x[k]);
    }
  }
  store(words, block.packed, i, n, vector(block.packed_vector));
  if constexpr (kAmsgrad) store(maxima, block.maximum, i, n, vector(block.maximum_vector));
  Vector<float> theta;
  for (int k = 0; k < kVector; ++k) theta.x[k] = lane.theta[k];
  if constexpr (kFast) {
    store(theta, block.moved.data, i, n, true);
  } else {
    store_moved(
        theta, block, i, n, [&] { return random; },
        [&](const AnyList& list) { return vector(list.vector); });
  }
}

}  // namespace maxva::gpu
