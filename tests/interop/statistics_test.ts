/** Models that run in PyTorch alone, solved here from the statistics that scripts/collect_statistics.py writes there. */
import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { dequantizeCheckpoint, quantizeCheckpoint, type RunEvent } from "../../lib/pipeline/mod.ts";
import { workplace } from "../_checkpoints.ts";
import { readersPython, runReader } from "../_readers.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

const SCRIPT = "statistics.py";

/** Quantizes a model, and writes its weights as others read them. @returns names of the solved layers, events */
async function solved(input: string, overrides: Record<string, unknown>) {
  const packed = place.fresh("packed"), plain = place.fresh("plain"), events: RunEvent[] = [];
  const { config } = resolveConfig({ overrides: { num_threads: 1, ...overrides } });
  const { layers } = await quantizeCheckpoint({
    input,
    output: packed,
    kernels,
    config,
    onEvent: (event) => events.push(event),
  });
  await dequantizeCheckpoint({ input: packed, output: plain, kernels, dtype: "F32" });
  return {
    names: layers.filter(({ solved }) => solved !== undefined).map(({ name }) => name),
    events,
    file: join(plain, "diffusion_pytorch_model.safetensors"),
  };
}

describe("families that do not run here", () => {
  test("flux: layers solved from statistics err at most a third as much as rounded ones", async () => {
    const python = readersPython(), folder = place.fresh("flux");
    if (python === undefined) return;
    await runReader(python, SCRIPT, ["draw", "flux", folder]);
    const calibration_data = join(folder, "statistics.safetensors");
    for (const bit_width of [2, 3]) {
      const own = await solved(folder, { bit_width, group_size: 32, solver: "best", calibration_data });
      const rounded = await solved(folder, { bit_width, group_size: 32, solver: "round" });
      expect(own.names.length).toBeGreaterThan(15);
      const args = ["errors", folder, JSON.stringify(own.names), own.file, rounded.file];
      const [best, round] = await runReader(python, SCRIPT, args) as Record<string, number>[];
      for (const name of own.names) {
        const ratio = best![name]! / round![name]!;
        expect(`${name} at ${bit_width} bits: ${ratio <= 1 / 3 ? "at most a third" : ratio}`)
          .toBe(`${name} at ${bit_width} bits: at most a third`);
      }
    }
  }, 120_000);
});
