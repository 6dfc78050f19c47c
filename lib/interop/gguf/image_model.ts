/** Image models as readers of GGUF load them: names of their own code, parts joined in one tensor. */
import { quote } from "../../files/positional.ts";
import { cannotHold, type ExportSource, type ExportTensor } from "../format.ts";
import { text } from "./container.ts";
import { imageModel, type Line, ownName } from "../../names/image_names.ts";
import type { GgufModel } from "./language_model.ts";
import type { GgufEntry, RowOrder } from "./tensors.ts";

/** Longest name that ComfyUI-GGUF's tools take. */
const MAX_NAME = 127;
/** Largest tensor that is F32 in any case. */
const SMALL_WEIGHTS = 1024;
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
 * @throws {CheckpointError} when a tensor has no place in its family's table, or parts that belong together
 * are missing
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
