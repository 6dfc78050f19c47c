import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import {
  closeSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readFileSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { CheckpointError, FormatError } from "../../lib/errors.ts";
import { MAX_HEADER_BYTES, MAX_NAME_LENGTH, SafetensorsFile } from "../../lib/tensor/mod.ts";
import {
  entry,
  fileBytes,
  MODELS,
  randomIntegers,
  readIndependently,
  temporaryFolder,
  thrown,
  writeRaw,
} from "./_files.ts";

const folder = temporaryFolder();
const path = join(folder.path, "file.safetensors");
afterAll(folder.remove);

/** Opens a file with this header and data and returns its tensors' names. */
function open(header: string | Uint8Array, data: number | Uint8Array = 0): string[] {
  using file = SafetensorsFile.open(writeRaw(path, header, data));
  return [...file.tensors.keys()];
}

describe("SafetensorsFile reads what the format allows", () => {
  test("names, shapes, places and bytes, in the order of the bytes", () => {
    const header = `{${entry("b", "F16", [2, 3], 4, 16)},"__metadata__":{"format":"pt","empty":""},${
      entry("a", "U8", [4], 0, 4)
    }}`;
    const data = Uint8Array.from({ length: 16 }, (_, i) => i + 1);
    using file = SafetensorsFile.open(writeRaw(path, header, data));
    expect(file.metadata).toEqual({ format: "pt", empty: "" });
    expect(file.fileBytes).toBe(8 + header.length + 16);
    const start = 8 + header.length;
    expect([...file.tensors.values()]).toEqual([
      { name: "a", dtype: "U8", shape: [4], byteOffset: start, byteLength: 4, elements: 4 },
      { name: "b", dtype: "F16", shape: [2, 3], byteOffset: start + 4, byteLength: 12, elements: 6 },
    ]);
    expect([...file.read("a")]).toEqual([1, 2, 3, 4]);
    expect([...file.read("b", 2, 5)]).toEqual([7, 8, 9]);
    expect([...file.read("b", 12)]).toEqual([]);
    const target = new Uint8Array(6).fill(99);
    file.readInto("b", 9, target.subarray(2, 5));
    expect([...target]).toEqual([99, 99, 14, 15, 16, 99]);
  });

  test("scalars, zero-size tensors, no tensors, padding", () => {
    expect(open(`{${entry("s", "F32", [], 0, 4)}}     `, 4)).toEqual(["s"]);
    expect(open(`{${entry("a", "F32", [1], 0, 4)},${entry("z", "I64", [3, 0], 4, 4)}}`, 4)).toEqual([
      "a",
      "z",
    ]);
    expect(open(`{${entry("a", "F32", [1], 0, 4)},${entry("z", "I64", [0, 9007199254740991], 0, 0)}}`, 4))
      .toEqual(["z", "a"]);
    expect(open("{}")).toEqual([]);
    expect(open('{"__metadata__":{}}  ')).toEqual([]);
  });

  test("names that are special to JavaScript or to JSON", () => {
    const names = ["__proto__", "constructor", "0", 'a.b\n"c"', "weight é 層", ""];
    const header = `{${names.map((name, i) => entry(name, "U8", [1], i, i + 1)).join(",")}}`;
    expect(open(header, names.length)).toEqual(names);
    using file = SafetensorsFile.open(writeRaw(path, `{"__metadata__":{"__proto__":"x"}}`));
    expect(Object.entries(file.metadata)).toEqual([["__proto__", "x"]]);
  });

  test("the reference models, byte for byte as an independent reader sees them", () => {
    for (
      const name of [
        "dream-mini/model-00001-of-00002",
        "glyph-dit/diffusion_pytorch_model",
        "glyph-dit/golden",
      ]
    ) {
      const modelPath = join(MODELS, `${name}.safetensors`);
      using file = SafetensorsFile.open(modelPath);
      const wanted = readIndependently(modelPath);
      expect([...file.tensors.keys()].sort()).toEqual(Object.keys(wanted.tensors).sort());
      for (const info of file.tensors.values()) {
        expect<string>(info.dtype).toBe(wanted.tensors[info.name]!.dtype);
        expect([...info.shape]).toEqual(wanted.tensors[info.name]!.shape);
        const same = Buffer.compare(file.read(info.name), wanted.tensors[info.name]!.data) === 0;
        expect(`${info.name} ${same}`).toBe(`${info.name} true`);
      }
    }
  });
});

describe("SafetensorsFile refuses", () => {
  const good = entry("a", "F32", [2], 0, 8);
  const cases: [what: string, header: string | Uint8Array, data: number, message: string, tensor?: string][] =
    [
      ["no header", "", 0, 'start with "{", got no bytes'],
      ["a header that is no object", "[]", 0, 'start with "{", got byte 91'],
      ["space before the brace", ` {${good}}`, 8, 'start with "{", got byte 32'],
      ["a byte order mark", `\ufeff{${good}}`, 8, 'start with "{", got byte 239'],
      ["invalid UTF-8", Uint8Array.of(0x7b, 0x22, 0xff, 0x22, 0x3a, 0x31, 0x7d), 0, "valid UTF-8"],
      [
        "an overlong UTF-8 form",
        Uint8Array.of(0x7b, 0x22, 0xc0, 0x80, 0x22, 0x3a, 0x31, 0x7d),
        0,
        "valid UTF-8",
      ],
      ["an unfinished object", `{${good}`, 8, "valid JSON"],
      ["an unfinished string", '{"a', 0, "valid JSON"],
      ["a bad escape", '{"\\x":1}', 0, "valid JSON"],
      ["a trailing comma", `{${good},}`, 8, "valid JSON"],
      ["two objects", `{${good}}{}`, 8, "valid JSON"],
      ["padding with zero bytes", `{${good}}\0\0`, 8, "integers ≥ 0"],
      ["a repeated tensor", `{${good},${entry("a", "F32", [2], 8, 16)}}`, 16, "must not be repeated", "a"],
      ["a tensor repeated by an escape", `{${good},"\\u0061":{}}`, 8, "must not be repeated", "a"],
      ["a tensor repeated by an escaped quote", `{"x\\"":1,"x\\u0022":1}`, 8, "must not be repeated", 'x"'],
      ["a repeated __proto__", '{"__proto__":1,"__proto__":1}', 0, "must not be repeated", "__proto__"],
      [
        "a repeated field",
        '{"a":{"dtype":"U8","shape":[1],"dtype":"U8","data_offsets":[0,1]}}',
        1,
        '"a" / "dtype"',
        "a",
      ],
      ["a field repeated by an escape", '{"a":{"shape":[0],"sh\\u0061pe":[1]}}', 0, '"a" / "shape"', "a"],
      ["repeated metadata", '{"__metadata__":{"x":"1","x":"2"}}', 0, '"__metadata__" / "x"'],
      ["metadata twice", '{"__metadata__":{},"__metadata__":{}}', 0, "must not be repeated"],
      ["metadata that is no object", '{"__metadata__":"x"}', 0, "object of strings"],
      ["metadata that is a list", '{"__metadata__":["x"]}', 0, "object of strings"],
      ["metadata that is no string", '{"__metadata__":{"x":1}}', 0, "must be a string, got 1"],
      ["metadata with half a surrogate pair", '{"__metadata__":{"x":"\\ud800"}}', 0, "valid Unicode"],
      ["an entry that is no object", '{"a":[0,1]}', 1, "got [0,1]", "a"],
      ["an entry without offsets", '{"a":{"dtype":"U8","shape":[1]}}', 1, "got keys", "a"],
      [
        "an entry with a key too many",
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}}',
        1,
        "got keys",
        "a",
      ],
      [
        "an entry with __proto__ instead",
        '{"a":{"dtype":"U8","shape":[1],"__proto__":[0,1]}}',
        1,
        "got nothing",
        "a",
      ],
      ["an unknown dtype", `{${entry("a", "F5", [2], 0, 1)}}`, 1, 'got "F5"', "a"],
      [
        "a dtype that objects inherit",
        `{${entry("a", "constructor", [2], 0, 1)}}`,
        1,
        "dtype must be one of F64",
        "a",
      ],
      ["a dtype that is no string", '{"a":{"dtype":8,"shape":[1],"data_offsets":[0,1]}}', 1, "got 8", "a"],
      [
        "a shape that is no array",
        '{"a":{"dtype":"U8","shape":1,"data_offsets":[0,1]}}',
        1,
        "shape must be",
        "a",
      ],
      ["a negative dimension", '{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}', 1, 'got "-1"', "a"],
      ["negative zero", '{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', 0, 'got "-0"', "a"],
      ["a fraction", '{"a":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}}', 1, 'got "1.5"', "a"],
      [
        "an integer written as a fraction",
        '{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}',
        1,
        'got "1.0"',
        "a",
      ],
      ["an exponent", '{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}', 1, 'got "1e0"', "a"],
      ["a null", '{"a":{"dtype":"U8","shape":null,"data_offsets":[0,1]}}', 1, 'got "null"', "a"],
      [
        "a text dimension",
        '{"a":{"dtype":"U8","shape":["1"],"data_offsets":[0,1]}}',
        1,
        "shape must be",
        "a",
      ],
      [
        "a dimension above 2^53",
        `{${entry("a", "U8", [], 0, 1).replace("[]", "[9007199254740993]")}}`,
        1,
        "shape must be",
        "a",
      ],
      [
        "an overflowing product",
        `{${entry("a", "U8", [2 ** 32, 2 ** 32], 0, 0)}}`,
        0,
        "at most 2^53 − 1 bytes",
        "a",
      ],
      [
        "a product that wraps to 0 in 64 bits",
        `{${entry("a", "U8", [2 ** 32, 2 ** 32, 4], 0, 0)}}`,
        0,
        "at most 2^53",
        "a",
      ],
      [
        "an overflow that a zero would hide",
        `{${entry("a", "U8", [2 ** 40, 2 ** 40, 0], 0, 0)}}`,
        0,
        "at most 2^53",
        "a",
      ],
      ["overflowing bytes", `{${entry("a", "F64", [2 ** 52], 0, 8)}}`, 8, "at most 2^53 − 1 bytes", "a"],
      [
        "nine dimensions",
        `{${entry("a", "U8", [1, 1, 1, 1, 1, 1, 1, 1, 1], 0, 1)}}`,
        1,
        "at most 8 items",
        "a",
      ],
      ["a deep header", `{"a":${"[".repeat(9999)}`, 0, "nested at most 3 deep", "a"],
      ["more bytes than the shape takes", `{${entry("a", "F32", [2], 0, 12)}}`, 12, "must take 8 bytes", "a"],
      ["fewer bytes than the shape takes", `{${entry("a", "F32", [2], 0, 4)}}`, 4, "must take 8 bytes", "a"],
      ["bytes for a zero-size tensor", `{${entry("a", "F32", [0], 0, 4)}}`, 4, "must take 0 bytes", "a"],
      ["a scalar without bytes", `{${entry("a", "F32", [], 0, 0)}}`, 0, "must take 4 bytes", "a"],
      ["offsets the wrong way round", `{${entry("a", "F32", [2], 8, 0)}}`, 8, "ordered and inside", "a"],
      ["one offset", '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}}', 1, "two integers", "a"],
      ["three offsets", '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,1]}}', 1, "two integers", "a"],
      [
        "offsets behind the end",
        `{${entry("a", "F32", [2], 0, 8)}}`,
        7,
        "inside the data of 7 bytes, got [0, 8]: the file is truncated, fetch",
        "a",
      ],
      [
        "an offset above 2^53",
        `{${entry("a", "U8", [1], 0, 1).replace("[0,1]", "[0,18446744073709551616]")}}`,
        1,
        "two",
        "a",
      ],
      ["an overlap", `{${entry("a", "U8", [4], 0, 4)},${entry("b", "U8", [4], 2, 6)}}`, 6, "overlap", "b"],
      [
        "the same bytes twice",
        `{${entry("a", "U8", [4], 0, 4)},${entry("b", "U8", [4], 0, 4)}}`,
        4,
        "overlap",
        "b",
      ],
      [
        "a zero-size tensor inside another",
        `{${entry("a", "U8", [4], 0, 4)},${entry("b", "U8", [0], 2, 2)}}`,
        4,
        "overlap",
      ],
      ["a gap", `{${entry("a", "U8", [4], 0, 4)},${entry("b", "U8", [4], 6, 10)}}`, 10, "gap", "b"],
      ["a gap at the start", `{${entry("a", "U8", [4], 1, 5)}}`, 5, "gap", "a"],
      ["bytes behind the last tensor", `{${good}}`, 9, "must fill the data of 9 bytes exactly, got 8"],
      ["data without tensors", "{}", 1, "must fill the data of 1 bytes exactly, got 0"],
      [
        "a long name",
        `{${entry("n".repeat(MAX_NAME_LENGTH + 1), "U8", [1], 0, 1)}}`,
        1,
        "at most 1024 characters",
      ],
      [
        "half a surrogate pair",
        `{"\\udc00":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}`,
        1,
        "valid Unicode",
      ],
    ];
  for (const [what, header, data, message, tensor] of cases) {
    test(what, () => {
      const error = thrown(() => open(header, data));
      expect(error).toBeInstanceOf(FormatError);
      expect(error.code).toBe("AQ_FORMAT");
      expect(error.path).toBe(path);
      expect(error.message).toContain(JSON.stringify(path));
      expect(error.message).toContain(message);
      if (tensor !== undefined) {
        expect(error.tensor).toBe(tensor);
        expect(error.message).toContain(JSON.stringify(tensor));
      }
    });
  }

  test("a header length that lies", () => {
    const bytes = fileBytes(`{${good}}`, 8);
    const lengths: [bigint, string][] = [
      [BigInt(bytes.length - 7), "must end inside the file"],
      [BigInt(MAX_HEADER_BYTES), "must end inside the file"],
      [BigInt(MAX_HEADER_BYTES) + 1n, "at most 100000000 bytes, got a length of 100000001"],
      [2n ** 63n, "at most 100000000 bytes"],
      [2n ** 64n - 1n, "got a length of 18446744073709551615"],
      [0n, 'start with "{"'],
      [1n, "valid JSON"],
    ];
    for (const [length, message] of lengths) {
      new DataView(bytes.buffer).setBigUint64(0, length, true);
      writeFileSync(path, bytes);
      const error = thrown(() => SafetensorsFile.open(path));
      expect(error).toBeInstanceOf(FormatError);
      expect(error.message).toContain(message);
    }
  });

  test("a file cut off anywhere", () => {
    const bytes = fileBytes(`{${good}}`, 8);
    for (let length = 0; length < bytes.length; length++) {
      writeFileSync(path, bytes.subarray(0, length));
      expect(thrown(() => SafetensorsFile.open(path))).toBeInstanceOf(FormatError);
    }
  });

  test("100 MB of hostile header fast, without building it", () => {
    const fd = openSync(path, "w+");
    ftruncateSync(fd, 8 + MAX_HEADER_BYTES); // a sparse file of zeros
    const start = new TextEncoder().encode(`{"a":{"shape":[${"0,".repeat(1000)}`);
    writeFileSync(fd, Uint8Array.of(0x00, 0xe1, 0xf5, 0x05, 0, 0, 0, 0, ...start));
    closeSync(fd);
    expect(thrown(() => SafetensorsFile.open(path)).message).toContain("at most 8 items");
  });

  test("control characters in a message are escaped", () => {
    const { message } = thrown(() => open('{"\\u001b[2J\u009b\u202e":1}'));
    expect(message).toContain("entry must be");
    expect(/\p{Cc}|\p{Cf}/u.test(message)).toBe(false);
  });

  test("what is no file", () => {
    for (const wrong of [join(folder.path, "absent.safetensors"), folder.path, join(path, "below")]) {
      const error = thrown(() => SafetensorsFile.open(wrong));
      expect(error).toBeInstanceOf(CheckpointError);
      expect(error.message).toContain(JSON.stringify(wrong));
    }
  });
});

