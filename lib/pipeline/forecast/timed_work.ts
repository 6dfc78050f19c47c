/**
 * Time of a run's work on this machine, from a little of the same work done on the spot: a block run on a
 * sample, moments gathered, factored and solved on, weights packed and hashed.
 */
import { createHash } from "node:crypto";
import type { CalibrationPart } from "../../calibration/mod.ts";
import type { Solvable } from "../../calibration/statistics/alone.ts";
import type { Solver } from "../../config/names.ts";
import type { Blockwise, ImageBatch, SequenceBatch } from "../../models/mod.ts";
import { linearPackedInt8, quantizeActivations } from "../../models/layers/int8.ts";
import { RandomStream } from "../../models/random.ts";
import type { Kernels } from "../../native/mod.ts";
import { giveBack } from "../../quant/array_memory.ts";
import { packedErrorStatistics, quantize, quantizeByWeights, type WeightSolver } from "../../quant/mod.ts";
import { ROTATED_SCALE_BITS, type WeightFormat } from "../../quant/packed/layout.ts";
import { settingsFor } from "../../quant/solvers/effort.ts";
import { type FactoredMoment, factorMoments } from "../../quant/solvers/factored_moment.ts";
import { MomentSums } from "../../quant/solvers/moment_sums.ts";
import { accumulateMoment, emptyMoments } from "../../quant/solvers/moments.ts";
import { leastBlock } from "../../quant/solvers/problem.ts";
import { solveLayer } from "../../quant/solvers/solve_layer.ts";
import type { SolverSettings } from "../../quant/solvers/settings.ts";
import type { Checkpoint } from "../../tensor/mod.ts";
import { tokenKl } from "../../thermo/masked_transition.ts";

/** Most columns, rows and inputs of a layer that is timed: wider ones take as many times longer. */
const PROBE = { cols: 2048, rows: 384, manyRows: 768, tokens: 1024 };
/** Weights whose trellis codes are searched for: rows for each thread, the lanes of its vectors. */
const TRELLIS = { rowsOfThread: 32, cols: 512 };
/** Most multiply-adds, roughly, of a block that is run to be timed. */
const BLOCK_MULTIPLY_ADDS = 2e10;
/** What takes less is timed again: the first time has compiling in it. */
const SHORT_SECONDS = 0.3;
/** Times that it is done again, as long as they take no longer together. */
const MOST_TIMES = 9, ENOUGH_SECONDS = 0.05;
/** Weights that are packed, and bytes that are hashed, to be timed. */
const PACKED = { rows: 256, cols: 2048 }, HASHED_BYTES = 2 ** 22;
/** Those of trellis codes, and rotated ones: rows enough that rotating and factoring a moment is little. */
const PACKED_TRELLIS = { rows: 32, cols: 2048 }, PACKED_ROTATED = { rows: 128, cols: 1024 };
/** Bytes that are read to be timed, at most. */
const READ_BYTES = 2 ** 24;
/** Numbers that are copied to be timed. */
const COPIED_ELEMENTS = 2 ** 18;
/** Columns of a moment whose sums of a chunk are added to be timed. */
const SUMMED_COLS = 1536;
/** Rows and columns of logits that are compared to be timed. */
const LOGITS = { rows: 4, cols: 8192 };

/** Seconds of a function: of what is short the median of further times, the first has compiling in it. */
function secondsOf(run: () => unknown): number {
  const once = () => {
    const begin = performance.now();
    run();
    return Math.max(1e-7, (performance.now() - begin) / 1000);
  };
  const first = once();
  if (first >= SHORT_SECONDS) return first;
  const times = [once()];
  for (let all = first; times.length < MOST_TIMES && all < ENOUGH_SECONDS; all += times.at(-1)!) {
    times.push(once());
  }
  return times.sort((a, b) => a - b)[times.length >> 1]!;
}

/** Seconds of what is done with a moment of so many columns. */
interface MomentTimes {
  readonly cols: number;
  readonly moment: FactoredMoment;
  /** Of a multiply-add, and of factoring it. */
  readonly multiplyAdd: number;
  readonly factor: number;
}

