/** The stages of a calibrated run, with the memory that each takes and the time that it will take here. */
import { chooseMoment } from "../calibration/moment_structure.ts";
import { blockRuns } from "../calibration/collect.ts";
import type { CalibrationPart } from "../calibration/mod.ts";
import { type Solvable, thatRuns } from "../calibration/statistics/alone.ts";
import { OWN_BATCH_LOGITS, OWN_BATCH_POSITIONS, type OwnSampleWork } from "../calibration/own_samples.ts";
import { calibrationGroups } from "../calibration/saved_statistics.ts";
import { maskedRows } from "../calibration/step_kl.ts";
import { type ConfigInForce, hasBudget, wantsPhases } from "../config/mod.ts";
import {
  type Blockwise,
  forwardCost,
  gradientCost,
  type LinearLayer,
  modelConfig,
  modelRequirements,
} from "../models/mod.ts";
import { REFINEMENT_HELD_OUT, samplesOfStep, whatFits } from "../phases/fitting.ts";
import { MAX_REFINEMENT_BYTES } from "../phases/kept_refinement.ts";
import { REFINEMENT_DEFAULTS } from "../phases/settings.ts";
import { formatOf, isTokenTable, type PlanRow } from "../plan/plan.ts";
import { groupCount } from "../quant/mod.ts";
import type { WeightFormat } from "../quant/packed/layout.ts";
import { isRounded, weightSolver } from "../solve/by_weights.ts";
import { TARGET_STEPS } from "../solve/target_of_inputs.ts";
import { candidateCount, solverSettings } from "../solve/candidates.ts";
import { type Checkpoint, elementCount } from "../tensor/mod.ts";
import { statisticsBytes } from "../time/mod.ts";
import { GRADIENT_SHARE } from "./memory_shares.ts";
import type { TimedWork } from "./timed_work.ts";

/** A stage of a run. */
export interface RunStage {
  readonly name: string;
  /** Bytes that it takes beside weights and the states between stages. */
  readonly bytes: number;
  /** Bytes of states between stages, which may go to files. */
  readonly statesBytes: number;
  /** Time that it will take. */
  seconds(timed: TimedWork): number;
  /** What it will do in that time, where time decides. */
  note?(timed: TimedWork): string | undefined;
}

/** Combinations of bits, group size and zero points that a budget tries for a layer. */
const BUDGET_GRIDS = 24;
/** Held-out parts that a budget measures a layer on. */
const PROBE_PARTS = 2;
/** Logits in memory at once, of two models and a copy. */
const LOGITS_BYTES = 3 * 4 * 2 ** 25;
/** Bytes of a sum while it is gathered: in double, and of a chunk or rounded. */
const SUM_BYTES = 12;
/** Bytes of a weight of the layer that is solved, in its forms: as float32, as target and in steps to it, as codes. */
const LAYER_BYTES = 20;
/** Passes of two models over held-out data that a phase along the time axis takes, and over the others. */
const PHASE_PASSES = { heldOut: 8, fit: 2 };
/** Copies of what layers read, for each run, in those of {@linkcode TimedWork.copying}. */
const COPIES = 0.75;
/** Time of a small file or tensor that is made durable, on a disk of flash memory. */
const FILE_SECONDS = 3e-3;
/** Looks of the refinement at held-out samples that its time is forecast with: some by one model alone. */
const LOOKS = 4;
/** Arrays of a refined parameter: its value, gradient and unit, and the optimizer's five. */
const PARAMETER_BYTES = 8 * 4;
/** Arrays of it that are kept over a stop. */
const KEPT_PARAMETER_BYTES = 4 * 4;
/** Full-precision outputs that a meter and the refinement keep. */
const OUTPUTS_BYTES = 2 * 2 ** 28;

type Part = CalibrationPart<unknown>;

const positionsIn = (parts: readonly Part[]): number =>
  parts.reduce((sum, { weights }) => sum + weights.length, 0);

const sum = (values: readonly number[]): number => values.reduce((all, own) => all + own, 0);
const most = (values: readonly number[]): number => values.reduce((a, b) => Math.max(a, b), 0);

