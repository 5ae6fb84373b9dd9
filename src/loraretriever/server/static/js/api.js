// The server's API. All paths are relative to the page, which may lie below a prefix.
const KEY = "loraretriever.key";
const base = new URL("./", document.baseURI);

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (secret) => sessionStorage.setItem(KEY, secret),
  forget: () => sessionStorage.removeItem(KEY),
};

export class ApiError extends Error {
  constructor(status, error = {}, retryAfter = null) {
    super(error.message ?? `the server answered with status ${status}.`);
    this.status = status;
    this.code = error.code ?? null;
    this.retryAfter = retryAfter; // seconds
  }
}

let onUnauthorized = () => {};
/** Call this whenever the server wants a key, or another one. */
export function whenUnauthorized(listener) {
  onUnauthorized = listener;
}

export function url(path) {
  return new URL(path.replace(/^\//, ""), base);
}

function headers(body) {
  const found = {};
  if (key.get()) found.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) found["content-type"] = "application/json";
  return found;
}

function toError(status, text, retryAfter) {
  let error;
  try {
    error = JSON.parse(text).error;
  } catch {
    error = {}; // a proxy's page, say
  }
  if (status === 401) onUnauthorized();
  return new ApiError(status, error, Number(retryAfter) || null);
}

async function send(path, { method = "GET", body, signal } = {}) {
  let response;
  try {
    response = await fetch(url(path), {
      method,
      signal,
      headers: headers(body),
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "the server cannot be reached." });
  }
  if (!response.ok) throw toError(response.status, await response.text(), response.headers.get("retry-after"));
  return response;
}

/** The JSON that the server answers. */
export async function call(path, options) {
  return (await send(path, options)).json();
}

export const post = (path, body, signal) => call(path, { method: "POST", body, signal });

/** Whether the server takes requests now. */
export async function isReady() {
  try {
    return (await fetch(url("ready"))).ok;
  } catch {
    return false;
  }
}

/** The chunks of a streamed answer. */
export async function* stream(path, body, signal) {
  const response = await send(path, { method: "POST", body: { ...body, stream: true }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split(/\r?\n\r?\n/);
      rest = events.pop();
      for (const event of events) {
        const data = event.match(/^data: ?(.*)$/m)?.[1];
        if (data === undefined) continue; // a comment that keeps the connection open
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(0, chunk.error);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // closes the connection, which makes the server stop
  }
}

/** Send a form with files; `onProgress` hears of the share that is sent. `fetch` cannot tell. */
export function upload(path, form, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", url(path));
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    request.onerror = () => reject(new ApiError(0, { message: "the server cannot be reached, or refused the files." }));
    request.onabort = () => reject(new DOMException("stopped", "AbortError"));
    request.onload = () => {
      if (request.status < 300) resolve(JSON.parse(request.responseText));
      else reject(toError(request.status, request.responseText, request.getResponseHeader("retry-after")));
    };
    signal?.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}
