// npm wavespeed: the official JavaScript SDK.
const fs = require('node:fs');
const { Client } = require('wavespeed');
const { version } = require('wavespeed/package.json');

const [given, answer] = process.argv.slice(2);
const job = JSON.parse(fs.readFileSync(given));
const client = new Client(job.key, { baseUrl: job.url });
const stranger = new Client('frs_not-a-key', { baseUrl: job.url });
const quick = { pollInterval: 0.1 };

async function run(changes) {
  return (await client.run(job.model, { ...job.body, ...changes }, quick)).outputs;
}

async function module_() {
  require('wavespeed/dist/config').api.baseUrl = job.url;
  require('wavespeed/dist/config').api.apiKey = job.key;
  return (await require('wavespeed').run(job.model, job.body, quick)).outputs;
}

const cases = {
  version: () => version,
  run,
  module: module_,
  upload: async () => run({ image: await client.upload(job.file) }),
  sync: async () => (await client.run(job.model, job.body, { enableSyncMode: true })).outputs,
  'bad key': () => stranger.run(job.model, job.body),
  'bad parameter': () => run({ num_images: 5 }),
  'dead URL': () => run({ image: job.dead }),
};

(async () => {
  const answers = {};
  for (const [name, call] of Object.entries(cases)) {
    try {
      answers[name] = { value: await call() };
    } catch (error) {
      answers[name] = { error: String(error) };
    }
  }
  fs.writeFileSync(answer, JSON.stringify(answers));
})();
