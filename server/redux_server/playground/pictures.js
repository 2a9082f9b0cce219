/**
 * @file The pictures to vary: dropped, pasted, chosen, photographed, or by their links; each with a
 * weight, the first with a mask. They are uploaded once, when a task first needs them.
 */

import { button, h, icon, toast } from "./dom.js";
import { editMask } from "./mask.js";

const MAX_BYTES = 20 * 2 ** 20; // what a server takes by default
const MAX_SIDE = 4096;
const TAKEN = new Set(["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/avif"]);
/** What a server takes and few browsers show: sent as it is, with its name in the place of a preview. */
const UNSEEN = /\.(heic|heif|tiff?)$/i;
const UNSEEN_TYPES = /^image\/(hei[cf]|tiff)$/;
const ACCEPT = "image/*,.heic,.heif,.tif,.tiff";

/**
 * @typedef {object} Picture
 * @property {string} name
 * @property {Blob | null} file null for a link
 * @property {string} url the link, or where it was uploaded; "" before
 * @property {string} shown what the page may show: never another host's
 * @property {number} weight
 * @property {Blob | null} mask
 * @property {string} maskUrl
 */

export class Pictures {
  /**
   * @param {HTMLElement} place
   * @param {{changed: () => void, fit: () => string, most: number}} how
   */
  constructor(place, how) {
    this._place = place;
    this._how = how;
    /** @type {Picture[]} */
    this.all = [];
    this._input = h("input", { type: "file", multiple: true, accept: ACCEPT, "aria-label": "Picture", title: "" });
    this._input.addEventListener("change", () => {
      this.add([...(this._input.files ?? [])]);
      this._input.value = "";
    });
    this._camera = h("input", { type: "file", accept: "image/*", capture: "environment", hidden: true });
    this._camera.addEventListener("change", () => {
      this.add([...(this._camera.files ?? [])]);
      this._camera.value = "";
    });
    this._link = this._linkForm();
    this._listen();
    this.show();
  }

  /** @param {Iterable<File>} files */
  async add(files) {
    for (const file of files) {
      if (!this._hasRoom()) return;
      try {
        const ready = await readable(file);
        this._put({ name: file.name || "picture", file: ready, url: "", shown: URL.createObjectURL(ready) });
      } catch {
        if (isUnseen(file) && file.size <= MAX_BYTES) {
          this._put({ name: file.name || "picture", file, url: "", shown: "" });
          continue;
        }
        toast(`${file.name || "This file"} is no picture that this browser can read.`);
      }
    }
  }

