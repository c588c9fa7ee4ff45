// The chat: one conversation per tab, with streamed answers.

import { ask, said, ApiError } from "/page/api.js";
import { hasFiles, preview, takeFiles, tell } from "/page/files.js";
import { Speaker } from "/page/speak.js";

const $ = (id) => document.getElementById(id);
const form = $("ask"), box = $("message"), turns = $("turns"), scroll = $("scroll");
const speaker = new Speaker($("spoken"));
let talk = []; // the conversation, in the API's format
let model = null;
let running = null; // AbortController of the answer in progress
let follows = true; // keep the end in view; false after the user has scrolled up

async function loadModel() {
  try {
    model = (await (await ask("/v1/models")).json()).data[0].id;
    $("model").textContent = model;
  } catch (error) {
    $("model").textContent = error.message;
  }
}

// Sending

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = box.value.trim();
  if (running || (text === "" && !hasFiles())) return;
  running = new AbortController(); // set before the first await, so that nothing is sent twice
  showRunning();
  tell("");
  const files = await takeFiles();
  box.value = "";
  box.focus();
  $("empty").hidden = true;
  addTurn("user", "You", text, files);
  await answer({ role: "user", content: contentOf(text, files) });
});

/** Put media first, as in the model's training. */
function contentOf(text, files) {
  const parts = files.map((file) => {
    const type = `${file.kind}_url`;
    return { type, [type]: { url: file.uri } };
  });
  return [...parts, { type: "text", text }];
}

/** Send the conversation with a new question, and show the answer as it arrives. */
async function answer(question) {
  const conversation = talk;
  const turn = addTurn("answer", "Octavo", "", []);
  turn.root.classList.add("waits");
  running ??= new AbortController();
  showRunning();
  const made = { text: "", tokens: 0, firstAt: 0, reason: "" };
  if (model === null) loadModel(); // loading it failed before
  try {
    const response = await ask("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", "x-request-id": newName() },
      body: JSON.stringify(bodyOf([...conversation, question])),
      signal: running.signal,
    });
    for await (const event of events(response.body)) take(event, made, turn);
    finish(made, turn, made.reason === "length" ? "Truncated: reached the maximum number of tokens." : "");
  } catch (error) {
    if (error.name === "AbortError") finish(made, turn, "Stopped.");
    else fail(error, turn, question, made);
  }
  if ((made.text !== "" || made.reason) && talk === conversation) {
    talk = [...talk, question, { role: "assistant", content: made.text }];
  }
  turn.root.classList.remove("waits");
  running = null;
  showRunning();
}

function bodyOf(messages) {
  const body = { messages, stream: true, stream_options: { include_usage: true } };
  if (model !== null) body.model = model;
  if ($("temperature").value !== "") body.temperature = $("temperature").valueAsNumber;
  if ($("most").value !== "") body.max_tokens = $("most").valueAsNumber;
  return body;
}

/** Create a request id, which the engine view and the log show. */
function newName() {
  const bytes = crypto.getRandomValues(new Uint8Array(6));
  return `page-${[...bytes].map((each) => each.toString(16).padStart(2, "0")).join("")}`;
}

/** Yield the JSON objects of a stream of server-sent events. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch(lost);
    if (done) throw new ApiError(0, "The connection was closed before the answer was complete.", true);
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

function lost(error) {
  if (error.name === "AbortError") throw error;
  throw new ApiError(0, "The connection was lost.", true);
}

function take(event, made, turn) {
  if (event.error) throw said(0, event.error);
  if (event.usage) made.tokens = event.usage.completion_tokens;
  const choice = event.choices[0];
  if (!choice) return;
  made.firstAt ||= performance.now();
  made.reason = choice.finish_reason ?? made.reason;
  const text = choice.delta.content ?? "";
  if (text === "") return;
  made.text += text;
  turn.text.append(text); // a text node: output is never interpreted as markup
  speaker.push(text);
}

function finish(made, turn, word) {
  const parts = word ? [word] : [];
  if (made.tokens > 0) {
    const seconds = (performance.now() - made.firstAt) / 1000;
    const rate = made.tokens > 9 ? `, ${((made.tokens - 1) / seconds).toFixed(0)} per second` : ""; // too imprecise for few tokens
    parts.push(`${made.tokens} tokens${rate}`);
  }
  turn.after.textContent = parts.join(" ");
  speaker.end(word);
}

function fail(error, turn, question, made) {
  const problem = document.createElement("p");
  problem.className = "problem";
  problem.textContent = error instanceof ApiError ? error.message : "Could not read the answer.";
  turn.root.insertBefore(problem, turn.after);
  speaker.end(problem.textContent);
  if (!(error instanceof ApiError) || !error.mayRetry || made.text !== "") return;
  const again = document.createElement("button");
  again.type = "button";
  again.className = "quiet";
  again.textContent = "Try again";
  again.addEventListener("click", () => {
    if (running) return;
    turn.root.remove();
    box.focus();
    answer(question);
  });
  turn.after.append(again);
}

// Display

function addTurn(kind, who, text, files) {
  const root = document.createElement("li");
  root.className = `turn ${kind}`;
  const parts = { root, text: document.createElement("div"), after: document.createElement("p") };
  const name = document.createElement("h3");
  name.textContent = who;
  const media = document.createElement("div");
  media.className = "media";
  media.append(...files.map((file) => preview(file, true)));
  parts.text.className = "text";
  parts.text.textContent = text;
  parts.after.className = "after";
  root.append(name, ...(files.length ? [media] : []), parts.text, parts.after);
  turns.append(root);
  follows = true;
  return parts;
}

function showRunning() {
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
}

function stop() {
  if (!running) return;
  running.abort();
  box.focus();
}

scroll.addEventListener("scroll", () => {
  follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
});
const sizes = new ResizeObserver(() => {
  if (follows) scroll.scrollTop = scroll.scrollHeight;
});
sizes.observe(scroll);
sizes.observe(turns);

box.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("keys").open) stop();
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", () => {
  stop();
  talk = [];
  for (const each of turns.querySelectorAll("[src^='blob:']")) URL.revokeObjectURL(each.src);
  turns.replaceChildren();
  $("empty").hidden = false;
  tell("");
  box.focus();
});

loadModel();
