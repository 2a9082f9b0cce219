/** @file Server-sent events, read from a body. `EventSource` cannot send the header with the key. */

/** @typedef {{event: string, data: string, id: string}} ServerEvent */

export class EventParser {
  constructor() {
    this._rest = "";
    this._event = "";
    this._id = "";
    /** @type {string[]} */
    this._data = [];
  }

  /** The events that `text` completes. @param {string} text @returns {ServerEvent[]} */
  feed(text) {
    const lines = (this._rest + text).split(/\r\n|\n|\r(?!$)/);
    this._rest = lines.pop() ?? "";
    /** @type {ServerEvent[]} */
    const found = [];
    for (const line of lines) {
      if (line !== "") this._take(line);
      else {
        if (this._data.length)
          found.push({ event: this._event || "message", data: this._data.join("\n"), id: this._id });
        this._event = "";
        this._data = [];
      }
    }
    return found;
  }

  /** @param {string} line */
  _take(line) {
    const colon = line.indexOf(":");
    if (colon === 0) return;
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "event") this._event = value;
    else if (field === "data") this._data.push(value);
    else if (field === "id") this._id = value;
  }
}
