/**
 * Players of a video that is still being made. Both keep the clock of the video, wait when nothing
 * is there, and go on by themselves.
 *
 * `MsePlayer` feeds fragmented MP4 to Media Source Extensions; `JpegPlayer` draws pictures on a
 * canvas where a browser has none.
 */

/**
 * @typedef {object} VideoInfo  the message `video.start`
 * @property {number} width
 * @property {number} height
 * @property {number} fps
 * @property {string} [codec]
 * @property {number} [from_seconds]  moment of the video at which the chunks begin
 */

/**
 * @typedef {object} Elements
 * @property {HTMLVideoElement} video
 * @property {HTMLCanvasElement} frames  where pictures are drawn
 * @property {HTMLCanvasElement} still  the last picture, while a new video has none yet
 */

/**
 * @typedef {object} Events
 * @property {() => void} first  the first frame of a video is on screen
 * @property {() => void} broken  the video cannot be played on and has to be sent again
 * @property {(blocked: boolean) => void} blocked  the browser wants a click before it plays
 */

/** @typedef {"loading" | "playing" | "waiting" | "paused" | "ended"} PlayerState */

/** Seconds of media kept behind the moment on screen. */
const BEHIND = 30;
/** Seconds without progress, though there is media, before the player is pushed. */
const STUCK = 1.5;
/** Pushes without effect before the video is asked for again. */
const PUSHES = 3;
/** Seconds that a push skips. */
const PUSH = 0.05;
/** Less media than this, in seconds, a browser may wait to have more of: it does not hang. */
const LITTLE = 0.3;

/** What is asked of a browser before it is sent MP4: H.264, baseline, as the server encodes it. */
const PLAYABLE = 'video/mp4; codecs="avc1.42C01F"';

/** @typedef {"mp4" | "jpeg"} Format */

/**
 * The player of a format.
 * @param {Format} format
 * @param {Elements} elements
 * @param {Events} events
 * @returns {MsePlayer | JpegPlayer}
 */
export function makePlayer(format, elements, events) {
  return new (format === "mp4" ? MsePlayer : JpegPlayer)(elements, events);
}

/**
 * The format to ask the server for.
 * @returns {Format}
 */
export function playableFormat() {
  return mediaSource()?.isTypeSupported(PLAYABLE) ? "mp4" : "jpeg";
}

/** @returns {typeof MediaSource | undefined} */
function mediaSource() {
  return window.ManagedMediaSource ?? window.MediaSource;
}

/** Appends and removals of one SourceBuffer, one after the other. */
class Segments {
  /**
   * @param {SourceBuffer} buffer
   * @param {() => number} seconds  the moment on screen
   * @param {() => void} broken
   */
  constructor(buffer, seconds, broken) {
    this.buffer = buffer;
    this.seconds = seconds;
    this.broken = broken;
    /** @type {ArrayBuffer[]} */
    this.queue = [];
    buffer.addEventListener("updateend", () => this.next());
    buffer.addEventListener("error", broken);
  }

  /** Run what comes next, unless something is under way. */
  next() {
    if (this.buffer.updating) return;
    const behind = this.seconds() - BEHIND;
    const ranges = this.buffer.buffered;
    if (ranges.length && ranges.start(0) < behind - 2) this.buffer.remove(0, behind);
    else if (this.queue.length) this.#append();
  }

  /** All that waits, in one piece. */
  #append() {
    const bytes = joined(this.queue);
    try {
      this.buffer.appendBuffer(bytes);
      this.queue = [];
    } catch (error) {
      if (error.name !== "QuotaExceededError") return this.broken();
      this.queue = [bytes];
      const last = Math.max(0.001, this.seconds() - 1);
      this.buffer.remove(0, last);
    }
  }
}

