/**
 * The matrix products of the kernel suite: float32 beside the core's own multiply-adds, packed weights beside
 * float32 and ggml, 8-bit activations beside both.
 */
import { TRELLIS_BITS } from "../../config/names.ts";
import type { BitWidth } from "../../quant/mod.ts";
import { COLS, Group, type KernelBench, type RatioOf } from "./bench.ts";
import type { KernelCase } from "./cases.ts";
import {
  int8LinearCase,
  LINEAR_F32,
  LINEAR_INT8,
  LINEAR_PACKED,
  LINEAR_TRELLIS,
  LINEAR_TRELLIS_INT8,
  linearCase,
  packedLinearCase,
  ProductOperands,
  quantizeActivationsCase,
  trellisInt8LinearCase,
  trellisLinearCase,
} from "./product_cases.ts";
import {
  FMA_PEAK,
  fmaPeakCase,
  GGML_DOT,
  type GgmlDotType,
  ggmlVectorCase,
  openProductPeers,
  type ProductPeers,
} from "./product_peers.ts";
import { gaussianWeights } from "../random.ts";
import type { Summary } from "../../eval/statistics.ts";
import { withTemporaryFolder } from "../temporary_folder.ts";

type Shape = readonly [tokens: number, rows: number, cols: number];

/** Products of the reference models: Dream's with 32 prompts of 36 tokens, DiT's with 8 images. */
const MODEL_SHAPES: readonly Shape[] = [
  [1152, 64, 64],
  [1152, 160, 64],
  [1152, 64, 160],
  [512, 128, 128],
  [512, 512, 128],
  [512, 128, 512],
];

/** ggml's formats of each width, like for like: 8-bit activations too. */
const GGML_OF: Record<BitWidth, readonly GgmlDotType[]> = {
  2: ["q2_K"],
  3: ["q3_K"],
  4: ["q4_0", "q4_K"],
  8: ["q8_0"],
};
const BITS: readonly BitWidth[] = [8, 4, 3, 2];

function operandsOf({ kernels, context: { options: { seed } } }: KernelBench, [tokens, rows, cols]: Shape) {
  const x = gaussianWeights(tokens * cols, seed + 1), weights = gaussianWeights(rows * cols, seed);
  return new ProductOperands(kernels, tokens, rows, cols, x, weights);
}

/** Float32 products as shares of the core's peak, which is measured in turn with them. */
async function measureShares(
  bench: KernelBench,
  peers: ProductPeers | undefined,
  reason: string,
): Promise<void> {
  const side = bench.scale.productSide;
  const peak = peers && fmaPeakCase(peers, bench.kernels);
  const missing = peers && !peak ? `instruction set ${bench.kernels.isa} has none to measure` : reason;
  if (!peak) bench.skipped.push({ what: "the core's peak of multiply-adds", reason: missing });
  const name = ([tokens, rows, cols]: Shape) => `F32, ${tokens} tokens, ${rows} × ${cols}`;
  const shapes: readonly Shape[] = [[side, side, side], ...MODEL_SHAPES];
  const names = shapes.map(name);
  const ratios = names.map((of) => ({ of, to: FMA_PEAK, label: "the core's multiply-adds" }));
  const group = new Group("Float32 products", "in cache", ratios, "multiply-adds");
  const cases: KernelCase[] = shapes.map((shape, i) => linearCase(operandsOf(bench, shape), names[i]!));
  await bench.measure(group, [...cases, ...(peak ? [peak] : [])], [
    "The last row is ten independent chains of fused multiply-adds in registers: what this core can do at the time.",
  ]);
  bench.ratioGoal(`F32 product ${side}³ / the core's multiply-adds`, 0.75, [
    ["", group.speed(names[0]!, FMA_PEAK)],
  ], missing);
  const shares = MODEL_SHAPES.map((shape) => ({ shape, speed: group.speed(name(shape), FMA_PEAK) }));
  const [lowest] = shares.sort((a, b) => (a.speed?.median ?? 0) - (b.speed?.median ?? 0));
  bench.ratioGoal(
    "lowest F32 product of the models / multiply-adds",
    0.6,
    [[lowest!.shape.join("·"), lowest!.speed]],
    missing,
  );
}

const productRatios = (bits: BitWidth): RatioOf[] => [
  { of: LINEAR_PACKED(bits), to: LINEAR_F32, label: "F32" },
  { of: LINEAR_INT8(bits), to: LINEAR_F32, label: "F32" },
  { of: LINEAR_INT8(bits), to: LINEAR_PACKED(bits), label: "F32 act." },
];

/** Trellis codes beside uniform ones of the same bits. */
const trellisRatios = (bits: BitWidth): readonly RatioOf[] => [
  { of: LINEAR_TRELLIS(bits), to: LINEAR_PACKED(bits), label: "uniform" },
  { of: LINEAR_TRELLIS_INT8(bits), to: LINEAR_INT8(bits), label: "uniform" },
];

function trellisGoals(bench: KernelBench, group: Group, tokens: string, least: number): void {
  for (const bits of TRELLIS_BITS) {
    const speeds = trellisRatios(bits).map(({ of, to }, i) =>
      [["F32", "8-bit"][i]!, group.speed(of, to)] as [string, Summary | undefined]
    );
    bench.ratioGoal(`trellis / uniform of ${bits} bits, ${tokens}`, least, speeds, "");
  }
}

