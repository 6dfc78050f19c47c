/** Contenders of the peers' suite: one more entry here is one more row. */
import { type Solver, TRELLIS_BITS } from "../../config/names.ts";
import type { Kernels } from "../../native/mod.ts";
import type { BitWidth, GroupSize } from "../../quant/mod.ts";
import type { Ggml } from "../ggml.ts";
import type { Skipped } from "../suite.ts";
import { BEST_ON } from "./default_goals.ts";
import { type Contender, methodContender, pipelineContender } from "./contender.ts";
import { blockOf, GGML_FORMATS, type GgmlFormat, ggmlMethod, SUPERBLOCK } from "./ggml_method.ts";
import { gptq } from "./gptq.ts";
import { hqq } from "./hqq.ts";
import { gridName, type GridSetting } from "./method.ts";

interface ContenderOptions {
  readonly bits: readonly BitWidth[];
  readonly groupSizes: readonly GroupSize[];
  readonly solvers: readonly Solver[];
  /** One candidate and one round: for a look, not for a report. */
  readonly quick?: boolean | undefined;
}

/** Contenders of `each` at every width and group size. */
const atEverySetting = (
  { bits, groupSizes }: ContenderOptions,
  each: (setting: GridSetting) => Contender[],
): Contender[] =>
  bits.flatMap((width) => groupSizes.flatMap((groupSize) => each({ bits: width, groupSize })));

/** Parts of `best` that make a step of the ladder, as keys of the configuration. */
const ONE_CANDIDATE = { solver: "best", "solver_options.candidates": 1 };
const WITHOUT_STREAM = { ...ONE_CANDIDATE, "solver_options.residual_correction": 0 };
const WITHOUT_CORRECTION = { ...WITHOUT_STREAM, "solver_options.correction": 0 };

/** Steps of the solver ladder, each with one thing more than the last, as docs/solvers.md reports them. */
const LADDER: readonly (readonly [name: string, overrides: Readonly<Record<string, unknown>>])[] = [
  ["round", { solver: "round" }],
  ["clip", { solver: "clip" }],
  ["feedback, inputs of full precision", { solver: "feedback", calibration_mode: "once" }],
  ["feedback, block by block", { solver: "feedback" }],
  ["+ other ranges", { ...WITHOUT_CORRECTION, "solver_options.rounds": 0 }],
  ["+ descent over codes", { ...WITHOUT_CORRECTION, "solver_options.refit": false }],
  ["+ refit of scales", WITHOUT_CORRECTION],
  ["+ correction of inputs", WITHOUT_STREAM],
  ["+ correction of the stream", ONE_CANDIDATE],
  ["best: + choice held out", { solver: "best" }],
  ["best, trellis codes", { solver: "best", codes: "trellis" }],
];

/** Whether a configuration exists for so many bits. */
const existsAt = (bits: BitWidth, { codes }: Readonly<Record<string, unknown>>) =>
  codes !== "trellis" || TRELLIS_BITS.includes(bits);

export const ladderContenders = (options: ContenderOptions): Contender[] =>
  atEverySetting(
    options,
    (setting) =>
      LADDER.filter(([, overrides]) => existsAt(setting.bits, overrides))
        .map(([name, overrides]) => pipelineContender(name, setting, overrides)),
  );

/** What `solver: auto` chooses between, and the sources of calibration data, as keys of the configuration. */
const DEFAULTS: readonly (readonly [name: string, overrides: Readonly<Record<string, unknown>>])[] = [
  ["round", { solver: "round" }],
  ["clip", { solver: "clip" }],
  [BEST_ON.real, { solver: "best" }],
  [BEST_ON.own, { solver: "best", calibration_data: "self" }],
  [BEST_ON.synthetic, { solver: "best", calibration_data: "synthetic" }],
];

export const defaultContenders = (options: ContenderOptions): Contender[] =>
  atEverySetting(
    options,
    (setting) =>
      DEFAULTS.filter(([, { solver }]) => options.solvers.includes(solver as Solver))
        .map(([name, overrides]) => pipelineContender(name, setting, overrides)),
  );

/**
 * Our solvers and re-implementations of others at every setting. GPTQ as its reference code runs it, block by
 * block, and on the inputs of the full-precision model for all layers (`at once`). All have the same bits in
 * every matrix, without the rules that give some of ours more, and are calibrated on the same data with the
 * same weights of positions; where those differ, `best` and GPTQ come a second time with all positions alike,
 * as GPTQ was published.
 */
export function gridContenders(
  kernels: Kernels,
  options: ContenderOptions & { readonly hasPositionWeights: boolean },
): Contender[] {
  const quick = options.quick ? { "solver_options.candidates": 1, "solver_options.rounds": 1 } : {};
  const { solvers, hasPositionWeights } = options;
  return atEverySetting(options, (setting) => {
    const plain = gptq(kernels, setting);
    const ours = (solver: Solver) => ({ solver, layer_bit_widths: { ".": setting.bits }, ...quick });
    return [
      ...solvers.map((solver) => pipelineContender(solver, setting, ours(solver))),
      ...(hasPositionWeights && solvers.includes("best")
        ? [pipelineContender("best, positions alike", setting, ours("best"), "alike")]
        : []),
      ...(solvers.includes("best") && TRELLIS_BITS.includes(setting.bits)
        ? [pipelineContender("best, trellis codes", setting, { ...ours("best"), codes: "trellis" })]
        : []),
      methodContender(hqq(setting)),
      methodContender(plain, { blockwise: true }),
      methodContender(plain, { name: gridName("GPTQ at once", setting) }),
      ...(hasPositionWeights
        ? [methodContender(plain, {
          name: gridName("GPTQ, positions alike", setting),
          blockwise: true,
          positions: "alike",
        })]
        : []),
    ];
  });
}

/**
 * Formats of ggml with and without importance weights. Where a row of some layer is no whole number of
 * super-blocks, the formats of super-blocks are left out with that reason, and come laid across rows instead,
 * which their names say (`flat`).
 */
export function ggmlContenders(
  ggml: Ggml,
  widths: readonly number[],
): { readonly contenders: Contender[]; readonly skipped: Skipped[] } {
  const odd = [...new Set(widths.filter((cols) => cols % SUPERBLOCK !== 0))];
  const formats = Object.keys(GGML_FORMATS) as GgmlFormat[];
  const contenders = formats.flatMap((format) => {
    const acrossRows = widths.some((cols) => cols % blockOf(format) !== 0);
    const taken = GGML_FORMATS[format];
    return [...(taken === "required" ? [] : [false]), ...(taken === "ignored" ? [] : [true])]
      .map((importance) => methodContender(ggmlMethod(ggml, format, { importance, acrossRows })));
  });
  const required = formats.filter((format) => GGML_FORMATS[format] === "required");
  const skipped = [
    ...(odd.length === 0 ? [] : [{
      what: `ggml's formats of ${SUPERBLOCK} weights as a GGUF file stores them`,
      reason: `columns must be a multiple of ${SUPERBLOCK}, got ${
        odd.join(", ")
      }; measured laid across rows (flat)`,
    }]),
    ...required.map((format) => ({
      what: `ggml's ${format.toUpperCase()} without importance weights`,
      reason: "the library requires them for this format",
    })),
  ];
  return { contenders, skipped };
}
