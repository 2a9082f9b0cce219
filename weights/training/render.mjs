// Renders the SVG emoji of two iconify sets to raw straight RGBA, joined on their code points.
//
//   node render.mjs NODE_MODULES OUT SIDE [EVERY]
//
// Writes OUT/svg.rgba (one SIDE x SIDE x 4 picture after the other) and OUT/svg.json: the concepts
// drawn in at least two styles, with the picture's number for "noto" and "flat" and the file name
// for "3d" (which is bitmaps already and is read by dataset.py). With EVERY only each EVERYth
// drawing is drawn, the others have no number. Knows nothing of training.
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const [modules, out, sideText, everyText] = process.argv.slice(2);
const side = Number(sideText);
const every = Number(everyText ?? 1);
const require = createRequire(path.resolve(modules, "anchor.js"));
const { Resvg } = require("@resvg/resvg-js");

// resvg 2.6.2 aborts the whole process on these two drawings of Noto
const ABORTS = new Set(["noto/1f3f3-200d-1f308", "noto/1f4e6"]);
const SKIN_TONE = /1f3f[bcdef]/;

const withoutSelector = (points) => points.split("-").filter((p) => p !== "fe0f").join("-");

/** Code points to {name, svg} of one iconify set; skin tones are left out. */
function readSet(name) {
  const folder = path.join(modules, "@iconify-json", name);
  const icons = JSON.parse(fs.readFileSync(path.join(folder, "icons.json"), "utf8"));
  const characters = JSON.parse(fs.readFileSync(path.join(folder, "chars.json"), "utf8"));
  const found = new Map();
  for (const [points, alias] of Object.entries(characters)) {
    const icon = icons.icons[alias] ?? icons.icons[icons.aliases?.[alias]?.parent];
    if (!icon || SKIN_TONE.test(points)) continue;
    const box = `0 0 ${icon.width ?? icons.width ?? 16} ${icon.height ?? icons.height ?? 16}`;
    const head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"';
    found.set(withoutSelector(points), {
      name: alias,
      svg: `<svg ${head} width="${side}" height="${side}" viewBox="${box}">${icon.body}</svg>`,
    });
  }
  return found;
}

/** Code points to file name of the bitmap set. */
function readBitmaps() {
  const names = fs.readdirSync(path.join(modules, "@lobehub/fluent-emoji-3d/assets"));
  const pairs = names.map((name) => [name.replace(/\.\w+$/, ""), name]);
  const kept = pairs.filter(([points]) => !SKIN_TONE.test(points));
  return new Map(kept.map(([points, name]) => [withoutSelector(points), name]));
}

function draw(svg) {
  const options = { fitTo: { mode: "width", value: side }, font: { loadSystemFonts: false } };
  const picture = new Resvg(svg, options).render();
  if (picture.width !== side || picture.height !== side) throw new Error("is not square");
  return picture.pixels;
}

const sets = { noto: readSet("noto"), flat: readSet("fluent-emoji-flat") };
const bitmaps = readBitmaps();
const keys = new Set([...sets.noto.keys(), ...sets.flat.keys(), ...bitmaps.keys()]);
fs.mkdirSync(out, { recursive: true });
const file = fs.openSync(path.join(out, "svg.rgba"), "w");
const concepts = [];
let pictures = 0;
let seen = 0;
for (const key of [...keys].sort()) {
  const styles = {};
  const drawn = Object.entries(sets).filter(([, set]) => set.has(key));
  if (drawn.length + Number(bitmaps.has(key)) < 2) continue;
  for (const [style, set] of drawn) {
    if (ABORTS.has(`${style}/${key}`) || seen++ % every !== 0) continue;
    try {
      fs.writeSync(file, draw(set.get(key).svg));
      styles[style] = pictures++;
    } catch (error) {
      console.error(`${style}/${key} left out: ${error.message ?? error}`);
    }
  }
  if (bitmaps.has(key)) styles["3d"] = bitmaps.get(key);
  const name = (sets.flat.get(key) ?? sets.noto.get(key))?.name ?? key;
  concepts.push({ key, name, styles });
}
fs.closeSync(file);
fs.writeFileSync(path.join(out, "svg.json"), JSON.stringify({ side, pictures, concepts }));
console.log(`${concepts.length} concepts, ${pictures} drawings of ${side} pixels`);
