#include "evaluation/report/html.h"

namespace oryx::evaluation {

// Colours of series are Okabe and Ito's; the dark theme takes lighter ones of the same hues.
const char kPageStyle[] = R"css(
:root {
  --paper: #FFFFFF; --ink: #1B1F24; --muted: #5D6673; --axis: #7B8490; --grid: #E3E7EB; --rule: #D3D9DF;
  --tint: #F5F7F9; --accent: #005B94; --attention: #00598C; --attention-tint: #DCECF7; --linear: #A34700;
  --linear-tint: #FBE9DC;
  --c0: #0072B2; --c1: #D55E00; --c2: #009E73; --c3: #CC79A7; --c4: #E69F00; --c5: #56B4E9; --c6: #1B1F24;
  color-scheme: light;
}
@media screen {
  :root[data-theme="dark"] {
    --paper: #14171B; --ink: #E6E9ED; --muted: #9DA7B3; --axis: #6F7A86; --grid: #2A3038; --rule: #363D46;
    --tint: #1C2127; --accent: #6CB8EC; --attention: #8CCBF5; --attention-tint: #12344A; --linear: #F5B183;
    --linear-tint: #47290F;
    --c0: #4BA3DE; --c1: #F28A3F; --c2: #35C79D; --c3: #DE9CC2; --c4: #F0B93A; --c5: #8BCDF5; --c6: #E6E9ED;
    color-scheme: dark;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink); display: grid;
  grid-template-columns: 190px minmax(0, 1000px); column-gap: 48px; justify-content: center;
  font: 15px/1.55 "Inter", "Source Sans 3", "Segoe UI", "Helvetica Neue", "Liberation Sans", Arial, "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
nav { position: sticky; top: 0; align-self: start; padding: 44px 0 24px; max-height: 100vh; overflow: auto; font-size: 14px; }
nav .brand { margin: 0 0 14px; font-weight: 700; letter-spacing: .02em; }
nav ol { list-style: none; margin: 0; padding: 0; border-left: 1px solid var(--rule); }
nav a { display: block; padding: 4px 0 4px 14px; color: var(--muted); text-decoration: none; margin-left: -1px; border-left: 2px solid transparent; }
nav a:hover, nav a.here { color: var(--ink); border-left-color: var(--accent); }
nav button { margin-top: 18px; font: inherit; font-size: 13px; color: var(--muted); background: none; border: 1px solid var(--rule); border-radius: 4px; padding: 3px 10px; cursor: pointer; }
main { padding: 40px 0 80px; min-width: 0; }
header { padding-bottom: 8px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -.015em; }
h2 { font-size: 21px; margin: 56px 0 6px; padding-top: 14px; border-top: 1px solid var(--rule); letter-spacing: -.01em; }
h3 { font-size: 16px; margin: 30px 0 4px; }
h4 { font-size: 14px; margin: 0 0 6px; }
p { margin: 8px 0 12px; max-width: 74ch; }
.lead { color: var(--muted); }
a { color: var(--accent); }
code { font: 13px/1.5 "JetBrains Mono", "DejaVu Sans Mono", "Liberation Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
figure { margin: 16px 0 26px; }
figcaption { color: var(--muted); font-size: 13px; line-height: 1.5; margin-top: 8px; max-width: 92ch; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px 32px; align-items: start; }
.plots .full { grid-column: 1 / -1; }
.plots .note { margin: 0 0 10px; }
.plots figure { margin: 14px 0 12px; }
.picture { position: relative; }
.picture svg { display: block; width: 100%; height: auto; font: 12px/1 inherit; font-family: inherit; font-size: 12px; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0 0 6px; padding: 0; font-size: 12.5px; line-height: 1.5; }
.legend li { display: inline-flex; align-items: center; gap: 7px; border-radius: 3px; }
.legend svg { flex: none; }
.legend li[role="button"] { cursor: pointer; }
.legend li[role="button"]:hover { color: var(--accent); }
.legend li.off { opacity: .38; text-decoration: line-through; }
.off-series { display: none; }
.cross { stroke: var(--muted); stroke-width: 1; pointer-events: none; }
.readout { position: absolute; z-index: 2; pointer-events: none; background: var(--paper); border: 1px solid var(--rule); border-radius: 4px; box-shadow: 0 2px 10px rgb(0 0 0 / .12); padding: 6px 10px; font-size: 12px; line-height: 1.5; white-space: nowrap; }
.readout b { display: block; }
.readout i { display: inline-block; width: 10px; height: 3px; margin-right: 7px; vertical-align: middle; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; line-height: 1.4; width: 100%; }
th, td { padding: 5px 12px 5px 0; text-align: left; vertical-align: baseline; }
th:last-child, td:last-child { padding-right: 4px; }
table code { white-space: nowrap; }
table.wrap { font-size: 13px; }
table.wrap code { white-space: normal; overflow-wrap: normal; }
table.narrow { width: auto; }
.narrow th, .narrow td { padding-right: 36px; }
table.stacked td small { display: block; }
table.stacked { font-size: 13px; }
table.stacked th, table.stacked td { padding-right: 9px; }
table.stacked td, table.stacked tbody th { padding-top: 4px; padding-bottom: 3px; }
thead th { font-weight: 600; color: var(--muted); font-size: 12.5px; vertical-align: bottom; border-bottom: 1.5px solid var(--ink); }
thead tr:not(:last-child) th { border-bottom: 0; }
tbody th { font-weight: 400; }
tbody tr { border-bottom: 1px solid var(--grid); }
tbody:last-child tr:last-child { border-bottom: 1.5px solid var(--ink); }
tr.group th { font-weight: 600; padding-top: 14px; }
tr.group { border-bottom: 1px solid var(--rule); }
.number { text-align: right; white-space: nowrap; }
.same code { white-space: nowrap; margin-right: 14px; }
.same code b { font-weight: 400; color: var(--muted); }
thead .number { white-space: normal; }
.best { font-weight: 700; }
.best small { font-weight: 400; }
.muted, small { color: var(--muted); }
small { font-size: 11px; }
.differs { background: var(--tint); font-weight: 600; }
.heatmaps { display: flex; flex-wrap: wrap; gap: 12px 28px; align-items: flex-end; }
.heatmaps figure { margin: 6px 0; }
.heatmaps h4 { font-weight: 600; font-size: 13px; margin-bottom: 2px; max-width: 300px; overflow-wrap: anywhere; }
.note { font-size: 13px; color: var(--muted); line-height: 1.5; max-width: 92ch; }
.heatmaps svg { display: block; font-size: 11.5px; max-width: 100%; height: auto; }
details { margin: 10px 0 18px; }
summary { cursor: pointer; color: var(--accent); }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.75 "Source Serif 4", Georgia, "Liberation Serif", "DejaVu Serif", serif; border-left: 3px solid var(--rule); padding: 2px 0 2px 18px; margin: 10px 0; max-width: 84ch; }
.sample span, .key span { border-radius: 2px; padding: 1px 0; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.attention { color: var(--attention); background: var(--attention-tint); font-weight: 600; }
.linear { color: var(--linear); background: var(--linear-tint); }
.prompt { text-decoration: underline; text-decoration-style: dotted; text-decoration-color: var(--muted); text-underline-offset: 3px; }
.key .attention, .key .linear { padding: 1px 6px; }
.nowrap { white-space: nowrap; }
@media (max-width: 1080px) {
  body { grid-template-columns: minmax(0, 1fr); padding: 0 20px; }
  nav { position: static; padding: 20px 0 0; }
  nav ol { display: flex; flex-wrap: wrap; border: 0; }
  nav a { padding: 2px 16px 2px 0; border: 0; margin: 0; }
  main { padding-top: 16px; }
}
@media (max-width: 720px) { .plots { grid-template-columns: minmax(0, 1fr); } }
@media print {
  @page { margin: 16mm; }
  body { display: block; font-size: 10.5pt; }
  nav, .cross, .readout { display: none; }
  main { padding: 0; }
  h2 { break-after: avoid; margin-top: 24pt; }
  h3, h4 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .scroll { overflow: visible; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
)css";

}  // namespace oryx::evaluation
