// Dead letters: how many of each kind over time, the newest of each, payload only when it is asked for.

import { command, fill, foreign, h, moment, number, shown, table } from "./dom.js";
import { ask } from "./feed.js";
import { optionsOf } from "./now.js";

const COLORS = ["accent", "against", "short", "long", "look", "soft"];

export class LettersView {
  constructor(state) {
    this.state = state;
    this.note = h("p", { class: "soft", role: "status" });
    this.box = h("div", { class: "chart" });
    this.kinds = h("div", {});
    this.element = h("div", {},
      h("section", { "aria-label": "Over time" }, h("h2", {}, "Dead letters per minute"), this.box, this.note),
      this.kinds);
    new ResizeObserver(() => this.plot?.setSize({ width: this.box.clientWidth, height: 140 })).observe(this.element);
  }

  shown() { this.load(); }

  themed() { this.letters && this.draw(); }

  news(news) {
    const key = `${news.letters.written}/${news.letters.count}`;
    if (this.key !== key && this.element.isConnected) { this.key = key; this.load(); }
  }

  async load() {
    try {
      this.letters = await ask("/api/letters");
      this.draw();
    } catch (error) {
      this.note.textContent = shown(error.message);
    }
  }

  draw() {
    const { kinds, minutes, since_ms, topic } = this.letters;
    fill(this.note, "Since ", moment(since_ms), " on ", foreign(topic), kinds.length ? "." : ": none.");
    const reasons = [...new Set(kinds.map((kind) => kind.reason))].slice(0, COLORS.length);
    this.plot?.destroy();
    this.plot = null;
    if (window.uPlot && minutes.length) {
      const first = minutes[0].minute, last = Math.max(Math.floor(Date.now() / 60000), minutes.at(-1).minute);
      const times = Array.from({ length: last - first + 1 }, (_, n) => (first + n) * 60);
      const series = reasons.map((reason) => {
        const values = new Array(times.length).fill(0);
        for (const { minute, counts } of minutes) for (const [of, , n] of counts) if (of === reason) values[minute - first] += n;
        return values;
      });
      const options = optionsOf({ box: this.box, title: "Dead letters per minute", series: reasons.map((reason, n) => [shown(reason), "", COLORS[n]]) });
      this.plot = new uPlot(options, [times, ...series], this.box);
    }
    const open = new Set([...this.kinds.querySelectorAll("details[open]")].map((one) => one.dataset.kind));
    fill(this.kinds, kinds.map((kind) => this.kind(kind, open)));
  }

  kind(kind, open) {
    const name = `${kind.reason} ${kind.topic}`;
    return h("section", { "aria-label": shown(name) },
      h("h2", {}, foreign(kind.reason), " · ", foreign(kind.topic || "no topic of ours"), ` · ${number(kind.count)}`),
      kind.replay ? command(kind.replay) : h("p", { class: "soft" }, "no letter of ours: it can't be replayed"),
      h("details", { "data-kind": name, open: open.has(name) }, h("summary", {}, `the newest ${number(kind.newest.length)}`),
        table("Letters without their payload", [
          ["letter", (row) => row.place],
          ["written", (row) => moment(row.ts_ms)],
          ["from", (row) => foreign(row.source)],
          ["bytes", (row) => number(row.size), "n"],
          ["what was wrong", (row) => foreign(row.detail)],
          ["payload", (row) => this.payload(row)],
        ], kind.newest)));
  }

  payload(row) {
    const box = h("div", {}, h("button", { type: "button", "aria-label": `show the payload of letter ${row.place}`, onclick: async () => {
      try {
        const letter = await ask(`/api/letter?place=${encodeURIComponent(row.place)}`);
        fill(box, h("h3", {}, "key"), data(letter.key), h("h3", {}, "value"), data(letter.value),
          h("h3", {}, "headers"), letter.headers.map(([name, value]) => h("div", {}, foreign(name), data(value))), command(letter.replay));
      } catch (error) {
        fill(box, shown(error.message));
      }
    } }, "Show"));
    return box;
  }
}

function data(value) {
  if (value === null) return h("p", { class: "soft" }, "null");
  const text = value.is_text ? shown(value.text) : value.text;
  return [h("pre", { tabindex: 0 }, text), value.is_text ? null : h("p", { class: "soft" }, "in base64"), value.whole ? null : h("p", { class: "soft" }, `the first of ${number(value.bytes)} bytes`)];
}
