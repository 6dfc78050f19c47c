import { expect, test } from "bun:test";
import process from "node:process";
import { compilePattern } from "../../lib/config/patterns.ts";
import { randomStream } from "../_kernels.ts";

const random = randomStream(11);
const one = <T>(list: readonly T[]): T => list[Math.floor(random() * list.length)]!;

/** A pattern of every construction. */
function anyPattern(depth: number): string {
  const kind = Math.floor(random() * 12);
  if (depth === 0 || kind < 4) {
    return one(["a", "b", ".", "\\.", "[ab]", "[^\\]c]", "\\w", "\\d", "\\b", "\\p{L}", "\\u{61}", "\\x62"]);
  }
  const inner = () => anyPattern(depth - 1);
  if (kind < 7) return inner() + inner();
  if (kind < 8) return `(${inner()}|${inner()})`;
  if (kind < 11) return `(?:${inner()})${one(["*", "+", "?", "{1,2}", "{2,}", "*?", "{2}"])}`;
  return `${one(["(?=", "(?!", "(?<=", "(?<!"])}${inner()})`;
}

/** A name that an engine cannot count on, long enough for sets of places to be matched. */
const LONG = "_".repeat(1200);

test("a pattern finds what JavaScript's regular expressions find", () => {
  for (let i = 0; i < 250; i++) {
    const source = anyPattern(3) + anyPattern(2),
      pattern = compilePattern(source),
      own = new RegExp(source, "u");
    for (let k = 0; k < 8; k++) {
      const name = Array.from({ length: 1 + Math.floor(random() * 6) }, () => one([..."abc.1_]"])).join("");
      expect([source, name, pattern.test(name)]).toEqual([source, name, own.test(name)]);
      // as part of a long name, with what surrounds it shut out
      const framed = `${LONG}<${name}>`, shut = compilePattern(`<(?:${source})>`);
      if (k === 0) {
        expect([source, framed, shut.test(framed)]).toEqual([
          source,
          framed,
          new RegExp(`<(?:${source})>`, "u").test(`<${name}>`),
        ]);
      }
    }
  }
});

test("no pattern takes for ever", () => {
  const hostile = [
    "^(([a-z_.0-9]+)+)+$X",
    "(.*.*.*.*.*.*.*.*.*.*)*X$",
    "(a|a)*b",
    "((a*)*)*b",
    `${"a?".repeat(60)}${"a".repeat(60)}b`,
    "(?:a{1,900}){1,900}b",
    "(?=(a+)+b)a",
    "(?<!(a+)+b)(a+)+c",
    ".*a.*a.*a.*a.*b",
  ];
  const begin = process.cpuUsage().user;
  for (const source of hostile) expect(compilePattern(source).test("a".repeat(1024))).toBe(false);
  expect(process.cpuUsage().user - begin).toBeLessThan(3e6); // microseconds
});

test("what cannot be matched so is refused", () => {
  expect(() => compilePattern("(a)\\1")).toThrow("no back references");
  expect(() => compilePattern("a{1,1001}")).toThrow("at most 1000 repetitions");
  for (const source of ["a(", "(?i:a)", "(?-i:a)+"]) {
    expect(() => compilePattern(source)).toThrow(SyntaxError);
  }
});
