// oryx report's page: one HTML file that opens without a network.
#pragma once

#include <string>

#include "evaluation/report/html.h"
#include "evaluation/report/sources.h"

namespace oryx::evaluation {

struct ReportOptions {
  std::string title = "Oryx report";
  std::string made;     // when and by what: a line under the title
  std::string command;  // that made it
};

std::string report_html(const Sources& sources, const ReportOptions& options);

// The sections, each empty html where the sources hold nothing for it.
Section models_section(const Sources& sources);
Section training_section(const Sources& sources, Figures& figures);
Section tasks_section(const Sources& sources);
Section needle_section(const Sources& sources);
Section recall_section(const Sources& sources, Figures& figures);
Section curves_section(const Sources& sources, Figures& figures);
Section cost_section(const Sources& sources, Figures& figures);
Section samples_section(const Sources& sources);

}  // namespace oryx::evaluation
