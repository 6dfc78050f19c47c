/** `quantize.ts MODEL OUT`: a checkpoint in, a quantized checkpoint out. */
import { basename, resolve } from "node:path";
import type { QuantizeResult } from "../lib/analysis/make_run.ts";
import { calibrationBeside } from "../lib/calibration/source.ts";
import { CalibrationError } from "../lib/errors.ts";
import {
  type Config,
  type ConfigOverrides,
  formatConfig,
  hasBudget,
  LATER_KEYS,
  loadConfig,
  TARGETS,
} from "../lib/config/mod.ts";
import type { LoraSource } from "../lib/lora/mod.ts";
import { nameOfPath } from "../lib/files/whole.ts";
import { checkMemory, forecastMemory } from "../lib/eval/forecast.ts";
import { forwardCost, modelRequirements } from "../lib/models/mod.ts";
import { type ExportReport, quantizeFor } from "../lib/interop/mod.ts";
import { environmentOf } from "../lib/eval/environment.ts";
import type { Kernels } from "../lib/native/mod.ts";
import {
  KEEP_RULES,
  outputErrors,
  quantizeCheckpoint,
  type QuantizeCheckpointOptions,
  type RunReport,
  saveCalibrationOf,
} from "../lib/pipeline/mod.ts";
import { relativeRmsError } from "../lib/quant/mod.ts";
import { openCheckpoint } from "../lib/tensor/mod.ts";
import { type Arguments, environmentVariables, type Usage, UsageError } from "./_command/options.ts";
import { ProgressDisplay } from "./_command/progress.ts";
import {
  type Context,
  defineCommand,
  KERNEL_OPTIONS,
  limitsText,
  MODEL_OPTIONS,
  OUTPUT_OPTIONS,
  outputMode,
  prepareReport,
} from "./_command/run.ts";
import { chosenShard } from "./_command/shard.ts";
import { openCommandKernels } from "./_command/signals.ts";
import { formatBytes, formatCells } from "../lib/eval/table.ts";
import { peakResidentBytes } from "../lib/eval/environment.ts";
import { formatCount, print, printable, printJson } from "./_command/text.ts";
import { printExport, summaryOf } from "./export.ts";

