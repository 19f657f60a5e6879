// The page on which a person picks the better of two answers. Text of the model is only ever set as textContent.

import { number } from "./parts.js";
import { $, KEY, STATE, post, stored } from "./requests.js";

const SESSION = "lora-align picks";
const KEYS = { 1: "1", 2: "0", 0: "0.5", s: "" };
const buttons = [...document.querySelectorAll("[data-won]")];
let state = null;

async function send(path, body) {
  for (const button of buttons) button.disabled = true;
  try {
    show(await (await post(path, body)).json());
  } catch (fault) {
    $("#status").textContent = fault.message;
    if (state) for (const button of buttons) button.disabled = false; // the same pick can be sent again
  }
}

function show(next) {
  state = next;
  sessionStorage.setItem(SESSION, state.id);
  $("#status").textContent = state.picks ? `${state.picks} ${state.picks === 1 ? "pick" : "picks"}` : "Which answer is better?";
  $("#question").textContent = state.prompt;
  document.querySelectorAll(".pair .text").forEach((node, place) => { node.textContent = state.answers[place]; });
  for (const button of buttons) button.disabled = false;
  $("#profile").hidden = !state.picks;
  $("#saved").textContent = "";
  const all = Object.values(state.weights).flatMap(({ low, high }) => [Math.abs(low), Math.abs(high)]);
  const far = Math.max(...all, 0.01), share = (weight) => 50 + (50 * weight) / far;
  $(".learned").replaceChildren(...Object.entries(state.weights).map(([name, { mean, low, high }]) => {
    const row = document.createElement("tr"), head = document.createElement("th"), scale = document.createElement("td");
    const figures = document.createElement("td"), bar = document.createElement("i"), dot = document.createElement("b");
    head.textContent = name;
    scale.className = "scale";
    bar.style.left = `${share(low)}%`;
    bar.style.width = `${share(high) - share(low)}%`;
    dot.style.left = `${share(mean)}%`;
    scale.append(bar, dot);
    figures.className = "interval";
    figures.textContent = `${number(round(mean))} (${number(round(low))} to ${number(round(high))})`;
    row.append(head, scale, figures);
    return row;
  }));
}

const round = (value) => Math.round(100 * value) / 100;
const pick = (won) => send(`v1/picks/${state.id}`, { number: state.number, won: won === "" ? null : Number(won) });

for (const button of buttons) button.onclick = () => pick(button.dataset.won);
document.onkeydown = (event) => {
  if (event.target.matches("input") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in KEYS && !buttons[0].disabled) pick(KEYS[event.key]);
};
$("#use").onclick = () => {
  const weights = Object.entries(state.weights).map(([name, { mean }]) => [name, round(mean)]);
  const [first, ...others] = stored(sessionStorage, STATE, []);
  const column = { ...first, messages: first?.messages ?? [], weights: Object.fromEntries(weights) };
  sessionStorage.setItem(STATE, JSON.stringify([column, ...others]));
  location.href = "./";
};
$("#profile").onsubmit = async (event) => {
  event.preventDefault();
  const profile = event.target.elements.name.value.trim();
  try {
    await post(`v1/picks/${state.id}/profile`, { profile });
    $("#saved").textContent = `saved; lora-align chat --profile ${profile}`;
  } catch (fault) {
    $("#saved").textContent = fault.message;
  }
};
$("#key").onclose = () => {
  sessionStorage.setItem(KEY, $("#key-text").value);
  begin();
};

async function begin() { // a reload continues; a number that no question has asks for the state alone
  const id = sessionStorage.getItem(SESSION);
  if (id) await send(`v1/picks/${id}`, { number: -1, won: null });
  if (!state) await send("v1/picks", {});
}

begin();
