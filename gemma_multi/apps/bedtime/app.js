// The page: what was wished for goes to the worker, what it tells is shown word by word.
import {KINDS, LENGTHS, NAMES, SETTINGS, THEMES, TWISTS, promptOf} from "./choices.js";
import {cover} from "./cover.js";

const at = (id) => document.getElementById(id);
const form = at("wishes");
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const onPhone = matchMedia("(max-width: 48rem)"); // as in style.css: the story is below the wishes
const threads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 4) : 1;
let worker, ready = false, whole = "", finished = true, shown = 0, timer;
let story = 0; // its number: what is still told of an earlier one is not shown

const lists = {kind: KINDS, setting: SETTINGS, twist: TWISTS, theme: THEMES, length: LENGTHS};
for (const [name, values] of Object.entries(lists)) form[name].append(...values.map((value) => new Option(value)));
at("names").append(...NAMES.map((name) => new Option(name)));
form.length.value = "medium";
at("engines").hidden = !MANIFEST.model.onnx;

function wishes() {
  const given = Object.fromEntries(new FormData(form));
  return {...given, seed: Number(given.seed)};
}

function loadEngine() {
  worker?.terminate();
  ready = false;
  showButtons();
  worker = new Worker("worker.js");
  worker.onmessage = ({data}) => {
    if (!("story" in data) || data.story === story) on[data.type](data);
  };
  worker.onerror = ({message}) => on.problem({text: `The worker could not start: ${message}`});
  worker.postMessage({type: "load", engine: form.engine.value, threads});
}

const on = {
  loading: ({done, total}) => { at("status").textContent = `Loading the model, ${Math.floor((100 * done) / total)}%`; },
  ready: ({engine, threads, memory}) => {
    ready = true;
    const name = engine === "litert" ? "LiteRT" : "Transformers.js";
    at("status").textContent = `${name}, ${threads} ${threads > 1 ? "threads" : "thread"}`;
    showNumbers(0, memory);
    showButtons();
    keepOffline();
  },
  text: ({text, speed}) => { whole = text; showNumbers(speed); },
  told: ({text, tokens, reason, speed, memory}) => {
    whole = reason === "length" ? `${text} …` : text;
    finished = true;
    at("story").dataset.tokens = tokens;
    showNumbers(speed, memory);
  },
  problem: ({text}) => { self.showProblem(text); finished = true; showButtons(); },
};

let memoryNow = 0;
function showNumbers(speed, memory = memoryNow) {
  memoryNow = memory;
  at("speed").textContent = (speed ? `${speed.toFixed()} tokens/s · ` : "") + `${(memory / 1e6).toFixed()} MB`;
}

// Shows what is there, a word at a time; sentences are said to screen readers once they are whole.
function read() {
  clearTimeout(timer);
  const pace = calm.matches ? 0 : Number(form.pace.value);
  const next = pace ? /^\s*\S+/.exec(whole.slice(shown)) : null;
  const end = pace ? shown + (next?.[0].length ?? 0) : whole.length;
  if (end > shown && (finished || !pace || end < whole.length)) {
    const before = sentences(whole.slice(0, shown));
    shown = end;
    at("story").replaceChildren(...paragraphs(whole.slice(0, shown)));
    const said = sentences(whole.slice(0, shown)).slice(before.length);
    if (said.length) at("heard").textContent = said.join(" ");
  }
  const over = finished && shown >= whole.length;
  at("story").setAttribute("aria-busy", String(!over));
  if (!over) timer = setTimeout(read, pace || 30);
  showButtons();
}

const sentences = (text) => text.match(/[^.!?]+[.!?]+/g) ?? [];

function paragraphs(text) {
  return text.split(/\n+/).map((part) => Object.assign(document.createElement("p"), {textContent: part}));
}

function showButtons() {
  const reading = at("story").getAttribute("aria-busy") === "true";
  at("tell").disabled = !ready || reading;
  at("stop").disabled = !reading;
  at("again").disabled = at("save").disabled = reading || !whole;
}

function begin() {
  shown = 0;
  at("story").replaceChildren();
  at("story").setAttribute("aria-busy", "true");
  read();
}

form.onsubmit = (event) => {
  event.preventDefault();
  self.showProblem("");
  const chosen = wishes();
  [whole, finished] = ["", false];
  story += 1;
  at("cover").innerHTML = cover(chosen);
  if (onPhone.matches) at("cover").scrollIntoView({behavior: calm.matches ? "auto" : "smooth"});
  const options = {...MANIFEST.model.options, seed: chosen.seed};
  worker.postMessage({type: "tell", story, prompt: promptOf(chosen), options});
  begin();
};
at("stop").onclick = () => {
  worker.postMessage({type: "stop"});
  clearTimeout(timer);
  story += 1;
  whole = whole.slice(0, shown);
  finished = true;
  at("story").setAttribute("aria-busy", "false");
  showButtons();
};
at("again").onclick = begin;
at("another").onclick = () => { form.seed.value = crypto.getRandomValues(new Uint32Array(1))[0]; };
at("save").onclick = () => {
  const text = paragraphs(whole).map((part) => part.outerHTML).join("\n");
  const title = `${wishes().name} the ${wishes().kind}`;
  const page = `<!doctype html><meta charset="utf-8"><title>Bedtime story</title><body style="max-width:38rem;margin:2rem auto;font:1.1rem/1.7 Georgia,serif">\n${at("cover").innerHTML}\n${text}\n`;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([page], {type: "text/html"}));
  link.download = `${title.replace(/[^\p{L} -]/gu, "").replaceAll(" ", "-")}.html`;
  link.click();
  URL.revokeObjectURL(link.href);
};
at("engines").onchange = loadEngine;

async function keepOffline() {
  if (!navigator.serviceWorker) return;
  try {
    const {installing} = await navigator.serviceWorker.register("sw.js");
    await Promise.race([navigator.serviceWorker.ready, new Promise((_, fail) => {
      if (installing) installing.onstatechange = () => { if (installing.state === "redundant") fail(new Error("no room, or a file is not what was packed")); };
    })]);
    at("offline").textContent = "works offline";
  } catch (error) {
    at("offline").textContent = "not kept offline";
    console.warn(error);
  }
}

at("cover").innerHTML = cover(wishes());
form.oninput = () => { if (finished && !whole) at("cover").innerHTML = cover(wishes()); };
if (!self.CANNOT_RUN) loadEngine();
