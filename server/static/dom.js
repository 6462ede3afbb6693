/** Small helpers for elements and words. */

/**
 * A new element.
 * @param {string} tag
 * @param {string} [className]
 * @param {Record<string, string>} [attributes]
 * @param {string} [text]
 * @returns {HTMLElement}
 */
export function element(tag, className = "", attributes = {}, text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
}

/**
 * The element of the page with an id.
 * @param {string} id
 * @returns {any}
 */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`The page has no element #${id}.`);
  return found;
}

/**
 * Seconds as m:ss, with tenths where there are any.
 * @param {number} seconds
 * @returns {string}
 */
export function clock(seconds) {
  const tenths = Math.round(seconds * 10);
  const rest = tenths % 600;
  const whole = String(Math.floor(rest / 10)).padStart(2, "0");
  const part = rest % 10 ? `.${rest % 10}` : "";
  return `${Math.floor(tenths / 600)}:${whole}${part}`;
}

/**
 * A number of bytes for people.
 * @param {number} bytes
 * @returns {string}
 */
export function size(bytes) {
  const units = ["B", "kB", "MB", "GB"];
  const power = Math.min(Math.floor(Math.log10(Math.max(bytes, 1)) / 3), units.length - 1);
  const value = bytes / 1000 ** power;
  return `${value < 10 && power ? value.toFixed(1) : Math.round(value)} ${units[power]}`;
}

/**
 * The whole number in an input, or null where it is empty.
 * @param {HTMLInputElement} input
 * @returns {number | null}
 */
export function wholeNumber(input) {
  return input.value.trim() === "" ? null : Math.trunc(Number(input.value));
}
