// Answers of the service -> the numbers that are shown: signals, aggregates, colour steps, differences. Pure.

import { alignment } from "./align.js";

/** Steps on either side of zero, as heatmap/palette.py has them. */
export const STEPS = 32;
const SCALE_PERCENTILE = 0.995;
const SMALLEST_SCALE = 0.01; // below it, rounding would get full colours

const TAUGHT = "It shows what the demonstrations taught, not what is true: do not trust it on texts unlike them";
const PLACE = "It belongs to the position: do not read it as a judgement of the token that stands there.";
/** Name -> label, unit, and what colours mean and when not to trust them, in the words of a palette. */
export const SIGNALS = {
  reward: {
    label: "reward", unit: "nats",
    line: ({ high, low }) => `${high} tokens became likelier between reference and SFT model, ${low} ones less likely.`,
    trust: `${TAUGHT}, nor to compare sums of responses of different lengths.`,
  },
  centred: {
    label: "centred", unit: "nats",
    line: ({ high, low }) => `${high} tokens beat the reward that the SFT model expects there, ${low} ones miss it.`,
    trust: `${TAUGHT}, nor where the SFT model is unsure.`,
  },
  kl: {
    label: "KL(SFT ‖ reference)", unit: "nats",
    line: ({ higher }) => `The ${higher}, the more SFT changed what the model expects at that position.`,
    trust: PLACE,
  },
  sft_logprob: {
    label: "log π SFT", unit: "nats",
    line: ({ lower }) => `The ${lower}, the less likely the SFT model finds the token.`,
    trust: "Rare words are unlikely too: do not read it as an error.",
  },
  reference_logprob: {
    label: "log π reference", unit: "nats",
    line: ({ lower }) => `The ${lower}, the less likely the reference finds the token.`,
    trust: "Rare words are unlikely too: do not read it as an error.",
  },
  entropy: {
    label: "entropy of SFT", unit: "nats",
    line: ({ higher }) => `The ${higher}, the less sure the SFT model is which token comes.`,
    trust: PLACE,
  },
  varentropy: {
    label: "varentropy of SFT", unit: "nats²",
    line: ({ higher }) => `The ${higher}, the more the surprise varies between the tokens that the SFT model expects.`,
    trust: PLACE,
  },
};
const VALUE = {
  label: "value", unit: "log-odds",
  line: ({ high, low }) => `${high}: a high value of the token head after that token, ${low}: a low one.`,
  trust: "Only differences between responses to one prompt count: do not trust the sign, nor sums.",
};
/** The words for a signal of this card: the reward of a token head is its value. */
export const wordsOf = (name, card) => (name === "reward" && card.token_head !== null ? VALUE : SIGNALS[name]);

/** How each palette's ends are called. */
export const PALETTES = {
  "blue-red": { high: "blue", low: "red", higher: "bluer", lower: "redder" },
  "dark-red": { high: "red", low: "blue", higher: "redder", lower: "bluer" },
  "purple-green": { high: "green", low: "purple", higher: "greener", lower: "more purple" },
  grey: { high: "light", low: "dark", higher: "lighter", lower: "darker" },
};

/** The rows of an answer: pieces of text and arrays by signal, in the order of the responses. */
export function rowsOf(answer, card) {
  const results = answer.results.toSorted((one, other) => one.item - other.item || one.response - other.response);
  return results.map((result) => ({
    pieces: piecesOf(result),
    ids: result.token_ids,
    series: Object.fromEntries(Object.keys(SIGNALS).flatMap((name) => (name in result ? [[name, result[name]]] : []))),
    alternatives: result.alternatives ?? null,
    end: card.end_of_turn_id,
  }));
}

/** Consecutive slices of the text. A token whose character ends in a later one gets "", a special token its name. */
function piecesOf({ text, offsets, tokens }) {
  const characters = /[\ud800-\udfff]/.test(text) ? Array.from(text) : null; // offsets count code points
  return offsets.map(([start, end], at) => {
    if (start === end) return tokens[at].includes("\ufffd") ? "" : tokens[at];
    return characters === null ? text.slice(start, end) : characters.slice(start, end).join("");
  });
}

/** Sum, mean, min and the first place of the minimum; of entries that are null nothing counts. */
export function aggregates(values) {
  let [sum, count, at] = [0, 0, -1];
  values.forEach((value, index) => {
    if (value === null) return;
    sum += value;
    count += 1;
    if (at < 0 || value < values[at]) at = index;
  });
  return { sum, mean: count ? sum / count : null, min: count ? values[at] : null, at, count };
}

/** The value at which colour saturates: the 99.5th percentile of all sizes, to two digits, as in heatmap/rows.py. */
export function scaleOf(rows) {
  const sizes = Float64Array.from(rows.flat().filter((value) => value !== null), Math.abs).sort();
  if (sizes.length === 0 || sizes.at(-1) === 0) return 1;
  const place = SCALE_PERCENTILE * (sizes.length - 1);
  const [low, high] = [sizes[Math.floor(place)], sizes[Math.ceil(place)]];
  const robust = low + (high - low) * (place - Math.floor(place)) || sizes.at(-1);
  return Math.max(Number(robust.toPrecision(2)), SMALLEST_SCALE);
}

export const level = (value, scale) => STEPS + Math.round(Math.max(-1, Math.min(1, value / scale)) * STEPS);

/** The values of `row` minus those of `base` at the same tokens; null for tokens that `base` does not have. */
export function difference(row, base, signal) {
  const [mine, theirs] = [row.series[signal], base.series[signal]];
  return alignment(row.ids, base.ids).map((at, index) => (at < 0 ? null : mine[index] - theirs[at]));
}

export function runningSum(values) {
  let sum = 0;
  return values.map((value) => (sum += value ?? 0));
}
