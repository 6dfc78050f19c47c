/** The stages of a calibrated run, with the memory that each takes and the time that it will take here. */
import { chooseMoment, chooseSaved } from "../../calibration/moment_structure.ts";
import { blockRuns } from "../../calibration/collect.ts";
import type { CalibrationPart } from "../../calibration/mod.ts";
import type { Solvable } from "../../calibration/statistics/alone.ts";
import { partsWith } from "../../calibration/statistics/expert_stacks.ts";
import { calibrationGroups } from "../../calibration/saved_statistics.ts";
import { type ConfigInForce, hasBudget } from "../../config/mod.ts";
import type { Blockwise, LinearLayer } from "../../models/mod.ts";
import { formatOf, isTokenTable, type PlanRow } from "../../plan/plan.ts";
import {
  CODED_SCALE_BITS,
  heldBytes,
  matrixSizes,
  ROTATED_SCALE_BITS,
  type WeightFormat,
} from "../../quant/packed/layout.ts";
import { isRounded, weightSolver } from "../../solve/by_weights.ts";
import { READY_BYTES, stageBytes } from "../../solve/stage_inputs.ts";
import { TARGET_STEPS } from "../../solve/target_of_inputs.ts";
import { candidateCount, solverSettings, solvesOnDemand } from "../../solve/candidates.ts";
import { type Checkpoint, elementCount } from "../../tensor/mod.ts";
import { statisticsBytes } from "../../time/mod.ts";
import type { TimedWork } from "./timed_work.ts";
import type { HeldMatrix } from "../../models/requirements.ts";

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
/**
 * Bytes of a sum while it is gathered: in double, and of a chunk or rounded; where tasks add theirs up, in
 * double as the total, as a file and as what is read from it.
 */
const SUM_BYTES = 12, SHARED_SUM_BYTES = 24;
/** Bytes of a weight of the layer that is solved: as float32, as target and in steps to it, as codes. */
const LAYER_BYTES = 20;
/** Copies of what layers read, for each run, in those of {@linkcode TimedWork.copying}. */
const COPIES = 0.75;
/** Bytes of a file's header and of what is left of the disk's block, and files of an output. */
const SMALL_FILE_BYTES = 2 ** 13, OUTPUT_FILES = 8;
/** Time of a small file or tensor that is made durable, on a disk of flash memory. */
const FILE_SECONDS = 3e-3;

export type Part = CalibrationPart<unknown>;

export const sum = (values: readonly number[]): number => values.reduce((all, own) => all + own, 0);
export const most = (values: readonly number[]): number => values.reduce((a, b) => Math.max(a, b), 0);

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

/**
 * Bytes beside a moment and its factor: for trellis codes a factor in the order of the columns, for rotated
 * weights that and the moment of rotated inputs, both of all columns.
 */
const ownOrderBytes = (forms: readonly WeightFormat[], cols: number, block: number): number => {
  if (forms.some(({ scaleBits }) => scaleBits === ROTATED_SCALE_BITS)) return 8 * cols ** 2;
  return forms.some(({ codes }) => codes === "trellis") ? 4 * cols * block : 0;
};

/**
 * Seconds of summing up products of all positions, chunk by chunk.
 *
 * @param elements sums
 * @param cols of the products
 */
const summing = (timed: TimedWork, { positions }: Pass, chunks: number, elements: number, cols: number) =>
  elements === 0 || chunks === 0
    ? 0
    : elements * positions * timed.multiplyAdd(cols) + timed.adding(elements, chunks);

/** What a run works on. */
export interface CountedRun {
  readonly calibrated: Solvable;
  readonly checkpoint: Checkpoint;
  /** Of the plan. */
  readonly rows: readonly PlanRow[];
  readonly memoryBytes: number;
  /** Layers whose sensitivities are measured already, as a part of all; default 0. */
  readonly measuredShare?: number | undefined;
  /** Whether tasks add up their sums; default no. */
  readonly isTogether?: boolean | undefined;
  /** Whether an earlier run has solved a layer for a candidate; default none. */
  readonly isSolved?: ((candidate: number, name: string) => boolean) | undefined;
}

