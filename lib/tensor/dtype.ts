/**
 * Names and sizes of the element types that safetensors files may hold. Conversions between them are kernels
 * and live elsewhere.
 */

/** Bytes of an element by its type in a safetensors header; a fraction where elements are packed. */
export const BYTES_PER_ELEMENT = {
  F64: 8,
  F32: 4,
  F16: 2,
  BF16: 2,
  F8_E4M3: 1,
  F8_E5M2: 1,
  I64: 8,
  I32: 4,
  I16: 2,
  I8: 1,
  U64: 8,
  U32: 4,
  U16: 2,
  U8: 1,
  BOOL: 1,
  // Types that no kernel reads: their tensors are kept byte for byte.
  C128: 16,
  C64: 8,
  F8_E8M0: 1,
  F8_E4M3FNUZ: 1,
  F8_E5M2FNUZ: 1,
  F6_E2M3: 0.75,
  F6_E3M2: 0.75,
  F4: 0.5,
  I4: 0.5,
  U4: 0.5,
} as const;

/** Name of an element type, as in a safetensors header. */
export type Dtype = keyof typeof BYTES_PER_ELEMENT;

/** Names of the floating-point types. */
export type FloatDtype = "F64" | "F32" | "F16" | "BF16" | "F8_E4M3" | "F8_E5M2";

const FLOAT_DTYPES: readonly Dtype[] = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"];

/** Every element type that can be read and written. */
export const DTYPES: readonly Dtype[] = Object.freeze(Object.keys(BYTES_PER_ELEMENT) as Dtype[]);

/** Whether a value is the name of a known element type. */
export function isDtype(value: unknown): value is Dtype {
  return typeof value === "string" && Object.hasOwn(BYTES_PER_ELEMENT, value);
}

/** Whether elements of this type are floating-point numbers, the only ones that can be quantized. */
export function isFloatDtype(dtype: Dtype): dtype is FloatDtype {
  return FLOAT_DTYPES.includes(dtype);
}
