// The tokens of one response on the page: coloured text, one tab stop, arrows inside.
// Tokens lie in blocks that the browser lays out only near the screen (content-visibility), made a few at a time.

import { breathe, element, frame, visibleLines } from "./text.js";

const BLOCK = 160; // a block ends at the first line feed after so many tokens,
const LONGEST_BLOCK = 400; // or at the next word after so many, where a line then ends early
const SLICE_MS = 6;
const AT_ONCE = 500; // tokens in one frame: the browser lays out all that is new
const LINE_PX = 27;
const COLUMNS = 70; // only to estimate the height of blocks that were never laid out

/** Runs `work` on 0 .. count-1, in tasks of a few milliseconds; draws if it returns true. Stops early if `stale()`. */
export async function inSlices(count, work, stale) {
  let before = performance.now();
  for (let at = 0; at < count; at++) {
    const draw = work(at) === true;
    if (!draw && performance.now() - before < SLICE_MS) continue;
    await (draw ? frame() : breathe());
    if (stale()) return false;
    before = performance.now();
  }
  return true;
}

export class TokenText {
  /** `point(token index or null, element, kept)`: the pointer or the focus is at a token. */
  constructor(row, name, point) {
    this.row = row;
    this.current = 0;
    this.spans = [];
    this.drawing = 0;
    this.element = element("div", { cls: "tokens mono", role: "group", dir: "auto" });
    this.element.setAttribute("aria-label", `${name}: ${row.pieces.length} tokens; arrow keys move between them`);
    this.element.addEventListener("pointerover", (event) => this.#pointed(event, point));
    this.element.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null));
    this.element.addEventListener("focusin", (event) => this.#focused(event.target, point));
    this.element.addEventListener("focusout", () => point(null));
    this.element.addEventListener("click", (event) => this.#clicked(event.target.closest(".t"), point));
    this.element.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Draws all tokens with these classes: the steps of their colours and marks. Draws blocks near the start first. */
  async paint(classOf) {
    const mine = (this.drawing += 1);
    const stale = () => mine !== this.drawing;
    const fresh = this.spans.length === 0;
    const count = this.row.pieces.length;
    if (count === 0) this.element.replaceChildren(element("span", { cls: "none", text: "no tokens" }));
    if (!fresh) return inSlices(this.spans.length, (at) => this.#colour(at, classOf), stale);
    let [block, drawn] = [element("div", { cls: "block" }), 0];
    return inSlices(count, (at) => {
      const span = element("span", { text: visibleLines(this.row.pieces[at]) });
      span.index = at;
      this.spans.push(span);
      this.#colour(at, classOf);
      block.append(span);
      if (at === this.current) this.#stop(span);
      if (at < count - 1 && !this.#ends(block, at + 1)) return false;
      const lines = Math.ceil(block.textContent.length / COLUMNS);
      block.style.containIntrinsicSize = `auto ${lines * LINE_PX}px`;
      this.element.append(block); // whole, so that it is laid out once
      block = element("div", { cls: "block" });
      if (at - drawn < AT_ONCE) return false;
      drawn = at;
      return true;
    }, stale);
  }

  #colour(at, classOf) {
    const name = `t ${classOf(at)}`;
    if (this.spans[at].className !== name) this.spans[at].className = name;
  }

  #ends(block, at) {
    const size = block.children.length;
    if (size < BLOCK) return false;
    const { pieces } = this.row;
    if (pieces[at - 1].endsWith("\n") || size >= 2 * LONGEST_BLOCK) return true;
    return size >= LONGEST_BLOCK && /^\s/.test(pieces[at]);
  }

  #stop(span) {
    span.tabIndex = 0;
    span.setAttribute("role", "button");
    span.setAttribute("aria-describedby", "details");
  }

  /** Moves the focus to this token, or to the nearest that is drawn. */
  focus(at, options) {
    const span = this.spans[Math.max(0, Math.min(at, this.spans.length - 1))];
    if (span === undefined) return;
    span.tabIndex = 0; // otherwise it cannot take the focus
    span.focus(options);
  }

  /** Makes this token the tab stop of the response. */
  #focused(span, point) {
    if (span.index === undefined) return;
    const last = this.spans[this.current];
    if (last !== span) ["tabindex", "role", "aria-describedby"].forEach((name) => last.removeAttribute(name));
    this.current = span.index;
    this.#stop(span);
    point(span.index, span, true);
  }

  #pointed(event, point) {
    if (event.pointerType !== "mouse") return;
    const span = event.target.closest(".t");
    if (span !== null) point(span.index, span, false);
  }

  #clicked(span, point) {
    if (span === null) return;
    this.focus(span.index, { preventScroll: true });
    point(span.index, span, true);
  }

  #key(event) {
    const far = this.spans.length;
    const to = {
      ArrowRight: this.current + 1, ArrowLeft: this.current - 1, ArrowDown: this.#line(1), ArrowUp: this.#line(-1),
      Home: 0, End: far - 1, PageDown: this.current + 25, PageUp: this.current - 25,
    }[event.key];
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.focus(to);
  }

  /** The token above or below the current one. */
  #line(step) {
    const from = this.spans[this.current].getClientRects()[0];
    if (from === undefined) return this.current + step;
    let [best, away] = [this.current, Infinity];
    let top = null;
    for (let at = this.current + step; this.spans[at] !== undefined; at += step) {
      const box = this.spans[at].getClientRects()[0];
      if (box === undefined || Math.abs(box.top - from.top) < box.height / 2) continue;
      top ??= box.top;
      if (Math.abs(box.top - top) > box.height / 2) break;
      const distance = Math.abs(box.left - from.left);
      if (distance < away) [best, away] = [at, distance];
    }
    return best;
  }
}