  /** @param {string} url @param {string} [name] */
  addLink(url, name = "") {
    if (!this._hasRoom()) return;
    if (!/^https?:\/\//i.test(url)) return toast("A link begins with http:// or https://.");
    const isOurs = new URL(url).origin === location.origin;
    this._put({ name: name || new URL(url).hostname, file: null, url, shown: isOurs ? url : "" });
  }

  /** Put one in the place of all. @param {string} url @param {string} name */
  replaceBy(url, name) {
    this._forget(...this.all.splice(0));
    this.addLink(url, name);
  }

  /**
   * Their parameters; what is not on the server yet is uploaded.
   *
   * @param {import("./api.js").Api} api
   * @param {AbortSignal} [signal]
   * @returns {Promise<Record<string, any>>}
   */
  async parameters(api, signal) {
    for (const each of this.all) {
      if (!each.url && each.file) each.url = await api.upload(each.file, safeName(each), signal);
      if (each.mask && !each.maskUrl) each.maskUrl = await api.upload(each.mask, "mask.png", signal);
    }
    return this.told();
  }

  /** The parameters with what is known of the links now. @returns {Record<string, any>} */
  told() {
    const [first, ...rest] = this.all;
    const weights = this.all.map((each) => each.weight);
    return {
      ...(first ? { image: first.url || first.name } : {}),
      ...(rest.length ? { images: rest.map((each) => each.url || each.name) } : {}),
      ...(weights.some((each) => each !== 1) ? { image_weights: weights } : {}),
      ...(first?.mask ? { mask: first.maskUrl || "mask.png" } : {}),
    };
  }

  /** Upload all of them again next time: the server no longer has them. */
  forgetUploads() {
    for (const each of this.all) {
      if (each.file) each.url = "";
      each.maskUrl = "";
    }
  }

  show() {
    const isEmpty = this.all.length === 0;
    const hasFocus = this._place.contains(document.activeElement);
    const isFull = this.all.length >= this._how.most;
    const drop = h("label", { class: isEmpty ? "drop" : "drop small" }, this._input, icon(isEmpty ? "image" : "plus"),
      isEmpty ? h("strong", {}, "Drop a picture here") : h("span", {}, "Add another"),
      isEmpty ? h("span", {}, "or paste one, or click to choose") : null);
    drop.hidden = isFull;
    this._place.replaceChildren(
      h("div", { class: "tiles", "data-count": this.all.length }, ...this.all.map((each, i) => this._tile(each, i)), drop),
      this._camera,
      h("div", { class: "row sources" },
        button("Photograph", "camera", () => this._camera.click(), { kind: "quiet on-touch" }),
        isEmpty ? button("Try a sample", "sparkle", () => void this._sample(), { kind: "quiet" }) : null,
        button("Use a link", "link", () => {
          this._link.hidden = !this._link.hidden;
          this._link.querySelector("input")?.focus();
        }, { kind: "quiet" })),
      this._link,
    );
    if (hasFocus && !this._place.contains(document.activeElement)) this._input.focus();
  }

  /** @param {Picture} picture @param {number} index */
  _tile(picture, index) {
    const name = this.all.length > 1 ? `picture ${index + 1}` : "the picture";
    const image = picture.shown
      ? h("img", { src: picture.shown, alt: picture.name, class: `seen ${this._how.fit()}` })
      : h("span", { class: "elsewhere" }, icon(picture.file ? "image" : "link"), picture.name);
    const weight = h("input", { type: "range", min: 0, max: 2, step: 0.05, value: picture.weight, "aria-label": `Weight of picture ${index + 1}` });
    const told = h("output", {}, picture.weight.toFixed(2));
    weight.addEventListener("input", () => {
      picture.weight = Number(weight.value);
      told.value = picture.weight.toFixed(2);
      this._how.changed();
    });
    return h("div", { class: "tile" },
      h("div", { class: "frame" }, image,
        picture.mask ? h("img", { class: `mask seen ${this._how.fit()}`, src: URL.createObjectURL(picture.mask), alt: "Mask: what counts is white" }) : null),
      button(`Remove ${name}`, "close", () => this._remove(index), { bare: true, kind: "corner" }),
      index === 0 && picture.shown
        ? button(picture.mask ? "Edit mask" : "Mask", "brush", () => void this._mask(picture), { kind: "on-picture", title: "Paint what of the picture counts" })
        : null,
      this.all.length > 1 ? h("div", { class: "weight" }, weight, told) : null);
  }

  /** @param {Pick<Picture, "name" | "file" | "url" | "shown">} picture */
  _put(picture) {
    this.all.push({ ...picture, weight: 1, mask: null, maskUrl: "" });
    this.show();
    this._how.changed();
  }

  /** @param {number} index */
  _remove(index) {
    this._forget(...this.all.splice(index, 1));
    this.show();
    this._how.changed();
  }

  /** @param {...Picture} pictures */
  _forget(...pictures) {
    for (const each of pictures) if (each.file && each.shown) URL.revokeObjectURL(each.shown);
  }

  _hasRoom() {
    if (this.all.length < this._how.most) return true;
    toast(`At most ${this._how.most} pictures at a time.`);
    return false;
  }

  /** @param {Picture} picture */
  async _mask(picture) {
    const made = await editMask(picture.shown, picture.mask);
    if (made === undefined) return;
    picture.mask = made;
    picture.maskUrl = "";
    this.show();
    this._how.changed();
  }

  async _sample() {
    const response = await fetch("playground/sample.png");
    this.add([new File([await response.blob()], "sample.png", { type: "image/png" })]);
  }

  _linkForm() {
    const field = h("input", { type: "url", placeholder: "https://example.com/photo.jpg", "aria-label": "Link to a picture" });
    const form = h("form", { class: "row link", hidden: true }, field, h("button", { class: "button" }, "Add"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim()) this.addLink(field.value.trim());
      field.value = "";
    });
    return form;
  }

  _listen() {
    document.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])].filter((each) => each.type.startsWith("image/") || isUnseen(each));
      if (files.length) this.add(files);
      else if (!isTyping(event.target)) {
        const text = event.clipboardData?.getData("text/plain").trim() ?? "";
        if (/^https?:\/\/\S+$/.test(text)) this.addLink(text);
      }
    });
    document.addEventListener("dragover", (event) => {
      event.preventDefault();
      document.body.classList.add("dragging");
    });
    for (const name of ["dragleave", "drop", "dragend"])
      document.addEventListener(name, (event) => {
        if (name !== "dragleave" || /** @type {DragEvent} */ (event).relatedTarget === null)
          document.body.classList.remove("dragging");
      });
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      const files = [...(event.dataTransfer?.files ?? [])];
      const link = event.dataTransfer?.getData("text/uri-list").split(/\r?\n/)[0] ?? "";
      if (files.length) this.add(files);
      else if (link) this.addLink(link);
    });
  }
}

/** @param {EventTarget | null} target */
const isTyping = (target) => target instanceof HTMLInputElement || target instanceof HTMLTextAreaElement;

/** @param {File} file */
const isUnseen = (file) => UNSEEN.test(file.name) || UNSEEN_TYPES.test(file.type);

/** @param {Picture} picture */
function safeName(picture) {
  const unseen = picture.shown ? null : UNSEEN.exec(picture.name);
  if (unseen) return `picture${unseen[0].toLowerCase()}`;
  const kind = picture.file?.type.split("/")[1]?.replace("jpeg", "jpg") ?? "png";
  return `picture.${kind}`;
}

/**
 * The file if a server takes it as it is, or else drawn anew as JPEG, smaller if need be.
 *
 * @param {File} file
 * @returns {Promise<Blob>}
 */
async function readable(file) {
  const picture = await createImageBitmap(file);
  const isTaken = TAKEN.has(file.type) && file.size <= MAX_BYTES && picture.width * picture.height <= 40e6;
  if (isTaken) return file;
  const scale = Math.min(1, MAX_SIDE / Math.max(picture.width, picture.height));
  const canvas = h("canvas", { width: Math.round(picture.width * scale), height: Math.round(picture.height * scale) });
  canvas.getContext("2d")?.drawImage(picture, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve, reject) =>
    canvas.toBlob((made) => (made ? resolve(made) : reject(new Error("no picture"))), "image/jpeg", 0.95));
}
