/** What the gradient refinement has time and memory for: known before its first step. */
import { TOGETHER } from "../output/paged_floats.ts";
import { formatBytes, secondsText } from "../progress.ts";
import type { Family } from "./settings.ts";

/** Positions of one refinement step, roughly. */
const STEP_POSITIONS = 1152;
/** Samples held out from the refinement; rare large errors decide a language model's mean. */
export const REFINEMENT_HELD_OUT = { sequences: 1024, images: 256 };

/** Samples of a step, of so many positions each. */
export const samplesOfStep = (positions: number): number =>
  Math.max(1, Math.floor(STEP_POSITIONS / positions));

/** Passes of both models that a step is worth: one forward, two back. */
const STEP_PASSES = 3;
/** Looks at held-out samples that a refinement cannot do without: two of each of its ends. */
const LEAST_LOOKS = 4;
/** Share of the time that these looks may take. */
const LOOKS_SHARE = 1 / 3;
/** What would take less is begun however little time there is: it is over before it can be foreseen. */
const BEGUN_SECONDS = 10;

/** What a refinement has time for. */
export interface FittingWork {
  /** Steps; 0 where the time does not suffice. */
  readonly iterations: number;
  /** Batches of held-out samples. */
  readonly batches: number;
  readonly stepSeconds: number;
  /** Of a look at the held-out samples. */
  readonly lookSeconds: number;
}

/**
 * What fits into so many seconds: fewer held-out batches where looking at all of them would take too much of
 * it, then as many steps as are left.
 *
 * @param work seconds of a pass of both models over a batch, and what is wanted
 */
export function whatFits(
  { passSeconds, batches, iterations, seconds }: {
    readonly passSeconds: number;
    readonly batches: number;
    readonly iterations: number;
    readonly seconds: number;
  },
): FittingWork {
  const most = Math.floor(LOOKS_SHARE * seconds / (LEAST_LOOKS * passSeconds));
  const stepSeconds = STEP_PASSES * passSeconds, least = LEAST_LOOKS * passSeconds + stepSeconds;
  const isBegun = least <= Math.max(BEGUN_SECONDS, seconds);
  // Where every look is short, all of them are kept: few samples choose by chance.
  const isShort = LEAST_LOOKS * passSeconds * batches <= BEGUN_SECONDS;
  const own = isShort ? batches : Math.max(1, Math.min(batches, most)), lookSeconds = own * passSeconds;
  const left = Math.floor((seconds - LEAST_LOOKS * lookSeconds) / stepSeconds);
  return {
    iterations: isBegun ? Math.max(1, Math.min(iterations, left)) : 0,
    batches: own,
    stepSeconds,
    lookSeconds,
  };
}

/** What a refinement is expected to do, before its first step. */
export function fitsText(
  { iterations, batches, stepSeconds, lookSeconds }: FittingWork,
  { asked, minutes, size, kind }: {
    readonly asked: number;
    readonly minutes: number;
    readonly size: number;
    readonly kind: Family;
  },
): string {
  const times = `about ${secondsText(stepSeconds)} a step of ${size} ${kind} and ${
    secondsText(lookSeconds)
  } a look at ${batches * size} held-out samples`;
  const allowed = Number.isFinite(minutes) ? `${minutes} min (max_minutes)` : "no limit of time";
  return iterations === 0
    ? `gradient refinement is left out: it would take ${times}, with ${allowed}`
    : `gradient refinement begins: ${times}; ${
      iterations === asked ? `all ${asked}` : `${iterations} of ${asked}`
    } steps are expected with ${allowed}`;
}

/** Bytes of a refined parameter: its value, gradient and unit, and the optimizer's four numbers. */
const PARAMETER_BYTES = 7 * 4;

/** What refined parameters and the values of a step take, and what of it is in memory. */
export interface RefinementMemory {
  /** Blocks are run again on the way back, one at a time, instead of keeping the values of all. */
  readonly recomputes: boolean;
  /** Of the values of a step. */
  readonly stepBytes: number;
  /** Of all parameters, with their gradients and what the optimizer keeps of them. */
  readonly parameterBytes: number;
  /** Of those that are in memory: of all, or of the block that has most of them. */
  readonly heldBytes: number;
}

/** Refined parameters of a layer. */
export interface LayerParameterCount {
  /** The block; of what lies behind the last block, undefined. */
  readonly block: number | undefined;
  readonly parameters: number;
  /** Those of one kind, of which it has most. */
  readonly longest: number;
}

/** Refined parameters of a layer, which has some of them for each group of weights and some for each row. */
export function parametersOf(
  block: number | undefined,
  { rows, groups, isReal, perRow }: {
    readonly rows: number;
    readonly groups: number;
    readonly isReal: boolean;
    readonly perRow: number;
  },
): LayerParameterCount {
  const parameters = rows * (groups * (isReal ? 2 : 1) + perRow);
  return { block, parameters, longest: rows * Math.max(groups, perRow) };
}

/**
 * What is in memory: of all blocks where that takes no more than `limitBytes`, else of one; of a head, which
 * may be larger, what is used together.
 *
 * @param step bytes of its values, of all blocks and with blocks that are run again
 */
export function memoryThatFits(
  { scratchBytes, recomputedBytes }: {
    readonly scratchBytes: number;
    readonly recomputedBytes: number;
  },
  layers: readonly LayerParameterCount[],
  limitBytes: number,
): RefinementMemory {
  const sumOf = (own: readonly LayerParameterCount[]) =>
    own.reduce((sum, { parameters }) => sum + parameters, 0);
  const parameterBytes = PARAMETER_BYTES * sumOf(layers);
  const blocks = Map.groupBy(layers.filter(({ block }) => block !== undefined), ({ block }) => block);
  const ofBlock = Math.max(0, ...[...blocks.values()].map((own) => PARAMETER_BYTES * sumOf(own)));
  const together = layers.reduce((most, { longest }) => Math.max(most, 4 * TOGETHER * longest), 0);
  const recomputes = scratchBytes > limitBytes;
  return {
    recomputes,
    stepBytes: recomputes ? recomputedBytes : scratchBytes,
    parameterBytes,
    heldBytes: parameterBytes <= limitBytes
      ? parameterBytes
      : Math.min(parameterBytes, Math.max(ofBlock, together)),
  };
}

/** The same as a sentence. */
export function memoryText({ recomputes, stepBytes, parameterBytes, heldBytes }: RefinementMemory): string {
  const values = `${formatBytes(stepBytes)} of a step's values (${
    recomputes ? "of one block at a time, which is run again on the way back" : "of all blocks"
  })`;
  const parameters = heldBytes === parameterBytes
    ? `${formatBytes(parameterBytes)} of parameters (of all blocks)`
    : `${formatBytes(heldBytes)} of parameters (of one block at a time, of ${
      formatBytes(parameterBytes)
    } in the work folder)`;
  return `gradient refinement has in memory: ${values}, ${parameters}`;
}