/** Packed weights and 8-bit activations against float32, many tokens. */
async function measureTokens(bench: KernelBench): Promise<void> {
  const side = bench.scale.productSide;
  for (const tokens of [64, 256]) {
    const operands = operandsOf(bench, [tokens, side, side]);
    const title = `Products of ${tokens} tokens`;
    const ratios = [...BITS.flatMap(productRatios), ...TRELLIS_BITS.flatMap(trellisRatios)];
    const group = new Group(title, "in cache", ratios, "multiply-adds");
    await bench.measure(
      group,
      [
        linearCase(operands),
        ...BITS.map((bits) => packedLinearCase(operands, bits)),
        ...TRELLIS_BITS.map((bits) => trellisLinearCase(operands, bits)),
        ...BITS.map((bits) => int8LinearCase(operands, bits)),
        ...TRELLIS_BITS.map((bits) => trellisInt8LinearCase(operands, bits)),
        quantizeActivationsCase(operands),
        quantizeActivationsCase(operands, "static"),
      ],
      [
        "8-bit activations are quantized before; the last two rows are what that costs, once for all layers that read them.",
      ],
    );
    for (const bits of [4, 2] as const) {
      const time = group.speed(LINEAR_F32, LINEAR_PACKED(bits))!.median;
      bench.goals.push({
        goal: `${bits}-bit product of ${tokens} tokens / F32 product`,
        wanted: "≤ 1.25 × its time",
        measured: `${time.toFixed(2)} ×`,
        met: time <= 1.25,
      });
    }
    trellisGoals(bench, group, `${tokens} tokens`, 0.9);
    bench.ratioGoal(
      `8-bit / F32 activations, ${tokens} tokens`,
      1,
      BITS.map((bits) => [`(${bits})`, group.speed(LINEAR_INT8(bits), LINEAR_PACKED(bits))]),
      "",
    );
  }
}

/** One token: matrices read from memory. */
async function measureVector(
  bench: KernelBench,
  peers: ProductPeers | undefined,
  reason: string,
): Promise<void> {
  const { kernels, ggml, scale, context } = bench;
  const rows = scale.vectorRows, part = Math.min(rows, 1024) * COLS;
  const some = gaussianWeights(part, context.options.seed), weights = new Float32Array(rows * COLS);
  for (let at = 0; at < weights.length; at += part) {
    weights.set(some.subarray(0, Math.min(part, weights.length - at)), at);
  }
  const x = gaussianWeights(COLS, context.options.seed + 1);
  const operands = new ProductOperands(kernels, 1, rows, COLS, x, weights);
  const peersOf = (bits: BitWidth) => ggml && peers ? GGML_OF[bits] : [];
  const ratios: RatioOf[] = BITS.flatMap((bits) => [
    ...productRatios(bits),
    ...GGML_OF[bits].flatMap((type) => [
      { of: LINEAR_PACKED(bits), to: GGML_DOT(type), label: type },
      { of: LINEAR_INT8(bits), to: GGML_DOT(type), label: type },
    ]),
  ]);
  ratios.push(...TRELLIS_BITS.flatMap(trellisRatios));
  const group = new Group("Products of one token", "from memory", ratios, "multiply-adds");
  await bench.measure(
    group,
    [
      linearCase(operands),
      ...BITS.flatMap((bits) => [
        packedLinearCase(operands, bits),
        int8LinearCase(operands, bits),
        ...peersOf(bits).map((type) => ggmlVectorCase(ggml!, peers!, operands, type)),
      ]),
      ...TRELLIS_BITS.flatMap((bits) => [
        trellisLinearCase(operands, bits),
        trellisInt8LinearCase(operands, bits),
      ]),
    ],
    [
      "ggml's rows: its dot product of the processor's library called for every row by a loop in C, as its own product",
      "does, so that no call through the FFI is in the loop. Its activations have 8 bits: like for like is our row of",
      "8-bit activations. Between two samples of a row all other matrices are read.",
    ],
  );
  const speed = (of: string, to: string): Summary | undefined => group.speed(of, to);
  bench.ratioGoal("4-bit product of one token / F32", 2.5, [["", speed(LINEAR_PACKED(4), LINEAR_F32)]], "");
  bench.ratioGoal("2-bit product of one token / F32", 4, [["", speed(LINEAR_PACKED(2), LINEAR_F32)]], "");
  trellisGoals(bench, group, "one token", 0.7);
  for (const bits of BITS) {
    bench.ratioGoal(
      `${bits} bits, 8-bit activations, one token / ggml`,
      1,
      GGML_OF[bits].map((type) => [type, speed(LINEAR_INT8(bits), GGML_DOT(type))]),
      ggml ? reason : "ggml is not there",
    );
  }
}

export async function measureProducts(bench: KernelBench): Promise<void> {
  await withTemporaryFolder(async (folder) => {
    const opened = bench.kernels.backend === "native"
      ? await openProductPeers(folder)
      : { reason: "the backend is WebAssembly" };
    const peers = "reason" in opened ? undefined : opened;
    const reason = "reason" in opened ? opened.reason : "";
    try {
      await measureShares(bench, peers, reason);
      await measureTokens(bench);
      await measureVector(bench, peers, reason);
    } finally {
      peers?.close();
    }
  });
}
