/** The steps suite at small sizes, and llama.cpp's library as its peer. */
import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { formatReport } from "../../lib/bench/report.ts";
import { fitsBlocks, LLAMA_TYPES, openLlama } from "../../lib/bench/steps/llama.ts";
import { stepsSuiteOf } from "../../lib/bench/steps/suite.ts";
import type { BenchContext, SuiteReport } from "../../lib/bench/suite.ts";
import { withTemporaryFolder } from "../../lib/bench/temporary_folder.ts";
import { environmentOf } from "../../lib/eval/environment.ts";
import { loadDream } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { parseBenchArguments } from "../../scripts/bench.ts";
import { commandOf } from "../../scripts/_command/programs.ts";
import { MODELS } from "../_checkpoints.ts";

const MODEL = join(MODELS, "dream-mini");
const kernels = await openKernels({ threads: 1 });
afterAll(() => kernels.close());

const context: BenchContext = {
  kernels,
  environment: environmentOf(kernels),
  options: parseBenchArguments(["--suite", "steps", "--quick", "--threads", "1", "--model", MODEL]).options,
  commandOf,
  progress: () => {},
};

describe("the steps suite", () => {
  test("runs our steps beside each other and says why llama.cpp's are not there", async () => {
    const scale = { layers: { dream: 1, dit: 1 }, hidden: { dream: 64, dit: 64 }, samples: 2 };
    const report: SuiteReport = await stepsSuiteOf(scale).run(context);
    const steps = report.rows.filter((row) => "seconds" in row);
    expect(steps.map(({ model, bits, activations }) => `${model} ${bits} ${activations}`)).toEqual([
      "dream 4 int8",
      "dream 4 f32",
      "dream 2 int8",
      "dream 2 f32",
      "dit 4 int8",
      "dit 4 f32",
      "dit 2 int8",
      "dit 2 f32",
    ]);
    const distances = report.rows.filter((row) => "int8" in row) as unknown as {
      f32: number;
      int8: number;
    }[];
    for (const { f32, int8 } of distances) expect(f32 > 0 && int8 !== f32).toBe(true);
    expect(report.goals.map(({ met }) => met)).toEqual([null, null, true, true]);
    for (const line of formatReport(report)) expect([line, line.length <= 120]).toEqual([line, true]);
  });

  test("llama.cpp runs a model of random weights, and each run gives the same logits", async () => {
    await withTemporaryFolder(async (place) => {
      const llama = await openLlama(place);
      if ("reason" in llama) return console.log(`skipped: ${llama.reason}`);
      const config = {
        ...loadDream(MODEL, kernels).config,
        vocabularySize: 32,
        hiddenSize: 256,
        intermediateSize: 512,
        blocks: 2,
        heads: 4,
        keyValueHeads: 2,
        headSize: 64,
      };
      expect(fitsBlocks(config)).toBe(true);
      for (const type of Object.values(LLAMA_TYPES)) {
        const step = llama.randomStep(join(place, `${type}.gguf`), config, type, 8, 1);
        const first = step.logits.slice();
        expect(new Set(first).size).toBeGreaterThan(4);
        step.run();
        expect(step.logits).toEqual(first);
        step.close();
      }
      llama.close();
    });
  });
});
