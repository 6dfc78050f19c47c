import { expect, test } from "bun:test";
import * as call from "../../lib/native/functions.ts";
import { SIGNATURES } from "../../lib/native/signatures.ts";
import { type Kernels, openKernels } from "../../mod.ts";
import { allKernels, randomStream } from "../_kernels.ts";

/** Sizes that fit each other in every kernel, and a few that are odd. */
const NUMBERS: Readonly<Record<string, readonly number[]>> = {
  rows: [1, 3, 8],
  cols: [8, 40, 300],
  n: [1, 7, 40],
  tokens: [1, 4],
  batch: [0, 1, 2],
  bits: [2, 3, 4, 8],
  groupSize: [16, 32],
  scaleBits: [4, 6],
  heads: [4],
  kvHeads: [2, 4],
  headSize: [4, 8],
  channels: [2, 5],
  height: [4],
  width: [6],
  patch: [2],
  stride: [300, 310],
  theta: [10000],
  maxPeriod: [10000],
  ratio: [0.8],
  rounds: [0, 1],
  step: [1],
  beta1: [0.9],
  beta2: [0.9],
  epsilon: [1e-5],
  zeroPointKind: [0],
  dtype: [0, 1],
  inDtype: [0, 4],
  outDtype: [0, 1],
  aDtype: [0, 2],
  bDtype: [0, 1],
};
const ARRAYS = {
  any: Uint8Array,
  u8: Uint8Array,
  u16: Uint16Array,
  u32: Uint32Array,
  u64: BigUint64Array,
  i32: Int32Array,
  f32: Float32Array,
  f64: Float64Array,
} as const;
type View = InstanceType<(typeof ARRAYS)[keyof typeof ARRAYS]>;

const MARGIN = 4096;

interface Argument {
  readonly name: string;
  readonly kind: string;
}

/** The arguments of a function behind `kernels` and `doing`, by its text and its signature. */
function argumentsOf(name: string, fn: (...args: never[]) => void): Argument[] {
  const names = /^\(([^)]*)\)/.exec(String(fn))![1]!.split(",").map((text) =>
    text.trim().split(":")[0]!.trim()
  )
    .slice(2);
  const symbol = `aq_${name.replace(/[A-Z0-9]/g, (c) => /\d/.test(c) ? c : `_${c.toLowerCase()}`)}`;
  const kinds = (SIGNATURES as Readonly<Record<string, string>>)[symbol]!.split(" ");
  return names.map((name, i) => ({ name, kind: kinds[i]! }));
}

/** Fills an array as a kernel likes it: small values, a permutation, indices. */
function fill(name: string, array: View, random: () => number): void {
  for (let i = 0; i < array.length; i++) {
    const value = name === "order"
      ? array.length - 1 - i
      : /scale|pivots/.test(name)
      ? 1
      : Math.floor(3 * random());
    if (array instanceof BigUint64Array) array[i] = BigInt(value);
    else array[i] = value;
  }
  const side = Math.sqrt(array.length);
  // a moment and its factor: the unit matrix is both
  if (name === "m") { for (let i = 0; i < array.length; i++) array[i] = i % (side + 1) === 0 ? 1 : 0; }
}

/** The least length that the function takes for an argument, by what it says when there is none. */
function wanted(run: (empty: View) => void, empty: View): number {
  try {
    run(empty);
    return 0;
  } catch (error) {
    const [, least] = /must have at least (\d+)/.exec(String(error)) ?? [];
    return least === undefined ? 0 : Number(least);
  }
}

/** Calls a function with arrays of the least lengths inside larger ones, and gives all the bytes afterwards. */
function callTight(kernels: Kernels, name: keyof typeof call, seed: number, around: number) {
  const fn = call[name] as unknown as (kernels: Kernels, doing: string, ...args: unknown[]) => void;
  const random = randomStream(seed);
  const list = argumentsOf(name, fn);
  const args: unknown[] = list.map(({ name, kind }) =>
    kind.includes(":") ? null : (NUMBERS[name] ?? [0])[Math.floor(random() * (NUMBERS[name] ?? [0]).length)]
  );
  const wholes: Uint8Array[] = [], parts: [number, number][] = [];
  list.forEach(({ name, kind }, i) => {
    const element = kind.split(":")[1] as keyof typeof ARRAYS | undefined;
    if (element === undefined) return;
    const Type = ARRAYS[element];
    const length = wanted((empty) => fn(kernels, "try", ...args.with(i, empty)), new Type(0));
    const whole = new Uint8Array(2 * MARGIN + length * Type.BYTES_PER_ELEMENT).fill(around);
    const part = new Type(whole.buffer as ArrayBuffer, MARGIN, length);
    fill(name, part, random);
    args[i] = part;
    wholes.push(whole);
    parts.push([MARGIN, MARGIN + part.byteLength]);
  });
  let outcome = "done";
  try {
    fn(kernels, "try", ...args);
  } catch (error) {
    outcome = String(error);
  }
  const outside = wholes.every((whole, i) => {
    const [begin, end] = parts[i]!;
    return whole.every((byte, at) => (at >= begin && at < end) || byte === around);
  });
  const inside = wholes.map((whole, i) => whole.slice(...parts[i]!).join());
  return { outcome, outside, inside: inside.join(";") };
}

for (const { name: opened, kernels } of await allKernels()) {
  test(`${opened}: arrays of exactly the lengths that the checks ask for are all that is touched`, () => {
    let done = 0;
    const names = Object.keys(call) as (keyof typeof call)[];
    for (const name of names) {
      for (let seed = 1; seed <= 4; seed++) {
        const zeros = callTight(kernels, name, seed, 0), ones = callTight(kernels, name, seed, 0xff);
        const { outcome, outside } = zeros;
        expect({ name, seed, outcome, outside, again: ones.outside }).toEqual(
          { name, seed, outcome: ones.outcome, outside: true, again: true },
        );
        if (outcome !== "done") continue;
        done++;
        // what lies around the arrays makes no difference: nothing of it was read
        if (ones.inside !== zeros.inside) throw new Error(`${name}, seed ${seed}: read what lies outside`);
      }
    }
    expect(done).toBeGreaterThan(3 * names.length);
  });
}

test("what an array says of itself is not believed", async () => {
  using kernels = await openKernels({ threads: 1 });
  const x = Float32Array.of(1, 2), short = new Float32Array(1);
  for (
    const lie of [
      Object.defineProperty(short, "length", { value: 2 }),
      Object.create(Float32Array.prototype),
      new Proxy(x, {}),
      new (class extends Float32Array {
        override get length() {
          return 2;
        }
      })(1),
      new Float32Array(new SharedArrayBuffer(8)).subarray(1),
    ]
  ) expect(() => call.add(kernels, "add", x, x, 2, lie)).toThrow(TypeError);
  const gone = new Float32Array(2);
  structuredClone(gone.buffer, { transfer: [gone.buffer] });
  expect(() => call.add(kernels, "add", x, x, 2, gone)).toThrow(/at least 2 elements, got 0/);
  for (const n of [NaN, -1, 1.5, Infinity, 2 ** 53, "2", 2n]) {
    expect(() => call.add(kernels, "add", x, x, n as never, x)).toThrow(RangeError);
  }
  for (const bits of [NaN, 2.5, 2 ** 32 + 2, 8 - 2 ** 32, "2"]) {
    const run = () =>
      call.packCodes(kernels, "pack", new Uint8Array(8), 1, 8, bits as never, new Uint32Array(1));
    expect(run).toThrow(TypeError);
  }
});
