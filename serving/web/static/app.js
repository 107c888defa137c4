// The form, the figures, and the cards of the pages.

import { Card } from "./cards.js";
import { headersFor, readError, readEvents } from "./stream.js";

const find = (id) => document.getElementById(id);
const at = (path) => new URL(path, document.baseURI);
const MAX_PICTURES = 20; // that the service sends per document

let chosen = null; // the File to read
let cards = new Map(); // by index in the document
let stopper = null; // cancels the request in progress
let figures = null;

// --- the document ---

function choose(file) {
  if (!file) return;
  chosen = file;
  find("file-name").textContent = file.name;
  find("file-hint").textContent = `${Math.max(1, Math.round(file.size / 1024)).toLocaleString()} KB`;
  const thumbnail = find("thumbnail");
  URL.revokeObjectURL(thumbnail.src);
  thumbnail.hidden = !/^image\/(png|jpeg|webp|gif|bmp)$/.test(file.type);
  thumbnail.src = thumbnail.hidden ? "" : URL.createObjectURL(file);
  setStatus(`${file.name} is chosen; press Read.`);
  find("error").hidden = true;
}

function watchDocument() {
  const drop = find("drop");
  find("file").addEventListener("change", (event) => choose(event.target.files[0]));
  for (const name of ["dragenter", "dragover"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
  // A document dropped outside the field must not replace the page.
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    choose(event.dataTransfer?.files[0]);
  });
  addEventListener("paste", (event) => choose(event.clipboardData?.files[0]));
  find("sample").addEventListener("click", async () => {
    const answer = await fetch(at("playground/sample.png"));
    choose(new File([await answer.blob()], "sample.png", { type: "image/png" }));
    find("read").focus();
  });
}

// --- reading ---

function buildBody() {
  const body = new FormData();
  body.append("file", chosen, chosen.name);
  for (const name of ["model", "mode", "format", "pages", "dpi", "prompt"]) {
    const value = find(name).value.trim();
    if (value) body.append(name, value);
  }
  body.append("stream", "true");
  body.append("include_page_images", "true");
  return body;
}

async function read() {
  if (!chosen) {
    fail("Choose a document first.");
    find("file").focus();
    return;
  }
  begin();
  try {
    const answer = await fetch(at("v1/ocr"), {
      method: "POST",
      headers: headersFor(find("key").value.trim()),
      body: buildBody(),
      signal: stopper.signal,
    });
    if (!answer.ok) throw await readError(answer);
    for await (const event of readEvents(answer.body)) take(event);
  } catch (error) {
    if (error.name === "AbortError") setStatus("Stopped.");
    else explain(error);
  } finally {
    end();
  }
}

function begin() {
  stopper = new AbortController();
  cards = new Map();
  find("cards").replaceChildren();
  find("error").hidden = true;
  figures = { begin: performance.now(), firstDelta: null, lastDelta: null, pieces: 0, text: 0, image: 0, cost: 0 };
  figures.done = figures.failed = figures.total = 0;
  find("read").disabled = true;
  find("stop").disabled = false;
  find("progress").hidden = false;
  find("progress").removeAttribute("value");
  find("results").setAttribute("aria-busy", "true");
  setStatus(`Sending ${chosen.name}.`);
  showFigures();
}

function end() {
  stopper = null;
  find("read").disabled = false;
  find("stop").disabled = true;
  find("progress").hidden = true;
  find("results").setAttribute("aria-busy", "false");
  for (const name of ["copy", "save"]) find(name).disabled = !figures.done;
  for (const card of cards.values()) if (!card.page) card.show("not read", "failed");
  showFigures();
}

function take(event) {
  if (event.error) throw Object.assign(new Error(event.error.message), { code: event.error.code });
  const card = cards.get(event.index);
  if (event.type === "document") open(event);
  else if (event.type === "page.started") card.start(event);
  else if (event.type === "page.image") card.setPicture(event.image_url, event);
  else if (event.type === "page.delta") {
    figures.firstDelta ??= performance.now();
    figures.lastDelta = performance.now();
    figures.pieces += 1;
    card.append(event.text);
  } else if (event.type === "page.completed" || event.type === "page.failed") finishPage(card, event.page);
  else if (event.type === "result") finishDocument(event.usage);
  showFigures();
}

