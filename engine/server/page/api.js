// Requests to this server: authentication, and error messages for users.

const KEY = "octavo-key"; // in sessionStorage: per tab, deleted when the tab is closed

const dialog = document.getElementById("keys");
const input = document.getElementById("key");
const wrong = document.getElementById("key-wrong");
let asking = null; // resolves when the key dialog is closed; null if it is not open

/** An API error with a message for the user. */
export class ApiError extends Error {
  constructor(status, text, mayRetry) {
    super(text);
    this.status = status;
    this.mayRetry = mayRetry;
  }
}

/** Fetch `path` and return the response; throw ApiError on failure. On status 401, ask the user for
 *  a key and retry. With `isPatient`, throw instead, for callers that poll. */
export async function ask(path, { isPatient = false, ...options } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
    const response = await send(path, { ...options, headers });
    if (response.ok) return response;
    if (response.status !== 401 || isPatient) throw await errorOf(response);
    await newKey(key, options.signal);
  }
}

async function send(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.", true);
  }
}

async function errorOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch { /* not JSON, for example a proxy's error page */ }
  return said(response.status, error);
}

/** Convert OpenAI's error object to an `ApiError`. The status is 0 for errors inside a stream. */
export function said(status, error) {
  const text = error.message ?? `The server returned status ${status}.`;
  if (status === 413) return new ApiError(status, "The message is larger than 256 MiB, the server’s limit. Remove some files, or use smaller ones.", false);
  if (status === 429 || error.code === "rate_limit_exceeded") return new ApiError(status, "The server is busy: its queue is full. Try again in a moment.", true);
  if (status === 503 || error.code === "unavailable") return new ApiError(status, `The server is unavailable: ${text}`, true);
  if (error.type === "invalid_request_error") return new ApiError(status, `The server rejected the request: ${text}`, false);
  return new ApiError(status, text, true);
}

/** Wait until the user has entered a key other than `rejected`. All callers share one dialog. */
async function newKey(rejected, signal) {
  const now = sessionStorage.getItem(KEY);
  if (now !== null && now !== rejected) return;
  asking ??= new Promise((done) => {
    wrong.textContent = rejected === null ? "" : "Invalid API key.";
    sessionStorage.removeItem(KEY);
    input.value = "";
    dialog.showModal();
    dialog.addEventListener("close", () => { asking = null; done(); }, { once: true });
  });
  await asking;
  if (signal?.aborted) throw new DOMException("stopped", "AbortError");
  if (sessionStorage.getItem(KEY) === null) throw new ApiError(401, "This server requires an API key.", true);
}

document.getElementById("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = input.value.trim();
  // Keys are printable ASCII without spaces, as HTTP headers require.
  if (!/^[\x21-\x7e]+$/.test(key)) {
    wrong.textContent = "A key consists of ASCII letters, digits and symbols, without spaces.";
    return;
  }
  sessionStorage.setItem(KEY, key);
  dispatchEvent(new Event("octavo-key")); // resumes polling that stopped on status 401
  dialog.close();
});
