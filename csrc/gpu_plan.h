// Pure C++: what is uploaded once for a list of tensors, and how the list is cut into launches. See
// Note [Launch arguments] in gpu_traversal.h.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "gpu_traversal.h"
#include "multi_tensor.h"

namespace maxva::gpu {

// Consecutive tensors whose gradients and learning rates fit one launch's arguments.
struct LaunchRange {
  int64_t first_tensor, end_tensor;
  int64_t first_block, end_block;
  int64_t first_group = 0;
  bool float64 = false;

  unsigned num_blocks() const { return static_cast<unsigned>(end_block - first_block); }
};

inline std::vector<BlockEntry> block_map(const ChunkPlan& chunks) {
  std::vector<BlockEntry> blocks;
  blocks.reserve(chunks.num_chunks());
  chunks.for_each_chunk(0, chunks.num_elements(), [&](const Chunk& c) {
    blocks.push_back(
        {static_cast<int32_t>(c.tensor), static_cast<int32_t>(c.begin / chunks.chunk_size())});
  });
  return blocks;
}

// Bytes that go to the device as they are. Two of them are equal exactly if everything the kernels
// read from them is, so that comparing them is what makes a stale plan impossible.
class Image {
 public:
  template <typename E>
  void append(const std::vector<E>& table) {
    static_assert(std::is_trivially_copyable_v<E> && sizeof(E) % 8 == 0);
    const size_t end = bytes_.size();
    bytes_.resize(end + table.size() * sizeof(E));
    if (!table.empty()) std::memcpy(bytes_.data() + end, table.data(), table.size() * sizeof(E));
  }

  const std::vector<char>& bytes() const { return bytes_; }

 private:
  std::vector<char> bytes_;
};

// The tables of an update: tensors of float arithmetic first, then those of float64.
class UpdatePlan {
 public:
  // hyper.lr is not part of the plan. Group indices do not fall within float or float64 tensors.
  UpdatePlan(const std::vector<TensorEntry>& in_order, std::vector<Hyper> hyper,
             std::vector<int32_t*> group_steps)
      : hyper_(std::move(hyper)), group_steps_(std::move(group_steps)) {
    static_assert(std::has_unique_object_representations_v<TensorEntry>);
    tensors_.reserve(in_order.size());
    for (const bool float64 : {false, true}) {
      for (const TensorEntry& tensor : in_order) {
        if (is_float64(tensor) == float64) tensors_.push_back(tensor);
      }
    }
    int64_t block = 0;
    for (TensorEntry& tensor : tensors_) {
      tensor.first_block = block;
      block += tensor.num_blocks();
    }
    num_blocks_ = block;
    for (Hyper& row : hyper_) row.lr = 0;
  }

  const std::vector<TensorEntry>& tensors() const { return tensors_; }
  int64_t num_blocks() const { return num_blocks_; }
  int64_t num_groups() const { return static_cast<int64_t>(group_steps_.size()); }

  // Tensors, hyper-parameters, counters: what identifies the plan.
  Image key() const {
    Image image;
    image.append(tensors_);
    image.append(hyper_);
    image.append(group_steps_);
    return image;
  }

  // What is uploaded: the key, and the block map, which follows from it.
  Image image() const {
    std::vector<int64_t> numels;
    for (const TensorEntry& tensor : tensors_) numels.push_back(tensor.work());
    Image image = key();
    image.append(block_map(ChunkPlan(numels, kUpdateChunk)));
    return image;
  }

  // Where the tables are in an uploaded image.
  struct OnDevice {
    const TensorEntry* tensors;
    const Hyper* hyper;
    int32_t* const* group_steps;
    const BlockEntry* blocks;
  };

  OnDevice locate(const char* image) const {
    const char* hyper = image + tensors_.size() * sizeof(TensorEntry);
    const char* steps = hyper + hyper_.size() * sizeof(Hyper);
    const char* blocks = steps + group_steps_.size() * sizeof(int32_t*);
    return {reinterpret_cast<const TensorEntry*>(image), reinterpret_cast<const Hyper*>(hyper),
            reinterpret_cast<int32_t* const*>(steps), reinterpret_cast<const BlockEntry*>(blocks)};
  }

