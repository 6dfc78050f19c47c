import { readFileSync } from "node:fs";
import { describe, expect, test } from "bun:test";
import { readersPython, runReader } from "../_readers.ts";

describe("programs that read what is exported", () => {
  test("are of the versions that the list pins", async () => {
    const python = readersPython();
    if (python === undefined) return;
    const pins = readFileSync(new URL("requirements.txt", import.meta.url), "utf8");
    const found = await runReader(python, "versions.py", []) as Record<string, string>;
    for (const [name, version] of Object.entries(found)) expect(pins).toContain(`${name}==${version}\n`);
  });
});
