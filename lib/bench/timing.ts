/** Timing of functions side by side: warmed up, interleaved, sampled. Results are checked elsewhere. */
import { pairedRatio, summarize, type Summary } from "../eval/statistics.ts";

/** Milliseconds since any fixed moment. */
type Clock = () => number;

export interface Contender {
  /** Called, and timed. */
  run(): void;
  /** Called before every `run` and never timed: fresh input, for instance. */
  readonly prepare?: (() => void) | undefined;
  /** Least time of warm-up in place of that in the options: optimizing compilers take a while to start. */
  readonly warmUpMilliseconds?: number | undefined;
}

export interface TimingOptions {
  readonly samples: number;
  /** Least time of warm-up for each contender. */
  readonly warmUpMilliseconds: number;
  /** Least length of a sample; as many calls as this takes make one. */
  readonly sampleMilliseconds: number;
  readonly clock?: Clock | undefined;
}

/** Milliseconds of one call, a value a sample. Samples of the same number were taken in turn. */
export interface Timing {
  readonly milliseconds: readonly number[];
  readonly callsPerSample: number;
}

/** Seconds of one call. */
export function secondsOf(run: () => void): number {
  const begin = performance.now();
  run();
  return (performance.now() - begin) / 1000;
}

/** Longest warm-up of one contender, as a multiple of the shortest, when its pace does not settle. */
const WARM_UP_LIMIT = 3;
/** A pace has settled when the last tenth of a warm-up is no faster than this share of the best before. */
const SETTLED = 0.97;

/** Time of `calls` calls, preparations left out. */
function timeCalls(contender: Contender, calls: number, clock: Clock): number {
  if (contender.prepare === undefined) {
    const begin = clock();
    for (let i = 0; i < calls; i++) contender.run();
    return clock() - begin;
  }
  let total = 0;
  for (let i = 0; i < calls; i++) {
    contender.prepare();
    const begin = clock();
    contender.run();
    total += clock() - begin;
  }
  return total;
}

/** Runs until the least time is over and the pace has settled. @returns milliseconds of a call then */
function warmUp(contender: Contender, leastMilliseconds: number, clock: Clock): number {
  const begin = clock();
  let best = Infinity;
  for (;;) {
    let calls = 0, time = 0;
    const chunkBegin = clock();
    do {
      time += timeCalls(contender, 1, clock);
      calls++;
    } while (clock() - chunkBegin < leastMilliseconds / 10);
    const pace = time / calls, elapsed = clock() - begin;
    const isSettled = pace >= best * SETTLED;
    best = Math.min(best, pace);
    if (elapsed >= leastMilliseconds && (isSettled || elapsed >= leastMilliseconds * WARM_UP_LIMIT)) {
      return pace;
    }
  }
}

/**
 * Times the contenders in turn, sample by sample, so that a machine that slows down slows all of them.
 *
 * @returns a timing for each contender, in their order
 */
export function timeInterleaved(contenders: readonly Contender[], options: TimingOptions): Timing[] {
  const { samples, warmUpMilliseconds, sampleMilliseconds, clock = () => performance.now() } = options;
  const calls = contenders.map((contender) => {
    const pace = warmUp(contender, contender.warmUpMilliseconds ?? warmUpMilliseconds, clock);
    return Math.max(1, Math.ceil(sampleMilliseconds / Math.max(pace, 1e-6)));
  });
  const times: number[][] = contenders.map(() => []);
  for (let sample = 0; sample < samples; sample++) {
    contenders.forEach((contender, i) => times[i]!.push(timeCalls(contender, calls[i]!, clock) / calls[i]!));
  }
  return times.map((milliseconds, i) => ({ milliseconds, callsPerSample: calls[i]! }));
}

/** `units` a second, summarized over the samples: 2 means twice the units in the same time. */
export function rate(timing: Timing, units: number): Summary {
  return summarize(timing.milliseconds.map((milliseconds) => units / milliseconds * 1e3));
}

/** How many times as fast `timing` is as `other`, from pairs of samples; units default to the same work. */
export function speedRatio(timing: Timing, other: Timing, units = 1, otherUnits = 1): Summary {
  return pairedRatio(
    other.milliseconds.map((milliseconds) => milliseconds / otherUnits),
    timing.milliseconds.map((milliseconds) => milliseconds / units),
  );
}
