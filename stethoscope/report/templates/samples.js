// The samples of a run, of two runs side by side, or of all runs. Filters run in the browser; opening one asks the server.
// It reads element, props.value, watch and trigger, as viewer.js does; trigger is null on a static page.
const PAGE = 40, POLL = 5000; // samples shown at once; milliseconds between two looks at a run in progress
const KINDS = [["", "all samples"], ["false alarm", "with a false alarm"], ["missed", "with a missed hallucination"],
  ["caught", "with a caught hallucination"], ["hallucinated", "with a hallucination, not judged by a detector"],
  ["wrong", "with a wrong answer"], ["right", "without a hallucination or an alarm"]];
const ORDERS = [["", "as in the run"], ["high", "highest probability first"], ["low", "lowest probability first"]];
const APART = ["apart", "probabilities furthest apart first"];
const TOGETHER = ["together", "a sample's answers of all runs together"];
const ALL = "/"; // in place of a run's name: all runs, of which every row has its own
const WRONG = ["caught", "missed", "hallucinated"], RIGHT = ["right", "grounded"]; // outcomes of an object that is not there, or is
const pictures = new Map(); // by key, once they have come
let wanted = new Set(); // keys that the server was asked for
let waiting = false; // of small pictures: one at a time, as the page would see the later of two answers alone
let split = new Set(); // runs and tasks whose images a detector has learned from
let rows = [], limit = PAGE, run = "", other = "", state = "", timer = 0, writable = false;
let opened = null; // on a static page: key of the sample that is looked at, and the first character of a mention
let page = null; // what a static page brings along: pictures, and the colours of heat maps
let editing = null; // the note that is being written: key, name of the run, the form, which survives a new list, and whether it was sent

function choices(id, values) {
  options(id, [["", "all"], ...values.map((value) => [value, value])]);
  $(id + "-line").hidden = values.length < 2;
}

// --- what is alike and what differs --------------------------------------------------------------------------------

function wrong(mention) {
  return WRONG.includes(mention.outcome);
}

function sameObject(side, mention, test) { // the mention of an object, if the other run has it and it passes a test
  return side.mentions.find((candidate) => candidate.object === mention.object && test(candidate));
}

function changed(mention, side) { // whether the other run has no mention of this object with this outcome
  return !sameObject(side, mention, (candidate) => candidate.outcome === mention.outcome);
}

function differs(row) {
  if (!row.same || row.right !== row.other.right) return true;
  return row.mentions.some((mention) => changed(mention, row.other)) || row.other.mentions.some((mention) => changed(mention, row));
}

function alike(first, second) { // mentions with outcomes of two runs: of the first, those whose object became the second's
  return (a, b) => a.mentions.filter((mention) => mention.outcome === first && sameObject(b, mention, (candidate) => candidate.outcome === second));
}

const only = (test) => (a, b) => a.mentions.filter((mention) => test(mention) && !sameObject(b, mention, test));
const PAIRS = { // mentions of the first side that a filter is about
  caught: alike("caught", "missed"),
  hallucinated: only(wrong),
  "false alarm": only((mention) => mention.outcome === "false alarm"),
};

function pairKinds() {
  const [a, b] = sides(run, other);
  return [["", "all samples"], ["differ", "only where they differ"],
    ["caught", `caught in ${a}, missed in ${b}`], ["caught-", `caught in ${b}, missed in ${a}`],
    ["hallucinated", `hallucinated in ${a}, not in ${b}`], ["hallucinated-", `hallucinated in ${b}, not in ${a}`],
    ["false alarm", `false alarm in ${a}, not in ${b}`], ["false alarm-", `false alarm in ${b}, not in ${a}`],
    ["answer", `right answer in ${a}, wrong in ${b}`], ["answer-", `right answer in ${b}, wrong in ${a}`]];
}

function sides(first, second) { // long names would fill the line
  return Math.max(first.length, second.length) > 24 ? ["A", "B"] : [first, second];
}

