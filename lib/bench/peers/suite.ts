/**
 * The peers' suite: our solvers and their rivals on the same models, layers, calibration data and held-out data. Who takes part is in
 * peers/contenders.ts, what is measured in peers/yardstick.ts.
 */
import { availableParallelism } from "node:os";
import { modelFrom } from "../../models/mod.ts";
import { MAX_THREADS } from "../../quant/mod.ts";
import { openCheckpoint } from "../../tensor/mod.ts";
import { openGgml } from "../ggml.ts";
import type { Interval } from "../../eval/intervals.ts";
import type { Contender, Target } from "./contender.ts";
import { correctionContenders, ggmlContenders, gridContenders, ladderContenders } from "./contenders.ts";
import { calibrationOf, collectInputs } from "./inputs.ts";
import { gridName, type MethodKind } from "./method.ts";
import { solverSpeed } from "./solver_speed.ts";
import { quantizedLayers, type QuantizedModel } from "./quantized_model.ts";
import { type Measurement, yardstickOf } from "./yardstick.ts";
import type { Kernels } from "../../native/mod.ts";
import type { BenchContext, Goal, Section, Skipped, Suite, SuiteReport } from "../suite.ts";

const nameOf = (path: string) => path.replace(/[/\\]+$/, "").split(/[/\\]/).at(-1)!;
const span = ({ value, low, high }: Interval, digits: number) =>
  `${value.toFixed(digits)} ${low.toFixed(digits)}–${high.toFixed(digits)}`;

const SHORT_KINDS: Record<MethodKind, string> = {
  "ours": "ours",
  "peer library": "library",
  "re-implementation": "re-impl.",
};

interface Measured {
  readonly contender: Contender | undefined;
  readonly quantized: Omit<QuantizedModel, "model"> | undefined;
  readonly measurement: Measurement;
  readonly evaluationSeconds: number;
}

function skippedReport(what: string, reason: string): SuiteReport {
  return { sections: [], rows: [], goals: [], skipped: [{ what, reason }] };
}

