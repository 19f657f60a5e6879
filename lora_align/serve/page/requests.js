// Requests to the server. It may ask for an API key, which the session stores.

export const STATE = "lora-align columns", KEY = "lora-align key";
export const $ = (selector, inside = document) => inside.querySelector(selector);
export const fresh = (template) => $(`#${template}`).content.firstElementChild.cloneNode(true);

export function stored(storage, name, otherwise) { // what another page or version wrote may be damaged
  try {
    const value = JSON.parse(storage.getItem(name));
    return value && Array.isArray(value) === Array.isArray(otherwise) && typeof value === "object" ? value : otherwise;
  } catch {
    return otherwise;
  }
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

export async function call(path, options = {}) {
  const response = await fetch(path, { headers: headers(), ...options });
  if (response.ok) return response;
  if (response.status === 401 && !$("#key").open) $("#key").showModal();
  const body = await response.json().catch(() => ({}));
  throw new Error(body.error?.message ?? `the server answered ${response.status}`);
}

export const post = (path, body, signal) => call(path, { method: "POST", body: JSON.stringify(body), signal });

export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice("data: ".length));
    }
  }
  throw new Error("the connection was lost");
}
