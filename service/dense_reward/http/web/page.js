// The page served at /: sends the form to POST heatmap and shows the answer in a sandboxed frame.
// Text from users and servers enters the page only as textContent, markup only as the srcdoc of the sandboxed frame.

const byId = (id) => document.getElementById(id);

const EXAMPLE = {
  prompt: "Add 478 and 365.",
  response: "8+5=13 write 3 carry 1\n7+6+1=14 write 4 carry 1\n4+3+1=8 write 8 carry 0\n#### 843",
  other: "8+5=13 write 3 carry 1\n7+6+1=15 write 4 carry 1\n4+3+1=8 write 8 carry 0\n#### 843",
};

const KEY = "dense-reward-key"; // kept until the tab is closed
const RETRY_MS = 2000; // while the service starts

class ServiceError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.error = error;
  }
}

/** Sends a request. Throws ServiceError with the service's error, or with the status line if the answer has none. */
async function send(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: withKey(options.headers) });
  if (answer.ok) return answer;
  if (answer.status === 401) showKeyForm();
  const body = await answer.json().catch(() => ({}));
  const unknown = { message: `The service answered ${answer.status} ${answer.statusText}.` };
  throw new ServiceError(answer.status, body.error ?? unknown);
}

function withKey(headers = {}) {
  const key = sessionStorage.getItem(KEY);
  return key === null ? headers : { ...headers, Authorization: `Bearer ${key}` };
}

function showKeyForm() {
  byId("access").hidden = false;
  byId("key").focus();
}

function request(format) {
  const responses = [byId("response").value, byId("other").value].filter((text, at) => at === 0 || text !== "");
  const [signal, palette] = [byId("signal").value, byId("palette").value];
  return { prompt: byId("prompt").value, responses, format, signal, palette };
}

async function picture(body) {
  const headers = { "Content-Type": "application/json" };
  return (await send("heatmap", { method: "POST", headers, body: JSON.stringify(body) })).text();
}

/** Runs one exchange with the service, with the buttons disabled, and shows its failure. */
async function exchange(work) {
  const buttons = [byId("show"), byId("save-html"), byId("save-svg")];
  buttons.forEach((button) => { button.disabled = true; });
  byId("error").hidden = true;
  byId("status").textContent = "computing …";
  try {
    await work();
  } catch (failure) {
    showFailure(failure);
  } finally {
    byId("status").textContent = "";
    buttons.forEach((button) => { button.disabled = false; });
  }
}

let shown = null; // the request whose picture is in the frame

async function show() {
  const body = request("html");
  byId("picture").srcdoc = await picture(body).catch((failure) => {
    byId("result").hidden = true; // an old picture below a new error would mislead
    throw failure;
  });
  shown = body;
  byId("result").hidden = false;
  byId("result").scrollIntoView({ block: "nearest" });
}

function showFailure(failure) {
  const unreachable = { message: `The service cannot be reached: ${failure.message}` };
  const error = failure instanceof ServiceError ? failure.error : unreachable;
  byId("error-message").textContent = error.message;
  const items = error.items ?? [];
  const listed = items.length > 1 ? items : []; // a single one is the message itself
  byId("error-items").replaceChildren(...listed.map(itemLine));
  const details = [["code", error.code], ["field", error.param], ["request", error.request_id]];
  const known = details.filter(([, value]) => value != null);
  byId("error-details").textContent = known.map((pair) => pair.join(": ")).join(" · ");
  byId("error").hidden = false;
  byId("error").scrollIntoView({ block: "nearest" });
}

function itemLine(item) {
  const line = document.createElement("li");
  const place = [item.item == null ? null : `item ${item.item}`, item.param].filter((part) => part != null).join(", ");
  line.textContent = [place, item.message ?? JSON.stringify(item)].filter(Boolean).join(": ");
  return line;
}

function save(text, type, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

async function showServed() {
  try {
    const { models } = await (await send("models")).json();
    byId("served").textContent = models.map(describe).join("; ");
  } catch (failure) {
    const keyIsMissing = failure.status === 401 && sessionStorage.getItem(KEY) === null;
    byId("served").textContent = keyIsMissing ? "" : failure.message;
    if (failure.error?.code === "starting") setTimeout(showServed, RETRY_MS);
  }
}

function describe(model) {
  const pair = [model.sft, model.reference].filter(Boolean).join(" against ");
  const renderer = model.renderer && `renderer ${model.renderer}`;
  const revision = model.revision && `revision ${model.revision.slice(0, 12)}`;
  const facts = [pair, renderer, revision];
  return `${model.name}: ${facts.filter(Boolean).join(", ")}`;
}

byId("access").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value);
  byId("access").hidden = true;
  byId("error").hidden = true;
  byId("served").textContent = "looking up the served pairs …";
  showServed();
});
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  exchange(show);
});
byId("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("form").requestSubmit(byId("show"));
});
byId("example").addEventListener("click", () => {
  for (const [id, text] of Object.entries(EXAMPLE)) byId(id).value = text;
  byId("show").focus();
});
byId("save-html").addEventListener("click", () => save(byId("picture").srcdoc, "text/html", "token-rewards.html"));
byId("save-svg").addEventListener("click", () => exchange(async () => {
  save(await picture({ ...shown, format: "svg" }), "image/svg+xml", "token-rewards.svg");
}));
showServed();
