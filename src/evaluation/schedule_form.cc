#include "evaluation/schedule_form.h"

#include "base/error.h"

namespace oryx::evaluation {

using schedule::Mode;
using schedule::Schedule;

ScheduleForm ScheduleForm::parse(std::string_view text) {
  ScheduleForm form;
  form.text_ = text;
  if (form.is_split()) {
    form.split_at("query");  // throws where it is none
    return form;
  }
  if (form.needs_query()) {
    form.at(1);
    return form;
  }
  form.fixed_ = Schedule::parse(text);
  form.text_ = form.fixed_->text();
  return form;
}

ScheduleForm ScheduleForm::split_at(std::string_view start) const {
  const size_t arrow = text_.find(kArrow);
  if (arrow == std::string::npos) return *this;
  return parse(text_.substr(0, arrow) + "," + text_.substr(arrow + kArrow.size()) + "@" + std::string(start));
}

Schedule ScheduleForm::at(std::optional<int64_t> query) const {
  if (fixed_) return *fixed_;
  if (!query) fail_usage("schedule '{}' names a query, which this task does not have", text_);
  std::string text = text_;
  for (size_t at = 0; (at = text.find(kQuery, at)) != std::string::npos;) {
    text.replace(at, kQuery.size(), fmt::format("@{}", *query));
  }
  return Schedule::parse(text);
}

schedule::ModeSpans ScheduleForm::spans(int64_t length, std::optional<int64_t> query) const {
  return at(query).spans(length, length);
}

void ScheduleForm::expect_served_by(const model::ModelConfig& config) const {
  for (const Mode mode : {Mode::attention, Mode::linear}) {
    if (config.has_mode(mode)) continue;
    const bool named = text_.find(schedule::mode_name(mode)) != std::string::npos || text_.ends_with(')');
    if (named) {
      fail_usage("schedule '{}' asks for {}, which this model does not have", text_,
                 schedule::mode_name(mode));
    }
  }
}

}  // namespace oryx::evaluation
