/** The refinement's state in the work folder, so that a stopped one goes on from its last look. */
import { join } from "node:path";
import { readKept, writeKept } from "../output/kept_file.ts";
import { SOLVED_PREFIX } from "../output/output_folder.ts";
import type { OptimizerState } from "../thermo/mod.ts";
import type { FittingWork } from "./fitting.ts";

/** The file; it goes with those of solved layers. */
const NAME = `${SOLVED_PREFIX}refinement`;
/** Most bytes that are written at a look: of 67 million parameters. More begins again after a stop. */
export const MAX_REFINEMENT_BYTES = 2 ** 30;

/** Where a run keeps its refinement. */
export interface RefinementPlace {
  readonly folder: string;
  /** Of the run: what another one has left is not taken. */
  readonly identity: string;
}

/** Where a refinement was, and what was found to fit into its time. */
export interface KeptRefinement {
  readonly fits: FittingWork;
  readonly state: OptimizerState;
}

interface Header {
  readonly fits: FittingWork;
  readonly progress: string;
}

/** Keeps a state in place of the last one. @throws {OutputError} when the system refuses */
export function keepRefinement({ folder, identity }: RefinementPlace, { fits, state }: KeptRefinement): void {
  const { progress, arrays } = state;
  if (arrays.reduce((sum, { byteLength }) => sum + byteLength, 0) > MAX_REFINEMENT_BYTES) return;
  const header: Header = { fits, progress };
  writeKept(join(folder, NAME), identity, { header, arrays });
}

/** What an earlier run has kept. */
export function keptRefinement({ folder, identity }: RefinementPlace): KeptRefinement | undefined {
  const kept = readKept<Header>(join(folder, NAME), identity);
  if (kept === undefined) return undefined;
  const { header: { fits, progress }, arrays } = kept;
  return { fits, state: { progress, arrays: arrays as OptimizerState["arrays"] } };
}
