/**
 * A headless Chromium, driven over its DevTools protocol
 * (https://chromedevtools.github.io/devtools-protocol/): enough to open a page, ask it things, and see every
 * message and request. Works in Bun and Deno without a package.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { delimiter, join } from "node:path";
import process from "node:process";

/** Where Chromium is, undefined where it is not. */
export function findChromium(): string | undefined {
  const names = ["chromium", "chromium-browser", "google-chrome"];
  const folders = (process.env["PATH"] ?? "").split(delimiter);
  return folders.flatMap((folder) => names.map((name) => join(folder, name))).find((path) =>
    existsSync(path)
  );
}

const START_MILLISECONDS = 30_000;

interface Message {
  readonly id?: number;
  readonly method?: string;
  readonly params?: Record<string, unknown>;
  readonly result?: Record<string, unknown>;
  readonly error?: { readonly message: string };
  readonly sessionId?: string;
}

/** One browser; close it. */
export class Browser {
  readonly #child: ChildProcess;
  readonly #socket: WebSocket;
  readonly #profile: string;
  readonly #waiting = new Map<
    number,
    { resolve(value: Record<string, unknown>): void; reject(error: Error): void }
  >();
  readonly #listeners = new Map<string, (method: string, params: Record<string, unknown>) => void>();
  #next = 1;

  private constructor(child: ChildProcess, socket: WebSocket, profile: string) {
    this.#child = child;
    this.#socket = socket;
    this.#profile = profile;
    socket.addEventListener("message", ({ data }) => this.#receive(JSON.parse(String(data)) as Message));
  }

  static async open(path: string): Promise<Browser> {
    const profile = mkdtempSync(join(tmpdir(), "arrowquant-chromium-"));
    const child = spawn(path, [
      "--headless",
      "--no-sandbox",
      "--disable-gpu",
      "--disable-dev-shm-usage",
      "--disable-background-networking",
      "--no-first-run",
      "--hide-scrollbars",
      "--remote-debugging-port=0",
      `--user-data-dir=${profile}`,
      "about:blank",
    ], { stdio: ["ignore", "ignore", "pipe"] });
    const url = await new Promise<string>((resolve, reject) => {
      let output = "";
      const timer = setTimeout(
        () => reject(new Error(`Chromium did not start: ${output}`)),
        START_MILLISECONDS,
      );
      child.stderr!.on("data", (chunk) => {
        output += chunk;
        const found = /DevTools listening on (ws:\S+)/.exec(output)?.[1];
        if (found === undefined) return;
        clearTimeout(timer);
        resolve(found);
      });
      child.on("exit", (code) => {
        clearTimeout(timer);
        reject(new Error(`Chromium ended with ${code}: ${output}`));
      });
    });
    const socket = new WebSocket(url);
    await new Promise((resolve, reject) => {
      socket.addEventListener("open", resolve, { once: true });
      socket.addEventListener("error", () => reject(new Error("Chromium does not answer")), { once: true });
    });
    return new Browser(child, socket, profile);
  }

  #receive(message: Message): void {
    if (message.id !== undefined) {
      const waiting = this.#waiting.get(message.id);
      this.#waiting.delete(message.id);
      if (message.error !== undefined) waiting?.reject(new Error(message.error.message));
      else waiting?.resolve(message.result ?? {});
    } else if (message.method !== undefined) {
      this.#listeners.get(message.sessionId ?? "")?.(message.method, message.params ?? {});
    }
  }

  send(
    method: string,
    params: Record<string, unknown> = {},
    sessionId?: string,
  ): Promise<Record<string, unknown>> {
    const id = this.#next++;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      this.#socket.send(
        JSON.stringify({ id, method, params, ...(sessionId === undefined ? {} : { sessionId }) }),
      );
    });
  }

  listen(sessionId: string, listener: (method: string, params: Record<string, unknown>) => void): void {
    this.#listeners.set(sessionId, listener);
  }

  async page(url: string, size: { readonly width: number; readonly height: number }): Promise<Page> {
    const { targetId } = await this.send("Target.createTarget", { url: "about:blank" });
    const { sessionId } = await this.send("Target.attachToTarget", { targetId, flatten: true });
    const page = new Page(this, String(sessionId));
    await page.open(url, size);
    return page;
  }

  async close(): Promise<void> {
    const ended = new Promise((resolve) => this.#child.once("exit", resolve));
    await this.send("Browser.close").catch(() => this.#child.kill());
    await ended;
    this.#socket.close();
    rmSync(this.#profile, { recursive: true, force: true, maxRetries: 5 });
  }
}

/** One page of it, with everything it said and asked for. */
export class Page {
  /** Errors and warnings of the console, uncaught exceptions, violations of the policy. */
  readonly messages: string[] = [];
  /** Addresses asked for, except `data:`, `blob:` and the page's own. */
  readonly requests: string[] = [];
  #url = "";

  constructor(readonly browser: Browser, readonly session: string) {}

  async open(url: string, size: { readonly width: number; readonly height: number }): Promise<void> {
    this.#url = url;
    this.browser.listen(this.session, (method, params) => this.#note(method, params));
    for (const domain of ["Runtime", "Log", "Network", "Page"]) await this.#send(`${domain}.enable`);
    await this.#send("Emulation.setDeviceMetricsOverride", {
      ...size,
      deviceScaleFactor: 1,
      mobile: size.width < 600,
    });
    await this.#send("Page.navigate", { url });
    await this.until("document.readyState === 'complete'");
  }

  #send(method: string, params: Record<string, unknown> = {}): Promise<Record<string, unknown>> {
    return this.browser.send(method, params, this.session);
  }

  #note(method: string, params: Record<string, unknown>): void {
    if (method === "Runtime.exceptionThrown") this.messages.push(JSON.stringify(params["exceptionDetails"]));
    if (
      method === "Runtime.consoleAPICalled" && ["error", "warning", "assert"].includes(String(params["type"]))
    ) {
      this.messages.push(JSON.stringify(params["args"]));
    }
    if (method === "Log.entryAdded") this.messages.push(JSON.stringify(params["entry"]));
    if (method === "Network.requestWillBeSent") {
      const { url } = params["request"] as { readonly url: string };
      if (url !== this.#url && !/^(?:data|blob):/.test(url)) this.requests.push(url);
    }
  }

  /** The value of an expression in the page. */
  async evaluate(expression: string): Promise<unknown> {
    const { result, exceptionDetails } = await this.#send("Runtime.evaluate", {
      expression,
      returnByValue: true,
      awaitPromise: true,
    });
    if (exceptionDetails !== undefined) throw new Error(JSON.stringify(exceptionDetails));
    return (result as { readonly value?: unknown }).value;
  }

  /** Waits until an expression holds. */
  async until(expression: string, milliseconds = 20_000): Promise<void> {
    const end = performance.now() + milliseconds;
    while (await this.evaluate(expression) !== true) {
      if (performance.now() > end) throw new Error(`never true: ${expression}; ${this.messages.join("\n")}`);
      await new Promise((resolve) => setTimeout(resolve, 30));
    }
  }

  /** The whole page as a PNG file. */
  async screenshot(): Promise<Uint8Array<ArrayBuffer>> {
    const { data } = await this.#send("Page.captureScreenshot", { captureBeyondViewport: true });
    return Uint8Array.fromBase64(String(data));
  }
}
