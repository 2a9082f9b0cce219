/**
 * @file The form of a task's parameters, made of the model's JSON schema: a field that the API gets
 * later appears by itself. Pictures, and what the page decides itself, are not in it.
 */

import { button, h, icon } from "./dom.js";
import { label, sides } from "./words.js";

const NOT_HERE = new Set([
  "image", "images", "image_weights", "mask", "webhook", "webhook_url",
  "enable_sync_mode", "enable_base64_output", "enable_preview",
]);
/** Where a field stands; the rest is in the last group. @type {[string, string[]][]} */
const GROUPS = [
  ["", ["prompt", "size", "num_images", "seed"]],
  ["What of the picture counts", ["redux_strength", "redux_pooling", "fit", "empty_prompt"]],
  ["Quality and time", ["quality", "num_inference_steps", "guidance_scale"]],
  ["Output", []],
];
/** Useful strengths are factors: see docs/guide/controls.md. */
const SCALES = /** @type {Record<string, number[]>} */ ({
  redux_strength: [0, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10],
});
const SIZES = ["1024*1024", "1152*896", "896*1152", "1344*768", "768*1344", "1536*640", "512*512"];

/**
 * A field's element, and its value: undefined where it has none, and the default's is of no account.
 * @typedef {{element: HTMLElement, get: () => any, set: (value: any) => void}} Field
 */

export class ParameterForm {
  /**
   * @param {any} schema
   * @param {HTMLElement} place
   * @param {() => void} changed
   */
  constructor(schema, place, changed) {
    /** @type {Record<string, any>} */
    this.properties = schema.properties;
    /** @type {Map<string, Field>} */
    this._fields = new Map();
    const order = (schema["x-order-properties"] ?? Object.keys(this.properties)).filter(
      (/** @type {string} */ name) => name in this.properties && !NOT_HERE.has(name),
    );
    const grouped = new Set(GROUPS.flatMap(([, names]) => names));
    for (const [title, names] of GROUPS) {
      const members = title === "Output" ? order.filter((/** @type {string} */ each) => !grouped.has(each))
        : names.filter((name) => order.includes(name));
      const fields = members.map((/** @type {string} */ name) => this._field(name, changed));
      if (!title) place.append(...fields);
      else if (fields.length) place.append(this._group(title, members, fields));
    }
    place.addEventListener("input", changed);
    place.addEventListener("change", changed);
  }

  /** What differs from the defaults. @returns {Record<string, any>} */
  values() {
    /** @type {Record<string, any>} */
    const found = {};
    for (const [name, field] of this._fields) {
      const value = field.get();
      if (value !== undefined && value !== this.properties[name].default) found[name] = value;
    }
    return found;
  }

  /** The value of a field, be it the default. @param {string} name */
  value(name) {
    return this._fields.get(name)?.get() ?? this.properties[name]?.default;
  }

  /** @param {string} name */
  has = (name) => this._fields.has(name);

  /** Set some fields, the others to their defaults. @param {Record<string, any>} values */
  restore(values) {
    for (const [name, field] of this._fields) field.set(values[name] ?? this.properties[name].default);
  }

  /** @param {string} name @param {any} value */
  set(name, value) {
    this._fields.get(name)?.set(value);
  }

  /** @param {string} title @param {string[]} names @param {HTMLElement[]} fields */
  _group(title, names, fields) {
    const told = h("span", { class: "changes" });
    const group = h("details", { class: "group" }, h("summary", {}, h("span", {}, title), told),
      h("div", { class: "fields" }, ...fields));
    const tell = () => {
      const changed = this.values();
      told.textContent = names.filter((name) => name in changed)
        .map((name) => `${label(name)} ${changed[name]}`).join(", ");
    };
    group.addEventListener("input", tell);
    group.addEventListener("change", tell);
    group.addEventListener("told", tell);
    return group;
  }

  /** @param {string} name @param {() => void} changed */
  _field(name, changed) {
    const schema = this.properties[name];
    const id = `field-${name}`;
    const field = fieldOf(name, schema, id);
    const set = field.set;
    field.set = (value) => {
      set(value);
      field.element.dispatchEvent(new Event("told", { bubbles: true }));
      field.element.closest(".group")?.dispatchEvent(new Event("told"));
      changed();
    };
    set(schema.default);
    this._fields.set(name, field);
    return field.element;
  }
}

