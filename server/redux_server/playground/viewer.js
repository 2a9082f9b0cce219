/** @file A large look at images: zoom, before and after, any two compared, and what made them. */

import { button, h, icon } from "./dom.js";
import { fileName, save } from "./cards.js";
import { duration, label } from "./words.js";

const MAX_ZOOM = 16;

/** @typedef {{url: string, name: string, below?: {url: string, name: string}, task?: import("./api.js").Task, index?: number}} Shot */

/** @param {Shot[]} shots @param {number} at @param {{useAsInput: (url: string, name: string) => void}} page */
export function view(shots, at, page) {
  const stage = h("div", { class: "stage", tabindex: 0, role: "img" });
  const facts = h("div", { class: "facts" });
  const heading = h("h2", {}, "");
  const zoom = new Zoom(stage);
  const between = h("input", { type: "range", min: 0, max: 100, value: 50, class: "between" });
  const both = button("Before and after", "compare", () => toggle(!both.matches("[aria-pressed=true]")), { attributes: { "aria-pressed": "false" } });
  const acts = h("div", { class: "row" });
  let above = h("img");

  /** @param {boolean} isOn */
  const toggle = (isOn) => {
    const { below, name } = shots[at];
    const isBoth = isOn && below !== undefined;
    both.setAttribute("aria-pressed", String(isBoth));
    between.hidden = !isBoth;
    between.setAttribute("aria-label", `Left: ${below?.name}. Right: ${name}`);
    const under = below ? h("img", { src: below.url, alt: below.name }) : null;
    above = h("img", { src: shots[at].url, alt: name });
    zoom.pictures.replaceChildren(...[isBoth ? under : null, above].filter((each) => each !== null));
    cut();
  };
  const cut = () => {
    above.style.clipPath = between.hidden ? "" : `inset(0 0 0 ${between.value}%)`;
    stage.style.setProperty("--cut", `${between.value}%`);
    stage.classList.toggle("both", !between.hidden);
  };
  between.addEventListener("input", cut);

  const show = () => {
    const { name, below, task, index = 0, url } = shots[at];
    heading.textContent = name;
    stage.setAttribute("aria-label", `${name}. Plus and minus zoom, arrows move.`);
    both.hidden = below === undefined;
    facts.replaceChildren(...(task ? factsOf(task, index) : []));
    acts.replaceChildren(
      h("a", { class: "button", href: url, download: fileName(url, task?.seeds[index] ?? 0), onclick: save }, icon("download"), "Download"),
      button("Use as input", "image", () => {
        page.useAsInput(url, name);
        dialog.close();
      }));
    zoom.reset();
    toggle(below !== undefined && (task === undefined || both.matches("[aria-pressed=true]")));
  };
  /** @param {number} by */
  const step = (by) => {
    at = (at + by + shots.length) % shots.length;
    show();
  };
  const dialog = h("dialog", { class: "viewer", "aria-label": "Image" },
    h("header", {}, heading,
      h("div", { class: "row" }, both,
        button("Zoom out", "minus", () => zoom.by(1 / 1.5), { bare: true }),
        button("Fit", "expand", () => zoom.reset(), { bare: true }),
        button("Zoom in", "plus", () => zoom.by(1.5), { bare: true }),
        button("Close", "close", () => dialog.close(), { bare: true }))),
    h("div", { class: "room" }, stage, between,
      shots.length > 1 ? button("Previous", "left", () => step(-1), { bare: true, kind: "previous" }) : null,
      shots.length > 1 ? button("Next", "right", () => step(1), { bare: true, kind: "next" }) : null),
    h("footer", {}, facts, acts));
  dialog.addEventListener("keydown", (event) => {
    if (event.target === between) return;
    if (event.key === "ArrowLeft" && zoom.isWhole) step(-1);
    else if (event.key === "ArrowRight" && zoom.isWhole) step(1);
    else if (!zoom.key(event.key)) return;
    event.preventDefault();
  });
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  show();
  dialog.showModal();
  stage.focus();
}

