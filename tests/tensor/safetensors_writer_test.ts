import { afterAll, describe, expect, test } from "bun:test";
import {
  closeSync,
  existsSync,
  linkSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { writeFully } from "../../lib/files/positional.ts";
import { IntegrityError, OutputError } from "../../lib/errors.ts";
import { DTYPES, SafetensorsFile, SafetensorsWriter, type TensorSpec } from "../../lib/tensor/mod.ts";
import { randomIntegers, readIndependently, temporaryFolder, thrown } from "./_files.ts";

const folder = temporaryFolder();
afterAll(folder.remove);
let paths = 0;
const newPath = () => join(folder.path, `${paths++}.safetensors`);

const SPECS: readonly TensorSpec[] = [
  { name: "layer.weight_packed", dtype: "U32", shape: [3, 2] },
  { name: "layer.weight_scale", dtype: "F16", shape: [3, 1] },
  { name: "odd", dtype: "U8", shape: [5] },
  { name: "nothing", dtype: "F32", shape: [0, 4] },
  { name: 'scalar "é"', dtype: "F64", shape: [] },
];
const METADATA = { format: "pt", note: 'é "quoted" \n 層' };
const OPTIONS = { reservedHeaderBytes: SafetensorsWriter.headerBytes(SPECS, METADATA), metadata: METADATA };

/** Bytes that tell tensors and places apart. */
function content(spec: TensorSpec, length: number): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => (spec.name.length * 31 + i) & 255);
}

function addAndWrite(writer: SafetensorsWriter, specs: readonly TensorSpec[]): void {
  for (const info of writer.add(specs)) writer.write(info.name, 0, content(info, info.byteLength));
}

function unbroken(): Uint8Array {
  const path = newPath();
  const writer = SafetensorsWriter.create(path, OPTIONS);
  addAndWrite(writer, SPECS);
  writer.finish();
  return readFileSync(path);
}

