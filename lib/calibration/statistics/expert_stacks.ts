/**
 * Statistics of experts whose matrices one tensor of three dimensions holds. Programs count what each expert
 * reads under the name that its matrix has where experts are apart; here that becomes the tensor's name with
 * the expert's number.
 */
import type { LinearLayer } from "../../models/mod.ts";
import type { DenseMatrix } from "../../models/layers/linear.ts";
import { PREFIXES } from "../../names/image_names.ts";
import type { Checkpoint, TensorInfo } from "../../tensor/mod.ts";
import type { CalibrationStatistics } from "../../time/mod.ts";

/** Name of one expert's matrix in a tensor of all. */
const expertName = (stack: string, expert: number): string => `${stack}[${expert}]`;

/** The tensor of a checkpoint that a matrix or an expert's matrix is in. */
export const stackOf = ({ tensors }: Checkpoint, name: string): string =>
  tensors.has(name) ? name : name.replace(/\[\d+\]$/, "");

/** Rows and columns of a matrix, or of one expert's. */
export function matrixShape(checkpoint: Checkpoint, name: string): readonly number[] {
  const { shape } = checkpoint.tensors.get(stackOf(checkpoint, name))!.info;
  return shape.length === 3 ? shape.slice(1) : shape;
}

/** One expert's matrix as a linear layer; a layer that is no stack is its only part. */
export function expertLayer(layer: LinearLayer, expert: number): LinearLayer {
  const { name, bias, experts } = layer, whole = layer.weights as DenseMatrix;
  if (experts === undefined) return layer;
  const { cols, dtype } = whole, rows = whole.rows / experts, size = rows * cols;
  const weights = {
    ...{ rows, cols, dtype },
    get data() {
      return whole.data.subarray(expert * size, (expert + 1) * size);
    },
  };
  return { name: expertName(name, expert), weights: weights as DenseMatrix, bias };
}

/** A layer's matrices of which there are statistics: itself, or its experts that have read anything. */
export function partsWith(statistics: CalibrationStatistics | undefined, layer: LinearLayer): LinearLayer[] {
  if (layer.experts === undefined) return [layer];
  return Array.from({ length: layer.experts }, (_, expert) => expertLayer(layer, expert))
    .filter(({ name }) => statistics?.has(name));
}

/** A matrix of an expert: what stands before the number, the number, and the matrix's name. */
const EXPERT = /^(.*\.experts|experts)\.(\d+)\.(.+?)(?:\.weight)?$/;
/** Matrices that stacks hold as rows of one, by its name. */
const FUSED: Readonly<Record<string, string>> = { gate_proj: "gate_up_proj", up_proj: "gate_up_proj" };

const PREFIX = new RegExp(`^(?:${
  ["diffusion_model.", "transformer.", ...PREFIXES]
    .map((prefix) => prefix.replaceAll(".", "\\.")).join("|")
})`);

/** What two names of a tensor have in common, whatever a program puts before and behind it. */
function keyOf(name: string): string {
  const rest = name.replace(PREFIX, "");
  return rest === name ? name.replace(/\.weight$/, "") : keyOf(rest);
}

/** Names of experts' matrices in a checkpoint, and whether they are those of a layer alone. */
interface ExpertPlaces {
  readonly names: readonly string[];
  readonly isWhole: boolean;
}

/**
 * Finds a layer in the tensors of three dimensions: the matrix of one expert, or of all where the layer's
 * name is that of the tensor; undefined where there is none.
 */
export function expertFinder({ tensors }: Checkpoint): (layer: string) => ExpertPlaces | undefined {
  const stacks = new Map<string, TensorInfo>();
  for (const { info } of tensors.values()) {
    if (info.shape.length === 3 && /(?:^|\.)experts\./.test(info.name)) stacks.set(keyOf(info.name), info);
  }
  return (layer) => {
    if (stacks.size === 0) return undefined;
    const shared = stacks.get(keyOf(layer));
    if (shared !== undefined) {
      const names = Array.from({ length: shared.shape[0]! }, (_, e) => expertName(shared.name, e));
      return { names, isWhole: false };
    }
    const [, head, number, tail] = EXPERT.exec(layer) ?? [];
    if (head === undefined) return undefined;
    const expert = Number(number), own = stacks.get(keyOf(`${head}.${tail}`));
    const stack = own ?? stacks.get(keyOf(`${head}.${FUSED[tail!] ?? tail}`));
    if (stack === undefined || expert >= stack.shape[0]!) return undefined;
    return { names: [expertName(stack.name, expert)], isWhole: own !== undefined };
  };
}
