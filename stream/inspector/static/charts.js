// Charts over time, by uPlot.

import { color, number, shown } from "./dom.js";

const COLORS = ["accent", "against", "short", "long", "look", "soft"];
const HEIGHT = 140;
const HOUR_MINUTES = 60;
const DAY_MINUTES = 1440;
/** A chart that has just begun shows so many seconds. */
const LEAST_S = 60;

/** Put a chart into a box; `series` are [label, values, colour]. */
export function chart(box, title, times, series) {
  const options = optionsOf(box, title, series.map(([label, , name]) => [label, name]));
  return new uPlot(options, [times, ...series.map(([, values]) => values)], box);
}

/** Keep a chart as wide as its box. */
export function follows(box, plot) {
  plot?.setSize({ width: box.clientWidth, height: HEIGHT });
}

/** Dead letters per minute, a line for each of the most frequent reasons; null where there are none. */
export function lettersChart(box, { kinds, minutes }) {
  if (!window.uPlot || !minutes.length) return null;
  const reasons = [...new Set(kinds.map((kind) => kind.reason))].slice(0, COLORS.length);
  const last = Math.max(Math.floor(Date.now() / 60000), minutes.at(-1).minute);
  const first = Math.max(Math.min(minutes[0].minute, last - HOUR_MINUTES), last - DAY_MINUTES);
  const times = Array.from({ length: last - first + 1 }, (_, n) => (first + n) * 60);
  const series = reasons.map((reason, n) => {
    const values = new Array(times.length).fill(0);
    for (const { minute, counts } of minutes) for (const [of, , count] of counts) if (of === reason && minute >= first) values[minute - first] += count;
    return [shown(reason), values, COLORS[n]];
  });
  return chart(box, "Dead letters per minute", times, series);
}

function optionsOf(box, title, series) {
  const axis = { stroke: color("soft"), grid: { stroke: color("line"), width: 1 }, ticks: { stroke: color("line"), width: 1 } };
  return {
    width: box.clientWidth || 300,
    height: HEIGHT,
    cursor: { y: false },
    legend: { live: false },
    scales: { x: { range: (_, low, high) => [Math.min(low, high - LEAST_S), high] }, y: { range: (_, low, high) => [0, Math.max(high ?? 1, 1e-3) * 1.1] } },
    axes: [{ ...axis, space: 70, values: (_, times, __, ___, step) => times.map((s) => new Date(s * 1000).toISOString().slice(11, step < 60 ? 19 : 16)) }, { ...axis, size: 52, values: (_, values) => values.map((v) => number(v, v && v < 1 ? 2 : 0)) }],
    series: [{ label: "time" }, ...series.map(([label, name]) => ({ label, stroke: color(name), width: 2, spanGaps: false, value: (_, v) => v === null ? "–" : number(v, 1) }))],
    hooks: { ready: [(plot) => plot.root.setAttribute("aria-label", title)] },
  };
}
