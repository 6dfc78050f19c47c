/**
 * LoRA files of PEFT, diffusers and kohya's scripts: what each module adds to a weight, `factor · up · down`,
 * and how the factor follows from alpha and rank. The spellings, in front of them the module's name:
 *
 * - PEFT and diffusers: `.lora_A.weight`, `.lora_B.weight`; alpha in adapter_config.json or in the file's
 *   metadata
 * - kohya and ComfyUI: `.lora_down.weight`, `.lora_up.weight`, `.alpha`
 * - older diffusers: `.lora.down.weight`, `_lora.down.weight`, `.lora_linear_layer.down.weight`
 * - XLabs: `.processor.qkv_lora1.down.weight` and the like
 * - whole differences: `.diff`, `.diff_b`, of LyCORIS' norms `.w_norm`, `.b_norm`
 */
import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { compilePattern } from "../config/mod.ts";
import { CheckpointError } from "../errors.ts";
import { isJsonObject, JsonFault, parseJson, readJsonFile } from "../files/json.ts";
import { quote } from "../files/positional.ts";
import { kindOf } from "../files/whole.ts";
import { isFloatDtype, SafetensorsFile, type TensorInfo, valuesOf } from "../tensor/mod.ts";

/** A LoRA file and how much of it is added. */
export interface LoraSource {
  /** A safetensors file, or a folder with one named as PEFT or diffusers name it. */
  readonly path: string;
  /** Factor on all that it adds; default 1. */
  readonly scale?: number | undefined;
}

/** What an adapter adds to one module. */
export interface LoraModule {
  /** As the file has it, without what tells the two matrices apart. */
  readonly name: string;
  /** `[rows, rank]`; undefined where `down` is the whole difference. */
  readonly up: TensorInfo | undefined;
  /** `[rank, cols]`, of a convolution `[rank, …]`; or the whole difference. */
  readonly down: TensorInfo | undefined;
  /** Added to the bias. */
  readonly bias: TensorInfo | undefined;
  /** alpha / rank, or alpha / √rank, times the source's scale. */
  readonly factor: number;
}

/** An open LoRA file. */
export interface Adapter extends Disposable {
  readonly path: string;
  readonly scale: number;
  /** Of all that changes what is added: names, shapes, values, alpha. */
  readonly sha256: string;
  readonly modules: readonly LoraModule[];
  /** Entries that are no part of a LoRA. */
  readonly others: readonly string[];
  /** A file of PEFT without anything that gives alpha: it is taken to be the rank. */
  readonly lacksAlpha: boolean;
  readonly file: SafetensorsFile;
}

/** Names of files in a folder, the first that is there. */
const FILES = ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"];
/** Largest metadata text that is read as JSON. */
const MAX_METADATA_BYTES = 2 ** 20;
/** Largest rank: that of the full matrix is below it in every published model. */
const MAX_RANK = 2 ** 15;

/** What stands behind a module's name; the name of a PEFT adapter may stand in between. */
const PARTS: readonly (readonly [part: "up" | "down" | "alpha" | "bias" | "diff", pattern: RegExp])[] = [
  [
    "down",
    /(?:\.lora_A(?:\.[\w-]+)?|\.lora_down|[._]lora\.down|(?<=_lora[12])\.down|\.lora_linear_layer\.down)\.weight$/,
  ],
  [
    "up",
    /(?:\.lora_B(?:\.[\w-]+)?|\.lora_up|[._]lora\.up|(?<=_lora[12])\.up|\.lora_linear_layer\.up)\.weight$/,
  ],
  ["bias", /(?:\.lora_B(?:\.[\w-]+)?\.bias|\.diff_b|\.b_norm)$/],
  ["diff", /\.(?:diff|w_norm)$/],
  ["alpha", /(?:[._]lora)?\.alpha$/],
];
/** Parts that make another thing than a LoRA of a module. */
const OTHER_KINDS: readonly (readonly [what: string, pattern: RegExp])[] = [
  ["DoRA", /(?:^|[._])(?:lora_magnitude_vector|dora_scale)(?:[._]|$)/],
  ["LoHa", /(?:^|[._])hada_[wt]\d/],
  ["LoKr", /(?:^|[._])lokr_[wt]\d/],
  ["OFT", /(?:^|[._])oft_(?:blocks|diag|r)(?:[._]|$)/],
  ["BOFT", /(?:^|[._])boft_[Rs](?:[._]|$)/],
  ["GLoRA", /\.[ab][12]\.weight$/],
  ["IA3", /\.on_input$|(?:^|[._])ia3_l(?:[._]|$)/],
  ["T-LoRA", /\.(?:[qp]_layer\.weight|lambda_layer)$/],
  ["VeRA", /(?:^|[._])vera_(?:lambda|A|B)(?:[._]|$)/],
  ["a LoRA of an embedding", /(?:^|[._])lora_embedding_[AB](?:[._]|$)/],
  ["a LoRA of a decomposed convolution", /(?:^|[._])lora_mid(?:[._]|$)/],
];

