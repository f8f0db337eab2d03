// Attention over blocks of queries (FlashAttention-2, arXiv 2307.08691), on one core per task.
//
// All tiles are transposed: scores are [keys, lanes] with the queries of a block along the vector lanes. So
// every product has a plain right operand (K·Qᵀ, V·dOᵀ, P·dO, dS·Q) or a transposed left one (Pᵀ·V, dSᵀ·K),
// the fast forms of the BLAS; softmax needs no sums across lanes; and a lane's result depends on no other
// lane.
#include "operators/attention/attention_cpu.h"

#include <limits>

#include "operators/cpu/gemm.h"
#include "operators/cpu/vectors.h"
#include "operators/linear/gemm_bfloat16.h"

namespace oryx::ORYX_CPU_ISA {

namespace {

using cpu::AttentionProblem;
using cpu::BackwardTask;
using cpu::ForwardTask;
using cpu::Next;
using cpu::QueryBlock;
using cpu::ReduceTask;

constexpr int64_t kKeys = 256;     // keys of a tile; tiles start at multiples of this
constexpr int64_t kLaneStep = 16;  // lanes are padded to whole vectors of either instruction set

int64_t padded_lanes(int64_t lanes) { return (lanes + kLaneStep - 1) / kLaneStep * kLaneStep; }

// A sequence's rows of one key head, as the products see them.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
};

template <typename T>
Rows<T> rows_of(const void* tensor, const int64_t* strides, int64_t sequence, int64_t head) {
  return {static_cast<const T*>(tensor) + sequence * strides[0] + head * strides[2], strides[1]};
}

// The lanes of a block in memory: lane r · group + g is head g of the group in the block's row r.
struct Lanes {
  int64_t group, count, padded, row, head, heads;

  Lanes(const AttentionProblem& p, const QueryBlock& block, int64_t key_head)
      : group(p.query_heads / p.key_heads),
        count(block.rows * group),
        padded(padded_lanes(count)),
        row(block.row),
        head(key_head * group),
        heads(p.query_heads) {}

  // Index of a lane's row in a tensor [N · Hq, …].
  int64_t index(int64_t lane) const { return (row + lane / group) * heads + head + lane % group; }
};

// compact[lane, :] = the lane's row of `from`; zeros in the padding.
template <typename T>
void gather(const Lanes& lanes, const T* from, int64_t dim, T* compact) {
  for (int64_t lane = 0; lane < lanes.count; ++lane) {
    std::memcpy(compact + lane * dim, from + lanes.index(lane) * dim, dim * sizeof(T));
  }
  std::memset(static_cast<void*>(compact + lanes.count * dim), 0,
              (lanes.padded - lanes.count) * dim * sizeof(T));
}

// to[d, lane] = from[lane, d] in squares, so that both sides stay in cache lines already fetched.
template <typename T>
void transpose(int64_t lanes, int64_t dim, const T* from, T* to) {
  for (int64_t first = 0; first < lanes; first += kLaneStep) {
    for (int64_t d = 0; d < dim; ++d) {
      for (int64_t lane = 0; lane < kLaneStep; ++lane)
        to[d * lanes + first + lane] = from[(first + lane) * dim + d];
    }
  }
}

template <typename A>
void lane_positions(const AttentionProblem& p, const QueryBlock& block, const Lanes& lanes, A* positions) {
  for (int64_t lane = 0; lane < lanes.padded; ++lane) {
    positions[lane] = lane < lanes.count ? p.positions[block.row + lane / lanes.group] : block.last;
  }
}

// The keys of one step. The BLAS sums products with a single row in another order, so a tile of one key takes
// the key before it along (`extra` = 1), masked: results do not depend on where a block of queries ends.
struct Tile {
  int64_t begin, keys, extra;

