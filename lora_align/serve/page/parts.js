// The parts of the page: a slider, and the map of a sweep.

import { $, fresh } from "./requests.js";

export const plain = (value) => String(Math.round(value * 1000) / 1000);
export const number = (value) => plain(value).replace("-", "−");

export function slider(name, value, low, high, safe, set) {
  const node = fresh("slider"), range = $("[type=range]", node), field = $("[type=number]", node);
  let weight = value;
  const share = (at) => `${(100 * (at - low)) / (high - low)}%`;
  const show = () => {
    range.value = weight;
    range.style.setProperty("--from", share(Math.min(0, weight)));
    range.style.setProperty("--to", share(Math.max(0, weight)));
    node.classList.toggle("off", !weight);
    node.classList.toggle("far", Boolean(safe) && (weight < safe.low || weight > safe.high));
  };
  const change = (to) => {
    weight = Number.isFinite(to) ? Math.min(high, Math.max(low, to)) : 0;
    show();
    if (document.activeElement !== field) field.value = plain(weight);
    set(weight);
  };
  $("label", node).textContent = name;
  range.setAttribute("aria-label", name);
  field.setAttribute("aria-label", `${name}, as a number`);
  for (const input of [range, field]) [input.min, input.max] = [low, high];
  const tick = (at, kind) => {
    const mark = document.createElement("i");
    mark.className = kind;
    mark.style.left = share(at);
    $(".ticks", node).append(mark);
  };
  tick(0, "zero");
  if (safe) [safe.low, safe.high].filter((at) => at > low && at < high && at).forEach((at) => tick(at, "edge"));
  show();
  field.value = plain(weight);
  range.oninput = () => change(range.valueAsNumber);
  field.oninput = () => change(field.valueAsNumber);
  field.onblur = () => { field.value = plain(weight); };
  for (const part of [$(".track", node), $("label", node)]) part.ondblclick = () => change(0);
  return node;
}

export function drawMap(figure, map, weights) {
  figure.hidden = !map;
  if (!map) return;
  const all = [...map.points.map((point) => point.weights), map.axes.map((axis) => weights[axis] ?? 0)];
  const ends = [0, 1].map((axis) => [Math.min(...all.map((at) => at[axis])), Math.max(...all.map((at) => at[axis]))]);
  const place = (at, axis) => 10 + (100 * (at - ends[axis][0])) / (ends[axis][1] - ends[axis][0] || 1);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 120 120");
  const circle = (at, kind, radius, title) => {
    const dot = document.createElementNS(svg.namespaceURI, "circle"), label = document.createElementNS(svg.namespaceURI, "title");
    const [x, y] = [place(at[0], 0), 120 - place(at[1], 1)];
    for (const [key, value] of Object.entries({ cx: x, cy: y, r: radius, class: kind })) dot.setAttribute(key, value);
    label.textContent = title;
    dot.append(label);
    svg.append(dot);
  };
  for (const point of map.points) {
    const scores = Object.entries(point.scores).map(([name, value]) => `${name} ${number(value)}`);
    circle(point.weights, "point", 3, [map.axes.map((axis, i) => `${axis} ${number(point.weights[i])}`).join(", "), ...scores].join("\n"));
  }
  circle(all.at(-1), "here", 6, "these weights");
  const caption = document.createElement("figcaption");
  caption.textContent = `${map.axes[0]} →  ${map.axes[1]} ↑`;
  figure.replaceChildren(svg, caption);
}
