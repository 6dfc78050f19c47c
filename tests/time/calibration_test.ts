import { afterAll, describe, expect, test } from "bun:test";
import { cpSync, existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { CalibrationError, FormatError, InterruptedError, OutputError } from "../../lib/errors.ts";
import { openKernels, withThreads } from "../../lib/native/mod.ts";
import { quantizeCheckpoint, type QuantizeCheckpointOptions, type RunEvent } from "../../lib/pipeline/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import {
  type CalibrationRun,
  CalibrationStatistics,
  equalTimeGroups,
  isCalibrationStatistics,
  maskRatioAxis,
  modelFingerprint,
  readCalibrationStatistics,
  type SecondMoments,
  type TimeGroups,
  timestepAxis,
  writeCalibrationStatistics,
} from "../../lib/time/mod.ts";
import { contents, MODELS, rejection, run as runScript, workplace } from "../_checkpoints.ts";
import { ditCheckpoint, store } from "../_models.ts";
import { gaussians, randomStream } from "../_kernels.ts";
import { fileBytes, thrown } from "../tensor/_files.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

const DREAM = join(MODELS, "dream-mini"), DIT = join(MODELS, "glyph-dit");
const DATA = join(DREAM, "calibration.jsonl");
const GROUPS = equalTimeGroups(maskRatioAxis(100), 3);
const COLS = 7, LONG = 13;

const runOf = (identity: string): CalibrationRun => ({
  identity,
  source: `data ${identity}`,
  isSynthetic: false,
  samples: 5,
});

function empty(
  { second = "groups", groups = GROUPS, fingerprint = "model", identity = "a" }: {
    second?: SecondMoments;
    groups?: TimeGroups;
    fingerprint?: string;
    identity?: string;
  } = {},
): CalibrationStatistics {
  return new CalibrationStatistics({
    fingerprint,
    groups,
    second,
    runs: [runOf(identity)],
    inputs: new Map([
      ["q.weight", { cols: COLS, layers: ["q.weight", "k.weight"] }],
      ["time.weight", { cols: LONG, layers: ["time.weight"] }],
    ]),
  });
}

/** A batch whose samples have different times: rows of positions for one input, a row a sample for the other. */
interface Batch {
  readonly times: number[];
  readonly rows: number;
  readonly x: Float32Array<ArrayBuffer>;
  readonly weights: Float32Array<ArrayBuffer>;
  readonly perSample: Float32Array<ArrayBuffer>;
}

function batches(seed: number, count = 4): Batch[] {
  const random = randomStream(seed);
  return Array.from({ length: count }, (_, i) => {
    const samples = 3 + i % 3, positions = 4, rows = samples * positions;
    return {
      times: Array.from({ length: samples }, () => Math.max(1e-3, random())),
      rows,
      x: gaussians(seed * 100 + i, rows * COLS).map((value, k) => (value + k % COLS) * (1 + i)),
      weights: Float32Array.from({ length: rows }, () => random() < 0.5 ? 1 : 0.3),
      perSample: gaussians(seed * 100 + 50 + i, samples * LONG),
    };
  });
}

function addAll(
  statistics: CalibrationStatistics,
  all: readonly Batch[],
  threads = 1,
): CalibrationStatistics {
  for (const { times, rows, x, weights, perSample } of all) {
    statistics.add(withThreads(kernels, threads), "q.weight", x, rows, { times, weights });
    statistics.add(withThreads(kernels, threads), "time.weight", perSample, times.length, { times });
  }
  return statistics;
}

/** Sums of one group, all in float64, row by row. */
function reference(all: readonly Batch[], wanted: (group: number) => boolean) {
  let weight = 0, tokens = 0, samples = 0;
  const sum = new Float64Array(COLS), second = new Float64Array(COLS * COLS), values: number[] = [];
  for (const { times, rows, x, weights } of all) {
    for (const [sample, time] of times.entries()) {
      if (!wanted(GROUPS.groupOf(time))) continue;
      samples++;
      const each = rows / times.length;
      for (let row = sample * each; row < (sample + 1) * each; row++) {
        const own = x.subarray(row * COLS, (row + 1) * COLS), w = weights[row]!;
        tokens++;
        weight += w;
        for (let i = 0; i < COLS; i++) {
          values.push(own[i]!);
          sum[i]! += w * own[i]!;
          for (let j = 0; j < COLS; j++) second[i * COLS + j]! += w * own[i]! * own[j]!;
        }
      }
    }
  }
  return { weight, tokens, samples, sum, second, values: Float64Array.from(values).sort() };
}

