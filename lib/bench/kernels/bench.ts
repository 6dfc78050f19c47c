/** Common to all groups of the kernel suite: input, checks and timing together, rows, tables and goals. */
import { type Kernels, withThreads } from "../../native/mod.ts";
import type { Ggml } from "../ggml.ts";
import { convertInto, type KernelCase, Operands } from "./cases.ts";
import { gaussianWeights } from "../random.ts";
import { collectGarbage } from "../../eval/environment.ts";
import { spreadPercent, type Summary } from "../../eval/statistics.ts";
import type { BenchContext, Goal, Section, Skipped } from "../suite.ts";
import type { Column } from "../../eval/table.ts";
import { rate, speedRatio, timeInterleaved, type Timing, type TimingOptions } from "../timing.ts";

/** Row length of every matrix here: a multiple of each group size and of ggml's blocks of 256. */
export const COLS = 4096;

/** Sizes of the matrices, in rows, and how long each is timed. */
export interface KernelScale {
  readonly inCacheRows: number;
  readonly fromMemoryRows: number;
  /** Of the matrices that threads share. */
  readonly threadedRows: number;
  /** Side of the large square product. */
  readonly productSide: number;
  /** Of the matrices that are multiplied by one vector. */
  readonly vectorRows: number;
  /** Of the weights that calls in cache take one part after the other. */
  readonly poolRows: number;
  readonly inCache: TimingOptions;
  readonly fromMemory: TimingOptions;
  /** Engines compile WebAssembly again after a while; before that the first compilation is timed. */
  readonly wasmWarmUpMilliseconds: number;
  /** Pause before the samples: an engine's own threads finish, and a signal gets in. */
  readonly settleMilliseconds: number;
}

/** For a report. */
export const FULL_SCALE: KernelScale = {
  inCacheRows: 16, // 256 KiB of float32: in a second-level cache with its output
  fromMemoryRows: 4096, // 64 MiB: larger than the last-level cache of most processors
  threadedRows: 256, // 4 MiB: enough work for a thread to be worth starting
  productSide: 1024,
  vectorRows: 16384, // 256 MiB of float32, and 16 MiB at 2 bits: all of a group's are read between a row's two samples
  poolRows: 1024, // 16 MiB: a processor that meets a number again after so many has forgotten it
  inCache: { samples: 25, warmUpMilliseconds: 150, sampleMilliseconds: 4 },
  fromMemory: { samples: 9, warmUpMilliseconds: 100, sampleMilliseconds: 1 },
  wasmWarmUpMilliseconds: 1500,
  settleMilliseconds: 100,
};

/** For a look. */
export const QUICK_SCALE: KernelScale = {
  ...FULL_SCALE,
  productSide: 512,
  vectorRows: 4096,
  inCache: { samples: 7, warmUpMilliseconds: 30, sampleMilliseconds: 2 },
  fromMemory: { samples: 3, warmUpMilliseconds: 1, sampleMilliseconds: 1 },
  wasmWarmUpMilliseconds: 300,
  settleMilliseconds: 0,
};

export const NO_GGML = "ggml is not there";

interface Measured {
  readonly of: KernelCase;
  readonly timing: Timing;
  readonly place: Place;
}

export type Place = "in cache" | "from memory";

/** A ratio of two rows of a group, by name: `of` is so many times as fast as `to`. */
export interface RatioOf {
  readonly of: string;
  readonly to: string;
  /** Short for `to` in the table; default without what all of ggml's names have in common. */
  readonly label?: string;
}

/** Rows that were timed together. */
export class Group {
  readonly measured = new Map<string, Measured>();

  constructor(
    readonly title: string,
    readonly place: Place,
    readonly ratios: readonly RatioOf[] = [],
    /** Unit of the `weights` of a call: weights, or multiply-adds of a product. */
    readonly counts: "weights" | "multiply-adds" = "weights",
  ) {}

  /** How many times as many weights a second, undefined where one of the two was left out. */
  speed(of: string, to: string): Summary | undefined {
    const a = this.measured.get(of), b = this.measured.get(to);
    return a && b && speedRatio(a.timing, b.timing, a.of.weights, b.of.weights);
  }

  bytesAgainstMemcpy(of: string): Summary | undefined {
    const a = this.measured.get(of), b = this.measured.get("memcpy");
    return a && b && speedRatio(a.timing, b.timing, a.of.bytes, b.of.bytes);
  }
}

/** A row of the JSON report: a timed call, or a format's error. */
export type KernelRow =
  & { readonly suite: "kernels"; readonly group: string; readonly kernel: string }
  & { readonly library: string; readonly backend: string }
  & Partial<{
    readonly isa: string;
    readonly dtype: string;
    readonly shape: readonly [rows: number, cols: number];
    readonly place: Place;
    readonly threads: number;
    readonly runtime: string;
    readonly processor: string;
    readonly samples: number;
    readonly callsPerSample: number;
    readonly bytesPerCall: number;
    readonly bytesPerSecond: Summary;
    readonly weightsPerSecond: Summary | null;
    readonly multiplyAddsPerSecond: Summary | null;
    readonly bytesAgainstMemcpy: Summary | null;
    readonly ratios: readonly (Summary & { readonly to: string })[];
    readonly bitsPerWeight: number;
    readonly relativeRmsError: number;
  }>;

