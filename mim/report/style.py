"""The frame of the page: its head and its look, on light and dark screens and on paper."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
<main>
{body}
</main>
</html>
"""

STYLE = """
:root { --paper: #fdfcfa; --ink: #1d1c1a; --soft: #66635d; --line: #e4e1db; --well: #f4f2ee;
  --s1: #1f6fb2; --s2: #b34f17; --c1: #b3261e; --c2: #2e7031; --c3: #1f6fb2;
  --s3: #2e7031; --s4: #8e3a9d; --s5: #8a6100; --s6: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #16171a; --ink: #e9e7e2; --soft: #9b9890; --line: #2e3035;
  --well: #1e2024; --s1: #6db3f2; --s2: #f0975a;
  --c1: #f2857c; --c2: #7cc47f; --c3: #6db3f2;
  --s3: #7cc47f; --s4: #d58ee2; --s5: #e0b44c; --s6: #f2857c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1040px; margin: 0 auto; padding: 48px 24px 96px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.015em; margin: 4px 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -0.01em; margin: 0 0 14px; }
h3 { font-size: 16px; margin: 32px 0 12px; }
section { margin-top: 40px; padding-top: 28px; border-top: 1px solid var(--line); }
p { margin: 16px 0 6px; }
h2 + .lead { margin-top: -10px; }
.lead { color: var(--soft); margin: 0 0 20px; max-width: 76ch; }
.run { color: var(--soft); margin: 0; font-size: 14px; }
.status { margin-left: 10px; padding: 1px 9px; border: 1px solid currentColor; border-radius: 99px; color: var(--s1);
  font-size: 12px; }
.numbers { display: flex; flex-wrap: wrap; gap: 16px 44px; margin: 28px 0 0; }
.numbers dt { color: var(--soft); font-size: 13px; }
.numbers dd { margin: 0; font-size: 28px; line-height: 1.25; font-weight: 600; letter-spacing: -0.01em; }
.numbers dd.note { color: var(--soft); font-size: 13px; font-weight: 400; letter-spacing: 0; }
.numbers + .lead { margin: 24px 0 0; }
.pair, .charts { display: grid; gap: 28px 32px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.charts { align-items: end; }
.titles { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; margin-bottom: 4px; color: var(--soft);
  font-size: 12px; text-align: center; white-space: nowrap; }
a { color: var(--s1); }
.narrow { max-width: 560px; margin-top: 24px; }
.zoom { display: block; cursor: zoom-in; }
.zoom input { position: absolute; opacity: 0; }
.zoom input:focus-visible + img { outline: 3px solid var(--s1); outline-offset: 2px; }
.zoom input:checked + img { position: fixed; inset: 0; z-index: 9; width: 100vw; height: 100vh; object-fit: contain;
  background: var(--paper); padding: 16px; cursor: zoom-out; }
img { display: block; width: 100%; height: auto; border-radius: 3px; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
small { color: var(--soft); font-weight: 400; font-size: 13px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; color: var(--soft); margin-bottom: 6px; }
.legend [class]::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 6px; vertical-align: middle; background: var(--c); }
.legend b { color: var(--ink); font-weight: 600; }
.s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); }
.s4 { --c: var(--s4); } .s5 { --c: var(--s5); } .s6 { --c: var(--s6); }
.c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 11px; fill: var(--soft); }
.grid { stroke: var(--line); }
svg polyline { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg g > circle { fill: var(--c); }
svg polygon { fill: var(--c); opacity: 0.18; }
svg line.untrained { stroke: var(--c); stroke-width: 1.5; stroke-dasharray: 2 5; }
.hit rect { fill: transparent; } .hit line { stroke: var(--soft); opacity: 0; } .hit:hover line { opacity: 0.7; }
.seeds { width: 220px; }
circle.pretrained { fill: var(--s1); opacity: 0.75; }
circle.untrained { fill: none; stroke: var(--soft); stroke-width: 1.5; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 15px; }
th { font-weight: 400; color: var(--soft); text-align: left; }
th, td { padding: 6px 28px 6px 0; vertical-align: middle; border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; }
th[scope=col] { font-size: 13px; }
td { overflow-wrap: anywhere; }
pre { margin: 0; padding: 14px 16px; overflow-x: auto; background: var(--well); border-radius: 6px;
  font: 13px/1.55 ui-monospace, "DejaVu Sans Mono", monospace; }
details { margin-top: 16px; }
summary { cursor: pointer; color: var(--soft); font-size: 14px; margin-bottom: 8px; }
@media (max-width: 600px) { main { padding: 24px 16px 64px; } h1 { font-size: 24px; }
  th, td { padding-right: 10px; } table { font-size: 14px; } th:first-child { min-width: 6em; }
  .seeds { width: 92px; } }
@media print { :root { --paper: #ffffff; --ink: #1d1c1a; --soft: #66635d; --line: #d9d6d0; --well: #f4f2ee;
  --s1: #1f6fb2; --s2: #b34f17; --c1: #b3261e; --c2: #2e7031; --c3: #1f6fb2;
  --s3: #2e7031; --s4: #8e3a9d; --s5: #8a6100; --s6: #b3261e; }
  @page { margin: 14mm; } main { max-width: none; padding: 0; } .pair, .charts { grid-template-columns: 1fr 1fr; }
  figure, tr, .mosaic { break-inside: avoid; }
  h2, h3, figcaption { break-after: avoid; } img { print-color-adjust: exact; } pre { white-space: pre-wrap; }
  .scroll { overflow: visible; } .status { border: 0; } }
"""