function open(event) {
  figures.total = event.pages.length;
  for (const index of event.pages) {
    const card = new Card(index + 1);
    card.root.classList.toggle("without-picture", cards.size >= MAX_PICTURES);
    cards.set(index, card);
    find("cards").append(card.root);
  }
  setStatus(`Reading ${figures.total} ${figures.total === 1 ? "page" : "pages"}.`);
}

function finishPage(card, page) {
  card.finish(page);
  figures[page.status === "failed" ? "failed" : "done"] += 1;
  figures.text += page.usage?.completion_tokens ?? 0;
  figures.image += page.usage?.image_tokens ?? 0;
  figures.cost += page.usage?.estimated_cost ?? 0;
  const number = figures.done + figures.failed;
  find("progress").value = number / figures.total;
  if (number < figures.total) setStatus(`${number} of ${figures.total} pages read.`);
}

function finishDocument(usage) {
  figures.text = usage.completion_tokens;
  figures.image = usage.prompt_tokens_details?.image_tokens ?? figures.image;
  figures.cost = usage.estimated_cost;
  const failed = figures.failed ? `, ${figures.failed} failed` : "";
  setStatus(`Done: ${figures.done} of ${figures.total} ${figures.total === 1 ? "page" : "pages"} read${failed}.`);
}

// --- display ---

function setStatus(text) {
  find("status").textContent = text;
}

function fail(text) {
  find("error").textContent = text;
  find("error").hidden = false;
}

function explain(error) {
  let advice = "";
  if (error.status === 401) {
    advice = " Type an API key on the left.";
    find("key").focus();
  } else if (error.retryAfter) advice = ` Try again in ${error.retryAfter} s.`;
  else if (error instanceof TypeError) advice = " Is the server still there?";
  fail(`${error.message}${advice}`);
  setStatus("Not read.");
}

function formatDollars(dollars) {
  return dollars === 0 ? "$0" : `$${dollars.toFixed(dollars < 0.01 ? 6 : 4)}`;
}

function showFigures() {
  const { begin, firstDelta, lastDelta, pieces, text, image, cost, done, failed, total } = figures;
  const seconds = firstDelta === null ? 0 : (lastDelta - firstDelta) / 1000;
  // Until a page has reported its tokens, estimate them by the number of pieces.
  const tokens = done === total && total ? text : Math.max(text, pieces);
  const isExact = tokens === text;
  const show = (id, value) => { find(id).textContent = value; };
  show("rate", seconds > 0 ? `${isExact ? "" : "≈ "}${Math.round(tokens / seconds).toLocaleString()}` : "–");
  show("first", firstDelta === null ? "–" : `${((firstDelta - begin) / 1000).toFixed(2)} s`);
  show("cost", done ? formatDollars(cost) : "–");
  show("ratio", image ? `${(text / image).toFixed(1)}×` : "–");
  show("count", total ? `${done + failed} / ${total}` : "–");
}

function joinPages() {
  return [...cards.values()].map((card) => card.result).filter(Boolean).join("\n\n");
}

function save() {
  const isText = find("format").value === "text";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([joinPages(), "\n"], { type: "text/plain" }));
  link.download = chosen.name.replace(/\.[^.]*$/, "") + (isText ? ".txt" : ".md");
  link.click();
  URL.revokeObjectURL(link.href);
}

// --- settings ---

function watchTheme() {
  const button = find("theme");
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
  const show = () => button.setAttribute("aria-pressed", String(isDark()));
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    localStorage.setItem("theme", document.documentElement.dataset.theme);
    show();
  });
  prefersDark.addEventListener("change", show);
  show();
}

async function listModels() {
  try {
    const answer = await fetch(at("v1/models"), { headers: headersFor(find("key").value.trim()) });
    if (!answer.ok) return;
    const names = (await answer.json()).data.map((model) => model.id);
    find("models").replaceChildren(...names.map((name) => new Option(name, name)));
    if (!find("model").value && names.length) find("model").value = names[0];
  } catch {
    // The field accepts any name.
  }
}

function watchKey() {
  const key = find("key");
  key.value = sessionStorage.getItem("key") ?? "";
  key.addEventListener("change", () => {
    sessionStorage.setItem("key", key.value.trim());
    listModels();
  });
}

watchDocument();
watchTheme();
watchKey();
listModels();
find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!stopper) read();
});
find("stop").addEventListener("click", () => stopper?.abort());
addEventListener("keydown", (event) => {
  if (event.key === "Escape") stopper?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("ask").requestSubmit();
});
find("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(joinPages());
  setStatus("Copied.");
});
find("save").addEventListener("click", save);
