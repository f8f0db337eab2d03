#include "operators/attention/attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "base/shapes.h"
#include "operators/attention/attention_cpu.h"
#include "operators/attention/attention_cuda.h"
#include "operators/device/runtime.h"

namespace oryx::operators {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

constexpr int64_t kFewestLanes = 16;  // of a block: query rows · heads of a group
constexpr int64_t kDecodeKeys = 128;  // positions of one decode task

// The most lanes of a block. Few waste less at the diagonal; more read and repack a tile of keys less often,
// which the bfloat16 product of the BLAS does at every call.
int64_t most_lanes(at::ScalarType dtype) { return dtype == at::kBFloat16 ? 64 : 32; }

void check(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& spans) {
  constexpr auto who = "attention";
  expect_dimensions(who, "query [rows, query heads, key dim]", query, 3);
  expect_dimensions(who, "key [batch, capacity, key heads, key dim]", key, 4);
  expect_shape(who, "key [batch, capacity, key heads, key dim]", key, {-1, -1, -1, query.size(2)});
  expect_shape(who, "value [batch, capacity, key heads, value dim]", value,
               {key.size(0), key.size(1), key.size(2), -1});
  const auto dtype = query.scalar_type();
  expect(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16,
         "[attention] expected float32, float64 or bfloat16, got {}", c10::toString(dtype));
  expect(key.scalar_type() == dtype && value.scalar_type() == dtype,
         "[attention] expected query, key and value of one dtype, got {}, {} and {}", c10::toString(dtype),
         c10::toString(key.scalar_type()), c10::toString(value.scalar_type()));
  expect(key.size(2) > 0 && query.size(1) % key.size(2) == 0,
         "[attention] expected query heads that are a multiple of the {} key heads, got {}", key.size(2),
         query.size(1));
  expect_shape(who, "spans [spans, 3]", spans, {-1, 3});
  expect(spans.scalar_type() == at::kLong && spans.device().is_cpu(),
         "[attention] expected spans as int64 on the CPU, got {} on {}", c10::toString(spans.scalar_type()),
         spans.device().str());
  const auto rows = spans.accessor<int64_t, 2>();
  int64_t total = 0;
  for (int64_t i = 0; i < rows.size(0); ++i) {
    const int64_t sequence = rows[i][0], begin = rows[i][1], end = rows[i][2];
    expect(sequence >= 0 && sequence < key.size(0) && begin >= 0 && begin <= end && end <= key.size(1),
           "[attention] expected spans (sequence, begin, end) inside {} sequences of {} positions, got ({}, "
           "{}, {})",
           key.size(0), key.size(1), sequence, begin, end);
    total += end - begin;
  }
  expect(query.size(0) == total, "[attention] expected {} query rows (the spans' length), got {}", total,
         query.size(0));
}

// Who computes which rows: the packed rows in order, cut where the sequence changes.
class Plan {
 public:
  explicit Plan(const at::Tensor& spans, int64_t batch) : rows_of_sequence_(batch), keys_of_sequence_(batch) {
    const auto accessor = spans.accessor<int64_t, 2>();
    for (int64_t i = 0; i < accessor.size(0); ++i) {
      const int64_t sequence = accessor[i][0], begin = accessor[i][1], end = accessor[i][2];
      for (int64_t t = begin; t < end; ++t) positions_.push_back(static_cast<int32_t>(t));
      if (end == begin) continue;
      if (runs_.empty() || runs_.back().sequence != sequence) {
        runs_.push_back({sequence, static_cast<int64_t>(positions_.size()) - (end - begin), 0, 0, 0});
      }
      runs_.back().rows += end - begin;
      rows_of_sequence_[sequence] += end - begin;
      keys_of_sequence_[sequence] = std::max(keys_of_sequence_[sequence], end);
    }
  }

  const int32_t* positions() const { return positions_.data(); }
  // Rows that stand alone in their sequence: decoding.
  bool is_alone(const cpu::QueryBlock& run) const { return rows_of_sequence_[run.sequence] == 1; }
  const std::vector<cpu::QueryBlock>& runs() const { return runs_; }
  int64_t keys(int64_t sequence) const { return keys_of_sequence_[sequence]; }

  // The runs in blocks of at most `rows`, less those that stand alone unless `everything`.
  std::vector<cpu::QueryBlock> blocks(int64_t rows, bool everything) const {
    std::vector<cpu::QueryBlock> result;
    for (const cpu::QueryBlock& run : runs_) {
      if (!everything && is_alone(run)) continue;
      for (int64_t row = run.row; row < run.row + run.rows; row += rows) {
        const int64_t count = std::min(rows, run.row + run.rows - row);
        const auto first = positions_.begin() + row;
        const auto [low, high] = std::minmax_element(first, first + count);
        result.push_back({run.sequence, row, count, *low, *high});
      }
    }
    return result;
  }

