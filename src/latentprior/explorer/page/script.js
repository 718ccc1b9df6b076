"use strict";
const $ = (id) => document.getElementById(id);
const state = { info: null, items: [], uploaded: null };

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawn(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const number = (value, digits = 1) => (value === null ? "−∞" : value.toFixed(digits).replace("-", "−"));

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

async function ask(path, body, kind = "application/json") {
  const sent = kind === "application/json" ? JSON.stringify(body) : body;
  const options = body === undefined ? {} : { method: "POST", headers: { "Content-Type": kind }, body: sent };
  for (let left = 5; ; left--) {
    const answer = await fetch(path, options);
    if (answer.status === 503 && left > 0) {
      say("The model is busy; trying again.");
      await new Promise((done) => setTimeout(done, 1000 * Number(answer.headers.get("Retry-After") || 2)));
      continue;
    }
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    return found;
  }
}

// Of requests that come while one runs, only the last is sent: a slider does not flood the model.
function latest(work) {
  let running = false, again = false;
  return async function run() {
    if (running) { again = true; return; }
    running = true;
    do {
      again = false;
      say("Computing …");
      try {
        await work();
        if (!again) say("");
      } catch (error) {
        say(error.message, true);
      }
    } while (again);
    running = false;
  };
}

function plane(items, path, label) {
  const { low, high } = state.info.plane, flat = low.length < 2;
  const across = (p) => 10 + (480 * (p[0] - low[0])) / (high[0] - low[0]);
  const up = (p) => (flat ? 180 : 350 - (340 * (p[1] - low[1])) / (high[1] - low[1]));
  const dot = (p, r, kind) => drawn("circle", { cx: across(p).toFixed(1), cy: up(p).toFixed(1), r, class: kind });
  const made = drawn("svg", { viewBox: "0 0 500 360", class: "plane", role: "img", "aria-label": label });
  for (const p of state.info.points) made.append(dot(p, 2.5, "back"));
  for (const item of items) made.append(dot(item.point, 4, "item"));
  if (path) {
    const points = path.map((item) => `${across(item.point).toFixed(1)},${up(item.point).toFixed(1)}`).join(" ");
    made.append(drawn("polyline", { points }), ...path.map((item) => dot(item.point, 3.5, "step")));
  }
  return made;
}

function mark(made, item, letter) {
  const { low, high } = state.info.plane;
  const x = 10 + (480 * (item.point[0] - low[0])) / (high[0] - low[0]);
  const y = low.length < 2 ? 180 : 350 - (340 * (item.point[1] - low[1])) / (high[1] - low[1]);
  made.append(drawn("circle", { cx: x, cy: y, r: 9, class: "mark" }), drawn("text", { x: x + 11, y: y - 7 }, letter));
}

const text = (item, what) => `${what}, log density ${number(item.log_prob)} nats`;

function chosen(letter) {
  return state.items[Math.min(state.items.length, Math.max(1, Number($(letter).value) || 1)) - 1];
}

// The next click chooses the letter that was not chosen last.
let turn = "a";
function choose(i) {
  $(turn).value = i + 1;
  turn = turn === "a" ? "b" : "a";
  showChosen();
  if ($("property").value === "towards" && Number($("strength").value)) tilt();
}

function showChosen() {
  const [a, b] = [chosen("a"), chosen("b")];
  $("chosen").textContent = a ? `log density: A ${number(a.log_prob)}, B ${number(b.log_prob)} nats` : "";
  if (state.info.kind === "prior") {
    const made = plane(state.items, null, `${state.items.length} samples on the first principal axes; A and B marked`);
    if (a) { mark(made, a, "A"); mark(made, b, "B"); }
    made.addEventListener("click", (event) => {
      const dots = [...made.querySelectorAll("circle.item")];
      const away = dots.map((dot) => {
        const box = dot.getBoundingClientRect();
        return Math.hypot(box.x + box.width / 2 - event.clientX, box.y + box.height / 2 - event.clientY);
      });
      choose(away.indexOf(Math.min(...away)));
    });
    $("samples").replaceChildren(made);
    return;
  }
  [...$("samples").querySelectorAll("button")].forEach((button, i) => {
    const item = state.items[i], letters = ["a", "b"].filter((letter) => chosen(letter) === item);
    button.className = letters[0] || "";
    button.setAttribute("aria-pressed", String(letters.length > 0));
    button.querySelector("b")?.remove();
    if (letters.length) button.append(element("b", {}, letters.join(" ").toUpperCase()));
  });
}

function tiles(items, what, onclick) {
  return element("ul", { class: onclick ? "tiles" : "strip" }, ...items.map((item, i) => {
    const image = element("img", { src: item.image, alt: text(item, `${what} ${i + 1}`) });
    if (!onclick) return element("li", {}, image, element("span", {}, number(item.log_prob)));
    const button = element("button", { type: "button", "aria-pressed": "false" }, image);
    button.addEventListener("click", () => onclick(i));
    return element("li", {}, button);
  }));
}

// Points show a density only where there are many of them.
const shown = (images) => Math.min(state.info.most.n, state.info.kind === "model" ? images : 200);
const seed = () => Math.min(state.info.most.seed, Math.max(0, Math.trunc(Number($("seed").value)) || 0));
const stage = () => state.info.stages[Number($("stage").value)];

function nameStage() {
  const last = state.info.stages.at(-1);
  const name = `${stage()} of ${last}` + (stage() === 0 ? " (base)" : stage() === last ? " (full ladder)" : "");
  $("stage-name").textContent = name;
  $("stage").setAttribute("aria-valuetext", name);
}

const sample = latest(async () => {
  const found = await ask("/api/sample", { stage: stage(), seed: seed(), n: shown(40) });
  state.items = found.items;
  for (const letter of ["a", "b"]) $(letter).max = found.items.length;
  if (state.info.kind === "model") $("samples").replaceChildren(tiles(found.items, "Sample", choose));
  $("samples-note").textContent = found.coupled
    ? "A sample changes with the stage only where the ladder says so. Click two of them to choose A and B."
    : "This stage was sampled by itself. Click two samples to choose A and B.";
  $("samples").dataset.stage = found.stage;
  showChosen();
});

const walk = latest(async () => {
  const [a, b] = [chosen("a"), chosen("b")];
  if (!a) return;
  const { items } = await ask("/api/walk", { start: a.z, end: b.z, n: Math.round(Number($("steps").value)) });
  if (state.info.kind === "model") {
    $("walk").replaceChildren(tiles(items, "Step"), element("p", { class: "quiet" }, "Below each step its log density, nats."));
    return;
  }
  const densities = items.map((item) => number(item.log_prob)).join(", ");
  const made = plane(state.items, items, `A path of ${items.length} steps from A to B`);
  $("walk").replaceChildren(made, element("p", { class: "quiet" }, `Log density on the way, nats: ${densities}.`));
});

function figures(found) {
  const boxes = [
    ["p-value", found.p_value.toFixed(4), `against ${found.calibration}`],
    ["anomaly score, nats", number(found.score), state.info.kind === "model" ? "−log p(x, z): higher is odder" : "−log p(z)"],
    ["log density of the latent, nats", number(found.log_prob), `normaliser known to ± ${number(state.info.log_prob_stderr, 3)}`],
  ];
  if (found.squared_error !== undefined) boxes.push(["squared error a pixel", number(found.squared_error, 4), "images in [−1, 1]"]);
  return element("dl", { class: "figures" }, ...boxes.map(([name, value, note]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, element("b", {}, value), element("span", {}, note)))));
}

