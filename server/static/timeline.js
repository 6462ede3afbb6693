/**
 * The timeline under the video: prompts as coloured spans, the three moments of every change,
 * thumbnails, branch points, and a cursor that chooses a moment of the past.
 */

import { clock, element } from "./dom.js";

/**
 * @typedef {object} Heard  a change as the timeline knows it; times in seconds of the video
 * @property {string} id
 * @property {string} prompt
 * @property {string | null} policy
 * @property {number | null} asked  what was on screen when it was asked for
 * @property {number} first  the first block that hears it
 * @property {number | null} whole  the first block that hears nothing else
 */

/** Colours of spans in `style.css`, in turn. */
const COLOURS = 6;
/** Pixels of a thumbnail, and no fewer than this for a second. */
const THUMBNAIL = 48;
const SECOND = 5;
/** When there are more, every second one is let go. */
const MOST_THUMBNAILS = 600;
/** Lengths, in seconds, that the whole width may stand for. */
const SPANS = [15, 30, 60, 90, 120, 180];

/**
 * Where each prompt is alone, and where it comes in over the one before.
 * @param {Heard[]} changes  in order; the first is the prompt of the beginning
 * @param {number} end  seconds made so far
 * @returns {{change: Heard, index: number, from: number, whole: number, to: number}[]}
 */
export function spans(changes, end) {
  return changes.map((change, index) => {
    const to = Math.max(change.first, changes[index + 1]?.first ?? end);
    return { change, index, from: change.first, to, whole: Math.min(change.whole ?? to, to) };
  });
}

/**
 * The colour of each change, by number: that of its prompt, so that a new seed alone keeps it.
 * @param {Heard[]} changes
 * @returns {number[]}
 */
export function coloursOf(changes) {
  const prompts = [...new Set(changes.map(({ prompt }) => prompt))];
  return changes.map(({ prompt }) => prompts.indexOf(prompt) % COLOURS);
}

/**
 * The branch point to go back to: the last at or before a moment.
 * @template {{seconds: number}} Point
 * @param {Point[]} points
 * @param {number} seconds
 * @returns {Point | null}
 */
export function pointBefore(points, seconds) {
  const before = points.filter((point) => point.seconds <= seconds + 1e-6);
  return before.reduce((best, p) => (best && best.seconds >= p.seconds ? best : p), null);
}

