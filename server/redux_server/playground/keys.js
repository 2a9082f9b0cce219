/**
 * @file The API key: from the address once, kept for this tab, or for this device if that is asked.
 *
 * It is in no request but in the header of those to the API, and in no link that the page makes.
 */

const NAME = "flux-redux-key";

/** @typedef {Pick<Storage, "getItem" | "setItem" | "removeItem">} Store */

export class Key {
  /** @param {Store} tab @param {Store} device */
  constructor(tab, device) {
    this._tab = tab;
    this._device = device;
  }

  /** The key, or "" where there is none. */
  get value() {
    return this._tab.getItem(NAME) ?? this._device.getItem(NAME) ?? "";
  }

  get isRemembered() {
    return this._device.getItem(NAME) !== null;
  }

  /** @param {string} value @param {boolean} isRemembered on this device */
  keep(value, isRemembered) {
    this.forget();
    (isRemembered ? this._device : this._tab).setItem(NAME, value);
  }

  forget() {
    this._tab.removeItem(NAME);
    this._device.removeItem(NAME);
  }

  /**
   * Take the key out of an address's fragment (`#key=…`); returns what is left of the fragment.
   *
   * @param {string} fragment
   */
  takeFrom(fragment) {
    const given = new URLSearchParams(fragment.replace(/^#/, ""));
    const key = given.get("key")?.trim();
    if (key) this.keep(key, false);
    given.delete("key");
    const rest = given.toString();
    return rest ? `#${rest}` : "";
  }
}

/** What a browser that forbids storage is given instead. @returns {Store} */
function memory() {
  /** @type {Map<string, string>} */
  const values = new Map();
  return {
    getItem: (name) => values.get(name) ?? null,
    setItem: (name, value) => void values.set(name, value),
    removeItem: (name) => void values.delete(name),
  };
}

/** @param {() => Store} open @returns {Store} */
export function storeOr(open) {
  try {
    const store = open();
    store.getItem(NAME);
    return store;
  } catch {
    return memory();
  }
}
