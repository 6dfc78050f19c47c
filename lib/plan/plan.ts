/**
 * The plan of each tensor of a checkpoint, decided from names, shapes and the configuration before a
 * weight is read. The rules are data: `--dry-run` and docs/format.md print them.
 */
import { allPackedNames, packedNames } from "../quant/packed/entries.ts";
import {
  compilePattern,
  type Config,
  isSensitiveLayer,
  type LayerBits,
  layerBitWidth,
  type NamePattern,
} from "../config/mod.ts";
import {
  type BitWidth,
  type GroupSize,
  packedBytes,
  type ScaleBits,
  type ZeroPointKind,
} from "../quant/mod.ts";
import { CheckpointError } from "../errors.ts";
import { quote } from "../files/positional.ts";
import type { BitPlan } from "./budget.ts";
import {
  type Checkpoint,
  type CheckpointTensor,
  type Dtype,
  isFloatDtype,
  MAX_NAME_LENGTH,
  type TensorInfo,
} from "../tensor/mod.ts";

/** A reason to keep a tensor as it is; the first rule that holds wins. */
export interface KeepRule {
  readonly rule: string;
  /** Names it concerns; undefined when it looks at something else. */
  readonly pattern: string | undefined;
  readonly why: string;
}

/** Every rule, in the order in which they are tried. */
export const KEEP_RULES: readonly KeepRule[] = [
  {
    rule: "not floating",
    pattern: undefined,
    why: "integers and booleans are indices or masks, not weights",
  },
  {
    rule: "not a matrix",
    pattern: undefined,
    why:
      "biases, norms and other vectors are small and act on whole channels; convolutions have no rows to group",
  },
  { rule: "empty", pattern: undefined, why: "a dimension is 0: there is nothing to quantize" },
  { rule: "not named .weight", pattern: undefined, why: "tables and buffers are not a layer's weights" },
  { rule: "keep_patterns", pattern: undefined, why: "the configuration keeps it" },
  { rule: "layer_bit_widths 16", pattern: undefined, why: "the configuration asks for 16 bits" },
  {
    rule: "embedding",
    pattern: String
      .raw`(?:^|\.)(?:embed_tokens|tok_embeddings|wte|wpe|embedding_table|(?:word|token_type|position|pos)_embeddings?|pos_embed)(?:\.|$)|(?:^|\.)(?:(?:token_|patch_)?embeddings?|shared|embed_in|embed_positions)\.weight$`,
    why: "rows are looked up, not multiplied: an error is not averaged over a sum",
  },
  {
    rule: "norm",
    pattern: String.raw`(?:norm\d*|(?:^|\.)ln_\w+)\.weight$`,
    why: "scales whole channels; norm1.linear.weight of a DiT is a matrix and is not meant",
  },
  {
    rule: "head",
    pattern: String
      .raw`(?:^|\.)(?:lm_head|embed_out|score|classifier)\.weight$|^model\.transformer\.ff_out\.weight$|^proj_out(?:_2)?\.weight$|^(?:final_layer\.linear|head|output)\.weight$`,
    why: "its error goes into every output without another layer to absorb it",
  },
  {
    rule: "sensitive",
    pattern: String
      .raw`(?:^|\.)(?:timestep_embedder|time_embed(?:ding|der)?|t_embedder)\.|(?:^|\.)norm1\.linear\.weight$|(?:^|\.)norm_out\.linear\.weight$|adaLN_modulation|^proj_out_1\.weight$`,
    why:
      "only with skip_sensitive_layers: the configuration's sensitive layers, and those that turn the timestep " +
      "into every block's scales and shifts (timestep embedding, adaLN, final modulation)",
  },
];

type RuleName = (typeof KEEP_RULES)[number]["rule"];

