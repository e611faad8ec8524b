// The ONNX export, run by Transformers.js on onnxruntime in WebAssembly: token ids in, logits out.
import {AutoModelForCausalLM, DynamicCache, Tensor, env} from "./libraries/transformers.min.js";

const HERE = new URL("./", import.meta.url);

const memories = []; // that WebAssembly was given, to say how large they have grown
WebAssembly.Memory = class extends WebAssembly.Memory {
  constructor(...size) {
    super(...size);
    memories.push(this);
  }
};

export async function load({fetchWhole, onnx, threads}) {
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = HERE.href;
  env.useBrowserCache = env.useWasmCache = false; // the service worker keeps what there is
  const runtime = new URL("libraries/onnxruntime/ort-wasm-simd-threaded", HERE).href;
  env.backends.onnx.wasm.wasmPaths = {mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm`};
  env.backends.onnx.wasm.numThreads = threads;
  await fetchWhole(onnx); // only to be sure of it
  return new Engine(await AutoModelForCausalLM.from_pretrained("model", {device: "wasm"}), threads);
}

class Engine {
  constructor(model, threads) {
    Object.assign(this, {model, threads});
  }

  reset() {
    this.length = 0;
    this.caches = null;
  }

  async read(ids) {
    this.length += ids.length;
    const whole = (values, shape) => new Tensor("int64", BigInt64Array.from(values, BigInt), shape);
    const {logits, ...written} = await this.model({
      input_ids: whole(ids, [1, ids.length]),
      attention_mask: whole(Array(this.length).fill(1), [1, this.length]),
      past_key_values: this.caches,
      num_logits_to_keep: whole([1], []),
    });
    this.caches = new DynamicCache(Object.fromEntries(
      Object.entries(written).map(([name, tensor]) => [name.replace("present", "past_key_values"), tensor])));
    return logits.data.slice(-logits.dims.at(-1));
  }

  get memory() {
    return memories.reduce((sum, memory) => sum + memory.buffer.byteLength, 0);
  }
}
