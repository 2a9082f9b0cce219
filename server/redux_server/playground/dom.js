/** @file Makes elements. Text is always set as text, never as HTML. */

/** @typedef {Node | string | null | undefined | false} Child */

/**
 * An element with attributes and children. `on…` are listeners, `class` and `for` the attributes of
 * those names; `true` is an attribute without a value, `false` and null none at all.
 *
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, any>} [attributes]
 * @param {...Child} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" && "value" in element) /** @type {any} */ (element).value = value;
    else if (value !== false && value !== null && value !== undefined)
      element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((each) => each !== null && each !== undefined && each !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** Paths of the icons, on a grid of 24 with round strokes. @type {Record<string, string>} */
const ICONS = {
  image: "M4 5h16v14H4z M4 16l5-5 4 4 3-3 4 4 M15.5 9.5h.01",
  plus: "M12 5v14 M5 12h14",
  close: "M6 6l12 12 M18 6L6 18",
  key: "M14.5 9.5a4 4 0 1 0-3 3.9L13 15h2v2h2v2h3v-3l-5.6-5.6",
  brush: "M4 20c3 0 5-1 5-3.5A2.5 2.5 0 0 0 4 17c0 1 .5 2-1 3z M9 15L19 4l1 1L10 16",
  download: "M12 4v11 M7 11l5 5 5-5 M5 20h14",
  reuse: "M4 12a8 8 0 0 1 14-5l2 2 M20 4v5h-5 M20 12a8 8 0 0 1-14 5l-2-2 M4 20v-5h5",
  code: "M8 7l-5 5 5 5 M16 7l5 5-5 5",
  link: "M10 14a4 4 0 0 0 6 .5l3-3a4 4 0 0 0-6-6l-1.5 1.5 M14 10a4 4 0 0 0-6-.5l-3 3a4 4 0 0 0 6 6L12.5 17",
  trash: "M5 7h14 M9 7V4h6v3 M7 7l1 13h8l1-13 M10.5 11v5 M13.5 11v5",
  dice: "M5 5h14v14H5z M9 9h.01 M15 15h.01 M12 12h.01",
  lock: "M6 11h12v9H6z M8.5 11V8a3.5 3.5 0 0 1 7 0v3",
  unlock: "M6 11h12v9H6z M8.5 11V8a3.5 3.5 0 0 1 6.7-1.4",
  grid: "M4 4h6v6H4z M14 4h6v6h-6z M4 14h6v6H4z M14 14h6v6h-6z",
  columns: "M4 5h5v14H4z M10 5h4v14h-4z M15 5h5v14h-5z",
  compare: "M12 3v18 M4 6h5v12H4 M20 6h-5v12h5",
  camera: "M4 8h3l2-3h6l2 3h3v11H4z M12 16.5a3.5 3.5 0 1 0 0-7 3.5 3.5 0 0 0 0 7z",
  again: "M20 12a8 8 0 1 1-2.5-5.8 M20 4v4.5h-4.5",
  sparkle: "M12 3l1.8 5.2L19 10l-5.2 1.8L12 17l-1.8-5.2L5 10l5.2-1.8z M19 16v4 M17 18h4",
  expand: "M4 9V4h5 M15 4h5v5 M20 15v5h-5 M9 20H4v-5",
  left: "M15 5l-7 7 7 7",
  right: "M9 5l7 7-7 7",
  minus: "M5 12h14",
  undo: "M8 5L4 9l4 4 M4 9h10a5 5 0 0 1 0 10H9",
  warning: "M12 4l9 16H3z M12 10v4 M12 17h.01",
  check: "M5 13l4 4L19 7",
  eraser: "M8 19h12 M4 15l9-10 6 6-8 8H8z",
  sliders: "M4 7h10 M18 7h2 M4 17h2 M10 17h10 M16 5v4 M8 15v4",
};

/** A drawing that says nothing to a screen reader: its button does. @param {string} name */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of Object.entries({
    viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true", focusable: "false",
  }))
    svg.setAttribute(key, value);
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name] ?? "");
  svg.append(path);
  return svg;
}

/**
 * A button with an icon and a name; with `bare` the name is read but not shown.
 *
 * @param {string} name
 * @param {string} drawing
 * @param {(event: MouseEvent) => void} press
 * @param {{bare?: boolean, kind?: string, title?: string, attributes?: Record<string, any>}} [how]
 */
export function button(name, drawing, press, how = {}) {
  const shown = how.bare ? h("span", { class: "unseen" }, name) : name;
  return h(
    "button",
    {
      type: "button", class: `button ${how.bare ? "bare " : ""}${how.kind ?? ""}`,
      title: how.title ?? (how.bare ? name : null), onclick: press, ...how.attributes,
    },
    drawing ? icon(drawing) : null,
    shown,
  );
}

/** @param {string} selector @returns {HTMLElement} */
export function find(selector) {
  const found = document.querySelector(selector);
  if (!(found instanceof HTMLElement)) throw new Error(`the page has no ${selector}`);
  return found;
}

/** Say something for a few seconds, to eyes and to screen readers. @param {string} text */
export function toast(text) {
  const place = find("#toasts");
  const shown = h("div", { class: "toast" }, text);
  place.append(shown);
  setTimeout(() => shown.remove(), 4000);
}

/** @param {string} text @param {string} what what was copied, to be told */
export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    toast(`${what} copied`);
  } catch {
    // Without https there is no clipboard: let it be copied by hand.
    const field = h("textarea", { class: "copied", readonly: true, "aria-label": what });
    field.value = text;
    const dialog = h("dialog", { class: "small", "aria-label": "Copy by hand" },
      h("p", {}, "This browser lets only https pages copy. Copy it by hand:"), field,
      h("form", { method: "dialog" }, h("button", { class: "button" }, "Close")));
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
    field.select();
  }
}
