"""The style sheet of `report.html`: light and dark by the reader's own setting, wide and narrow screens, print."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --card: #ffffff; --ink: #1d1f23; --quiet: #5c6068; --rule: #dedfd9; --mark: #fff3cd;
  --good: #0b6b3a; --bad: #a32f00; --alarm: #fde7e1; --track: #ecece7;
  --run0: #0072b2; --run1: #d55e00; --run2: #00805c; --run3: #b5558d;
  --run4: #a87400; --run5: #2b8cc4; --run6: #444444;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --card: #1e2125; --ink: #e8e8e4; --quiet: #a3a8b0; --rule: #363a41; --mark: #453a17;
    --good: #6fd19c; --bad: #ff9d73; --alarm: #4a231a; --track: #2b2f35;
    --run0: #5ab4f0; --run1: #ff9a4d; --run2: #3ecf9f; --run3: #e49bc6;
    --run4: #e6b840; --run5: #9ad4f7; --run6: #cfcfcf;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1rem; font-weight: 600; color: var(--quiet); margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 40px 0 12px; }
h3 { font-size: 1rem; margin: 0 0 4px; overflow-wrap: anywhere; }
.charts + h3 { margin-top: 20px; }
p { margin: 0 0 12px; }
.verdict { font-size: 1.5rem; line-height: 1.3; font-weight: 650; margin-bottom: 16px; overflow-wrap: anywhere; }
.quiet, figcaption small { color: var(--quiet); }
.good { color: var(--good); }
.bad { color: var(--bad); }
.alarm { background: var(--alarm); border-left: 4px solid var(--bad); padding: 10px 14px; border-radius: 4px; }
ul { padding-left: 20px; margin: 0 0 12px; overflow-wrap: anywhere; }
.tiles, .charts, .samples { display: grid; gap: 14px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(220px, 100%), 1fr)); margin-bottom: 16px; }
.charts { align-items: start; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
.samples { grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); }
.card {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px; margin: 0;
  min-width: 0;
}
.tile strong { display: block; font-size: 2rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
figcaption { margin-bottom: 8px; }
figcaption small { display: block; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .875rem; overflow-wrap: anywhere; }
.legend svg { width: 30px; height: 10px; vertical-align: middle; margin-right: 6px; }
.words {
  display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px; font-size: .9rem;
  overflow-wrap: anywhere;
}
.words + svg { margin-bottom: 12px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg svg { overflow: hidden; }
.legend svg { display: inline; }
svg text { fill: var(--quiet); font-size: 12.5px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); }
.axis { stroke: var(--quiet); opacity: .6; }
.roof { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.track { fill: var(--track); }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.faint { stroke-width: 1; opacity: .3; }
.median { stroke-width: 3; }
.see-through { opacity: .55; }
.run0 { --run: var(--run0); } .run1 { --run: var(--run1); } .run2 { --run: var(--run2); } .run3 { --run: var(--run3); }
.run4 { --run: var(--run4); } .run5 { --run: var(--run5); } .run6 { --run: var(--run6); }
.line, .median { stroke: var(--run); }
.bar, .dot { fill: var(--run); }
.waiting { fill: var(--rule); }
.way-back { opacity: .6; }
svg .on-bar { fill: var(--card); font-size: 11px; }
.run1.line:not(.faint) { stroke-dasharray: 9 4; } .run2.line:not(.faint) { stroke-dasharray: 9 4 2 4; }
.run3.line:not(.faint) { stroke-dasharray: 2 4; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 14px; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: top; }
thead th { color: var(--quiet); font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
th:first-child {
  text-align: left; position: sticky; left: 0; background: var(--card); font-weight: 500; min-width: 9.5rem;
}
.figures td { white-space: nowrap; }
.figures .wide { white-space: normal; text-align: left; overflow-wrap: anywhere; min-width: 11rem; }
.settings td { text-align: left; overflow-wrap: anywhere; min-width: 7rem; }
.settings thead th { text-align: left; }
.differs > * { background: var(--mark); }
.differs > th:first-child { background: var(--mark); font-weight: 700; }
details { margin: 12px 0; }
summary { cursor: pointer; color: var(--quiet); padding: 4px 0; }
pre {
  white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.45 ui-monospace, monospace; margin: 8px 0 0;
  max-height: 30rem; overflow-y: auto;
}
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
footer { margin-top: 40px; color: var(--quiet); font-size: .875rem; }
@media (max-width: 520px) {
  .verdict { font-size: 1.2rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile strong { font-size: 1.5rem; }
  .card { padding: 12px; }
  table { font-size: .8rem; }
  th, td { padding: 6px 7px; }
  th:first-child { min-width: 6.5rem; max-width: 8rem; overflow-wrap: anywhere; }
  .figures td { white-space: normal; }
  .settings td { min-width: 5rem; }
  svg text { font-size: 17px; }
}
@media print { .card, .scroll { break-inside: avoid; } }
"""