/** Bytes of all weights as they are held, and of the block or the table that takes most. */
export interface WeightBytes {
  readonly bytes: number;
  readonly leastBytes: number;
}

/** A matrix of a model, and the bytes that it takes. */
export type SizedMatrix = Pick<HeldMatrix, "name" | "rows" | "cols" | "bytes">;

/** A pass over parts of the data, without logits. */
export interface Pass {
  readonly positions: number;
  /** Multiply-adds of a position. */
  readonly ofPosition: number;
  readonly bytes: number;
  /** Of hidden states of all positions. */
  readonly statesBytes: number;
  seconds(timed: TimedWork): number;
}

/** A run that is counted before it begins: layers that are solved, and tensors that are written. */
export abstract class CountedWork {
  readonly run: CountedRun;
  readonly weights: WeightBytes;

  /** @param matrices that may be held, and bytes of all weights: default of these */
  constructor(
    run: CountedRun,
    matrices: readonly SizedMatrix[],
    bytes = sum(matrices.map((own) => own.bytes)),
  ) {
    this.run = run;
    const bytesOf = new Map(matrices.map(({ name, bytes }) => [name, bytes]));
    const { stages, tables } = run.calibrated.model;
    const blocks = [...Map.groupBy(stages, ({ block }) => block).values()].map((own) =>
      sum(own.flatMap(({ layers }) => layers).map(({ name }) => bytesOf.get(name) ?? 0))
    );
    this.weights = {
      bytes,
      leastBytes: most([...blocks, ...tables.map(({ name }) => bytesOf.get(name) ?? 0)]),
    };
  }

  /** A pass over parts of the data. */
  abstract pass(parts: readonly Part[]): Pass;
  /** Numbers of a position's hidden state, and of what is kept of it beside what the widest layers read. */
  abstract readonly width: number;
  abstract readonly keptBeside: number;
  /** Whether the outputs of a layer that is alone in its stage are added to the hidden states as they are. */
  abstract readonly hasStream: boolean;
  /** Stages that run the model: behind the solver, and behind that the phases. */
  abstract heldOut(config: ConfigInForce): RunStage[];
  abstract phases(config: ConfigInForce): RunStage[];
  /** Bytes of the refinement's state in the work folder. */
  abstract refinementBytes(config: ConfigInForce): number;

  /** Bytes of the solved layers that a run holds and keeps: none where each is written once it is solved. */
  solvedBytes(config: ConfigInForce): number {
    const { calibrated } = this.run;
    return solvesOnDemand(calibrated, config) ? 0 : candidateCount(calibrated, config) * this.packedBytes;
  }

  /** Bytes of the files of these layers. */
  keptBytes(config: ConfigInForce): number {
    const bytes = this.solvedBytes(config);
    const files = this.run.rows.filter((row) => row.action === "quantize" && !isTokenTable(row)).length;
    return bytes === 0 ? 0 : bytes + candidateCount(this.run.calibrated, config) * files * SMALL_FILE_BYTES;
  }

  /** Bytes of the solved layers of a candidate, as they are held. */
  get packedBytes(): number {
    const rows = this.run.rows.filter((row) => row.action === "quantize" && !isTokenTable(row));
    return sum(rows.map((row) => heldBytes({ ...formatOf(row), ...matrixSizes(row.shape) })));
  }

  /** Bytes of the output: all tensors, and the small files beside them. */
  get outputBytes(): number {
    return SMALL_FILE_BYTES * OUTPUT_FILES +
      this.run.rows.reduce((sum, { bytesAfter }) => sum + bytesAfter, 0);
  }

  /** Bytes of packed token tables. */
  get tableBytes(): number {
    return this.run.rows.reduce((sum, row) => sum + (isTokenTable(row) ? row.bytesAfter : 0), 0);
  }

  /** Seconds of reading all weights; later again where memory does not hold them. */
  reading(timed: TimedWork): number {
    return timed.reading(this.weights.bytes);
  }

  readingAgain(timed: TimedWork): number {
    return this.weights.bytes > this.run.memoryBytes ? this.reading(timed) : 0;
  }

