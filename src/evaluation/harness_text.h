// The text conventions of lm-evaluation-harness that scores depend on.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace oryx::evaluation {

struct EncodedPair {
  std::vector<int64_t> context;       // never empty: the end-of-text token stands for an empty one
  std::vector<int64_t> continuation;  // empty where the tokens of the context take it in
};

// Context and continuation are encoded together and cut where the context alone ends. Blanks at the end of
// the context belong to the continuation.
EncodedPair encode_pair(const tokenizer::Tokenizer& tokenizer, std::string_view context,
                        std::string_view continuation);

// As Python's str.isspace and \s of its re module.
bool is_blank(uint32_t code);
std::string_view strip_blanks(std::string_view text);
std::string_view strip_trailing_blanks(std::string_view text);

// len(re.split(r"\s+", text)): a text that begins or ends with a blank counts an empty word there.
int64_t count_words(std::string_view text);
// len(text), in code points.
int64_t count_characters(std::string_view text);

// A page begins at a line ` = Title = ` of one level.
std::vector<std::string> wikitext_pages(std::string_view text);
// Undoes the spacing of WikiText's tokens.
std::string wikitext_detokenize(std::string_view page);

// One window of a long text: `size` tokens from `begin`, of which those from `first` on are predicted in this
// window. Begin −1 is the prefix token.
struct Window {
  int64_t begin = 0, end = 0;  // tokens begin … end−1, all but the last are read
  int64_t first = 0;           // first … end−1 are predicted
};

// Every token of 0 … tokens−1 predicted once, each after as many others as a window of `length` read tokens
// allows when the windows do not overlap more than the last one must.
std::vector<Window> rolling_windows(int64_t tokens, int64_t length);

// Whether `text` contains one of the answers, upper and lower case being equal.
bool contains_answer(std::string_view text, const std::vector<std::string>& answers);

}  // namespace oryx::evaluation
