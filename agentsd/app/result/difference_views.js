// Runs once; the component's HTML is replaced with each result, so events are delegated.
const FLICKER = 600; // milliseconds between the two images
const state = { mode: "slider", key: "", pair: 0, zoom: 1, x: 0.5, y: 0.5, split: 50 };
let flicker = null, race = null, drag = null;

const root = () => element.querySelector(".views:not(.views-empty)");
const find = (selector) => root()?.querySelector(selector);
const pairs = () => JSON.parse(root().dataset.pairs);
const still = matchMedia("(prefers-reduced-motion: reduce)");

function place() {
  const views = root();
  if (!views) return;
  views.dataset.mode = state.mode;
  views.style.setProperty("--split", `${state.split}%`);
  views.style.setProperty("--zoom", state.zoom);
  views.style.setProperty("--x", `${state.x * 100}%`);
  views.style.setProperty("--y", `${state.y * 100}%`);
  views.classList.toggle("zoomed", state.zoom > 1);
  find(".zoom output").textContent = `${state.zoom}×`;
  const divider = find(".divider");
  if (divider) divider.value = state.split;
  for (const button of views.querySelectorAll("[data-mode]")) {
    if (button === views) continue;
    const chosen = button.dataset.mode === state.mode;
    button.setAttribute("aria-selected", chosen);
    button.tabIndex = chosen ? 0 : -1;
  }
}

function choose(mode) {
  state.mode = mode;
  clearInterval(flicker);
  cancelAnimationFrame(race);
  root().classList.remove("other");
  if (mode === "flicker" && !still.matches)
    flicker = setInterval(() => root()?.classList.toggle("other"), FLICKER);
  place();
  if (mode === "race") run();
}

function show(number) {
  const pair = pairs()[number];
  state.pair = number;
  for (const kind of ["original", "ours"]) {
    const image = find(`figure.${kind} img`);
    image.src = pair[kind].src;
    image.alt = pair[kind].label;
    find(`figure.${kind} figcaption`).textContent = pair[kind].label;
    find(`.lane.${kind} span`).textContent = pair[kind].label;
    const link = find(`.downloads .${kind}`);
    link.href = pair[kind].src;
    link.download = pair[kind].name;
  }
  for (const button of root().querySelectorAll("[data-pair]"))
    button.setAttribute("aria-pressed", Number(button.dataset.pair) === number);
  if (state.mode === "race") run();
}

function frame(film, runner, columns, number) {
  const count = runner.times.length, rows = Math.ceil(count / columns);
  const wide = Math.min(columns, count);
  film.style.backgroundSize = `${wide * 100}% ${rows * 100}%`;
  const at = (place, all) => (all > 1 ? (100 * place) / (all - 1) : 0);
  film.style.backgroundPosition =
    `${at(number % columns, wide)}% ${at(Math.floor(number / columns), rows)}%`;
}

function run() {
  cancelAnimationFrame(race);
  const pair = pairs()[state.pair];
  const total = (runner) => runner.times[runner.times.length - 1];
  const end = Math.max(total(pair.ours), total(pair.original));
  const rate = Math.max(1, Math.ceil(end / 8));
  find(".rate").textContent = rate === 1
    ? "Each step at its measured time, in real time."
    : `Each step at its measured time, shown ${rate}× as fast as it ran.`;
  for (const kind of ["ours", "original"])
    find(`.lane.${kind} .film`).style.setProperty("--frames", `url("${pair[kind].frames}")`);
  const begun = performance.now();
  const draw = (now) => {
    if (state.mode !== "race" || !root()) return;
    const seconds = still.matches ? end : Math.min(end, (rate * (now - begun)) / 1000);
    for (const kind of ["ours", "original"]) {
      const lane = find(`.lane.${kind}`), runner = pair[kind];
      const reached = runner.times.filter((time) => time <= seconds).length;
      const mine = Math.min(seconds, total(runner));
      lane.classList.toggle("waiting", reached === 0);
      lane.classList.toggle("done", reached === runner.times.length);
      frame(lane.querySelector(".film"), runner, pair.columns, Math.max(0, reached - 1));
      lane.querySelector(".track i").style.width = `${(100 * mine) / total(runner)}%`;
      lane.querySelector("b").textContent = `${mine.toFixed(1)} s`;
    }
    if (seconds < end) race = requestAnimationFrame(draw);
  };
  race = requestAnimationFrame(draw);
}

function zoom(factor, x = state.x, y = state.y) {
  state.zoom = Math.max(1, Math.min(16, state.zoom * factor));
  [state.x, state.y] = state.zoom === 1 ? [0.5, 0.5] : [x, y];
  place();
}

const inside = (event, box) => [
  Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)),
  Math.min(1, Math.max(0, (event.clientY - box.top) / box.height)),
];

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || !root()) return;
  if (button.dataset.mode) choose(button.dataset.mode);
  else if (button.dataset.zoom) zoom(button.dataset.zoom === "in" ? 2 : 0.5);
  else if (button.dataset.pair) show(Number(button.dataset.pair));
  else if (button.classList.contains("again")) run();
});
element.addEventListener("keydown", (event) => {
  const tab = event.target.closest("[role=tab]");
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!tab || !step) return;
  const tabs = [...tab.parentElement.children];
  const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
  choose(next.dataset.mode);
  next.focus();
});
element.addEventListener("input", (event) => {
  if (!event.target.matches(".divider")) return;
  state.split = Number(event.target.value);
  place();
});
element.addEventListener("dblclick", (event) => {
  const figure = event.target.closest("figure");
  if (figure) zoom(state.zoom > 1 ? 1 / state.zoom : 4, ...inside(event, figure.getBoundingClientRect()));
});
element.addEventListener("wheel", (event) => {
  const figure = event.target.closest("figure");
  if (!figure || !(event.ctrlKey || event.metaKey)) return; // a plain wheel scrolls the page
  event.preventDefault();
  zoom(event.deltaY < 0 ? 2 : 0.5, ...inside(event, figure.getBoundingClientRect()));
}, { passive: false });
element.addEventListener("pointerdown", (event) => {
  const figure = event.target.closest("figure");
  if (!figure || event.button) return;
  const box = figure.getBoundingClientRect();
  drag = { box, x: event.clientX, y: event.clientY, from: [state.x, state.y] };
  if (state.mode === "slider" && state.zoom === 1) move(event);
  if (state.zoom > 1) event.preventDefault();
});
function move(event) {
  if (!drag) return;
  if (state.zoom > 1) {
    const scale = state.zoom - 1;
    const shift = [(event.clientX - drag.x) / drag.box.width, (event.clientY - drag.y) / drag.box.height];
    [state.x, state.y] = drag.from.map((at, i) => Math.min(1, Math.max(0, at - shift[i] / scale)));
  } else if (state.mode === "slider") {
    state.split = inside(event, drag.box)[0] * 100;
  }
  place();
}
addEventListener("pointermove", move);
addEventListener("pointerup", () => (drag = null));
addEventListener("pointercancel", () => (drag = null));

new MutationObserver(() => {
  const key = root()?.dataset.key;
  if (!key || key === state.key) return;
  Object.assign(state, { key, pair: 0, zoom: 1, x: 0.5, y: 0.5 });
  choose(state.mode);
}).observe(element, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-key"] });
