"""What the page of token budgets adds to the look of the report (report_style.py)."""

STYLE = """
body { max-width: 1240px; }
.lead { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.75rem; margin: 1.25rem 0 0;
  padding: 0; list-style: none; }
.lead li { background: var(--card); border: 1px solid var(--rule); border-top: 4px solid var(--line, var(--soft));
  border-radius: 6px; padding: 0.6rem 0.8rem; }
.lead b { display: block; font-size: 1.35rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.lead span { font-size: 0.8125rem; color: var(--soft); }
.viewer { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 1rem; margin-top: 1.75rem; }
.viewer video { position: absolute; width: 2px; height: 2px; opacity: 0.01; pointer-events: none; }
.viewer header { display: flex; gap: 0.5rem 1rem; align-items: baseline; flex-wrap: wrap; margin-bottom: 0.75rem; }
.viewer header h2 { margin: 0; }
.viewer header p { margin: 0; color: var(--soft); flex: 1 1 20rem; max-width: none; }
.tiles { display: grid; gap: 0.6rem; grid-template-columns: repeat(var(--across), minmax(0, 1fr)); --zoom: 1; --cx: 0.5;
  --cy: 0.5; }
.tile figcaption { display: flex; justify-content: space-between; gap: 0.5rem; font-size: 0.875rem; padding-bottom: 0.25rem;
  border-bottom: 3px solid var(--line, var(--soft)); margin-bottom: 0.25rem; }
.tile figcaption span { color: var(--soft); white-space: nowrap; }
.frame { overflow: hidden; border-radius: 3px; background: #000; cursor: zoom-in; touch-action: pan-y; }
.zoomed .frame { cursor: grab; touch-action: none; }
.frame canvas { display: block; width: 100%; height: auto; image-rendering: pixelated;
  transform-origin: calc(var(--cx) * 100%) calc(var(--cy) * 100%); transform: scale(var(--zoom)); }
.tile p { margin: 0.3rem 0 0; font-size: 0.8125rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.tile p b { color: var(--text); font-weight: 600; }
.trace { position: relative; margin: 1.6rem 8px 1.2rem; }
.trace svg { display: block; width: 100%; height: 84px; cursor: crosshair; touch-action: none; overflow: visible; }
.trace polyline { fill: none; stroke-width: 1.75; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.trace line { stroke: var(--text); stroke-width: 1; vector-effect: non-scaling-stroke; }
.trace .key { stroke: var(--rule); }
.trace span { position: absolute; left: 0; font-size: 0.6875rem; color: var(--soft); }
.trace .high { bottom: 100%; } .trace .low { top: 100%; }
#scrub { display: block; width: 100%; margin: 0.35rem 0 0.6rem; accent-color: var(--accent); height: 1.75rem; }
.buttons { display: flex; flex-wrap: wrap; gap: 0.5rem; align-items: center; }
.buttons button { min-width: 2.6rem; }
.buttons #play { min-width: 6rem; }
.buttons label { display: inline-flex; gap: 0.35rem; align-items: center; }
.buttons output { min-width: 9.5rem; font-variant-numeric: tabular-nums; font-size: 0.875rem; color: var(--soft); }
button[aria-pressed="true"] { background: var(--accent); border-color: var(--accent); color: var(--page); }
.spacer { flex: 1; }
.scale { display: flex; gap: 0.5rem; align-items: center; font-size: 0.8125rem; color: var(--soft); margin-top: 0.6rem; }
.scale i { flex: 0 1 16rem; height: 0.6rem; border-radius: 2px; background: linear-gradient(90deg,
  #000004, #280b54, #65156e, #9f2a63, #d44842, #f57d15, #fac127, #fcffa4); }
[hidden] { display: none !important; }
kbd { font: 0.8125rem ui-monospace, monospace; border: 1px solid var(--rule); border-radius: 4px; padding: 0 0.3rem; }
details { margin-top: 0.75rem; font-size: 0.875rem; color: var(--soft); }
.wide-table { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; background: var(--card); }
.clips { font-size: 0.875rem; font-variant-numeric: tabular-nums; min-width: 46rem; }
.clips { overflow-wrap: normal; } .clips thead button { white-space: nowrap; }
.clips td { vertical-align: middle; padding: 0.3rem 0.6rem; }
.clips thead th { position: sticky; top: 0; background: var(--card); padding: 0.2rem 0.3rem; }
.clips thead button { border: 0; background: none; min-width: 0; width: 100%; padding: 0.3rem; font-weight: 600;
  text-align: inherit; }
.clips .number { text-align: right; white-space: nowrap; }
.clips th[aria-sort] button::after { content: " ▾"; } .clips th[aria-sort="ascending"] button::after { content: " ▴"; }
.clips img { display: block; width: 56px; height: 56px; object-fit: cover; border-radius: 4px; }
.clips tbody tr { cursor: pointer; }
.clips tbody tr:hover { background: color-mix(in srgb, var(--accent) 8%, transparent); }
.clips tr.chosen { background: color-mix(in srgb, var(--accent) 16%, transparent); }
.clips td button { border: 0; background: none; padding: 0; min-height: 0; text-align: left; font-weight: 600; }
.clips small { display: block; max-width: 22rem; line-height: 1.3; }
.figures th:first-child { width: auto; } .figures { table-layout: auto; }
.figures tbody th { min-width: 11rem; }
.target { display: flex; flex-wrap: wrap; gap: 0.5rem 1.25rem; align-items: center; margin-bottom: 0.75rem; }
.target input[type="range"] { flex: 1 1 16rem; accent-color: var(--accent); height: 1.75rem; }
.target output { font-weight: 600; font-variant-numeric: tabular-nums; }
.told { font-size: 1.0625rem; max-width: 60rem; }
.levels { display: grid; gap: 3px; }
.levels > div { display: grid; grid-template-columns: minmax(6rem, 14rem) 1fr; gap: 0.75rem; align-items: center;
  font-size: 0.8125rem; }
.levels > div > span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; color: var(--soft); }
.levels .cells { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 2px; }
.levels i { font-style: normal; text-align: center; border-radius: 3px; line-height: 1.45rem; background: var(--line);
  color: var(--page); font-variant-numeric: tabular-nums; white-space: nowrap; overflow: hidden; }
.levels i.missed { color: var(--line); background: color-mix(in srgb, var(--line) 12%, var(--page));
  outline: 1px dashed var(--line); outline-offset: -1px; }
.plots .guess { stroke-dasharray: 2 5; stroke-width: 1.5; }
.wide-table + .plots { margin-top: 1.5rem; }
.plots .mark-name { font-size: 11px; fill: var(--text); }
.plots .open { fill: var(--page); stroke-width: 1.75; }
@media (max-width: 800px) {
  .tiles { grid-template-columns: repeat(min(2, var(--across)), minmax(0, 1fr)); }
  .figures { font-size: 0.8125rem; } .figures th, .figures td { padding: 0.35rem 0.4rem; }
  .figures tbody th { min-width: 7.5rem; }
}
@media (max-width: 520px) {
  .viewer { padding: 0.75rem; margin-inline: -0.5rem; }
  .spacer { display: none; }
  .buttons output { min-width: 0; width: 100%; order: -1; }
  .clips { min-width: 34rem; } .clips small { display: none; } .clips td, .clips thead th { padding: 0.25rem 0.3rem; }
  .clips img { width: 44px; height: 44px; }
}
"""
