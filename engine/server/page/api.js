// How the page asks this server: with the key, where there is one, and with errors in plain words.

const KEY = "octavo-key"; // in sessionStorage: this tab's, and gone with it

const dialog = document.getElementById("keys");
const input = document.getElementById("key");
const wrong = document.getElementById("key-wrong");
let asking = null; // the promise of a key, while the dialog is open

/** What the server said, in words for whoever reads the page. */
export class ApiError extends Error {
  constructor(status, text, mayRetry) {
    super(text);
    this.status = status;
    this.mayRetry = mayRetry;
  }
}

/** A response that is no error. Asks for a key where the server does, and then tries again; with
 *  `isPatient` it throws instead, for who would ask at any time. */
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
  } catch { /* not ours: a proxy's page, say */ }
  return said(response.status, error);
}

/** OpenAI's error object as an `ApiError`; status 0 of one that came inside a stream. */
export function said(status, error) {
  const text = error.message ?? `The server answered with status ${status}.`;
  if (status === 413) return new ApiError(status, "This is more than the server takes at once (256 MiB). Remove something, or use smaller files.", false);
  if (status === 429 || error.code === "rate_limit_exceeded") return new ApiError(status, "The server is busy: all its places are taken. Try again in a moment.", true);
  if (status === 503 || error.code === "unavailable") return new ApiError(status, `The server takes no requests now: ${text}`, true);
  if (error.type === "invalid_request_error") return new ApiError(status, `The server refused this: ${text}`, false);
  return new ApiError(status, text, true);
}

/** Resolves once there is another key than `refused`. One dialog serves all who wait. */
async function newKey(refused, signal) {
  const now = sessionStorage.getItem(KEY);
  if (now !== null && now !== refused) return;
  asking ??= new Promise((done) => {
    wrong.textContent = refused === null ? "" : "The server does not know that key.";
    sessionStorage.removeItem(KEY);
    input.value = "";
    dialog.showModal();
    dialog.addEventListener("close", () => { asking = null; done(); }, { once: true });
  });
  await asking;
  if (signal?.aborted) throw new DOMException("stopped", "AbortError");
  if (sessionStorage.getItem(KEY) === null) throw new ApiError(401, "This server asks for an API key.", true);
}

document.getElementById("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = input.value.trim();
  // A header takes no other characters, and no key has any.
  if (!/^[\x21-\x7e]+$/.test(key)) {
    wrong.textContent = "A key has plain letters, digits and signs, and no spaces.";
    return;
  }
  sessionStorage.setItem(KEY, key);
  dispatchEvent(new Event("octavo-key")); // for who was refused and has asked no more
  dialog.close();
});