/** Times of kinds of work, each measured when it is first asked for. */
export class TimedWork implements Disposable {
  readonly #kernels: Kernels;
  readonly #calibrated: Solvable;
  readonly #checkpoint: Checkpoint;
  readonly #known = new Map<string, number>();
  readonly #moments = new Map<number, MomentTimes>();
  readonly #inBlocks = new Map<string, FactoredMoment>();

  constructor(kernels: Kernels, calibrated: Solvable, checkpoint: Checkpoint) {
    [this.#kernels, this.#calibrated, this.#checkpoint] = [kernels, calibrated, checkpoint];
  }

  /** Gives back the memory of moments that were made to be timed. */
  [Symbol.dispose](): void {
    const whole = Array.from(this.#moments.values(), ({ moment }) => moment);
    for (const { moment, factor } of [...whole, ...this.#inBlocks.values()]) giveBack(moment, factor);
    this.#moments.clear();
    this.#inBlocks.clear();
  }

  #once(key: string, measure: () => number): number {
    let seconds = this.#known.get(key);
    if (seconds === undefined) this.#known.set(key, seconds = measure());
    return seconds;
  }

  /** Seconds of all blocks for a position of the data. @param multiplyAdds of them, about */
  position(multiplyAdds: number): number {
    return this.#once("position", () => {
      const { kind, model, data } = this.#calibrated;
      if (kind === "layers") return 0;
      return kind === "sequences"
        ? this.#block(model, data.fit[0] ?? data.heldOut[0], multiplyAdds, sequences)
        : this.#block(model, data.fit[0] ?? data.heldOut[0], multiplyAdds, images);
    });
  }

  #block<Batch>(
    model: Blockwise<Batch>,
    part: CalibrationPart<Batch> | undefined,
    multiplyAdds: number,
    first: (batch: Batch, of: number, count: number) => Batch,
  ): number {
    if (part === undefined) return 0;
    const { batch, samples, weights: { length } } = part, blocks = model.stages.at(-1)!.block;
    const ofSample = multiplyAdds / blocks * length / samples;
    const count = Math.max(1, Math.min(samples, Math.floor(BLOCK_MULTIPLY_ADDS / ofSample)));
    const own = first(batch, samples, count), hidden = model.start(own);
    model.runBlock(0, own, hidden, {}); // reads its weights
    return secondsOf(() => model.runBlock(0, own, hidden, {})) * blocks / (count * length / samples);
  }

  /** Seconds of a multiply-add of products with moments of so many columns. */
  multiplyAdd(cols: number): number {
    return this.#momentOf(cols).multiplyAdd;
  }

  /** Seconds of factoring a moment. */
  factor(cols: number): number {
    const own = this.#momentOf(cols);
    return own.factor * (cols / own.cols) ** 3;
  }

