// The live view: polls engine snapshots while the panel is visible, and shows them.

import { ask } from "/page/api.js";
import { MAX_RATES, MAX_STEPS, colorOf, drawBlocks, drawSteps, drawThroughput } from "/page/draw.js";
import { nameOf, showRequests } from "/page/table.js";

const ANNOUNCE_INTERVAL = 10_000; // minimum milliseconds between screen reader announcements
const RETRY = 3000; // milliseconds until the next poll after an error

const $ = (id) => document.getElementById(id);
const panel = $("engine"), button = $("toggle");
const wide = matchMedia("(min-width: 861px)");
const still = matchMedia("(prefers-reduced-motion: reduce)");

let steps = []; // [number, milliseconds, encoded, prefill, decode]
let rates = []; // tokens per second, one value per poll
let latest = null; // the latest snapshot
let drawnWidth = 0;
let timer = 0;
let announcedAt = -ANNOUNCE_INTERVAL, announced = "0 running, 0 waiting.";

function open(shows) {
  panel.hidden = !shows;
  $("rooms").classList.toggle("both", shows);
  button.setAttribute("aria-expanded", String(shows));
  resumePolling();
}

/** Poll once and schedule the next poll, while the panel is visible. */
async function poll() {
  timer = isSeen() ? -1 : 0; // -1: a poll is in flight; 0: none is in flight or scheduled
  if (timer === 0) return;
  let pause = still.matches ? 2000 : 500;
  try {
    const after = steps.length ? steps.at(-1)[0] : 0;
    const response = await ask(`/engine/snapshot?after=${after}`, { isPatient: true });
    show(await response.json());
  } catch (error) {
    $("state").textContent = error.status === 401 ? "The live view requires the API key." : error.message;
    pause = error.status === 401 ? Infinity : RETRY; // the server may count rejected keys, so do not poll until there is a new one
  }
  timer = isSeen() && pause < Infinity ? setTimeout(poll, pause) : 0;
}

const isSeen = () => !panel.hidden && !document.hidden;

function resumePolling() {
  if (timer === 0 && isSeen()) poll();
}

function show(found) {
  if (found.steps.length && steps.length && found.steps[0][0] !== steps.at(-1)[0] + 1) steps = []; // steps are missing
  steps = [...steps, ...found.steps].slice(-MAX_STEPS);
  rates = [...rates, found.load.tokens_per_second].slice(-MAX_RATES);
  latest = found;
  showNumbers(found.load);
  showRequests(found.requests, colorOf);
  draw();
  say(found.load);
}

function showNumbers(load) {
  const used = load.num_blocks - load.num_free_blocks;
  const preparing = load.num_preparing ? ` + ${load.num_preparing} preprocessing` : "";
  const last = steps.at(-1);
  $("state").textContent = load.num_running + load.num_waiting ? "Working." : "Idle.";
  $("running").textContent = load.num_running;
  $("waiting").textContent = `${load.num_waiting}${preparing}`;
  $("speed").textContent = load.tokens_per_second.toFixed(1);
  $("used").textContent = `${used} of ${load.num_blocks}`;
  $("hits").textContent = `${Math.round(load.prefix_hit_ratio * 100)} %`;
  $("latest").textContent = last ? `${last[1].toFixed(1)} ms` : "–";
}

function draw() {
  if (latest === null || panel.hidden) return;
  drawnWidth = panel.clientWidth;
  drawBlocks($("blocks"), latest, nameOf);
  drawSteps($("steps"), steps);
  drawThroughput($("throughput"), rates);
}

/** Announce changes to screen readers, at a limited rate. */
function say(load) {
  const text = `${load.num_running} running, ${load.num_waiting} waiting.`;
  if (text === announced || performance.now() - announcedAt < ANNOUNCE_INTERVAL) return;
  [announced, announcedAt] = [text, performance.now()];
  $("told").textContent = text;
}

button.addEventListener("click", () => open(panel.hidden));
document.querySelector(".skip").addEventListener("click", () => {
  if (!wide.matches) open(false); // show the chat, which contains the target
});
document.addEventListener("visibilitychange", resumePolling);
addEventListener("octavo-key", resumePolling);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
new ResizeObserver(() => { // drawing changes the height too, so compare only the width
  if (panel.clientWidth !== drawnWidth) draw();
}).observe(panel);
wide.addEventListener("change", () => open(wide.matches));
open(wide.matches);
