// Pictures of numbers: bars, and the ring of who talks to whom. Each has its numbers in words beside it.

import { badge, colour, h, initials, many, plain, svg } from "./dom.js";

export function bars(values, { width, height, label, axis = false }) {
  const top = Math.max(1, ...values), step = width / values.length;
  const nodes = values.map((value, at) => value > 0 && svg("rect", {
    x: at * step + 1, y: height - Math.max(2, (value / top) * height), width: Math.max(1, step - 2),
      height: Math.max(2, (value / top) * height),
    class: at === values.length - 1 ? "bar last" : "bar", rx: 1,
  }));
  const line = axis && svg("line", { x1: 0, x2: width, y1: height, y2: height, class: "axis" });
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, class: axis ? "bars wide" : "bars", role: "img",
    "aria-label": label }, nodes, line);
}

const RING = 14; // names

// The busiest names on a ring, and an arc for each direction; its width is the root of the count.
export function ring(pairs, troubled, open) {
  const talk = new Map();
  for (const { from, to, n } of pairs) for (const name of [from, to]) talk.set(name, (talk.get(name) || 0) + n);
  const names = [...talk].sort((a, b) => b[1] - a[1]).slice(0, RING).map(([name]) => name).sort();
  const places = new Map(names.map((name, at) => {
    const angle = (at / names.length) * 2 * Math.PI - Math.PI / 2;
    return [name, { x: 260 + 150 * Math.cos(angle), y: 190 + 140 * Math.sin(angle) }];
  }));
  const shown = pairs.filter(pair => places.has(pair.from) && places.has(pair.to) && pair.from !== pair.to).slice(0,
    60);
  const most = Math.sqrt(Math.max(1, ...shown.map(pair => pair.n)));
  const arrow = svg("marker", { id: "arrow", viewBox: "0 0 10 10", refX: 8, refY: 5, markerWidth: 9, markerHeight: 9,
    markerUnits: "userSpaceOnUse", orient: "auto" },
    svg("path", { d: "M0 0L10 5L0 10z", class: "arrow" }));
  const arcs = shown.map(pair => arc(pair, places.get(pair.from), places.get(pair.to),
    1.5 + (4.5 * Math.sqrt(pair.n)) / most, open));
  const dots = names.map(name => dot(name, places.get(name), troubled.has(name)));
  const node = svg("svg", { viewBox: "0 0 520 380", class: "ring", role: "group", "aria-label": "Who talks to whom" },
    svg("defs", {}, arrow), arcs, dots);
  for (const event of ["mouseover", "focusin"]) node.addEventListener(event,
    ({ target }) => dim(node, target.closest("[data-names]")?.getAttribute("data-names")));
  for (const event of ["mouseleave", "focusout"]) node.addEventListener(event, () => dim(node));
  return node;
}

function dim(node, names) {
  const one = names?.split(" ");
  for (const each of node.querySelectorAll("[data-names]")) {
    each.classList.toggle("faded", Boolean(one)
      && !one.some(name => each.getAttribute("data-names").split(" ").includes(name)));
  }
}

function arc({ from, to, n }, a, b, width, open) {
  const length = Math.hypot(b.x - a.x, b.y - a.y) || 1,
    shorter = 40 / length; // of half a line: 20 from the middle of a dot
  const bend = { x: (a.x + b.x) / 2 + ((b.y - a.y) / length) * 26, y: (a.y + b.y) / 2 - ((b.x - a.x) / length) * 26 };
  const start = { x: a.x + (bend.x - a.x) * shorter, y: a.y + (bend.y - a.y) * shorter };
  const end = { x: b.x + (bend.x - b.x) * shorter, y: b.y + (bend.y - b.y) * shorter };
  const path = svg("path", { d: `M${start.x} ${start.y}Q${bend.x} ${bend.y} ${end.x} ${end.y}`, "stroke-width": width,
    class: "arc", "marker-end": "url(#arrow)" });
  const label = `${from} to ${to}: ${many(n, "message")}`;
  return svg("a", { href: `#/messages/${from}/${to}`, "data-names": `${from} ${to}`, "aria-label": label,
    onclick: open }, svg("title", {}, label), path);
}

function dot(name, { x, y }, troubled) {
  const circle = svg("circle", { cx: x, cy: y, r: 14, class: troubled ? "dot troubled" : "dot" });
  circle.style.fill = colour(name);
  const side = x > 300 ? ["start", 20, 4] : x < 220 ? ["end", -20, 4] : ["middle", 0, y < 190 ? -22 : 32];
  return svg("a", { href: `#/agents/${name}`, "data-names": name }, circle,
    svg("text", { x, y: y + 4, class: "letters", "text-anchor": "middle", "aria-hidden": "true" }, initials(name)),
    svg("text", { x: x + side[1], y: y + side[2], class: "label", "text-anchor": side[0] }, plain(name, 16)));
}

export function table(titles, rows) {
  return h("table", {}, h("thead", {}, h("tr", {}, titles.map(title => h("th", { scope: "col" }, title)))),
    h("tbody", {}, rows.map(cells => h("tr", {}, cells.map(cell => h("td", {}, cell))))));
}

export function pairsTable(pairs) {
  const rows = pairs.slice(0, 50).map(({ from, to, n }) => [[badge(from), " ", from], to, n]);
  return h("details", {}, h("summary", {}, "as a table"), table(["from", "to", "messages"], rows));
}