const cannot = (path: string, reason: string, tensor?: string) =>
  new CheckpointError(`Cannot merge ${quote(path)}: ${reason}`, { path, tensor });

/**
 * Opens a LoRA and checks it whole: shapes, ranks, values.
 *
 * @throws {CheckpointError} when it is none, of another kind, incomplete, or has a value that is not finite
 * @throws {FormatError} when the file is not what its format promises
 */
export function openAdapter({ path: given, scale = 1 }: LoraSource): Adapter {
  if (!Number.isFinite(scale)) throw cannot(given, `its scale must be a number, got ${scale}`);
  const path = fileOf(given), file = SafetensorsFile.open(path);
  try {
    const { parts, others } = sorted(file);
    const told = toldBy(file, dirname(path));
    const lacksAlpha = [...parts].some(([name, { up, down, alpha }]) =>
      PEFT_PREFIX.test(name) && up !== undefined && alpha === undefined &&
      told.factor(name, down?.shape[0] ?? 1) === undefined
    );
    const hash = createHash("sha256");
    const modules = [...parts].map(([name, module]): LoraModule => {
      const made = moduleOf(path, name, module, file, told);
      for (const info of [made.up, made.down, made.bias]) {
        if (info !== undefined) {
          hash.update(`${info.name} ${info.shape.join()}\n`).update(checked(file, info));
        }
      }
      hash.update(`${name} ${made.factor}\n`);
      return { ...made, factor: made.factor * scale };
    });
    const sha256 = hash.digest("hex");
    return { path, scale, sha256, modules, others, lacksAlpha, file, [Symbol.dispose]: () => file.close() };
  } catch (error) {
    file.close();
    throw error;
  }
}

function fileOf(path: string): string {
  if (kindOf(path) !== "folder") return path;
  const name = FILES.find((name) => existsSync(join(path, name)));
  if (name === undefined) throw cannot(path, `the folder must have ${FILES.join(" or ")}, got neither`);
  return join(path, name);
}

type Parts = Partial<Record<(typeof PARTS)[number][0], TensorInfo>>;

/** The entries of a file by module. @throws {CheckpointError} on another kind of adapter */
function sorted(file: SafetensorsFile): { parts: ReadonlyMap<string, Parts>; others: string[] } {
  const parts = new Map<string, Parts>(), others: string[] = [];
  for (const info of file.tensors.values()) {
    const kind = OTHER_KINDS.find(([, pattern]) => pattern.test(info.name));
    if (kind !== undefined) {
      const way = "merge it with the library that made it (PEFT: merge_and_unload())";
      throw cannot(file.path, `it must be a LoRA, got ${kind[0]} in ${quote(info.name)}: ${way}`, info.name);
    }
    const part = PARTS.find(([, pattern]) => pattern.test(info.name));
    if (part === undefined || (part[0] === "diff" && info.shape.length === 0)) {
      others.push(info.name);
      continue;
    }
    const name = info.name.replace(part[1], "").replace(/\.processor(?=\.)/, "");
    const module = parts.get(name) ?? {};
    if (module[part[0]] !== undefined) {
      const got = `${quote(module[part[0]]!.name)} and ${quote(info.name)}`;
      throw cannot(file.path, `a module must have one ${part[0]}, got ${got}`, info.name);
    }
    parts.set(name, { ...module, [part[0]]: info });
  }
  for (const [name, { up, down, bias, diff }] of parts) {
    if (up ?? down ?? bias ?? diff) continue;
    parts.delete(name); // alpha alone
  }
  if (parts.size > 0) return { parts, others };
  throw cannot(
    file.path,
    `it must have matrices as lora_A and lora_B or lora_down and lora_up, got ${
      others.length === 0 ? "no tensor" : quote(others[0]!)
    }`,
  );
}

