// The demo page: each image is one POST /predict, four at a time, shown in the order chosen.

const PARALLEL = 4; // requests in flight
const ATTEMPTS = 6; // for one image, if the server says when to come back
const CHOICES = 10; // largest number of classes offered
const KEY = "api-key"; // in sessionStorage, never in a URL

import { CLIENTS } from "./code.js";

const $ = (id) => document.getElementById(id);
const percent = (share) => (share < 0.0005 ? "< 0.1%" : `${(share * 100).toFixed(1)}%`);
const milliseconds = (ms) => `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
const second = () => new Promise((resolve) => setTimeout(resolve, 1000));

let items = []; // what was chosen, in that order
let running = 0;
let model = "MODEL"; // its name, when described

/** An element; children that are strings become text, never markup. */
function element(name, className, ...children) {
  const made = Object.assign(document.createElement(name), { className });
  made.append(...children);
  return made;
}

/** The response and its JSON, null if it has none. Throws if there is no response. */
async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("X-API-Key", key);
  const response = await fetch(path, { ...options, headers });
  const text = await response.text();
  if (response.status === 401) $("key-form").hidden = false;
  try {
    return { response, answer: JSON.parse(text) };
  } catch {
    return { response, answer: null };
  }
}

function add(files) {
  for (const file of files) {
    const card = $("card").content.cloneNode(true).firstElementChild;
    const item = { file, card, url: URL.createObjectURL(file) };
    const image = card.querySelector("img");
    image.onerror = () => card.classList.add("no-picture");
    image.src = item.url;
    image.alt = `Your image ${file.name}`;
    card.querySelector("h3").textContent = file.name;
    card.querySelector(".again").onclick = () => ask(item);
    offerCode(item);
    $("list").append(card);
    items.push(item);
    ask(item);
  }
}

/** Buttons for each client, and the code of the one that is pressed. */
function offerCode(item) {
  const code = item.card.querySelector(".code");
  const text = code.querySelector("pre");
  const copy = code.querySelector(".copy");
  item.client = Object.keys(CLIENTS)[0];
  const buttons = Object.keys(CLIENTS).map((name) => element("button", "", name));
  for (const button of buttons) {
    button.type = "button";
    button.onclick = () => {
      item.client = button.textContent;
      write();
    };
  }
  code.querySelector(".clients").append(...buttons);
  const write = () => {
    for (const button of buttons) {
      button.setAttribute("aria-pressed", button.textContent === item.client);
    }
    copy.textContent = "Copy";
    text.textContent = CLIENTS[item.client]({
      url: new URL(".", location.href),
      file: item.file,
      model,
      topK: Number($("top-k").value) || 5,
      hasKey: sessionStorage.getItem(KEY) !== null,
    });
  };
  copy.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
    } catch {
      getSelection().selectAllChildren(text); // without HTTPS there is no clipboard
      document.execCommand("copy");
    }
    copy.textContent = "Copied";
    say(`Copied: ${item.client}`);
  };
  code.ontoggle = write; // as things are when it is opened
}

/** The code of all images, when what it says has changed. */
function rewrite() {
  for (const { card } of items) card.querySelector(".code").ontoggle();
}

/** Ask about an image, and drop what was asked about it before. */
function ask(item) {
  item.controller?.abort();
  item.controller = new AbortController();
  show(item, "waiting", "Waiting for its turn");
  next();
}

function next() {
  for (const item of items) {
    if (running === PARALLEL) return;
    if (item.state !== "waiting") continue;
    running += 1;
    classify(item, item.controller.signal).finally(() => {
      running -= 1;
      next();
    });
  }
}

async function classify(item, signal) {
  for (let attempt = 1; !signal.aborted; attempt += 1) {
    show(item, "busy", "Classifying");
    const started = performance.now();
    let result;
    try {
      const query = new URLSearchParams();
      if ($("top-k").value) query.set("top_k", $("top-k").value); // empty until described
      if ($("why").checked) query.set("explain", "true");
      result = await call(`predict?${query}`, {
        method: "POST",
        body: item.file,
        headers: { "Content-Type": item.file.type || "application/octet-stream" },
        signal,
      });
    } catch {
      if (!signal.aborted) fail(item, "The server cannot be reached, or the file cannot be read");
      return;
    }
    if (signal.aborted) return;
    const { response, answer } = result;
    if (response.ok && answer?.predictions) {
      succeed(item, answer, performance.now() - started);
      return;
    }
    const reason = `${explain(response, answer, item.file)} (${response.status})`;
    const wait = Math.ceil(Number(response.headers.get("Retry-After")));
    if (!(wait > 0) || attempt === ATTEMPTS) {
      fail(item, reason, response.status);
      return;
    }
    say(`${item.file.name}: ${reason}. Next attempt in ${wait} seconds.`);
    for (let left = wait; left > 0 && !signal.aborted; left -= 1) {
      show(item, "busy", `${reason}. Next attempt in ${left} s`);
      await second();
    }
  }
}

/** What the API says, or what can be said if it says nothing. */
function explain(response, answer, file) {
  if (answer?.message) return answer.message;
  if (response.status !== 413) return response.statusText || "No answer that can be read";
  return `The image has ${(file.size / 2 ** 20).toFixed(1)} MiB, more than the server takes`;
}

function show(item, state, text) {
  item.state = state;
  item.card.dataset.state = state;
  item.card.querySelector(".state").textContent = text;
  item.card.querySelector(".classes").replaceChildren();
  item.card.querySelector("dl").replaceChildren();
  item.card.querySelector(".reason").hidden = true;
  report();
}

function fail(item, reason, status) {
  item.status = status;
  show(item, "failed", reason);
  say(`${item.file.name}: ${reason}`);
}

function succeed(item, { predictions, metadata, explanation }, elapsed) {
  show(item, "done", "");
  if (explanation) showReason(item, explanation);
  item.card.querySelector(".classes").append(
    ...predictions.map((prediction) => {
      const bar = element("span", "bar");
      bar.style.setProperty("--share", prediction.confidence); // through the CSSOM: CSP allows it
      const name = element("span", "name", prediction.class);
      return element("li", "", name, element("span", "share", percent(prediction.confidence)), bar);
    }),
  );
  const facts = {
    Inference: metadata.cached ? "cached" : milliseconds(metadata.inference_time * 1000),
    "Round trip": milliseconds(elapsed),
    Size: metadata.image_size.join(" × "),
    Model: `${metadata.model} ${metadata.version}`,
    Engine: `${metadata.engine}, ${metadata.device}`,
    Weights: metadata.weights,
  };
  item.card.querySelector("dl").append(
    ...Object.entries(facts).map(([term, fact]) =>
      element("div", "", element("dt", "", term), element("dd", "", fact)),
    ),
  );
  const [best] = predictions;
  item.card.querySelector("img").alt = `Your image ${item.file.name}: ${best.class}`;
  if (metadata.weights === "untrained") $("untrained").hidden = false;
  say(`${item.file.name}: ${best.class}, ${percent(best.confidence)}`);
}

/** The places of the image that speak most for the class. */
function showReason(item, explanation) {
  const reason = item.card.querySelector(".reason");
  reason.querySelector("img").src = explanation.image;
  reason.querySelector("img").alt = `What speaks for ${explanation.class}, in yellow`;
  reason.querySelector("figcaption").textContent = `Yellow speaks most for ${explanation.class}`;
  reason.hidden = false;
}

/** How far it is, for the eyes; `say` tells a screen reader what came of each image. */
function report() {
  const count = (state) => items.filter((item) => item.state === state).length;
  const failed = count("failed");
  $("progress").textContent =
    `${count("done")} of ${items.length} classified` + (failed ? `, ${failed} failed` : "");
  for (const id of ["results", "clear"]) $(id).hidden = !items.length;
  document.body.classList.toggle("has-results", items.length > 0);
}

function say(text) {
  $("said").textContent = text;
}

function clear() {
  for (const item of items) {
    item.controller.abort();
    URL.revokeObjectURL(item.url);
  }
  items = [];
  $("list").replaceChildren();
  report();
  say("Cleared");
  $("files").focus();
}

/** The line about the model, and how many classes it can be asked for. */
async function describe() {
  let text = "The server cannot be reached";
  let largest = CHOICES;
  try {
    const { response, answer } = await call("info");
    text = `${explain(response, answer)} (${response.status})`;
    if (response.ok) {
      const { version, engine, device, weights, classes } = answer;
      model = answer.model;
      text = `${model} ${version} · ${engine} on ${device} · ${weights.name} · ${classes} classes`;
      $("untrained").hidden = weights.trained;
      largest = Math.min(classes, CHOICES);
    }
  } catch {
    // `text` says it, and the page works without.
  }
  $("model").textContent = text;
  const chosen = $("top-k").value || 5;
  $("top-k").replaceChildren(...Array.from({ length: largest }, (_, index) => new Option(index + 1)));
  $("top-k").value = Math.min(chosen, largest);
  rewrite();
}

$("top-k").onchange = () => {
  items.forEach(ask);
  rewrite();
};
$("why").onchange = () => items.forEach(ask);
$("clear").onclick = clear;
$("curl").textContent = `curl '${new URL("predict?top_k=3", location.href)}' -T photo.jpg`;

for (const id of ["files", "camera"]) {
  $(id).onchange = ({ target }) => {
    add(target.files);
    target.value = ""; // so that the same file can be chosen again
  };
}
addEventListener("paste", ({ clipboardData }) => add(clipboardData.files));
for (const kind of ["dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault(); // the browser would open the image in place of the page
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") add(event.dataTransfer.files);
  });
}
$("key-form").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  $("key-form").hidden = true;
  describe();
  items.filter(({ status }) => status === 401 || status === 403).forEach(ask);
};
addEventListener("pagehide", () => items.forEach(({ controller }) => controller.abort()));
addEventListener("pageshow", ({ persisted }) => {
  if (persisted) items.filter(({ state }) => state === "busy" || state === "waiting").forEach(ask);
});
describe();
