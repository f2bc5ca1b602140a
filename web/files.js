// The files that the manifest names: downloaded once, checked, kept in the browser's cache.
// An entry is {file, bytes, crc32}.

// A failure whose message tells the reader in one line what is wrong, and how to mend it.
export class Problem extends Error {}

const MEND = "make the site again with python -m web.export and copy all of its files";

const TABLE = Uint32Array.from({length: 256}, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? (n >>> 1) ^ 0xedb88320 : n >>> 1;
  return n;
});

export function crc32(bytes) {
  let sum = 0xffffffff;
  for (const byte of bytes) sum = TABLE[(sum ^ byte) & 255] ^ (sum >>> 8);
  return (sum ^ 0xffffffff) >>> 0;
}

function address(entry) {
  return new URL(`${entry.file}?crc=${entry.crc32.toString(16)}`, import.meta.url);
}

// The cache of this folder, or null: plain http has one on localhost alone.
async function openCache() {
  if (!self.caches) return null;
  return caches.open(new URL("./files", import.meta.url).pathname).catch(() => null);
}

export async function areCached(entries) {
  const cache = await openCache();
  if (!cache) return false;
  const found = await Promise.all(entries.map((entry) => cache.match(address(entry))));
  return found.every(Boolean);
}

// An entry's bytes. told(n) hears of every n bytes that came.
export async function loadFile(entry, told) {
  const cache = await openCache(), url = address(entry);
  const kept = await cache?.match(url);
  if (kept) {
    const bytes = new Uint8Array(await kept.arrayBuffer());
    if (bytes.length === entry.bytes) {
      told(bytes.length);
      return bytes;
    }
  }
  // checked below, so the browser's other cache must not give a damaged file again
  const response = await ask(entry, url, {cache: cache ? "reload" : "default"});
  const bytes = await received(entry, response, told);
  if (cache) await keep(cache, url, bytes).catch(() => {});     // no room: then without
  return bytes;
}

async function ask(entry, url, how) {
  let response;
  try {
    response = await fetch(url, how);
  } catch {
    throw new Problem(`${entry.file} cannot be reached: check the connection, then draw again`);
  }
  if (!response.ok) {
    throw new Problem(`${entry.file} is missing on this server (${response.status}): ${MEND}`);
  }
  return response;
}

async function received(entry, response, told) {
  const bytes = new Uint8Array(entry.bytes), reader = response.body.getReader();
  let length = 0;
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      if (length + part.value.length <= bytes.length) bytes.set(part.value, length);
      length += part.value.length;
      told(part.value.length);
    }
  } catch {
    throw new Problem(`${entry.file} broke off: check the connection, then draw again`);
  }
  if (length !== entry.bytes) {
    throw new Problem(`${entry.file} has ${length} bytes instead of ${entry.bytes}: ${MEND}`);
  }
  if (crc32(bytes) !== entry.crc32) {
    throw new Problem(`${entry.file} is damaged, its checksum is another: ${MEND}`);
  }
  return bytes;
}

// Keeps a file, and drops the ones that an older site had under its name.
async function keep(cache, url, bytes) {
  for (const request of await cache.keys()) {
    if (new URL(request.url).pathname === url.pathname) await cache.delete(request);
  }
  await cache.put(url, new Response(bytes));
}

export async function unzip(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