const USAGE = {
  name: "quantize.ts",
  operands: "MODEL [OUT]",
  about:
    "Quantizes a checkpoint (a folder or a .safetensors file) into the folder OUT. Without OUT it only saves\n" +
    "calibration statistics (--save-calibration).",
  options: {
    "Bits and scales": "",
    "--bits N": "2, 3, 4 or 8 (configuration: bit_width)",
    "--group-size N": "0 (whole row), 16, 32, 64, 128 or 256",
    "--scale-bits N":
      "16 (default), or 4 or 6 for two-level scales; with --codes trellis 3: one of eight scales, no offsets; " +
      "0: one scale a tensor, rotated, where rows are short",
    "--codes NAME": "uniform (default), or trellis: less error at 2 and 3 bits, with solver best",
    "--zero-point KIND": "real (default), integer, symmetric or offset",
    "--embedding-bits N": "2, 3, 4, 8 or 16 (kept); default 4, at 4 and 8 bits 8; small tables are kept",
    "--head-bits N": "the same for the layer that scores tokens; default 8",
    "--target-bits X": "bits per weight over all quantized layers, chosen by layer",
    "--for PROGRAM": `${
      Object.keys(TARGETS).join(", ")
    }: OUT becomes its file or folder, weights held exactly`,
    "--type TYPE …":
      "type of that program's files, as Q4_0; NAME=TYPE for the tensors that a pattern of names fits",
    "--allow-rounding": "with --for: store what its files cannot hold exactly as near as they can",
    "--plan FILE": "bits and group sizes by layer, as a run with --target-bits saves them",
    "Solver and calibration": "",
    "--solver NAME":
      "auto (default), round, clip, and on calibration data feedback or best; auto rounds 8 bits, " +
      "and takes best for fewer where the model can run here",
    "--effort NAME": "work of the solver best: low, medium (default) or high",
    "--calibrate FILE":
      'calibration data: JSONL or safetensors; "self": what MODEL makes with its own sampler; or "synthetic"; default: ' +
      'what lies beside MODEL, "self" where nothing does. FILE may also be statistics (of --save-calibration or of ' +
      "collect_statistics.py) or an importance matrix of llama.cpp, several with commas between them: layers are " +
      "then solved on them without running the model, with nothing held out to choose by",
    "--save-calibration FILE": "save statistics of what the layers of MODEL read (.safetensors); a stopped " +
      "run goes on from FILE.progress; with --shard of a part of the samples, for merge.ts",
    "--save-group-moments": "with --save-calibration: also the second moments of each time group",
    "--samples N": "calibration samples, 32 to 1024",
    "Phases along the denoising axis": "",
    "--phases LIST":
      "phases to run: 1 (validation), 2 (smoothing), 3 (optimization), as in 1,3; or all, or none",
    "--time-groups N": "time groups of the phases (configuration: num_time_groups)",
    "Configuration, input and machine": "",
    "--config FILE": "YAML; see docs/configuration.md",
    "--print-config": "print the configuration in force, with where each value came from",
    ...MODEL_OPTIONS,
    "--lora FILE[:SCALE] …":
      "LoRA of PEFT, diffusers or kohya that is merged into the weights first, in float32",
    ...KERNEL_OPTIONS,
    "--max-memory SIZE":
      "memory that calibrated work may take, as in 12GB: weights are held and states kept in it as far as " +
      "it goes; refused before it begins where it is too little; default three quarters of what is available",
    "Output": "",
    "--shard I/N":
      "do part I of N, into OUT/shard-I-of-N; merge.ts brings all parts together; default: what the array task's " +
      "environment says (Slurm, Kubernetes, Grid Engine), which is printed; none: the whole",
    "--together MINUTES":
      "with --shard and calibration_mode: blocks: all parts run at the same time, each on its part of the samples, and " +
      "exchange sums and solved layers through OUT; the longest time that a part waits for another one",
    "--dry-run": "show what would be done, and by which rules; write nothing",
    ...OUTPUT_OPTIONS,
    "--report DIR":
      "also write report.html there, with charts and tables of the run; a name that ends with " +
      ".html is the page alone",
    "--quiet": "print nothing but errors",
    "--json": "print the report as JSON",
    "--log FORMAT":
      "text (default) or json: what happens on stderr as one JSON object a line, with time and event: " +
      "log, calibrate, phase, warning and the like with a message and its numbers as data; progress at most every ten " +
      "seconds; layer with name, bits and error; result",
  },
  examples: {
    "MODEL OUT --bits 4": "four bits, solved on calibration data where there are any",
    "MODEL OUT --bits 4 --solver round": "rounded, in minutes",
    "MODEL OUT --bits 2 --group-size 32 --dry-run": "the plan and the size; nothing is written",
    "MODEL OUT --bits 2 --solver best --calibrate data.jsonl": "two bits, solved on calibration data",
    "MODEL out.gguf --bits 2 --for llama.cpp": "a file that llama.cpp opens",
    "MODEL OUT --bits 2 --resume": "go on with a run that was stopped",
    "MODEL PARTS --bits 4 --solver clip --shard 2/8":
      "one of eight tasks; then merge.ts PARTS OUT --model MODEL",
  },
  notes: "Later wins: default < deployment profile < --config < environment ARROW_QUANT_* < options.",
} as const satisfies Usage;

type Options = Arguments<typeof USAGE>;

/** Options that set a configuration key. */
const KEYS = {
  bits: "bit_width",
  "group-size": "group_size",
  "scale-bits": "scale_bits",
  codes: "codes",
  solver: "solver",
  calibrate: "calibration_data",
  samples: "calibration_samples",
  "target-bits": "target_bits_per_weight",
  plan: "bit_plan",
  "embedding-bits": "embedding_bits",
  "head-bits": "head_bits",
  "zero-point": "zero_point",
  threads: "num_threads",
  backend: "backend",
  for: "target",
  "time-groups": "num_time_groups",
  effort: "solver_options.effort",
} as const;

/** Keys that `--phases` sets: those of phases 1, 2 and 3. */
const PHASE_KEYS = [
  "thermodynamic.validation.enabled",
  "thermodynamic.boundary_smoothing.enabled",
  "thermodynamic.transition_optimization.enabled",
];

const WORST_LAYERS = 5;
/** Tokens of a pass that a report runs, for its memory. */
const FORECAST_TOKENS = 1024;

