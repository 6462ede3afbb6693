/** The choice of how a change of prompt comes, with a word of explanation for each. */

import { element } from "./dom.js";

/** @typedef {{policies: string[], in_flight: number, block_frames: number, fps: number}} Sizes */

/** Policies that can be blended over several blocks. */
const BLENDED = ["keep", "recache"];

/**
 * What a policy does, in a sentence.
 * @param {string} policy
 * @param {Sizes} sizes
 * @returns {string}
 */
export function explain(policy, { in_flight: blocks, block_frames: frames, fps }) {
  const inFlight = ((blocks * frames) / fps).toFixed(1).replace(/\.0$/, "");
  const again = `the last ${inFlight} s in the making start again, after a short wait`;
  const words = {
    keep: "Flows over: everything in view stays, new words are heard from the next block on.",
    recache: "Flows over faster: what is remembered is told anew with the new words.",
    renoise: `Clean break: ${blocks ? again : "what is remembered is told anew, too"}.`,
    cut: "A new scene: nothing of the old one is left.",
  };
  return words[policy] ?? "";
}

/**
 * Radio buttons for the policies; the blend is offered with those that can be blended.
 * @param {HTMLElement} root
 * @param {HTMLInputElement} blend  number of blocks
 * @param {HTMLElement} blendWords
 * @param {Sizes} sizes
 * @returns {() => {policy: string, transition_duration_chunks: number}} reads the choice
 */
export function makePolicies(root, blend, blendWords, sizes) {
  const { policies, block_frames: frames, fps } = sizes;
  const buttons = policies.map((policy, index) => {
    const label = element("label", "policy");
    const radio = element("input", "", { type: "radio", name: "policy", value: policy });
    radio.checked = index === 0;
    const words = element("span", "quiet", {}, explain(policy, sizes));
    label.append(radio, element("b", "", {}, policy), words);
    root.append(label);
    return radio;
  });
  const chosen = () => buttons.find(({ checked }) => checked)?.value ?? policies[0];
  const update = () => {
    blend.disabled = !BLENDED.includes(chosen());
    const blocks = Number(blend.value);
    const seconds = ((blocks * frames) / fps).toFixed(1);
    const words = blocks ? `over ${blocks} block${blocks > 1 ? "s" : ""} (${seconds} s)` : "(off)";
    blendWords.textContent = blend.disabled ? `(not with ${chosen()})` : words;
  };
  root.addEventListener("change", update);
  blend.addEventListener("input", update);
  update();
  return () => ({
    policy: chosen(),
    transition_duration_chunks: blend.disabled ? 0 : Number(blend.value),
  });
}
