/** @file The server's public API, with the user's key. Knows no page. */

import { EventParser } from "./events.js";

/**
 * @typedef {{step: number, total_steps: number, queue_position?: number}} Progress
 * @typedef {{
 *   id: string, model: string, status: string, input: Record<string, any>, outputs: string[],
 *   has_nsfw_contents: boolean[], seeds: number[], quality: string, reused_steps: number,
 *   progress: Progress, created_at: string, error: string, code: number, executionTime: number,
 *   timings: Record<string, number>,
 * }} Task
 * @typedef {{step: number, image: number, data: string}} Preview
 */

export const MODEL = "wavespeed-ai/flux-pro-redux";
const SILENCE_MS = 20_000; // the server breaks its silences every 15 s

/** What the server refused, or `status` 0 where it did not answer at all. */
export class ApiError extends Error {
  /** @param {string} message @param {number} status @param {number} [retryAfterS] */
  constructor(message, status, retryAfterS = 0) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }

  get isAway() {
    return this.status === 0 || this.status >= 502;
  }
}

/** @param {Task} task */
export const hasEnded = (task) => ["completed", "failed", "cancelled"].includes(task.status);

/** @param {AbortSignal} signal @param {number} ms */
export function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)));
  });
}

export class Api {
  /**
   * @param {string} base where the server is, with a slash at its end
   * @param {() => string} key
   * @param {typeof fetch} send
   */
  constructor(base, key, send = (...given) => fetch(...given)) {
    this._base = base;
    this._key = key;
    this._send = send;
  }

  /** @param {string} path @returns {Promise<any>} the answer's `data`, or all of it without one */
  async call(path, { method = "GET", body = /** @type {any} */ (null), headers = {}, signal = /** @type {AbortSignal | null} */ (null) } = {}) {
    const response = await this._answer(path, { method, body, headers, signal });
    const answer = await response.json().catch(() => null);
    if (!response.ok) throw refusal(response, answer);
    if (answer === null) throw new ApiError("The server's answer was cut off.", 0);
    return answer.data ?? answer;
  }

  /** @param {string} path @param {RequestInit} init */
  async _answer(path, init) {
    /** @type {Record<string, string>} */
    const key = path.startsWith("api/") ? { Authorization: `Bearer ${this._key()}` } : {};
    try {
      return await this._send(this._base + path, {
        ...init, headers: { ...key, .../** @type {Record<string, string>} */ (init.headers) },
        cache: "no-store", credentials: "omit",
      });
    } catch (error) {
      if (init.signal?.aborted) throw error;
      throw new ApiError("The server does not answer.", 0);
    }
  }

  /** @param {string} path @param {any} content */
  _post(path, content, headers = {}, signal = /** @type {AbortSignal | null} */ (null)) {
    const body = JSON.stringify(content);
    const kind = { "Content-Type": "application/json", ...headers };
    return this.call(path, { method: "POST", body, headers: kind, signal });
  }

  version = () => this.call("version");
  /** Ready or not: both are answers. */
  readiness = async () => (await this._answer("readyz", { headers: {} })).json();
  /** The JSON schema of a task's parameters. @returns {Promise<any>} */
  async schema() {
    const models = await this.call("api/v3/models");
    const model = models.find((/** @type {any} */ each) => each.model_id === MODEL) ?? models[0];
    return model.api_schema.api_schemas[0].request_schema;
  }
  /** @param {Record<string, any>} input @param {string} once @param {AbortSignal} [signal] @returns {Promise<Task>} */
  submit = (input, once, signal) =>
    this._post(`api/v3/${MODEL}`, input, { "Idempotency-Key": once }, signal);
  /** @param {string} id @param {AbortSignal} [signal] @returns {Promise<Task>} */
  result = (id, signal) => this.call(`api/v3/predictions/${id}/result`, { signal });
  /** @param {string} id @returns {Promise<Task>} */
  cancel = (id) => this._post(`api/v3/predictions/${id}/cancel`, {});
  /** @param {string} id */
  remove = (id) => this.call(`api/v3/predictions/${id}`, { method: "DELETE" });
  /** @param {number} page @param {string} before @returns {Promise<Task[]>} */
  async list(page, before, size = 12) {
    const wanted = { page, page_size: size, created_before: before };
    return (await this._post("api/v3/predictions", wanted)).items;
  }
  /** @param {Blob} file @param {string} name @param {AbortSignal} [signal] @returns {Promise<string>} its URL */
  async upload(file, name, signal) {
    const body = new FormData();
    body.append("file", file, name);
    return (await this.call("api/v3/media/upload/binary", { method: "POST", body, signal })).download_url;
  }

  /**
   * What the stream of a task tells, until it ends. Raises `ApiError` where there is none, and ends
   * early where it is cut off or silent for too long.
   *
   * @param {string} id
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<{event: string, data: any}>}
   */
  async *stream(id, signal) {
    const silence = new AbortController();
    const both = AbortSignal.any([signal, silence.signal]);
    let timer = setTimeout(() => silence.abort(), SILENCE_MS);
    try {
      const path = `api/v3/predictions/${id}/stream?preview=1`;
      const response = await this._answer(path, { headers: { Accept: "text/event-stream" }, signal: both });
      if (!response.ok || !response.body || response.status === 204)
        throw refusal(response, await response.json().catch(() => null));
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      const parser = new EventParser();
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        clearTimeout(timer);
        timer = setTimeout(() => silence.abort(), SILENCE_MS);
        for (const each of parser.feed(value)) yield { event: each.event, data: JSON.parse(each.data) };
      }
    } catch (error) {
      if (signal.aborted || error instanceof ApiError) throw error;
      throw new ApiError("The stream was cut off.", 0);
    } finally {
      clearTimeout(timer);
      silence.abort();
    }
  }
}

/** @param {Response} response @param {any} answer */
function refusal(response, answer) {
  const text = answer?.message || `The server answered ${response.status}.`;
  return new ApiError(text, response.status, Number(response.headers.get("Retry-After")) || 0);
}

/**
 * Follow a task to its end, over cut streams and restarts of the server.
 *
 * @param {Api} api
 * @param {string} id
 * @param {{
 *   state: (task: Task) => void, preview: (preview: Preview) => void, away: (isAway: boolean) => void,
 * }} tell
 * @param {AbortSignal} signal
 * @returns {Promise<void>} when it has ended; raises `ApiError` where it is gone or the key is wrong
 */
export async function follow(api, id, tell, signal, pauseMs = 500) {
  let pause = pauseMs;
  for (;;) {
    try {
      for await (const { event, data } of api.stream(id, signal)) {
        tell.away(false);
        pause = pauseMs;
        if (event === "preview") tell.preview(data);
        else if (event === "gone") throw new ApiError(data.message, 404);
        else if (event === "progress" || event === "end") {
          tell.state(data);
          if (hasEnded(data)) return;
        }
      }
    } catch (error) {
      if (!(error instanceof ApiError) || isFinal(error)) throw error;
    }
    try {
      const task = await api.result(id, signal);
      tell.away(false);
      tell.state(task);
      if (hasEnded(task)) return;
    } catch (error) {
      if (!(error instanceof ApiError) || isFinal(error)) throw error;
      tell.away(true);
    }
    await sleep(pause, signal);
    pause = Math.min(pause * 1.6, 5000);
  }
}

/** Whether asking again is of no use. @param {ApiError} error */
const isFinal = (error) => [401, 403, 404, 410].includes(error.status);
