"""Style and script of the pages that lora_dag/pages/html.py writes: constants, so that they are code like any other."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --faint: #59636e; --line: #d1d9e0; --accent: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --faint: #9198a1; --line: #3d444d; --accent: #58a6ff; }
  .plot img { filter: invert(0.93) hue-rotate(180deg); }  /* dark lines on white become light lines on dark */
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: auto; padding: 1rem 1rem 4rem; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.25; margin: 2rem 0 0.75rem; }
h1 { margin-top: 1rem; }
h2 { padding-bottom: 0.25rem; border-bottom: 1px solid var(--line); }
a { color: var(--accent); }
code, pre { font: 0.9em ui-monospace, monospace; }
pre { overflow-x: auto; padding: 0.75rem; border: 1px solid var(--line); border-radius: 6px; }
button, select { font: inherit; color: inherit; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }

.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.75rem; border: 1px solid var(--line); vertical-align: top; }
th button { padding: 0; border: 0; background: none; font-weight: inherit; text-align: inherit; cursor: pointer; }
th button::after { content: "\\2195"; color: var(--faint); margin-left: 0.35em; }
th[aria-sort=ascending] button::after { content: "\\2191"; }
th[aria-sort=descending] button::after { content: "\\2193"; }
@media (max-width: 45rem) {
  th, td { padding: 0.2rem 0.4rem; font-size: 0.85rem; }
  td:first-child { overflow-wrap: anywhere; }  /* long names break, so that the last column stays in sight */
}

img { max-width: 100%; background: #fff; border-radius: 4px; }
.picture { display: block; max-width: 100%; margin: 1rem 0; padding: 0; border: 0; background: none; cursor: zoom-in; }
.picture img { display: block; }
dialog { max-width: 100vw; max-height: 100vh; border: 0; padding: 0; overflow: auto; cursor: zoom-out; }
dialog::backdrop { background: rgb(0 0 0 / 0.8); }
dialog img { display: block; width: 94vw; height: 92vh; object-fit: contain; }
@media (max-width: 45rem) { dialog img { width: auto; height: auto; max-width: none; min-width: 94vw; } }

.beside { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: flex-start; }
.beside > div { max-width: 100%; }

.slider { width: 24rem; max-width: 100%; margin: 1rem 0; --at: 50%; }
.slider > div { position: relative; line-height: 0; }
.slider img { width: 100%; border-radius: 0; outline: 1px solid var(--line); }
.slider img + img { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--at)); }
.slider input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; cursor: ew-resize;
  appearance: none; background: none; touch-action: pan-y; }
.slider input::-webkit-slider-thumb { appearance: none; width: 4px; height: 200rem; background: #cf222e; }
.slider input::-moz-range-thumb { width: 4px; height: 200rem; border: 0; border-radius: 0; background: #cf222e; }
.slider input { overflow: hidden; }
.slider figcaption { display: flex; justify-content: space-between; gap: 1rem; color: var(--faint); }
.choice label { display: flex; flex-wrap: wrap; gap: 0.5rem; align-items: baseline; }
.choice select { max-width: 100%; padding: 0.25rem; }
"""

SCRIPT = """
// Sort a table by the column that is clicked; one whose last heading is empty lists facts, and keeps its order.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  if (!body || !heads.at(-1).textContent.trim()) continue;
  for (const [column, head] of heads.entries()) {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const order = head.ariaSort === "ascending" ? "descending" : "ascending";
      for (const other of heads) other.ariaSort = null;
      head.ariaSort = order;
      body.append(...sorted([...body.rows], column, order === "ascending" ? 1 : -1));
    };
  }
}

// By the number that a cell begins with, else by its text; cells without a number come last in either direction.
function sorted(rows, column, sign) {
  const text = row => row.cells[column].textContent.trim();
  const plain = row => text(row).replaceAll(",", "").replace("\\u2212", "-");
  const number = row => parseFloat(plain(row).match(/^[-+]?[\\d.]+(e[-+]?\\d+)?(?!\\w)/)?.[0]);
  const isText = row => Number.isNaN(number(row));
  return rows.sort((a, b) =>
    isText(a) - isText(b) || sign * (isText(a) ? text(a).localeCompare(text(b)) : number(a) - number(b)));
}

// Enlarge a picture; Escape or a click closes it.
const dialog = document.querySelector("dialog");
dialog.onclick = () => dialog.close();
for (const button of document.querySelectorAll(".picture")) {
  button.onclick = () => {
    dialog.className = button.classList.contains("plot") ? "plot" : "";
    dialog.replaceChildren(button.firstElementChild.cloneNode());
    dialog.showModal();
  };
}

for (const input of document.querySelectorAll(".slider input")) {
  input.oninput = () => input.closest(".slider").style.setProperty("--at", `${input.value}%`);
}

for (const select of document.querySelectorAll(".choice select")) {
  const panels = [...select.closest(".choice").querySelectorAll(":scope > div")];
  select.oninput = () => panels.forEach((panel, index) => { panel.hidden = index !== select.selectedIndex; });
  select.oninput();
}
"""