/** Draws a timeline into an element and tells when a moment is chosen. */
export class TimelineView {
  /**
   * @param {HTMLElement} root
   * @param {(seconds: number) => void} choose  a moment was clicked, or Enter was pressed on it
   */
  constructor(root, choose) {
    this.root = root;
    this.choose = choose;
    this.track = element("div", "track", {
      role: "slider",
      tabindex: "0",
      "aria-label": "Moment of the video",
      "aria-describedby": "timeline-help",
    });
    this.layers = Object.fromEntries(
      ["thumbs", "spans", "marks", "points", "axis", "now"].map((name) => {
        const layer = element("div", name, { "aria-hidden": "true" });
        this.track.append(layer);
        return [name, layer];
      }),
    );
    this.track.addEventListener("click", (event) => this.#clicked(event));
    this.track.addEventListener("keydown", (event) => this.#key(event));
    root.append(this.track);
    this.reset();
  }

  /** Empty, for a new video. */
  reset() {
    /** @type {Heard[]} */
    this.changes = [];
    /** @type {{id: number, seconds: number}[]} */
    this.points = [];
    /** @type {{seconds: number, jpeg: string}[]} */
    this.thumbnails = [];
    this.made = 0;
    this.played = 0;
    /** @type {number | null} chosen moment */
    this.cursor = null;
    /** @type {Record<string, string>} what each part was last drawn from */
    this.drawn = {};
    this.root.scrollLeft = 0;
    this.draw();
  }

  /**
   * A change that is heard, in the order of the video; one that is known is replaced.
   * @param {Heard} change
   */
  addChange(change) {
    this.changes = this.changes.filter(({ id }) => id !== change.id).concat(change);
    this.changes.sort((a, b) => a.first - b.first);
  }

  /** @param {{id: number, seconds: number}} point */
  addPoint(point) {
    this.points = this.points.filter(({ id }) => id !== point.id).concat(point);
    this.points.sort((a, b) => a.seconds - b.seconds);
  }

  /** @param {number} id */
  dropPoint(id) {
    this.points = this.points.filter((point) => point.id !== id);
  }

  /** @param {{seconds: number, jpeg: string}} thumbnail */
  addThumbnail(thumbnail) {
    this.thumbnails.push(thumbnail);
    if (this.thumbnails.length > MOST_THUMBNAILS) {
      this.thumbnails = this.thumbnails.filter((_, index) => index % 2 === 0);
    }
  }

  /** @param {number | null} seconds */
  setCursor(seconds) {
    this.cursor = seconds;
  }

  /** Bring the drawing up to date: what moves always, the rest where something changed. */
  draw() {
    const width = this.root.clientWidth || 600;
    const length = SPANS.find((seconds) => seconds >= this.made + 1);
    const scale = Math.max(SECOND, width / (length ?? this.made + 1));
    const followed = this.root.scrollLeft + width >= this.track.offsetWidth - 40;
    this.scale = scale;
    this.#drawNow();
    const ids = this.points.map(({ id }) => id);
    if (!this.#changed("all", [scale, this.made, ids, this.changes])) return;
    this.track.style.width = `${Math.max(width, (this.made + 1) * scale)}px`;
    if (followed) this.root.scrollLeft = this.track.offsetWidth;
    this.layers.thumbs.style.width = `${this.made * scale}px`;
    if (this.#changed("thumbs", [scale, this.thumbnails.length])) this.#drawThumbnails();
    this.#drawSpans();
    this.#drawPoints();
    this.#drawAxis(width);
  }

  /** Whether a part is to be drawn anew, since other values decide it than the last time. */
  #changed(part, values) {
    const text = JSON.stringify(values);
    const changed = this.drawn[part] !== text;
    this.drawn[part] = text;
    return changed;
  }

  #drawNow() {
    const { now } = this.layers;
    const played = element("div", "played");
    const made = element("div", "made");
    played.style.left = `${this.played * this.scale}px`;
    made.style.width = `${this.made * this.scale}px`;
    now.replaceChildren(made, played);
    if (this.cursor !== null) {
      const cursor = element("div", "cursor");
      cursor.style.left = `${this.cursor * this.scale}px`;
      now.append(cursor);
    }
    this.track.setAttribute("aria-valuemin", "0");
    this.track.setAttribute("aria-valuemax", this.made.toFixed(1));
    // A screen reader tells every new value of what has the focus: not those of a playing video.
    if (this.cursor === null && document.activeElement === this.track) return;
    const seconds = this.cursor ?? this.played;
    this.track.setAttribute("aria-valuenow", seconds.toFixed(1));
    const change = this.changes.findLast(({ first }) => first <= seconds + 1e-6);
    this.track.setAttribute("aria-valuetext", `${clock(seconds)}. ${change?.prompt ?? ""}`);
  }

  #drawThumbnails() {
    const shown = this.thumbnails;
    const kept = [];
    const end = shown.length ? shown.at(-1).seconds * this.scale + THUMBNAIL : 0;
    for (let left = 0; left < end; left += THUMBNAIL) {
      const { jpeg } = shown.findLast(({ seconds }) => seconds * this.scale <= left) ?? shown[0];
      const image = element("img", "", { src: jpeg, alt: "" });
      image.style.left = `${left}px`;
      kept.push(image);
    }
    this.layers.thumbs.replaceChildren(...kept);
  }

  #drawSpans() {
    const colours = coloursOf(this.changes);
    const drawn = spans(this.changes, this.made).map(({ change, index, from, to, whole }) => {
      const span = element("div", "span", { title: change.prompt });
      span.classList.add(`colour-${colours[index]}`);
      span.style.left = `${from * this.scale}px`;
      span.style.width = `${(to - from) * this.scale}px`;
      if (index) {
        const coming = element("div", "coming");
        coming.classList.add(`over-${colours[index - 1]}`);
        coming.style.width = `${(whole - from) * this.scale}px`;
        span.append(coming);
      }
      span.append(element("span", "", {}, `${index + 1}  ${change.prompt}`));
      return span;
    });
    this.layers.spans.replaceChildren(...drawn);
    this.layers.marks.replaceChildren(...this.changes.slice(1).flatMap((c) => this.#marks(c)));
  }

  #marks({ asked, first, whole }) {
    const marks = [
      ["asked", asked, "asked at"],
      ["first", first, "first heard at"],
      ["whole", whole, "nothing else heard from"],
    ];
    return marks
      .filter(([, seconds]) => seconds !== null)
      .map(([name, seconds, words]) => {
        const mark = element("i", `mark-${name}`, { title: `${words} ${clock(seconds)}` });
        mark.style.left = `${seconds * this.scale}px`;
        return mark;
      });
  }

  #drawPoints() {
    const ticks = this.points.map(({ seconds }) => {
      const tick = element("i", "", { title: `branch point at ${clock(seconds)}` });
      tick.style.left = `${seconds * this.scale}px`;
      return tick;
    });
    this.layers.points.replaceChildren(...ticks);
  }

  #drawAxis(width) {
    const steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600];
    const step = steps.find((seconds) => seconds * this.scale >= 56) ?? 600;
    const labels = [];
    for (let at = 0; at * this.scale <= Math.max(width, this.track.offsetWidth) - 30; at += step) {
      const label = element("span", "", {}, clock(at));
      label.style.left = `${at * this.scale}px`;
      labels.push(label);
    }
    this.layers.axis.replaceChildren(...labels);
  }

  #clicked(event) {
    const left = this.track.getBoundingClientRect().left;
    this.#take((event.clientX - left) / this.scale);
  }

  #take(seconds) {
    if (seconds > this.made || this.made === 0) return;
    this.cursor = Math.max(0, seconds);
    this.draw();
    this.choose(this.cursor);
  }

  /** Arrows go from branch point to branch point; Enter takes the moment. */
  #key(event) {
    const at = this.cursor ?? this.played;
    const seconds = this.points.map((point) => point.seconds);
    const goals = {
      ArrowLeft: seconds.findLast((s) => s < at - 1e-6),
      ArrowRight: seconds.find((s) => s > at + 1e-6),
      Home: seconds[0],
      End: seconds.at(-1),
    };
    if (event.key in goals) {
      event.preventDefault();
      this.cursor = goals[event.key] ?? this.cursor;
      this.draw();
      this.#reveal();
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.#take(at);
    } else if (event.key === "Escape") {
      this.cursor = null;
      this.draw();
    }
  }

  #reveal() {
    const left = (this.cursor ?? 0) * this.scale;
    const { scrollLeft, clientWidth } = this.root;
    if (left < scrollLeft || left > scrollLeft + clientWidth) {
      this.root.scrollLeft = left - clientWidth / 2;
    }
  }
}