async function run(parsed: Options, { signal, command }: Context): Promise<void> {
  const { flags, values } = parsed;
  const display = new ProgressDisplay(flags.quiet, parsed.oneOf("log", ["text", "json"]));
  const environment = environmentVariables(display.log);
  const resolved = await loadConfig({ path: values.config, environment, ...overridesOf(parsed) });
  if (flags["print-config"]) return print(formatConfig(resolved).trimEnd());
  const { config, origins } = resolved, shard = chosenShard(values.shard, environment, display.log);
  if (parsed.positionals.length === 1 && values["save-calibration"] !== undefined) {
    return await saveStatistics(parsed, { config, shard, signal }, display);
  }
  const task = { ...checkedTask(parsed), config, shard };
  if (shard !== undefined) checkShard(parsed);
  else if (values.together !== undefined) {
    throw new UsageError("--together is for parts of a run: give --shard I/N");
  }
  warnOfLaterKeys(origins, display.log);
  if (values.report !== undefined) {
    if (shard !== undefined) throw new UsageError("--report needs the whole model: leave it out of a shard");
    if (config.target !== null) {
      throw new UsageError("--report reads a checkpoint of this tool: leave --for out");
    }
    prepareReport(values.report);
  }
  const started = performance.now(), secondsSoFar = () => (performance.now() - started) / 1000;
  let report: RunReport, exported: ExportReport | undefined, seconds: number;
  const quantize = config.target === null
    ? async (options: QuantizeCheckpointOptions) => ({
      quantized: await quantizeCheckpoint(options),
      exported: undefined,
    })
    : (options: QuantizeCheckpointOptions) =>
      quantizeFor({ ...options, allowRounding: flags["allow-rounding"] });
  const { backend, numThreads: threads } = config;
  if (flags["dry-run"]) {
    using kernels = hasBudget(config) ? await openCommandKernels({ backend, threads }) : undefined;
    ({ quantized: report } = await quantize({ ...task, kernels, dryRun: true, onEvent: display.event }));
    seconds = secondsSoFar();
  } else {
    using kernels = await openCommandKernels({ backend, threads, onMessage: display.log });
    display.log(kernels.describe());
    display.log(limitsText(kernels.threads));
    try {
      const { update: onProgress, event: onEvent } = display;
      ({ quantized: report, exported } = await quantize({ ...task, kernels, signal, onProgress, onEvent }));
    } finally {
      display.clear();
    }
    seconds = secondsSoFar();
    if (values.report !== undefined) {
      const result = { command, report, resolved, seconds, kernels };
      const page = await writeRunReport(values.report, result, display.log);
      display.log(`report: ${printable(page)}`);
    }
  }
  const { output, totals } = report;
  display.result(
    `${totals.tensors} tensors quantized, all weights at ${totals.bitsPerWeightOfAll.toFixed(3)} bits`,
    {
      output,
      ...totals,
      seconds,
      peakMemoryBytes: peakResidentBytes(),
    },
  );
  if (flags.json) {
    const weightsPerSecond = report.totals.weights / seconds;
    const file = exported === undefined ? {} : { exported: summaryOf(exported) };
    printJson({ ...report, ...file, seconds, weightsPerSecond, peakMemoryBytes: peakResidentBytes() });
  } else if (!flags.quiet) {
    if (report.dryRun) printPlan(report);
    printSummary(report, seconds);
    if (exported !== undefined) {
      print("");
      printExport(exported, seconds);
    }
  }
}

/** Warns of keys that this version reads and does not use. */
function warnOfLaterKeys(origins: Readonly<Record<string, string>>, log: (line: string) => void): void {
  for (const key of LATER_KEYS) {
    if (origins[key] !== "default" && !origins[key]?.startsWith("deployment_profile")) {
      log(`warning: ${key} (${printable(origins[key] ?? "")}) has no effect in this version`);
    }
  }
}

/** Configuration keys that options set, with the options' names. @throws {ConfigError} on bad phases */
function overridesOf(
  { values, lists }: Options,
): Required<Pick<ConfigOverrides, "overrides" | "overrideSources">> {
  const own = Object.entries(KEYS).map(([option, key]) =>
    [key, values[option as keyof typeof KEYS], `--${option}`] as const
  );
  const named = lists.type.filter((text) => text.includes("=")).map((text) => {
    const at = text.lastIndexOf("=");
    return [text.slice(0, at), text.slice(at + 1)] as const;
  });
  const plain = lists.type.filter((text) => !text.includes("="));
  if (plain.length > 1) {
    throw new UsageError(`--type may name one type without a pattern, got ${plain.join(", ")}`);
  }
  const types = [
    ["target_type", plain[0], "--type"],
    ["layer_types", named.length === 0 ? undefined : Object.fromEntries(named), "--type"],
  ] as const;
  const phases = values.phases === undefined ? undefined : phasesOf(values.phases);
  const all = [
    ...own,
    ...types,
    ...PHASE_KEYS.map((key, i) => [key, phases?.includes(i + 1), "--phases"] as const),
  ];
  return {
    overrides: Object.fromEntries(all.map(([key, value]) => [key, value])),
    overrideSources: Object.fromEntries(all.map(([key, , source]) => [key, source])),
  };
}