function matching(row) { // the mentions that the filter is about, of the side that it begins with
  const kind = $("kind").value;
  if (!row.other) return row.mentions.filter((mention) => mention.outcome === kind);
  const turned = kind.endsWith("-"), [a, b] = turned ? [row.other, row] : [row, row.other];
  const choose = PAIRS[kind.replace(/-$/, "")];
  return choose ? choose(a, b) : [];
}

function fitsKind(row) {
  const kind = $("kind").value;
  if (!kind) return true;
  if (row.other) {
    if (kind === "differ") return differs(row);
    if (kind === "answer") return row.right === true && row.other.right === false;
    if (kind === "answer-") return row.right === false && row.other.right === true;
  } else {
    if (kind === "wrong") return row.right === false;
    if (kind === "right") return row.mentions.length > 0 && row.mentions.every((mention) => RIGHT.includes(mention.outcome));
  }
  return matching(row).length > 0;
}

function fits(row) {
  const find = $("find").value.trim().toLowerCase();
  if ($("task").value && row.task !== $("task").value) return false;
  if ($("run").value && row.run !== $("run").value) return false;
  if ($("fold").value && split.has(taskOf(row)) && row.fold !== $("fold").value) return false;
  if (!fitsKind(row) || !fitsNotes(row)) return false;
  const mentions = row.other ? [...row.mentions, ...row.other.mentions] : row.mentions;
  const texts = [row.run || "", row.sample, row.question, row.answer, row.other ? row.other.answer : "",
    ...mentions.map((mention) => mention.object), ...notesOf(row).flatMap((note) => [note.text, note.author, ...note.tags])];
  return !find || texts.some((text) => text.toLowerCase().includes(find));
}

function notesOf(row) {
  return row.other ? [...row.notes, ...row.other.notes] : row.notes;
}

function fitsNotes(row) {
  const noted = $("noted").value, notes = notesOf(row);
  if (noted === "any") return notes.length > 0;
  if (noted === "label") return notes.some((note) => note.label !== null);
  return !noted || notes.some((note) => note.tags.includes(noted.slice(1)));
}

function known(mentions) {
  return mentions.map((mention) => mention.probability).filter((value) => value !== null);
}

function probability(row) { // of the mentions that the filter is about, the one that counts in the order
  if ($("order").value === "apart") {
    const judged = row.mentions.filter((mention) => mention.probability !== null);
    const pairs = judged.map((mention) => [mention, sameObject(row.other, mention, (candidate) => candidate.probability !== null)]).filter(([, beside]) => beside);
    return pairs.length ? Math.max(...pairs.map(([mention, beside]) => Math.abs(mention.probability - beside.probability))) : null;
  }
  const about = matching(row), values = known(about.length ? about : [...row.mentions, ...(row.other ? row.other.mentions : [])]);
  if (!values.length) return null;
  return $("order").value === "low" ? Math.min(...values) : Math.max(...values);
}

function ordered(shown) {
  const compare = (a, b) => (a > b) - (a < b);
  if ($("order").value === "together") return [...shown].sort((a, b) => compare(a.task, b.task) || compare(a.sample, b.sample));
  const sign = { high: -1, apart: -1, low: 1 }[$("order").value];
  if (!sign) return shown;
  const values = new Map(shown.map((row) => [row, probability(row)]));
  const some = shown.filter((row) => values.get(row) !== null), others = shown.filter((row) => values.get(row) === null);
  return [...some.sort((a, b) => sign * (values.get(a) - values.get(b))), ...others];
}

// --- what opens a sample, and its picture --------------------------------------------------------------------------

function address(row, name) { // of a run's sample, at the mention that the filter is about, if there is one
  const side = row.other && name === other ? row.other : row, about = matching(row);
  const target = side.mentions.find((mention) => about.some((wanted) => wanted.object === mention.object));
  return { run: name, task: row.task, sample: row.sample, mention: $("kind").value && target ? target.start : null };
}

function runOf(row) {
  return row.run || run;
}

function taskOf(row) {
  return `${runOf(row)}\t${row.task}`;
}

function keyOf(row) {
  return `${row.run ? row.run + "\t" : ""}${row.task}\t${row.sample}`;
}