/** The plan of one tensor. */
export interface PlanRow {
  readonly name: string;
  /** Shard that holds it, before and after. */
  readonly file: string;
  readonly shape: readonly number[];
  readonly dtype: Dtype;
  readonly action: "quantize" | "keep";
  /** The rule of {@linkcode KEEP_RULES} that keeps it, or where its bits come from. */
  readonly reason: string;
  /** These three are undefined when kept. */
  readonly bits: BitWidth | undefined;
  readonly groupSize: GroupSize | undefined;
  readonly zeroPoint: ZeroPointKind | undefined;
  /** Bits of the sub-codes of two-level scales; undefined with plain ones. */
  readonly scaleBits: ScaleBits | undefined;
  readonly bytesBefore: number;
  /** Stored bytes; `min_accuracy` may ask for more. */
  readonly bytesAfter: number;
}

/** The plan of a whole checkpoint. */
export interface Plan {
  /** One row a tensor, by file and place in the file. */
  readonly rows: readonly PlanRow[];
  /** Parts of the configuration that concern no tensor: probably misspelt. */
  readonly warnings: readonly string[];
}

/**
 * Decides what happens to each tensor.
 *
 * A tensor's own name in `layer_bit_widths` or in a bit plan also quantizes an embedding, a head or a
 * sensitive layer; a pattern does not. A bit plan wins over `layer_bit_widths`, except where that keeps a
 * tensor.
 *
 * @example
 * ```ts
 * import { DEFAULT_CONFIG } from "../config/mod.ts";
 * import { openCheckpoint } from "../tensor/mod.ts";
 * import { planQuantization } from "./plan.ts";
 * using checkpoint = openCheckpoint("tests/models/dream-mini");
 * for (const row of planQuantization(checkpoint, DEFAULT_CONFIG).rows) console.log(row.name, row.action, row.reason);
 * ```
 */
export function planQuantization(checkpoint: Checkpoint, config: Config, bitPlan?: BitPlan): Plan {
  const decide = rowPlanner(config, bitPlan);
  const rows = checkpoint.files.flatMap(({ name, file }) =>
    [...file.tensors.values()].map((info) => decide(info, name))
  );
  const warnings = unmatched([...checkpoint.tensors.keys()], config);
  return { rows, warnings: [...nothingQuantized(rows), ...warnings] };
}

/** Bits of the sub-codes that a configuration asks for; undefined for plain half floats. */
function scaleBitsOf({ scaleBits }: Config): ScaleBits | undefined {
  return scaleBits === 16 ? undefined : scaleBits;
}

const NOT_PACKED = {
  bits: undefined,
  groupSize: undefined,
  zeroPoint: undefined,
  scaleBits: undefined,
};

function rowPlanner(config: Config, bitPlan?: BitPlan): (info: TensorInfo, file: string) => PlanRow {
  const patterns = new Map<RuleName, NamePattern>(
    KEEP_RULES.flatMap(({ rule, pattern }) => pattern === undefined ? [] : [[rule, compilePattern(pattern)]]),
  );
  const matches = (rule: RuleName, name: string) => patterns.get(rule)!.test(name);
  const keepPatterns = config.keepPatterns.map(compilePattern);

  const keptBy = (info: TensorInfo, ownBits: LayerBits | undefined): RuleName | undefined => {
    const { name, shape, dtype } = info;
    if (!isFloatDtype(dtype)) return "not floating";
    if (shape.length !== 2) return "not a matrix";
    if (shape.includes(0)) return "empty";
    if (!name.endsWith(".weight")) return "not named .weight";
    if (keepPatterns.some((pattern) => pattern.test(name))) return "keep_patterns";
    if (layerBitWidth(config, name) === 16) return "layer_bit_widths 16";
    if (ownBits !== undefined || bitPlan?.has(name) === true) return undefined;
    for (const rule of ["embedding", "norm", "head"] as const) if (matches(rule, name)) return rule;
    const sensitive = config.skipSensitiveLayers &&
      (isSensitiveLayer(config, name) || matches("sensitive", name));
    return sensitive ? "sensitive" : undefined;
  };

  return (info, file) => {
    const { name, shape, dtype, byteLength } = info;
    const ownBits = [name, name.replace(/\.weight$/, "")]
      .filter((key) => Object.hasOwn(config.layerBitWidths, key))
      .map((key) => config.layerBitWidths[key])[0];
    const rule = keptBy(info, ownBits);
    const common = { name, file, shape, dtype, bytesBefore: byteLength };
    if (rule !== undefined) {
      return { ...common, action: "keep", reason: rule, ...NOT_PACKED, bytesAfter: byteLength };
    }
    const asked = layerBitWidth(config, name) as BitWidth | undefined;
    const planned = bitPlan?.get(name);
    const bits = planned?.bits ?? asked ?? config.bitWidth;
    const groupSize = planned?.groupSize ?? config.groupSize;
    const zeroPoint = planned?.zeroPoint ?? config.zeroPoint, scaleBits = scaleBitsOf(config);
    const [rows, cols] = shape as [number, number];
    return {
      ...common,
      action: "quantize",
      reason: planned !== undefined ? "bit_plan" : asked === undefined ? "bit_width" : "layer_bit_widths",
      bits,
      groupSize,
      zeroPoint,
      scaleBits,
      bytesAfter: packedBytes({ rows, cols, bits, groupSize, zeroPoint, scaleBits }),
    };
  };
}

