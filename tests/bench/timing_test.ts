import { describe, expect, test } from "bun:test";
import { rate, speedRatio, timeInterleaved } from "../../lib/bench/timing.ts";

/** A clock that only moves when something says that it took time. */
class FakeClock {
  now = 0;
  /** Everything takes this many times as long. */
  slowness = 1;
  readonly calls: string[] = [];
  readonly read = () => this.now;

  contender(name: string, milliseconds: number, preparation = 0) {
    return {
      run: () => {
        this.calls.push(name);
        this.now += milliseconds * this.slowness;
      },
      ...(preparation > 0 ? { prepare: () => void (this.now += preparation) } : {}),
    };
  }
}

const timing = (clock: FakeClock, samples = 5, sampleMilliseconds = 10) => ({
  samples,
  warmUpMilliseconds: 20,
  sampleMilliseconds,
  clock: clock.read,
});

describe("interleaved timing", () => {
  test("reports what the clock said of one call, in as many calls as a sample takes", () => {
    const clock = new FakeClock();
    const [slow, quick] = timeInterleaved(
      [clock.contender("slow", 4), clock.contender("quick", 0.5)],
      timing(clock),
    );
    expect(slow).toEqual({ milliseconds: [4, 4, 4, 4, 4], callsPerSample: 3 });
    expect(quick).toEqual({ milliseconds: [0.5, 0.5, 0.5, 0.5, 0.5], callsPerSample: 20 });
  });

  test("leaves preparations out", () => {
    const clock = new FakeClock();
    const [prepared] = timeInterleaved([clock.contender("prepared", 2, 1000)], timing(clock));
    expect(prepared!.milliseconds).toEqual([2, 2, 2, 2, 2]);
  });

  test("takes a sample of each in turn", () => {
    const clock = new FakeClock();
    timeInterleaved([clock.contender("a", 10), clock.contender("b", 10)], timing(clock, 3));
    expect(clock.calls.slice(-6)).toEqual(["a", "b", "a", "b", "a", "b"]);
  });

  test("a machine that slows down does not change a ratio of pairs", () => {
    const clock = new FakeClock();
    const [mine, peer] = timeInterleaved([
      {
        run: () => {
          clock.now += 10 * clock.slowness;
        },
      },
      {
        run: () => {
          clock.now += 30 * clock.slowness;
          clock.slowness *= 1.5; // after each pair
        },
      },
    ], timing(clock, 7));
    const { median, minimum, maximum } = speedRatio(mine!, peer!);
    for (const ratio of [median, minimum, maximum]) expect(ratio).toBeCloseTo(3, 9);
    expect(mine!.milliseconds[6]! / mine!.milliseconds[0]!).toBeGreaterThan(10);
  });

  test("does not count what was slower while warming up", () => {
    const clock = new FakeClock();
    let calls = 0;
    const [compiled] = timeInterleaved([
      {
        run: () => {
          clock.now += calls++ < 8 ? 2 : 1; // an optimizing compiler takes over
        },
      },
    ], timing(clock));
    expect(compiled!.milliseconds).toEqual([1, 1, 1, 1, 1]);
  });
});

describe("rates and ratios", () => {
  const timed = (...milliseconds: number[]) => ({ milliseconds, callsPerSample: 1 });

  test("a rate is units by seconds", () => {
    expect(rate(timed(1, 2, 4), 1000).median).toBe(500_000);
  });

  test("a ratio counts the work of each", () => {
    // Twice the work in the same time is twice as fast.
    expect(speedRatio(timed(1, 1), timed(1, 1), 200, 100).median).toBe(2);
    expect(speedRatio(timed(1, 2), timed(4, 8)).median).toBe(4);
  });
});
