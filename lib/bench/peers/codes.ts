/**
 * Trellis codes beside uniform ones at the same bits a weight: the whole pipeline with `solver: best` for
 * several seeds of the calibration, errors of layers and of the model on evaluation data as ratios.
 */
import { modelFrom } from "../../models/mod.ts";
import { bootstrapMean, type Interval } from "../../eval/intervals.ts";
import { DISTANCE_TITLES, MaskedYardstick, type Yardstick, yardstickOf } from "../../eval/yardstick.ts";
import { nameOfPath } from "../../files/whole.ts";
import type { BitWidth, GroupSize } from "../../quant/mod.ts";
import { openCheckpoint } from "../../tensor/mod.ts";
import { span } from "../settings.ts";
import { type BenchContext, type Goal, mergeReports, type Suite, type SuiteReport } from "../suite.ts";
import { calibrationKeys } from "./calibration.ts";
import { quantizedByPipeline } from "./contender.ts";

/** Seeds of the calibration, and noised images a timestep. */
const SEEDS = 5, QUICK_SEEDS = 2, REFINED_SEEDS = 3, IMAGES = 32, QUICK_IMAGES = 4, SEQUENCES = 300;

/** The refinement of phase 3, of scales and of zero points or offsets. */
const REFINED = { "thermodynamic.transition_optimization.enabled": true, enable_time_aware: false };

/** How many settings are tried, of which the error held out selects one. */
const CANDIDATES = "solver_options.candidates";

/** Codes that are measured: uniform ones, then those that are compared with them. */
const FORMS = [
  { codes: "uniform" },
  { codes: "trellis", scale_bits: 16 },
  { codes: "trellis", scale_bits: 3 },
  { codes: "trellis", scale_bits: 0 },
] as const;

/** Scales of trellis codes by their bits, behind a comma. */
const SCALES: Readonly<Record<number, string>> = {
  16: "",
  3: ", scales of 3 bits",
  0: ", rotated, one scale",
};

/** What a seed measured of uniform codes and of trellis codes. */
type Pair = {
  readonly seed: number;
  /** Bits of the trellis codes' scales: half floats, 3, or 0 of one scale a tensor. */
  readonly scaleBits: number;
  readonly bitsPerWeight: readonly [uniform: number, trellis: number];
  readonly distance: readonly [uniform: number, trellis: number];
  /** Geometric mean over layers of trellis / uniform. */
  readonly layerRatio: number;
  readonly seconds: readonly [uniform: number, trellis: number];
};

const mean = (values: readonly number[]): number => values.reduce((sum, v) => sum + v, 0) / values.length;

/** Geometric mean over seeds with its interval. */
function ratioOf(values: readonly number[], seed: number): Interval {
  const logarithms = bootstrapMean(values.map(Math.log), { seed }), { value, low, high } = logarithms;
  return { ...logarithms, value: Math.exp(value), low: Math.exp(low), high: Math.exp(high) };
}

/** Tasks are not solved: at 2 bits they hardly tell these codes apart, and take most of the time. */
const withoutTasks = (own: Yardstick): Yardstick =>
  own.kind === "images"
    ? own
    : new MaskedYardstick(own.config, own.source, own.sequences, own.puzzles, [], undefined, own.options);

async function measureSetting(
  context: BenchContext,
  path: string,
  yardstick: Yardstick,
  bit_width: BitWidth,
  group_size: GroupSize,
): Promise<Pair[]> {
  const { kernels, options: { quick, phase, seed: first } } = context, pairs: Pair[] = [];
  const refined = phase === undefined ? {} : REFINED, seeds = phase === undefined ? SEEDS : REFINED_SEEDS;
  for (let seed = first; seed < first + (quick ? QUICK_SEEDS : seeds); seed++) {
    const measured = [];
    // the gradients of the refinement know scales that are half floats
    const forms = (phase === undefined ? FORMS : FORMS.slice(0, 2)).filter((form) =>
      group_size === 0 || !("scale_bits" in form) || form.scale_bits > 0
    );
    for (const form of forms) {
      const where = `${nameOfPath(path)}, ${bit_width} bits, groups of ${
        group_size || "a row"
      }, seed ${seed}`;
      context.progress(`${where}, ${Object.entries(form).map((pair) => pair.join(" ")).join(", ")}`);
      const keys = {
        ...calibrationKeys(path, quick),
        calibration_seed: seed,
        group_size,
        bit_width,
        layer_bit_widths: { ".": bit_width }, // no rule gives a layer more, whose codes would stay uniform
        ...form,
        solver: "best",
      };
      const found = await quantizedByPipeline(path, kernels, { ...keys, ...refined });
      // the choice held out may take another damping for one of the codes, under which all errors are others
      const { layerErrors } = await quantizedByPipeline(path, kernels, { ...keys, [CANDIDATES]: 1 });
      measured.push({ ...found, layerErrors, distance: yardstick.measure(found.model).distance.value });
    }
    const [uniform, ...others] = measured as [typeof measured[0], ...typeof measured];
    pairs.push(...others.map((own, i) => ({
      seed,
      scaleBits: [16, 3, 0][i]!,
      bitsPerWeight: [uniform!.bitsPerWeight, own!.bitsPerWeight] as const,
      distance: [uniform!.distance, own!.distance] as const,
      layerRatio: Math.exp(
        mean(own!.layerErrors.map((error, i) => Math.log(error / uniform!.layerErrors[i]!))),
      ),
      seconds: [uniform!.seconds, own!.seconds] as const,
    })));
  }
  return pairs;
}