/** @param {string} name @param {any} schema @param {string} id @returns {Field} */
function fieldOf(name, schema, id) {
  if (name === "prompt") return prompt(schema, id);
  if (name === "size") return size(schema, id);
  if (name === "seed") return seed(schema, id);
  if (schema.enum) return choice(name, schema, schema.enum);
  if (schema.type === "boolean") return toggle(name, schema, id);
  if (schema.type === "integer" || schema.type === "number") {
    const { minimum, maximum } = schema;
    if (schema.type === "integer" && maximum - minimum < 6)
      return choice(name, schema, Array.from({ length: maximum - minimum + 1 }, (_, i) => minimum + i));
    return number(name, schema, id);
  }
  return schema.type === "string" ? text(name, schema, id) : json(name, schema, id);
}

/** @param {string} name @param {any} schema @param {string} id @param {...(Node | null)} inner */
function labelled(name, schema, id, ...inner) {
  return h("div", { class: `field field-${name}` },
    h("label", { for: id, title: schema.description }, label(name)), ...inner,
    h("p", { class: "hint", id: `${id}-hint` }, schema.description ?? ""));
}

/** @param {any} schema @param {string} id @returns {Field} */
function prompt(schema, id) {
  const area = h("textarea", {
    id, rows: 2, dir: "auto", maxlength: schema.maxLength, "aria-describedby": `${id}-hint`,
    placeholder: "Optional: what the variation should also show", spellcheck: "true",
  });
  return { element: labelled("prompt", schema, id, area), get: () => area.value, set: (value) => void (area.value = value ?? "") };
}

/** @param {string} name @param {any} schema @param {string} id @returns {Field} */
function text(name, schema, id) {
  const input = h("input", { id, type: "text", dir: "auto", maxlength: schema.maxLength, "aria-describedby": `${id}-hint` });
  return { element: labelled(name, schema, id, input), get: () => input.value || undefined, set: (value) => void (input.value = value ?? "") };
}

/** Whatever has no field of its own, as JSON. @param {string} name @param {any} schema @param {string} id @returns {Field} */
function json(name, schema, id) {
  const input = h("input", { id, type: "text", placeholder: "JSON", "aria-describedby": `${id}-hint` });
  const read = () => {
    try {
      input.setCustomValidity("");
      const value = input.value.trim() ? JSON.parse(input.value) : undefined;
      return JSON.stringify(value) === JSON.stringify(schema.default) ? undefined : value;
    } catch {
      input.setCustomValidity("This is no JSON.");
      return undefined;
    }
  };
  return { element: labelled(name, schema, id, input), get: read, set: (value) => void (input.value = value === undefined ? "" : JSON.stringify(value)) };
}

/** @param {string} name @param {any} schema @param {string} id @returns {Field} */
function toggle(name, schema, id) {
  const box = h("input", { id, type: "checkbox", role: "switch", "aria-describedby": `${id}-hint` });
  const element = h("div", { class: "field switch" }, box, h("label", { for: id, title: schema.description }, label(name)),
    h("p", { class: "hint", id: `${id}-hint` }, schema.description ?? ""));
  return { element, get: () => box.checked, set: (value) => void (box.checked = Boolean(value)) };
}

/** A few values side by side; without a default, none may be chosen. @param {string} name @param {any} schema @param {any[]} values @returns {Field} */
function choice(name, schema, values) {
  const all = schema.default === undefined ? [undefined, ...values] : values;
  const inputs = all.map((value) =>
    h("input", { type: "radio", name, value: value === undefined ? "" : String(value), class: "unseen" }));
  const element = h("fieldset", { class: `field field-${name}` },
    h("legend", { title: schema.description }, label(name)),
    h("div", { class: "segments" }, ...inputs.map((input, i) =>
      h("label", {}, input, h("span", {}, all[i] === undefined ? "as the server" : String(all[i]))))),
    h("p", { class: "hint" }, schema.description ?? ""));
  return {
    element,
    get: () => all[inputs.findIndex((each) => each.checked)],
    set: (value) => inputs.forEach((each, i) => void (each.checked = all[i] === value)),
  };
}

