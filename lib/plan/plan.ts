/**
 * The plan of each tensor of a checkpoint, decided from names, shapes and the configuration before a
 * weight is read. The rules are data: `--dry-run` and docs/format.md print them.
 */
import { allPackedNames, packedNames } from "../quant/packed/entries.ts";
import {
  compilePattern,
  type Config,
  gridFor,
  isSensitiveLayer,
  type LayerBits,
  layerBitWidth,
  layerType,
  storedScales,
  TARGETS,
} from "../config/mod.ts";
import {
  type BitWidth,
  CODED_SCALE_BITS,
  type GroupSize,
  matrixSizes,
  MAX_MOMENT_COLS,
  MAX_ROW_WEIGHTS,
  OFFSET_BITS,
  packedBytes,
  type ScaleBits,
  type WeightFormat,
  type ZeroPointKind,
} from "../quant/mod.ts";
import { type Codes, ROTATED_SCALE_BITS, TRELLIS_BITS } from "../config/names.ts";
import { rotationBlock } from "../quant/rotation.ts";
import { CheckpointError } from "../errors.ts";
import { quote } from "../files/positional.ts";
import type { BitPlan } from "./budget.ts";
import {
  concerns,
  keptByName,
  leastBits,
  type RuleContext,
  ruleContext,
  type RuleName,
  tableBits,
} from "./rules.ts";
import {
  type Checkpoint,
  type CheckpointTensor,
  type Dtype,
  isFloatDtype,
  MAX_NAME_LENGTH,
  type TensorInfo,
} from "../tensor/mod.ts";

/** The plan of one tensor. */
export interface PlanRow {
  readonly name: string;
  /** Shard that holds it, before and after. */
  readonly file: string;
  readonly shape: readonly number[];
  readonly dtype: Dtype;
  readonly action: "quantize" | "keep";
  /** The rule of `KEEP_RULES` that keeps it, or where its bits come from. */
  readonly reason: string;
  /** These three are undefined when kept. */
  readonly bits: BitWidth | undefined;
  readonly groupSize: GroupSize | undefined;
  readonly zeroPoint: ZeroPointKind | undefined;
  /** Bits of the sub-codes of two-level scales; undefined with plain ones. */
  readonly scaleBits: ScaleBits | undefined;
  /** `trellis`, or undefined: uniform. */
  readonly codes?: Codes | undefined;
  /** Type of the target that stores it; undefined without a target. */
  readonly type?: string | undefined;
  /** Why that is another one than its bits would have. */
  readonly fallback?: string | undefined;
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
  /** Name of the model's family; undefined where it is not known. */
  readonly family?: string | undefined;
}

/**
 * Decides what happens to each tensor.
 *
 * A tensor's own name in `layer_bit_widths` or in a bit plan also quantizes an embedding, a head or a
 * sensitive layer; a pattern does not, with a warning. A bit plan wins over `layer_bit_widths`, except where
 * that keeps a tensor.
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
  const names = [...checkpoint.tensors.keys()], context = ruleContext(names, checkpoint.config, config);
  const decide = rowPlanner(context, bitPlan);
  const rows = checkpoint.files.flatMap(({ name, file }) =>
    [...file.tensors.values()].map((info) => decide(info, name))
  );
  return {
    rows,
    family: context.family?.name,
    warnings: [
      ...nothingQuantized(rows),
      ...withoutTrellis(rows, config),
      ...ofUnknownFamily(rows, context),
      ...fallbacks(rows),
      ...unmatched(names, config),
      ...overruled(rows, config),
    ],
  };
}

/** Whether a row is a token table with separate bits, which is quantized by its weights alone. */
export const isTokenTable = ({ reason }: Pick<PlanRow, "reason">): boolean =>
  reason === "embedding_bits" || reason === "head_bits";

/** Group size of token tables where layers have two-level scales. */
const TABLE_GROUP_SIZE: GroupSize = 64;

const NOT_PACKED = {
  bits: undefined,
  groupSize: undefined,
  zeroPoint: undefined,
  scaleBits: undefined,
};

/** The form of a row, and where its bits come from. */
type RowForm = Pick<PlanRow, "reason" | "type" | "fallback" | keyof typeof NOT_PACKED>;

/** The form in which the target's files store a matrix exactly; without a target, as it is. */
function fitTarget({ name, shape }: TensorInfo, form: RowForm, config: Config): RowForm {
  const target = config.target === null ? undefined : TARGETS[config.target];
  const { bits, reason } = form, own = target && layerType(config, name), cols = shape.at(-1)!;
  if (target === undefined || (bits === undefined && own === undefined)) return form;
  // No other program's files hold experts in one tensor.
  if (shape.length === 3) return { reason: "target", ...NOT_PACKED };
  if (target.keepsTables && own === undefined && isTokenTable(form)) {
    return { reason: "target", ...NOT_PACKED };
  }
  const asked = own ?? (reason === "bit_width" ? config.targetType : undefined) ?? target.types[bits!];
  if (asked === undefined) {
    throw new RangeError(`Cannot plan ${quote(name)}: ${config.target} has no type of ${bits} bits`);
  }
  const grid = gridFor(asked, cols, config.groupSize), why = `rows of ${cols} weights`;
  if (grid === undefined) {
    return { reason: "target", ...NOT_PACKED, fallback: `${why}: kept, ${asked} cannot hold them` };
  }
  const { type, groupSize, zeroPoint, scaleBits } = grid;
  return {
    reason: bits === undefined ? "layer_types" : reason,
    ...{ bits: grid.bits, groupSize, zeroPoint, scaleBits, type },
    fallback: type !== asked
      ? `${why}: ${type} in place of ${asked}`
      : groupSize < config.groupSize && cols % config.groupSize !== 0
      ? `${why}: groups of ${groupSize} in place of ${config.groupSize}`
      : undefined,
  };
}

