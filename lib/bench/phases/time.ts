/** Costs of a row of the phases suite: of its pipeline, its phases, selecting θ, forward passes. */
import type { LoadedModel } from "../../models/mod.ts";
import { imageNoise } from "../../models/random.ts";
import type { PhasesReport } from "../../phases/mod.ts";
import type { TimeParameters } from "../../time/mod.ts";
import { median, pairedRatio, type Summary } from "../../eval/statistics.ts";
import { secondsOf } from "../timing.ts";

/** Parts of the phases' time: the scores and the held-out step KL beside them are phase 1's. */
export const PHASE_PARTS = [
  ...["refinement", "output", "timeScales", "smoothing", "sampler"] as const,
  ...["scores", "stepKl"] as const,
];
export type PhaseTimes = Readonly<Record<(typeof PHASE_PARTS)[number], number>>;

/** Seconds of one run of the pipeline by part, without its calibrated solver. */
export interface PipelineRun extends PhaseTimes {
  readonly calibrate: number;
  readonly activations: number;
  /** Rounding, checking and writing the checkpoint, and θ beside it. */
  readonly write: number;
}

/** Times of a row from its report, 0 where there is none. */
export function phaseTimes(
  report: Partial<PhasesReport> = {},
): PhaseTimes & Pick<PipelineRun, "activations"> {
  const { refinement, output, timeScales, smoothing, sampler, validation, activationMilliseconds } = report;
  const parts = { refinement, output, timeScales, smoothing, sampler, scores: validation };
  const times = Object.entries(parts).map(([part, own]) => [part, (own?.milliseconds ?? 0) / 1000]);
  return {
    ...Object.fromEntries(times) as Readonly<Record<keyof typeof parts, number>>,
    stepKl: (validation?.stepKlMilliseconds ?? 0) / 1000,
    activations: (activationMilliseconds ?? 0) / 1000,
  };
}

const phaseSeconds = (run: PhaseTimes, parts: readonly (keyof PhaseTimes)[]) =>
  parts.reduce((sum, part) => sum + run[part], 0);

/** Seconds of a whole pipeline: median over its runs. @param solve seconds of its calibrated solver */
export function pipelineSeconds(runs: readonly PipelineRun[], solve: number): number {
  return median(
    runs.map((run) => run.calibrate + run.activations + run.write + solve + phaseSeconds(run, PHASE_PARTS)),
  );
}

/**
 * Time of a pipeline with phases / the same without − 1: the median over its runs, each divided by itself
 * less the phases.
 *
 * @param solve seconds of the calibrated solver in the pipeline with the phases, and `without` in the one
 *   without
 * @param parts of the phases that count
 */
export function overhead(
  runs: readonly PipelineRun[],
  solve: number,
  without: number,
  parts: readonly (keyof PhaseTimes)[] = PHASE_PARTS,
): number {
  return median(runs.map((run) => {
    const rest = run.calibrate + run.activations + run.write;
    return (rest + solve + phaseSeconds(run, parts)) / (rest + without) - 1;
  }));
}

const SELECTIONS = 2000, FORWARDS = 9;

/** Time of selecting θ for every layer over the time of a forward pass of one item. */
export function selectionShare(loaded: LoadedModel, parameters: TimeParameters): number {
  const { axis } = parameters.groups, names = [...parameters.layers.keys()];
  // The middle of the axis; times differ from call to call, so that nothing is known beforehand.
  const times = Array.from(
    { length: SELECTIONS },
    (_, i) => axis.kind === "timesteps" ? i % axis.bins : (i % axis.bins + 1) / axis.bins,
  );
  const select = () => {
    for (const time of times) for (const name of names) parameters.at(name, time);
  };
  const forward = forwardOf(loaded, 1);
  select();
  forward();
  const selecting = median(Array.from({ length: 5 }, () => secondsOf(select))) / SELECTIONS;
  return selecting / median(Array.from({ length: FORWARDS }, () => secondsOf(forward)));
}

/** Items of a batch that forward passes are timed on, and how many passes of each model, in turn. */
const TIMED_SEQUENCES = 32, TIMED_IMAGES = 16, TIMED_FORWARDS = 51;

/** A forward pass over so many items, all at the middle of the axis, as a sampler's step has them. */
function forwardOf(loaded: LoadedModel, items: number): () => void {
  if (loaded.kind === "dit") {
    const { model } = loaded, noise = imageNoise(0, 0, items, model.imageElements);
    const time = Math.floor((model.timeParameters?.groups.axis.bins ?? 2) / 2);
    const times = new Array<number>(items).fill(time), labels = times.map((_, i) => i % model.config.classes);
    return () => void model.forward(noise, times, labels);
  }
  const { model } = loaded,
    { maxTokens, vocabularySize } = model.config,
    length = items * Math.min(32, maxTokens);
  const tokens = Int32Array.from({ length }, (_, i) => i % vocabularySize);
  return () => void model.forward(tokens, items, { t: 0.5 });
}

/**
 * Time of a forward pass of one model over that of another of the same family, with the same threads: passes
 * in turn over the same batch.
 *
 * @throws {TypeError} when one draws and the other writes
 */
export function forwardRatio(own: LoadedModel, other: LoadedModel): Summary {
  if ((own.kind === "dit") !== (other.kind === "dit")) {
    throw new TypeError("Cannot compare a language model with one that draws images");
  }
  const items = own.kind === "dit" ? TIMED_IMAGES : TIMED_SEQUENCES;
  const runs = [own, other].map((loaded) => forwardOf(loaded, items));
  const milliseconds: [number[], number[]] = [[], []];
  for (let i = -2; i < TIMED_FORWARDS; i++) {
    for (const [m, run] of runs.entries()) {
      const seconds = secondsOf(run);
      if (i >= 0) milliseconds[m]!.push(1000 * seconds); // the first ones warm up
    }
  }
  return pairedRatio(...milliseconds);
}