  #momentOf(cols: number): MomentTimes {
    const own = Math.min(cols, PROBE.cols);
    const known = this.#moments.get(own);
    if (known !== undefined) return known;
    const kernels = this.#kernels, { tokens } = PROBE, moments = emptyMoments(own);
    const x = new Float32Array(tokens * own);
    new RandomStream(own).fillNormal(x);
    const gathered = secondsOf(() =>
      accumulateMoment(kernels, x, undefined, undefined, tokens, moments.second)
    );
    moments.tokens = moments.weight = tokens;
    let moment: FactoredMoment;
    const factor = secondsOf(() => void (moment = factorMoments(kernels, moments)));
    giveBack(x, moments.second);
    const times = { cols: own, moment: moment!, multiplyAdd: gathered / (tokens * own * own / 2), factor };
    this.#moments.set(own, times);
    return times;
  }

  /** A moment to solve on, whole or in blocks. */
  #solvable(cols: number, block: number): FactoredMoment {
    if (block === cols) return this.#momentOf(cols).moment;
    const key = `${cols} in ${block}`, known = this.#inBlocks.get(key);
    if (known !== undefined) return known;
    const moments = emptyMoments(cols, block), tokens = 2 * block, x = new Float32Array(tokens * cols);
    new RandomStream(cols).fillNormal(x);
    accumulateMoment(this.#kernels, x, undefined, undefined, tokens, moments.second, block);
    moments.tokens = moments.weight = tokens;
    const moment = factorMoments(this.#kernels, moments);
    giveBack(x, moments.second);
    this.#inBlocks.set(key, moment);
    return moment;
  }

  /**
   * Seconds of solving a layer.
   *
   * @param block columns of a block of its moment
   */
  solving(
    rows: number,
    cols: number,
    block: number,
    { form, solver, settings: asked }: {
      readonly form: WeightFormat;
      readonly solver: Solver;
      readonly settings: SolverSettings;
    },
  ): number {
    if (block === 1) return this.packing(rows * cols, "clip", form); // weighed by the diagonal
    const settings = settingsFor(asked, { rows, cols, block });
    if (form.scaleBits === ROTATED_SCALE_BITS) block = cols; // a rotation mixes the columns of several blocks
    const own = Math.min(block, PROBE.cols);
    // Narrow blocks are solved side by side, as in the layer: each call has fixed costs.
    const blocks = own % leastBlock(form) === 0 ? Math.floor(Math.min(cols, PROBE.cols) / own) : 1;
    const ofRows = (count: number, width: number) =>
      this.#once(JSON.stringify([count, width, own, form, solver, settings]), () => {
        const block = Math.min(width, own), moment = this.#solvable(width, block);
        const weights = new Float32Array(count * width);
        // What does not fit is refused when it is solved.
        const groupSize: WeightFormat["groupSize"] = block % (form.groupSize || block) === 0
          ? form.groupSize
          : 0;
        new RandomStream(1).fillNormal(weights);
        const problem = { weights, rows: count, cols: width, moment, ...form, groupSize };
        const seconds = secondsOf(() => solveLayer(this.#kernels, solver, problem, settings));
        giveBack(weights);
        return seconds;
      });
    const { rows: few, manyRows: many } = PROBE;
    if (form.codes === "trellis") {
      // A search takes the same for every weight, what comes behind it as long as a block has columns.
      const count = Math.min(rows, TRELLIS.rowsOfThread * this.#kernels.threads),
        width = Math.min(own, TRELLIS.cols),
        half = Math.ceil(width / 2);
      const whole = ofRows(count, width), part = half / width;
      const square = Math.max(0, whole - ofRows(count, half) / part) / (1 - part);
      const ofBlock = (whole - square) * block / width + square * (block / width) ** 2;
      return ofBlock * rows / count * cols / block;
    }
    // Some work is done on a sample of rows, however many there are.
    const width = blocks * own, most = ofRows(Math.min(rows, many), width);
    const seconds = rows <= many
      ? most
      : most + (rows - many) * Math.max(0, most - ofRows(few, width)) / (many - few);
    // Of work that is a square of the columns in each block.
    return seconds * (block / own) ** 2 * (cols / (blocks * block));
  }

  /** Seconds of copying numbers and subtracting others, which no kernel does. */
  copying(elements: number): number {
    const seconds = this.#once("copying", () => {
      const from = new Float32Array(COPIED_ELEMENTS).fill(1), to = new Float32Array(COPIED_ELEMENTS);
      return secondsOf(() => {
        to.set(from);
        for (let k = 0; k < to.length; k++) to[k]! -= from[k]!;
      });
    });
    return seconds * elements / COPIED_ELEMENTS;
  }

  /** Seconds of adding chunks of so many sums up, in double: the first in new memory, and read at the end. */
  adding(elements: number, chunks: number): number {
    const cols = SUMMED_COLS, x = new Float32Array(cols).fill(1), inputs = { x, tokens: 1 };
    const own = cols * (cols + 1) / 2;
    const first = this.#once("first sums", () => {
      const begin = performance.now(), sums = new MomentSums({ rows: cols, cols, isSymmetric: true });
      sums.add(this.#kernels, inputs);
      giveBack(sums.exact());
      return (performance.now() - begin) / 1000;
    });
    const further = this.#once("further sums", () => {
      const sums = new MomentSums({ rows: cols, cols, isSymmetric: true });
      const seconds = secondsOf(() => {
        sums.add(this.#kernels, inputs);
        sums.endChunk();
      });
      giveBack(sums.exact());
      return seconds;
    });
    return elements / own * (first + (chunks - 1) * further);
  }

  /** Seconds of comparing two models' logits at so many positions. */
  logits(rows: number, vocabularySize: number): number {
    if (rows * vocabularySize === 0) return 0;
    const seconds = this.#once("logits", () => {
      const cols = Math.min(vocabularySize, LOGITS.cols), values = new Float32Array(LOGITS.rows * cols);
      new RandomStream(2).fillNormal(values);
      return secondsOf(() => tokenKl(values, values, { vocabularySize: cols })) / values.length;
    });
    return seconds * rows * vocabularySize;
  }

  /** Seconds of packing so many weights with a solver of weights alone, or of measuring their error alone. */
  packing(weights: number, how: WeightSolver | "measure", form: WeightFormat): number {
    const isRotated = form.scaleBits === ROTATED_SCALE_BITS;
    const { rows, cols } = form.codes !== "trellis" ? PACKED : isRotated ? PACKED_ROTATED : PACKED_TRELLIS;
    const seconds = this.#once(JSON.stringify([how, form]), () => {
      const data = new Float32Array(rows * cols);
      new RandomStream(3).fillNormal(data);
      const given = { data, dtype: "F32" } as const, solver = how === "measure" ? "round" : how;
      const tensor = quantizeByWeights(this.#kernels, given, rows, cols, { ...form, solver });
      return secondsOf(() =>
        how === "measure"
          ? packedErrorStatistics(this.#kernels, given, tensor)
          : quantizeByWeights(this.#kernels, given, rows, cols, { ...form, solver })
      );
    });
    return seconds * weights / (rows * cols);
  }

  /** Seconds of a multiply-add of products of 8-bit weights and inputs. */
  integerMultiplyAdd(): number {
    return this.#once("integers", () => {
      const { rows, cols } = PACKED, tokens = 4 * rows, kernels = this.#kernels;
      const data = new Float32Array(rows * cols), x = new Float32Array(tokens * cols);
      new RandomStream(5).fillNormal(data);
      new RandomStream(6).fillNormal(x);
      const given = { data, dtype: "F32" } as const;
      const weights = quantize(kernels, given, rows, cols, { bits: 8, groupSize: 0, solver: "round" });
      const codes = quantizeActivations(kernels, x, tokens, cols), out = new Float32Array(tokens * rows);
      return secondsOf(() => linearPackedInt8(kernels, { weights }, codes, out)) / (tokens * rows * cols);
    });
  }

  /** Seconds of reading so many bytes of weights, from the disk or from what the system keeps of it. */
  reading(bytes: number): number {
    const { tensors } = this.#checkpoint;
    const { name, byteLength } = [...tensors.values()].map(({ info }) => info)
      .reduce((a, b) => b.byteLength > a.byteLength ? b : a);
    const content = new Uint8Array(Math.min(byteLength, READ_BYTES)), { length } = content;
    const seconds = this.#once("reading", () => secondsOf(() => this.#checkpoint.readInto(name, 0, content)));
    giveBack(content);
    return seconds * bytes / length;
  }

  /** Seconds of hashing so many bytes. */
  hashing(bytes: number): number {
    const seconds = this.#once("hashing", () => {
      const content = new Uint8Array(HASHED_BYTES);
      return secondsOf(() => createHash("sha256").update(content).digest());
    });
    return seconds * bytes / HASHED_BYTES;
  }
}

/** The first sequences of a batch. */
function sequences({ inputIds, attentionMask }: SequenceBatch, of: number, count: number): SequenceBatch {
  const length = inputIds.length / of * count;
  return {
    inputIds: inputIds.subarray(0, length),
    batch: count,
    attentionMask: attentionMask?.subarray(0, length),
  };
}

/** The first images of a batch. */
function images({ samples, timesteps, labels }: ImageBatch, of: number, count: number): ImageBatch {
  return {
    samples: samples.subarray(0, samples.length / of * count),
    timesteps: Array.from(timesteps).slice(0, count),
    labels: Array.from(labels).slice(0, count),
  };
}
