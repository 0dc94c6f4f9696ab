// Patches that are chosen in one of the two pictures, and the words that were written from them.
const PICTURES = { picture: () => data.maps[$("source").value] || data.maps.raw, "attention-picture": () => (data.attention && data.attention.box ? data.attention : null) };
let patches = null; // shape and box of a grid, its chosen cells, and the two corners of the last rectangle
let dragged = null; // canvas, first cell, and the cells that were chosen before

function sameGrid(one, other) {
  return one.shape.every((side, index) => side === other.shape[index]) && one.box.every((edge, index) => Math.abs(edge - other.box[index]) < 0.5);
}

function patchAt(id, event) {
  const map = PICTURES[id](), area = $(id).getBoundingClientRect();
  const [left, top, right, bottom] = map.box, [rows, columns] = map.shape, [width, height] = data.size;
  const scale = Math.min(area.width / width, area.height / height); // object-fit: contain
  const x = (event.clientX - area.left - area.width / 2) / scale + width / 2, y = (event.clientY - area.top - area.height / 2) / scale + height / 2;
  const column = Math.floor((x - left) / (right - left) * columns), row = Math.floor((y - top) / (bottom - top) * rows);
  return column >= 0 && column < columns && row >= 0 && row < rows ? row * columns + column : null;
}

function rectangle(columns, first, last) {
  const span = (a, b) => [...Array(Math.abs(a - b) + 1).keys()].map((step) => Math.min(a, b) + step);
  const across = span(first % columns, last % columns);
  return span(Math.floor(first / columns), Math.floor(last / columns)).flatMap((row) => across.map((column) => row * columns + column));
}

function choosePatches(id, cells, anchor, cursor) {
  const { shape, box } = PICTURES[id]();
  patches = cells.size ? { shape, box, cells, anchor, cursor } : null;
  soon();
}

function kept(id) { // the cells that more are added to: those of the same grid
  return patches && sameGrid(patches, PICTURES[id]()) ? new Set(patches.cells) : new Set();
}

function adds(event) {
  return event.shiftKey || event.ctrlKey || event.metaKey || $("patch-add").checked;
}

function wirePicture(id) {
  const canvas = $(id), ready = () => data && data.kind === "done" && PICTURES[id]();
  canvas.addEventListener("pointerdown", (event) => {
    dragged = null;
    if (!ready() || event.pointerType === "touch" || event.button) return; // a finger scrolls
    const first = patchAt(id, event);
    if (first === null) return;
    dragged = { first, last: first, before: adds(event) ? kept(id) : new Set() };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const last = dragged && event.buttons && ready() ? patchAt(id, event) : null;
    if (last === null || last === dragged.last) return;
    dragged.last = last;
    dragged.moved = true;
    choosePatches(id, new Set([...dragged.before, ...rectangle(PICTURES[id]().shape[1], dragged.first, last)]), dragged.first, last);
  });
  canvas.addEventListener("click", (event) => {
    const moved = dragged && dragged.moved;
    dragged = null;
    if (!ready() || moved) return;
    const cell = patchAt(id, event), cells = adds(event) ? kept(id) : new Set();
    if (cell !== null && !cells.delete(cell)) cells.add(cell);
    choosePatches(id, cells, cell, cell);
  });
  canvas.addEventListener("keydown", (event) => {
    if (!ready() || (!STEPS[event.key] && event.key !== "Escape")) return;
    event.preventDefault();
    if (event.key === "Escape") { choosePatches(id, new Set(), null, null); return; }
    const [rows, columns] = PICTURES[id]().shape, own = kept(id), [down, right] = STEPS[event.key];
    let { anchor, cursor } = own.size && patches.cursor !== null ? patches : { anchor: null, cursor: null };
    if (cursor === null) anchor = cursor = Math.floor(rows / 2) * columns + Math.floor(columns / 2);
    else {
      const row = Math.min(rows - 1, Math.max(0, Math.floor(cursor / columns) + down));
      cursor = row * columns + Math.min(columns - 1, Math.max(0, cursor % columns + right));
    }
    if (!event.shiftKey) anchor = cursor;
    const added = rectangle(columns, anchor, cursor);
    choosePatches(id, new Set($("patch-add").checked ? [...own, ...added] : added), anchor, cursor);
  });
}

