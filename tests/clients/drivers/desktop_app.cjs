// The API client of WaveSpeed's desktop app, from a checkout: its host is fixed. It looks for
// reductions on the hosted service's pages, and goes on without them.
const fs = require('node:fs');
const { answerAll, job, load } = require('./typescript.cjs');

const { apiClient } = load('src', 'api', 'client.ts');

const quick = { pollInterval: 100 };
const run = async (changes, options = quick) =>
  (await apiClient.run(job.model, { ...job.body, ...changes }, options)).outputs;

async function upload() {
  const file = new File([fs.readFileSync(job.file)], 'icon.png', { type: 'image/png' });
  return run({ image: await apiClient.uploadFile(file) });
}

async function badKey() {
  apiClient.setApiKey('frs_not-a-key');
  try {
    return await run({});
  } finally {
    apiClient.setApiKey(job.key);
  }
}

async function history() {
  const { items } = await apiClient.getHistory(1, 50);
  return items.map(({ id, model, status }) => ({ id, model, status }));
}

async function remove() {
  const { id } = await apiClient.run(job.model, job.body, quick);
  const before = await history();
  await apiClient.deletePrediction(id);
  const after = await history();
  return before.some((each) => each.id === id) && !after.some((each) => each.id === id);
}

apiClient.setApiKey(job.key);
answerAll({
  run: () => run({}),
  sync: () => run({}, { enableSyncMode: true }),
  upload,
  models: async () => (await apiClient.listModels()).map((model) => model.model_id),
  balance: () => apiClient.getBalance(),
  price: async () => (await apiClient.calculatePricing(job.model, job.body)).price,
  history,
  remove,
  'bad key': badKey,
  'bad parameter': () => run({ num_images: 5 }),
  'dead URL': () => run({ image: job.dead }),
});
