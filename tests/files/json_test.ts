/** JSON as Python writes it: NaN and infinities are read where Python reads them, and kept. */
import { afterAll, describe, expect, test } from "bun:test";
import { cpSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { resolveConfig } from "../../lib/config/mod.ts";
import { FormatError } from "../../lib/errors.ts";
import { parseJsonLine, readJsonFile, stringifyJson } from "../../lib/files/json.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { MODELS, workplace } from "../_checkpoints.ts";
import { thrown } from "../tensor/_files.ts";

const place = workplace();
const kernels = await openKernels({ threads: 1 });
afterAll(() => {
  kernels.close();
  place.remove();
});

function read(text: string): Record<string, unknown> {
  const path = place.fresh("file.json");
  writeFileSync(path, text);
  return readJsonFile(path);
}

describe("a file's JSON", () => {
  test("has Python's numbers, and texts that look like them stay texts", () => {
    const value = read(
      `{"a":NaN,"b":[Infinity , -Infinity,\n-0.5, NaN],"c":{"NaN":"NaN, Infinity"},"d":"\\"NaN","e" : -Infinity}`,
    );
    expect(value).toEqual({
      a: NaN,
      b: [Infinity, -Infinity, -0.5, NaN],
      c: { NaN: "NaN, Infinity" },
      d: '"NaN',
      e: -Infinity,
    });
  });

  test("has nothing that Python's reader refuses, and no key twice", () => {
    for (
      const text of [
        "{NaN: 1}",
        '{"a" NaN}',
        '{"a": nan}',
        '{"a": -NaN}',
        '{"a": +Infinity}',
        '{"a": Inf}',
        '{"a": InfinityNaN}',
        '{"a": [NaN NaN]}',
        '{"a": NaN "b": 1}',
        "NaN",
        '{"a": NaN, "a": 1}',
      ]
    ) expect([text, thrown(() => read(text)).constructor]).toEqual([text, FormatError]);
  });

  test("is written as Python writes it", () => {
    expect(stringifyJson({ a: [NaN, Infinity, -Infinity, 1], b: "NaN" })).toBe(
      '{"a":[NaN,Infinity,-Infinity,1],"b":"NaN"}',
    );
    expect(stringifyJson(undefined)).toBeUndefined();
  });

  test("may have them in a line of JSONL", () => {
    expect(parseJsonLine('{"text":"NaN","score":NaN}')).toEqual({ text: "NaN", score: NaN });
    expect(thrown(() => parseJsonLine('{"text":nan}'))).toBeInstanceOf(SyntaxError);
  });
});

test("config.json and the index keep them through a quantization, the rest of config.json to the letter", async () => {
  const input = place.fresh("model"), output = place.fresh("packed");
  cpSync(join(MODELS, "dream-mini"), input, { recursive: true });
  const config = join(input, "config.json"), index = join(input, "model.safetensors.index.json");
  const text = readFileSync(config, "utf8").replace(
    "{",
    '{\n  "time_step_limit": [0.0, Infinity],\n  "x": NaN,',
  );
  writeFileSync(config, text);
  writeFileSync(index, readFileSync(index, "utf8").replace(/"metadata": *\{/, '$&"loss": NaN,'));
  const { config: settings } = resolveConfig({ overrides: { solver: "clip", bit_width: 4 } });
  await quantizeCheckpoint({ input, output, config: settings, kernels });
  const written = readFileSync(join(output, "config.json"), "utf8");
  expect(written.startsWith(text.trimEnd().replace(/\s*\}$/, ""))).toBe(true);
  expect(readFileSync(join(output, "model.safetensors.index.json"), "utf8")).toContain('"loss": NaN');
  expect(readJsonFile(join(output, "config.json"))["time_step_limit"]).toEqual([0, Infinity]);
});
