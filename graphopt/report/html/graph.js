// One side: its ops and modules as places, numbered as in the data, and which modules are open.
const OP = { w: 138, h: 36 };
const CLOSED = { w: 164, h: 40 };
const HEAD = 24;
const PAD = 12;
const GAP = { x: 14, y: 24 };
const THROUGH = -1;

function makeSide(name, other) {
  const { ops, modules } = data[name];
  const side = { name, ops, modules, open: new Set([ops.length]), elements: new Map(), view: null };
  side.parent = new Map();
  modules.forEach((one, m) => one.rows.flat().forEach((k) => k >= 0 && side.parent.set(k, ops.length + m)));
  side.readers = ops.map(() => []);
  ops.forEach((op, k) => op[READS].forEach((one) => side.readers[one].push(k)));
  side.count = modules.map(() => 0);
  side.flops = modules.map(() => 0);
  ops.forEach((op, k) => {
    for (const m of around(side, k)) {
      side.count[m - ops.length] += 1;
      side.flops[m - ops.length] += op[FLOPS];
    }
  });
  side.total = Math.max(1, side.flops[0] || 0);
  const known = new Set(data[other].ops.map((op) => wording(data[other].ops, op)));
  side.fresh = ops.map((op) => op[ORIGINS].length > 1 || !known.has(wording(ops, op)));
  return side;
}

// What an op says, whatever the ops that it reads are called.
function wording(ops, op) {
  const text = op[READS].reduce((rest, k) => rest.replaceAll(nameOf(ops[k]), "_"), op[TEXT].split(": ").slice(1).join(": "));
  return `${op[WHERE]} ${text}`;
}

// The modules around a place, from the inside.
function around(side, k) {
  const found = [];
  for (let m = side.parent.get(k); m !== undefined; m = side.parent.get(m)) found.push(m);
  return found;
}

// -- sizes and positions

function size(side, k) {
  if (k === THROUGH) return { w: 6, h: 0 };
  if (k < 0) return { w: 10, h: 0 };
  if (k < side.ops.length) return OP;
  return side.open.has(k) ? arrange(side, k) : CLOSED;
}

// Where the places of an open module are, relative to its corner.
function arrange(side, m) {
  const { rows, links } = side.modules[m - side.ops.length];
  const head = side.parent.has(m) ? HEAD : 0;
  const boxes = rows.map((row) => row.map((k) => ({ k, ...size(side, k) })));
  rows.forEach((row, r) => spread(boxes[r], row.map(() => 0)));
  for (let sweep = 0; sweep < 6; sweep++) {
    const down = sweep % 2 === 0;
    for (let step = 1; step < rows.length; step++) {
      const r = down ? step : rows.length - 1 - step;
      const pairs = links[down ? r - 1 : r] || [];
      const pull = boxes[r].map(() => ({ sum: 0, weight: 0 }));
      for (let i = 0; i < pairs.length; i += 2) {
        const [own, next] = down ? [pairs[i + 1], boxes[r - 1][pairs[i]]] : [pairs[i], boxes[r + 1][pairs[i + 1]]];
        // Ops in line with ops, and edges that pass by with themselves.
        const weight = (boxes[r][own].k === THROUGH) === (next.k === THROUGH) ? 1 : 0.02;
        pull[own].sum += weight * next.c;
        pull[own].weight += weight;
      }
      spread(boxes[r], pull.map(({ sum, weight }, i) => (weight ? sum / weight : boxes[r][i].c)));
    }
  }
  const flat = boxes.flat();
  const left = Math.min(0, ...flat.map((one) => one.c - one.w / 2));
  const right = Math.max(0, ...flat.map((one) => one.c + one.w / 2));
  let y = head + (head ? 2 : 0);
  for (const row of boxes) {
    const tall = Math.max(...row.map((one) => one.h));
    for (const one of row) {
      Object.assign(one, { x: one.c - one.w / 2 - left + PAD, top: y, bottom: y + tall, y: y + (tall - one.h) / 2 });
      one.c = one.x + one.w / 2;
    }
    y += tall + (tall ? GAP.y : GAP.y / 2);
  }
  const title = head ? 7 * side.modules[m - side.ops.length].label.length + 50 : 0;
  return { w: Math.max(right - left + 2 * PAD, Math.min(title, 260)), h: Math.max(y - GAP.y / 2, head) + PAD / 2, boxes };
}

// Centers `c` of a row, in order and apart, as near as can be to those wanted: isotonic regression by pool
// adjacent violators.
function spread(row, wanted) {
  const offset = [0];
  for (let i = 1; i < row.length; i++) offset.push(offset[i - 1] + (row[i - 1].w + row[i].w) / 2 + GAP.x);
  const pools = [];
  row.forEach((one, i) => {
    const weight = one.k < 0 ? 0.2 : 1;
    pools.push({ sum: weight * (wanted[i] - offset[i]), weight, count: 1 });
    while (pools.length > 1) {
      const [a, b] = pools.slice(-2);
      if (a.sum / a.weight <= b.sum / b.weight) break;
      pools.splice(-2, 2, { sum: a.sum + b.sum, weight: a.weight + b.weight, count: a.count + b.count });
    }
  });
  let i = 0;
  for (const pool of pools)
    for (let n = 0; n < pool.count; n++, i++) row[i].c = pool.sum / pool.weight + offset[i];
}

