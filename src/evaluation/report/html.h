// Pieces of the report's page: tables, figures, the page around them. Everything that comes from a file is
// escaped where it enters; strings named html are markup already.
#pragma once

#include <string>
#include <vector>

#include "evaluation/plot.h"

namespace oryx::evaluation {

struct Cell {
  std::string html;
  std::string css = "";  // classes: "number", "best", "muted"
  int span = 1;
};
using Row = std::vector<Cell>;

// Cells of text and of numbers, aligned right.
Cell text_cell(const std::string& text);
Cell number_cell(const std::string& html, bool is_best = false);

struct HtmlTable {
  std::string caption;  // html
  std::vector<Row> head;
  std::string css = "";  // "narrow": few columns, kept together; "stacked": small print below its number
  struct Group {
    std::string title;  // html; empty: none
    std::vector<Row> rows;
  };
  std::vector<Group> groups;
};

// A row's first cell is its header.
std::string to_html(const HtmlTable& table);

enum class FigureSize { half, full };

// Figures of one page: their ids differ.
class Figures {
 public:
  // Title, legend, picture, caption (html).
  std::string figure(const Plot& plot, const std::string& caption, FigureSize size = FigureSize::half);

 private:
  int next_ = 0;
};

struct Section {
  std::string id, title;
  std::string html;
};

// "1,234,567", rounded.
std::string grouped(double count);
// "1.3 million", "131.1 million", "12,812".
std::string count_text(double count);
// "12.4 KiB".
std::string bytes_text(double bytes);

// The whole page. Sections without content are left out, of the contents list too.
std::string page_html(const std::string& title, const std::string& introduction,
                      const std::vector<Section>& sections);

// What the page brings along (page_style.cc, page_script.cc).
extern const char kPageStyle[];
extern const char kPageScript[];

}  // namespace oryx::evaluation
