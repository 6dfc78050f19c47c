/** Serves a folder on the loopback interface, as a host of a release would: GET, whole files, their types. */
import { readFileSync, statSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { extname, join, resolve, sep } from "node:path";

/** Deno takes a module only under a type of JavaScript or TypeScript. */
const CONTENT_TYPES: Readonly<Record<string, string>> = {
  ".ts": "application/typescript; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".json": "application/json",
};

/** An answer that is not the file's. */
export interface OtherAnswer {
  readonly status: number;
  readonly body: Uint8Array | string;
  readonly type?: string | undefined;
  /** Breaks the connection when that many bytes of the body are sent. */
  readonly breakAfter?: number | undefined;
}

export interface StaticServer {
  /** `127.0.0.1:PORT`. */
  readonly host: string;
  /** Ends with a slash. */
  readonly url: string;
  /** Paths asked for, in order. */
  readonly requests: readonly string[];
  close(): void;
}

/** Serves `folder`. Paths that lead out of it, or to nothing, are 404; `answer` may stand in. */
export async function serveFolder(
  folder: string,
  answer?: (path: string) => OtherAnswer | undefined,
): Promise<StaticServer> {
  const requests: string[] = [];
  const top = resolve(folder);
  const server = createServer((request, response) => {
    const path = decodeURIComponent(new URL(request.url ?? "/", "http://localhost").pathname);
    requests.push(path);
    const given = answer?.(path);
    if (given !== undefined) {
      const { status, body, type, breakAfter } = given;
      const bytes = typeof body === "string" ? new TextEncoder().encode(body) : body;
      const types = type === undefined ? {} : { "content-type": type };
      response.writeHead(status, { "content-length": bytes.length, ...types });
      if (breakAfter === undefined) response.end(bytes);
      else response.write(bytes.subarray(0, breakAfter), () => request.socket.destroy());
      return;
    }
    const file = resolve(join(top, path));
    if (!file.startsWith(top + sep) || !statSync(file, { throwIfNoEntry: false })?.isFile()) {
      response.writeHead(404).end();
      return;
    }
    const type = CONTENT_TYPES[extname(file)] ?? "application/octet-stream";
    response.writeHead(200, { "content-type": type }).end(readFileSync(file));
  });
  await new Promise<void>((done) => server.listen(0, "127.0.0.1", done));
  const host = `127.0.0.1:${(server.address() as AddressInfo).port}`;
  return {
    host,
    url: `http://${host}/`,
    requests,
    close: () => {
      server.close();
      server.closeAllConnections();
    },
  };
}
