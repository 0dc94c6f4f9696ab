// Raw attention in the viewer: by layer and head over the picture, and its mean as a matrix of tokens.
const grids = {}; // by the id of their canvas: what they show, and the cell that is pointed at
let fetching = null, patience = 0; // the token whose single heads the server is asked for, and the timer of the next

function numbers(text, kind) {
  return new kind(bytes(text).buffer);
}

function readMaps(maps) {
  return { values: bytes(maps.data), peaks: numbers(maps.peaks, Float32Array) };
}

function readAttention(own) {
  if (!own || own.mean) return;
  for (const name of ["mean", "largest"]) own[name] = readMaps(own.maps[name]);
  own.heads_of = {}; // by token, its single heads
  addHeads(own, own);
  own.sums = numbers(own.mass, Uint16Array);
  own.means = numbers(own.matrix, Uint16Array);
  own.cells = own.shape[0] * own.shape[1];
  own.peak = largest(own.means) / 32767;
}

function largest(values) { // also of more than a call can have arguments
  return values.reduce((most, value) => Math.max(most, value), 0);
}

function addHeads(own, sent) { // those of the payload, or of tokens that were asked for
  const single = readMaps(sent.single), count = own.layers * own.heads, cells = own.shape[0] * own.shape[1];
  sent.kept.forEach((token, index) => {
    own.heads_of[token] = { values: single.values.subarray(index * count * cells, (index + 1) * count * cells),
      peaks: single.peaks.subarray(index * count, (index + 1) * count) };
  });
}

function scaled(maps, index, cells) { // one map as shares
  const result = new Float32Array(cells), factor = maps.peaks[index] / 255;
  for (let cell = 0; cell < cells; cell++) result[cell] = maps.values[index * cells + cell] * factor;
  return result;
}

function combined(maps, kind) { // mean, or largest, of several maps
  const result = new Float32Array(maps[0].length);
  for (const map of maps) {
    map.forEach((value, cell) => { result[cell] = kind === "largest" ? Math.max(result[cell], value) : result[cell] + value / maps.length; });
  }
  return result;
}

// Attention of a token to every cell; layer is a number or "mean", head a number, "mean" or "largest". Null where it is not on the page.
function attentionOf(token, layer, head) {
  const own = data.attention, single = own.heads_of[token], layers = [...Array(own.layers).keys()];
  if (typeof head === "number") {
    if (!single) return null;
    if (layer === "mean") return combined(layers.map((index) => scaled(single, index * own.heads + head, own.cells)), "mean");
    return scaled(single, layer * own.heads + head, own.cells);
  }
  const position = layer === "mean" ? own.chosen.length : own.chosen.indexOf(layer);
  if (position >= 0) return scaled(own[head], token * (own.chosen.length + 1) + position, own.cells);
  if (!single) return null;
  return combined([...Array(own.heads).keys()].map((index) => scaled(single, layer * own.heads + index, own.cells)), head);
}

let shades = null;

function shade(value) { // of the ramp, in 256 steps
  shades = shades || [...Array(256).keys()].map((step) => ramp(step / 255).map(Math.round));
  return shades[Math.round(255 * Math.min(1, value))];
}

function picked(id) {
  const value = $(id).value;
  return /^\d+$/.test(value) ? Number(value) : value;
}

function layerName(layer) {
  return layer === "mean" ? "mean over layers" : `layer ${layer + 1}`;
}

function headName(head) {
  return { mean: "mean over heads", largest: "largest head" }[head] || `head ${head + 1}`;
}

// --- a grid of cells that are pointed at, clicked, and walked over with the arrow keys --------------------------

