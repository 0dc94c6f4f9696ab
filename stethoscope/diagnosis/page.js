"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const spans = [...document.querySelectorAll(".t")];
const canvas = $("picture"), brush = canvas.getContext("2d"), photo = new Image();
let chosen = data.start;

function bytes(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}
for (const map of Object.values(data.maps)) map.values = bytes(map.data);

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function percent(value) {
  return value >= 0.0995 ? (100 * value).toFixed(0) + " %" : (100 * value).toFixed(1) + " %";
}

function signed(value) {
  return (value > 0 ? "+" : value < 0 ? "\u2212" : "") + Math.abs(value).toFixed(2);
}

function ramp(value) {
  const stops = data.ramp, at = value * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
  return stops[low].map((part, index) => part + (at - low) * (stops[low + 1][index] - part));
}

function bars(id, rows) {
  const box = $(id), most = Math.max(...rows.map((row) => Math.abs(row.value)), 1e-9);
  box.replaceChildren(...rows.map((row) => {
    const line = element("div", undefined, "bar"), name = element("span", row.name), holder = element("span");
    const bar = element("i", undefined, row.against ? "against" : "");
    name.title = row.name;
    bar.style.width = 100 * Math.abs(row.value) / (row.most || most) + "%";
    holder.append(bar);
    line.append(name, holder, element("span", row.text));
    return line;
  }));
  if (!rows.length) box.append(element("p", "nothing", "soft"));
}

function colour() {
  const kind = $("colour").value;
  spans.forEach((span) => {
    const token = data.tokens[span.dataset.token];
    const value = kind === "warning" ? token.warning : kind === "every" ? token.every : 1 - token.probability;
    const tint = kind === "surprise" ? "var(--plain)" : "var(--warn)";
    span.style.background = value === null ? "none" : `rgba(${tint}, ${(0.75 * value).toFixed(3)})`;
  });
}

function draw() {
  brush.clearRect(0, 0, canvas.width, canvas.height);
  brush.imageSmoothingEnabled = true;
  brush.drawImage(photo, 0, 0, canvas.width, canvas.height);
  const map = data.maps[$("source") ? $("source").value : "none"];
  if (!map) return;
  const [rows, columns] = map.shape, size = rows * columns;
  const start = (chosen * data.layers.length + Number($("layer").value)) * size;
  const small = new ImageData(columns, rows), opacity = Number($("opacity").value) / 100;
  for (let cell = 0; cell < size; cell++) {
    const value = map.values[start + cell] / 255;
    small.data.set([...ramp(value), 255 * opacity * Math.sqrt(value)], 4 * cell);
  }
  const sheet = element("canvas");
  [sheet.width, sheet.height] = [columns, rows];
  sheet.getContext("2d").putImageData(small, 0, 0);
  const scale = canvas.width / data.size[0], [left, top, right, bottom] = map.box.map((edge) => edge * scale);
  brush.imageSmoothingEnabled = false;
  brush.drawImage(sheet, left, top, right - left, bottom - top);
  brush.fillStyle = "rgba(128, 128, 128, 0.6)"; // what the model does not see
  if (left > 2) brush.fillRect(0, 0, left, canvas.height);
  if (canvas.width - right > 2) brush.fillRect(right, 0, canvas.width, canvas.height);
  if (top > 2) brush.fillRect(0, 0, canvas.width, top);
  if (canvas.height - bottom > 2) brush.fillRect(0, bottom, canvas.width, canvas.height);
}

function facts(token) {
  const rows = [["token", JSON.stringify(token.text)], ["probability", percent(token.probability)],
    ["entropy", token.entropy.toFixed(2) + " nats"]];
  if (token.object) rows.push(["object", token.object]);
  if (token.warning !== null) rows.push(["hallucinated", percent(token.warning) + (token.warned ? ", warned" : "")]);
  if (token.evidence !== null) rows.push(["evidence and prior", `${signed(token.evidence)} and ${signed(token.prior)} log-odds`]);
  if (token.looks) rows.push(["the place looks like", token.looks]);
  $("facts").replaceChildren(...rows.flatMap(([name, text]) => [element("dt", name), element("dd", text)]));
}

function evolution(token) {
  const body = $("evolution");
  if (!body) return;
  body.replaceChildren(...token.evolution.map((layer, index) => {
    const row = element("tr");
    row.append(element("td", index + 1), element("td", layer.rank + 1), element("td", percent(layer.probability)));
    layer.top.forEach((one) => row.append(
      element("td", JSON.stringify(one.word).slice(1, -1) + " " + percent(one.probability), one.word === token.word ? "said" : "")));
    return row;
  }));
}

function show() {
  const token = data.tokens[chosen];
  spans.forEach((span) => {
    span.classList.toggle("chosen", Number(span.dataset.token) === chosen);
    span.setAttribute("aria-pressed", Number(span.dataset.token) === chosen);
  });
  facts(token);
  if ($("top")) bars("top", token.top.map(([name, push]) => (
    { name: name, value: push, against: push > 0, text: signed(push) })));
  evolution(token);
  if (data.layers.length) {
    const at = Number($("layer").value);
    $("layer-text").textContent = `${data.layers[at] + 1} of ${data.depth}`;
    $("opacity-text").textContent = $("opacity").value + " %";
    const parts = token.shares[at].map((value) => value / 10000);
    bars("shares", ["image", "question", "earlier answer", "everything else"].map((name, index) => (
      { name: name, value: parts[index], most: 1, text: percent(parts[index]) })));
    const kind = $("statistic").value;
    bars("contribution", data.layers.map((layer, index) => {
      const value = 1 / (1 + Math.exp(-token.contribution[kind][index]));
      return { name: "layer " + (layer + 1), value: value, most: 1, text: percent(value) };
    }));
    const asked = token.question[at].map((value, index) => ({ name: data.question[index], value: value / 10000, text: percent(value / 10000) }));
    bars("question", asked);
    const before = token.answer[at].map((value, index) => ({ name: data.tokens[index].text, value: value / 10000, text: percent(value / 10000) }));
    bars("before", before.sort((one, other) => other.value - one.value).slice(0, 12));
  }
  draw();
}

function choose(event) {
  const owner = event.target.closest("[data-token]");
  if (!owner || (event.type === "keydown" && event.key !== "Enter" && event.key !== " ")) return;
  event.preventDefault();
  chosen = Number(owner.dataset.token);
  show();
}
document.addEventListener("click", choose);
document.addEventListener("keydown", choose);
for (const id of ["layer", "opacity", "source", "statistic"]) if ($(id)) $(id).addEventListener("input", show);
$("colour").addEventListener("input", colour);
photo.onload = draw;
photo.src = $("photo").src;
colour();
show();
