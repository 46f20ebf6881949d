// The view as a file: JSON (the answers), HTML (a document without scripts), SVG (a picture).

import { signed, visible, visibleLines } from "./text.js";

const NAME = "token-rewards";
const [CELL, LINE, COLUMNS, MARGIN] = [8.4, 24, 96, 24];

export function download(text, type, ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = `${NAME}.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href));
}

const escape = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.codePointAt(0)};`);
const tip = (part, at) => {
  const numbers = Object.entries(part.series).map(([name, values]) => `${name} ${signed(values[at], 3)}`);
  return escape(numbers.join(", "));
};

/** A document with the tokens as they are coloured; a token's numbers are its title. */
export function html(shown, prompt) {
  const rules = shown.colours.map(({ fill, ink }, step) => `.c${step}{background:${fill};color:${ink}}`).join("");
  const sections = shown.parts.map((part) => {
    const tokens = part.pieces.map((piece, at) => {
      const step = part.levels[at];
      const cls = `${step === null ? "none" : `c${step}`}${at === part.lowest ? " low" : ""}`;
      return `<span class="${cls}" title="${tip(part, at)}">${escape(visibleLines(piece))}</span>`;
    });
    const head = `<h2>${escape(part.title)}</h2><p>${escape(part.stats)}</p>`;
    return `<section>${head}<pre dir="auto">${tokens.join("")}</pre></section>`;
  });
  return `<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>${escape(shown.label)} per token</title><style>
body{max-width:60rem;margin:2rem auto;padding:0 1rem;font:15px/1.5 system-ui,sans-serif;color:#1b1f24;background:#fff}
h1{font-size:1.3rem}h2{font-size:1rem;margin:1.4rem 0 0}p{margin:.2rem 0}
pre{font:14.5px/1.8 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;margin:.4rem 0}
pre span{padding:2px 0;border-radius:3px}.low{outline:2px solid #1b1f24}.none{border-bottom:2px dotted #777}${rules}
</style></head><body><h1>${escape(shown.label)} per token, ${escape(shown.unit)}</h1>
<p>${escape(shown.meaning)} Colour saturates at ±${shown.scale}.</p>
<h2>Prompt</h2><pre>${escape(prompt)}</pre>
${sections.join("\n")}
</body></html>
`;
}

/** A picture in a monospace font, one cell for each character, two for wide ones. */
export function svg(shown) {
  const drawn = [];
  let y = MARGIN;
  const write = (text, size, weight = 400) => {
    for (const line of wrapped(text, Math.floor(COLUMNS * (14 / size)))) {
      const font = `font-family="system-ui,sans-serif" font-size="${size}" font-weight="${weight}"`;
      drawn.push(`<text x="${MARGIN}" y="${y + 16}" ${font}>${escape(line)}</text>`);
      y += LINE - 3;
    }
  };
  write(`${shown.label} per token, ${shown.unit}`, 16, 650);
  write(`${shown.meaning} Colour saturates at ±${shown.scale}.`, 13);
  for (const part of shown.parts) {
    y += LINE / 2;
    write(`${part.title}: ${part.stats}`, 14, 600);
    y = tokens(part, shown.colours, y, drawn);
  }
  const size = `width="${COLUMNS * CELL + 2 * MARGIN}" height="${y + MARGIN}"`;
  return `<svg xmlns="http://www.w3.org/2000/svg" ${size}>
<rect width="100%" height="100%" fill="#fff"/><g fill="#1b1f24">${drawn.join("\n")}</g></svg>
`;
}

function tokens(part, colours, top, drawn) {
  let [x, y] = [0, top];
  const box = (at, text, cells) => {
    const colour = part.levels[at] === null ? { fill: "none", ink: "#1b1f24" } : colours[part.levels[at]];
    const edge = at === part.lowest ? ' stroke="#1b1f24" stroke-width="2"' : "";
    const left = MARGIN + x * CELL;
    const size = `width="${cells * CELL - 0.6}" height="${LINE - 3}" rx="3"`;
    const font = 'font-family="ui-monospace,Menlo,Consolas,DejaVu Sans Mono,monospace" font-size="14"';
    const fit = `xml:space="preserve" textLength="${cells * CELL}" lengthAdjust="spacingAndGlyphs"`;
    drawn.push(
      `<g><title>${tip(part, at)}</title>` +
        `<rect x="${left}" y="${y + 1}" ${size} fill="${colour.fill}"${edge}/>` +
        `<text x="${left}" y="${y + 16}" ${font} ${fit} fill="${colour.ink}">${escape(text)}</text></g>`,
    );
    x += cells;
  };
  part.pieces.forEach((piece, at) => {
    for (const line of visibleLines(piece).match(/[^\n]+\n?/g)) {
      const text = line.replace("\n", "");
      for (const chunk of chunks(text, COLUMNS)) {
        const cells = width(chunk);
        if (x > 0 && x + cells > COLUMNS) [x, y] = [0, y + LINE];
        box(at, chunk, cells);
      }
      if (line.endsWith("\n")) [x, y] = [0, y + LINE];
    }
  });
  return y + LINE;
}

const WIDE = /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60]|\p{Emoji_Presentation}/u;
const cellsOf = (one) => (/\p{Mn}|\p{Me}/u.test(one) ? 0 : WIDE.test(one) ? 2 : 1);
const width = (text) => Array.from(text).reduce((sum, one) => sum + cellsOf(one), 0);

function* chunks(text, columns) {
  let chunk = "";
  for (const character of text) {
    if (width(chunk + character) > columns) {
      yield chunk;
      chunk = "";
    }
    chunk += character;
  }
  yield chunk;
}

function wrapped(text, columns) {
  const lines = [""];
  for (const word of visible(text).split(" ")) {
    if (lines.at(-1).length + word.length > columns) lines.push("");
    lines[lines.length - 1] += (lines.at(-1) ? " " : "") + word;
  }
  return lines;
}
