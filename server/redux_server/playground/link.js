/** @file Links that restore a task's parameters: never the key, never a picture. */

const LEFT_OUT = new Set(["image", "images", "image_weights", "mask", "webhook", "webhook_url", "enable_preview", "key"]);

/** @param {string} page the page's address @param {Record<string, any>} input */
export function linkTo(page, input) {
  const told = Object.entries(input).filter(([name]) => !LEFT_OUT.has(name));
  const fragment = new URLSearchParams(told.map(([name, value]) => [name, String(value)]));
  return `${page.split("#")[0]}#${fragment}`;
}

/**
 * The parameters of a link, as the schema has them; others are passed over.
 *
 * @param {string} fragment
 * @param {Record<string, any>} properties of the JSON schema
 */
export function parametersOf(fragment, properties) {
  /** @type {Record<string, any>} */
  const found = {};
  for (const [name, text] of new URLSearchParams(fragment.replace(/^#/, ""))) {
    const type = properties[name]?.type;
    if (LEFT_OUT.has(name) || !type) continue;
    if (type === "boolean") found[name] = text === "true";
    else if (type === "string") found[name] = text;
    else if ((type === "number" || type === "integer") && text !== "" && Number.isFinite(Number(text)))
      found[name] = Number(text);
  }
  return found;
}
