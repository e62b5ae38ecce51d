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
  const plain = row => text(row).replaceAll(",", "").replace("\u2212", "-");
  const number = row => parseFloat(plain(row).match(/^[-+]?[\d.]+(e[-+]?\d+)?(?!\w)/)?.[0]);
  const isText = row => Number.isNaN(number(row));
  return rows.sort((a, b) =>
    isText(a) - isText(b) || sign * (isText(a) ? text(a).localeCompare(text(b)) : number(a) - number(b)));
}

// Enlarge an image; Escape or a click closes it.
const dialog = document.querySelector("dialog");
dialog.onclick = () => dialog.close();
for (const button of document.querySelectorAll(".image")) {
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
