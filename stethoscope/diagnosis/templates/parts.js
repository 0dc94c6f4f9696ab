// Small parts that the viewer and the app's list share; element is the root of each.
const $ = (id) => element.querySelector(`[data-id="${id}"]`);

function make(name, text, kind) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
}

function entries(pairs) { // of a menu: pairs of value and text
  return pairs.map(([value, text]) => Object.assign(make("option", text), { value }));
}

function options(id, pairs) { // fills a menu, which keeps what is chosen
  const before = $(id).value;
  $(id).replaceChildren(...entries(pairs));
  if (pairs.some(([value]) => value === before)) $(id).value = before;
}

function percent(value) { // as stethoscope.core.text.percent
  if (value > 0 && value < 0.0005) return "<0.1\u00a0%";
  return (100 * value).toFixed(value >= 0.0995 || value === 0 ? 0 : 1) + "\u00a0%";
}

function counted(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

function outcome(label, alarm) { // as stethoscope.diagnosis.answer_verdicts.mention_outcome
  if (label < 0) return "not judged";
  return label ? (alarm ? "caught" : "missed") : (alarm ? "false alarm" : "right");
}