/** Largest difference, relative to the largest of the wanted. */
function distance(got: ArrayLike<number>, wanted: ArrayLike<number>): number {
  expect(got.length).toBe(wanted.length);
  let error = 0, size = 1e-30;
  for (let i = 0; i < wanted.length; i++) {
    error = Math.max(error, Math.abs(got[i]! - wanted[i]!));
    size = Math.max(size, Math.abs(wanted[i]!));
  }
  return error / size;
}

/** Everything that statistics hold, as text. */
function held({ fingerprint, second, runs, inputs, groups }: CalibrationStatistics): string {
  return JSON.stringify([fingerprint, second, runs, groups.axis.kind, groups.axis.bins, [
    ...groups.boundaries,
  ]]) +
    [...inputs].map(([name, input]) =>
      name + JSON.stringify([
        input.layers,
        ...[input.weight, input.tokens, input.samples, input.sum, input.second ?? [], input.groupSecond ?? []]
          .map((
            values,
          ) => [...values]),
        input.histograms.map(({ state }) => [state.minimum, state.maximum, state.reach, [...state.counts]]),
      ])
    ).join();
}

describe("collecting", () => {
  const all = batches(1), statistics = addAll(empty(), all);

  test("sums over all times and of each group equal float64 sums of the rows whose time is in it", () => {
    for (let group = 0; group < GROUPS.count; group++) {
      const wanted = reference(all, (each) => each === group);
      expect(wanted.tokens).toBeGreaterThan(0);
      const { weight, tokens, samples, sum } = statistics.inputOf("q.weight");
      expect([tokens[group], samples[group]]).toEqual([wanted.tokens, wanted.samples]);
      expect(Math.abs(weight[group]! - wanted.weight)).toBeLessThan(1e-12 * wanted.weight);
      expect(distance(sum.subarray(group * COLS, (group + 1) * COLS), wanted.sum)).toBeLessThan(1e-13);
      const { mean, second, samples: independent } = statistics.groupMoments("k.weight", group);
      expect(independent).toBe(wanted.samples);
      expect(distance(mean, wanted.sum.map((value) => value / wanted.weight))).toBeLessThan(1e-7);
      expect(distance(second, wanted.second.map((value) => value / wanted.weight))).toBeLessThan(1e-6);
    }
    const total = reference(all, () => true), moments = statistics.moments("k.weight");
    expect(moments.tokens).toBe(total.tokens);
    expect(Math.abs(moments.weight - total.weight)).toBeLessThan(1e-12 * total.weight);
    expect(distance(moments.second, total.second)).toBeLessThan(1e-6);
  });

  test("minimum and maximum are exact, quantiles right to two bins", () => {
    for (let group = 0; group < GROUPS.count; group++) {
      const { values } = reference(all, (each) => each === group);
      const histogram = statistics.histogram("q.weight", group), { reach } = histogram.state;
      expect([histogram.quantile(0), histogram.quantile(1)]).toEqual([values[0]!, values.at(-1)!]);
      for (const share of [0.1, 0.5, 0.9]) {
        const at = share * values.length, width = 2 * 2 * reach / 2048;
        expect(histogram.quantile(share)).toBeGreaterThanOrEqual(values[Math.floor(at) - 1]! - width);
        expect(histogram.quantile(share)).toBeLessThanOrEqual(values[Math.ceil(at)]! + width);
      }
    }
  });

  test("the same to the bit for any number of threads", () => {
    expect(held(addAll(empty(), all, 2))).toBe(held(statistics));
  });

  test("a row a sample, and no second moments where none are kept", () => {
    const { tokens, samples } = statistics.inputOf("time.weight");
    expect([...tokens]).toEqual([...samples]);
    const few = addAll(empty({ second: "none" }), all);
    expect(thrown(() => few.moments("q.weight"))).toBeInstanceOf(CalibrationError);
    expect(few.mean("q.weight", 0)).toEqual(statistics.mean("q.weight", 0));
    const total = addAll(empty({ second: "total" }), all);
    expect(total.moments("q.weight").second).toEqual(statistics.moments("q.weight").second);
    expect(thrown(() => total.groupMoments("q.weight", 0)).message).toMatch(
      /second moments for each time group, got none/,
    );
    expect(thrown(() => total.inputOf("v.weight")).message).toMatch(/"v\.weight": they must have its input/);
  });

  test("NaN, other shapes and times outside the axis are refused, and nothing is added", () => {
    const own = addAll(empty(), all), before = held(own), [{ times, rows, x, weights }] = all as [Batch];
    const broken = x.slice();
    broken[10] = NaN;
    const add = (x: Float32Array, rows: number, times: number[], weights?: Float32Array) =>
      thrown(() => own.add(kernels, "q.weight", x, rows, { times, weights }));
    expect(add(broken, rows, times, weights)).toBeInstanceOf(CalibrationError);
    expect(add(broken, rows, times, weights).message).toMatch(/must be finite, got NaN in column 3/);
    expect(add(x.subarray(1), rows, times)).toBeInstanceOf(TypeError);
    expect(add(x, rows, [...times, 0.5, 0.5])).toBeInstanceOf(TypeError);
    expect(add(x, rows, times, weights.subarray(1))).toBeInstanceOf(TypeError);
    expect(add(x, rows, times.map(() => 1.5))).toBeInstanceOf(RangeError);
    expect(held(own)).toBe(before);
  });

  test("too large statistics are refused before any memory is taken", () => {
    const inputs = new Map([["a", { cols: 65_536, layers: ["a"] }]]);
    const error = thrown(() =>
      new CalibrationStatistics({ fingerprint: "m", groups: GROUPS, inputs, runs: [runOf("a")] })
    );
    expect(error).toBeInstanceOf(CalibrationError);
    expect(error.message).toMatch(/must fit 17179869184 bytes, got 17\d{9}/);
  });
});

