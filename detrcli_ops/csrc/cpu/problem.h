// What the CPU kernels work on, in plain types: this header is shared by translation units compiled for different
// instruction sets, so nothing in it may emit code that a linker could merge.
//
// Axes: B batch, Q queries, M heads, D channels of a head, S tokens of all levels, L levels, P points per level.
#pragma once

#include <cstddef>
#include <cstdint>

namespace detrcli_ops {

enum class Dtype : int { f64, f32, bf16, f16 };

struct Array {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  explicit operator bool() const { return data != nullptr; }
};

enum class Kind : int { msda, fused, kda };

struct Problem {
  Kind kind;
  int64_t batch, tokens, heads, depth, queries, levels, points;
  const int64_t* shapes;   // (L, 2) height, width
  Array locations;         // (B, Q, M, L, P, 2): locations for msda, offsets otherwise
  Array weights;           // (B, Q, M, L*P): weights for msda, logits for fused
  Array reference;         // (B, Q, L, 2|4)
  int64_t reference_width; // 2 or 4
  const bool* mask;        // (B, S), true on padding; may be null
  Array query;             // (B, Q, M, D), kda only
  double scale;
};

// The rows that are sampled. Packed rows are (B, M, S+1, D) in the working type, masked rows and the last one zero;
// otherwise they are the caller's (B, S, M, D).
struct Rows {
  Array data;
  bool packed = false;
  explicit operator bool() const { return bool(data); }
};

struct Gradients {
  Array out;         // in: (B, Q, M, D)
  Array locations;   // as in Problem
  Array weights;     // as in Problem
  Array query;       // as in Problem
  Array reference;   // as in Problem
  Array attention;   // (B, Q, M, L*P) working type: the weights that multiply the samples
  Array key_weight;  // (B, Q, M, L*P) working type, kda: what multiplies the query in the gradient of a sampled key
  Array pixels;      // (B, Q, M, L*P, 2) working type: gradient by pixel coordinates, kept for the reference's gradient
};

// Where the gradient of the rows is added up.
struct Target {
  Array rows;   // (B, S, M, D)
  bool direct;  // there, zeroed before; else by a buffer of one head
};

// One scattered gradient: rows += share * source, and, where key and value are one tensor, + second share * second source.
struct Scatter {
  Array source, share;                // (B, Q, M, D), (B, Q, M, L*P)
  Array second_source, second_share;  // may be null
  Target to;
  int64_t levels;                     // that one task takes
};

// Pictures as rows of numbers, all channels of a pixel side by side.
struct Pixels {
  const uint8_t* from;         // (height, width), rows from_stride apart
  const float *scale, *shift;  // (width)
  float* to;                   // (any, room), rows to_stride apart
  int64_t height, width, room, from_stride, to_stride;
};

struct Kernels {
  int vector_bytes;
  size_t (*scratch_bytes)(const Problem&, bool wide);
  size_t (*scatter_bytes)(const Problem&, bool wide, bool direct);
  size_t (*sums_bytes)(const Problem&, bool wide, bool direct);  // of backward_and_scatter
  // tasks: blocks of queries of one image and head
  void (*forward)(const Problem&, const Rows& value, const Rows& key, Array out, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const Problem&, const Rows& value, const Rows& key, const Gradients&, int64_t begin, int64_t end,
                   void* scratch);
  // tasks: some levels of one image and head
  void (*scatter)(const Problem&, const Scatter&, int64_t begin, int64_t end, void* scratch);
  // tasks: one image and head each; not for kda
  void (*backward_and_scatter)(const Problem&, const Rows& value, const Gradients&, const Target&, int64_t begin,
                               int64_t end, void* scratch);
  // tasks: queries of all images
  void (*reference)(const Problem&, const Gradients&, int64_t begin, int64_t end);
  // tasks: tokens of all images
  void (*pack)(const Problem&, Array rows, Array packed, int64_t begin, int64_t end);
  // tasks: rows of the answer
  void (*normalise)(const Pixels&, int64_t begin, int64_t end);
};

constexpr int64_t kQueryBlock = 64;

inline constexpr int64_t query_blocks(int64_t queries) { return (queries + kQueryBlock - 1) / kQueryBlock; }

}  // namespace detrcli_ops
