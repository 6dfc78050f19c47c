/** `make_checkpoint.ts OUT`: a synthetic sharded BF16 checkpoint with Dream's layer shapes, for timing and memory. */
import { createCipheriv } from "node:crypto";
import { mkdirSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { OutputError } from "../lib/errors.ts";
import { elementCount, SafetensorsWriter, type TensorSpec } from "../lib/tensor/mod.ts";
import { EXIT_CODE_HELP, formatBytes, parseOptions, runCommand, usageError } from "./_terminal.ts";

const HELP = `Usage: make_checkpoint.ts OUT [options]

Writes a checkpoint of seeded Gaussian BF16 weights with the layer shapes of Dream 7B into the new or empty folder OUT.

  --gigabytes X    size to reach with whole layers (default 2)
  --layers N       number of layers instead
  --hidden N       width (default 3584; feed-forward, heads and vocabulary keep Dream's proportions)
  --shards N       files (default one per gigabyte, at least 2)
  --seed N         default 1
  --help

${EXIT_CODE_HELP}`;

/** Widths of Dream 7B in units of 1/3584 of its hidden size. */
const DREAM = { hidden: 3584, feedForward: 18944, vocabulary: 8192 };
/** Gaussian values come from a table of this many quantiles: enough for BF16's 8 bits of precision. */
const QUANTILES = 65536;
const BLOCK_ELEMENTS = 2 ** 21;

async function main(args: readonly string[]): Promise<void> {
  const { positionals, flags, values } = parseOptions(args, {
    help: HELP,
    boolean: ["help"],
    string: ["gigabytes", "layers", "hidden", "shards", "seed"],
  });
  if (flags.help) {
    console.log(HELP);
    return;
  }
  const [out] = positionals;
  if (out === undefined || positionals.length > 1) throw usageError("OUT is needed", HELP);
  const number = (name: keyof typeof values, fallback: number, isWhole = true): number => {
    const text = values[name];
    const value = text === undefined ? fallback : Number(text);
    if (value > 0 && Number.isFinite(value) && (!isWhole || Number.isInteger(value))) return value;
    throw usageError(`--${name} must be a ${isWhole ? "whole " : ""}number above 0, got "${text}"`, HELP);
  };
  const hidden = number("hidden", DREAM.hidden);
  // Dream's heads of 128, or smaller ones where the width does not hold whole pairs of them
  const headSize = [128, 64, 32, 16, 2].find((size) => hidden % size === 0);
  if (headSize === undefined) throw usageError(`--hidden must be even, got ${hidden}`, HELP);
  const heads = hidden / headSize;
  const keyValueHeads = [...Array(heads).keys()].map((n) => n + 1).filter((n) => heads % n === 0)
    .findLast((n) => n <= Math.max(1, heads / 7))!;
  const scaled = (width: number) => Math.max(16, Math.round(width * hidden / DREAM.hidden / 16) * 16);
  const sizes = {
    hidden,
    feedForward: scaled(DREAM.feedForward),
    keyValue: keyValueHeads * headSize,
    vocabulary: scaled(DREAM.vocabulary),
    heads,
    keyValueHeads,
  };
  const ends = bytesOf(tensorsAround(sizes).flat());
  const layerBytes = bytesOf(layerTensors(0, sizes));
  const layers = number(
    "layers",
    Math.max(1, Math.round((number("gigabytes", 2, false) * 1e9 - ends) / layerBytes)),
  );
  const total = ends + layers * layerBytes;
  const shards = number("shards", Math.max(2, Math.ceil(total / 1e9)));
  makeCheckpoint(out, sizes, layers, shards, number("seed", 1));
  console.log(`${out}: ${layers} layers, ${formatBytes(total)} in ${shards} files`);
  await Promise.resolve();
}

type Sizes = {
  readonly [name in keyof typeof DREAM | "keyValue" | "heads" | "keyValueHeads"]: number;
};

const bf16 = (name: string, ...shape: number[]): TensorSpec => ({ name, dtype: "BF16", shape });

const bytesOf = (specs: readonly TensorSpec[]): number =>
  specs.reduce((sum, { shape }) => sum + elementCount(shape)! * 2, 0);

/** Tensors before and after the layers. */
function tensorsAround({ hidden, vocabulary }: Sizes): [TensorSpec[], TensorSpec[]] {
  return [
    [bf16("model.embed_tokens.weight", vocabulary, hidden)],
    [bf16("model.norm.weight", hidden), bf16("lm_head.weight", vocabulary, hidden)],
  ];
}

function layerTensors(layer: number, { hidden, feedForward, keyValue }: Sizes): TensorSpec[] {
  const at = `model.layers.${layer}`;
  return [
    bf16(`${at}.self_attn.q_proj.weight`, hidden, hidden),
    bf16(`${at}.self_attn.q_proj.bias`, hidden),
    bf16(`${at}.self_attn.k_proj.weight`, keyValue, hidden),
    bf16(`${at}.self_attn.k_proj.bias`, keyValue),
    bf16(`${at}.self_attn.v_proj.weight`, keyValue, hidden),
    bf16(`${at}.self_attn.v_proj.bias`, keyValue),
    bf16(`${at}.self_attn.o_proj.weight`, hidden, hidden),
    bf16(`${at}.mlp.gate_proj.weight`, feedForward, hidden),
    bf16(`${at}.mlp.up_proj.weight`, feedForward, hidden),
    bf16(`${at}.mlp.down_proj.weight`, hidden, feedForward),
    bf16(`${at}.input_layernorm.weight`, hidden),
    bf16(`${at}.post_attention_layernorm.weight`, hidden),
  ];
}

function makeCheckpoint(out: string, sizes: Sizes, layers: number, shards: number, seed: number): void {
  mkdirSync(out, { recursive: true });
  if (readdirSync(out).length > 0) {
    throw new OutputError(`Cannot write "${out}": must be empty, got other files`, { path: out });
  }
  const [before, after] = tensorsAround(sizes);
  const tensors = [
    ...before,
    ...Array.from({ length: layers }, (_, layer) => layerTensors(layer, sizes)).flat(),
    ...after,
  ];
  const total = bytesOf(tensors);
  const parts: TensorSpec[][] = Array.from({ length: shards }, () => []);
  let bytes = 0;
  for (const tensor of tensors) {
    parts[Math.min(shards - 1, Math.floor(bytes / total * shards))]!.push(tensor);
    bytes += bytesOf([tensor]);
  }
  const random = randomBytes(seed);
  const weightMap: Record<string, string> = {};
  parts.forEach((specs, i) => {
    const digits = (n: number) => String(n).padStart(5, "0");
    const name = `model-${digits(i + 1)}-of-${digits(shards)}.safetensors`;
    const metadata = { format: "pt" };
    using writer = SafetensorsWriter.create(join(out, name), {
      reservedHeaderBytes: SafetensorsWriter.headerBytes(specs, metadata),
      metadata,
    });
    writer.add(specs);
    for (const spec of specs) {
      weightMap[spec.name] = name;
      writeGaussian(writer, spec, random);
    }
    writer.finish();
  });
  const config = {
    architectures: ["DreamModel"],
    model_type: "Dream",
    hidden_size: sizes.hidden,
    intermediate_size: sizes.feedForward,
    num_hidden_layers: layers,
    num_attention_heads: sizes.heads,
    num_key_value_heads: sizes.keyValueHeads,
    max_position_embeddings: 2048,
    vocab_size: sizes.vocabulary,
    pad_token_id: 0,
    mask_token_id: 1,
    bos_token_id: 2,
    eos_token_id: 3,
    rms_norm_eps: 1e-6,
    rope_theta: 1e6,
    tie_word_embeddings: false,
    torch_dtype: "bfloat16",
  };
  writeFileSync(join(out, "config.json"), `${JSON.stringify(config, null, 2)}\n`);
  const index = { metadata: { total_size: total }, weight_map: weightMap };
  writeFileSync(join(out, "model.safetensors.index.json"), `${JSON.stringify(index, null, 2)}\n`);
}

/** Seeded random bytes: the key stream of AES in counter mode, which processors make faster than any loop here. */
function randomBytes(seed: number): (bytes: number) => Uint8Array {
  const key = new Uint8Array(16);
  new DataView(key.buffer).setFloat64(0, seed, true);
  const cipher = createCipheriv("aes-128-ctr", key, new Uint8Array(16));
  const zeros = new Uint8Array(BLOCK_ELEMENTS * 2);
  return (bytes) => cipher.update(zeros.subarray(0, bytes));
}

/** Norm weights are 1; everything else is Gaussian, matrices scaled by their inputs as trained ones about are. */
function writeGaussian(
  writer: SafetensorsWriter,
  { name, shape }: TensorSpec,
  random: (bytes: number) => Uint8Array,
): void {
  const elements = elementCount(shape)!;
  const deviation = shape.length === 2 ? 1 / Math.sqrt(shape[1]!) : 0.02;
  const table = name.includes("norm") ? new Uint16Array(QUANTILES).fill(0x3f80) : gaussianTable(deviation);
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
  const bits = new Uint32Array(Float32Array.from(quantiles, (value) => value * deviation).buffer);
  return Uint16Array.from(bits, (value) => (value + 0x7fff + ((value >>> 16) & 1)) >>> 16);
}

/** Acklam's rational approximation of the inverse normal distribution function, relative error below 1.2e-9. */
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

if (import.meta.main) await runCommand(main);
