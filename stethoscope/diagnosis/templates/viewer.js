// The viewer of one answer, in the app and on static pages; everything that comes from a model is set as text.
// It reads element (its root), props.value (the payload), watch (calls back on a new payload) and trigger (asks the
// server; null on a static page).
const number = (id) => Number($(id).value);
const CASE = ["run", "task", "sample", "mention"]; // keys of a link to a sample
const RANGES = ["layer", "threshold", "opacity", "scale", "warn", "contribution-layer", "contribution-scale"];
const COLOURS = {
  warning: "warning of every object", every: "the detector on every token", surprise: "how improbable the token is",
  contribution: "visual contribution (layer and scale below)", relevancy: "relevancy of the chosen patches", attention: "attention to the chosen patches",
};
const TRUTH = { 1: "hallucinated", 0: "grounded", "-1": "not judged" };
const WRITTEN = ["relevancy", "attention"]; // colours by the chosen patches
const STRONGEST = 45; // percent of a colour behind a token, so that its text stays readable
const photo = new Image();
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
let data = null, conversation = null, scopes = {}, chosen = 0, frame = 0, written = null; // what the chosen patches are to every token
let letters = []; // of the answer, as Python counts them: one for an emoji, which is two in JavaScript
let warnFrom = 0; // probability from which is warned: the detector's threshold as it is, until the slider is moved

