#pragma once

#include <cstdio>
#include <cstdlib>

namespace maxva::test {

inline int failures = 0;

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
      if (++maxva::test::failures > 20) std::exit(1);                      \
    }                                                                      \
  } while (false)

}  // namespace maxva::test