const COLUMNS: readonly Column[] = [
  { key: "name", title: "kernel" },
  { key: "isa", title: "isa" },
  { key: "rate", title: "Mw/s", digits: 0, align: "right" },
  { key: "gigaflops", title: "GFLOP/s", digits: 1, align: "right" },
  { key: "spread", title: "±%", digits: 1, align: "right" },
  { key: "bytes", title: "GB/s", digits: 1, align: "right" },
  { key: "memcpy", title: "× memcpy", digits: 2, align: "right" },
  { key: "ratios", title: "speed against", align: "left" },
];
/** Columns that a table of weights or of multiply-adds does without. */
const LEFT_OUT = { "weights": ["gigaflops"], "multiply-adds": ["rate", "memcpy"] };

const shortName = (name: string) => name.replace(/^ggml (quantize_row_|quantize_|dequantize_row_)?/, "");

function weightPools(kernels: Kernels, count: number, seed: number) {
  const F32 = gaussianWeights(count, seed), BF16 = new Uint16Array(count);
  convertInto(kernels, F32, "F32", BF16, "BF16");
  return { F32, BF16 };
}

export class KernelBench {
  readonly sections: Section[] = [];
  readonly rows: KernelRow[] = [];
  readonly skipped: Skipped[] = [];
  readonly goals: Goal[] = [];
  /** With one thread. */
  readonly kernels: Kernels;
  readonly #pools = new Map<number, ReturnType<typeof weightPools>>();

  constructor(readonly context: BenchContext, readonly ggml: Ggml | undefined, readonly scale: KernelScale) {
    this.kernels = withThreads(context.kernels, 1);
  }

  /** Input for matrices of so many rows: several times as much, unless that is in memory anyway. */
  operands(rows: number): Operands {
    const count = Math.max(rows, this.scale.poolRows) * COLS;
    const pools = this.#pools.get(count) ??
      weightPools(this.kernels, count, this.context.options.seed);
    this.#pools.set(count, pools);
    return new Operands(this.kernels, rows, COLS, pools);
  }

  weights(rows: number): Float32Array<ArrayBuffer> {
    return gaussianWeights(rows * COLS, this.context.options.seed);
  }

  /** Checks and times the cases together and adds their rows and their table. */
  async measure(group: Group, cases: readonly KernelCase[], notes: readonly string[] = []): Promise<Group> {
    this.context.progress(`${group.title}, ${group.place}: ${cases.length} rows`);
    for (const each of cases) each.check();
    await collectGarbage(); // of the last group: later it would take a core from the samples
    await new Promise((resolve) => setTimeout(resolve, this.scale.settleMilliseconds));
    const timings = timeInterleaved(
      cases.map(({ contender, backend }) => ({
        ...contender,
        warmUpMilliseconds: backend === "wasm" ? this.scale.wasmWarmUpMilliseconds : undefined,
      })),
      group.place === "in cache" ? this.scale.inCache : this.scale.fromMemory,
    );
    cases.forEach((of, i) => group.measured.set(of.name, { of, timing: timings[i]!, place: group.place }));
    const [rows, cols] = cases[0]!.shape;
    this.sections.push({
      title: `${group.title}, ${group.place} (${rows} × ${cols})`,
      notes,
      columns: COLUMNS.filter(({ key }) => !LEFT_OUT[group.counts].includes(key)),
      rows: cases.map((each, i) => this.#row(group, each, timings[i]!)),
    });
    return group;
  }

  #row(group: Group, of: KernelCase, timing: Timing) {
    const bytes = rate(timing, of.bytes), pace = rate(timing, 1);
    const weights = of.weights === 0 ? undefined : rate(timing, of.weights);
    const memcpy = of.library === "memcpy" ? undefined : group.bytesAgainstMemcpy(of.name);
    const ratios = group.ratios.filter((ratio) => ratio.of === of.name).flatMap(({ to, label }) => {
      const speed = group.speed(of.name, to);
      return speed === undefined ? [] : [{ to, label: label ?? shortName(to), ...speed }];
    });
    const { runtime, processor } = this.context.environment;
    const { name: kernel, library, backend, isa, dtype, shape, threads } = of;
    this.rows.push({
      suite: "kernels",
      group: group.title,
      ...{ kernel, library, backend, isa, dtype, shape, place: group.place, threads, runtime, processor },
      samples: timing.milliseconds.length,
      callsPerSample: timing.callsPerSample,
      bytesPerCall: of.bytes,
      bytesPerSecond: bytes,
      weightsPerSecond: group.counts === "weights" ? weights ?? null : null,
      multiplyAddsPerSecond: group.counts === "weights" ? null : weights ?? null,
      bytesAgainstMemcpy: memcpy ?? null,
      ratios: ratios.map(({ label: _, ...ratio }) => ratio),
    });
    return {
      name: of.name,
      isa: of.backend === "wasm" ? `wasm ${of.isa}` : of.isa,
      rate: weights && weights.median / 1e6,
      gigaflops: weights && 2 * weights.median / 1e9,
      spread: spreadPercent(pace),
      bytes: of.bytes === 0 ? undefined : bytes.median / 1e9,
      memcpy: memcpy?.median,
      ratios: ratios.map(({ label, median }) => `${median.toFixed(2)} ${label}`).join(", "),
    };
  }

  /** A goal on ratios, one for each place: met when every one that was measured is at least `least`. */
  ratioGoal(
    goal: string,
    least: number,
    ratios: readonly [label: string, ratio: Summary | undefined][],
    reason: string,
  ): void {
    const found = ratios.filter((entry): entry is [string, Summary] => entry[1] !== undefined);
    const wanted = `≥ ${least} ×`;
    const measured = found.map(([label, { median }]) => `${median.toFixed(2)} ${label}`.trim()).join(", ");
    this.goals.push(
      found.length === 0
        ? { goal, wanted, measured: null, met: null, reason }
        : { goal, wanted, measured, met: found.every(([, { median }]) => median >= least) },
    );
  }
}
