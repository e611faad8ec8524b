// Files as they were packed, or not at all. For workers, after manifest.js.

// A file's bytes, once their number and their hash are right. Throws what a person can read.
async function fetchWhole(path, report = () => {}) {
  const {bytes, sha256} = MANIFEST.files[path];
  const response = await fetch(path).catch(() => null);
  if (!response?.ok) throw new Error(`${path} could not be loaded (${response?.status ?? "no connection"}). Is the server still running?`);
  const content = new Uint8Array(bytes);
  const reader = response.body.getReader();
  let done = 0;
  for (let part; !(part = await reader.read()).done; done += part.value.length) {
    if (done + part.value.length <= bytes) content.set(part.value, done);
    report(done + part.value.length, bytes);
  }
  const copy = "Copy the packed folder again, whole.";
  if (done !== bytes) throw new Error(`${path} has ${done.toLocaleString("en")} bytes, ${bytes.toLocaleString("en")} were packed. ${copy}`);
  if (crypto.subtle && (await digest(content)) !== sha256) throw new Error(`${path} is damaged: it is not what was packed. ${copy}`);
  return content;
}

async function fetchJson(path) {
  return JSON.parse(new TextDecoder().decode(await fetchWhole(path)));
}

async function digest(content) {
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  return Array.from(hash, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
