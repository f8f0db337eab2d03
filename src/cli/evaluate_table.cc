#include "cli/evaluate_table.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <vector>

#include "base/error.h"

namespace oryx::cli {

namespace {

constexpr int kTaskWidth = 20, kMetricWidth = 16, kLeastColumn = 14;

struct Row {
  std::string task, metric;
  std::vector<std::string> cells;  // one a run
};

std::optional<double> number_in(const Table& table, std::string_view key) {
  const Value* value = table.find(key);
  if (!value) return std::nullopt;
  if (const auto* integer = value->as<int64_t>()) return static_cast<double>(*integer);
  if (const auto* number = value->as<double>()) return *number;
  return std::nullopt;
}

bool is_fraction(const std::string& metric) { return metric == "contains" || metric.starts_with("acc"); }

// "41.23 ± 0.70"; "-" where there is none, "inf" for what JSON cannot hold.
std::string metric_text(const std::string& name, const Table& metric) {
  const double scale = is_fraction(name) ? 100 : 1;
  const std::optional<double> value = number_in(metric, "value"), error = number_in(metric, "standard_error");
  if (!value) return "inf";
  const auto text = [&](double number) {
    return scale == 100 || std::abs(number) < 1e4 ? fmt::format("{:.2f}", number * scale)
                                                  : fmt::format("{:.3g}", number);
  };
  return error ? fmt::format("{} ± {}", text(*value), text(*error)) : text(*value);
}

std::string bytes_text(double bytes) {
  for (const char* unit : {"B", "kB", "MB"}) {
    if (bytes < 1000) return fmt::format("{:.3g} {}", bytes, unit);
    bytes /= 1000;
  }
  return fmt::format("{:.3g} GB", bytes);
}

size_t width_of(const std::string& text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

std::string right_aligned(const std::string& text, size_t width) {
  const size_t size = width_of(text);
  return std::string(size < width ? width - size : 0, ' ') + text;
}

class TableMaker {
 public:
  explicit TableMaker(const Array& runs) {
    for (const Value& run : runs) runs_.push_back(run.as<Table>());
    // Tasks in the order in which they first appear.
    for (const Table* run : runs_) {
      for (const Entry& task : section(*run, "tasks").entries) {
        if (std::find(tasks_.begin(), tasks_.end(), task.key) == tasks_.end()) tasks_.push_back(task.key);
      }
    }
  }

  std::string text(int columns) {
    for (const std::string& task : tasks_) add_metrics(task);
    rows_.push_back({});
    for (const char* average : {"language", "retrieval", "needle"}) add_average(average);
    add_sum(
        "tokens in attention", [](const Table& task) { return number_in(task, "attention_tokens"); },
        [](double attention, double tokens, double) {
          return fmt::format("{:.1f} %", 100 * attention / tokens);
        });
    add_sum(
        "operations", [](const Table& task) { return number_in(task, "flops"); },
        [](double flops, double, double) { return fmt::format("{:.3g}", flops); });
    add_sum(
        "state, largest", [](const Table& task) { return number_in(task, "state_bytes"); },
        [](double, double, double largest) { return bytes_text(largest); });
    add_sum(
        "tokens a second", [](const Table& task) { return number_in(task, "tokens_run"); },
        [this](double run, double, double) { return fmt::format("{:.0f}", run / seconds_); });
    return laid_out(columns);
  }

 private:
  const Table* task_of(const Table& run, const std::string& task) const {
    const Value* value = section(run, "tasks").find(task);
    return value ? value->as<Table>() : nullptr;
  }

  void add_metrics(const std::string& task) {
    std::vector<std::string> names;
    for (const Table* run : runs_) {
      if (const Table* entry = task_of(*run, task); entry && names.empty()) {
        for (const Entry& metric : section(*entry, "metrics").entries) names.push_back(metric.key);
      }
    }
    for (size_t n = 0; n < names.size(); ++n) {
      Row row{n == 0 ? task : "", names[n], {}};
      for (const Table* run : runs_) {
        const Table* entry = task_of(*run, task);
        row.cells.push_back(entry ? metric_text(names[n], section(section(*entry, "metrics"), names[n]))
                                  : "-");
      }
      rows_.push_back(std::move(row));
    }
  }

  void add_average(const std::string& name) {
    Row row{"average", name, {}};
    bool any = false;
    for (const Table* run : runs_) {
      const std::optional<double> value = number_in(section(*run, "averages"), name);
      row.cells.push_back(value ? fmt::format("{:.2f}", *value * 100) : "-");
      any = any || value;
    }
    if (any) rows_.push_back(std::move(row));
  }

  // Over the tasks of each run: the sum of `part`, of tokens, and the largest part.
  void add_sum(const std::string& name, const std::function<std::optional<double>(const Table&)>& part,
               const std::function<std::string(double sum, double tokens, double largest)>& show) {
    Row row{name, "", {}};
    for (const Table* run : runs_) {
      double sum = 0, tokens = 0, largest = 0;
      seconds_ = 0;
      for (const Entry& task : section(*run, "tasks").entries) {
        const double value = part(*task.value.as<Table>()).value_or(0);
        sum += value;
        largest = std::max(largest, value);
        tokens += number_in(*task.value.as<Table>(), "tokens").value_or(0);
        seconds_ += number_in(*task.value.as<Table>(), "seconds").value_or(0);
      }
      row.cells.push_back(tokens > 0 ? show(sum, tokens, largest) : "-");
    }
    rows_.push_back(std::move(row));
  }

  std::string laid_out(int columns) const {
    std::vector<size_t> widths;
    for (size_t r = 0; r < runs_.size(); ++r) {
      size_t width = std::max<size_t>(kLeastColumn, width_of(schedule(r)));
      for (const Row& row : rows_) {
        if (!row.cells.empty()) width = std::max(width, width_of(row.cells[r]));
      }
      widths.push_back(width);
    }
    std::string text;
    for (size_t begin = 0; begin < runs_.size();) {
      size_t end = begin, used = kTaskWidth + kMetricWidth;
      while (end < runs_.size() && (end == begin || used + 2 + widths[end] <= static_cast<size_t>(columns))) {
        used += 2 + widths[end++];
      }
      if (begin > 0) text += "\n";
      text += fmt::format("{:<{}}{:<{}}", "task", kTaskWidth, "metric", kMetricWidth);
      for (size_t r = begin; r < end; ++r) text += "  " + right_aligned(schedule(r), widths[r]);
      text += "\n";
      for (const Row& row : rows_) {
        if (!row.cells.empty()) {
          text += fmt::format("{:<{}}{:<{}}", row.task, kTaskWidth, row.metric, kMetricWidth);
          for (size_t r = begin; r < end; ++r) text += "  " + right_aligned(row.cells[r], widths[r]);
        }
        text += "\n";
      }
      begin = end;
    }
    return text;
  }

  std::string schedule(size_t run) const { return *runs_[run]->find("schedule")->as<std::string>(); }

  std::vector<const Table*> runs_;
  std::vector<std::string> tasks_;
  std::vector<Row> rows_;
  double seconds_ = 0;
};

}  // namespace

std::string evaluation_table(const Table& results, int columns) {
  return TableMaker(*results.find("runs")->as<Array>()).text(columns);
}

}  // namespace oryx::cli