function phasesOf(list: string): readonly number[] {
  if (list === "all") return [1, 2, 3];
  if (list === "none") return [];
  const phases = list.split(",").map((text) => ["1", "2", "3"].indexOf(text.trim()) + 1);
  if (!phases.includes(0)) return phases;
  throw new UsageError(`--phases must be all, none or a list of 1, 2 and 3 as in 1,3, got "${list}"`);
}

/** Input, output and mode of the run. @throws {ConfigError} on paths or options that exclude each other */
function checkedTask(parsed: Options) {
  const { flags, values } = parsed,
    isSavedOnly = parsed.positionals.length === 1 && values["save-calibration"] !== undefined;
  const [input, output = ""] = isSavedOnly ? parsed.operands("MODEL") : parsed.operands("MODEL", "OUT");
  const { resume, force } = outputMode(flags), { variant, subfolder } = values;
  if (values.report !== undefined) {
    if (flags["dry-run"]) throw new UsageError("--dry-run writes nothing: there is nothing to report");
    if (parsed.lists.lora.length > 0) {
      throw new UsageError(
        "--report compares with the weights of MODEL: leave --lora out, or merge it first",
      );
    }
    if (subfolder !== undefined) {
      throw new UsageError("--report opens OUT as one model: leave it out with --subfolder");
    }
    if (resolve(values.report) === resolve(output)) throw new UsageError("--report must not be OUT itself");
  }
  const path = values["save-calibration"], groupMoments = flags["save-group-moments"];
  const maxMemoryBytes = sizeOf(values["max-memory"]), loras = parsed.lists.lora.map(loraOf);
  const minutes = parsed.number("together");
  if (minutes !== undefined && !(minutes > 0)) {
    throw new UsageError(`--together must be a number of minutes above 0, got ${minutes}`);
  }
  const togetherMilliseconds = minutes === undefined ? undefined : minutes * 60_000;
  const task = {
    input,
    output,
    resume,
    force,
    variant,
    subfolder,
    maxMemoryBytes,
    loras,
    togetherMilliseconds,
  };
  if (path === undefined) {
    if (groupMoments) throw new UsageError("--save-group-moments needs --save-calibration FILE");
    return { ...task, saveCalibration: undefined };
  }
  if (flags["dry-run"]) throw new UsageError("--dry-run writes nothing: there is nothing to save");
  if (!path.endsWith(".safetensors")) {
    throw new UsageError(`--save-calibration must name a .safetensors file, got ${path}`);
  }
  return { ...task, saveCalibration: { path, groupMoments } };
}

/** @throws {UsageError} on what a shard of the tensors cannot have */
function checkShard({ values, lists }: Options): void {
  if (values["save-calibration"] !== undefined) {
    throw new UsageError(
      "with --save-calibration a shard is a part of the samples: leave OUT out, and quantize after merge.ts",
    );
  }
  if (lists.lora.length > 0) {
    throw new UsageError(
      "--lora needs the whole model: merge.ts compares shards with the weights of MODEL; leave --shard out",
    );
  }
}

/** Saves statistics of MODEL, and nothing else. */
async function saveStatistics(
  parsed: Options,
  { config, shard, signal }: Pick<QuantizeCheckpointOptions, "config" | "shard" | "signal">,
  display: ProgressDisplay,
): Promise<void> {
  const { saveCalibration, ...task } = checkedTask(parsed);
  if (task.resume) display.log("a stopped pass goes on by itself: --resume changes nothing");
  using kernels = await openCommandKernels({
    backend: config.backend,
    threads: config.numThreads,
    onMessage: display.log,
  });
  try {
    const { update: onProgress, event: onEvent } = display;
    const save = { ...saveCalibration!, shard };
    await saveCalibrationOf({ ...task, config, kernels, signal, onProgress, onEvent, saveCalibration: save });
  } finally {
    display.clear();
  }
}

/** A LoRA with its scale behind the last colon, where a number stands there. */
function loraOf(text: string): LoraSource {
  const [, path = text, scale] = /^(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)$/i.exec(text) ?? [];
  if (path === "") throw new UsageError("--lora must name a file, got an empty text");
  return { path, scale: scale === undefined ? 1 : Number(scale) };
}

