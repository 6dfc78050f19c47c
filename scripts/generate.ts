/** `generate.ts MODEL`: solves a puzzle, continues a text or draws images. */
import { ConfigError } from "../lib/errors.ts";
import {
  ACTIVATION_PRECISIONS,
  keysWithoutMeaning,
  languageFamily,
  type LanguageKind,
  modelConfig,
  storedTimeParameters,
} from "../lib/models/mod.ts";
import { stepProgress } from "../lib/progress.ts";
import { openCheckpoint } from "../lib/tensor/mod.ts";
import { UsageError } from "./_command/options.ts";
import { ProgressDisplay } from "./_command/progress.ts";
import { chosenKernels, type Context, defineCommand } from "./_command/run.ts";
import { openCommandKernels } from "./_command/signals.ts";
import { printable } from "./_command/text.ts";
import { draw } from "./_generate/draw.ts";
import { names, type Options, type Task, USAGE } from "./_generate/task.ts";
import { write } from "./_generate/write.ts";

/** Options that some families of language models have, with the setting of each. */
const OF_FAMILIES = {
  "algorithm": "algorithm",
  "algorithm-temperature": "algorithmTemperature",
  "top-p": "topP",
  "top-k": "topK",
  "block-length": "blockLength",
} as const;
type FamilyOption = keyof typeof OF_FAMILIES;
const OF_SOME = Object.keys(OF_FAMILIES) as FamilyOption[];
const TEXT_ONLY = ["prompt", "length", "temperature", ...OF_SOME] as const;
const IMAGE_ONLY = ["class", "out", "sampler", "zoom"] as const;

/** Options that a family has not. */
function foreignTo(kind: LanguageKind | "dit") {
  if (kind === "dit") return TEXT_ONLY;
  const { settings } = languageFamily(kind);
  const others = OF_SOME.filter((name) => !settings.includes(OF_FAMILIES[name]));
  return [...IMAGE_ONLY, ...others, ...(settings.includes("guidance") ? [] : ["guidance" as const])];
}

async function run(parsed: Options, { signal }: Context): Promise<void> {
  const { positionals, flags, values } = parsed;
  if (positionals.length > 1) {
    throw new UsageError(`one MODEL is needed, got ${positionals.length}; a text is --prompt TEXT`);
  }
  const [path] = parsed.operands("MODEL");
  const display = new ProgressDisplay(flags.quiet || flags.json);
  const chosen = await chosenKernels(values, display.log);
  using checkpoint = openCheckpoint(path, { variant: values.variant, subfolder: values.subfolder });
  for (const note of checkpoint.notes) display.log(`input: ${printable(note)}`);
  const described = modelConfig(checkpoint);
  const misplaced = foreignTo(described.kind).find((name) => values[name] !== undefined) ??
    (flags.chat && described.kind === "dit" ? "chat" : undefined);
  if (misplaced !== undefined) {
    const isDrawn = IMAGE_ONLY.some((name) => name === misplaced);
    const models = described.kind === "dit"
      ? "a model that draws"
      : isDrawn
      ? "a model that writes"
      : languageFamily(described.kind).title;
    throw new UsageError(`--${misplaced} is not for ${models}`);
  }
  using kernels = await openCommandKernels(chosen);
  display.log(`${described.kind}; ${kernels.describe()}, threads ${kernels.threads}`);
  const warn = new ProgressDisplay(flags.quiet).log, unknown = keysWithoutMeaning(checkpoint);
  if (unknown.length > 0) warn(`config.json: not known here, ignored: ${names(unknown)}`);
  const groups = parsed.whole("time-groups", 0);
  const timeParameters = flags["no-time-parameters"]
    ? undefined
    : storedTimeParameters(checkpoint, { groups });
  if (timeParameters !== undefined) {
    const { groups, layers } = timeParameters;
    display.log(`time parameters beside it: ${groups.count} time groups, ${layers.size} layers`);
  }
  // integer products are for CPUs: a GPU has tensor cores for products in full precision
  const activations = parsed.oneOf("activations", ACTIVATION_PRECISIONS) ??
    (kernels.device === undefined ? "int8" : "f32");
  const onStep = (done: number, of: number) => {
    if (done === of) display.clear();
    else if (!flags.trace) {
      display.update(stepProgress(done === 0 ? "opening the model" : "generating", done, of));
    }
  };
  const { log } = display;
  const task: Task = { checkpoint, kernels, parsed, timeParameters, activations, signal, log, onStep, warn };
  try {
    if (described.kind === "dit") await draw(task, described.config);
    else await write(task, described.kind, described.config);
  } catch (error) {
    // A value out of range that the library refuses is one of the command line here.
    if (error instanceof RangeError && !("code" in error)) throw new ConfigError(error.message, [], error);
    throw error;
  }
}

export const main = defineCommand(USAGE, run);
if (import.meta.main) await main();