/** Layers that read the same and are solved one after the other. */
interface SolvedStage {
  readonly names: readonly string[];
  readonly cols: number;
  readonly rows: readonly number[];
  readonly forms: readonly WeightFormat[];
  /** Columns of a block of their moment. */
  readonly block: number;
}

/** Rows of a layer's matrix, or of each of its experts'. */
const rowsOf = ({ weights: { rows }, experts = 1 }: LinearLayer): number[] =>
  Array.from({ length: experts }, () => rows / experts);

/** What a run works on. */
export interface CountedRun {
  readonly calibrated: Solvable;
  readonly checkpoint: Checkpoint;
  /** Of the plan. */
  readonly rows: readonly PlanRow[];
  readonly memoryBytes: number;
  /** Layers whose sensitivities are measured already, as a part of all; default 0. */
  readonly measuredShare?: number | undefined;
  /** Whether an earlier run has solved a layer for a candidate; default none. */
  readonly isSolved?: ((candidate: number, name: string) => boolean) | undefined;
}

/** A run that is counted before it begins. */
export class CountedWork {
  readonly #run: CountedRun;
  /** Undefined where the model does not run. */
  readonly #model: ReturnType<typeof modelConfig> | undefined;
  /** Weights of the largest matrix. */
  readonly #largestMatrix: number;
  /** Bytes of all weights as they are held, and of the block or the table that takes most. */
  readonly weights: { readonly bytes: number; readonly leastBytes: number };

  constructor(run: CountedRun) {
    this.#run = run;
    const { checkpoint } = run, isRun = run.calibrated.kind !== "layers";
    this.#model = isRun ? modelConfig(checkpoint) : undefined;
    const matrices = isRun ? modelRequirements(checkpoint).matrices : run.calibrated.model.stages.flatMap(
      ({ layers }) =>
        layers.map(({ name, weights: { rows, cols } }) => {
          return { name, rows, cols, bytes: checkpoint.tensors.get(name)!.info.byteLength };
        }),
    );
    this.#largestMatrix = most(matrices.map(({ rows, cols }) => rows * cols));
    const weightBytes = isRun
      ? modelRequirements(checkpoint).weightBytes
      : matrices.reduce((sum, { bytes }) => sum + bytes, 0);
    const bytesOf = new Map(matrices.map(({ name, bytes }) => [name, bytes]));
    const sizes = [...Map.groupBy(run.calibrated.model.stages, ({ block }) => block).values()].map((stages) =>
      stages.flatMap(({ layers }) => layers).reduce((sum, { name }) => sum + (bytesOf.get(name) ?? 0), 0)
    );
    const tables = run.calibrated.model.tables.map(({ name }) => bytesOf.get(name) ?? 0);
    this.weights = { bytes: weightBytes, leastBytes: most([...sizes, ...tables]) };
  }

  /** Samples to solve on. */
  get samples(): number {
    return this.#run.calibrated.data.samples;
  }

  /** The same with a part of the samples. */
  withSamples(share: number): CountedWork {
    const { calibrated } = this.#run, { data } = calibrated;
    const fit = data.fit.slice(0, Math.ceil(data.fit.length * share));
    return new CountedWork({
      ...this.#run,
      calibrated: { ...calibrated, data: { ...data, fit } } as Solvable,
    });
  }

