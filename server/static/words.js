/** What the page says in sentences. */

const REASONS = {
  stopped: ", as you asked",
  disk_full: ": the server's disk is full",
  recording_failed: ": the server could not record it",
  out_of_memory: ": the server has too little memory",
  step_failed: ": it could not be gone on with",
  room: ": it gave way to another one",
};

/**
 * What goes on, by the name of the state.
 * @param {string} state
 * @param {object} facts
 * @param {number} facts.fps  of the video
 * @param {number | undefined} facts.rate  frames a second that the model makes
 * @param {number} facts.made  seconds made
 * @param {string | undefined} facts.reason  why it ended
 * @returns {string}
 */
export function stateWords(state, { fps, rate, made, reason }) {
  const slow = rate && rate < fps;
  const pace = slow && `the model: it makes ${rate.toFixed(1)} frames/s, the video plays ${fps}`;
  return {
    idle: "Ready.",
    starting: "Starting…",
    loading: "The first picture is on its way…",
    playing: "Playing.",
    waiting: `Waiting for ${pace || "more of the video"}. It goes on by itself.`,
    paused: "Paused.",
    offline: "The connection is lost. Trying again; the video goes on from here.",
    replaced: "Another window has taken over this video; load this page again to take it back.",
    ending: "The video is complete; playing to its end.",
    ended: `The end, after ${made.toFixed(1)} s${REASONS[reason] ?? ""}.`,
  }[state];
}

/**
 * The question before a branch.
 * @param {number} seconds  the chosen moment
 * @param {{seconds: number} | null} point  the branch point at or before it
 * @returns {string}
 */
export function branchWords(seconds, point) {
  if (!point) return "No branch point at or before this moment is kept; choose a later one.";
  const [back, chosen] = [point.seconds, seconds].map((value) => `${value.toFixed(1)} s`);
  return `Go back to ${back}, the branch point at or before ${chosen}, and go on from there?`;
}

/**
 * What the server says, with a capital at its beginning and a stop at its end.
 * @param {string} text
 * @returns {string}
 */
export function sentence(text) {
  const whole = text[0].toUpperCase() + text.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}
