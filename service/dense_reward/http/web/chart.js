// Per-token bars and the running sum of a response, on a canvas. Also the colours that classes stand for.

import { runningSum, STEPS } from "./signals.js";
import { element, signed } from "./text.js";

const HEIGHT_PX = 68;
const WIDEST_PX = 30; // of a token

/** Fill and ink of every colour step, as the browser computes them for the palette and theme in force. */
export function colours() {
  const probe = element("span", { hidden: "" });
  document.getElementById("result").append(probe);
  const found = Array.from({ length: 2 * STEPS + 1 }, (_, step) => {
    probe.className = `c${step}`;
    const { backgroundColor, color } = getComputedStyle(probe);
    return { fill: backgroundColor, ink: color };
  });
  probe.remove();
  return found;
}

export class Chart {
  /** `point(token index or null)` and `choose(token index)`: the pointer is over a token's bar, or pressed it. */
  constructor(point, choose) {
    this.canvas = element("canvas", { cls: "chart", role: "img" });
    const at = (event) => {
      const box = this.canvas.getBoundingClientRect();
      const place = Math.floor(((event.clientX - box.left) / box.width) * this.values.length);
      return Math.max(0, Math.min(place, this.values.length - 1));
    };
    this.canvas.addEventListener("pointermove", (event) => event.pointerType === "mouse" && point(at(event)));
    this.canvas.addEventListener("pointerleave", () => point(null));
    this.canvas.addEventListener("click", (event) => choose(at(event)));
  }

  /**
   * `values` may hold nulls, `levels` has their colour steps, `palette` is what `colours` gave. The same for all
   * responses: `scale` is the value of the longest bar, `most` the sum at that height, `zero` the place of 0 from the
   * top, 0 to 1.
   */
  draw({ values, levels, scale, zero, most, palette, bars, running, unit }) {
    this.values = values;
    const shown = (bars || running) && values.some((value) => value !== null);
    this.canvas.hidden = !shown;
    if (!shown) return;
    this.canvas.style.maxWidth = `${values.length * WIDEST_PX}px`;
    const width = this.canvas.clientWidth || 600;
    const ratio = Math.min(devicePixelRatio || 1, 3);
    this.canvas.width = width * ratio;
    this.canvas.height = HEIGHT_PX * ratio;
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const style = getComputedStyle(this.canvas);
    const base = Math.min(HEIGHT_PX * zero, HEIGHT_PX - 1);
    const at = { width, base, unit: HEIGHT_PX * Math.max(zero, 1 - zero) - 3 };
    if (bars) drawBars(pen, at, { values, levels, scale, palette });
    pen.fillStyle = style.borderColor;
    pen.fillRect(0, at.base, width, 1);
    const total = running ? drawRunning(pen, at, { values, most }, style.color) : null;
    const parts = [bars && "bar of each token", running && `running sum, which ends at ${signed(total)} ${unit}`];
    this.canvas.setAttribute("aria-label", parts.filter(Boolean).join("; "));
  }
}

/** A bar for each token; if there are more tokens than pixels, the largest of each pixel. */
function drawBars(pen, { width, base, unit }, { values, levels, scale, palette }) {
  const columns = Math.min(values.length, Math.floor(width));
  for (let column = 0; column < columns; column++) {
    const [from, to] = [column, column + 1].map((edge) => Math.floor((edge * values.length) / columns));
    let at = from;
    for (let other = from; other < to; other++) {
      if (Math.abs(values[other] ?? 0) > Math.abs(values[at] ?? 0)) at = other;
    }
    const share = Math.max(-1, Math.min(1, (values[at] ?? 0) / scale));
    const [left, step] = [(column * width) / columns, width / columns];
    pen.fillStyle = palette[levels[at] ?? STEPS].fill;
    const size = Math.max(Math.abs(share) * unit, 0.5);
    pen.fillRect(left, share > 0 ? base - size : base, Math.max(step - (step > 3 ? 1 : 0), 0.7), size);
  }
}

function drawRunning(pen, { width, base, unit }, { values, most }, colour) {
  const sums = runningSum(values);
  const step = Math.max(1, Math.floor(sums.length / (2 * width)));
  pen.beginPath();
  pen.moveTo(0, base);
  for (let at = 0; at < sums.length; at += step) {
    pen.lineTo(((at + 0.5) * width) / sums.length, base - (sums[at] / most) * unit);
  }
  pen.lineTo(width, base - (sums.at(-1) / most) * unit);
  pen.strokeStyle = colour;
  pen.lineWidth = 1.5;
  pen.lineJoin = "round";
  pen.stroke();
  return sums.at(-1);
}
