/** For the tests of the pipeline and its commands: small checkpoints, folders to compare, commands to run. */
import { spawn, spawnSync } from "node:child_process";
import {
  closeSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { fileBytes, randomIntegers } from "./tensor/_files.ts";

export const ROOT = fileURLToPath(new URL("..", import.meta.url));
export const MODELS = join(ROOT, "tests", "models");

/** A folder for one test file; `fresh` names a path in it that does not exist. */
export function workplace(): { path: string; fresh: (name?: string) => string; remove: () => void } {
  const path = mkdtempSync(join(tmpdir(), "arrowquant-pipeline-"));
  let count = 0;
  return {
    path,
    fresh: (name = "out") => join(path, `${name}-${count++}`),
    remove: () => rmSync(path, { recursive: true, force: true }),
  };
}

/** A tensor to be stored. */
export interface TestTensor {
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly data: ArrayBufferView<ArrayBuffer>;
}

/** Seeded, roughly Gaussian float32 weights. */
export function gaussian(count: number, seed: number, deviation = 0.05): Float32Array<ArrayBuffer> {
  const random = randomIntegers(seed);
  const uniform = () => random(1 << 24) / (1 << 24);
  return Float32Array.from({ length: count }, () => {
    return deviation * Math.sqrt(-2 * Math.log(uniform() + 1e-9)) * Math.cos(2 * Math.PI * uniform());
  });
}

/** A float32 matrix. */
export function matrix(rows: number, cols: number, data: Float32Array<ArrayBuffer>): TestTensor {
  return { dtype: "F32", shape: [rows, cols], data };
}

/** Writes a safetensors file, by the format's description alone. */
export function writeTensors(path: string, tensors: Readonly<Record<string, TestTensor>>): void {
  let end = 0;
  const entries = Object.entries(tensors).map(([name, { dtype, shape, data }]) => {
    const start = end;
    end += data.byteLength;
    return [name, { dtype, shape, data_offsets: [start, end] }];
  });
  const body = new Uint8Array(end);
  let offset = 0;
  for (const { data } of Object.values(tensors)) {
    body.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), offset);
    offset += data.byteLength;
  }
  writeFileSync(path, fileBytes(JSON.stringify(Object.fromEntries(entries)), body));
}

/** A folder with one `model.safetensors` and a config.json. */
export function writeCheckpoint(
  folder: string,
  tensors: Readonly<Record<string, TestTensor>>,
  config: unknown = { model_type: "Dream" },
): string {
  mkdirSync(folder, { recursive: true });
  writeTensors(join(folder, "model.safetensors"), tensors);
  writeFileSync(join(folder, "config.json"), JSON.stringify(config, null, 2));
  return folder;
}

/** Every file below a folder with its bytes, as text that differs where a byte differs. */
export function contents(folder: string): Record<string, string> {
  const files: Record<string, string> = {};
  const walk = (path: string, prefix: string): void => {
    for (const entry of readdirSync(path, { withFileTypes: true })) {
      if (entry.isDirectory()) walk(join(path, entry.name), `${prefix}${entry.name}/`);
      else files[prefix + entry.name] = readFileSync(join(path, entry.name)).toString("base64");
    }
  };
  walk(folder, "");
  return files;
}

/** Names and sizes of what differs between two folders: short where a comparison of bytes would fill the screen. */
export function differences(a: string, b: string): string[] {
  const [left, right] = [contents(a), contents(b)];
  return [...new Set([...Object.keys(left), ...Object.keys(right)])].filter((name) =>
    left[name] !== right[name]
  );
}

/** What a promise rejects with; fails when it does not. */
export async function rejection(
  promise: Promise<unknown>,
): Promise<Error & { code?: string; path?: string; tensor?: string }> {
  let result: unknown;
  try {
    result = await promise;
  } catch (error) {
    return error as Error;
  }
  throw new Error(`expected a rejection, got ${String(result)}`);
}

export const isDeno = "Deno" in globalThis;

function commandLine(
  script: string,
  args: readonly string[],
  permissions: readonly string[] = ["-A"],
): [string, string[]] {
  const file = join(ROOT, "scripts", script);
  const importMap = `--import-map=${join(ROOT, "tests", "deno", "import_map.json")}`;
  const deno = ["run", "--no-prompt", ...permissions, "--no-check", importMap, file, ...args];
  return [process.execPath, isDeno ? deno : [file, ...args]];
}

/** The environment without what would change a command's result. */
const environment = Object.fromEntries(
  Object.entries(process.env).filter(([name]) => !name.startsWith("ARROW_QUANT_")),
);

/** How to run a command, apart from its arguments. */
interface RunSettings {
  /** A file that gets its standard output. */
  readonly stdoutPath?: string;
  /** The same for its standard error. */
  readonly stderrPath?: string;
  /** What Deno lets it do; everything by default. */
  readonly permissions?: readonly string[];
}

/** Runs a command of scripts/ in the runtime of this test. */
export function run(
  script: string,
  args: readonly string[],
  variables: Readonly<Record<string, string>> = {},
  { stdoutPath, stderrPath, permissions }: RunSettings = {},
): { code: number | null; stdout: string; stderr: string } {
  const [command, line] = commandLine(script, args, permissions);
  const streams = [stdoutPath, stderrPath].map((path) => path === undefined ? "pipe" : openSync(path, "w"));
  const { status, stdout, stderr } = spawnSync(command, line, {
    cwd: ROOT,
    encoding: "utf8",
    env: { ...environment, ...variables },
    maxBuffer: 64 * 2 ** 20,
    stdio: ["ignore", ...streams],
  });
  for (const stream of streams) if (typeof stream === "number") closeSync(stream);
  return { code: status, stdout, stderr };
}

/**
 * Starts a command and sends it a signal after some milliseconds, or once `when` holds for what it printed on
 * stderr. Resolves to its exit code or the signal that ended it.
 */
export function runAndSignal(
  script: string,
  args: readonly string[],
  signal: "SIGKILL" | "SIGHUP" | "SIGINT" | "SIGTERM",
  when: number | ((stderr: string) => boolean),
): Promise<{ code: number | null; signal: string | null; stderr: string }> {
  const [command, line] = commandLine(script, args);
  return new Promise((resolve, reject) => {
    const child = spawn(command, line, { cwd: ROOT, env: environment, stdio: ["ignore", "ignore", "pipe"] });
    let stderr = "";
    let isSent = false;
    const send = () => {
      // Not child.kill: after it Deno reports the signal as what ended the child, whatever its exit code.
      if (!isSent && child.exitCode === null) process.kill(child.pid!, signal);
      isSent = true;
    };
    const timer = typeof when === "number" ? setTimeout(send, when) : undefined;
    child.stderr!.on("data", (chunk) => {
      stderr += String(chunk);
      if (typeof when === "function" && when(stderr)) send();
    });
    child.on("error", reject);
    child.on("close", (code, ended) => {
      clearTimeout(timer);
      resolve({ code, signal: ended, stderr });
    });
  });
}
