// Server-sent events in answer to a POST, which EventSource does not support.

/** An error of the service, in OpenAI's shape. */
export class ApiError extends Error {
  constructor(status, error, retryAfter) {
    super(error.message || `The server answered ${status}.`);
    this.status = status;
    this.code = error.code;
    this.retryAfter = retryAfter;
  }
}

export function headersFor(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

/** The error of an answer that is not 2xx. */
export async function readError(answer) {
  let error = {};
  try {
    error = (await answer.json()).error ?? {};
  } catch {
    // Not an answer of the service: a proxy's page, or nothing.
  }
  return new ApiError(answer.status, error, Number(answer.headers.get("retry-after")) || null);
}

/** Yields the data of every event up to [DONE]; throws when the stream ends without it. */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = value.split("\n");
      // Page images are long lines that arrive in many pieces: join them once.
      pending.push(lines.shift());
      while (lines.length) {
        const line = pending.join("");
        pending = [lines.shift()];
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new Error("The connection was lost before the end.");
}
