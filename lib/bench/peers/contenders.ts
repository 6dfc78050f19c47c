/** Who takes part: one more entry here is one more row of the peers' suite. */
import type { Kernels } from "../../native/mod.ts";
import type { BitWidth, GroupSize } from "../../quant/mod.ts";
import type { Solver } from "../../quant/solvers/solve_layer.ts";
import type { Ggml } from "../ggml.ts";
import { type Contender, methodContender, pipelineContender } from "./contender.ts";
import { blockOf, GGML_FORMATS, type GgmlFormat, ggmlMethod, SUPERBLOCK } from "./ggml_method.ts";
import { gptq } from "./gptq.ts";
import { gridName } from "./method.ts";
import { hqq } from "./hqq.ts";
import { ours } from "./ours.ts";
import type { Layer } from "./quantized_model.ts";
import type { Skipped } from "../suite.ts";

export interface ContenderOptions {
  readonly bits: readonly BitWidth[];
  readonly groupSizes: readonly GroupSize[];
  readonly solvers: readonly Solver[];
  /** Fewer samples and one candidate: for a look, not for a report. */
  readonly quick?: boolean | undefined;
}

/** What a quick look changes of a calibrated solver. */
const QUICK = { calibration_samples: 32, "solver_options.candidates": 1, "solver_options.rounds": 1 };

/** Settings of a solver that make a step of the ladder, in the pipeline's keys. */
const WITHOUT_CORRECTION = {
  "solver_options.correction": 0,
  "solver_options.residual_correction": 0,
  "solver_options.candidates": 1,
};

/**
 * Every step of our own solver ladder, each with one thing more than the one before: what docs/solvers.md reports.
 */
export function ladderContenders({ bits, groupSizes }: ContenderOptions): Contender[] {
  return bits.flatMap((width) =>
    groupSizes.flatMap((groupSize) => {
      const setting = { bits: width, groupSize };
      const step = (name: string, overrides: Readonly<Record<string, unknown>>) =>
        pipelineContender(name, setting, overrides);
      return [
        step("round", { solver: "round" }),
        step("clip", { solver: "clip" }),
        step("feedback, inputs of full precision", { solver: "feedback", calibration_mode: "once" }),
        step("feedback, block by block", { solver: "feedback" }),
        step("+ other ranges", { solver: "best", ...WITHOUT_CORRECTION, "solver_options.rounds": 0 }),
        step("+ descent over codes", {
          solver: "best",
          ...WITHOUT_CORRECTION,
          "solver_options.refit": false,
        }),
        step("+ refit of scales", { solver: "best", ...WITHOUT_CORRECTION }),
        step("+ correction of inputs", {
          solver: "best",
          "solver_options.residual_correction": 0,
          "solver_options.candidates": 1,
        }),
        step("+ correction of the stream", { solver: "best", "solver_options.candidates": 1 }),
        step("best: + choice held out", { solver: "best" }),
      ];
    })
  );
}

/**
 * Low-rank corrections and rotations beside the same bits spent otherwise: on smaller groups, and on one bit more. One candidate each,
 * so that nothing but the named thing differs; `seed` is the calibration's.
 */
export function correctionContenders(
  { bits, groupSizes, seed }: ContenderOptions & { readonly seed: number },
): Contender[] {
  const contender = (width: BitWidth, groupSize: GroupSize, rank: number, rotation: "none" | "hadamard") =>
    pipelineContender(
      `best${rank > 0 ? ` + rank ${rank}` : ""}${rotation === "none" ? "" : " + rotation"}`,
      { bits: width, groupSize },
      {
        solver: "best",
        calibration_seed: seed % 2 ** 31,
        "solver_options.candidates": 1,
        "solver_options.low_rank": rank,
        "solver_options.rotation": rotation,
      },
    );
  const groups = [...groupSizes], whole = groups[0] ?? 0;
  return bits.flatMap((width) => {
    const wider: BitWidth | undefined = width === 2 ? 3 : width === 3 ? 4 : undefined;
    return [
      ...groups.flatMap((size) =>
        (["none", "hadamard"] as const).map((rotation) => contender(width, size, 0, rotation))
      ),
      contender(width, whole, 4, "none"),
      contender(width, whole, 4, "hadamard"),
      contender(width, whole, 8, "none"),
      ...(wider === undefined ? [] : groups.slice(0, 2).map((size) => contender(wider, size, 0, "none"))),
    ];
  });
}

/**
 * Our solvers and the re-implementations of others' at every setting. GPTQ as its reference code runs it, block by block, and
 * with the inputs of the full-precision model for all layers (`at once`).
 */
export function gridContenders(
  kernels: Kernels,
  { bits, groupSizes, solvers, quick = false }: ContenderOptions,
): Contender[] {
  return bits.flatMap((width) =>
    groupSizes.flatMap((groupSize) => {
      const setting = { bits: width, groupSize };
      return [
        ...solvers.map((solver) =>
          solver === "feedback" || solver === "best"
            ? pipelineContender(solver, setting, { solver, ...(quick ? QUICK : {}) })
            : methodContender(ours(kernels, solver, setting))
        ),
        methodContender(hqq(setting)),
        methodContender(gptq(kernels, setting), { blockwise: true }),
        methodContender(gptq(kernels, setting), { name: gridName("GPTQ at once", setting) }),
      ];
    })
  );
}

/**
 * ggml's formats with and without importance weights. Where a row of some layer is no whole number of super-blocks, the formats of
 * super-blocks are left out with that reason, and come laid across rows instead, which their names say (`flat`).
 */
export function ggmlContenders(
  ggml: Ggml,
  layers: readonly Layer[],
): { readonly contenders: Contender[]; readonly skipped: Skipped[] } {
  const odd = [...new Set(layers.map(({ cols }) => cols).filter((cols) => cols % SUPERBLOCK !== 0))];
  const formats = Object.keys(GGML_FORMATS) as GgmlFormat[];
  const skipped: Skipped[] = [];
  const contenders = formats.flatMap((format) => {
    const acrossRows = layers.some(({ cols }) => cols % blockOf(format) !== 0);
    const taken = GGML_FORMATS[format];
    return [
      ...(taken === "required" ? [] : [false]),
      ...(taken === "ignored" ? [] : [true]),
    ].map((importance) => methodContender(ggmlMethod(ggml, format, { importance, acrossRows })));
  });
  if (odd.length > 0) {
    skipped.push({
      what: `ggml's formats of ${SUPERBLOCK} weights as a GGUF file stores them`,
      reason: `columns must be a multiple of ${SUPERBLOCK}, got ${
        odd.join(", ")
      }; measured laid across rows (flat)`,
    });
  }
  for (const format of formats) {
    if (GGML_FORMATS[format] === "required") {
      skipped.push({
        what: `ggml's ${format.toUpperCase()} without importance weights`,
        reason: "the library requires them for this format",
      });
    }
  }
  return { contenders, skipped };
}
