/** @file How things are said: names of parameters, times, and how long a task will take. */

/** @type {Record<string, string>} */
const LABELS = {
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  num_images: "Images",
  enable_safety_checker: "Safety checker",
  redux_strength: "Strength",
  redux_pooling: "Pooling",
  output_format: "File format",
  enable_preview: "Preview",
};

/** @param {string} name */
export function label(name) {
  const words = name.replace(/_/g, " ");
  return LABELS[name] ?? words[0].toUpperCase() + words.slice(1);
}

/** @param {number} ms */
export function duration(ms) {
  if (ms < 950) return `${Math.round(ms)} ms`;
  if (ms < 59_500) return `${(ms / 1000).toFixed(ms < 9950 ? 1 : 0)} s`;
  const seconds = Math.round(ms / 1000);
  return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
}

/** @param {number} count @param {string} one @param {string} many */
export const counted = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

/** @param {number} position */
export const queued = (position) =>
  position > 0 ? `Waiting: ${counted(position, "task")} before it` : "Waiting: next in the queue";

/** Width and height of "1024*768". @param {string} size @returns {[number, number]} */
export function sides(size) {
  const [width, height] = size.split(/[*x×]/).map(Number);
  return [width, height];
}

/** Learns from tasks that ended how long others will take. */
export class Estimate {
  constructor() {
    /** Milliseconds per step and megapixel, of the last tasks. @type {number[]} */
    this._paces = [];
  }

  /** @param {import("./api.js").Task} task */
  learn(task) {
    if (task.status === "completed" && task.timings.inference > 0)
      this._paces = [...this._paces, task.timings.inference / work(task)].slice(-5);
  }

  /** Milliseconds on the device; null where nothing is known. @param {import("./api.js").Task} task */
  of(task) {
    const paces = this._paces.toSorted((a, b) => a - b);
    return paces.length ? paces[paces.length >> 1] * work(task) : null;
  }
}

/** @param {import("./api.js").Task} task */
function work(task) {
  const [width, height] = sides(task.input.size);
  return (task.progress.total_steps * width * height) / 1e6;
}
