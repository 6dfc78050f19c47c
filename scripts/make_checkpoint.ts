/** `make_checkpoint.ts OUT`: a synthetic sharded BF16 checkpoint in the layout of a published model. */
import { createCipheriv } from "node:crypto";
import { Buffer } from "node:buffer";
import { existsSync, mkdirSync, readdirSync, statSync, truncateSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { OutputError } from "../lib/errors.ts";
import { writeSyntheticStatistics } from "../lib/bench/solver_speed/synthetic_statistics.ts";
import { toBfloat16 } from "../lib/tensor/bfloat16.ts";
import { elementCount, SafetensorsWriter, type TensorSpec } from "../lib/tensor/mod.ts";
import {
  bytesOf,
  type Layout,
  layoutOf,
  LAYOUTS,
  PUBLISHED_HIDDEN,
  readTogether,
  smallestHead,
  tokenizerFiles,
} from "./_checkpoint/layouts.ts";
import { type Arguments, type Usage, UsageError } from "./_command/options.ts";
import { type Context, defineCommand, stopIfAsked } from "./_command/run.ts";
import { formatBytes } from "../lib/eval/table.ts";
import { print } from "./_command/text.ts";

const USAGE = {
  name: "make_checkpoint.ts",
  operands: "OUT",
  about:
    `Writes a checkpoint of seeded Gaussian BF16 weights into the new or empty folder OUT: names, shapes, shards and
configuration as a published model has them, at any size. It can be quantized and run; what it writes or draws means
nothing.`,
  options: {
    "--layout NAME": "dream (Dream 7B, the default), llada (LLaDA 8B), dit (DiT-XL/2) or flux (FLUX.1)",
    "--gigabytes X": "size to reach with whole layers (default 2)",
    "--layers N":
      "number of layers instead; one of flux is a block of two streams and two of one, 19 are the whole",
    "--hidden N": "width (default the published one; everything else keeps its proportions)",
    "--vocabulary N": "tokens of a language model (default 8192, scaled with the width)",
    "--tokenizer": "also a tokenizer.json, of the words w4, w5, … (language models)",
    "--shards N": "files (default one per gigabyte, at least 2)",
    "--seed N": "default 1",
    "--statistics FILE":
      "also synthetic statistics of what the layers read, .safetensors, to solve the checkpoint with --calibrate",
    "--moment-block N": "columns of a block of their second moments (default 1024)",
    "--headers-only":
      "leave holes in the files in place of weights, which read as 0: a model larger than the disk, to plan",
  },
} as const satisfies Usage;

/** Gaussian values come from a table of this many quantiles: enough for BF16's 8 bits of precision. */
const QUANTILES = 65536;
const BLOCK_ELEMENTS = 2 ** 21;
/** As collect_statistics.py writes them for large models. */
const MOMENT_BLOCK = 1024;

async function run(parsed: Arguments<typeof USAGE>, { signal }: Context): Promise<void> {
  const { flags, values } = parsed, [out] = parsed.operands("OUT");
  const gigabytes = parsed.number("gigabytes") ?? 2;
  if (gigabytes <= 0) throw new UsageError(`--gigabytes must be a number above 0, got "${values.gigabytes}"`);
  const name = parsed.oneOf("layout", LAYOUTS) ?? "dream";
  if ((name === "dit" || name === "flux") && (flags.tokenizer || values.vocabulary !== undefined)) {
    throw new UsageError("--tokenizer and --vocabulary are for language models");
  }
  const hidden = parsed.whole("hidden", 1) ?? PUBLISHED_HIDDEN[name];
  const layout = layoutOf(name, { hidden, vocabulary: parsed.whole("vocabulary", 1) });
  if (layout === undefined) {
    throw new UsageError(`--hidden must be a multiple of ${smallestHead(name)}, got ${hidden}`);
  }
  const ends = bytesOf(layout.around.flat());
  const layerBytes = bytesOf(layout.layer(0));
  const layers = parsed.whole("layers", 1) ?? Math.max(1, Math.round((gigabytes * 1e9 - ends) / layerBytes));
  const total = ends + layers * layerBytes;
  const shards = parsed.whole("shards", 1) ?? Math.max(2, Math.ceil(total / 1e9));
  const files = layout.files(layers);
  const tokens = flags.tokenizer ? (files["config.json"] as { vocab_size: number }).vocab_size : undefined;
  const block = parsed.whole("moment-block", 1) ?? MOMENT_BLOCK, { statistics } = values;
  if (statistics !== undefined) checkStatistics(statistics);
  const random = flags["headers-only"] ? undefined : randomBytes(parsed.whole("seed", 1) ?? 1);
  const tensors = tensorsOf(layout, layers);
  await makeCheckpoint(out, layout.stem, tensors, shards, signal, random, {
    ...files,
    ...(tokens === undefined ? {} : tokenizerFiles(tokens)),
  });
  print(`${out}: ${layers} layers, ${formatBytes(total)} in ${shards} files`);
  if (statistics === undefined) return;
  const inputs = readTogether(tensors).map((specs) => ({
    cols: specs[0]!.shape[1]!,
    matrices: specs.map(({ name, shape }) => [name, shape[0]!] as const),
  }));
  mkdirSync(dirname(statistics), { recursive: true });
  writeSyntheticStatistics(statistics, inputs, block);
  print(`${statistics}: ${inputs.length} inputs, ${formatBytes(statSync(statistics).size)}`);
}

/** @throws {UsageError | OutputError} unless statistics can be written there */
function checkStatistics(path: string): void {
  if (!path.endsWith(".safetensors")) {
    throw new UsageError(`--statistics must end in .safetensors, got "${path}"`);
  }
  if (existsSync(path)) {
    throw new OutputError(`Cannot write "${path}": it must not exist, got a file`, { path });
  }
}

const tensorsOf = ({ around: [before, after], layer }: Layout, layers: number): TensorSpec[] => [
  ...before,
  ...Array.from({ length: layers }, (_, index) => layer(index)).flat(),
  ...after,
];

async function makeCheckpoint(
  out: string,
  stem: Layout["stem"],
  tensors: readonly TensorSpec[],
  shards: number,
  signal: AbortSignal,
  random: ((bytes: number) => Uint8Array) | undefined,
  files: Readonly<Record<string, unknown>>,
): Promise<void> {
  mkdirSync(out, { recursive: true });
  if (readdirSync(out).length > 0) {
    throw new OutputError(`Cannot write "${out}": must be empty, got other files`, { path: out });
  }
  const total = bytesOf(tensors);
  const parts: TensorSpec[][] = Array.from({ length: shards }, () => []);
  let bytes = 0;
  for (const tensor of tensors) {
    parts[Math.min(shards - 1, Math.floor(bytes / total * shards))]!.push(tensor);
    bytes += bytesOf([tensor]);
  }
  const weightMap: Record<string, string> = {};
  for (const [i, specs] of parts.entries()) {
    const digits = (n: number) => String(n).padStart(5, "0");
    const name = `${stem}-${digits(i + 1)}-of-${digits(shards)}.safetensors`;
    const metadata = { format: "pt" };
    for (const spec of specs) weightMap[spec.name] = name;
    if (random === undefined) {
      writeHoles(join(out, name), specs, metadata);
      continue;
    }
    using writer = SafetensorsWriter.create(join(out, name), {
      reservedHeaderBytes: SafetensorsWriter.headerBytes(specs, metadata),
      metadata,
    });
    writer.add(specs);
    for (const spec of specs) {
      await stopIfAsked(signal);
      writeGaussian(writer, spec, random);
    }
    writer.finish();
  }
  const index = { metadata: { total_size: total }, weight_map: weightMap };
  for (
    const [name, content] of Object.entries({ ...files, [`${stem}.safetensors.index.json`]: index })
  ) {
    writeFileSync(join(out, name), `${JSON.stringify(content, null, 2)}\n`);
  }
}

/** A safetensors file whose weights are a hole. */
function writeHoles(
  path: string,
  specs: readonly TensorSpec[],
  metadata: Readonly<Record<string, string>>,
): void {
  let end = 0;
  const entries = specs.map(({ name, dtype, shape }) => {
    const begin = end;
    end += bytesOf([{ name, dtype, shape }]);
    return [name, { dtype, shape, data_offsets: [begin, end] }];
  });
  const header = new TextEncoder().encode(
    JSON.stringify({ __metadata__: metadata, ...Object.fromEntries(entries) }),
  );
  const length = new DataView(new ArrayBuffer(8));
  length.setBigUint64(0, BigInt(header.length), true);
  writeFileSync(path, Buffer.concat([new Uint8Array(length.buffer), header]));
  truncateSync(path, 8 + header.length + end);
}

/** Seeded random bytes: the key stream of AES in counter mode, faster than any loop here. */
function randomBytes(seed: number): (bytes: number) => Uint8Array {
  const key = new Uint8Array(16);
  new DataView(key.buffer).setFloat64(0, seed, true);
  const cipher = createCipheriv("aes-128-ctr", key, new Uint8Array(16));
  const zeros = new Uint8Array(BLOCK_ELEMENTS * 2);
  return (bytes) => cipher.update(zeros.subarray(0, bytes));
}

/** Norm weights are 1; everything else is Gaussian, matrices scaled by their inputs. */
function writeGaussian(
  writer: SafetensorsWriter,
  { name, shape }: TensorSpec,
  random: (bytes: number) => Uint8Array,
): void {
  const elements = elementCount(shape)!;
  const deviation = shape.length > 1 ? 1 / Math.sqrt(elements / shape[0]!) : 0.02;
  const isNorm = shape.length === 1 && /(norm(_\w+)?|ln_f)\.weight$/.test(name);
  const table = isNorm ? new Uint16Array(QUANTILES).fill(0x3f80) : gaussianTable(deviation);
  const block = new Uint16Array(Math.min(BLOCK_ELEMENTS, elements));
  for (let begin = 0; begin < elements; begin += block.length) {
    const count = Math.min(block.length, elements - begin);
    const bytes = random(count * 2);
    const indices = new Uint16Array(bytes.buffer, bytes.byteOffset, count);
    for (let i = 0; i < count; i++) block[i] = table[indices[i]!]!;
    writer.write(name, begin * 2, new Uint8Array(block.buffer, 0, count * 2));
  }
}

let quantiles: Float64Array | undefined;

/** BF16 bits of the normal distribution's quantiles. */
function gaussianTable(deviation: number): Uint16Array {
  quantiles ??= Float64Array.from({ length: QUANTILES }, (_, i) => normalQuantile((i + 0.5) / QUANTILES));
  return toBfloat16(Float32Array.from(quantiles, (value) => value * deviation));
}

/** Acklam's rational approximation of the inverse normal distribution, relative error below 1.2e-9. */
function normalQuantile(p: number): number {
  if (p > 0.5) return -normalQuantile(1 - p);
  if (p < 0.02425) {
    const q = Math.sqrt(-2 * Math.log(p));
    return (((((-7.784894002430293e-3 * q - 0.3223964580411365) * q - 2.400758277161838) * q -
              2.549732539343734) *
            q + 4.374664141464968) * q + 2.938163982698783) /
      ((((7.784695709041462e-3 * q + 0.3224671290700398) * q + 2.445134137142996) * q + 3.754408661907416) *
          q + 1);
  }
  const q = p - 0.5;
  const r = q * q;
  return (((((-39.69683028665376 * r + 220.9460984245205) * r - 275.9285104469687) * r + 138.3577518672690) *
          r -
        30.66479806614716) * r + 2.506628277459239) *
    q /
    (((((-54.47609879822406 * r + 161.5858368580409) * r - 155.6989798598866) * r + 66.80131188771972) * r -
          13.28068155288572) * r + 1);
}

export const main = defineCommand(USAGE, run);
if (import.meta.main) await main();
