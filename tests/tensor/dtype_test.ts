import { describe, expect, test } from "bun:test";
import { BYTES_PER_ELEMENT, DTYPES, isDtype, isFloatDtype } from "../../lib/tensor/mod.ts";

describe("dtype", () => {
  test("every type's size is in its name", () => {
    expect(DTYPES.length).toBe(25);
    for (const dtype of DTYPES) {
      const bits = dtype === "BOOL" ? 8 : Number(/\d+/.exec(dtype)?.[0]);
      expect(`${dtype} ${BYTES_PER_ELEMENT[dtype]}`).toBe(`${dtype} ${bits / 8}`);
    }
  });

  test("float types are told from the others", () => {
    const floats = DTYPES.filter(isFloatDtype).join(" ");
    expect(floats).toBe("F64 F32 F16 BF16 F8_E4M3 F8_E5M2");
  });

  test("only exact names are types, not what objects inherit", () => {
    for (const name of ["f32", "F5", "", "constructor", "__proto__", "toString"]) {
      expect(isDtype(name)).toBe(false);
    }
    for (const value of [4, undefined, null, ["F32"]]) expect(isDtype(value)).toBe(false);
    expect(isDtype("BF16")).toBe(true);
  });
});