/** Warnings of matrices whose rows rule out the type that they would have. */
const fallbacks = (rows: readonly PlanRow[]): string[] =>
  [...Map.groupBy(rows, ({ fallback }) => fallback)].flatMap(([why, { length, 0: first }]) =>
    why === undefined
      ? []
      : [`target: ${length} ${length === 1 ? "tensor" : "tensors"} with ${why}, as ${quote(first!.name)}`]
  );

function rowPlanner(context: RuleContext, bitPlan?: BitPlan): (info: TensorInfo, file: string) => PlanRow {
  const { config } = context, keepPatterns = config.keepPatterns.map(compilePattern);

  const keptBy = ({ name, shape, dtype }: TensorInfo): RuleName | undefined => {
    if (!isFloatDtype(dtype)) return "not floating";
    const isStack = shape.length === 3 && concerns("experts", name);
    if (shape.length !== 2 && !isStack) return "not a matrix";
    if (shape.includes(0)) return "empty";
    if (!name.endsWith(".weight") && !isStack) return "not named .weight";
    if (keepPatterns.some((pattern) => pattern.test(name))) return "keep_patterns";
    return layerBitWidth(config, name) === 16 ? "layer_bit_widths 16" : undefined;
  };

  const formOf = (info: TensorInfo): RowForm => {
    const { name } = info, { groupSize } = config, { zeroPoint, scaleBits } = storedScales(config);
    const form = { groupSize, zeroPoint }, planned = bitPlan?.get(name);
    if (planned !== undefined) return { reason: "bit_plan", ...planned, scaleBits };
    const asked = layerBitWidth(config, name) as BitWidth | undefined;
    if (ownBits(config, name) === undefined) {
      const table = tableBits(info, context);
      // Codes of 8 bits gain nothing from two levels of scales.
      const isOffset = scaleBits === OFFSET_BITS;
      const own = scaleBits === undefined || isOffset
        ? { ...form, scaleBits }
        : { ...form, groupSize: TABLE_GROUP_SIZE, scaleBits: undefined };
      if (table !== undefined) return { reason: table.rule, bits: table.bits, ...own };
      const rule = keptByName(info, context, isSensitiveLayer(config, name));
      if (rule !== undefined) return { reason: rule, ...NOT_PACKED };
      const least = asked === undefined ? leastBits(name, config.bitWidth) : undefined;
      if (least !== undefined) return { reason: least.rule, bits: least.bits, ...form, scaleBits };
    }
    const reason = asked === undefined ? "bit_width" : "layer_bit_widths";
    return { reason, bits: asked ?? config.bitWidth, ...form, scaleBits };
  };

  return (info, file) => {
    const { name, shape, dtype, byteLength } = info, kept = keptBy(info);
    const own = kept === undefined ? fitTarget(info, formOf(info), config) : { reason: kept, ...NOT_PACKED };
    // Tables of tokens are not searched for.
    const form = isTokenTable(own) ? own : { ...own, ...codesOf(own, shape, config) };
    const { bits, groupSize, zeroPoint, scaleBits } = form, sizes = matrixSizes(shape);
    const common = { name, file, shape, dtype, bytesBefore: byteLength };
    if (bits === undefined) return { ...common, action: "keep", ...form, bytesAfter: byteLength };
    const packed = { ...sizes, bits, groupSize: groupSize!, zeroPoint: zeroPoint!, scaleBits };
    return { ...common, action: "quantize", ...form, bytesAfter: packedBytes(packed) };
  };
}

/**
 * Codes that the configuration asks for, where a form of a layer's rows of `cols` weights can have them: of
 * few bits, with a zero point that is stored, in whose place an offset stands. Matrices of experts share no
 * scales, so a stack of them has half floats. So has what is not worth a rotation: rows for which two half
 * floats are next to nothing, and sides without a power of two over which it could spread anything.
 */
export function codesOf(
  { bits, zeroPoint }: Pick<RowForm, "bits" | "zeroPoint">,
  shape: readonly number[],
  { codes, scaleBits }: Pick<Config, "codes" | "scaleBits">,
): Pick<WeightFormat, "scaleBits" | "codes"> | undefined {
  const cols = shape.at(-1)!;
  const isSearched = bits !== undefined && TRELLIS_BITS.includes(bits) && cols <= MAX_MOMENT_COLS;
  return codes === "trellis" && isSearched && zeroPoint === "real"
    ? { scaleBits: getsFewerScales(scaleBits, shape) ? scaleBits : OFFSET_BITS, codes }
    : undefined;
}

