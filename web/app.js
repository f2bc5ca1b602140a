// The page. It asks worker.js for pictures and shows what comes back.
import {areCached, loadFile} from "./files.js";
import {randn} from "./noise.js";
import {preview} from "./pixels.js";
import {Vocabulary} from "./tokens.js";

const MOST_SEEDS = 2 ** 32;
const by = (id) => document.getElementById(id);
const options = Object.fromEntries(new URLSearchParams(location.search));
let manifest, vocabulary, worker, figures = [], busy = false, task = null, drawnOn = "";

// ------------------------------------------------------------------------------ what is shown
function element(tag, content = {}, ...children) {
  const node = Object.assign(document.createElement(tag), content);
  node.append(...children);
  return node;
}

function say(text, value) {
  by("status").textContent = text;
  by("progress").parentElement.classList.toggle("quiet", value === null);
  if (value === undefined) by("progress").removeAttribute("value");     // it moves
  else by("progress").value = value ?? 0;
}

function complain(text) {
  by("error").textContent = text;
  by("error").hidden = !text;
}

function megabytes(bytes) {
  return (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0);
}

function choices(id, values, chosen) {
  for (const value of values) {
    const input = element("input", {type: "radio", name: id, value, checked: value === chosen});
    by(id).append(element("label", {className: "choice"}, input, element("span", {}, `${value}`)));
  }
}

const chosen = (id) => Number(document.querySelector(`input[name=${id}]:checked`).value);

// Frames for n pictures, with the noise in which each begins.
function makeFigures(n, seed, prompt = "") {
  figures = Array.from({length: n}, (_, i) => {
    const canvas = element("canvas", {width: manifest.size, height: manifest.size});
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", prompt || "No picture yet");
    const save = element("button", {type: "button", textContent: "Save", hidden: true});
    const words = prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);
    save.title = "Save as PNG";
    save.addEventListener("click", () => savePicture(canvas, `${words}-${seed + i}.png`));
    const about = prompt ? `seed ${seed + i}` : "every picture begins as noise";
    const caption = element("span", {}, about);
    return {canvas, save, caption, seed: seed + i};
  });
  const shown = figures.map(({canvas, caption, save}) =>
    element("figure", {}, canvas, element("figcaption", {}, caption, save)));
  by("pictures").replaceChildren(...shown);
  by("pictures").className = n > 1 ? "four" : "";
  for (const {canvas, seed} of figures) {
    const noise = randn(manifest.channels * (manifest.size / 8) ** 2, seed);
    paint(canvas, preview(noise, manifest.preview));
  }
}

