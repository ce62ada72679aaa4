// The page: which view is shown, what is wrong at this moment, and the theme.

import { fill, foreign, h, number, seconds, shown } from "./dom.js";
import { ask, follow } from "./feed.js";
import { LettersView } from "./letters.js";
import { MapView } from "./map.js";
import { NowView } from "./now.js";
import { UserView } from "./user.js";
import { VersionsView } from "./versions.js";

/** News that are older than this are told to be old; they come once a second. */
const SILENT_MS = 3000;
const HISTORY = 600;
const VIEWS = { now: NowView, user: UserView, versions: VersionsView, letters: LettersView, map: MapView };
const TITLES = { now: "Now", user: "User", versions: "Versions", letters: "Dead letters", map: "Map" };

/** What all views share. */
const state = { about: null, news: null, at: -Infinity, trouble: null, history: [], user: "" };
const views = {};
let current = null;

function route() {
  const [name, ...rest] = location.hash.slice(1).split("/");
  let text = rest.join("/");
  try { text = decodeURIComponent(text); } catch { /* somebody wrote it by hand */ }
  return { name: Object.hasOwn(VIEWS, name) ? name : "now", rest: text };
}

function show(focus = true) {
  if (location.hash === "#main" && current) {  // the way past the links
    document.getElementById("main").focus();
    return;
  }
  const { name, rest } = route();
  document.querySelectorAll("nav a").forEach((a) => a.dataset.view === name ? a.setAttribute("aria-current", "page") : a.removeAttribute("aria-current"));
  document.title = `${TITLES[name]}: user embeddings`;
  views[name] ??= new VIEWS[name](state);
  const main = document.getElementById("main");
  current = views[name];
  fill(main, current.element);
  current.shown?.(rest);
  if (state.news) current.news?.(state.news);
  if (focus) main.focus({ preventScroll: false });
}

/** What is wrong, in words, as far as the news tell: [what, for how long]. */
function troubles(news) {
  const found = [];
  const { sources } = news;
  const since = (age_s) => ` for ${seconds(age_s)}`;
  if (sources.workers.stale) found.push([`workers are not looked at: ${sources.workers.error ?? "no answer"}`, ""]);
  for (const one of news.workers) {
    if (!one.answers) found.push([`worker ${one.address} does not answer (${one.reasons[0]})`, ""]);
    else if (!one.ready) found.push([`worker ${one.address} is not ready: ${one.reasons.join("; ")}`, ""]);
  }
  if (!news.store.answers) found.push(news.store.error ? [`the store does not answer: ${news.store.error}`, ""] : ["the store does not answer", since(sources.store.age_s)]);
  for (const [name, what] of [["versions", "control topics"], ["letters", "dead letters"]]) {
    const { stale, error, age_s } = sources[name];
    if (stale && error) found.push([`the ${what} can't be read: ${error}`, ""]);
    else if (stale && age_s !== null) found.push([`the ${what} can't be read: the brokers do not answer`, since(age_s)]);
  }
  if (news.stale_partitions) {
    const least = news.least_silence_s === null ? ", never heard of" : `, silent for ${seconds(news.least_silence_s)} or longer`;
    found.push([`${number(news.stale_partitions)} of ${number(news.partition_count)} partitions are stale`, least]);
  }
  return found;
}

function tellTroubles() {
  const age_s = (performance.now() - state.at) / 1000, silent = 1000 * age_s > SILENT_MS;
  const link = document.getElementById("link");
  link.className = silent ? "link down" : "link";
  const text = !silent ? "live" : state.trouble ?? (state.news ? "no news" : "connecting…");
  if (link.textContent !== text) link.textContent = text;
  const found = state.news ? troubles(state.news) : [];
  if (silent && state.news) found.unshift([`what is shown is old: ${text}`, `, ${seconds(age_s)}`]);
  const box = document.getElementById("troubles"), key = found.map(([what]) => what).join("\n");
  box.hidden = !found.length;
  if (box.dataset.key !== key) {
    box.dataset.key = key;
    fill(box, h("ul", {}, found.map(([what]) => h("li", {}, shown(what), h("span", { "aria-hidden": "true" })))));
  }
  // how long it has lasted grows each second, which is seen, and not said again and again
  box.querySelectorAll("li > span").forEach((span, n) => { if (span.textContent !== found[n][1]) span.textContent = found[n][1]; });
}

/** Keep the news, and draw them as soon as the tab is drawn. */
function take(news) {
  state.news = news;
  state.at = performance.now();
  state.trouble = null;
  askWhatItIs();
  const point = { at_ms: news.at_ms, ...news.rates, lag_s: news.worst_lag_s };
  state.history.push(point);
  if (state.history.length > HISTORY) state.history.shift();
  drawing ??= requestAnimationFrame(draw);  // of a tab that nobody sees the browser asks for none
}

let drawing = null;

function draw() {
  drawing = null;
  const { news } = state;
  const { user_version, item_version, wanted } = news.serving;
  fill(document.getElementById("serving"), item_version
    ? ["serves ", foreign(`${user_version} · ${item_version}`), wanted ? [", ", foreign(wanted.join(" · ")), " is to be served"] : null]
    : ["nothing is served yet"]);
  tellTroubles();
  current?.news?.(news);
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  const button = document.getElementById("theme");
  button.setAttribute("aria-pressed", String(name === "dark"));
  current?.themed?.();
}

function begin() {
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  setTheme(localStorage.getItem("uemb-theme") ?? (preferred.matches ? "dark" : "light"));
  preferred.addEventListener("change", (event) => { if (!localStorage.getItem("uemb-theme")) setTheme(event.matches ? "dark" : "light"); });
  document.getElementById("theme").addEventListener("click", () => {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("uemb-theme", next);
    setTheme(next);
  });
  addEventListener("hashchange", () => show());
  setInterval(tellTroubles, 500);
  show(false);
  follow(take, (trouble) => { state.trouble = trouble; tellTroubles(); });
}

/** What does not change, asked for until it is told. */
function askWhatItIs() {
  if (state.about || state.askedAbout) return;
  state.askedAbout = true;
  ask("/api/about").then((about) => {
    state.about = about;
    state.history = [...about.history, ...state.history.filter((point) => !about.history.length || point.at_ms > about.history.at(-1).at_ms)];
    Object.values(views).forEach((view) => view.told?.());
  }, (error) => { state.trouble = error.message; }).finally(() => { state.askedAbout = false; });
}

begin();
