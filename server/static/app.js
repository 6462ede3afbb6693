/** The page: connects forms, socket, player, timeline and numbers. */

import { makeComposer } from "./composer.js";
import { byId, element, size, wholeNumber } from "./dom.js";
import { drawPrompts } from "./history.js";
import { makePlayer, playableFormat } from "./player.js";
import { makePolicies } from "./policies.js";
import { Connection, socketUrl } from "./protocol.js";
import { drawView } from "./strip.js";
import { pointBefore, TimelineView } from "./timeline.js";
import { branchWords, sentence, stateWords } from "./words.js";

/**
 * @typedef {object} Session  what is known of the session on this page
 * @property {string} id
 * @property {number} seed
 * @property {number} fps
 */

/**
 * @typedef {object} Change  one that was asked for and is not heard yet
 * @property {string | null} prompt
 * @property {string} policy
 * @property {number} asked  what was on screen then
 * @property {object} request  what the server was told
 * @property {"queued" | "sent" | "lost" | "accepted" | "unknown"} fate  queued: no socket is open;
 *   lost: it went into a socket that was lost; unknown: it had been accepted before
 */

/** @typedef {"idle" | "starting" | "live" | "paused" | "ended" | "replaced"} Phase */

const TICK = 100;
/** Milliseconds without media before the page speaks of waiting, and for which it then does. */
const WAITING_AFTER = 300;
const WAITING_FOR = 4000;
const STORED = "rolling-forcing-live";
/** Times in a row that a video is sent again in vain before pictures are tried instead. */
const MOST_REPEATS = 3;
/** A seed that nobody chose is below this. */
const SEEDS = 2 ** 32;

class Page {
  /** @param {object} config  of `GET v1/config` */
  constructor(config) {
    this.config = config;
    /** @type {Phase} */
    this.phase = "idle";
    /** @type {Session | null} */
    this.session = null;
    this.online = true;
    this.stats = {};
    /** @type {Record<string, number>} moment on screen when each change was asked for, by its id */
    this.asked = {};
    /** @type {Map<string, Change>} */
    this.pending = new Map();
    this.floor = 0;
    this.clicked = 0;
    /** Timer of a request to send the video again, and how often that was in vain. */
    this.asking = 0;
    this.repeats = 0;
    this.brokenAt = -Infinity;
    this.waitingSince = 0;
    this.waitedAt = -Infinity;
    this.told = "";
    this.#build();
    this.#listen();
    this.#describe();
    setInterval(() => this.#tick(), TICK);
    this.#takeUp();
  }

  /** @returns {boolean} whether a video is being made, or paused, that can be changed */
  get running() {
    return this.phase === "live" || this.phase === "paused";
  }

  // -- what is on the page

  #build() {
    const { config } = this;
    this.box = makeComposer(byId("composer"), config);
    const blend = [byId("blend"), byId("blend-words")];
    this.choice = makePolicies(byId("policies"), ...blend, config);
    this.timeline = new TimelineView(byId("timeline"), (seconds) => this.#offerBranch(seconds));
    this.#choosePlayer(playableFormat());
    this.connection = new Connection(socketUrl(document.baseURI, this.format), {
      message: (message) => this.#receive(message),
      binary: (bytes) => this.player.push(bytes),
      online: (online) => this.#online(online),
      unopened: () => this.#askWhy(),
      unbegun: () => this.#unbegun(),
      seconds: () => Math.max(this.floor, this.player.seconds),
    });
  }

  #choosePlayer(format) {
    this.format = format;
    this.player = makePlayer(
      format,
      { video: byId("video"), frames: byId("frames"), still: byId("still") },
      {
        first: () => this.#firstFrame(),
        broken: () => this.#sendAgain(),
        blocked: (blocked) => (byId("unblock").hidden = !blocked),
      },
    );
  }

