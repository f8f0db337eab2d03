#include <fmt/format.h>

#include "evaluation/report/report.h"
#include "evaluation/report/section_tools.h"

namespace oryx::evaluation {

Section samples_section(const Sources& sources) {
  Section section{"samples", "Samples", ""};
  if (sources.samples.empty()) return section;
  section.html =
      "<p class=\"key\">Each token in the colour of the mixer that served it: <span "
      "class=\"attention\">attention, "
      "bold</span> <span class=\"linear\">linear, regular</span>. The prompt is <span "
      "class=\"prompt\">underlined</span>.</p>\n";
  for (const SampleSource& file : sources.samples) {
    section.html += fmt::format("<h3>{}</h3>\n", escape_markup(file.name.label));
    for (const Sample& sample : file.samples) {
      section.html += fmt::format(
          "<p><small>{}<code>{}</code>; {} of prompt, {} generated</small></p>\n",
          sample.model.empty() ? "" : fmt::format("<code>{}</code>, ", escape_markup(sample.model)),
          escape_markup(sample.schedule), plural(sample.prompt_tokens, "token"), sample.tokens);
      section.html += "<div class=\"sample\">";
      for (const TextPiece& piece : sample.pieces) {
        section.html += fmt::format("<span class=\"{}{}\">{}</span>", piece.mode,
                                    piece.is_prompt ? " prompt" : "", escape_markup(piece.text));
      }
      section.html += "</div>\n";
    }
  }
  return section;
}

}  // namespace oryx::evaluation
