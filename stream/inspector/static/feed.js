// Questions to the inspector, and its news: one stream for all pages of a browser, handed from page to page.

const TOKEN = "uemb-inspect-token";
let asking = null;

function headers(more = {}) {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { ...more, Authorization: `Bearer ${token}` } : more;
}

/** Ask for the token, once for all who need it. */
function askForToken() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("token");
    dialog.addEventListener("close", () => {
      const given = document.getElementById("token-text").value.trim();
      if (/^[\x21-\x7e]+$/.test(given)) sessionStorage.setItem(TOKEN, given);  // what no header holds is no token
      else sessionStorage.removeItem(TOKEN);
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

async function answered(path, options) {
  for (;;) {
    const answer = await fetch(path, { ...options, headers: headers(options.headers), cache: "no-store" });
    if (answer.status !== 401) return answer;
    await askForToken();
  }
}

/** The answer to a question; an Error with the reason where there is none. */
export async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  let answer;
  try {
    answer = await answered(path, options);
  } catch {
    throw new Error("the inspector does not answer");
  }
  const document = await answer.json();
  if (!answer.ok) throw new Error(document.error ?? `the inspector answers ${answer.status}`);
  return document;
}

/** Follow the news for ever: `onNews` gets each, `onTrouble` why there are none. */
export async function follow(onNews, onTrouble) {
  if (!navigator.locks || !window.BroadcastChannel) {  // pages from other machines without TLS
    stream(onNews, onTrouble);
    return;
  }
  // Whoever waits for a token must not hold the lock: another page may have it.
  const channel = new BroadcastChannel("uemb-news");
  channel.onmessage = ({ data }) => data.trouble ? onTrouble(data.trouble) : onNews(data.news);
  const tell = (news) => { onNews(news); channel.postMessage({ news }); };
  const complain = (trouble) => { onTrouble(trouble); channel.postMessage({ trouble }); };
  for (;;) {
    try {
      await answered("/api/about", {});
    } catch {
      onTrouble("the inspector does not answer");
      await pause();
      continue;
    }
    await navigator.locks.request("uemb-news", () => stream(tell, complain, true));
  }
}

/** News for ever; where there is a lock to give up, until a token is needed. */
async function stream(onNews, onTrouble, givesUp = false) {
  for (;;) {
    try {
      const answer = givesUp ? await fetch("/api/news", { headers: headers(), cache: "no-store" }) : await answered("/api/news", {});
      if (answer.status === 401) return;
      if (!answer.ok) throw new Error((await answer.json()).error);
      await readEvents(answer.body, onNews);
      onTrouble("the inspector has ended");
    } catch (error) {
      onTrouble(error instanceof TypeError ? "the inspector does not answer" : error.message);
    }
    await pause();
  }
}

function pause() {
  return new Promise((resolve) => setTimeout(resolve, 1000));
}

async function readEvents(body, onNews) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const line = text.slice(0, end).split("\n").find((one) => one.startsWith("data: "));
      if (line) onNews(JSON.parse(line.slice(6)));
    }
  }
}
