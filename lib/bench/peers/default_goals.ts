/** Goals of the default solver: own calibration data beside real ones, and more bits beside fewer. */
import { bootstrapRatio, type Interval } from "../../eval/intervals.ts";
import type { BitWidth, GroupSize } from "../../quant/mod.ts";
import { span } from "../settings.ts";
import type { Goal } from "../suite.ts";
import { gridName } from "./method.ts";

/** `best` on each source of calibration data, as the suite names it. */
export const BEST_ON = {
  real: "best, data beside the model",
  own: "best, the model's own samples",
  synthetic: "best, synthetic data",
} as const;

/** Distance with own samples, against that with real data, that is wanted. */
const OWN_SHARE = 1.5;

/** The distance to full precision of one method at one setting. */
export interface MeasuredDistance {
  /** As {@linkcode gridName} makes it. */
  readonly name: string;
  readonly bits: BitWidth;
  readonly groupSize: GroupSize;
  readonly distance: number;
  /** Of the same samples in the same order for all: the distance is proportional to their sum. */
  readonly samples: ArrayLike<number>;
}

/** One distance beside another on the same samples; the interval is of drawing these again for both. */
const ratioOf = (own: MeasuredDistance, other: MeasuredDistance): Interval =>
  bootstrapRatio(own.samples, other.samples);

const text = (own: MeasuredDistance, other: MeasuredDistance) =>
  `${span(ratioOf(own, other), 3)} × (${own.distance.toPrecision(3)} / ${other.distance.toPrecision(3)})`;

/** Weights of a group, more for a whole row than for any other. */
const weightsOf = (groupSize: GroupSize): number => groupSize === 0 ? Infinity : groupSize;

/**
 * Own samples beside real data at each setting, and real data with more bits or smaller groups beside those
 * with less: of many pairs one is always the worst, so that it counts only where its interval lies above 1.
 * Nothing where the others were not measured.
 */
export function defaultGoals(model: string, measured: readonly MeasuredDistance[], unit: string): Goal[] {
  const real = measured.filter((own) => own.name === gridName(BEST_ON.real, own));
  const sources = real.flatMap((own): Goal[] => {
    const other = measured.find(({ name }) => name === gridName(BEST_ON.own, own));
    return other === undefined ? [] : [{
      goal: `${model}, ${gridName("best", own)}: ${unit}, own samples / real data`,
      wanted: `at most ${OWN_SHARE} ×`,
      measured: text(other, own),
      met: other.distance <= OWN_SHARE * own.distance,
    }];
  });
  const pairs = real.flatMap((more) =>
    real.filter((less) =>
      less !== more && more.bits >= less.bits && weightsOf(more.groupSize) <= weightsOf(less.groupSize)
    ).map((less) => ({ more, less, ratio: ratioOf(more, less) }))
  );
  if (pairs.length === 0) return sources;
  const worst = pairs.reduce((a, b) => b.ratio.low > a.ratio.low ? b : a);
  const largest = Math.max(...pairs.map(({ ratio }) => ratio.value));
  return [...sources, {
    goal: `${model}, best: ${unit}, more bits a weight / fewer, worst of ${pairs.length} pairs`,
    wanted: "at most 1 ×, or no difference",
    measured: `${text(worst.more, worst.less)}: ${gridName("best", worst.more)} / ${
      gridName("best", worst.less)
    }; largest ratio ${largest.toFixed(3)}`,
    met: worst.ratio.low <= 1,
  }];
}