function thumbnail(row) {
  const image = make("img", undefined, "st-thumbnail");
  image.alt = "";
  image.dataset.key = keyOf(row);
  const own = page ? page.pictures[row.picture] : pictures.get(keyOf(row));
  if (own) image.src = own; else image.hidden = true;
  return image;
}

function fetchThumbnails() {
  if (!trigger || waiting || !element.offsetParent) return; // nothing is fetched for a list that nobody sees
  const keys = [...element.querySelectorAll(".st-thumbnail[hidden]")].map((image) => image.dataset.key);
  const missing = [...new Set(keys)].filter((key) => !wanted.has(key)).slice(0, PAGE);
  if (!missing.length) return;
  missing.forEach((key) => wanted.add(key));
  waiting = true;
  trigger("thumbnails", { run, samples: missing });
}

// --- cards ---------------------------------------------------------------------------------------------------------

function open(row, name, start = null) { // in the first tab, or on a static page in its own card; at the mention that starts there
  if (trigger) { trigger("look", start === null ? address(row, name) : { ...address(row, name), mention: start }); return; }
  const key = keyOf(row), again = opened && opened.key === key && opened.start === start;
  opened = again ? null : { key, start };
  window.location.replace(`#${again ? "" : encodeURIComponent(key)}`);
  show();
}

function isOpen(row) {
  return opened !== null && opened.key === keyOf(row);
}

function answerText(row, side) { // with the mention marked that is looked at
  const words = make("p", undefined, "st-words"), shown = isOpen(row) ? side.mentions.find((mention) => mention.start === opened.start) : null;
  if (!shown) { words.textContent = side.answer; return words; }
  const { start, end } = shown, letters = [...side.answer]; // as Python counts characters
  const [before, name, after] = [letters.slice(0, start), letters.slice(start, end), letters.slice(end)].map((part) => part.join(""));
  words.append(before + name.slice(0, name.length - name.trimStart().length), make("mark", name.trim()), name.slice(name.trimEnd().length) + after);
  return words;
}

function heatmap(row, text, width, height, source) { // the picture under a mention's map, drawn as the report does
  const [high, wide] = row.maps.shape, sheet = make("canvas"), canvas = make("canvas"), small = new ImageData(wide, high);
  const values = Uint8Array.from(atob(row.maps.values[opened.start]), (letter) => letter.charCodeAt(0)), top = Math.max(...values) || 1;
  values.forEach((value, cell) => {
    const strength = value / top, position = strength * (page.ramp.length - 1), low = Math.min(Math.floor(position), page.ramp.length - 2);
    small.data.set([...page.ramp[low].map((part, index) => part + (position - low) * (page.ramp[low + 1][index] - part)), 255 * page.opacity * strength], 4 * cell);
  });
  [sheet.width, sheet.height, canvas.width, canvas.height] = [wide, high, width, height];
  sheet.getContext("2d").putImageData(small, 0, 0);
  const brush = canvas.getContext("2d");
  brush.drawImage(source, 0, 0, width, height);
  brush.imageSmoothingEnabled = false;
  brush.drawImage(sheet, 0, 0, width, height);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", text);
  return canvas;
}

function figure(content, caption) {
  const box = make("figure");
  box.append(content, make("figcaption", caption, "st-soft"));
  return box;
}

function detail(row) { // on a static page: the picture, the heat map of a mention, and the truth
  const box = make("div", undefined, "st-detail"), image = make("img"), shown = row.mentions.find((mention) => mention.start === opened.start);
  if (page.pictures[row.picture]) {
    image.alt = `picture of ${row.sample}`;
    image.src = page.pictures[row.picture];
    box.append(figure(image, row.sample));
    if (shown && row.maps.values && row.maps.values[shown.start]) {
      const text = row.maps.caption.join(shown.object), place = figure("", text);
      image.decode().then(() => place.prepend(heatmap(row, text, image.naturalWidth, image.naturalHeight, image)));
      box.append(place);
    }
  }
  if (row.objects) box.append(make("p", `The picture shows: ${[...row.objects].sort().join(", ") || "none of these objects"}.`, "st-soft"));
  return box;
}

