/** Time until the library is loaded and until a report is written, each measured in a fresh process. */
import { join } from "node:path";
import { runChild } from "../child_process.ts";
import { spreadPercent, summarize, type Summary } from "../../eval/statistics.ts";
import { type CommandOf, type Goal, type Section, tableOf } from "../suite.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";

const GOAL_IMPORT_MILLISECONDS = 60;
const GOAL_REPORT_MILLISECONDS = 3000;
const GOAL_REPORT_BYTES = 5e6;
/** The goal's number of layers, and more than any model has. */
const LAYERS = [300, 10_000] as const;

export interface StartUp {
  /** Of `mod.ts`, without tables and charts, by the runtime that measures. */
  readonly importMilliseconds: Summary;
  /** Of quantizations with so many layers: everything that `--report` writes, libraries loaded first. */
  readonly reports: readonly {
    readonly layers: number;
    readonly milliseconds: Summary;
    /** Of the page. */
    readonly bytes: number;
  }[];
}

/** Measures both, each so many times after one that fills the caches. */
export async function measureStartUp(commandOf: CommandOf, runs: number): Promise<StartUp> {
  const probe = async (args: readonly string[]): Promise<{ milliseconds: number; bytes?: number }> =>
    JSON.parse((await runChild(commandOf("_probes/start.ts", args))).output);
  const times = async (args: readonly string[]) => {
    let last = await probe(args);
    const milliseconds: number[] = [];
    for (let run = 0; run < runs; run++) {
      last = await probe(args);
      milliseconds.push(last.milliseconds);
    }
    return { milliseconds: summarize(milliseconds), bytes: last.bytes };
  };
  const { milliseconds: importMilliseconds } = await times([]);
  const reports = await withTemporaryFolder(async (folder) => {
    const found: StartUp["reports"][number][] = [];
    for (const layers of LAYERS) {
      const { milliseconds, bytes } = await times([String(layers), join(folder, String(layers))]);
      found.push({ layers, milliseconds, bytes: bytes! });
    }
    return found;
  });
  return { importMilliseconds, reports };
}

export function startUpSection({ importMilliseconds, reports }: StartUp): Section {
  return tableOf(
    "Start-up and reports",
    [
      "Each in a fresh process with warm files, medians: the import of mod.ts without tables and charts; the report of a",
      "quantization with synthetic layers and histograms of their codes, from loading the libraries to the last file.",
    ],
    [
      { what: "import of mod.ts", milliseconds: importMilliseconds, bytes: null },
      ...reports.map(({ layers, ...times }) => ({ what: `report of ${layers} layers`, ...times })),
    ],
    [
      ["what", "", ({ what }) => what],
      ["milliseconds", "ms", ({ milliseconds }) => milliseconds.median, 0],
      ["spread", "±%", ({ milliseconds }) => spreadPercent(milliseconds), 1],
      ["megabytes", "MB of the page", ({ bytes }) => bytes === null ? null : bytes / 1e6, 2],
    ],
  );
}

export function startUpGoals({ importMilliseconds, reports }: StartUp): Goal[] {
  const { layers, milliseconds, bytes } = reports[0]!;
  return [
    {
      goal: "import of mod.ts without tables and charts",
      wanted: `< ${GOAL_IMPORT_MILLISECONDS} ms`,
      measured: `${importMilliseconds.median.toFixed(0)} ms`,
      met: importMilliseconds.median < GOAL_IMPORT_MILLISECONDS,
    },
    {
      goal: `report of ${layers} layers`,
      wanted: `< ${GOAL_REPORT_MILLISECONDS / 1000} s, < ${GOAL_REPORT_BYTES / 1e6} MB`,
      measured: `${(milliseconds.median / 1000).toFixed(2)} s, ${(bytes / 1e6).toFixed(2)} MB`,
      met: milliseconds.median < GOAL_REPORT_MILLISECONDS && bytes < GOAL_REPORT_BYTES,
    },
  ];
}
