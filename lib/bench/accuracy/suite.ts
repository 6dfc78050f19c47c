/**
 * The accuracy suite: models run at full precision and quantized, on the same prompts and noise. Measured are
 * the puzzles that a language model still solves and the glyphs that an image model still draws recognizably;
 * without tasks, the distance to full precision.
 */
import { nameOfPath } from "../../files/whole.ts";
import { loadStoredModel } from "../../models/mod.ts";
import { layerSection, type LayersOverTime, layersOverTime } from "../layers_over_time.ts";
import { atEverySetting } from "../settings.ts";
import { mergeReports, type Suite, type SuiteReport } from "../suite.ts";
import { planModels } from "./plan.ts";
import { accuracyReport, type AccuracyRow } from "./report.ts";

/** The reference models, or those of `--model`, run at full precision and quantized. */
export const accuracySuite: Suite<AccuracyRow> = {
  name: "accuracy",
  summary: "models run at full precision and quantized: puzzles solved, glyphs drawn",
  defaults: { bits: [8, 4, 3, 2], groupSizes: [64], solvers: ["round", "clip", "best"] },
  run: async (context) => {
    const reports: SuiteReport<AccuracyRow>[] = [];
    // What is wrong with the last model is found out before the first is measured.
    for (const plan of await planModels(context)) {
      const measured = await atEverySetting(
        context,
        plan.path,
        (folder) => plan.yardstick.measure(loadStoredModel(folder, context.kernels)),
      );
      const report = accuracyReport(context, plan, measured), timed: LayersOverTime[] = [];
      for (const folder of context.options.packed ?? []) {
        context.progress(`${nameOfPath(folder)}, layers by time`);
        timed.push(await layersOverTime(context.kernels, plan.path, folder));
      }
      reports.push({ ...report, sections: [...report.sections, ...timed.map(layerSection)], timed });
    }
    return mergeReports(reports);
  },
};
