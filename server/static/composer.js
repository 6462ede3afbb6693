/**
 * The prompt box. A model that understands any text has a text field; one that knows a few words
 * has a sentence with a choice of words in it, so that nothing else can be said.
 */

import { element } from "./dom.js";

/**
 * @typedef {object} Grammar  `composer` of the configuration
 * @property {string | string[]} template  sentences with slots, "A {colour} {kind} …"
 * @property {Record<string, string[]>} words  the words of each slot
 * @property {string[][]} [distinct]  slots that may not say the same
 */

/**
 * @typedef {object} PromptBox
 * @property {string} prompt  what it says; setting it shows that text
 * @property {() => void} focus
 */

/**
 * The prompt box that fits a model, with its examples.
 * @param {HTMLElement} root
 * @param {{composer: Grammar | null, examples: string[], max_prompt: number}} config
 * @returns {PromptBox}
 */
export function makeComposer(root, config) {
  const box = config.composer
    ? new SentenceBox(root, config.composer)
    : new TextBox(root, config.max_prompt);
  if (config.examples.length) root.append(exampleButtons(config.examples, box));
  if (config.examples.length) box.prompt = config.examples[0];
  return box;
}

/** Any text. */
class TextBox {
  constructor(root, longest) {
    this.field = element("textarea", "", {
      id: "prompt",
      rows: "4",
      maxlength: String(longest),
      "aria-label": "Prompt",
      placeholder: "A prompt: what is to be seen, and how it moves",
    });
    this.field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.field.form.requestSubmit();
    });
    root.append(this.field);
  }

  get prompt() {
    return this.field.value.trim();
  }

  set prompt(text) {
    this.field.value = text;
  }

  focus() {
    this.field.focus();
  }
}

/** A sentence of fixed words and choices; a text of another form is shown as it stands. */
class SentenceBox {
  constructor(root, grammar) {
    this.grammar = grammar;
    this.templates = [grammar.template].flat();
    this.root = element("div", "sentence", { role: "group", "aria-label": "Prompt" });
    root.append(this.root, this.#tools());
    /** @type {Record<string, string>} the word of each slot */
    this.said = Object.fromEntries(
      Object.entries(grammar.words).map(([slot, words]) => [slot, words[0]]),
    );
    this.#keepDistinct();
    this.template = this.templates[0];
    /** @type {string | null} a text that no template makes */
    this.verbatim = null;
    this.#draw();
  }

  get prompt() {
    return this.verbatim ?? fill(this.template, this.said);
  }

  set prompt(text) {
    this.verbatim = text;
    for (const template of this.templates) {
      const said = read(template, this.grammar.words, text);
      if (!said) continue;
      Object.assign(this.said, said);
      this.template = template;
      this.verbatim = null;
      break;
    }
    this.#keepDistinct();
    this.#draw();
  }

  focus() {
    this.root.querySelector("select, button")?.focus();
  }

  #tools() {
    const tools = element("div", "row");
    const shuffle = element("button", "", { type: "button" }, "Surprise me");
    shuffle.addEventListener("click", () => this.#shuffle());
    this.form = element("button", "", { type: "button", hidden: "" });
    this.form.addEventListener("click", () => this.#nextTemplate());
    tools.append(shuffle, this.form);
    return tools;
  }

  #draw() {
    if (this.verbatim) this.root.replaceChildren(element("q", "", {}, this.verbatim));
    else this.root.replaceChildren(...pieces(this.template).map((piece) => this.#piece(piece)));
    const next = this.#following();
    this.form.hidden = !this.verbatim && next === this.template;
    this.form.textContent = this.verbatim
      ? "Choose words"
      : slots(next).length > slots(this.template).length
        ? "Say more"
        : "Say less";
  }

  #piece({ text, slot }) {
    if (!slot) return document.createTextNode(text);
    const select = element("select", "", { "aria-label": slot.replaceAll("_", " ") });
    const taken = this.#partners(slot).map((other) => this.said[other]);
    for (const word of this.grammar.words[slot]) {
      const option = element("option", "", { value: word }, word);
      option.selected = word === this.said[slot];
      option.disabled = taken.includes(word);
      select.append(option);
    }
    select.addEventListener("change", () => {
      this.said[slot] = select.value;
      this.#draw();
      this.root.querySelector(`[aria-label="${select.getAttribute("aria-label")}"]`)?.focus();
    });
    return select;
  }

  /** Slots of the present sentence that may not say what this one says. */
  #partners(slot) {
    const shown = slots(this.template ?? "");
    const groups = (this.grammar.distinct ?? []).filter((group) => group.includes(slot));
    return groups.flat().filter((other) => other !== slot && shown.includes(other));
  }

  #keepDistinct() {
    for (const [first, ...others] of this.grammar.distinct ?? []) {
      const taken = [this.said[first]];
      for (const slot of others) {
        const free = this.grammar.words[slot].filter((word) => !taken.includes(word));
        if (taken.includes(this.said[slot])) this.said[slot] = free[0];
        taken.push(this.said[slot]);
      }
    }
  }

  #following() {
    const index = this.templates.indexOf(this.template);
    return this.templates[(index + 1) % this.templates.length];
  }

  #nextTemplate() {
    if (this.verbatim) this.verbatim = null;
    else this.template = this.#following();
    this.#keepDistinct();
    this.#draw();
  }

  #shuffle() {
    for (const [slot, words] of Object.entries(this.grammar.words)) {
      this.said[slot] = words[Math.floor(Math.random() * words.length)];
    }
    this.verbatim = null;
    this.#keepDistinct();
    this.#draw();
  }
}

function exampleButtons(examples, box) {
  const group = element("div", "examples", { role: "group", "aria-label": "Examples" });
  for (const text of examples.slice(0, 6)) {
    const button = element("button", "example", { type: "button", title: text }, text);
    button.addEventListener("click", () => {
      box.prompt = text;
      box.focus();
    });
    group.append(button);
  }
  return group;
}

/**
 * A template as its fixed texts and slots.
 * @param {string} template
 * @returns {{text?: string, slot?: string}[]}
 */
export function pieces(template) {
  const parts = template.split(/\{(\w+)\}/);
  const all = parts.map((part, i) => (i % 2 ? { slot: part } : { text: part }));
  return all.filter(({ slot, text }) => slot || text);
}

function slots(template) {
  return pieces(template).flatMap(({ slot }) => slot ?? []);
}

/**
 * The sentence that a template and words make.
 * @param {string} template
 * @param {Record<string, string>} said
 * @returns {string}
 */
export function fill(template, said) {
  return pieces(template).map(({ text, slot }) => text ?? said[slot]).join("");
}

/**
 * The words with which a template makes a text, or null where it cannot.
 * @param {string} template
 * @param {Record<string, string[]>} words
 * @param {string} text
 * @returns {Record<string, string> | null}
 */
export function read(template, words, text) {
  const choice = (slot) => `(?<${slot}>${words[slot].map(escaped).join("|")})`;
  const pattern = pieces(template).map((p) => (p.slot ? choice(p.slot) : escaped(p.text))).join("");
  const found = new RegExp(`^${pattern}$`, "i").exec(text.trim());
  if (!found) return null;
  const exact = (slot, said) => words[slot].find((w) => w.toLowerCase() === said.toLowerCase());
  return Object.fromEntries(
    Object.entries(found.groups ?? {}).map(([slot, said]) => [slot, exact(slot, said)]),
  );
}

function escaped(text) {
  return text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
}
