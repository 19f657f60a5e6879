// The page of `lora-align serve`. Text of the model is only ever set as textContent.

import { drawMap, number, plain, slider } from "./parts.js";
import { $, KEY, STATE, call, events, fresh, post, stored } from "./requests.js";

const PRESETS = "lora-align presets";
const SPAN = 2; // the end of a slider whose safe range is not known or smaller
const columns = [];
let about = { vectors: [], conditioned: {}, map: null, default: { weights: {} } };

// ---- server

async function health() {
  const status = $("#status");
  try {
    const now = await (await call("/health")).json();
    status.className = "";
    status.textContent = now.running ? `${now.running} running, ${now.tokens_per_second} tokens/s` : "ready";
    if (status.dataset.lost || now.content !== about.content) await refresh();
    delete status.dataset.lost;
  } catch (fault) {
    status.className = "lost";
    status.textContent = fault instanceof TypeError ? "no connection" : fault.message; // fetch throws a TypeError
    status.dataset.lost = "yes";
  }
}

async function refresh() {
  about = await (await call("/v1/vectors")).json();
  $("#base").textContent = about.base;
  columns.forEach((column) => column.draw());
  if (columns.length) return;
  const saved = stored(sessionStorage, STATE, []).filter((one) => Array.isArray(one?.messages));
  for (const one of saved.length ? saved : [undefined]) add(one);
  $("#prompt").focus();
}

// ---- a column: weights, and a conversation

class Column {
  constructor(saved) {
    this.weights = { ...(saved?.weights ?? about.default.weights) };
    this.want = { ...saved?.want }; // objective → value, for the policy that takes a direction
    this.policy = saved?.policy ?? null;
    this.messages = saved?.messages ?? [];
    this.nodes = new WeakMap(); // message → its article
    this.node = fresh("column");
    this.running = null;
    $(".remove", this.node).onclick = () => this.remove();
    $(".copy", this.node).onchange = (event) => this.copy(event.target);
    $(".presets", this.node).onchange = (event) => this.preset(event.target);
    $(".log", this.node).dataset.hint = "Move a slider, and ask something. You can move it while the answer is written.";
    $("#columns").append(this.node);
    this.draw();
    this.messages.forEach((message) => this.show(message));
  }

  get mix() {
    const known = new Set(about.vectors.map((vector) => vector.name));
    return Object.fromEntries(Object.entries(this.weights).filter(([name, weight]) => weight && known.has(name)));
  }

  get name() {
    const want = this.policy ? Object.entries(this.want) : [];
    const parts = [...Object.entries(this.mix), ...want].map(([name, weight]) => `${name} ${number(weight)}`);
    return parts.join(" · ") || (this.body().model ?? "start policy");
  }

  // ---- sliders

  draw() {
    const sliders = $(".sliders", this.node);
    sliders.replaceChildren();
    for (const vector of about.vectors) sliders.append(this.vectorSlider(vector));
    for (const [name, policy] of Object.entries(about.conditioned)) this.drawDirection(sliders, name, policy);
    if (!sliders.children.length) {
      const none = document.createElement("p");
      none.className = "part";
      none.textContent = "No vector is trained yet. `lora-align dpo` trains one; it appears here.";
      sliders.append(none);
    }
    this.drawPresets();
    this.update();
  }

  vectorSlider({ name, safe, warnings }) {
    const weight = this.weights[name] ?? 0;
    const reach = Math.max(SPAN, ...[safe?.low ?? 0, safe?.high ?? 0, weight].map((end) => Math.ceil(4 * Math.abs(end) + 1) / 4));
    const [low, high] = [-reach, reach]; // beyond the marks, and a multiple of the step
    const made = slider(name, weight, low, high, safe, (value) => {
      this.weights[name] = value;
      this.changed();
    });
    const measured = safe ? `safe from ${number(safe.low)} to ${number(safe.high)}` : "`lora-align reach` measures its safe range";
    made.title = [measured, "double-click sets 0", ...warnings].join("; ");
    return made;
  }

  drawDirection(sliders, name, { objectives }) {
    const part = document.createElement("label"), box = document.createElement("input"), own = document.createElement("div");
    part.className = "part";
    box.type = "checkbox";
    box.checked = this.policy === name;
    own.hidden = !box.checked;
    part.append(box, `direction of ${name}`);
    const set = (objective) => (value) => {
      this.want[objective] = value;
      this.changed();
    };
    objectives.forEach((objective, place) => {
      const value = (box.checked ? this.want[objective] : undefined) ?? (place ? 0 : 1);
      own.append(slider(objective, value, -1, 1, null, set(objective)));
    });
    box.onchange = () => {
      for (const other of this.node.querySelectorAll(".part input")) if (other !== box && other.checked) other.click();
      this.policy = box.checked ? name : null;
      const values = [...own.querySelectorAll("[type=number]")].map((field) => field.valueAsNumber);
      this.want = Object.fromEntries(objectives.map((objective, place) => [objective, values[place]]));
      own.hidden = !box.checked;
      this.changed();
    };
    sliders.append(part, own);
  }

