import { describe, expect, test } from "bun:test";
import { formatTable } from "../../lib/eval/table.ts";

describe("a table", () => {
  const columns = [
    { key: "name", title: "name" },
    { key: "rate", title: "Mw/s", digits: 1 },
    { key: "met", title: "met" },
  ];

  test("aligns text to the left and numbers to the right", () => {
    expect(formatTable(columns, [
      { name: "memcpy", rate: 2, met: true },
      { name: "x", rate: 1234.56, met: false },
    ])).toEqual([
      "name      Mw/s  met",
      "------  ------  ---",
      "memcpy     2.0  yes",
      "x       1234.6  no",
    ]);
  });

  test("shows a dash for what a row does not have, never a number", () => {
    expect(formatTable(columns, [{ name: "x", rate: null }, { name: "y", rate: 3, met: true }]).slice(2))
      .toEqual([
        "x        -  -",
        "y      3.0  yes",
      ]);
  });
});
