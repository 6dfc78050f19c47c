import { afterAll, describe, expect, test } from "bun:test";
import { spawn } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { denoBinary } from "./_deno.ts";

const root = fileURLToPath(new URL("..", import.meta.url));
const folder = mkdtempSync(join(tmpdir(), "arrowquant-remote-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

function run(
  command: string,
  args: string[],
): Promise<{ code: number | null; output: string; errors: string }> {
  return new Promise((resolve) => {
    const child = spawn(command, args, {
      cwd: folder,
      env: { PATH: "/nonexistent", HOME: folder, DENO_DIR: join(folder, "deno"), NO_COLOR: "1" },
    });
    let output = "", errors = "";
    child.stdout.on("data", (chunk) => output += chunk);
    child.stderr.on("data", (chunk) => errors += chunk);
    child.on("close", (code) => resolve({ code, output, errors }));
  });
}

describe("import from a URL", () => {
  test("a Deno program in an empty folder quantizes and dequantizes with mod.ts from loopback HTTP", async () => {
    const deno = denoBinary();
    if (deno === undefined) {
      console.log("skipped: no Deno");
      return;
    }
    const requests: string[] = [];
    const server = createServer((request, response) => {
      const path = new URL(request.url ?? "/", "http://localhost").pathname;
      requests.push(path);
      if (!/^\/(mod\.ts|lib\/[\w/]+\.ts)$/.test(path) || !existsSync(join(root, path))) {
        response.writeHead(404).end();
        return;
      }
      response.writeHead(200, { "content-type": "application/typescript" }).end(
        readFileSync(join(root, path)),
      );
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    try {
      const host = `127.0.0.1:${(server.address() as AddressInfo).port}`;
      const program = join(folder, "program.ts");
      writeFileSync(
        program,
        `import { dequantize, openKernels, quantize, resolveConfig } from "http://${host}/mod.ts";
        const kernels = await openKernels();
        const data = Float32Array.from({ length: 4096 }, (_, i) => Math.sin(i));
        const packed = quantize(kernels, { data, dtype: "F32" }, 32, 128, { bits: 8 });
        const restored = dequantize(kernels, packed);
        const worst = Math.max(...restored.map((w, i) => Math.abs(w - data[i])));
        console.log(JSON.stringify({ backend: kernels.backend, worst, bits: resolveConfig({}).config.bitWidth }));`,
      );
      const arguments_ = ["run", "--no-prompt", "--no-check", `--allow-import=${host}`, program];
      const { code, output, errors } = await run(deno, arguments_);
      if (code !== 0) throw new Error(errors);
      const result = JSON.parse(output);
      expect(result.backend).toBe("wasm"); // nothing is permitted and nothing installed
      expect(result.worst).toBeLessThan(0.005);
      expect(result.bits).toBe(4);
      expect(requests).toContain("/mod.ts");
    } finally {
      server.close();
    }
  });
});
