// TensorFlow.js in Node.js: frames come through standard input, each behind its length, and answers go out the same way.
// Arguments: the folder node_modules, and the model.json.
"use strict";

// What libraries print must not get between the answers.
for (const word of ["log", "info", "debug"]) console[word] = console.error;

const fs = require("node:fs");
const path = require("node:path");
const { Inference, pack } = require("./inference.js");

const [modules, file] = process.argv.slice(2);
const library = name => require(path.join(modules, "@tensorflow", name));
const tf = library("tfjs-core"), { loadGraphModel } = library("tfjs-converter"), wasm = library("tfjs-backend-wasm");

// TensorFlow.js reads no files in Node.js without its native package.
const read = {
  load: () => tf.io.getModelArtifactsForJSON(JSON.parse(fs.readFileSync(file, "utf8")), async manifest => {
    const shards = manifest.flatMap(group => group.paths).map(name => fs.readFileSync(path.join(path.dirname(file), name)));
    const all = Buffer.concat(shards);
    return [manifest.flatMap(group => group.weights), all.buffer.slice(all.byteOffset, all.byteOffset + all.length)];
  }),
};

function write(frame) {
  const length = Buffer.alloc(4);
  length.writeUInt32LE(frame.length);
  process.stdout.write(length);
  process.stdout.write(frame);
}

async function main() {
  const inference = new Inference(tf, wasm, () => loadGraphModel(read));
  try {
    write(await inference.start(path.join(modules, "@tensorflow/tfjs-backend-wasm/dist") + path.sep, `Node.js ${process.version}`));
  } catch (error) {
    write(pack({ error: String(error?.message ?? error) }));
  }
  let parts = [], held = 0, wanted = 4, isLength = true;
  for await (const chunk of process.stdin) {
    parts.push(chunk);
    held += chunk.length;
    while (held >= wanted) {
      const all = Buffer.concat(parts), one = all.subarray(0, wanted), rest = all.subarray(wanted);
      parts = rest.length ? [rest] : [];
      held = rest.length;
      if (!isLength) write(await inference.answer(one.buffer.slice(one.byteOffset, one.byteOffset + one.length)));
      wanted = isLength ? one.readUInt32LE() : 4;
      isLength = !isLength;
    }
  }
}

main();
