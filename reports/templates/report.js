"use strict";
const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));

// Of many cases the details are text until they are needed: a browser with a script reads <noscript> so.
function fill(node) {
  const kept = node.querySelector(":scope > noscript");
  if (!kept) return;
  kept.outerHTML = kept.textContent;
  equip(node);
}
addEventListener("toggle", event => fill(event.target), true);

// A cell of the matrix leads into a folded case: open what its anchor lies in, then go there.
function reveal() {
  const name = decodeURIComponent(location.hash.slice(1));
  const holder = document.getElementById(name.replace(/^c(\d+)-\d+$/, "r$1"));
  if (holder) fill(holder);
  const target = name && document.getElementById(name);
  if (!target) return;
  for (let node = target; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
  target.scrollIntoView();
}
addEventListener("hashchange", reveal);

// Paper has nothing to click on: everything is unfolded for printing, and folded as it was afterwards.
let folded = [];
addEventListener("beforeprint", () => {
  all("details.case").forEach(fill);
  folded = all("details:not([open])");
  folded.forEach(node => { node.open = true; });
});
addEventListener("afterprint", () => folded.forEach(node => { node.open = false; }));

const tools = document.getElementById("tools");
const search = document.getElementById("search");
const only = document.getElementById("only");
function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  all("[data-row]").forEach(node => {
    const fits = words.every(word => node.dataset.row.toLowerCase().includes(word));
    node.hidden = !fits || (only.checked && node.dataset.failing !== "1");
    if (!node.hidden && node.matches("details.case")) shown += 1;
  });
  const told = `${shown} of ${all("details.case").length} cases shown`;
  document.getElementById("shown").textContent = words.length || only.checked ? told : "";
}
if (tools) {  // a run that came to no case has nothing to filter
  tools.hidden = false;
  search.addEventListener("input", filter);
  only.addEventListener("change", filter);
}

const equip = root => all("pre.command", root).forEach(block => {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    const code = block.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  block.append(button);
});
equip(document);
reveal();