function paint(canvas, pixels) {
  const side = Math.sqrt(pixels.length / 4);
  const small = element("canvas", {width: side, height: side});
  small.getContext("2d").putImageData(new ImageData(pixels, side), 0, 0);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

function savePicture(canvas, name) {
  canvas.toBlob((blob) => {
    const link = element("a", {href: URL.createObjectURL(blob), download: name});
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }, "image/png");
}

// ------------------------------------------------------------------------------ the address
function readAddress() {
  const found = new URLSearchParams(location.hash.slice(1));
  if (!found.get("prompt")) return false;
  by("prompt").value = found.get("prompt");
  by("seed").value = found.get("seed") || 0;
  for (const id of ["steps", "count"]) {
    const wanted = document.querySelector(`input[name=${id}][value="${Number(found.get(id))}"]`);
    if (wanted) wanted.checked = true;
  }
  return true;
}

function writeAddress({prompt, seed, steps, count}) {
  const hash = new URLSearchParams({prompt, seed, steps, count});
  history.replaceState(null, "", `${location.pathname}${location.search}#${hash}`);
  by("link").disabled = false;
}

async function copyLink() {
  try {
    await navigator.clipboard.writeText(location.href);
    by("link").textContent = "Copied";
  } catch {                                     // plain http: no clipboard
    by("link").textContent = "Copy the address";
  }
  setTimeout(() => { by("link").textContent = "Copy link"; }, 2000);
}

// ------------------------------------------------------------------------------ drawing
function submit() {
  if (busy) return;
  const prompt = by("prompt").value.trim(), seed = Number(by("seed").value || 0);
  if (!prompt) return complain("Say what to draw, such as “a red car”");
  if (!Number.isInteger(seed) || seed < 0 || seed >= MOST_SEEDS) {
    return complain(`The seed wants a whole number from 0 to ${MOST_SEEDS - 1}`);
  }
  const ids = vocabulary.ids(prompt), most = manifest.tokens.max;
  if (ids.length > most) {
    return complain(`This prompt has ${ids.length} tokens, the model reads ${most}: shorten it`);
  }
  task = {prompt, seed, steps: chosen("steps"), count: chosen("count")};
  makeFigures(task.count, seed, prompt);
  writeAddress(task);
  by("pictures").scrollIntoView({block: "nearest", behavior: "smooth"});
  busy = true;
  by("draw").setAttribute("aria-disabled", "true");
  if (matchMedia("(pointer: coarse)").matches) by("prompt").blur();     // the keyboard goes
  send({ids, steps: task.steps, seeds: figures.map((figure) => figure.seed)});
}

function send(message) {
  complain("");
  say("Starting");
  worker ??= startWorker();
  worker.postMessage({manifest, options, ...message});
}

function startWorker() {
  const made = new Worker("worker.js", {type: "module"});
  made.onmessage = ({data}) => heard[data.kind](data);
  made.onerror = (event) => {
    worker = null;
    heard.error({text: `The drawing program did not start (${event.message || "worker.js"}): ` +
      "reload the page, or make the site again and copy all of its files"});
  };
  return made;
}

function rest(text) {
  busy = false;
  by("draw").removeAttribute("aria-disabled");
  say(text, null);
}

// What worker.js tells, by its kind.
const heard = {
  download({done, total}) {
    say(`Downloading ${megabytes(done)} of ${megabytes(total)} MB, once`, done / total);
  },
  start() {
    say("Starting the network");
  },
  ready({device, threads, fallback}) {
    const why = isSecureContext ? "" : ": threads want https";
    const many = threads > 1 ? `${threads} threads` : `one thread, which is slow${why}`;
    const on = device === "webgpu" ? "the graphics chip (WebGPU)" : `the processor, ${many}`;
    drawnOn = `${on}${fallback && `; ${fallback}`}`;
  },
  preview({index, step, steps, pixels}) {
    paint(figures[index].canvas, pixels);
    const which = figures.length > 1 ? `Picture ${index + 1} of ${figures.length}, step` : "Step";
    say(`${which} ${step} of ${steps}`, (index + step / (steps + 1)) / figures.length);
  },
  picture({index, seconds, pixels}) {
    const {canvas, caption, save, seed} = figures[index];
    paint(canvas, pixels);
    canvas.dataset.done = "yes";
    caption.textContent = `seed ${seed} · ${seconds.toFixed(2)} s`;
    save.hidden = false;
  },
  end({drew}) {
    if (drew) rest(`Drawn on ${drawnOn}`);
    else if (!busy) rest(`Ready to draw on ${drawnOn}`);
  },
  error({text, drew = true}) {
    if (!drew && busy) return;          // the picture that waits will tell the same
    complain(text);
    rest("Nothing was drawn");
  },
};

// ------------------------------------------------------------------------------ the start
// Registers the service worker. Its headers come with the next load of the page, so once it loads
// again by itself; then threads work and the page opens offline. Without it, after 3 s, it goes on.
async function isolate() {
  if (crossOriginIsolated) sessionStorage.removeItem("reloaded");
  let active = null;
  try {
    await navigator.serviceWorker.register("service.js");
    const late = new Promise((done) => setTimeout(done, 3000));
    active = await Promise.race([navigator.serviceWorker.ready, late]);
  } catch {
    return;                 // plain http on another host than localhost, or forbidden
  }
  if (!active || crossOriginIsolated || sessionStorage.getItem("reloaded")) return;
  sessionStorage.setItem("reloaded", "yes");
  location.reload();
  await new Promise(() => {});
}

async function readManifest() {
  const response = await fetch("manifest.json").catch(() => null);
  if (!response?.ok) {
    throw new Error("manifest.json is missing: make the site again and copy all of its files");
  }
  return response.json();
}

function showManifest() {
  choices("steps", Object.keys(manifest.times).map(Number), manifest.steps);
  choices("count", [1, 4], 1);
  for (const example of manifest.examples) {
    const button = element("button", {type: "button", textContent: example});
    button.addEventListener("click", () => {
      if (!busy) by("prompt").value = example;
      submit();
    });
    by("examples").append(button);
  }
  const things = manifest.known.length, millions = Math.round(manifest.parameters / 1e6);
  by("about").textContent = `${millions} million weights draw on your device` +
    (things ? `; they have seen nothing but scenes of ${things} emoji. ` : ". ") +
    "Code and weights: MIT. Runtime: ONNX Runtime Web (Microsoft, MIT).";
  by("known").hidden = !things;
  by("known").querySelector("p").textContent = `${manifest.known.join(", ")}. In red, orange, ` +
    "yellow, green, blue, purple, pink, brown, black or white; one to four of a kind; left of, " +
    "right of, above or under another; on a colour, at the beach, in the snow, at night and more.";
}

function listen() {
  by("form").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  by("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  by("dice").addEventListener("click", () => {
    if (!busy) by("seed").value = Math.floor(Math.random() * 10000);
    if (by("prompt").value.trim()) submit();
  });
  by("link").addEventListener("click", copyLink);
  addEventListener("hashchange", readAddress);
}

async function main() {
  await isolate();
  manifest = await readManifest();
  const captions = new TextDecoder().decode(await loadFile(manifest.tokens, () => {}));
  vocabulary = new Vocabulary(captions, manifest.tokens.pattern);
  showManifest();
  listen();
  const linked = readAddress();
  makeFigures(1, Number(by("seed").value) || 0);
  const runtime = manifest.runtimes.wasm.binary;
  const files = Object.values(manifest.parts);
  const size = [...files, runtime].reduce((sum, entry) => sum + entry.bytes, 0);
  rest(`The first picture downloads ${megabytes(size)} MB, once`);
  if (!await areCached(files)) return;
  if (linked) submit();
  else send({});
}

if (!by("draw").disabled) main().catch((error) => heard.error({text: error.message}));
