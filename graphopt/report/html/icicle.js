// Cost by module: the tree of module paths, widths in proportion to what is inside.
const ROW = 26;
const DEPTH = 7;
const METRICS = { flops: (op) => op[FLOPS], bytes: (op) => op[BYTES], ops: () => 1 };
const metric = byId("metric");
let shownPath = "";

function costs(side) {
  const value = METRICS[metric.value];
  const root = { path: "", label: "the model", sum: 0, inside: new Map() };
  for (const op of side.ops) {
    let at = root;
    at.sum += value(op);
    for (const part of pathOf(op[WHERE]).split(".").filter(Boolean)) {
      if (!at.inside.has(part))
        at.inside.set(part, { path: at.path ? `${at.path}.${part}` : part, label: part, sum: 0, inside: new Map() });
      at = at.inside.get(part);
      at.sum += value(op);
    }
  }
  return root;
}

function find(root, path) {
  let at = root;
  for (const part of path.split(".").filter(Boolean)) at = at && at.inside.get(part);
  return at;
}

const unit = () => ({ flops: " FLOPs", bytes: "B", ops: " ops" })[metric.value];

function drawIcicle(side, root, scale) {
  const drawing = byId(`icicle-${side.name}`);
  const width = drawing.getBoundingClientRect().width || 600;
  const pieces = [];
  let deepest = 0;
  const place = (node, x, depth) => {
    const w = (node.sum / scale) * width;
    if (w < 1 || depth >= DEPTH) return;
    deepest = Math.max(deepest, depth);
    const about = `${node.path || "the model"}: ${si(node.sum)}${unit()}, ${((100 * node.sum) / scale).toFixed(1)} %`;
    const group = svg("g", { "data-path": node.path, role: "button", "aria-label": about, transform: `translate(${x} ${depth * ROW})` });
    if (w >= 6) group.setAttribute("tabindex", 0);
    group.append(svg("title", {}, about), svg("rect", { class: "box", width: w, height: ROW - 1, fill: "none" }),
      svg("rect", { class: "shade", width: Math.max(0.5, w - 1), height: ROW - 2, rx: 2, opacity: Math.max(0.1, 0.42 - 0.06 * depth) }));
    if (w > 34) group.append(svg("text", { x: 5, y: 17 }, begin(node.label, Math.floor((w - 8) / 7))));
    pieces.push(group);
    let at = x;
    for (const child of node.inside.values()) {
      place(child, at, depth + 1);
      at += (child.sum / scale) * width;
    }
  };
  if (root && root.sum) place(root, 0, 0);
  drawing.setAttribute("height", (deepest + 1) * ROW);
  drawing.setAttribute("viewBox", `0 0 ${width} ${(deepest + 1) * ROW}`);
  drawing.replaceChildren(...pieces);
  byId(`icicle-${side.name}-total`).textContent = root ? `${si(root.sum)}${unit()}` : "nothing left of it";
}

function drawCosts() {
  const roots = [before, after].map((side) => find(costs(side), shownPath));
  const scale = Math.max(1, ...roots.map((root) => (root ? root.sum : 0)));
  [before, after].forEach((side, i) => drawIcicle(side, roots[i], scale));
  const parts = shownPath.split(".").filter(Boolean);
  const trail = parts.length ? ["the model", ...parts] : [];
  byId("trail").replaceChildren(...trail.map((part, i) => {
    const button = html("button", { type: "button" }, part);
    button.addEventListener("click", () => enlarge(parts.slice(0, i).join(".")));
    return button;
  }));
}

function enlarge(path) {
  shownPath = path;
  drawCosts();
}

for (const side of [before, after]) {
  const drawing = byId(`icicle-${side.name}`);
  const press = (event) => {
    const piece = event.target.closest("[data-path]");
    if (!piece) return;
    const { path } = piece.dataset;
    enlarge(path === shownPath ? path.split(".").slice(0, -1).join(".") : path);
    const now = [...drawing.children].find((one) => one.dataset.path === path);
    if (now) now.focus({ preventScroll: true });
  };
  drawing.addEventListener("click", press);
  drawing.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") press(event);
    else if (event.key === "Escape") enlarge("");
    else return;
    event.preventDefault();
  });
}
if (![before, after].some((side) => side.ops.some((op) => op[FLOPS] || op[BYTES]))) {
  metric.value = "ops";
  metric.disabled = true;
}
metric.addEventListener("change", drawCosts);