async function measureModel(
  context: BenchContext,
  path: string,
  { open, contenders: own, goals }: PeersOptions,
): Promise<SuiteReport> {
  const { kernels, environment, options } = context;
  const { seed, quick } = options;
  const threads = kernels.backend === "wasm"
    ? 1
    : options.threads ?? Math.min(MAX_THREADS, availableParallelism());
  const name = nameOf(path);
  using checkpoint = openCheckpoint(path);
  const full = modelFrom(checkpoint, kernels, { threads });
  const layers = quantizedLayers(checkpoint, kernels);
  if (layers.length === 0) return skippedReport(name, "no matrix of it is quantized by default");
  const limit = options.limit ?? (quick && full.kind !== "dit" ? 20 : undefined);
  const yardstick = await yardstickOf(full, path, kernels, {
    seed,
    threads,
    limit,
    quick,
    tasks: options.tasks,
  });
  if ("unsupported" in yardstick) return skippedReport(name, yardstick.unsupported);
  const calibration = await calibrationOf(full, path, { seed, quick });

  const begin = performance.now();
  const fullInputs = collectInputs(full, calibration, layers.map((layer) => layer.name), kernels, threads);
  const calibrationSeconds = (performance.now() - begin) / 1000;
  const target: Target = {
    path,
    checkpoint,
    kernels,
    threads,
    layers,
    source: {
      collect: (part, model) =>
        model === undefined
          ? fullInputs
          : collectInputs(model, calibration, part.map((layer) => layer.name), kernels, threads),
    },
  };

  const skipped: Skipped[] = yardstick.missing.map((text) => {
    const [what, reason] = text.split(": ") as [string, string];
    return { what: `${name}: ${what}`, reason };
  });
  const opened = await open?.();
  const ggml = opened === undefined || "reason" in opened ? undefined : opened;
  if (opened !== undefined && "reason" in opened) {
    skipped.push({ what: `${name}: ggml`, reason: opened.reason });
  }
  const rivals = ggml && ggmlContenders(ggml, layers);
  skipped.push(...(rivals?.skipped ?? []).map(({ what, reason }) => ({ what: `${name}: ${what}`, reason })));

  const measured: Measured[] = [];
  const measure = async (contender: Contender | undefined) => {
    context.progress(`${name}, ${contender?.name ?? "full"}`);
    const quantized = await contender?.quantize(target);
    if (quantized !== undefined && "unsupported" in quantized) {
      skipped.push({ what: `${name}: ${contender!.name}`, reason: quantized.unsupported });
      return;
    }
    const begin = performance.now();
    const measurement = yardstick.measure(quantized?.model ?? full);
    const evaluationSeconds = (performance.now() - begin) / 1000;
    const { model: _, ...rest } = quantized ?? { model: undefined };
    measured.push({
      contender,
      quantized: quantized && rest as Omit<QuantizedModel, "model">,
      measurement,
      evaluationSeconds,
    });
  };
  try {
    await measure(undefined);
    for (const contender of own(kernels, options)) await measure(contender);
    for (const contender of rivals?.contenders ?? []) await measure(contender);
  } finally {
    ggml?.close();
  }

  const { tasks } = yardstick;
  const weights = layers.reduce((sum, layer) => sum + layer.weights.length, 0);
  const section: Section = {
    title:
      `${name} (${full.kind}): ${layers.length} matrices with ${weights} weights, quantized by ours and by others`,
    notes: [
      `Measured on ${yardstick.source}; calibrated on`,
      `${calibration.source}, ${
        calibrationSeconds.toFixed(1)
      } s. 95 % intervals: Wilson for tasks, bootstrap for`,
      `${yardstick.distance}. Library: another project's code; re-impl.: written here from its paper. s: quantizing alone.`,
    ],
    columns: [
      { key: "method", title: "method" },
      { key: "kind", title: "kind" },
      { key: "bitsPerWeight", title: "bits/w", digits: 3 },
      { key: "distance", title: yardstick.distance },
      ...(measured[0]!.measurement.tokenAccuracy === undefined
        ? []
        : [{ key: "tokens", title: "tokens", digits: 3 }]),
      ...tasks.map((task) => ({ key: task, title: task })),
      ...(measured[0]!.measurement.byTimestep === undefined
        ? []
        : [{ key: "worst", title: "worst timestep" }]),
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
  const rows = measured.map(({ contender, quantized, measurement, evaluationSeconds }) => ({
    suite: "peers",
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
    measure: yardstick.distance,
    distance: measurement.distance,
    tokenAccuracy: measurement.tokenAccuracy ?? null,
    exactMatch: measurement.scores,
    byTimestep: measurement.byTimestep ?? null,
    quantizeSeconds: quantized?.seconds ?? null,
    evaluationSeconds,
    calibrationSeconds,
    calibration: calibration.source,
    evaluation: yardstick.source,
    notes: quantized?.notes ?? [],
    seed,
    threads,
    backend: environment.backend,
    isa: environment.isa,
    runtime: environment.runtime,
    processor: environment.processor,
  }));
  for (const { contender, quantized } of measured) {
    for (const note of quantized?.notes ?? []) context.progress(`${name}, ${contender!.name}, ${note}`);
  }
  return { sections: [section], rows, goals: goals(name, measured, yardstick.distance), skipped };
}

/** Our goals against the rivals of the same run, at each setting. */
function rivalGoals(name: string, measured: readonly Measured[], unit: string): Goal[] {
  const full = measured.find(({ contender }) => contender === undefined)?.measurement.scores.at(-1)
    ?.exactMatch;
  return measured.flatMap(({ contender, measurement }): Goal[] => {
    const { bits, groupSize } = contender ?? {};
    if (bits === undefined || groupSize === undefined) return [];
    const own = gridName("best", { bits, groupSize });
    if (contender!.name !== own) return [];
    const { value } = measurement.distance;
    const atMost = (rival: string, factor: number): Goal[] => {
      const rivalName = gridName(rival, { bits, groupSize });
      const other = measured.find((each) => each.contender?.name === rivalName)?.measurement.distance.value;
      if (other === undefined) return [];
      return [{
        goal: `${name}, ${own}: ${unit}, beside ${rival}`,
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

interface PeersOptions {
  /** How ggml is opened; without it only our own contenders take part. */
  readonly open?: typeof openGgml | undefined;
  readonly contenders: (kernels: Kernels, options: BenchContext["options"]) => Contender[];
  readonly goals: (name: string, measured: readonly Measured[], unit: string) => Goal[];
}

function suiteOf(about: Pick<Suite, "name" | "summary">, peers: PeersOptions): Suite {
  return {
    ...about,
    defaults: { bits: [2], groupSizes: [0, 32], solvers: ["round", "clip", "feedback", "best"] },
    run: async (context) => {
      const reports: SuiteReport[] = [];
      for (const path of context.options.models) reports.push(await measureModel(context, path, peers));
      return {
        sections: reports.flatMap(({ sections }) => sections),
        rows: reports.flatMap(({ rows }) => rows),
        goals: reports.flatMap(({ goals }) => goals),
        skipped: reports.flatMap(({ skipped }) => skipped),
      };
    },
  };
}

/** The suite with a way to open ggml. */
export function peersSuiteOf(open: typeof openGgml): Suite {
  return suiteOf({
    name: "peers",
    summary: "our solvers beside HQQ, GPTQ and ggml: bits, KL, puzzles, seconds",
  }, {
    open,
    contenders: (kernels, options) => gridContenders(kernels, options),
    goals: rivalGoals,
  });
}

/** Our solvers beside HQQ, GPTQ and ggml on the reference models, or those of `--model`. */
export const peersSuite: Suite = peersSuiteOf(openGgml);

/** What low-rank corrections and rotations gain or lose beside the same bits spent otherwise. */
export const correctionsSuite: Suite = {
  ...suiteOf(
    {
      name: "corrections",
      summary: "low-rank corrections and rotations beside equal bits in groups and codes",
    },
    { contenders: (_, options) => correctionContenders(options), goals: () => [] },
  ),
  defaults: { bits: [2], groupSizes: [0, 32, 16], solvers: ["best"] },
};

/** What each step of our own solvers gains and costs. */
const ladderSuite: Suite = suiteOf(
  { name: "solvers", summary: "the solver ladder, step by step: KL or noise error, puzzles, seconds" },
  { contenders: (_, options) => ladderContenders(options), goals: () => [] },
);

/** The ladder, and what it takes at a large model's shapes. */
export const solversSuite: Suite = {
  ...ladderSuite,
  run: async (context) => {
    const report = await ladderSuite.run(context);
    context.progress("solvers: layer shapes of a large model");
    return { ...report, sections: [...report.sections, solverSpeed(context)] };
  },
};