/** A seed's measurements of a setting. */
export type CodesRow = Pair & {
  readonly suite: "codes";
  readonly model: string;
  readonly bits: BitWidth;
  readonly groupSize: GroupSize;
  /** What `distance` is. */
  readonly measure: string;
};

async function measureModel(context: BenchContext, path: string): Promise<SuiteReport<CodesRow>> {
  const { kernels, options: { seed, quick, phase, tasks, bits, groupSizes, limit } } = context,
    name = nameOfPath(path);
  using checkpoint = openCheckpoint(path);
  const full = modelFrom(checkpoint, kernels), images = quick ? QUICK_IMAGES : IMAGES;
  const puzzles = limit ?? (quick ? 20 : undefined);
  const amounts = { seed, tasks, puzzles, sequences: SEQUENCES, images };
  const yardstick = withoutTasks(await yardstickOf(checkpoint, kernels, amounts));
  yardstick.measure(full);
  const rows: CodesRow[] = [], cells: Record<string, string | number>[] = [], goals: Goal[] = [];
  const settings = bits.flatMap((b) => groupSizes.map((g) => [b, g] as const)), all = [];
  for (const [width, groupSize] of settings) {
    const pairs = await measureSetting(context, path, yardstick, width, groupSize);
    const forms = Map.groupBy(pairs, ({ scaleBits }) => scaleBits);
    for (const [scaleBits, own] of forms) all.push([width, groupSize, scaleBits, own] as const);
  }
  for (const [width, groupSize, scaleBits, pairs] of all) {
    const layers = ratioOf(pairs.map(({ layerRatio }) => layerRatio), seed);
    const distance = ratioOf(pairs.map(({ distance: [uniform, trellis] }) => trellis / uniform), seed);
    const group = (groupSize === 0 ? "row" : `g ${groupSize}`) + SCALES[scaleBits],
      title = DISTANCE_TITLES[yardstick.kind];
    const of = (key: "bitsPerWeight" | "distance" | "seconds", which: 0 | 1) =>
      mean(pairs.map((pair) => pair[key][which]));
    cells.push({
      width,
      groups: group,
      seeds: pairs.length,
      uniformBits: of("bitsPerWeight", 0),
      bits: of("bitsPerWeight", 1),
      uniform: of("distance", 0),
      trellis: of("distance", 1),
      layers: span(layers, 3),
      distance: span(distance, 3),
      seconds: of("seconds", 1) / of("seconds", 0),
    });
    for (const pair of pairs) {
      rows.push({ suite: "codes", model: name, bits: width, groupSize, measure: title, ...pair });
    }
    const most = scaleBits === 16 ? [0.72, 0.75] as const : [1, 1] as const; // fewer bits: no worse is enough
    for (
      const [what, ratio, wanted] of [["layer error", layers, most[0]], [title, distance, most[1]]] as const
    ) {
      goals.push({
        goal: `${name}, ${width} bits, ${group}: ${what} beside uniform codes`,
        wanted: `at most ${wanted} ×, interval below 1`,
        measured: `${span(ratio, 3)} ×`,
        met: ratio.value <= wanted && ratio.high < 1,
      });
    }
  }
  return {
    sections: [{
      title: `${name} (${full.kind}): trellis codes beside uniform ones, solver best${
        phase === undefined ? "" : " and refinement"
      }`,
      notes: [
        `Measured on ${yardstick.source}. Means over seeds of the calibration; × is trellis / uniform, the geometric`,
        "mean of layers and of seeds, with a 95 % interval by bootstrap over seeds. Every matrix has these bits.",
        "Errors of layers are those of the first candidate, before a refinement: others have other moments.",
      ],
      columns: [
        { key: "width", title: "bits", digits: 0 },
        { key: "groups", title: "groups" },
        { key: "seeds", title: "seeds" },
        { key: "uniformBits", title: "bits/w, uniform", digits: 3 },
        { key: "bits", title: "trellis", digits: 3 },
        { key: "uniform", title: `${DISTANCE_TITLES[yardstick.kind]}, uniform`, digits: 5 },
        { key: "trellis", title: "trellis", digits: 5 },
        { key: "layers", title: "layer error ×" },
        { key: "distance", title: `${DISTANCE_TITLES[yardstick.kind]} ×` },
        { key: "seconds", title: "s ×", digits: 2 },
      ],
      rows: cells,
    }],
    rows,
    goals,
    skipped: [],
  };
}

/** Trellis codes beside uniform ones. */
export const codesSuite: Suite<CodesRow> = {
  name: "codes",
  summary: "trellis codes beside uniform ones at equal bits, over seeds of the calibration",
  defaults: { bits: [2], groupSizes: [0, 32], solvers: ["best"] },
  run: async (context) => {
    const reports: SuiteReport<CodesRow>[] = [];
    for (const path of context.options.models) reports.push(await measureModel(context, path));
    return mergeReports(reports);
  },
};
