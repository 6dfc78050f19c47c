/** `bench.ts`: measures, and prints what this run measured. */
import { existsSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { type Solver, SOLVERS } from "../lib/config/names.ts";
import { OutputError } from "../lib/errors.ts";
import { compareSolvers, paretoFront } from "../lib/analysis/tables.ts";
import { DIVISIBLE_SUITES, shardOptions, unitText } from "../lib/bench/shards.ts";
import { mergeReports } from "../lib/bench/suite.ts";
import { type Shard, shardFolder } from "../lib/output/shard_folders.ts";
import { shardText } from "../lib/plan/shards.ts";
import { chosenShard } from "./_command/shard.ts";
import {
  type BenchContext,
  type BenchOptions,
  formatHeader,
  formatReport,
  type Section,
  type Suite,
  type SuiteReport,
  type SuiteRow,
  SUITES,
} from "../lib/bench/mod.ts";
import {
  DEFAULT_TIME_GROUPS,
  type LayerShape,
  MODEL_SIZES,
  PHASES,
  SOLVER_SPEED_PARTS,
  type SolverSpeedPart,
} from "../lib/bench/options.ts";
import { MAX_TIME_GROUPS } from "../lib/time/mod.ts";
import { findDevice } from "../lib/native/cuda/mod.ts";
import { INSTRUCTION_SETS, type InstructionSet } from "../lib/native/kernels.ts";
import { BACKENDS, MAX_THREADS } from "../lib/native/mod.ts";
import { checkReplaceable, MADE_BY, writeResult } from "../lib/files/results.ts";
import { kindOf, makeFolder } from "../lib/files/whole.ts";
import { BIT_WIDTHS, GROUP_SIZES } from "../lib/quant/mod.ts";
import { environmentOf, OtherLoad, peakResidentBytes } from "../lib/eval/environment.ts";
import {
  type Arguments,
  environmentVariables,
  parseArguments,
  type Usage,
  UsageError,
} from "./_command/options.ts";
import { commandOf } from "./_command/programs.ts";
import { ProgressDisplay } from "./_command/progress.ts";
import { type Context, defineCommand, prepareReport, REPLACE_OPTION } from "./_command/run.ts";
import { openCommandKernels, signalExitCode } from "./_command/signals.ts";
import { print } from "./_command/text.ts";

const USAGE = {
  name: "bench.ts",
  operands: "",
  about: "Measures on this machine and prints tables; every number in them is from this run.",
  options: {
    "What is measured": "",
    "--suite NAME": [
      ...SUITES.map(({ name, summary }) => `${name.padEnd(12)} ${summary}`),
      `(default ${SUITES[0]!.name})`,
    ].join("\n"),
    "--model DIR …": "checkpoint to quantize; may be repeated (default: the reference models). One without " +
      "tasks beside it is compared with its own full precision on synthetic inputs",
    "--packed DIR …":
      "a folder that quantize.ts made, measured beside the model that it was made of, error by " +
      "layer and time included; may be repeated",
    "--against MODEL": "with --packed: the model that it was made of, as --model",
    "--phase NAME":
      `${PHASES.join(", ")}: the suite phases, that phase beside the baseline; with --suite codes ` +
      "phase3_full, both codes refined",
    "--model-size NAME":
      `${MODEL_SIZES.join(", ")}: time and memory of the phases at a large model's shapes, ` +
      "synthetic weights, no accuracy",
    "--tasks LIST": "puzzles of the accuracy suite, as in add,sort; default all",
    "--limit N":
      "puzzles a task, or images drawn, of the accuracy and peers suites; default all and 128 (16 " +
      "sequences or 4 trajectories of a model without tasks), for peers no images",
    "--megabytes N": "size of the process suite's checkpoint; default 2000 (64 with --quick)",
    "--parts LIST": `parts of the suite solver-speed, some of ${
      SOLVER_SPEED_PARTS.join(", ")
    }; default all but effort`,
    "--shapes LIST": "rows and columns of the layers whose kernels the suite solver-speed measures, as in " +
      "3584x3584,3584x18944 (the default); the part kernels alone where --parts does not say more",
    "--quick": "fewer samples: for a look, not for a report",
    "--seed N": "of noise, masks and synthetic weights; default 1",
    "How it is quantized": "",
    "--bits LIST": "default 8,4,3,2; 2 for peers, phases and solvers",
    "--group-size N": `${GROUP_SIZES.join(", ")} (0: whole row); default 64, 0 for phases; for peers and ` +
      "solvers a list, default 0,32",
    "--solver NAME":
      "clip, round, feedback or best; default round and clip, with best at the fewest bits; of " +
      "the peers all",
    "--groups N": `time groups of the suite phases, 1 to ${MAX_TIME_GROUPS}; default ${DEFAULT_TIME_GROUPS}`,
    "Machine": "",
    "--threads N": `1 to ${MAX_THREADS}; default: all cores for accuracy and checkpoint, 2 for the others`,
    "--backend NAME": `${
      BACKENDS.join(", ")
    }; auto is cpu here, and cuda measures the suites kernels and solver-speed on a GPU`,
    "--isa NAME": `${Object.keys(INSTRUCTION_SETS).join(", ")}; default: the fastest`,
    "--ignore-memory": "run models although memory looks too small for them",
    "--shard I/N":
      "measure part I of N of the models and bits, into shard-I-of-N of the folders of --report and --out; merge.ts makes " +
      "one run of all parts; a part that was measured before is skipped, unless --force is given; default: what the array " +
      "task's environment says (Slurm, Kubernetes, Grid Engine); none: all",
    "Output": "",
    "--json": "print JSON instead of tables",
    "--out DIR": "also write bench.json and bench.txt there",
    "--report DIR":
      "also write report.html there, with charts and tables of the run; a name that ends with " +
      ".html is the page alone",
    ...REPLACE_OPTION,
  },
  examples: {
    "--model MODEL --bits 4,2 --limit 16": "how much accuracy a model keeps at 4 and at 2 bits",
    "--packed OUT --against MODEL --report out/measured":
      "what a quantized folder keeps, as a page with charts",
    "--suite kernels --quick": "how fast this machine is",
  },
} as const satisfies Usage;

type Options = Arguments<typeof USAGE>;

export interface BenchArguments {
  readonly suite: Suite<SuiteRow>;
  readonly options: BenchOptions;
  readonly json: boolean;
  readonly out: string | undefined;
  readonly report: string | undefined;
  /** A part of what is measured. */
  readonly shard?: Shard | undefined;
}

/** Values of an option that lists numbers, each once. */
function listOf<T extends number>(text: string, allowed: readonly T[], name: string, wanted: string): T[] {
  return [
    ...new Set(
      text.split(",").map((part) => {
        const value = allowed.find((each) => String(each) === part);
        if (value !== undefined) return value;
        throw new UsageError(`--${name} must ${wanted} ${allowed.join(", ")}, got "${part}"`);
      }),
    ),
  ];
}

/** The suite that is asked for; some options are of one suite only. */
function suiteOf(parsed: Options): Suite<SuiteRow> {
  const { values } = parsed, asked = parsed.oneOf("suite", SUITES.map(({ name }) => name));
  const phaseOption = (["phase", "model-size"] as const).find((name) => values[name] !== undefined);
  const isRefined = asked === "codes" && phaseOption === "phase";
  if (isRefined && values.phase !== "phase3_full") {
    throw new UsageError(`--phase must be phase3_full with --suite codes, got ${values.phase}`);
  }
  if (phaseOption !== undefined && asked !== undefined && asked !== "phases" && !isRefined) {
    throw new UsageError(`--${phaseOption} is of the suite phases, got --suite ${asked}`);
  }
  const name = phaseOption === undefined ? asked ?? SUITES[0]!.name : asked ?? "phases";
  if (values.groups !== undefined && name !== "phases") {
    throw new UsageError(`--groups is of the suite phases, got the suite ${name}`);
  }
  const speedOption = (["parts", "shapes"] as const).find((option) => values[option] !== undefined);
  if (speedOption !== undefined && name !== "solver-speed") {
    throw new UsageError(`--${speedOption} is of the suite solver-speed, got the suite ${name}`);
  }
  if (values.backend === "cuda" && !ON_GPU.includes(name)) {
    throw new UsageError(`--backend cuda is for the suites ${ON_GPU.join(" and ")}, got ${name}`);
  }
  return SUITES.find((suite) => suite.name === name)!;
}

/** Suites that measure a GPU with `--backend cuda`. */
const ON_GPU: readonly string[] = ["kernels", "solver-speed"];

/** Most rows and columns of a layer that is measured. */
const MOST_ROWS = 2 ** 20;

/** Layers as `ROWSxCOLUMNS`, separated by commas. @throws {UsageError} on anything else */
function shapesOf(text: string | undefined): LayerShape[] | undefined {
  return text?.split(",").map((part) => {
    const [, rows, cols] = /^([0-9]{1,7})x([0-9]{1,7})$/.exec(part)?.map(Number) ?? [];
    const isAllowed = [rows, cols].every((count) => count !== undefined && count >= 64 && count <= MOST_ROWS);
    if (isAllowed && cols! % 64 === 0) return { rows: rows!, cols: cols! };
    throw new UsageError(
      `--shapes must list layers as in 3584x18944, from 64 to ${MOST_ROWS}, columns in steps of 64, got "${part}"`,
    );
  });
}

/** Parts of the suite solver-speed. @throws {UsageError} on a name that none has */
function partsOf(text: string | undefined): SolverSpeedPart[] | undefined {
  return text?.split(",").map((part) => {
    const found = SOLVER_SPEED_PARTS.find((name) => name === part);
    if (found !== undefined) return found;
    throw new UsageError(`--parts must list some of ${SOLVER_SPEED_PARTS.join(", ")}, got "${part}"`);
  });
}

type OptionName = Extract<keyof Options["values"] | keyof Options["flags"] | keyof Options["lists"], string>;

/** Options that would change nothing. */
const QUANTIZING = ["bits", "group-size", "solver"] as const;
const IGNORED_WITH_PACKED: readonly OptionName[] = QUANTIZING;
const IGNORED_BY_SUITE: Readonly<Record<string, readonly OptionName[]>> = {
  accuracy: ["megabytes"],
  checkpoint: ["tasks", "limit", "megabytes", "ignore-memory"],
  kernels: ["model", ...QUANTIZING, "tasks", "limit", "megabytes", "ignore-memory"],
  peers: ["megabytes", "ignore-memory"],
  phases: ["solver", "megabytes", "ignore-memory"],
  process: ["model", ...QUANTIZING, "tasks", "limit", "ignore-memory"],
  defaults: ["megabytes", "ignore-memory"],
  solvers: ["megabytes", "ignore-memory"],
  "solver-speed": [...QUANTIZING, "tasks", "limit", "megabytes"],
};

/** @throws {UsageError} naming every option that was given and would change nothing */
function refuseIgnored({ values, flags, lists }: Options, ignored: readonly OptionName[], by: string): void {
  const given = { ...values, ...flags, ...lists };
  const names = ignored.filter((name) => [given[name] ?? []].flat().some((value) => value !== false));
  if (names.length === 0) return;
  const list = names.map((name) => `--${name}`).join(", ");
  throw new UsageError(`${list} would change nothing ${by}: leave ${names.length === 1 ? "it" : "them"} out`);
}

/** Parses the command line. @throws {UsageError} on an unknown option or a value that is not allowed */
export function parseBenchArguments(args: readonly string[]): BenchArguments {
  return benchArguments(parseArguments(USAGE, args));
}

function benchArguments(parsed: Options): BenchArguments {
  const { flags, values, lists: { model, packed } } = parsed;
  parsed.operands();
  const phase = parsed.oneOf("phase", PHASES), modelSize = parsed.oneOf("model-size", MODEL_SIZES);
  const backend = parsed.oneOf("backend", BACKENDS) ?? "auto", suite = suiteOf(parsed);
  const isWithoutModels = modelSize !== undefined || (IGNORED_BY_SUITE[suite.name] ?? []).includes("model");
  const models = values.against === undefined ? model : [...model, values.against];
  const defaults = {
    bits: [8, 4, 3, 2],
    groupSizes: [64],
    solvers: ["round", "clip"] as Solver[],
    ...suite.defaults,
  };
  const bits = listOf(values.bits ?? defaults.bits.join(), BIT_WIDTHS, "bits", "list some of");
  const sizes = values["group-size"] ?? defaults.groupSizes.join();
  const groupSizes = listOf(sizes, GROUP_SIZES, "group-size", "be one of");
  if (groupSizes.length > 1 && defaults.groupSizes.length === 1) {
    throw new UsageError(`--group-size must be one size for the suite ${suite.name}, got ${sizes}`);
  }
  if (modelSize !== undefined && models.length > 0) {
    throw new UsageError("--model-size takes no --model: its weights are synthetic");
  }
  if (packed.length > 0 && (models.length !== 1 || suite.name !== "accuracy")) {
    throw new UsageError("--packed needs one --against MODEL (or --model), and the suite accuracy");
  }
  if (packed.length === 0 && values.against !== undefined) throw new UsageError("--against needs --packed");
  if (packed.length > 0) refuseIgnored(parsed, IGNORED_WITH_PACKED, "with --packed, which is quantized");
  refuseIgnored(parsed, IGNORED_BY_SUITE[suite.name] ?? [], `in the suite ${suite.name}`);
  const solver = parsed.oneOf("solver", SOLVERS);
  return {
    suite,
    options: {
      packed,
      models: models.length > 0 || isWithoutModels ? models : referenceModels(),
      bits,
      groupSize: groupSizes[0]!,
      groupSizes,
      solvers: solver === undefined ? defaults.solvers : [solver],
      threads: parsed.whole("threads", 1, MAX_THREADS),
      backend,
      isa: parsed.oneOf("isa", Object.keys(INSTRUCTION_SETS) as InstructionSet[]),
      seed: parsed.whole("seed", 0, 2 ** 32 - 1) ?? 1,
      tasks: values.tasks?.split(","),
      limit: parsed.whole("limit", 1, 1e6),
      phase: suite.name === "phases" ? phase ?? "all" : phase,
      modelSize,
      parts: partsOf(values.parts) ?? (values.shapes === undefined ? undefined : ["kernels"]),
      shapes: shapesOf(values.shapes),
      timeGroups: parsed.whole("groups", 1, MAX_TIME_GROUPS),
      syntheticBytes: (parsed.whole("megabytes", 1, 1e6) ?? (flags.quick ? 64 : 2000)) * 1e6,
      ignoresMemory: flags["ignore-memory"],
      quick: flags.quick,
    },
    json: flags.json,
    out: values.out,
    report: values.report,
  };
}

/** Models of a checkout. @throws {UsageError} where the command comes from a package, which has none */
function referenceModels(): string[] {
  const folders = ["dream-mini", "glyph-dit"].map((name) =>
    new URL(`../tests/models/${name}`, import.meta.url)
  );
  if (folders.every((url) => url.protocol === "file:" && existsSync(url))) {
    return folders.map((url) => fileURLToPath(url));
  }
  throw new UsageError("--model is needed: only a checkout has the reference models");
}

/** Further tables of some suites, from the rows that were measured. */
function furtherSections(suite: Suite<SuiteRow>, { rows }: SuiteReport<SuiteRow>): Section[] {
  const sections: Record<string, () => Section> = {
    peers: () => ({
      title: "Pareto front: nothing measured here is smaller and as close to full precision",
      notes: [],
      columns: [
        { key: "model", title: "model" },
        { key: "method", title: "method" },
        { key: "kind", title: "kind" },
        { key: "bitsPerWeight", title: "bits/w", digits: 3 },
        { key: "distance", title: "KL or noise error", digits: 4 },
      ],
      rows: paretoFront(rows.filter((row) => row.suite === "peers")).map((row) => ({ ...row })),
    }),
    checkpoint: () => ({
      title: "Clip search / round to nearest, medians over the models",
      notes: [],
      columns: [
        { key: "bits", title: "bits" },
        { key: "models", title: "models" },
        { key: "errorRatio", title: "error", digits: 3 },
        { key: "timeRatio", title: "seconds", digits: 2 },
      ],
      rows: compareSolvers(rows.filter((row) => row.suite === "checkpoint")).map((row) => ({ ...row })),
    }),
  };
  return [sections[suite.name]?.() ?? []].flat().filter(({ rows }) => rows.length > 0);
}

/** A shard's part of what a suite measures, as one report. */
async function measureShard(
  suite: Suite<SuiteRow>,
  context: BenchContext,
  shard: Shard,
): Promise<SuiteReport<SuiteRow>> {
  const reports: SuiteReport<SuiteRow>[] = [];
  for (const options of shardOptions(suite.name, context.options, shard)) {
    context.progress(`shard ${shardText(shard)}: ${unitText(options)}`);
    reports.push(await suite.run({ ...context, options }));
  }
  return mergeReports(reports);
}

/** The part that is asked for, by option or environment, with the folders that it writes into. */
function shardArguments(line: Options, parsed: BenchArguments): BenchArguments {
  // The environment of an array divides what can be divided; an option asks for it.
  const isDivisible = DIVISIBLE_SUITES.includes(parsed.suite.name) && parsed.options.modelSize === undefined;
  const asked = line.values.shard, log = (text: string) => process.stderr.write(`${text}\n`);
  const shard = asked === undefined && !isDivisible
    ? undefined
    : chosenShard(asked, environmentVariables(log), log);
  if (shard === undefined) return parsed;
  shardOptions(parsed.suite.name, parsed.options, shard); // refuses what cannot be divided, before the work
  const { report, out } = parsed;
  if (report === undefined || report.endsWith(".html")) {
    throw new UsageError(
      "a shard needs --report DIR, a folder, from which merge.ts makes one run; --shard none measures all",
    );
  }
  const own = (folder: string) => join(folder, shardFolder(shard));
  return { ...parsed, shard, report: own(report), out: out === undefined ? undefined : own(out) };
}

/**
 * Whether a shard was measured before, by this version, with these settings and models.
 *
 * @throws {OutputError} where another run is in its place
 */
async function isMeasured({ suite, options, report, out, shard }: BenchArguments): Promise<boolean> {
  if (shard === undefined || report === undefined) return false;
  const { readRun, RUN_FILE } = await import("../lib/analysis/run.ts");
  if (kindOf(join(report, RUN_FILE)) !== "file") return false;
  const { isRunOf, shardConfiguration } = await import("../lib/analysis/report/merge_runs.ts");
  if (isRunOf(await readRun(report), suite.name, shardConfiguration(options, shard))) {
    return out === undefined || kindOf(join(out, "bench.json")) === "file";
  }
  throw new OutputError(
    `Cannot measure shard ${shardText(shard)} into ${
      JSON.stringify(report)
    }: it must not exist, got a run of another ` +
      "version, suite, settings or models: choose another folder, or give --force to replace it",
    { path: report },
  );
}

/** Runs the suite on kernels that are opened for it. */
async function measure(
  { suite, options, json, shard }: BenchArguments,
  command: string,
  progress: (line: string) => void,
) {
  const { backend, isa, threads, quick } = options,
    isSolved = backend === "cuda" && suite.name === "solver-speed";
  using device = backend === "cuda" && !isSolved ? await findDevice(true, progress) : undefined;
  using kernels = await openCommandKernels({
    backend: isSolved || backend !== "auto" && backend !== "cuda" ? backend : "cpu", // auto measures the CPU
    isa,
    threads,
    onMessage: progress,
  });
  const environment = environmentOf(kernels), header = formatHeader(command, environment);
  if (!json) print(header.join("\n"));
  const others = new OtherLoad(), begin = performance.now();
  const context = { kernels, environment, options, commandOf, progress };
  const measured = device !== undefined
    ? (await import("../lib/bench/kernels/cuda_suite.ts")).measureCuda(device, kernels, quick, progress)
    : shard === undefined
    ? await suite.run(context)
    : await measureShard(suite, context, shard);
  const seconds = (performance.now() - begin) / 1000, otherCores = others.cores();
  const report: SuiteReport<SuiteRow> = {
    ...measured,
    sections: [...measured.sections, ...furtherSections(suite, measured)],
  };
  return {
    header,
    measurement: { suite: suite.name, command, environment, options, seconds, otherCores },
    report,
  };
}

async function run(line: Options, { signal, command }: Context): Promise<void> {
  const parsed = shardArguments(line, benchArguments(line));
  const { suite, options, json, out, report: target, shard } = parsed;
  if (!line.flags.force && await isMeasured(parsed)) {
    const text = `${suite.name}: shard ${
      shardText(shard!)
    } is measured: ${target}; --force measures it again`;
    return void process.stderr.write(`${text}\n`);
  }
  // Nothing of a measurement can be kept: the exit handlers remove its files.
  signal.addEventListener("abort", () => {
    process.stderr.write(`\nerror: Stopped by ${signal.reason}: nothing of this measurement is kept\n`);
    process.exit(signalExitCode(String(signal.reason)));
  });
  const { force } = line.flags, files = ["bench.json", "bench.txt"].map((name) => join(out ?? "", name));
  if (out !== undefined) {
    makeFolder(out);
    for (const file of files) checkReplaceable(file, force);
  }
  if (target !== undefined) prepareReport(target, force);
  const display = new ProgressDisplay(false);
  const progress = (line: string) => {
    display.log(`${suite.name}: ${line}`);
    // A display that goes on would be seen in the time of small kernels.
    if (suite.name !== "kernels") display.event({ kind: "stage", message: line });
  };
  const { header, measurement, report } = await measure(parsed, command, progress);
  display.clear();
  const { seconds, otherCores } = measurement, { sections, rows, goals, skipped } = report;
  const load = otherCores === undefined
    ? ""
    : `; other processes (children are others) kept ${otherCores.toFixed(2)} cores busy meanwhile`;
  const note = options.quick ? "; --quick: too few samples for a report" : "";
  const body = [...formatReport(report), "", `took ${seconds.toFixed(1)} s${load}${note}`];
  const measured = {
    tool: MADE_BY,
    ...measurement,
    peakResidentBytes: peakResidentBytes(),
    sections,
    rows,
    goals,
    skipped,
  };
  const result = JSON.stringify(measured, null, 2);
  print(json ? result : body.join("\n"));
  if (out !== undefined) {
    writeResult(files[0]!, `${result}\n`, force);
    writeResult(files[1]!, [...header, ...body].join("\n"), force);
  }
  if (target !== undefined) {
    // Loaded only here: drawing takes libraries that nothing else needs.
    const { benchRun } = await import("../lib/analysis/make_run.ts");
    const { writeReport } = await import("../lib/analysis/report/folder.ts");
    const { writeRun } = await import("../lib/analysis/run.ts");
    const name = basename(resolve(target)).replace(/\.html$/, ""),
      made = await benchRun(name, { ...measurement, report });
    if (shard !== undefined) {
      const { shardConfiguration } = await import("../lib/analysis/report/merge_runs.ts");
      const configuration = shardConfiguration(options, shard);
      return await writeRun(target, { ...made, configuration }, force); // the merge draws
    }
    display.log(`${suite.name}: report: ${await writeReport(target, made, { force })}`);
  }
}

export const main = defineCommand(USAGE, run);
if (import.meta.main) await main();
