/**
 * Forecast of calibrated work, before it begins: time by stage, from multiplications counted and products timed on
 * the spot, and memory, which is refused where it does not fit, with a setting that does.
 */
import process from "node:process";
import { blockRuns } from "../calibration/collect.ts";
import type { Calibrated, CalibrationPart } from "../calibration/mod.ts";
import { calibrationGroups } from "../calibration/saved_statistics.ts";
import { type ConfigInForce, hasBudget } from "../config/mod.ts";
import { MemoryError } from "../errors.ts";
import { quote } from "../files/positional.ts";
import { type Blockwise, forwardCost, modelConfig } from "../models/mod.ts";
import { RandomStream } from "../models/random.ts";
import type { Kernels } from "../native/mod.ts";
import type { PlanRow } from "../plan/plan.ts";
import { formatBytes, type RunOptions, secondsText } from "../progress.ts";
import { product } from "../quant/product.ts";
import { factorMoments } from "../quant/solvers/factored_moment.ts";
import { accumulateMoment, emptyMoments } from "../quant/solvers/moments.ts";
import { solveLayer } from "../quant/solvers/solve_layer.ts";
import { FEEDBACK_PASSES, ROUND_PASSES } from "../quant/solvers/steps.ts";
import { candidateCount, solverSettings } from "../solve/candidates.ts";
import type { Checkpoint } from "../tensor/mod.ts";
import { statisticsBytes } from "../time/mod.ts";

/** Multiplications with an addition, by the kernel that does them: their rates differ. */
type Work = Readonly<Record<"forward" | "moments" | "factors" | "solving", number>>;

/** A stage of calibrated work. */
interface Stage {
  readonly name: string;
  readonly work: Work;
  /** Bytes that it takes beside the loaded model. */
  readonly bytes: number;
}

/** A run to forecast. */
export interface ForecastRun {
  readonly checkpoint: Checkpoint;
  readonly config: ConfigInForce;
  readonly kernels: Kernels;
  /** Bytes that the process may take. */
  readonly memoryBytes: number;
  readonly options: RunOptions;
}

/** Multiply-adds of a second at least, on any processor: work below a moment is not timed. */
const LEAST_RATE = 2e9;
/** Shorter work is not announced. */
const ANNOUNCED_SECONDS = 2;
/** Sizes of the products that are timed: some 100 milliseconds on one core. */
const PROBE = { rows: 128, cols: 768, tokens: 256 };
/** Combinations of bits, group size and zero points that a budget tries for a layer. */
const BUDGET_GRIDS = 24;
/** Sweeps of annealing, which is no kernel: each takes as long as so many passes. */
const ANNEALING_PASSES = 100;

const positionsIn = (parts: readonly CalibrationPart<unknown>[]): number =>
  parts.reduce((sum, { weights }) => sum + weights.length, 0);

/** Counts the stages of a run on its calibration data. */
class Counted {
  readonly #model: ReturnType<typeof modelConfig>;

  constructor(readonly calibrated: Calibrated, checkpoint: Checkpoint, readonly rows: readonly PlanRow[]) {
    this.#model = modelConfig(checkpoint);
  }

  /** Work and bytes of forward passes over parts; `outputs` where logits of all positions are wanted. */
  #passes(parts: readonly CalibrationPart<unknown>[], outputs: boolean) {
    const costs = parts.map(({ samples, weights: { length } }) =>
      forwardCost(this.#model, { batch: samples, tokens: length / samples, rows: outputs ? undefined : 1 })
    );
    const largest = Math.max(0, ...parts.map(({ weights }) => weights.length));
    const width = this.#model.config.hiddenSize;
    const logits = outputs && this.#model.kind !== "dit"
      ? 12 * largest * this.#model.config.vocabularySize
      : 0;
    return {
      multiplyAdds: costs.reduce((sum, cost) => sum + cost.multiplyAdds, 0),
      bytes: Math.max(0, ...costs.map(({ activationBytes }) => activationBytes)) + 4 * largest * width +
        logits,
      states: 4 * positionsIn(parts) * width,
    };
  }

