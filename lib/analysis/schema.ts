/**
 * The tables that runs leave behind: their columns, units and keys, in one constant that validation, the
 * documentation and the report share. No library is loaded here.
 */

/** Kind of a column's values. Integers are safe; numbers may be NaN or infinite; every kind may be absent. */
export type ColumnType = "text" | "integer" | "number" | "boolean";

/** One column of a table. */
export interface ColumnSchema {
  readonly type: ColumnType;
  /** As on an axis; `1` is a plain ratio. Absent for text and booleans. */
  readonly unit?: string;
  /** Every row has a value. */
  readonly required?: true;
  /** Tables of earlier versions lack it: no row has a value then. */
  readonly isLater?: true;
  readonly doc: string;
}

/** One table. */
export interface TableSchema {
  readonly doc: string;
  /** Columns that together tell its rows apart; what two runs are joined on. */
  readonly key: readonly string[];
  readonly columns: Readonly<Record<string, ColumnSchema>>;
}

/** Version of the schemas below, stored with every table. */
export const TABLE_VERSION = 1;

const text = (doc: string) => ({ type: "text", doc }) as const;
const boolean = (doc: string) => ({ type: "boolean", doc }) as const;
const integer = (unit: string, doc: string) => ({ type: "integer", unit, doc }) as const;
const number = (unit: string, doc: string) => ({ type: "number", unit, doc }) as const;
const required = <Column extends ColumnSchema>(column: Column) => ({ ...column, required: true }) as const;
/** Both ends of the 95 % interval of a column. */
const interval = <Name extends string>(name: Name, unit: string) =>
  Object.fromEntries(["Low", "High"].map((end) => [name + end, number(unit, "interval")])) as {
    readonly [Key in `${Name}Low` | `${Name}High`]: ReturnType<typeof number>;
  };

const requiredText = (doc: string) => required(text(doc));

const MODEL = requiredText("name of the folder of the model");
const SETTING = requiredText("how it was quantized, as in `2 clip`; `full` is full precision");

/**
 * Every table by name.
 *
 * Ends in `Low` and `High`: the 95 % interval of the column without that ending, where the run measured one.
 */
