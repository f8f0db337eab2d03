#include "schedule/schedule.h"

#include <algorithm>
#include <charconv>
#include <optional>

#include "base/error.h"
#include "base/random.h"
#include "schedule/chunks.h"

namespace oryx::schedule {
namespace {

constexpr int64_t kDefaultChunk = 128;
constexpr uint64_t kRandomStream = 0x7363686564756C65;  // "schedule"

std::string_view trim(std::string_view text) {
  constexpr std::string_view kBlanks = " \t\r\n";
  const size_t first = text.find_first_not_of(kBlanks);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kBlanks) - first + 1);
}

std::vector<std::string_view> split(std::string_view text) {
  std::vector<std::string_view> pieces;
  for (size_t begin = 0;;) {
    const size_t comma = text.find(',', begin);
    pieces.push_back(trim(text.substr(begin, comma - begin)));
    if (comma == std::string_view::npos) return pieces;
    begin = comma + 1;
  }
}

template <class Number>
std::optional<Number> parse_number(std::string_view text) {
  Number number{};
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc{} || stop != end) return std::nullopt;
  return number;
}

bool all_digits(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

}  // namespace

class ScheduleParser {
 public:
  explicit ScheduleParser(std::string_view text) : text_(trim(text)) {}

  Schedule parse() {
    if (text_.empty()) wrong("is empty", "modes such as linear,attention@97.5% or a form such as every(4)");
    Schedule schedule;
    if (text_.find('(') != std::string_view::npos) {
      parse_form(schedule);
    } else {
      parse_spans(schedule);
    }
    return schedule;
  }

 private:
  [[noreturn]] void wrong(std::string_view what, std::string_view expected) const {
    fail_usage("schedule \"{}\" {}; expected {}", text_, what, expected);
  }

  void parse_spans(Schedule& schedule) const {
    std::vector<Schedule::Span> spans;
    for (std::string_view piece : split(text_)) {
      const size_t at = piece.find('@');
      const Mode mode = parse_mode(trim(piece.substr(0, at)));
      const bool first = spans.empty();
      Schedule::Start start{Schedule::Start::Kind::index, 0, 1, "0"};
      if (at != std::string_view::npos) {
        start = parse_start(trim(piece.substr(at + 1)));
      } else if (!first) {
        wrong(fmt::format("has no start in \"{}\"", piece),
              fmt::format("{}@START for every span but the first", piece));
      }
      if (first && (start.kind != Schedule::Start::Kind::index || start.value != 0)) {
        wrong(fmt::format("starts at {}", start.text), "the first span at token 0");
      }
      std::string text(mode_name(mode));
      if (!first) text += "@" + start.text;
      schedule.text_ += (first ? "" : ",") + text;
      spans.push_back({mode, std::move(start), std::move(text)});
      if (!first) expect_increasing(spans[spans.size() - 2], spans.back());
    }
    schedule.form_ = std::move(spans);
  }

  Mode parse_mode(std::string_view name) const {
    for (Mode mode : {Mode::attention, Mode::linear}) {
      if (name == mode_name(mode)) return mode;
    }
    wrong(fmt::format("has no mode in \"{}\"", name), "attention or linear");
  }

  Schedule::Start parse_start(std::string_view text) const {
    using Kind = Schedule::Start::Kind;
    if (text == "generation") return {Kind::generation, 0, 1, std::string(text)};
    if (text.ends_with('%')) return parse_percent(text);
    const bool negative = text.starts_with('-');
    const std::string_view digits = text.substr(negative ? 1 : 0);
    const auto number = all_digits(digits) ? parse_number<int64_t>(digits) : std::nullopt;
    if (!number || (negative && *number == 0)) {
      wrong(fmt::format("cannot start a span at \"{}\"", text),
            "a token index, a percent such as 97.5%, -N (N tokens before the end) or generation");
    }
    const int64_t value = negative ? -*number : *number;
    return {negative ? Kind::before_end : Kind::index, value, 1, std::to_string(value)};
  }

  // Percents are kept as fractions of integers: rounding down is exact.
  Schedule::Start parse_percent(std::string_view text) const {
    const std::string_view number = trim(text.substr(0, text.size() - 1));
    const size_t point = std::min(number.find('.'), number.size());
    const std::string_view whole = number.substr(0, point);
    const std::string_view decimals =
        point < number.size() ? number.substr(point + 1) : std::string_view("0");
    int64_t scale = 100;
    if (all_digits(whole) && all_digits(decimals) && whole.size() <= 3 && decimals.size() <= 12) {
      int64_t value = *parse_number<int64_t>(whole);
      for (char digit : decimals) {
        value = value * 10 + (digit - '0');
        scale *= 10;
      }
      if (value <= scale) return {Schedule::Start::Kind::percent, value, scale, fmt::format("{}%", number)};
    }
    wrong(fmt::format("cannot start a span at \"{}\"", text),
          "a percent from 0% to 100% with at most 12 decimals");
  }

  // What can never increase, whatever the length, fails at once; the rest when the length is known.
  void expect_increasing(const Schedule::Span& before, const Schedule::Span& after) const {
    if (before.start.kind != after.start.kind) return;
    if (static_cast<__int128>(before.start.value) * after.start.scale <
        static_cast<__int128>(after.start.value) * before.start.scale) {
      return;
    }
    wrong(fmt::format("runs backwards from {} to {}", before.text, after.text), "starts that increase");
  }

