/** @file What the page shows of a task: progress, preview, images, what may be done with them. */

import { button, copy, h, icon, toast } from "./dom.js";
import { linkTo } from "./link.js";
import { said } from "./runs.js";
import { counted, duration, queued, sides } from "./words.js";

/**
 * What cards ask of the page.
 * @typedef {object} Page
 * @property {import("./words.js").Estimate} estimate
 * @property {(run: import("./runs.js").Run, image: number) => void} view
 * @property {(url: string, name: string) => void} useAsInput
 * @property {(seed: number, input: Record<string, any>) => void} useSeed
 * @property {(input: Record<string, any>) => void} restore
 * @property {(run: import("./runs.js").Run) => void} again
 * @property {(input: Record<string, any>) => void} showCode
 * @property {(shot: {url: string, name: string}) => boolean} compare whether it is chosen now
 * @property {(card: HTMLElement) => void} removed
 * @property {() => void} askKey
 */

/** How it is, in a line; for the card and for screen readers. @param {import("./runs.js").Run} run @param {import("./words.js").Estimate} estimate */
export function statusOf(run, estimate) {
  const task = run.task;
  if (run.state === "refused") {
    const waitS = Math.max(1, Math.ceil((run.sendAgainAt - Date.now()) / 1000));
    return `${run.problem} Trying again in ${waitS} s`;
  }
  if (run.state === "sending") return "Sending";
  if (run.state === "broken" || !task) return run.problem;
  if (task.status === "completed") return ended(run, task);
  if (task.status === "failed") return `Failed: ${task.error}`;
  if (task.status === "cancelled") return "Cancelled";
  if (run.isAway) return "The server does not answer; trying again";
  if (run.isCancelling) return "Cancelling";
  if (task.status === "created") return queued(task.progress.queue_position ?? 0);
  return `Step ${task.progress.step} of ${task.progress.total_steps}${times(run, task, estimate)}`;
}

/** @param {import("./runs.js").Run} run @param {import("./api.js").Task} task */
function ended(run, task) {
  const images = counted(task.outputs.length, "image");
  const took = run.isNew ? run.endedAt - run.begunAt : task.timings.inference;
  return `Done: ${images} in ${duration(took)}`;
}

/** @param {import("./runs.js").Run} run @param {import("./api.js").Task} task @param {import("./words.js").Estimate} estimate */
function times(run, task, estimate) {
  if (!run.workedSince) return "";
  const soFar = Date.now() - run.workedSince;
  const share = task.progress.step / task.progress.total_steps;
  const expected = estimate.of(task) ?? (share > 0.1 ? soFar / share : null);
  const whole = expected === null ? "" : ` of about ${duration(Math.max(expected, soFar))}`;
  return `, ${duration(soFar)}${whole}`;
}

/** @param {import("./runs.js").Run} run @param {Page} page */
export function card(run, page) {
  const status = h("p", { class: "status" });
  const bar = h("progress", { max: 1, "aria-label": "Steps done" });
  const media = h("div", { class: "media" });
  const actions = h("div", { class: "row actions" });
  const told = h("p", { class: "told" });
  const element = h("article", { class: "card" },
    run.label ? h("h3", { class: "label" }, run.label) : null, media, h("div", { class: "below" }, bar, status, told, actions));
  let timer = 0;

  const tick = () => {
    status.textContent = statusOf(run, page.estimate);
    const { step = 0, total_steps = 0 } = run.task?.progress ?? {};
    if (run.task?.status === "processing") bar.value = total_steps ? step / total_steps : 0;
    else bar.removeAttribute("value");
  };
  const show = () => {
    const kind = run.state === "ended" ? run.task?.status : run.state === "broken" ? "failed" : run.state;
    element.dataset.state = kind;
    element.setAttribute("aria-label", nameOf(run));
    bar.hidden = run.isOver;
    told.replaceChildren(summary(run), ...(run.input.prompt ? [" · ", h("bdi", {}, run.input.prompt)] : []));
    media.replaceChildren(...pictures(run, page));
    actions.replaceChildren(...deeds(run, page, element));
    tick();
    if (run.isOver) clearInterval(timer);
  };
  run.addEventListener("state", show);
  run.addEventListener("progress", tick);
  run.addEventListener("preview", () => {
    for (const [index, data] of run.previews) {
      const place = media.children[index];
      const image = place?.querySelector("img.preview") ?? h("img", { class: "preview", alt: "Preview of the image as it forms" });
      image.setAttribute("src", data);
      if (place?.classList.contains("waiting")) place.prepend(image);
    }
  });
  if (!run.isOver) timer = window.setInterval(tick, 500);
  show();
  return element;
}

/** @param {import("./runs.js").Run} run */
function nameOf(run) {
  const when = run.task ? new Date(run.task.created_at).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }) : "";
  return `Task ${run.label} ${when}`.replace(/\s+/g, " ").trim();
}

/** @param {import("./runs.js").Run} run */
function summary(run) {
  const input = run.input;
  const seeds = run.task?.seeds ?? [];
  const parts = [
    (input.size ?? "1024*1024").replace("*", "×"),
    counted(input.num_inference_steps ?? 28, "step"),
    seeds.length ? `seed ${seeds[0]}${seeds.length > 1 ? `–${seeds[seeds.length - 1]}` : ""}` : "",
    run.task?.quality && run.task.quality !== "exact" ? run.task.quality : "",
    input.redux_strength !== undefined && !run.label ? `strength ${input.redux_strength}` : "",
    input.redux_pooling !== undefined && !run.label ? `pooling ${input.redux_pooling}` : "",
  ];
  return parts.filter(Boolean).join(" · ");
}