export const TABLE_SCHEMAS = {
  layers: {
    doc: "One row for each tensor: its bits, its error and its size",
    key: ["model", "setting", "name"],
    columns: {
      model: MODEL,
      setting: SETTING,
      name: requiredText("original name of the tensor"),
      kind: requiredText(
        "`attention`, `feed-forward`, `embedding`, `modulation`, `norm`, `head` or `other`, from the name",
      ),
      action: requiredText(
        "`quantized`, `kept`, or `fallback`: more bits than asked for, to reach `min_accuracy`",
      ),
      reason: text("rule that kept it, or origin of its bits"),
      bits: integer("bits", "of a code; absent when kept"),
      groupSize: integer("weights", "weights that share a scale; 0 is a whole row"),
      weights: required(integer("weights", "number of weights")),
      bitsPerWeight: number("bits/weight", "stored bytes, scales and zero points included, · 8 / weights"),
      outputError: {
        ...number("1", "‖(W − Ŵ) x‖² / ‖W x‖², mean over calibration inputs; of solved layers"),
        isLater: true,
      },
      relativeRmsError: number("1", "root of Σ(w − ŵ)² / Σw²; absent when kept; does not rank solvers"),
      cosine: number("1", "of w and ŵ as vectors; absent when kept"),
      maxError: number("weight", "largest |w − ŵ|; absent when kept"),
      bytesBefore: required(integer("bytes", "of the original tensor")),
      bytesAfter: required(integer("bytes", "of everything stored for it")),
      milliseconds: number(
        "ms",
        "to read, quantize, verify and write it; absent when an earlier run had done it",
      ),
    },
  },
  time: {
    doc:
      "One row for each layer (or the output of the model) and part of the time axis: errors, and time parameters θ",
    key: ["model", "setting", "layer", "stage", "tBegin"],
    columns: {
      model: MODEL,
      setting: SETTING,
      layer: text("absent: the output of the whole model"),
      timeGroup: integer("group", "index of the time group, where there are groups"),
      tUnit: requiredText("`timestep` or `mask ratio`"),
      tBegin: required(number("tUnit", "first timestep, or lower mask ratio")),
      tEnd: required(number("tUnit", "end, exclusive")),
      samples: integer("samples", "images or sequences measured"),
      relativeError: number("1", "‖ŷ − y‖² / ‖y‖² of the output against full precision"),
      ...interval("relativeError", "1"),
      kl: number("nats", "mean over masked positions of KL(full ‖ quantized)"),
      ...interval("kl", "nats"),
      stepKl: number(
        "nats",
        "KL of p(x_{t−1} | x_t), full ‖ quantized: mean at a masked position, or of an image",
      ),
      ...interval("stepKl", "nats"),
      stage: text("of θ: `before` or `after` boundary smoothing"),
      scale: number("activation", "θ: step of the activation codes"),
      zeroPoint: number("code", "θ: zero point of the activation codes"),
      activationLow: number("activation", "θ: smallest activation in the range"),
      activationHigh: number("activation", "θ: largest activation in the range"),
      gain: number("1", "θ: mean gain of the output correction"),
      bias: number("activation", "θ: root mean square bias of the output correction"),
    },
  },
  phases: {
    doc: "One row for each phase and task: full precision, the baseline, each phase and its rivals",
    key: ["model", "setting", "phase", "task"],
    columns: {
      model: MODEL,
      setting: SETTING,
      phase: requiredText(
        "`full`, `baseline`, `phase1`, `phase2`, `phase3_full`, or the name of an ablation",
      ),
      bits: integer("bits", "of a code; absent at full precision"),
      bitsPerWeight: number("bits/weight", "over all quantized tensors"),
      task: requiredText("`all` is all of them together"),
      samples: integer("samples", "prompts or images"),
      accuracy: number("1", "share of exact answers, or of recognized images"),
      ...interval("accuracy", "1"),
      delta: number("1", "paired difference of accuracy to the baseline"),
      ...interval("delta", "1"),
      stepKl: number(
        "nats",
        "on evaluation data: mean KL(full ‖ quantized) at a masked position, or mean ω_t ‖Δ prediction‖² of an image",
      ),
      ...interval("stepKl", "nats"),
      markovScore: number("1", "mean over layers; a diagnostic, not an objective"),
      seconds: number("s", "whole pipeline: calibrate, quantize, write"),
      overhead: number(
        "1",
        "time of the row divided by that of the baseline (rounding, static activations, no phase), minus 1",
      ),
      iterations: integer("iterations", "of the optimizer, all layers"),
      converged: boolean("the test of the optimizer was met in every layer"),
      layersKept: integer("layers", "that kept the result of the phase"),
      layersRejected: integer("layers", "whose result was rejected"),
      peakBytes: integer("bytes", "peak resident memory"),
    },
  },
  peers: {
    doc: "One row for each method and task, ours and others: accuracy and error at its bits per weight",
    key: ["model", "method", "task"],
    columns: {
      model: MODEL,
      method: requiredText("as in `2 clip` or `ggml q2_K`; `full` is full precision"),
      library: requiredText("`arrowquant`, `ggml`, or `re-implementation`"),
      bits: integer("bits", "of a code; absent at full precision"),
      bitsPerWeight: number("bits/weight", "absent at full precision"),
      task: text("`all` is all of them together; absent: no task was run"),
      samples: integer("samples", "prompts or images"),
      accuracy: number("1", "share of exact answers, or of recognized images"),
      ...interval("accuracy", "1"),
      kl: number("nats", "mean over masked positions of KL(full ‖ quantized)"),
      ...interval("kl", "nats"),
      relativeError: number("1", "‖ε̂ − ε‖² / ‖ε‖², mean over timesteps"),
      ...interval("relativeError", "1"),
      frechetDistance: number("1", "between the classifier features of generated and real images"),
      relativeRmsError: number("1", "of the weights: root of Σ(w − ŵ)² / Σw²"),
      seconds: number("s", "to quantize"),
    },
  },
  kernels: {
    doc:
      "One row for each kernel: its rate compared with memcpy, or the error of a format on the same weights",
    key: ["group", "kernel", "place", "isa", "threads"],
    columns: {
      group: requiredText("group of rows that were timed together"),
      kernel: requiredText("kernel or format"),
      library: text("`arrowquant`, `ggml` or `memcpy`"),
      backend: text("`native` or `wasm`"),
      isa: text("instruction set"),
      dtype: text("element types"),
      rows: integer("rows", "of the matrix"),
      cols: integer("columns", "of the matrix"),
      place: text("`in cache` or `from memory`"),
      threads: integer("threads", "of the call"),
      samples: integer("samples", "timed samples"),
      weightsPerSecond: number("weights/s", "median"),
      weightsPerSecondDeviation: number("weights/s", "median deviation from the median"),
      bytesPerSecond: number("bytes/s", "median; all arrays read and written, each once"),
      bytesPerSecondDeviation: number("bytes/s", "median deviation from the median"),
      timesMemcpy: number("× memcpy", "bytes per second divided by those of memcpy in the same run"),
      bitsPerWeight: number("bits/weight", "of a format"),
      relativeRmsError: number("1", "of a format on Gaussian weights"),
    },
  },
  samples: {
    doc: "One row for each sample: the same prompt or noise at each setting",
    key: ["model", "setting", "sample"],
    columns: {
      model: MODEL,
      setting: SETTING,
      sample: required(integer("index", "the same prompt or noise in every setting")),
      label: text("requested class, or task"),
      prompt: text("of a text sample"),
      expected: text("of a text sample"),
      answer: text("of a text sample"),
      isCorrect: boolean("exact answer, or recognized as its class"),
      image: text("PNG as a `data:image/png;base64,` URL, of an image sample"),
    },
  },
  drift: {
    doc: "One row for each step of a sampler: drift of a free-running trajectory from that of full precision",
    key: ["model", "setting", "step"],
    columns: {
      model: MODEL,
      setting: SETTING,
      step: required(integer("steps", "steps done")),
      relativeDistance: number("1", "‖x̂ − x‖² / ‖x‖², same noise"),
      ...interval("relativeDistance", "1"),
    },
  },
  losses: {
    doc: "One row for each iteration of an optimizer",
    key: ["model", "setting", "layer", "iteration"],
    columns: {
      model: MODEL,
      setting: SETTING,
      layer: text("absent: the whole model"),
      iteration: required(integer("iterations", "0 is before the first step")),
      total: number("loss", "objective: sum of the terms"),
      quantization: number("loss", "data term"),
      markov: number("loss", "Gauss-Markov term"),
      entropy: number("loss", "annealing term"),
      isAccepted: boolean("best so far"),
    },
  },
  codes: {
    doc: "One row for each code of a layer: how often it occurs",
    key: ["model", "setting", "layer", "code"],
    columns: {
      model: MODEL,
      setting: SETTING,
      layer: requiredText("original name of the tensor"),
      bits: required(integer("bits", "of a code")),
      code: required(integer("code", "0 … 2^bits − 1")),
      count: required(integer("weights", "counted weights with this code")),
    },
  },
} as const satisfies Readonly<Record<string, TableSchema>>;

