// The live view: asks how the engine is while somebody can see it, and shows what it is told.

import { ask } from "/page/api.js";
import { MOST_STEPS, colorOf, drawBlocks, drawSteps, drawThroughput } from "/page/draw.js";
import { nameOf, showRequests } from "/page/table.js";

const MOST_RATES = 240; // shown
const QUIET = 10_000; // milliseconds at least between two things said to a screen reader
const RETRY = 3000;

const $ = (id) => document.getElementById(id);
const panel = $("engine"), button = $("toggle");
const wide = matchMedia("(min-width: 861px)");
const still = matchMedia("(prefers-reduced-motion: reduce)");

let steps = []; // [number, milliseconds, encoded, prefill, decode]
let rates = []; // tokens a second, one a look
let latest = null; // what was told last
let drawnWidth = 0;
let timer = 0;
let toldAt = -QUIET, told = "0 running, 0 waiting.";

function open(shows) {
  panel.hidden = !shows;
  $("rooms").classList.toggle("both", shows);
  button.setAttribute("aria-expanded", String(shows));
  lookAgain();
}

/** Once, and again in a while; not while nobody can see it. */
async function look() {
  timer = isSeen() ? -1 : 0; // -1: a look is on its way; 0: there is none, nor will be
  if (timer === 0) return;
  let pause = still.matches ? 2000 : 500;
  try {
    const after = steps.length ? steps.at(-1)[0] : 0;
    const response = await ask(`/engine/snapshot?after=${after}`, { isPatient: true });
    show(await response.json());
  } catch (error) {
    $("state").textContent = error.status === 401 ? "The live view needs the API key." : error.message;
    pause = error.status === 401 ? Infinity : RETRY; // a server may count what it refuses
  }
  timer = isSeen() && pause < Infinity ? setTimeout(look, pause) : 0;
}

const isSeen = () => !panel.hidden && !document.hidden;

function lookAgain() {
  if (timer === 0 && isSeen()) look();
}

function show(found) {
  if (found.steps.length && steps.length && found.steps[0][0] !== steps.at(-1)[0] + 1) steps = []; // a gap
  steps = [...steps, ...found.steps].slice(-MOST_STEPS);
  rates = [...rates, found.load.tokens_per_second].slice(-MOST_RATES);
  latest = found;
  showNumbers(found.load);
  showRequests(found.requests, colorOf);
  draw();
  say(found.load);
}

function showNumbers(load) {
  const used = load.num_blocks - load.num_free_blocks;
  const preparing = load.num_preparing ? ` + ${load.num_preparing} prepared` : "";
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

/** To a screen reader: what has changed, and not too often. */
function say(load) {
  const text = `${load.num_running} running, ${load.num_waiting} waiting.`;
  if (text === told || performance.now() - toldAt < QUIET) return;
  [told, toldAt] = [text, performance.now()];
  $("told").textContent = text;
}

button.addEventListener("click", () => open(panel.hidden));
document.querySelector(".skip").addEventListener("click", () => {
  if (!wide.matches) open(false); // what it leads to is in the other room
});
document.addEventListener("visibilitychange", lookAgain);
addEventListener("octavo-key", lookAgain);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
new ResizeObserver(() => { // drawing changes the panel's height, which is no reason to draw again
  if (panel.clientWidth !== drawnWidth) draw();
}).observe(panel);
wide.addEventListener("change", () => open(wide.matches));
open(wide.matches);