  Tile(const QueryBlock& block, int64_t first)
      : begin(first), keys(std::min<int64_t>(kKeys, block.last + 1 - first)), extra(first > 0 && keys == 1) {
    begin -= extra;
    keys += extra;
  }
};

// scores = scale · K · Qᵀ for the keys of a tile, −∞ where the key comes after the query or is extra.
template <typename T, typename A>
void score_tile(const AttentionProblem& p, const QueryBlock& block, const Lanes& lanes, Rows<T> key,
                const Tile& tile, const T* query, const int32_t* positions, A* scores) {
  constexpr A masked = -std::numeric_limits<A>::infinity();
  cpu::gemm(false, false, tile.keys, lanes.padded, p.key_dim, A(p.scale), key.data + tile.begin * key.stride,
            key.stride, query, lanes.padded, A(0), scores, lanes.padded);
  std::fill(scores, scores + tile.extra * lanes.padded, masked);
  for (int64_t j = std::max<int64_t>(0, block.first + 1 - tile.begin); j < tile.keys; ++j) {
    A* row = scores + j * lanes.padded;
#pragma omp simd
    for (int64_t lane = 0; lane < lanes.padded; ++lane) {
      row[lane] = positions[lane] < tile.begin + j ? masked : row[lane];
    }
  }
}

// Calls body.operator()<W>(lane) for groups of W vectors that cover the lanes.
template <typename A, typename Body>
void for_lane_vectors(int64_t lanes, Body body) {
  constexpr int64_t step = Vec<A>::size();
  int64_t lane = 0;
  for (; lane + 4 * step <= lanes; lane += 4 * step) body.template operator()<4>(lane);
  for (; lane < lanes; lane += step) body.template operator()<1>(lane);
}

// One step of the online softmax over a tile: raises `maximum`, writes the probabilities relative to it, and
// brings `sum` up to date. `factor` is what sums over earlier tiles must be multiplied by.
template <typename T, typename A>
void softmax_tile(int64_t keys, int64_t lanes, const A* scores, T* probabilities, A* maximum, A* sum,
                  A* factor) {
  constexpr int64_t step = Vec<A>::size();
  for_lane_vectors<A>(lanes, [&]<int W>(int64_t lane) {
    Vec<A> highest[W], total[W];
    for (int w = 0; w < W; ++w) highest[w] = Vec<A>::loadu(maximum + lane + w * step);
    for (int64_t j = 0; j < keys; ++j) {
      const A* row = scores + j * lanes + lane;
      // clamp_min(a, b) is max(b, a) and keeps a where b is NaN: a NaN score shows in the sum instead.
      for (int w = 0; w < W; ++w) highest[w] = at::vec::clamp_min(highest[w], Vec<A>::loadu(row + w * step));
    }
    for (int w = 0; w < W; ++w) {
      exp(Vec<A>::loadu(maximum + lane + w * step) - highest[w]).store(factor + lane + w * step);
      highest[w].store(maximum + lane + w * step);
      total[w] = Vec<A>(A(0));
    }
    for (int64_t j = 0; j < keys; ++j) {
      const A* row = scores + j * lanes + lane;
      for (int w = 0; w < W; ++w) {
        const Vec<A> e = exp(Vec<A>::loadu(row + w * step) - highest[w]);
        total[w] = total[w] + e;
        store(probabilities + j * lanes + lane + w * step, e, Full{});
      }
    }
    for (int w = 0; w < W; ++w) {
      A* s = sum + lane + w * step;
      at::vec::fmadd(Vec<A>::loadu(s), Vec<A>::loadu(factor + lane + w * step), total[w]).store(s);
    }
  });
}

template <typename T, typename A = Acc<T>>
struct ForwardScratch {
  static constexpr bool kSeparate = !std::is_same_v<T, A>;
  Scratch<T> compact, query, rounded;
  Scratch<A> scores, output, maximum, sum, factor;
  Scratch<int32_t> positions;

  ForwardScratch(const AttentionProblem& p, int64_t lanes)
      : compact(lanes * p.key_dim),
        query(lanes * p.key_dim),
        rounded(kSeparate ? kKeys * lanes : 0),
        scores(kKeys * lanes),
        output(lanes * p.value_dim),
        maximum(lanes),
        sum(lanes),
        factor(lanes),
        positions(lanes) {}

