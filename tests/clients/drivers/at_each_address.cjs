// What the drivers of spoiled answers share: one task at each address of the job, all at once, since
// some only wait. ``job`` is what was asked for; ``outputs(url, timeout)`` is what a user gets there.
const fs = require('node:fs');

const [given, answer] = process.argv.slice(2);
exports.job = JSON.parse(fs.readFileSync(given));

async function attempt(outputs, url, timeout) {
  try {
    return { value: await outputs(url, timeout) };
  } catch (error) {
    return { error: String(error) };
  }
}

exports.atEachAddress = async (outputs) => {
  const { urls, impatient } = exports.job;
  const all = Object.entries(urls).map(async ([name, url]) => {
    return [name, await attempt(outputs, url, name in impatient ? impatient[name] : 60)];
  });
  fs.writeFileSync(answer, JSON.stringify(Object.fromEntries(await Promise.all(all))));
};