// grid: rows and columns (names), value(row, column) in [0, 1] for the colour, text(row, column), pick(row, column),
// own (row and column that are chosen, the column null for a whole row, or null), picture(row, column) for a small map in the cell, or null.
// key is what the values are of: while it is the same, nothing is drawn again.
function drawGrid(id, grid) {
  const canvas = $(id), former = grids[id] || {}, brush = canvas.getContext("2d");
  grids[id] = grid;
  grid.cursor = former.cursor && former.cursor[0] < grid.rows.length && former.cursor[1] < grid.columns.length ? former.cursor : null;
  grid.drawn = [data.answer_id, grid.key, grid.own, grid.cursor, document.activeElement === canvas, canvas.parentElement.clientWidth, getComputedStyle(canvas).color].join(";");
  if (grid.drawn === former.drawn) { Object.assign(grid, { left: former.left, top: former.top, side: former.side }); return; }
  brush.font = "12px system-ui, sans-serif";
  const widest = (names) => Math.min(130, Math.max(...names.map((name) => brush.measureText(name).width)) + 8);
  const upright = grid.columns.every((name) => name.length <= 3);
  const left = widest(grid.rows), top = upright ? 18 : widest(grid.columns);
  const space = canvas.parentElement.clientWidth - left - 2, most = Math.max(grid.rows.length, grid.columns.length);
  const side = Math.floor(Math.min(grid.largest || 40, Math.max(space / grid.columns.length, Math.min(grid.least || 8, 4000 / most))));
  const [width, height] = [left + side * grid.columns.length + 1, top + side * grid.rows.length + 1];
  const sharp = Math.min(2, window.devicePixelRatio || 1, Math.max(1, 8000 / Math.max(width, height)));
  [canvas.width, canvas.height] = [width * sharp, height * sharp];
  [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
  Object.assign(grid, { left, top, side });
  brush.scale(sharp, sharp);
  brush.font = "12px system-ui, sans-serif";
  brush.fillStyle = getComputedStyle(canvas).color;
  brush.textBaseline = "middle";
  const every = Math.ceil((upright ? 22 : 13) / side), down = Math.ceil(13 / side);
  brush.textAlign = "right";
  grid.rows.forEach((name, row) => { if (row % down === 0) brush.fillText(name, left - 5, top + (row + 0.5) * side, left - 6); });
  grid.columns.forEach((name, column) => {
    if (column % every) return;
    brush.save();
    brush.translate(left + (column + 0.5) * side, top - 5);
    if (!upright) brush.rotate(-Math.PI / 2);
    brush.textAlign = upright ? "center" : "left";
    brush.fillText(name, 0, upright ? -4 : 0, upright ? 22 : top - 8);
    brush.restore();
  });
  const gap = side > 6 ? 1 : 0;
  for (let row = 0; row < grid.rows.length; row++) {
    for (let column = 0; column < grid.columns.length; column++) {
      const [x, y] = [left + column * side, top + row * side], small = grid.picture ? grid.picture(row, column) : null;
      if (small) { brush.imageSmoothingEnabled = false; brush.drawImage(small, x, y, side - gap, side - gap); continue; }
      const value = grid.value(row, column);
      if (value === null) continue;
      brush.fillStyle = `rgb(${shade(value).join(",")})`;
      brush.fillRect(x, y, side - gap, side - gap);
    }
  }
  const frame = ([row, column], colours) => colours.forEach(([colour, thickness]) => {
    [brush.strokeStyle, brush.lineWidth] = [colour, thickness];
    brush.strokeRect(left + (column || 0) * side - 0.5, top + row * side - 0.5, column === null ? width - left : side, side);
  });
  if (grid.own) frame(grid.own, grid.own[1] === null ? [[getComputedStyle(canvas).color, 1.5]] : [["#000", 4], ["#fff", 2]]);
  if (grid.cursor && document.activeElement === canvas) frame(grid.cursor, [["#000", 4], ["#ffd33d", 2]]);
  canvas.setAttribute("aria-label", grid.label);
}

function gridCell(id, event) {
  const grid = grids[id], area = $(id).getBoundingClientRect();
  const row = Math.floor((event.clientY - area.top - grid.top) / grid.side), column = Math.floor((event.clientX - area.left - grid.left) / grid.side);
  return row >= 0 && column >= 0 && row < grid.rows.length && column < grid.columns.length ? [row, column] : null;
}

function wireGrid(id) {
  const canvas = $(id), ready = () => data && data.kind === "done" && data.attention && grids[id];
  const describe = (cell) => { $(`${id}-value`).textContent = cell && cell[1] !== null ? grids[id].text(...cell) : ""; };
  canvas.addEventListener("mousemove", (event) => { if (ready()) describe(gridCell(id, event)); });
  canvas.addEventListener("mouseleave", () => { if (ready()) describe(grids[id].own); });
  canvas.addEventListener("click", (event) => {
    const cell = ready() ? gridCell(id, event) : null;
    if (!cell) return;
    grids[id].cursor = cell;
    grids[id].pick(...cell);
  });
  canvas.addEventListener("keydown", (event) => {
    if (!ready()) return;
    const grid = grids[id], step = STEPS[event.key], before = grid.cursor || grid.own, [row, column] = before || [0, 0];
    if (step) {
      const move = before && before[1] !== null ? step : [0, 0], clamp = (value, length) => Math.max(0, Math.min(length - 1, value));
      grid.cursor = [clamp(row + move[0], grid.rows.length), clamp(column + move[1], grid.columns.length)];
      describe(grid.cursor);
      const box = canvas.parentElement, x = grid.left + grid.cursor[1] * grid.side; // of a wide grid, which is scrolled
      box.scrollLeft = Math.max(x + 2 * grid.side - box.clientWidth, Math.min(box.scrollLeft, x - grid.side));
      if (grid.follows) grid.pick(...grid.cursor); else soon();
    } else if ((event.key === "Enter" || event.key === " ") && grid.cursor) grid.pick(...grid.cursor);
    else return;
    event.preventDefault();
  });
  new ResizeObserver(soon).observe(canvas.parentElement);
  for (const kind of ["focus", "blur"]) canvas.addEventListener(kind, soon);
}

// --- what the viewer shows --------------------------------------------------------------------------------------

function smallMap(values, [rows, columns], most) {
  const sheet = make("canvas"), image = new ImageData(columns, rows);
  values.forEach((value, cell) => {
    [image.data[4 * cell], image.data[4 * cell + 1], image.data[4 * cell + 2]] = shade(value / most);
    image.data[4 * cell + 3] = 255;
  });
  [sheet.width, sheet.height] = [columns, rows];
  sheet.getContext("2d").putImageData(image, 0, 0);
  return sheet;
}

function massOf(layer, head) { // share of the chosen token's attention that falls on all image tokens; numbers, or "mean"
  const own = data.attention, range = (index, count) => (index === "mean" ? [...Array(count).keys()] : [index]);
  const sums = range(layer, own.layers).flatMap((row) => range(head, own.heads).map((column) => own.sums[(chosen * own.layers + row) * own.heads + column]));
  return sums.reduce((sum, value) => sum + value, 0) / sums.length / 32767;
}

function showHeads() {
  const own = data.attention, size = own.layers * own.heads, start = chosen * size, word = shown(data.tokens[chosen].text);
  const sums = Array.from(own.sums.subarray(start, start + size), (value) => value / 32767), most = Math.max(...sums, 1e-9);
  const [layer, head] = [picked("attention-layer"), picked("attention-head")], single = own.heads_of[chosen];
  const maps = $("heads-show").value === "map" && single;
  drawGrid("heads", {
    rows: [...Array(own.layers).keys()].map((index) => `layer ${index + 1}`), columns: [...Array(own.heads).keys()].map((index) => `${index + 1}`),
    value: (row, column) => sums[row * own.heads + column] / most,
    picture: maps ? (row, column) => {
      const index = row * own.heads + column;
      return smallMap(scaled(single, index, own.cells), own.shape, Math.max(single.peaks[index], 1e-9));
    } : null,
    text: (row, column) => `${layerName(row)}, ${headName(column)}: ${percent(sums[row * own.heads + column])} of its attention falls on the picture`,
    own: typeof layer === "number" && typeof head === "number" ? [layer, head] : null,
    pick: (row, column) => { [$("attention-layer").value, $("attention-head").value] = [row, column]; soon(); },
    follows: true, key: [chosen, maps ? "map" : "mass"], largest: maps ? 72 : 44, least: maps ? 24 : 9,
    label: `attention of ${word} to the picture by layer and head, ${percent(most)} at most`,
  });
  $("heads-most").textContent = maps ? "largest of each map" : percent(most);
}

function showMatrix() {
  if (!$("matrix-details").open) return;
  const own = data.attention, names = data.tokens.map((token) => shown(token.text)), count = names.length;
  const columns = ["picture", ...data.question.map(shown), ...names, "everything else", ...(own.crosses ? ["start token"] : [])], width = own.means.length / count;
  const value = (row, column) => own.means[row * width + column] / 32767, most = own.peak || 1;
  const first = 1 + data.question.length; // column of the answer's first token
  drawGrid("matrix", {
    rows: names, columns, value: (row, column) => (column >= first + row && column < first + count ? null : Math.sqrt(value(row, column) / most)),
    text: (row, column) => `“${names[row]}” to ${column === 0 || column >= first + count ? columns[column] : `“${columns[column]}”`}: ${percent(value(row, column))}`,
    own: [chosen, null], key: "", pick: choose, largest: 18, least: 13, label: `mean attention of ${count} answer tokens to the picture, the question and each other`,
  });
  $("matrix-most").textContent = `${percent(most)}, square-root scale`;
  $("matrix-note").textContent = "Rows are the answer's tokens, columns what they attend to: the picture as a whole, the question's tokens, earlier tokens of the answer, "
    + "and everything else (template, first token). " + (own.crosses ? "Answer tokens and the start token by the decoder's self-attention, all else by its cross-attention; each sums to 100\u00a0%." : "A row sums to 100\u00a0%.");
}

function attention() {
  const own = data.attention;
  if (!own) return;
  const [layer, head] = [picked("attention-layer"), picked("attention-head")], values = attentionOf(chosen, layer, head);
  const most = values === null ? 0 : largest(values), name = `${layerName(layer)}, ${headName(head)}`;
  if (!own.heads_of[chosen] && (values === null || $("heads-show").value === "map")) fetchHeads();
  const held = Object.keys(own.heads_of).length;
  $("attention-note").textContent = values === null ? (trigger ? "This map is on its way …" : `This map is not on the page: it has the single heads of ${held} of ${counted(data.tokens.length, "token")}.`)
    : head === "largest" ? `${name}, for every image token by itself.` : `${name}: ${percent(massOf(layer, head))} of the attention falls on the picture.`;
  $("attention-most").textContent = `${percent(most)} on one ${own.tiles > 1 ? "cell" : "image token"}`;
  $("attention-legend").hidden = values === null;
  if (own.box) {
    drawMap($("attention-picture"), own, values === null ? () => 0 : (cell) => values[cell] / Math.max(most, 1e-12));
    $("attention-picture").setAttribute("aria-label", `the picture under the attention of ${shown(data.tokens[chosen].text)}, ${name}`);
  } else if (values) {
    drawGrid("queries", {
      rows: [""], columns: [...values.keys()].map((index) => `${index + 1}`), value: (row, column) => values[column] / Math.max(most, 1e-12),
      text: (row, column) => `image token ${column + 1}: ${percent(values[column])}`, own: null, key: [chosen, layer, head, Boolean(own.heads_of[chosen])], pick: () => {}, largest: 32, least: 12,
      label: `attention to every image token, which are no grid over the picture`,
    });
  }
  showHeads();
  showMatrix();
}

function fetchHeads() { // of the chosen token, unless another is chosen soon
  clearTimeout(patience);
  if (!trigger || fetching !== null) return;
  patience = setTimeout(() => {
    if (!data || data.kind !== "done" || data.attention.heads_of[chosen]) return;
    fetching = chosen;
    trigger("heads", { token: chosen, answer_id: data.answer_id });
  }, 250);
}

function receiveHeads(message) {
  fetching = null;
  if (!data || data.kind !== "done" || message.answer_id !== data.answer_id) return;
  addHeads(data.attention, message);
  for (const other of Object.values(scopes)) if (other.attention !== data.attention) addHeads(other.attention, message);
  soon();
}

function fitAttention() { // the choices of a new answer
  const own = data.attention;
  $("attention-card").hidden = !own;
  if (!own) return;
  const range = (count, name) => [...Array(count).keys()].map((index) => [String(index), name(index)]);
  options("attention-layer", [["mean", layerName("mean")], ...range(own.layers, layerName)]);
  options("attention-head", [["mean", headName("mean")], ["largest", headName("largest")], ...range(own.heads, headName)]);
  $("attention-picture").hidden = !own.box;
  $("queries-line").hidden = Boolean(own.box);
  $("attention-kind").textContent = own.box ? "Patches are chosen here as in the picture above."
    : "The image tokens of this model are no grid over the picture (queries of a Q-Former see all of it), so they are a row of cells.";
}
