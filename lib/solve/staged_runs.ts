/** A model run over calibration data from stage to stage: what is computed once is not computed again. */
import { blockCount } from "../calibration/collect.ts";
import type { CalibrationPart } from "../calibration/mod.ts";
import type { Blockwise, Matrix, StagedRun, StageStop } from "../models/mod.ts";
import type { KeptArrays } from "./kept_arrays.ts";

type Floats = Float32Array<ArrayBuffer>;

/** Where the run of a part of the data is. */
interface Place {
  block: number;
  steps?: StagedRun<Float32Array> | undefined;
  stop?: StageStop | undefined;
  /** Hidden states while the part runs: parts of a length share them. */
  readonly hidden: Floats;
}

/** The runs of all parts of the data with the same weights. */
export class StagedRuns<Batch> {
  readonly #places: (Place | undefined)[] = [];
  readonly #hidden = new Map<number, Floats>();

  /**
   * @param name of these runs among those that share `kept`
   * @param weights in place of the model's; what is put into it counts from then on
   */
  constructor(
    readonly model: Blockwise<Batch>,
    readonly parts: readonly CalibrationPart<Batch>[],
    readonly kept: KeptArrays,
    readonly name: string,
    readonly weights?: ReadonlyMap<string, Matrix>,
  ) {}

  /** Takes a part on to a stage: layers that read what the one of this name does. Scratch. */
  stop(index: number, block: number, layer: string): StageStop {
    const place = this.#resume(index);
    this.#advance(index, place, block);
    while (place.stop?.layers.some(({ name }) => name === layer) !== true) {
      place.steps ??= this.model.stagesOf(block, this.parts[index]!.batch, place.hidden, this);
      const { done, value } = place.steps.next();
      if (done === true) throw new Error(`block ${block} has no layer ${layer}`);
      place.stop = value;
    }
    this.#keep(index, place);
    return place.stop;
  }

  /** Takes a part on to the beginning of a block. */
  enter(index: number, block: number): void {
    if ((this.#places[index]?.block ?? -1) >= block) return;
    const place = this.#resume(index);
    this.#advance(index, place, block);
    this.#keep(index, place);
  }

  /** Runs to the end of each block before one; nothing stays of a model's output. */
  #advance(index: number, place: Place, block: number): void {
    const { batch } = this.parts[index]!;
    for (; place.block < Math.min(block, blockCount(this.model)); place.block++) {
      place.steps ??= this.model.stagesOf(place.block, batch, place.hidden, this);
      while (place.steps.next().done !== true);
      place.steps = place.stop = undefined;
    }
  }

  /** Puts back what a part's run reads. */
  #resume(index: number): Place {
    const known = this.#places[index];
    if (known !== undefined) {
      this.kept.get(this.#key(index), arraysOf(known));
      return known;
    }
    const start = this.model.start(this.parts[index]!.batch, this), { length } = start;
    const hidden = this.#hidden.get(length) ?? start;
    if (hidden !== start) hidden.set(start);
    this.#hidden.set(length, hidden);
    return this.#places[index] = { block: 0, hidden };
  }

  #keep(index: number, place: Place): void {
    this.kept.put(this.#key(index), arraysOf(place));
  }

  #key(index: number): string {
    return `${this.name}-${index}`;
  }
}

/** Arrays that a stopped run still reads: for the layers behind the stop, `x`. */
const arraysOf = ({ hidden, stop }: Place): Floats[] =>
  stop === undefined ? [hidden] : [hidden, stop.x, ...stop.kept ?? []];