// The browser turns what it can show, and what is large, into a PNG of at most 2,048 pixels a side.
async function asPicture(file) {
  if (["image/png", "image/jpeg"].includes(file.type) && file.size < 4e6) return file;
  const bitmap = await createImageBitmap(file).catch(() => { throw new Error("This browser cannot read that picture."); });
  const share = Math.min(1, 2048 / Math.max(bitmap.width, bitmap.height));
  const canvas = element("canvas", { width: Math.max(1, Math.round(bitmap.width * share)), height: Math.max(1, Math.round(bitmap.height * share)) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

let waiting = null;
const scoreImage = latest(async () => {
  const picture = await asPicture(waiting);
  const found = await ask("/api/score", picture, picture.type);
  state.uploaded = found;
  if (!$("target").querySelector("[value=uploaded]")) $("target").append(element("option", { value: "uploaded" }, "the scored image"));
  const figure = (source, caption) => element("figure", {}, element("img", { src: source, alt: caption }), element("figcaption", {}, caption));
  const pair = element("div", { class: "pair" }, figure(found.image, "The image as the model sees it"), figure(found.reconstruction, "Its reconstruction"));
  $("score").replaceChildren(pair, figures(found));
});

const scoreLatent = latest(async () => {
  const parts = $("z").value.split(",").map((part) => part.trim());
  if (parts.some((part) => part === "" || !Number.isFinite(Number(part)))) throw new Error("Give numbers with commas between them.");
  const found = await ask("/api/score", { z: parts.map(Number) });
  state.uploaded = found;
  if (!$("target").querySelector("[value=uploaded]")) $("target").append(element("option", { value: "uploaded" }, "the scored latent"));
  const made = plane(state.items, null, "The scored latent among the samples");
  mark(made, found, "scored");
  $("score").replaceChildren(figures(found), made);
});

const tilt = latest(async () => {
  const property = $("property").value, strength = Number($("strength").value);
  const body = { property, strength, seed: seed(), n: shown(20) };
  if (property === "towards") body.z = ($("target").value === "a" || !state.uploaded ? chosen("a") : state.uploaded).z;
  if (property === "class") body.class = Number($("class").value);
  const found = await ask("/api/tilt", body);
  const what = { towards: "distance to the target, a standardised coordinate", brightness: "brightness", class: "probability of the class" };
  $("tilt-note").textContent = `Mean ${what[property]}: ${number(found.before, 3)} under the prior, ${number(found.after, 3)} tilted. ` +
    `Log normaliser of the tilt ${number(found.log_normalizer, 2)} ± ${number(found.log_normalizer_stderr, 2)} nats.` +
    (found.r_squared === null ? "" : ` Brightness is read off the latent with R² ${number(found.r_squared, 2)}.`) +
    (found.accuracy === null ? "" : ` Classes are read off the latent, right for ${Math.round(100 * found.accuracy)}%.`);
  $("tilt").replaceChildren(state.info.kind === "model" ? tiles(found.items, "Tilted sample")
    : plane(found.items, null, `${found.items.length} samples of the tilted prior`));
  $("tilt").dataset.strength = found.strength;
});

function nameTilt() {
  const property = $("property").value, range = state.info.tilts[property];
  $("strength").min = range.low;
  $("strength").max = range.high;
  $("class-label").hidden = property !== "class";
  $("target-label").hidden = property !== "towards";
  $("strength-name").textContent = number(Number($("strength").value));
}

async function start() {
  const info = state.info = await ask("/api/info");
  const shape = info.event_shape.join(" × ");
  $("name").textContent = `${info.name}: ${info.kind === "model" ? "a model of images of " + info.image_shape.join(" × ") + ", " : "a prior on "}latents of ${shape}, base ${info.base}, ${info.stages.at(-1)} stage${info.stages.at(-1) === 1 ? "" : "s"}`;
  $("stage").max = info.stages.length - 1;
  $("stage").value = info.stages.length - 1;
  $("stage").disabled = info.stages.length < 2;
  $("seed").max = info.most.seed;
  $("steps").max = info.most.steps;
  $("steps").value = Math.min(info.most.steps, 10);
  $(info.kind === "model" ? "drop" : "vector").hidden = false;
  const rest = info.calibration.data ? "Right if they trained nothing."
    : "Start the explorer with --calibration to hold it against data: these p-values say what is odd for the model, not for data.";
  $("score-note").textContent = `p-values are conformal, against ${info.calibration.text}. ${rest}`;
  for (const [name, range] of Object.entries(info.tilts)) $("property").append(element("option", { value: name }, range.text));
  for (const name of info.classes || []) $("class").append(element("option", { value: name }, name));
  nameStage();
  nameTilt();
  $("stage").addEventListener("input", () => { nameStage(); sample(); });
  $("seed").addEventListener("change", sample);
  $("next-seed").addEventListener("click", () => { $("seed").value = seed() + 1; sample(); });
  for (const letter of ["a", "b"]) $(letter).addEventListener("change", showChosen);
  $("walk-go").addEventListener("click", walk);
  $("file").addEventListener("change", () => { if ((waiting = $("file").files[0])) scoreImage(); });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    $("drop").addEventListener(kind, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop" && (waiting = event.dataTransfer.files[0])) scoreImage();
    });
  }
  $("z-a").addEventListener("click", () => { $("z").value = chosen("a")?.z.join(", ") || ""; });
  $("z-go").addEventListener("click", scoreLatent);
  $("property").addEventListener("change", () => { $("strength").value = 0; nameTilt(); });
  for (const id of ["class", "target"]) $(id).addEventListener("change", tilt);
  $("strength").addEventListener("input", () => { nameTilt(); tilt(); });
  await sample();
}

start().catch((error) => say(error.message, true));
