/** @file The page: puts its parts together, and does what its buttons say. */

import { Api, ApiError } from "./api.js";
import { card, group, statusOf } from "./cards.js";
import { button, copy, find, h, toast } from "./dom.js";
import { ParameterForm } from "./form.js";
import { Key, storeOr } from "./keys.js";
import { linkTo, parametersOf } from "./link.js";
import { Pictures } from "./pictures.js";
import { Run, said } from "./runs.js";
import { SNIPPETS } from "./snippets.js";
import { view } from "./viewer.js";
import { counted, Estimate } from "./words.js";

const GRID = { redux_strength: [1, 0.25, 0.05], redux_pooling: [27, 6, 2] };
const PAGE_SIZE = 12;

const base = new URL(".", location.href.split("#")[0]).href;
const key = new Key(storeOr(() => sessionStorage), storeOr(() => localStorage));
let fragment = key.takeFrom(location.hash);
if (fragment !== location.hash) history.replaceState(null, "", location.pathname + location.search + fragment);
const api = new Api(base, () => key.value);
const estimate = new Estimate();
/** @type {ParameterForm | null} */
let form = null;
/** @type {Set<Run>} */
const runs = new Set();
/** @type {Map<string, HTMLElement>} */
const cardsById = new Map();
/** @type {{url: string, name: string}[]} */
let chosen = [];
let historyPage = 0;
let historyBefore = "";

const results = find("#cards");
const generate = /** @type {HTMLButtonElement} */ (find("#generate"));
const status = find("#status");
const pictures = new Pictures(find("#pictures"), {
  changed: () => changed(), fit: () => form?.value("fit") ?? "squash", most: 4,
});

// --- the key ---------------------------------------------------------------------------------------

const keyPanel = /** @type {HTMLDialogElement} */ (find("#key-panel"));
const keyField = /** @type {HTMLInputElement} */ (find("#key"));
const keyProblem = find("#key-problem");
const remember = /** @type {HTMLInputElement} */ (find("#remember"));

/** @param {string} [problem] */
function askKey(problem = "") {
  keyProblem.textContent = problem;
  keyField.setAttribute("aria-invalid", String(problem !== ""));
  keyField.value = key.value;
  remember.checked = key.isRemembered;
  find("#forget").hidden = key.value === "";
  if (!keyPanel.open) keyPanel.show();
  find("#key-button").setAttribute("aria-expanded", "true");
  keyField.focus();
  keyField.select();
}

function closeKey() {
  keyPanel.close();
  find("#key-button").setAttribute("aria-expanded", "false");
}

find("#key-button").addEventListener("click", () => (keyPanel.open ? closeKey() : askKey()));
keyPanel.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && key.value) {
    closeKey();
    find("#key-button").focus();
  }
});
find("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const value = keyField.value.trim();
  if (!value) return askKey("Enter a key first.");
  key.keep(value, remember.checked);
  void enter();
});
find("#show-key").addEventListener("click", () => {
  const isShown = keyField.type === "text";
  keyField.type = isShown ? "password" : "text";
  find("#show-key").setAttribute("aria-pressed", String(!isShown));
});
find("#forget").addEventListener("click", () => {
  key.forget();
  for (const run of runs) run.stop();
  runs.clear();
  cardsById.clear();
  results.replaceChildren();
  find("#more").hidden = true;
  tell();
  askKey();
});

/** Look whether the key is good; then show the form and the history. */
async function enter() {
  if (!key.value) {
    document.body.classList.add("keyless");
    return askKey();
  }
  try {
    const schema = await api.schema();
    document.body.classList.remove("keyless");
    closeKey();
    if (!form) makeForm(schema);
    pictures.forgetUploads();
    await showHistory(true);
  } catch (error) {
    if (error instanceof ApiError && error.status === 401)
      askKey("This key is unknown or was revoked. `flux-redux keys create --name me` makes one.");
    else {
      offline(said(error));
      setTimeout(() => void enter(), 2000);
    }
  }
}

// --- the form --------------------------------------------------------------------------------------

