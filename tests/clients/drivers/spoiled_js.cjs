// npm wavespeed, at each address: one task, and what its user gets.
const { Client } = require('wavespeed');
const { atEachAddress, job } = require('./at_each_address.cjs');

atEachAddress(async (url, timeout) => {
  const client = new Client(job.key, { baseUrl: url, maxRetries: 0 });
  const done = await client.run(job.model, job.body, { pollInterval: 0.05, timeout });
  return done.outputs;
});