  void parse_form(Schedule& schedule) const {
    const size_t open = text_.find('('), close = text_.find(')');
    const std::string_view name = trim(text_.substr(0, open));
    if (name != "every" && name != "random") {
      wrong(fmt::format("has no form \"{}\"", name), "every(N), random(P) or random(P,SEED)");
    }
    if (close == std::string_view::npos || close < open)
      wrong("has no closing parenthesis", "every(N) or random(P)");
    std::vector<std::string_view> arguments = split(text_.substr(open + 1, close - open - 1));
    // chunk=N is one more argument, or follows the form: every(4,chunk=64) or every(4),chunk=64.
    std::string_view rest = trim(text_.substr(close + 1));
    if (rest.starts_with(',')) rest = trim(rest.substr(1));
    if (!rest.empty()) {
      if (!rest.starts_with("chunk"))
        wrong(fmt::format("has \"{}\" after the form", rest), "chunk=N or nothing");
      arguments.push_back(rest);
    }
    int64_t chunk = kDefaultChunk;
    if (arguments.back().starts_with("chunk")) {
      chunk = parse_chunk(arguments.back());
      arguments.pop_back();
    }
    if (name == "every") {
      parse_every(schedule, arguments, chunk);
    } else {
      parse_random(schedule, arguments, chunk);
    }
    if (chunk != kDefaultChunk) schedule.text_ += fmt::format(",chunk={}", chunk);
    schedule.text_ += ")";
  }

  int64_t parse_chunk(std::string_view text) const {
    const size_t equals = text.find('=');
    if (equals != std::string_view::npos && trim(text.substr(0, equals)) == "chunk") {
      const auto chunk = parse_number<int64_t>(trim(text.substr(equals + 1)));
      if (chunk && *chunk >= 1) return *chunk;
    }
    wrong(fmt::format("has \"{}\"", text), "chunk=N with N at least 1");
  }

  void parse_every(Schedule& schedule, const std::vector<std::string_view>& arguments, int64_t chunk) const {
    const auto period = arguments.size() == 1 ? parse_number<int64_t>(arguments[0]) : std::nullopt;
    if (!period || *period < 1)
      wrong("has no period", "every(N) with N at least 1: every N-th chunk is attention");
    schedule.form_ = Schedule::Every{*period, chunk};
    schedule.text_ = fmt::format("every({}", *period);
  }

  void parse_random(Schedule& schedule, const std::vector<std::string_view>& arguments, int64_t chunk) const {
    if (arguments.empty() || arguments.size() > 2)
      wrong("has wrong arguments", "random(P) or random(P,SEED)");
    const auto probability = parse_number<double>(arguments[0]);
    if (!probability || !(*probability >= 0 && *probability <= 1)) {
      wrong(fmt::format("has probability \"{}\"", arguments[0]), "a number from 0 to 1");
    }
    const auto seed = arguments.size() == 2 ? parse_number<uint64_t>(arguments[1]) : uint64_t{0};
    if (!seed) wrong(fmt::format("has seed \"{}\"", arguments[1]), "an integer of at least 0");
    schedule.form_ = Schedule::Random{*probability, *seed, chunk};
    schedule.text_ = fmt::format("random({},{}", *probability, *seed);
  }

  std::string_view text_;
};

Schedule Schedule::parse(std::string_view text) { return ScheduleParser(text).parse(); }

ModeSpans Schedule::spans(int64_t known_length, int64_t total_length) const {
  expect(0 <= known_length && known_length <= total_length,
         "expected a known length of 0 to {} tokens for schedule \"{}\", got {}", total_length, text_,
         known_length);
  if (const auto* spans = std::get_if<std::vector<Span>>(&form_)) {
    return explicit_spans(*spans, known_length, total_length);
  }
  if (const auto* every = std::get_if<Every>(&form_)) {
    return chunked_spans(total_length, every->chunk, [&](uint64_t index) {
      return (index + 1) % static_cast<uint64_t>(every->period) == 0 ? Mode::attention : Mode::linear;
    });
  }
  const Random& random = std::get<Random>(form_);
  return chunked_spans(total_length, random.chunk, [&](uint64_t index) {
    return random_uniform(random.seed, kRandomStream, index) < random.probability ? Mode::attention
                                                                                  : Mode::linear;
  });
}

ModeSpans Schedule::explicit_spans(const std::vector<Span>& spans, int64_t known_length,
                                   int64_t total_length) const {
  const auto resolve = [&](const Start& start) -> int64_t {
    switch (start.kind) {
      case Start::Kind::index:
        return start.value;
      case Start::Kind::percent:
        return static_cast<int64_t>(static_cast<__int128>(known_length) * start.value / start.scale);
      case Start::Kind::before_end:
        return known_length + start.value;
      case Start::Kind::generation:
        return known_length;
    }
    return 0;
  };
  ModeSpans resolved;
  for (size_t i = 0; i < spans.size(); ++i) {
    const int64_t begin = resolve(spans[i].start);
    if (begin < 0) {
      fail_usage("schedule \"{}\": {} reaches back past the first of {} known tokens; expected at most -{}",
                 text_, spans[i].text, known_length, std::max<int64_t>(known_length - 1, 1));
    }
    if (i > 0) {
      const int64_t previous = resolve(spans[i - 1].start);
      if (begin <= previous) {
        fail_usage(
            "schedule \"{}\": {} starts at token {}, which is not after {} at token {} (known length {}); "
            "expected starts that increase",
            text_, spans[i].text, begin, spans[i - 1].text, previous, known_length);
      }
    }
    if (!resolved.empty()) resolved.back().end = std::min(begin, total_length);
    if (begin < total_length) resolved.push_back({begin, total_length, spans[i].mode});
  }
  return merge(resolved);
}

}  // namespace oryx::schedule