/** Name of a table. */
export type TableName = keyof typeof TABLE_SCHEMAS;

/** Every table's name, in the order of {@linkcode TABLE_SCHEMAS}. */
export const TABLE_NAMES = Object.keys(TABLE_SCHEMAS) as readonly TableName[];

type Values = { text: string; integer: number; number: number; boolean: boolean };
type Columns<Name extends TableName> = (typeof TABLE_SCHEMAS)[Name]["columns"];
type ValueOf<Column> = Column extends { readonly type: infer Type extends ColumnType } ? Values[Type] : never;
type RequiredOf<Name extends TableName> = {
  [Key in keyof Columns<Name>]: Columns<Name>[Key] extends { readonly required: true } ? Key : never;
}[keyof Columns<Name>];

/** A row of a table as a plain object; what is not required may be absent. */
export type RowOf<Name extends TableName> =
  & { readonly [Key in RequiredOf<Name>]: ValueOf<Columns<Name>[Key]> }
  & {
    readonly [Key in Exclude<keyof Columns<Name>, RequiredOf<Name>>]?:
      | ValueOf<Columns<Name>[Key]>
      | null
      | undefined;
  };

/** The columns of a table, by name. */
export function columnsOf(name: TableName): Readonly<Record<string, ColumnSchema>> {
  return TABLE_SCHEMAS[name].columns;
}

/**
 * The schemas as Markdown, for the documentation.
 *
 * @example
 * ```ts
 * import { schemaMarkdown } from "./schema.ts";
 * console.log(schemaMarkdown().split("\n")[0]); // ### layers
 * ```
 */
export function schemaMarkdown(): string {
  return TABLE_NAMES.map((name) => {
    const { doc, key }: TableSchema = TABLE_SCHEMAS[name];
    const rows = Object.entries(columnsOf(name)).map(([column, { type, unit, required, doc }]) =>
      `| \`${column}\` | ${type}${required === true ? "" : "?"} | ${unit ?? ""} | ${
        doc.replaceAll("|", "\\|")
      } |`
    );
    return [
      `### ${name}`,
      "",
      `${doc}. Key: ${key.map((column) => `\`${column}\``).join(", ")}.`,
      "",
      "| column | type | unit | meaning |",
      "| --- | --- | --- | --- |",
      ...rows,
    ].join("\n");
  }).join("\n\n");
}