  // float and double probabilities replace the scores.
  T* probabilities() {
    if constexpr (kSeparate)
      return rounded.get();
    else
      return scores.get();
  }
};

template <typename T, typename A = Acc<T>>
void forward_block(const AttentionProblem& p, const QueryBlock& block, int64_t key_head,
                   ForwardScratch<T>& s) {
  const Lanes lanes(p, block, key_head);
  const Rows<T> key = rows_of<T>(p.key, p.key_strides, block.sequence, key_head);
  const Rows<T> value = rows_of<T>(p.value, p.value_strides, block.sequence, key_head);
  A *maximum = s.maximum.get(), *sum = s.sum.get(), *factor = s.factor.get(), *output = s.output.get();
  gather(lanes, static_cast<const T*>(p.query), p.key_dim, s.compact.get());
  transpose(lanes.padded, p.key_dim, s.compact.get(), s.query.get());
  lane_positions(p, block, lanes, s.positions.get());
  for (int64_t lane = 0; lane < lanes.padded; ++lane) {
    maximum[lane] = std::numeric_limits<A>::lowest();  // not −∞: −∞ − (−∞) is NaN
    sum[lane] = 0;
  }

  for (int64_t begin = 0; begin <= block.last; begin += kKeys) {
    const Tile tile(block, begin);
    score_tile(p, block, lanes, key, tile, s.query.get(), s.positions.get(), s.scores.get());
    softmax_tile(tile.keys, lanes.padded, s.scores.get(), s.probabilities(), maximum, sum, factor);
    if (begin > 0) {
      for (int64_t lane = 0; lane < lanes.count; ++lane) {
        A* row = output + lane * p.value_dim;
        if (factor[lane] == A(1)) continue;
        for (int64_t d = 0; d < p.value_dim; ++d) row[d] *= factor[lane];
      }
    }
    cpu::gemm(true, false, lanes.padded, p.value_dim, tile.keys, A(1), s.probabilities(), lanes.padded,
              value.data + tile.begin * value.stride, value.stride, A(begin > 0), output, p.value_dim);
  }

  for (int64_t lane = 0; lane < lanes.count; ++lane) {
    const Vec<A> inverse(A(1) / sum[lane]);
    const A* from = output + lane * p.value_dim;
    T* to = static_cast<T*>(p.output) + lanes.index(lane) * p.value_dim;
    for_vectors<A>(p.value_dim,
                   [&](int64_t d, auto part) { store(to + d, load(from + d, part) * inverse, part); });
    if (p.logsumexp != nullptr) {
      static_cast<A*>(p.logsumexp)[lanes.index(lane)] = maximum[lane] + std::log(sum[lane]);
    }
  }
}

// From scores and dP = dO·Vᵀ of a tile: P = e^{scores − logsumexp} and dS = P ⊙ (dP − δ).
template <typename T, typename A>
void gradient_tile(int64_t keys, int64_t lanes, const A* scores, const A* probability_grad,
                   const A* logsumexp, const A* delta, T* probabilities, T* score_grad) {
  constexpr int64_t step = Vec<A>::size();
  for_lane_vectors<A>(lanes, [&]<int W>(int64_t lane) {
    Vec<A> offset[W], shift[W];
    for (int w = 0; w < W; ++w) {
      offset[w] = Vec<A>::loadu(logsumexp + lane + w * step);
      shift[w] = Vec<A>::loadu(delta + lane + w * step);
    }
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t at = j * lanes + lane;
      for (int w = 0; w < W; ++w) {
        const Vec<A> e = exp(Vec<A>::loadu(scores + at + w * step) - offset[w]);
        const Vec<A> g = e * (Vec<A>::loadu(probability_grad + at + w * step) - shift[w]);
        store(probabilities + at + w * step, e, Full{});
        store(score_grad + at + w * step, g, Full{});
      }
    }
  });
}

template <typename T, typename A = Acc<T>>
struct BackwardScratch {
  static constexpr bool kSeparate = !std::is_same_v<T, A>;
  Scratch<T> query, query_transposed, grad, grad_transposed, rounded;
  Scratch<A> scores, probability_grad, query_grad, logsumexp, delta;
  Scratch<int32_t> positions;

  BackwardScratch(const AttentionProblem& p, int64_t lanes)
      : query(lanes * p.key_dim),
        query_transposed(lanes * p.key_dim),
        grad(lanes * p.value_dim),
        grad_transposed(lanes * p.value_dim),
        rounded(kSeparate ? 2 * kKeys * lanes : 0),
        scores(kKeys * lanes),
        probability_grad(kKeys * lanes),
        query_grad(lanes * p.key_dim),
        logsumexp(lanes),
        delta(lanes),
        positions(lanes) {}