describe("merging", () => {
  const first = batches(2), later = batches(3);

  test("two runs give what one run over both gives: counts exactly, sums to rounding", () => {
    const merged = addAll(empty(), first).merge(addAll(empty({ identity: "b" }), later));
    const both = addAll(empty(), [...first, ...later]);
    expect(merged.samples).toBe(10);
    expect(merged.source).toBe("data a; data b");
    for (const [name, input] of both.inputs) {
      const own = merged.inputs.get(name)!;
      expect(own.tokens).toEqual(input.tokens);
      expect(own.samples).toEqual(input.samples);
      expect(distance(own.weight, input.weight)).toBeLessThan(1e-13);
      expect(distance(own.sum, input.sum)).toBeLessThan(1e-13);
      expect(distance(own.second!, input.second!)).toBeLessThan(1e-6);
      expect(distance(own.groupSecond!, input.groupSecond!)).toBeLessThan(1e-6);
      expect(own.histograms.map(({ state }) => state)).toEqual(input.histograms.map(({ state }) => state));
    }
  });

  test("another model, other groups, other moments and the same run twice are refused", () => {
    const own = addAll(empty(), first), before = held(own);
    const cases: [CalibrationStatistics, RegExp][] = [
      [empty({ identity: "b", fingerprint: "other" }), /of one model/],
      [
        empty({ identity: "b", groups: equalTimeGroups(maskRatioAxis(100), 4) }),
        /the same time groups, got 3 .* and 4/,
      ],
      [
        empty({ identity: "b", groups: equalTimeGroups(timestepAxis(100), 3) }),
        /mask_ratio bins and 3 of 100 timesteps/,
      ],
      [empty({ identity: "b", second: "total" }), /second moments, got groups and total/],
      [empty(), /the same run twice: data a/],
    ];
    for (const [other, message] of cases) {
      const error = thrown(() => own.merge(other));
      expect(error).toBeInstanceOf(CalibrationError);
      expect(error.message).toMatch(message);
    }
    expect(held(own)).toBe(before);
  });

  test("layers of which there are none are named", () => {
    const lacking = new CalibrationStatistics({
      fingerprint: "model",
      groups: GROUPS,
      second: "groups",
      runs: [runOf("b")],
      inputs: new Map([["q.weight", { cols: COLS, layers: ["q.weight"] }]]),
    });
    const missing = thrown(() => lacking.checkLayers(["q.weight", "k.weight", "time.weight"]));
    expect(missing).toBeInstanceOf(CalibrationError);
    expect(missing.message).toContain('got none of "k.weight", "time.weight"');
    const message = 'the same layers, got "k.weight", "time.weight" in one of them';
    expect(thrown(() => addAll(empty(), first).merge(lacking)).message).toContain(message);
  });
});

