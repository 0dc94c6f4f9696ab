// Says in the viewer how many questions are before one that waits, and that Ask waits; the numbers are those of Gradio's own, hidden tracker.
{
const tracker = element.closest(".block") || element.parentElement, status = element.querySelector('[data-id="status"]');
let line = "", timer = 0, fewest = Infinity;

function questionsBefore() { // waiting ones up to this, less this, and the one that has the model
  const text = tracker.querySelector(".progress-text"), numbers = text && text.textContent.match(/(\d+)\/\d+/);
  return numbers ? Number(numbers[1]) : 0;
}

function showWaiting() {
  timer = 0;
  if (tracker.querySelector(".error")) ended(); // the request was refused before the app saw it, or the server is gone
  const shown = questionsBefore();
  fewest = shown ? Math.min(shown, fewest) : Infinity; // nobody goes ahead of another: a larger number is an older one that came late
  const number = shown && fewest, next = number ? `waiting: ${counted(number, "question")} before yours …` : "";
  if (next === line) return;
  if (next && !line && window.innerWidth <= 760) element.scrollIntoView({ block: "start" });
  if (next || status.textContent === line) status.textContent = next;
  status.classList.remove("st-error");
  status.hidden = !status.textContent;
  line = next;
}

// not at once: a question that need not wait is in the queue for a moment, too
new MutationObserver(() => { timer = timer || setTimeout(showWaiting, 300); }).observe(tracker, { childList: true, subtree: true, characterData: true });

// Says that Ask waits for the answer that is being written: Gradio drops a second request of one event in silence.
const BUSY = "An answer is being written. Stop ends it, then ask again.";
let asked = false;

function busy(text) {
  const label = document.querySelector('#busy [data-id="busy"]');
  if (label && label.textContent !== text) label.textContent = text;
}

function ask() {
  if (asked) busy(BUSY);
  asked = true;
}

function ended() {
  asked = false;
  busy("");
}

document.addEventListener("click", (event) => { if (event.target.closest("#ask")) ask(); }, true);
document.addEventListener("keydown", (event) => { if (event.key === "Enter" && event.shiftKey && event.target.closest("#question")) ask(); }, true);
// the viewer's own word, set with each message: Gradio's tracker also shows and hides for an upload beside the question
new MutationObserver(() => { if (element.ariaBusy !== "true") ended(); }).observe(element, { attributes: true, attributeFilter: ["aria-busy"] });
}
