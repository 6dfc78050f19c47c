/**
 * The peers' suite: our solvers and other projects' methods on the same models, layers, calibration data and
 * held-out data. Who takes part is in contenders.ts.
 */
import { modelFrom } from "../../models/mod.ts";
import { CheckpointError, ConfigError } from "../../errors.ts";
import { DISTANCE_TITLES, type Measurement, type Yardstick, yardstickOf } from "../../eval/yardstick.ts";
import type { Kernels } from "../../native/mod.ts";
import type { BitWidth } from "../../quant/mod.ts";
import { openCheckpoint } from "../../tensor/mod.ts";
import { openGgml } from "../ggml.ts";
import { nameOfPath } from "../../files/whole.ts";
import { span } from "../settings.ts";
import {
  type BenchContext,
  type Goal,
  mergeReports,
  type Section,
  type Skipped,
  type Suite,
  type SuiteReport,
} from "../suite.ts";
import { hasPositionWeights } from "./calibration.ts";
import type { Contender } from "./contender.ts";
import { defaultContenders, ggmlContenders, gridContenders, ladderContenders } from "./contenders.ts";
import { defaultGoals, type MeasuredDistance } from "./default_goals.ts";
import { gridName, type MethodKind } from "./method.ts";
import { type QuantizedModel, type Target, targetOf } from "./quantized_model.ts";
import { llamaContenders, llamaGoals } from "./in_llama.ts";

/** Sequences for a language model without puzzles, and noised images a timestep. */
const SYNTHETIC_SEQUENCES = 300, IMAGES = 32, QUICK_SEQUENCES = 40, QUICK_IMAGES = 4;

const SHORT_KINDS: Record<MethodKind, string> = {
  "ours": "ours",
  "peer library": "library",
  "re-implementation": "re-impl.",
};

/** A full-precision model or a contender's, as measured. */
interface Measured {
  readonly contender: Contender | undefined;
  readonly quantized: QuantizedModel | undefined;
  readonly measurement: Measurement;
  readonly evaluationSeconds: number;
}

/** A comparison of ways to quantize, as a suite. */
export interface Comparison extends Pick<Suite, "name" | "summary"> {
  readonly contenders: (
    kernels: Kernels,
    options: BenchContext["options"] & { readonly hasPositionWeights: boolean },
  ) => Contender[];
  /** How ggml is opened; without it only the contenders above take part. */
  readonly openGgml?: typeof openGgml;
  readonly goals?: (name: string, measured: readonly Measured[], unit: string) => Goal[];
  /** Widths by default; 2 alone where none are named. */
  readonly bits?: readonly BitWidth[];
  /** Times that each puzzle is masked; once by default. */
  readonly repeats?: number;
}

const skippedReport = (what: string, reason: string): SuiteReport<PeersRow> => ({
  sections: [],
  rows: [],
  goals: [],
  skipped: [{ what, reason }],
});

/** Measures full precision and every contender on a model. */
async function measureModel(
  context: BenchContext,
  path: string,
  comparison: Comparison,
): Promise<SuiteReport<PeersRow>> {
  const { kernels, options } = context, { seed, quick, tasks } = options;
  const name = nameOfPath(path);
  using checkpoint = openCheckpoint(path);
  const full = modelFrom(checkpoint, kernels);
  const limit = options.limit ?? (quick && full.kind !== "dit" ? 20 : undefined);
  let yardstick: Yardstick;
  try {
    yardstick = await yardstickOf(checkpoint, kernels, {
      seed,
      tasks,
      puzzles: limit,
      repeats: quick ? undefined : comparison.repeats,
      drawn: limit,
      sequences: quick ? QUICK_SEQUENCES : SYNTHETIC_SEQUENCES,
      images: quick ? QUICK_IMAGES : IMAGES,
    });
  } catch (error) {
    if (!(error instanceof ConfigError || error instanceof CheckpointError)) throw error;
    return skippedReport(name, error.message); // the next model may have what it needs
  }
  const target = await targetOf({ path, checkpoint, full, kernels }, quick);
  if (target.layers.length === 0) return skippedReport(name, "no matrix of it is quantized by default");
  const skipped: Skipped[] = [...yardstick.missing];
  const opened = await comparison.openGgml?.();
  const ggml = opened === undefined || "reason" in opened ? undefined : opened;
  if (opened !== undefined && "reason" in opened) skipped.push({ what: "ggml", reason: opened.reason });
  const others = ggml && ggmlContenders(ggml, target.layers.map(({ cols }) => cols));
  skipped.push(...others?.skipped ?? []);
  const own = comparison.contenders(kernels, {
    ...options,
    hasPositionWeights: hasPositionWeights(target.data.by_role),
  });
  const files = ggml && await llamaContenders(ggml, target);
  if (files !== undefined && "reason" in files) {
    skipped.push({ what: "files run by llama.cpp", reason: files.reason });
  }
  const inLlama = files === undefined || "reason" in files ? undefined : files;
  const measured: Measured[] = [];
  try {
    for (const contender of [undefined, ...own, ...others?.contenders ?? [], ...inLlama?.contenders ?? []]) {
      context.progress(`${name}, ${contender?.name ?? "full"}`);
      const found = await measureContender(contender, target, yardstick);
      if ("unsupported" in found) skipped.push({ what: contender!.name, reason: found.unsupported });
      else measured.push(found);
      if ("quantized" in found) {
        for (const note of found.quantized?.notes ?? []) {
          context.progress(`${name}, ${contender!.name}, ${note}`);
        }
      }
    }
  } finally {
    inLlama?.close();
    ggml?.close();
  }
  return {
    sections: [sectionOf(name, target, yardstick, measured)],
    rows: measured.map((each) => rowOf(context, name, target, yardstick, each)),
    goals: [
      ...comparison.goals?.(name, measured, DISTANCE_TITLES[yardstick.kind]) ?? [],
      ...llamaGoals(
        name,
        new Map(measured.map((each) => [each.contender?.name ?? "", each.measurement.distance.value])),
      ),
    ],
    skipped: skipped.map(({ what, reason }) => ({ what: `${name}: ${what}`, reason })),
  };
}

