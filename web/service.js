// The service worker. It adds the two headers that a page needs for threads and that plain static
// hosts do not send, and it keeps the page for later without a connection. Models and runtime are
// kept by files.js, which checks them: their addresses have ?crc=.
const CACHE = new URL("./page", self.location).pathname;

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  const {request} = event, url = new URL(request.url);
  const ours = url.origin === self.location.origin && request.method === "GET";
  if (ours && !url.search.startsWith("?crc=")) event.respondWith(answer(request));
});

async function answer(request) {
  const cache = await caches.open(CACHE).catch(() => null);
  let response;
  try {
    response = await fetch(request, {cache: "no-cache"});       // newer pages are seen at once
  } catch (error) {
    response = await cache?.match(request, {ignoreSearch: true});
    if (!response) throw error;
    return isolated(response);
  }
  if (response.ok) await cache?.put(request, response.clone()).catch(() => {});     // no room
  return isolated(response);
}

function isolated(response) {
  if (response.type === "opaqueredirect") return response;      // /site -> /site/
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  const {status, statusText} = response;
  return new Response(response.body, {status, statusText, headers});
}