describe("SafetensorsWriter writes files", () => {
  test("that an independent reader and ours agree on", () => {
    const path = newPath();
    const writer = SafetensorsWriter.create(path, OPTIONS);
    addAndWrite(writer, SPECS);
    expect(existsSync(path)).toBe(false);
    const result = writer.finish();
    expect(result).toEqual({ path, bytes: statSync(path).size });
    expect(existsSync(writer.partialPath)).toBe(false);

    const seen = readIndependently(path);
    expect(seen.metadata).toEqual(METADATA);
    expect(seen.headerBytes).toBe(OPTIONS.reservedHeaderBytes);
    expect((8 + seen.headerBytes) % 8).toBe(0);
    expect(Object.keys(seen.tensors)).toEqual(SPECS.map(({ name }) => name));
    using file = SafetensorsFile.open(path);
    expect([...file.tensors.values()]).toEqual([...writer.tensors]);
    for (const spec of SPECS) {
      const { dtype, shape, data } = seen.tensors[spec.name]!;
      expect({ dtype, shape }).toEqual({ dtype: spec.dtype, shape: [...spec.shape] });
      expect([...data]).toEqual([...content(spec, data.length)]);
      expect([...file.read(spec.name)]).toEqual([...data]);
    }
  });

  test("of every dtype, without tensors, and with names special to JavaScript", () => {
    const path = newPath();
    const specs = [
      ...DTYPES.map((dtype) => ({ name: dtype, dtype, shape: [4] })),
      { name: "__proto__", dtype: "U8", shape: [2] } as const,
      { name: "7", dtype: "U8", shape: [1] } as const,
    ];
    const writer = SafetensorsWriter.create(path, {
      reservedHeaderBytes: SafetensorsWriter.headerBytes(specs),
    });
    addAndWrite(writer, specs);
    writer.finish();
    using file = SafetensorsFile.open(path);
    expect([...file.tensors.keys()]).toEqual(specs.map(({ name }) => name));
    expect([...file.read("__proto__")]).toEqual([...content(specs.at(-2)!, 2)]);

    SafetensorsWriter.create(path, { reservedHeaderBytes: 8 }).finish();
    expect(readIndependently(path).tensors).toEqual({});
    expect(readFileSync(path).toString("latin1")).toBe("\x08\0\0\0\0\0\0\0{}      ");
  });

  test("in pieces, in any order, again, and reads back what it wrote", () => {
    const path = newPath();
    using writer = SafetensorsWriter.create(path, { reservedHeaderBytes: 256 });
    writer.add([{ name: "a", dtype: "U8", shape: [10] }, { name: "b", dtype: "U8", shape: [2] }]);
    writer.write("b", 0, Uint8Array.of(8));
    writer.write("b", 1, Uint8Array.of(9));
    writer.write("a", 6, Uint8Array.of(6, 7, 8, 9));
    writer.write("a", 0, Uint8Array.of(0, 1, 2, 3));
    const both = new Uint8Array(2);
    writer.readInto("b", 0, both);
    expect([...both]).toEqual([8, 9]);
    const back = new Uint8Array(4);
    writer.readInto("a", 6, back);
    expect([...back]).toEqual([6, 7, 8, 9]);
    expect(thrown(() => writer.readInto("a", 3, back))).toBeInstanceOf(IntegrityError);
    const unfinished = thrown(() => writer.finish());
    expect(unfinished).toBeInstanceOf(IntegrityError);
    expect(unfinished.tensor).toBe("a");
    expect(unfinished.message).toContain("10 bytes written, got 8");
    writer.write("a", 2, Uint8Array.of(2, 3, 4, 5, 6));
    writer.readInto("a", 3, back);
    expect([...back]).toEqual([3, 4, 5, 6]);
    writer.finish();
    expect([...readIndependently(path).tensors["a"]!.data]).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
  });

  test("of random ranges, each byte the last one written", () => {
    const seed = 7;
    const random = randomIntegers(seed);
    const path = newPath();
    const writer = SafetensorsWriter.create(path, { reservedHeaderBytes: 128 });
    const wanted = new Uint8Array(200);
    const covered = new Set<number>();
    writer.add([{ name: "a", dtype: "U8", shape: [200] }]);
    while (covered.size < 200) {
      expect(`seed ${seed} ${thrown(() => writer.finish()).name}`).toBe(`seed ${seed} IntegrityError`);
      const start = random(200);
      const bytes = new Uint8Array(random(Math.min(30, 200 - start) + 1)).fill(random(256));
      writer.write("a", start, bytes);
      wanted.set(bytes, start);
      bytes.forEach((_, i) => covered.add(start + i));
    }
    writer.finish();
    expect([...readIndependently(path).tensors["a"]!.data]).toEqual([...wanted]);
  });

  test("whose newest tensors were taken back and replaced", () => {
    const path = newPath();
    const writer = SafetensorsWriter.create(path, OPTIONS);
    addAndWrite(writer, SPECS.slice(0, 1));
    addAndWrite(writer, [{ name: "odd", dtype: "F64", shape: [100] }, {
      name: "other",
      dtype: "F64",
      shape: [1],
    }]);
    writer.removeLast(2);
    expect(writer.tensors.length).toBe(1);
    expect(thrown(() => writer.write("other", 0, new Uint8Array(1)))).toBeInstanceOf(RangeError);
    expect(thrown(() => writer.removeLast(2))).toBeInstanceOf(RangeError);
    addAndWrite(writer, SPECS.slice(1));
    writer.finish();
    expect(Buffer.compare(readFileSync(path), unbroken())).toBe(0);
  });

  test("in place of a finished one, only at the end", () => {
    const path = newPath();
    writeFileSync(path, "old");
    writeFileSync(`${path}.partial`, `${"\0".repeat(8)}leftover of an earlier run`);
    const writer = SafetensorsWriter.create(path, OPTIONS);
    addAndWrite(writer, SPECS);
    expect(readFileSync(path).toString()).toBe("old");
    writer.finish();
    expect(Buffer.compare(readFileSync(path), unbroken())).toBe(0);
  });
});