  update() {
    $("h2", this.node).textContent = this.name;
    drawMap($(".map", this.node), about.map, this.weights);
    $(".remove", this.node).hidden = columns.length < 2;
  }

  changed() {
    this.update();
    save();
    this.steer();
  }

  async steer() { // sends the newest weights; one request at a time, so that none overtakes another
    const running = this.running;
    if (!running?.id || running.steering) return;
    running.steering = true;
    try {
      while (this.running === running && running.sent !== JSON.stringify(this.mix)) {
        running.sent = JSON.stringify(this.mix);
        const changed = await (await post(`/v1/requests/${running.id}/weights`, { weights: this.mix })).json();
        this.warn(changed.warnings);
        running.changed = true;
      }
    } catch (fault) {
      if (this.running === running) this.warn([fault.message]);
    }
    running.steering = false;
  }

  warn(warnings) {
    const lines = (warnings ?? []).map((text) => {
      const line = document.createElement("li");
      line.textContent = text;
      return line;
    });
    $(".warnings", this.node).replaceChildren(...lines);
  }

  // ---- conversation

  show(message) {
    const node = fresh("message"), log = $(".log", this.node);
    this.nodes.set(message, node);
    node.className = message.role;
    $(".retry", node).onclick = () => this.retry();
    log.append(node);
    this.redraw(message);
    log.scrollTop = log.scrollHeight;
  }

  redraw(message) {
    const node = this.nodes.get(message), facts = $(".facts", node);
    $(".text", node).textContent = [message.content, message.fault].filter(Boolean).join("\n");
    node.classList.toggle("failed", Boolean(message.fault));
    const said = [
      message.tokens !== undefined && `${message.tokens} tokens`, message.stopped && "stopped", message.cut && "cut",
      message.changed && "weights changed",
    ];
    facts.textContent = said.filter(Boolean).join(", ");
    if (message.refused) {
      const mark = document.createElement("span");
      mark.className = "refused";
      mark.textContent = " · refuses";
      facts.append(mark);
    }
    for (const one of this.messages.filter((shown) => this.nodes.has(shown))) {
      $(".retry", this.nodes.get(one)).hidden = Boolean(this.running) || one !== this.messages.at(-1);
    }
  }

  add(message) {
    this.messages.push(message);
    this.show(message);
  }

  drop() {
    this.nodes.get(this.messages.pop()).remove();
  }

  async ask(text) {
    this.add({ role: "user", content: text });
    await this.answer();
  }

  async retry() {
    if (this.running) return;
    while (this.messages.at(-1)?.role === "assistant") this.drop();
    if (this.messages.length) await this.answer();
  }

  history() { // without answers that failed and the questions before them
    const failed = (message) => !message || message.role === "user" || !message.content;
    return this.messages
      .filter((message, place, all) => (message.role === "user" ? place === all.length - 1 || !failed(all[place + 1]) : message.content))
      .map(({ role, content }) => ({ role, content }));
  }

  body() {
    const mix = this.mix, asDefault = about.default.fixed && !Object.keys(mix).length;
    const want = this.policy ? { model: this.policy, want: this.want } : {};
    return { messages: this.history(), ...(asDefault ? { model: about.default.model } : { weights: mix }), ...want, temperature: 0.7 };
  }

  async answer() {
    const body = { ...this.body(), stream: true, stream_options: { include_usage: true } };
    const running = (this.running = { abort: new AbortController(), sent: JSON.stringify(this.mix) });
    const message = { role: "assistant", content: "" }, log = $(".log", this.node);
    this.add(message);
    this.nodes.get(message).classList.add("writing");
    buttons();
    try {
      for await (const chunk of events(await post("/v1/chat/completions", body, running.abort.signal))) {
        if (chunk.error) throw new Error(chunk.error.message);
        if (!running.id) {
          running.id = chunk.id;
          this.warn(chunk.warnings);
          this.steer();
        }
        const choice = chunk.choices[0], atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
        message.content += choice?.delta.content ?? "";
        message.refused = choice?.refused ?? message.refused;
        message.cut = message.cut || choice?.finish_reason === "length";
        message.tokens = chunk.usage?.completion_tokens ?? message.tokens;
        $(".text", this.nodes.get(message)).textContent = message.content;
        if (atEnd) log.scrollTop = log.scrollHeight;
      }
    } catch (fault) {
      if (fault.name === "AbortError") message.stopped = true;
      else message.fault = fault.message;
    }
    this.running = null;
    message.changed = running.changed;
    this.nodes.get(message).classList.remove("writing");
    if (this.messages.includes(message)) this.redraw(message);
    save();
    buttons();
  }

  clear() {
    this.running?.abort.abort();
    this.messages = [];
    $(".log", this.node).replaceChildren();
    this.warn([]);
  }