function opener(row, name) {
  const button = make("button", !trigger && isOpen(row) ? "close" : "look at it", "st-open");
  if (!trigger) button.setAttribute("aria-expanded", isOpen(row));
  button.type = "button";
  button.setAttribute("aria-label", `look at sample ${row.sample}${row.other || row.run ? ` of ${name}` : ""}`);
  button.dataset.use = `look ${name}`;
  button.addEventListener("click", () => open(row, name));
  return button;
}

function chips(row, side, beside, name) { // right mentions are only counted, but for those that the other run has otherwise
  const box = make("div", undefined, "st-chips"), plain = (mention) => RIGHT.includes(mention.outcome) && !(beside && changed(mention, beside)) && !isOpen(row);
  if (side.right !== null) box.append(make("span", side.right ? "right answer" : `wrong answer, right is ${side.truth}`, "st-chip" + (side.right ? "" : " st-missed")));
  side.mentions.filter((mention) => !plain(mention)).forEach(({ object, outcome, probability, start }) => {
    const chip = make("button", `${outcome}: ${object}${probability === null ? "" : ` ${percent(probability)}`}`, "st-chip st-" + outcome.replace(" ", "-"));
    chip.type = "button";
    chip.dataset.use = `${start} ${name}`;
    chip.addEventListener("click", () => open(row, name, start));
    box.append(chip);
  });
  const right = side.mentions.filter(plain).length;
  if (right) box.append(make("span", `${right} ${side.mentions.find(plain).outcome}`, "st-chip"));
  return box;
}

const LABELS = { "": "as it is", 1: "hallucinated", 0: "grounded", "-1": "not to be judged" };

function notes(side) {
  const list = make("ul", undefined, "st-notes");
  list.append(...side.notes.map((note) => {
    const parts = [...(note.label === null ? [] : [`label corrected to ${LABELS[note.label]}`]), ...note.tags.map((tag) => `#${tag}`), ...(note.text ? [note.text] : [])];
    return make("li", `${note.object ? note.object + ": " : ""}${parts.join("; ")} (${note.author ? note.author + ", " : ""}${note.time.slice(0, 10)})`);
  }));
  return list;
}

function field(text, control) {
  const label = make("label", `${text} `);
  label.append(control);
  return label;
}

function noteForm(row, side, name) { // of the sample or of one of its mentions; an empty one takes an earlier note back
  const form = make("form", undefined, "st-note st-controls"), about = make("select"), label = make("select"), tags = make("input"), words = make("textarea");
  about.append(...entries([["", "the sample"], ...side.mentions.map(({ start, object, outcome }) => [start, `${object} (${outcome})`])]));
  label.append(...entries(["", 1, 0, -1].map((value) => [value, LABELS[value]])));
  [tags.maxLength, words.maxLength, words.rows] = [300, 2000, 2];
  tags.placeholder = "separated by commas";
  const labelled = field("right label", label), fill = () => {
    const start = about.value === "" ? null : Number(about.value), note = side.notes.find((candidate) => candidate.start === start);
    labelled.hidden = start === null;
    label.value = note && note.label !== null ? note.label : "";
    [tags.value, words.value] = note ? [note.tags.join(", "), note.text] : ["", ""];
  };
  const save = make("button", "save", "st-open"), cancel = make("button", "cancel", "st-open");
  cancel.type = "button";
  cancel.addEventListener("click", () => { editing = null; show(); });
  form.setAttribute("aria-label", `note on sample ${row.sample}`);
  form.append(field("about", about), labelled, field("tags", tags), field("note", words), save, cancel);
  about.addEventListener("input", fill);
  form.addEventListener("input", () => { if (editing) editing.sent = false; }); // it was refused, and is written on
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const start = about.value === "" ? null : Number(about.value), names = tags.value.split(",").map((tag) => tag.trim()).filter(Boolean);
    editing.sent = true;
    const corrected = start === null || label.value === "" ? null : Number(label.value);
    const sample = { run: name, shown: run, other, task: row.task, sample: row.sample, start };
    trigger("note", { ...sample, label: corrected, tags: names, text: words.value.trim() });
  });
  fill();
  return form;
}

