/** Whole runs of `best` as `quantize.ts` does them, from reading to writing. */
import { join } from "node:path";
import { resolveConfig } from "../../config/mod.ts";
import { nameOfPath } from "../../files/whole.ts";
import { forwardCost, requirementsAt } from "../../models/mod.ts";
import type { Kernels } from "../../native/mod.ts";
import { quantizeCheckpoint } from "../../pipeline/mod.ts";
import { commandsOf, runChild } from "../child_process.ts";
import { type Goal, type SuiteReport, tableOf } from "../suite.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";
import { FORM, FULL_SCALE, type PartRun } from "./scale.ts";

const HALF_WIDTH_SECONDS = 60;
/** Seconds of the reference models before the solver was made of products. */
const REFERENCE_SECONDS: Readonly<Record<string, number>> = { "dream-mini": 8, "glyph-dit": 20 };

/** A run of `best` as `quantize.ts` does it. */
export interface WholeRun {
  readonly model: string;
  readonly what: string;
  readonly seconds: number;
  readonly goalSeconds: number | undefined;
}

async function quantizeSeconds(
  kernels: Kernels,
  input: string,
  output: string,
  overrides: Readonly<Record<string, unknown>>,
): Promise<number> {
  const { config } = resolveConfig({
    overrides: { bit_width: FORM.bits, solver: "best", num_threads: kernels.threads, ...overrides },
  });
  const begin = performance.now();
  await quantizeCheckpoint({ input, output, config, kernels, force: true });
  return (performance.now() - begin) / 1000;
}

async function measureRuns(
  { context, kernels, scale: { hidden, calibration, models } }: PartRun,
): Promise<WholeRun[]> {
  const runs: WholeRun[] = [], { options, progress } = context;
  await withTemporaryFolder(async (folder) => {
    for (const path of options.models.slice(0, models)) {
      const model = nameOfPath(path);
      progress(`${model}: best`);
      const seconds = await quantizeSeconds(kernels, path, join(folder, "out"), { group_size: 0 });
      runs.push({
        model,
        what: "2 bits, whole rows, its own data",
        seconds,
        goalSeconds: REFERENCE_SECONDS[model],
      });
    }
    if (hidden === undefined) return;
    const input = join(folder, "dream"), sizes = { layout: "dream", layers: 2, hidden };
    progress(`two layers of width ${hidden}: best`);
    const args = Object.entries(sizes).flatMap(([name, value]) => [`--${name}`, `${value}`]);
    await runChild(commandsOf(context)("make_checkpoint.ts", [input, ...args]));
    const seconds = await quantizeSeconds(kernels, input, join(folder, "out"), {
      group_size: FORM.groupSize,
      ...calibration,
    });
    const { multiplyAdds } = forwardCost(requirementsAt(input).model, { batch: 1, tokens: 1, rows: 0 });
    const model = `Dream, 2 layers of width ${hidden}`;
    const what = `2 bits, groups of ${FORM.groupSize}, sequences that it writes, ${
      (multiplyAdds / 1e6).toFixed(0)
    } M weights`;
    runs.push({
      model,
      what,
      seconds,
      goalSeconds: hidden === FULL_SCALE.hidden ? HALF_WIDTH_SECONDS : undefined,
    });
  });
  return runs;
}

/** Runs of the models, and of a two-layer one. */
export async function measureWholeRuns(part: PartRun): Promise<SuiteReport<WholeRun>> {
  const rows = await measureRuns(part);
  const goals = rows.flatMap(({ model, seconds, goalSeconds }): Goal[] =>
    goalSeconds === undefined ? [] : [{
      goal: `best, ${model}`,
      wanted: `≤ ${goalSeconds} s`,
      measured: `${seconds.toFixed(1)} s`,
      met: seconds <= goalSeconds,
    }]
  );
  const skipped = part.scale.hidden === undefined
    ? [{ what: "the two-layer model of half width", reason: "measured without --quick" }]
    : [];
  return { sections: [sectionOf(rows)], rows, goals, skipped };
}

const sectionOf = (runs: readonly WholeRun[]) =>
  tableOf(
    "Whole runs of best, from reading to writing",
    ["A denoising step of 256 positions from packed weights: --suite steps."],
    runs,
    [
      ["model", "model", ({ model }) => model],
      ["what", "what", ({ what }) => what],
      ["seconds", "s", ({ seconds }) => seconds, 1],
    ],
  );
