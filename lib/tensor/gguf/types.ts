/** The element types of ggml: numbers in a file, sizes of blocks, and what each reads as here. */
import type { Dtype } from "../dtype.ts";

/** An element type of ggml. */
export interface GgmlType {
  readonly name: string;
  /** Number in a GGUF file. */
  readonly id: number;
  /** Weights of a block, and its bytes. */
  readonly weights: number;
  readonly bytes: number;
  /** The same type in safetensors; undefined where blocks hold codes. */
  readonly plain: Dtype | undefined;
}

/** `name number weights bytes`, and of plain types the name in safetensors. */
const TABLE = `
  F32 0 1 4 F32, F16 1 1 2 F16, BF16 30 1 2 BF16, F64 28 1 8 F64,
  I8 24 1 1 I8, I16 25 1 2 I16, I32 26 1 4 I32, I64 27 1 8 I64,
  Q4_0 2 32 18, Q4_1 3 32 20, Q5_0 6 32 22, Q5_1 7 32 24, Q8_0 8 32 34, Q8_1 9 32 36,
  Q2_K 10 256 84, Q3_K 11 256 110, Q4_K 12 256 144, Q5_K 13 256 176, Q6_K 14 256 210, Q8_K 15 256 292,
  IQ2_XXS 16 256 66, IQ2_XS 17 256 74, IQ3_XXS 18 256 98, IQ1_S 19 256 50, IQ4_NL 20 32 18, IQ3_S 21 256 110,
  IQ2_S 22 256 82, IQ4_XS 23 256 136, IQ1_M 29 256 56, TQ1_0 34 256 54, TQ2_0 35 256 66,
  MXFP4 39 32 17, NVFP4 40 64 36, Q1_0 41 128 18, Q2_0 42 64 18`;

/** Every type by its number. */
export const GGML_TYPES: ReadonlyMap<number, GgmlType> = new Map(
  TABLE.split(",").map((text) => {
    const [name, id, weights, bytes, plain] = text.trim().split(" ");
    return [Number(id), {
      name: name!,
      id: Number(id),
      weights: Number(weights),
      bytes: Number(bytes),
      plain: plain as Dtype | undefined,
    }];
  }),
);

const BY_NAME: ReadonlyMap<string, GgmlType> = new Map(
  [...GGML_TYPES.values()].map((type) => [type.name, type]),
);

/** A type by its name. @throws {RangeError} when there is none */
export function ggmlType(name: string): GgmlType {
  const type = BY_NAME.get(name);
  if (type === undefined) {
    throw new RangeError(`a type of ggml must be one of ${[...BY_NAME.keys()].join(" ")}, got ${name}`);
  }
  return type;
}
