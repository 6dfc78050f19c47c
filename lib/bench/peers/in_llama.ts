/**
 * GGUF files side by side, all run by llama.cpp's own library: those of its quantizers with importance
 * weights from the same calibration data, and ours of the same types. Bits per weight are those of the whole
 * file.
 */
import { Buffer } from "node:buffer";
import { mkdtempSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { resolveConfig } from "../../config/mod.ts";
import { quantizeFor } from "../../interop/mod.ts";
import { ggufHeader, type GgufTensorInfo, padding } from "../../interop/gguf/container.ts";
import { languageModel } from "../../interop/gguf/language_model.ts";
import { ggufPieces, ggufRow } from "../../interop/gguf/tensors.ts";
import type { LoadedModel } from "../../models/mod.ts";
import { elementCount } from "../../tensor/mod.ts";
import type { Ggml, GgmlCodebookType, GgmlType } from "../ggml.ts";
import { type LlamaModel, openLlama } from "../steps/llama.ts";
import type { Goal } from "../suite.ts";
import { TEMPORARY_PREFIX } from "../temporary_folder.ts";
import type { Contender } from "./contender.ts";
import { importanceOf, SUPERBLOCK } from "./ggml_method.ts";
import { neededInputs } from "./method.ts";
import { KEPT_TABLES, type QuantizedModel, type Target } from "./quantized_model.ts";

/** Types of its quantizers, by the library's names, and of ours with their bits. */
const THEIRS: Readonly<Record<"Q2_K" | "IQ2_XS" | "IQ2_S" | "Q3_K" | "Q4_K", GgmlType | GgmlCodebookType>> = {
  ...{ Q2_K: "q2_K", IQ2_XS: "iq2_xs", IQ2_S: "iq2_s", Q3_K: "q3_K", Q4_K: "q4_K" },
};
const OURS = { Q2_K: 2, Q2_0: 2, Q3_K: 3, Q4_K: 4 } as const;

/** Its threads wait without sleeping, which takes forever beside other work; small models need one. */
const THREADS = 1;

const theirName = (type: string) => `llama.cpp: its ${type} + imatrix`;
const ourName = (type: string) => `llama.cpp: our ${type}, best`;

/** Ours beside theirs: their type, ours, and the most that our KL may be of theirs. */
const GOALS = [["Q2_K", "Q2_K", 0.25], ["Q3_K", "Q3_K", 0.25], ["Q4_K", "Q4_K", 0.5], [
  "IQ2_S",
  "Q2_0",
  1,
]] as const;

/** Goals of files that llama.cpp runs, from distances by the contenders' names. */
export function llamaGoals(name: string, distances: ReadonlyMap<string, number>): Goal[] {
  return GOALS.flatMap(([their, our, factor]): Goal[] => {
    const theirs = distances.get(theirName(their)), ours = distances.get(ourName(our));
    if (theirs === undefined || ours === undefined) return [];
    return [{
      goal: `${name}: KL of our ${our} beside llama.cpp's ${their} with importance weights, both run by it`,
      wanted: `at most ${factor} ×`,
      measured: `${(ours / theirs).toFixed(3)} × (${ours.toPrecision(3)} / ${theirs.toPrecision(3)})`,
      met: ours <= factor * theirs,
    }];
  });
}

/** A model whose forward pass is llama.cpp's on a file. */
function modelOf({ full }: Target, run: (ids: Int32Array) => Float32Array): LoadedModel {
  if (full.kind === "dit") throw new TypeError("Cannot run an image model in llama.cpp");
  const { vocabularySize } = full.model.config;
  const forward = (ids: Int32Array, batch: number, { rows }: { readonly rows?: Int32Array } = {}) => {
    const tokens = ids.length / batch, all = new Float32Array(ids.length * vocabularySize);
    for (let b = 0; b < batch; b++) {
      all.set(run(ids.subarray(b * tokens, (b + 1) * tokens)), b * tokens * vocabularySize);
    }
    if (rows === undefined) return all;
    const wanted = new Float32Array(rows.length * vocabularySize);
    rows.forEach((row, i) =>
      wanted.set(all.subarray(row * vocabularySize, (row + 1) * vocabularySize), i * vocabularySize)
    );
    return wanted;
  };
  const model = Object.create(full.model, { forward: { value: forward } }) as typeof full.model;
  return { ...full, model } as LoadedModel;
}

/** Writes the model with the layers' blocks by ggml's own quantizer, all else as it is stored. */
async function writeTheirs(
  ggml: Ggml,
  target: Target,
  type: keyof typeof THEIRS,
  path: string,
): Promise<void> {
  const { checkpoint, kernels, layers, inputsOf } = target, inputs = await inputsOf("by_role", layers);
  const tensors = checkpoint.files.flatMap(({ name: file, file: { tensors } }) =>
    [...tensors.values()].map(({ name, shape, dtype, byteLength: bytes }) => (
      { name, shape, dtype, file, layer: undefined, bytes }
    ))
  );
  const source = { checkpoint, tensors, kernels }, { metadata, entries } = languageModel(source);
  const quantizer = THEIRS[type], byName = new Map(layers.map((layer) => [layer.name, layer]));
  if (quantizer.startsWith("iq2")) ggml.prepare(quantizer as GgmlCodebookType);
  const parts = entries.map((entry): GgufTensorInfo & { readonly data: Uint8Array[] } => {
    const layer = byName.get(entry.sources[0]!.name);
    const row = ggufRow(source, entry, { allowRounding: false, types: [] });
    if (layer === undefined) {
      const data = [...ggufPieces(source, row)].map(({ bytes }) =>
        new Uint8Array(bytes.buffer, bytes.byteOffset, bytes.byteLength)
      );
      return { ...row, data };
    }
    const { rows, cols, weights } = layer, packed = new Uint8Array(weights.length * 2);
    const importance = importanceOf(neededInputs(type, inputs.get(layer.name)));
    const bytes = ggml.quantize(quantizer, weights, packed, rows, cols, importance);
    return { name: row.name, shape: row.shape, type, bytes, data: [packed.slice(0, bytes)] };
  });
  const pieces = parts.flatMap(({ data, bytes }) => [...data, new Uint8Array(padding(bytes))]);
  writeFileSync(path, Buffer.concat([ggufHeader(new Map(metadata), parts), ...pieces]));
}

/** Files of llama.cpp's and of ours as contenders; the reason where the model or this machine has none. */
export async function llamaContenders(ggml: Ggml, target: Target) {
  const { full, layers, path, kernels, keys, checkpoint } = target;
  if (full.kind !== "dream") return { reason: "only Dream is compared there" };
  if (layers.some(({ cols }) => cols % SUPERBLOCK !== 0)) {
    return { reason: `columns must be a multiple of ${SUPERBLOCK}` };
  }
  const folder = mkdtempSync(join(tmpdir(), `${TEMPORARY_PREFIX}${process.pid}-`));
  const llama = await openLlama(folder);
  const remove = () => rmSync(folder, { recursive: true, force: true });
  if ("reason" in llama) {
    remove();
    return llama;
  }
  const opened: LlamaModel[] = [], { vocabularySize } = full.model.config;
  const weights = [...checkpoint.tensors.values()].reduce(
    (sum, { info }) => sum + (elementCount(info.shape) ?? 0),
    0,
  );
  const measured = (file: string, begin: number): QuantizedModel => {
    const seconds = (performance.now() - begin) / 1000, storedBytes = statSync(file).size;
    const byTokens = new Map<number, LlamaModel>();
    const run = (ids: Int32Array) => {
      let model = byTokens.get(ids.length);
      if (model === undefined) {
        byTokens.set(ids.length, model = llama.open(file, ids.length, vocabularySize, THREADS));
        opened.push(model);
      }
      return model.run(Int32Array.from(ids));
    };
    const sizes = { weights, storedBytes, bitsPerWeight: storedBytes * 8 / weights, relativeRmsError: NaN };
    return { model: modelOf(target, run), ...sizes, seconds, notes: [] };
  };
  const common = { bits: undefined, groupSize: undefined };
  const contenders: Contender[] = [
    ...(Object.keys(THEIRS) as (keyof typeof THEIRS)[]).map((type): Contender => ({
      ...common,
      name: theirName(type),
      kind: "peer library",
      async quantize() {
        const file = join(folder, `theirs-${type}.gguf`), begin = performance.now();
        await writeTheirs(ggml, target, type, file);
        return measured(file, begin);
      },
    })),
    ...Object.entries(OURS).map(([type, bits]): Contender => ({
      ...common,
      name: ourName(type),
      kind: "ours",
      async quantize() {
        const output = join(folder, `ours-${type}.gguf`), begin = performance.now();
        const own = { bit_width: bits, target: "llama.cpp", target_type: type, solver: "best" };
        const { config } = resolveConfig({
          overrides: { ...KEPT_TABLES, ...keys, ...own, num_threads: kernels.threads },
        });
        await quantizeFor({ input: path, output, config, kernels });
        return measured(output, begin);
      },
    })),
  ];
  const close = () => {
    opened.forEach((model) => model.close());
    llama.close();
    remove();
  };
  return { contenders, close };
}
