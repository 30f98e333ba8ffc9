// The rest of the page: sides, buttons, filter, theme; and the first drawing.
const panes = document.querySelector(".panes");

function show(side) {
  active = side;
  panes.dataset.show = side.name;
  for (const button of document.querySelectorAll("[data-show][aria-pressed]"))
    button.setAttribute("aria-pressed", button.dataset.show === side.name);
  if (!side.fitted) fit(side);
}
for (const button of document.querySelectorAll("button[data-show]"))
  button.addEventListener("click", () => show(sides[button.dataset.show]));

const DO = {
  in: (side) => zoom(side, 1.25),
  out: (side) => zoom(side, 0.8),
  fit,
  open: (side) => setAll(side, true),
  close: (side) => setAll(side, false),
};
for (const button of document.querySelectorAll("[data-do]"))
  button.addEventListener("click", () => [before, after].forEach(DO[button.dataset.do]));

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, select, textarea");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    search.focus();
    event.preventDefault();
  } else if (event.key === "Escape" && !typing) choose(active, null);
});

const filter = byId("filter");
const filterable = [...document.querySelectorAll(".filterable")].map((element) => [element, element.textContent.toLowerCase()]);
filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const [element, text] of filterable) {
    const title = element.closest(".group");
    const inside = title ? `${text} ${title.firstElementChild.textContent.toLowerCase()}` : text;
    element.hidden = !words.every((word) => inside.includes(word));
    shown += !element.hidden;
  }
  for (const group of document.querySelectorAll(".group")) {
    group.hidden = !group.querySelector(".filterable:not([hidden])");
    group.open = words.length > 0 && !group.hidden;
  }
  byId("filter-count").textContent = words.length ? `${shown} of ${filterable.length}` : "";
});

// Kept where the browser lets a file keep something.
const theme = byId("theme");
const THEMES = ["system", "light", "dark"];
const kept = { get: () => null, set: () => undefined };
try {
  const { localStorage } = window;
  kept.get = () => localStorage.getItem("graphopt-theme");
  kept.set = (value) => localStorage.setItem("graphopt-theme", value);
} catch { /* none here */ }
function paint(value) {
  if (value === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = value;
  theme.textContent = `Theme: ${value}`;
}
theme.hidden = false;
paint(THEMES.includes(kept.get()) ? kept.get() : "system");
theme.addEventListener("click", () => {
  const now = document.documentElement.dataset.theme || "system";
  const next = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
  paint(next);
  kept.set(next);
});
window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));

const ROOM = 24;
openSome(ROOM);
for (const side of [before, after]) {
  draw(side);
  fit(side);
  listen(side);
}
drawCosts();
let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === width) return;
  width = window.innerWidth;
  drawCosts();
  [before, after].forEach(fit);
});
