// Requests to the service, with the key of this tab, and its errors.

import { breathe } from "./text.js";

const KEY = "dense-reward-key"; // in sessionStorage: until the tab is closed

/** An error that the service answered, or the status line of an answer that has none. */
export class ServiceError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.error = error;
  }
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const useKey = (key) => sessionStorage.setItem(KEY, key);

/** Sends a request; throws ServiceError, or TypeError if the service cannot be reached. */
export async function send(path, options = {}) {
  const key = hasKey() ? { Authorization: `Bearer ${sessionStorage.getItem(KEY)}` } : {};
  const answer = await fetch(path, { ...options, headers: { ...options.headers, ...key } });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  const unknown = { message: `The service answered ${answer.status} ${answer.statusText}: its log has the reason.` };
  throw new ServiceError(answer.status, body.error ?? unknown);
}

/** The cards of the served pairs, first the one that is used without a name. */
export const models = async () => (await (await send("models")).json()).models;

const ARRAYS = ["sft_logprob", "reference_logprob", "kl", "centred", "entropy", "varentropy"];
const ALTERNATIVES = 5;

/** The answer of POST /score with every array that this pair has. */
export async function score(input, card, signal) {
  const offered = new Set(card.quantities);
  if (card.token_head === null) offered.add("sft_logprob").add("reference_logprob");
  const include = ["token_ids", "tokens", "offsets", "text", "reward", ...ARRAYS.filter((name) => offered.has(name))];
  const top = offered.has("alternatives") ? Math.min(ALTERNATIVES, card.vocabulary) : 0;
  const ask = async (top_k) => {
    const body = JSON.stringify({ ...input, model: card.name, include, top_k });
    const headers = { "Content-Type": "application/json" };
    const answer = await (await send("score", { method: "POST", headers, body, signal })).json();
    await breathe(); // reading a long answer is a task of its own
    return answer;
  };
  return ask(top).catch((failure) => {
    // Alternatives have a limit of their own: without them the answer still shows everything else.
    if (top > 0 && failure.error?.param === "top_k") return ask(0);
    throw failure;
  });
}
