/**
 * The steps suite: one denoising step of 256 positions from packed weights at the widths of published models,
 * beside llama.cpp's step on a file of the same shapes; and what 8-bit activations change in the predictions
 * of the reference models. Weights of the steps are random and their layers few: a step of all layers takes
 * as many times longer.
 */
import { join } from "node:path";
import { resolveConfig } from "../../config/mod.ts";
import { spreadPercent, summarize, type Summary } from "../../eval/statistics.ts";
import { DISTANCE_TITLES, yardstickOf } from "../../eval/yardstick.ts";
import { nameOfPath } from "../../files/whole.ts";
import { type ActivationPrecision, forwardCost, loadStoredModel, requirementsAt } from "../../models/mod.ts";
import { withThreads } from "../../native/mod.ts";
import { quantizeCheckpoint } from "../../pipeline/mod.ts";
import { openCheckpoint } from "../../tensor/mod.ts";
import { commandsOf, runChild } from "../child_process.ts";
import { gaussianWeights } from "../random.ts";
import {
  type BenchContext,
  type Goal,
  type Section,
  type Skipped,
  type Suite,
  type SuiteReport,
  tableOf,
} from "../suite.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";
import { type Contender, speedRatio, timeInterleaved } from "../timing.ts";
import { fitsBlocks, type Llama, LLAMA_TYPES, type LlamaStep, openLlama } from "./llama.ts";

type Model = "dream" | "dit";

const POSITIONS = 256;
const BITS = [4, 2] as const;
const GROUP_SIZE = 64;
/** llama.cpp's activations: 8 bits, a scale for 256 columns of a token. */
const PEER_ACTIVATIONS = "q8_K";
const ACTIVATIONS: readonly ActivationPrecision[] = ["int8", "f32"];

/** Sizes of the steps' models. */
export interface StepsScale {
  readonly layers: Readonly<Record<Model, number>>;
  readonly hidden: Readonly<Record<Model, number>>;
  readonly samples: number;
}
const FULL_SCALE: StepsScale = {
  layers: { dream: 2, dit: 4 },
  hidden: { dream: 3584, dit: 1152 },
  samples: 7,
};
const QUICK_SCALE: StepsScale = { ...FULL_SCALE, hidden: { dream: 1792, dit: 576 }, samples: 3 };

/** Speed against llama.cpp that is wanted. */
const GOAL_SPEED = 1;
/** Distance to full precision with 8-bit activations, against that with float32, that counts as the same. */
const GOAL_DISTANCE = 1.1;

/** A contender of a step; `peer` is llama.cpp's type. */
interface Step {
  readonly model: Model;
  readonly weights: string;
  readonly bits: number;
  readonly activations: string;
  readonly contender: Contender;
}

interface MeasuredStep extends Omit<Step, "contender"> {
  readonly seconds: Summary;
  readonly multiplyAdds: number;
  /** Speed against llama.cpp's step at the same bits. */
  readonly toLlama: Summary | undefined;
  /** Speed against our step of float32 activations. */
  readonly toF32: Summary | undefined;
}

/** What one model's step needs. */
interface Bench {
  readonly context: BenchContext;
  readonly folder: string;
  readonly threads: number;
  readonly scale: StepsScale;
}

async function quantized(
  { context: { kernels }, threads }: Bench,
  input: string,
  output: string,
  bits: number,
  solver: "round" | "clip",
): Promise<string> {
  const overrides = { bit_width: bits, group_size: GROUP_SIZE, solver, num_threads: threads };
  await quantizeCheckpoint({
    input,
    output,
    config: resolveConfig({ overrides }).config,
    kernels,
    force: true,
  });
  return output;
}

/** Our step of a packed model, which must have finite outputs that the other precision nearly gives. */
function ownStep({ context, threads }: Bench, path: string, activations: ActivationPrecision) {
  const loaded = loadStoredModel(path, withThreads(context.kernels, threads), { activations });
  if (loaded.kind === "dit") {
    const { model } = loaded, noise = gaussianWeights(model.imageElements, context.options.seed);
    return () => model.forward(noise, [500], [1]);
  }
  const { model } = loaded, ids = new Int32Array(POSITIONS).fill(model.config.maskToken);
  return () => model.forward(ids, 1);
}

function checkAlike(name: string, one: Float32Array, other: Float32Array): void {
  let error = 0, size = 0;
  for (let i = 0; i < one.length; i++) {
    error += (one[i]! - other[i]!) ** 2;
    size += other[i]! ** 2;
  }
  if (!(error < 0.01 * size)) {
    throw new Error(
      `Cannot time ${name}: both precisions must agree to a tenth, got ${Math.sqrt(error / size)}`,
    );
  }
}

