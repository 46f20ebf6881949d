// The rewards on the page: answers and choices (signal, reference, difference, aggregate, palette) -> what is drawn.

import { Chart, colours } from "./chart.js";
import { hideDetails, leaveDetails, showDetails } from "./details.js";
import { aggregates, difference, level, PALETTES, rowsOf, runningSum, scaleOf, wordsOf } from "./signals.js";
import { breathe, byId, element, signed, spaced } from "./text.js";
import { TokenText } from "./tokens.js";

const CHOICES = ["signal", "reference", "minus", "palette"];
const CHECKS = ["bars", "running", "beside"];
const TICKS = [-1, -0.5, 0, 0.5, 1];

export class View {
  /** `ask(card)` gives the answer for a pair, `failed(error)` shows an error. */
  constructor({ ask, failed }) {
    Object.assign(this, { ask, failed, answers: new Map(), parts: [], cards: [], drawing: 0 });
    for (const id of [...CHOICES, ...CHECKS]) byId(id).addEventListener("change", () => this.#choose(id));
    for (const radio of document.querySelectorAll("input[name=aggregate]")) {
      radio.addEventListener("change", () => this.#choose("aggregate"));
    }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
    new ResizeObserver(() => this.#charts()).observe(byId("answers"));
  }

  /** The choices, by the ids of their controls. */
  choices() {
    const aggregate = document.querySelector("input[name=aggregate]:checked").value;
    const values = CHOICES.map((id) => [id, byId(id).value]);
    return { ...Object.fromEntries([...values, ...CHECKS.map((id) => [id, byId(id).checked])]), aggregate };
  }

  /** Choices of a link, as far as they exist here. */
  choose(choices) {
    for (const id of CHOICES) {
      if ([...byId(id).options].some((one) => one.value === choices[id])) byId(id).value = choices[id];
    }
    for (const id of CHECKS) if (typeof choices[id] === "boolean") byId(id).checked = choices[id];
    for (const radio of document.querySelectorAll("input[name=aggregate]")) {
      radio.checked ||= radio.value === choices.aggregate;
    }
  }

  /** Shows a new answer. `siblings`: the cards with the same SFT model, which can be the reference too. */
  async show(card, siblings, answer, choices = this.choices()) {
    this.cards = siblings;
    this.coming = new Map(); // the answers that are fetched ahead
    this.answers = new Map([[card.name, this.#answer(answer, card)]]);
    const rows = this.answers.get(card.name).rows;
    const names = rows.map((_, at) => (rows.length > 1 ? `response ${at + 1}` : "response"));
    const references = siblings.map((one) => [one.name, one.name]);
    options("signal", Object.keys(rows[0].series).map((name) => [name, wordsOf(name, card).label]));
    options("reference", references);
    const others = siblings.length > 1 ? siblings.map((one) => [`p${one.name}`, `reference ${one.name}`]) : [];
    const responses = rows.length > 1 ? names.map((name, at) => [`r${at}`, name]) : [];
    options("minus", [["", "nothing"], ...responses, ...others]);
    this.choose({ ...choices, reference: card.name });
    byId("reference").closest(".field").hidden = siblings.length < 2;
    byId("minus").closest(".field").hidden = byId("minus").options.length < 2;
    byId("beside-label").hidden = rows.length < 2;
    byId("result").hidden = false;
    byId("about").hidden = true;
    this.#layOut(rows, names);
    await this.#needed();
    await breathe();
    await this.#draw();
  }

  #answer(answer, card) {
    return { answer, card, rows: rowsOf(answer, card) };
  }

  #layOut(rows, names) {
    hideDetails();
    this.parts = rows.map((row, at) => {
      const title = names[at].replace(/^r/, "R");
      const text = new TokenText(row, title, (index, span, keep) => this.#point(at, index, span, keep));
      const over = (index) => this.#point(at, index, text.spans[index], false);
      const chart = new Chart(over, (index) => text.focus(index));
      const stats = element("p", { cls: "stats" });
      const head = element("header", {}, [element("h3", { text: title }), stats]);
      return { row, title, text, chart, stats, article: element("article", {}, [head, chart.canvas, text.element]) };
    });
    byId("answers").replaceChildren(...this.parts.map((part) => part.article));
  }

  /** Fetches the answers of the pairs that the choices name, if they are not there yet. */
  async #needed() {
    const { answers, coming } = this; // new texts have new ones
    const { reference, minus } = this.choices();
    const wanted = [reference, ...(minus.startsWith("p") ? [minus.slice(1)] : [])];
    for (const name of wanted.filter((one) => !answers.has(one))) {
      await coming.get(name);
      if (answers.has(name)) continue;
      const card = this.cards.find((one) => one.name === name);
      answers.set(name, this.#answer(await this.ask(card), card));
    }
  }

  /** Keeps the answer of another pair, if it comes before new texts do. */
  prefetch(card, ask) {
    const { answers } = this;
    const keep = (answer) => { answers.set(card.name, this.#answer(answer, card)); };
    this.coming.set(card.name, ask().then(keep, () => null)); // a failure shows when the pair is chosen
  }

  redraw() {
    if (this.parts.length > 0) this.#draw();
  }

  async #choose(id) {
    const before = this.parts;
    byId("answers").ariaBusy = "true";
    try {
      if (id === "reference" || id === "minus") await this.#needed();
      if (this.parts !== before || before.length === 0) return;
      const { rows } = this.answers.get(this.choices().reference);
      this.parts.forEach((part, at) => { part.row = rows[at]; });
      await this.#draw();
    } catch (failure) {
      this.choose(this.drawn); // the controls show what is on the page
      this.failed(failure);
    } finally {
      if (this.parts === before) byId("answers").ariaBusy = "false";
    }
  }

  /** The values of every response under the choices, their colour steps, and the words for them. */
  #computed() {
    const { signal, reference, minus, palette } = this.choices();
    const { rows, card } = this.answers.get(reference);
    const base = minus.startsWith("r") ? Number(minus.slice(1)) : null;
    const other = minus.startsWith("p") ? this.answers.get(minus.slice(1)).rows : null;
    const values = rows.map((row, at) => {
      if (base === at) return row.ids.map(() => null);
      if (base !== null) return difference(row, rows[base], signal);
      return other === null ? row.series[signal] : difference(row, other[at], signal);
    });
    const scale = scaleOf(values);
    const levels = values.map((list) => list.map((value) => (value === null ? null : level(value, scale))));
    const words = wordsOf(signal, card);
    const named = base !== null ? this.parts[base].title.toLowerCase() : `reference ${minus.slice(1)}`;
    const label = minus === "" ? words.label : `${words.label} − that of ${named}`;
    const meaning = minus === "" ? null : [
      `${PALETTES[palette].high}: higher than in ${named}, ${PALETTES[palette].low}: lower` +
        (base === null ? "." : "; underlined: tokens that it does not have."),
      base === null ? words.trust : "After the first difference the contexts differ: do not trust small values there.",
    ];
    const lines = meaning ?? [words.line(PALETTES[palette]), words.trust];
    return { rows, card, values, scale, levels, words, label, base, meaning: sentence(lines), unit: words.unit };
  }

  async #draw() {
    const mine = (this.drawing += 1);
    const { palette, aggregate, beside } = this.choices();
    this.drawn = this.choices();
    byId("result").dataset.palette = palette;
    byId("details").dataset.palette = palette;
    this.computed = this.#computed();
    const { values, levels, scale, unit, meaning } = this.computed;
    byId("answers").classList.toggle("beside", beside && this.parts.length > 1);
    byId("meaning").textContent = meaning;
    const tick = (share) => (share ? signed(share * scale, scale < 0.1 ? 3 : scale < 10 ? 2 : 1) : `0 ${unit}`);
    byId("ticks").replaceChildren(...TICKS.map((share) => element("span", { text: tick(share) })));
    byId("notes").replaceChildren(...this.#notes().map((text) => element("li", { text })));
    const all = values.map(aggregates);
    const counted = all.filter((one) => one.count > 0 && one[aggregate] !== null);
    const best = counted.length > 1 ? Math.max(...counted.map((one) => one[aggregate])) : null;
    this.parts.forEach((part, at) => {
      const isBase = this.computed.base === at;
      part.stats.replaceChildren(...stats(part, all[at], aggregate, best, isBase));
    });
    await breathe();
    if (mine !== this.drawing) return;
    this.#charts();
    await breathe();
    for (const [at, part] of this.parts.entries()) {
      const lowest = all[at].at;
      await part.text.paint((index) => {
        const step = levels[at][index];
        return `${step === null ? "none" : `c${step}`}${index === lowest ? " low" : ""}`;
      });
    }
  }

  #charts() {
    if (this.computed === undefined || this.parts.length === 0) return;
    const { bars, running } = this.choices();
    const { values, levels, scale, unit } = this.computed;
    const palette = colours();
    const signs = new Set(values.flat().map(Math.sign));
    const most = values.map(runningSum).flat().reduce((top, sum) => Math.max(top, Math.abs(sum)), 1e-9);
    const zero = signs.has(-1) ? (signs.has(1) ? 0.5 : 0) : 1; // where 0 lies, from the top: the same for all responses
    this.parts.forEach((part, at) => {
      if (values[at] === undefined) return;
      part.chart.draw({ values: values[at], levels: levels[at], scale, zero, most, palette, unit, bars, running });
    });
  }

  #notes() {
    const { card, rows, values, label } = this.computed;
    const notes = [];
    const flat = this.choices().minus === "" && values.every((list) => list.every((value) => value === 0));
    const bare = card.quantities.includes("alternatives") && rows.some((row) => row.alternatives === null);
    if (!card.related) notes.push("The two checkpoints are of different runs: this is not the paper's reward.");
    if (flat && rows[0].ids.length > 0) notes.push(`Every ${label} is 0: is the pair one checkpoint twice?`);
    if (bare) notes.push("The texts are too long for alternatives: score fewer responses at a time to see them.");
    if (card.template_date) notes.push(`The template writes the date ${card.template_date}: rewards depend on it.`);
    return notes;
  }

  #point(part, index, span, keep) {
    this.pointed?.classList.remove("here");
    this.pointed = undefined;
    if (index === null || span === undefined) {
      leaveDetails();
      return;
    }
    this.pointed = span;
    span.classList.add("here");
    const { values, card, scale, label } = this.computed;
    const { signal, minus } = this.choices();
    const { row } = this.parts[part];
    const facts = {
      row, at: index, signal, value: values[part][index], names: Object.keys(row.series),
      words: (name) => wordsOf(name, card),
      tint: (reward) => (signal === "reward" && minus === "" ? `c${level(reward, scale)}` : ""),
      ...(minus === "" ? {} : { label }),
    };
    showDetails(facts, span, keep);
  }

  /** What is on the page, for files. */
  shown() {
    const { values, levels, scale, unit, label, meaning, rows } = this.computed;
    const { aggregate } = this.choices();
    const parts = this.parts.map((part, at) => ({
      title: part.title, stats: part.stats.textContent, pieces: rows[at].pieces, series: rows[at].series,
      values: values[at], levels: levels[at], lowest: aggregates(values[at]).at,
    }));
    return { label, meaning, scale, unit, aggregate, parts, colours: colours() };
  }

  /** The answers as the service sent them, by pair. */
  raw() {
    return Object.fromEntries([...this.answers].map(([name, { answer }]) => [name, answer]));
  }

  /** One sentence for the status line, which screen readers speak. */
  summary() {
    const tokens = this.parts.reduce((sum, part) => sum + part.row.pieces.length, 0);
    const responses = this.parts.length > 1 ? `${this.parts.length} responses` : "One response";
    const count = tokens.toLocaleString("en");
    return `${responses}, ${count} tokens. Point at a token, or use the arrow keys inside a response.`;
  }
}

function options(id, entries) {
  const before = byId(id).value;
  byId(id).replaceChildren(...entries.map(([value, text]) => element("option", { value, text })));
  if (entries.some(([value]) => value === before)) byId(id).value = before;
}

function stats(part, { sum, mean, min, at, count }, aggregate, best, isBase) {
  if (isBase) return [element("span", { cls: "dim", text: "the others are compared with this one" })];
  const entry = (name, value) => {
    const top = name === aggregate && best !== null && value === best;
    const parts = [`${name} `, element("b", { text: value === null ? "–" : signed(value) })];
    if (top) parts.push(" ", element("span", { cls: "badge", text: "highest" }));
    return element("span", { cls: name === aggregate ? "chosen" : "" }, parts);
  };
  const tokens = element("span", { text: `${count} tokens` });
  const found = [tokens, entry("sum", sum), entry("mean", mean), entry("min", min)];
  if (at < 0) return found;
  const go = element("button", { type: "button", cls: "link at", title: "Go to this token" }, [
    "at ", element("bdi", { cls: "mono", text: spaced(part.row.pieces[at]) }),
  ]);
  go.setAttribute("aria-label", `Go to the lowest token, number ${at + 1}`);
  go.addEventListener("click", () => part.text.focus(at));
  found.at(-1).append(" ", go);
  return found.flatMap((one, index) => (index ? [" ", one] : [one]));
}

const sentence = (lines) => lines.map((line) => line.charAt(0).toUpperCase() + line.slice(1)).join(" ");