  std::vector<LaunchRange> launches() const {
    std::vector<LaunchRange> ranges;
    const auto num_tensors = static_cast<int64_t>(tensors_.size());
    for (int64_t i = 0; i < num_tensors; ++i) {
      const TensorEntry& tensor = tensors_[i];
      const bool fits = !ranges.empty() && ranges.back().float64 == is_float64(tensor) &&
                        i - ranges.back().first_tensor < kMaxTensors &&
                        tensor.group - ranges.back().first_group < kMaxGroups;
      if (!fits) ranges.push_back({i, i, tensor.first_block, 0, tensor.group, is_float64(tensor)});
      ranges.back().end_tensor = i + 1;
      ranges.back().end_block = i + 1 < num_tensors ? tensors_[i + 1].first_block : num_blocks_;
    }
    return ranges;
  }

  // Fills in what travels with the launch; g by index of the tensor, lr by group.
  void fill(UpdateLaunch& launch, const LaunchRange& range, const OnDevice& tables,
            const std::vector<TypedAddress>& g, const std::vector<LearningRate>& lr) const {
    launch.tensors = tables.tensors;
    launch.hyper = tables.hyper;
    launch.blocks = tables.blocks + range.first_block;
    launch.first_tensor = static_cast<int32_t>(range.first_tensor);
    launch.first_group = static_cast<int32_t>(range.first_group);
    for (int64_t i = range.first_tensor; i < range.end_tensor; ++i) {
      const int64_t group = tensors_[i].group;
      launch.g[i - range.first_tensor] = g[tensors_[i].index];
      launch.lr[group - range.first_group] = lr[group];
    }
  }

 private:
  static bool is_float64(const TensorEntry& tensor) {
    return static_cast<DType>(tensor.theta_dtype) == DType::kFloat64;
  }

  std::vector<TensorEntry> tensors_;
  std::vector<Hyper> hyper_;
  std::vector<int32_t*> group_steps_;
  int64_t num_blocks_;
};

// The tables of a norm: sizes, a count of finished blocks, and the block map.
class NormPlan {
 public:
  explicit NormPlan(std::vector<int64_t> numels)
      : numels_(std::move(numels)), chunks_(numels_, kNormChunk) {}

  int64_t num_blocks() const { return chunks_.num_chunks(); }

  Image key() const {
    Image image;
    image.append(numels_);
    image.append(std::vector<int64_t>{0});
    return image;
  }

  Image image() const {
    Image image = key();
    image.append(block_map(chunks_));
    return image;
  }

  struct OnDevice {
    const int64_t* numels;
    unsigned* finished;
    const BlockEntry* blocks;
  };

  OnDevice locate(char* image) const {
    char* finished = image + numels_.size() * sizeof(int64_t);
    return {reinterpret_cast<const int64_t*>(image), reinterpret_cast<unsigned*>(finished),
            reinterpret_cast<const BlockEntry*>(finished + sizeof(int64_t))};
  }

  std::vector<LaunchRange> launches() const {
    std::vector<LaunchRange> ranges;
    const auto num_tensors = static_cast<int64_t>(numels_.size());
    for (int64_t first = 0; first < num_tensors; first += kMaxTensors) {
      const int64_t end = std::min<int64_t>(num_tensors, first + kMaxTensors);
      ranges.push_back({first, end, chunks_.first_chunk(first), chunks_.first_chunk(end)});
    }
    return ranges;
  }

  void fill(NormLaunch& launch, const LaunchRange& range, const OnDevice& tables,
            const std::vector<TypedAddress>& g) const {
    launch.numels = tables.numels;
    launch.finished = tables.finished;
    launch.num_blocks = num_blocks();
    launch.blocks = tables.blocks + range.first_block;
    launch.first_tensor = range.first_tensor;
    for (int64_t i = range.first_tensor; i < range.end_tensor; ++i) {
      launch.g[i - range.first_tensor] = g[i];
    }
  }

 private:
  std::vector<int64_t> numels_;
  ChunkPlan chunks_;
};

}  // namespace maxva::gpu