/** @param {any} schema */
function makeForm(schema) {
  form = new ParameterForm(schema, find("#parameters"), changed);
  find("#waiting-for-form").hidden = true;
  form.restore(parametersOf(fragment, form.properties));
  for (const [id, names] of Object.entries({ "#grid": ["redux_strength", "redux_pooling"], "#tiers": ["quality"] }))
    find(id).hidden = names.some((name) => !(name in schema.properties));
  changed();
}

function changed() {
  const hasPictures = pictures.all.length > 0;
  generate.setAttribute("aria-disabled", String(!hasPictures || !form));
  const fit = form?.value("fit") ?? "squash";
  for (const each of document.querySelectorAll(".seen")) {
    each.classList.remove("squash", "letterbox", "center");
    each.classList.add(fit);
  }
}

/** All that the form and the pictures say; these are uploaded, so that code with their links works. */
async function wanted() {
  const told = await pictures.parameters(api).catch(() => pictures.told());
  return { ...told, ...form?.values() };
}

/** Whether there is anything to send; says what is missing. */
function isReady() {
  const element = /** @type {HTMLFormElement} */ (find("#form"));
  if (!key.value) askKey("A key is needed to generate.");
  else if (!form) toast("The server has not answered yet.");
  else if (!pictures.all.length) {
    say("Choose a picture first.");
    find("#pictures input[type=file]").focus();
  } else if (!element.checkValidity()) {
    const wrong = element.querySelector(":invalid");
    const folded = wrong?.closest("details");
    if (folded) folded.open = true;
    element.reportValidity();
  } else return true;
  return false;
}

/**
 * A task of what the form says, but for `more`.
 *
 * @param {Record<string, any>} [more]
 * @param {string} [label]
 * @param {() => Promise<Record<string, any>>} [instead] gives all of its parameters
 */
function newRun(more = {}, label = "", instead = undefined) {
  const values = instead ? more : { ...form?.values(), ...more };
  const run = new Run(api, { input: values, label });
  watch(run);
  const preview = form && "enable_preview" in form.properties ? { enable_preview: true } : {};
  const prepare = async (/** @type {AbortSignal} */ signal) => ({
    ...(await (instead?.() ?? pictures.parameters(api, signal))), ...values, ...preview,
  });
  return { run, start: () => run.start(prepare) };
}

/** @param {Run} run */
function watch(run) {
  runs.add(run);
  run.addEventListener("progress", tell);
  run.addEventListener("state", () => {
    if (run.task) cardsById.set(run.task.id, results);
    if (run.state === "ended" && run.task) estimate.learn(run.task);
    if (run.state === "broken") {
      if (run.needsKey) askKey("The server does not know this key.");
      pictures.forgetUploads();
    }
    offline(run.isAway && !run.isOver ? "The server does not answer. Nothing is lost; trying again." : "");
    tell();
  });
}

find("#form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!isReady()) return;
  const { run, start } = newRun();
  results.prepend(card(run, page));
  tell();
  void start();
  if (matchMedia("(max-width: 60rem)").matches)
    find("#results").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
});

/** Send several tasks of one seed, shown beside each other. @param {string} title @param {number} columns @param {[string, Record<string, any>][]} wants */
async function sendBeside(title, columns, wants) {
  if (!form || !isReady()) return;
  const given = form.value("seed");
  const seed = given >= 0 ? given : Math.floor(Math.random() * 2 ** 31);
  const made = wants.map(([label, more]) => newRun({ seed, num_images: 1, ...more }, label));
  results.prepend(group(title, columns, made.map(({ run }) => card(run, page)), () =>
    made.forEach(({ run }) => !run.isOver && void run.cancel())));
  tell();
  for (const { run, start } of made) if (!run.isOver) await start();
}