/** Bytes that an option names. */
function sizeOf(text: string | undefined): number | undefined {
  if (text === undefined) return undefined;
  const [, number, prefix = "", binary = ""] = /^(\d+(?:\.\d+)?) ?([kMGT]?)(i?)B?$/i.exec(text) ?? [];
  const bytes = Number(number) *
    (binary === "" ? 1000 : 1024) ** " kmgt".indexOf(prefix.toLowerCase() || " ");
  if (bytes > 0) return bytes;
  throw new UsageError(`--max-memory must be a size as in 12GB, got "${text}"`);
}

/** Writes the report of a run; what that needs is loaded only here. */
async function writeRunReport(
  target: string,
  { kernels, ...result }: Pick<QuantizeResult, "command" | "report" | "resolved" | "seconds"> & {
    readonly kernels: Kernels;
  },
  log: (line: string) => void,
): Promise<string> {
  const { countCodes } = await import("../lib/analysis/codes.ts");
  const { storedTimeParameters } = await import("../lib/models/mod.ts");
  const { quantizeRun, settingOf } = await import("../lib/analysis/make_run.ts");
  const { writeReport } = await import("../lib/analysis/report/folder.ts");
  const { input, output } = result.report;
  const { date, runtime, processor, cores, memoryBytes } = environmentOf(kernels);
  using checkpoint = openCheckpoint(output);
  const run = await quantizeRun(basename(resolve(target)).replace(/\.html$/, ""), {
    ...result,
    date,
    environment: { runtime, processor, cores, memoryBytes },
    codes: countCodes(kernels, output, {
      model: nameOfPath(input),
      setting: settingOf(result.resolved, result.report.solver?.name),
    }),
    timed: await layerErrorsOf(result.report, result.resolved.config, kernels, log),
    timeParameters: storedTimeParameters(checkpoint),
  });
  return await writeReport(target, run);
}

/** Errors of the layers along the time axis, where there are calibration data to run the model on. */
async function layerErrorsOf(
  { input, output }: RunReport,
  config: Config,
  kernels: Kernels,
  log: (line: string) => void,
): Promise<QuantizeResult["timed"]> {
  try {
    if (config.calibrationData === null && calibrationBeside(input) === undefined) {
      throw new CalibrationError("there are no calibration data (--calibrate FILE)");
    }
    using checkpoint = openCheckpoint(input);
    const needs = modelRequirements(checkpoint), shape = { batch: 1, tokens: FORECAST_TOKENS };
    const { activationBytes } = forwardCost(needs.model, shape);
    // The model in full precision beside the packed one.
    const sizes = { weightBytes: needs.weightBytes * 1.5, activationBytes, rows: FORECAST_TOKENS };
    checkMemory(input, forecastMemory(kernels, needs, sizes), "leave --report out, or free some");
    log("report: errors of the layers along time, on held-out calibration data");
    const { layersOverTime } = await import("../lib/bench/layers_over_time.ts");
    return await layersOverTime(kernels, input, output, config);
  } catch (error) {
    // The quantized model is written and the rest of the page holds.
    if (!(error instanceof Error) || !("code" in error)) throw error;
    log(`report: no errors of layers along time: ${printable(error.message)}`);
    return undefined;
  }
}

function printPlan({ plan }: RunReport): void {
  const rows = plan.rows.map((row) => [
    printable(row.name),
    `${row.dtype} [${row.shape.join(", ")}]`,
    row.action === "keep" ? "keep" : row.type ?? `${row.bits} bits`,
    row.reason,
  ]);
  print(formatCells([["tensor", "type", "action", "reason"], ...rows]));
  const reasons = new Set(plan.rows.map(({ reason }) => reason));
  const rules = KEEP_RULES.filter(({ rule }) => reasons.has(rule)).map(({ rule, why }) => [`  ${rule}`, why]);
  print(`\nfamily: ${plan.family ?? "not known by its names or config.json"}`);
  if (rules.length > 0) print(`\nKept by rule:\n${formatCells(rules)}`);
  for (const warning of plan.warnings) print(`warning: ${printable(warning)}`);
  print("");
}

