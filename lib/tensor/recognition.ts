/** Recognises weights that are not plain, by the names of tensors and by config.json. */
import { isJsonObject } from "../files/json.ts";
import { quote, show } from "../files/positional.ts";
import type { TensorInfo } from "./safetensors.ts";

/** Key of config.json that describes a quantization, for us and for others. */
export const CONFIG_KEY = "quantization_config";

/** Our own section inside {@linkcode CONFIG_KEY}. */
export const SECTION_KEY = "arrowquant";

const ORIGINAL = "take the original model in F32, F16 or BF16, which its card often names as base_model";

/** The programs that write a kind of quantized weights. */
interface Kind {
  readonly what: string;
  /** Names of tensors that only this kind has. */
  readonly names: RegExp;
  /** Further condition. */
  readonly holds?: (info: TensorInfo, has: Has) => boolean;
  /** By default {@linkcode ORIGINAL}. */
  readonly wayOut?: string;
}

/** The tensor of another name in the same module. */
type Has = (name: string) => TensorInfo | undefined;

const isInteger = (info: TensorInfo | undefined) => /^[UI]\d/.test(info?.dtype ?? "");
const isByte = ({ dtype }: TensorInfo) => /^[UI][48]$/.test(dtype);
/** Floats that no kernel reads; without scales they are kept. */
const isTiny = ({ dtype }: TensorInfo) => /^(?:F4|F6_\w+|F8_\w+FNUZ)$/.test(dtype);

const SCALES = ["weight_scale", "weight_scale_inv", "scale_weight"];

const KINDS: readonly Kind[] = [
  {
    what: "bitsandbytes weights",
    names: /\.weight\.(?:absmax|quant_map|nested_absmax|quant_state\.bitsandbytes__\w+)$|(?:^|\.)SCB$/,
    wayOut: `load it with transformers and save what model.dequantize() gives, or ${ORIGINAL}`,
  },
  { what: "weights of Nunchaku (SVDQuant)", names: /\.wscales$/ },
  { what: "GPTQ weights", names: /(?:^|\.)g_idx$/, holds: isInteger },
  {
    what: "AWQ weights",
    names: /\.qweight$/,
    holds: ({ shape }, has) => (has("scales")?.shape[1] ?? 0) === (shape[1] ?? 1) * 8,
  },
  {
    what: "GPTQ weights",
    names: /\.qweight$/,
    holds: (info, has) => isInteger(info) && has("scales") !== undefined,
  },
  {
    what: "EETQ weights",
    names: /\.weight_scales$/,
    holds: (_, has) => isInteger(has("weight") ?? has("qweight")),
  },
  { what: "HQQ weights", names: /(?:^|\.)W_q$/, holds: isInteger },
  {
    what: "VPTQ weights",
    names: /\.indices$/,
    holds: (info, has) => isInteger(info) && has("centroids.weight") !== undefined,
  },
  { what: "AQLM weights", names: /\.codebooks$/, holds: (_, has) => has("codes") !== undefined },
  { what: "QuIP# weights", names: /\.Qidxs$/ },
  { what: "EXL2 or EXL3 weights", names: /\.(?:q_invperm|q_scale_max|trellis)$/ },
  { what: "DFloat11 weights", names: /\.encoded_exponent$/, holds: isInteger },
  { what: "weights of optimum-quanto", names: /\.weight\._(?:data|scale|shift)$/ },
  {
    what: "torchao weights",
    names:
      /(?:^|[._])weight[._:]_?(?:qdata|int_data|tensor_impl\S*|scale_and_zero)$|:_?(?:qdata|data|scale)$/,
  },
  {
    what: "MLX weights",
    names: /(?:^|\.)scales$/,
    holds: (_, has) => isInteger(has("weight")),
    wayOut: `dequantize it here or with mlx_lm.convert, or ${ORIGINAL}`,
  },
  { what: "MXFP4 weights", names: /_blocks$/, holds: ({ dtype }) => dtype === "U8" },
  {
    what: "packed weights of compressed-tensors, or of this tool without its config.json",
    names: /\.weight_packed$/,
    holds: isInteger,
  },
  {
    what: "NVFP4 or MXFP weights (ModelOpt, ComfyUI)",
    names: /(?:^|\.)weight$/,
    holds: (info, has) =>
      isTiny(info)
        ? has("weight_scale") !== undefined
        : isByte(info) && ["F8_E4M3", "U8", "F8_E8M0"].includes(has("weight_scale")?.dtype ?? ""),
  },
  {
    what: "integer or 4-bit weights",
    names: /[^.]+$/,
    holds: (info, has) => {
      if (!isInteger(info) || info.shape.length < 2) return false;
      const own = info.name.slice(info.name.lastIndexOf(".") + 1), isWeight = own === "weight";
      // "scale" alone may be another thing's: of attention beside a mask
      const names = [...SCALES, ...(isWeight ? ["scale", "scales"] : [`${own}_scale`, `${own}_scales`])];
      const isScaled = names.some((part) => has(part) !== undefined);
      return isByte(info) ? isWeight || isScaled : isWeight && isScaled;
    },
  },
];