find("#grid").addEventListener("click", () => {
  const wants = GRID.redux_strength.flatMap((redux_strength) => GRID.redux_pooling.map(
    (redux_pooling) => /** @type {[string, Record<string, any>]} */ ([`strength ${redux_strength}, pooling ${redux_pooling}`, { redux_strength, redux_pooling }])));
  void sendBeside("Strength × pooling", GRID.redux_pooling.length, wants);
});
find("#tiers").addEventListener("click", () => {
  const tiers = form?.properties.quality.enum ?? [];
  void sendBeside("Quality tiers", tiers.length, tiers.map((/** @type {string} */ quality) => [quality, { quality }]));
});
find("#copy-code").addEventListener("click", async () => showCode(await wanted()));
find("#copy-link").addEventListener("click", () => void copy(linkTo(location.href, form?.values() ?? {}), "Link"));
find("#reset").addEventListener("click", () => form?.restore({}));

// --- results ---------------------------------------------------------------------------------------

/** @type {import("./cards.js").Page} */
const page = {
  estimate,
  view: (run, image) => {
    const task = run.task;
    if (!task) return;
    const input = ours(task.input.image) ?? (run.isNew ? pictures.all[0]?.shown : undefined);
    view(task.outputs.map((url, index) => ({
      url, index, task, name: `Variation${task.outputs.length > 1 ? ` ${index + 1}` : ""}, seed ${task.seeds[index]}`,
      below: input ? { url: input, name: "Input" } : undefined,
    })), image, page);
  },
  useAsInput: (url, name) => {
    pictures.replaceBy(url, name);
    toast("Now the input");
    find("#pictures").scrollIntoView({ block: "nearest" });
  },
  useSeed: (seed, input) => {
    restore(input);
    form?.set("seed", seed);
    toast(`Parameters restored, and seed ${seed} kept`);
  },
  restore: (input) => {
    restore(input);
    toast("Parameters restored");
  },
  again,
  showCode,
  compare,
  removed: (element) => {
    const beside = element.closest(".group-card");
    element.remove();
    if (beside && !beside.querySelector(".card")) beside.remove();
    tell();
  },
  askKey: () => askKey(),
};

/** @param {Record<string, any>} input */
function restore(input) {
  form?.restore(input);
  if (ours(input.image) && !pictures.all.some((each) => each.url === input.image)) pictures.replaceBy(input.image, "picture");
}

/** Send a task once more; with the pictures of now, where the server does not tell its own. @param {Run} former */
function again(former) {
  const input = former.input;
  if (!input.image && !pictures.all.length) return toast("Choose a picture first.");
  const { run, start } = newRun(input, former.label, input.image ? async () => input : undefined);
  results.prepend(card(run, page));
  tell();
  void start();
}

/** A picture's URL if this server has it: others are not loaded. @param {string | undefined} url */
function ours(url) {
  return url && new RegExp("^https?:").test(url) && new URL(url).origin === location.origin ? url : undefined;
}

/** @param {{url: string, name: string}} shot */
function compare(shot) {
  const isChosen = chosen.some((each) => each.url === shot.url);
  chosen = isChosen ? chosen.filter((each) => each.url !== shot.url) : [...chosen, shot];
  if (chosen.length === 2) {
    const [below, above] = chosen;
    chosen = [];
    for (const each of document.querySelectorAll("[data-compare]")) each.setAttribute("aria-pressed", "false");
    view([{ ...above, below }], 0, page);
    return false;
  }
  if (!isChosen) toast("Choose another one to compare it with");
  return !isChosen;
}

/** @param {Record<string, any>} input */
function showCode(input) {
  const code = h("pre", { tabindex: 0 }, h("code", {}));
  const tabs = Object.entries(SNIPPETS).map(([name, write]) =>
    h("button", { type: "button", role: "tab", onclick: (/** @type {Event} */ event) => choose(/** @type {HTMLElement} */ (event.currentTarget), write) }, name));
  /** @param {HTMLElement} tab @param {(input: any, origin: string) => string} write */
  const choose = (tab, write) => {
    for (const each of tabs) {
      each.setAttribute("aria-selected", String(each === tab));
      each.tabIndex = each === tab ? 0 : -1;
    }
    code.firstElementChild?.replaceChildren(write(input, base.replace(/\/$/, "")));
  };
  const list = h("div", { class: "segments", role: "tablist", "aria-label": "Language" }, ...tabs);
  list.addEventListener("keydown", (event) => {
    const by = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
    const next = tabs[(tabs.findIndex((each) => each === document.activeElement) + by + tabs.length) % tabs.length];
    if (!by) return;
    next.focus();
    next.click();
  });
  const dialog = h("dialog", { class: "code", "aria-label": "Code" },
    h("header", {}, h("h2", {}, "Do this from your own code"), button("Close", "close", () => dialog.close(), { bare: true })),
    list, code, h("div", { class: "row end" }, h("p", { class: "hint" }, "The key is read from the environment variable FLUX_REDUX_KEY."),
      button("Copy", "code", () => void copy(code.textContent ?? "", "Code"), { kind: "primary" })));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  choose(tabs[0], SNIPPETS.curl);
  dialog.showModal();
}

