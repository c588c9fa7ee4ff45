// Attachments of the next message: images and videos that are dropped, pasted or picked.

const MAX_BYTES = 180 << 20; // total file size per message; as base64 within the server's 256 MiB
const IMAGES = ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"];
const VIDEOS = ["mp4", "m4v", "mov", "mkv", "webm"];
const IMAGE_TYPES = ["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff"];

const list = document.getElementById("files");
const notice = document.getElementById("notice");
const picker = document.getElementById("pick");
const chat = document.getElementById("chat");
let items = []; // {kind, name, size, uri, url}: uri is the data URI to send, url the blob URL to show
let arrival = Promise.resolve(); // files are read one at a time, in order

picker.accept = [...IMAGES, ...VIDEOS].map((each) => `.${each}`).join(",");

/** Return the attachments and clear the list. */
export async function takeFiles() {
  await arrival;
  const taken = items;
  items = [];
  show();
  return taken;
}

export function hasFiles() {
  return items.length > 0;
}

/** Create an `img` or `video` element for an item. */
export function preview(item, withControls) {
  const made = document.createElement(item.kind === "image" ? "img" : "video");
  made.src = item.url;
  if (item.kind === "image") made.alt = item.name;
  else {
    made.muted = true;
    made.controls = withControls;
    made.setAttribute("aria-label", item.name);
  }
  return made;
}

function add(files) {
  arrival = arrival.then(() => read([...files])).catch(() => tell("A file could not be read."));
  return arrival;
}

async function read(files) {
  const rejected = [];
  for (const file of files) {
    const kind = kindOf(file);
    const size = items.reduce((sum, each) => sum + each.size, file.size);
    if (kind === null) rejected.push(`${file.name}: only images (${IMAGES.join(", ")}) and videos (${VIDEOS.join(", ")}) are supported.`);
    else if (file.size === 0) rejected.push(`${file.name} is empty.`);
    else if (size > MAX_BYTES) rejected.push(`${file.name}: too large; the limit is ${MAX_BYTES >> 20} MiB for all files of a message.`);
    else items.push({ kind, name: file.name, size: file.size, uri: await dataUri(file), url: URL.createObjectURL(file) });
  }
  tell(rejected.join(" "));
  show();
}

function kindOf(file) {
  const ending = file.name.split(".").pop().toLowerCase();
  if (IMAGE_TYPES.includes(file.type) || IMAGES.includes(ending)) return "image";
  return file.type.startsWith("video/") || VIDEOS.includes(ending) ? "video" : null;
}

function dataUri(file) {
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(reader.error);
    reader.readAsDataURL(file);
  });
}

function show() {
  list.replaceChildren(...items.map((item) => {
    const entry = document.createElement("li");
    const name = document.createElement("span");
    name.textContent = name.title = item.name;
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Remove ${item.name}`);
    remove.addEventListener("click", () => {
      URL.revokeObjectURL(item.url);
      items = items.filter((each) => each !== item);
      show();
      document.getElementById("message").focus();
    });
    entry.append(preview(item, false), name, remove);
    return entry;
  }));
}

export function tell(text) {
  notice.textContent = text;
}

document.getElementById("attach").addEventListener("click", () => picker.click());
picker.addEventListener("change", async () => {
  await add(picker.files);
  picker.value = ""; // allow picking the same file again
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length === 0) return;
  event.preventDefault();
  add(event.clipboardData.files);
});

// Handle drops on the whole page: otherwise the browser would open a file dropped outside the chat.
const bringsFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!bringsFiles(event)) return;
  event.preventDefault();
  chat.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) chat.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  chat.classList.remove("dropping");
  if (!bringsFiles(event)) return;
  event.preventDefault();
  add(event.dataTransfer.files);
});