  T* probabilities() {
    if constexpr (kSeparate)
      return rounded.get();
    else
      return scores.get();
  }
  T* score_grad(int64_t lanes) {
    if constexpr (kSeparate)
      return rounded.get() + kKeys * lanes;
    else
      return probability_grad.get();
  }
};

// Writes the query gradients of one block and adds its share to key_grad [keys, Dk] and value_grad [keys,
// Dv].
template <typename T, typename A = Acc<T>>
void backward_block(const AttentionProblem& p, const QueryBlock& block, int64_t key_head, A* key_grad,
                    A* value_grad, BackwardScratch<T>& s) {
  const Lanes lanes(p, block, key_head);
  const Rows<T> key = rows_of<T>(p.key, p.key_strides, block.sequence, key_head);
  const Rows<T> value = rows_of<T>(p.value, p.value_strides, block.sequence, key_head);
  const int64_t padded = lanes.padded, key_dim = p.key_dim, value_dim = p.value_dim;
  gather(lanes, static_cast<const T*>(p.query), key_dim, s.query.get());
  transpose(padded, key_dim, s.query.get(), s.query_transposed.get());
  gather(lanes, static_cast<const T*>(p.output_grad), value_dim, s.grad.get());
  transpose(padded, value_dim, s.grad.get(), s.grad_transposed.get());
  lane_positions(p, block, lanes, s.positions.get());
  for (int64_t lane = 0; lane < padded; ++lane) {
    A delta = 0, logsumexp = 0;
    if (lane < lanes.count) {
      const T* output = static_cast<const T*>(p.output) + lanes.index(lane) * value_dim;
      const T* grad = s.grad.get() + lane * value_dim;
      Vec<A> total(A(0));
      for_vectors<A>(value_dim, [&](int64_t d, auto part) {
        total = at::vec::fmadd(load(output + d, part), load(grad + d, part), total);
      });
      delta = oryx::ORYX_CPU_ISA::sum(total);
      logsumexp = static_cast<const A*>(p.logsumexp)[lanes.index(lane)];
    }
    s.delta.get()[lane] = delta;
    s.logsumexp.get()[lane] = logsumexp;
  }

  T *probabilities = s.probabilities(), *score_grad = s.score_grad(padded);
  for (int64_t begin = 0; begin <= block.last; begin += kKeys) {
    const Tile tile(block, begin);
    score_tile(p, block, lanes, key, tile, s.query_transposed.get(), s.positions.get(), s.scores.get());
    cpu::gemm(false, false, tile.keys, padded, value_dim, A(1), value.data + tile.begin * value.stride,
              value.stride, s.grad_transposed.get(), padded, A(0), s.probability_grad.get(), padded);
    gradient_tile(tile.keys, padded, s.scores.get(), s.probability_grad.get(), s.logsumexp.get(),
                  s.delta.get(), probabilities, score_grad);
    cpu::gemm(false, false, tile.keys, value_dim, padded, A(1), probabilities, padded, s.grad.get(),
              value_dim, A(1), value_grad + tile.begin * value_dim, value_dim);
    cpu::gemm(false, false, tile.keys, key_dim, padded, A(p.scale), score_grad, padded, s.query.get(),
              key_dim, A(1), key_grad + tile.begin * key_dim, key_dim);
    cpu::gemm(true, false, padded, key_dim, tile.keys, A(p.scale), score_grad, padded,
              key.data + tile.begin * key.stride, key.stride, A(begin > 0), s.query_grad.get(), key_dim);
  }
  for (int64_t lane = 0; lane < lanes.count; ++lane) {
    const A* from = s.query_grad.get() + lane * key_dim;
    T* to = static_cast<T*>(p.query_grad) + lanes.index(lane) * key_dim;
    for_vectors<A>(key_dim, [&](int64_t d, auto part) { store(to + d, load(from + d, part), part); });
  }
}

