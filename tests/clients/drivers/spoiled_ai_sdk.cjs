// The AI SDK's provider of WaveSpeed, from a checkout, at each address: one task, and what its user
// gets. Its image model is TypeScript, which is bundled here as its own build does.
const path = require('node:path');
const { buildSync } = require('esbuild');
const { atEachAddress, job } = require('./at_each_address.cjs');

const outfile = path.join(process.cwd(), 'image-model.cjs');
buildSync({
  entryPoints: [path.join(job.source, 'src', 'wavespeed-image-model.ts')],
  nodePaths: [process.env.NODE_PATH],
  bundle: true,
  platform: 'node',
  format: 'cjs',
  logLevel: 'error',
  outfile,
});
const { WaveSpeedImageModel } = require(outfile);

atEachAddress(async (url, timeout) => {
  const model = new WaveSpeedImageModel(job.model, {
    provider: 'wavespeed.image',
    baseURL: url,
    headers: { Authorization: `Bearer ${job.key}` },
    pollIntervalMillis: 50,
    pollTimeoutMillis: timeout * 1000,
  });
  const asked = { prompt: 'a fox', n: 1, providerOptions: { wavespeed: job.body } };
  const { images, providerMetadata } = await model.doGenerate(asked);
  const found = providerMetadata.wavespeed.images.map((each) => each.url);
  if (images.length !== found.length || images.some((each) => each.length === 0)) {
    throw new Error('images are missing');
  }
  return found;
});
