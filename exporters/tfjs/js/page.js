// TensorFlow.js on a page: each answer is posted to the server, whose response is the next frame.
"use strict";

const alive = new EventSource("alive"); // open as long as this page is, which the server sees
const state = document.getElementById("state");

async function main() {
  let answer, inference;
  try { // also of a library that did not load
    inference = new Inference(tf, tf.wasm, () => tf.loadGraphModel("model/model.json"), { show });
    answer = await inference.start("wasm/", `${navigator.userAgent.match(/Chrom\w*\/[\d.]+/)}`);
    state.textContent = "Waiting for a model …";
  } catch (error) {
    answer = pack({ error: String(error?.message ?? error) });
  }
  for (;;) {
    const response = await fetch("exchange", { method: "POST", body: answer });
    if (!response.ok) break;
    answer = await inference.answer(await response.arrayBuffer());
  }
  state.textContent = "The session is closed.";
}

main();
