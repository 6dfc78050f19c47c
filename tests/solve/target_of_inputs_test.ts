/** Corrected targets of moments in blocks, against the equations of the whole moment in float64. */
import { afterAll, expect, test } from "bun:test";
import { RandomStream } from "../../lib/models/mod.ts";
import { openKernels } from "../../lib/native/mod.ts";
import { factorMoments } from "../../lib/quant/solvers/factored_moment.ts";
import { accumulateMoment, emptyMoments } from "../../lib/quant/solvers/moments.ts";
import { targetOfInputs } from "../../lib/solve/target_of_inputs.ts";

const kernels = await openKernels({ threads: 1 });
afterAll(() => kernels.close());

const COLS = 48, ROWS = 5, TOKENS = 160, PARTS = 4, DAMPING = 0.05;

test("more steps come nearer to the solution of the whole moment's equations, and reach it", async () => {
  const random = new RandomStream(8, 0);
  const normals = (n: number) => Float32Array.from({ length: n }, () => random.normal());
  const x = normals(TOKENS * COLS), shared = normals(TOKENS), weights = normals(ROWS * COLS);
  for (let i = 0; i < x.length; i++) x[i]! += 0.7 * shared[Math.floor(i / COLS)]!; // every column knows of the others
  const lost = x.map((value) => 0.1 * value + 0.1 * random.normal()), stream = normals(TOKENS * ROWS);
  const own = Float32Array.from({ length: TOKENS }, (_, t) => t % 3 === 0 ? 0.3 : 1);
  const weight = own.reduce((sum, value) => sum + value, 0), correction = 1, residualCorrection = 0.5;

  // (T − W) (M + λ) = G in float64
  const m = new Float64Array(COLS * COLS), g = new Float64Array(ROWS * COLS);
  let power = 0;
  for (let t = 0; t < TOKENS; t++) {
    for (let j = 0; j < COLS; j++) {
      const share = own[t]! * x[t * COLS + j]! / weight;
      for (let i = 0; i < COLS; i++) m[i * COLS + j]! += share * x[t * COLS + i]!;
      for (let row = 0; row < ROWS; row++) {
        let output = residualCorrection * stream[t * ROWS + row]!;
        for (let k = 0; k < COLS; k++) output += correction * weights[row * COLS + k]! * lost[t * COLS + k]!;
        g[row * COLS + j]! += share * output;
      }
    }
  }
  for (let i = 0; i < COLS; i++) power += m[i * COLS + i]! / COLS;
  for (let i = 0; i < COLS; i++) m[i * COLS + i]! += DAMPING * power;
  /** ‖(T − W) M − G‖ / ‖G‖ */
  const residual = (target: Float32Array) => {
    let off = 0, size = 0;
    for (let row = 0; row < ROWS; row++) {
      for (let j = 0; j < COLS; j++) {
        let value = -g[row * COLS + j]!;
        for (let i = 0; i < COLS; i++) {
          value += (target[row * COLS + i]! - weights[row * COLS + i]!) * m[i * COLS + j]!;
        }
        off += value ** 2;
        size += g[row * COLS + j]! ** 2;
      }
    }
    return Math.sqrt(off / size);
  };

  const each = TOKENS / PARTS;
  const part = (values: Float32Array, i: number, width: number) =>
    values.subarray(i * each * width, (i + 1) * each * width);
  const inputs = (i: number) => ({ x: part(x, i, COLS), tokens: each, weights: part(own, i, 1) });
  for (const block of [1, 16, 32]) {
    const moments = { ...emptyMoments(COLS, block), tokens: TOKENS, weight };
    accumulateMoment(kernels, x, undefined, own, TOKENS, moments.second, block);
    const moment = factorMoments(kernels, moments, { damping: DAMPING }), shares: number[] = [];
    const data = {
      parts: PARTS,
      weight,
      inputs,
      lost: (i: number) => ({ ...inputs(i), lost: part(lost, i, COLS), lostStream: part(stream, i, ROWS) }),
      pause(share: number) {
        shares.push(share);
        return Promise.resolve();
      },
    };
    const errors: number[] = [];
    for (const steps of [2, 6, 40]) {
      const layer = { weights, rows: ROWS, moment };
      errors.push(
        residual(await targetOfInputs(kernels, layer, data, { correction, residualCorrection }, steps)),
      );
      expect(shares.at(-1)).toBe(1);
    }
    expect(errors[0]!).toBeLessThan(0.5);
    expect(errors[1]!).toBeLessThan(0.5 * errors[0]!);
    expect(errors[2]!).toBeLessThan(1e-4);
  }
});
