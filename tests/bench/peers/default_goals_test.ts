/** Goals of the suite `defaults` from distances by hand. */
import { expect, test } from "bun:test";
import { BEST_ON, defaultGoals } from "../../../lib/bench/peers/default_goals.ts";
import { gridName } from "../../../lib/bench/peers/method.ts";
import type { BitWidth, GroupSize } from "../../../lib/quant/mod.ts";

/** @param shares of the samples in the distance: alike by default */
const at = (
  source: keyof typeof BEST_ON,
  bits: BitWidth,
  groupSize: GroupSize,
  distance: number,
  shares: readonly number[] = Array(50).fill(1),
) => ({
  name: gridName(BEST_ON[source], { bits, groupSize }),
  bits,
  groupSize,
  distance,
  samples: shares.map((share) => share * distance),
});

test("own samples are held against real data at the same setting", () => {
  const goals = defaultGoals("m", [
    at("real", 2, 0, 0.1),
    at("own", 2, 0, 0.15),
    at("real", 3, 0, 0.01),
    at("own", 3, 0, 0.016),
    at("own", 4, 0, 9),
  ], "KL, nats");
  expect(goals.map(({ goal, met }) => [goal, met])).toEqual([
    ["m, 2 best, row: KL, nats, own samples / real data", true],
    ["m, 3 best, row: KL, nats, own samples / real data", false],
    ["m, best: KL, nats, more bits a weight / fewer, worst of 1 pairs", true],
  ]);
  expect(goals[1]!.measured).toBe("1.600 1.600–1.600 × (0.0160 / 0.0100)");
});

test("more bits or smaller groups, neither of them less, are never to be worse", () => {
  const real = [
    at("real", 2, 0, 0.5),
    at("real", 2, 64, 0.3),
    at("real", 2, 32, 0.33), // worse than groups of 64
    at("real", 3, 0, 0.4), // against groups of 64 no pair: more bits, larger groups
    at("real", 3, 32, 0.1),
  ];
  const [goal] = defaultGoals("m", real, "KL, nats");
  expect(goal).toMatchObject({
    goal: "m, best: KL, nats, more bits a weight / fewer, worst of 8 pairs",
    measured: "1.100 1.100–1.100 × (0.330 / 0.300): 2 best, g 32 / 2 best, g 64; largest ratio 1.100",
    met: false,
  });
  expect(defaultGoals("m", real.slice(3), "KL, nats")[0]!.met).toBe(true);
  expect(defaultGoals("m", real.slice(0, 1), "KL, nats")).toEqual([]);
});

test("a distance that a few samples make up is no difference", () => {
  const few = (place: number) => Array.from({ length: 50 }, (_, i) => i === place ? 50 : 0.02);
  const [goal] = defaultGoals(
    "m",
    [at("real", 2, 0, 0.3, few(3)), at("real", 2, 32, 0.33, few(8))],
    "KL, nats",
  );
  expect(goal).toMatchObject({ met: true, measured: expect.stringContaining("; largest ratio 1.100") });
  const alike = [at("real", 2, 0, 0.3, few(3)), at("real", 2, 32, 0.33, few(3))];
  expect(defaultGoals("m", alike, "KL, nats")[0]!.met).toBe(false); // 1.1 × at every sample
});
