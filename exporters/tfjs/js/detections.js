// A detector's boxes: suppression, and a picture of what is left.
"use strict";

const COLOURS = ["#d1242f", "#0969da", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#0a7ea4", "#57606a"];

// Boxes [left, top, right, bottom, score, class] of raw output [1, 4 + classes or more, anchors] with centres and sizes
// in pixels: the highest score of each anchor above `conf`, best first, less those that overlap a better one of their
// class by more than `iou`.
function detections(values, anchors, classes, conf, iou) {
  const found = [];
  for (let a = 0; a < anchors; a++) {
    let best = 4;
    for (let c = 5; c < 4 + classes; c++) if (values[c * anchors + a] > values[best * anchors + a]) best = c;
    const score = values[best * anchors + a];
    if (!(score > conf)) continue;
    const [x, y, w, h] = [0, 1, 2, 3].map(c => values[c * anchors + a]);
    found.push([x - w / 2, y - h / 2, x + w / 2, y + h / 2, score, best - 4]);
  }
  found.sort((p, q) => q[4] - p[4]);
  const kept = [];
  for (const box of found) if (!kept.some(k => k[5] === box[5] && overlap(k, box) > iou)) kept.push(box);
  return kept;
}

function overlap(p, q) {
  const width = Math.max(0, Math.min(p[2], q[2]) - Math.max(p[0], q[0]));
  const height = Math.max(0, Math.min(p[3], q[3]) - Math.max(p[1], q[1]));
  const area = b => (b[2] - b[0]) * (b[3] - b[1]);
  return width * height / (area(p) + area(q) - width * height);
}

// Paints an image (values from 0 to 1, [1, height, width, 3]) and boxes onto the canvas.
function draw(canvas, image, [, height, width], boxes, names) {
  const pixels = new ImageData(width, height);
  for (let p = 0; p < width * height; p++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * p + c] = Math.round(255 * image[3 * p + c]);
    pixels.data[4 * p + 3] = 255;
  }
  const plain = new OffscreenCanvas(width, height);
  plain.getContext("2d").putImageData(pixels, 0, 0);
  const scale = canvas.width / width, pen = canvas.getContext("2d");
  canvas.height = Math.round(height * scale);
  pen.drawImage(plain, 0, 0, canvas.width, canvas.height);
  pen.lineWidth = 3;
  pen.font = "bold 16px system-ui, sans-serif";
  pen.textBaseline = "middle";
  for (const [left, top, right, bottom, score, kind] of boxes.toReversed()) { // the best is on top
    const colour = COLOURS[kind % COLOURS.length], text = `${names[kind] ?? kind} ${score.toFixed(2)}`;
    const [x, y] = [left * scale, top * scale], wide = pen.measureText(text).width + 8;
    pen.strokeStyle = pen.fillStyle = colour;
    pen.strokeRect(x, y, (right - left) * scale, (bottom - top) * scale);
    const [tag, above] = [Math.max(0, Math.min(x - 1.5, canvas.width - wide)), Math.max(0, y - 22)];
    pen.fillRect(tag, above, wide, 22);
    pen.fillStyle = "#fff";
    pen.fillText(text, tag + 4, above + 11);
  }
}

// Runs the model on one picture, shows what it detects, and gives the boxes and the canvas as PNG.
async function show(header, arrays) {
  const { made, values, ms } = await this.infer(header, arrays);
  const boxes = detections(values[0], made[0].shape[2], header.names.length, header.conf, header.iou);
  const canvas = document.getElementById("picture");
  draw(canvas, arrays[0], header.arrays[0].shape, boxes, header.names);
  document.getElementById("title").textContent = header.title;
  document.getElementById("state").textContent = `${boxes.length} detections above ${header.conf} in ${ms.toFixed(1)} ms, ` +
    `TensorFlow.js ${this.tf.version_core}, ${this.tf.getBackend()} backend`;
  const blob = await new Promise(done => canvas.toBlob(done, "image/png"));
  const picture = new Uint8Array(await blob.arrayBuffer());
  const described = [{ shape: [boxes.length, 6], dtype: "float32" }, { shape: [picture.length], dtype: "uint8" }];
  return pack({ arrays: described, ms }, [new Float32Array(boxes.flat()), picture]);
}
