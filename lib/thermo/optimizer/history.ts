/** The losses of an optimization, iteration by iteration, and whether they have settled. */
import type { LossHistory, LossTerms } from "../losses.ts";

/**
 * Iterations whose mean loss is compared with that of as many before, and how often in a row the two must
 * agree: batches differ, so that two means agree by chance.
 */
export const CONVERGENCE_WINDOW = 10, CONVERGENCE_STREAK = 10;

/** The record of the iterations. */
export class History {
  readonly quantization: number[] = [];
  readonly markov: number[] = [];
  readonly entropy: number[] = [];
  readonly total: number[] = [];
  readonly gradientNorms: number[] = [];
  clipped = 0;

  /** @returns the total */
  add(loss: LossTerms | number): number {
    const { quantization, markov, entropy } = typeof loss === "number"
      ? { quantization: loss, markov: 0, entropy: 0 }
      : loss;
    const total = quantization + markov + entropy;
    this.quantization.push(quantization);
    this.markov.push(markov);
    this.entropy.push(entropy);
    this.total.push(total);
    return total;
  }

  /** What {@linkcode restart} goes on from. */
  state() {
    const { gradientNorms, clipped } = this;
    return { losses: this.losses, gradientNorms, clipped };
  }

  restart({ losses, gradientNorms, clipped }: ReturnType<History["state"]>): void {
    for (const term of ["quantization", "markov", "entropy", "total"] as const) {
      this[term].push(...losses[term]);
    }
    this.gradientNorms.push(...gradientNorms);
    this.clipped = clipped;
  }

  get losses(): LossHistory {
    const { quantization, markov, entropy, total } = this;
    return { quantization, markov, entropy, total };
  }
}

/** True where the mean of the last losses equals that of those before, relative to itself. */
export function hasSettled(losses: readonly number[], threshold: number): boolean {
  if (threshold === 0 || losses.length < 2 * CONVERGENCE_WINDOW) return false;
  const mean = (part: readonly number[]) => part.reduce((sum, loss) => sum + loss, 0) / part.length;
  const now = mean(losses.slice(-CONVERGENCE_WINDOW));
  const before = mean(losses.slice(-2 * CONVERGENCE_WINDOW, -CONVERGENCE_WINDOW));
  return Math.abs(now - before) <= threshold * Math.abs(before);
}
