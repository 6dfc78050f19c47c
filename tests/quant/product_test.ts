import { expect, test } from "bun:test";
import { RandomStream } from "../../lib/models/mod.ts";
import { withThreads } from "../../lib/native/mod.ts";
import { addProduct } from "../../lib/quant/product.ts";
import { allKernels } from "../_kernels.ts";

const random = new RandomStream(3, 0);
const normals = (n: number) => Float32Array.from({ length: n }, () => random.normal());

test("a product is Σ a b, the same bytes from every instruction set, WebAssembly and any number of threads", async () => {
  const all = await allKernels();
  for (const [rows, k, cols] of [[1, 1, 1], [15, 193, 33], [170, 9, 65], [29, 300, 70]] as const) {
    const a = normals(rows * k), b = normals(k * cols), start = normals(rows * cols);
    const sums = all.flatMap(({ kernels }) =>
      [1, 3].map((threads) => {
        const out = start.slice();
        addProduct(withThreads(kernels, threads), "multiply", a, b, { rows, k, cols }, out);
        return out;
      })
    );
    for (let i = 0; i < rows; i++) {
      for (let j = 0; j < cols; j++) {
        let sum = start[i * cols + j]!;
        for (let l = 0; l < k; l++) sum += a[i * k + l]! * b[l * cols + j]!;
        expect(Math.abs(sums[0]![i * cols + j]! - sum)).toBeLessThan(1e-4);
      }
    }
    for (const other of sums.slice(1)) expect(other).toEqual(sums[0]!);
  }
});