describe("SafetensorsFile reads with care", () => {
  let file: SafetensorsFile;
  beforeAll(() => {
    mkdirSync(join(folder.path, "care"));
    file = SafetensorsFile.open(
      writeRaw(join(folder.path, "care", "x"), `{${entry("a", "U8", [8], 0, 8)}}`, 8),
    );
  });

  test("ranges outside the tensor are refused", () => {
    for (const [from, to] of [[0, 9], [-1, 2], [4, 3], [9, 9], [0.5, 1], [NaN, 1], [0, NaN]] as const) {
      expect(thrown(() => file.read("a", from, to))).toBeInstanceOf(RangeError);
    }
    expect(thrown(() => file.readInto("a", 1, new Uint8Array(8)))).toBeInstanceOf(RangeError);
    const error = thrown(() => file.read("b"));
    expect(error).toBeInstanceOf(CheckpointError);
    expect(error.tensor).toBe("b");
  });

  test("a file that shrank since it was opened", () => {
    truncateSync(file.path, file.fileBytes - 3);
    expect([...file.read("a", 0, 5)]).toEqual([0, 0, 0, 0, 0]);
    const error = thrown(() => file.read("a"));
    expect(error).toBeInstanceOf(FormatError);
    expect(error.tensor).toBe("a");
  });

  test("a closed file", () => {
    file.close();
    file.close();
    expect(thrown(() => file.read("a"))).toBeInstanceOf(TypeError);
  });
});