function outlinePatches(brush, scale) {
  if (!patches) return;
  const [rows, columns] = patches.shape, [left, top, right, bottom] = patches.box.map((edge) => edge * scale);
  const wide = (right - left) / columns, high = (bottom - top) / rows;
  brush.beginPath();
  for (const cell of patches.cells) {
    const row = Math.floor(cell / columns), column = cell % columns, x = left + column * wide, y = top + row * high;
    const edges = [[column === 0 || !patches.cells.has(cell - 1), x, y, x, y + high], [column === columns - 1 || !patches.cells.has(cell + 1), x + wide, y, x + wide, y + high],
      [!patches.cells.has(cell - columns), x, y, x + wide, y], [!patches.cells.has(cell + columns), x, y + high, x + wide, y + high]];
    for (const [outer, ...ends] of edges) if (outer) { brush.moveTo(ends[0], ends[1]); brush.lineTo(ends[2], ends[3]); }
  }
  brush.lineCap = "square";
  for (const [colour, thickness] of [["#000", 5], ["#fff", 2]]) {
    [brush.strokeStyle, brush.lineWidth] = [colour, thickness];
    brush.stroke();
  }
}

function covered(map) { // the share of every cell of a map that the chosen patches cover
  const [rows, columns] = map.shape, shares = new Float32Array(rows * columns);
  if (sameGrid(map, patches)) { patches.cells.forEach((cell) => { shares[cell] = 1; }); return shares; }
  const side = (from, to, start, stop, count) => [...Array(count).keys()].map((index) => { // of every stretch, from start to stop
    const step = (stop - start) / count, low = start + index * step;
    return Math.max(0, Math.min(to, low + step) - Math.max(from, low)) / step;
  });
  const [left, top, right, bottom] = patches.box, wide = (right - left) / patches.shape[1], high = (bottom - top) / patches.shape[0];
  for (const cell of patches.cells) {
    const x = left + (cell % patches.shape[1]) * wide, y = top + Math.floor(cell / patches.shape[1]) * high;
    const across = side(x, x + wide, map.box[0], map.box[2], columns), down = side(y, y + high, map.box[1], map.box[3], rows);
    down.forEach((part, row) => { if (part) across.forEach((other, column) => { shares[row * columns + column] += part * other; }); });
  }
  return shares;
}

function patchValues() { // by token, what the chosen patches are to it; null where the page does not have the map
  const none = data.tokens.map(() => null), map = PICTURES.picture(), own = PICTURES["attention-picture"]();
  if (!patches) return { relevancy: none, attention: none };
  const of = map && covered(map), to = own && covered(own), size = map && map.shape[0] * map.shape[1], layer = number("layer");
  const sum = (values, weights) => values.reduce((total, value, cell) => total + value * weights[cell], 0);
  const relevancies = (token) => {
    const index = token * data.layers.length + layer;
    return sum(map.values.subarray(index * size, (index + 1) * size), of) / 255 * map.peaks[token][layer];
  };
  const attentions = (token) => {
    const values = attentionOf(token, picked("attention-layer"), picked("attention-head"));
    return values && sum(values, to);
  };
  return { relevancy: none.map((_, token) => (map ? relevancies(token) : null)), attention: none.map((_, token) => (own ? attentions(token) : null)) };
}

function fromPatches(values) {
  for (const [kind, id] of [["relevancy", "patch"], ["attention", "patch-attention"]]) {
    const rows = values[kind].map((value, token) => ({ token, value })).filter((row) => row.value !== null);
    $(id).hidden = !rows.length;
    if (!rows.length) continue;
    const text = kind === "relevancy" ? (value) => value.toPrecision(2) : percent;
    bars(`${id}-tokens`, rows.sort((a, b) => b.value - a.value).slice(0, 5).map(({ token, value }) => (
      { name: shown(data.tokens[token].text), value, text: text(value), token })));
    const these = patches.cells.size === 1 ? "this patch" : `these ${patches.cells.size} patches`, left = values[kind].length - rows.length;
    $(`${id}-title`).textContent = kind === "relevancy" ? `Tokens to which ${these} ${patches.cells.size === 1 ? "was" : "were"} most relevant`
      : `Tokens that attended most to ${these}, ${layerName(picked("attention-layer"))}, ${headName(picked("attention-head"))}${left ? `; ${counted(left, "token")} not on the page` : ""}`;
  }
}