// -- drawing

function draw(side) {
  side.elements.clear();
  const placed = arrange(side, side.ops.length);
  side.size = placed;
  const layer = svg("g");
  drawInside(side, side.ops.length, placed, layer);
  side.layer.replaceChildren(layer);
  mark(side);
}

function drawInside(side, m, placed, into) {
  const { links, back } = side.modules[m - side.ops.length];
  const { boxes } = placed;
  let wires = "";
  links.forEach((pairs, r) => {
    for (let i = 0; i < pairs.length; i += 2) {
      const a = boxes[r][pairs[i]];
      const b = boxes[r + 1][pairs[i + 1]];
      const middle = (a.bottom + b.top) / 2;
      const from = a.k === THROUGH ? a.top : a.y + a.h;
      wires += `M${a.c} ${from}V${a.bottom}C${a.c} ${middle} ${b.c} ${middle} ${b.c} ${b.top}V${b.k === THROUGH ? b.bottom : b.y}`;
    }
  });
  into.append(svg("path", { class: "wire", d: wires }));
  const at = new Map(boxes.flat().map((one) => [one.k, one]));
  const aside = back
    .map(([a, b]) => [at.get(a), at.get(b)])
    .filter(([a, b]) => a && b)
    .map(([a, b]) => `M${a.x + a.w} ${a.y + a.h / 2}H${a.x + a.w + 8}C${a.x + a.w + 30} ${a.y} ${b.x + b.w + 30} ${b.y + b.h} ${b.x + b.w} ${b.y + b.h / 2}`);
  if (aside.length) into.append(svg("path", { class: "wire back", d: aside.join("") }));
  for (const one of boxes.flat()) if (one.k >= 0) into.append(drawPlace(side, one));
}

function drawPlace(side, box) {
  const { k, x, y, w, h } = box;
  const module = k >= side.ops.length;
  const open = side.open.has(k);
  const group = svg("g", { transform: `translate(${x} ${y})`, "data-k": k, tabindex: 0, role: "button" });
  group.append(svg("rect", { class: "box", width: w, height: h, rx: module ? 7 : 5 }));
  side.elements.set(k, group);
  if (module) {
    const m = k - side.ops.length;
    const one = side.modules[m];
    const part = side.flops[m] / side.total;
    const about = `${side.count[m]} ops` + (side.flops[0] ? ` · ${(100 * part).toFixed(1)} % FLOPs` : "");
    group.setAttribute("class", open ? "module open" : "module");
    group.setAttribute("aria-expanded", open);
    group.setAttribute("aria-label", `module ${pathOf(one.path)}, ${about}`);
    group.append(svg("title", {}, `${pathOf(one.path)}: ${about}`));
    group.append(svg("text", { class: "head", x: 9, y: 16 }, `${open ? "▾" : "▸"} ${short(one.label, Math.floor((w - 30) / 7))}`));
    if (open) drawInside(side, k, box, group);
    else {
      group.append(svg("text", { class: "sub", x: 9, y: 31 }, about));
      heat(group, part, w, h);
    }
    return group;
  }
  const op = side.ops[k];
  group.setAttribute("class", side.fresh[k] ? `op ${side.name === "after" ? "changed" : "gone"}` : "op");
  group.setAttribute("aria-label", `${kindOf(op)} ${nameOf(op)} of ${placeOf(op)}`);
  const more = op[ORIGINS].length > 1 ? ` +${op[ORIGINS].length - 1}` : "";
  group.append(
    svg("title", {}, `${op[TEXT]}\n${placeOf(op)}`),
    svg("text", { class: "head", x: 8, y: 15 }, begin(kindOf(op), 18) + more),
    svg("text", { class: "sub", x: 8, y: 28 }, short(below(side, k) || nameOf(op), 21)),
  );
  heat(group, op[FLOPS] / side.total, w, h);
  return group;
}

// The module of an op, as seen from the one that it is drawn in.
function below(side, k) {
  const home = pathOf(side.modules[side.parent.get(k) - side.ops.length].path);
  const path = pathOf(side.ops[k][WHERE]);
  return home && `${path}.`.startsWith(`${home}.`) ? path.slice(home.length + 1) : path;
}

function heat(group, part, w, h) {
  if (part > 0.001) group.append(svg("rect", { class: "heat", x: 5, y: h - 4, width: Math.max(1, (w - 10) * Math.min(1, part)), height: 2.5, rx: 1.2 }));
}