/** @param {import("./api.js").Task} task @param {number} index */
function factsOf(task, index) {
  const { inference = 0, ...stages } = task.timings;
  const detail = Object.entries(stages).map(([stage, ms]) => `${stage} ${duration(ms)}`).join(", ");
  /** @type {[string, string][]} */
  const rows = [
    ["Seed", String(task.seeds[index])],
    ["Time on the device", duration(inference) + (detail ? ` (${detail})` : "")],
    ["Quality", task.quality + (task.reused_steps ? `, ${task.reused_steps} steps reused` : "")],
    ["Safety", task.has_nsfw_contents[index] ? "withheld" : task.input.enable_safety_checker === false ? "not checked" : "nothing found"],
  ];
  for (const [name, value] of Object.entries(task.input))
    if (!["image", "images", "mask", "seed", "quality", "enable_preview", "enable_safety_checker"].includes(name) && value !== "")
      rows.push([label(name), String(value)]);
  return [h("dl", {}, ...rows.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { dir: "auto" }, value))))];
}

class Zoom {
  /** @param {HTMLElement} stage */
  constructor(stage) {
    this.pictures = h("div", { class: "pictures" });
    stage.append(this.pictures);
    this._stage = stage;
    this._scale = 1;
    this._x = 0;
    this._y = 0;
    this._listen();
  }

  get isWhole() {
    return this._scale === 1;
  }

  reset() {
    [this._scale, this._x, this._y] = [1, 0, 0];
    this._show();
  }

  /** Zoom about a place, from the middle of the stage. @param {number} factor */
  by(factor, x = 0, y = 0) {
    const next = Math.min(MAX_ZOOM, Math.max(1, this._scale * factor));
    const real = next / this._scale;
    this._x = x - (x - this._x) * real;
    this._y = y - (y - this._y) * real;
    this._scale = next;
    if (next === 1) [this._x, this._y] = [0, 0];
    this._show();
  }

  /** @param {string} key @returns {boolean} whether it was one of ours */
  key(key) {
    /** @type {Record<string, () => void>} */
    const deeds = {
      "+": () => this.by(1.5), "=": () => this.by(1.5), "-": () => this.by(1 / 1.5), "0": () => this.reset(),
      ArrowLeft: () => this._move(60, 0), ArrowRight: () => this._move(-60, 0),
      ArrowUp: () => this._move(0, 60), ArrowDown: () => this._move(0, -60),
    };
    deeds[key]?.();
    return key in deeds;
  }

  /** @param {number} x @param {number} y */
  _move(x, y) {
    if (this.isWhole) return;
    this._x += x;
    this._y += y;
    this._show();
  }

  _show() {
    this.pictures.style.transform = `translate(${this._x}px, ${this._y}px) scale(${this._scale})`;
    this._stage.classList.toggle("zoomed", !this.isWhole);
  }

  _listen() {
    /** @type {Map<number, PointerEvent>} */
    const held = new Map();
    this._stage.addEventListener("wheel", (event) => {
      event.preventDefault();
      const box = this._stage.getBoundingClientRect();
      const factor = Math.exp(-event.deltaY / 400);
      this.by(factor, event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2);
    }, { passive: false });
    this._stage.addEventListener("dblclick", () => (this.isWhole ? this.by(3) : this.reset()));
    this._stage.addEventListener("pointerdown", (event) => {
      this._stage.setPointerCapture(event.pointerId);
      held.set(event.pointerId, event);
    });
    this._stage.addEventListener("pointermove", (event) => {
      const last = held.get(event.pointerId);
      if (!last) return;
      const other = [...held.values()].find((each) => each.pointerId !== event.pointerId);
      held.set(event.pointerId, event);
      if (!other) this._move(event.clientX - last.clientX, event.clientY - last.clientY);
      else {
        const far = (/** @type {PointerEvent} */ a) => Math.hypot(a.clientX - other.clientX, a.clientY - other.clientY);
        this.by(far(event) / Math.max(1, far(last)));
      }
    });
    for (const name of /** @type {const} */ (["pointerup", "pointercancel"]))
      this._stage.addEventListener(name, (event) => void held.delete(event.pointerId));
  }
}
