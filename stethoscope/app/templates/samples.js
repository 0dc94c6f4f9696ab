// The samples of a run. Filters run in the browser; opening one asks the server.
const PAGE = 40;
const pictures = new Map(); // by key, once they have come
let wanted = new Set(); // keys that the server was asked for
let rows = [], limit = PAGE, run = "";

function options(id, values, all) {
  $(id).replaceChildren(...[["", all], ...values.map((value) => [value, value])].map(([value, text]) => Object.assign(make("option", text), { value })));
  $(id + "-line").hidden = values.length < 2;
}

function fits(row) {
  const kind = $("kind").value, find = $("find").value.trim().toLowerCase();
  if ($("task").value && row.task !== $("task").value) return false;
  if ($("fold").value && row.fold !== $("fold").value) return false;
  if (kind === "right" && (!row.mentions.length || row.mentions.some((one) => one[1] !== "right"))) return false;
  if (kind && kind !== "right" && !row.mentions.some((one) => one[1] === kind)) return false;
  return !find || [row.sample, row.question, row.answer, ...row.mentions.map((one) => one[0])].some((text) => text.toLowerCase().includes(find));
}

// what opens a sample: at the mention that the filter is about, if there is one
function address(row) {
  const mention = row.mentions.find((one) => one[1] === $("kind").value);
  return { run, task: row.task, sample: row.sample, mention: mention ? mention[3] : null };
}

function keyOf(row) {
  return `${row.task}\t${row.sample}`;
}

function probability(row) { // of the mentions that the filter is about, the one that counts in the order
  const kind = $("kind").value, values = row.mentions.filter((one) => !kind || one[1] === kind).map((one) => one[2]);
  if (!values.length) return null;
  return $("order").value === "low" ? Math.min(...values) : Math.max(...values);
}

function ordered(shown) {
  const sign = { high: -1, low: 1 }[$("order").value];
  if (!sign) return shown;
  const known = shown.filter((row) => probability(row) !== null), others = shown.filter((row) => probability(row) === null);
  return [...known.sort((a, b) => sign * (probability(a) - probability(b))), ...others];
}

function thumbnail(row) {
  const image = make("img", undefined, "st-thumbnail");
  image.alt = "";
  image.dataset.key = keyOf(row);
  if (pictures.has(keyOf(row))) image.src = pictures.get(keyOf(row)); else image.hidden = true;
  return image;
}

function fetchThumbnails() {
  if (!element.offsetParent) return; // nothing is fetched for a list that nobody sees
  const keys = [...element.querySelectorAll(".st-thumbnail[hidden]")].map((image) => image.dataset.key);
  const missing = [...new Set(keys)].filter((key) => !wanted.has(key)).slice(0, PAGE);
  if (!missing.length) return;
  missing.forEach((key) => wanted.add(key));
  trigger("thumbnails", { run, samples: missing });
}

function card(row) {
  const box = make("article", undefined, "st-card st-sample"), head = make("div", undefined, "st-sample-head");
  const open = make("button", "look at it", "st-open");
  open.type = "button";
  open.setAttribute("aria-label", `look at sample ${row.sample}`);
  open.addEventListener("click", () => trigger("look", address(row)));
  head.append(make("b", row.sample), make("span", row.task + (row.fold ? `, ${row.fold}` : "") + (row.status === "ok" ? "" : `, ${row.status}`), "st-soft"), open);
  box.append(thumbnail(row), head, make("p", row.question, "st-soft"), make("p", row.answer, "st-words"));
  const chips = make("div", undefined, "st-chips");
  row.mentions.filter((one) => one[1] !== "right").forEach(([name, kind, probability, mention]) => {
    const chip = make("button", `${kind}: ${name} ${percent(probability)}`, "st-chip st-" + kind.replace(" ", "-"));
    chip.type = "button";
    chip.addEventListener("click", () => trigger("look", { ...address(row), mention }));
    chips.append(chip);
  });
  const right = row.mentions.filter((one) => one[1] === "right").length;
  if (right) chips.append(make("span", `${right} right`, "st-chip"));
  if (row.mentions.length) box.append(chips);
  return box;
}

function show() {
  const shown = ordered(rows.filter(fits));
  $("count").textContent = rows.length ? `${shown.length} of ${counted(rows.length, "sample")}` : "";
  $("rows").replaceChildren(...shown.slice(0, limit).map(card));
  $("more").hidden = shown.length <= limit;
  fetchThumbnails();
  window.stethoscopeOrder = shown.map(address); // in which the viewer goes to the previous and the next
}

function receive() {
  let message;
  try { message = JSON.parse(props.value); } catch (error) { message = { rows: [], note: "what came from the server cannot be read", run: "" }; }
  ({ rows, run } = message);
  pictures.clear();
  wanted = new Set();
  limit = PAGE;
  $("note").textContent = message.note;
  $("note").hidden = !message.note;
  $("filters").hidden = !rows.length;
  options("fold", [...new Set(rows.map((row) => row.fold).filter(Boolean))], "all");
  options("task", [...new Set(rows.map((row) => row.task))], "all");
  if (rows.some((row) => row.fold === "test")) $("fold").value = "test"; // those that the detector has not learned from
  show();
}

document.addEventListener("stethoscope-thumbnails", ({ detail }) => {
  if (detail.run !== run) return;
  for (const [key, address] of Object.entries(detail.pictures)) pictures.set(key, address);
  for (const image of element.querySelectorAll(".st-thumbnail[hidden]")) {
    if (pictures.has(image.dataset.key)) { image.src = pictures.get(image.dataset.key); image.hidden = false; }
  }
  fetchThumbnails();
});
new ResizeObserver(fetchThumbnails).observe(element); // once the tab is seen
for (const id of ["kind", "fold", "task", "order", "find"]) $(id).addEventListener("input", () => { limit = PAGE; show(); });
$("more").addEventListener("click", () => { limit += PAGE; show(); });
watch("value", receive);
receive();
