// What happens at this moment: rates, latency, lag by partition and owner, workers, rollouts.

import { chart, follows, lettersChart } from "./charts.js";
import { foreign, h, milliseconds, number, rate, refill, seconds, share, table } from "./dom.js";
import { ask } from "./feed.js";

const CHARTS = [
  { title: "Events per second", series: [["events/s", "events_per_s", "accent"], ["dead letters/s", "dead_per_s", "against"]] },
  { title: "From event to readable, milliseconds", series: [["p50", "p50_ms", "short"], ["p99", "p99_ms", "long"]] },
  { title: "Worst lag, seconds", series: [["lag", "lag_s", "accent"]] },
];

export class NowView {
  constructor(state) {
    this.state = state;
    this.tiles = h("dl", { class: "tiles" });
    this.charts = CHARTS.map((chart) => ({ ...chart, box: h("div", { class: "chart" }), plot: null }));
    this.dead = { box: h("div", { class: "chart" }), note: h("p", { class: "soft" }), plot: null, key: null };
    this.workers = h("section", { "aria-label": "Workers" });
    this.partitions = h("section", { "aria-label": "Partitions" });
    this.rollout = h("section", { "aria-label": "Versions and rollouts" });
    this.element = h("div", {},
      this.tiles,
      h("div", { class: "charts gap" }, this.charts.map(({ title, box }) => h("section", { "aria-label": title }, h("h2", {}, title), box)),
        h("section", { "aria-label": "Dead letters per minute" }, h("h2", {}, "Dead letters per minute, last day"), this.dead.box, this.dead.note)),
      this.workers, this.partitions, this.rollout);
    new ResizeObserver(() => [...this.charts, this.dead].forEach(({ box, plot }) => follows(box, plot))).observe(this.element);
  }

  shown() { this.draw(); this.drawLetters(); }

  themed() {
    this.charts.forEach((chart) => { chart.plot?.destroy(); chart.plot = null; });
    this.draw();
    this.drawLetters();
  }

  news(news) {
    const { rates, sources } = news;
    const silent = sources.workers.stale || news.silent_workers === news.workers.length;
    const tile = (name, value, stale = silent) => h("div", { class: stale ? "tile stale" : "tile" }, h("dt", {}, name), h("dd", {}, value));
    refill(this.tiles,
      tile("Events per second", silent ? "–" : rate(rates.events_per_s)),
      tile("Event to readable, p50", silent ? "–" : milliseconds(rates.p50_ms)),
      tile("Event to readable, p99", silent ? "–" : milliseconds(rates.p99_ms)),
      tile("Worst lag", seconds(news.worst_lag_s), silent),
      tile("Stale partitions", `${number(news.stale_partitions)} of ${number(news.partition_count)}`, news.stale_partitions > 0),
      tile("Dead letters, last day", number(news.letters.count), sources.letters.stale),
      tile("Store", news.store.answers ? "answers" : "silent", !news.store.answers));
    refill(this.workers, h("h2", {}, "Workers"), table("What each says of itself", [
      ["worker", (row) => foreign(row.address)],
      ["state", (row) => row.answers ? (row.ready ? h("span", { class: "ok" }, "ready") : h("span", { class: "bad" }, row.reasons.join("; "))) : h("span", { class: "bad" }, `does not answer (${row.reasons[0]})`)],
      ["events/s", (row) => rate(row.events_per_s), "n"],
      ["partitions", (row) => row.answers ? number(row.partitions) + (row.taking ? ` (taking ${number(row.taking)})` : "") : "–", "n"],
      ["CPU", (row) => row.answers ? share(row.cpu, 0) : "–", "n"],
      ["memory", (row) => row.answers ? number(row.memory_bytes / 1e6) + " MB" : "–", "n"],
      ["version", (row) => row.build ?? "–"],
    ], news.workers, (row) => row.answers ? null : "stale"));
    const more = news.partition_count > news.partitions.length ? ` (the ${news.partitions.length} worst of ${number(news.partition_count)})` : "";
    refill(this.partitions, h("h2", {}, "Partitions"), table(`Owner, lag, and the last sign of life in the store${more}`, [
      ["partition", (row) => number(row.partition), "n"],
      ["owner", (row) => row.owner ? foreign(row.owner) : "not known"],
      ["epoch", (row) => row.epoch ?? "–", "n"],
      ["records behind", (row) => number(row.lag_records), "n"],
      ["time behind", (row) => seconds(row.lag_s), "n"],
      ["last sign", (row) => row.heartbeat_s === null ? "never" : `${seconds(row.heartbeat_s)} ago`, "n"],
      ["state", (row) => row.restoring !== null ? `restoring, ${number(row.restoring)} records left` : row.stale ? "stale" : "fresh"],
    ], news.partitions, (row) => row.stale ? "stale" : null));
    refill(this.rollout, h("h2", {}, "Versions"), table("How far each pair of versions is", [
      ["item version", (row) => foreign(row.item_version)],
      ["user version", (row) => foreign(row.user_version)],
      ["state", (row) => row.refused ? h("span", { class: "bad" }, "refused: ", foreign(row.refused)) : { served: "served", wanted: "to be served", prepare: "prepared", active: "kept" }[row.state]],
      ["partitions", (row) => `${number(row.covered)} of ${number(row.partitions)}`, "n"],
      ["users", (row) => `${number(row.done)} of ${number(row.users)}`, "n"],
      ["time left", (row) => row.seconds_left === null ? "–" : seconds(row.seconds_left), "n"],
      ["fallbacks", (row) => share(row.fallback_share), "n"],
      ["unknown items", (row) => share(row.unknown_item_share), "n"],
    ], news.rollout));
    this.draw();
    this.askForLetters(news);
  }

  draw() {
    if (!window.uPlot || !this.element.isConnected) return;
    const points = this.state.history;
    const times = points.map((point) => point.at_ms / 1000);
    for (const one of this.charts) {
      const series = one.series.map(([label, name, tint]) => [label, points.map((point) => point[name] ?? null), tint]);
      if (one.plot) one.plot.setData([times, ...series.map(([, values]) => values)]);
      else one.plot = chart(one.box, one.title, times, series);
    }
  }

  async askForLetters({ letters }) {
    const key = `${letters.written}/${letters.count}`;
    if (this.dead.key === key || letters.count === null) return;
    this.dead.key = key;
    try {
      this.letters = await ask("/api/letters");
      this.drawLetters();
    } catch {
      this.dead.key = null;  // the next news try again; what is wrong is told at the top
    }
  }

  drawLetters() {
    if (!this.letters || !this.element.isConnected) return;
    this.dead.plot?.destroy();
    this.dead.plot = lettersChart(this.dead.box, this.letters);
    this.dead.note.textContent = this.dead.plot ? "" : "none";
  }
}
