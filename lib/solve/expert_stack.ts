/** Solving experts that one tensor holds: each on what it reads, joined to one layer. */
import type { PackedTensor } from "../quant/mod.ts";
import { rowsJoined } from "../quant/packed/layout.ts";
import type { SolvedLayer } from "./solved_layers.ts";

/** A solved expert, or one that is quantized by its weights alone. */
export type SolvedExpert = Pick<SolvedLayer, "tensor"> & Partial<SolvedLayer>;

/**
 * Experts as one layer. Errors and gains are means of those that were solved, counts their sums.
 *
 * @returns undefined where none was solved
 */
export function joinedExperts(name: string, experts: readonly SolvedExpert[]): SolvedLayer | undefined {
  const solved = experts.filter((expert): expert is SolvedLayer => expert.name !== undefined);
  if (solved.length === 0) return undefined;
  const sum = (of: (layer: SolvedLayer) => number) => solved.reduce((total, each) => total + of(each), 0);
  return {
    name,
    tensor: rowsJoined(experts.map(({ tensor }) => tensor) as [PackedTensor, ...PackedTensor[]]),
    relativeError: sum(({ relativeError }) => relativeError) / solved.length,
    gain: sum(({ gain }) => gain) / solved.length,
    moment: [...new Set(solved.map(({ moment }) => moment))].join(", "),
    damping: Math.max(...solved.map(({ damping }) => damping)),
    deadColumns: sum(({ deadColumns }) => deadColumns),
    inputs: sum(({ inputs }) => inputs),
    milliseconds: sum(({ milliseconds }) => milliseconds),
  };
}