describe("SafetensorsWriter resumes", () => {
  for (let complete = 0; complete <= SPECS.length; complete++) {
    test(`after ${complete} tensors, to the same bytes`, () => {
      const path = newPath();
      const first = SafetensorsWriter.create(path, OPTIONS);
      addAndWrite(first, SPECS.slice(0, complete));
      if (complete < SPECS.length) {
        first.add(SPECS.slice(complete, complete + 1));
        const begun = first.tensors.at(-1)!;
        first.write(begun.name, 0, new Uint8Array(Math.ceil(begun.byteLength / 2)).fill(0xee));
      }
      first.sync();
      first.close();
      expect(thrown(() => SafetensorsFile.open(first.partialPath)).name).toBe("FormatError");

      const second = SafetensorsWriter.resume(path, { ...OPTIONS, tensors: SPECS.slice(0, complete) });
      addAndWrite(second, SPECS.slice(complete));
      second.finish();
      expect(Buffer.compare(readFileSync(path), unbroken())).toBe(0);
    });
  }

  test("a run that stopped between header and rename, with the header void until it is done", () => {
    const path = newPath();
    writeFileSync(`${path}.partial`, Buffer.concat([unbroken(), new Uint8Array(99)]));
    const writer = SafetensorsWriter.resume(path, { ...OPTIONS, tensors: SPECS.slice(0, 2) });
    expect([...readFileSync(writer.partialPath).subarray(0, 8)]).toEqual([0, 0, 0, 0, 0, 0, 0, 0]);
    addAndWrite(writer, SPECS.slice(2, 3));
    addAndWrite(writer, SPECS.slice(3));
    writer.finish();
    expect(Buffer.compare(readFileSync(path), unbroken())).toBe(0);
  });

  test("not with a file shorter than its tensors, which stays as it was", () => {
    const path = newPath();
    writeFileSync(`${path}.partial`, unbroken());
    truncateSync(`${path}.partial`, 8 + OPTIONS.reservedHeaderBytes + 23);
    const error = thrown(() => SafetensorsWriter.resume(path, { ...OPTIONS, tensors: SPECS.slice(0, 1) }));
    expect(error).toBeInstanceOf(IntegrityError);
    expect(error.message).toContain(`got ${8 + OPTIONS.reservedHeaderBytes + 23}`);
    expect(statSync(`${path}.partial`).size).toBe(8 + OPTIONS.reservedHeaderBytes + 23);
  });

  test("not without an unfinished file", () => {
    const error = thrown(() => SafetensorsWriter.resume(newPath(), { ...OPTIONS, tensors: [] }));
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain("start again without --resume");
  });
});

