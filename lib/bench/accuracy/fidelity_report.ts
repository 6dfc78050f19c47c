/** Reports of models without tasks: how near each setting stays to full precision on synthetic inputs. No accuracy is claimed. */
import { loadModel } from "../../models/mod.ts";
import type { SequencePlan, TrajectoryPlan } from "./plan.ts";
import {
  maskedFidelity,
  maskedLogits,
  type Trajectory,
  trajectoryFidelity,
  trajectoryOf,
} from "./fidelity.ts";
import { stratifiedMean } from "../../eval/intervals.ts";
import { atEverySetting, circumstances, nameOf, span } from "../settings.ts";
import type { BenchContext, Skipped, SuiteReport } from "../suite.ts";

function noAccuracy(path: string, kind: string, reason: string): Skipped {
  return {
    what: `${nameOf(path)} (${kind}): accuracy`,
    reason: `${reason}; fidelity to full precision on synthetic inputs instead`,
  };
}

/** Distributions at the masked positions of random tokens, against full precision's. */
export async function measureSequences(
  context: BenchContext,
  { path, kind, config, sequences, reason }: SequencePlan,
): Promise<SuiteReport> {
  const { kernels, options: { seed } } = context;
  let full: Float32Array[] | undefined;
  const rows = await atEverySetting(context, path, (folder) => {
    const loaded = loadModel(folder, kernels);
    if (loaded.kind === "dit") {
      throw new TypeError(`Cannot compare distributions of ${folder}: it draws images`);
    }
    const logits = maskedLogits(loaded.model, sequences);
    full ??= logits;
    return maskedFidelity(config, sequences, full, logits, { seed });
  });
  const { positions } = rows[0]!.result.at(-1)!;
  return {
    sections: [{
      title: `${
        nameOf(path)
      } (${kind}): ${sequences.length} synthetic sequences, ${positions} masks - no accuracy`,
      notes: [
        "Random tokens, not text: KL divergence from full precision at masked positions, in nats, and share of them with",
        "the same most probable token, with 95 % intervals (bootstrap over sequences). They say how far the numbers moved,",
        "not how many answers are right.",
      ],
      columns: [
        { key: "setting", title: "setting" },
        { key: "bitsPerWeight", title: "bits/weight", digits: 3 },
        { key: "error", title: "rel. RMS error", digits: 4 },
        { key: "kl", title: "KL, nats" },
        { key: "agreement", title: "same token" },
        { key: "seconds", title: "s", digits: 1 },
      ],
      rows: rows.map(({ setting, bitsPerWeight, relativeRmsError, result, seconds }) => ({
        setting: setting.name,
        bitsPerWeight,
        error: relativeRmsError,
        kl: setting.bits === undefined ? undefined : span(result.at(-1)!.kl, 4),
        agreement: setting.bits === undefined ? undefined : span(result.at(-1)!.agreement, 3),
        seconds,
      })),
    }],
    rows: rows.map((row) => ({
      ...circumstances(context, path, row),
      kind: "masked language model, synthetic sequences",
      byMaskRatio: row.result,
    })),
    goals: [],
    skipped: [noAccuracy(path, kind, reason)],
    quantized: rows.flatMap(({ quantized }) => quantized ?? []),
  };
}

/** Predictions along full precision's own trajectories, and how far a free-running one drifts from them. */
export async function measureTrajectories(
  context: BenchContext,
  { path, scheduler, images, steps, batch, reason }: TrajectoryPlan,
): Promise<SuiteReport> {
  const { kernels, options: { seed } } = context;
  let full: Trajectory | undefined;
  const rows = await atEverySetting(context, path, (folder) => {
    const loaded = loadModel(folder, kernels);
    if (loaded.kind !== "dit") throw new TypeError(`Cannot draw images with ${folder}: it writes text`);
    const trajectory = trajectoryOf(loaded.model, scheduler, { images, steps, batch, seed }, full);
    full ??= trajectory;
    const fidelity = trajectoryFidelity(full, trajectory, { seed });
    const noiseError = stratifiedMean(fidelity.byTimestep.map(({ perImage }) => perImage), { seed });
    return { ...fidelity, noiseError };
  });
  return {
    sections: [{
      title: `${nameOf(path)} (dit): ${images} trajectories of ${steps} steps, DDIM - no accuracy`,
      notes: [
        "No classifier and no real images lie beside it. Prediction error: mean over steps of ‖ε̂ − ε‖² / ‖ε‖² at the states",
        "of full precision's trajectory; drift: ‖x̂ − x‖² / ‖x‖² at the end of free-running ones from the same noise; 95 %",
        "intervals by a bootstrap over images.",
      ],
      columns: [
        { key: "setting", title: "setting" },
        { key: "bitsPerWeight", title: "bits/weight", digits: 3 },
        { key: "error", title: "rel. RMS error", digits: 4 },
        { key: "noise", title: "prediction error" },
        { key: "drift", title: "drift" },
        { key: "seconds", title: "s", digits: 1 },
      ],
      rows: rows.map(({ setting, bitsPerWeight, relativeRmsError, result, seconds }) => ({
        setting: setting.name,
        bitsPerWeight,
        error: relativeRmsError,
        noise: setting.bits === undefined ? undefined : span(result.noiseError, 4),
        drift: setting.bits === undefined ? undefined : span(result.drift.at(-1)!.relativeDistance, 3),
        seconds,
      })),
    }],
    rows: rows.map((row) => ({
      ...circumstances(context, path, row),
      kind: "image model, synthetic trajectories",
      images,
      noiseError: row.result.noiseError,
      byTimestep: row.result.byTimestep.map(({ perImage: _, ...error }) => error),
      drift: row.result.drift,
    })),
    goals: [],
    skipped: [noAccuracy(path, "dit", reason)],
    quantized: rows.flatMap(({ quantized }) => quantized ?? []),
  };
}
