// Looking at a side: pan, zoom, opening modules; and the op that is chosen, with its counterparts.
const before = makeSide("before", "after");
const after = makeSide("after", "before");
const sides = { before, after };
let chosen = null; // [side, op]
let active = before;

for (const side of [before, after]) {
  side.drawing = byId(`drawing-${side.name}`);
  side.layer = svg("g");
  side.drawing.append(side.layer);
  side.view = { x: 0, y: 0, z: 1 };
}

function look(side) {
  const { x, y, z } = side.view;
  side.layer.setAttribute("transform", `translate(${x} ${y}) scale(${z})`);
}

const frame = (side) => side.drawing.getBoundingClientRect();

function fit(side) {
  const { width } = frame(side);
  if (!width) return;
  const z = Math.min(1, Math.max(0.12, (width - 16) / side.size.w));
  side.view = { z, x: (width - z * side.size.w) / 2, y: 10 };
  side.fitted = true;
  look(side);
}

function pan(side, dx, dy) {
  side.view.x += dx;
  side.view.y += dy;
  look(side);
}

// Around a point of the drawing, by default its middle.
function zoom(side, by, point) {
  const { width, height } = frame(side);
  const [px, py] = point || [width / 2, height / 2];
  const z = Math.min(4, Math.max(0.05, side.view.z * by));
  const real = z / side.view.z;
  side.view = { z, x: px - (px - side.view.x) * real, y: py - (py - side.view.y) * real };
  look(side);
}

function center(side, k) {
  const shown = side.elements.get(visible(side, k));
  const { left, top, width, height } = frame(side);
  if (!shown || !width) return;
  if (!side.fitted) fit(side);
  if (side.view.z < 0.5) zoom(side, 0.8 / side.view.z);
  const box = shown.getBoundingClientRect();
  if (box.left >= left && box.right <= left + width && box.top >= top && box.bottom <= top + height) return;
  pan(side, left + width / 2 - (box.left + box.width / 2), top + height / 2 - (box.top + Math.min(box.height, height) / 2));
}

// A place, or the closed module that it is inside of.
function visible(side, k) {
  const closed = around(side, k).filter((m) => !side.open.has(m));
  return closed.length ? closed[closed.length - 1] : k;
}

function toggle(side, m) {
  const path = side.modules[m - side.ops.length].path;
  const opens = !side.open.has(m);
  const held = side.elements.get(m).getBoundingClientRect();
  for (const one of [before, after]) {
    const twin = one.modules.findIndex((module) => module.path === path);
    if (twin < 0) continue;
    one.open[opens ? "add" : "delete"](one.ops.length + twin);
    draw(one);
  }
  const now = side.elements.get(m);
  const box = now.getBoundingClientRect();
  pan(side, held.left - box.left, held.top - box.top);
  now.focus({ preventScroll: true });
}

// As many modules as there is room for, the largest first; the same ones on both sides.
function openSome(room) {
  const side = before.ops.length ? before : after;
  const closed = () => [...side.elements.keys()].filter((k) => k >= side.ops.length && !side.open.has(k));
  const seen = () => [...side.elements.keys()].filter((k) => !side.open.has(k)).length;
  const inside = (m) => side.modules[m - side.ops.length].rows.flat().filter((k) => k >= 0).length;
  draw(side);
  for (;;) {
    const [next] = closed().filter((m) => seen() + inside(m) - 1 <= room)
      .sort((a, b) => side.count[b - side.ops.length] - side.count[a - side.ops.length]);
    if (next === undefined) break;
    side.open.add(next);
    draw(side);
  }
  const paths = new Set([...side.open].map((m) => side.modules[m - side.ops.length].path));
  for (const one of [before, after])
    one.modules.forEach((module, m) => paths.has(module.path) && one.open.add(one.ops.length + m));
}

function setAll(side, open) {
  side.open = new Set(open ? side.modules.map((_, m) => side.ops.length + m) : [side.ops.length]);
  draw(side);
  fit(side);
}

function reveal(side, k) {
  around(side, k).forEach((m) => side.open.add(m));
  draw(side);
  center(side, k);
}

// -- the chosen op

