/** Memory of a run: its limit, and what of it weights and the states between stages may take. */
import process from "node:process";
import { BATCH_POSITIONS } from "../../calibration/draw.ts";
import { forwardCost, HeldWeights, modelConfig } from "../../models/mod.ts";
import type { Checkpoint } from "../../tensor/mod.ts";

/** Part of the room that a forward pass may take with its values before it takes fewer positions at once. */
const BATCH_SHARE = 1 / 8;
/** Fewest positions of a forward pass: products of fewer are slower. */
const LEAST_BATCH_POSITIONS = 256;
/** Tokens of a sequence for whose sake the values of a position are counted. */
const COUNTED_TOKENS = 128;

/** Part of the limit that gradients may take before blocks are run again for them. */
export const GRADIENT_SHARE = 1 / 4;

/** The memory of a run, divided once it is known what the run does. */
export class MemoryShares {
  /** The model's weights: half of the room until it is divided. */
  readonly held: HeldWeights;
  /** Bytes of hidden states that stay in memory between stages; what is more goes to files. */
  statesBytes = Infinity;

  /** @param limitBytes that the process may take */
  constructor(readonly limitBytes: number) {
    this.held = new HeldWeights(0);
    this.held.limitBytes = Math.max(0, this.roomBytes / 2);
  }

  /** Bytes that the process has beside weights that can be let go. */
  get residentBytes(): number {
    return Math.max(0, process.memoryUsage().rss - this.held.bytes);
  }

  /** Bytes that are left. */
  get roomBytes(): number {
    return this.limitBytes - this.residentBytes;
  }

  /** Positions of a forward pass whose values take a small part of the room. */
  batchPositions(checkpoint: Checkpoint): number {
    const { activationBytes } = forwardCost(modelConfig(checkpoint), {
      batch: 1,
      tokens: COUNTED_TOKENS,
      rows: 1,
    });
    const most = BATCH_SHARE * this.roomBytes;
    let positions = BATCH_POSITIONS;
    while (positions > LEAST_BATCH_POSITIONS && positions * activationBytes / COUNTED_TOKENS > most) {
      positions /= 2;
    }
    return positions;
  }
}
