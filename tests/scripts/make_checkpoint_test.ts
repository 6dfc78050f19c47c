/** Checkpoints in FLUX's layout, and made-up statistics to solve them with. */
import { afterAll, describe, expect, test } from "bun:test";
import { existsSync, statSync } from "node:fs";
import { join } from "node:path";
import { loadStatistics } from "../../lib/calibration/saved_statistics.ts";
import { openCheckpoint } from "../../lib/tensor/mod.ts";
import { run, workplace } from "../_checkpoints.ts";

const place = workplace();
afterAll(() => place.remove());

/** Weights and biases of the published FLUX.1-dev. */
const PUBLISHED_PARAMETERS = 11_901_408_320;

describe("make_checkpoint.ts --layout flux", () => {
  test("19 layers have as many weights as the published model, and headers alone take no room", () => {
    const folder = place.fresh("whole");
    expect(run("make_checkpoint.ts", [folder, "--layout", "flux", "--layers", "19", "--headers-only"]).code)
      .toBe(0);
    using checkpoint = openCheckpoint(folder);
    const infos = [...checkpoint.tensors.values()].map(({ info }) => info);
    expect(infos.reduce((sum, { elements }) => sum + elements, 0)).toBe(PUBLISHED_PARAMETERS);
    const blocks = (stem: string) =>
      new Set(infos.flatMap(({ name }) => new RegExp(`^${stem}\\.\\d+`).exec(name)?.[0] ?? [])).size;
    expect([blocks("transformer_blocks"), blocks("single_transformer_blocks")]).toEqual([19, 38]);
    const { blocks: taken } = statSync(checkpoint.files[0]!.file.path);
    expect(taken * 512).toBeLessThan(2 ** 20);
  });

  test("its statistics are of every matrix, in blocks, and the default solver takes them", () => {
    const folder = place.fresh("small"), statistics = join(place.fresh(), "statistics.safetensors");
    const made = [folder, "--layout", "flux", "--hidden", "64", "--layers", "1"];
    const asked = ["--statistics", statistics, "--moment-block", "32"];
    expect(run("make_checkpoint.ts", [...made, ...asked]).code).toBe(0);
    const own = loadStatistics([statistics], "");
    using checkpoint = openCheckpoint(folder);
    const matrices = [...checkpoint.tensors.values()].filter(({ info: { shape } }) => shape.length === 2);
    expect([...own.inputs.values()].flatMap(({ layers }) => layers).sort())
      .toEqual(matrices.map(({ info }) => info.name).sort());
    // What FLUX's blocks read in one product: query, key and value, and in blocks of one stream the
    // feed-forward too.
    const together = own.inputOf("single_transformer_blocks.1.attn.to_q.weight").layers;
    expect(together.map((name) => name.replace(/^single_transformer_blocks\.1\./, "")))
      .toEqual(["attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight", "proj_mlp.weight"]);
    const { second, cols, block } = own.moments("single_transformer_blocks.0.proj_out.weight");
    expect([cols, block, second.length]).toEqual([320, 32, 320 * 32]);
    const output = place.fresh("out");
    const options = ["--bits", "4", "--group-size", "32", "--calibrate", statistics];
    const quantized = run("quantize.ts", [folder, output, ...options]);
    expect(quantized.stderr).not.toContain("have no statistics");
    expect(quantized.code).toBe(0);
  });

  test("a file that is there is not written over, and nothing is made", () => {
    const statistics = join(place.fresh(), "statistics.safetensors");
    const asked = ["--layout", "flux", "--hidden", "64", "--layers", "1", "--statistics", statistics];
    expect(run("make_checkpoint.ts", [place.fresh("first"), ...asked]).code).toBe(0);
    const second = place.fresh("second");
    const { code, stderr } = run("make_checkpoint.ts", [second, ...asked]);
    expect(code).not.toBe(0);
    expect(stderr).toContain(`Cannot write "${statistics}": it must not exist`);
    expect(existsSync(second)).toBe(false);
  });
});
