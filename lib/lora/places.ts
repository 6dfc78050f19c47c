/**
 * Where the modules of a LoRA are in a checkpoint: by their own names, by names with other prefixes, with
 * underscores for dots as kohya's scripts write them, by the names that the other layout of an image model
 * has, whose parts may be fused (`attn.qkv` for `to_q`, `to_k`, `to_v`), and by XLabs' names for FLUX.
 */
import { imageModel, ownName, PREFIXES, tableOf } from "../names/image_names.ts";
import { unetNames } from "../names/unet_names.ts";
import type { Checkpoint, TensorInfo } from "../tensor/mod.ts";

/** Rows `[from, from + rows)` of what a module adds, and the rows of a tensor that they are added to. */
export interface RowPlace {
  /** The tensor's name. */
  readonly tensor: string;
  readonly from: number;
  readonly row: number;
  readonly rows: number;
}

/** What libraries put in front of a module's name. */
const IN_FRONT =
  /^(?:base_model\.model\.|base_model_model_|lora_unet__?|lora_transformer_|lycoris_|diffusion_model[._]|transformer[._]|unet[._]|model[._]|net[._])/;
/** Modules of a pipeline's text encoders. */
const OF_TEXT_ENCODERS =
  /^(?:lora_te\d?_|lora_prior_te_|text_encoders?(?:_\d)?\.|text_model\.|conditioner\.)/;
/** Most prefixes that stand in front of one another. */
const MOST_PREFIXES = 4;

/** Whether a module is of a text encoder. */
export const isOfTextEncoder = (module: string): boolean => OF_TEXT_ENCODERS.test(module);

const keyOf = (module: string) => module.replaceAll(".", "_");
const isWeight = ({ name, shape }: TensorInfo) => name.endsWith(".weight") && shape.length > 0;
const moduleOf = (tensor: string) => tensor.replace(/\.weight$/, "");
const whole = ({ name, shape }: TensorInfo): readonly RowPlace[] => [
  { tensor: name, from: 0, row: 0, rows: shape[0]! },
];

/** Names by key; undefined stands for a key with two meanings. */
type Index = Map<string, readonly RowPlace[] | undefined>;

function add(index: Index, module: string, places: readonly RowPlace[]): void {
  const key = keyOf(module), known = index.get(key);
  const isSame = !index.has(key) || (known !== undefined && JSON.stringify(known) === JSON.stringify(places));
  index.set(key, isSame ? places : undefined);
}

/** Finds the modules of a checkpoint: the places of a name's rows; empty where there is no single one. */
export function moduleFinder({ tensors }: Checkpoint): (module: string) => readonly RowPlace[] {
  const weights = [...tensors.values()].map(({ info }) => info).filter(isWeight);
  const exact: Index = new Map(), bare: Index = new Map(), other: Index = new Map();
  for (const info of weights) {
    const module = moduleOf(info.name);
    add(exact, module, whole(info));
    const prefix = ["model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", ...PREFIXES]
      .find((prefix) => module.startsWith(prefix));
    if (prefix !== undefined) add(bare, module.slice(prefix.length), whole(info));
    for (const name of unetNames(module.slice(module.startsWith(PREFIXES[0]!) ? PREFIXES[0]!.length : 0))) {
      add(other, name, whole(info));
    }
  }
  addOtherLayout(other, weights, [...tensors.keys()]);
  const find = (module: string): readonly RowPlace[] => {
    let name = module;
    for (let i = 0; i <= MOST_PREFIXES; i++) {
      for (const ending of ["", "_0"]) { // to_out, which became to_out.0
        for (const index of [exact, bare, other]) {
          const found = index.get(keyOf(name) + ending);
          if (found !== undefined) return found;
        }
      }
      const rest = name.replace(IN_FRONT, "");
      if (rest === name) break;
      name = rest;
    }
    return [];
  };
  return (module) => {
    const found = find(module);
    return found.length > 0 ? found : behindOneAnother(namesOfXlabs(module).map(find));
  };
}

/** Places of what follows one another in a module's rows; none where one part has no place. */
function behindOneAnother(parts: readonly (readonly RowPlace[])[]): readonly RowPlace[] {
  if (parts.some(({ length }) => length === 0)) return [];
  let from = 0;
  return parts.flatMap((places) => {
    const begin = from;
    return places.map((place) => {
      from += place.rows;
      return { ...place, from: begin + place.from };
    });
  });
}

