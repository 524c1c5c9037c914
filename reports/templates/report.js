"use strict";
const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));

// A cell of the matrix leads into a folded case: open what its anchor lies in, then go there.
function reveal() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let node = target; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
  target.scrollIntoView();
}
addEventListener("hashchange", reveal);
reveal();

// Paper has nothing to click on: everything is unfolded for printing, and folded as it was afterwards.
let folded = [];
addEventListener("beforeprint", () => {
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
    if (!node.hidden && node.tagName === "TR") shown += 1;
  });
  document.getElementById("shown").textContent = words.length || only.checked ? `${shown} shown` : "";
}
tools.hidden = false;
search.addEventListener("input", filter);
only.addEventListener("change", filter);

all("pre.command").forEach(block => {
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
