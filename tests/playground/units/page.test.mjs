// What of the page's modules needs no browser. Run by test_units.py with the node of playwright.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Api, ApiError, follow } from "../../../server/redux_server/playground/api.js";
import { EventParser } from "../../../server/redux_server/playground/events.js";
import { Key, storeOr } from "../../../server/redux_server/playground/keys.js";
import { linkTo, parametersOf } from "../../../server/redux_server/playground/link.js";
import { SNIPPETS } from "../../../server/redux_server/playground/snippets.js";
import { duration, Estimate, label, queued } from "../../../server/redux_server/playground/words.js";

const store = () => {
  const values = new Map();
  return {
    getItem: (name) => values.get(name) ?? null,
    setItem: (name, value) => void values.set(name, value),
    removeItem: (name) => void values.delete(name),
  };
};

const task = (status, more = {}) => ({
  id: "1", status, input: { size: "512*512" }, outputs: [], timings: { inference: 0 },
  progress: { step: 0, total_steps: 28 }, ...more,
});

test("events come whole however the text is cut", () => {
  const text = ": a comment\r\n\r\nretry: 5\nevent: progress\ndata: {\"a\":\ndata: 1}\nid: x\n\nevent: end\r\ndata: 2\r\n\r\n";
  for (let size = 1; size <= text.length; size++) {
    const parser = new EventParser();
    const found = [];
    for (let i = 0; i < text.length; i += size) found.push(...parser.feed(text.slice(i, i + size)));
    assert.deepEqual(found, [
      { event: "progress", data: '{"a":\n1}', id: "x" },
      { event: "end", data: "2", id: "x" },
    ], `cut every ${size}`);
  }
});

test("the key of an address is taken out of it and kept in the tab only", () => {
  const tab = store(), device = store();
  const key = new Key(tab, device);
  assert.equal(key.takeFrom("#key=frs_abc&size=512*512"), "#size=512*512");
  assert.equal(key.value, "frs_abc");
  assert.equal(key.isRemembered, false);
  key.keep("frs_def", true);
  assert.equal(new Key(store(), device).value, "frs_def");
  assert.equal(key.takeFrom("#seed=1"), "#seed=1");
  key.forget();
  assert.equal(key.value, "");
});

test("a browser that forbids storage keeps the key as long as the page", () => {
  const broken = storeOr(() => {
    throw new Error("SecurityError");
  });
  const key = new Key(broken, storeOr(store));
  key.keep("frs_abc", false);
  assert.equal(key.value, "frs_abc");
});

test("a link has the parameters, and neither picture nor key", () => {
  const input = { image: "http://h/files/secret", images: ["b"], mask: "m", prompt: "a & b", seed: 7, enable_safety_checker: false };
  const link = linkTo("http://h/#key=frs_abc", input);
  assert.doesNotMatch(link, /secret|frs_abc|image/);
  const properties = { prompt: { type: "string" }, seed: { type: "integer" }, enable_safety_checker: { type: "boolean" } };
  assert.deepEqual(parametersOf(new URL(link).hash, properties), { prompt: "a & b", seed: 7, enable_safety_checker: false });
  assert.deepEqual(parametersOf("#seed=x&unknown=1&image=http://evil/", { ...properties, image: { type: "string" } }), {});
});