test("4000 mutated files open or are refused with FormatError, nothing else", () => {
  const seed = 20240611;
  const random = randomIntegers(seed);
  const header = `{"__metadata__":{"format":"pt"},${entry("a.weight", "F16", [3, 4], 0, 24)},${
    entry("b", "I64", [2], 24, 40)
  },${entry("c", "F32", [], 40, 44)},${entry("d", "BF16", [5, 0], 44, 44)}}  `;
  const original = fileBytes(header, 44);
  const tokens = [
    '"',
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "-",
    "9",
    "\\",
    "\\u0061",
    "e",
    "null",
    " ",
    "\0",
    "\xff",
  ];
  let opened = 0;
  for (let i = 0; i < 4000; i++) {
    let bytes = [...original];
    for (let changes = 1 + random(3); changes > 0; changes--) {
      // Most bytes of a real file are data: aim at the length and the header.
      const at = random(Math.min(bytes.length, 8 + header.length + 4));
      const kind = random(5);
      if (kind === 0) bytes[at] = bytes[at]! ^ (1 << random(8));
      else if (kind === 1) bytes[at] = random(256);
      else if (kind === 2) bytes = bytes.slice(0, at);
      else if (kind === 3) bytes.splice(at, 1 + random(4));
      else bytes.splice(at, random(2), ...[...tokens[random(tokens.length)]!].map((c) => c.charCodeAt(0)));
    }
    writeFileSync(path, Uint8Array.from(bytes));
    try {
      using file = SafetensorsFile.open(path);
      let total = 0;
      for (const info of file.tensors.values()) total += file.read(info.name).length;
      expect(total).toBeLessThan(file.fileBytes - 8);
      opened++;
    } catch (error) {
      if (error instanceof FormatError) continue;
      throw new Error(`seed ${seed}, case ${i}: ${readFileSync(path).toString("latin1")}`, { cause: error });
    }
  }
  expect(opened).toBeGreaterThan(0);
  expect(opened).toBeLessThan(2000);
});
