const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const [TEXT, WHERE, ORIGINS, READS, FLOPS, BYTES] = [0, 1, 2, 3, 4, 5];
const SVG = "http://www.w3.org/2000/svg";

// Children are elements or text; nothing is ever parsed as markup.
function build(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}
const svg = (tag, attributes = {}, ...children) => build(document.createElementNS(SVG, tag), attributes, children);
const html = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);

const pathOf = (number) => data.paths[number];
const nameOf = (op) => op[TEXT].split(":", 1)[0];
const kindOf = (op) => op[TEXT].slice(op[TEXT].indexOf(" = ") + 3).split("(", 1)[0];
const typeOf = (op) => op[TEXT].slice(op[TEXT].indexOf(": ") + 2).split(" = ", 1)[0];
const placeOf = (op) => pathOf(op[WHERE]) || "the model";
const short = (text, length) => (text.length <= length ? text : "…" + text.slice(1 - length));
const begin = (text, length) => (text.length <= length ? text : text.slice(0, length - 1) + "…");

function si(value) {
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]])
    if (value >= size) return `${Number((value / size).toPrecision(3))} ${unit}`;
  return String(Math.round(value));
}
