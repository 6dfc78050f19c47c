/**
 * What the project relies on from `@std/yaml` and `@std/cli/parse-args`, and nothing more.
 *
 * Where JSR is out of reach both names stand for npm packages (package.json, tsconfig.json); the same tests
 * hold for the real ones.
 */
import { describe, expect, test } from "bun:test";
import { parseArgs } from "@std/cli/parse-args";
import { parse } from "@std/yaml";

const read = (text: string): unknown => parse(text);

function messageOf(text: string): string {
  try {
    read(text);
  } catch (error) {
    return (error as Error).message;
  }
  throw new Error(`parsed without an error: ${text}`);
}

describe("parse of @std/yaml", () => {
  const scalars: [string, unknown][] = [
    ["4", 4],
    ["-4", -4],
    ["+4", 4],
    ["64.0", 64],
    ["0.25", 0.25],
    ["1e-4", 1e-4],
    ["1e-7", 1e-7],
    ["1.5E+3", 1500],
    [".inf", Infinity],
    ["-.inf", -Infinity],
    [".nan", NaN],
    ["true", true],
    ["false", false],
    ["yes", "yes"],
    ["null", null],
    ["~", null],
    ["", null],
    ['"4"', "4"],
    ["'4'", "4"],
    ["clip", "clip"],
    ["a b # comment", "a b"],
  ];
  for (const [text, value] of scalars) {
    test(`reads ${text} as a scalar`, () => {
      expect(read(`key: ${text}`)).toEqual({ key: value });
    });
  }

  test("keeps the sign of zero", () => {
    expect(Object.is((read("key: -0.0") as { key: number }).key, -0)).toBe(true);
  });

  for (const text of ["", "\n", "# only a comment\n", "---\n", "null"]) {
    test(`reads ${JSON.stringify(text)} as null`, () => {
      expect(read(text)).toBe(null);
    });
  }

  test("reads block and flow collections, and keys as strings", () => {
    expect(read("a:\n  - x\n  - 2\nb: [x, 2]\nc: {4: 8}\nd: []\ne: {}\n")).toEqual({
      a: ["x", 2],
      b: ["x", 2],
      c: { "4": 8 },
      d: [],
      e: {},
    });
  });

  test("returns plain objects", () => {
    expect(Object.getPrototypeOf(read("a: 1"))).toBe(Object.prototype);
  });

  test("reads a list or a scalar as the whole document", () => {
    expect(read("- 1\n- 2\n")).toEqual([1, 2]);
    expect(read("hello")).toBe("hello");
  });

  test("reads JSON strings with escapes", () => {
    const text = 'quote " backslash \\ tab \t nul \u0000 \u2028 é 😀';
    expect(read(`key: ${JSON.stringify(text).replace("\u2028", "\\u2028")}`)).toEqual({ key: text });
  });

  test("reads a JSON map on one line, then a comment", () => {
    expect(read('key: {"a\\\\.b": 2, "c: d": 16} # from here')).toEqual({ key: { "a\\.b": 2, "c: d": 16 } });
  });

  test("makes __proto__ an own key", () => {
    const value = read("__proto__: {polluted: 1}\n") as Record<string, unknown>;
    expect(Object.keys(value)).toEqual(["__proto__"]);
    expect(Object.getPrototypeOf(value)).toBe(Object.prototype);
  });

  test("resolves aliases", () => {
    expect(read("a: &x [1]\nb: *x\n")).toEqual({ a: [1], b: [1] });
  });

  const faults = [
    ["a duplicate key", "a: 1\na: 2\n"],
    ["an open list", "a: [1, 2\nb: 3\n"],
    ["an open string", 'a: "x\n'],
    ["a missing anchor", "a: *missing\n"],
    ["a second document", "a: 1\n---\nb: 2\n"],
  ] as const;
  for (const [fault, text] of faults) {
    test(`throws at ${fault}`, () => {
      expect(() => read(text)).toThrow();
    });
  }

  for (const text of ["a: 1\na: 2\n", "a: [1, 2\nb: 3\n", 'a: "x\n']) {
    test(`says where ${JSON.stringify(text)} is wrong`, () => {
      expect(messageOf(text).split("\n")[0]).toMatch(/at line \d+, column \d+:?$/);
    });
  }
});

