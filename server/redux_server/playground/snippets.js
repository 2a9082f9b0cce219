/** @file A task as code to paste: curl, Python, JavaScript and the command line. The key is in none. */

import { MODEL } from "./api.js";

const VARIABLE = "FLUX_REDUX_KEY";

/** @typedef {{image?: string, [name: string]: any}} Input */

/** Within single quotes of a shell. @param {string} text */
const quoted = (text) => `'${text.replace(/'/g, "'\\''")}'`;

/** @param {any} value */
function python(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  return JSON.stringify(value);
}

/** What the page adds for itself is no part of what is wanted. @param {Input} input @returns {Input} */
function wanted(input) {
  /** @type {Input} */
  const told = { image: "https://example.com/photo.jpg", ...input };
  delete told.enable_preview;
  return told;
}

/** @param {Input} input @param {string} origin */
export function curl(input, origin) {
  return [
    `curl -X POST "${origin}/api/v3/${MODEL}" \\`,
    `  -H "Authorization: Bearer $${VARIABLE}" -H "Content-Type: application/json" \\`,
    `  -d ${quoted(JSON.stringify({ ...wanted(input), enable_sync_mode: true }))}`,
  ].join("\n");
}

/** @param {Input} input @param {string} origin */
export function pythonSdk(input, origin) {
  const lines = Object.entries(wanted(input)).map(([name, value]) => `    "${name}": ${python(value)},`);
  return [
    "# pip install wavespeed",
    "import os, wavespeed",
    "",
    `client = wavespeed.Client(api_key=os.environ["${VARIABLE}"], base_url="${origin}")`,
    `output = client.run("${MODEL}", {`, ...lines, "})",
    'print(output["outputs"])',
  ].join("\n");
}

/** @param {Input} input @param {string} origin */
export function javascript(input, origin) {
  const body = JSON.stringify(wanted(input), null, 2);
  return [
    "// npm install wavespeed",
    'import { Client } from "wavespeed";',
    "",
    `const client = new Client(process.env.${VARIABLE}, { baseUrl: "${origin}" });`,
    `const output = await client.run("${MODEL}", ${body});`,
    "console.log(output.outputs);",
  ].join("\n");
}

/** @param {Input} input @param {string} origin */
export function commandLine(input, origin) {
  const { image, ...rest } = wanted(input);
  /** @type {string[]} */
  const flags = [];
  for (const [name, value] of Object.entries(rest)) {
    if (name === "enable_safety_checker") {
      if (value === false) flags.push("--no-safety-checker");
    } else if (name === "images") flags.push(`--images ${value.map(quoted).join(" ")}`);
    else if (Array.isArray(value)) flags.push(`--${name.replace(/_/g, "-")} ${value.join(",")}`);
    else if (typeof value === "boolean") continue; // the command line has no other switches
    else
      flags.push(`--${name.replace(/_/g, "-")} ${/^[\w.-]+$/.test(String(value)) ? value : quoted(String(value))}`);
  }
  return [`export ${VARIABLE}=...`, ["flux-redux submit --wait", quoted(image ?? ""), `--url ${origin}`, ...flags].join(" \\\n  ")].join("\n");
}

/** By the name on its tab. */
export const SNIPPETS = { curl, Python: pythonSdk, JavaScript: javascript, CLI: commandLine };
