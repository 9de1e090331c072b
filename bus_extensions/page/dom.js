// Nodes and text. Whatever an agent wrote becomes a text node: nothing here parses HTML, and nothing becomes a link.

const SVG = "http://www.w3.org/2000/svg";

// An element with properties and children. A child is a node, a text, an array of them, or nothing.
export function h(tag, properties = {}, ...children) {
  return filled(document.createElement(tag), properties, children);
}

export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  for (const child of present(children)) node.append(child); // a call has too few arguments for a long text
  return node;
}

const present = children => children.flat(3).filter(child => child != null && child !== false);

export function fill(node, ...children) {
  node.replaceChildren();
  for (const child of present(children)) node.append(child);
}

// These become the children of a node. Those that are there already stay as they are, with their focus.
export function arrange(node, children) {
  const kept = new Set(children);
  for (const child of [...node.childNodes]) if (!kept.has(child)) child.remove();
  let next = node.firstChild;
  for (const child of children) {
    if (child === next) next = next.nextSibling;
    else node.insertBefore(child, next);
  }
}

export const button = (title, onclick, properties = {}) =>
  h("button", { type: "button", onclick, ...properties }, title);

// Browsers give a page without encryption no clipboard.
export const copyButton = text =>
  navigator.clipboard && button("Copy", () => navigator.clipboard.writeText(text));

// What is invisible, or changes the order of what is beside it: controls, bidi, zero widths, tags, lone surrogates.
const HIDDEN = new RegExp(
  String.raw`[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b]` +
    String.raw`|[\u200e\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ufeff\uffa0\ufff0-\ufffb]` +
    String.raw`|[\u{1bca0}-\u{1bca3}\u{1d173}-\u{1d17a}\u{e0000}-\u{e0fff}]|[\u{d800}-\u{dfff}]` +
    String.raw`|(?<!\p{Emoji})[\ufe00-\ufe0f]|[\ufe00-\ufe0e](?=[\ufe00-\ufe0f])`, "gu"); // a variant of an emoji is shown
// A joiner stays inside an emoji, and in scripts that need it; elsewhere it is hidden text.
const JOINER = new RegExp(
  String.raw`(?<![\p{Extended_Pictographic}\p{Emoji_Modifier}\ufe0f\p{L}\p{M}])[\u200c\u200d]` +
    String.raw`|(?<=\p{Script=Latin})[\u200c\u200d]|[\u200c\u200d](?![\p{Extended_Pictographic}\p{L}])`, "gu");
const STACK = /(\p{M}{4})\p{M}+/gu; // more marks on one letter than any script needs

const escaped = found => `\\u{${found.codePointAt(0).toString(16)}}`;

// The text with each hidden character written out, for one line.
export function plain(text, most = 400) {
  const line = cut(String(text), most).replace(/\s*\n\s*/g, " ⏎ ").replace(/\t/g, " ");
  return line.replace(STACK, "$1…").replace(HIDDEN, escaped).replace(JOINER, escaped);
}

export function cut(text, most) {
  if (text.length <= most) return text;
  const end = /[\ud800-\udbff]/.test(text[most - 1]) ? most - 1 : most;
  return text.slice(0, end) + "…";
}

const FRAMED = 1000, BLOCKS = 100; // hidden characters and pieces of code in a text: for many a browser takes minutes

// The nodes of a text of any length: hidden characters are framed, and what stands between ``` is code. A text with too
// many pieces of code is shown as it was sent.
export function prose(text) {
  const all = String(text).split(/^```[^\n]*\n?/m), parts = all.length > 2 * BLOCKS ? [String(text)] : all;
  return parts.map((part, number) => {
    const nodes = framed(part.replace(STACK, "$1…"), FRAMED / parts.length);
    return number % 2 ? h("pre", { class: "code", tabindex: 0 }, nodes) : nodes;
  });
}

function framed(text, most) {
  const nodes = [];
  let end = 0;
  for (const found of [...text.matchAll(HIDDEN), ...text.matchAll(JOINER)].sort((a, b) => a.index - b.index)) {
    if (found.index < end) continue;
    if (nodes.length > 2 * most) return [...nodes, text.slice(end).replace(HIDDEN, escaped).replace(JOINER, escaped)];
    nodes.push(text.slice(end, found.index), h("span", { class: "hidden-character" }, escaped(found[0])));
    end = found.index + found[0].length;
  }
  return [...nodes, text.slice(end)];
}

// Whatever a member holds, as text.
export const shown = value => (typeof value === "string" ? value : JSON.stringify(value, null, 1) ?? "");

// A badge: a hue and two letters of the name, so that a name is known again at a glance.
export function badge(name) {
  const node = h("span", { class: "badge", "aria-hidden": "true" }, initials(name));
  node.style.background = colour(name);
  return node;
}

// Who sent it, and for whom, if a relay did. Anybody can write `relayed_from`, so the sender's own name stands first.
export const sender = ({ from, relayed_from: first }) =>
  [h("b", {}, from), first !== undefined && h("span", { class: "dim" }, ` for ${plain(shown(first), 60)}`)];

export function initials(name) {
  const parts = name.split(/[-._:@]+/).filter(Boolean);
  const digits = /(\d\d?)$/.exec(name);
  if (digits) return digits[1].padStart(2, "0");
  return (parts.length > 1 ? parts[0][0] + parts[1][0] : name.slice(0, 2)).toLowerCase();
}

export function colour(name) {
  let sum = 7;
  for (const letter of name) sum = (sum * 31 + letter.charCodeAt(0)) >>> 0;
  return `oklch(0.49 0.1 ${(sum * 47) % 360})`; // one lightness: white letters have a contrast above 5 on all
}

export const clock = ts => new Date(ts * 1000).toTimeString().slice(0, 8);

export function day(ts) {
  return new Date(ts * 1000).toLocaleDateString("en-GB", { weekday: "short", day: "numeric", month: "short" });
}

// "4 s", "12 min", "3 h", "5 days"
export function span(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} days`;
}

export const many = (number, one, more = one + "s") => `${number.toLocaleString("en")} ${number === 1 ? one : more}`;

export const sum = numbers => numbers.reduce((a, b) => a + b, 0);