const LORA =
  /(?:^|[._])(?:lora[_.](?:A|B|up|down|mid|embedding_[AB]|magnitude_vector|linear_layer|unet|te\d?|transformer)|hada_[wt]\d|lokr_[wt]\d|oft_blocks|oft_diag)(?:[._]|$)/;

/**
 * Says what weights are when they are not plain, with the way out; undefined where nothing is recognised.
 *
 * @param fp8 scaled FP8 weights: how many can be read, and why others cannot
 * @param isAdapter whether the file is named as those of adapters are
 */
export function recognise(
  tensors: ReadonlyMap<string, { readonly info: TensorInfo }>,
  config: Readonly<Record<string, unknown>> | undefined,
  fp8: { readonly count: number; readonly fault: string | undefined },
  isAdapter: boolean,
): string | undefined {
  const again = "already quantized, and quantizing it again would add one error to another";
  for (const { what, names, holds, wayOut = ORIGINAL } of KINDS) {
    for (const [name, { info }] of tensors) {
      if (!names.test(name)) continue;
      const module = name.slice(0, name.lastIndexOf(".") + 1);
      if (holds?.(info, (part) => tensors.get(module + part)?.info) === false) continue;
      return `${what} (${quote(name)}, ${info.dtype} [${info.shape.join(", ")}]): ${again}; ${wayOut}`;
    }
  }
  const matrices = [...tensors.values()].filter(({ info: { shape } }) => shape.length > 1);
  if (isAdapter || (matrices.length > 0 && matrices.every(({ info: { name } }) => LORA.test(name)))) {
    return "a LoRA or another adapter alone, which is no model: give quantize.ts its base model and this as --lora, or merge it " +
      "first (PEFT: merge_and_unload(), diffusers: fuse_lora()) and quantize what that saves";
  }
  if (fp8.fault !== undefined) {
    return `${fp8.fault}: such codes are no weights until they are scaled; convert them with the library that ` +
      `wrote them, or ${ORIGINAL}`;
  }
  const codes = mostlyIntegers([...tensors.values()].map(({ info }) => info));
  if (codes !== undefined) {
    return `integers for the most part (${quote(codes.name)}, ${codes.dtype} [${
      codes.shape.join(", ")
    }]), codes in a ` +
      `form that is not known here: ${again}; ${ORIGINAL}`;
  }
  const told = toldBy(config);
  if (told === undefined || fp8.count > 0) return undefined;
  return `config.json with ${told}: ${again}; ${ORIGINAL}, or where the weights are plain all the same, take that ` +
    "out of config.json";
}

/** Fewest integers of a tensor that may be codes; positions and permutations of small modules have fewer. */
const MANY_INTEGERS = 4096;

/** The largest tensor of integers where such tensors take more than half of a checkpoint. */
function mostlyIntegers(tensors: readonly TensorInfo[]): TensorInfo | undefined {
  const sum = (of: readonly TensorInfo[]) => of.reduce((total, { byteLength }) => total + byteLength, 0);
  const codes = tensors.filter((info) => isInteger(info) && info.elements >= MANY_INTEGERS);
  if (sum(codes) * 2 <= sum(tensors)) return undefined;
  return codes.reduce((largest, info) => info.byteLength > largest.byteLength ? info : largest);
}

/** Names the quantization of others that config.json describes. */
function toldBy(config: Readonly<Record<string, unknown>> | undefined): string | undefined {
  for (const key of [CONFIG_KEY, "compression_config", "quantization"]) {
    const value = config?.[key];
    if (value === undefined || value === null) continue;
    if (isJsonObject(value) && SECTION_KEY in value) continue;
    const method = isJsonObject(value)
      ? value["quant_method"] ?? value["quant_algo"] ?? value["bits"]
      : value;
    return `a ${key}${method === undefined ? "" : ` of ${show(method)}`}`;
  }
  return undefined;
}

/** Whether config.json says that FP8 weights have scales. */
export const saysScaled = (config: Readonly<Record<string, unknown>> | undefined): boolean =>
  toldBy(config) !== undefined;

/** Whether config.json has our own section. */
export const isOurs = (config: Readonly<Record<string, unknown>> | undefined): boolean => {
  const section = config?.[CONFIG_KEY];
  return isJsonObject(section) && section[SECTION_KEY] !== undefined;
};