// What stands for an op on the other side: ops that have its module among what they stand for.
function mates(side, k) {
  const op = side.ops[k];
  const other = side === before ? after : before;
  const [mine, theirs] = side === before ? [WHERE, ORIGINS] : [ORIGINS, WHERE];
  const found = other.ops.flatMap((one, i) => {
    const a = [op[mine]].flat();
    const b = [one[theirs]].flat();
    return a.some((path) => b.includes(path)) ? [i] : [];
  });
  const same = found.filter((i) => nameOf(other.ops[i]) === nameOf(op));
  return same.length && (side === before || op[ORIGINS].length === 1) ? same : found;
}

function mark(side) {
  const wanted = new Map(); // place -> class
  if (chosen) {
    const [where, op] = chosen;
    const ops = where === side ? [op] : mates(where, op);
    for (const k of ops) {
      wanted.set(k, where === side ? "chosen" : "mate");
      for (const m of around(side, k)) wanted.set(m, "has");
    }
  }
  for (const [k, element] of side.elements) {
    element.classList.remove("chosen", "mate", "has");
    if (wanted.has(k)) element.classList.add(wanted.get(k));
    if (k < side.ops.length) element.setAttribute("aria-pressed", wanted.get(k) === "chosen");
  }
}

function choose(side, k) {
  chosen = k === null ? null : [side, k];
  mark(before);
  mark(after);
  tell(chosen);
  if (!chosen) return;
  const other = side === before ? after : before;
  const [first] = mates(side, k);
  if (first !== undefined) center(other, first);
}

// -- pointers and keys

function press(side, element) {
  const k = Number(element.dataset.k);
  if (k >= side.ops.length) toggle(side, k);
  else choose(side, chosen && chosen[0] === side && chosen[1] === k ? null : k);
}

const MOVES = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };

function listen(side) {
  const { drawing } = side;
  const pointers = new Map();
  let moved = 0;
  drawing.addEventListener("pointerdown", (event) => {
    active = side;
    if (!pointers.size) moved = 0;
    pointers.set(event.pointerId, [event.clientX, event.clientY]);
  });
  window.addEventListener("pointermove", (event) => {
    const last = pointers.get(event.pointerId);
    if (!last) return;
    const now = [event.clientX, event.clientY];
    const { left, top } = frame(side);
    if (pointers.size === 2) {
      const [rest] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, point]) => point);
      const apart = (point) => Math.hypot(point[0] - rest[0], point[1] - rest[1]) || 1;
      zoom(side, apart(now) / apart(last), [(now[0] + rest[0]) / 2 - left, (now[1] + rest[1]) / 2 - top]);
    }
    pan(side, (now[0] - last[0]) / pointers.size, (now[1] - last[1]) / pointers.size);
    moved += Math.abs(now[0] - last[0]) + Math.abs(now[1] - last[1]);
    pointers.set(event.pointerId, now);
  });
  for (const end of ["pointerup", "pointercancel"]) window.addEventListener(end, (event) => pointers.delete(event.pointerId));
  drawing.addEventListener("click", (event) => {
    const place = event.target.closest("[data-k]");
    if (moved < 5 && place) press(side, place);
  });
  drawing.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const { left, top } = frame(side);
    zoom(side, Math.exp(-event.deltaY / 300), [event.clientX - left, event.clientY - top]);
  }, { passive: false });
  drawing.addEventListener("focusin", (event) => {
    active = side;
    const place = event.target.closest("[data-k]");
    if (!place || !place.matches(":focus-visible")) return;
    const outer = frame(side);
    const box = place.querySelector(".box").getBoundingClientRect();
    if (box.right < outer.left || box.left > outer.right || box.bottom < outer.top || box.top > outer.bottom) center(side, Number(place.dataset.k));
  });
  drawing.addEventListener("keydown", (event) => {
    const place = event.target.closest("[data-k]");
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (place && (event.key === "Enter" || event.key === " ")) press(side, place);
    else if (MOVES[event.key]) pan(side, ...MOVES[event.key]);
    else if (event.key === "+" || event.key === "=") zoom(side, 1.25);
    else if (event.key === "-") zoom(side, 0.8);
    else if (event.key === "0") fit(side);
    else return;
    event.preventDefault();
  });
}
