/** Layers that read the same input, and the moments of that input that they are solved on. */
import type { CalibrationSet } from "../calibration/mod.ts";
import { CalibrationError } from "../errors.ts";
import type { LinearLayer, Stage } from "../models/mod.ts";
import { momentElements } from "../native/call_checks.ts";
import { giveBack } from "../quant/array_memory.ts";
import type { WeightFormat } from "../quant/packed/layout.ts";
import { type FactoredMoment, solvableBlock } from "../quant/solvers/factored_moment.ts";
import type { InputMoments } from "../quant/solvers/moments.ts";
import type { CalibrationStatistics } from "../time/mod.ts";

/** With fewer inputs a column solvers overfit the sample. */
const INPUTS_PER_COLUMN = 4;
/**
 * Bytes of inputs that stay for layers that read the same: theirs are not far behind in a file. A stage that
 * takes more by itself is kept alone.
 */
export const READY_BYTES = 2 ** 27;

/** Layers that read the same input. */
export interface LayerStage {
  readonly block: number;
  readonly layers: readonly LinearLayer[];
  /** Of these layers, and of those that are left out. */
  readonly formats: readonly WeightFormat[];
}

export interface Gathered {
  readonly moments: InputMoments;
  /** Mean of w (x° − x) xᵀ; undefined when nothing is to be corrected. */
  readonly cross: Float32Array<ArrayBuffer> | undefined;
  /** Mean of w (r° − r) xᵀ, by layer. */
  readonly residuals: ReadonlyMap<string, Float32Array<ArrayBuffer>>;
}

/** The inputs of a stage, ready to solve on. */
export interface StageInputs extends Gathered {
  readonly moment: FactoredMoment;
  /** Its structure in words. */
  readonly structure: string;
  /** Σ of the inputs' weights. */
  readonly weight: number;
}

/** Saved moments of a layer's inputs, without anything to correct. */
export function known(statistics: CalibrationStatistics, { name, weights: { cols } }: LinearLayer): Gathered {
  const moments = statistics.moments(name);
  if (moments.cols === cols) return { moments, cross: undefined, residuals: new Map() };
  throw new CalibrationError(
    `Cannot solve ${JSON.stringify(name)}: its statistics must be of ${cols} columns, got ${moments.cols}`,
    { tensor: name },
  );
}

/** Bytes of the moment and of its factor that layers of `cols` columns are solved on. */
export const stageBytes = (cols: number, block: number): number =>
  2 * 4 * momentElements(cols, cols, solvableBlock(cols, block));

/** Inputs of the stages that were asked for last. */
export class ReadyInputs<Key> {
  readonly #ready = new Map<Key, StageInputs>();

  /** @param limit bytes of all that are kept, where one stage does not take more */
  constructor(readonly limit = READY_BYTES) {}

  /** Lets go of the oldest, of all where it must be, until `bytes` more fit. */
  makeRoom(bytes: number): void {
    const bytesOf = ({ moment: { moment, factor } }: StageInputs) => moment.byteLength + factor.byteLength;
    let kept = bytes;
    for (const own of this.#ready.values()) kept += bytesOf(own);
    for (const [key, own] of this.#ready) {
      if (kept <= this.limit) return;
      kept -= bytesOf(own);
      this.#ready.delete(key);
      letGo(own);
    }
  }

  /** A stage's inputs, that are kept: made once there is room for the `bytes` that they take. */
  async take(stage: Key, bytes: number, make: () => Promise<StageInputs>): Promise<StageInputs> {
    const known = this.#ready.get(stage);
    if (known !== undefined) return known;
    this.makeRoom(bytes);
    const inputs = await make();
    this.#ready.set(stage, inputs);
    return inputs;
  }
}

/** Gives back the memory of a stage's inputs, whose layers are solved. */
export function letGo({ moment: { moment, factor }, cross, residuals }: StageInputs): void {
  giveBack(moment, factor, cross, ...residuals.values());
}

/** Warns once, for the layer with most columns, when its inputs are too few. */
export function warnOfFewInputs<Batch>(
  stages: readonly Pick<Stage, "layers">[],
  data: CalibrationSet<Batch>,
  statistics: CalibrationStatistics | undefined,
  onWarning: ((message: string) => void) | undefined,
): void {
  const widest = stages.map(({ layers }) => layers[0]!)
    .reduce((a, b) => b.weights.cols > a.weights.cols ? b : a, stages[0]!.layers[0]!);
  const wanted = INPUTS_PER_COLUMN * widest.weights.cols;
  const got = statistics === undefined ? data.distinctPositions : statistics.tokensOf(widest.name);
  if (got >= wanted) return;
  onWarning?.(
    `${widest.name} reads ${widest.weights.cols} columns: calibrate with at least ${wanted} different positions, got ${got}`,
  );
}