  /** Layers that are solved, a stage at a time. */
  #layers(config: ConfigInForce): SolvedStage[] {
    const { rows, calibrated: { model, data, statistics }, memoryBytes } = this.run;
    const settings = solverSettings(config);
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
      const { weights: { cols } } = own[0]!, positions = data.distinctPositions;
      const choice = chooseMoment(settings, { cols, positions, memoryBytes, formats: forms });
      // Of experts in one tensor, that of the first that read anything.
      const known = partsWith(statistics, own[0]!).find(({ name }) => statistics?.has(name));
      const saved = known === undefined ? cols : statistics!.inputOf(known.name).block ?? cols;
      const { block } = chooseSaved(settings, choice, { cols, saved, formats: forms });
      const names = own.flatMap(({ name, experts = 1 }) => Array.from({ length: experts }, () => name));
      return [{ names, cols, rows: own.flatMap(rowsOf), forms, block }];
    });
  }

  /** The stages of a run with a configuration. */
  stages(config: ConfigInForce): RunStage[] {
    return [
      ...(hasBudget(config) && this.run.measuredShare !== 1 ? [this.#sensitivities(config)] : []),
      ...(["best", "feedback"].includes(config.solver)
        ? [this.#solving(config), ...this.heldOut(config)]
        : []),
      ...this.phases(config),
      this.#writing(config),
    ];
  }

  #solving(config: ConfigInForce): RunStage {
    const { calibrated } = this.run, { data: { fit }, statistics } = calibrated;
    const { solver } = config,
      settings = solverSettings(config),
      isBlockwise = config.calibrationMode === "blocks";
    const isRun = fit.length > 0 && (statistics === undefined || isBlockwise);
    const corrects = isRun && isBlockwise && solver === "best" &&
      (settings.correction > 0 || settings.residualCorrection > 0);
    const count = candidateCount(calibrated, config), layers = this.#layers(config), runs = corrects ? 2 : 1;
    const pass = this.pass(isRun ? fit : []), tables = this.tableBytes;
    const packed = Math.min(this.solvedBytes(config), 2 * this.packedBytes);
    const { samples, chunk = samples } = calibrated.data, chunks = isRun ? Math.ceil(samples / chunk) : 0;
    // Between stages: hidden states, and what the widest layers read.
    const kept = most(layers.map(({ cols }) => cols)) + this.keptBeside;
    const states = runs * (pass.statesBytes + 4 * pass.positions * kept);
    const sumBytes = this.run.isTogether === true ? SHARED_SUM_BYTES : SUM_BYTES;
    const ready = layers.map(({ cols, block }) => stageBytes(cols, block));
    // Beside a stage's own: those that stay for layers that read the same, where each is solved by itself.
    const stays = solvesOnDemand(calibrated, config) ? Math.min(READY_BYTES, sum(ready)) : 0;
    const solveBytes = most(
      layers.flatMap(({ cols, rows, forms, block }, i) => [
        // Gathered; a layer that is alone in its stage adds to the stream.
        sumBytes * cols * (block * (corrects ? 2 : 1) + (corrects && rows.length === 1 ? rows[0]! : 0)),
        4 * cols * block * (corrects ? 3 : 2) + ownOrderBytes(forms, cols, block) +
        most(rows) * cols * LAYER_BYTES +
        (corrects ? 4 * cols * rows.reduce((a, b) => a + b, 0) : 0) + Math.max(0, stays - ready[i]!),
      ]),
    );
    // Beside the inputs of a part, what they lost.
    const lost = corrects ? pass.bytes / 2 : 0;
    return {
      name: count > 1 ? `solving ${count} candidates` : "solving",
      bytes: pass.bytes + lost + solveBytes + tables + packed,
      statesBytes: isRun ? states : 0,
      seconds: (timed) => {
        const ofStage = ({ names, cols, rows, forms, block }: SolvedStage, candidate: number) => {
          const isOpen = names.map((name) => this.run.isSolved?.(candidate, name) !== true);
          if (!isOpen.includes(true)) return 0;
          // Of a moment half; with a diagonal alone nothing lost is summed up by itself.
          const lost = corrects && block > 1 ? cols * block : 0;
          const stream = lost > 0 && this.hasStream && rows.length === 1 ? rows[0]! * cols : 0;
          const gathered = summing(timed, pass, chunks, 0.5 * cols * block + lost, block) +
            summing(timed, pass, chunks, stream, cols);
          // Then targets are made from the inputs themselves, two products a step.
          const outputs = corrects && block === 1 ? (TARGET_STEPS + 1) * cols * sum(rows) : 0;
          const targets = pass.positions * outputs * timed.multiplyAdd(cols) +
            summing(timed, pass, chunks, outputs, cols);
          const factored = timed.factor(block) * (cols / block);
          // To the states that are kept and back, and what inputs lost.
          const copied = COPIES * runs * timed.copying(pass.positions * (cols + this.width));
          const solved = rows.map((n, i) => {
            // Its target, its stream's loss.
            const target = (corrects ? 2.5 : 0) * n * cols * block * timed.multiplyAdd(block);
            const how = { form: forms[i]!, solver, settings };
            return isOpen[i] ? target + timed.solving(n, cols, block, how) + FILE_SECONDS : 0;
          });
          return gathered + targets + factored + copied + sum(solved);
        };
        return this.reading(timed) + sum(
          Array.from(
            { length: count },
            (_, candidate) =>
              (candidate > 0 ? this.readingAgain(timed) : 0) +
              runs * pass.seconds(timed) + sum(layers.map((stage) => ofStage(stage, candidate))),
          ),
        );
      },
    };
  }

  #sensitivities(config: ConfigInForce): RunStage {
    const { calibrated, measuredShare = 0 } = this.run,
      { data: { fit, heldOut, axis, distinctPositions }, statistics } = calibrated;
    const settings = solverSettings(config), solver = config.solver === "best" ? "feedback" : config.solver;
    const layers = this.#layers({ ...config, solver: "best", chosen: undefined });
    const pass = this.pass(statistics === undefined ? fit : []),
      probe = this.pass(heldOut.slice(0, PROBE_PARTS));
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
        most(
          layers.map(({ cols, rows, forms, block }) =>
            8 * cols * block + ownOrderBytes(forms, cols, block) + most(rows) * cols * LAYER_BYTES
          ),
        ),
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

  #writing(config: ConfigInForce): RunStage {
    const { rows } = this.run, isSolved = ["best", "feedback"].includes(config.solver);
    const { stages } = this.run.calibrated.model;
    const layers = new Set(stages.flatMap((stage) => stage.layers.map(({ name }) => name)));
    const isOwn = (row: PlanRow) =>
      isSolved && layers.has(row.name) && !isTokenTable(row) && !isRounded(config, row);
    const before = rows.reduce((sum, { bytesBefore }) => sum + bytesBefore, 0);
    const after = rows.reduce((sum, { bytesAfter }) => sum + bytesAfter, 0);
    return {
      name: "writing",
      bytes: Math.min(this.solvedBytes(config), this.packedBytes) + this.tableBytes +
        // Coded scales share a grid: a matrix that was not solved is in memory as a whole, and a rotated one.
        most(
          rows.map((row) => {
            const isCoded = row.scaleBits === CODED_SCALE_BITS,
              isRotated = row.scaleBits === ROTATED_SCALE_BITS;
            if (!isRotated && (!isCoded || isOwn(row))) return 0;
            const { rows: height, cols } = matrixSizes(row.shape);
            return row.bytesBefore + height * cols * LAYER_BYTES +
              (isOwn(row) ? 0 : ownOrderBytes([formatOf(row)], cols, 1));
          }),
        ),
      statesBytes: 0,
      seconds: (timed) =>
        // Read and hashed; written, hashed, and read back.
        timed.hashing(before + 2 * after) + FILE_SECONDS * rows.length + rows.reduce((sum, row) => {
          if (row.action === "keep") return sum;
          const weights = elementCount(row.shape)!, form = formatOf(row);
          return sum + timed.packing(weights, "measure", form) +
            (isOwn(row) ? 0 : timed.packing(weights, weightSolver(config, row), form));
        }, 0),
    };
  }
}