/** Longest rows that are rotated: of more weights two half floats take less than 0.02 bits. */
const ROTATED_COLS = 1600;

/** Least columns of blocks of a rotation. */
const ROTATED_BLOCK = 32;

/** Whether a matrix has the scales of fewer than 16 bits that the configuration asks for. */
function getsFewerScales(scaleBits: number, shape: readonly number[]): scaleBits is 0 | 3 {
  if (shape.length !== 2) return false;
  if (scaleBits === CODED_SCALE_BITS) return true;
  return scaleBits === ROTATED_SCALE_BITS && shape[1]! <= ROTATED_COLS &&
    shape.every((side) => rotationBlock(side) >= ROTATED_BLOCK);
}

/** How a row that is quantized is packed. @param bits other ones than the plan's */
export const formatOf = (
  { bits, groupSize, zeroPoint, scaleBits, codes }: Partial<
    Pick<PlanRow, "bits" | "groupSize" | "zeroPoint" | "scaleBits" | "codes">
  >,
  own: BitWidth = bits!,
): WeightFormat => ({ bits: own, groupSize: groupSize!, zeroPoint: zeroPoint!, scaleBits, codes });

/** Bits by a tensor's own name in `layer_bit_widths`, which go before every rule by name. */
function ownBits({ layerBitWidths }: Config, name: string): LayerBits | undefined {
  const key = [name, name.replace(/\.weight$/, "")].find((key) => Object.hasOwn(layerBitWidths, key));
  return key === undefined ? undefined : layerBitWidths[key];
}

/** Warnings of patterns of `layer_bit_widths` that a rule by name goes before. */
function overruled(rows: readonly PlanRow[], config: Config): string[] {
  const byName = [
    "other model",
    "embedding",
    "norm",
    "head",
    "router",
    "router by shape",
    "embedder",
    "unknown family",
    "sensitive",
  ];
  return Object.keys(config.layerBitWidths).flatMap((text) => {
    const pattern = compilePattern(text);
    const met = rows.filter((row) =>
      (byName.includes(row.reason) || isTokenTable(row)) && pattern.test(row.name) &&
      ownBits(config, row.name) === undefined
    );
    return [...Map.groupBy(met, ({ reason }) => reason)].map(([rule, { length, 0: first }]) =>
      `layer_bit_widths: the pattern ${JSON.stringify(text)} does not change ${length} ${
        length === 1 ? "tensor" : "tensors"
      } of the rule "${rule}", as ${quote(first!.name)}: a tensor's full name does`
    );
  });
}

/** The warning of a model whose family is not known: what is kept of it and why. */
function ofUnknownFamily(rows: readonly PlanRow[], { family, hasBlocks }: RuleContext): string[] {
  if (family !== undefined || !rows.some(({ action }) => action === "quantize")) return [];
  const kept = rows.filter(({ reason }) => reason === "unknown family"), [first] = kept;
  const what = first !== undefined
    ? `${kept.length} ${kept.length === 1 ? "matrix" : "matrices"} outside its numbered blocks ${
      kept.length === 1 ? "is" : "are"
    } kept, as ${quote(first.name)}; a tensor's full name in layer_bit_widths quantizes it`
    : `${
      hasBlocks ? "" : "its names have no numbered blocks, and "
    }only the rules by name choose what is kept; --dry-run shows it`;
  return [`the family is not known by names or config.json: ${what}`];
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

/** The warning of trellis codes that no layer has. */
function withoutTrellis(rows: readonly PlanRow[], { codes }: Pick<Config, "codes">): string[] {
  const quantized = rows.filter(({ action }) => action === "quantize");
  if (codes !== "trellis" || quantized.length === 0 || quantized.some((row) => row.codes === codes)) {
    return [];
  }
  return [`no layer has trellis codes, which are of ${TRELLIS_BITS.join(" or ")} bits: all are uniform`];
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
export function checkPlan({ rows }: Plan, { tensors, path: checkpoint }: Checkpoint): void {
  const remedy = "keep_patterns can keep such tensors as they are";
  for (const { name, action, shape, zeroPoint, scaleBits } of rows) {
    if (action === "keep") continue;
    const fail = (reason: string, { file: { path } }: CheckpointTensor) => {
      const message = `Cannot quantize ${quote(name)} of ${quote(checkpoint)}: ${reason}; ${remedy}`;
      return new CheckpointError(message, { path, tensor: name });
    };
    if (shape.at(-1)! > MAX_ROW_WEIGHTS) {
      throw fail(
        `a row must have at most ${MAX_ROW_WEIGHTS} weights, got ${shape.at(-1)}`,
        tensors.get(name)!,
      );
    }
    const parts = Object.values(
      packedNames(name, { zeroPoint: zeroPoint!, scaleBits }),
    ) as (string | undefined)[];
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
