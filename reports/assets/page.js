"use strict";
/* The script of every page: videos that play in step, the player with zoom and error maps, the sortable table of clips,
   the slider of a target, and the reloading of a page that is written again while a run proceeds. */

const reducedMotion = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

function safe(text) {
  return String(text).replace(/[&<>"']/g, character => `&#${character.charCodeAt(0)};`);
}

function videoUrl(base64) {
  // A blob is played as a file is; Safari on iOS has had trouble with long data URIs (openradar 15943700).
  const bytes = Uint8Array.from(atob(base64), character => character.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], {type: "video/mp4"}));
}

function tryToPlay(video, refused = () => {}) {
  // A browser may refuse to play before the reader has touched the page; the button then offers it.
  video.play().catch(error => {
    if (error.name === "NotAllowedError") refused();
    else if (error.name !== "AbortError") throw error;
  });
}

// -- all videos of a page together -------------------------------------------------------------------------------------

function startStrips(controls) {
  const videos = [...document.querySelectorAll(".strip video")];
  const button = controls.querySelector(".play"), speed = controls.querySelector(".speed");
  let playing = !reducedMotion();
  function update() {
    button.textContent = playing ? "Pause all" : "Play all";
    for (const video of videos) {
      video.playbackRate = Number(speed.value);
      if (!playing) video.pause();
      else tryToPlay(video, () => { if (playing) { playing = false; update(); } });
    }
  }
  for (const video of videos) {
    video.src = videoUrl(video.src.split(",")[1]);
    video.addEventListener("loadeddata", () => { video.playbackRate = Number(speed.value); });
  }
  button.addEventListener("click", () => {
    playing = !playing;
    document.body.dataset.paused = playing ? "" : "yes";
    update();
  });
  speed.addEventListener("change", update);
  update();
}

function reloadEvery(seconds) {
  setInterval(() => { if (!document.body.dataset.paused) location.reload(); }, 1000 * seconds);
}

// -- the player: one film whose tiles are the original and the reconstructions of a clip -----------------------------------
// Each tile is drawn on a canvas of the clip's own size; an error map is computed there against the original's tile.

const STOPS = [[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39],
  [252, 255, 164]];
const HEAT = Array.from({length: 256}, (_, i) => {
  const place = i / 255 * (STOPS.length - 1), low = Math.min(STOPS.length - 2, Math.floor(place));
  return STOPS[low].map((value, k) => Math.round(value + (STOPS[low + 1][k] - value) * (place - low)));
});

