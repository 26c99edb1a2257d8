"""Look and behaviour of the report page: CSS with a dark scheme, and the script that plays the videos together."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fafaf8; --card: #ffffff; --text: #1c1d1f; --soft: #5c6166; --rule: #dddcd6; --accent: #0a5fb4;
  --yes: #1a7a3c; --no: #b3352b;
  --line0: #0068b5; --line1: #c94f00; --line2: #008060; --line3: #a2448e; --line4: #7a6a00; --line5: #555a60;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --card: #1d2024; --text: #e7e7e4; --soft: #a3a8ae; --rule: #363a40; --accent: #74b6f5;
    --yes: #6cc98b; --no: #f08a80;
    --line0: #5fb0f5; --line1: #ff9a4d; --line2: #4cc9a4; --line3: #e19ad2; --line4: #d8c65a; --line5: #b5bac0;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1rem; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; margin: 0 0 0.35rem; }
h3 { font-size: 1rem; line-height: 1.35; margin: 0; }
p { max-width: 46rem; margin: 0 0 0.6rem; }
section { margin-top: 2.75rem; }
section > p { color: var(--soft); margin-bottom: 1rem; }
small, .small { font-size: 0.8125rem; color: var(--soft); }
abbr { text-decoration: none; color: var(--soft); cursor: help; }
figure { margin: 0; min-width: 0; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 0.4rem 0.75rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
tbody th { font-weight: 400; }
.budgets { table-layout: fixed; background: var(--card); border: 1px solid var(--rule);
  font-variant-numeric: tabular-nums; }
.budgets td, .budgets thead th:not(:first-child) { text-align: right; overflow-wrap: normal; }
.budgets thead th:first-child { width: 40%; }
.budgets thead th { border-bottom: 2px solid var(--rule); }
.budgets .group th { padding-top: 0.9rem; font-size: 0.8125rem; font-weight: 600; color: var(--soft); }
.budgets small { display: block; line-height: 1.3; }
.budgets strong { white-space: nowrap; }
.budgets strong span { color: var(--accent); }
.budgets + .small { margin-top: 0.6rem; max-width: none; }
.videos { position: relative; }
.controls { position: sticky; top: 0; z-index: 1; display: flex; gap: 1rem; align-items: center; margin-top: 2.25rem;
  padding: 0.6rem 0; background: var(--page); border-bottom: 1px solid var(--rule); }
.controls + section { margin-top: 1.5rem; }
button, select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--soft);
  border-radius: 6px; padding: 0.3rem 0.7rem; min-height: 2.25rem; }
button { min-width: 7rem; cursor: pointer; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.wide { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 780px); gap: 0.75rem 1.5rem;
  padding: 1.25rem 0; border-top: 1px solid var(--rule); }
.wide p { margin: 0.35rem 0 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 1.75rem 1.5rem; }
.cards figure { display: grid; grid-row: span 2; grid-template-rows: subgrid; row-gap: 0.4rem; }
.cards figcaption { align-self: end; }
.strip > div { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); column-gap: var(--gap);
  font-size: 0.8125rem; line-height: 1.35; text-align: center; }
.labels { color: var(--soft); padding-bottom: 0.2rem; }
.notes { padding-top: 0.3rem; font-variant-numeric: tabular-nums; }
video { display: block; width: 100%; height: auto; image-rendering: pixelated; }
.yes { color: var(--yes); font-weight: 700; }
.no { color: var(--no); font-weight: 700; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 1.5rem; }
.plots svg { display: block; width: 100%; max-width: 600px; height: auto; }
.plots text { font-size: 12px; fill: var(--soft); }
.axis { stroke: var(--soft); fill: none; }
.grid { stroke: var(--rule); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.25rem; margin: 0.4rem 0 0; padding: 0; list-style: none;
  font-size: 0.875rem; }
.plots .swatch { display: inline-block; width: 32px; height: 8px; margin-right: 0.4rem; vertical-align: middle; }
.facts th { width: 14rem; padding-left: 0; color: var(--soft); }
@media (max-width: 800px) { .wide { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 520px) {
  body { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.4rem; }
  .budgets { font-size: 0.875rem; }
  .budgets th, .budgets td { padding: 0.4rem 0.3rem; }
  .budgets small { font-size: 0.75rem; }
  .budgets thead th:first-child { width: 34%; }
  .plots text { font-size: 15px; }
  .facts th { width: 35%; }
}
"""

SCRIPT = """
const videos = [...document.querySelectorAll("video")];
const button = document.getElementById("play"), speed = document.getElementById("speed");
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;

function update() {
  button.textContent = playing ? "Pause all" : "Play all";
  for (const video of videos) {
    video.playbackRate = Number(speed.value);
    if (!playing) video.pause();
    else video.play().catch(error => {
      // A browser may refuse to play before the reader has touched the page; the button then offers it.
      if (error.name === "NotAllowedError" && playing) { playing = false; update(); }
    });
  }
}

if (videos.length) {
  for (const video of videos) {
    // Safari on iOS has had trouble with base64 videos (openradar 15943700); a blob is played as a file is.
    const bytes = Uint8Array.from(atob(video.src.split(",")[1]), character => character.charCodeAt(0));
    video.src = URL.createObjectURL(new Blob([bytes], {type: "video/mp4"}));
    video.addEventListener("loadeddata", () => { video.playbackRate = Number(speed.value); });
  }
  button.addEventListener("click", () => { playing = !playing; update(); });
  speed.addEventListener("change", update);
  update();
}
"""

# The policy forbids the page every request, whatever stands in it.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; media-src data: blob:; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>{lead}</header>
<main>
{main}</main>
{scripts}
</body>
</html>
"""
