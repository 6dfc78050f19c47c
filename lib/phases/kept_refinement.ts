/** The refinement's state in the work folder, so that a stopped one goes on from its last look. */
import { join } from "node:path";
import { listFolder, remove } from "../files/whole.ts";
import { readKept, writeKept } from "../output/kept_file.ts";
import { SOLVED_PREFIX } from "../output/output_folder.ts";
import type { OptimizerState } from "../thermo/mod.ts";
import type { FittingWork } from "./fitting.ts";

/** The file; it goes with those of solved layers. What does not fit into it has files that begin like it. */
const NAME = `${SOLVED_PREFIX}refinement`;
/** Numbers of a file, which are in memory at once. */
const FILE_NUMBERS = 2 ** 24;

/** Where a run keeps its refinement. */
export interface RefinementPlace {
  readonly folder: string;
  /** Of the run: what another one has left is not taken. */
  readonly identity: string;
  /** Numbers of a file; default 16 million. */
  readonly fileNumbers?: number | undefined;
}

/** Where a refinement was, and what was found to fit into its time. */
export interface KeptRefinement {
  readonly fits: FittingWork;
  readonly state: OptimizerState;
}

interface Header {
  readonly fits: FittingWork;
  readonly progress: string;
  /** Of the files with the numbers before those of this one: how often was kept, and their count. */
  readonly generation: number;
  readonly files: number;
}

const partName = (generation: number, index: number): string => `${NAME}-${generation}-${index}`;

/** Where the refinement's parameters lie that are not in memory. */
export const parametersPath = ({ folder }: RefinementPlace): string => join(folder, `${NAME}.parameters`);

/**
 * Keeps a state in place of the last one, which stands until all of it is written.
 *
 * @throws {OutputError} when the system refuses
 */
export function keepRefinement(place: RefinementPlace, { fits, state }: KeptRefinement): void {
  const { folder, identity, fileNumbers = FILE_NUMBERS } = place;
  const path = join(folder, NAME), last = readKept<Header>(path, identity)?.header.generation ?? 0;
  const generation = last + 1;
  let part = new Float32Array(0), length = 0, files = 0;
  for (const piece of state.pieces) {
    for (let from = 0; from < piece.length;) {
      if (length === fileNumbers) {
        writeKept(join(folder, partName(generation, files++)), identity, { header: {}, arrays: [part] });
        length = 0;
      }
      const own = piece.subarray(from, from + fileNumbers - length), end = length + own.length;
      if (end > part.length) {
        const longer = new Float32Array(Math.min(fileNumbers, Math.max(end, 2 * part.length)));
        longer.set(part.subarray(0, length));
        part = longer;
      }
      part.set(own, length);
      [from, length] = [from + own.length, end];
    }
  }
  const header: Header = { fits, progress: state.progress, generation, files };
  writeKept(path, identity, { header, arrays: [part.subarray(0, length)] });
  for (const name of listFolder(folder)) {
    if (name.startsWith(`${NAME}-`) && !name.startsWith(`${NAME}-${generation}-`)) remove(join(folder, name));
  }
}

/** What an earlier run has kept, undefined where it is not whole. */
export function keptRefinement({ folder, identity }: RefinementPlace): KeptRefinement | undefined {
  const kept = readKept<Header>(join(folder, NAME), identity);
  if (kept === undefined) return undefined;
  const { header: { fits, progress, generation, files }, arrays } = kept;
  if (!Number.isInteger(files)) return undefined; // of a build that kept an array of each kind in one file
  const partOf = (index: number) => readKept(join(folder, partName(generation, index)), identity)?.arrays[0];
  for (let index = 0; index < files; index++) if (partOf(index) === undefined) return undefined;
  function* pieces(): Generator<Float32Array> {
    for (let index = 0; index < files; index++) yield partOf(index) as Float32Array;
    yield arrays[0] as Float32Array;
  }
  return { fits, state: { progress, pieces: { [Symbol.iterator]: pieces } } };
}
