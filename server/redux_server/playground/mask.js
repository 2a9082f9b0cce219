/** @file A brush and an eraser for what of a picture counts: white there, black elsewhere. */

import { button, h } from "./dom.js";

const MAX_SIDE = 768; // a token of the model covers far more than a pixel of this
const STEPS_KEPT = 20;
const PAINT = "#6d5bff"; // to be seen on any picture; only how much it covers counts

/**
 * Let a mask be painted.
 *
 * @param {string} picture its URL
 * @param {Blob | null} before
 * @returns {Promise<Blob | null | undefined>} the mask, null for none, undefined to leave it as it was
 */
export async function editMask(picture, before) {
  const image = new Image();
  image.src = picture;
  await image.decode();
  const scale = Math.min(1, MAX_SIDE / Math.max(image.naturalWidth, image.naturalHeight));
  const editor = new Editor(Math.round(image.naturalWidth * scale), Math.round(image.naturalHeight * scale));
  if (before) await editor.load(before);
  return new Promise((resolve) => {
    const size = h("input", { type: "range", min: 4, max: 160, value: 48, "aria-label": "Brush size" });
    size.addEventListener("input", () => editor.resize(Number(size.value)));
    editor.resize(48);
    const modes = h("div", { class: "segments", role: "group", "aria-label": "Tool" },
      ...["Brush", "Eraser"].map((name) => h("button", {
        type: "button", "aria-pressed": String(name === "Brush"),
        onclick: (/** @type {MouseEvent} */ event) => {
          editor.isErasing = name === "Eraser";
          for (const each of modes.children) each.setAttribute("aria-pressed", String(each === event.currentTarget));
        },
      }, name)));
    image.alt = "";
    const stage = h("div", { class: "canvas" }, image, editor.canvas, editor.cursor);
    stage.style.setProperty("--ratio", String(image.naturalWidth / image.naturalHeight));
    const dialog = h("dialog", { class: "mask-editor", "aria-label": "Mask" },
      h("header", {}, h("h2", {}, "Paint what counts"), h("p", { class: "hint" },
        "Only what you paint is varied. Keys: arrows move the brush, space paints.")),
      stage,
      h("div", { class: "row tools" }, modes, size,
        button("Undo", "undo", () => editor.undo()),
        button("Invert", "compare", () => editor.invert()),
        button("Clear", "trash", () => editor.clear())),
      h("div", { class: "row end" },
        button("Cancel", "", () => end(undefined)),
        button("Use this mask", "check", async () => end(await editor.mask()), { kind: "primary" })));
    /** @param {Blob | null | undefined} result */
    const end = (result) => {
      dialog.remove();
      resolve(result);
    };
    dialog.addEventListener("cancel", () => end(undefined));
    document.body.append(dialog);
    dialog.showModal();
    editor.canvas.focus();
  });
}

/** @param {number} value @param {number} most */
const within = (value, most) => Math.min(most, Math.max(0, value));

class Editor {
  /** @param {number} width @param {number} height */
  constructor(width, height) {
    this.canvas = h("canvas", {
      width, height, tabindex: 0, role: "application",
      "aria-label": "Mask: arrow keys move the brush, space paints",
    });
    this.cursor = h("span", { class: "brush", "aria-hidden": "true" });
    this.isErasing = false;
    this._size = 48;
    /** @type {ImageData[]} */
    this._before = [];
    /** @type {[number, number]} */
    this._at = [width / 2, height / 2];
    this._context = /** @type {CanvasRenderingContext2D} */ (this.canvas.getContext("2d", { willReadFrequently: true }));
    this._listen();
  }

  /** @param {Blob} mask */
  async load(mask) {
    this._context.drawImage(await createImageBitmap(mask), 0, 0, this.canvas.width, this.canvas.height);
    const { data } = this._pixels();
    this._fill((i) => data[i]);
  }