describe("SafetensorsWriter refuses", () => {
  const reserved = { reservedHeaderBytes: 512 };

  test("impossible tensors, and adds none of a list with one", () => {
    using writer = SafetensorsWriter.create(newPath(), reserved);
    writer.add([{ name: "a", dtype: "U8", shape: [1] }]);
    const bad: unknown[] = [
      { name: "a", dtype: "U8", shape: [1] },
      { name: "__metadata__", dtype: "U8", shape: [1] },
      { name: "\ud800", dtype: "U8", shape: [1] },
      { name: "n".repeat(1025), dtype: "U8", shape: [1] },
      { name: "b", dtype: "F4", shape: [1] },
      { name: "b", dtype: "U8", shape: [-1] },
      { name: "b", dtype: "U8", shape: [1.5] },
      { name: "b", dtype: "U8", shape: [1, 1, 1, 1, 1, 1, 1, 1, 1] },
      { name: "b", dtype: "U8", shape: [2 ** 30, 2 ** 30] },
      { name: "b", dtype: "F64", shape: [2 ** 51] },
      { name: "ok", dtype: "U8", shape: [1] },
    ];
    for (const spec of bad as TensorSpec[]) {
      const error = thrown(() => writer.add([{ name: "ok", dtype: "U8", shape: [1] }, spec]));
      expect(error).toBeInstanceOf(RangeError);
      expect(error.message).toContain(JSON.stringify(spec.name.slice(0, 300)).slice(0, -1));
      expect(writer.tensors.length).toBe(1);
    }
  });

  test("a header that does not fit, before anything is written", () => {
    using writer = SafetensorsWriter.create(newPath(), { reservedHeaderBytes: 64 });
    expect(thrown(() => writer.add(SPECS)).message).toContain("must fit the 64 bytes");
    for (let i = 0; i < 5; i++) { // removing it gives its room back
      writer.add([{ name: "a", dtype: "U8", shape: [0] }]);
      writer.removeLast(1);
    }
    for (const reservedHeaderBytes of [0, 7, 60, -8, 1.5, NaN, 100_000_008]) {
      expect(thrown(() => SafetensorsWriter.create(newPath(), { reservedHeaderBytes }))).toBeInstanceOf(
        RangeError,
      );
    }
    const tight = { reservedHeaderBytes: 16, metadata: METADATA };
    expect(thrown(() => SafetensorsWriter.create(newPath(), tight))).toBeInstanceOf(RangeError);
  });

  test("metadata that is no text", () => {
    const metadata = { x: 1 } as unknown as Record<string, string>;
    expect(thrown(() => SafetensorsWriter.create(newPath(), { ...reserved, metadata }))).toBeInstanceOf(
      TypeError,
    );
    expect(thrown(() => SafetensorsWriter.headerBytes([], { x: "\udc00" }))).toBeInstanceOf(RangeError);
  });

  test("ranges outside a tensor, and use after the end", () => {
    const writer = SafetensorsWriter.create(newPath(), reserved);
    writer.add([{ name: "a", dtype: "U8", shape: [4] }, { name: "b", dtype: "U8", shape: [4] }]);
    for (const [start, length] of [[0, 5], [-1, 2], [4, 1], [0.5, 1]] as const) {
      expect(thrown(() => writer.write("a", start, new Uint8Array(length)))).toBeInstanceOf(RangeError);
      expect(thrown(() => writer.readInto("a", start, new Uint8Array(length)))).toBeInstanceOf(RangeError);
    }
    writer.close();
    writer.close();
    expect(thrown(() => writer.write("a", 0, new Uint8Array(1)))).toBeInstanceOf(TypeError);
    expect(thrown(() => writer.sync())).toBeInstanceOf(TypeError);
  });

  test("a file that was cut behind its back", () => {
    const writer = SafetensorsWriter.create(newPath(), OPTIONS);
    addAndWrite(writer, SPECS);
    truncateSync(writer.partialPath, 8 + OPTIONS.reservedHeaderBytes + 3);
    expect(thrown(() => writer.readInto("odd", 0, new Uint8Array(5)))).toBeInstanceOf(IntegrityError);
    expect(thrown(() => writer.finish())).toBeInstanceOf(IntegrityError);
    expect(existsSync(writer.path)).toBe(false);
    writer.close();
  });

  test("places that cannot be written, with a way out", () => {
    const blocked = newPath();
    mkdirSync(`${blocked}.partial`);
    const finished = newPath();
    mkdirSync(join(finished, "in the way"), { recursive: true });
    const calls: [() => unknown, string][] = [
      [() => SafetensorsWriter.create(join(folder.path, "absent", "x"), reserved), "create the folder first"],
      [() => SafetensorsWriter.create(blocked, reserved), "choose another name"],
      [() => SafetensorsWriter.create(finished, reserved).finish(), "rename the finished file"],
    ];
    for (const [call, message] of calls) {
      const error = thrown(call);
      expect(error).toBeInstanceOf(OutputError);
      expect(error.message).toContain(message);
      expect(error.cause).toBeInstanceOf(Error);
    }
    expect(readdirSync(folder.path)).toContain(`${finished.slice(folder.path.length + 1)}.partial`);
  });

  test("a full device", () => {
    if (!existsSync("/dev/full")) return console.log("skipped: this system has no /dev/full");
    const path = newPath(), fd = openSync("/dev/full", "r+");
    const error = thrown(() => writeFully(fd, new Uint8Array(4), 0, path)) as OutputError;
    closeSync(fd);
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain("no space left on the device");
    expect(error.path).toBe(path);
    expect((error.cause as { code?: string }).code).toBe("ENOSPC");
  });

  test("links, and does not empty a file that has another name elsewhere", () => {
    const path = newPath(), victim = newPath();
    writeFileSync(victim, "precious");
    symlinkSync(victim, `${path}.partial`);
    const specs = { ...reserved, tensors: [] };
    for (
      const call of [
        () => SafetensorsWriter.create(path, reserved),
        () => SafetensorsWriter.resume(path, specs),
      ]
    ) {
      expect(thrown(call)).toBeInstanceOf(OutputError);
    }
    rmSync(`${path}.partial`);
    linkSync(victim, `${path}.partial`);
    expect(thrown(() => SafetensorsWriter.create(path, reserved))).toBeInstanceOf(OutputError);
    expect(thrown(() => SafetensorsWriter.resume(path, specs)).message).toContain("got 2 (hard links)");
    expect(readFileSync(victim, "utf8")).toBe("precious");
    writeFileSync(victim, "\0".repeat(8) + "precious");
    SafetensorsWriter.create(path, reserved).close();
    expect(readFileSync(victim, "utf8")).toContain("precious");
  });
});

test("headerBytes is a bound that any offsets keep, not far above", () => {
  const specs = Array.from(
    { length: 50 },
    (_, i): TensorSpec => ({ name: `é${i}`, dtype: "U8", shape: [i, 2 ** 40] }),
  );
  const bound = SafetensorsWriter.headerBytes(specs, METADATA);
  expect(bound % 8).toBe(0);
  const writer = SafetensorsWriter.create(newPath(), { reservedHeaderBytes: bound, metadata: METADATA });
  writer.add(specs); // offsets up to 2^50 fit
  writer.close();
  expect(bound).toBeLessThan(50 * 120);
  expect(thrown(() => SafetensorsWriter.headerBytes(Array(1_200_000).fill(specs[0])))).toBeInstanceOf(
    RangeError,
  );
});