/** Where the calibration data come from, without the folder of their file. */
const calibrationText = ({ data: { source } }: Target["data"]["by_role"]): string =>
  source.replace(/"[^"]*[/\\]([^"/\\]+)"/, "$1");

/** Quantizes a model by a contender and measures the result; without a contender, full precision. */
async function measureContender(contender: Contender | undefined, target: Target, yardstick: Yardstick) {
  const quantized = await contender?.quantize(target);
  if (quantized !== undefined && "unsupported" in quantized) return quantized;
  const begin = performance.now();
  const measurement = yardstick.measure(quantized?.model ?? target.full);
  const evaluationSeconds = (performance.now() - begin) / 1000;
  return { contender, quantized, measurement, evaluationSeconds };
}

function sectionOf(
  name: string,
  { full, layers, data }: Target,
  { kind, source, tasks }: Yardstick,
  measured: readonly Measured[],
): Section {
  const { tokenAccuracy, byTimestep } = measured[0]!.measurement, unit = DISTANCE_TITLES[kind];
  const weights = layers.reduce((sum, layer) => sum + layer.weights.length, 0);
  return {
    title:
      `${name} (${full.kind}): ${layers.length} matrices with ${weights} weights, quantized by ours and by others`,
    notes: [
      `Measured on ${source}.`,
      `All calibrated on ${calibrationText(data.by_role)}, with the same masks or noise.`,
      `95 % intervals: Wilson for tasks, bootstrap for ${unit}. Library: another project's code; re-impl.: written here`,
      "from its paper. s: ours with reading, calibrating and writing; others' quantizing alone.",
    ],
    columns: [
      { key: "method", title: "method" },
      { key: "kind", title: "kind" },
      { key: "bitsPerWeight", title: "bits/w", digits: 3 },
      { key: "distance", title: unit },
      ...(tokenAccuracy === undefined ? [] : [{ key: "tokens", title: "tokens", digits: 3 }]),
      ...tasks.map((task) => ({ key: task, title: task })),
      ...(byTimestep === undefined ? [] : [{ key: "worst", title: "worst timestep" }]),
      { key: "seconds", title: "s", digits: 2 },
    ],
    rows: measured.map(({ contender, quantized, measurement }) => {
      const { byTimestep, tokenAccuracy, scores, distance } = measurement;
      const worst = byTimestep?.toSorted((a, b) => b.relativeError.value - a.relativeError.value)[0];
      return {
        method: contender?.name ?? "full precision",
        kind: contender && SHORT_KINDS[contender.kind],
        bitsPerWeight: quantized?.bitsPerWeight,
        distance: contender && span(distance, 4),
        tokens: tokenAccuracy?.value,
        worst: contender && worst && `${worst.relativeError.value.toFixed(4)} at ${worst.timestep}`,
        ...Object.fromEntries(scores.map(({ task, exactMatch }) => [task, span(exactMatch, 2)])),
        seconds: quantized?.seconds,
      };
    }),
  };
}

export type PeersRow = ReturnType<typeof rowOf>;

function rowOf(
  context: BenchContext,
  name: string,
  { full, data }: Target,
  yardstick: Yardstick,
  { contender, quantized, measurement, evaluationSeconds }: Measured,
) {
  const { environment: { backend, isa, runtime, processor }, options: { seed } } = context;
  return {
    suite: "peers" as const,
    model: name,
    family: full.kind,
    method: contender?.name ?? "full precision",
    kind: contender?.kind ?? null,
    bits: contender?.bits ?? null,
    groupSize: contender?.groupSize ?? null,
    bitsPerWeight: quantized?.bitsPerWeight ?? null,
    storedBytes: quantized?.storedBytes ?? null,
    weights: quantized?.weights ?? null,
    relativeRmsError: quantized?.relativeRmsError ?? null,
    measure: DISTANCE_TITLES[yardstick.kind],
    distance: measurement.distance,
    tokenAccuracy: measurement.tokenAccuracy ?? null,
    exactMatch: measurement.scores,
    byTimestep: measurement.byTimestep?.map(({ perImage: _, ...error }) => error) ?? null,
    quantizeSeconds: quantized?.seconds ?? null,
    evaluationSeconds,
    calibration: calibrationText(data.by_role),
    evaluation: yardstick.source,
    notes: quantized?.notes ?? [],
    seed,
    threads: context.kernels.threads,
    ...{ backend, isa, runtime, processor },
  };
}

/** Goals of `best` beside the peers of the same run, at each setting. */
function peerGoals(name: string, measured: readonly Measured[], unit: string): Goal[] {
  const full = measured.find(({ contender }) => contender === undefined)?.measurement.scores.at(-1)
    ?.exactMatch;
  return measured.flatMap(({ contender, measurement }): Goal[] => {
    const { bits, groupSize } = contender ?? {};
    if (bits === undefined || groupSize === undefined) return [];
    const own = gridName("best", { bits, groupSize });
    if (contender!.name !== own) return [];
    const { value } = measurement.distance;
    const atMost = (peer: string, factor: number): Goal[] => {
      const peerName = gridName(peer, { bits, groupSize });
      const other = measured.find((each) => each.contender?.name === peerName)?.measurement.distance.value;
      if (other === undefined) return [];
      return [{
        goal: `${name}, ${own}: ${unit}, beside ${peer}`,
        wanted: `at most ${factor} ×`,
        measured: `${(value / other).toFixed(3)} × (${value.toPrecision(3)} / ${other.toPrecision(3)})`,
        met: value <= factor * other,
      }];
    };
    const exact = measurement.scores.at(-1)?.exactMatch;
    return [
      ...atMost("round", unit.startsWith("KL") ? 0.05 : 0.1),
      ...atMost("HQQ", 1),
      ...atMost("GPTQ", 1.1),
      ...(full === undefined || exact === undefined ? [] : [{
        goal: `${name}, ${own}: exact match of all tasks`,
        wanted: `${(full.value - 0.02).toFixed(3)} or inside full precision's interval`,
        measured: span(exact, 3),
        met: exact.value >= full.value - 0.02 || exact.value >= full.low,
      }]),
    ];
  });
}

/** A comparison on each of the models, as a suite of the bench. */
export function comparisonSuite(comparison: Comparison): Suite<PeersRow> {
  const { name, summary } = comparison;
  return {
    name,
    summary,
    defaults: {
      bits: comparison.bits ?? [2],
      groupSizes: [0, 32],
      solvers: ["round", "clip", "feedback", "best"],
    },
    run: async (context) => {
      const reports: SuiteReport<PeersRow>[] = [];
      for (const path of context.options.models) reports.push(await measureModel(context, path, comparison));
      return mergeReports(reports);
    },
  };
}

/** Our solvers beside HQQ, GPTQ and ggml. */
export const PEERS: Comparison = {
  name: "peers",
  summary: "our solvers beside HQQ, GPTQ and ggml: bits, KL, puzzles, seconds",
  openGgml,
  contenders: gridContenders,
  goals: peerGoals,
};

/** The suite `peers`: our solvers beside HQQ, GPTQ and ggml. */
export const peersSuite: Suite<PeersRow> = comparisonSuite(PEERS);

/** The solver ladder, and what each step gains and costs. */
export const solversSuite: Suite<PeersRow> = comparisonSuite({
  name: "solvers",
  summary: "the solver ladder, step by step: KL or noise error, puzzles, seconds",
  contenders: (_, options) => ladderContenders(options),
});

/** Masks of a puzzle: at 4 bits a few positions are most of a KL (docs/solvers.md). */
const MASKS = 8;

/** What a contender at a setting measured; nothing of full precision. */
function distanceOf(
  { contender, measurement: { distance, stepKl, byTimestep } }: Measured,
): MeasuredDistance[] {
  const { name = "", bits, groupSize } = contender ?? {};
  if (bits === undefined || groupSize === undefined) return [];
  const samples = byTimestep?.flatMap(({ perImage }) => [...perImage]) ?? stepKl.sums;
  return [{ name, bits, groupSize, distance: distance.value, samples }];
}

/** What `solver: auto` chooses between: rounding, clip search, `best` on each source of data. */
export const defaultsSuite: Suite<PeersRow> = comparisonSuite({
  name: "defaults",
  summary: "rounding, clip search, and best on real, own and synthetic calibration data",
  contenders: (_, options) => defaultContenders(options),
  goals: (name, measured, unit) => defaultGoals(name, measured.flatMap(distanceOf), unit),
  bits: [2, 3, 4],
  repeats: MASKS,
});