function noteButton(row, side, name) {
  const button = make("button", "note", "st-open");
  button.type = "button";
  button.dataset.use = `note ${name}`;
  button.setAttribute("aria-label", `note on sample ${row.sample}${row.other || row.run ? ` of ${name}` : ""}`);
  button.addEventListener("click", () => {
    editing = { key: keyOf(row), name, form: noteForm(row, side, name) };
    show();
    editing.form.querySelector("select").focus();
  });
  return button;
}

function noted(row, side, name) { // what is noted of a side, and the form if it is open
  const open = editing && editing.key === keyOf(row) && editing.name === name;
  return [...(side.notes.length ? [notes(side)] : []), ...(open ? [editing.form] : [])];
}

function remark(side) {
  return (side.fold ? `, ${side.fold}` : "") + (side.status === "ok" ? "" : `, ${side.status}`);
}

function buttons(row, side, name) {
  const box = make("span", undefined, "st-buttons");
  box.append(...(writable ? [noteButton(row, side, name)] : []), opener(row, name));
  return box;
}

function card(row) {
  const box = make("article", undefined, "st-card st-sample"), head = make("div", undefined, "st-sample-head");
  box.dataset.key = keyOf(row);
  head.append(make("b", row.sample), ...(row.run ? [make("span", row.run, "st-run")] : []), make("span", row.task + (row.other ? "" : remark(row)), "st-soft"));
  box.append(thumbnail(row), head, make("p", row.question, "st-soft"));
  if (!row.other) {
    head.append(buttons(row, row, runOf(row)));
    box.append(answerText(row, row), chips(row, row, null, runOf(row)), ...noted(row, row, runOf(row)));
    if (isOpen(row)) box.append(detail(row));
    return box;
  }
  const both = make("div", undefined, "st-columns st-both");
  [[row, row.other, run], [row.other, row, other]].forEach(([side, beside, name], index) => {
    const half = make("section"), title = make("div", undefined, "st-sample-head");
    half.setAttribute("aria-label", name);
    title.append(make("b", `${"AB"[index]}: ${name}`), make("span", remark(side).slice(2), "st-soft"));
    title.append(buttons(row, side, name));
    half.append(title, make("p", side.answer, "st-words"), chips(row, side, beside, name), ...noted(row, side, name));
    both.append(half);
  });
  box.append(both);
  return box;
}

function show() {
  const shown = ordered(rows.filter(fits)), held = document.activeElement, kept = held && element.contains(held) ? held.closest("article") : null;
  const runs = run === ALL ? ` of ${counted(new Set(rows.map(runOf)).size, "run")}` : "";
  $("count").textContent = rows.length ? `${shown.length} of ${counted(rows.length, "sample")}${runs}` : "";
  $("rows").replaceChildren(...shown.slice(0, limit).map(card));
  $("more").hidden = shown.length <= limit;
  const again = kept && [...$("rows").children].find((box) => box.dataset.key === kept.dataset.key);
  if (again && !again.contains(document.activeElement)) {
    const buttons = [...again.querySelectorAll("button")];
    const heir = again.contains(held) ? held : buttons.find((button) => button.dataset.use && button.dataset.use === held.dataset.use);
    (heir || buttons[0]).focus(); // in its new card
  }
  fetchThumbnails();
  const sequences = other ? [() => run, () => other] : [runOf]; // in which the viewer goes to the previous and the next
  window.stethoscopeOrders = sequences.map((name) => shown.map((row) => address(row, name(row))));
}

function openLink() { // of a static page, to a sample
  let key = "";
  try { key = decodeURIComponent(window.location.hash.slice(1)); } catch (error) { return; }
  const row = rows.find((candidate) => keyOf(candidate) === key);
  if (trigger || !row) return;
  opened = { key, start: null };
  $("fold").value = "";
  $("find").value = row.sample;
  show();
}

