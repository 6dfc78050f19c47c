/** Plans of models larger than this machine, divided: from headers alone. */
import { afterAll, describe, expect, test } from "bun:test";
import { type ConfigInForce, resolveConfig } from "../../lib/config/mod.ts";
import { dividePlan, planQuantization } from "../../lib/pipeline/mod.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { run, workplace } from "../_checkpoints.ts";

const place = workplace();
afterAll(() => place.remove());

/** A checkpoint with Dream's layout whose weights are holes. */
function headersOf(...sizes: string[]): string {
  const folder = place.fresh();
  const args = [folder, "--headers-only", "--vocabulary", "152064", ...sizes];
  const { code, stderr } = run("make_checkpoint.ts", args);
  expect([code, stderr]).toEqual([0, ""]);
  return folder;
}

function divided(folder: string, solver: ConfigInForce["solver"], count: number) {
  using checkpoint = openCheckpoint(folder);
  const { config } = resolveConfig({ overrides: { solver, bit_width: 2 } });
  const plan = planQuantization(checkpoint, config), own = dividePlan(plan, { ...config, solver }, count);
  expect(own.shards.flat().map(({ name }) => name).sort()).toEqual(plan.rows.map(({ name }) => name).sort());
  const mean = own.costs.reduce((sum, cost) => sum + cost, 0) / count;
  return { ...own, slowest: Math.max(...own.costs) / mean };
}

describe("a plan shaped as Dream 7B", () => {
  const folder = headersOf("--layers", "28");
  for (const solver of ["round", "clip", "feedback", "best"] as const) {
    test(`in 8 shards: the slowest within 15 % of the mean (${solver})`, () => {
      expect(divided(folder, solver, 8).slowest).toBeLessThan(1.15);
    });
  }
});

test("a checkpoint of 100 B weights in 512 shards: in less than 10 s, each as large as its largest tensor or near the mean", () => {
  const folder = headersOf("--hidden", "8192", "--layers", "84", "--shards", "64");
  const begun = performance.now(), { costs, shards, slowest } = divided(folder, "best", 512);
  expect(performance.now() - begun).toBeLessThan(10_000);
  const weights = shards.flat().reduce((sum, { shape }) => sum + shape.reduce((a, b) => a * b, 1), 0);
  expect(weights).toBeGreaterThan(100e9);
  expect(shards[costs.indexOf(Math.max(...costs))]!.length).toBe(1); // nothing can be taken from it
  expect(slowest).toBeLessThan(3);
});
