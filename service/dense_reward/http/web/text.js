// Text and numbers for people. The signs are those of heatmap/visible.py, so that pictures of both agree.

const SIGNS = { "\n": "⏎", "\t": "⇥", "\u00a0": "⍽" };
const BLANK = "\\u034f\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f\\u2800\\u3164\\ufe00-\\ufe0f" +
  "\\uffa0\\u{e0100}-\\u{e01ef}";
const HIDDEN = new RegExp(`[\\p{C}\\p{Z}${BLANK}]`, "u");
const MARK = /^\p{M}/u;
export const EMPTY = "·"; // a token without text of its own: its character ends in a later token

/** One printable line: line feeds, controls, and characters that are invisible or change direction become signs. */
export function visible(text) {
  const signs = Array.from(text, sign).join("");
  return MARK.test(text) && !HIDDEN.test(Array.from(text)[0]) ? `◌${signs}` : signs;
}

function sign(character) {
  if (character in SIGNS) return SIGNS[character];
  if (character === " " || character === "\u3000" || !HIDDEN.test(character)) return character;
  return `\\u{${character.codePointAt(0).toString(16).toUpperCase()}}`;
}

/** As `visible`, with line breaks after the signs of line feeds. Never empty. */
export const visibleLines = (piece) => (piece === "" ? EMPTY : piece.split("\n").map(visible).join("⏎\n"));

/** A token on its own, on one line: spaces at its ends would not be seen. */
export const spaced = (piece) => visibleLines(piece).replaceAll("\n", "").replace(/^ | $/g, "␣");

/** The number with its sign, a typographic minus, and no sign if it rounds to zero. */
export function signed(number, digits = 2) {
  const text = Math.abs(number) >= 1e5 ? number.toExponential(2) : number.toFixed(digits);
  if (Number(text) === 0) return text.replace("-", "");
  return number > 0 ? `+${text}` : text.replaceAll("-", "−");
}

export const plain = (number) => signed(number, 3).replace("+", "");

/** The probability of a log-probability. Rounding can leave one just above 0. */
export function probability(logprob) {
  const share = Math.exp(Math.min(logprob, 0));
  return share >= 0.0005 ? `${(100 * share).toFixed(1)} %` : share.toExponential(0);
}

/** An element with text and attributes. Text is only ever text: nothing in this page parses markup. */
export function element(tag, { text, ...attributes } = {}, children = []) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name === "cls" ? "class" : name, value);
  made.append(...children);
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Lets the browser draw what was added. Where it draws nothing, as in a hidden tab, a moment later. */
export const frame = () => new Promise((resume) => {
  requestAnimationFrame(() => setTimeout(resume));
  setTimeout(resume, 100);
});

/** Lets the browser paint and handle input, so that no task of ours is long. */
export const breathe = () => globalThis.scheduler?.yield?.() ?? new Promise((resume) => { setTimeout(resume); });
