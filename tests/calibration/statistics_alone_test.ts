/** Checkpoints of families that do not run here, solved from files of statistics alone. */
import { afterAll, describe, expect, test } from "bun:test";
import {
  copyFileSync,
  existsSync,
  readdirSync,
  readFileSync,
  statSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { readImportanceMatrix } from "../../lib/calibration/statistics/importance_matrix.ts";
import { loadStatistics } from "../../lib/calibration/saved_statistics.ts";
import {
  CalibrationError,
  CheckpointError,
  FormatError,
  IntegrityError,
  InterruptedError,
} from "../../lib/errors.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { dequantizeCheckpoint, quantizeCheckpoint, type RunEvent } from "../../lib/pipeline/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import {
  CalibrationStatistics,
  equalTimeGroups,
  readCalibrationStatistics,
  timestepAxis,
  writeCalibrationStatistics,
} from "../../lib/time/mod.ts";
import { contents, gaussian, matrix, rejection, workplace, writeCheckpoint } from "../_checkpoints.ts";
import { gaussians } from "../_kernels.ts";
import { fileBytes, thrown } from "../tensor/_files.ts";
import { ggufBytes } from "../tensor/gguf/_files.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

const COLS = 64, ROWS = 32, TOKENS = 512;
/** Layers, those of a stage together. */
const STAGES = [["self_attn.q_proj", "self_attn.k_proj"], ["self_attn.o_proj"], ["mlp.down_proj"]]
  .map((names) => names.map((name) => `model.layers.0.${name}.weight`));
const LAYERS = STAGES.flat();
const GROUPS = equalTimeGroups(timestepAxis(1000), 4);

/** A checkpoint of a family that does not run here. */
function checkpoint(prefix = "", seed = 1): string {
  const folder = place.fresh("model");
  const tensors = LAYERS.map((name, i) =>
    [prefix + name, matrix(ROWS, COLS, gaussian(ROWS * COLS, seed + i))] as const
  );
  const norm = { dtype: "F32", shape: [COLS], data: new Float32Array(COLS).fill(1) };
  writeCheckpoint(folder, { ...Object.fromEntries(tensors), "model.norm.weight": norm }, {
    model_type: "llama",
  });
  return folder;
}
const MODEL = checkpoint();

/** Weights that a program that runs the model saw. */
function samplesOf(folder: string, name: string): Float32Array {
  using file = openCheckpoint(folder);
  const values = new Float32Array(file.read(name).buffer);
  return Float32Array.from({ length: 8 }, (_, i) => values[Math.floor(i * (values.length - 1) / 7)]!);
}

/** Inputs of which some columns are much larger than others. */
const inputs = (seed: number) =>
  gaussians(seed, TOKENS * COLS).map((value, k) => value * Math.exp(1.5 * Math.sin(k % COLS)));

/** Statistics of some of the stages, as another program writes them. */
function statistics(stages = STAGES, { cols = COLS, identity = "a", model = MODEL, seed = 10 } = {}) {
  const layers = stages.flat();
  const own = new CalibrationStatistics({
    fingerprint: "",
    model: {
      name: "a llama",
      layers: new Map(layers.map((name) => [name, [ROWS, cols]])),
      samples: new Map(layers.map((name) => [name, samplesOf(model, name)])),
    },
    groups: GROUPS,
    inputs: new Map(stages.map((names) => [names[0]!, { cols, layers: names }])),
    runs: [{ identity, source: `run ${identity}`, isSynthetic: false, samples: 4 }],
  });
  for (const [i, [first]] of stages.entries()) {
    own.add(kernels, first!, inputs(seed + i).slice(0, TOKENS * cols), TOKENS, {
      times: [10, 300, 600, 900],
    });
  }
  return own;
}

function save(own: CalibrationStatistics): string {
  const path = `${place.fresh("statistics")}.safetensors`;
  writeCalibrationStatistics(path, own);
  return path;
}

/** An entry of a header. */
interface Entry {
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly data_offsets: readonly [number, number];
}

/** A copy of a file with other numbers in a tensor, from its element `first` on. */
function withNumbers(file: string, tensor: string, first: number, values: readonly number[]): string {
  const bytes = readFileSync(file), data = 8 + Number(bytes.readBigUInt64LE(0));
  const { dtype, data_offsets: [begin] } = JSON.parse(bytes.toString("utf8", 8, data))[tensor];
  for (const [i, value] of values.entries()) {
    if (dtype === "F32") bytes.writeFloatLE(value, data + begin + 4 * (first + i));
    else bytes.writeDoubleLE(value, data + begin + 8 * (first + i));
  }
  const path = `${place.fresh("numbers")}.safetensors`;
  writeFileSync(path, bytes);
  return path;
}

function quantize(input: string, calibration_data: string, overrides: Record<string, unknown> = {}) {
  const output = place.fresh("out"), events: RunEvent[] = [];
  const { config } = resolveConfig({
    overrides: {
      bit_width: 2,
      group_size: 32,
      num_threads: 1,
      solver: "best",
      calibration_data,
      ...overrides,
    },
  });
  const job = { input, output, kernels, config };
  const run = () => quantizeCheckpoint({ ...job, onEvent: (event) => events.push(event) });
  return { output, events, run, job };
}

const weightsOf = (folder: string) =>
  Object.entries(contents(folder)).filter(([name]) => name.endsWith(".safetensors"));

describe("statistics alone", () => {
  test("each layer is written once it is solved: a stopped run keeps nothing else, and goes on to the same bytes", async () => {
    const file = save(statistics()), whole = quantize(MODEL, file);
    await whole.run();
    const { output, job } = quantize(MODEL, file), controller = new AbortController();
    let solved = 0;
    const error = await rejection(quantizeCheckpoint({
      ...job,
      signal: controller.signal,
      onEvent: ({ data }) => data?.["stage"] === "writing" && ++solved === 2 && controller.abort("SIGINT"),
    }));
    expect(error).toBeInstanceOf(InterruptedError);
    const kept = readdirSync(join(output, "arrowquant.partial"));
    expect(kept.filter((name) => name.startsWith("solved-"))).toEqual([]);
    const again: string[] = [];
    const { tensorsResumed } = await quantizeCheckpoint({
      ...job,
      resume: true,
      onEvent: ({ data }) => data?.["stage"] === "solving" && again.push(String(data["name"])),
    });
    expect(tensorsResumed).toBeGreaterThanOrEqual(2);
    expect(again).toHaveLength(LAYERS.length - 2);
    expect(contents(output)).toEqual(contents(whole.output));
  });

  test("of which weights were changed behind a stop, their times set back: a resumed run refuses them", async () => {
    const model = checkpoint(), file = save(statistics()), controller = new AbortController();
    const { job } = quantize(model, file);
    await rejection(quantizeCheckpoint({
      ...job,
      signal: controller.signal,
      onEvent: ({ data }) => data?.["stage"] === "writing" && controller.abort("SIGINT"),
    }));
    const path = join(model, "model.safetensors"), { atime, mtime } = statSync(path);
    copyFileSync(withNumbers(path, LAYERS[0]!, 5, [3]), path);
    utimesSync(path, atime, mtime);
    const error = await rejection(quantizeCheckpoint({ ...job, resume: true }));
    expect(error).toBeInstanceOf(IntegrityError);
    expect(error.message).toMatch(/must have the weights that it had|must not have changed/);
  });

  test("of which weights were changed between solving and writing, their times set back: the run ends, and goes on", async () => {
    const model = checkpoint(), data = save(statistics()), path = join(model, "model.safetensors");
    const before = readFileSync(path), { output, job } = quantize(model, data);
    utimesSync(path, new Date(1e12), new Date(1e12)); // whole milliseconds, that can be set back
    const changed = readFileSync(withNumbers(path, LAYERS[2]!, 5, [3]));
    const write = (bytes: Uint8Array) => {
      const { atime, mtime } = statSync(path);
      writeFileSync(path, bytes);
      utimesSync(path, atime, mtime);
    };
    const error = await rejection(quantizeCheckpoint({
      ...job,
      onEvent: ({ data }) => data?.["stage"] === "solving" && data["name"] === LAYERS[2] && write(changed),
    })) as CheckpointError;
    expect(error).toBeInstanceOf(CheckpointError);
    expect([error.path, error.tensor]).toEqual([path, LAYERS[2]]);
    expect(error.message).toMatch(
      /must not change until it is written, and was changed; go on with --resume/,
    );
    write(before);
    await quantizeCheckpoint({ ...job, resume: true });
    const whole = quantize(model, data);
    await whole.run();
    expect(contents(output)).toEqual(contents(whole.output));
  });

  test("layers of another family are solved, those without statistics by a rule that is said", async () => {
    const { output, events, run } = quantize(MODEL, save(statistics(STAGES.slice(0, 2))));
    const { layers } = await run();
    const solved = layers.filter((layer) => layer.solved !== undefined).map(({ name }) => name);
    expect(solved).toEqual(STAGES.slice(0, 2).flat());
    const warnings = events.filter(({ kind }) => kind === "warning").map(({ message }) => message);
    expect(warnings.join("\n")).toMatch(/1 of 4 layers have no statistics: clip search .*mlp\.down_proj/);
    expect(existsSync(join(output, "config.json"))).toBe(true);
  });

  test("names behind other prefixes are the same layers", async () => {
    const prefixed = checkpoint("model.diffusion_model.");
    const { run } = quantize(prefixed, save(statistics()));
    const { layers } = await run();
    expect(layers.filter((layer) => layer.solved !== undefined).length).toBe(LAYERS.length);
  });

  test("diffusers' names find the layers of a checkpoint in a family's own layout, whose parts are fused", async () => {
    const own = place.fresh("own"), width = COLS, seed = 30;
    const tensor = (rows: number, cols: number, i: number) =>
      matrix(rows, cols, gaussian(rows * cols, seed + i));
    const block = "double_blocks.0.";
    writeCheckpoint(own, {
      [`${block}img_attn.qkv.weight`]: tensor(3 * width, width, 0),
      [`${block}img_attn.proj.weight`]: tensor(width, width, 1),
      [`${block}img_mlp.0.weight`]: tensor(2 * width, width, 2),
      [`${block}img_mlp.2.weight`]: tensor(width, 2 * width, 3),
      "img_in.weight": tensor(width, 32, 4),
      "txt_in.weight": tensor(width, 32, 5),
    }, {});
    const names = ["to_q", "to_k", "to_v"].map((name) => `transformer_blocks.0.attn.${name}.weight`);
    const made = new CalibrationStatistics({
      ...{ fingerprint: "", groups: GROUPS },
      model: {
        name: "flux",
        layers: new Map(names.map((name) => [name, [width, width]])),
        samples: new Map(names.map((name) => [name, new Float32Array(8).fill(9)])),
      },
      inputs: new Map([[names[0]!, { cols: width, layers: names }]]),
      runs: [{ identity: "a", source: "a", isSynthetic: false, samples: 4 }],
    });
    made.add(kernels, names[0]!, inputs(1), TOKENS, { times: [10] });
    const { run } = quantize(own, save(made));
    const { layers } = await run();
    const solved = layers.filter((layer) => layer.solved !== undefined).map(({ name }) => name);
    expect(solved).toEqual([`${block}img_attn.qkv.weight`]);
  });

  test("files of some layers each are one, to the same bytes", async () => {
    const whole = quantize(MODEL, save(statistics()));
    await whole.run();
    const parts = STAGES.map((stage, i) => save(statistics([stage], { identity: String(i), seed: 10 + i })));
    const merged = quantize(MODEL, parts.join(","));
    await merged.run();
    expect(weightsOf(merged.output)).toEqual(weightsOf(whole.output));
  });

  test("of two models with the same names are not merged", () => {
    const own = statistics(), tuned = statistics(STAGES, { identity: "b", model: checkpoint("", 50) });
    const error = thrown(() => own.merge(tuned));
    expect(error).toBeInstanceOf(CalibrationError);
    expect(error.message).toContain(`of one model, got other weights in "${LAYERS[0]}"`);
    expect(own.merge(statistics(STAGES, { identity: "b" })).runs.length).toBe(2);
    const { cols, layers } = own.inputs.get(LAYERS[3]!)!,
      taller = new CalibrationStatistics({
        ...{ fingerprint: "", groups: GROUPS, inputs: new Map([[LAYERS[3]!, { cols, layers }]]) },
        model: { name: "another", layers: new Map([[LAYERS[3]!, [2 * ROWS, cols]]]) },
        runs: [{ identity: "c", source: "c", isSynthetic: false, samples: 1 }],
      });
    expect(thrown(() => own.merge(taller)).message).toContain(`other weights in "${LAYERS[3]}"`);
  });

  test("layers whose weights are not known are told from no others, and another model by the rest", async () => {
    const all = statistics(), { layers } = all.model!, own = statistics();
    const samples = new Map([...all.model!.samples!].slice(1));
    Object.assign(own.model!, { samples });
    const path = save(own), { statistics: read } = readCalibrationStatistics(path, { fingerprint: "" });
    expect([...read.model!.samples!.keys()]).toEqual([...layers.keys()].slice(1));
    expect(read.merge(statistics(STAGES, { identity: "b" })).model!.samples!.size).toBe(layers.size);
    await quantize(MODEL, path).run();
    const error = await rejection(quantize(checkpoint("", 50), path).run()) as Error;
    expect(error.message).toContain(`other weights in "${LAYERS[1]}"`);
    const half = withNumbers(path, "model.weights", 9, [NaN]);
    expect(thrown(() => readCalibrationStatistics(half, { fingerprint: "" })).message).toContain(
      "finite, or all NaN if not known",
    );
  });

  test("of another model, other shapes, NaN, a missing layer, cut off: refused by name, nothing is written", async () => {
    const path = save(statistics()),
      bytes = readFileSync(path),
      broken = `${place.fresh("broken")}.safetensors`;
    const other = checkpoint("", 50), headerBytes = Number(bytes.readBigUInt64LE(0));
    const header = JSON.parse(bytes.toString("utf8", 8, 8 + headerBytes)),
      body = bytes.subarray(8 + headerBytes);
    const { [`${LAYERS[3]}.weight`]: _, ...without } = header;
    const changed = (own: unknown, data: Uint8Array = body) => {
      writeFileSync(broken, fileBytes(JSON.stringify(own), data));
      return broken;
    };
    const cut = () => {
      writeFileSync(broken, bytes.subarray(0, bytes.length - 100));
      return broken;
    };
    const nan = Uint8Array.from(body), at = header[`${LAYERS[0]}.second`].data_offsets[0];
    new DataView(nan.buffer).setFloat32(at + 4, NaN, true);
    const names = statistics([STAGES[0]!]).renamed((name) => ({ names: [`other.${name}`], isWhole: true }));
    const cases: [
      make: () => [model: string, file: string],
      type: unknown,
      message: RegExp,
      tensor?: string | undefined,
    ][] = [
      [
        () => [other, path],
        CalibrationError,
        /statistics of one with other weights in "model\.layers/,
        LAYERS[0],
      ],
      [() => [MODEL, save(names)], CalibrationError, /must have layers of .*got statistics of "a llama"/],
      [
        () => [MODEL, save(statistics([STAGES[0]!], { cols: 32 }))],
        CalibrationError,
        /q_proj.*\[32, 64\].*got \[32, 32\]/,
        LAYERS[0],
      ],
      [
        () => [MODEL, changed(header, nan)],
        FormatError,
        /numbers must be finite, got NaN/,
        `${LAYERS[0]}.second`,
      ],
      [() => [MODEL, changed(without)], FormatError, /down_proj/, undefined],
      [() => [MODEL, cut()], FormatError, /Cannot read/],
    ];
    for (const [make, type, message, tensor] of cases) {
      const [model, file] = make(), { output, run } = quantize(model, file);
      const error = await rejection(run()) as Error & { tensor?: string; path?: string };
      expect(error).toBeInstanceOf(type as typeof FormatError);
      expect(error.message).toMatch(message);
      expect(error.message).toContain(file);
      if (tensor !== undefined) expect(error.tensor).toBe(tensor);
      expect(existsSync(output)).toBe(false);
    }
  });

  test("numbers that contradict each other are refused by name, nothing is written", async () => {
    const layer = LAYERS[3]!, path = save(statistics());
    const changed = (part: string, first: number, values: readonly number[], file = path) =>
      withNumbers(file, `${layer}.${part}`, first, values);
    const mirrored = (value: number) => changed("second", COLS, [value], changed("second", 1, [value]));
    const cases: [file: string, tensor: string, message: RegExp][] = [
      [changed("second", 0, [Infinity]), "second", /must be finite, got Infinity/],
      [changed("second", COLS + 1, [-1]), "second", /sums of squares must be ≥ 0, got -1/],
      [changed("second", 1, [7]), "second", /must be symmetric, got another one at \[1, 0\]/],
      [mirrored(1e9), "second", /sums of products must fit those of squares, got 1000000000 at \[1, 0\]/],
      [
        changed("second", 0, Array(COLS * COLS).fill(0)),
        "second",
        /the diagonal must have the sums of squares/,
      ],
      [changed("squares", 5, [1e12]), "second", /the diagonal must have the sums of squares.*in column 5/],
      [changed("sum", 3, [1e12]), "sum", /sums must be at most √.*in column 3, got 1000000000000/],
      [changed("weight", 0, [0, 0, 0, 0]), "sum", /sums must be at most √/],
      [changed("weight", 0, [1e308]), "weight", /weights must be ≥ 0, at most 4294967296 an input/],
      [changed("tokens", 0, [0.5]), "tokens", /counts must be whole numbers/],
    ];
    for (const [file, part, message] of cases) {
      const { output, run } = quantize(MODEL, file), error = await rejection(run()) as FormatError;
      expect([error.name, error.tensor, error.path]).toEqual(["FormatError", `${layer}.${part}`, file]);
      expect(error.message).toMatch(message);
      expect(error.message).toContain(file);
      expect(existsSync(output)).toBe(false);
    }
  });

  test("correlations in half precision stand for a moment, and are refused where they are none", async () => {
    const path = save(statistics()), bytes = readFileSync(path), data = 8 + Number(bytes.readBigUInt64LE(0));
    const header = JSON.parse(bytes.toString("utf8", 8, data)), count = COLS * (COLS - 1) / 2;
    /** The same file with numbers below the diagonal alone, by the roots of the squares; one may be another. */
    const packed = (change: (values: Float16Array<ArrayBuffer>, layer: string) => void) => {
      const own: Record<string, unknown> = { __metadata__: header.__metadata__ }, parts: Uint8Array[] = [];
      let end = 0;
      const { __metadata__: _, ...entries } = header as Record<string, Entry>;
      for (const [name, { dtype, shape, data_offsets: [begin, stop] }] of Object.entries(entries)) {
        let part: Uint8Array = bytes.subarray(data + begin, data + stop), entry = { name, dtype, shape };
        if (name.endsWith(".second")) {
          const moment = new Float32Array(Uint8Array.from(part).buffer), values = new Float16Array(count);
          for (let i = 0, at = 0; i < COLS; i++) {
            for (let k = 0; k < i; k++, at++) {
              values[at] = moment[i * COLS + k]! /
                Math.sqrt(moment[i * (COLS + 1)]! * moment[k * (COLS + 1)]!);
            }
          }
          change(values, name);
          part = new Uint8Array(values.buffer);
          entry = { name: name.replace(/second$/, "correlations"), dtype: "F16", shape: [count] };
        }
        parts.push(part);
        own[entry.name] = { ...entry, name: undefined, data_offsets: [end, end += part.length] };
      }
      const file = `${place.fresh("correlations")}.safetensors`;
      writeFileSync(file, fileBytes(JSON.stringify(own), Uint8Array.from(Buffer.concat(parts))));
      return file;
    };
    const half = packed(() => {}),
      read = (file: string) => loadStatistics([file], "").moments(LAYERS[3]!).second;
    const [got, wanted] = [read(half), read(path)];
    for (const [i, value] of got.entries()) {
      const row = Math.floor(i / COLS), col = i % COLS;
      const size = Math.sqrt(wanted[row * (COLS + 1)]! * wanted[col * (COLS + 1)]!);
      expect(Math.abs(value - wanted[i]!)).toBeLessThan(size * (row === col ? 1e-6 : 2 ** -11));
      expect(value).toBe(got[col * COLS + row]!);
    }
    const { layers } = await quantize(MODEL, half).run(),
      { layers: exact } = await quantize(MODEL, path).run();
    for (const [i, { solved }] of layers.entries()) {
      const ratio = (solved?.relativeError ?? 1) / (exact[i]!.solved?.relativeError ?? 1);
      expect(Math.abs(ratio - 1)).toBeLessThan(0.05);
    }
    for (const bad of [1.5, NaN, -Infinity]) {
      const file = packed((values, name) => name.startsWith(LAYERS[3]!) && (values[7] = bad));
      const { output, run } = quantize(MODEL, file), error = await rejection(run()) as FormatError;
      expect(error).toBeInstanceOf(FormatError);
      expect(error.message).toMatch(/correlations must be −1 to 1, got .* at 7/);
      expect([error.tensor, error.path]).toEqual([`${LAYERS[3]}.correlations`, file]);
      expect(existsSync(output)).toBe(false);
    }
  });

  test("moments that are read when they are asked for are the same each time, merged and written too", () => {
    const paths = ["a", "b"].map((identity, i) => save(statistics(STAGES, { identity, seed: 20 + i })));
    const mergedOf = (keptBytes?: number) => {
      const [one, other] = paths.map((path) =>
        readCalibrationStatistics(path, { fingerprint: "", checksAll: true }, keptBytes).statistics
      );
      return one!.merge(other!);
    };
    const kept = mergedOf(), read = mergedOf(0);
    expect([kept.isFresh, read.isFresh]).toEqual([false, true]);
    for (let time = 0; time < 2; time++) {
      for (const layer of LAYERS) expect(read.moments(layer).second).toEqual(kept.moments(layer).second);
    }
    expect(readFileSync(save(read))).toEqual(readFileSync(save(kept)));
    expect(read.moments(LAYERS[0]!).second).toEqual(kept.moments(LAYERS[0]!).second);
  });

  test("moments too large to be kept are checked before work begins", () => {
    const path = withNumbers(save(statistics()), `${LAYERS[3]}.second`, 5, [NaN]);
    const read = (checksAll: boolean) => readCalibrationStatistics(path, { fingerprint: "", checksAll }, 0);
    expect(thrown(() => read(true))).toBeInstanceOf(FormatError);
    expect(thrown(() => read(false).statistics.moments(LAYERS[3]!)).message).toContain("got NaN at 5");
  });

  test("a listed layer of the checkpoint without an entry is missing, not left to chance", async () => {
    const own = statistics(STAGES.slice(0, 2)), { layers, samples } = statistics().model!;
    const listing = new CalibrationStatistics({ ...own, model: { name: "a llama", layers, samples } });
    listing.takeSums(own.inputs);
    for (const name of own.inputs.keys()) listing.takeMoments(name, "second", own.momentsOf(name, "second")!);
    const { output, run } = quantize(MODEL, save(listing));
    const error = await rejection(run()) as CalibrationError;
    expect(error).toBeInstanceOf(CalibrationError);
    expect(error.message).toMatch(
      /must have statistics of every layer that it lists, got none of .*down_proj/,
    );
    expect(error.tensor).toBe(LAYERS[3]);
    expect(existsSync(output)).toBe(false);
  });

  test("a budget chooses bits by the layers' output errors", async () => {
    const events: RunEvent[] = [], output = place.fresh("budget");
    const calibration_data = save(statistics());
    const { config } = resolveConfig({
      overrides: { target_bits_per_weight: 4.2, num_threads: 1, solver: "best", calibration_data },
    });
    const { layers } = await quantizeCheckpoint({
      ...{ input: MODEL, output, kernels, config },
      onEvent: (event) => events.push(event),
    });
    const said = events.find(({ message }) => message.startsWith("budget: "))!.message;
    expect(said).toMatch(/relative output errors of the layers add up to [\d.e-]+ with feedback/);
    expect(Number(/budget: ([\d.]+) bits/.exec(said)![1])).toBeLessThanOrEqual(4.2);
    expect(layers.filter((layer) => layer.solved !== undefined).length).toBe(LAYERS.length);
  });

  test("weights by time: Σ ω M of the groups where they were kept, otherwise its diagonal", () => {
    const times = [10, 300, 600, 900], omega = [4, 1, 0.5, 0];
    const make = (second: "total" | "groups") => {
      const own = new CalibrationStatistics({
        ...{
          fingerprint: "f",
          groups: GROUPS,
          second,
          inputs: new Map([["a", { cols: COLS, layers: ["a"] }]]),
        },
        runs: [{ identity: "a", source: "a", isSynthetic: false, samples: 4 }],
      });
      for (const [i, time] of times.entries()) {
        own.add(kernels, "a", inputs(i).map((value) => value * (1 + i)), TOKENS, { times: [time] });
      }
      return own.weightedByTime(omega).moments("a");
    };
    const wanted = new Float64Array(COLS * COLS);
    const all = omega.reduce((sum, own) => sum + own, 0);
    for (const [g, own] of omega.entries()) {
      const x = inputs(g).map((value) => value * (1 + g));
      for (let row = 0; row < TOKENS; row++) {
        for (let i = 0; i < COLS; i++) {
          for (let k = 0; k < COLS; k++) {
            wanted[i * COLS + k]! += own * x[row * COLS + i]! * x[row * COLS + k]! / (all * TOKENS);
          }
        }
      }
    }
    const size = Math.max(...wanted),
      near = (got: number, value: number) => Math.abs(got - value) < 1e-5 * size;
    const exact = make("groups"), byDiagonal = make("total");
    expect(wanted.every((value, k) => near(exact.second[k]! / exact.weight, value))).toBe(true);
    for (let k = 0; k < COLS; k++) {
      const place = k * (COLS + 1);
      expect(near(byDiagonal.second[place]! / byDiagonal.weight, wanted[place]!)).toBe(true);
    }
  });

  test("weights by time change what is solved where there is a schedule, and are refused where there is none", async () => {
    const scheduled = checkpoint(), data = save(statistics());
    writeFileSync(
      join(scheduled, "scheduler_config.json"),
      JSON.stringify({ _class_name: "DDPMScheduler", num_train_timesteps: 1000, beta_schedule: "linear" }),
    );
    const phase = { "thermodynamic.transition_optimization.enabled": true };
    const run = async (input: string, more: Record<string, unknown>) => {
      const { output, events, run } = quantize(input, data, more);
      await run();
      return { weights: weightsOf(output), said: events.map(({ message }) => message).join("\n") };
    };
    const by = await run(scheduled, {
      ...phase,
      "thermodynamic.transition_optimization.time_weights": "ddpm",
    });
    expect(by.said).toContain("weights by time (ddpm): kept");
    expect(by.said).toContain("refinement needs a model that runs here");
    const without = await run(scheduled, {
      ...phase,
      "thermodynamic.transition_optimization.time_weights": "none",
    });
    expect(by.weights).not.toEqual(without.weights);
    const refused = quantize(MODEL, data, {
      ...phase,
      "thermodynamic.transition_optimization.time_weights": "ddpm",
    });
    expect((await rejection(refused.run())).message).toMatch(
      /must be a noise schedule \(scheduler_config\.json\)/,
    );
  });

  test("phases and a run of the model are refused", async () => {
    const { run } = quantize(MODEL, save(statistics()), { "thermodynamic.validation.enabled": true });
    expect((await rejection(run())).message).toMatch(/Cannot run the phases: .*got statistics alone/);
  });
});

/** llama.cpp's names of the layers. */
const THEIR_NAMES = ["attn_q", "attn_k", "attn_output", "ffn_down"].map((name) => `blk.0.${name}.weight`);
const CALLS = 3;
/** Mean squares of what each layer reads. */
const MEANS = LAYERS.map((_, i) => Float32Array.from({ length: COLS }, (_, k) => 1 + ((i + 1) * k * k) % 97));
const bytesOf = (values: Float32Array<ArrayBuffer>) => new Uint8Array(values.buffer);

/** The older form: numbers, and names and numbers of each entry. */
function olderFile(): Uint8Array<ArrayBuffer> {
  const int = (value: number) => new Uint8Array(Int32Array.of(value).buffer);
  const text = (value: string) => new TextEncoder().encode(value);
  const entries = THEIR_NAMES.flatMap((name, i) => [
    ...[int(name.length), text(name), int(CALLS), int(COLS), bytesOf(MEANS[i]!.map((mean) => CALLS * mean))],
  ]);
  const parts = [int(LAYERS.length), ...entries, int(CALLS), int(4), text("data")];
  return new Uint8Array(Buffer.concat(parts));
}

function ggufFile(count = 700, change = (sums: Float32Array<ArrayBuffer>) => sums): Uint8Array<ArrayBuffer> {
  return ggufBytes(
    [["general.type", "string", "imatrix"], ["imatrix.chunk_count", "u32", CALLS], [
      "imatrix.chunk_size",
      "u32",
      512,
    ]],
    THEIR_NAMES.flatMap((name, i) => [
      {
        name: `${name}.in_sum2`,
        type: "F32",
        dimensions: [COLS, 1],
        data: bytesOf(change(MEANS[i]!.map((mean) => count * mean))),
      },
      { name: `${name}.counts`, type: "F32", dimensions: [1, 1], data: bytesOf(Float32Array.of(count)) },
    ]),
  );
}

describe("importance matrices of llama.cpp", () => {
  const file = (ending: string, bytes: Uint8Array) => {
    const path = `${place.fresh("matrix")}${ending}`;
    writeFileSync(path, bytes);
    return path;
  };

  test("both forms are diagonal moments: Σ x² by column, of so many inputs", () => {
    for (const path of [file(".imatrix", olderFile()), file(".gguf", ggufFile())]) {
      const own = loadStatistics([path], "any");
      for (const [i, name] of THEIR_NAMES.entries()) {
        const { block, second, weight } = own.moments(name);
        expect(block).toBe(1);
        for (const [k, mean] of MEANS[i]!.entries()) expect(second[k]! / weight).toBeCloseTo(mean, 4);
      }
    }
  });

  test("layers are solved on them under a checkpoint's own names, better than rounded by what they weigh", async () => {
    const folders: string[] = [];
    for (
      const path of [file(".imatrix", olderFile()), file(".dat", olderFile()), file(".gguf", ggufFile())]
    ) {
      const { output, run } = quantize(MODEL, path, { solver: "feedback" });
      const { layers } = await run();
      expect(layers.filter((layer) => layer.solved?.moment === "diagonal").length).toBe(LAYERS.length);
      folders.push(output);
    }
    expect(weightsOf(folders[1]!)).toEqual(weightsOf(folders[0]!));
    const rounded = quantize(MODEL, folders[0]!, { solver: "round", calibration_data: null });
    await rounded.run();
    const errors = async (packed: string) => {
      const output = place.fresh("plain");
      await dequantizeCheckpoint({ input: packed, output, kernels, dtype: "F32" });
      using plain = openCheckpoint(output), full = openCheckpoint(MODEL);
      return LAYERS.map((name, i) => {
        const [own, wanted] = [plain, full].map((each) => new Float32Array(each.read(name).buffer));
        return own!.reduce((sum, value, k) => sum + MEANS[i]![k % COLS]! * (value - wanted![k]!) ** 2, 0);
      });
    };
    const [solved, plain] = [await errors(folders[2]!), await errors(rounded.output)];
    for (const [i, error] of solved.entries()) expect(error).toBeLessThan(plain[i]!);
  });

  test("a GGUF checkpoint of an unknown architecture is solved on them", async () => {
    const model = file(
      ".gguf",
      ggufBytes(
        [["general.architecture", "string", "unheard"]],
        THEIR_NAMES.map((name, i) => ({
          ...{ name, type: "F32", dimensions: [COLS, ROWS] },
          data: bytesOf(gaussian(ROWS * COLS, i + 1)),
        })),
      ),
    );
    const { run } = quantize(model, file(".gguf", ggufFile()), { solver: "feedback" });
    const { layers } = await run();
    expect(layers.filter((layer) => layer.solved !== undefined).map(({ name }) => name)).toEqual(THEIR_NAMES);
  });

  test("cut off, negative, NaN or empty: refused by name", () => {
    const older = olderFile();
    for (const length of [0, 3, 10, 30, older.length - 30]) {
      const error = thrown(() => readImportanceMatrix(file(".imatrix", older.subarray(0, length))));
      expect(error).toBeInstanceOf(FormatError);
    }
    for (const bad of [NaN, -1, Infinity]) {
      const bytes = ggufFile(700, (sums) => (sums[3] = bad, sums));
      const error = thrown(() => readImportanceMatrix(file(".gguf", bytes)));
      expect(error).toBeInstanceOf(FormatError);
      expect(error.message).toMatch(/"blk\.0\.attn_q\.weight": sums of squares must be ≥ 0/);
    }
    const name = "blk.0.ffn_down_exps",
      stack = ggufBytes(
        [["general.type", "string", "imatrix"]],
        [{ part: "in_sum2", cols: COLS }, { part: "counts", cols: 1 }].map(({ part, cols }) => ({
          ...{ name: `${name}.${part}`, type: "F32", dimensions: [cols, 2] },
          data: bytesOf(new Float32Array(2 * cols).fill(1)),
        })),
      );
    const twice = thrown(() => readImportanceMatrix(file(".gguf", stack)));
    expect(twice).toBeInstanceOf(FormatError);
    expect(twice.message).toMatch(/"blk\.0\.ffn_down_exps": entries must have different names/);
    expect(thrown(() => readImportanceMatrix(file(".gguf", ggufFile(0)))).message).toMatch(
      /entry with inputs, got none/,
    );
  });
});
