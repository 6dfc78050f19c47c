/** Relative errors of our formats and ggml's on the same Gaussian weights, by bits per weight. */
import { dequantize, packedBytes, quantize } from "../../quant/mod.ts";
import { GGML_TYPES, type GgmlType } from "../ggml.ts";
import { COLS, type KernelBench, NO_GGML } from "./bench.ts";
import { type QuantizeSpec, relativeDifference, specName, TWO_LEVEL_SPECS, twoLevelName } from "./cases.ts";

const SOLVERS = [
  ["round", 32, "symmetric"],
  ["round", 32, "real"],
  ["round", 64, "real"],
  ["clip", 64, "real"],
  ["clip", 32, "symmetric"],
] as const;

/** Formats whose error should be no larger than that of a ggml format with as many bits per weight. */
const GOALS: readonly (readonly [name: string, type: GgmlType, bitsPerWeight: number])[] = [
  ["round 4 bits, g 32, symmetric", "q4_0", 4.5],
  ["round 8 bits, g 32, symmetric", "q8_0", 8.5],
  [twoLevelName(TWO_LEVEL_SPECS[0]), "q2_K", 2.625],
  [twoLevelName(TWO_LEVEL_SPECS[1]), "q4_K", 4.5],
];
const CLIP = "clip 2 bits, g 64, real", MAX_CLIP_ERROR = 0.357;

interface FormatError {
  readonly name: string;
  readonly library: "arrowquant" | "ggml";
  readonly bitsPerWeight: number;
  readonly error: number;
}

type OwnFormat = QuantizeSpec | (typeof TWO_LEVEL_SPECS)[number];

/** Quantizes the weights to every format and back, ours and, where it is there, ggml's. */
function formatErrors({ kernels, ggml }: KernelBench, weights: Float32Array, rows: number): FormatError[] {
  const count = weights.length;
  const own = (name: string, options: OwnFormat): FormatError => {
    const tensor = quantize(kernels, { data: weights, dtype: "F32" }, rows, COLS, options);
    const error = relativeDifference(dequantize(kernels, tensor), weights);
    const bytes = packedBytes({ rows, cols: COLS, zeroPoint: "real", ...options });
    return { name, library: "arrowquant", bitsPerWeight: (bytes - 16) * 8 / count, error };
  };
  const found = ([2, 3, 4, 8] as const).flatMap((bits) =>
    SOLVERS.map(([solver, groupSize, zeroPoint]) => {
      const spec = { solver, bits, groupSize, zeroPoint };
      return own(`${solver} ${specName(spec)}`, spec);
    })
  );
  found.push(...TWO_LEVEL_SPECS.map((spec) => own(twoLevelName(spec), spec)));
  if (ggml === undefined) return found;
  const packed = new Uint8Array(2 * count), restored = new Float32Array(count);
  for (const type of GGML_TYPES) {
    const bitsPerWeight = ggml.quantize(type, weights, packed, rows, COLS) * 8 / count;
    ggml.dequantizeRow(type, packed, restored, count);
    const error = relativeDifference(restored, weights);
    found.push({ name: `ggml ${type}`, library: "ggml", bitsPerWeight, error });
  }
  return found;
}

/** Adds the table of errors, its rows and its goals. */
export function measureErrors(bench: KernelBench): void {
  const rows = bench.scale.threadedRows, weights = bench.weights(rows);
  const { backend, isa, runtime, processor } = bench.context.environment;
  bench.context.progress(`Errors on ${weights.length} Gaussian weights`);
  const found = formatErrors(bench, weights, rows)
    .sort((a, b) => a.bitsPerWeight - b.bitsPerWeight || a.error - b.error);
  bench.sections.push({
    title: `Weight error on the same ${weights.length} Gaussian weights (relative RMS)`,
    notes: [
      "Weights without structure: the order of methods on a model can differ, and a model's accuracy is another matter.",
    ],
    columns: [
      { key: "name", title: "format" },
      { key: "bitsPerWeight", title: "bits/weight", digits: 4 },
      { key: "error", title: "relative RMS error", digits: 5 },
    ],
    rows: found.map((each) => ({ ...each })),
  });
  for (const { name, library, bitsPerWeight, error } of found) {
    bench.rows.push({
      suite: "kernels",
      group: "Weight error",
      kernel: name,
      ...{ library, backend, isa, shape: [rows, COLS], runtime, processor },
      bitsPerWeight,
      relativeRmsError: error,
    });
  }
  const errorOf = (name: string) => found.find((row) => row.name === name)?.error;
  for (const [name, type, bitsPerWeight] of GOALS) {
    const own = errorOf(name)!,
      other = errorOf(`ggml ${type}`),
      goal = `error of ${name} (${bitsPerWeight} b/w)`;
    bench.goals.push(
      other === undefined
        ? { goal, wanted: `≤ ${type}'s`, measured: null, met: null, reason: NO_GGML }
        : { goal, wanted: `≤ ${other.toFixed(5)} (${type})`, measured: own.toFixed(5), met: own <= other },
    );
  }
  const clip = errorOf(CLIP)!;
  bench.goals.push({
    goal: `error of ${CLIP}`,
    wanted: `≤ ${MAX_CLIP_ERROR}`,
    measured: clip.toFixed(4),
    met: clip <= MAX_CLIP_ERROR,
  });
}