describe("files", () => {
  const statistics = addAll(empty(), batches(4));
  const save = (own = statistics, partsDone?: number) => {
    const path = `${place.fresh("statistics")}.safetensors`;
    writeCalibrationStatistics(path, own, partsDone);
    return path;
  };
  const read = (path: string, fingerprint = "model") => readCalibrationStatistics(path, { fingerprint });

  test("what is saved comes back to the bit, for every kind of second moments and for groups without inputs", () => {
    for (const second of ["none", "total", "groups"] as const) {
      const own = addAll(empty({ second }), batches(4, 1));
      const path = save(own);
      expect(isCalibrationStatistics(path)).toBe(true);
      expect(held(read(path).statistics)).toBe(held(own));
      const again = save(read(path).statistics);
      expect(readFileSync(again).equals(readFileSync(path))).toBe(true);
    }
    expect(held(read(save(empty())).statistics)).toBe(held(empty()));
  });

  test("sums of a part come back with what rounding took, which can be no more than a trifle", () => {
    const own = empty({ second: "none" });
    for (const { times, rows, x, weights } of batches(4, 2)) {
      own.add(kernels, "q.weight", x, rows, { times, weights, chunk: 2 });
    }
    const path = save(own),
      back = read(path).statistics,
      sums = (all: CalibrationStatistics) => {
        const { sum, sumLow, squares, squaresLow } = all.inputs.get("q.weight")!;
        return [all.isExact, sum, sumLow, squares, squaresLow];
      };
    expect(sums(back)).toEqual(sums(own));
    const { squares, squaresLow } = own.inputs.get("q.weight")!, at = squares.findIndex((value) => value > 0);
    squaresLow[at] = -squares[at]!;
    expect(thrown(() => read(save(own)))).toBeInstanceOf(FormatError);
    expect(thrown(() => read(save(own))).message).toMatch(/squares_low": rounding must have taken at most/);
  });

  test("of another model, with other groups, or unfinished: refused as not fitting", () => {
    const path = save();
    expect(thrown(() => read(path, "other"))).toBeInstanceOf(CalibrationError);
    const groups = equalTimeGroups(maskRatioAxis(100), 4);
    const error = thrown(() => readCalibrationStatistics(path, { fingerprint: "model", groups }));
    expect(error).toBeInstanceOf(CalibrationError);
    expect(error.message).toMatch(/must have the 4 time groups/);
    expect(readCalibrationStatistics(path, { fingerprint: "model", groups: GROUPS }).partsDone)
      .toBeUndefined();
    const unfinished = save(statistics, 2);
    expect(thrown(() => read(unfinished))).toBeInstanceOf(CalibrationError);
    expect(readCalibrationStatistics(unfinished, { fingerprint: "model", allowUnfinished: true }).partsDone)
      .toBe(2);
  });

  test("cut off, changed or filled with NaN: refused as malformed", () => {
    const path = save(), bytes = readFileSync(path);
    const headerBytes = Number(bytes.readBigUInt64LE(0));
    const header = JSON.parse(bytes.toString("utf8", 8, 8 + headerBytes));
    const body = Uint8Array.from(bytes.subarray(8 + headerBytes));
    const broken = `${place.fresh("broken")}.safetensors`;
    const refuses = (message: RegExp, change: (header: Record<string, never>, body: DataView) => void) => {
      const own = structuredClone(header), data = body.slice();
      change(own, new DataView(data.buffer));
      writeFileSync(broken, fileBytes(JSON.stringify(own), data));
      const error = thrown(() => read(broken));
      expect(error).toBeInstanceOf(FormatError);
      expect(error.message).toMatch(message);
    };
    for (const length of [0, 7, 40, 8 + headerBytes, bytes.length - 1]) {
      writeFileSync(broken, bytes.subarray(0, length));
      expect(thrown(() => read(broken))).toBeInstanceOf(FormatError);
    }
    const at = (part: string, header: Record<string, { data_offsets: number[] }>) =>
      header[`q.weight.${part}`]!.data_offsets[0]!;
    const number =
      (part: string, value: number, index = 0) => (header: Record<string, never>, body: DataView) =>
        part.endsWith("second")
          ? body.setFloat32(at(part, header) + 4 * index, value, true)
          : body.setFloat64(at(part, header) + 8 * index, value, true);
    for (
      const part of ["weight", "tokens", "sum", "squares", "range", "histogram", "second", "group_second"]
    ) {
      refuses(/numbers must be finite, got NaN at 0/, number(part, NaN));
      refuses(/numbers must be finite, got Infinity/, number(part, Infinity));
    }
    refuses(/weights must be ≥ 0/, number("weight", -1));
    refuses(/weight\.tokens": counts must be whole numbers ≥ 0, got 1.5/, number("tokens", 1.5));
    refuses(/counts must be whole numbers ≥ 0, got -3/, number("samples", -3));
    refuses(/must have seen the 7 values/, number("tokens", 1));
    refuses(/counts, whole numbers/, number("histogram", -1));
    refuses(/must lie within a power of two/, number("range", 3, 2));
    refuses(/sums of squares must be ≥ 0/, number("second", -1));
    refuses(/sums of squares must be ≥ 0, got -1/, number("squares", -1));
    refuses(/a moment must be symmetric, got another one at \[1, 0\]/, number("second", 1e9, 1));
    const metadata = (key: string, value: string) => (header: Record<string, never>) => {
      (header["__metadata__"] as unknown as Record<string, string>)[key] = value;
    };
    refuses(/metadata must say/, metadata("version", "1"));
    refuses(/inputs must be a list in JSON/, metadata("inputs", "{"));
    refuses(/inputs must be at least one/, metadata("inputs", "[]"));
    refuses(
      /"absent\.sum": it must hold sums of 1 to \d+ columns, got none of this layer/,
      metadata("inputs", '[["q.weight",["q.weight"]],["absent",["v"]]]'),
    );
    refuses(/must read one input, got two/, metadata("inputs", '[["q.weight",["a"]],["time.weight",["a"]]]'));
    refuses(/every tensor must be a part of an input/, metadata("inputs", '[["q.weight",["q.weight"]]]'));
    refuses(/runs must be 1 to 1024, got 0/, metadata("runs", "[]"));
    refuses(/each run must have/, metadata("runs", '[{"identity": "a"}]'));
    refuses(/second must be one of/, metadata("second", "all"));
    refuses(/every tensor must be a part/, metadata("second", "none"));
    refuses(/parts_done must be/, metadata("parts_done", "-1"));
    refuses(/model must be an object in JSON/, metadata("model", "{"));
    refuses(/model must have a name/, metadata("model", '{"layers": []}'));
    for (const layers of ['["a"]', '["a", 1, 0]', '["a", 1, 1.5]', '["a", 1, 1], ["a", 1, 1]']) {
      refuses(
        /new names, each with rows and columns/,
        metadata("model", `{"name": "m", "layers": [${layers}]}`),
      );
    }
    const without = (header: Record<string, never>) => {
      delete (header["__metadata__"] as unknown as Record<string, string>)["fingerprint"];
    };
    refuses(/must have a fingerprint or a model, got neither/, without);
  });

  test("columns that the file has no bytes for take no memory", () => {
    const cols = 60_000;
    const shapes: Record<string, [string, number[]]> = {
      "time_groups.boundaries": ["I32", [2]],
      "a.sum": ["F64", [1, cols]],
    };
    let end = 0;
    const tensors = Object.entries(shapes).map(([name, [dtype, shape]]) => {
      const start = end;
      end += shape.reduce((product, size) => product * size, dtype === "I32" ? 4 : 8);
      return [name, { dtype, shape, data_offsets: [start, end] }];
    });
    const metadata = {
      format: "arrowquant calibration statistics",
      version: "2",
      fingerprint: "model",
      axis: "mask_ratio",
      bins: "1",
      second: "total",
      inputs: '[["a",["a"]]]',
      runs: JSON.stringify([runOf("a")]),
    };
    const body = new Uint8Array(end);
    body[4] = 1;
    const path = `${place.fresh("hollow")}.safetensors`;
    writeFileSync(
      path,
      fileBytes(JSON.stringify({ __metadata__: metadata, ...Object.fromEntries(tensors) }), body),
    );
    const error = thrown(() => read(path));
    expect(error).toBeInstanceOf(FormatError);
    expect(error.message).toMatch(/must hold its inputs' \d+ bytes of statistics/);
  });
});

/** Quantizes a reference model with few samples. */
function quantize(
  output: string,
  overrides: Record<string, unknown> = {},
  more: Partial<
    Pick<
      QuantizeCheckpointOptions,
      "resume" | "force" | "signal" | "onEvent" | "onProgress" | "input" | "saveCalibration"
    >
  > = {},
) {
  const { config } = resolveConfig({
    overrides: {
      bit_width: 2,
      group_size: 0,
      solver: "best",
      calibration_data: DATA,
      calibration_samples: 256,
      num_threads: 1,
      "solver_options.candidates": 1,
      ...overrides,
    },
  });
  return quantizeCheckpoint({ input: DREAM, output, config, kernels, ...more });
}

function fingerprintOf(model: string): string {
  using checkpoint = openCheckpoint(model);
  return modelFingerprint(checkpoint);
}

/** The weights of an output. */
const weights = (folder: string) =>
  Object.entries(contents(folder)).filter(([name]) => name.endsWith(".safetensors"));

describe("saved statistics in the pipeline", () => {
  const saved = `${place.fresh("saved")}.safetensors`;

  test(
    "solving from the file gives the same bytes as calibration_mode: once on the data, and says what it cannot do",
    async () => {
      const images = store(place.fresh("dit"), ditCheckpoint());
      cpSync(join(DIT, "scheduler_config.json"), join(images, "scheduler_config.json"));
      for (
        const [input, data, solver] of [
          [DREAM, DATA, "best"],
          [images, "synthetic", "feedback"],
        ] as const
      ) {
        const file = input === DREAM ? saved : `${place.fresh("images")}.safetensors`;
        const small = { solver, calibration_data: data, calibration_mode: "once", calibration_samples: 64 };
        const once = place.fresh("once"), kept = place.fresh("kept"), replayed = place.fresh("replayed");
        await quantize(once, small, { input });
        await quantize(kept, small, { input, saveCalibration: { path: file } });
        expect(weights(kept)).toEqual(weights(once));
        const events: RunEvent[] = [];
        await quantize(
          replayed,
          { solver, calibration_data: file, "solver_options.candidates": 2 },
          { input, onEvent: (event) => events.push(event) },
        );
        expect(weights(replayed)).toEqual(weights(once));
        const text = events.map(({ message }) => message).join("\n");
        expect(text).toMatch(/all layers are solved on saved statistics .*, nothing is held out/);
        if (solver === "best") expect(text).toMatch(/hold nothing out: the first candidate is taken unseen/);
        const { statistics } = readCalibrationStatistics(file, {
          fingerprint: fingerprintOf(input),
        });
        expect(statistics.groups.count).toBe(10);
        expect(statistics.runs.map(({ samples }) => samples)).toEqual([64]);
      }
    },
    120_000,
  );

  test("block by block differs from once: a layer reads what the quantized ones before it make", async () => {
    const once = place.fresh("once"), blocks = place.fresh("blocks");
    const small = {
      calibration_samples: 64,
      "solver_options.correction": 0,
      "solver_options.residual_correction": 0,
    };
    await quantize(once, { ...small, calibration_mode: "once" });
    await quantize(blocks, small);
    expect(weights(blocks)).not.toEqual(weights(once));
  }, 120_000);

  test("stopped while collecting: the file is the same to the byte as without a stop", async () => {
    const path = (name: string) => `${place.fresh(name)}.safetensors`;
    const whole = path("whole"), stopped = path("stopped"), output = place.fresh("out");
    const simple = { solver: "clip" };
    for (const groupMoments of [false, true]) {
      await quantize(place.fresh("out"), simple, {
        saveCalibration: { path: whole, groupMoments },
        force: true,
      });
      const controller = new AbortController();
      let parts = 0;
      const error = await rejection(
        quantize(output, simple, {
          saveCalibration: { path: stopped, groupMoments },
          force: true,
          signal: controller.signal,
          onProgress: () => {
            if (++parts === 2) controller.abort("SIGINT");
          },
        }),
      );
      expect(error).toBeInstanceOf(InterruptedError);
      expect(error.message).toMatch(/what is collected is kept/);
      expect(existsSync(`${stopped}.progress`)).toBe(true);
      const events: RunEvent[] = [];
      await quantize(output, simple, {
        saveCalibration: { path: stopped, groupMoments },
        force: true,
        onEvent: (event) => events.push(event),
      });
      expect(events.map(({ message }) => message).join("\n")).toMatch(
        /2 of \d+ parts of the data were collected before/,
      );
      expect(existsSync(`${stopped}.progress`)).toBe(false);
      expect(readFileSync(stopped).equals(readFileSync(whole))).toBe(true);
    }
  }, 120_000);

  test("killed while collecting: what was saved last is gone on with, to the same byte", async () => {
    const whole = `${place.fresh("whole")}.safetensors`, killed = `${place.fresh("killed")}.safetensors`;
    const simple = { solver: "clip", calibration_samples: 1024 };
    await quantize(place.fresh("out"), simple, { saveCalibration: { path: whole } });
    let parts = 0;
    const error = await rejection(quantize(place.fresh("out"), simple, {
      saveCalibration: { path: killed },
      onProgress: () => {
        if (++parts === 10) throw new Error("killed");
      },
    }));
    expect(error.message).toBe("killed");
    const events: RunEvent[] = [];
    await quantize(place.fresh("out"), simple, {
      saveCalibration: { path: killed },
      onEvent: (event) => events.push(event),
    });
    expect(events.map(({ message }) => message).join("\n")).toMatch(
      /8 of \d+ parts of the data were collected/,
    );
    expect(readFileSync(killed).equals(readFileSync(whole))).toBe(true);
  }, 120_000);

  test("stopped at the last part: the file is there, and taken when the command is given again", async () => {
    const path = `${place.fresh("last")}.safetensors`, output = place.fresh("out");
    const small = { solver: "feedback", calibration_samples: 256 };
    const controller = new AbortController();
    const error = await rejection(quantize(output, small, {
      saveCalibration: { path },
      signal: controller.signal,
      onProgress: ({ tensor, tensorsDone, tensors }) => {
        if (tensor.startsWith("(calibrating") && tensorsDone === tensors) controller.abort("SIGINT");
      },
    }));
    expect(error).toBeInstanceOf(InterruptedError);
    expect(existsSync(path)).toBe(true);
    const events: RunEvent[] = [];
    await quantize(output, small, {
      saveCalibration: { path },
      resume: true,
      onEvent: (event) => events.push(event),
    });
    expect(events.map(({ message }) => message).join("\n")).toMatch(/has these statistics/);
  }, 120_000);

  test(
    "runs with other seeds are merged; the same twice, another model's, and data among them are refused",
    async () => {
      const other = `${place.fresh("seed")}.safetensors`, merged = `${place.fresh("merged")}.safetensors`;
      const small = { calibration_samples: 64, solver: "feedback" };
      await quantize(place.fresh("out"), { ...small, calibration_seed: 5 }, {
        saveCalibration: { path: other },
      });
      await quantize(place.fresh("out"), { ...small, calibration_data: `${saved},${other}` }, {
        saveCalibration: { path: merged },
      });
      const { statistics } = readCalibrationStatistics(merged, {
        fingerprint: fingerprintOf(DREAM),
      });
      expect(statistics.samples).toBe(128);
      const refused = async (
        calibration_data: string,
        message: RegExp,
        more: Record<string, unknown> = {},
      ) => {
        const output = place.fresh("refused");
        const error = await rejection(quantize(output, { ...small, ...more, calibration_data }));
        expect(error).toBeInstanceOf(CalibrationError);
        expect(error.message).toMatch(message);
        expect(existsSync(output)).toBe(false);
      };
      await refused(`${saved},${saved}`, /the same run twice/);
      await refused(
        `${saved},${DATA}`,
        /each must hold saved calibration statistics, got ".*calibration\.jsonl"/,
      );
      await refused(`${saved},absent.safetensors`, /got "absent\.safetensors", which is not there/);
      const error = await rejection(
        quantize(place.fresh("refused"), { calibration_data: saved }, { input: DIT }),
      );
      expect(error.message).toMatch(/must be of the model that is quantized/);
    },
    120_000,
  );

  test("a finished file is taken as it is; other files stay", async () => {
    const simple = { solver: "clip", calibration_samples: 64 };
    const path = `${place.fresh("kept")}.safetensors`;
    const events: RunEvent[] = [];
    const save = (more: Record<string, unknown> = {}, force = false) =>
      quantize(place.fresh("out"), { ...simple, ...more }, {
        saveCalibration: { path },
        force,
        onEvent: (event) => events.push(event),
      });
    await save();
    const before = readFileSync(path);
    await save();
    expect(events.map(({ message }) => message).join("\n")).toMatch(/has these statistics/);
    const error = await rejection(save({ calibration_seed: 1 }));
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toMatch(/other calibration statistics: choose another name, or give --force/);
    expect(readFileSync(path).equals(before)).toBe(true);
    await save({ calibration_seed: 1 }, true);
    expect(readFileSync(path).equals(before)).toBe(false);
    writeFileSync(path, "mine");
    expect((await rejection(save({}, true))).message).toMatch(/did not write/);
    expect(readFileSync(path, "utf8")).toBe("mine");
  }, 120_000);

  test("the command saves, solves from what it saved, and refuses options that do not fit", () => {
    const path = `${place.fresh("command")}.safetensors`;
    const quick = ["--bits", "2", "--samples", "32", "--threads", "1", "--solver", "feedback"];
    const first = runScript("quantize.ts", [DREAM, place.fresh("out"), ...quick, "--save-calibration", path]);
    expect(first.stderr).toMatch(/statistics of 32 samples saved as/);
    expect(first.code).toBe(0);
    const again = runScript("quantize.ts", [DREAM, place.fresh("out"), ...quick, "--calibrate", path]);
    expect(again.stderr).toMatch(/all layers are solved on saved statistics/);
    expect(again.code).toBe(0);
    for (
      const [options, message] of [
        [["--save-group-moments"], /needs --save-calibration/],
        [["--save-calibration", path, "--dry-run"], /nothing to save/],
        [["--save-calibration", "statistics.bin"], /must name a \.safetensors file/],
      ] as const
    ) {
      const { code, stderr } = runScript("quantize.ts", [DREAM, place.fresh("out"), ...options]);
      expect(code).toBe(2);
      expect(stderr).toMatch(message);
    }
  }, 120_000);
});
