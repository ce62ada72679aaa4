// Dead letters: how many of each kind over time, the newest of each, payload only when it is asked for.

import { follows, lettersChart } from "./charts.js";
import { command, fill, foreign, h, keepingFocus, moment, number, shown, table } from "./dom.js";
import { ask } from "./feed.js";

export class LettersView {
  constructor(state) {
    this.state = state;
    this.note = h("p", { class: "soft", role: "status" });
    this.box = h("div", { class: "chart" });
    this.kinds = h("div", {});
    this.opened = new Map();  // payloads that somebody has asked for, by place
    this.element = h("div", {},
      h("section", { "aria-label": "Over time" }, h("h2", {}, "Dead letters per minute"), this.box, this.note),
      this.kinds);
    new ResizeObserver(() => follows(this.box, this.plot)).observe(this.element);
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
    const { kinds, since_ms, topic } = this.letters;
    fill(this.note, "Since ", moment(since_ms), " on ", foreign(topic), kinds.length ? "." : ": none.");
    this.plot?.destroy();
    this.plot = lettersChart(this.box, this.letters);
    keepingFocus(this.kinds, () => this.drawKinds(kinds));
  }

  drawKinds(kinds) {
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
    if (this.opened.has(row.place)) return this.opened.get(row.place);
    const box = h("div", {}, h("button", { type: "button", "data-focus": row.place, "aria-label": `show the payload of letter ${row.place}`, onclick: async () => {
      this.opened.set(row.place, box);  // before it is there: what is drawn meanwhile must not put it away
      try {
        const letter = await ask(`/api/letter?place=${encodeURIComponent(row.place)}`);
        fill(box, h("h3", {}, "key"), data(letter.key), h("h3", {}, "value"), data(letter.value),
          h("h3", {}, "headers"), letter.headers.map(([name, value]) => h("div", {}, foreign(name), data(value))), command(letter.replay));
      } catch (error) {
        this.opened.delete(row.place);
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