/** Alpha and the like, as something beside the matrices gives them. */
interface Told {
  /** alpha / rank of a module of this name and rank; undefined where nothing says it. */
  readonly factor: (name: string, rank: number) => number | undefined;
}

/** In front of the names in a file of PEFT. */
export const PEFT_PREFIX = /^base_model\.model\./;

/** Alpha by adapter_config.json (PEFT), or by the file's metadata (diffusers). */
function toldBy(file: SafetensorsFile, folder: string): Told {
  const beside = join(folder, "adapter_config.json");
  const isPeft = basename(file.path) === FILES[0] ||
    [...file.tensors.keys()].some((name) => PEFT_PREFIX.test(name));
  if (isPeft && existsSync(beside)) {
    const config = readJsonFile(beside);
    checkPeft(file.path, config);
    return { factor: (name, rank) => peftFactor(file.path, config, name.replace(PEFT_PREFIX, ""), rank) };
  }
  const text = file.metadata["lora_adapter_metadata"];
  if (text === undefined) return { factor: () => undefined };
  const config = metadataJson(file.path, text);
  const components = [...new Set(Object.keys(config).map((key) => key.split(".")[0]!))];
  return {
    factor(name, rank) {
      const component = components.find((component) => name.startsWith(`${component}.`));
      if (component === undefined) return undefined;
      const own = Object.entries(config).flatMap(([key, value]) =>
        key.startsWith(`${component}.`) ? [[key.slice(component.length + 1), value] as const] : []
      );
      return peftFactor(file.path, Object.fromEntries(own), name.slice(component.length + 1), rank);
    },
  };
}

function metadataJson(path: string, text: string): Record<string, unknown> {
  const fail = (why: string) => cannot(path, `its lora_adapter_metadata must be a JSON object, got ${why}`);
  if (text.length > MAX_METADATA_BYTES) throw fail(`${text.length} characters`);
  try {
    const rules = { maxDepth: 8, maxKeys: 2 ** 16, maxItems: 2 ** 16, integersOnly: false };
    const value = parseJson(new TextEncoder().encode(text), rules);
    if (isJsonObject(value)) return value;
  } catch (error) {
    if (!(error instanceof JsonFault)) throw error;
    throw fail(error.message);
  }
  throw fail("another value");
}

/** Beginnings that change the base model's weights, so that the LoRA fits those alone. */
const CHANGES_BASE = /^(?:pissa|olora|corda|loftq|mi?lora)/i;

/** @throws {CheckpointError} when a configuration of PEFT is no LoRA of the model as it is */
function checkPeft(path: string, config: Readonly<Record<string, unknown>>): void {
  const { peft_type: type, init_lora_weights: init, layer_replication: replicated } = config;
  if (typeof type === "string" && type.toUpperCase() !== "LORA") {
    throw cannot(path, `peft_type must be LORA, got ${quote(type)}`);
  }
  if (replicated !== undefined && replicated !== null) {
    throw cannot(path, "layer_replication must be null, got a model of other layers");
  }
  if (typeof init === "string" && CHANGES_BASE.test(init)) {
    throw cannot(
      path,
      `init_lora_weights must leave the base model as it is, got ${quote(init)}: save it with PEFT's ` +
        "path_initial_model_for_weight_conversion, or merge it there (merge_and_unload())",
    );
  }
}

/** Whether a key of alpha_pattern is of a module, as PEFT matches it: the name, or a pattern of its end. */
function isOfModule(path: string, key: string, name: string): boolean {
  if (name === key || name.endsWith(`.${key}`)) return true;
  try {
    return compilePattern(`^(?:.*\\.)?(?:${key})$`).test(name);
  } catch (cause) {
    if (!(cause instanceof SyntaxError)) throw cause;
    throw cannot(path, `alpha_pattern must have patterns of names, got ${quote(key)}: ${cause.message}`);
  }
}

