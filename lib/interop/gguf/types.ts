/** ggml's types of tensors that are written: their numbers in a file, weights and bytes of a block. */
import { ggmlType } from "../../tensor/gguf/types.ts";

const NAMES = ["F32", "F16", "Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "BF16", "Q2_0"] as const;

export type GgmlType = typeof NAMES[number];

/** Types by name. */
export const GGML_TYPES = Object.fromEntries(NAMES.map((name) => {
  const { id, weights: block, bytes } = ggmlType(name);
  return [name, { id, block, bytes }];
})) as Readonly<Record<GgmlType, { readonly id: number; readonly block: number; readonly bytes: number }>>;

export const isGgmlType = (name: string): name is GgmlType => Object.hasOwn(GGML_TYPES, name);

/** Types with code books, which only ggml itself writes: for the bench. */
export const CODEBOOK_TYPES = { IQ2_XS: { id: 17 }, IQ2_S: { id: 22 } } as const;

/** Bytes of a row of `cols` weights, a multiple of the block. */
export const rowBytes = (type: GgmlType, cols: number): number =>
  cols / GGML_TYPES[type].block * GGML_TYPES[type].bytes;