/** @param {import("./runs.js").Run} run @param {Page} page @returns {HTMLElement[]} */
function pictures(run, page) {
  const [width, height] = sides(run.input.size ?? "1024*1024");
  const count = run.task?.outputs.length || Number(run.input.num_images ?? 1);
  return Array.from({ length: count }, (_, i) => {
    const url = run.task?.outputs[i];
    const place = h("figure", { class: url ? "shot" : "shot waiting" });
    place.style.aspectRatio = `${width} / ${height}`;
    if (url) place.append(...done(run, i, url, page));
    else if (run.isOver) place.append(icon(run.task?.status === "cancelled" ? "close" : "warning"));
    else if (run.previews.has(i)) place.append(h("img", { class: "preview", alt: "Preview of the image as it forms", src: run.previews.get(i) }));
    return place;
  });
}

/** @param {import("./runs.js").Run} run @param {number} i @param {string} url @param {Page} page */
function done(run, i, url, page) {
  const task = /** @type {import("./api.js").Task} */ (run.task);
  const name = `Variation${task.outputs.length > 1 ? ` ${i + 1}` : ""}, seed ${task.seeds[i]}`;
  const open = h("button", { type: "button", class: "open", onclick: () => page.view(run, i) },
    h("img", { src: url, alt: name, loading: "lazy", decoding: "async" }), h("span", { class: "unseen" }, "Enlarge"));
  const chosen = button("Compare", "compare", () => {
    chosen.setAttribute("aria-pressed", String(page.compare({ url, name })));
  }, { bare: true, title: "Choose two to compare", attributes: { "aria-pressed": "false", "data-compare": url } });
  return [
    open,
    task.has_nsfw_contents[i] ? h("span", { class: "flag" }, icon("warning"), "Withheld by the safety checker") : null,
    h("div", { class: "over" },
      button("Use as input", "image", () => page.useAsInput(url, name), { bare: true }),
      button("Same seed again", "lock", () => page.useSeed(task.seeds[i], task.input), { bare: true }),
      chosen,
      h("a", { class: "button bare", href: url, download: fileName(url, task.seeds[i]), title: "Download", onclick: save },
        icon("download"), h("span", { class: "unseen" }, "Download"))),
  ].filter((each) => each !== null);
}

/** @param {string} url @param {number} seed */
export const fileName = (url, seed) => `variation-${seed}.${url.split(".").pop()}`;

/** Save rather than open, also where pictures come from another origin. @param {MouseEvent} event */
export async function save(event) {
  const link = /** @type {HTMLAnchorElement} */ (event.currentTarget);
  if (new URL(link.href).origin === location.origin) return;
  event.preventDefault();
  const url = URL.createObjectURL(await (await fetch(link.href)).blob());
  h("a", { href: url, download: link.download }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** @param {import("./runs.js").Run} run @param {Page} page @param {HTMLElement} element */
function deeds(run, page, element) {
  if (!run.isOver)
    return [button("Cancel", "close", () => void run.cancel(), { attributes: { disabled: run.isCancelling } })];
  const remove = button("Delete", "trash", async () => {
    if (remove.dataset.sure === undefined) {
      remove.dataset.sure = "";
      remove.lastChild?.replaceWith("Really delete?");
      setTimeout(() => {
        delete remove.dataset.sure;
        remove.lastChild?.replaceWith("Delete");
      }, 4000);
      return;
    }
    try {
      await run.remove();
      const next = element.nextElementSibling?.querySelector("button") ?? element.previousElementSibling?.querySelector("button");
      page.removed(element);
      if (next instanceof HTMLElement) next.focus();
      toast("Deleted");
    } catch (error) {
      toast(said(error));
    }
  }, { kind: "quiet danger" });
  const name = linkTo(location.href, run.input);
  return [
    run.needsKey ? button("Enter a key", "key", page.askKey, { kind: "primary" }) : null,
    button("Again", "again", () => page.again(run), { kind: "quiet", title: "Send it once more, as it was" }),
    button("Restore", "sliders", () => page.restore(run.input), { kind: "quiet", title: "Put these parameters into the form" }),
    button("Code", "code", () => page.showCode(run.input), { kind: "quiet", title: "Copy as curl, Python, JavaScript or a command" }),
    button("Link", "link", () => void copy(name, "Link"), { kind: "quiet", title: "Copy a link that restores the parameters, without picture and key" }),
    remove,
  ].filter((each) => each !== null);
}

/** Cards of one press beside each other. @param {string} title @param {number} columns @param {HTMLElement[]} cards @param {() => void} cancelAll */
export function group(title, columns, cards, cancelAll) {
  const body = h("div", { class: "beside" }, ...cards);
  body.style.setProperty("--columns", String(columns));
  return h("section", { class: "group-card", "aria-label": title },
    h("header", {}, h("h3", {}, title), button("Cancel all", "close", cancelAll, { kind: "quiet" })), body);
}