/** @param {boolean} isFirst */
async function showHistory(isFirst) {
  if (isFirst) [historyPage, historyBefore] = [0, new Date(Date.now() + 60_000).toISOString()];
  const found = await api.list(++historyPage, historyBefore, PAGE_SIZE);
  for (const task of found) {
    if (cardsById.has(task.id)) continue;
    const run = new Run(api, { task });
    cardsById.set(task.id, results);
    if (run.state === "open") watch(run);
    estimate.learn(task);
    results.append(card(run, page));
  }
  find("#more").hidden = found.length < PAGE_SIZE;
  tell();
}

find("#more").addEventListener("click", () => void showHistory(false).catch((error) => toast(said(error))));

// --- how it goes -----------------------------------------------------------------------------------

let toldLast = "";
let toldAt = 0;

/** @param {string} text */
function say(text) {
  if (text !== toldLast) status.textContent = toldLast = text;
}

/** What the status region says: at most twice a second, but ends at once. */
function tell() {
  const open = [...runs].filter((run) => !run.isOver);
  find("#empty").hidden = results.childElementCount > 0;
  document.title = (open.length ? `(${open.length}) ` : "") + "FLUX Redux";
  const last = open.find((run) => run.task?.status === "processing") ?? open.at(-1) ?? [...runs].at(-1);
  const now = Date.now();
  if (!last || (open.length && now - toldAt < 500 && last.task?.status === "processing")) return;
  toldAt = now;
  const others = open.length - (last.isOver ? 0 : 1);
  say(statusOf(last, estimate) + (others > 0 ? ` · ${counted(others, "other task")} open` : ""));
}
setInterval(() => [...runs].some((run) => run.state === "refused") && tell(), 1000);

/** @param {string} problem */
function offline(problem) {
  const wasAway = !find("#offline").hidden;
  find("#offline").textContent = problem;
  find("#offline").hidden = problem === "";
  if (problem) showServer("away", "Not reachable");
  else if (wasAway) lookNow();
}

/** @param {string} state @param {string} text */
function showServer(state, text) {
  find("#server").dataset.state = state;
  find("#server-state").textContent = text;
}

let lookNow = () => {};

async function watchServer() {
  for (;;) {
    let pauseMs = 3000;
    try {
      const { status: state, workers } = await api.readiness();
      const detail = workers?.map((/** @type {any} */ each) => each.detail || each.state).join(" · ") || "no worker yet";
      if (state === "ready") showServer("ready", "Ready");
      else showServer("loading", "Loading the model");
      find("#server").title = detail;
      if (![...runs].some((run) => run.isAway && !run.isOver) && form) offline("");
      if (state === "ready") pauseMs = 15_000;
    } catch {
      showServer("away", "Not reachable");
    }
    await new Promise((resolve) => {
      lookNow = () => resolve(undefined);
      setTimeout(resolve, document.hidden ? 15_000 : pauseMs);
    });
  }
}

async function showVersion() {
  const { version, model } = await api.version();
  find("#model").textContent = model;
  find("#version").textContent = version;
  find("#small-model").hidden = model !== "mini";
}

addEventListener("hashchange", () => {
  fragment = key.takeFrom(location.hash);
  if (fragment !== location.hash) {
    history.replaceState(null, "", location.pathname + location.search + fragment);
    void enter();
  }
  if (form && fragment) form.restore(parametersOf(fragment, form.properties));
});

changed();
void watchServer();
void showVersion().catch(() => {});
void enter();
