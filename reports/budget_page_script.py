"""What the page of token budgets does: one player for every clip, zoom, error maps, a sortable table, the target slider.

All videos of a clip are tiles of one film, so they are in step whatever the browser does. A tile is drawn on a canvas of the
clip's own size; an error map is computed there from the original's tile and the reconstruction's.
"""
# ruff: noqa: RUF001 (the page is set with × and −)

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const film = $("film"), tiles = [...document.querySelectorAll(".tile")], grid = $("tiles");
const contexts = tiles.map(tile => tile.querySelector("canvas").getContext("2d", {willReadFrequently: true}));
const shown = {clip: null, frame: 0, error: false, original: false, wanted: null, urls: new Map()};

function safe(text) {
  return String(text).replace(/[&<>"]/g, character => `&#${character.charCodeAt(0)};`);
}

// -- one film at a time ----------------------------------------------------------------------------------------------

function url(index) {
  // A blob is played as a file is; Safari on iOS has had trouble with long data URIs (openradar 15943700).
  if (!shown.urls.has(index)) {
    const text = $("film-" + index).textContent.trim();
    const bytes = Uint8Array.from(atob(text), character => character.charCodeAt(0));
    shown.urls.set(index, URL.createObjectURL(new Blob([bytes], {type: "video/mp4"})));
  }
  return shown.urls.get(index);
}

function choose(index) {
  const playing = shown.clip === null ? !matchMedia("(prefers-reduced-motion: reduce)").matches : !film.paused;
  const clip = data.clips[index];
  shown.clip = index;
  $("clip-name").textContent = clip.name;
  $("clip-caption").textContent = clip.caption;
  $("scrub").max = clip.frames - 1;
  for (const row of document.querySelectorAll(".clips tbody tr")) row.classList.toggle("chosen", row.dataset.clip == index);
  film.src = url(index);
  film.playbackRate = Number($("speed").value);
  shown.frame = 0;
  shown.wanted = null;
  trace();
  if (playing) play(); else film.load();
}

function play() {
  film.play().catch(error => {
    // A browser may refuse to play before the reader has touched the page; the button then offers it.
    if (error.name !== "NotAllowedError" && error.name !== "AbortError") throw error;
  });
}

function seek(frame) {
  const count = data.clips[shown.clip].frames;
  shown.wanted = Math.max(0, Math.min(count - 1, frame));
  film.pause();
  if (!film.seeking) film.currentTime = (shown.wanted + 0.5) / data.clips[shown.clip].fps;
  tell(shown.wanted);
}

film.addEventListener("seeked", () => {
  const time = (shown.wanted + 0.5) / data.clips[shown.clip].fps;
  if (shown.wanted !== null && Math.abs(time - film.currentTime) > 1e-3) film.currentTime = time;
  else draw();
});
film.addEventListener("loadeddata", draw);
for (const name of ["play", "pause"]) film.addEventListener(name, () => {
  $("play").textContent = film.paused ? "Play" : "Pause";
  if (!film.paused) shown.wanted = null;
});

function present(now, metadata) {
  draw(metadata ? metadata.mediaTime : undefined);
  next();
}
function next() {
  if (film.requestVideoFrameCallback) film.requestVideoFrameCallback(present);
  else requestAnimationFrame(present);
}

// -- drawing ---------------------------------------------------------------------------------------------------------

const STOPS = [[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39],
  [252, 255, 164]];
const HEAT = Array.from({length: 256}, (_, i) => {
  const place = i / 255 * (STOPS.length - 1), low = Math.min(STOPS.length - 2, Math.floor(place));
  return STOPS[low].map((value, k) => Math.round(value + (STOPS[low + 1][k] - value) * (place - low)));
});

function draw(mediaTime) {
  if (shown.clip === null || film.readyState < 2) return;
  const clip = data.clips[shown.clip], {width, height, across, scale} = data.tile;
  const time = typeof mediaTime === "number" ? mediaTime + 0.5 / clip.fps : film.currentTime;
  contexts.forEach((context, i) => {
    const k = shown.original ? 0 : i, w = width * scale, h = height * scale;
    context.drawImage(film, (k % across) * w, Math.floor(k / across) * h, w, h, 0, 0, width, height);
  });
  if (shown.error) errors(width, height);
  tell(shown.wanted !== null ? shown.wanted : Math.max(0, Math.min(clip.frames - 1, Math.floor(time * clip.fps + 1e-3))));
}

function errors(width, height) {
  const [first, ...others] = contexts, gain = Number($("gain").value);
  const original = first.getImageData(0, 0, width, height).data;
  for (const context of others) {
    const picture = context.getImageData(0, 0, width, height), pixels = picture.data;
    for (let i = 0; i < pixels.length; i += 4) {
      const error = (Math.abs(pixels[i] - original[i]) + Math.abs(pixels[i + 1] - original[i + 1])
        + Math.abs(pixels[i + 2] - original[i + 2])) / 3;
      const [r, g, b] = HEAT[Math.min(255, Math.round(error * gain))];
      pixels[i] = r; pixels[i + 1] = g; pixels[i + 2] = b;
    }
    context.putImageData(picture, 0, 0);
  }
}

function tell(frame) {
  const clip = data.clips[shown.clip];
  shown.frame = frame;
  $("scrub").value = frame;
  $("where").textContent = `frame ${frame + 1} of ${clip.frames}, ${(frame / clip.fps).toFixed(2)} s`;
  const head = $("head"), x = clip.frames > 1 ? 1000 * frame / (clip.frames - 1) : 0;
  head.setAttribute("x1", x); head.setAttribute("x2", x);
  tiles.forEach(tile => {
    const name = tile.dataset.budget, values = clip.per_frame[name];
    if (values) tile.querySelector("p").innerHTML =
      `<b>${clip.psnr[name].toFixed(2)} dB</b> clip · ${values[frame].toFixed(2)} dB this frame`;
  });
}

function trace() {
  const clip = data.clips[shown.clip], names = Object.keys(clip.per_frame);
  const all = names.flatMap(name => clip.per_frame[name]), low = Math.min(...all), span = Math.max(...all) - low || 1;
  const place = (value, i) => `${1000 * i / Math.max(1, clip.frames - 1)},${(80 - 76 * (value - low) / span).toFixed(2)}`;
  const lines = names.map(name => `<polyline style="stroke:var(${data.lines[name]})" points="${
    clip.per_frame[name].map(place).join(" ")}"/>`);
  let ticks = "";
  for (let i = 0; i < clip.frames; i += data.every) {
    const x = 1000 * i / Math.max(1, clip.frames - 1);
    ticks += `<line class="key" x1="${x}" x2="${x}" y1="0" y2="84"/>`;
  }
  $("trace").innerHTML = `${ticks}${lines.join("")}<line id="head" y1="0" y2="84"/>`;
  $("low").textContent = `${low.toFixed(1)} dB`;
  $("high").textContent = `${(low + span).toFixed(1)} dB`;
  tell(0);
}

function along(event) {
  const box = $("trace").getBoundingClientRect();
  seek(Math.round((event.clientX - box.left) / box.width * (data.clips[shown.clip].frames - 1)));
}
$("trace").addEventListener("pointerdown", event => { $("trace").setPointerCapture(event.pointerId); along(event); });
$("trace").addEventListener("pointermove", event => { if (event.buttons) along(event); });

// -- controls --------------------------------------------------------------------------------------------------------

function press(id, on) { $(id).setAttribute("aria-pressed", on); }
function toggleError() {
  shown.error = !shown.error;
  press("error", shown.error);
  $("heat").hidden = !shown.error;
  redraw();
}
function holdOriginal(on) { shown.original = on; press("original", on); redraw(); }
function redraw() { if (film.paused) draw(); }
function step(frames) { seek(shown.frame + frames); }
function other(rows) {
  const order = [...document.querySelectorAll(".clips tbody tr")].map(row => Number(row.dataset.clip));
  choose(order[(order.indexOf(shown.clip) + rows + order.length) % order.length]);
}
$("play").addEventListener("click", () => { if (film.paused) play(); else film.pause(); });
$("back").addEventListener("click", () => step(-1));
$("forth").addEventListener("click", () => step(1));
$("scrub").addEventListener("input", () => seek(Number($("scrub").value)));
$("speed").addEventListener("change", () => { film.playbackRate = Number($("speed").value); });
$("error").addEventListener("click", toggleError);
$("gain").addEventListener("change", () => { $("most").textContent = Math.round(255 / $("gain").value); redraw(); });
$("original").addEventListener("click", () => holdOriginal(!shown.original));

const view = {zoom: 1, cx: 0.5, cy: 0.5, fingers: new Map(), apart: 0, moved: false};
function look(zoom, cx = view.cx, cy = view.cy) {
  const inside = value => Math.max(0, Math.min(1, value));
  Object.assign(view, {zoom: Math.max(1, Math.min(16, zoom)), cx: inside(cx), cy: inside(cy)});
  for (const name of ["zoom", "cx", "cy"]) grid.style.setProperty("--" + name, view[name]);
  grid.classList.toggle("zoomed", view.zoom > 1);
  $("zoomed").textContent = `${Number(view.zoom.toFixed(1))}×`;
}
function at(event) {
  const box = event.currentTarget.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}
$("in").addEventListener("click", () => look(view.zoom * 1.5));
$("out").addEventListener("click", () => look(view.zoom / 1.5));
$("zoomed").addEventListener("click", () => look(1, 0.5, 0.5));
for (const frame of document.querySelectorAll(".frame")) {
  frame.addEventListener("pointerdown", event => {
    view.fingers.set(event.pointerId, [event.clientX, event.clientY]);
    view.moved = false;
    view.apart = 0;
    if (view.zoom > 1 || view.fingers.size > 1) frame.setPointerCapture(event.pointerId);
  });
  frame.addEventListener("pointermove", event => {
    const before = view.fingers.get(event.pointerId);
    if (!before) return;
    const dx = event.clientX - before[0], dy = event.clientY - before[1], box = frame.getBoundingClientRect();
    if (Math.abs(dx) + Math.abs(dy) > 3) view.moved = true;
    view.fingers.set(event.pointerId, [event.clientX, event.clientY]);
    if (view.fingers.size > 1) {
      const [a, b] = [...view.fingers.values()], apart = Math.hypot(a[0] - b[0], a[1] - b[1]);
      if (view.apart) look(view.zoom * apart / view.apart);
      view.apart = apart;
    } else if (view.zoom > 1) {
      look(view.zoom, view.cx - dx / box.width / (view.zoom - 1), view.cy - dy / box.height / (view.zoom - 1));
    }
  });
  for (const name of ["pointerup", "pointercancel", "pointerleave"])
    frame.addEventListener(name, event => { view.fingers.delete(event.pointerId); view.apart = 0; });
  frame.addEventListener("click", event => { if (!view.moved && view.zoom === 1) look(3, ...at(event)); });
  frame.addEventListener("dblclick", () => { if (view.zoom > 1 && !view.moved) look(1, 0.5, 0.5); });
  frame.addEventListener("wheel", event => {
    if (!event.ctrlKey && view.zoom === 1) return;  // a wheel without Ctrl scrolls the page until one has zoomed in
    event.preventDefault();
    look(view.zoom * Math.exp(-event.deltaY / 300), ...(view.zoom === 1 ? at(event) : [view.cx, view.cy]));
  }, {passive: false});
}

const KEYS = {
  " ": () => $("play").click(), k: () => $("play").click(), ArrowLeft: () => step(-1), ArrowRight: () => step(1),
  j: () => step(-8), l: () => step(8), Home: () => seek(0), End: () => seek(data.clips[shown.clip].frames - 1),
  e: toggleError, o: () => holdOriginal(!shown.original), n: () => other(1), p: () => other(-1),
  "+": () => look(view.zoom * 1.5), "-": () => look(view.zoom / 1.5), 0: () => look(1, 0.5, 0.5),
};
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  if (event.key === " " && event.target.closest("button")) return;
  const action = KEYS[event.key];
  if (action) { event.preventDefault(); action(); }
});