async function measureModel(bench: Bench, model: Model, llama: Llama | undefined): Promise<MeasuredStep[]> {
  const { context, folder, threads, scale } = bench, { seed } = context.options, input = join(folder, model);
  const layers = scale.layers[model];
  context.progress(`a checkpoint of ${layers} layers of the shapes of ${model}`);
  const sizes = { layout: model, layers, hidden: scale.hidden[model], seed };
  const args = Object.entries(sizes).flatMap(([name, value]) => [`--${name}`, `${value}`]);
  await runChild(commandsOf(context)("make_checkpoint.ts", [input, ...args]));
  const needs = requirementsAt(input), steps: Step[] = [], opened: LlamaStep[] = [];
  for (const bits of BITS) {
    context.progress(`${model} at ${bits} bits`);
    const path = await quantized(bench, input, `${input}-${bits}`, bits, "round");
    const runs = ACTIVATIONS.map((activations) => ownStep(bench, path, activations));
    checkAlike(`${model} at ${bits} bits`, runs[0]!().slice(), runs[1]!());
    runs.forEach((run, i) =>
      steps.push({ model, weights: `${bits} bits`, bits, activations: ACTIVATIONS[i]!, contender: { run } })
    );
    if (llama === undefined || needs.model.kind === "dit" || !fitsBlocks(needs.model.config)) continue;
    const type = LLAMA_TYPES[bits], { config } = needs.model;
    const step = llama.randomStep(join(folder, `${type}.gguf`), config, type, POSITIONS, threads);
    opened.push(step);
    steps.push({ model, weights: `llama.cpp ${type}`, bits, activations: PEER_ACTIVATIONS, contender: step });
  }
  context.progress(`${model}: steps of ${POSITIONS} positions`);
  const { multiplyAdds } = forwardCost(needs.model, { batch: 1, tokens: POSITIONS });
  const timings = timeInterleaved(steps.map(({ contender }) => contender), {
    samples: scale.samples,
    warmUpMilliseconds: 1,
    sampleMilliseconds: 1,
  });
  for (const step of opened) step.close();
  return steps.map(({ contender: _, ...step }, i): MeasuredStep => {
    const of = (activations: string) =>
      steps.findIndex((other) => other.bits === step.bits && other.activations === activations);
    const against = (other: number) =>
      other < 0 || other === i ? undefined : speedRatio(timings[i]!, timings[other]!);
    return {
      ...step,
      seconds: summarize(timings[i]!.milliseconds.map((milliseconds) => milliseconds / 1000)),
      multiplyAdds,
      toLlama: against(of(PEER_ACTIVATIONS)),
      toF32: step.activations === "int8" ? against(of("f32")) : undefined,
    };
  });
}

// Predictions -----------------------------------------------------------------------------------------------

interface MeasuredDistance {
  readonly model: string;
  readonly bits: number;
  readonly unit: string;
  readonly f32: number;
  readonly int8: number;
}

/** Distances to full precision of a reference model with either precision of activations. */
async function measureDistances(bench: Bench, path: string): Promise<MeasuredDistance[]> {
  const { context: { kernels, options, progress }, folder } = bench;
  const few = options.quick ? { puzzles: 20, images: 2 } : { puzzles: 300, images: 16 };
  using checkpoint = openCheckpoint(path);
  const yardstick = await yardstickOf(checkpoint, kernels, {
    ...few,
    seed: options.seed,
    sequences: 16,
    trajectories: 4,
  });
  await yardstick.measure(loadStoredModel(path, kernels));
  const found: MeasuredDistance[] = [], model = nameOfPath(path);
  for (const bits of BITS) {
    progress(`${model} at ${bits} bits: distance to full precision`);
    const output = await quantized(bench, path, join(folder, `${model}-${bits}`), bits, "clip");
    const distance = async (activations: ActivationPrecision) =>
      (await yardstick.measure(loadStoredModel(output, kernels, { activations }))).distance.value;
    const unit = DISTANCE_TITLES[yardstick.kind];
    found.push({ model, bits, unit, f32: await distance("f32"), int8: await distance("int8") });
  }
  return found;
}

// Report ----------------------------------------------------------------------------------------------------

/** Rows of the JSON report: a step, or a distance. */
export type StepsRow = ReturnType<typeof rowOf>;

function rowOf({ environment }: BenchContext, threads: number, measured: MeasuredStep | MeasuredDistance) {
  const { backend, isa, runtime, processor } = environment;
  return { suite: "steps" as const, threads, backend, isa, runtime, processor, ...measured };
}

