/** What generate.ts takes, and what writing and drawing have in common: what a run needs, and how it went. */
import { peakResidentBytes } from "../../lib/eval/environment.ts";
import { checkMemory, forecastMemory, forecastTime, memoryText, timeText } from "../../lib/eval/forecast.ts";
import {
  type ActivationPrecision,
  forwardCost,
  type ForwardShape,
  modelRequirements,
} from "../../lib/models/mod.ts";
import type { Kernels } from "../../lib/native/mod.ts";
import type { Checkpoint } from "../../lib/tensor/mod.ts";
import type { TimeParameters } from "../../lib/time/mod.ts";
import type { Arguments, Usage } from "../_command/options.ts";
import { KERNEL_OPTIONS, MODEL_OPTIONS, REPLACE_OPTION } from "../_command/run.ts";
import { printable } from "../_command/text.ts";

export const USAGE = {
  name: "generate.ts",
  operands: "MODEL",
  about:
    "Runs a checkpoint (a folder or a .safetensors file), full precision or packed. Dream, LLaDA, LLaDA-MoE\nand SDAR write, a DiT draws.",
  options: {
    "Writing (generation_config.json has the defaults, as far as it sets them)": "",
    "--prompt TEXT":
      'a puzzle ("47+38=", "S" + 16 cells + ">", eight letters a-p + ">") or any text; masks in it are filled',
    "--chat": "the prompt is a user's message in the checkpoint's chat template",
    "--length N": "tokens to write; default none if the prompt has masks, a puzzle's answer, else 32",
    "--algorithm NAME": `Dream: origin, maskgit_plus, topk_margin or entropy
LLaDA: low_confidence (default) or random`,
    "--algorithm-temperature X": "of the order in which masks are filled; 0 takes the most confident (Dream)",
    "--temperature X": "0 takes the most probable token",
    "--top-p X": "keep only the most probable tokens that have this probability together (Dream, SDAR)",
    "--top-k N": "keep only so many of the most probable tokens (Dream, SDAR)",
    "--block-length N": "finish so many tokens before the next (LLaDA, LLaDA-MoE)",
    "Drawing": "",
    "--class N[,N…]": "classes; default every one, at most ten",
    "--out FILE":
      "PNG to write; default class-N.png; latents of a pipeline with a VAE go to FILE.safetensors",
    "--sampler NAME": "ddim or ddpm; default scheduler_config.json's",
    "--zoom N": "pixels a pixel; default 8 for images under 64 pixels, else 1",
    "Both": "",
    "--guidance X":
      "classifier-free guidance of a DiT, default 1, none; of LLaDA, default generation_config.json's " +
      "cfg_scale or 0, none",
    "--steps N": "default: one a mask; 50 when drawing, or as many as the training had",
    "--seed N": "default 0",
    "--trace": "show the masks being filled, in place on a terminal and a line a step elsewhere; " +
      "put the way from noise to image into the PNG",
    "--no-time-parameters":
      "leave time_parameters.safetensors, which lies beside a quantized model, out of it",
    "--activations NAME":
      "int8: packed layers multiply inputs of 8 bits, each token by its own range (default on a CPU); " +
      "f32: full precision (default on a GPU)",
    "--time-groups N": "refuse time parameters of another number of time groups",
    "Machine, input and output": "",
    ...MODEL_OPTIONS,
    ...KERNEL_OPTIONS,
    ...REPLACE_OPTION,
    "--ignore-memory": "run although memory looks too small",
    "--quiet": "print nothing but the result and errors",
    "--json": "print JSON",
  },
  examples: {
    'MODEL --prompt "47+38="': "a language model writes",
    'MODEL --chat --prompt "Why is the sky blue?" --length 64': "an instruction model answers",
    "MODEL --class 3,7 --seed 1 --out two.png": "an image model draws",
  },
} as const satisfies Usage;

export type Options = Arguments<typeof USAGE>;

export interface Task {
  readonly checkpoint: Checkpoint;
  readonly kernels: Kernels;
  readonly parsed: Options;
  readonly timeParameters: TimeParameters | undefined;
  readonly activations: ActivationPrecision;
  readonly signal: AbortSignal;
  readonly log: (line: string) => void;
  /** Shows that a step is done; a trace does so itself. */
  readonly onStep: (done: number, of: number) => void;
  /** Prints a line with `--json` too, where it goes to the standard error. */
  readonly warn: (line: string) => void;
}

/** Names out of a file, the first of many. */
export const names = (all: readonly string[]): string =>
  all.slice(0, 10).map((name) => printable(name.slice(0, 100))).join(", ") + (all.length > 10 ? ", …" : "");

/** Says what the run needs, from sizes alone. @throws {MemoryError} when that is more than there is */
export function announce(
  { checkpoint, kernels, parsed, activations, log }: Task,
  shape: ForwardShape,
  /** Rows of a typical pass, whose logits are wanted. */
  typicalRows: number,
  passes: number,
) {
  const needs = modelRequirements(checkpoint);
  const packedCols = needs.matrices.flatMap(({ held, cols }) => typeof held === "number" ? [cols] : []);
  const precision = packedCols.length === 0 ? "f32" : activations;
  const rows = needs.model.kind === "dit"
    ? shape.batch * (needs.model.config.sampleSize / needs.model.config.patchSize) ** 2
    : shape.batch * shape.tokens;
  const codeBytes = precision === "int8" ? rows * Math.max(...packedCols) : 0;
  const activationBytes = forwardCost(needs.model, shape).activationBytes + codeBytes;
  const memory = forecastMemory(kernels, needs, { activationBytes, rows });
  if (!parsed.flags["ignore-memory"]) {
    const wayOut =
      "quantize it to fewer bits (scripts/quantize.ts MODEL OUT --bits 4), ask for less at a time, or try anyway " +
      "with --ignore-memory";
    checkMemory(checkpoint.path, memory, wayOut);
  }
  const { multiplyAdds } = forwardCost(needs.model, { ...shape, rows: typicalRows });
  const time = forecastTime(kernels, needs, passes * multiplyAdds, rows, precision);
  if (precision === "int8") {
    log(
      "activations: 8 bits, each token by its own range, where weights are packed (--activations f32: none)",
    );
  }
  log(`needs ${memoryText(memory)}`);
  log(`takes ${timeText(time)}`);
  return { memory, time, precision };
}

/** Forecast, outcome and kernels of a run, for machines. */
export function measured(
  { kernels, timeParameters }: Task,
  { memory, time, precision }: ReturnType<typeof announce>,
) {
  return {
    forecast: { memoryBytes: memory.total, memory, seconds: time.seconds },
    peakMemoryBytes: peakResidentBytes(),
    timeGroups: timeParameters?.groups.count ?? null,
    activations: precision,
    backend: kernels.describe(),
  };
}