 private:
  std::vector<int32_t> positions_;
  std::vector<cpu::QueryBlock> runs_;
  std::vector<int64_t> rows_of_sequence_, keys_of_sequence_;
};

// Runs a worker of attention_cpu.h on every thread until the tasks are done.
template <typename Task, typename Kernel>
void run(const cpu::AttentionProblem& problem, const std::vector<Task>& tasks, Kernel kernel) {
  const int64_t count = static_cast<int64_t>(tasks.size());
  if (count == 0) return;
  cpu::Next next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), count), 1,
                   [&](int64_t, int64_t) { kernel(problem, tasks.data(), count, next); });
}

cpu::AttentionProblem describe(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               double scale, const Plan& plan) {
  cpu::AttentionProblem p{};
  p.dtype = query.scalar_type();
  p.query_heads = query.size(1), p.key_heads = key.size(2);
  p.key_dim = key.size(3), p.value_dim = value.size(3), p.capacity = key.size(1);
  p.scale = scale;
  p.positions = plan.positions();
  p.query = query.const_data_ptr(), p.key = key.const_data_ptr(), p.value = value.const_data_ptr();
  for (int i = 0; i < 3; ++i) p.key_strides[i] = key.stride(i), p.value_strides[i] = value.stride(i);
  return p;
}

at::Tensor last_contiguous(const at::Tensor& x) {
  return x.size(-1) > 1 && x.stride(-1) != 1 ? x.contiguous() : x;
}

// Rows of a forward block: smaller blocks when threads would idle.
int64_t rows_per_block(const Plan& plan, at::ScalarType dtype, int64_t group, int64_t key_heads) {
  int64_t lanes = most_lanes(dtype);
  const auto rows = [&] { return std::max<int64_t>(1, lanes / group); };
  const int64_t wanted = 2 * at::get_num_threads();
  while (lanes > kFewestLanes &&
         static_cast<int64_t>(plan.blocks(rows(), false).size()) * key_heads < wanted) {
    lanes /= 2;
  }
  return rows();
}

void decode(const cpu::AttentionProblem& problem, const Plan& plan, const at::TensorOptions& accumulate) {
  std::vector<cpu::DecodeTask> tasks;
  std::vector<int64_t> first;
  for (const cpu::QueryBlock& run : plan.runs()) {
    if (!plan.is_alone(run)) continue;
    first.push_back(static_cast<int64_t>(tasks.size()));
    const int64_t keys = plan.positions()[run.row] + 1;
    for (int64_t begin = 0; begin < keys; begin += kDecodeKeys) {
      tasks.push_back({run.sequence, run.row, begin, std::min(begin + kDecodeKeys, keys), nullptr});
    }
  }
  if (tasks.empty()) return;
  const int64_t count = static_cast<int64_t>(tasks.size());
  const at::Tensor partials = at::empty({count, problem.query_heads * (problem.value_dim + 2)}, accumulate);
  for (int64_t i = 0; i < count; ++i) tasks[i].partial = partials[i].data_ptr();
  run(problem, tasks, cpu::attention_decode);
  for (size_t i = 0; i < first.size(); ++i) {
    const int64_t end = i + 1 < first.size() ? first[i + 1] : count;
    cpu::attention_merge(problem, tasks[first[i]].row, tasks[first[i]].partial, end - first[i]);
  }
}

// Output and, where backward will follow, log-sum-exp [N, Hq].
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query, const at::Tensor& key,
                                           const at::Tensor& value, const at::Tensor& spans, double scale,
                                           bool keep_logsumexp) {
  const Plan plan(spans, key.size(0));
  const auto accumulate =
      query.options().dtype(query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const at::Tensor output = at::empty({query.size(0), query.size(1), value.size(3)}, query.options());
  const at::Tensor logsumexp =
      keep_logsumexp ? at::empty({query.size(0), query.size(1)}, accumulate) : at::Tensor();
  cpu::AttentionProblem problem = describe(query, key, value, scale, plan);
  problem.output = output.data_ptr();
  problem.logsumexp = keep_logsumexp ? logsumexp.data_ptr() : nullptr;

  decode(problem, plan, accumulate);
  std::vector<cpu::ForwardTask> tasks;
  for (const cpu::QueryBlock& block : plan.blocks(
           rows_per_block(plan, problem.dtype, problem.query_heads / problem.key_heads, problem.key_heads),
           false)) {
    for (int64_t head = 0; head < problem.key_heads; ++head) tasks.push_back({block, head});
  }
  // Longest first, so that the threads end together.
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const auto& a, const auto& b) { return a.block.last > b.block.last; });
  run(problem, tasks, cpu::attention_forward);
  return {output, logsumexp};
}

