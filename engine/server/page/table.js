// The table of requests. Rows are updated in place, so that focus and selection are kept.

const body = document.getElementById("requests");
const rows = new Map(); // by request number and answer index

/** Return a request's name, or its number if names are hidden. */
export function nameOf(request) {
  const name = request.name ?? `request ${request.number}`;
  return request.answer ? `${name} [${request.answer}]` : name;
}

export function showRequests(requests, colorOf) {
  const now = new Set();
  requests.forEach((request, index) => {
    const key = `${request.number}/${request.answer}`;
    now.add(key);
    if (!rows.has(key)) rows.set(key, newRow(nameOf(request), colorOf(nameOf(request))));
    const row = rows.get(key);
    if (body.rows[index] !== row) body.insertBefore(row, body.rows[index] ?? null);
    fill(row, request);
  });
  for (const [key, row] of rows) {
    if (now.has(key)) continue;
    row.remove();
    rows.delete(key);
  }
  document.getElementById("none").hidden = requests.length > 0;
}

function newRow(name, color) {
  const row = document.createElement("tr");
  const head = document.createElement("th");
  const swatch = document.createElement("span");
  head.scope = "row";
  head.title = name;
  swatch.className = "swatch";
  swatch.style.background = color;
  head.append(swatch, name);
  row.append(head, ...[1, 2, 3, 4].map(() => document.createElement("td")));
  return row;
}

function fill(row, request) {
  const computed = Math.min(request.num_computed_tokens, request.num_prompt_tokens);
  const done = computed < request.num_prompt_tokens ? `${computed}/` : "";
  const cached = request.num_cached_tokens ? `, ${request.num_cached_tokens} cached` : "";
  const texts = [
    stateOf(request),
    `${done}${request.num_prompt_tokens}${cached}`,
    `${request.num_output_tokens}/${request.max_tokens}`,
    String(request.num_blocks),
  ];
  texts.forEach((text, index) => {
    const cell = row.cells[index + 1];
    if (cell.textContent !== text) cell.textContent = text;
  });
}

function stateOf(request) {
  if (request.status !== "running") return request.status;
  if (request.awaits_media) return "waiting for media";
  return request.num_computed_tokens < request.num_prompt_tokens ? "prefill" : "decode";
}