/** Fragmented MP4 through Media Source Extensions. */
export class MsePlayer {
  /**
   * @param {Elements} elements
   * @param {Events} events
   */
  constructor({ video, still }, events) {
    this.video = video;
    this.still = still;
    this.events = events;
    this.wanted = true;
    this.complete = false;
    this.shown = false;
    /** @type {Segments | null} */
    this.segments = null;
    /** @type {ArrayBuffer[]} chunks that came before the source was open */
    this.early = [];
    this.progress = { seconds: -1, at: 0, goal: 0, pushes: 0 };
    video.addEventListener("error", () => this.segments && events.broken());
    video.addEventListener("loadeddata", () => this.#first());
  }

  /**
   * Show another video, or another part of this one; the last picture stays until it begins.
   * @param {VideoInfo} info
   */
  begin(info) {
    this.#keepStill();
    this.close();
    this.from = info.from_seconds ?? 0;
    this.shown = false;
    this.complete = false;
    this.progress = { seconds: -1, at: performance.now(), goal: 0, pushes: 0 };
    const source = new (mediaSource())();
    this.source = source;
    this.video.disableRemotePlayback = true;
    this.video.src = URL.createObjectURL(source);
    this.video.hidden = false;
    const open = () => source === this.source && this.#opened(info);
    source.addEventListener("sourceopen", open, { once: true });
  }

  /** @param {ArrayBuffer} bytes  a chunk of the container */
  push(bytes) {
    if (!this.segments) this.early.push(bytes);
    else {
      this.segments.queue.push(bytes);
      this.segments.next();
    }
  }

  /** No more chunks come: play what is there, and end. */
  finish() {
    this.complete = true;
  }

  /** @returns {number} the moment on screen, in seconds of the video */
  get seconds() {
    return this.shown ? this.video.currentTime : this.from ?? 0;
  }

  /** @returns {number} seconds of media that follow the moment on screen */
  get ahead() {
    const range = this.#range();
    return range ? range.end - this.video.currentTime : 0;
  }

  /** @returns {PlayerState} */
  get state() {
    if (this.#over()) return "ended";
    if (!this.shown) return "loading";
    if (!this.wanted) return "paused";
    const ready = this.video.readyState >= HTMLMediaElement.HAVE_FUTURE_DATA;
    return ready && !this.video.paused ? "playing" : "waiting";
  }

  /** Play on (as soon as there is something to play). */
  play() {
    this.wanted = true;
    this.tick();
  }

  /** Hold the picture. */
  pause() {
    this.wanted = false;
    this.video.pause();
  }

  /** Called ten times a second: evicts, steps over gaps, and wakes a player that hangs. */
  tick() {
    if (!this.segments) return;
    this.segments.next();
    this.#end();
    if (this.video.seeking || this.#over()) return;
    const range = this.#range();
    if (!range) this.#jump();
    else if (!this.wanted) return;
    else if (this.video.paused) this.#start();
    else this.#check(range);
  }

  /** Let go of the media. */
  close() {
    this.segments = null;
    this.early = [];
    if (this.video.src) URL.revokeObjectURL(this.video.src);
    this.video.removeAttribute("src");
    this.video.load();
    this.source = null;
  }

  #opened(info) {
    const type = `video/mp4; codecs="${info.codec}"`;
    try {
      const buffer = this.source.addSourceBuffer(type);
      this.segments = new Segments(buffer, () => this.seconds, this.events.broken);
    } catch {
      return this.events.broken();
    }
    for (const bytes of this.early.splice(0)) this.push(bytes);
  }

  #first() {
    this.#start();
    const shown = () => {
      if (!this.segments) return;
      this.still.hidden = true;
      if (!this.shown) this.events.first();
      this.shown = true;
    };
    if (this.video.requestVideoFrameCallback) this.video.requestVideoFrameCallback(shown);
    else this.video.addEventListener("timeupdate", shown, { once: true });
  }

  #start() {
    if (!this.wanted) return;
    this.video.play().then(
      () => this.events.blocked(false),
      (error) => error.name === "NotAllowedError" && this.events.blocked(true),
    );
  }

