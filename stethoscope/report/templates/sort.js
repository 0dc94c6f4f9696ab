// A click on the head of a column sorts its table, a second one turns the order round, a third one restores it.
function value(row, column) {
  const cell = row.cells[column].cloneNode(true);
  for (const part of cell.querySelectorAll("small")) part.remove();
  const text = cell.textContent.trim(), number = parseFloat(text.replace("\u2212", "-"));
  return { text, number: /^[\u2212-]?\.?\d/.test(text) ? number : NaN };
}

function compare(first, second) {
  if (!first.text || !second.text) return Number(!first.text) - Number(!second.text) || 0;
  const numbers = [first.number, second.number].map(Number.isNaN);
  if (numbers[0] !== numbers[1]) return numbers[0] - numbers[1];
  return numbers[0] ? first.text.localeCompare(second.text) : second.number - first.number;
}

for (const table of document.querySelectorAll("figure.table table")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  if (rows.length < 3) continue;
  heads.forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const state = { "": "descending", descending: "ascending", ascending: "" }[head.getAttribute("aria-sort") || ""];
      for (const other of heads) other.removeAttribute("aria-sort");
      const sorted = [...rows];
      if (state) {
        head.setAttribute("aria-sort", state);
        const turn = state === "descending" ? 1 : -1;
        sorted.sort((a, b) => {
          const pair = [value(a, column), value(b, column)];
          return (pair[0].text && pair[1].text ? turn : 1) * compare(...pair);
        });
      }
      body.replaceChildren(...sorted);
    });
  });
}
