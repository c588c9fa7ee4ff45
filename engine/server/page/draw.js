// The three charts of the live view, with text descriptions.

export const MAX_STEPS = 200; // steps shown
export const MAX_RATES = 240; // values of tokens per second shown
const UNUSED = 0, CACHED = 1, SHARED = 2, FIRST_REQUEST = 3; // codes of engine/observability/snapshot.py
const BLOCKS_HEIGHT = 180, STRIP = 34, GAP = 21; // CSS pixels
const STAGES = [["encode", 2], ["prefill", 3], ["decode", 4]]; // and their index in a step

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;

/** Return a color that depends only on the name. */
export function colorOf(name) {
  let hash = 2166136261; // FNV-1a, then a final mix, because names often differ only in their last letters
  for (let i = 0; i < name.length; i++) hash = Math.imul(hash ^ name.charCodeAt(i), 16777619);
  for (const by of [0x85ebca6b, 0xc2b2ae35]) hash = Math.imul(hash ^ (hash >>> 15), by);
  hash = (hash ^ (hash >>> 16)) >>> 0;
  const hue = hash % 360, shade = ((hash >>> 9) % 3) * 8;
  return `hsl(${hue} 62% ${(isDark() ? 58 : 40) + shade}%)`;
}

/** Clear a canvas and scale it to the screen. Return its context, and its size in CSS pixels. */
function prepare(canvas, height) {
  const width = canvas.clientWidth, scale = devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const to = canvas.getContext("2d");
  to.scale(scale, scale);
  to.font = "11px system-ui, sans-serif";
  to.textBaseline = "top";
  return [to, width, height];
}

/** Draw blocks as cells, in the order of ids. A cell stands for several blocks if there are many. */
export function drawBlocks(canvas, found, nameOf) {
  const count = found.load.num_blocks, width = canvas.clientWidth;
  const side = Math.max(3, Math.min(14, Math.floor(Math.sqrt((width * BLOCKS_HEIGHT) / count))));
  const across = Math.max(1, Math.floor(width / side));
  const maxCells = across * Math.floor(BLOCKS_HEIGHT / side), each = Math.ceil(count / maxCells);
  const cells = Math.ceil(count / each);
  const [to] = prepare(canvas, Math.ceil(cells / across) * side);
  const inks = [color("unused"), color("cached"), color("shared")];
  found.requests.forEach((request) => inks.push(colorOf(nameOf(request))));
  const codes = new Int32Array(cells); // the highest code of a cell's blocks
  let first = 0;
  for (let i = 0; i < found.blocks.length; i += 2) {
    const [code, end] = [found.blocks[i], first + found.blocks[i + 1]];
    for (let cell = Math.floor(first / each); cell < Math.ceil(end / each); cell++) codes[cell] = Math.max(codes[cell], code);
    first = end;
  }
  const gap = side > 4 ? 1 : 0;
  codes.forEach((code, cell) => {
    to.fillStyle = inks[code];
    to.fillRect((cell % across) * side, Math.floor(cell / across) * side, side - gap, side - gap);
  });
  canvas.setAttribute("aria-label", blocksInWords(found, nameOf));
}

function blocksInWords(found, nameOf) {
  const counts = [0, 0, 0];
  const owned = new Map();
  for (let i = 0; i < found.blocks.length; i += 2) {
    const [code, length] = [found.blocks[i], found.blocks[i + 1]];
    if (code < FIRST_REQUEST) counts[code] += length;
    else owned.set(code, (owned.get(code) ?? 0) + length);
  }
  const each = [...owned].slice(0, 5).map(([code, n]) => `${nameOf(found.requests[code - FIRST_REQUEST])} uses ${n} alone`);
  const total = found.load.num_blocks, used = total - counts[UNUSED] - counts[CACHED];
  return [`${used} of ${total} blocks of ${found.block_size} tokens are in use`, `${counts[SHARED]} shared`,
    `${counts[CACHED]} free with a cached prefix`, `${counts[UNUSED]} unused`, ...each].join(", ");
}

/** Draw bars of the latest steps: time, and tokens per stage, each with its own scale. */
export function drawSteps(canvas, steps) {
  const strips = [["milliseconds", 1, color("text")], ...STAGES.map(([name, at]) => [`${name} tokens`, at, color(name)])];
  const [to, width] = prepare(canvas, strips.length * (STRIP + GAP));
  const bar = width / MAX_STEPS, left = width - steps.length * bar;
  strips.forEach(([name, at, ink], index) => {
    const top = index * (STRIP + GAP) + GAP, max = Math.max(...steps.map((step) => step[at]), 0);
    to.fillStyle = color("soft");
    to.fillText(`${name}, max. ${at === 1 ? max.toFixed(1) : max}`, 0, top - GAP + 6);
    to.fillStyle = color("unused");
    to.fillRect(0, top + STRIP, width, 1);
    to.fillStyle = ink;
    steps.forEach((step, index) => {
      const height = max > 0 ? (step[at] / max) * STRIP : 0;
      to.fillRect(left + index * bar, top + STRIP - height, Math.max(1, bar - .6), height);
    });
  });
  const sums = STAGES.map(([name, at]) => `${steps.reduce((sum, step) => sum + step[at], 0)} ${name} tokens`);
  const last = steps.at(-1);
  const time = last ? `, the latest took ${last[1].toFixed(1)} milliseconds` : "";
  canvas.setAttribute("aria-label", `The latest ${steps.length} steps: ${sums.join(", ")}${time}`);
}

/** Draw tokens per second over the latest polls. */
export function drawThroughput(canvas, rates) {
  const [to, width, height] = prepare(canvas, 70);
  const max = Math.max(...rates, 1);
  to.fillStyle = color("soft");
  to.fillText(`tokens per second, 10 s mean, max. ${max.toFixed(1)}`, 0, 2);
  to.fillStyle = color("unused");
  to.fillRect(0, height - 1, width, 1);
  to.strokeStyle = color("decode");
  to.lineWidth = 2;
  to.beginPath();
  rates.forEach((rate, i) => to.lineTo(width - ((rates.length - 1 - i) / (MAX_RATES - 1)) * width, height - 2 - (rate / max) * (height - 20)));
  to.stroke();
  canvas.setAttribute("aria-label", `${(rates.at(-1) ?? 0).toFixed(1)} tokens per second now, max. ${max.toFixed(1)} while this page was open`);
}
