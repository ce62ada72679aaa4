// Elements out of text nodes alone: whatever an id or a title holds, it is shown, and never acts.

/** An element with attributes and children; `on…` are listeners, what is null or false is left out. */
export function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

/** Put `children` in place of what an element holds. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== false && child !== undefined));
}

/**
 * Make what an element holds like `children`, and keep those of its elements that stay what they were: with the focus,
 * the selection and how far they are scrolled. For what listens to nothing.
 */
export function refill(element, ...children) {
  likenedChildren(element, h("div", {}, ...children));
}

function likened(old, wanted) {
  for (const { name } of [...old.attributes]) if (!wanted.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of wanted.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  likenedChildren(old, wanted);
}

function likenedChildren(old, wanted) {
  const before = [...old.childNodes], after = [...wanted.childNodes];
  after.forEach((node, n) => {
    const there = before[n];
    if (!there) old.append(node);
    else if (there.nodeType !== node.nodeType || there.nodeName !== node.nodeName) there.replaceWith(node);
    else if (node.nodeType === Node.TEXT_NODE) { if (there.data !== node.data) there.data = node.data; }
    else likened(there, node);
  });
  before.slice(after.length).forEach((node) => node.remove());
}

/** Draw anew, and give the focus to what has the same name as what had it: its id, or its `data-focus`. */
export function keepingFocus(root, draw) {
  const active = root.contains(document.activeElement) ? document.activeElement : null;
  const name = active && (active.id ? `#${CSS.escape(active.id)}` : active.dataset.focus ? `[data-focus="${CSS.escape(active.dataset.focus)}"]` : null);
  const scrolled = [...root.querySelectorAll(".scroll")].map((one) => [one.getAttribute("aria-label"), one.scrollLeft]);
  draw();
  for (const [label, left] of scrolled) if (left) for (const one of root.querySelectorAll(".scroll")) if (one.getAttribute("aria-label") === label) one.scrollLeft = left;
  if (!active || document.activeElement === active) return;
  (active.isConnected ? active : (name && root.querySelector(name)) ?? root.querySelector("button, input, summary"))?.focus({ preventScroll: true });
}

const ACTIVE = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu;

/** Other people's text on one line: what would act on the order of its neighbours is written as an escape. */
export function shown(text) {
  return String(text).replace(ACTIVE, (c) => "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"));
}

/** Such text as an element of its own. */
export function foreign(text, tag = "bdi") {
  return h(tag, { class: "foreign" }, shown(text));
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export function number(value, digits = 0) {
  if (value === null || value === undefined) return "–";
  return digits ? value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }) : whole.format(value);
}

/** A rate: with digits where it is small. */
export function rate(value) {
  return value === null || value === undefined ? "–" : number(value, value && value < 10 ? 1 : 0);
}

export function share(value, digits = 1) {
  return value === null || value === undefined ? "–" : number(100 * value, digits) + " %";
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 1) return number(1000 * value) + " ms";
  if (value < 120) return number(value, value < 10 ? 1 : 0) + " s";
  if (value < 7200) return number(value / 60) + " min";
  return value < 172800 ? number(value / 3600) + " h" : number(value / 86400) + " days";
}

export function milliseconds(value) {
  return value === null || value === undefined ? "–" : seconds(value / 1000);
}

export function moment(ms) {
  if (ms === null || ms === undefined) return "never";
  const date = new Date(ms);
  return Number.isNaN(date.getTime()) ? `${ms} ms` : date.toISOString().replace("T", " ").slice(0, 19) + " UTC";
}

/** A table: `columns` are [heading, cell of a row, class]. */
export function table(caption, columns, rows, classOf = () => null) {
  const head = columns.map(([name, , kind]) => h("th", { scope: "col", class: kind }, name));
  const body = rows.map((row) => h("tr", { class: classOf(row) }, columns.map(([, cell, kind]) => h("td", { class: kind }, cell(row)))));
  return h("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": caption },
    h("table", {}, h("caption", {}, caption), h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
}

/** A command to copy. */
export function command(text) {
  const button = h("button", { type: "button", onclick: async () => {
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
    catch { button.textContent = "Select it and copy"; }
  } }, "Copy");
  return h("div", { class: "command" }, foreign(text, "code"), button);
}

export function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}
