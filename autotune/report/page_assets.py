"""The page's own style and script: two themes from the reader's preference, charts redrawn when it changes."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2430; --muted: #667085; --line: #e3e6eb; --soft: #f6f7f9;
  --chosen: #c8102e; --good: #137a4c; --warn: #8a5a00; --warn-soft: #fff6df; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --ink: #e7e9ee; --muted: #9aa3b2; --line: #2c323c;
  --soft: #1c2027; --chosen: #ff6b7d; --good: #58c793; --warn: #f0c45c; --warn-soft: #2b2514; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 44px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 56px 0 4px; letter-spacing: -.005em; }
p { margin: 4px 0 12px; max-width: 76ch; }
.muted, .note { color: var(--muted); }
.note { font-size: 14px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(235px, 1fr)); gap: 14px; margin: 26px 0 10px; }
.tile { border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px 15px; }
.tile .name { color: var(--muted); font-size: 13px; }
.tile .big { font-size: 22px; font-weight: 650; line-height: 1.3; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
.tile .was { font-size: 14px; color: var(--muted); }
.certified { color: var(--good); } .not_certified { color: var(--warn); } .violated { color: var(--bad); }
.warnings { list-style: none; margin: 18px 0 0; padding: 0; }
.warnings li { background: var(--warn-soft); border-left: 4px solid var(--warn); padding: 8px 14px; margin: 0 0 8px;
  border-radius: 0 6px 6px 0; overflow-wrap: anywhere; }
.chart { margin: 10px 0 0; min-height: 120px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; margin: 8px 0; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: 13px; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: break-word; }
td.number, th.number { text-align: right; white-space: nowrap; }
tr.chosen td { font-weight: 600; }
.facts td { overflow-wrap: anywhere; }
.facts td:first-child { width: 24%; min-width: 110px; color: var(--muted); overflow-wrap: break-word; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
.groups { margin-top: 12px; border-top: 1px solid var(--line); }
.row { display: grid; grid-template-columns: 130px 175px 160px 92px 92px minmax(0, 1fr); gap: 12px; padding: 6px 8px;
  align-items: baseline; font-size: 14px; font-variant-numeric: tabular-nums; }
.row > * { overflow-wrap: anywhere; }
.row.head { color: var(--muted); font-size: 13px; font-weight: 600; padding-left: 18px; }
.groups details { border-bottom: 1px solid var(--line); }
.groups summary { cursor: pointer; list-style: none; position: relative; padding-left: 18px; }
.groups summary::-webkit-details-marker { display: none; }
.groups summary::before { content: "▸"; position: absolute; left: 4px; top: 6px; color: var(--muted); }
.groups details[open] summary::before { content: "▾"; }
.groups summary:hover, .groups details[open] { background: var(--soft); }
.inside { padding: 2px 26px 16px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 8px 44px; }
pre { background: var(--soft); border-radius: 8px; padding: 12px 16px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; margin: 4px 0 12px; }
@media (max-width: 760px) { main { padding: 24px 14px 60px; } .row { grid-template-columns: 1fr 1fr; }
  .row.head { display: none; } }
@media print { .chart { break-inside: avoid; } }
"""

# Fills "@ink" and the like in the charts' JSON, and draws them again when the reader's theme changes.
SCRIPT = """
const charts = document.getElementById("charts").textContent;
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const themes = {
  light: {ink: "#1f2430", muted: "#7b8494", faint: "#aab0ba", grid: "#e6e9ee", page: "#ffffff", chosen: "#c8102e"},
  dark: {ink: "#e7e9ee", muted: "#8a93a3", faint: "#5b6472", grid: "#2c323c", page: "#14171c", chosen: "#ff6b7d"},
};
function draw() {
  const theme = themes[dark.matches ? "dark" : "light"];
  const filled = charts.replace(/"@(ink|muted|faint|grid|page|chosen)"/g, (_, name) => JSON.stringify(theme[name]));
  const buttons = [["zoom2d", "pan2d", "resetScale2d", "toImage"]];
  for (const [id, chart] of Object.entries(JSON.parse(filled))) {
    const zooms = chart.data.some(trace => trace.type === "scatter");
    const bar = {modeBarButtons: buttons, displayModeBar: zooms ? "hover" : false};
    const config = {responsive: true, displaylogo: false, ...bar};
    Plotly.react(id, chart.data, chart.layout, config);
  }
}
draw();
dark.addEventListener("change", draw);
"""