  /** Layers that are solved, a stage at a time, as columns and rows. */
  #layers(): { readonly cols: number; readonly rows: readonly number[] }[] {
    const wanted = new Set(this.rows.filter(({ action }) => action === "quantize").map(({ name }) => name));
    return this.calibrated.model.stages.flatMap(({ layers }) => {
      const own = layers.filter(({ name }) => wanted.delete(name));
      return own.length === 0
        ? []
        : [{ cols: own[0]!.weights.cols, rows: own.map(({ weights: { rows } }) => rows) }];
    });
  }

  stages(config: ConfigInForce): Stage[] {
    const { data: { fit, heldOut }, statistics } = this.calibrated, settings = solverSettings(config);
    const isBest = config.solver === "best",
      isRun = statistics === undefined || config.calibrationMode === "blocks";
    const count = candidateCount(this.calibrated, config), layers = this.#layers();
    const isBlockwise = config.calibrationMode === "blocks", corrects = isBest && isBlockwise;
    const pass = this.#passes(isRun ? fit : [], false), tokens = positionsIn(isRun ? fit : []);
    const rounds = isBest ? settings.rounds : 0, starts = isBest ? 1 + settings.ratios.length : 2;
    const passes = starts * (FEEDBACK_PASSES + ROUND_PASSES * rounds) + (corrects ? 2 : 0) +
      (isBest && settings.annealing > 0 ? ANNEALING_PASSES : 0);
    const sum = (of: (cols: number, rows: number) => number, each: (cols: number) => number) =>
      layers.reduce(
        (total, { cols, rows }) => total + each(cols) + rows.reduce((s, own) => s + of(cols, own), 0),
        0,
      );
    const none = () => 0, factors = sum(none, (cols) => cols ** 3 / 4);
    // Beside the moment and its factor: sums, what inputs lost, the layer in several forms.
    const solveBytes = Math.max(
      0,
      ...layers.map(({ cols, rows }) =>
        4 * cols * cols * (corrects ? 5 : 3) + Math.max(...rows) * cols * 18 +
        (corrects ? 4 * cols * rows.reduce((a, b) => a + b, 0) : 0)
      ),
    );
    const packed = this.rows.reduce(
      (bytes, row) => bytes + (row.action === "quantize" ? row.bytesAfter : 0),
      0,
    );
    const held = this.#passes(heldOut, true), stages: Stage[] = [];
    if (hasBudget(config)) {
      const groups = calibrationGroups(this.calibrated.data.axis, 1), second = "total" as const;
      const runs = blockRuns(this.calibrated.model as Blockwise<unknown>, { groups, second });
      const probe = this.#passes(heldOut.slice(0, 2), true);
      const counted = statistics !== undefined
        ? []
        : runs.map(({ inputs }) => statisticsBytes(inputs.values(), 1, second));
      stages.push({
        name: "sensitivities",
        work: {
          forward: pass.multiplyAdds + 2 * layers.flatMap(({ rows }) => rows).length * probe.multiplyAdds,
          moments: sum(none, (cols) => tokens * cols * cols / 2),
          factors: sum((cols) => cols ** 3 / 4, none),
          solving: sum((cols, own) => own * cols * cols * 2 * FEEDBACK_PASSES * BUDGET_GRIDS, none),
        },
        bytes: pass.states + Math.max(pass.bytes, probe.bytes) + Math.max(0, ...counted) + solveBytes,
      });
    }
    if (isBest || config.solver === "feedback") {
      stages.push({
        name: count > 1 ? `solving ${count} candidates` : "solving",
        work: {
          forward: count * (isBlockwise ? corrects ? 6 : 4 : 2) * pass.multiplyAdds,
          moments: count * sum(
            corrects ? (cols, own) => tokens * cols * own / 4 : none, // some are added to the stream
            (cols) => tokens * cols * cols * (corrects ? 1.5 : 0.5),
          ),
          factors: count * factors,
          solving: count * sum((cols, own) => own * cols * cols * passes, none),
        },
        bytes: (isBlockwise ? 2 : 1) * pass.states + pass.bytes + solveBytes + count * packed,
      }, {
        name: "held-out distances",
        work: { forward: 2 * count * held.multiplyAdds, moments: 0, factors: 0, solving: 0 },
        bytes: held.bytes + count * packed,
      });
    }
    return stages;
  }

  /** The same with fewer samples. */
  withSamples(share: number): Calibrated {
    const { data } = this.calibrated;
    const fit = data.fit.slice(0, Math.ceil(data.fit.length * share));
    return { ...this.calibrated, data: { ...data, fit } } as Calibrated;
  }
}

