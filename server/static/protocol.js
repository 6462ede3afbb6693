/**
 * The socket of one page: JSON control and binary chunks, with reconnection.
 *
 * A connection that is lost while a session lives is opened again and attached to that session;
 * delays double from half a second to eight.
 */

/** @typedef {{type: string, [key: string]: any}} Message */

/**
 * @typedef {object} Handlers
 * @property {(message: Message) => void} message  a JSON message of the server
 * @property {(bytes: ArrayBuffer) => void} binary  a chunk of the video
 * @property {(online: boolean) => void} online  the socket was opened, or was lost and is retried
 * @property {() => void} unopened  a socket could not be opened, or was refused
 * @property {() => void} unbegun  the socket was lost before the video that was asked for began
 * @property {() => number} seconds  where to go on after a loss, in seconds of the video
 */

const FIRST_DELAY = 500;
const LAST_DELAY = 8000;
/** Messages after which another video comes: until it does, nobody has seen any of it. */
const BEGINNINGS = ["session.start", "session.attach", "session.branch"];
/** With a session the server speaks twice a second; a socket silent for so long is half-open. */
const SILENCE = 10000;

/**
 * The address of the socket, beside the page: it works behind a path prefix and behind TLS.
 * @param {string} page  address of the page
 * @param {"mp4" | "jpeg"} format
 * @returns {string}
 */
export function socketUrl(page, format) {
  const url = new URL("v1/realtime/video", page);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  url.search = format === "jpeg" ? "?format=jpeg" : "";
  url.hash = "";
  return url.href;
}

/** One socket at a time; what is sent before it is open waits in a queue. */
export class Connection {
  /**
   * @param {string} url
   * @param {Handlers} handlers
   */
  constructor(url, handlers) {
    this.url = url;
    this.handlers = handlers;
    /** @type {string | null} session to attach to after a loss */
    this.session = null;
    /** @type {WebSocket | null} */
    this.socket = null;
    this.delay = FIRST_DELAY;
    this.retry = 0;
    this.heard = 0;
    /** @type {string[]} */
    this.waiting = [];
    /** @type {string | null} what asked for a video that has not begun */
    this.beginning = null;
  }

  /**
   * Send a message, opening the socket if there is none.
   * @param {string} type
   * @param {object} [fields]
   * @returns {boolean} whether it has gone out, rather than waits
   */
  send(type, fields = {}) {
    const text = JSON.stringify({ type, ...fields });
    if (BEGINNINGS.includes(type)) this.beginning = type;
    if (this.socket?.readyState === WebSocket.OPEN) {
      this.socket.send(text);
      return true;
    }
    this.waiting.push(text);
    if (!this.socket) this.#open();
    return false;
  }

  /**
   * Send a message that is worth nothing later: dropped while there is no open socket, and what has
   * been seen while another video is about to come.
   * @param {string} type
   * @param {object} fields
   */
  sendNow(type, fields) {
    if (type === "playhead" && this.beginning) return;
    if (this.socket?.readyState === WebSocket.OPEN) this.send(type, fields);
  }

  /**
   * Take over a session, or ask for its video again: from `handlers.seconds()` on.
   * @param {string} id
   */
  attach(id) {
    this.session = id;
    if (this.socket?.readyState === WebSocket.OPEN) this.#attach();
    else if (!this.socket) this.#open();
  }

  /** Forget the session: a loss of the socket is final from now on. */
  release() {
    this.session = null;
  }

  /** Leave the session and its socket for good; the next message opens a new one. */
  renew() {
    this.session = null;
    this.waiting = [];
    this.beginning = null;
    clearTimeout(this.retry);
    const socket = this.socket;
    this.socket = null;
    socket?.close();
  }

  /** Called now and then: gives up a socket that has gone silent. */
  watch() {
    const open = this.socket?.readyState === WebSocket.OPEN;
    if (open && this.session && performance.now() - this.heard > SILENCE) this.#lost();
  }

  #open() {
    clearTimeout(this.retry);
    const socket = new WebSocket(this.url);
    let opened = false;
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    socket.onopen = () => {
      opened = true;
      this.delay = FIRST_DELAY;
      this.heard = performance.now();
      this.handlers.online(true);
      if (this.session) this.#attach();
      for (const text of this.waiting.splice(0)) socket.send(text);
    };
    socket.onmessage = ({ data }) => {
      if (socket !== this.socket) return;
      this.heard = performance.now();
      if (typeof data === "string") this.#told(JSON.parse(data));
      else this.handlers.binary(data);
    };
    socket.onclose = () => {
      if (socket !== this.socket) return;
      this.#lost();
      if (!opened) this.handlers.unopened();
    };
  }

  /** @param {Message} message */
  #told(message) {
    if (message.type === "video.start" || message.type === "error") this.beginning = null;
    this.handlers.message(message);
  }

  #lost() {
    const socket = this.socket;
    this.socket = null;
    socket?.close();
    if (!this.waiting.length) {
      const asked = this.beginning;
      this.beginning = null;
      if (asked && asked !== "session.attach") this.handlers.unbegun();
    }
    if (!this.session && !this.waiting.length) return;
    this.handlers.online(false);
    this.retry = setTimeout(() => this.socket || this.#open(), this.delay);
    this.delay = Math.min(2 * this.delay, LAST_DELAY);
  }

  #attach() {
    this.send("session.attach", { id: this.session, from_seconds: this.handlers.seconds() });
  }
}
