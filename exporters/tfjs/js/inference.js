// Frames and inference, the same in Node.js and on a page.
"use strict";

const ARRAYS = { float32: Float32Array, int32: Int32Array, bool: Uint8Array, uint8: Uint8Array };

// A frame is the length of its header (4 bytes, little-endian), the header as JSON, and the bytes of the arrays that
// header.arrays describes, one after the other.
function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let at = 4 + length;
  const arrays = header.arrays.map(({ shape, dtype }) => {
    const bytes = shape.reduce((a, b) => a * b, 1) * ARRAYS[dtype].BYTES_PER_ELEMENT;
    at += bytes;
    return new ARRAYS[dtype](buffer.slice(at - bytes, at));
  });
  return [header, arrays];
}

function pack(header, arrays = []) {
  const text = new TextEncoder().encode(JSON.stringify({ arrays: [], ...header }));
  const frame = new Uint8Array(arrays.reduce((sum, a) => sum + a.byteLength, 4 + text.length));
  new DataView(frame.buffer).setUint32(0, text.length, true);
  frame.set(text, 4);
  let at = 4 + text.length;
  for (const array of arrays) {
    frame.set(new Uint8Array(array.buffer, array.byteOffset, array.byteLength), at);
    at += array.byteLength;
  }
  return frame;
}

class Inference {
  // `tf` is TensorFlow.js, `wasm` its backend of that name, `load` gives the model, `further` are more operations.
  constructor(tf, wasm, load, further = {}) {
    Object.assign(this, { tf, wasm, load, further });
  }

  // Starts the backend, whose binaries lie in `place`, and gives a frame that says what runs: `host` it in.
  async start(place, host) {
    const { tf, wasm } = this;
    wasm.setWasmPaths(place);
    if (!await tf.setBackend("wasm") || tf.getBackend() !== "wasm") throw new Error("the wasm backend does not start");
    await tf.ready();
    const simd = await tf.env().getAsync("WASM_HAS_SIMD_SUPPORT");
    const threaded = simd && await tf.env().getAsync("WASM_HAS_MULTITHREAD_SUPPORT");
    return pack({
      host,
      version: tf.version_core,
      wasm: wasm.version_wasm,
      bits: tf.backend().floatPrecision(),
      simd,
      threads: threaded ? wasm.getThreadsCount() : 1,
    });
  }

  // The frame that answers a frame; an exception becomes one with its text.
  async answer(buffer) {
    try {
      const [header, arrays] = unpack(buffer);
      const operation = { load: this.open, run: this.run, ...this.further }[header.op];
      return await operation.call(this, header, arrays);
    } catch (error) {
      return pack({ error: String(error?.message ?? error) });
    }
  }

  async open() {
    this.model = await this.load();
    return pack({});
  }

  // Outputs by name, computed and read back, with the milliseconds that it took.
  async infer(header, arrays) {
    const { tf } = this, begun = performance.now(), feeds = {};
    header.inputs.forEach((name, n) => {
      feeds[name] = tf.tensor(arrays[n], header.arrays[n].shape, header.arrays[n].dtype);
    });
    let made = [];
    try {
      made = [this.model.execute(feeds, header.outputs)].flat();
      const values = await Promise.all(made.map(tensor => tensor.data()));
      return { made: made.map(({ shape, dtype }) => ({ shape, dtype })), values, ms: performance.now() - begun };
    } finally {
      tf.dispose([Object.values(feeds), made]);
    }
  }

  async run(header, arrays) {
    const { made, values, ms } = await this.infer(header, arrays);
    return pack({ arrays: made, ms }, values);
  }
}

if (typeof module !== "undefined") module.exports = { Inference, pack };