  #describe() {
    const { title, model, width, height, fps, sinks, max_seconds: longest } = this.config;
    if (title) document.title = byId("title").textContent = title;
    const about = [model, `${width}×${height}`, `${fps} frames/s`];
    byId("model").textContent = about.filter(Boolean).join(" · ");
    const stage = byId("stage");
    stage.style.setProperty("--ratio", String(width / height));
    document.documentElement.style.setProperty("--stage-ratio", String(width / height));
    stage.classList.toggle("tiny", height <= 160);
    fillChoice(byId("sink"), byId("sink-field"), sinks ?? []);
    if (longest) {
      byId("seconds").max = String(longest);
      byId("endless").parentElement.append(` (${longest} s at most)`);
    }
  }

  #listen() {
    byId("form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.change();
      else this.start();
    });
    byId("again").addEventListener("click", () => this.start());
    byId("pause").addEventListener("click", () => {
      if (this.phase === "paused") this.resume();
      else this.pause();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("copy").addEventListener("click", () => this.#copy());
    byId("unblock").addEventListener("click", () => this.player.play());
    byId("alert-close").addEventListener("click", () => this.#alert(""));
    byId("seconds").addEventListener("input", () => {
      byId("limited").checked = true;
    });
    byId("branch").addEventListener("submit", (event) => {
      event.preventDefault();
      this.branch();
    });
    byId("branch-cancel").addEventListener("click", () => this.#closeBranch());
    byId("branch").addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#closeBranch();
    });
    document.addEventListener("visibilitychange", () => this.#visibility());
    addEventListener("resize", () => this.timeline.draw());
  }

  // -- what a viewer does

  /** Start a new video with what the form says. */
  start() {
    const request = { prompt: this.box.prompt, format: this.format };
    request.seconds = byId("limited").checked ? Number(byId("seconds").value) : null;
    request.seed = wholeNumber(byId("seed")) ?? Math.floor(Math.random() * SEEDS);
    if (!byId("sink-field").hidden) request.sink = Number(byId("sink").value);
    this.#alert("");
    if (this.running) this.connection.sendNow("session.stop", {});
    this.connection.renew();
    this.clicked = performance.now();
    this.session = null;
    byId("branch").hidden = true;
    this.#setPhase("starting");
    byId("stage").scrollIntoView({ block: "nearest" });
    this.connection.send("session.start", request);
  }

  /** Change the prompt (or the seed) of the video that is being made. */
  change() {
    const id = `c${Date.now().toString(36)}${Math.random().toString(36).slice(2, 6)}`;
    const request = { id, prompt: this.box.prompt, ...this.choice() };
    const seed = wholeNumber(byId("new-seed"));
    if (seed !== null) request.seed = seed;
    this.#alert("");
    this.asked[id] = this.player.seconds;
    const { prompt, policy } = request;
    const fate = this.connection.send("session.prompt_update", request) ? "sent" : "queued";
    this.pending.set(id, { prompt, policy, asked: this.asked[id], request, fate });
    this.#store();
    this.#drawPrompts();
  }

  /** Hold the picture and the making of it. */
  pause() {
    this.connection.send("session.pause");
    this.#paused();
  }

  /** Go on. */
  resume() {
    this.connection.send("session.resume");
    this.#resumed();
  }

  /** End the video; what is made is played to its end. */
  stop() {
    this.connection.send("session.stop");
    this.player.play();
  }

  /** Go on from the chosen moment of the past, another way. */
  branch() {
    const request = { snapshot: this.chosen.id };
    if (byId("branch-prompt").checked) request.prompt = this.box.prompt;
    const seed = wholeNumber(byId("branch-seed"));
    if (seed !== null) request.seed = seed;
    this.#closeBranch();
    this.clicked = performance.now();
    this.connection.session = this.session.id; // to go back to, where the socket of an end is lost
    this.connection.send("session.branch", request);
    byId("stage").scrollIntoView({ block: "nearest" });
  }

  // -- what the server says

  #receive(message) {
    const handlers = {
      "session.started": (m) => this.#started(m),
      "video.start": (m) => this.#begin(m),
      "session.prompt_update.accepted": ({ id }) => this.#accepted(id),
      "session.prompt_update.applied": (m) => this.#applied(m),
      "session.prompt_update.superseded": (m) => this.#superseded(m),
      "snapshot.available": (m) => this.timeline.addPoint(m),
      "snapshot.dropped": (m) => this.timeline.dropPoint(m.id),
      thumbnail: (m) => this.timeline.addThumbnail(m),
      stats: (m) => this.#counted(m),
      "session.paused": () => this.#paused(),
      "session.resumed": () => this.#resumed(),
      "session.replaced": () => this.#replaced(),
      "session.stopped": (m) => this.#stopped(m),
      error: (m) => this.#failed(m),
    };
    handlers[message.type]?.(message);
  }

  #started(message) {
    const { id, seed, prompt, fps, state } = message;
    if (id !== this.session?.id) {
      this.pending.clear();
      byId("branch").hidden = true;
    }
    for (const change of this.pending.values()) {
      if (change.fate === "accepted") change.fate = "unknown";
    }
    this.session = { id, seed, fps };
    this.connection.session = id;
    this.timeline.reset();
    this.timeline.addChange({ id: "", prompt, policy: null, asked: null, first: 0, whole: 0 });
    if (state === "paused") this.#paused();
    else this.#resumed();
    this.#offerFiles(message.replay);
    this.#store();
    this.#drawPrompts();
    if (document.hidden) this.#visibility();
    byId("n-seed").textContent = seed;
  }

  #accepted(id) {
    const change = this.pending.get(id);
    if (change) change.fate = "accepted";
  }

  #applied({ id, block, prompt, policy, seed, seconds, whole_from_seconds: whole = null }) {
    const asked = this.asked[id] ?? null;
    this.pending.delete(id);
    const said = prompt ?? this.timeline.changes.at(-1).prompt;
    const key = id ?? `block-${block}`;
    this.timeline.addChange({ id: key, prompt: said, policy, seed, asked, first: seconds, whole });
    this.#drawPrompts();
  }

  #paused() {
    this.player.pause();
    this.#setPhase("paused");
  }

  #resumed() {
    this.player.play();
    this.#setPhase("live");
  }

  #superseded({ id }) {
    this.pending.delete(id);
    this.#drawPrompts();
    this.#note("A change was replaced by a later one before it was heard.");
  }

  #counted(stats) {
    this.stats = stats;
    const { fps, lead, block, frames, memory_bytes: memory, view } = stats;
    if (frames && this.session) this.timeline.made = frames / this.session.fps;
    byId("n-fps").textContent = fps ? fps.toFixed(fps < 10 ? 1 : 0) : "–";
    const plays = lead != null && this.phase !== "ended";
    byId("n-lead").textContent = plays ? `${lead.toFixed(1)} s` : "–";
    byId("n-block").textContent = block >= 0 ? block : "–";
    byId("n-memory").textContent = memory ? size(memory) : "–";
    if (view?.window) drawView(byId("view"), view);
  }

  #replaced() {
    this.connection.release();
    this.player.pause();
    this.#setPhase("replaced");
  }

  #stopped({ reason, replay }) {
    this.connection.release();
    this.player.finish();
    this.player.play();
    this.reason = reason;
    this.pending.clear();
    this.#setPhase("ended");
    byId("n-lead").textContent = "–";
    this.#offerFiles(replay);
    this.#drawPrompts();
  }

  #failed({ code, message, id }) {
    if (code === "no_session" && this.phase !== "starting" && !this.running) return;
    if (id === undefined) this.clicked = 0;
    this.pending.delete(id);
    this.#drawPrompts();
    this.#alert(sentence(message ?? code));
    if (code === "unknown_session") this.#forget();
    else if (this.phase === "starting") this.#setPhase("idle");
  }

  #online(online) {
    this.online = online;
    for (const change of this.pending.values()) {
      if (online && change.fate === "queued") change.fate = "sent";
      else if (!online && change.fate === "sent") change.fate = "lost";
    }
  }

  /** The socket was lost before the server said whether the video begins. */
  #unbegun() {
    this.clicked = 0;
    this.#alert("The connection was lost before the new video began. Ask for it again.");
    if (this.phase === "starting") this.#setPhase("idle");
  }

  /** Why no socket opens: a server that was started again wants another token. */
  async #askWhy() {
    const answer = await fetch(new URL("v1/health", document.baseURI)).catch(() => null);
    if (answer?.status !== 403) return;
    const { message } = await answer.json();
    this.connection.renew();
    this.#forget();
    this.#alert(sentence(message));
  }

  // -- the picture

  #begin(info) {
    this.#settleChanges();
    clearTimeout(this.asking);
    this.asking = 0;
    this.floor = info.from_seconds;
    this.player.begin(info);
  }

  #firstFrame() {
    byId("welcome").hidden = true;
    if (!this.clicked) return;
    const seconds = (performance.now() - this.clicked) / 1000;
    this.clicked = 0;
    byId("n-first").textContent = `${seconds.toFixed(2)} s`;
  }

  /** All that the server knows of changes is told: send anew what it never got. */
  #settleChanges() {
    for (const [id, change] of this.pending) {
      if (change.fate === "unknown") this.pending.delete(id);
      if (change.fate !== "lost") continue;
      change.fate = "sent";
      this.connection.send("session.prompt_update", change.request);
    }
    this.#drawPrompts();
  }

  /** The player cannot go on with what it has: ask for the video again, from here. */
  #sendAgain() {
    if (this.asking || !this.session || this.phase === "replaced") return;
    this.repeats = this.player.seconds > this.brokenAt + 5 ? 0 : this.repeats + 1;
    this.brokenAt = this.player.seconds;
    const { id } = this.session;
    const inVain = this.repeats > MOST_REPEATS && this.format === "mp4";
    const ask = () => {
      if (id !== this.session?.id) return;
      if (inVain) this.#fallBack();
      this.connection.attach(id);
    };
    this.asking = setTimeout(ask, Math.min(100 * 2 ** this.repeats, 5000));
  }

  /** This browser cannot play what it said it can: pictures from now on. */
  #fallBack() {
    this.player.close();
    byId("video").hidden = byId("still").hidden = true;
    this.#choosePlayer("jpeg");
    if (this.phase === "paused") this.player.pause();
    this.connection.renew();
    this.connection.url = socketUrl(document.baseURI, this.format);
  }

  #visibility() {
    if (this.running) this.connection.sendNow("hidden", { hidden: document.hidden });
    if (document.hidden) this.player.pause();
    else if (this.phase === "live" || this.phase === "ended") this.player.play();
  }

  #tick() {
    this.player.tick();
    this.connection.watch();
    const seconds = Math.max(this.floor, this.player.seconds);
    if (this.session && this.phase !== "replaced") {
      if (Math.floor(seconds) !== Math.floor(this.floor)) this.#store();
      this.floor = seconds;
      if (this.running) this.connection.sendNow("playhead", { seconds });
      this.timeline.played = seconds;
      this.timeline.made = Math.max(this.timeline.made, seconds);
      this.timeline.draw();
    }
    this.#sayState();
  }

  // -- words

  /** One sentence on what goes on; said again only when it is another one. */
  #sayState() {
    const now = performance.now();
    const waits = this.phase === "live" && this.player.state === "waiting" && !document.hidden;
    this.waitingSince = waits ? this.waitingSince || now : 0;
    if (waits && now - this.waitingSince > WAITING_AFTER) this.waitedAt = now;
    const key = this.#stateKey(now);
    document.body.dataset.state = key;
    if (key === this.told) return;
    this.told = key;
    byId("state").textContent = stateWords(key, {
      fps: this.config.fps,
      rate: this.stats.fps,
      made: this.timeline.made,
      reason: this.reason,
    });
  }

  #stateKey(now) {
    if (!this.online && this.phase !== "ended") return "offline";
    if (this.phase === "ended") return this.player.state === "ended" ? "ended" : "ending";
    if (this.phase !== "live") return this.phase;
    if (this.player.state === "loading") return "loading";
    return now - this.waitedAt < WAITING_FOR ? "waiting" : "playing";
  }

  /** @param {Phase} phase */
  #setPhase(phase) {
    this.phase = phase;
    const changes = this.running;
    byId("form-title").textContent = changes ? "Change it" : "What to show";
    byId("start-options").hidden = changes;
    byId("change-options").hidden = !changes;
    byId("submit").textContent = changes ? "Change" : "Start";
    byId("submit").disabled = phase === "starting";
    byId("again").hidden = !changes;
    byId("pause").disabled = byId("stop").disabled = !changes;
    byId("pause").textContent = phase === "paused" ? "Go on" : "Pause";
    if (phase !== "idle") byId("welcome").hidden = true;
    this.#sayState();
  }

  #drawPrompts() {
    drawPrompts(byId("prompts"), this.timeline.changes, [...this.pending.values()]);
  }

  /** @param {string} text  a sentence; empty: none */
  #alert(text) {
    byId("alert").hidden = !text;
    byId("alert").classList.remove("note");
    byId("alert-text").textContent = text;
  }

  #note(text) {
    this.#alert(text);
    byId("alert").classList.add("note");
  }

  // -- going back

  #offerBranch(seconds) {
    this.chosen = pointBefore(this.timeline.points, seconds);
    byId("branch-words").textContent = branchWords(seconds, this.chosen);
    if (this.chosen) this.timeline.setCursor(this.chosen.seconds);
    byId("branch-go").hidden = !this.chosen;
    byId("branch").hidden = false;
    byId(this.chosen ? "branch-go" : "branch-cancel").focus();
  }

  #closeBranch() {
    byId("branch").hidden = true;
    this.timeline.setCursor(null);
    this.timeline.track.focus();
  }

  // -- files, and the session of a page that is loaded again

  #offerFiles(replay) {
    const { id } = this.session;
    for (const name of ["mp4", "json"]) {
      const link = byId(name);
      link.href = `v1/sessions/${encodeURIComponent(id)}/video.${name}`;
      link.download = `${id}.${name}`;
      link.removeAttribute("aria-disabled");
    }
    byId("replay").textContent = replay || `python inference.py --replay ${id}.json`;
    byId("replay").hidden = false;
    byId("copy").disabled = false;
  }

  async #copy() {
    const button = byId("copy");
    const copied = await copyText(byId("replay"));
    button.textContent = copied ? "Copied" : "Select the line below and copy it";
    setTimeout(() => (button.textContent = "Copy the replay command"), 2000);
  }

  #store() {
    const stored = { id: this.session?.id, asked: this.asked, floor: this.floor };
    inStorage((storage) => storage.setItem(STORED, JSON.stringify(stored)));
  }

  /** A page that is loaded again goes on with its session. */
  #takeUp() {
    const { id, asked, floor } = JSON.parse(inStorage((storage) => storage.getItem(STORED)) ?? "{}");
    if (!id) return;
    this.asked = asked ?? {};
    this.floor = floor ?? 0;
    this.#setPhase("starting");
    this.connection.attach(id);
  }

  #forget() {
    this.connection.release();
    inStorage((storage) => storage.removeItem(STORED));
    this.session = null;
    this.clicked = 0;
    this.pending.clear();
    this.#drawPrompts();
    this.player.finish();
    this.#setPhase("idle");
  }
}

