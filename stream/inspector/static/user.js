// One user, explained: the vector, the history behind it, what each interaction does, and what if.

import { color, fill, foreign, h, keepingFocus, moment, number, share, shown, svg, table } from "./dom.js";
import { ask } from "./feed.js";

/** A user who is looked at is looked up again with each of so many news. */
const REFRESH = 3;
const OUTCOMES = { applied: "taken in", duplicate: "there already", too_old: "too old for a full history", erased: "from before the erasure" };
const NAMES = { long: "share of the long part", short: "share of the short part", mean: "share of the mean" };

export class UserView {
  constructor(state) {
    this.state = state;
    this.without = new Set();
    this.added = [];
    this.answer = null;
    this.user = "";
    this.beats = 0;
    this.input = h("input", { id: "user-id", name: "user", autocomplete: "off", spellcheck: "false", required: true, size: 28 });
    this.pair = h("select", { id: "user-pair", onchange: () => this.load() });
    // kept from one drawing to the next, with what was written into them
    this.item = h("input", { id: "if-item", autocomplete: "off", spellcheck: "false", required: true, size: 14 });
    this.type = h("select", { id: "if-type" });
    this.told();
    this.note = h("p", { class: "soft", role: "status" });
    this.result = h("div", {});
    this.element = h("div", {},
      h("section", {}, h("h2", {}, "A user"),
        h("form", { class: "row", onsubmit: (event) => { event.preventDefault(); this.go(); } },
          h("label", { for: "user-id" }, "user id", this.input),
          h("label", { for: "user-pair" }, "versions", this.pair),
          h("button", { type: "submit" }, "Look up")),
        this.note),
      this.result);
  }

  go() {
    const user = this.input.value;
    const hash = `#user/${encodeURIComponent(user)}`;
    if (location.hash === hash) { this.reset(user); this.load(); }
    else location.hash = hash;
  }

  shown(user) {
    if (user) this.state.user = user;
    if (!this.state.user) return;
    if (this.user !== this.state.user) this.reset(this.state.user);  // what was supposed was supposed of another
    this.input.value = this.user;
    this.load();
  }

  reset(user) {
    this.user = this.state.user = user;
    this.without.clear();
    this.added = [];
    this.answer = null;
  }

  themed() { if (this.answer) keepingFocus(this.result, () => this.draw()); }

  /** What types there are is known now. */
  told() { fill(this.type, (this.state.about?.types ?? []).map((name) => h("option", { value: name }, shown(name)))); }

  news(news) {
    const served = [news.serving.user_version, news.serving.item_version].join(" · ");
    const names = news.rollout.map((row) => [row.user_version, row.item_version].join(" · ")).sort((a, b) => (b === served) - (a === served));
    const key = JSON.stringify([served, names]);
    if (this.pairKey !== key) {
      const wasServed = !this.pair.value || this.pair.value === this.served, chosen = this.pair.value;
      this.served = served;
      this.pairKey = key;
      fill(this.pair, names.map((name) => h("option", { value: name }, shown(name) + (name === served ? " (served)" : ""))));
      if (!wasServed && names.includes(chosen)) this.pair.value = chosen;  // who looked at the served one goes on with it
    }
    const busy = this.result.contains(document.activeElement);  // what somebody writes in would be put away
    if (this.answer && !busy && !this.loading && !this.without.size && !this.added.length && ++this.beats % REFRESH === 0) this.load(true);
    if (news.reading && this.loading) {
      const [done, total] = news.reading;
      this.note.textContent = `reading the histories of the user's partition: ${number(done)} of ${number(total)} records`;
    }
  }

  /** Ask, and draw what is new; `quietly` where nobody has asked, and the same again is no news. */
  async load(quietly = false) {
    const { user } = this;
    if (!user) return false;
    const known = quietly ? this.answer.state : "";
    const [user_version = "", item_version = ""] = this.pair.value.split(" · ");
    const turn = this.loading = this.turns = (this.turns ?? 0) + 1;
    if (!quietly) this.note.textContent = "looking…";
    try {
      const answer = await ask("/api/user", { user, user_version, item_version, without: [...this.without], add: this.added, known });
      if (turn !== this.loading) return true;
      this.note.textContent = shown(answer.problem ?? "");
      if (!answer.same) {
        this.answer = answer;
        keepingFocus(this.result, () => this.draw());
      }
      return true;
    } catch (error) {
      if (turn !== this.loading) return true;
      this.note.textContent = shown(error.message);
      if (!this.answer || this.answer.user !== user) fill(this.result);
      return false;
    } finally {
      if (turn === this.loading) this.loading = 0;
    }
  }

