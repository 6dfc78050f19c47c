/**
 * config.json of a quantized checkpoint: the `quantization_config` that others and we read, and putting it
 * into a JSON text, or taking it out, without touching any other character.
 */
import { type ConfigInForce, storedScales } from "../config/mod.ts";
import {
  CONFIG_KEY,
  FORMAT_VERSION,
  type PackedLayer,
  type PackedLayerEntry,
  type PackedSection,
  SECTION_KEY,
  TRELLIS_FORMAT_VERSION,
  TRELLIS_TABLE,
} from "../quant/packed/checkpoint.ts";
import { OFFSET_BITS } from "../quant/packed/layout.ts";
import type { FloatDtype } from "../tensor/mod.ts";
import type { LayerRecord } from "./record.ts";

/** A record, or what a plan says of it. */
type StoredLayer = Omit<LayerRecord, "sourceSha256">;

/** Version of compressed-tensors whose `pack-quantized` layout ours is. */
const COMPRESSED_TENSORS_VERSION = "0.17.0";

/**
 * The `quantization_config`. As compressed-tensors' `pack-quantized` where that can say it (symmetric or
 * integer zero points, whole groups, plain scales), so that vLLM and transformers load the result; otherwise
 * only as our own.
 */
export function quantizationConfig(
  layers: readonly StoredLayer[],
  config: ConfigInForce,
): Record<string, unknown> {
  const quantized = layers.filter(({ action }) => action === "quantize");
  const kind = storedScales(config).zeroPoint,
    hasTrellis = quantized.some(({ codes }) => codes === "trellis");
  const section: PackedSection = {
    format_version: hasTrellis ? TRELLIS_FORMAT_VERSION : FORMAT_VERSION,
    solver: config.solver,
    zero_point: kind,
    ...(hasTrellis ? { trellis_table: TRELLIS_TABLE } : {}),
    layers: Object.fromEntries(quantized.map((layer): [string, PackedLayerEntry] => [layer.name, {
      bits: layer.bits!,
      group_size: layer.groupSize!,
      zero_point: layer.zeroPoint === kind ? undefined : layer.zeroPoint,
      ...(layer.codes === "trellis" ? { codes: layer.codes } : {}),
      scale_bits: layer.codes === "trellis" && layer.scaleBits === OFFSET_BITS ? undefined : layer.scaleBits,
      dtype: layer.dtype as FloatDtype,
    }])),
  };
  const isExpressible = quantized.length > 0 && kind !== "real" &&
    quantized.every(({ shape, groupSize, scaleBits, zeroPoint, reason }) =>
      reason !== "embedding_bits" && shape.length === 2 && scaleBits === undefined && zeroPoint === kind &&
      (groupSize === 0 || shape[1]! % groupSize! === 0)
    );
  if (!isExpressible) return { quant_method: SECTION_KEY, [SECTION_KEY]: section };

  const linear = quantized.map(({ name, bits, groupSize }) => ({ name, bits: bits!, groupSize: groupSize! }));
  const ignore = layers.filter(isKeptLinear).map(({ name }) => moduleName(name));
  return { ...packQuantizedConfig(linear, kind === "symmetric", ignore), [SECTION_KEY]: section };
}

/** compressed-tensors' description of packed layers, a group a scheme. @param ignore other linear layers */
export function packQuantizedConfig(
  layers: readonly Pick<PackedLayer, "name" | "bits" | "groupSize">[],
  symmetric: boolean,
  ignore: readonly string[],
): Record<string, unknown> {
  const schemes = [...Map.groupBy(layers, ({ bits, groupSize }) => bits * 1000 + groupSize)]
    .sort(([a], [b]) => a - b);
  const groups = schemes.map(([, [first, ...others]], i) => [`group_${i}`, {
    targets: [first!, ...others].map(({ name }) => moduleName(name)),
    input_activations: null,
    output_activations: null,
    format: "pack-quantized",
    weights: {
      num_bits: first!.bits,
      type: "int",
      symmetric,
      ...(first!.groupSize === 0
        ? { strategy: "channel", group_size: null }
        : { strategy: "group", group_size: first!.groupSize }),
      dynamic: false,
      actorder: null,
      block_structure: null,
      observer: "minmax",
      observer_kwargs: {},
    },
  }]);
  return {
    quant_method: "compressed-tensors",
    format: "pack-quantized",
    quantization_status: "compressed",
    version: COMPRESSED_TENSORS_VERSION,
    global_compression_ratio: null,
    kv_cache_scheme: null,
    ignore,
    config_groups: Object.fromEntries(groups),
  };
}

/** Kept matrices that a loader takes for linear layers. */
function isKeptLinear({ action, reason, name, shape }: StoredLayer): boolean {
  return action === "keep" && shape.length === 2 && name.endsWith(".weight") &&
    !["embedding", "norm", "not floating"].includes(reason);
}

const moduleName = (tensor: string): string => tensor.replace(/\.weight$/, "");

/** Puts `quantization_config` into a JSON object's text, as {@linkcode withConfigKey} does. */
export const withQuantizationConfig = (original: string, value: unknown): string =>
  withConfigKey(original, CONFIG_KEY, value);

/**
 * Puts a key behind the last one of a JSON object's text, in place of one that is there (as `null`, which
 * some exporters write); every other character stays.
 */
export function withConfigKey(original: string, name: string, value: unknown): string {
  const text = withoutConfigKey(original, name);
  const end = text.lastIndexOf("}");
  const head = text.slice(0, end).trimEnd();
  const tail = text.slice(head.length);
  const indent = /^\s*\{[^\S\n]*\n([^\S\n]+)"/.exec(text)?.[1];
  const body = JSON.stringify(value, null, indent ?? "").replaceAll("\n", `\n${indent ?? ""}`);
  const separator = (head.endsWith("{") ? "" : ",") + (indent === undefined ? "" : `\n${indent}`);
  return `${head}${separator}"${name}": ${body}${tail}`;
}

/** Takes `quantization_config` out of a JSON object's text; every other character stays. */
export const withoutQuantizationConfig = (text: string): string => withoutConfigKey(text, CONFIG_KEY);

/** Takes out what any program writes of a quantization, MLX's key too. */
export const withoutAnyQuantization = (text: string): string =>
  withoutConfigKey(withoutQuantizationConfig(text), "quantization");

/** Takes a key out of a JSON object's text; every other character stays. */
function withoutConfigKey(text: string, name: string): string {
  let depth = 0;
  let start = text.indexOf("{") + 1; // behind the brace or comma in front of the current key
  let key: string | undefined;
  for (let i = 0; i < text.length; i++) {
    const c = text[i]!;
    if (c === '"') {
      const literal = /"(?:[^"\\]|\\.)*"/sy;
      literal.lastIndex = i;
      const found = literal.exec(text)?.[0] ?? c;
      if (depth === 1) key ??= JSON.parse(found) as string;
      i += found.length - 1;
    } else if (c === "{" || c === "[") depth++;
    else if (c === "}" || c === "]" || c === ",") {
      const ends = depth === 1;
      if (ends && key === name) {
        if (c === ",") return text.slice(0, start) + text.slice(i + 1); // the comma behind it goes with it
        const head = text.slice(0, start).replace(/,$/, "");
        return head + text.slice(text.slice(0, i).trimEnd().length);
      }
      if (ends) [start, key] = [i + 1, undefined];
      if (c !== ",") depth--;
    }
  }
  return text;
}
