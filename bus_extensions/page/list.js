// A list of any length with a true scrollbar: its rows have one height, so only those in sight are nodes.

import { arrange, h } from "./dom.js";

const SPARE = 8; // rows above and below what is in sight

export class List {
  // `draw(item)` makes the content of a row; `end()` is called when its last rows come into sight.
  constructor({ label, draw, end = () => {}, height = () => 46 }) {
    Object.assign(this, { draw, end, height, items: [], drawn: new Map() });
    this.space = h("div", { class: "space", role: "list", "aria-label": label });
    this.node = h("div", { class: "list", tabindex: 0, role: "group", "aria-label": label,
      onscroll: () => this.show() }, this.space);
    new ResizeObserver(() => this.show(true)).observe(this.node);
  }

  get isAtTop() {
    return this.node.scrollTop < 4;
  }

  set(items) {
    this.items = items;
    this.show(true);
  }

  // What the rows show may be other now: each is drawn anew.
  forget() {
    for (const row of this.drawn.values()) row.mark = null;
  }

  // Draw what is in sight. Rows that are there already stay as they are, unless `anew`.
  show(anew = false) {
    const high = this.height(), { scrollTop, clientHeight } = this.node;
    this.space.style.height = `${this.items.length * high}px`;
    const first = Math.max(0, Math.floor(scrollTop / high) - SPARE);
    const last = Math.min(this.items.length, Math.ceil((scrollTop + clientHeight) / high) + SPARE);
    const kept = new Map();
    for (let at = first; at < last; at += 1) {
      const item = this.items[at];
      let row = this.drawn.get(item.key);
      if (row && row.mark !== item.mark) row = this.redraw(row, item);
      row ??= { mark: item.mark, node: h("div", { class: "row", role: "listitem" }, this.draw(item)) };
      if (row.at !== at || anew) row.node.style.transform = `translateY(${at * high}px)`;
      row.at = at;
      kept.set(item.key, row);
    }
    arrange(this.space, [...kept.values()].map(row => row.node)); // in their order, for who hears them read
    this.drawn = kept;
    if (this.items.length - last < 40) this.end();
  }

  // The same item with other content. The node stays, so that it keeps the focus.
  redraw(row, item) {
    const focused = row.node.contains(document.activeElement);
    row.node.replaceChildren(this.draw(item));
    if (focused) row.node.querySelector("a, button")?.focus({ preventScroll: true });
    return { ...row, mark: item.mark };
  }
}
