/**
 * `_doors_walk.ts BACKEND SEED CALLS FOLDER`: calls every function, and every method of every class, of every
 * door with wrong arguments. Arrays lie between canaries, and on Linux in front of forbidden pages. Names
 * each call in FOLDER/last before it, so that a call that ends the process or never returns is known; prints
 * one JSON object.
 */
import { Buffer } from "node:buffer";
import { cpSync, mkdtempSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import packageJson from "../package.json" with { type: "json" };
import { guardPages } from "./_guard_pages.ts";
import { randomStream } from "./_kernels.ts";

const [backend, seed, calls, folder] = process.argv.slice(2) as ["native" | "wasm", string, string, string];
const random = randomStream(Number(seed));
const one = <T>(list: readonly T[]): T => list[Math.floor(random() * list.length)]!;
const models = join(folder, "models"); // a copy: some functions write where they are told to
cpSync(fileURLToPath(new URL("models/", import.meta.url)), models, { recursive: true });

const guard = await guardPages();
const MARGIN = 1024, PATTERN = 0xa5, CANARY = new Uint8Array(2 * 4096).fill(PATTERN);
const guarded: { whole: Uint8Array; begin: number; end: number }[] = [];
const TYPES = [
  Float32Array,
  Float64Array,
  Uint8Array,
  Uint16Array,
  Uint32Array,
  Int32Array,
  BigUint64Array,
] as const;

/**
 * An array behind a canary, and in front of a page that nobody may touch or of another canary; its byte
 * offset is one that its type allows and no larger one does.
 */
function between(Type: (typeof TYPES)[number], length: number, shared = false) {
  const bytes = length * Type.BYTES_PER_ELEMENT, before = MARGIN + Type.BYTES_PER_ELEMENT;
  const paged = shared ? undefined : guard?.(before + bytes), size = before + bytes + MARGIN;
  const buffer = paged ?? (shared ? new SharedArrayBuffer(size) : new ArrayBuffer(size));
  const begin = paged === undefined ? before : paged.byteLength - bytes;
  const whole = new Uint8Array(buffer).fill(PATTERN);
  guarded.push({ whole, begin, end: begin + bytes });
  const array = new Type(buffer as ArrayBuffer, begin, length);
  for (let i = 0; i < length; i++) array[i] = Type === BigUint64Array ? BigInt(i) as never : i % 4 as never;
  return array;
}

function detached() {
  const array = new Float32Array(64);
  structuredClone(array.buffer, { transfer: [array.buffer] });
  return array;
}

const resizable = () => {
  const buffer = new (ArrayBuffer as unknown as new (n: number, o: object) => ArrayBuffer)(256, {
    maxByteLength: 512,
  });
  return new Float32Array(buffer);
};

/** An object whose every property is another wrong value each time. */
const fickle = () =>
  new Proxy({}, {
    get: (_, key) => key === "then" || typeof key === "symbol" ? undefined : wrong(),
    has: () => true,
  });

const SCALARS = [
  undefined,
  null,
  NaN,
  Infinity,
  -Infinity,
  -1,
  1.5,
  0,
  1,
  3,
  8,
  64,
  2 ** 31,
  2 ** 32 + 8,
  2 ** 40,
]
  .concat(
    [2 ** 53, -(2 ** 53), 1e300, "", "x", "F32", "feedback", "constructor", "__proto__", true, 1n] as never[],
  );

function wrong(): unknown {
  const kind = random();
  if (kind < 0.45) return one(SCALARS as unknown[]);
  if (kind < 0.75) return between(one(TYPES), one([0, 1, 7, 8, 16, 64, 512]), random() < 0.2);
  if (kind < 0.8) return one([detached, resizable])();
  if (kind < 0.85) return fickle();
  if (kind < 0.9) {
    return one([[], [1, 2], {}, () => {}, Symbol("s"), new Map(), new Set(), new Date(NaN), [null], [{}]]);
  }
  return Object.fromEntries(NAMES.filter(() => random() < 0.5).map((name) => [name, right(name)]));
}

process.chdir(mkdtempSync(join(folder, "place-")));
const doors = await Promise.all(
  Object.values(packageJson.exports).map((path) => import(new URL(`../${path}`, import.meta.url).href)),
) as Record<string, unknown>[];
const { openKernels, openCheckpoint, quantize, emptyMoments, accumulateMoment, factorMoments } =
  doors[0] as never as typeof import("../mod.ts");
const { DEFAULT_CONFIG, loadModel, loadTokenizer, loadScheduler } =
  doors[0] as never as typeof import("../mod.ts");
const kernels = await openKernels({ backend, threads: 1 }),
  closed = await openKernels({ backend, threads: 1 });
closed.close();
const rows = 8, cols = 64;
const floats = (n: number) => {
  const array = between(Float32Array, n) as Float32Array<ArrayBuffer>;
  for (let i = 0; i < n; i++) array[i] = Math.sin(i * i);
  return array;
};
const weights = { data: floats(rows * cols), dtype: "F32" as const };
const packed = quantize(kernels, weights, rows, cols, { bits: 2, groupSize: 16 });
const moments = emptyMoments(cols);
accumulateMoment(kernels, floats(80 * cols), undefined, undefined, 80, moments.second);
moments.tokens = moments.weight = 80;
const moment = factorMoments(kernels, moments);
const dream = loadModel(join(models, "dream-mini"), kernels).model,
  dit = loadModel(join(models, "glyph-dit"), kernels).model;
const { tableFromRows } = doors[6] as never as typeof import("../lib/analysis/mod.ts");
const { equalTimeGroups, timestepAxis } = doors[1] as never as typeof import("../lib/time/mod.ts");
const checkpoint = openCheckpoint(join(models, "dream-mini"));
const table = await tableFromRows("drift", [{
  model: "m",
  setting: "2 clip",
  step: 1,
  relativeDistance: 0.1,
}]);

/** Values that fit, by the name of a parameter or a field. */
const RIGHT: Readonly<Record<string, () => unknown>> = {
  kernels: () => one([kernels, kernels, kernels, kernels, closed]),
  weights: () => one<unknown>([weights, weights.data]),
  data: () => weights.data,
  tensor: () => packed,
  quantized: () => packed,
  moments: () => one<unknown>([moments, [moments]]),
  moment: () => moment,
  problem: () => ({ weights: weights.data, rows, cols, moment, bits: 2, groupSize: 16, zeroPoint: "real" }),
  checkpoint: () => checkpoint,
  model: () => one<unknown>([dream, dit]),
  full: () => dit,
  other: () => dit,
  table: () => table,
  groups: () => equalTimeGroups(timestepAxis(100), 4),
  path: () => join(models, "dream-mini"),
  folder: () => join(models, "dream-mini"),
  config: () => ({ ...DEFAULT_CONFIG, solver: "clip" }),
  name: () => "drift",
  x: () => floats(80 * cols),
  out: () => between(Float32Array, cols * cols),
  settings: () => undefined,
  options: () => ({}),
  canvas: () => Int32Array.from({ length: 12 }, () => 1),
  ...Object.fromEntries(
    Object.entries({ rows, cols, bits: 2, groupSize: 16, tokens: 80, batch: 1, steps: 2, n: 4 })
      .map(([name, value]) => [name, () => value]),
  ),
};
const NAMES = [
  ...Object.keys(RIGHT),
  "scale",
  "zeroPoint",
  "second",
  "factor",
  "order",
  "pivots",
  "labels",
  "length",
];
const right = (name: string): unknown =>
  random() < 0.8 && Object.hasOwn(RIGHT, name) ? RIGHT[name]!() : wrong();

/** An argument of a parameter: what fits, what fits but for one field, or something else. */
function argument(name: string): unknown {
  const fitting = Object.hasOwn(RIGHT, name) ? RIGHT[name]!() : undefined, kind = random();
  if (fitting === undefined || kind < 0.3) return wrong();
  const keys = typeof fitting === "object" && fitting !== null ? Object.keys(fitting) : [];
  if (kind > 0.65 || keys.length === 0 || ArrayBuffer.isView(fitting) || name === "kernels") return fitting;
  const key = one(keys), turns = [wrong(), (fitting as Record<string, unknown>)[key]];
  let reads = 0;
  return Object.defineProperty({ ...fitting }, key, {
    get: () => turns[kind < 0.5 ? 0 : reads++ % 2],
    enumerable: true,
  });
}

/** Calls that work on purpose for as long, or write where, they are told to. */
const LEFT_OUT = /^(run|loadAnalysis|openKernels|resetPeakResident|dispose|close)$/;
const untyped: string[] = [];
let made = 0;

async function tryCall(name: string, fn: (...args: unknown[]) => unknown) {
  const names =
    /^[^(]*\(([^]*?)\)\s*(?:=>|\{)/.exec(String(fn))?.[1]?.split(",").map((text) =>
      /\w+/.exec(text)?.[0] ?? ""
    ) ?? [];
  for (let i = 0; i < Number(calls); i++) {
    guarded.length = 0;
    const args = names.concat(random() < 0.1 ? ["more"] : []).map(argument);
    made++;
    writeFileSync(join(folder, "last"), `${name} ${i}`);
    try {
      const result = await fn(...args) as { next?: () => unknown } | undefined;
      if (typeof result?.next === "function") await result.next();
    } catch (error) {
      const code = (error as { code?: unknown } | undefined)?.code;
      // an array of big integers does not take the language's texts and numbers, and says so by a SyntaxError
      const isBigInt = error instanceof SyntaxError && /BigInt/.test(error.message);
      const isTyped = isBigInt || error instanceof TypeError || error instanceof RangeError ||
        String(code).startsWith("AQ_");
      if (!isTyped && !untyped.some((text) => text.startsWith(`${name}: `))) {
        untyped.push(`${name}: ${error}`);
      }
    }
    for (const { whole, begin, end } of guarded) {
      const isWhole = [whole.subarray(0, begin), whole.subarray(end)].every((part) =>
        Buffer.compare(part, CANARY.subarray(0, part.length)) === 0
      );
      if (!isWhole) throw new Error(`${name} wrote outside an array`);
    }
  }
}

/** Functions behind a value: itself, or the methods and accessors of what it is an instance of. */
function methodsOf(value: object): [string, (...args: unknown[]) => unknown][] {
  const found = new Map<string, (...args: unknown[]) => unknown>();
  for (
    let at: object | null = value;
    at !== null && at !== Object.prototype && at !== Function.prototype;
    at = Object.getPrototypeOf(at)
  ) {
    for (const [key, { value: own }] of Object.entries(Object.getOwnPropertyDescriptors(at))) {
      if (typeof own === "function" && key !== "constructor" && !found.has(key)) {
        const method = (...args: unknown[]) => own.apply(value, args);
        Object.defineProperty(method, "toString", { value: () => String(own) });
        found.set(key, method);
      }
    }
  }
  return [...found];
}

const isClass = (value: unknown): value is new (...args: unknown[]) => object =>
  typeof value === "function" && String(value).startsWith("class");
const tokenizer = await loadTokenizer(join(models, "dream-mini")),
  scheduler = loadScheduler(join(models, "glyph-dit"));
const instances = {
  kernels,
  tokenizer,
  scheduler,
  dream,
  dit,
  checkpoint,
  groups: RIGHT["groups"]!() as object,
};
for (const door of doors) {
  for (const [name, value] of Object.entries(door)) {
    if (LEFT_OUT.test(name)) continue;
    if (isClass(value)) {
      const make = (...args: unknown[]) => {
        const made = new value(...args);
        if (!(made instanceof Error)) {
          for (const [key, method] of methodsOf(made)) LEFT_OUT.test(key) || void method(wrong(), wrong());
        }
      };
      Object.defineProperty(make, "toString", {
        value: () => /constructor\([^]*?\)\s*\{/.exec(String(value))?.[0] ?? "() {",
      });
      await tryCall(`new ${name}`, make);
      for (const [key, method] of methodsOf(value)) {
        if (!LEFT_OUT.test(key)) await tryCall(`${name}.${key}`, method);
      }
    } else if (typeof value === "function") await tryCall(name, value as never);
  }
}
for (const [name, instance] of Object.entries(instances)) {
  for (const [key, method] of methodsOf(instance)) {
    if (!LEFT_OUT.test(key)) await tryCall(`${name}.${key}`, method);
  }
}
console.log(JSON.stringify({ made, untyped }));
