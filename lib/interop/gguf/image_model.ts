/** Image models as the readers of GGUF load them: names of their own code, parts that belong together in one tensor. */
import { quote } from "../../files/positional.ts";
import { cannotHold, type ExportSource, type ExportTensor } from "../format.ts";
import { text } from "./container.ts";
import { IMAGE_FAMILIES, type ImageFamily } from "./image_families.ts";
import type { GgufModel } from "./language_model.ts";
import type { GgufEntry, RowOrder } from "./tensors.ts";

/** Longest name that ComfyUI-GGUF's tools take. */
const MAX_NAME = 127;
/** Largest tensor that is F32 in any case. */
const SMALL_WEIGHTS = 1024;
/** What checkpoints of several models put in front of the names of this one. */
const PREFIXES = ["model.diffusion_model.", "model.", "net."];

/** A line of a table: the own name of a tensor of diffusers, which part of it that is, and how it changes. */
interface Line {
  readonly pattern: RegExp;
  readonly own: string;
  readonly part: number;
  readonly parts: number;
  readonly swap: "" | "~" | "~?";
}

function parse({ names }: ImageFamily): Line[] {
  let prefix = ["", ""];
  return names.split("\n").flatMap((raw): Line[] => {
    const line = raw.trim(), section = /^\[(\S+) < (\S+)\]$/.exec(line);
    if (section !== null) prefix = [`${section[1]}.`, `${section[2]}.`];
    const [, left, kind, swap, right] = /^(\S+) (==?) (~\??)?(\S+)$/.exec(line) ?? [];
    if (left === undefined || right === undefined) return [];
    const [, before, inner, after] = /^(.*)\{(.*)\}(.*)$/.exec(right) ?? [];
    const each = inner === undefined ? [right] : inner.split(",").map((part) => before + part + after);
    return each.map((part, i) => {
      const module = (prefix[1] + part).replaceAll(".", "\\.").replaceAll("*", "(\\d+)");
      const kept = kind === "=" ? "\\.(?<kind>weight|bias)" : "";
      const own = prefix[0] + left + (kind === "=" ? ".$<kind>" : "");
      return {
        pattern: new RegExp(`^${module}${kept}$`),
        own,
        part: i,
        parts: each.length,
        swap: (swap ?? "") as Line["swap"],
      };
    });
  });
}

const TABLES = new Map<ImageFamily, readonly Line[]>();
function tableOf(family: ImageFamily): readonly Line[] {
  if (!TABLES.has(family)) TABLES.set(family, parse(family));
  return TABLES.get(family)!;
}

/** A family with the prefix of its names, and whether they are diffusers'. */
export interface KnownImageModel {
  readonly family: ImageFamily;
  readonly prefix: string;
  readonly isDiffusers: boolean;
}

/** The family that tensors of such names belong to; undefined where it is no known one. */
export function imageModel(names: Iterable<string>): KnownImageModel | undefined {
  const all = new Set(names);
  for (const prefix of ["", ...PREFIXES]) {
    const hasAll = (list: readonly string[]) => list.every((name) => all.has(prefix + name));
    for (const family of IMAGE_FAMILIES) {
      if (family.own.some(hasAll)) return { family, prefix, isDiffusers: false };
      if (family.diffusers.some(hasAll)) return { family, prefix, isDiffusers: true };
    }
  }
  return undefined;
}

/** The own name of a tensor, with its place in it; undefined where a table has none. */
function ownName({ family, isDiffusers }: KnownImageModel, name: string): Omit<Line, "pattern"> | undefined {
  const same = { own: name, part: 0, parts: 1, swap: "" } as const;
  if (!isDiffusers) return same;
  for (const { pattern, own, part, parts, swap } of tableOf(family)) {
    const found = pattern.exec(name);
    if (found === null) continue;
    let i = 1;
    const numbered = own.replaceAll("*", () => found[i++]!).replace("$<kind>", found.groups?.["kind"] ?? "");
    return { own: numbered, part, parts, swap };
  }
  return family.same?.test(name) === true ? same : undefined;
}

/** Names of tensors that the readers' own tools never quantize; none where the family is not known. */
export function keptByTools(names: readonly string[]): ReadonlySet<string> {
  const model = imageModel(names);
  if (model === undefined) return new Set();
  return new Set(names.filter((name) => {
    const own = name.startsWith(model.prefix) ? ownName(model, name.slice(model.prefix.length)) : undefined;
    return own !== undefined && model.family.kept.test(own.own);
  }));
}

/** Whether an export is of a known image model. */
export const isImageModel = ({ tensors }: ExportSource): boolean =>
  imageModel(tensors.map(({ name }) => name)) !== undefined;

/**
 * Describes an image model.
 *
 * @throws {CheckpointError} when a tensor has no place in its family's table, or parts that belong together are missing
 */
export function imageGguf(source: ExportSource): GgufModel {
  const { tensors } = source,
    model = imageModel(tensors.map(({ name }) => name))!,
    { family, prefix } = model;
  const fail = (reason: string, name: string) => cannotHold(source, "gguf", reason, name);
  const groups = new Map<string, { parts: (ExportTensor | undefined)[]; swap: Line["swap"] }>(),
    left: string[] = [];
  for (const tensor of tensors) {
    const { name } = tensor;
    if (!name.startsWith(prefix)) {
      left.push(name);
      continue;
    }
    const found = ownName(model, name.slice(prefix.length));
    if (found === undefined) {
      throw fail(`it must be one of the tensors of ${family.name}, got another name`, name);
    }
    const { own, part, parts, swap } = found;
    const group = groups.get(own) ?? { parts: Array.from({ length: parts }, () => undefined), swap };
    if (group.parts[part] !== undefined) throw fail(`it must be the only ${quote(own)}, got two`, name);
    group.parts[part] = tensor;
    groups.set(own, group);
  }
  const bySource = new Map(tensors.map((tensor) => [tensor.name, tensor]));
  const entries = [...groups].map(([name, { parts, swap }]): GgufEntry => {
    const sources = parts.filter((part) => part !== undefined), first = sources[0]!;
    if (sources.length < parts.length) {
      throw fail(
        `the rows of ${quote(name)} must be in ${parts.length} tensors, got ${sources.length}`,
        first.name,
      );
    }
    return { name, sources, rowOrder: rowOrder(first, swap, bySource), plain: plainType(name, first) };
  });
  const note = `${left.length} tensors of other models are left out, as ${quote(left[0] ?? "")}`;
  return {
    metadata: [["general.architecture", text(family.architecture)]],
    entries,
    notes: left.length === 0 ? [] : [note],
    maxName: MAX_NAME,
  };
}

/** Type of plain values: diffusers reads BF16 in the weights of linear layers only. */
function plainType(name: string, { shape, dtype }: ExportTensor): GgufEntry["plain"] {
  const elements = shape.reduce((product, size) => product * size, 1);
  const isLinear = shape.length === 2 && name.endsWith(".weight") && !/embedding\.weight$/.test(name);
  if (dtype === "F16" && shape.length > 1) return "F16";
  return isLinear && elements > SMALL_WEIGHTS ? undefined : "F32";
}

function rowOrder(
  { name, shape }: ExportTensor,
  swap: Line["swap"],
  all: ReadonlyMap<string, ExportTensor>,
): RowOrder | undefined {
  const [rows = 0] = shape, weight = all.get(name.replace(/\.bias$/, ".weight"));
  const isPair = swap === "~" || (swap === "~?" && weight?.shape[0] === 2 * (weight?.shape[1] ?? 0));
  return isPair ? { block: rows, order: (row) => (row + rows / 2) % rows } : undefined;
}