  /** Bytes of the solved layers of a candidate. */
  get packedBytes(): number {
    return this.#run.rows.reduce(
      (sum, row) => sum + (row.action === "quantize" && !isTokenTable(row) ? row.bytesAfter : 0),
      0,
    );
  }

  /** Bytes of all tensors of the output. */
  get outputBytes(): number {
    return this.#run.rows.reduce((sum, { bytesAfter }) => sum + bytesAfter, 0);
  }

  /** Bytes of packed token tables. */
  get #tableBytes(): number {
    return this.#run.rows.reduce((sum, row) => sum + (isTokenTable(row) ? row.bytesAfter : 0), 0);
  }

  get #width(): number {
    return this.#model?.config.hiddenSize ?? 0;
  }

  /** Cost of a forward pass over parts, without logits. */
  #pass(parts: readonly Part[]) {
    const costs = parts.map(({ samples, weights: { length } }) =>
      forwardCost(this.#model!, { batch: samples, tokens: length / samples, rows: 1 })
    );
    const positions = positionsIn(parts);
    const multiplyAdds = costs.reduce((sum, cost) => sum + cost.multiplyAdds, 0);
    return {
      positions,
      ofPosition: multiplyAdds / Math.max(1, positions),
      bytes: most(costs.map(({ activationBytes }) => activationBytes)),
      statesBytes: 4 * positions * this.#width,
      seconds: (timed: TimedWork) =>
        positions === 0 ? 0 : positions * timed.position(multiplyAdds / positions),
    };
  }

  /**
   * The model making its own samples; about half of the positions are written to.
   *
   * @param heldBytes of weights that stay in memory: where they are fewer than all, each pass reads all again
   */
  ownSamples({ positions, passes, isRounded }: OwnSampleWork, heldBytes: () => number): RunStage {
    const { data: { fit } } = this.#run.calibrated, pass = this.#pass(fit), width = this.#width;
    const form = { bits: 8, groupSize: 0, zeroPoint: "real" } as const;
    const { vocabularySize = 0 } = (this.#model?.config ?? {}) as { readonly vocabularySize?: number };
    const logits = Math.min(OWN_BATCH_LOGITS, OWN_BATCH_POSITIONS * vocabularySize);
    return {
      name: "its own samples",
      bytes: pass.bytes + 4 * logits + (isRounded ? this.#largestMatrix : 0),
      statesBytes: 0,
      seconds: (timed) => {
        const ofLogits = 0.5 * vocabularySize * width;
        const read = heldBytes() < this.weights.bytes ? passes : 1;
        const around = read * timed.reading(this.weights.bytes) +
          timed.logits(0.5 * positions, vocabularySize);
        if (!isRounded) {
          return around +
            positions * (pass.seconds(timed) / pass.positions + ofLogits * timed.multiplyAdd(width));
        }
        // Weights are rounded again in each pass.
        return around + positions * (pass.ofPosition + ofLogits) * timed.integerMultiplyAdd() +
          passes * timed.packing(pass.ofPosition + 2 * ofLogits, "round", form);
      },
    };
  }

  /** Layers that are solved, a stage at a time. */
  #layers(config: ConfigInForce): SolvedStage[] {
    const { rows, calibrated: { model, data }, memoryBytes } = this.#run, settings = solverSettings(config);
    const wanted = new Map(
      rows.filter((row) => row.action === "quantize" && !isTokenTable(row) && !isRounded(config, row))
        .map((row) => [row.name, row]),
    );
    return model.stages.flatMap(({ layers }): SolvedStage[] => {
      const own = layers.filter(({ name }) => wanted.has(name));
      if (own.length === 0) return [];
      const forms = own.flatMap(({ name, experts = 1 }): WeightFormat[] => {
        const row = wanted.get(name)!;
        wanted.delete(name);
        return Array.from({ length: experts }, () => formatOf(row));
      });
      const { cols } = own[0]!.weights, positions = data.distinctPositions;
      const { block } = chooseMoment(settings, { cols, positions, memoryBytes, formats: forms });
      const names = own.flatMap(({ name, experts = 1 }) => Array.from({ length: experts }, () => name));
      return [{ names, cols, rows: own.flatMap(rowsOf), forms, block }];
    });
  }

  /** The stages of a run with a configuration. */
  stages(config: ConfigInForce): RunStage[] {
    return [
      ...(hasBudget(config) && this.#run.measuredShare !== 1 ? [this.#sensitivities(config)] : []),
      ...(["best", "feedback"].includes(config.solver) ? this.#solving(config) : []),
      ...(wantsPhases(config) && this.#model !== undefined ? [this.#phases(config)] : []),
      this.#writing(config),
    ];
  }

  #solving(config: ConfigInForce): RunStage[] {
    const { calibrated } = this.#run, { data: { fit, heldOut }, statistics } = calibrated;
    const { solver } = config,
      settings = solverSettings(config),
      isBlockwise = config.calibrationMode === "blocks";
    const isRun = fit.length > 0 && (statistics === undefined || isBlockwise);
    const corrects = isRun && isBlockwise && solver === "best" &&
      (settings.correction > 0 || settings.residualCorrection > 0);
    const count = candidateCount(calibrated, config), layers = this.#layers(config), runs = corrects ? 2 : 1;
    const pass = this.#pass(isRun ? fit : []), packed = this.packedBytes, tables = this.#tableBytes;
    // Between stages: hidden states, and what the widest layers read; of experts also what all read, and their sum.
    const { mixture } = (this.#model?.config ?? {}) as { readonly mixture?: unknown };
    const kept = most(layers.map(({ cols }) => cols)) + (mixture === undefined ? 0 : 2 * this.#width);
    const states = runs * (pass.statesBytes + 4 * pass.positions * kept);
    const solveBytes = most(
      layers.flatMap(({ cols, rows, block }) => [
        // Gathered; a layer that is alone in its stage adds to the stream.
        SUM_BYTES * cols * (block * (corrects ? 2 : 1) + (corrects && rows.length === 1 ? rows[0]! : 0)),
        4 * cols * block * (corrects ? 3 : 2) + most(rows) * cols * LAYER_BYTES +
        (corrects ? 4 * cols * rows.reduce((a, b) => a + b, 0) : 0),
      ]),
    );
    // Beside the inputs of a part, what they lost.
    const lost = corrects ? pass.bytes / 2 : 0;
    const held = this.#pass(heldOut), rows = this.#maskedRows();
    const { vocabularySize = 0 } = (this.#model?.config ?? {}) as { readonly vocabularySize?: number };
    return [
      {
        name: count > 1 ? `solving ${count} candidates` : "solving",
        bytes: pass.bytes + lost + solveBytes + tables + Math.min(2, count) * packed,
        statesBytes: isRun ? states : 0,
        seconds: (timed) => {
          const ofStage = ({ names, cols, rows, forms, block }: SolvedStage, candidate: number) => {
            const isOpen = names.map((name) => this.#run.isSolved?.(candidate, name) !== true);
            if (!isOpen.includes(true)) return 0;
            const gathered = pass.positions * cols * block * (corrects ? 1.5 : 0.5) *
              timed.multiplyAdd(block);
            // With a diagonal alone targets are made from the inputs themselves, two products a step.
            const targets = corrects && block === 1
              ? pass.positions * cols * sum(rows) * 2 * (TARGET_STEPS + 1) * timed.multiplyAdd(cols)
              : 0;
            const factored = timed.factor(block) * (cols / block);
            // To the states that are kept and back, and what inputs lost.
            const copied = COPIES * runs * timed.copying(pass.positions * (cols + this.#width));
            const solved = rows.map((n, i) => {
              // Its target, its stream's loss.
              const target = (corrects ? 2.5 : 0) * n * cols * block * timed.multiplyAdd(block);
              const how = { form: forms[i]!, solver, settings };
              return isOpen[i] ? target + timed.solving(n, cols, block, how) + FILE_SECONDS : 0;
            });
            return gathered + targets + factored + copied + sum(solved);
          };
          return sum(
            Array.from(
              { length: count },
              (_, candidate) =>
                runs * pass.seconds(timed) + sum(layers.map((stage) => ofStage(stage, candidate))),
            ),
          );
        },
      },
      ...(heldOut.length === 0 ? [] : [{
        name: "held-out distances",
        bytes: held.bytes + 2 * held.statesBytes + tables + Math.min(2, count) * packed +
          (rows === 0 ? 0 : Math.min(LOGITS_BYTES, 12 * rows * vocabularySize)),
        statesBytes: 0,
        seconds: (timed: TimedWork) =>
          (1 + count) * held.seconds(timed) +
          count * (2 * rows * vocabularySize * this.#width * timed.multiplyAdd(this.#width) +
              timed.logits(rows, vocabularySize)),
      }]),
    ];
  }

  /** Held-out positions whose logits are compared. */
  #maskedRows(): number {
    const { calibrated } = this.#run;
    if (calibrated.kind !== "sequences") return 0;
    const { data, model: { config }, shift } = calibrated;
    return data.heldOut.reduce(
      (sum, { batch: { inputIds }, samples }) =>
        sum + maskedRows(inputIds, inputIds.length / samples, config.maskToken, shift).length,
      0,
    );
  }

  #sensitivities(config: ConfigInForce): RunStage {
    const { calibrated, measuredShare = 0 } = this.#run,
      { data: { fit, heldOut, axis, distinctPositions }, statistics } = calibrated;
    const settings = solverSettings(config), solver = config.solver === "best" ? "feedback" : config.solver;
    const layers = this.#layers({ ...config, solver: "best", chosen: undefined });
    const pass = this.#pass(statistics === undefined ? fit : []),
      probe = this.#pass(heldOut.slice(0, PROBE_PARTS));
    const runs = blockRuns(calibrated.model as Blockwise<unknown>, {
      groups: calibrationGroups(axis, 1),
      second: "total",
      blockOf: (cols) => chooseMoment(settings, { cols, positions: distinctPositions }).block,
    });
    const gathered = statistics !== undefined
      ? []
      : runs.map(({ inputs }) => statisticsBytes(inputs.values(), 1, "total", 8));
    const count = layers.reduce((sum, { rows }) => sum + rows.length, 0);
    return {
      name: "sensitivities",
      bytes: pass.statesBytes + Math.max(pass.bytes, probe.bytes) + 3 * probe.statesBytes + most(gathered) +
        most(layers.map(({ cols, rows, block }) => 8 * cols * block + most(rows) * cols * LAYER_BYTES)),
      statesBytes: 0,
      seconds: (timed) =>
        // A block that is measured is still run.
        pass.seconds(timed) + probe.seconds(timed) + (1 - measuredShare) * layers.reduce(
            (sum, { cols, rows, forms, block }) =>
              sum + pass.positions * cols * block / 2 * timed.multiplyAdd(block) +
              timed.factor(block) * (cols / block) +
              BUDGET_GRIDS * rows.reduce(
                  (own, n, i) => own + timed.solving(n, cols, block, { form: forms[i]!, solver, settings }),
                  0,
                ),
            count * probe.seconds(timed),
          ),
    };
  }

  #phases(config: ConfigInForce): RunStage {
    const { kind, data: { fit, heldOut } } = thatRuns(this.#run.calibrated, "run the phases");
    const { validation, boundarySmoothing, transitionOptimization: refinement } = config.thermodynamic;
    const pass = this.#pass(fit), held = this.#pass(heldOut), [first] = fit;
    const axis = validation.enabled || boundarySmoothing.enabled || config.enableTimeAware;
    const length = first === undefined ? 1 : first.weights.length / first.samples,
      size = samplesOfStep(length);
    const asked = refinement.maxIterations ?? REFINEMENT_DEFAULTS[kind].maxIterations;
    const fits = (timed: TimedWork) =>
      whatFits({
        passSeconds: pass.positions === 0 ? 1 : 2 * size * length * pass.seconds(timed) / pass.positions,
        batches: Math.ceil(REFINEMENT_HELD_OUT[kind] / size),
        iterations: asked,
        seconds: (refinement.maxMinutes ?? Infinity) * 60,
      });
    // The phases' models share their scratch; the full ones have their own.
    const models = 3 * Math.max(pass.bytes, held.bytes) + this.packedBytes + this.#tableBytes;
    return {
      name: "phases",
      bytes: models + this.#outputBytes() +
        (refinement.enabled ? this.#gradientBytes(config, size, length) : 0),
      statesBytes: 0,
      seconds: (timed) => {
        const { iterations, stepSeconds, lookSeconds } = fits(timed);
        const refined = iterations === 0 ? 0 : iterations * stepSeconds + LOOKS * lookSeconds;
        return (refinement.enabled ? refined : 0) +
          (axis ? PHASE_PASSES.fit * pass.seconds(timed) + PHASE_PASSES.heldOut * held.seconds(timed) : 0);
      },
      note: (timed) =>
        refinement.enabled ? `${fits(timed).iterations} of ${asked} steps of gradients` : undefined,
    };
  }

  /** Bytes of outputs: of a part by two models with a copy, and those of full precision that are kept. */
  #outputBytes(): number {
    const calibrated = thatRuns(this.#run.calibrated, "run the phases"), { data: { heldOut } } = calibrated;
    if (calibrated.kind === "images") {
      const { model: { imageElements, config: { outputChannels, channels } } } = calibrated;
      const ofImage = 4 * imageElements * outputChannels / channels;
      return 3 * ofImage * most(heldOut.map(({ samples }) => samples)) +
        Math.min(OUTPUTS_BYTES, 2 * ofImage * heldOut.reduce((sum, { samples }) => sum + samples, 0));
    }
    const { data, model: { config }, shift } = calibrated;
    const rows = data.heldOut.map(({ batch: { inputIds }, samples }) =>
      maskedRows(inputIds, inputIds.length / samples, config.maskToken, shift).length
    );
    const ofRow = 4 * config.vocabularySize;
    return 3 * ofRow * most(rows) +
      Math.min(OUTPUTS_BYTES, 2 * ofRow * rows.reduce((sum, count) => sum + count, 0));
  }

  /** Bytes of a step's gradients, and of what the optimizer keeps of each parameter. */
  #gradientBytes(config: ConfigInForce, batch: number, tokens: number): number {
    const { scratchBytes, recomputedBytes } = gradientCost(this.#model!, { batch, tokens });
    return (scratchBytes <= GRADIENT_SHARE * this.#run.memoryBytes ? scratchBytes : recomputedBytes) +
      PARAMETER_BYTES * this.#refinedParameters(config);
  }

  /** Scales, zero points and biases that the refinement moves. */
  #refinedParameters(config: ConfigInForce): number {
    const groups = config.enableTimeAware && config.outputCorrection ? config.numTimeGroups : 0;
    return this.#run.rows.filter((row) => row.action === "quantize" && !isTokenTable(row)).reduce(
      (sum, { shape: [rows, cols], groupSize, zeroPoint }) =>
        sum + rows! * (groupCount(cols!, groupSize!) * (zeroPoint === "real" ? 2 : 1) + 1 + groups),
      0,
    );
  }

  /** Bytes of the refinement's state in the work folder. */
  refinementBytes(config: ConfigInForce): number {
    if (!config.thermodynamic.transitionOptimization.enabled) return 0;
    const bytes = KEPT_PARAMETER_BYTES * this.#refinedParameters(config);
    return bytes > MAX_REFINEMENT_BYTES ? 0 : bytes;
  }

  #writing(config: ConfigInForce): RunStage {
    const { rows } = this.#run, isSolved = ["best", "feedback"].includes(config.solver);
    const before = rows.reduce((sum, { bytesBefore }) => sum + bytesBefore, 0);
    const after = rows.reduce((sum, { bytesAfter }) => sum + bytesAfter, 0);
    return {
      name: "writing",
      bytes: this.packedBytes + this.#tableBytes,
      statesBytes: 0,
      seconds: (timed) =>
        // Read and hashed; written, hashed, and read back.
        timed.hashing(before + 2 * after) + FILE_SECONDS * rows.length + rows.reduce((sum, row) => {
          if (row.action === "keep") return sum;
          const weights = elementCount(row.shape)!, form = formatOf(row);
          const isOwn = isSolved && !isTokenTable(row) && !isRounded(config, row);
          return sum + timed.packing(weights, "measure", form) +
            (isOwn ? 0 : timed.packing(weights, weightSolver(config, row), form));
        }, 0),
    };
  }
}
