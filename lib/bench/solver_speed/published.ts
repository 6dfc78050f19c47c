/**
 * Forecasts of `best` for published models: those that `quantize.ts` prints before it begins, for checkpoints
 * of the same shapes without weights. What is forecast is not run.
 */
import { join } from "node:path";
import { resolveConfig } from "../../config/mod.ts";
import type { Effort } from "../../config/names.ts";
import { quantizeCheckpoint, type RunEvent } from "../../pipeline/mod.ts";
import { formatBytes } from "../../progress.ts";
import { commandsOf, runChild } from "../child_process.ts";
import { type Goal, type SuiteReport, tableOf } from "../suite.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";
import { FORM, type PartRun } from "./scale.ts";

/** A published model, by what makes a checkpoint of its shapes. */
interface PublishedModel {
  readonly name: string;
  readonly options: Readonly<Record<string, string | number>>;
  /** Minutes that are wanted, by effort. */
  readonly goals: Readonly<Partial<Record<Effort, number>>>;
  /** Most memory that is wanted. */
  readonly bytes: number | undefined;
}

const PUBLISHED: readonly PublishedModel[] = [
  {
    name: "Dream 7B",
    options: { layout: "dream", layers: 28, vocabulary: 152_064 },
    goals: { medium: 120, low: 40 },
    bytes: 12e9,
  },
  {
    name: "LLaDA 8B",
    options: { layout: "llada", layers: 32, vocabulary: 126_464 },
    goals: { medium: 120 },
    bytes: 12e9,
  },
  { name: "DiT-XL/2", options: { layout: "dit", layers: 28 }, goals: { medium: 12 }, bytes: undefined },
];

/** A forecast, beside what is wanted. */
export interface Forecast {
  readonly model: string;
  readonly effort: Effort;
  readonly minutes: number;
  readonly bytes: number;
  /** Its stages, with their minutes. */
  readonly stages: string;
  readonly goalMinutes: number;
  readonly goalBytes: number | undefined;
}

/** What a run says before it begins. */
interface Announced {
  readonly seconds: number;
  readonly bytes: number;
  readonly stages: readonly { readonly name: string; readonly seconds: number }[];
}

/** Thrown out of a run that has said how long it will take. */
class Announcement extends Error {
  constructor(readonly data: Announced) {
    super("the run is forecast");
  }
}

/** Starts a run and stops it at its forecast. @throws where it ends without one */
async function announced({ kernels }: PartRun, folder: string, effort: Effort, bytes: number | undefined) {
  const { config } = resolveConfig({
    overrides: {
      bit_width: FORM.bits,
      group_size: FORM.groupSize,
      solver: "best",
      num_threads: kernels.threads,
      "solver_options.effort": effort,
    },
  });
  const onEvent = ({ message, data }: RunEvent) => {
    if (message.startsWith("forecast: ")) throw new Announcement(data as unknown as Announced);
  };
  try {
    const output = join(folder, "..", "out");
    await quantizeCheckpoint({
      input: folder,
      output,
      config,
      kernels,
      maxMemoryBytes: bytes,
      force: true,
      onEvent,
    });
  } catch (error) {
    if (error instanceof Announcement) return error.data;
    throw error;
  }
  throw new Error(`Cannot forecast ${folder}: it must take some seconds, got less`);
}

/** Forecasts of all published models and efforts that have a goal. */
async function measure(run: PartRun): Promise<Forecast[]> {
  const { context, scale: { published } } = run, forecasts: Forecast[] = [];
  for (const { name, options, goals, bytes } of PUBLISHED.slice(0, published)) {
    await withTemporaryFolder(async (folder) => {
      const input = join(folder, "model"), args = Object.entries(options);
      const list = [...args.flatMap(([key, value]) => [`--${key}`, `${value}`]), "--headers-only"];
      await runChild(commandsOf(context)("make_checkpoint.ts", [input, ...list]));
      for (const [effort, goalMinutes] of Object.entries(goals) as [Effort, number][]) {
        context.progress(`forecast of ${name}, effort ${effort}`);
        const { seconds, stages, bytes: needed } = await announced(run, input, effort, bytes);
        const text = stages.map((stage) => `${stage.name} ${(stage.seconds / 60).toFixed(1)}`).join(", ");
        const own = { model: name, effort, minutes: seconds / 60, bytes: needed, stages: text };
        forecasts.push({ ...own, goalMinutes, goalBytes: bytes });
      }
    });
  }
  return forecasts;
}

/** Forecasts of published models, with goals of time and memory. */
export async function forecastPublished(run: PartRun): Promise<SuiteReport<Forecast>> {
  const forecasts = await measure(run), { context: { options: { quick } } } = run;
  const goals = PUBLISHED.flatMap(({ name, goals, bytes }) =>
    (Object.entries(goals) as [Effort, number][]).flatMap(([effort, goalMinutes]): Goal[] => {
      const own = forecasts.find((each) => each.model === name && each.effort === effort);
      const goal = `best, ${name}, effort ${effort} (forecast)`, wanted = `≤ ${goalMinutes} min`;
      const memory = `${goal.slice(0, -"(forecast)".length)}memory (forecast)`;
      const reason = `measured without ${quick ? "--quick" : "the limits of a test"}`;
      const unknown = { measured: null, met: null, reason };
      return [
        {
          goal,
          wanted,
          ...own === undefined
            ? unknown
            : { measured: `${own.minutes.toFixed(0)} min`, met: own.minutes <= goalMinutes },
        },
        ...(bytes === undefined ? [] : [{
          goal: memory,
          wanted: `≤ ${formatBytes(bytes)}`,
          ...own === undefined ? unknown : { measured: formatBytes(own.bytes), met: own.bytes <= bytes },
        }]),
      ];
    })
  );
  return { sections: [sectionOf(forecasts)], rows: forecasts, goals, skipped: [] };
}

const sectionOf = (forecasts: readonly Forecast[]) =>
  tableOf(
    "Forecast of best at published models' shapes: not run",
    [
      `What quantize.ts says before it begins: 2 bits, groups of ${FORM.groupSize}, on samples of its own, from reading to`,
      "writing; where memory has a goal, with --max-memory.",
    ],
    forecasts,
    [
      ["model", "model", ({ model }) => model],
      ["effort", "effort", ({ effort }) => effort],
      ["minutes", "minutes", ({ minutes }) => minutes, 1],
      ["goal", "goal", ({ goalMinutes }) => goalMinutes],
      ["memory", "memory", ({ bytes }) => formatBytes(bytes)],
      ["stages", "minutes by stage", ({ stages }) => stages],
    ],
  );
