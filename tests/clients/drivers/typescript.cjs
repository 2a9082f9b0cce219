// What the drivers of TypeScript checkouts share: a module of a checkout, bundled in memory as a
// loader does it, and the job; ``answerAll`` tries each case and writes down what came of it.
const fs = require('node:fs');
const Module = require('node:module');
const path = require('node:path');
const { buildSync } = require('esbuild');

const [given, answer] = process.argv.slice(2);
const job = JSON.parse(fs.readFileSync(given));

exports.job = job;

exports.load = (...parts) => {
  const { outputFiles } = buildSync({
    entryPoints: [path.join(job.source, ...parts)],
    nodePaths: [process.env.NODE_PATH],
    bundle: true,
    platform: 'node',
    format: 'cjs',
    logLevel: 'error',
    // One copy of a package for the checkout and for its driver.
    external: ['axios', 'n8n-workflow', 'wavespeed'],
    write: false,
  });
  const module_ = new Module(path.join(__dirname, 'of-a-checkout.cjs'), module);
  module_.paths = [process.env.NODE_PATH];
  module_._compile(outputFiles[0].text, module_.id);
  return module_.exports;
};

exports.answerAll = async (cases) => {
  const answers = {};
  for (const [name, call] of Object.entries(cases)) {
    try {
      answers[name] = { value: await call() };
    } catch (error) {
      answers[name] = { error: [error, error.description, error.cause].filter(Boolean).join(' | ') };
    }
  }
  fs.writeFileSync(answer, JSON.stringify(answers));
  process.exit(0);
};
