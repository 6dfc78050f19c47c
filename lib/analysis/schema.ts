/**
 * The tables that runs leave behind: their columns, units and keys, in one constant that validation, the documentation
 * and the report share. No library is loaded here.
 */

/** What a column holds. Integers are safe integers; numbers may be NaN or infinite; every kind may be absent. */
export type ColumnType = "text" | "integer" | "number" | "boolean";

/** One column of a table. */
export interface ColumnSchema {
  readonly type: ColumnType;
  /** As on an axis; `1` is a plain ratio. Absent for text and booleans. */
  readonly unit?: string;
  /** Every row has a value. */
  readonly required?: true;
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

const MODEL = { type: "text", required: true, doc: "name of the model's folder" } as const;
const SETTING = {
  type: "text",
  required: true,
  doc: "how it was quantized, as in `2 clip`; `full` is full precision",
} as const;

/**
 * Every table by name.
 *
 * Ends in `Low` and `High`: the 95 % interval of the column without that ending, where the run measured one.
 */
export const TABLE_SCHEMAS = {
  layers: {
    doc: "One row a tensor: what became of it and what that cost",
    key: ["model", "setting", "name"],
    columns: {
      model: MODEL,
      setting: SETTING,
      name: { type: "text", required: true, doc: "the tensor's original name" },
      kind: {
        type: "text",
        required: true,
        doc:
          "`attention`, `feed-forward`, `embedding`, `modulation`, `norm`, `head` or `other`, read off the name",
      },
      action: {
        type: "text",
        required: true,
        doc:
          "`quantized`, `kept`, or `fallback`: more bits than asked for, because `min_accuracy` was missed",
      },
      reason: { type: "text", doc: "the rule that kept it, or where its bits came from" },
      bits: { type: "integer", unit: "bits", doc: "of a code; absent when kept" },
      groupSize: { type: "integer", unit: "weights", doc: "weights that share a scale; 0 is a whole row" },
      weights: { type: "integer", unit: "weights", required: true, doc: "number of weights" },
      bitsPerWeight: {
        type: "number",
        unit: "bits/weight",
        doc: "stored bytes, scales and zero points included, · 8 / weights",
      },
      relativeRmsError: { type: "number", unit: "1", doc: "root of Σ(w − ŵ)² / Σw²; absent when kept" },
      cosine: { type: "number", unit: "1", doc: "of w and ŵ as vectors; absent when kept" },
      maxError: { type: "number", unit: "weight", doc: "largest |w − ŵ|; absent when kept" },
      bytesBefore: { type: "integer", unit: "bytes", required: true, doc: "of the original tensor" },
      bytesAfter: { type: "integer", unit: "bytes", required: true, doc: "of all that is stored for it" },
      milliseconds: {
        type: "number",
        unit: "ms",
        doc: "to read, quantize, verify and write it; absent when an earlier run had done it",
      },
    },
  },
  time: {
    doc:
      "One row a layer (or the model's output) and stretch of the time axis: errors there, and time parameters θ",
    key: ["model", "setting", "layer", "stage", "tBegin"],
    columns: {
      model: MODEL,
      setting: SETTING,
      layer: { type: "text", doc: "absent: the output of the whole model" },
      timeGroup: { type: "integer", unit: "group", doc: "index of the time group, where there are groups" },
      tUnit: { type: "text", required: true, doc: "`timestep` or `mask ratio`" },
      tBegin: { type: "number", unit: "tUnit", required: true, doc: "first timestep, or lower mask ratio" },
      tEnd: { type: "number", unit: "tUnit", required: true, doc: "end, itself not inside" },
      samples: { type: "integer", unit: "samples", doc: "images or sequences measured there" },
      relativeError: {
        type: "number",
        unit: "1",
        doc: "‖ŷ − y‖² / ‖y‖² of the output against full precision",
      },
      relativeErrorLow: { type: "number", unit: "1", doc: "interval" },
      relativeErrorHigh: { type: "number", unit: "1", doc: "interval" },
      kl: { type: "number", unit: "nats", doc: "mean over masked positions of KL(full ‖ quantized)" },
      klLow: { type: "number", unit: "nats", doc: "interval" },
      klHigh: { type: "number", unit: "nats", doc: "interval" },
      stepKl: {
        type: "number",
        unit: "nats",
        doc: "of p(x_{t−1} | x_t), full against quantized: mean at a masked position, or of an image",
      },
      stepKlLow: { type: "number", unit: "nats", doc: "interval" },
      stepKlHigh: { type: "number", unit: "nats", doc: "interval" },
      stage: { type: "text", doc: "of θ: `before` or `after` boundary smoothing" },
      scale: { type: "number", unit: "activation", doc: "θ: step of the activation codes" },
      zeroPoint: { type: "number", unit: "code", doc: "θ: zero point of the activation codes" },
      activationLow: { type: "number", unit: "activation", doc: "θ: least activation that is represented" },
      activationHigh: {
        type: "number",
        unit: "activation",
        doc: "θ: largest activation that is represented",
      },
      gain: { type: "number", unit: "1", doc: "θ: mean gain of the output correction" },
      bias: { type: "number", unit: "activation", doc: "θ: root mean square bias of the output correction" },
    },
  },
  phases: {
    doc: "One row a phase and task: what each phase does beside full precision and the baseline",
    key: ["model", "setting", "phase", "task"],
    columns: {
      model: MODEL,
      setting: SETTING,
      phase: {
        type: "text",
        required: true,
        doc: "`full`, `baseline`, `phase1`, `phase2`, `phase3_full`, or an ablation's name",
      },
      bits: { type: "integer", unit: "bits", doc: "of a code; absent at full precision" },
      bitsPerWeight: { type: "number", unit: "bits/weight", doc: "over all quantized tensors" },
      task: { type: "text", required: true, doc: "`all` is all of them together" },
      samples: { type: "integer", unit: "samples", doc: "prompts or images" },
      accuracy: { type: "number", unit: "1", doc: "share of exact answers, or of recognized images" },
      accuracyLow: { type: "number", unit: "1", doc: "interval" },
      accuracyHigh: { type: "number", unit: "1", doc: "interval" },
      delta: { type: "number", unit: "1", doc: "paired difference of accuracy to the baseline" },
      deltaLow: { type: "number", unit: "1", doc: "interval" },
      deltaHigh: { type: "number", unit: "1", doc: "interval" },
      stepKl: {
        type: "number",
        unit: "nats",
        doc:
          "held-out: mean KL(full ‖ quantized) at a masked position, or mean ω_t ‖Δ prediction‖² of an image",
      },
      stepKlLow: { type: "number", unit: "nats", doc: "interval" },
      stepKlHigh: { type: "number", unit: "nats", doc: "interval" },
      markovScore: { type: "number", unit: "1", doc: "mean over layers; a diagnostic, not an objective" },
      seconds: { type: "number", unit: "s", doc: "whole pipeline: calibrate, quantize, write" },
      overhead: {
        type: "number",
        unit: "1",
        doc:
          "what the row adds to the time of the baseline - rounding, static activations, no phase - over that time",
      },
      iterations: { type: "integer", unit: "iterations", doc: "of the optimizer, all layers" },
      converged: { type: "boolean", doc: "the optimizer's test was met in every layer" },
      layersKept: { type: "integer", unit: "layers", doc: "that took what the phase proposed" },
      layersRejected: { type: "integer", unit: "layers", doc: "that kept what they had" },
      peakBytes: { type: "integer", unit: "bytes", doc: "most resident memory" },
    },
  },
  peers: {
    doc: "One row a method and task: accuracy and error at its bits per weight, ours and others'",
    key: ["model", "method", "task"],
    columns: {
      model: MODEL,
      method: {
        type: "text",
        required: true,
        doc: "as in `2 clip` or `ggml q2_K`; `full` is full precision",
      },
      library: { type: "text", required: true, doc: "`arrowquant`, `ggml`, or `re-implementation`" },
      bits: { type: "integer", unit: "bits", doc: "of a code; absent at full precision" },
      bitsPerWeight: { type: "number", unit: "bits/weight", doc: "absent at full precision" },
      task: { type: "text", doc: "`all` is all of them together; absent: nothing was solved or drawn" },
      samples: { type: "integer", unit: "samples", doc: "prompts or images" },
      accuracy: { type: "number", unit: "1", doc: "share of exact answers, or of recognized images" },
      accuracyLow: { type: "number", unit: "1", doc: "interval" },
      accuracyHigh: { type: "number", unit: "1", doc: "interval" },
      kl: { type: "number", unit: "nats", doc: "mean over masked positions of KL(full ‖ quantized)" },
      klLow: { type: "number", unit: "nats", doc: "interval" },
      klHigh: { type: "number", unit: "nats", doc: "interval" },
      relativeError: { type: "number", unit: "1", doc: "‖ε̂ − ε‖² / ‖ε‖², mean over timesteps" },
      relativeErrorLow: { type: "number", unit: "1", doc: "interval" },
      relativeErrorHigh: { type: "number", unit: "1", doc: "interval" },
      frechetDistance: { type: "number", unit: "1", doc: "of the classifier's features to real images'" },
      relativeRmsError: { type: "number", unit: "1", doc: "of the weights: root of Σ(w − ŵ)² / Σw²" },
      seconds: { type: "number", unit: "s", doc: "to quantize" },
    },
  },
  kernels: {
    doc: "One row a kernel: its rate beside memcpy's, or a format's error on the same weights",
    key: ["group", "kernel", "place", "isa", "threads"],
    columns: {
      group: { type: "text", required: true, doc: "rows of a group were timed together" },
      kernel: { type: "text", required: true, doc: "kernel or format" },
      library: { type: "text", doc: "`arrowquant`, `ggml` or `memcpy`" },
      backend: { type: "text", doc: "`native` or `wasm`" },
      isa: { type: "text", doc: "instruction set" },
      dtype: { type: "text", doc: "element types" },
      rows: { type: "integer", unit: "rows", doc: "of the matrix" },
      cols: { type: "integer", unit: "columns", doc: "of the matrix" },
      place: { type: "text", doc: "`in cache` or `from memory`" },
      threads: { type: "integer", unit: "threads", doc: "of the call" },
      samples: { type: "integer", unit: "samples", doc: "of the clock" },
      weightsPerSecond: { type: "number", unit: "weights/s", doc: "median" },
      weightsPerSecondDeviation: {
        type: "number",
        unit: "weights/s",
        doc: "median deviation from the median",
      },
      bytesPerSecond: {
        type: "number",
        unit: "bytes/s",
        doc: "median; all arrays read and written, each once",
      },
      bytesPerSecondDeviation: { type: "number", unit: "bytes/s", doc: "median deviation from the median" },
      timesMemcpy: {
        type: "number",
        unit: "× memcpy",
        doc: "bytes per second in units of memcpy's, same run",
      },
      bitsPerWeight: { type: "number", unit: "bits/weight", doc: "of a format" },
      relativeRmsError: { type: "number", unit: "1", doc: "of a format on Gaussian weights" },
    },
  },
  samples: {
    doc: "One row a sample: the same prompt or noise at each setting",
    key: ["model", "setting", "sample"],
    columns: {
      model: MODEL,
      setting: SETTING,
      sample: {
        type: "integer",
        unit: "index",
        required: true,
        doc: "the same prompt or noise in every setting",
      },
      label: { type: "text", doc: "class asked for, or task" },
      prompt: { type: "text", doc: "of a text sample" },
      expected: { type: "text", doc: "of a text sample" },
      answer: { type: "text", doc: "of a text sample" },
      isCorrect: { type: "boolean", doc: "exact answer, or recognized as its class" },
      image: { type: "text", doc: "PNG as a `data:image/png;base64,` URL, of an image sample" },
    },
  },
  drift: {
    doc: "One row a sampler's step: how far a free-running trajectory has drifted from full precision's",
    key: ["model", "setting", "step"],
    columns: {
      model: MODEL,
      setting: SETTING,
      step: { type: "integer", unit: "steps", required: true, doc: "steps done" },
      relativeDistance: { type: "number", unit: "1", doc: "‖x̂ − x‖² / ‖x‖², same noise" },
      relativeDistanceLow: { type: "number", unit: "1", doc: "interval" },
      relativeDistanceHigh: { type: "number", unit: "1", doc: "interval" },
    },
  },
  losses: {
    doc: "One row an iteration of an optimizer",
    key: ["model", "setting", "layer", "iteration"],
    columns: {
      model: MODEL,
      setting: SETTING,
      layer: { type: "text", doc: "absent: the whole model" },
      iteration: { type: "integer", unit: "iterations", required: true, doc: "0 is before the first step" },
      total: { type: "number", unit: "loss", doc: "what is minimised" },
      quantization: { type: "number", unit: "loss", doc: "data term" },
      markov: { type: "number", unit: "loss", doc: "Gauss-Markov term" },
      entropy: { type: "number", unit: "loss", doc: "annealing term" },
      isAccepted: { type: "boolean", doc: "best so far" },
    },
  },
  codes: {
    doc: "One row a code of a layer: how often it occurs",
    key: ["model", "setting", "layer", "code"],
    columns: {
      model: MODEL,
      setting: SETTING,
      layer: { type: "text", required: true, doc: "the tensor's original name" },
      bits: { type: "integer", unit: "bits", required: true, doc: "of a code" },
      code: { type: "integer", unit: "code", required: true, doc: "0 … 2^bits − 1" },
      count: {
        type: "integer",
        unit: "weights",
        required: true,
        doc: "weights with this code, among those counted",
      },
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
