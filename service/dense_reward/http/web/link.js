// A view as a link: texts and choices, compressed, in the fragment, which browsers never send. It never holds a key.

const VERSION = "1";

async function through(bytes, transform) {
  const stream = new Blob([bytes]).stream().pipeThrough(transform);
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The fragment of a view, without #. */
export async function fragmentOf(view) {
  const bytes = await through(new TextEncoder().encode(JSON.stringify(view)), new CompressionStream("deflate-raw"));
  const binary = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  return `v${VERSION}=${btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")}`;
}

/** The view of a fragment; null if there is none. Throws Error with the cure if it is damaged. */
export async function viewOf(fragment) {
  const [, version, code] = /^#v(\w+)=([\w-]+)$/.exec(fragment) ?? [];
  if (version === undefined) return null;
  if (version !== VERSION) {
    throw new Error(`This link is of version ${version} of the page, not ${VERSION}: ask for a new one.`);
  }
  try {
    const binary = atob(code.replaceAll("-", "+").replaceAll("_", "/"));
    const bytes = Uint8Array.from(binary, (character) => character.charCodeAt(0));
    const view = JSON.parse(new TextDecoder().decode(await through(bytes, new DecompressionStream("deflate-raw"))));
    return { ...view, input: inputOf(view.input) };
  } catch {
    throw new Error("This link is damaged: copy it again, whole.");
  }
}

/** Only texts, whatever a link holds. */
function inputOf(input) {
  const text = (value) => (typeof value === "string" ? value : "");
  const extra = (one) => (one?.extra !== null && typeof one?.extra === "object" ? { extra: one.extra } : {});
  const texts = (one) => ({ text: text(one?.text), thoughts: text(one?.thoughts), ...extra(one) });
  return {
    mode: input.mode === "chat" ? "chat" : "prompt",
    prompt: text(input.prompt),
    turns: (input.turns ?? []).map((one) => ({ role: text(one.role) || "user", ...texts(one) })),
    all: input.all === true,
    responses: (input.responses ?? []).map(texts),
    ...(Array.isArray(input.tools) ? { tools: input.tools } : {}),
  };
}