/**
 * What the browser keeps for this tab; one that keeps nothing refuses even to be asked.
 * @template T
 * @param {(storage: Storage) => T} use
 * @returns {T | null}
 */
function inStorage(use) {
  try {
    return use(sessionStorage);
  } catch {
    return null;
  }
}

/** Offer a choice where there is one. */
function fillChoice(select, field, values) {
  field.hidden = values.length < 2;
  const texts = values.map(String);
  select.append(...texts.map((value) => element("option", "", { value }, value)));
}

/** To the clipboard, also where a page without TLS may not use it directly. */
async function copyText(source) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(source.textContent).then(() => true, () => false);
  }
  getSelection().selectAllChildren(source);
  return document.execCommand("copy");
}

/** The token of the address is a cookie by now; it need not be seen, or copied with the address. */
function hideToken() {
  const url = new URL(location.href);
  if (!url.searchParams.has("token")) return;
  url.searchParams.delete("token");
  history.replaceState(null, "", url);
}

async function begin() {
  hideToken();
  let config;
  try {
    const answer = await fetch(new URL("v1/config", document.baseURI));
    if (!answer.ok) throw new Error(`it answered ${answer.status}`);
    config = await answer.json();
  } catch (error) {
    byId("alert").hidden = false;
    const words = `The server cannot be reached (${error.message}).`;
    byId("alert-text").textContent = `${words} Load the page again once it runs.`;
    return;
  }
  new Page(config);
}

begin();
