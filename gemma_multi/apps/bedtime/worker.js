// Tells stories, apart from the page, so that the page never waits. A classic worker: LiteRT loads
// its WebAssembly by importScripts, which a module worker has not.
//
// In:  {type: "load", engine, threads}
//      {type: "tell", story, prompt, options} {type: "stop"}
// Out: {type: "loading", done, total}         {type: "ready", engine, threads, memory}
//      {type: "text", story, text, speed}     {type: "told", story, text, tokens, reason, speed, memory}
//      {type: "problem", text}
importScripts("manifest.js", "fetching.js");

const ENGINES = {litert: "./litert.js", transformers: "./transformers.js"};
const WARMING = 1500; // milliseconds
const BREATH = 30; // milliseconds between two looks at the messages
const channel = new MessageChannel();
let engine, tokenizer, choose, stopped;
let telling = Promise.resolve(); // one story at a time: they share the engine

onmessage = async ({data}) => {
  try {
    if (data.type === "load") await load(data);
    else stopped = true; // a story, or warming up
    if (data.type === "tell") await (telling = telling.catch(() => {}).then(() => tell(data)));
  } catch (error) {
    postMessage({type: "problem", text: inWords(error)});
  }
};

async function load({engine: name, threads}) {
  const {contextLength, onnx} = MANIFEST.model;
  const report = (done, total) => postMessage({type: "loading", done, total});
  const fetchFile = (path) => fetchWhole(path, report);
  const [sampler, words, {load: make}] = await Promise.all(
    ["./sampler.js", "./tokenizer.js", ENGINES[name]].map((module) => import(module)));
  choose = sampler.choose;
  const [file, settings] = await Promise.all(
    ["model/tokenizer.json", "model/tokenizer_config.json"].map(fetchJson));
  tokenizer = new words.StoryTokenizer(file, settings);
  engine = await make({fetchWhole: fetchFile, onnx, threads});
  engine.contextLength = contextLength;
  engine.reset();
  postMessage({type: "ready", engine: name, threads: engine.threads, memory: engine.memory});
  telling = warmUp();
}

// A browser compiles WebAssembly quickly, and then better what has run for a while: before the first
// story rather than during it. A wish ends it.
async function warmUp() {
  stopped = false;
  const end = performance.now() + WARMING;
  for (let ids = Array(32).fill(0); !stopped && performance.now() < end && engine.length < engine.contextLength / 2; ids = [0]) {
    await engine.read(ids);
    await messages();
  }
}

async function tell({story, prompt, options}) {
  stopped = false;
  const {contextLength, stopIds, vocabulary} = MANIFEST.model;
  const ids = tokenizer.encode(prompt), seen = [...ids], tokens = [];
  if (ids.length > contextLength) throw new Error(`the wishes take ${ids.length} tokens, the model reads ${contextLength}`);
  engine.reset();
  let unread = ids, reason = "length", started = 0, breath = performance.now();
  const speed = () => (tokens.length > 1 ? (1000 * (tokens.length - 1)) / (performance.now() - started) : 0);
  while (tokens.length < options.max_tokens && engine.length < contextLength) {
    const logits = (await engine.read(unread)).subarray(0, vocabulary);
    const token = choose(logits, seen, options, seen.length);
    if (stopIds.includes(token)) { reason = "stop"; break; }
    if (!tokens.length) started = performance.now(); // the first comes from the prompt
    tokens.push(token);
    seen.push(token);
    unread = [token];
    if (performance.now() - breath > BREATH) {
      postMessage({type: "text", story, text: tokenizer.decode(tokens), speed: speed()});
      await messages();
      breath = performance.now();
      if (stopped) { reason = "stopped"; break; }
    }
  }
  const text = tokenizer.decode(tokens);
  postMessage({type: "told", story, text, tokens, reason, speed: speed(), memory: engine.memory});
}

// Lets messages in. Nested timers would wait 4 ms.
function messages() {
  return new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });
}

// What went wrong, as a person can use it.
function inWords(error) {
  const text = String(error?.message ?? error);
  const gigabytes = (MANIFEST.files["model/model.tflite"].bytes / 1e9).toFixed(1);
  if (error instanceof RangeError || /out of memory|OOM|allocat|Aborted\(/i.test(text))
    return `The model, ${gigabytes} GB, did not fit into this browser's memory. Close other tabs, or pack a smaller model. (${text})`;
  return text;
}