/** Errors, those that rank solvers first. */
function errorFacts({ heldOut, layers, totals }: RunReport): [label: string, value: string][] {
  const solved = outputErrors(layers), hasSolved = solved.length > 0;
  const median = solved[Math.floor(solved.length / 2)]?.error.toPrecision(3);
  const byWeights = hasSolved ? [] : layers.flatMap(({ name, bits, statistics }) => {
    return statistics === undefined ? [] : [{ name, bits, error: relativeRmsError(statistics) }];
  }).sort((a, b) => b.error - a.error);
  const worst = (hasSolved ? solved : byWeights).slice(0, WORST_LAYERS);
  return [
    ...(heldOut === undefined
      ? []
      : [["held out", `${heldOut.metric}: ${heldOut.value.toPrecision(4)}`] as [string, string]]),
    ...(hasSolved
      ? [["output error", `${median} relative, median of ${solved.length} layers`] as [string, string]]
      : []),
    ...(totals.relativeRmsError === undefined ? [] : [[
      "weight error",
      `relative RMS ${totals.relativeRmsError.toPrecision(4)}, cosine ${
        totals.cosine!.toFixed(6)
      }; does not rank solvers`,
    ] as [string, string]]),
    ...worst.map(({ name, bits, error }, i): [string, string] => [
      i === 0 ? "worst" : "",
      `${printable(name)}: ${bits} bits, ${hasSolved ? "output error" : "relative RMS"} ${
        error.toPrecision(4)
      }`,
    ]),
  ];
}

export function printSummary(report: RunReport, seconds: number): void {
  const { totals, dryRun, layers, plan, tensorsResumed } = report;
  const rows = dryRun ? plan.rows : layers;
  const actions = new Map<string, { tensors: number; weights: number; before: number; after: number }>();
  for (const row of rows) {
    const action = row.action === "keep" ? "kept" : `${row.bits} bits`;
    const sum = actions.get(action) ?? { tensors: 0, weights: 0, before: 0, after: 0 };
    sum.tensors++;
    sum.weights += row.shape.reduce((product, size) => product * size, 1);
    sum.before += row.bytesBefore;
    sum.after += row.bytesAfter;
    actions.set(action, sum);
  }
  const table = [...actions].sort(([a], [b]) => a < b ? -1 : 1).map(([action, sum]) => [
    action,
    formatCount(sum.tensors),
    formatCount(sum.weights),
    formatBytes(sum.before),
    formatBytes(sum.after),
    sum.weights === 0 ? "-" : (sum.after * 8 / sum.weights).toFixed(3),
  ]);
  const head = ["layers", "tensors", "weights", "before", "after", "bits/weight"];
  print(formatCells([head, ...table], [1, 2, 3, 4, 5]));
  print("");
  const family = report.modelKind === "unknown" ? plan.family ?? "unknown" : report.modelKind;
  const fallbacks = layers.filter(({ tried }) => tried !== undefined).length;
  const rate = tensorsResumed > 0 ? "" : `, ${(totals.weights / seconds / 1e6).toFixed(1)} M weights/s`;
  const facts: [label: string, value: string, isShown?: boolean][] = [
    ["model", `${family}, ${printable(report.input)} -> ${printable(report.output)}`],
    [
      "files",
      `${formatBytes(totals.fileBytesBefore)} -> ${dryRun ? "about " : ""}${
        formatBytes(totals.fileBytesAfter)
      }, ` +
      `${(totals.fileBytesBefore / Math.max(1, totals.fileBytesAfter)).toFixed(2)} times smaller`,
    ],
    ["all weights", `${totals.bitsPerWeightOfAll.toFixed(3)} bits per weight, kept tensors included`],
    [
      "quantized",
      `${formatCount(totals.weights)} weights at ${totals.bitsPerWeight.toFixed(3)} bits per weight`,
    ],
    ...errorFacts(report),
    ["min_accuracy", `missed at first by ${fallbacks} tensors; the manifest has each step`, fallbacks > 0],
    ["opens in", report.opensIn],
    ["copied", report.copied.map(printable).join(", "), report.copied.length > 0],
    ["not copied", report.left.map(printable).join(", "), report.left.length > 0],
    [
      "resumed",
      `${tensorsResumed} of ${layers.length} tensors were done before`,
      !dryRun && tensorsResumed > 0,
    ],
    ["backend", `${report.backend}, ${report.threads} threads`, report.backend !== undefined],
    ["time", `${seconds.toFixed(2)} s${rate}, peak memory ${formatBytes(peakResidentBytes())}`, !dryRun],
  ];
  print(formatCells(facts.flatMap(([label, value, isShown = true]) => isShown ? [[label, value]] : [])));
}

export const main = defineCommand(USAGE, run);
if (import.meta.main) await main();