  /** The buffered range that holds the moment on screen. */
  #range() {
    const { buffered, currentTime } = this.video;
    for (let i = 0; i < buffered.length; i++) {
      const start = buffered.start(i);
      const end = buffered.end(i);
      if (start <= currentTime + 0.001 && currentTime < end) return { start, end };
    }
    return null;
  }

  /** To the media that begins next: the first chunk of an attached video, or one after a gap. */
  #jump() {
    const { buffered, currentTime } = this.video;
    for (let i = 0; i < buffered.length; i++) {
      if (buffered.start(i) <= currentTime) continue;
      this.video.currentTime = buffered.start(i) + 0.001;
      return;
    }
  }

  /** Push a player that does not move although there is media; ask for the video again at last. */
  #check(range) {
    const seconds = this.video.currentTime;
    const now = performance.now();
    if (seconds !== this.progress.seconds || range.end - seconds < LITTLE) {
      const { pushes, goal } = this.progress;
      this.progress = { seconds, at: now, goal, pushes: seconds > goal ? 0 : pushes };
    } else if (now - this.progress.at > 1000 * STUCK) {
      if (this.progress.pushes >= PUSHES) return this.events.broken();
      this.progress = { seconds, at: now, goal: seconds + 1, pushes: this.progress.pushes + 1 };
      this.video.currentTime = seconds + PUSH;
      this.#start();
    }
  }

  #end() {
    const idle = !this.segments.queue.length && !this.segments.buffer.updating;
    if (this.complete && idle && this.source.readyState === "open") this.source.endOfStream();
  }

  /** Played to the end, or complete without a single picture. */
  #over() {
    const empty = this.source?.readyState === "ended" && !this.video.buffered.length;
    return this.complete && (this.video.ended || empty);
  }

  #keepStill() {
    if (!this.shown) return;
    const { videoWidth, videoHeight } = this.video;
    Object.assign(this.still, { width: videoWidth, height: videoHeight, hidden: false });
    this.still.getContext("2d").drawImage(this.video, 0, 0);
  }
}

/** One JPEG a frame, drawn at the video's pace. */
export class JpegPlayer {
  /**
   * @param {Elements} elements
   * @param {Events} events
   */
  constructor({ frames }, events) {
    this.canvas = frames;
    this.events = events;
    this.wanted = true;
    this.complete = false;
    this.shown = false;
    this.fps = 16;
    /** @type {ArrayBuffer[]} */
    this.queue = [];
    this.drawn = 0;
    this.from = 0;
    this.due = 0;
    this.generation = 0;
  }

  /** @param {VideoInfo} info */
  begin(info) {
    this.close();
    this.fps = info.fps;
    this.from = info.from_seconds ?? 0;
    this.shown = false;
    this.complete = false;
    this.drawn = 0;
    Object.assign(this.canvas, { width: info.width, height: info.height, hidden: false });
    this.#loop(this.generation);
  }

  /** @param {ArrayBuffer} bytes  a picture */
  push(bytes) {
    this.queue.push(bytes);
  }

  /** No more pictures come. */
  finish() {
    this.complete = true;
  }

  /** @returns {number} the moment on screen, in seconds of the video */
  get seconds() {
    return this.from + this.drawn / this.fps;
  }

  /** @returns {number} seconds of pictures that wait */
  get ahead() {
    return this.queue.length / this.fps;
  }

  /** @returns {PlayerState} */
  get state() {
    if (this.complete && !this.queue.length) return "ended";
    if (!this.shown) return "loading";
    if (!this.wanted) return "paused";
    return this.queue.length ? "playing" : "waiting";
  }

  /** Play on. */
  play() {
    this.wanted = true;
  }

  /** Hold the picture. */
  pause() {
    this.wanted = false;
  }

  /** Nothing to do: the loop of pictures keeps time. */
  tick() {}

  /** Let go of the pictures. */
  close() {
    this.generation += 1;
    this.queue = [];
  }

  /** Draw what is due with every picture of the screen; after a wait the clock starts anew. */
  async #loop(generation) {
    while (generation === this.generation) {
      const now = await new Promise(requestAnimationFrame);
      if (!this.wanted || !this.queue.length || now < this.due) continue;
      this.due = Math.max(this.due + 1000 / this.fps, now - 1000 / this.fps);
      await this.#draw(this.queue.shift(), generation);
    }
  }

  async #draw(bytes, generation) {
    const picture = await createImageBitmap(new Blob([bytes], { type: "image/jpeg" }));
    if (generation !== this.generation) return;
    this.canvas.getContext("2d").drawImage(picture, 0, 0);
    picture.close();
    this.drawn += 1;
    if (!this.shown) this.events.first();
    this.shown = true;
  }
}

/**
 * @param {ArrayBuffer[]} parts
 * @returns {ArrayBuffer}
 */
function joined(parts) {
  if (parts.length === 1) return parts[0];
  const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.byteLength, 0));
  let at = 0;
  for (const part of parts) {
    bytes.set(new Uint8Array(part), at);
    at += part.byteLength;
  }
  return bytes.buffer;
}
