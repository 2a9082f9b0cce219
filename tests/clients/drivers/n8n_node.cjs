// n8n's WaveSpeed node, from a checkout: its execute(), with what n8n gives a node. n8n sends a
// node's requests with axios, signed as the node's credentials say.
const fs = require('node:fs');
const path = require('node:path');
const axios = require('axios');
const { answerAll, job, load } = require('./typescript.cjs');

const { WaveSpeed } = load('nodes', 'WaveSpeed', 'WaveSpeed.node.ts');
const { WavespeedApi } = load('credentials', 'WavespeedApi.credentials.ts');

function signed(key) {
  const { headers } = new WavespeedApi().authenticate.properties;
  const fill = (text) => text.replace(/^=/, '').replace('{{$credentials.apiKey}}', key);
  return Object.fromEntries(Object.entries(headers).map(([name, text]) => [name, fill(text)]));
}

async function send({ url, method, headers, body, encoding, timeout, returnFullResponse }) {
  const wanted = { url, method, headers, data: body, responseType: encoding, timeout };
  const got = await axios(wanted);
  return returnFullResponse ? { body: got.data, headers: got.headers } : got.data;
}

function context(parameters, key) {
  return {
    getInputData: () => [{ json: {} }],
    getNode: () => ({ name: 'WaveSpeed', type: 'waveSpeed', typeVersion: 1, parameters: {} }),
    continueOnFail: () => false,
    getNodeParameter: (name, _item, otherwise) => parameters[name] ?? otherwise,
    helpers: {
      httpRequest: send,
      httpRequestWithAuthentication: (_name, options) =>
        send({ ...options, headers: { ...options.headers, ...signed(key) } }),
      prepareBinaryData: (data, fileName, mimeType) => ({ data, fileName, mimeType }),
    },
  };
}

async function execute(changes, { key = job.key, download = false } = {}) {
  const parameters = {
    resource: 'media',
    operation: 'runModel',
    model: job.model,
    inputs: JSON.stringify({ ...job.body, ...changes }),
    options: { pollInterval: 1, downloadOutput: download },
  };
  const [[item]] = await new WaveSpeed().execute.call(context(parameters, key));
  return item;
}

async function download() {
  const { binary } = await execute({}, { download: true });
  const { data, fileName, mimeType } = binary.data;
  if (mimeType !== 'image/png' || !fileName.endsWith('.png')) {
    throw new Error(`${fileName} is ${mimeType}`);
  }
  const place = path.join(process.cwd(), 'downloaded.png');
  fs.writeFileSync(place, data);
  return [place];
}

async function generateImage() {
  const parameters = {
    operation: 'generateImage',
    model: job.model,
    prompt: '',
    imageOptions: { additionalInputs: JSON.stringify(job.body) },
    options: { pollInterval: 1 },
  };
  const [[item]] = await new WaveSpeed().execute.call(context(parameters, job.key));
  return item.json.urls;
}

answerAll({
  run: async () => (await execute({})).json.urls,
  download,
  'generate image': generateImage,
  'bad key': () => execute({}, { key: 'frs_not-a-key' }),
  'bad parameter': () => execute({ num_images: 5 }),
  'dead URL': () => execute({ image: job.dead }),
});
