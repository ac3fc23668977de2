// Borders between the bars of the timeline: dragged, or moved with the arrow keys.
let held = null;

const bars = () => element.querySelector(".bars");
const neighbours = (border) => [border.previousElementSibling, border.nextElementSibling];
const span = (bar) => Number(bar.style.flexGrow);

function range(border) {
  const now = Number(border.getAttribute("aria-valuenow"));
  const [left, right] = neighbours(border);
  return [now - span(left) + 1, now + span(right) - 1];
}
function preview(border, step) {
  const now = Number(border.getAttribute("aria-valuenow"));
  const [left, right] = neighbours(border);
  left.style.flexGrow = span(left) + step - now;
  right.style.flexGrow = span(right) - step + now;
  border.setAttribute("aria-valuenow", step);
}
function commit(border) {
  const data = { phase: Number(border.dataset.phase), step: Number(border.getAttribute("aria-valuenow")) };
  trigger("input", data);
}
const clamp = (value, [low, high]) => Math.min(high, Math.max(low, value));

element.addEventListener("pointerdown", (event) => {
  const border = event.target.closest(".border");
  if (!border) return;
  event.preventDefault();
  border.focus();
  held = { border, from: border.getAttribute("aria-valuenow"), limits: range(border) };
});
addEventListener("pointermove", (event) => {
  if (!held) return;
  const box = bars().getBoundingClientRect();
  const steps = [...bars().querySelectorAll(".bar")].reduce((sum, bar) => sum + span(bar), 0);
  const step = Math.round(((event.clientX - box.left) / box.width) * steps);
  preview(held.border, clamp(step, held.limits));
});
addEventListener("pointerup", () => {
  const last = held;
  held = null;
  if (last && last.border.getAttribute("aria-valuenow") !== last.from) commit(last.border);
});
element.addEventListener("keydown", (event) => {
  const border = event.target.closest(".border");
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!border || !by) return;
  event.preventDefault();
  const now = Number(border.getAttribute("aria-valuenow"));
  const step = clamp(now + by, range(border));
  if (step === now) return;
  preview(border, step);
  commit(border);
});
