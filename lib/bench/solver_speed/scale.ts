/** Sizes of the solver-speed suite, and how what it solves is stored. */
import type { Kernels } from "../../native/mod.ts";
import type { SolverSettings } from "../../quant/solvers/settings.ts";
import type { LayerShape } from "../options.ts";
import type { BenchContext } from "../suite.ts";
import type { EffortShape } from "./effort.ts";

/** A layer whose kernels are measured: rows and columns, inputs, and how much of `best` is run. */
export interface MeasuredShape extends LayerShape {
  readonly tokens: number;
  readonly samples: number;
  readonly settings: Partial<SolverSettings>;
}

/** Sizes of the suite. */
export interface SolverSpeedScale {
  readonly shapes: readonly MeasuredShape[];
  /** Published models that are forecast. */
  readonly published: number;
  /** Width of the two-layer model that is quantized; undefined leaves it out. */
  readonly hidden: number | undefined;
  /** Keys of the configuration that make the sequences few and short that it writes, for tests. */
  readonly calibration?: Readonly<Record<string, number>>;
  /** Most models that are quantized beside it. */
  readonly models: number;
  /** Layer that is solved with more and more steps. */
  readonly effort: EffortShape;
  /** Width of the block that is solved from statistics. */
  readonly statistics: number;
}

/** Columns from which a layer is measured once, with fewer inputs. */
const WIDE = 8192;

/** One start and one round: the kernels' rates are those of all. */
const ONE_ROUND = { ratios: [], rounds: 1 };
export const FULL_SCALE: SolverSpeedScale = {
  shapes: [
    { rows: 3584, cols: 3584, tokens: 4096, samples: 3, settings: { ratios: [], rounds: 2 } },
    { rows: 3584, cols: 18_944, tokens: 1024, samples: 1, settings: ONE_ROUND },
  ],
  published: Infinity,
  hidden: 1792,
  models: Infinity,
  effort: { rows: 1024, cols: 2048, tokens: 4096 },
  statistics: 3072,
};
export const QUICK_SCALE: SolverSpeedScale = {
  shapes: [
    { rows: 1024, cols: 1024, tokens: 1024, samples: 3, settings: ONE_ROUND },
    { rows: 512, cols: 4736, tokens: 512, samples: 1, settings: ONE_ROUND },
  ],
  published: 0,
  hidden: undefined,
  models: 1,
  effort: { rows: 512, cols: 512, tokens: 1024 },
  statistics: 512,
};

/** Bits and groups of everything that is solved here. */
export const FORM = { bits: 2, groupSize: 64, zeroPoint: "real" } as const;
/** Layers that are measured in place of the suite's: fewer inputs and one sample where they are wide. */
export const shapesAsked = (shapes: readonly LayerShape[]): MeasuredShape[] =>
  shapes.map(({ rows, cols }) => ({
    rows,
    cols,
    ...(cols > WIDE ? { tokens: 1024, samples: 1 } : { tokens: 4096, samples: 3 }),
    settings: ONE_ROUND,
  }));

/** What a part of the suite runs with: kernels with the suite's threads. */
export interface PartRun {
  readonly context: BenchContext;
  readonly kernels: Kernels;
  readonly scale: SolverSpeedScale;
}

export const percent = (share: number) => `${(share * 100).toFixed(0)} %`;
