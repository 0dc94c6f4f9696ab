// The report of a run in a frame that runs no script, as high as the report is.
const note = element.querySelector('[data-id="note"]'), frame = element.querySelector('[data-id="frame"]');

function fit() {
  const inside = frame.contentDocument && frame.contentDocument.documentElement;
  if (inside && inside.offsetHeight) frame.style.height = inside.offsetHeight + 24 + "px";
}

function receive() {
  let found = { note: "", page: "" };
  try { found = { ...found, ...JSON.parse(props.value || "{}") }; } catch (error) { found.note = "what came from the server cannot be read"; }
  note.textContent = found.note;
  note.hidden = !found.note;
  frame.hidden = !found.page;
  frame.title = found.title || "figures";
  frame.srcdoc = found.page;
}

frame.addEventListener("load", fit);
new ResizeObserver(fit).observe(element);
watch("value", receive);
receive();
