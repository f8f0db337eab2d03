// Attention of one query against a long cache: reads every key and value once, in memory order (all heads of
// a position together), for any number of query heads. Tasks are ranges of positions; attention_merge joins
// them.
#include "operators/attention/attention_cpu.h"

#include <cmath>
#include <limits>

#include "operators/cpu/vectors.h"

namespace oryx::ORYX_CPU_ISA {

namespace {

using cpu::AttentionProblem;
using cpu::DecodeTask;
using cpu::Next;

constexpr int kStreams = 4;  // positions read side by side
constexpr int kAhead = 8;    // positions fetched ahead, into the second-level cache

// Asks for the h-th of `heads` shares of the positions kAhead … kAhead + Keys after `rows`, where a
// position's heads lie side by side. In memory order: alone, the order of the reads (a bit of each of several
// rows) hides from the hardware that this is one stream. (Assembly: GCC 12 drops a loop that only holds its
// prefetch.)
template <int Keys, typename T>
inline void fetch_ahead(const T* rows, int64_t h, int64_t dim, const int64_t* strides) {
  if (strides[2] != dim) return;
  const char* share = reinterpret_cast<const char*>(rows + kAhead * strides[1] + h * Keys * dim);
  const int64_t bytes = Keys * dim * static_cast<int64_t>(sizeof(T));
  for (int64_t byte = 0; byte < bytes; byte += 64) asm volatile("prefetcht1 %0" : : "m"(share[byte]));
}

// scores[g · ld + i] = query[g]·key_i for `Keys` neighbouring positions and every head of the group.
template <int Keys, typename T, typename A>
inline void score_keys(int64_t group, int64_t dim, const A* query, const T* key, int64_t stride, A* scores,
                       int64_t ld) {
  for (int64_t g = 0; g < group; ++g) {
    Vec<A> total[Keys];
    for (int i = 0; i < Keys; ++i) total[i] = Vec<A>(A(0));
    for_vectors<A>(dim, [&](int64_t d, auto part) {
      const Vec<A> q = load(query + g * dim + d, part);
      for (int i = 0; i < Keys; ++i) total[i] = at::vec::fmadd(q, load(key + i * stride + d, part), total[i]);
    });
    for (int i = 0; i < Keys; ++i) scores[g * ld + i] = sum(total[i]);
  }
}

// output[g] += Σ_i weights[g · ld + i] value_i.
template <int Keys, typename T, typename A>
inline void add_values(int64_t group, int64_t dim, const A* weights, int64_t ld, const T* value,
                       int64_t stride, A* output, int64_t output_stride) {
  for (int64_t g = 0; g < group; ++g) {
    Vec<A> weight[Keys];
    for (int i = 0; i < Keys; ++i) weight[i] = Vec<A>(weights[g * ld + i]);
    A* row = output + g * output_stride;
    for_vectors<A>(dim, [&](int64_t d, auto part) {
      Vec<A> total = load(row + d, part);
      for (int i = 0; i < Keys; ++i)
        total = at::vec::fmadd(weight[i], load(value + i * stride + d, part), total);
      store(row + d, total, part);
    });
  }
}

// Calls body.operator()<Keys>(i) for all i in [0, n), kStreams at a time.
template <typename Body>
inline void for_keys(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kStreams <= n; i += kStreams) body.template operator()<kStreams>(i);
  for (; i < n; ++i) body.template operator()<1>(i);
}

template <typename T, typename A = Acc<T>>
void decode_range(const AttentionProblem& p, const DecodeTask& task, A* query, A* scores) {
  const int64_t keys = task.end - task.begin, group = p.query_heads / p.key_heads, size = p.value_dim + 2;
  const T* key =
      static_cast<const T*>(p.key) + task.sequence * p.key_strides[0] + task.begin * p.key_strides[1];
  const T* value =
      static_cast<const T*>(p.value) + task.sequence * p.value_strides[0] + task.begin * p.value_strides[1];
  const T* rows = static_cast<const T*>(p.query) + task.row * p.query_heads * p.key_dim;
  for_vectors<A>(p.query_heads * p.key_dim, [&](int64_t d, auto part) {
    store(query + d, load(rows + d, part) * Vec<A>(A(p.scale)), part);
  });

  for_keys(keys, [&]<int Keys>(int64_t i) {
    for (int64_t h = 0; h < p.key_heads; ++h) {
      const T* rows_of_head = key + i * p.key_strides[1] + h * p.key_strides[2];
      fetch_ahead<Keys>(key + i * p.key_strides[1], h, p.key_dim, p.key_strides);
      score_keys<Keys>(group, p.key_dim, query + h * group * p.key_dim, rows_of_head, p.key_strides[1],
                       scores + h * group * keys + i, keys);
    }
  });

  for (int64_t h = 0; h < p.query_heads; ++h) {
    A* row = scores + h * keys;
    A* partial = static_cast<A*>(task.partial) + h * size;
    A maximum = std::numeric_limits<A>::lowest();
    for (int64_t i = 0; i < keys; ++i) maximum = std::max(maximum, row[i]);
    Vec<A> total(A(0));
    for_vectors<A>(keys, [&](int64_t i, auto part) {
      const Vec<A> e = exp(load(row + i, part) - Vec<A>(maximum));
      store(row + i, e, part);
      total = total + load(row + i, part);  // read back: missing lanes count as zero
    });
    std::fill(partial, partial + p.value_dim, A(0));
    partial[p.value_dim] = maximum;
    partial[p.value_dim + 1] = sum(total);
  }

  for_keys(keys, [&]<int Keys>(int64_t i) {
    for (int64_t h = 0; h < p.key_heads; ++h) {
      const T* rows_of_head = value + i * p.value_strides[1] + h * p.value_strides[2];
      fetch_ahead<Keys>(value + i * p.value_strides[1], h, p.value_dim, p.value_strides);
      add_values<Keys>(group, p.value_dim, scores + h * group * keys + i, keys, rows_of_head,
                       p.value_strides[1], static_cast<A*>(task.partial) + h * group * size, size);
    }
  });
}

}  // namespace

