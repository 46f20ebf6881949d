// A JSONL file -> its rows, one at a time, as inputs of the form. Layouts: those of docs/data.md that hold a response.

export class RowError extends Error {}

/** The lines of a file that are not empty, with their numbers. Read in parts, so that large files do not block. */
export async function linesOf(file) {
  const lines = [];
  let [rest, number] = ["", 0];
  const take = (line) => {
    number += 1;
    if (line.trim() !== "") lines.push({ number, line });
  };
  const reader = file.stream().pipeThrough(new TextDecoderStream()).getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const pieces = (rest + part.value).split("\n");
    rest = pieces.pop();
    pieces.forEach(take);
  }
  if (rest !== "") take(rest);
  if (lines.length === 0) {
    throw new RowError(`${file.name} has no rows: choose a file with one JSON object on each line.`);
  }
  return lines;
}

/** The input of the form for a line. Throws RowError with the reason and the cure. */
export function inputOf({ number, line }) {
  let row;
  try {
    row = JSON.parse(line);
  } catch (failure) {
    throw new RowError(`Line ${number} is not JSON (${failure.message}): write one JSON object on each line.`);
  }
  const read = row !== null && typeof row === "object" && (fromChat(row) ?? fromPrompt(row));
  if (read) return read;
  const keys = row !== null && typeof row === "object" ? Object.keys(row).slice(0, 8).join(", ") : typeof row;
  throw new RowError(
    `Line ${number} has no prompt with a response (it has: ${keys}): use prompt and response(s), ` +
      "prompt, chosen and rejected, question and answer, instruction and output, or messages.",
  );
}

const PROMPTS = ["prompt", "question", "query", "problem", "instruction"];
const RESPONSES = ["responses", "response", "completions", "completion", "answer", "output", "solution"];
const isMessage = (value) => typeof value?.role === "string";
const isChat = (value) => Array.isArray(value) && value.length > 0 && value.every(isMessage);
const joined = (parts) => parts.map((part) => part?.text ?? "").join("\n");
const words = (content) => (Array.isArray(content) ? joined(content) : content ?? "");
const chat = (turns, responses) => ({ mode: "chat", prompt: "", turns, all: false, responses });
const EXTRA = ["name", "tool_calls", "tool_call_id"];

/** A message as a turn or a response of the form. */
function turn(one) {
  const extra = Object.fromEntries(EXTRA.filter((name) => one[name] != null).map((name) => [name, one[name]]));
  const thoughts = String(one.reasoning_content ?? one.reasoning ?? one.thinking ?? "");
  const more = Object.keys(extra).length > 0 ? { extra } : {};
  return { role: one.role, text: String(words(one.content)), thoughts, ...more };
}

function fromChat(row) {
  const messages = row.messages ?? (isChat(row.chosen) && row.prompt === undefined ? row.chosen : undefined);
  if (!isChat(messages)) return null;
  const last = messages.at(-1);
  if (last.role !== "assistant") return null;
  const rejected = row.chosen === messages && isChat(row.rejected) ? [row.rejected.at(-1)] : [];
  const read = chat(messages.slice(0, -1).map(turn), [last, ...rejected].map(turn));
  return Array.isArray(row.tools) ? { ...read, tools: row.tools } : read;
}

function fromPrompt(row) {
  const prompt = PROMPTS.map((name) => row[name]).find((value) => typeof value === "string" || isChat(value));
  const responses = row.chosen === undefined ? responsesOf(row) : [row.chosen, row.rejected].filter(Boolean).map(only);
  if (prompt === undefined || responses === null) return null;
  if (isChat(prompt)) return chat(prompt.map(turn), responses);
  const added = typeof row.input === "string" && row.input !== "" ? `\n\n${row.input}` : "";
  const system = row.system ?? row.system_prompt;
  const user = { role: "user", text: prompt + added, thoughts: "" };
  if (typeof system === "string" && system !== "") {
    return chat([{ role: "system", text: system, thoughts: "" }, user], responses);
  }
  return { mode: "prompt", prompt: prompt + added, turns: [], all: false, responses };
}

function responsesOf(row) {
  const found = RESPONSES.map((name) => row[name]).find((value) => value !== undefined && value !== null);
  if (found === undefined) return null;
  if (isChat(found)) return [only(found)];
  return Array.isArray(found) ? found.map(only) : [only(found)];
}

const only = (value) => (isChat(value) ? turn(value.at(-1)) : { text: String(value), thoughts: "" });
