// Keeps every packed file, so that the page works without a network, and gives each the headers that
// threads need, whatever server it came from. A new pack is a new version: this file then changes,
// by what it imports.
importScripts("manifest.js");

const CACHES = `bedtime ${registration.scope} `;
const CACHE = CACHES + MANIFEST.version;

addEventListener("install", (event) => event.waitUntil(keepAll().then(() => skipWaiting())));
addEventListener("activate", (event) => event.waitUntil(dropOthers().then(() => clients.claim())));
addEventListener("fetch", (event) => event.respondWith(answer(event.request)));

async function keepAll() {
  const cache = await caches.open(CACHE);
  const files = {"manifest.js": {}, ...MANIFEST.files}; // which cannot state its own size
  for (const [path, {bytes}] of Object.entries(files)) {
    const response = await fetch(path, {cache: "no-cache"}); // what the page has loaded comes back as 304
    const body = await response.blob();
    if (!response.ok || body.size !== (bytes ?? body.size)) throw new Error(`${path} is not what was packed`);
    const type = response.headers.get("Content-Type") ?? "";
    await cache.put(path, new Response(body, {headers: {...MANIFEST.headers, "Content-Type": type}}));
  }
}

async function dropOthers() {
  const names = await caches.keys();
  const old = names.filter((name) => name.startsWith(CACHES) && name !== CACHE);
  await Promise.all(old.map((name) => caches.delete(name)));
}

async function answer(request) {
  const path = request.mode === "navigate" && request.url === registration.scope ? "index.html" : request.url;
  const cache = await caches.open(CACHE);
  return (await cache.match(path, {ignoreSearch: true})) ?? fetch(request);
}
