// The page served at /: asks POST /score and draws the tokens itself. No text is ever parsed as markup or code.

import { hasKey, models, score, send, ServiceError, useKey } from "./api.js";
import { hideDetails, leaveDetails } from "./details.js";
import { EXAMPLE, read, requestOf, start as startForm, write } from "./form.js";
import { fragmentOf, viewOf } from "./link.js";
import { inputOf, linesOf, RowError } from "./records.js";
import { download, html, svg } from "./save.js";
import { byId, element } from "./text.js";
import { View } from "./view.js";

const RETRY_MS = 2000; // while the service starts
const MOST_PREFETCHED = 3;

let cards = []; // of the served pairs
let asked = null; // {input, card}: what is shown
let running = null; // the AbortController of the request in flight
let waiting = null; // what to do once a key is given
let linked = {}; // choices of the link that the page was opened with
let file = null; // {name, lines, at}

const view = new View({ ask: (card) => score(requestOf(asked.input), card), failed: showFailure });

async function showRewards() {
  const card = cards.find((one) => one.name === byId("pair").value);
  if (card === undefined) return loadPairs();
  running?.abort();
  const mine = (running = new AbortController());
  const input = read();
  byId("error").hidden = true;
  byId("show").disabled = true;
  byId("answers").ariaBusy = "true";
  byId("answers").classList.add("old");
  say("computing …");
  try {
    const answer = await score(requestOf(input), card, mine.signal);
    asked = { input, card };
    const siblings = siblingsOf(card);
    await view.show(card, siblings, answer, { ...view.choices(), ...linked });
    linked = {};
    say(view.summary());
    byId("result").scrollIntoView({ block: "nearest" });
    prefetch(siblings.filter((one) => one !== card).slice(0, MOST_PREFETCHED), mine.signal);
  } catch (failure) {
    if (mine.signal.aborted) return;
    byId("result").hidden = true; // old rewards below a new error would mislead
    showFailure(failure, showRewards);
  } finally {
    if (running === mine) {
      byId("show").disabled = false;
      byId("answers").ariaBusy = "false";
      byId("answers").classList.remove("old");
    }
  }
}

/** The pairs with the same SFT model, tokens and signals: only their references differ. */
function siblingsOf(card) {
  const kind = (one) => JSON.stringify([one.sft, one.tokenizer_sha256, one.quantities]);
  return card.token_head === null ? cards.filter((one) => kind(one) === kind(card)) : [card];
}

/** Asks for the other references too, so that switching is immediate. Failures show when they are chosen. */
function prefetch(others, signal) {
  for (const card of others) view.prefetch(card, () => score(requestOf(asked.input), card, signal));
}

function say(text) {
  byId("status").textContent = text;
}

/** Shows an error in words. `again`: what to do once a key is given. */
function showFailure(failure, again = null) {
  say("");
  if (failure.status === 401) {
    waiting = again;
    byId("access").hidden = false;
    byId("key").focus();
    if (!hasKey()) return;
  }
  const cure = "check that it runs and that this computer can reach it, then try again.";
  const words = failure instanceof TypeError
    ? `The service cannot be reached (${failure.message}): ${cure}`
    : failure.message;
  const error = failure instanceof ServiceError ? failure.error : { message: words };
  byId("error-message").textContent = error.message;
  const items = error.items ?? [];
  byId("error-items").replaceChildren(...(items.length > 1 ? items : []).map(itemLine)); // a single one is the message
  const details = [["code", error.code], ["field", error.param], ["request", error.request_id]];
  const known = details.filter(([, value]) => value != null);
  byId("error-details").textContent = known.map((pair) => pair.join(": ")).join(" · ");
  byId("error").hidden = false;
  byId("error").scrollIntoView({ block: "nearest" });
}

function itemLine(item) {
  const place = [item.item == null ? null : `item ${item.item}`, item.param].filter((part) => part != null).join(", ");
  return element("li", { text: [place, item.message ?? JSON.stringify(item)].filter(Boolean).join(": ") });
}

async function loadPairs() {
  try {
    cards = await models();
  } catch (failure) {
    if (failure.error?.code === "starting") {
      byId("served").textContent = failure.message;
      setTimeout(loadPairs, RETRY_MS);
    } else {
      byId("served").textContent = "";
      showFailure(failure, loadPairs);
    }
    return;
  }
  byId("pair").replaceChildren(...cards.map((card) => element("option", { value: card.name, text: card.name })));
  describe();
  await openLink();
}

function describe() {
  const card = cards.find((one) => one.name === byId("pair").value);
  if (card === undefined) return;
  const folders = card.token_head ?? `${card.sft} against ${card.reference}`;
  const length = `up to ${card.max_length_tokens.toLocaleString("en")} tokens`;
  const facts = [folders, `renderer ${card.renderer}`, length, `revision ${card.revision.slice(0, 12)}`];
  byId("served").textContent = card.text_refused ?? facts.join(" · ");
}

/** A link holds texts and choices: they are put into the form and scored. */
async function openLink() {
  let opened;
  try {
    opened = await viewOf(location.hash);
  } catch (failure) {
    showFailure(failure);
    return;
  }
  if (opened === null) return;
  write(opened.input);
  if (cards.some((card) => card.name === opened.pair)) byId("pair").value = opened.pair;
  describe();
  linked = opened.choices ?? {};
  await showRewards();
}