/** A slider and the number itself. @param {string} name @param {any} schema @param {string} id @returns {Field} */
function number(name, schema, id) {
  const { minimum, maximum } = schema;
  const step = schema.type === "integer" ? 1 : "any";
  const input = h("input", { id, type: "number", min: minimum, max: maximum, step, required: true, inputmode: "decimal", "aria-describedby": `${id}-hint` });
  const scale = SCALES[name];
  const isBounded = minimum !== undefined && maximum !== undefined;
  const slider = isBounded ? h("input", {
    type: "range", "aria-label": `${label(name)}, slider`,
    min: scale ? 0 : minimum, max: scale ? scale.length - 1 : maximum, step: scale || step === 1 ? 1 : 0.1,
  }) : null;
  const place = (/** @type {number} */ value) => {
    if (!slider) return;
    slider.value = String(scale ? nearest(scale, value) : value);
    slider.setAttribute("aria-valuetext", String(value));
  };
  slider?.addEventListener("input", () => {
    input.value = String(scale ? scale[Number(slider.value)] : Number(slider.value));
    slider.setAttribute("aria-valuetext", input.value);
  });
  input.addEventListener("input", () => place(Number(input.value)));
  return {
    element: labelled(name, schema, id, h("div", { class: "number" }, slider, input)),
    get: () => (input.value === "" || !input.checkValidity() ? undefined : Number(input.value)),
    set: (value) => {
      input.value = value === undefined ? "" : String(value);
      place(Number(value ?? minimum));
    },
  };
}

/** @param {number[]} scale @param {number} value */
function nearest(scale, value) {
  return scale.reduce((best, each, i) => (Math.abs(each - value) < Math.abs(scale[best] - value) ? i : best), 0);
}

/** @param {any} schema @param {string} id @returns {Field} */
function size(schema, id) {
  const [low, high] = (schema.description?.match(/(\d+) ~ (\d+)/) ?? [0, 512, 1536]).slice(1).map(Number);
  const side = (/** @type {string} */ name) =>
    h("input", { type: "number", min: low, max: high, step: 1, required: true, "aria-label": name, inputmode: "numeric" });
  const width = side("Width"), height = side("Height");
  width.id = id;
  const offered = SIZES.filter((each) => sides(each).every((pixels) => pixels >= low && pixels <= high));
  const presets = offered.map((preset) => {
    const [w, hgt] = sides(preset);
    const shape = h("span", { class: "shape" });
    shape.style.aspectRatio = `${w} / ${hgt}`;
    shape.style[w >= hgt ? "width" : "height"] = preset === "512*512" ? "0.6em" : "1.1em";
    const press = h("button", { type: "button", class: "preset", title: `${w} × ${hgt}`, "aria-label": `${w} by ${hgt}` }, shape);
    press.addEventListener("click", () => {
      set(preset);
      press.dispatchEvent(new Event("change", { bubbles: true }));
    });
    return press;
  });
  const mark = () => presets.forEach((each, i) => each.setAttribute("aria-pressed", String(offered[i] === get())));
  const get = () => (width.checkValidity() && height.checkValidity() ? `${width.value}*${height.value}` : undefined);
  const set = (/** @type {string} */ value) => {
    [width.value, height.value] = sides(value ?? "1024*1024").map(String);
    mark();
  };
  const swap = button("Swap width and height", "reuse", () => {
    [width.value, height.value] = [height.value, width.value];
    mark();
    width.dispatchEvent(new Event("input", { bubbles: true }));
  }, { bare: true });
  for (const each of [width, height]) each.addEventListener("input", mark);
  const element = h("fieldset", { class: "field field-size" }, h("legend", { title: schema.description }, "Size"),
    h("div", { class: "presets" }, ...presets),
    h("div", { class: "sides" }, width, h("span", { "aria-hidden": "true" }, "×"), height, swap));
  return { element, get, set };
}

/** @param {any} schema @param {string} id @returns {Field & {isLocked?: () => boolean}} */
function seed(schema, id) {
  const input = h("input", { id, type: "number", min: 0, max: schema.maximum, step: 1, placeholder: "a new one each time", inputmode: "numeric", "aria-describedby": `${id}-hint` });
  const lock = h("button", { type: "button", class: "button bare lock", "aria-pressed": "false" });
  const mark = () => {
    const isLocked = input.value !== "";
    lock.setAttribute("aria-pressed", String(isLocked));
    lock.replaceChildren(icon(isLocked ? "lock" : "unlock"), h("span", { class: "unseen" }, "Keep the seed"));
    lock.title = isLocked ? "Kept: each task uses this seed" : "Keep one seed for all tasks";
  };
  lock.addEventListener("click", () => {
    input.value = input.value === "" ? String(Math.floor(Math.random() * 2 ** 31)) : "";
    mark();
    input.dispatchEvent(new Event("input", { bubbles: true }));
  });
  input.addEventListener("input", mark);
  return {
    element: labelled("seed", schema, id, h("div", { class: "row" }, input, lock)),
    get: () => (input.value === "" || !input.checkValidity() ? -1 : Number(input.value)),
    set: (value) => {
      input.value = value === undefined || value < 0 ? "" : String(value);
      mark();
    },
  };
}
