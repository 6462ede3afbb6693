/** What the model sees now: sink, recent frames, and the window with its noise levels. */

import { element } from "./dom.js";

/**
 * @typedef {object} View  `view` of the message `stats`; frames are latent frames
 * @property {number[]} sink  the first frames, kept for ever
 * @property {number[]} recent  the newest finished frames
 * @property {[number, number][]} window  block and noise level of each block in flight
 * @property {number} levels  how many levels there are: 0 is pure noise
 */

/**
 * Draw a view as a row of cells with a sentence for screen readers.
 * @param {HTMLElement} root
 * @param {View} view
 */
export function drawView(root, view) {
  const window = view.window.map(([block, level]) => {
    const cell = element("i", "noisy", { title: `block ${block}, level ${level}` }, String(level));
    cell.style.setProperty("--clean", String((level + 1) / (view.levels + 1)));
    return cell;
  });
  root.replaceChildren(
    group("sink", view.sink.map((frame) => finished("pinned", frame)), span(view.sink)),
    group("recent", view.recent.map((frame) => finished("kept", frame)), span(view.recent)),
    group("window", window, blocks(view.window)),
  );
}

function finished(name, frame) {
  return element("i", name, { title: `frame ${frame}` });
}

function group(name, cells, words) {
  const box = element("div", "group");
  const row = element("div", "cells", { "aria-hidden": "true" });
  row.append(...cells);
  box.append(element("span", "label", {}, name), row, element("span", "quiet", {}, words));
  return box;
}

function span(frames) {
  if (!frames.length) return "none";
  const last = frames.at(-1);
  return frames[0] === last ? `frame ${last}` : `frames ${frames[0]}–${last}`;
}

function blocks(window) {
  if (!window.length) return "none";
  const numbers = window.map(([block]) => block);
  const levels = window.map(([, level]) => level).join(" ");
  const [first, last] = [numbers[0], numbers.at(-1)];
  const name = first === last ? `block ${first}` : `blocks ${first}–${last}`;
  return `${name}, levels ${levels} (0 is noise)`;
}