// -- table of clips --------------------------------------------------------------------------------------------------

const body = document.querySelector(".clips tbody");
document.querySelectorAll(".clips thead th").forEach((head, column) => head.querySelector("button")?.addEventListener("click",
  () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const cell of head.parentNode.children) cell.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => {
      const text = row.cells[column].dataset.value ?? row.cells[column].textContent;
      return isNaN(Number(text)) ? text : Number(text);
    };
    const rows = [...body.rows].sort((a, b) => (value(a) > value(b) ? 1 : value(a) < value(b) ? -1 : 0) * (up ? 1 : -1));
    body.append(...rows);
  }));
body.addEventListener("click", event => {
  const row = event.target.closest("tr");
  choose(Number(row.dataset.clip));
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) play();
  $("viewer").scrollIntoView({block: "nearest", behavior: "smooth"});
});

// -- smallest budget for a target --------------------------------------------------------------------------------------

function smallest(psnr, target) {
  // Levels stand in order of falling tokens: the last that is good enough is the cheapest; where none is, the best.
  for (let level = psnr.length - 1; level >= 0; level--) if (psnr[level] >= target) return level;
  return psnr.lastIndexOf(Math.max(...psnr));
}

function adapt() {
  const {levels, clips, segments} = data.adaptive, by = document.querySelector("[name=by]:checked").value;
  const target = Number($("target").value), tokens = levels.map(level => level[by + "_tokens"]);
  const parts = by === "clip" ? clips.map(clip => [clip]) : segments;
  const chosen = parts.map(clip => clip.map(psnr => smallest(psnr, target)));
  const all = parts.flatMap((clip, i) => clip.map((psnr, j) => ({psnr, level: chosen[i][j]})));
  const spent = all.reduce((sum, part) => sum + tokens[part.level], 0);
  const worst = Math.min(...all.map(part => part.psnr[part.level]));
  const missed = all.filter(part => part.psnr[part.level] < target).length;
  let fixed = 0;  // the cheapest level whose worst part is no worse and that misses no more
  levels.forEach((_, level) => {
    const values = all.map(part => part.psnr[level]);
    if (Math.min(...values) >= worst && values.filter(value => value < target).length <= missed) fixed = level;
  });
  const saved = 1 - spent / (all.length * tokens[fixed]), share = Math.abs(100 * saved).toFixed(1);
  const counts = levels.map((level, i) => `${all.filter(part => part.level === i).length} at ${level.name}`).join(", ");
  $("aim").textContent = `${target.toFixed(1)} dB`;
  $("told").textContent = `${counts}: ${spent.toLocaleString("en")} tokens, ${share} % ${saved < 0 ? "more" : "fewer"} than `
    + `${levels[fixed].name} everywhere. Worst case ${worst.toFixed(2)} dB.`
    + (missed ? ` ${missed} of ${all.length} miss the target at every level and get their best one.` : "");
  const bar = (psnr, level) => `<i class="${psnr[level] < target ? "missed" : ""}" style="--line:var(${
    data.lines[levels[level].name]})">${safe(levels[level].name)} ${psnr[level].toFixed(1)}</i>`;
  $("levels").innerHTML = data.adaptive.names.map((name, i) => `<div><span>${safe(name)}</span><div class="cells">${
    chosen[i].map((level, j) => bar(parts[i][j], level)).join("")}</div></div>`).join("");
  for (const row of body.rows) {
    const level = smallest(clips[row.dataset.place], target), cell = row.querySelector(".smallest");
    cell.textContent = levels[level].name + (clips[row.dataset.place][level] < target ? " (misses)" : "");
    cell.dataset.value = level;
  }
}

if (data.adaptive) {
  $("target").addEventListener("input", adapt);
  for (const choice of document.querySelectorAll("[name=by]")) choice.addEventListener("change", adapt);
  adapt();
}
if (data.clips.length) { next(); choose(0); }
look(1);
"""