/** alpha / rank, or alpha / √rank, by PEFT's configuration. @throws {CheckpointError} on what is no LoRA */
function peftFactor(
  path: string,
  config: Readonly<Record<string, unknown>>,
  name: string,
  rank: number,
): number | undefined {
  for (const key of ["use_dora", "fan_in_fan_out", "use_qalora"]) {
    if (config[key] === true) throw cannot(path, `${key} must be false, got true`);
  }
  const patterns = isJsonObject(config["alpha_pattern"]) ? config["alpha_pattern"] : {};
  const own = Object.entries(patterns).find(([key]) => isOfModule(path, key, name));
  const alpha = own?.[1] ?? config["lora_alpha"];
  if (alpha === undefined || alpha === null) return undefined;
  if (typeof alpha !== "number" || !Number.isFinite(alpha)) {
    throw cannot(path, `lora_alpha must be a number, got ${quote(String(alpha))}`);
  }
  return alpha / (config["use_rslora"] === true ? Math.sqrt(rank) : rank);
}

/** @throws {CheckpointError} when a matrix is missing or two do not fit */
function moduleOf(
  path: string,
  name: string,
  { up, down, alpha, bias, diff }: Parts,
  file: SafetensorsFile,
  told: Told,
): LoraModule {
  const fail = (reason: string, info: TensorInfo) =>
    cannot(path, `${quote(info.name)}: ${reason}`, info.name);
  for (const info of [up, down, bias, diff]) {
    if (info !== undefined && !isFloatDtype(info.dtype)) {
      throw fail(`it must have floats, got ${info.dtype}`, info);
    }
  }
  if (diff !== undefined || (up === undefined && down === undefined)) {
    if (up !== undefined || down !== undefined) {
      throw fail("a module must have a LoRA or a difference, got both", up ?? down!);
    }
    return { name, up: undefined, down: diff, bias, factor: 1 };
  }
  if (up === undefined || down === undefined) {
    const there = up ?? down!;
    throw fail(
      `it must come with its ${up === undefined ? "up (lora_B)" : "down (lora_A)"}, got it alone`,
      there,
    );
  }
  const [rank = 0] = down.shape, [rows = 0] = up.shape;
  const fits = down.shape.length >= 2 && rows > 0 && rank > 0 && rank <= MAX_RANK &&
    up.elements === rows * rank;
  if (!fits) {
    const got = `[${up.shape.join(", ")}] and [${down.shape.join(", ")}]`;
    throw fail(`up must be [rows, rank] and down [rank, …], with a rank of 1 to ${MAX_RANK}, got ${got}`, up);
  }
  let factor = told.factor(name, rank) ?? 1;
  if (alpha !== undefined) {
    const isNumber = isFloatDtype(alpha.dtype) || alpha.dtype === "I64" || alpha.dtype === "I32";
    if (alpha.elements !== 1 || !isNumber) {
      throw fail(`alpha must be one number, got ${alpha.dtype} [${alpha.shape.join(", ")}]`, alpha);
    }
    factor = floatsOf(file, alpha)[0]! / rank;
    if (!Number.isFinite(factor)) throw fail(`alpha must be finite, got ${factor}`, alpha);
  }
  return { name, up, down, bias, factor };
}

/** A tensor's bytes, looked through for NaN and infinity. @throws {CheckpointError} naming it */
function checked(file: SafetensorsFile, info: TensorInfo): Uint8Array {
  const bad = floatsOf(file, info).findIndex((value) => !Number.isFinite(value));
  if (bad >= 0) {
    throw cannot(
      file.path,
      `${quote(info.name)}: values must be finite, got NaN or infinity at ${bad}`,
      info.name,
    );
  }
  return file.read(info.name);
}

/** A tensor's values as float32. */
export function floatsOf(file: SafetensorsFile, info: TensorInfo): Float32Array<ArrayBuffer> {
  if (info.dtype === "I64") return Float32Array.from(new BigInt64Array(file.read(info.name).buffer), Number);
  if (info.dtype === "I32") return Float32Array.from(new Int32Array(file.read(info.name).buffer));
  const values = valuesOf({ info, file });
  return values instanceof Float32Array ? values as Float32Array<ArrayBuffer> : Float32Array.from(values);
}
