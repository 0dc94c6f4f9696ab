// The report of a run in a frame that runs no script, as high as the report is.
const note = element.querySelector('[data-id="note"]'), frame = element.querySelector('[data-id="frame"]');
let wanted = null; // the runs whose figures are wanted, once others were chosen than at first

function fit() {
  const inside = frame.contentDocument && frame.contentDocument.documentElement;
  if (inside && inside.offsetHeight) frame.style.height = inside.offsetHeight + 24 + "px";
}

function draw() { // where they are seen; a choice of the tab asks for them, too
  if (element.offsetParent) trigger("draw", {});
}

function receive() {
  let message = { note: "", page: "" };
  try { message = { ...message, ...JSON.parse(props.value || "{}") }; } catch (error) { message.note = "what came from the server cannot be read"; }
  if (message.wanted) wanted = message;
  else if (wanted && (message.run !== wanted.run || message.other !== wanted.other)) { draw(); return; } // those of an earlier choice came late
  note.textContent = message.note;
  note.hidden = !message.note;
  frame.hidden = !message.page;
  frame.title = message.title || "figures";
  frame.srcdoc = message.page;
  if (message.wanted) draw();
}

frame.addEventListener("load", fit);
new ResizeObserver(fit).observe(element);
watch("value", receive);
receive();
