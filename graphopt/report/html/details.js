// The panel below the graphs, and the search.
const panel = byId("details");

function opButton(side, k) {
  const op = side.ops[k];
  const button = html("button", { type: "button", title: op[TEXT] }, `${nameOf(op)} · ${kindOf(op)}`);
  button.addEventListener("click", () => pick(side, k));
  return button;
}

function tell(what) {
  if (!what) {
    panel.replaceChildren(html("p", { class: "muted" }, "No op chosen."));
    return;
  }
  const [side, k] = what;
  const op = side.ops[k];
  const other = side === before ? after : before;
  const origins = op[ORIGINS].map((one) => pathOf(one) || "the model");
  const facts = html("dl", { class: "facts" });
  const add = (term, parts) => {
    if (parts.length) facts.append(html("dt", {}, term), html("dd", {}, ...parts));
  };
  const buttons = (of, all) => [
    ...all.slice(0, 12).map((one) => opButton(of, one)),
    ...(all.length > 12 ? [`and ${all.length - 12} more`] : []),
  ];
  add("module", [html("code", {}, placeOf(op))]);
  if (origins.length > 1) add("stands for", [html("code", {}, origins.join(", "))]);
  if (op[FLOPS] || op[BYTES]) add("cost", [`${si(op[FLOPS])} FLOPs, ${si(op[BYTES])}B moved`]);
  add("reads", buttons(side, [...new Set(op[READS])]));
  add("read by", buttons(side, side.readers[k]));
  add(side === before ? "has become" : "was", buttons(other, mates(side, k)));
  const concerned = data.records.filter(([, , node, where, from]) =>
    (side === before && node === nameOf(op)) || [where, ...from].some((path) => op[ORIGINS].includes(path) && pathOf(path)));
  add("rewrites", concerned.slice(0, 12).flatMap(([rewrite, state, node, where], i) => [
    ...(i ? [html("br")] : []), html("code", {}, rewrite), ` ${state} at ${pathOf(where) || node}`]));
  panel.replaceChildren(
    html("p", { class: "muted" }, side === before ? "Before" : "After"),
    html("p", {}, html("code", {}, op[TEXT])), facts);
}

const search = byId("search");
const found = byId("found");
const LISTED = 40;

function matches(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  return [before, after].flatMap((side) =>
    side.ops.flatMap((op, k) => {
      const own = `${nameOf(op)} ${pathOf(op[WHERE])}`.toLowerCase();
      const inside = `${own} ${op[TEXT]} ${op[ORIGINS].map(pathOf).join(" ")}`.toLowerCase();
      if (!words.every((word) => inside.includes(word))) return [];
      const parts = own.split(/[ .]/);
      const rank = words.every((word) => parts.includes(word) || own.includes(` ${word}`)) ? 0 : words.every((word) => own.includes(word)) ? 1 : 2;
      return [[rank, side, k]];
    })).sort((a, b) => a[0] - b[0]).map(([, side, k]) => [side, k]);
}

function listFound() {
  const all = matches(search.value);
  found.replaceChildren(...all.slice(0, LISTED).map(([side, k]) => {
    const op = side.ops[k];
    const button = html("button", { type: "button", title: op[TEXT] }, html("span", { class: "side" }, side.name),
      html("code", {}, `${nameOf(op)} · ${kindOf(op)} · ${placeOf(op)}`));
    button.addEventListener("click", () => pick(side, k));
    return html("li", {}, button);
  }));
  found.hidden = !all.length;
  const more = all.length > LISTED ? `, ${LISTED} listed` : "";
  byId("search-count").textContent = search.value ? `${all.length} found${more}` : "";
}

function pick(side, k) {
  found.hidden = true;
  show(side);
  choose(side, k);
  const other = side === before ? after : before;
  const [mate] = mates(side, k);
  if (mate !== undefined) reveal(other, mate);
  reveal(side, k);
  side.drawing.scrollIntoView({ block: "nearest" });
  side.elements.get(k).focus({ preventScroll: true });
}

search.addEventListener("input", listFound);
search.addEventListener("focus", listFound);
search.addEventListener("keydown", (event) => {
  const buttons = found.querySelectorAll("button");
  if (event.key === "Enter" && buttons.length) buttons[0].click();
  else if (event.key === "ArrowDown" && buttons.length) buttons[0].focus();
  else if (event.key === "Escape") {
    search.value = "";
    listFound();
    choose(active, null);
  } else return;
  event.preventDefault();
});
found.addEventListener("keydown", (event) => {
  const item = event.target.closest("li");
  const next = event.key === "ArrowDown" ? item.nextElementSibling : event.key === "ArrowUp" ? item.previousElementSibling : null;
  if (event.key === "ArrowUp" && !next) search.focus();
  else if (next) next.firstElementChild.focus();
  else return;
  event.preventDefault();
});
