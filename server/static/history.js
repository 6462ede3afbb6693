/** The list of prompts: what each one says, how it came, and when it was heard. */

import { clock, element } from "./dom.js";
import { coloursOf } from "./timeline.js";

/**
 * Draw the prompts that are heard, then those that wait.
 * @param {HTMLElement} root
 * @param {import("./timeline.js").Heard[]} heard
 * @param {{prompt: string | null, policy: string, asked: number}[]} pending
 */
export function drawPrompts(root, heard, pending) {
  const colours = coloursOf(heard);
  const items = heard.map((change, index) =>
    item(change.prompt, `${index + 1}`, `colour-${colours[index]}`, timesOf(change, index)),
  );
  const waiting = pending.map(({ prompt, policy, asked }) => {
    const times = `${policy} · asked at ${clock(asked)} · not heard yet`;
    return item(prompt ?? "a new seed", "…", "none", times);
  });
  const none = element("li", "quiet", {}, "None yet.");
  root.replaceChildren(...items, ...waiting, ...(items.length + waiting.length ? [] : [none]));
}

function item(text, number, colour, times) {
  const made = element("li");
  const swatch = element("i", `swatch ${colour}`, { "aria-hidden": "true" }, number);
  const words = element("div");
  words.append(element("span", "", {}, text), element("small", "quiet", {}, times));
  made.append(swatch, words);
  return made;
}

function timesOf({ policy, asked, first, whole, seed }, index) {
  if (!index) return "from the beginning";
  const parts = [policy];
  if (seed != null) parts.push(`seed ${seed}`);
  if (asked !== null) parts.push(`asked at ${clock(asked)}`);
  parts.push(`first heard at ${clock(first)}`);
  if (whole !== null) parts.push(`nothing else from ${clock(whole)}`);
  return parts.join(" · ");
}