function poll() { // look again at a run in progress, while somebody sees it
  timer = 0;
  if (element.offsetParent && !document.hidden && !(editing && editing.form.isConnected)) trigger("refresh", { run, other, state, asked: false });
  pollLater();
}

function pollLater() {
  if (!timer && trigger && $("progress").textContent) timer = setTimeout(poll, POLL);
}

function named(row) { // with mentions as objects; on the way they are lists, in the order of ``sample_list.sample_rows``
  const mentions = row.mentions.map(([object, outcome, probability, start, end]) => ({ object, outcome, probability, start, end }));
  return { ...row, mentions, ...(row.other ? { other: named(row.other) } : {}) };
}

function receive() {
  let message;
  try { message = JSON.parse(props.value); } catch (error) { message = { rows: [], note: "what came from the server cannot be read", run: "", other: "" }; }
  const same = message.run === run && message.other === other; // of a run that is going on: nothing that was chosen is lost
  ({ run, other, writable } = message);
  rows = message.rows.map(named);
  page = trigger ? null : message;
  if (!same || (editing && editing.sent)) editing = null;
  state = message.state || "";
  if (!same) {
    pictures.clear();
    limit = PAGE;
  }
  wanted = new Set(pictures.keys());
  split = new Set(rows.filter((row) => row.fold).map(taskOf));
  $("note").textContent = message.note;
  $("note").hidden = !message.note;
  $("progress").textContent = message.progress || "";
  $("progress").hidden = !message.progress;
  $("refresh").hidden = !trigger;
  for (const label of $("filters").querySelectorAll("label")) label.hidden = !rows.length;
  options("kind", other ? pairKinds() : KINDS);
  options("order", [...ORDERS, ...(other ? [APART] : []), ...(run === ALL ? [TOGETHER] : [])]);
  const tags = [...new Set(rows.flatMap(notesOf).flatMap((note) => note.tags))].sort();
  options("noted", [["", "all samples"], ["any", "with a note"], ["label", "with a corrected label"], ...tags.map((tag) => [`#${tag}`, `#${tag}`])]);
  $("noted-line").hidden = !rows.some((row) => notesOf(row).length);
  $("saving").hidden = !trigger || run === ALL || $("noted-line").hidden;
  if ($("noted-line").hidden) $("noted").value = "";
  choices("run", [...new Set(rows.map((row) => row.run).filter(Boolean))]);
  choices("fold", [...new Set(rows.map((row) => row.fold).filter(Boolean))]);
  choices("task", [...new Set(rows.map((row) => row.task))]);
  if (!same && rows.some((row) => row.fold === "test")) $("fold").value = "test"; // those that the detector has not learned from
  show();
  pollLater();
}

document.addEventListener("stethoscope-thumbnails", ({ detail }) => {
  waiting = false;
  for (const [key, address] of Object.entries(detail.run === run ? detail.pictures : {})) pictures.set(key, address);
  for (const image of element.querySelectorAll(".st-thumbnail[hidden]")) {
    if (pictures.has(image.dataset.key)) { image.src = pictures.get(image.dataset.key); image.hidden = false; }
  }
  fetchThumbnails();
});
element.addEventListener("keydown", (event) => { // n and p go through the samples, as in the viewer
  const box = event.target.closest("article"), step = { n: "nextElementSibling", p: "previousElementSibling" }[event.key];
  const next = box && step && !event.target.closest("input, select, textarea") ? box[step] : null;
  if (next && next.querySelector("button")) next.querySelector("button").focus();
});
new ResizeObserver(fetchThumbnails).observe(element); // once the tab is seen
for (const id of ["kind", "run", "fold", "task", "order", "noted", "find"]) $(id).addEventListener("input", () => { limit = PAGE; show(); });
$("more").addEventListener("click", () => { limit += PAGE; show(); });
$("refresh").addEventListener("click", () => trigger("refresh", { run, other, state, asked: true }));
for (const button of $("saving").children) button.addEventListener("click", () => trigger("notes", { run, kind: button.dataset.kind }));
watch("value", receive);
receive();
openLink();
