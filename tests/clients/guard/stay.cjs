// Loaded by node at its start (NODE_OPTIONS=--require): keeps it on this machine. Whatever would
// leave loopback is refused and noted in the file LEFT_LOOPBACK; LOCAL_NAMES leads a host's port
// to one of this machine, as sitecustomize.py beside this file does.
const fs = require('node:fs');
const net = require('node:net');

const names = JSON.parse(process.env.LOCAL_NAMES || '{}');
const connect = net.Socket.prototype.connect;

function isLocal(host) {
  return !host || host === 'localhost' || host === '::1' || /^127\.[\d.]+$/.test(host);
}

net.Socket.prototype.connect = function (...args) {
  const options = Array.isArray(args[0]) ? args[0][0] : args[0];
  if (options && typeof options === 'object' && !options.path) {
    const here = names[`${options.host}:${options.port}`];
    if (here !== undefined) {
      options.host = '127.0.0.1';
      options.hostname = '127.0.0.1';
      options.port = here;
    } else if (!isLocal(options.host)) {
      fs.appendFileSync(process.env.LEFT_LOOPBACK, `connect ${options.host}\n`);
      options.host = '127.0.0.1';
      options.port = 9; // discard: nobody listens
    }
  }
  return connect.apply(this, args);
};
