#include "evaluation/report/html.h"

#include <fmt/format.h>

#include <cmath>

namespace oryx::evaluation {

namespace {

std::string row_html(const Row& row, bool is_head) {
  std::string html = "<tr>";
  for (size_t i = 0; i < row.size(); ++i) {
    const char* tag = is_head || i == 0 ? "th" : "td";
    const std::string css = row[i].css.empty() ? "" : fmt::format(" class=\"{}\"", row[i].css);
    const std::string span = row[i].span == 1 ? "" : fmt::format(" colspan=\"{}\"", row[i].span);
    const char* scope = is_head ? " scope=\"col\"" : i == 0 ? " scope=\"row\"" : "";
    html += fmt::format("<{}{}{}{}>{}</{}>", tag, scope, css, span, row[i].html, tag);
  }
  return html + "</tr>\n";
}

size_t columns_of(const HtmlTable& table) {
  size_t columns = 0;
  for (const Cell& cell : table.head.empty() ? Row{} : table.head.back()) columns += cell.span;
  return columns;
}

std::string legend_html(const Plot& plot) {
  const std::vector<SeriesStyle> styles = series_styles(plot, /*variables=*/true);
  std::string html = "<ul class=\"legend\">";
  for (size_t i = 0; i < plot.series.size(); ++i) {
    html += fmt::format(
        "<li data-for=\"{0}\"><svg width=\"{1}\" height=\"12\" viewBox=\"0 0 {1} 12\" "
        "aria-hidden=\"true\">{2}</svg>{3}</li>",
        i, plot.series[i].line ? 34 : 14, legend_swatch(plot.series[i], styles[i], 0, 6),
        escape_markup(plot.series[i].name));
  }
  return html + "</ul>\n";
}

}  // namespace

Cell text_cell(const std::string& text) { return {escape_markup(text)}; }
Cell number_cell(const std::string& html, bool is_best) { return {html, is_best ? "number best" : "number"}; }

std::string to_html(const HtmlTable& table) {
  std::string html = "<figure class=\"table\"><div class=\"scroll\"><table";
  if (!table.css.empty()) html += fmt::format(" class=\"{}\"", table.css);
  html += ">\n<thead>";
  for (const Row& row : table.head) html += row_html(row, true);
  html += "</thead>\n";
  for (const HtmlTable::Group& group : table.groups) {
    html += "<tbody>";
    if (!group.title.empty()) {
      html += fmt::format("<tr class=\"group\"><th colspan=\"{}\" scope=\"colgroup\">{}</th></tr>\n",
                          columns_of(table), group.title);
    }
    for (const Row& row : group.rows) html += row_html(row, false);
    html += "</tbody>\n";
  }
  html += "</table></div>";
  if (!table.caption.empty()) html += fmt::format("<figcaption>{}</figcaption>", table.caption);
  return html + "</figure>\n";
}

std::string Figures::figure(const Plot& plot, const std::string& caption, FigureSize size) {
  const bool full = size == FigureSize::full;
  const std::string svg =
      to_page_svg(plot, fmt::format("plot-{}", next_++), full ? 980 : 480, full ? 400 : 300);
  return fmt::format("<figure class=\"plot {}\"><h4>{}</h4>\n{}<div class=\"picture\">{}</div>{}</figure>\n",
                     full ? "full" : "half", escape_markup(plot.title),
                     plot.series.size() > 1 ? legend_html(plot) : "", svg,
                     caption.empty() ? "" : fmt::format("<figcaption>{}</figcaption>", caption));
}

std::string grouped(double count) {
  const std::string digits = fmt::format("{:.0f}", std::abs(count));
  std::string text = count < 0 ? "-" : "";
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

std::string count_text(double count) {
  if (count >= 1e9) return fmt::format("{:.2f} billion", count * 1e-9);
  if (count >= 1e6) return fmt::format("{:.1f} million", count * 1e-6);
  return grouped(count);
}

std::string bytes_text(double bytes) {
  if (bytes >= 1 << 30) return fmt::format("{:.2f} GiB", bytes / (1 << 30));
  if (bytes >= 1 << 20) return fmt::format("{:.1f} MiB", bytes / (1 << 20));
  if (bytes >= 1 << 10) return fmt::format("{:.1f} KiB", bytes / (1 << 10));
  return fmt::format("{:.0f} B", bytes);
}

std::string page_html(const std::string& title, const std::string& introduction,
                      const std::vector<Section>& sections) {
  std::string contents, body;
  for (const Section& section : sections) {
    if (section.html.empty()) continue;
    contents += fmt::format("<li><a href=\"#{}\">{}</a></li>", section.id, escape_markup(section.title));
    body += fmt::format("<section id=\"{}\">\n<h2>{}</h2>\n{}</section>\n", section.id,
                        escape_markup(section.title), section.html);
  }
  // The page may fetch nothing: browsers are told so too.
  return fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
      "script-src 'unsafe-inline'; img-src data:\">\n"
      "<title>{0}</title>\n<link rel=\"icon\" href=\"data:,\">\n<style>{1}</style>\n</head>\n<body>\n"
      "<nav aria-label=\"Contents\"><p class=\"brand\">Oryx</p><ol>{2}</ol></nav>\n"
      "<main>\n<header><h1>{0}</h1>\n{3}</header>\n{4}</main>\n<script>{5}</script>\n</body>\n</html>\n",
      escape_markup(title), kPageStyle, contents, introduction, body, kPageScript);
}

}  // namespace oryx::evaluation
