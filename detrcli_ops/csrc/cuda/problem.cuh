// What a kernel is given, by value: sizes, arrays of any dtype, and where backward writes.
#pragma once

#include <cstdint>

namespace detrcli_ops {
namespace {

constexpr int kThreads = 256;
constexpr int kMostLevels = 32;
constexpr int kMostShared = 48 * 1024;  // what every device grants without asking; more would cost occupancy
constexpr unsigned kAll = 0xffffffffu;

enum class Dtype : int { f64, f32, bf16, f16 };

struct Array {
  void* data;
  Dtype dtype;
  __host__ __device__ explicit operator bool() const { return data != nullptr; }
};

struct Level {
  int height, width;
  int64_t start;
  int shared;  // first element of its gradient in shared memory, or -1
};

struct Problem {
  int64_t batch, tokens, queries;
  int heads, depth, levels, points;
  Level level[kMostLevels];
  Array value, key, query, locations, weights, reference;
  int reference_width;
  bool softmax;   // weights are logits
  bool grid;      // queries are the tokens: tile them in two dimensions
  const bool* mask;
  double scale;
  int64_t tiles;
  __host__ __device__ int samples() const { return levels * points; }
};

// Of the deterministic mode, on the device.
struct FixedPoint {
  double bound;  // of every addend that is finite
  double lost;   // not 0 where one was not
};

// Where backward writes; absent arrays are not wanted.
struct Outputs {
  Array grad;                                // in: (B, Q, M, D)
  Array query, locations, weights;           // like the inputs
  Array raw;                                 // (B, Q, M, L*P) working type: gradient by attention, before softmax
  Array pixels;                              // (B, Q, M, L*P, 2) working type: gradient by pixel, for the reference
  Array value, key;                          // (B, S, M, D) working type, or int64 in deterministic mode; zeroed
  FixedPoint* fixed;                         // null in the default mode
  int shared_elements;
};

}  // namespace
}  // namespace detrcli_ops
