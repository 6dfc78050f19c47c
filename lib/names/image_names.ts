/** Names of image models: a checkpoint's family, and what its own code calls the tensors. */
import { IMAGE_FAMILIES, type ImageFamily } from "./image_families.ts";

/** What checkpoints of several models put in front of the names of this one. */
export const PREFIXES = ["model.diffusion_model.", "model.", "net."];

/** A line of a table: the own name of a tensor of diffusers, which part of it that is, and how it changes. */
export interface Line {
  readonly pattern: RegExp;
  /** The name in diffusers, as the table has it: `*` is a number. */
  readonly diffusers: string;
  /** The own name, with `*` for the same numbers and `$<kind>` for weight or bias. */
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
        diffusers: prefix[1] + part,
        own,
        part: i,
        parts: each.length,
        swap: (swap ?? "") as Line["swap"],
      };
    });
  });
}

const TABLES = new Map<ImageFamily, readonly Line[]>();
/** The lines of a family's table. */
export function tableOf(family: ImageFamily): readonly Line[] {
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
export function ownName(
  { family, isDiffusers }: KnownImageModel,
  name: string,
): Omit<Line, "pattern" | "diffusers"> | undefined {
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
