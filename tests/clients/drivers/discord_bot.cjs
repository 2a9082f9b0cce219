// The gateway of WaveSpeed's Discord bot, from a checkout: all that it asks of the service, by the
// official SDK and by itself. Without Discord.
const { answerAll, job, load } = require('./typescript.cjs');

const { createGateway } = load('src', 'lib', 'wavespeed.ts');
const { loadConfig } = load('src', 'config.ts');

function gateway(key) {
  const told = { DISCORD_TOKEN: 'none', DISCORD_CLIENT_ID: 'none', WAVESPEED_API_KEY: key };
  return createGateway(loadConfig({ ...told, WAVESPEED_BASE_URL: job.url }));
}

async function run(changes, by = gateway(job.key)) {
  const { status, outputs, error } = await by.generate(job.model, { ...job.body, ...changes });
  if (status !== 'completed') {
    throw new Error(error);
  }
  return outputs;
}

answerAll({
  run: () => run({}),
  models: async () => (await gateway(job.key).listModels()).map((model) => model.model_id),
  balance: async () => (await gateway(job.key).getBalance()).balance,
  'bad key': () => run({}, gateway('frs_not-a-key')),
  'bad key, balance': () => gateway('frs_not-a-key').getBalance(),
  'bad parameter': () => run({ num_images: 5 }),
  'dead URL': () => run({ image: job.dead }),
  'no picture': () => run({ image: undefined, prompt: 'a fox' }),
});