  remove() {
    this.running?.abort.abort();
    this.node.remove();
    columns.splice(columns.indexOf(this), 1);
    columns.forEach((column) => column.update());
    save();
  }

  // ---- copies and presets

  copy(select) {
    const mix = Object.entries(this.mix).map(([name, weight]) => `${name}=${plain(weight)}`).join(",");
    const body = this.body(), key = sessionStorage.getItem(KEY);
    if (!body.messages.length) body.messages = [{ role: "user", content: $("#prompt").value || "Hello" }];
    const { messages, temperature, model, ...extra } = body;
    const texts = {
      merge: `lora-align merge --weights ${mix || "NAME=1"}`,
      curl: [
        `curl ${location.origin}/v1/chat/completions`, ...(key ? ["-H 'authorization: Bearer KEY'"] : []),
        "-H 'content-type: application/json'", `-d '${JSON.stringify(body).replaceAll("'", "'\\''")}'`,
      ].join(" \\\n  "),
      python: [
        "from openai import OpenAI", "", `client = OpenAI(base_url="${location.origin}/v1", api_key="${key ? "KEY" : "-"}")`,
        "answer = client.chat.completions.create(", `    model=${JSON.stringify(model ?? (mix || "start"))},`,
        `    messages=${JSON.stringify(messages)},`, `    temperature=${temperature},`,
        ...(extra.want ? [`    extra_body=${JSON.stringify(extra)},`] : []), ")", "print(answer.choices[0].message.content)",
      ].join("\n"),
    };
    const text = texts[select.value];
    select.value = "";
    const show = () => window.prompt("Copy this:", text);
    if (text) navigator.clipboard?.writeText(text).then(() => note("copied"), show) ?? show();
  }

  drawPresets() {
    const select = $(".presets", this.node), saved = Object.keys(presets());
    const option = (value, text) => Object.assign(document.createElement("option"), { value, textContent: text });
    select.replaceChildren(
      option("", "Presets …"), option("zero:", "all weights 0"), option("save:", "save these weights …"),
      ...saved.map((name) => option(`use:${name}`, name)), ...saved.map((name) => option(`drop:${name}`, `delete ${name}`)),
    );
  }

  preset(select) {
    const at = select.value.indexOf(":"), what = select.value.slice(0, at), name = select.value.slice(at + 1);
    const all = presets();
    if (what === "zero") this.weights = {};
    if (what === "use" && all[name]) this.weights = { ...all[name] };
    if (what === "drop") delete all[name];
    const chosen = what === "save" && window.prompt("Name of the preset:", this.name);
    if (chosen) all[chosen] = this.mix;
    localStorage.setItem(PRESETS, JSON.stringify(all));
    columns.forEach((column) => column.drawPresets());
    this.draw();
    this.changed();
  }

  get saved() {
    return { weights: this.weights, want: this.want, policy: this.policy, messages: this.messages };
  }
}

function note(text) {
  $("#status").textContent = text;
}

const presets = () => stored(localStorage, PRESETS, {});

function save() {
  try {
    sessionStorage.setItem(STATE, JSON.stringify(columns.map((column) => column.saved)));
  } catch (fault) {
    note(`this conversation is too long to be kept after a reload: ${fault.message}`);
  }
}

function buttons() {
  const busy = columns.some((column) => column.running);
  $("#send").hidden = busy;
  $("#stop").hidden = !busy;
}

// ---- the whole page

function add(saved) {
  columns.push(new Column(saved));
  columns.forEach((column) => column.update());
  save();
}

$("#add").onclick = () => {
  const said = columns.at(-1).messages, end = said.findLastIndex((message) => message.role === "user") + 1;
  add({ weights: {}, messages: structuredClone(said.slice(0, end)) });
  columns.at(-1).node.scrollIntoView({ behavior: "smooth", inline: "end" });
  if (end) columns.at(-1).answer();
};
$("#clear").onclick = () => {
  columns.forEach((column) => column.clear());
  save();
};
$("#export").onclick = () => {
  const text = JSON.stringify({ base: about.base, columns: columns.map((column) => column.saved) }, null, 2);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
  URL.revokeObjectURL(link.href);
};
$("#stop").onclick = () => columns.forEach((column) => column.running?.abort.abort());
$("#composer").onsubmit = (event) => {
  event.preventDefault();
  const field = $("#prompt"), text = field.value.trim();
  if (!text || columns.some((column) => column.running)) return;
  field.value = "";
  field.style.height = "";
  columns.forEach((column) => column.ask(text));
};
$("#prompt").oninput = ({ target }) => {
  target.style.height = "";
  target.style.height = `${target.scrollHeight + 2}px`;
};
$("#prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("#composer").requestSubmit();
};
$("#key").onclose = () => {
  sessionStorage.setItem(KEY, $("#key-text").value);
  health();
};

$("#status").dataset.lost = "yes"; // so that `health` reads the vectors first
setInterval(health, 3000);
health();