function showErrors(contexts, width, height, gain) {
  const [first, ...others] = contexts, original = first.getImageData(0, 0, width, height).data;
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

function startViewer(root) {
  const $ = name => root.querySelector("." + name);
  const {clips, layout, every} = JSON.parse(root.dataset.player);
  const film = $("film"), tiles = [...root.querySelectorAll(".tile")], films = root.querySelectorAll(".film-data");
  const contexts = tiles.map(tile => tile.querySelector("canvas").getContext("2d", {willReadFrequently: true}));
  const lines = Object.fromEntries(tiles.map(tile => [tile.dataset.label, tile.style.getPropertyValue("--line")]));
  const shown = {clip: null, frame: 0, error: false, original: false, wanted: null, urls: new Map()};

  function filmUrl(index) {
    if (!shown.urls.has(index)) shown.urls.set(index, videoUrl(films[index].value));
    return shown.urls.get(index);
  }

  function choose(index) {
    const playing = shown.clip === null ? !reducedMotion() : !film.paused, clip = clips[index];
    shown.clip = index;
    $("clip-name").textContent = clip.name;
    $("clip-caption").textContent = clip.caption;
    $("scrub").max = clip.frames - 1;
    $("scrub").hidden = $("trace-box").hidden = clip.frames < 2;
    film.src = filmUrl(index);
    film.playbackRate = Number($("speed").value);
    shown.frame = 0;
    shown.wanted = null;
    trace();
    describe(0);
    root.dispatchEvent(new CustomEvent("clip", {detail: index}));
    if (playing) tryToPlay(film); else film.load();
  }

  function seek(frame) {
    const {frames, fps} = clips[shown.clip];
    shown.wanted = Math.max(0, Math.min(frames - 1, frame));
    film.pause();
    if (!film.seeking) film.currentTime = (shown.wanted + 0.5) / fps;
    describe(shown.wanted);
  }

  film.addEventListener("seeked", () => {
    const time = (shown.wanted + 0.5) / clips[shown.clip].fps;
    if (shown.wanted !== null && Math.abs(time - film.currentTime) > 1e-3) film.currentTime = time;
    else draw();
  });
  film.addEventListener("loadeddata", () => draw());
  for (const name of ["play", "pause"]) film.addEventListener(name, () => {
    $("play").textContent = film.paused ? "Play" : "Pause";
    if (!film.paused) shown.wanted = null;
  });

  function onFrame(now, metadata) {
    draw(metadata ? metadata.mediaTime : undefined);
    waitForFrame();
  }
  function waitForFrame() {
    if (!root.isConnected) return;  // the app has replaced this player by another one
    if (film.requestVideoFrameCallback) film.requestVideoFrameCallback(onFrame);
    else requestAnimationFrame(() => onFrame());
  }

  function draw(mediaTime) {
    if (shown.clip === null || film.readyState < 2) return;
    const {fps, frames} = clips[shown.clip], {width, height, scale, columns, gap} = layout;
    contexts.forEach((context, i) => {
      const k = shown.original ? 0 : i, w = width * scale, h = height * scale;
      context.drawImage(film, (k % columns) * (w + gap), Math.floor(k / columns) * (h + gap), w, h, 0, 0, width, height);
    });
    if (shown.error) showErrors(contexts, width, height, Number($("gain").value));
    const time = mediaTime === undefined ? film.currentTime : mediaTime + 0.5 / fps;
    describe(shown.wanted ?? Math.max(0, Math.min(frames - 1, Math.floor(time * fps + 1e-3))));
  }

  function describe(frame) {
    const clip = clips[shown.clip], x = clip.frames > 1 ? 1000 * frame / (clip.frames - 1) : 0;
    shown.frame = frame;
    $("scrub").value = frame;
    $("where").textContent = `frame ${frame + 1} of ${clip.frames}, ${(frame / clip.fps).toFixed(2)} s`;
    $("head").setAttribute("x1", x);
    $("head").setAttribute("x2", x);
    for (const tile of tiles) {
      const values = clip.per_frame[tile.dataset.label];
      if (values) tile.querySelector("p").innerHTML = `<b>${clip.psnr[tile.dataset.label].toFixed(2)} dB</b> clip · `
        + `${values[frame].toFixed(2)} dB this frame`;
    }
  }

  function trace() {
    const clip = clips[shown.clip], all = Object.values(clip.per_frame).flat(), svg = $("trace");
    const low = Math.min(...all), span = Math.max(...all) - low || 1;
    const x = frame => clip.frames > 1 ? 1000 * frame / (clip.frames - 1) : 0;
    let drawn = "";
    for (let frame = 0; frame < clip.frames; frame += every)
      drawn += `<line class="key" x1="${x(frame)}" x2="${x(frame)}" y1="0" y2="84"/>`;
    for (const [label, values] of Object.entries(clip.per_frame)) {
      const points = values.map((value, frame) => `${x(frame).toFixed(1)},${(80 - 76 * (value - low) / span).toFixed(1)}`);
      drawn += `<polyline style="stroke:${lines[label]}" points="${points.join(" ")}"/>`;
    }
    svg.innerHTML = drawn + '<line class="head" y1="0" y2="84" x1="0" x2="0"/>';
    $("high").textContent = `${(low + span).toFixed(1)} dB`;
    $("low").textContent = `${low.toFixed(1)} dB`;
  }

  function goTo(event) {
    const box = $("trace").getBoundingClientRect();
    seek(Math.round((event.clientX - box.left) / box.width * (clips[shown.clip].frames - 1)));
  }
  $("trace").addEventListener("pointerdown", event => { $("trace").setPointerCapture(event.pointerId); goTo(event); });
  $("trace").addEventListener("pointermove", event => { if (event.buttons) goTo(event); });

  // -- buttons and keys

  function toggleError() {
    shown.error = !shown.error;
    $("error").setAttribute("aria-pressed", shown.error);
    $("heat").hidden = !shown.error;
    draw();
  }
  function holdOriginal(on) {
    shown.original = on;
    $("original").setAttribute("aria-pressed", on);
    draw();
  }
  function other(step) {
    const rows = [...document.querySelectorAll(".clips tbody tr")], order = rows.map(row => Number(row.dataset.clip));
    if (order.length) choose(order[(order.indexOf(shown.clip) + step + order.length) % order.length]);
  }
  const step = by => seek(shown.frame + by);
  $("play").addEventListener("click", () => { if (film.paused) tryToPlay(film); else film.pause(); });
  $("back").addEventListener("click", () => step(-1));
  $("forward").addEventListener("click", () => step(1));
  $("scrub").addEventListener("input", () => seek(Number($("scrub").value)));
  $("speed").addEventListener("change", () => { film.playbackRate = Number($("speed").value); });
  $("error").addEventListener("click", toggleError);
  $("gain").addEventListener("change", () => { $("saturates").textContent = Math.round(255 / $("gain").value); draw(); });
  $("original").addEventListener("click", () => holdOriginal(!shown.original));

  const KEYS = {
    " ": () => $("play").click(), k: () => $("play").click(), ArrowLeft: () => step(-1), ArrowRight: () => step(1),
    j: () => step(-8), l: () => step(8), Home: () => seek(0), End: () => seek(clips[shown.clip].frames - 1),
    e: toggleError, o: () => holdOriginal(!shown.original), n: () => other(1), p: () => other(-1),
    "+": () => look(view.zoom * 1.5), "-": () => look(view.zoom / 1.5), 0: () => look(1, 0.5, 0.5),
  };
  function onKey(event) {
    if (!root.isConnected) return document.removeEventListener("keydown", onKey);
    if (!root.checkVisibility()) return;  // another tab of the app is shown
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, video")) return;
    if (event.key === " " && event.target.closest("button, summary")) return;
    const action = KEYS[event.key];
    if (action) { event.preventDefault(); action(); }
  }
  document.addEventListener("keydown", onKey);

  // -- zoom, the same in every tile

  const view = {zoom: 1, cx: 0.5, cy: 0.5, fingers: new Map(), distance: 0, moved: false};
  function look(zoom, cx = view.cx, cy = view.cy) {
    const inside = value => Math.max(0, Math.min(1, value));
    Object.assign(view, {zoom: Math.max(1, Math.min(16, zoom)), cx: inside(cx), cy: inside(cy)});
    for (const name of ["zoom", "cx", "cy"]) $("tiles").style.setProperty("--" + name, view[name]);
    $("tiles").classList.toggle("zoomed", view.zoom > 1);
    $("zoom-reset").textContent = `${Number(view.zoom.toFixed(1))}×`;
  }
  function pointAt(event) {
    const box = event.currentTarget.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }
  $("zoom-in").addEventListener("click", () => look(view.zoom * 1.5));
  $("zoom-out").addEventListener("click", () => look(view.zoom / 1.5));
  $("zoom-reset").addEventListener("click", () => look(1, 0.5, 0.5));
  for (const frame of root.querySelectorAll(".frame")) {
    frame.addEventListener("pointerdown", event => {
      view.fingers.set(event.pointerId, [event.clientX, event.clientY]);
      view.moved = false;
      view.distance = 0;
      if (view.zoom > 1 || view.fingers.size > 1) frame.setPointerCapture(event.pointerId);
    });
    frame.addEventListener("pointermove", event => {
      const before = view.fingers.get(event.pointerId);
      if (!before) return;
      const dx = event.clientX - before[0], dy = event.clientY - before[1], box = frame.getBoundingClientRect();
      if (Math.abs(dx) + Math.abs(dy) > 3) view.moved = true;
      view.fingers.set(event.pointerId, [event.clientX, event.clientY]);
      if (view.fingers.size > 1) {
        const [a, b] = [...view.fingers.values()], distance = Math.hypot(a[0] - b[0], a[1] - b[1]);
        if (view.distance) look(view.zoom * distance / view.distance);
        view.distance = distance;
      } else if (view.zoom > 1) {
        look(view.zoom, view.cx - dx / box.width / (view.zoom - 1), view.cy - dy / box.height / (view.zoom - 1));
      }
    });
    for (const name of ["pointerup", "pointercancel", "pointerleave"])
      frame.addEventListener(name, event => { view.fingers.delete(event.pointerId); view.distance = 0; });
    frame.addEventListener("click", event => { if (!view.moved && view.zoom === 1) look(3, ...pointAt(event)); });
    frame.addEventListener("dblclick", () => { if (view.zoom > 1 && !view.moved) look(1, 0.5, 0.5); });
    frame.addEventListener("wheel", event => {
      if (!event.ctrlKey && view.zoom === 1) return;  // a wheel without Ctrl scrolls the page until one has zoomed in
      event.preventDefault();
      look(view.zoom * Math.exp(-event.deltaY / 300), ...(view.zoom === 1 ? pointAt(event) : [view.cx, view.cy]));
    }, {passive: false});
  }

  root.viewer = {film, clips, shown, lines, choose, seek, play: () => tryToPlay(film)};
  look(1);
  waitForFrame();
  choose(0);
}

// -- the table of clips ------------------------------------------------------------------------------------------------

function startClips(table) {
  const body = table.tBodies[0], root = document.querySelector(".viewer");
  const mark = index => { for (const row of body.rows) row.classList.toggle("chosen", Number(row.dataset.clip) === index); };
  table.querySelectorAll("thead th").forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const cell of head.parentNode.children) cell.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => {
      const text = row.cells[column].dataset.value ?? row.cells[column].textContent;
      return isNaN(Number(text)) ? text : Number(text);
    };
    const order = (a, b) => typeof a === "string" || typeof b === "string"
      ? String(a).localeCompare(String(b), undefined, {numeric: true}) : a - b;
    const rows = [...body.rows].sort((a, b) => order(value(a), value(b)) * (up ? 1 : -1));
    body.append(...rows);
  }));
  body.addEventListener("click", event => {
    root.viewer.choose(Number(event.target.closest("tr").dataset.clip));
    if (!reducedMotion()) root.viewer.play();
    root.scrollIntoView({block: "nearest", behavior: "smooth"});
  });
  root.addEventListener("clip", event => mark(event.detail));
  if (root.viewer) mark(root.viewer.shown.clip);
}