// Rounds [keys, dim] sums of one sequence and key head into a gradient [B, S, Hk, dim]; later rows become
// zero.
template <typename T, typename A>
void store_key_rows(const AttentionProblem& p, int64_t sequence, int64_t key_head, int64_t keys, int64_t dim,
                    const A* from, void* gradient) {
  T* to = static_cast<T*>(gradient) + (sequence * p.capacity * p.key_heads + key_head) * dim;
  const int64_t stride = p.key_heads * dim;
  for (int64_t j = 0; j < keys; ++j) {
    for_vectors<A>(
        dim, [&](int64_t d, auto part) { store(to + j * stride + d, load(from + j * dim + d, part), part); });
  }
  for (int64_t j = keys; j < p.capacity; ++j)
    std::memset(static_cast<void*>(to + j * stride), 0, dim * sizeof(T));
}

template <typename Task, typename Lane>
int64_t largest(const Task* tasks, int64_t count, Lane lanes) {
  int64_t result = kLaneStep;
  for (int64_t i = 0; i < count; ++i) result = std::max(result, lanes(tasks[i]));
  return result;
}

}  // namespace

void attention_forward(const AttentionProblem& p, const ForwardTask* tasks, int64_t count, Next& next) {
  dispatch(p.dtype, [&]<typename T>() {
    const int64_t lanes =
        largest(tasks, count, [&](const ForwardTask& t) { return Lanes(p, t.block, t.key_head).padded; });
    ForwardScratch<T> scratch(p, lanes);
    for (int64_t i = next++; i < count; i = next++)
      forward_block<T>(p, tasks[i].block, tasks[i].key_head, scratch);
  });
}

void attention_backward(const AttentionProblem& p, const BackwardTask* tasks, int64_t count, Next& next) {
  dispatch(p.dtype, [&]<typename T>() {
    using A = Acc<T>;
    int64_t lanes = kLaneStep, keys = 0;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t b = 0; b < tasks[i].count; ++b) {
        lanes = std::max(lanes, Lanes(p, tasks[i].blocks[b], 0).padded);
      }
      if (tasks[i].partial == nullptr) keys = std::max(keys, tasks[i].keys);
    }
    BackwardScratch<T> scratch(p, lanes);
    Scratch<A> own(keys * (p.key_dim + p.value_dim));
    for (int64_t i = next++; i < count; i = next++) {
      const BackwardTask& task = tasks[i];
      A* key_grad = task.partial == nullptr ? own.get() : static_cast<A*>(task.partial);
      A* value_grad = key_grad + task.keys * p.key_dim;
      std::memset(key_grad, 0, task.keys * (p.key_dim + p.value_dim) * sizeof(A));
      for (int64_t b = 0; b < task.count; b += task.stride) {
        backward_block<T>(p, task.blocks[b], task.key_head, key_grad, value_grad, scratch);
      }
      if (task.partial == nullptr) {
        store_key_rows<T>(p, task.sequence, task.key_head, task.keys, p.key_dim, key_grad, p.key_grad);
        store_key_rows<T>(p, task.sequence, task.key_head, task.keys, p.value_dim, value_grad, p.value_grad);
      }
    }
  });
}

void attention_reduce(const AttentionProblem& p, const ReduceTask* tasks, int64_t count, Next& next) {
  dispatch(p.dtype, [&]<typename T>() {
    using A = Acc<T>;
    for (int64_t i = next++; i < count; i = next++) {
      const ReduceTask& task = tasks[i];
      const int64_t size = task.keys * (p.key_dim + p.value_dim);
      Scratch<A> total(size);
      std::memcpy(total.get(), task.partials, size * sizeof(A));
      for (int64_t slot = 1; slot < task.slots; ++slot) {
        const A* from = static_cast<const A*>(task.partials) + slot * size;
        for (int64_t e = 0; e < size; ++e) total.get()[e] += from[e];
      }
      store_key_rows<T>(p, task.sequence, task.key_head, task.keys, p.key_dim, total.get(), p.key_grad);
      store_key_rows<T>(p, task.sequence, task.key_head, task.keys, p.value_dim,
                        total.get() + task.keys * p.key_dim, p.value_grad);
    }
  });
}

}  // namespace oryx::ORYX_CPU_ISA