/** The warning of a plan that keeps everything, with its most frequent reasons. */
function nothingQuantized(rows: readonly PlanRow[]): string[] {
  if (rows.some(({ action }) => action === "quantize")) return [];
  const reasons = [...Map.groupBy(rows, ({ reason }) => reason)].sort(([, a], [, b]) => b.length - a.length);
  const why = reasons.slice(0, 3).map(([reason, { length }]) => `${length} ${reason}`).join(", ");
  return [
    `nothing is quantized: every tensor is kept (${
      why === "" ? "there is none" : why
    }); --dry-run lists them`,
  ];
}

/** Warnings of names and patterns of the configuration that concern no tensor. */
function unmatched(names: readonly string[], config: Config): string[] {
  const isName = (text: string) => names.includes(text) || names.includes(`${text}.weight`);
  const isPattern = (text: string) => names.some((name) => compilePattern(text).test(name));
  const warn = (key: string, texts: readonly string[], found: (text: string) => boolean) =>
    texts.filter((text) => !found(text)).map((text) => `${key}: ${JSON.stringify(text)} concerns no tensor`);
  return [
    ...warn(
      "layer_bit_widths",
      Object.keys(config.layerBitWidths),
      (text) => isName(text) || isPattern(text),
    ),
    ...warn("keep_patterns", config.keepPatterns, isPattern),
    ...warn("sensitive_layer_names", config.sensitiveLayerNames, isName),
    ...warn("sensitive_layer_patterns", config.sensitiveLayerPatterns, isPattern),
  ];
}

/** Checks the names that packed tensors need. @throws {CheckpointError} when one is taken or too long */
export function checkPlan({ rows }: Plan, { tensors, path: checkpoint }: Checkpoint, config: Config): void {
  const { zeroPoint } = config, scaleBits = scaleBitsOf(config);
  const remedy = "keep_patterns can keep such tensors as they are";
  for (const { name, action } of rows) {
    if (action === "keep") continue;
    const fail = (reason: string, { file: { path } }: CheckpointTensor) => {
      const message = `Cannot quantize ${quote(name)} of ${quote(checkpoint)}: ${reason}; ${remedy}`;
      return new CheckpointError(message, { path, tensor: name });
    };
    const parts = Object.values(packedNames(name, { zeroPoint, scaleBits })) as (string | undefined)[];
    const most = MAX_NAME_LENGTH - Math.max(...parts.map((part) => part?.length ?? 0)) + name.length;
    if (name.length > most) {
      const wanted = `name must have at most ${most} characters, because the names of its parts are longer`;
      throw fail(`${wanted}, got ${name.length}`, tensors.get(name)!);
    }
    const taken = allPackedNames(name).find((part) => tensors.has(part));
    if (taken === undefined) continue;
    const got = `${quote(taken)} beside them, as quantized checkpoints have it`;
    throw fail(`weights must be plain, got ${got}`, tensors.get(taken)!);
  }
}
