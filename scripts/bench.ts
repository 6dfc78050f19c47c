/** `bench.ts`: measures, and prints what this run measured. */
import { mkdirSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { parseArgs } from "@std/cli/parse-args";
import { SOLVERS } from "../lib/config/names.ts";
import { compareSolvers, paretoFront } from "../lib/analysis/tables.ts";
import {
  type BenchOptions,
  formatHeader,
  formatReport,
  type Section,
  type Suite,
  type SuiteReport,
  SUITES,
} from "../lib/bench/mod.ts";
import { DEFAULT_TIME_GROUPS, MODEL_SIZES, PHASES } from "../lib/bench/options.ts";
import { MAX_TIME_GROUPS } from "../lib/time/mod.ts";
import { findDevice } from "../lib/native/cuda/mod.ts";
import { BACKENDS, type InstructionSet, MAX_THREADS, openKernels } from "../lib/native/mod.ts";
import { outputError, writeWhole } from "../lib/files/whole.ts";
import { BIT_WIDTHS, type BitWidth, GROUP_SIZES, type GroupSize } from "../lib/quant/mod.ts";
import { environmentOf, OtherLoad, peakResidentBytes } from "../lib/eval/environment.ts";
import { commandLine, usageError } from "./_command/options.ts";
import { commandOf } from "./_command/programs.ts";
import { EXIT_CODE_HELP, prepareReport, runCommand } from "./_command/run.ts";
import { print } from "./_command/text.ts";

const INSTRUCTION_SETS = [
  "scalar",
  "avx2",
  "avx512",
  "avx512_vnni",
  "neon",
  "neon_dot",
  "simd128",
] as const satisfies InstructionSet[];
const HELP = `Usage: bench.ts [options]

Measures on this machine and prints tables; every number in them is from this run.

  --suite NAME       ${
  SUITES.map(({ name, summary }) => `${name.padEnd(11)} ${summary}`).join(`\n${" ".repeat(21)}`)
}
                     (default ${SUITES[0]!.name})
  --phase NAME       ${PHASES.join(", ")}: the suite phases, that phase beside the baseline
  --model-size NAME  ${
  MODEL_SIZES.join(", ")
}: time and memory of the phases at a large model's shapes, synthetic weights, no accuracy
  --groups N         time groups of the suite phases, 1 to ${MAX_TIME_GROUPS}; default ${DEFAULT_TIME_GROUPS}
  --model DIR        checkpoint to quantize; may be repeated (default: the reference models). One without tasks beside it is
                     held against its own full precision on synthetic inputs
  --packed DIR       a folder that quantize.ts made of the one --model, measured beside it; may be repeated
  --bits LIST        default 8,4,3,2; 2 for peers, phases and solvers
  --group-size N     ${
  GROUP_SIZES.join(", ")
} (0: whole row); default 64, 0 for phases; for peers and solvers a list, default 0,32
  --solver NAME      clip, round, feedback or best; default round and clip, with best at the fewest bits; of the peers all
  --threads N        1 to ${MAX_THREADS}; default: all cores for accuracy and checkpoint, 2 for the others
  --backend NAME     ${BACKENDS.join(", ")}; auto is cpu here, and cuda measures the suite kernels on a GPU
  --isa NAME         ${INSTRUCTION_SETS.join(", ")}; default: the fastest
  --tasks LIST       puzzles of the accuracy suite, as in add,sort; default all
  --limit N          puzzles a task, or images drawn, of the accuracy and peers suites; default all and 128 (16
                     sequences or 4 trajectories of a model without tasks), for peers no images
  --seed N           of noise, masks and synthetic weights; default 1
  --ignore-memory    run models although memory looks too small for them
  --megabytes N      size of the process suite's checkpoint; default 2000 (64 with --quick)
  --quick            fewer samples: for a look, not for a report
  --json             print JSON instead of tables
  --out DIR          also write bench.json and bench.txt there
  --report DIR       also write report.html there, with charts and tables of the run; a name that ends with .html is
                     the page alone
  --help

${EXIT_CODE_HELP}`;

/** What the command line asks for. */
export interface BenchArguments {
  readonly suite: Suite;
  readonly options: BenchOptions;
  readonly isa: InstructionSet | undefined;
  readonly json: boolean;
  readonly out: string | undefined;
  readonly report: string | undefined;
  readonly help: boolean;
}

/**
 * Parses the command line.
 *
 * @throws {ConfigError} on an option that does not exist or a value that is not allowed
 */
export function parseBenchArguments(args: readonly string[]): BenchArguments {
  const string = [
    "suite",
    "phase",
    "groups",
    "model-size",
    "model",
    "packed",
    "bits",
    "group-size",
    "solver",
    "threads",
    "backend",
    "isa",
    "tasks",
    "limit",
    "seed",
    "megabytes",
    "out",
    "report",
  ] as const;
  const boolean = ["ignore-memory", "quick", "json", "help"] as const;
  const unknown: string[] = [];
  const parsed = parseArgs([...args], {
    string: ["_", ...string],
    boolean: [...boolean],
    collect: ["model", "packed"],
    unknown: (name: string) => {
      unknown.push(name);
      return false;
    },
  });
  const fail = (reason: string) => usageError(reason, HELP);
  if (unknown[0] !== undefined) {
    throw fail(
      unknown[0].startsWith("-") ? `unknown option "${unknown[0]}"` : `unexpected argument "${unknown[0]}"`,
    );
  }
  const given = (name: typeof string[number]): string | undefined => {
    const value = parsed[name];
    if (value === undefined) return undefined;
    if (value === "") throw fail(`option "--${name}" needs a value`);
    return String(value);
  };
  const one = <T extends string>(name: typeof string[number], allowed: readonly T[]): T | undefined => {
    const value = given(name);
    if (value === undefined || allowed.includes(value as T)) return value as T | undefined;
    throw fail(`option "--${name}" must be one of ${allowed.join(", ")}, got "${value}"`);
  };
  const whole = (name: typeof string[number], least: number, most: number): number | undefined => {
    const value = given(name);
    if (value === undefined) return undefined;
    const number = Number(value);
    if (/^\d+$/.test(value) && number >= least && number <= most) return number;
    throw fail(`option "--${name}" must be a whole number from ${least} to ${most}, got "${value}"`);
  };
  const phase = one("phase", PHASES);
  const asked = one("suite", SUITES.map(({ name }) => name));
  if (phase !== undefined && asked !== undefined && asked !== "phases") {
    throw fail(`option "--phase" is of the suite phases, got --suite ${asked}`);
  }
  const modelSize = one("model-size", MODEL_SIZES);
  if (modelSize !== undefined && asked !== undefined && asked !== "phases") {
    throw fail(`option "--model-size" is of the suite phases, got --suite ${asked}`);
  }
  const isPhases = phase !== undefined || modelSize !== undefined;
  const suite = SUITES.find(({ name }) => name === (isPhases ? "phases" : asked)) ?? SUITES[0]!;
  const timeGroups = whole("groups", 1, MAX_TIME_GROUPS);
  if (timeGroups !== undefined && suite.name !== "phases") {
    throw fail(`option "--groups" is of the suite phases, got the suite ${suite.name}`);
  }
  const bits = (given("bits") ?? (suite.defaults?.bits ?? [8, 4, 3, 2]).join()).split(",").map((text) => {
    const width = BIT_WIDTHS.find((allowed) => String(allowed) === text);
    if (width === undefined) {
      throw fail(`option "--bits" must list some of ${BIT_WIDTHS.join(", ")}, got "${text}"`);
    }
    return width;
  });
  const groupSizes = (given("group-size") ?? (suite.defaults?.groupSizes ?? [64]).join()).split(",").map(
    (text) => {
      const size = GROUP_SIZES.find((allowed) => String(allowed) === text);
      if (size !== undefined) return size;
      throw fail(`option "--group-size" must be one of ${GROUP_SIZES.join(", ")}, got "${text}"`);
    },
  );
  if (groupSizes.length > 1 && !((suite.defaults?.groupSizes.length ?? 0) > 1)) {
    throw fail(
      `option "--group-size" must be one size for the suite ${suite.name}, got ${groupSizes.join()}`,
    );
  }
  const solver = one("solver", SOLVERS);
  const models = ([parsed["model"] ?? []].flat() as string[]).map(String);
  if (models.includes("")) throw fail('option "--model" needs a value');
  if (modelSize !== undefined && models.length > 0) {
    throw fail('option "--model-size" takes no --model: its weights are synthetic');
  }
  const packed = ([parsed["packed"] ?? []].flat() as string[]).map(String);
  if (packed.includes("")) throw fail('option "--packed" needs a value');
  if (packed.length > 0 && (models.length !== 1 || suite.name !== "accuracy")) {
    throw fail('option "--packed" needs one --model, and the suite accuracy');
  }
  const quick = parsed["quick"] === true;
  const isa = one("isa", INSTRUCTION_SETS), backend = one("backend", BACKENDS) ?? "auto";
  if (backend === "cuda" && suite.name !== "kernels") {
    throw fail(`"--backend" cuda is for the suite kernels, got ${suite.name}`);
  }
  return {
    suite,
    options: {
      packed,
      models: models.length > 0 ? models : ["dream-mini", "glyph-dit"].map(referenceModel),
      bits: [...new Set<BitWidth>(bits)],
      groupSize: groupSizes[0]!,
      groupSizes: [...new Set<GroupSize>(groupSizes)],
      solvers: solver === undefined ? suite.defaults?.solvers ?? ["round", "clip"] : [solver],
      threads: whole("threads", 1, MAX_THREADS),
      backend,
      isa,
      seed: whole("seed", 0, 2 ** 32 - 1) ?? 1,
      tasks: given("tasks")?.split(","),
      limit: whole("limit", 1, 1e6),
      phase: suite.name === "phases" ? phase ?? "all" : undefined,
      modelSize,
      timeGroups,
      syntheticBytes: (whole("megabytes", 1, 1e6) ?? (quick ? 64 : 2000)) * 1e6,
      ignoresMemory: parsed["ignore-memory"] === true,
      quick,
    },
    isa,
    json: parsed["json"] === true,
    out: given("out"),
    report: given("report"),
    help: parsed["help"] === true,
  };
}

function referenceModel(name: string): string {
  return fileURLToPath(new URL(`../tests/models/${name}`, import.meta.url));
}

/** The methods that no other beats, from the rows that were measured. */
function frontSections({ rows }: SuiteReport, suite: Suite): Section[] {
  if (suite.name !== "peers") return [];
  const front = paretoFront(rows);
  if (front.length === 0) return [];
  return [{
    title: "Pareto front: nothing measured here is smaller and as close to full precision",
    notes: [],
    columns: [
      { key: "model", title: "model" },
      { key: "method", title: "method" },
      { key: "kind", title: "kind" },
      { key: "bitsPerWeight", title: "bits/w", digits: 3 },
      { key: "distance", title: "KL or noise error", digits: 4 },
    ],
    rows: front.map((row) => ({ ...row })),
  }];
}

/** A table of what clip search gains, from the rows that were measured. */
function solverSections({ rows }: SuiteReport, suite: Suite): Section[] {
  if (suite.name !== "checkpoint") return [];
  const compared = compareSolvers(rows);
  if (compared.length === 0) return [];
  return [{
    title: "Clip search / round to nearest, medians over the models",
    notes: [],
    columns: [
      { key: "bits", title: "bits" },
      { key: "models", title: "models" },
      { key: "errorRatio", title: "error", digits: 3 },
      { key: "timeRatio", title: "seconds", digits: 2 },
    ],
    rows: compared.map((row) => ({ ...row })),
  }];
}

/** A run is called after its folder or page. */
function nameOfReport(target: string): string {
  return basename(resolve(target)).replace(/\.html$/, "");
}

function makeFolder(path: string): void {
  try {
    mkdirSync(path, { recursive: true });
  } catch (cause) {
    throw outputError("create", path, cause);
  }
}

async function main(args: readonly string[], signal: AbortSignal): Promise<void> {
  const { suite, options, isa, json, out, report: reportTarget, help } = parseBenchArguments(args);
  if (help) {
    print(HELP);
    return;
  }
  // Nothing of a measurement can be kept: the exit handlers remove its files.
  signal.addEventListener("abort", () => process.exit(signal.reason === "SIGTERM" ? 143 : 130));
  if (out !== undefined) makeFolder(out);
  if (reportTarget !== undefined) prepareReport(reportTarget);
  const progress = (line: string) => void process.stderr.write(`${suite.name}: ${line}\n`);
  const { backend } = options;
  using device = backend === "cuda" ? await findDevice(true, progress) : undefined;
  // measured is what runs on the CPU, whatever could quantize
  using kernels = await openKernels({
    backend: backend === "auto" || backend === "cuda" ? "cpu" : backend,
    isa,
    threads: options.threads,
    onMessage: progress,
  });
  const environment = environmentOf(kernels);
  const command = commandLine("bench.ts", args);
  const header = formatHeader(command, environment);
  if (!json) print(header.join("\n"));

  const others = new OtherLoad();
  const begin = performance.now();
  const measured = device === undefined
    ? await suite.run({ kernels, environment, options, commandOf, progress })
    : (await import("../lib/bench/kernels/cuda_suite.ts")).measureCuda(
      device,
      kernels,
      options.quick,
      progress,
    );
  const seconds = (performance.now() - begin) / 1000;
  const otherCores = others.cores();
  const report = {
    ...measured,
    sections: [
      ...measured.sections,
      ...solverSections(measured, suite),
      ...frontSections(measured, suite),
    ],
  };
  const closing = [
    "",
    `took ${seconds.toFixed(1)} s` +
    (otherCores === undefined
      ? ""
      : `; other processes (children are others) kept ${otherCores.toFixed(2)} cores busy meanwhile`) +
    (options.quick ? "; --quick: too few samples for a report" : ""),
  ];
  const body = [...formatReport(report), ...closing];
  const { sections, rows, goals, skipped } = report;
  const result = `${
    JSON.stringify(
      {
        suite: suite.name,
        command,
        environment,
        options,
        seconds,
        otherCores,
        peakResidentBytes: peakResidentBytes(),
        sections,
        rows,
        goals,
        skipped,
      },
      null,
      2,
    )
  }\n`;
  if (json) print(result.trimEnd());
  else print(body.join("\n"));
  if (out !== undefined) {
    writeWhole(join(out, "bench.json"), result);
    writeWhole(join(out, "bench.txt"), `${[...header, ...body].join("\n")}\n`);
  }
  if (reportTarget !== undefined) {
    // Loaded only here: drawing takes libraries that nothing else needs.
    const { benchRun } = await import("../lib/analysis/make_run.ts");
    const { writeReport } = await import("../lib/analysis/report/folder.ts");
    const run = await benchRun(nameOfReport(reportTarget), {
      suite: suite.name,
      command,
      environment,
      options,
      seconds,
      otherCores,
      report,
    });
    progress(`report: ${await writeReport(reportTarget, run)}`);
  }
}

if (import.meta.main) await runCommand(main);