test("snippets survive quotes, and tell no key", () => {
  const input = { image: "http://h/a.png", prompt: "it's \"new\" $HOME", enable_preview: true, image_weights: [1, 0.5], enable_safety_checker: false };
  for (const [name, write] of Object.entries(SNIPPETS)) {
    const text = write(input, "http://127.0.0.1:8000");
    assert.match(text, /FLUX_REDUX_KEY/, name);
    assert.doesNotMatch(text, /enable_preview/, name);
  }
  assert.match(SNIPPETS.curl(input, "http://h"), /it'\\''s \\"new\\" \$HOME/);
  assert.match(SNIPPETS.Python(input, "http://h"), /"enable_safety_checker": False/);
  assert.match(SNIPPETS.CLI(input, "http://h"), /--no-safety-checker/);
  assert.match(SNIPPETS.CLI(input, "http://h"), /--image-weights 1,0.5/);
});

test("times and names are said as people say them", () => {
  assert.deepEqual([12, 1234, 61_000, 59_900].map(duration), ["12 ms", "1.2 s", "1 min 1 s", "1 min 0 s"]);
  assert.equal(label("num_inference_steps"), "Steps");
  assert.equal(label("some_new_field"), "Some new field");
  assert.equal(queued(0), "Waiting: next in the queue");
  assert.equal(queued(1), "Waiting: 1 task before it");
});

test("an estimate follows pixels and steps of what ended", () => {
  const estimate = new Estimate();
  assert.equal(estimate.of(task("created")), null);
  estimate.learn(task("failed", { timings: { inference: 9 } }));
  assert.equal(estimate.of(task("created")), null);
  estimate.learn(task("completed", { timings: { inference: 1000 } }));
  const larger = task("created", { input: { size: "1024*1024" }, progress: { step: 0, total_steps: 14 } });
  assert.equal(Math.round(estimate.of(larger)), 2000);
});

/** A server whose answers are given in turn; a text is a stream. */
function server(...answers) {
  const seen = [];
  const send = async (url, init) => {
    seen.push({ url, init });
    const next = answers.shift();
    if (next === undefined) throw new TypeError("fetch failed");
    if (typeof next === "string") return new Response(next, { headers: { "Content-Type": "text/event-stream" } });
    const [status, body, headers] = next;
    return new Response(JSON.stringify(body), { status, headers });
  };
  return { api: new Api("http://h/", () => "frs_k", send), seen };
}

const event = (name, data) => `event: ${name}\ndata: ${JSON.stringify(data)}\n\n`;

async function followed(...answers) {
  const { api, seen } = server(...answers);
  const told = [];
  const tell = {
    state: (each) => told.push(each.status),
    preview: (each) => told.push(`preview ${each.step}`),
    away: (isAway) => isAway && told.push("away"),
  };
  await follow(api, "1", tell, new AbortController().signal, 1);
  return { told, seen };
}

test("a stream tells of states and previews; what old servers do not know is passed over", async () => {
  const stream = event("progress", task("processing")) + event("preview", { step: 3, image: 0, data: "data:," }) +
    event("novelty", { a: 1 }) + event("end", task("completed"));
  const { told, seen } = await followed(stream);
  assert.deepEqual(told, ["processing", "preview 3", "completed"]);
  assert.equal(seen[0].init.headers.Authorization, "Bearer frs_k");
});

test("where there is no stream, the task is polled", async () => {
  const { told } = await followed([429, { message: "100 streams" }], [200, { data: task("processing") }],
    [503, {}], [200, { data: task("completed") }]);
  assert.deepEqual(told, ["processing", "completed"]);
});

test("a server that is away is asked again, and the end is not missed", async () => {
  const { told } = await followed(event("progress", task("processing")), undefined, undefined, undefined, event("end", task("completed")));
  assert.deepEqual(told, ["processing", "away", "away", "completed"]);
});

test("a task that is gone, and a key that is wrong, end the following", async () => {
  await assert.rejects(followed([404, { message: "no task" }]), (error) => error instanceof ApiError && error.status === 404);
  await assert.rejects(followed(event("gone", { message: "deleted" })), /deleted/);
  await assert.rejects(followed([401, { message: "wrong key" }]), (error) => error.status === 401);
});

test("refusals carry their text and their wait; cut answers are no success", async () => {
  const full = server([429, { message: "The queue is full." }, { "Retry-After": "7" }]).api;
  await assert.rejects(full.submit({}, "once"), (error) => error.message === "The queue is full." && error.retryAfterS === 7);
  const away = server().api;
  await assert.rejects(away.version(), (error) => error.isAway && error.status === 0);
});

test("each submit can be repeated: it has a key of its own", async () => {
  const { api, seen } = server([200, { data: task("created") }]);
  await api.submit({ image: "a" }, "once");
  assert.equal(seen[0].init.headers["Idempotency-Key"], "once");
  assert.equal(JSON.parse(seen[0].init.body).image, "a");
});
