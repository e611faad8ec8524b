// The .tflite that ships to Android, run by Google's LiteRT in WebAssembly: token ids in, logits out.
import {Tensor, loadAndCompile, loadLiteRt, supportsFeature} from "./libraries/litert/index.js";

const FOLDER = new URL("./libraries/litert/", import.meta.url).href;

export async function load({fetchWhole, threads: wanted}) {
  const threads = (await supportsFeature("relaxedSimd")) ? wanted : 1; // its other builds have none
  // LiteRT looks for its files, and starts its threads, from here
  self.Module = {
    locateFile: (name) => FOLDER + name,
    mainScriptUrlOrBlob: `${FOLDER}litert_wasm_threaded_internal.js`,
  };
  const [bytes, runtime] = await Promise.all([
    fetchWhole("model/model.tflite"), loadLiteRt(FOLDER, {threads: threads > 1})]);
  const cpuOptions = {numThreads: threads};
  const model = await loadAndCompile(bytes, {accelerator: "wasm", cpuOptions});
  return new Engine(model, runtime, threads);
}

class Engine {
  constructor(model, runtime, threads) {
    Object.assign(this, {model, runtime, threads});
    this.shapes = model.signatures.decode.getInputDetails().filter(({name}) => name.startsWith("kv_cache_"));
    this.caches = {}; // by name, and passed on from call to call
    this.sizes = Object.keys(model.signatures) // that tokens are read in at once
      .filter((name) => name.startsWith("prefill_"))
      .map((name) => Number(name.slice("prefill_".length)))
      .sort((a, b) => a - b);
  }

  // Forgets what was read. Caches are zeros at first: what is masked is finite.
  reset() {
    this.length = 0;
    this.keep(Object.fromEntries(this.shapes.map(({name, shape, dtype}) => {
      const zeros = new (dtype === "int8" ? Int8Array : Float32Array)(shape.reduce((a, b) => a * b, 1));
      return [name, new Tensor(zeros, shape)];
    })));
  }

  // Reads tokens; the logits after the last, a Float32Array.
  async read(ids) {
    for (let at = 0; at < ids.length - 1; ) {
      const left = ids.length - 1 - at;
      const size = this.chunk(left);
      await this.run(size > 1 ? `prefill_${size}` : "decode", size, ids.slice(at, at + Math.min(size, left)));
      at += size;
    }
    return this.run("decode", 1, ids.slice(-1));
  }

  // How many tokens to read next; padding may not reach past the end of the caches.
  chunk(left) {
    const room = this.contextLength - this.length;
    const sizes = this.sizes.filter((size) => size <= room);
    if (left === 1) return 1;
    return sizes.findLast((size) => left > size >> 1) ?? sizes[0] ?? 1;
  }

  async run(signature, size, ids) {
    const tokens = new Int32Array(size), positions = new Int32Array(size); // 0 is how padding is told
    ids.forEach((id, i) => { tokens[i] = id; positions[i] = this.length + i; });
    const inputs = {tokens: new Tensor(tokens, [1, size]), input_pos: new Tensor(positions, [size])};
    const {logits, ...caches} = await this.model.run(signature, {...inputs, ...this.caches});
    for (const tensor of Object.values(inputs)) tensor.delete();
    this.keep(caches);
    this.length += ids.length;
    if (!logits) return null;
    const scores = await logits.data();
    logits.delete();
    return scores;
  }

  keep(caches) {
    for (const tensor of Object.values(this.caches)) tensor.delete();
    this.caches = caches;
  }

  get memory() { // bytes
    return this.runtime.liteRtWasm.HEAPU8.byteLength;
  }
}
