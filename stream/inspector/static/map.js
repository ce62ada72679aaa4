// Many users in two dimensions, and how close to one another popularity has drawn them.

import { color, fill, foreign, h, moment, number, share, shown, table } from "./dom.js";
import { ask } from "./feed.js";

const LISTED = 50;

export class MapView {
  constructor(state) {
    this.state = state;
    this.by = h("select", { id: "map-by", onchange: () => this.draw() },
      h("option", { value: "age" }, "age of the last event"), h("option", { value: "unknown" }, "share of unknown items; fallbacks"));
    this.note = h("p", { class: "soft", role: "status" });
    this.canvas = h("canvas", { class: "map", role: "img", "aria-label": "users by their vectors, in two dimensions" });
    this.canvas.addEventListener("click", (event) => this.open(event));
    this.legend = h("div", { class: "key" });
    this.axes = h("div", {});
    this.gauge = h("div", {});
    this.list = h("div", {});
    this.element = h("div", {},
      h("section", { "aria-label": "Map" }, h("h2", {}, "Users by their vectors"),
        h("form", { class: "row", onsubmit: (event) => { event.preventDefault(); this.load(); } },
          h("label", { for: "map-by" }, "colour", this.by), h("button", { type: "submit" }, "Look again")),
        this.note, this.canvas, this.legend, this.axes),
      h("section", { "aria-label": "Collapse" }, h("h2", {}, "Popularity collapse"), this.gauge),
      h("section", { "aria-label": "Users" }, h("h2", {}, "The same as a table"), this.list));
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  shown() { if (!this.crowd) this.load(); }

  themed() { this.draw(); }

  async load() {
    this.note.textContent = "looking at users who were active of late…";
    try {
      this.crowd = await ask("/api/map");
      this.note.textContent = `${number(this.crowd.users)} users who were active of late, ${number(this.crowd.fallbacks)} of them with the fallback vector. Click on one to see why.`;
      this.draw();
      this.tell();
    } catch (error) {
      this.note.textContent = shown(error.message);
    }
  }

  draw() {
    const { crowd, canvas } = this;
    if (!crowd || !canvas.clientWidth) return;
    const scale = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const far = Math.max(...crowd.points.map((point) => Math.max(Math.abs(point.at[0]), Math.abs(point.at[1]))), 1e-9) * 1.08;
    this.place = (point) => [width / 2 + (point.at[0] / far) * (width / 2), height / 2 - (point.at[1] / far) * (height / 2)];
    pen.strokeStyle = color("line");
    pen.beginPath();
    pen.moveTo(0, height / 2); pen.lineTo(width, height / 2); pen.moveTo(width / 2, 0); pen.lineTo(width / 2, height);
    pen.stroke();
    const shadeOf = this.shades();
    for (const point of crowd.points) {
      const [x, y] = this.place(point);
      pen.fillStyle = shadeOf(point);
      pen.beginPath();
      pen.arc(x, y, 3, 0, 7);
      pen.fill();
    }
  }

  /** Colour of a point; the legend says what it means. */
  shades() {
    const dark = document.documentElement.dataset.theme === "dark", light = (t) => dark ? 75 - 35 * t : 30 + 45 * t;
    if (this.by.value === "unknown") {
      const shade = (share) => `hsl(265 55% ${light(share)}%)`;
      fill(this.legend, dot(shade(0), "all items known"), dot(shade(1), "none"), dot(color("bad"), "the fallback vector"));
      return (point) => point.status === "ok" ? shade(point.unknown) : color("bad");
    }
    // by rank: a few users of long ago would make all others look alike
    const times = this.crowd.points.map((point) => point.as_of ?? 0).sort((a, b) => b - a), ranks = new Map();
    times.forEach((ts, n) => { if (!ranks.has(ts)) ranks.set(ts, n / times.length); });
    const shade = (rank) => `hsl(210 75% ${light(rank)}%)`;
    fill(this.legend, dot(shade(0), moment(times[0])), dot(shade(0.5), moment(times[times.length >> 1])), dot(shade(1), moment(times.at(-1))), h("span", {}, "by rank"));
    return (point) => shade(ranks.get(point.as_of ?? 0));
  }

  tell() {
    const { axes, collapse, points } = this.crowd;
    const names = ["to the right", "to the left", "upward", "downward"];
    const ends = axes.flatMap((axis, n) => [[names[2 * n], axis.high], [names[2 * n + 1], axis.low]]);
    fill(this.axes, h("p", {}, axes.map((axis, n) => `${n ? "upward" : "to the right"} ${share(axis.explained)} of the differences between users. `)),
      h("ul", { class: "plain" }, ends.map(([where, items]) => h("li", {}, `${where}: `, items.map((item, n) => [n ? ", " : "", foreign(item)])))));
    const most = Math.max(...collapse.counts, 1);
    const bars = collapse.counts.map((count, n) => {
      const bar = h("span", { class: collapse.edges[n + 1] > collapse.near_from ? "near" : null, title: `${collapse.edges[n]} to ${collapse.edges[n + 1]}: ${count}` });
      bar.style.height = `${(100 * count) / most}%`;
      return bar;
    });
    fill(this.gauge,
      h("p", { "data-collapsed": String(collapse.collapsed) }, h("span", { class: collapse.collapsed ? "bad" : "ok" }, collapse.collapsed ? "Collapsed: " : "Not collapsed: "),
        `${share(collapse.near)} of the vectors have a cosine above ${collapse.near_from} to the items' centroid; above ${share(collapse.threshold, 0)} many users are served nearly the same.`,
        collapse.median === null ? "" : ` The median is ${number(collapse.median, 2)}.`),
      h("div", { class: "histogram", role: "img", "aria-label": `distribution of the cosine to the centroid from -1 to 1, ${share(collapse.near)} above ${collapse.near_from}` }, bars),
      h("div", { class: "scale" }, h("span", {}, "-1"), h("span", {}, "cosine to the centroid"), h("span", {}, "1")));
    const farthest = [...points].sort((a, b) => Math.hypot(...b.at) - Math.hypot(...a.at)).slice(0, LISTED);
    fill(this.list, table(`the ${number(farthest.length)} furthest from the middle`, [
      ["user", (row) => h("a", { href: `#user/${encodeURIComponent(row.user)}` }, foreign(row.user))],
      ["right", (row) => number(row.at[0], 3), "n"], ["up", (row) => number(row.at[1], 3), "n"],
      ["newest event", (row) => moment(row.as_of)], ["status", (row) => row.status], ["unknown items", (row) => share(row.unknown), "n"],
    ], farthest));
  }

  open(event) {
    if (!this.crowd?.points.length) return;
    const box = this.canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const away = (point) => { const [px, py] = this.place(point); return Math.hypot(px - x, py - y); };
    const found = this.crowd.points.reduce((best, point) => away(point) < away(best) ? point : best);
    if (away(found) < 12) location.hash = `#user/${encodeURIComponent(found.user)}`;
  }
}

function dot(tint, text) {
  const mark = h("span", { "aria-hidden": "true" }, "● ");
  mark.style.color = tint;
  return h("span", {}, mark, text);
}
