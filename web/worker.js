// Draws, in a thread of its own, so that the page stays alive. Messages in: {manifest, options} to
// load, with {ids, seeds, steps} to draw too. Messages out: see tell().
import {Problem, loadFile, unzip} from "./files.js";
import {randn} from "./noise.js";
import {preview, toPixels} from "./pixels.js";

const FAILED = "The network failed: reload the page; add ?device=wasm to its address to do " +
  "without WebGPU";

let loading = null;     // a promise of what open() gives
let ready = false;
let queue = Promise.resolve();

// kind: download {done, total}, start, ready {device, threads, fallback}, preview {index, step,
// steps, pixels}, picture {index, seconds, pixels}, end {drew}, error {text, drew}
function tell(kind, more = {}, moved = []) {
  self.postMessage({kind, ...more}, moved);
}

self.onmessage = ({data}) => {
  queue = queue.then(() => obey(data));
};

async function obey(task) {
  const drew = Boolean(task.seeds);
  try {
    loading ??= start(task.manifest, task.options);
    const model = await loading;
    if (drew) await draw(model, task);
    tell("end", {drew});
  } catch (error) {
    const ours = error instanceof Problem;
    if (!ours || !ready) loading = null;        // the next click starts anew
    if (!ours) console.error(error);
    const text = ours ? error.message : `${FAILED} (${error.message || error})`;
    tell("error", {text, drew});
  }
}

// WebGPU where there is one, else WebAssembly.
async function start(manifest, options) {
  let fallback = "";
  if (options.device !== "wasm" && await navigator.gpu?.requestAdapter().catch(() => null)) {
    try {
      return await open(manifest, "webgpu", options);
    } catch (error) {
      if (error instanceof Problem) throw error;
      console.warn(error);
      fallback = "WebGPU did not start here";
    }
  }
  return open(manifest, "wasm", options, fallback);
}

async function open(manifest, device, options, fallback = "") {
  const {module, binary} = manifest.runtimes[device];
  const entries = [...Object.values(manifest.parts), binary];
  const total = entries.reduce((sum, entry) => sum + entry.bytes, 0), files = {};
  let done = 0;
  for (const entry of entries) {
    files[entry.file] = await loadFile(entry, (bytes) => {
      done += bytes;
      tell("download", {done, total});
    });
  }
  tell("start");
  const ort = await import(`./${module.file}`).catch(() => {
    throw new Problem(`${module.file} cannot be loaded: make the site again and copy all of it`);
  });
  const cores = Math.min(navigator.hardwareConcurrency || 1, 8);
  const threads = self.crossOriginIsolated ? options.threads || cores : 1;
  ort.env.wasm.wasmBinary = await unzip(files[binary.file]);
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  const sessions = {};
  for (const [name, entry] of Object.entries(manifest.parts)) {
    const how = {executionProviders: [device], logSeverityLevel: Number(options.log ?? 3)};
    sessions[name] = await ort.InferenceSession.create(files[entry.file], how);
  }
  ready = true;
  tell("ready", {device, threads, fallback});
  return {ort, sessions, manifest};
}

async function draw(model, {ids, seeds, steps}) {
  const {ort, sessions, manifest} = model;
  const tokens = new ort.Tensor("int32", Int32Array.from(ids), [1, ids.length]);
  const states = (await sessions.text.run({ids: tokens})).y;            // (1, L, D)
  for (const [index, seed] of seeds.entries()) {
    const begin = performance.now();
    const x0 = await euler(model, states, seed, manifest.times[steps], (step, x) => {
      const pixels = preview(x, manifest.preview);
      tell("preview", {index, step, steps, pixels}, [pixels.buffer]);
    });
    const image = (await sessions.decoder.run({z: latents(model, x0)})).y;
    const pixels = toPixels(image.data);
    const seconds = (performance.now() - begin) / 1000;
    tell("picture", {index, seconds, pixels}, [pixels.buffer]);
  }
}

function latents({ort, manifest}, x) {
  return new ort.Tensor("float32", x, [1, manifest.channels, manifest.size / 8, manifest.size / 8]);
}

// sample.py's euler(): x_t = (1 - t) x0 + t eps, and the network gives v = eps - x0. told() hears
// of each step's guess at x0.
async function euler(model, context, seed, times, told) {
  const {ort, sessions, manifest} = model;
  let x = randn(manifest.channels * (manifest.size / 8) ** 2, seed);
  for (let i = 0; i + 1 < times.length; i++) {
    const [t, s] = times.slice(i, i + 2);
    const time = new ort.Tensor("float32", [t], [1]);
    const v = (await sessions.unet.run({x: latents(model, x), t: time, context})).y.data;
    told(i + 1, x.map((value, k) => value - t * v[k]));
    x = x.map((value, k) => value + (s - t) * v[k]);
  }
  return x;
}
