// The CPU backend's kernels, one table of entry points per instruction set. Needs no torch.
#pragma once

#include <cstdint>

#include "compact.h"
#include "maxva_math.h"
#include "statistics.h"
#include "stochastic_rounding.h"

namespace maxva {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

MAXVA_INLINE int size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// One chunk of one tensor; pointers are at its first element. m, u, v, w (and vmax) are of the
// compute type: double for float64 parameters, else float.
struct ChunkView {
  void* theta;
  DType theta_dtype;
  void* master;  // float32 copy that is moved instead of theta and rounded into it, or null
  void* g;
  DType g_dtype;
  const double* grad_scale;  // divides g, and g is written back; or null
  void *m, *u, *v, *w, *vmax;
  int64_t n;
  int64_t first = 0;                   // index of the first element in its tensor
  const RandomBits* random = nullptr;  // for rounding theta; or null
  double* statistics = nullptr;        // [kStatistics], those of the phase are set; or null
};

// Blocks of one tensor whose states are compact; pointers are at the tensor's first element.
struct PackedView {
  void* theta;
  DType theta_dtype;
  void* master;  // as in ChunkView, as are g and grad_scale
  void* g;
  DType g_dtype;
  const double* grad_scale;
  void* packed;     // int32 or int64
  uint32_t* scale;  // one per block, or null
  void* maximum;    // uint8 or bfloat16, or null
  int64_t row;      // elements of a row of dimension 0
  int64_t first_block, end_block;
  const RandomBits* random;
  double* statistics = nullptr;  // as in ChunkView
};

MAXVA_INLINE int64_t blocks_of_row(int64_t row) { return (row + kStateBlock - 1) / kStateBlock; }

// Of a whole tensor, whose rows may be empty.
MAXVA_INLINE int64_t state_blocks(int64_t numel, int64_t row) {
  return row == 0 ? 0 : numel / row * blocks_of_row(row);
}

// Where a block is.
struct PackedBlock {
  int64_t first;  // element
  int n;
};

MAXVA_INLINE PackedBlock packed_block(int64_t block, int64_t row, int64_t of_row) {
  if (row % kStateBlock == 0) return {block * kStateBlock, kStateBlock};
  const int64_t in_row = block % of_row * kStateBlock, rest = row - in_row;
  return {block / of_row * row + in_row, rest < kStateBlock ? static_cast<int>(rest) : kStateBlock};
}

struct SumsOfSquares {
  double theta, update;
};

template <typename T>
using UpdateChunk = SumsOfSquares (*)(const ChunkView&, const Scalars<T>&, Phase);

using UpdatePacked = SumsOfSquares (*)(const PackedView&, const Scalars<float>&, Phase);

// [packing][algorithm][amsgrad]
struct PackedKernels {
  UpdatePacked update[2][2][2];
};

struct CpuKernels {
  const char* isa;
  // [algorithm][amsgrad]
  UpdateChunk<float> update_float[2][2];
  UpdateChunk<double> update_double[2][2];
  double (*sum_of_squares)(const void* g, DType dtype, int64_t n);
  const PackedKernels* packed;
};

inline constexpr const char* kIsaVariable = "MAXVA_CPU_ISA";

// The kernels for this machine: the widest instruction set it has, or the one that MAXVA_CPU_ISA
// named ("baseline", "avx2", "avx512") when this was loaded. Throws std::runtime_error for a name
// that it lacks.
const CpuKernels& cpu_kernels();

// As above for a given name; "" for the widest.
const CpuKernels& cpu_kernels_for(const char* isa);

// From now on cpu_kernels() gives those of this name, not to be called during a step.
void use_cpu_kernels(const char* isa);

}  // namespace maxva