async function copyLink() {
  const fragment = await fragmentOf({ pair: view.choices().reference, input: asked.input, choices: view.choices() });
  history.replaceState(null, "", `#${fragment}`);
  try {
    await navigator.clipboard.writeText(location.href);
    say("Link copied. It holds the texts: share it only where the texts may go.");
  } catch {
    say("The link is in the address bar: copy it from there (without https, pages cannot use the clipboard).");
  }
}

// Files

async function openFile(chosen) {
  try {
    file = { name: chosen.name, lines: await linesOf(chosen), at: 0 };
    byId("file-name").textContent = file.name;
    byId("rows").textContent = `of ${file.lines.length.toLocaleString("en")}`;
    byId("row").max = file.lines.length;
    byId("records").hidden = false;
    await goToRow(0);
  } catch (failure) {
    showFailure(failure);
  }
}

async function goToRow(at) {
  file.at = Math.max(0, Math.min(Number.isInteger(at) ? at : 0, file.lines.length - 1));
  byId("row").value = file.at + 1;
  byId("previous").disabled = file.at === 0;
  byId("next").disabled = file.at === file.lines.length - 1;
  try {
    write(inputOf(file.lines[file.at]));
  } catch (failure) {
    if (!(failure instanceof RowError)) throw failure;
    write({}); // the texts of another row would mislead
    byId("result").hidden = true;
    showFailure(failure);
    return;
  }
  await showRewards();
}

function startFiles() {
  byId("open").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", () => {
    const [chosen] = byId("file").files;
    byId("file").value = "";
    if (chosen) openFile(chosen);
  });
  byId("previous").addEventListener("click", () => goToRow(file.at - 1));
  byId("next").addEventListener("click", () => goToRow(file.at + 1));
  byId("row").addEventListener("change", () => goToRow(Number(byId("row").value) - 1));
  byId("close").addEventListener("click", () => {
    byId("records").hidden = true;
    byId("open").focus();
  });
  const holds = (event) => [...event.dataTransfer.items].some((item) => item.kind === "file");
  addEventListener("dragover", (event) => {
    if (!holds(event)) return;
    event.preventDefault();
    byId("drop").hidden = false;
  });
  addEventListener("dragleave", (event) => { if (event.relatedTarget === null) byId("drop").hidden = true; });
  addEventListener("drop", (event) => {
    byId("drop").hidden = true;
    if (event.dataTransfer.files.length === 0) return;
    event.preventDefault();
    openFile(event.dataTransfer.files[0]);
  });
}

// Header, key, result

const THEMES = [["", "◐ Auto", "as the system"], ["light", "○ Light", "light"], ["dark", "● Dark", "dark"]];

function startHeader() {
  let theme = 0;
  byId("theme").addEventListener("click", () => {
    theme = (theme + 1) % THEMES.length;
    const [name, label, words] = THEMES[theme];
    document.documentElement.dataset.theme = name;
    byId("theme").textContent = label;
    byId("theme").setAttribute("aria-label", `Colours: ${words}`);
    view.redraw();
  });
  // A link cannot carry the key, so the page fetches what the link would show.
  byId("metrics").addEventListener("click", async (event) => {
    if (!hasKey()) return;
    event.preventDefault();
    try {
      byId("metrics-text").textContent = await (await send("metrics")).text();
      byId("metrics-view").showModal();
    } catch (failure) {
      showFailure(failure);
    }
  });
  byId("metrics-close").addEventListener("click", () => byId("metrics-view").close());
}

function startAccess() {
  byId("access").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey(byId("key").value);
    byId("key").value = "";
    byId("access").hidden = true;
    byId("error").hidden = true;
    (waiting ?? loadPairs)();
  });
}

const promptOf = (input) =>
  input.mode === "prompt" ? input.prompt : input.turns.map((turn) => `${turn.role}: ${turn.text}`).join("\n");

function startResult() {
  byId("link").addEventListener("click", copyLink);
  byId("save-svg").addEventListener("click", () => download(svg(view.shown()), "image/svg+xml", "svg"));
  byId("save-html").addEventListener("click", () => {
    download(html(view.shown(), promptOf(asked.input)), "text/html", "html");
  });
  byId("save-json").addEventListener("click", () => {
    const content = { request: requestOf(asked.input), choices: view.choices(), answers: view.raw() };
    download(JSON.stringify(content, null, 1), "application/json", "json");
  });
  addEventListener("keydown", (event) => { if (event.key === "Escape") hideDetails(); });
  addEventListener("scroll", leaveDetails, { passive: true });
}

startForm();
startFiles();
startHeader();
startAccess();
startResult();
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  showRewards();
});
byId("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) showRewards();
});
byId("pair").addEventListener("change", () => {
  describe();
  if (asked !== null) showRewards();
});
byId("example").addEventListener("click", () => {
  write(EXAMPLE);
  byId("records").hidden = true;
  showRewards();
});
addEventListener("hashchange", openLink);
loadPairs();