describe("parseArgs of @std/cli", () => {
  const options = {
    boolean: ["json", "quick", "no-color"],
    string: ["bits", "out", "keep"],
    collect: ["keep"],
    alias: { bits: "b" },
  } as const;
  const run = (...args: string[]) => parseArgs(args, options);

  test("gives false to absent booleans, nothing to absent strings, an empty list to collected ones", () => {
    const args = run();
    expect(args._).toEqual([]);
    expect([args.json, args.quick]).toEqual([false, false]);
    expect(Object.hasOwn(args, "bits")).toBe(false);
    expect(args.keep).toEqual([]);
  });

  for (const args of [["--bits", "2"], ["--bits=2"], ["-b", "2"], ["-b2"], ["-b=2"]]) {
    test(`reads a string from ${args.join(" ")}`, () => {
      expect(run(...args).bits).toBe("2");
    });
  }

  test("does not let a boolean take the next argument", () => {
    expect(run("--json", "model")).toMatchObject({ json: true, _: ["model"] });
  });

  test("lets a boolean take true and false", () => {
    expect(run("--json", "false").json).toBe(false);
    expect(run("--json=false").json).toBe(false);
    expect(run("--json=true").json).toBe(true);
  });

  test("takes the last of a repeated string", () => {
    expect(run("--bits", "2", "--bits=3").bits).toBe("3");
  });

  test("collects into a list, also a single value", () => {
    expect(run("--keep", "a", "--keep=b,c").keep).toEqual(["a", "b,c"]);
    expect(run("--keep", "a").keep).toEqual(["a"]);
  });

  test("gives an empty string to a string option without a value", () => {
    expect(run("--bits").bits).toBe("");
    expect(run("--bits", "--json")).toMatchObject({ bits: "", json: true });
    expect(run("--out", "-")).toMatchObject({ out: "", _: ["-"] });
    expect(run("--out", "")).toMatchObject({ out: "", _: [""] });
  });

  test("keeps everything after the first equals sign", () => {
    expect(run("--out=a=b").out).toBe("a=b");
  });

  test("negates nothing", () => {
    expect(run("--json", "--no-json")).toMatchObject({ json: true, "no-json": true });
    expect(run("--no-quick")).toMatchObject({ quick: false, "no-quick": true });
    expect([run("--no-color", "a"), run()]).toMatchObject([{ "no-color": true, _: ["a"] }, {
      "no-color": false,
    }]);
  });

  test("turns positionals that look like numbers into numbers", () => {
    expect(run("model", "7", "1e3", "0x10", "7B")._).toEqual(["model", 7, 1000, 16, "7B"]);
    expect(parseArgs(["7"], { string: ["_"] })._).toEqual(["7"]);
  });

  test("leaves what follows -- unparsed", () => {
    expect(run("a", "--", "--json", "--no-quick")).toMatchObject({
      _: ["a", "--json", "--no-quick"],
      json: false,
    });
  });

  test("asks `unknown` about undeclared options and positionals, and drops what it refuses", () => {
    const seen: [string, string | undefined][] = [];
    const args = parseArgs(["model", "--json", "--bitz", "2", "--no-quick", "--keep=a", "-x"], {
      ...options,
      unknown: (arg: string, key?: string) => {
        seen.push([arg, key]);
        return !arg.startsWith("-");
      },
    });
    expect(seen).toEqual([["model", undefined], ["--bitz", "bitz"], ["--no-quick", "no-quick"], ["-x", "x"]]);
    expect(args).toMatchObject({ _: ["model"], json: true, keep: ["a"] });
    expect(Object.hasOwn(args, "bitz") || Object.hasOwn(args, "x")).toBe(false);
  });

  test("does not reach prototypes", () => {
    run("--__proto__.polluted=1", "--constructor.prototype.polluted=1");
    expect(({} as Record<string, unknown>)["polluted"]).toBe(undefined);
  });
});
