// Two versions side by side: one user in both, and the checklist before a version is activated.

import { command, fill, foreign, h, number, share, shown } from "./dom.js";
import { ask } from "./feed.js";
import { nearest } from "./user.js";

const WORDS = { ok: "fine", look: "look", no: "no" };

export class VersionsView {
  constructor(state) {
    this.state = state;
    this.pair = h("select", { id: "other-pair", onchange: () => this.load() });
    this.input = h("input", { id: "both-user", autocomplete: "off", spellcheck: "false", size: 28 });
    this.note = h("p", { class: "soft", role: "status" });
    this.checks = h("div", {});
    this.both = h("div", {});
    this.element = h("div", {},
      h("section", {}, h("h2", {}, "Beside the served version"),
        h("form", { class: "row", onsubmit: (event) => { event.preventDefault(); this.state.user = this.input.value; this.load(); } },
          h("label", { for: "other-pair" }, "other version", this.pair),
          h("label", { for: "both-user" }, "user id", this.input),
          h("button", { type: "submit" }, "Compare")),
        this.note),
      this.checks, this.both);
  }

  shown() {
    if (this.state.user) this.input.value = this.state.user;
    if (this.pairKey) this.load();
  }

  news(news) {
    const others = news.rollout.filter((row) => row.state !== "served");
    const names = others.map((row) => [row.user_version, row.item_version].join(" · "));
    const key = JSON.stringify(others.map((row) => [row.user_version, row.item_version, row.state, row.covered, row.refused]));
    if (this.pairKey === key) return;
    this.pairKey = key;
    const chosen = this.pair.value;
    fill(this.pair, names.map((name) => h("option", { value: name }, shown(name))));
    if (names.includes(chosen)) this.pair.value = chosen;
    this.load();
  }

  async load() {
    if (!this.pair.value) {
      this.note.textContent = "Only one pair of versions is published. `uemb items publish DIR` prepares another.";
      fill(this.checks);
      fill(this.both);
      return;
    }
    const [user_version, item_version] = this.pair.value.split(" · ");
    const user = this.input.value;
    const turn = this.turn = (this.turn ?? 0) + 1;
    this.note.textContent = "comparing…";
    fill(this.checks);  // nobody shall take what was said of another for this one's
    fill(this.both);
    try {
      const query = new URLSearchParams({ user_version, item_version });
      const checklist = await ask(`/api/checklist?${query}`);
      if (turn !== this.turn) return;
      this.drawChecks(checklist);
      if (user) {
        const served = await ask("/api/user", { user });
        const other = await ask("/api/user", { user, user_version, item_version });
        if (turn !== this.turn) return;
        this.drawBoth(served, other);
      } else fill(this.both);
      this.note.textContent = "";
    } catch (error) {
      if (turn === this.turn) this.note.textContent = shown(error.message);
    }
  }

  drawChecks({ checks, activate, compared }) {
    fill(this.checks, h("section", { "aria-label": "Checklist" }, h("h2", {}, "Before it is activated"),
      h("ul", { class: "plain checks" }, checks.map((check) => h("li", { "data-verdict": check.verdict }, h("span", { class: `verdict ${check.verdict}` }, WORDS[check.verdict]), " ", foreign(check.text, "span")))),
      compared ? h("p", { class: "soft" }, `compared on ${number(compared)} users who were active of late`) : null,
      activate.map(command)));
  }

  drawBoth(served, other) {
    const a = served.explained?.nearest ?? [], b = other.explained?.nearest ?? [];
    const shared = a.filter((one) => b.some((two) => two.item === one.item)).length;
    fill(this.both, h("section", { "aria-label": "One user in both" }, h("h2", {}, "User ", foreign(served.user), " in both"),
      h("p", { "data-overlap": a.length ? shared / a.length : null }, a.length ? `${number(shared)} of the ${number(a.length)} nearest items are the same (${share(shared / a.length, 0)}). ` : `${served.words} `,
        served.status === other.status ? "" : `Here ${served.status}, there ${other.status}${other.reason ? ` (${other.reason})` : ""}. `,
        served.stored && other.stored && served.stored.unknown_items !== other.stored.unknown_items ? `${number(other.stored.unknown_items)} items of the history are unknown there, ${number(served.stored.unknown_items)} here.` : ""),
      h("div", { class: "two" },
        nearest(shown(`${served.user_version} · ${served.item_version} (served)`), a, b.length ? b : a),
        nearest(shown(`${other.user_version} · ${other.item_version}`), b, a.length ? a : b))));
  }
}