function signed(value) {
  return (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
}

function shown(word) {
  return word.trim() === "" ? JSON.stringify(word) : word.trim();
}

function say(text, error) {
  $("status").textContent = text;
  $("status").classList.toggle("st-error", Boolean(error));
  $("status").hidden = !text;
}

// --- the answer ------------------------------------------------------------------------------------------------

function judged(index) {
  const mention = data.tokens[index].mention;
  return mention === undefined || mention === null ? null : data.mentions[mention];
}

function warned(mention) {
  return mention !== null && mention.probability !== null && data.threshold !== null
    && mention.probability >= warnFrom;
}

function part(start, end) { // of the answer's text
  return letters.slice(start, end).join("");
}

function write() {
  let done = 0;
  letters = [...data.text];
  const parts = [], struck = [...(data.struck || [])];
  const strike = (end) => { while (struck.length && struck[0][0] <= end) parts.push(make("del", struck.shift()[1], "st-struck")); };
  data.tokens.forEach((token, index) => {
    const [start, end] = token.span;
    if (start >= end || start < done) return;
    strike(done);
    if (start > done) parts.push(document.createTextNode(part(done, start)));
    const span = make("span", part(start, end), "st-t");
    span.dataset.token = index;
    if (data.kind === "done") span.setAttribute("role", "button");
    parts.push(span);
    done = end;
  });
  parts.push(document.createTextNode(part(done)));
  strike(Infinity);
  if (data.kind === "writing") parts.push(make("span", "", "st-caret"));
  $("answer").replaceChildren(...parts);
  tabStop();
}

function tabStop() { // the word that the Tab key leads to: the chosen one, or the last before it where that is no text of its own (a part of an emoji)
  const spans = [...element.querySelectorAll(".st-t")], before = spans.filter((span) => Number(span.dataset.token) <= chosen);
  const stop = before[before.length - 1] || spans[0];
  if (data.kind === "done") spans.forEach((span) => { span.tabIndex = span === stop ? 0 : -1; });
}

function strength(token, index, kind) {
  if (kind === "every") return token.verdict.probability;
  if (kind === "surprise") return 1 - token.probability;
  if (kind === "contribution") {
    const value = contribution(token, number("contribution-layer"));
    return value === null ? null : Math.min(1, value * number("contribution-scale") / 10);
  }
  if (WRITTEN.includes(kind)) {
    const value = data.kind === "done" ? written[kind][index] : null;
    return value === null ? null : value / Math.max(...written[kind], 1e-12);
  }
  const mention = judged(index);
  return mention === null ? null : mention.probability;
}

function colour() {
  const kind = $("colour").value || (data.threshold === null ? "surprise" : "warning");
  const tint = { surprise: "var(--st-plain)", contribution: "var(--st-good)", relevancy: "var(--st-plain)", attention: "var(--st-plain)" }[kind] || "var(--st-warn)";
  legend(kind, tint);
  element.querySelectorAll(".st-t").forEach((span) => {
    const index = Number(span.dataset.token), token = data.tokens[index], mention = judged(index);
    const value = strength(token, index, kind), alarm = warned(mention);
    span.style.background = value === null || value === undefined ? "none" : mixed(tint, value);
    const first = alarm && mention.tokens[0] === index, last = alarm && mention.tokens[mention.tokens.length - 1] === index;
    span.className = ["st-t", alarm ? "st-warned" : "", first ? "st-first" : "", last ? "st-last" : "",
      { 1: "st-hallucinated", 0: "st-grounded" }[mention === null ? -1 : mention.label] || "", data.kind === "done" && index === chosen ? "st-chosen" : ""].filter(Boolean).join(" ");
    if (last) span.dataset.chance = percent(mention.probability); else delete span.dataset.chance;
    if (data.kind !== "done") return; // buttons from then on
    span.setAttribute("aria-pressed", index === chosen);
    const truth = mention !== null && mention.label >= 0 ? `, ${TRUTH[mention.label]}` : "";
    span.setAttribute("aria-label", part(...token.span) + (alarm ? `, warned, ${percent(mention.probability)}` : "") + truth);
  });
}

function mixed(tint, value) {
  return `color-mix(in srgb, ${tint} ${(STRONGEST * value).toFixed(1)}%, transparent)`;
}

function legend(kind, tint) {
  const known = data.mentions.some((one) => one.label >= 0), rows = [], ramp = make("i");
  const entry = (sample, text) => { const row = make("li"); row.append(sample, make("span", text)); rows.push(row); };
  ramp.style.background = `linear-gradient(90deg, transparent, ${mixed(tint, 1)})`;
  const meaning = data.meaning || "score of the object so far";
  entry(ramp, { surprise: "how improbable the token was, 0 to 100\u00a0%", contribution: "how much the image weighs against the text",
    every: "the detector on every token, which it is not calibrated for",
    relevancy: patches ? "relevancy of the chosen patches, 0 to its largest" : "choose patches of the picture", attention: patches ? "attention to the chosen patches, 0 to its largest" : "choose patches of the picture" }[kind] || `0 to 100\u00a0%: ${meaning}`);
  if (data.threshold !== null) {
    const box = make("span", "word", "st-key-warned");
    box.append(make("b", "%"));
    entry(box, "warned of");
  }
  if (known) entry(make("span", "word", "st-hallucinated"), "truth: hallucinated");
  if (known) entry(make("span", "word", "st-grounded"), "truth: grounded");
  $("key").replaceChildren(...rows);
}

function outcomes() {
  const known = data.mentions.filter((one) => one.label >= 0), names = known.map((one) => outcome(one.label, warned(one)));
  const count = (name) => names.filter((one) => one === name).length, wrong = known.filter((one) => one.label === 1).length;
  const parts = [];
  if (data.threshold !== null && data.mentions.length) {
    parts.push(`Warned of ${data.mentions.filter(warned).length} of ${counted(data.mentions.length, "mention")}.`);
  }
  if (known.length) parts.push(`${wrong} of ${known.length} ${known.length === 1 ? "is" : "are"} hallucinated`
    + (data.threshold === null ? "." : `: ${count("caught")} caught, ${count("missed")} missed; ${counted(count("false alarm"), "false alarm")}.`));
  $("outcomes").textContent = parts.join(" ");
  $("outcomes").hidden = !parts.length;
  $("reply").textContent = data.reply;
  $("reply").hidden = !data.reply;
  $("truth-note").textContent = data.truth === null ? "" : `The picture shows: ${[...data.truth].sort().join(", ") || "none of these objects"}.`;
}

function tip(event) {
  const entered = event.type.endsWith("out") ? event.relatedTarget : event.target; // of leaving, what comes next
  const span = entered && entered.closest ? entered.closest(".st-t") : null, box = $("tip");
  if (!span || !data || data.kind !== "done") { box.hidden = true; return; }
  const token = data.tokens[Number(span.dataset.token)], mention = judged(Number(span.dataset.token));
  const lines = [`token probability ${percent(token.probability)}`];
  if (mention !== null && mention.probability !== null) {
    lines.unshift(`${mention.object}: ${percent(mention.probability)} ${{ calibrated: "hallucinated", shifted: "(not calibrated)", unknown: "(score)" }[data.calibration]}`);
    if (mention.label >= 0) lines.push(`truth: ${TRUTH[mention.label]} (${outcome(mention.label, warned(mention))})`);
    if (mention.evidence !== null) lines.push(`evidence ${signed(mention.evidence)}, prior ${signed(mention.prior)} (log-odds)`);
    if (mention.visual_evidence) lines.push(`the place looks like: ${mention.visual_evidence}`);
    mention.top.slice(0, 3).forEach(([name, push]) => lines.push(`${name} ${signed(push)}`));
  }
  box.replaceChildren(...lines.map((line, index) => make("div", line, index ? "" : "st-tip-head")));
  box.hidden = false;
  const rect = span.getBoundingClientRect(), width = box.offsetWidth;
  box.style.left = Math.max(8, Math.min(rect.left, window.innerWidth - width - 8)) + "px";
  const below = rect.bottom + 6;
  box.style.top = (below + box.offsetHeight > window.innerHeight ? rect.top - box.offsetHeight - 6 : below) + "px";
}

// --- the picture -----------------------------------------------------------------------------------------------

function ramp(value) {
  const stops = data.ramp, position = value * (stops.length - 1), low = Math.min(Math.floor(position), stops.length - 2);
  return stops[low].map((part, index) => part + (position - low) * (stops[low + 1][index] - part));
}

function gain(map) {
  const own = Math.pow(10, number("scale") / 20);
  if ($("common").value === "own") return own;
  return own * map.peaks[chosen][number("layer")] / map.highest;
}

function drawMap(canvas, map, value) { // the photograph under a map of shape and box; value(cell) in [0, 1] and above
  const brush = canvas.getContext("2d"), scale = canvas.width / data.size[0];
  brush.clearRect(0, 0, canvas.width, canvas.height);
  brush.imageSmoothingEnabled = true;
  if (photo.complete && photo.naturalWidth) brush.drawImage(photo, 0, 0, canvas.width, canvas.height);
  if (map) cover(brush, map, value, map.box.map((edge) => edge * scale));
  outlinePatches(brush, scale);
}

function cover(brush, map, value, [left, top, right, bottom]) {
  const [rows, columns] = map.shape, opacity = number("opacity") / 100, least = number("threshold") / 100;
  const small = new ImageData(columns, rows), sheet = make("canvas");
  for (let cell = 0; cell < rows * columns; cell++) {
    const share = Math.min(1, value(cell));
    small.data.set([...ramp(share), share < least || share === 0 ? 0 : 255 * opacity * share], 4 * cell);
  }
  [sheet.width, sheet.height] = [columns, rows];
  sheet.getContext("2d").putImageData(small, 0, 0);
  brush.imageSmoothingEnabled = false;
  brush.drawImage(sheet, left, top, right - left, bottom - top);
  brush.fillStyle = "rgba(128, 128, 128, 0.6)"; // what the model does not see
  const { width, height } = brush.canvas, after = width - right, below = height - bottom;
  $("margin").hidden = Math.max(left, top, after, below) <= 2;
  if (left > 2) brush.fillRect(0, 0, left, height);
  if (after > 2) brush.fillRect(right, 0, width, height);
  if (top > 2) brush.fillRect(0, 0, width, top);
  if (below > 2) brush.fillRect(0, bottom, width, height);
}

function paintSeen() { // where the detector sees the object, as strongly as every token speaks for it
  const mention = judged(chosen), entry = (mention && data.seen.objects[mention.object]) || [0, ""], name = `“${mention ? mention.object : shown(data.tokens[chosen].text)}”`;
  const [probability, cells] = entry, values = bytes(cells), factor = probability * Math.pow(10, number("scale") / 20) / 255;
  drawMap($("picture"), data.seen, (cell) => (values.length ? values[cell] * factor : 0));
  $("seen-word").textContent = name;
  $("seen-note").textContent = !values.length ? "This word names no object that the detector looks for."
    : `The detector looks for ${name} among the image tokens. The one that speaks for it most makes it ${percent(probability)} probable, by itself; full colour would be 100\u00a0%. It has learned this from what answers named, and from no box.`;
}

function paint() {
  const seen = $("source").value === "seen", map = data.maps[$("source").value];
  for (const id of ["seen-title", "seen-note"]) $(id).hidden = !seen;
  for (const id of ["map-title", "legend"]) $(id).hidden = seen || (id === "legend" && !data.layers.length);
  for (const id of ["layer", "common"]) $(id).disabled = seen;
  if (seen) { paintSeen(); return; }
  if (!map) { drawMap($("picture"), null, null); return; }
  const size = map.shape[0] * map.shape[1], factor = gain(map) / 255, start = (chosen * data.layers.length + number("layer")) * size;
  drawMap($("picture"), map, (cell) => map.values[start + cell] * factor);
}

// --- everything about the chosen token -------------------------------------------------------------------------

function bars(id, rows, signs) {
  const most = Math.max(...rows.map((row) => Math.abs(row.value)), 1e-9);
  $(id).replaceChildren(...rows.map((row) => {
    const line = make("div", undefined, signs ? "st-bar st-signed" : "st-bar"), name = make("span", row.name);
    const holder = make("span", undefined, "st-track"), bar = make("i", undefined, row.value < 0 ? "st-against" : "");
    name.title = row.name;
    if (row.token !== undefined) line.dataset.token = row.token; // a click chooses it
    bar.style.width = (signs ? 50 : 100) * Math.abs(row.value) / (row.most || most) + "%";
    holder.append(bar);
    line.append(name, holder, make("span", row.text));
    return line;
  }));
  if (!rows.length) $(id).append(make("p", "none", "st-soft"));
}

function list(id, rows) {
  $(id).replaceChildren(...rows.flatMap(([name, text]) => [make("dt", name), make("dd", text)]));
}

function contribution(token, layer) {
  if (!token.contribution) return null;
  return 1 / (1 + Math.exp(-token.contribution[$("statistic").value || "sum"][layer]));
}

function facts(token, mention) {
  const rows = [["token", JSON.stringify(token.text)], ["probability", percent(token.probability)], ["entropy", token.entropy.toFixed(2) + " nats"],
    ["position", `${chosen + 1} of ${data.tokens.length}`]];
  if (mention !== null) rows.push(["object", mention.object]);
  if (mention !== null && mention.probability !== null) {
    rows.push([data.calibration === "calibrated" ? "hallucinated" : "score", percent(mention.probability) + (warned(mention) ? ", warned" : ", not warned")
      + (data.shift ? ", not calibrated here" : "")]);
    if (mention.label >= 0) rows.push(["truth", `${TRUTH[mention.label]}: ${outcome(mention.label, warned(mention))}`]);
    if (mention.evidence !== null) {
      rows.push(["evidence", signed(mention.evidence) + " log-odds, what the model's own computation says"]);
      rows.push(["prior", signed(mention.prior) + " log-odds, before any evidence"]);
    }
    if (mention.visual_evidence) rows.push(["the place looks like", mention.visual_evidence]);
  } else if (mention === null && data.threshold !== null) {
    rows.push(["object", "none is named here, so the detector says nothing"]);
    if ($("colour").value === "every" && token.verdict.probability !== null) {
      rows.push(["detector", percent(token.verdict.probability) + ", for which it is not calibrated: it learned from objects"]);
    }
  }
  list("facts", rows);
}

function relevancy(token) {
  const layer = number("layer"), share = (value) => value / 10000;
  const rows = (names, values) => values.map((value, index) => ({ name: names[index], value: share(value), text: percent(share(value)) }));
  const parts = rows(["image", "question", "earlier answer", "everything else"], token.shares[layer]);
  bars("shares", parts.map((part) => ({ ...part, most: 1 })));
  $("shares-layer").textContent = `${data.layers[layer] + 1} of ${data.depth}`;
  $("shares-scope").textContent = `, gradient of scope ${data.scope}`;
  const [image, question, before] = token.shares[layer].map((value) => share(value) * token.total[layer]);
  list("sums", [["R_image", image.toFixed(4)], ["R_text", `${(question + before).toFixed(4)} = question ${question.toFixed(4)} + answer ${before.toFixed(4)}`]]);
  bars("question", rows(data.question.map(shown), token.question[layer]));
  const earlier = rows(data.tokens.map((other) => shown(other.text)), token.answer[layer]);
  const kept = new Set([...earlier].sort((a, b) => b.value - a.value).slice(0, 16));
  bars("before", earlier.filter((row) => kept.has(row)));
  if (earlier.length > 16) $("before").append(make("p", `the 16 most relevant of ${earlier.length}, in their order`, "st-soft"));
}

function strip() {
  const layer = number("contribution-layer"), scale = number("contribution-scale") / 10;
  $("contribution-layer-text").textContent = `${data.layers[layer] + 1} of ${data.depth}`;
  $("contribution-scale-text").textContent = `× ${scale.toFixed(1)}`;
  $("strip").replaceChildren(...data.tokens.map((token, index) => {
    const value = contribution(token, layer), column = make("div", undefined, index === chosen ? "st-column st-chosen" : "st-column");
    const holder = make("span", undefined, "st-rise"), bar = make("i");
    bar.style.height = 100 * Math.min(1, value * scale) + "%";
    holder.append(bar);
    column.append(holder, make("b", shown(token.text)));
    column.title = `${shown(token.text)}: ${percent(value)}`;
    column.dataset.token = index;
    return column;
  }));
  bars("by-layer", data.layers.map((number, index) => {
    const value = contribution(data.tokens[chosen], index);
    return { name: `layer ${number + 1}`, value: Math.min(1, value * scale), most: 1, text: percent(value) };
  }));
}

function evolution(token) {
  const layers = token.evolution, style = (top) => (top.word === token.word ? "st-said" : "");
  $("evolution").replaceChildren(...layers.map((layer, index) => {
    const row = make("tr");
    row.append(make("td", index + 1), make("td", layer.rank + 1), make("td", percent(layer.probability)));
    layer.top.forEach((top) => row.append(make("td", `${shown(top.word)} ${percent(top.probability)}`, style(top))));
    return row;
  }));
  if (layers.length) bars("words", layers[layers.length - 1].top.map((top) => (
    { name: shown(top.word) + (style(top) ? " ✓" : ""), value: top.probability, most: 1, text: percent(top.probability) })));
}

function truthOf(one) {
  const name = outcome(one.label, warned(one)), box = make("span");
  if (one.label < 0) return "not judged";
  box.append(`${TRUTH[one.label]}: `, make("span", name, "st-outcome st-" + name.replace(" ", "-")));
  return box;
}

function mentions() {
  const odds = data.mentions.some((one) => one.evidence !== null), known = data.mentions.some((one) => one.label >= 0), head = make("tr");
  const priors = [...new Set(data.mentions.filter((one) => one.prior !== null).map((one) => one.prior))], varies = priors.length > 1;
  const names = ["object", data.threshold === null ? "probability of its token" : data.calibration === "calibrated" ? "probability" : "score",
    ...(known ? ["truth"] : []), ...(odds ? ["evidence", ...(varies ? ["prior"] : [])] : [])];
  $("prior-note").textContent = priors.length !== 1 ? "" : `Evidence adds to a prior of ${signed(priors[0])} log-odds, the same for every object.`;
  const odd = (index) => (index >= names.length - (odds ? 1 + varies : 0) ? "st-odds" : ""); // left out on a phone
  head.append(...names.map((name, index) => make("th", name, odd(index))));
  $("mentions-head").replaceChildren(head);
  $("visual-evidence-note").textContent = data.visual_evidence_note;
  $("mentions").replaceChildren(...data.mentions.flatMap((one) => {
    const row = make("tr", undefined, warned(one) ? "st-alarm" : ""), cells = [""];
    if (data.threshold === null) cells.push(one.tokens.length ? percent(data.tokens[one.tokens[0]].probability) : "");
    else cells.push(one.probability === null ? "" : percent(one.probability) + (warned(one) ? ", warned" : ""));
    if (known) cells.push(data.threshold === null ? TRUTH[one.label] : truthOf(one));
    if (odds) cells.push(...[one.evidence, ...(varies ? [one.prior] : [])].map((value) => (value === null ? "" : signed(value))));
    row.append(...cells.map((cell, index) => { const box = make("td", undefined, odd(index)); box.append(cell); return box; }));
    const name = make(one.tokens.length ? "button" : "span", one.object, one.tokens.length ? "st-link" : "");
    if (one.tokens.length) name.type = "button";
    row.firstChild.append(name);
    const rows = [row];
    if (one.visual_evidence) {
      const cell = make("td", `looks like: ${one.visual_evidence}`);
      cell.colSpan = cells.length;
      rows.push(make("tr", undefined, "st-visual-evidence"));
      rows[1].append(cell);
    }
    if (one.tokens.length) rows.forEach((node) => { node.dataset.token = one.tokens[0]; });
    return rows;
  }));
}

// --- before and after a mitigation -----------------------------------------------------------------------------

function table(head, body, names, rows) {
  const first = make("tr");
  first.append(...names.map((name) => make("th", name)));
  $(head).replaceChildren(first);
  $(body).replaceChildren(...rows.map((cells) => {
    const row = make("tr");
    row.append(...cells.map((cell) => make("td", cell)));
    return row;
  }));
}

function edit() {
  const own = data.kind === "done" ? data.edit : null, tags = { same: "span", removed: "del", added: "ins" };
  $("edit-card").hidden = !own;
  if (!own) return;
  for (const [id, pieces] of [["before-edit", own.before], ["after-edit", own.after]]) {
    $(id).replaceChildren(...pieces.map(([kind, text]) => make(tags[kind], text)));
  }
  if (own.candidates.length) {
    const rows = own.candidates.map((one) => [one.score.toFixed(2) + (one.chosen ? ", chosen" : ""), one.mentions, one.text]);
    table("reasons-head", "reasons", ["score, lower is better", "mentions", "answer"], rows);
    return;
  }
  const asked = own.reasons.some((one) => one.yes !== null), known = own.reasons.some((one) => one.label >= 0);
  const names = ["object", data.calibration === "calibrated" ? "probability" : "score", "removed from",
    ...(asked ? ["yes when asked"] : []), ...(known ? ["truth"] : []), "what became of it"];
  table("reasons-head", "reasons", names, own.reasons.map((one) => [one.object, percent(one.probability),
    one.threshold === null ? "" : percent(one.threshold), ...(asked ? [one.yes === null ? "not asked" : percent(one.yes)] : []),
    ...(known ? [TRUTH[one.label]] : []), one.fate]));
}

// --- a sample of a run ------------------------------------------------------------------------------------------

function neighbour(step) {
  const own = data.case, same = (one) => one.run === own.run && one.task === own.task && one.sample === own.sample;
  const order = (window.stethoscopeOrders || []).find((samples) => samples.some(same)) || [];
  const index = order.findIndex(same);
  if (index >= 0) return order[index + step] || null; // in the order and the filter of the list
  const sample = step < 0 ? own.previous : own.next;
  return sample === null ? null : { run: own.run, task: own.task, sample, mention: null };
}

function showCase() {
  const own = data.kind === "done" ? data.case : null;
  $("case").hidden = !own || !trigger;
  if (!trigger || data.kind !== "done") return;
  const link = new URL(window.location);
  for (const key of CASE) {
    if (own && own[key] !== null) link.searchParams.set(key, own[key]); else link.searchParams.delete(key);
  }
  window.history.replaceState(window.history.state, "", link);
  if (!own) return;
  $("case-name").textContent = `${own.run}, ${own.task}: ${own.sample} (${own.index} of ${own.count})`;
  for (const [id, step] of [["previous", -1], ["next", 1]]) $(id).disabled = neighbour(step) === null;
}

function openLink() {
  const link = new URL(window.location).searchParams;
  if (!trigger || !link.get("run") || !link.get("sample")) return;
  const mention = /^\d+$/.test(link.get("mention")) ? Number(link.get("mention")) : null;
  trigger("look", { run: link.get("run"), task: link.get("task") || "", sample: link.get("sample"), mention });
}

// --- a conversation -----------------------------------------------------------------------------------------------

function turns(idle) { // a static page has the earlier ones only, and no server to show them again
  const done = Boolean(data) && data.kind === "done", shown = done ? data.answer_id : "";
  const earlier = done && !conversation ? (data.history || []).map(([asked, text]) => ({ asked, text, warned: [], mentions: null })) : [];
  const listed = conversation ? conversation.turns : earlier;
  $("turns-card").hidden = !listed.some((turn) => turn.answer_id !== shown);
  $("turns").replaceChildren(...listed.map((turn, index) => {
    const row = make("li"), box = make(conversation ? "button" : "div", undefined, "st-turn"), current = done && turn.answer_id === shown;
    if (conversation) {
      box.type = "button";
      box.disabled = !done && !idle;
      box.setAttribute("aria-current", current);
      box.addEventListener("click", () => { if (!current) trigger("gradient", { scope: "row", answer_id: turn.answer_id }); });
    }
    const names = turn.warned.map(([name, probability, label]) => `${name} ${percent(probability)}` + (label < 0 ? "" : ` (${outcome(label, true)})`));
    const warnings = names.length ? `warned of ${[...new Set(names)].join(", ")}` : turn.mentions ? "no warning" : "";
    box.append(make("b", `${index + 1}. ${turn.asked}`), make("span", turn.text, "st-turn-text"));
    if (warnings) box.append(make("span", warnings, names.length ? "st-error" : "st-soft"));
    if (current) box.append(make("span", "shown below", "st-soft"));
    row.append(box);
    return row;
  }));
  if (!listed.length || !shown || listed[listed.length - 1].answer_id === shown) $("past").scrollTop = $("past").scrollHeight;
}

function askOn() {
  const field = document.querySelector("#question textarea");
  field.scrollIntoView({ block: "center" });
  field.focus({ preventScroll: true });
  field.select();
}

// --- saving ----------------------------------------------------------------------------------------------------

function savePicture(id, name) {
  const link = make("a");
  link.href = $(id).toDataURL("image/png");
  link.download = `${(name.match(/[\p{L}\p{N}]+/gu) || ["token"]).join("-")}.png`;
  link.click();
}

function save(kind) {
  if (kind === "png") savePicture("picture", shown(data.tokens[chosen].text));
  else trigger("export", { kind, scope: data.scope, answer_id: data.answer_id });
}

// --- drawing, choosing, receiving ------------------------------------------------------------------------------

function texts() {
  for (const id of ["threshold", "opacity"]) $(id + "-text").textContent = percent(number(id) / 100);
  $("warn-text").textContent = percent(warnFrom);
  $("scale-text").textContent = "× " + Math.pow(10, number("scale") / 20).toFixed(2);
  if (data.layers.length) $("layer-text").textContent = `${data.layers[number("layer")] + 1} of ${data.depth}`;
}

function show() {
  frame = 0;
  if (!data || data.kind !== "done") return;
  const began = performance.now(), token = data.tokens[chosen], mention = judged(chosen);
  element.querySelectorAll("[data-word]").forEach((one) => { one.textContent = `“${shown(token.text)}”`; });
  texts();
  facts(token, mention);
  const top = mention === null && $("colour").value !== "every" ? [] : (mention || token.verdict).top;
  $("top-card").hidden = !top.length;
  bars("top", top.map(([name, push]) => ({ name, value: push, text: signed(push) })), true);
  mentions();
  outcomes();
  evolution(token);
  if (data.layers.length) { relevancy(token); strip(); }
  written = patchValues();
  colour();
  attention();
  paint();
  fromPatches(written);
  $("picture").setAttribute("aria-label", $("source").value === "seen" ? `the picture, and where the detector sees ${$("seen-word").textContent}` : `the picture under the relevancy of ${shown(token.text)}`);
  element.querySelector(".st").dataset.redraw = (performance.now() - began).toFixed(1); // milliseconds
}

function soon() {
  if (!frame) frame = requestAnimationFrame(show);
}

function choose(index) {
  chosen = index;
  tabStop();
  if (data.case) { // the link leads to what is looked at
    const mention = judged(chosen);
    data.case.mention = mention === null ? null : mention.start;
    showCase();
  }
  soon();
}

function bytes(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

function fit(id, last) {
  const fresh = Number($(id).max) !== last;
  $(id).max = last;
  if (fresh) $(id).value = last;
}

function setWarnFrom() {
  warnFrom = data.threshold === null ? 0.5 : data.threshold;
  $("warn").value = 100 * warnFrom;
}

function finished(message) {
  const same = message.answer_id === (data && data.answer_id);
  data = message;
  for (const map of Object.values(data.maps)) {
    if (map.values) continue;
    map.values = bytes(map.data);
    map.highest = Math.max(...map.peaks.map((row) => Math.max(...row)), 1e-12);
  }
  readAttention(data.attention);
  if (!same) {
    scopes = {};
    patches = null;
    chosen = data.start;
    setWarnFrom();
    fit("layer", Math.max(0, data.layers.length - 1));
    fit("contribution-layer", Math.max(0, data.layers.length - 1));
  }
  scopes[data.scope] = data;
  $("scope").value = data.scope;
  $("scope").disabled = false;
  $("scope-line").hidden = !trigger;
  const kinds = Object.keys(COLOURS).filter((kind) => (data.threshold !== null || !["warning", "every"].includes(kind))
    && (data.layers.length || !["contribution", "relevancy"].includes(kind)) && (data.attention && data.attention.box || kind !== "attention"));
  options("colour", kinds.map((kind) => [kind, COLOURS[kind]]));
  const names = { raw: "image tokens, as the language model reads them", tower: "patches, through the vision tower", seen: "the named object, as the detector sees it" };
  options("source", [...Object.keys(data.maps), ...(data.seen ? ["seen"] : [])].map((kind) => [kind, names[kind]]));
  options("statistic", ["sum", "max", "mean"].map((kind) => [kind, kind]));
  for (const id of ["map-controls", "legend", "shares-card", "question-card", "before-card", "contribution-card"]) $(id).hidden = !data.layers.length;
  for (const id of ["words-card", "evolution-card"]) $(id).hidden = !data.tokens[0].evolution.length;
  $("no-map").hidden = data.layers.length > 0;
  $("mentions-card").hidden = !data.mentions.length;
  fitAttention();
  const [width, height] = data.size;
  const scale = width < 640 && height < 640 ? Math.ceil(640 / Math.max(width, height)) : Math.min(1, 1024 / Math.max(width, height));
  for (const id of ["picture", "attention-picture"]) [$(id).width, $(id).height] = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
  if (photo.src !== data.photo) { photo.onload = soon; photo.src = data.photo; }
}

function reveal() { // on a phone the answer comes below the question
  const after = $("turns-card").hidden ? element : [$("status"), $("written")].find((part) => !part.hidden) || element;
  if (trigger && window.innerWidth <= 760) after.scrollIntoView({ block: "start" });
}

function receive() {
  let message;
  try { message = JSON.parse(props.value || "{}"); } catch (error) { say("what came from the server cannot be read", true); return; }
  if (message.kind === "heads") { receiveHeads(message); return; }
  $("tip").hidden = true; // it is about a word that may be gone
  if (!message.aside) element.ariaBusy = message.kind === "busy" || message.kind === "writing";
  if (!message.kind || ["hint", "error", "busy", "stopped"].includes(message.kind)) {
    say(message.text || "", message.kind === "error");
    if (message.kind === "error") fetching = null;
    if (message.kind === "busy") $("scope").disabled = true;
    if (["error", "stopped"].includes(message.kind) && data && !message.aside) { $("scope").disabled = false; $("scope").value = data.scope || "row"; }
    if (message.clear && !(message.kind === "stopped" && data && data.kind === "done")) {
      data = null;
      conversation = message.conversation || null;
      turns(message.kind !== "busy");
      for (const id of ["written", "diagnosed", "case", "edit-card"]) $(id).hidden = true;
    }
    if (message.kind === "busy" || (message.kind === "error" && message.clear)) reveal();
    return;
  }
  const fresh = !data;
  if (message.kind === "done") { finished(message); conversation = data.conversation || null; } else data = message;
  turns();
  $("ask-on").hidden = !conversation;
  say(message.status || "");
  $("asked").textContent = data.asked;
  $("summary").textContent = data.summary || "";
  $("notes").replaceChildren(...(data.notes || []).map((note) => make("li", note, data.shift && note === data.shift ? "st-error" : "")));
  $("written").hidden = false;
  $("diagnosed").hidden = $("colouring").hidden = data.kind !== "done";
  $("saving").hidden = data.kind !== "done";
  for (const button of element.querySelectorAll("[data-save]")) button.hidden = button.dataset.save !== "png" && !trigger;
  for (const id of ["reply", "outcomes"]) if (data.kind !== "done") $(id).hidden = true;
  $("warn-line").hidden = data.threshold === null;
  write();
  edit();
  showCase();
  if (fresh) reveal();
  if (data.kind === "done") show(); else { setWarnFrom(); colour(); }
}

element.addEventListener("click", (event) => {
  const saved = event.target.closest("[data-save]");
  if (saved && data && data.kind === "done") { save(saved.dataset.save); return; }
  const owner = event.target.closest("[data-token]");
  if (owner && data && data.kind === "done") choose(Number(owner.dataset.token));
});
element.addEventListener("keydown", (event) => {
  const span = event.target.closest(".st-t");
  if (!span || !data || data.kind !== "done") return;
  const step = { n: 1, p: -1 }[event.key]; // only here, where a word has the focus
  const sample = step && trigger && data.case ? neighbour(step) : null;
  if (sample) { trigger("look", sample); return; }
  const spans = [...element.querySelectorAll(".st-t")], at = spans.indexOf(span);
  const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1, Enter: at, " ": at }[event.key];
  if (next === undefined || !spans[next]) return;
  event.preventDefault();
  choose(Number(spans[next].dataset.token));
  spans[next].focus();
});
for (const kind of ["mouseover", "focusin", "mouseout", "focusout"]) element.addEventListener(kind, tip);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") $("tip").hidden = true; });
$("warn").addEventListener("input", () => { warnFrom = number("warn") / 100; });
for (const id of [...RANGES, "common", "source", "statistic", "colour"]) $(id).addEventListener("input", soon);
for (const id of ["attention-layer", "attention-head", "heads-show"]) $(id).addEventListener("input", soon);
for (const id of ["heads", "matrix", "queries"]) wireGrid(id);
$("matrix-details").addEventListener("toggle", soon);
$("matrix-save").addEventListener("click", () => savePicture("matrix", "attention-matrix"));
for (const id of Object.keys(PICTURES)) wirePicture(id);
$("ask-on").addEventListener("click", askOn);
$("scope").addEventListener("change", () => {
  const wanted = $("scope").value;
  if (scopes[wanted]) { data = scopes[wanted]; soon(); return; }
  $("scope").disabled = true;
  trigger("gradient", { scope: wanted, answer_id: data.answer_id });
});
for (const [id, step] of [["previous", -1], ["next", 1]]) {
  $(id).addEventListener("click", () => { const sample = neighbour(step); if (sample) trigger("look", sample); });
}
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", soon);
watch("value", receive);
receive();
openLink();