/** Diffusers' names of what a module of XLabs' LoRAs of FLUX changes: of its processors of attention. */
function namesOfXlabs(module: string): string[] {
  const [, kind, block, part, stream] =
    /(?:^|\.)(double|single)_blocks\.(\d+)\.(qkv|proj)(?:_lora([12]))?$/.exec(module) ?? [];
  if (kind === undefined || (kind === "double") === (stream === undefined)) return [];
  const single = `single_transformer_blocks.${block}.`, attention = `transformer_blocks.${block}.attn.`;
  if (part === "proj") {
    return [
      kind === "single" ? `${single}proj_out` : attention + (stream === "1" ? "to_out.0" : "to_add_out"),
    ];
  }
  return ["q", "k", "v"].map((each) =>
    kind === "single"
      ? `${single}attn.to_${each}`
      : attention + (stream === "1" ? `to_${each}` : `add_${each}_proj`)
  );
}

/** Adds the names that an image model has in its other layout. */
function addOtherLayout(index: Index, weights: readonly TensorInfo[], names: readonly string[]): void {
  const model = imageModel(names);
  if (model === undefined) return;
  const { family, prefix, isDiffusers } = model;
  const own = weights.filter(({ name }) => name.startsWith(prefix));
  if (isDiffusers) {
    const groups = new Map<string, { parts: (TensorInfo | undefined)[]; swap: string }>();
    for (const info of own) {
      const found = ownName(model, info.name.slice(prefix.length));
      if (found === undefined) continue;
      const group = groups.get(found.own) ??
        { parts: Array.from({ length: found.parts }, () => undefined), swap: found.swap };
      group.parts[found.part] = info;
      groups.set(found.own, group);
    }
    for (const [name, { parts, swap }] of groups) {
      if (!parts.includes(undefined)) add(index, moduleOf(name), fused(parts as TensorInfo[], swap));
    }
    return;
  }
  for (const { own: pattern, diffusers, part, parts, swap } of tableOf(family)) {
    if (!pattern.endsWith(".$<kind>")) continue;
    const module = pattern.slice(0, -".$<kind>".length).replaceAll(".", "\\.").replaceAll("*", "(\\d+)");
    const expression = new RegExp(`^${module}\\.weight$`);
    for (const info of own) {
      const numbers = expression.exec(info.name.slice(prefix.length));
      if (numbers === null) continue;
      let i = 1;
      const name = diffusers.replaceAll("*", () => numbers[i++]!);
      const places = parts === 1 ? fused([info], swap) : partOf(info, part, parts);
      if (places !== undefined) add(index, name, places);
    }
  }
}

/** The places of rows that follow one another in several tensors; `swap` as in the table of names. */
function fused(parts: readonly TensorInfo[], swap: string): readonly RowPlace[] {
  const [first] = parts, rows = first!.shape[0]!;
  if (swap === "~" || (swap === "~?" && rows === 2 * (first!.shape[1] ?? 0))) {
    const half = rows / 2, tensor = first!.name;
    return [{ tensor, from: 0, row: half, rows: half }, { tensor, from: half, row: 0, rows: half }];
  }
  let from = 0;
  return parts.map(({ name: tensor, shape }) => {
    const place = { tensor, from, row: 0, rows: shape[0]! };
    from += place.rows;
    return place;
  });
}

/**
 * The rows of query, key, value and what follows them in a fused tensor: the query has as many as the input
 * is wide; of three parts the other two share the rest, of four each has as many as the query and the last
 * has the rest.
 */
function partOf(
  { name: tensor, shape }: TensorInfo,
  part: number,
  parts: number,
): readonly RowPlace[] | undefined {
  const [rows = 0, cols = 0] = shape, each = parts === 3 ? (rows - cols) / 2 : cols;
  const sizes = parts === 3 ? [cols, each, each] : [cols, cols, cols, rows - 3 * cols];
  if (sizes.length !== parts || sizes.some((size) => !Number.isInteger(size) || size <= 0)) return undefined;
  const row = sizes.slice(0, part).reduce((sum, size) => sum + size, 0);
  return [{ tensor, from: 0, row, rows: sizes[part]! }];
}