/** Multiply-adds a second of each kernel, timed now. */
function timedRates(kernels: Kernels): Work {
  const { rows, cols, tokens } = PROBE,
    x = new Float32Array(tokens * cols),
    weights = new Float32Array(rows * cols);
  new RandomStream(1).fillNormal(x);
  new RandomStream(2).fillNormal(weights);
  const timed = <T>(multiplyAdds: number, run: () => T): readonly [rate: number, T] => {
    const begin = performance.now(), result = run();
    return [multiplyAdds / Math.max(1e-6, (performance.now() - begin) / 1000), result];
  };
  const moments = emptyMoments(cols), size = { tokens, rows, cols };
  product(kernels, "time a product", x, weights, size); // touches every page once
  const [forward] = timed(tokens * rows * cols, () => product(kernels, "time a product", x, weights, size));
  const [gathered] = timed(
    tokens * cols * cols / 2,
    () => accumulateMoment(kernels, x, undefined, undefined, tokens, moments.second),
  );
  moments.tokens = moments.weight = tokens;
  const [factors, moment] = timed(cols ** 3 / 4, () => factorMoments(kernels, moments));
  const problem = { weights, rows, cols, moment, bits: 2, groupSize: 128, zeroPoint: "real" } as const;
  const [solving] = timed(
    rows * cols * cols * 2 * FEEDBACK_PASSES,
    () => solveLayer(kernels, "feedback", problem),
  );
  return { forward, moments: gathered, factors, solving };
}

/**
 * Checks memory and says how long calibrated work will take. What is short is not announced; phases and writing are
 * not in it.
 *
 * @param rows of the plan
 * @throws {MemoryError} when a stage does not fit, with a setting that does
 */
export function announce(run: ForecastRun, calibrated: Calibrated, rows: readonly PlanRow[]): void {
  const { checkpoint, config, kernels, memoryBytes, options: { onEvent } } = run;
  const counted = new Counted(calibrated, checkpoint, rows), stages = counted.stages(config);
  const resident = process.memoryUsage().rss;
  const peak = (own: readonly Stage[]) => own.reduce((most, stage) => Math.max(most, stage.bytes), 0);
  if (resident + peak(stages) > memoryBytes) {
    const fits = (other: ConfigInForce, data = calibrated) =>
      resident + peak(new Counted(data, checkpoint, rows).stages(other)) <= memoryBytes;
    const { path } = checkpoint, largest = stages.find(({ bytes }) => bytes === peak(stages))!;
    throw new MemoryError(
      `Cannot calibrate ${quote(path)}: it must fit into ${formatBytes(memoryBytes)} (--max-memory), got ${
        formatBytes(resident + peak(stages))
      } (${formatBytes(resident)} the process with the model, ${
        formatBytes(largest.bytes)
      } ${largest.name}); ` +
        wayOut(config, counted, fits),
      resident + peak(stages),
      memoryBytes,
      { path },
    );
  }
  const total = (of: (stage: Stage) => number) => stages.reduce((sum, stage) => sum + of(stage), 0);
  if (total(({ work }) => Object.values(work).reduce((a, b) => a + b, 0)) / LEAST_RATE < ANNOUNCED_SECONDS) {
    return;
  }
  const rates = timedRates(kernels), kinds = Object.keys(rates) as (keyof Work)[];
  const secondsOf = ({ work }: Stage) => kinds.reduce((sum, kind) => sum + work[kind] / rates[kind], 0);
  const seconds = total(secondsOf), bytes = resident + peak(stages);
  if (seconds < ANNOUNCED_SECONDS) return;
  const parts = stages.map((stage) => ({
    name: stage.name,
    seconds: secondsOf(stage),
    bytes: resident + stage.bytes,
  }));
  onEvent?.({
    kind: "calibrate",
    message: `forecast: about ${secondsText(seconds)} (${
      parts.map((part) => `${part.name} ${secondsText(part.seconds)}`).join(", ")
    }; products timed now) and ${formatBytes(bytes)} of memory`,
    data: { seconds, bytes, stages: parts },
  });
}

/** A setting with which a run fits, the one that costs least first. */
function wayOut(
  config: ConfigInForce,
  counted: Counted,
  fits: (config: ConfigInForce, data?: Calibrated) => boolean,
): string {
  const { calibrationSamples } = config;
  const once = { ...config, calibrationMode: "once" } as const;
  if (config.calibrationMode !== "once" && fits(once)) return "it fits with calibration_mode: once";
  for (let samples = 2 ** Math.ceil(Math.log2(calibrationSamples) - 1); samples >= 32; samples /= 2) {
    if (fits(config, counted.withSamples(samples / calibrationSamples))) {
      return `it fits with --samples ${samples}`;
    }
  }
  const feedback = { ...once, solver: "feedback" } as const;
  if (config.solver === "best" && fits(feedback)) {
    return "it fits with --solver feedback and calibration_mode: once";
  }
  return `with --solver clip ${
    hasBudget(config) ? "and without a budget " : ""
  }a tensor at a time is in memory`;
}
