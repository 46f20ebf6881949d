// The form: a prompt or a chat, and responses -> the input of a request, and back.
// `extra` holds what a message of a file has beside its texts, such as tool calls: shown by name, sent unchanged.

import { byId, element } from "./text.js";

const ROLES = ["system", "user", "assistant", "tool"];

export const EXAMPLE = {
  mode: "prompt",
  prompt: "Add 84 and 39.",
  turns: [],
  all: false,
  responses: [
    { text: "4+9=13 write 3 carry 1\n8+3+1=12 write 2 carry 1\n#### 123", thoughts: "" },
    { text: "4+9=13 write 3 carry 1\n8+3+0=11 write 1 carry 1\n#### 113", thoughts: "" },
  ],
};

const mode = () => document.querySelector("input[name=mode]:checked").value;

let tools = null; // of the row of a file

/** What the form holds: {mode, prompt, turns: [{role, text, thoughts, extra}], all, tools, responses: [...]}. */
export function read() {
  const texts = (entry) => ({
    text: entry.querySelector(".text").value,
    thoughts: entry.querySelector(".thoughts").value,
    ...(entry.extra ? { extra: entry.extra } : {}),
  });
  const role = (entry) => entry.querySelector("select").value;
  const turns = [...byId("turns").children].map((entry) => ({ role: role(entry), ...texts(entry) }));
  const all = byId("all-turns").checked;
  const responses = [...byId("responses").children].map(texts);
  return { mode: mode(), prompt: byId("prompt").value, turns, all, responses, ...(tools ? { tools } : {}) };
}

export function write(input) {
  document.querySelector(`input[name=mode][value=${input.mode === "chat" ? "chat" : "prompt"}]`).checked = true;
  byId("prompt").value = input.prompt ?? "";
  byId("all-turns").checked = input.all === true;
  tools = input.tools ?? null;
  byId("turns").replaceChildren(...(input.turns ?? []).map(turn));
  byId("responses").replaceChildren(...(input.responses ?? []).map(response));
  if (byId("responses").children.length === 0) byId("responses").append(response());
  showMode();
}

/** The responses that count: all that are not empty, or else the first. */
export function given(input) {
  const filled = input.responses.filter((one) => one.text !== "" || one.thoughts !== "" || one.extra);
  return filled.length > 0 ? filled : input.responses.slice(0, 1);
}

/** The input of POST /score. A chat and thoughts need messages: an item for each response. */
export function requestOf(input) {
  const responses = given(input);
  if (input.mode === "prompt" && responses.every((one) => one.thoughts === "" && !one.extra)) {
    return { prompt: input.prompt, responses: responses.map((one) => one.text) };
  }
  const before = input.mode === "prompt" ? [{ role: "user", text: input.prompt, thoughts: "" }] : input.turns;
  const options = input.mode === "chat" && input.all ? { score: "all_assistant" } : {};
  if (input.tools) options.tools = input.tools;
  const last = (one) => ({ ...one, role: "assistant" });
  return { items: responses.map((one) => ({ messages: [...before, last(one)].map(message), ...options })) };
}

function message({ role, text, thoughts, extra }) {
  const content = text === "" && extra?.tool_calls ? null : text;
  return { role, content, ...(thoughts ? { reasoning_content: thoughts } : {}), ...extra };
}

function turn(filled) {
  const roles = ROLES.includes(filled.role) ? ROLES : [...ROLES, filled.role];
  const listed = roles.map((name) => element("option", { text: name, value: name }));
  const role = element("select", { "aria-label": "Role" }, listed);
  role.value = filled.role;
  const entry = element("div", { cls: "turn field" }, [
    element("div", { cls: "line spread" }, [role, remover("Remove this turn")]),
    area("text", "Text of the turn", filled.text, 2),
    thoughts(filled.thoughts),
    ...named(filled.extra),
  ]);
  entry.extra = filled.extra;
  const allow = () => { entry.querySelector("details").hidden = role.value !== "assistant"; };
  role.addEventListener("change", allow);
  allow();
  return entry;
}

function response(filled = { text: "", thoughts: "" }) {
  const entry = element("div", { cls: "response field" }, [
    element("div", { cls: "line spread" }, [element("span", { cls: "name" }), remover("Remove this response")]),
    area("text", "Response", filled.text, 5),
    thoughts(filled.thoughts),
    ...named(filled.extra),
  ]);
  entry.extra = filled.extra;
  return entry;
}

function named(extra) {
  return extra ? [element("p", { cls: "hint", text: `with ${Object.keys(extra).join(", ")}, as in the file` })] : [];
}

function area(cls, label, text, rows) {
  const made = element("textarea", { cls, rows, spellcheck: "false", "aria-label": label });
  made.value = text ?? "";
  return made;
}

function thoughts(text) {
  const inner = [element("summary", { text: "Thoughts" }), area("thoughts", "Thoughts before the text", text, 2)];
  return element("details", text ? { open: "" } : {}, inner);
}

function remover(label) {
  const shown = { cls: "link remove", "aria-label": label, title: label, text: "×" };
  const button = element("button", { type: "button", ...shown });
  button.addEventListener("click", () => {
    const entry = button.closest(".field");
    const next = entry.nextElementSibling ?? entry.previousElementSibling;
    entry.remove();
    showMode();
    (next?.querySelector("textarea") ?? byId("add-response")).focus();
  });
  return button;
}

/** Shows the fields of the mode, and numbers the responses. */
export function showMode() {
  const isChat = mode() === "chat";
  byId("prompt-field").hidden = isChat;
  byId("chat").hidden = !isChat;
  const entries = [...byId("responses").children];
  entries.forEach((entry, at) => {
    const name = entries.length > 1 ? `Response ${at + 1}` : "Response";
    entry.querySelector(".name").textContent = name;
    entry.querySelector(".text").setAttribute("aria-label", name);
    entry.querySelector(".remove").hidden = entries.length === 1;
  });
}

/** Switching to a chat takes the prompt along, and back the only user turn. */
function changeMode() {
  const input = read();
  if (input.mode === "chat" && input.turns.length === 0) {
    write({ ...input, turns: [{ role: "user", text: input.prompt, thoughts: "" }] });
  } else if (input.mode === "prompt" && input.turns.length === 1 && input.turns[0].role === "user") {
    write({ ...input, prompt: input.turns[0].text, turns: [] });
  }
  showMode();
}

export function start() {
  document.querySelectorAll("input[name=mode]").forEach((radio) => radio.addEventListener("change", changeMode));
  byId("add-turn").addEventListener("click", () => {
    const last = byId("turns").lastElementChild?.querySelector("select").value;
    byId("turns").append(turn({ role: last === "user" ? "assistant" : "user", text: "", thoughts: "" }));
    byId("turns").lastElementChild.querySelector("textarea").focus();
  });
  byId("add-response").addEventListener("click", () => {
    byId("responses").append(response());
    showMode();
    byId("responses").lastElementChild.querySelector("textarea").focus();
  });
  write({ mode: "prompt" });
}
