// One card beside the token that is pointed at, focused or tapped: all signals, and the alternatives of its position.

import { byId, element, plain, probability, signed, spaced } from "./text.js";

const GAP_PX = 8;
let kept = null; // the token that has the focus, or was tapped

/** Shows the card of a token: `facts` is {row, at, signal, value, meaning, scale, level}. */
export function showDetails(facts, span, keep) {
  if (keep) kept = { facts, span };
  const card = byId("details");
  card.replaceChildren(...contents(facts));
  card.hidden = false;
  place(card, span.getClientRects()[0] ?? span.getBoundingClientRect(), keep);
}

/** The pointer has left: back to the kept token, if there is one. */
export function leaveDetails() {
  if (kept !== null && kept.span.isConnected && document.activeElement === kept.span) {
    showDetails(kept.facts, kept.span, false);
  } else {
    hideDetails();
  }
}

export function hideDetails() {
  kept = null;
  byId("details").hidden = true;
}

function place(card, box, keep) {
  if (matchMedia("(max-width: 40rem)").matches) {
    card.style.removeProperty("left");
    card.style.removeProperty("top");
    // The stylesheet puts it at the bottom of a small screen; a token that was tapped must not lie below it.
    const covered = box.bottom + GAP_PX - card.getBoundingClientRect().top;
    if (keep && covered > 0) scrollBy({ top: covered });
    return;
  }
  const { width, height } = card.getBoundingClientRect();
  const below = box.bottom + GAP_PX + height <= innerHeight;
  const left = Math.max(GAP_PX, Math.min(box.left, document.documentElement.clientWidth - width - GAP_PX));
  const top = below ? box.bottom + GAP_PX : Math.max(GAP_PX, box.top - GAP_PX - height);
  card.style.left = `${left}px`;
  card.style.top = `${top}px`;
}

function contents(facts) {
  const { row, at } = facts;
  const title = element("p", { cls: "what" }, [
    element("bdi", { cls: "mono", text: spaced(row.pieces[at]) }),
    element("span", { cls: "dim", text: ` token ${at + 1} of ${row.pieces.length}, id ${row.ids[at]}` }),
  ]);
  return [title, signals(facts), ...alternatives(facts)];
}

function signals({ row, at, names, signal, value, label, words }) {
  const shown = line("shown", label ?? words(signal).label, value === null ? "not in the other" : signed(value, 3));
  const others = names
    .filter((name) => label !== undefined || name !== signal)
    .map((name) => line("", words(name).label, likelihood(name, row.series[name][at])));
  return element("table", {}, [element("tbody", {}, [shown, ...others])]);
}

const likelihood = (name, number) =>
  (name.endsWith("logprob") ? `${plain(number)} (${probability(number)})` : plain(number));

function line(cls, name, text) {
  const head = element("th", { scope: "row", text: name });
  return element("tr", cls ? { cls } : {}, [head, element("td", { text })]);
}

function alternatives({ row, at, tint }) {
  const listed = row.alternatives?.[at] ?? [];
  if (listed.length === 0) return [];
  const heads = ["likeliest under SFT", "p", "reward"].map((text) => element("th", { scope: "col", text }));
  const lines = listed.map((one) => {
    const name = element("td", { cls: "mono" }, [element("bdi", { text: spaced(one.token) })]);
    if (one.id === row.ids[at]) name.append(element("span", { cls: "dim", text: " ← this one" }));
    const swatch = element("i", { cls: `swatch ${tint(one.reward)}` });
    const reward = element("td", {}, [swatch, ` ${signed(one.reward)}`]);
    return element("tr", {}, [name, element("td", { text: probability(one.sft_logprob) }), reward]);
  });
  return [element("table", { cls: "others" }, [
    element("thead", {}, [element("tr", {}, heads)]), element("tbody", {}, lines),
  ])];
}