void attention_decode(const AttentionProblem& p, const DecodeTask* tasks, int64_t count, Next& next) {
  dispatch(p.dtype, [&]<typename T>() {
    using A = Acc<T>;
    int64_t keys = 0;
    for (int64_t i = 0; i < count; ++i) keys = std::max(keys, tasks[i].end - tasks[i].begin);
    Scratch<A> query(p.query_heads * p.key_dim), scores(p.query_heads * keys);
    for (int64_t i = next++; i < count; i = next++) decode_range<T>(p, tasks[i], query.get(), scores.get());
  });
}

void attention_merge(const AttentionProblem& p, int64_t row, const void* partials, int64_t parts) {
  dispatch(p.dtype, [&]<typename T>() {
    using A = Acc<T>;
    const int64_t size = p.value_dim + 2, stride = p.query_heads * size;
    Scratch<A> scratch(p.value_dim);
    for (int64_t h = 0; h < p.query_heads; ++h) {
      const A* first = static_cast<const A*>(partials) + h * size;
      A* total = scratch.get();
      A maximum = first[p.value_dim], sum = 0;
      for (int64_t i = 1; i < parts; ++i) maximum = std::max(maximum, first[i * stride + p.value_dim]);
      std::fill(total, total + p.value_dim, A(0));
      for (int64_t i = 0; i < parts; ++i) {
        const A* part = first + i * stride;
        const A factor = std::exp(part[p.value_dim] - maximum);
        sum += factor * part[p.value_dim + 1];
        for (int64_t d = 0; d < p.value_dim; ++d) total[d] += factor * part[d];
      }
      T* to = static_cast<T*>(p.output) + (row * p.query_heads + h) * p.value_dim;
      const Vec<A> inverse(A(1) / sum);
      for_vectors<A>(p.value_dim,
                     [&](int64_t d, auto part) { store(to + d, load(total + d, part) * inverse, part); });
      if (p.logsumexp != nullptr) {
        static_cast<A*>(p.logsumexp)[row * p.query_heads + h] = maximum + std::log(sum);
      }
    }
  });
}

}  // namespace oryx::ORYX_CPU_ISA
