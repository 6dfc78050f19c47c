/** ggml's types of tensors: their numbers in a file, weights and bytes of a block (ggml.h, ggml-common.h). */

/** Types that are written or read, by name. */
export const GGML_TYPES = {
  F32: { id: 0, block: 1, bytes: 4 },
  F16: { id: 1, block: 1, bytes: 2 },
  Q4_0: { id: 2, block: 32, bytes: 18 },
  Q4_1: { id: 3, block: 32, bytes: 20 },
  Q8_0: { id: 8, block: 32, bytes: 34 },
  Q2_K: { id: 10, block: 256, bytes: 84 },
  Q3_K: { id: 11, block: 256, bytes: 110 },
  Q4_K: { id: 12, block: 256, bytes: 144 },
  Q6_K: { id: 14, block: 256, bytes: 210 },
  BF16: { id: 30, block: 1, bytes: 2 },
  Q2_0: { id: 42, block: 64, bytes: 18 },
} as const;

export type GgmlType = keyof typeof GGML_TYPES;

export const isGgmlType = (name: string): name is GgmlType => Object.hasOwn(GGML_TYPES, name);

/** Types with code books, which only ggml itself writes: for the bench. */
export const CODEBOOK_TYPES = { IQ2_XS: { id: 17 }, IQ2_S: { id: 22 } } as const;

/** Bytes of a row of `cols` weights, a multiple of the block. */
export const rowBytes = (type: GgmlType, cols: number): number =>
  cols / GGML_TYPES[type].block * GGML_TYPES[type].bytes;
