/** @file A task as the page follows it, from the press of the button to its end. Knows no elements. */

import { ApiError, follow, hasEnded, sleep } from "./api.js";

const LONGEST_WAIT_S = 30;

/**
 * @typedef {"sending" | "refused" | "open" | "ended" | "broken"} State
 * sending: not accepted yet · refused: will be sent again · open: accepted · broken: never was
 */

export class Run extends EventTarget {
  /**
   * Tells of itself by the events `state` (all may have changed), `progress` and `preview`.
   *
   * @param {import("./api.js").Api} api
   * @param {{task?: import("./api.js").Task, label?: string, input?: Record<string, any>}} given
   */
  constructor(api, given) {
    super();
    this._api = api;
    this._ending = new AbortController();
    this.label = given.label ?? "";
    this.input = given.input ?? given.task?.input ?? {};
    /** @type {import("./api.js").Task | null} */
    this.task = given.task ?? null;
    /** @type {State} */
    this.state = given.task ? (hasEnded(given.task) ? "ended" : "open") : "sending";
    this.problem = "";
    this.needsKey = false;
    this.isAway = false;
    this.isCancelling = false;
    this.isNew = !given.task;
    /** Times of this browser's clock, in milliseconds. */
    this.begunAt = Date.now();
    this.endedAt = 0;
    this.sendAgainAt = 0;
    this.workedSince = 0;
    /** The last preview of each image. @type {Map<number, string>} */
    this.previews = new Map();
    if (this.state === "open") void this._follow();
  }

  get isOver() {
    return this.state === "ended" || this.state === "broken";
  }

  get total() {
    return this.task?.progress.total_steps ?? 0;
  }

  /**
   * Upload, submit, follow.
   *
   * @param {(signal: AbortSignal) => Promise<Record<string, any>>} prepare gives the parameters
   * @returns {Promise<boolean>} whether it was accepted; it is followed from then on
   */
  async start(prepare) {
    const once = [...crypto.getRandomValues(new Uint8Array(16))].map((each) => each.toString(16).padStart(2, "0")).join("");
    try {
      const signal = this._ending.signal;
      this.input = await this._patiently(() => prepare(signal));
      this.task = await this._patiently(() => this._api.submit(this.input, once, signal));
    } catch (error) {
      this._break(error);
      return false;
    }
    this._to("open");
    void this._follow();
    return true;
  }

  async cancel() {
    if (this.state === "sending" || this.state === "refused") {
      this._ending.abort();
      return;
    }
    this.isCancelling = true;
    this._to(this.state);
    try {
      if (this.task) this._take(await this._api.cancel(this.task.id));
    } catch (error) {
      this.isCancelling = false;
      this.problem = said(error);
      this._to(this.state);
    }
  }

  /** Delete it on the server, and follow it no more. */
  async remove() {
    if (this.task) await this._api.remove(this.task.id).catch((error) => {
      if (!(error instanceof ApiError) || error.status !== 404) throw error;
    });
    this.stop();
  }

  stop() {
    this._ending.abort();
  }

  /** Call until the server takes it: it may be full, or away for a while. @template T @param {() => Promise<T>} call @returns {Promise<T>} */
  async _patiently(call) {
    for (let pauseS = 1; ; pauseS = Math.min(pauseS * 2, LONGEST_WAIT_S)) {
      try {
        const found = await call();
        this.isAway = false;
        return found;
      } catch (error) {
        if (!(error instanceof ApiError) || !(error.status === 429 || error.status === 503 || error.isAway)) throw error;
        const waitS = error.retryAfterS || pauseS;
        this.problem = error.message;
        this.isAway = error.isAway;
        this.sendAgainAt = Date.now() + waitS * 1000;
        this._to("refused");
        await sleep(waitS * 1000, this._ending.signal);
        this.problem = "";
        this._to("sending");
      }
    }
  }

  async _follow() {
    if (!this.task) return;
    const tell = {
      state: (/** @type {import("./api.js").Task} */ task) => this._take(task),
      preview: (/** @type {import("./api.js").Preview} */ preview) => {
        this.previews.set(preview.image, preview.data);
        this.dispatchEvent(new Event("preview"));
      },
      away: (/** @type {boolean} */ isAway) => {
        if (isAway !== this.isAway) {
          this.isAway = isAway;
          this._to(this.state);
        }
      },
    };
    try {
      await follow(this._api, this.task.id, tell, this._ending.signal);
    } catch (error) {
      this._break(error);
    }
  }

  /** @param {import("./api.js").Task} task */
  _take(task) {
    const before = this.task?.status;
    this.task = task;
    if (task.status === "processing" && !this.workedSince) this.workedSince = Date.now();
    if (hasEnded(task) && this.state !== "ended") {
      this.endedAt = Date.now();
      this._to("ended");
    } else if (task.status !== before) this._to(this.state);
    else this.dispatchEvent(new Event("progress"));
  }

  /** @param {unknown} error */
  _break(error) {
    this.needsKey = error instanceof ApiError && error.status === 401;
    this.problem = this._ending.signal.aborted ? "Cancelled before it was sent." : said(error);
    this.endedAt = Date.now();
    this._to("broken");
  }

  /** @param {State} state */
  _to(state) {
    this.state = state;
    this.dispatchEvent(new Event("state"));
  }
}

/** @param {unknown} error */
export function said(error) {
  if (error instanceof ApiError) return error.message;
  return error instanceof Error ? error.message : String(error);
}