  draw() {
    const { answer } = this;
    const explained = answer.explained, supposed = answer.supposed;
    fill(this.result,
      this.facts(answer),
      explained && this.timeline(explained),
      (explained || supposed) && h("section", { "aria-label": "Nearest items" }, h("h2", {}, "Nearest items"), h("div", { class: "three" },
        answer.before && nearest("before the last event", answer.before.nearest, explained.nearest, `cosine to the vector now ${number(answer.before.cosine, 3)}`),
        explained && nearest("now", explained.nearest, answer.before?.nearest ?? explained.nearest),
        supposed && nearest("supposed", supposed.nearest, explained?.nearest ?? supposed.nearest, supposed.cosine === undefined ? null : `cosine to the vector now ${number(supposed.cosine, 3)}`))),
      this.whatIf(answer),
      (supposed ?? explained) && this.history(answer));
  }

  facts(answer) {
    const { stored, kept } = answer;
    const rows = [
      ["status", h("span", { class: answer.status === "ok" ? "ok" : "look", "data-status": answer.status }, answer.status + (answer.reason ? ` (${answer.reason})` : ""))],
      ["versions", foreign(`${answer.user_version} · ${answer.item_version}`)],
      ["partition", kept ? number(kept.partition) : "–"],
      ["newest event", stored ? moment(stored.as_of) : "–"],
      ["history", stored ? `${number(stored.history_len)} of at most ${number(kept?.limit)}, ${number(stored.unknown_items)} unknown to the item version` : "–"],
      ["revision", stored ? `${stored.epoch}.${stored.revision} in the store, ${kept ? `${kept.epoch}.${kept.revision}` : "none"} in the changelog` : kept ? `${kept.epoch}.${kept.revision} in the changelog` : "–"],
      ["stored vector", answer.agrees === undefined ? "–" : answer.agrees ? "is what the history makes" : h("span", { class: "bad" }, "is not what the history makes: it may be on its way; look again")],
      kept?.erased_at ? ["erased up to", moment(kept.erased_at)] : null,
    ].filter(Boolean);
    return h("section", {}, h("h2", {}, "User ", foreign(answer.user)), h("p", { class: "words" }, answer.words),
      h("dl", { class: "facts" }, rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))));
  }

  timeline({ history }) {
    const times = history.map((row) => row.ts_ms), first = times[0], last = times.at(-1);
    const x = (ts) => 18 + 964 * (last > first ? (ts - first) / (last - first) : 1);
    const most = Math.max(...history.map((row) => Math.abs(row.pull ?? row.turn ?? 0)), 1e-9);
    const dots = history.map((row) => {
      const weight = row.pull ?? row.turn ?? 0;
      return svg("circle", { cx: x(row.ts_ms), cy: 36, r: 3 + 14 * Math.sqrt(Math.abs(weight) / most), "fill-opacity": 0.45, fill: color(!row.known ? "soft" : weight < 0 ? "against" : "pull") },
        svg("title", {}, `${shown(row.title ?? row.item)}, ${moment(row.ts_ms)}`));
    });
    return h("section", { "aria-label": "Time line" }, h("h2", {}, "Time line"),
      svg("svg", { class: "timeline", viewBox: "0 0 1000 72", preserveAspectRatio: "none", role: "img", "aria-label": `${history.length} interactions from ${moment(first)} to ${moment(last)}, each as large as its pull` },
        svg("line", { x1: 0, x2: 1000, y1: 36, y2: 36, stroke: color("line") }), dots),
      h("div", { class: "scale" }, h("span", {}, moment(first)), h("span", {}, moment(last))),
      h("div", { class: "key" }, key("pull", "pulls the vector"), key("against", "pulls against it"), h("span", {}, "as large as its pull")));
  }

  whatIf(answer) {
    const { item, type } = this;
    const newest = answer.explained?.history.at(-1)?.ts_ms;
    const changed = this.without.size + this.added.length;
    return h("section", { "aria-label": "What if" }, h("h2", {}, "What if"),
      h("p", { class: "soft" }, "Take interactions away below, or add one as the newest. Nothing is written."),
      h("form", { class: "row", onsubmit: (event) => {
        event.preventDefault();
        const at = Math.max(newest ?? Date.now(), ...this.added.map((one) => one.ts_ms)) + 1;
        if (!type.value) return;
        const one = { item: item.value, type: type.value, ts_ms: at };
        this.added.push(one);
        this.load().then((fine) => { if (!fine) this.added = this.added.filter((other) => other !== one); });
      } },
        h("label", { for: "if-item" }, "item id", item), h("label", { for: "if-type" }, "type", type),
        h("button", { type: "submit" }, "Add"),
        h("button", { type: "button", id: "if-reset", disabled: !changed, onclick: () => { this.without.clear(); this.added = []; this.load(); } }, "As it is")),
      changed ? h("p", { role: "status" }, `${number(this.without.size)} taken away, ${number(this.added.length)} added`,
        answer.supposed?.cosine !== undefined ? `: cosine to the vector now ${number(answer.supposed.cosine, 4)}` : "",
        answer.supposed?.outcomes.some((one) => one !== "applied") ? `; of those added: ${answer.supposed.outcomes.map((one) => OUTCOMES[one]).join(", ")}` : "",
        answer.supposed && answer.supposed.status !== "ok" ? `. ${answer.supposed.words}` : ".") : null);
  }

  history(answer) {
    const now = new Map((answer.explained?.history ?? []).map((row) => [row.key, row]));
    const shownHistory = answer.supposed ?? answer.explained;
    const gone = [...now.values()].filter((row) => this.without.has(row.key)).map((row) => ({ ...row, gone: true, shares: row.shares.map(() => 0), pull: null, turn: null }));
    const rows = [...shownHistory.history, ...gone].sort((a, b) => b.ts_ms - a.ts_ms || (a.key < b.key ? 1 : -1));
    const parts = shownHistory.parts;
    const widest = parts.map((_, k) => Math.max(...rows.map((row) => row.shares[k]), 1e-9));
    const mostPull = Math.max(...rows.map((row) => Math.abs(row.pull ?? 0)), 1e-9);
    const sums = parts.map((_, k) => shownHistory.history.reduce((sum, row) => sum + row.shares[k], 0));
    const columns = [
      ["when", (row) => moment(row.ts_ms)],
      ["item", (row) => [foreign(row.title ?? row.item), row.title ? h("span", { class: "soft" }, " ", foreign(row.item)) : null, row.known ? null : h("span", { class: "unknown" }, " unknown to this item version")]],
      ["type", (row) => foreign(row.type)],
      ...parts.map((name, k) => [NAMES[name] ?? `share of ${name}`, (row) => bar(row.shares[k], widest[k], k === 0 ? "long" : "short")]),
      ["pull", (row) => row.pull === null ? "–" : bar(row.pull, mostPull, row.pull < 0 ? "against" : "pull")],
      ["turns the vector by", (row) => row.turn === null ? "–" : `${number(row.turn, 2)}°`, "n"],
      ["keep", (row) => now.has(row.key) ? h("input", { type: "checkbox", "data-focus": row.key, checked: !this.without.has(row.key), "aria-label": `keep ${shown(row.title ?? row.item)} of ${moment(row.ts_ms)}`, onchange: (event) => {
        if (event.target.checked) this.without.delete(row.key); else this.without.add(row.key);
        this.load();
      } }) : "supposed"],
    ];
    return h("section", { "aria-label": "History" }, h("h2", {}, "History, newest first"),
      h("p", { class: "soft" }, parts.map((name, k) => `${NAMES[name] ?? name}: all of them together ${number(sums[k], 3)}. `), "The pull is what an interaction adds to the vector, along it; all pulls sum to 1. The last figure is how far the vector would turn without it."),
      table(`${number(rows.length)} interactions`, columns, rows, (row) => row.gone ? "out" : now.has(row.key) ? null : "new"));
  }
}

function nearest(title, items, other, note) {
  const known = new Set(other.map((one) => one.item));
  return h("div", {}, h("h3", {}, title),
    h("ol", { class: "items", "data-nearest": title }, items.map((one) => h("li", { class: known.has(one.item) ? null : "new", "data-item": shown(one.item) }, foreign(one.title ?? one.item), h("span", { class: "soft" }, ` ${number(one.score, 3)}`)))),
    note ? h("p", { class: "soft" }, note) : null);
}

function bar(value, most, kind) {
  const inner = h("span", { class: `fill ${kind}` });
  inner.style.width = `${(100 * Math.min(1, Math.abs(value) / most)).toFixed(1)}%`;
  return h("div", { class: "bars" }, h("span", { class: "track", "aria-hidden": "true" }, inner), h("span", {}, share(value)));
}

function key(kind, text) {
  return h("span", {}, h("span", { class: `swatch ${kind}` }), text);
}

export { nearest };
