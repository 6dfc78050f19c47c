import { expect, test } from "bun:test";
import { formatTable } from "../../lib/eval/table.ts";
import { StateDisplay } from "../../scripts/_command/progress.ts";
import { visible } from "../../scripts/_command/text.ts";

const HOSTILE = "a\x1b[2J\x1b]0;title\x07b\rc\b\x7f\x9b31m\u202ed\u2066e\u2028f";

test("nothing that a name holds moves a terminal's cursor or turns its text", () => {
  const shown = visible(HOSTILE);
  // deno-lint-ignore no-control-regex
  expect(shown).not.toMatch(/[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]/);
  expect(shown).toContain("a\\u001b[2J");
  expect(visible("two\nlines\tand a 👩‍👧")).toBe("two\nlines\tand a 👩‍👧");
});

test("JSON with such names is the same JSON", () => {
  expect(JSON.parse(visible(JSON.stringify({ [HOSTILE]: HOSTILE })))).toEqual({ [HOSTILE]: HOSTILE });
});

test("a display of states escapes its line, on a terminal and elsewhere", () => {
  for (const stream of [{ isTTY: true, columns: 80 }, {}]) {
    let written = "";
    new StateDisplay(stream, (text) => written += text).show(HOSTILE);
    expect(written).toContain("\\u001b[2J");
    expect(written).not.toContain("\x1b[2J");
  }
});

test("a table's cell is the row's own, whatever its column is called", () => {
  const columns = ["constructor", "toString", "__proto__", "x"].map((key) => ({ key, title: key }));
  expect(formatTable(columns, [{ x: 1 }]).at(-1)!.split(/ +/)).toEqual(["-", "-", "-", "1"]);
});