variable_list backward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                       const at::Tensor& output, const at::Tensor& logsumexp, const at::Tensor& output_grad,
                       const at::Tensor& spans, double scale) {
  const Plan plan(spans, key.size(0));
  const int64_t batch = key.size(0), key_heads = key.size(2), size = key.size(3) + value.size(3);
  const at::Tensor query_grad = at::empty(query.sizes(), query.options());
  const at::Tensor key_grad = at::empty(key.sizes(), query.options());
  const at::Tensor value_grad = at::empty(value.sizes(), query.options());
  cpu::AttentionProblem problem = describe(query, key, value, scale, plan);
  problem.output = output.data_ptr(), problem.logsumexp = logsumexp.data_ptr();
  problem.output_grad = output_grad.const_data_ptr();
  problem.query_grad = query_grad.data_ptr();
  problem.key_grad = key_grad.data_ptr(), problem.value_grad = value_grad.data_ptr();

  std::vector<cpu::QueryBlock> blocks =
      plan.blocks(std::max<int64_t>(1, most_lanes(problem.dtype) / (problem.query_heads / key_heads)), true);
  std::stable_sort(blocks.begin(), blocks.end(),
                   [](const auto& a, const auto& b) { return a.sequence < b.sequence; });
  // One task per sequence and key head; several, each with sums of its own, when threads would idle.
  const int64_t slots =
      std::max<int64_t>(1, (at::get_num_threads() + batch * key_heads - 1) / (batch * key_heads));
  std::vector<cpu::BackwardTask> tasks;
  std::vector<cpu::ReduceTask> reductions;
  std::vector<int64_t> cost;
  at::Tensor partials;
  int64_t keys_total = 0;
  for (int64_t sequence = 0; sequence < batch; ++sequence) keys_total += plan.keys(sequence);
  if (slots > 1) partials = at::empty({slots * key_heads * keys_total * size}, logsumexp.options());
  char* next_partial = slots > 1 ? static_cast<char*>(partials.data_ptr()) : nullptr;
  auto first = blocks.begin();
  for (int64_t sequence = 0; sequence < batch; ++sequence) {
    const auto end = std::find_if(first, blocks.end(), [&](const auto& b) { return b.sequence != sequence; });
    const int64_t count = end - first, keys = plan.keys(sequence);
    for (int64_t head = 0; head < key_heads; ++head) {
      if (slots > 1) reductions.push_back({sequence, head, slots, keys, next_partial});
      for (int64_t slot = 0; slot < slots; ++slot) {
        const int64_t own = std::min(slot, count);
        tasks.push_back({sequence, head, blocks.data() + (first - blocks.begin()) + own, count - own, slots,
                         keys, next_partial});
        if (slots > 1) next_partial += keys * size * logsumexp.element_size();
      }
    }
    first = end;
  }
  const auto work = [](const cpu::BackwardTask& task) {
    int64_t sum = 0;
    for (int64_t i = 0; i < task.count; i += task.stride) sum += task.blocks[i].last;
    return sum;
  };
  std::stable_sort(tasks.begin(), tasks.end(),
                   [&](const auto& a, const auto& b) { return work(a) > work(b); });
  run(problem, tasks, cpu::attention_backward);
  run(problem, reductions, cpu::attention_reduce);
  return {query_grad, key_grad, value_grad};
}

struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static Variable forward(AutogradContext* context, const at::Tensor& query, const at::Tensor& key,
                          const at::Tensor& value, const at::Tensor& spans, double scale) {
    auto [output, logsumexp] = operators::forward(query, key, value, spans, scale, true);
    context->save_for_backward({query, key, value, output, logsumexp, spans});
    context->saved_data["scale"] = scale;
    return output;
  }
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    variable_list result =
        operators::backward(saved[0], saved[1], saved[2], saved[3], saved[4], grads[0].contiguous(), saved[5],
                            context->saved_data["scale"].toDouble());
    result.resize(5);
    return result;
  }
};

}  // namespace

at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const at::Tensor& spans, double scale) {
  check(query, key, value, spans);
  if (cuda::serves(query)) return attention_cuda(query, key, value, spans, scale);
  if (!query.device().is_cpu()) return attention_composed(query, key, value, spans, scale);
  const at::Tensor q = query.contiguous(), k = last_contiguous(key), v = last_contiguous(value);
  const bool needs_grad =
      at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  if (needs_grad) return AttentionFunction::apply(q, k, v, spans, scale);
  return std::get<0>(forward(q, k, v, spans, scale, false));
}

TORCH_LIBRARY_FRAGMENT(oryx, m) {
  m.def("attention(Tensor query, Tensor key, Tensor value, Tensor spans, float scale) -> Tensor", &attention);
}

}  // namespace oryx::operators
