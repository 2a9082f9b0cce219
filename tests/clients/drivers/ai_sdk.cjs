// The image model of the AI SDK's WaveSpeed provider, from a checkout, called as the AI SDK calls it.
const fs = require('node:fs');
const path = require('node:path');
const { answerAll, job, load } = require('./typescript.cjs');

const { WaveSpeedImageModel } = load('src', 'wavespeed-image-model.ts');

async function run(changes, { key = job.key, files } = {}) {
  const model = new WaveSpeedImageModel(job.model, {
    provider: 'wavespeed.image',
    baseURL: job.url,
    headers: { Authorization: `Bearer ${key}` },
    pollIntervalMillis: 100,
  });
  const { size, seed, ...rest } = { ...job.body, ...changes };
  const asked = { n: 1, size: size.replace('*', 'x'), seed, files };
  const { images } = await model.doGenerate({ ...asked, providerOptions: { wavespeed: rest } });
  return images.map((data, index) => {
    const place = path.join(process.cwd(), `ai-sdk-${index}.png`);
    fs.writeFileSync(place, data);
    return place;
  });
}

const file = { type: 'file', mediaType: 'image/png', data: new Uint8Array(fs.readFileSync(job.file)) };

answerAll({
  run: () => run({}),
  'local file': () => run({ image: undefined }, { files: [file] }),
  'bad key': () => run({}, { key: 'frs_not-a-key' }),
  'bad parameter': () => run({ num_images: 5 }),
  'dead URL': () => run({ image: job.dead }),
});