function goalsOf(
  steps: readonly MeasuredStep[],
  distances: readonly MeasuredDistance[],
  reason: string,
): Goal[] {
  return [
    ...BITS.map((bits): Goal => {
      const own = steps.find((step) =>
        step.bits === bits && step.activations === "int8" && step.model === "dream"
      );
      const speed = own?.toLlama?.median;
      const goal = `a step of ${POSITIONS} at ${bits} bits / llama.cpp's at ${LLAMA_TYPES[bits]}`;
      const wanted = `≥ ${GOAL_SPEED} × its speed`;
      return speed === undefined
        ? { goal, wanted, measured: null, met: null, reason }
        : { goal, wanted, measured: `${speed.toFixed(2)} ×`, met: speed >= GOAL_SPEED };
    }),
    ...distances.map(({ model, bits, f32, int8 }): Goal => ({
      goal: `${model}, ${bits} bits: distance of 8-bit / float32 activations`,
      wanted: `≤ ${GOAL_DISTANCE}`,
      measured: (int8 / f32).toFixed(3),
      met: int8 <= GOAL_DISTANCE * f32,
    })),
  ];
}

async function measure(context: BenchContext, scale: StepsScale): Promise<SuiteReport<StepsRow>> {
  const threads = context.options.threads ?? 2;
  return await withTemporaryFolder(async (folder) => {
    const bench: Bench = { context, folder, threads, scale }, llama = await openLlama(folder);
    const reason = "reason" in llama ? llama.reason : "widths must be multiples of 256",
      peer = "reason" in llama ? undefined : llama;
    const skipped: Skipped[] = peer === undefined ? [{ what: "llama.cpp's steps", reason }] : [];
    const steps = [
      ...await measureModel(bench, "dream", peer),
      ...await measureModel(bench, "dit", undefined),
    ];
    const distances: MeasuredDistance[] = [];
    for (const path of context.options.models) distances.push(...await measureDistances(bench, path));
    peer?.close();
    return {
      sections: sectionsOf(bench, steps, distances),
      rows: [...steps, ...distances].map((each) => rowOf(context, threads, each)),
      goals: goalsOf(steps, distances, reason),
      skipped,
    };
  });
}

function sectionsOf(
  { threads, scale: { layers, hidden } }: Bench,
  steps: readonly MeasuredStep[],
  distances: readonly MeasuredDistance[],
): Section[] {
  const speed = (summary: Summary | undefined) => summary === undefined ? null : summary.median;
  return [
    tableOf(
      `One denoising step of ${POSITIONS} positions, ${threads} threads`,
      [
        `Random weights in the shapes of Dream 7B (${layers.dream} layers, width ${hidden.dream}, a small vocabulary) and DiT-XL/2`,
        `(${layers.dit} layers, width ${hidden.dit}), groups of ${GROUP_SIZE}; all logits wanted. Taken in turn, sample by sample.`,
      ],
      steps,
      [
        ["model", "model", ({ model }) => model],
        ["weights", "weights", ({ weights }) => weights],
        ["activations", "activations", ({ activations }) => activations],
        ["seconds", "seconds", ({ seconds }) => seconds.median, 3],
        ["spread", "±%", ({ seconds }) => spreadPercent(seconds), 1],
        ["rate", "G mul-adds/s", ({ seconds, multiplyAdds }) => multiplyAdds / seconds.median / 1e9, 0],
        ["toLlama", "× llama.cpp", ({ toLlama }) => speed(toLlama), 2],
        ["toF32", "× float32 act.", ({ toF32 }) => speed(toF32), 2],
      ],
    ),
    tableOf(
      "Distance to full precision by activations",
      ["Held-out data; weights by clip search in the same groups."],
      distances,
      [
        ["model", "model", ({ model }) => model],
        ["bits", "bits", ({ bits }) => bits],
        ["unit", "distance", ({ unit }) => unit],
        ["f32", "float32", ({ f32 }) => f32.toPrecision(4)],
        ["int8", "8 bits a token", ({ int8 }) => int8.toPrecision(4)],
      ],
    ),
  ];
}

/** The suite at other sizes, for tests. */
export const stepsSuiteOf = (scale: StepsScale | undefined): Suite<StepsRow> => ({
  name: "steps",
  summary: "a denoising step from packed weights at the widths of Dream 7B and DiT-XL/2, beside llama.cpp's",
  run: (context) => measure(context, scale ?? (context.options.quick ? QUICK_SCALE : FULL_SCALE)),
});

/** One denoising step from packed weights, beside llama.cpp's. */
export const stepsSuite = stepsSuiteOf(undefined);
