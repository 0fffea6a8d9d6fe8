// Pure C++: how a list of tensors is cut into chunks of work, whatever device runs them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace maxva {

// A piece of one tensor: elements [begin, end).
struct Chunk {
  int64_t tensor, begin, end;
  int64_t index;  // position among all chunks of the plan
};

// Note [Chunks]
// Every tensor is cut at multiples of chunk_size from its own start. The cut does not depend on the
// number of threads, so neither do the results; work is shared out by elements, not by chunks, so
// that a list of tiny tensors beside a few huge ones stays balanced. Nothing is stored per chunk.
class ChunkPlan {
 public:
  ChunkPlan(const std::vector<int64_t>& numels, int64_t chunk_size) : chunk_size_(chunk_size) {
    first_element_.reserve(numels.size() + 1);
    first_chunk_.reserve(numels.size() + 1);
    int64_t elements = 0, chunks = 0;
    for (int64_t numel : numels) {
      first_element_.push_back(elements);
      first_chunk_.push_back(chunks);
      elements += numel;
      chunks += (numel + chunk_size - 1) / chunk_size;
    }
    first_element_.push_back(elements);
    first_chunk_.push_back(chunks);
  }

  int64_t num_elements() const { return first_element_.back(); }
  int64_t num_chunks() const { return first_chunk_.back(); }
  int64_t num_tensors() const { return static_cast<int64_t>(first_chunk_.size()) - 1; }
  int64_t chunk_size() const { return chunk_size_; }
  int64_t first_chunk(int64_t tensor) const { return first_chunk_[tensor]; }

  // Calls fn(Chunk) for the chunks that start in elements [begin, end) of the concatenated list.
  template <typename F>
  void for_each_chunk(int64_t begin, int64_t end, const F& fn) const {
    const auto after = std::upper_bound(first_element_.begin(), first_element_.end(), begin);
    int64_t tensor = std::max<int64_t>(0, after - first_element_.begin() - 1);
    for (; tensor < num_tensors() && first_element_[tensor] < end; ++tensor) {
      const int64_t first = first_element_[tensor];
      const int64_t numel = first_element_[tensor + 1] - first;
      const int64_t skipped =
          begin > first ? (begin - first + chunk_size_ - 1) / chunk_size_ : int64_t{0};
      for (int64_t k = skipped; k * chunk_size_ < numel && first + k * chunk_size_ < end; ++k) {
        fn(Chunk{tensor, k * chunk_size_, std::min(numel, (k + 1) * chunk_size_),
                 first_chunk_[tensor] + k});
      }
    }
  }

 private:
  int64_t chunk_size_;
  std::vector<int64_t> first_element_, first_chunk_;  // per tensor, and one past the last
};

}  // namespace maxva