  /** @param {number} size in pixels of the mask */
  resize(size) {
    this._size = size;
    this._show();
  }

  undo() {
    const last = this._before.pop();
    if (last) this._context.putImageData(last, 0, 0);
  }

  clear() {
    this._remember();
    this._context.clearRect(0, 0, this.canvas.width, this.canvas.height);
  }

  invert() {
    this._remember();
    const { data } = this._pixels();
    this._fill((i) => 255 - data[i + 3]);
  }

  /** Paint anew. @param {(i: number) => number} coverage of the pixel at i, from 0 to 255 */
  _fill(coverage) {
    const pixels = this._pixels();
    for (let i = 0; i < pixels.data.length; i += 4) pixels.data.set([0x6d, 0x5b, 0xff, coverage(i)], i);
    this._context.putImageData(pixels, 0, 0);
  }

  /** White on black as PNG; null where nothing, or all, is painted. @returns {Promise<Blob | null>} */
  async mask() {
    const painted = this._pixels();
    const coverage = painted.data.filter((_, i) => i % 4 === 3 && painted.data[i] > 127).length;
    if (coverage === 0 || coverage * 4 === painted.data.length) return null;
    const out = h("canvas", { width: this.canvas.width, height: this.canvas.height });
    const context = /** @type {CanvasRenderingContext2D} */ (out.getContext("2d"));
    context.drawImage(this.canvas, 0, 0);
    for (const [how, colour] of /** @type {const} */ ([["source-in", "#fff"], ["destination-over", "#000"]])) {
      context.globalCompositeOperation = how;
      context.fillStyle = colour;
      context.fillRect(0, 0, out.width, out.height);
    }
    return new Promise((resolve) => out.toBlob(resolve, "image/png"));
  }

  _pixels() {
    return this._context.getImageData(0, 0, this.canvas.width, this.canvas.height);
  }

  _remember() {
    this._before = [...this._before, this._pixels()].slice(-STEPS_KEPT);
  }

  /** @param {[number, number]} from @param {[number, number]} to */
  _stroke(from, to) {
    const c = this._context;
    c.globalCompositeOperation = this.isErasing ? "destination-out" : "source-over";
    c.strokeStyle = PAINT;
    c.lineCap = c.lineJoin = "round";
    c.lineWidth = this._size;
    c.beginPath();
    c.moveTo(...from);
    c.lineTo(to[0] + 0.01, to[1]);
    c.stroke();
    c.globalCompositeOperation = "source-over";
  }

  /** @param {PointerEvent} event @returns {[number, number]} */
  _place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * this.canvas.width, ((event.clientY - box.top) / box.height) * this.canvas.height];
  }

  _show() {
    const { width, height } = this.canvas;
    Object.assign(this.cursor.style, {
      left: `${(this._at[0] / width) * 100}%`, top: `${(this._at[1] / height) * 100}%`,
      width: `${(this._size / width) * 100}%`,
    });
  }

  _listen() {
    let isPainting = false;
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      isPainting = true;
      this._remember();
      this._at = this._place(event);
      this._stroke(this._at, this._at);
      this._show();
    });
    this.canvas.addEventListener("pointermove", (event) => {
      const to = this._place(event);
      if (isPainting) this._stroke(this._at, to);
      this._at = to;
      this._show();
    });
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => void (isPainting = false));
    this.canvas.addEventListener("keydown", (event) => this._key(event));
  }

  /** @param {KeyboardEvent} event */
  _key(event) {
    const by = Math.max(4, this._size / 2);
    /** @type {Record<string, [number, number]>} */
    const moves = { ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by] };
    const move = moves[event.key];
    if (event.key === " ") {
      this._remember();
      this._stroke(this._at, this._at);
    } else if (move) {
      this._at = [within(this._at[0] + move[0], this.canvas.width), within(this._at[1] + move[1], this.canvas.height)];
      this._show();
    } else return;
    event.preventDefault();
  }
}