// -- the smallest budget for a target ------------------------------------------------------------------------------------

function cheapestLevel(psnr, target) {
  // Levels stand in order of falling tokens: the last that is good enough is the cheapest; where none is, the best.
  for (let level = psnr.length - 1; level >= 0; level--) if (psnr[level] >= target) return level;
  return psnr.lastIndexOf(Math.max(...psnr));
}

function startTarget(root) {
  const $ = name => root.querySelector("." + name), {levels, clips, segments, whole, names} = JSON.parse(root.dataset.levels);
  function update() {
    const by = root.querySelector("[name=by]:checked").value, target = Number($("aim").value);
    const tokens = levels.map(level => level[by + "_tokens"]), parts = by === "clip" ? clips.map(clip => [clip]) : segments;
    const coded = (by === "clip" ? parts : whole).flat();  // the same parts where every clip is coded whole
    const chosen = parts.map(clip => clip.map(psnr => cheapestLevel(psnr, target)));
    const all = parts.flatMap((clip, i) => clip.map((psnr, j) => ({psnr, level: chosen[i][j]})));
    const spent = all.reduce((sum, part) => sum + tokens[part.level], 0);
    const worst = Math.min(...all.map(part => part.psnr[part.level]));
    const missed = all.filter(part => part.psnr[part.level] < target).length;
    let fixed = 0;  // the cheapest level whose worst part is no worse and that misses no more
    levels.forEach((_, level) => {
      const values = coded.map(psnr => psnr[level]);
      if (Math.min(...values) >= worst && values.filter(value => value < target).length <= missed) fixed = level;
    });
    const cost = clips.length * levels[fixed].clip_tokens, fixedWorst = Math.min(...coded.map(psnr => psnr[fixed]));
    const saved = 1 - spent / cost, share = Math.abs(100 * saved).toFixed(1);
    const counts = levels.map((level, i) => `${all.filter(part => part.level === i).length} at ${level.name}`).join(", ");
    $("aimed").textContent = `${target.toFixed(1)} dB`;
    $("outcome").textContent = `${counts}: ${spent.toLocaleString("en")} tokens, ${share} % ${saved < 0 ? "more" : "fewer"} `
      + `than ${levels[fixed].name} everywhere (${cost.toLocaleString("en")} tokens, worst case ${fixedWorst.toFixed(2)} dB). `
      + `Worst case ${worst.toFixed(2)} dB.`
      + (missed ? ` ${missed} of ${all.length} miss the target at every level and get their best one.` : "");
    const bar = (psnr, level) => `<i class="${psnr[level] < target ? "missed" : ""}" style="--line:${levels[level].line}">`
      + `${safe(levels[level].name)} ${psnr[level].toFixed(1)}</i>`;
    $("levels").innerHTML = names.map((name, i) => `<div><span>${safe(name)}</span><div class="cells">${
      chosen[i].map((level, j) => bar(parts[i][j], level)).join("")}</div></div>`).join("");
    for (const row of document.querySelectorAll(".clips tbody tr")) {
      const psnr = clips[row.dataset.place], level = cheapestLevel(psnr, target), cell = row.querySelector(".smallest");
      cell.textContent = levels[level].name + (psnr[level] < target ? " (misses)" : "");
      cell.dataset.value = level;
    }
  }
  $("aim").addEventListener("input", update);
  for (const choice of root.querySelectorAll("[name=by]")) choice.addEventListener("change", update);
  root.update = update;
  update();
}

// -- start: at once in a page, and whenever the app puts in a new part -------------------------------------------------------

const PARTS = {".controls": startStrips, ".viewer": startViewer, ".clips": startClips, ".target": startTarget};
function startParts() {
  for (const [selector, start] of Object.entries(PARTS))
    for (const part of document.querySelectorAll(`${selector}:not([data-started])`)) {
      part.dataset.started = "yes";
      start(part);
    }
}
startParts();
new MutationObserver(startParts).observe(document, {childList: true, subtree: true});
if (document.body?.dataset.reload) reloadEvery(Number(document.body.dataset.reload));
