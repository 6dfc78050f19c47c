/**
 * The kernel suite: every kernel beside memcpy and ggml in the same run, in cache and from memory, over
 * threads and instruction sets, with the goals of the project beside what was measured.
 */
import { OtherLoad } from "../../eval/environment.ts";
import type { Summary } from "../../eval/statistics.ts";
import { RandomStream } from "../../models/random.ts";
import { INSTRUCTION_SETS, unchecked, withThreads } from "../../native/kernels.ts";
import { type Kernels, openKernels } from "../../native/mod.ts";
import { TRELLIS_BITS } from "../../config/names.ts";
import { type BitWidth, dequantize, quantize } from "../../quant/mod.ts";
import { type GgmlConversion, type GgmlType, openGgml } from "../ggml.ts";
import type { BenchContext, Suite, SuiteReport } from "../suite.ts";
import { rate } from "../timing.ts";
import {
  COLS,
  FULL_SCALE,
  Group,
  KernelBench,
  type KernelRow,
  type KernelScale,
  NO_GGML,
  type Place,
  QUICK_SCALE,
  type RatioOf,
} from "./bench.ts";
import {
  codesCase,
  convertCase,
  dequantizeCase,
  findNonfiniteCase,
  type KernelCase,
  type Operands,
  quantizeCase,
  type QuantizeSpec,
  relativeDifference,
  specName,
  statisticsCase,
  type TimedDtype,
  TRELLIS_DEQUANTIZE,
  trellisDequantizeCase,
  TWO_LEVEL_SPECS,
  twoLevelCase,
  twoLevelName,
  withIsa,
} from "./cases.ts";
import {
  GGML_DEQUANTIZE,
  GGML_QUANTIZE,
  GGML_QUANTIZE_SIMD,
  ggmlConvertCase,
  ggmlDequantizeCase,
  ggmlQuantizeCase,
  ggmlQuantizeSimdCase,
  memcpyCase,
} from "./peers.ts";
import { measureProducts } from "./product_suite.ts";
import { measureErrors } from "./weight_errors.ts";

const BITS: readonly BitWidth[] = [2, 3, 4, 8];

const placesOf = ({ scale }: KernelBench): readonly [Place, number][] => [
  ["in cache", scale.inCacheRows],
  ["from memory", scale.fromMemoryRows],
];

const roundSpec = (bits: BitWidth, zeroPoint: "real" | "symmetric", dtype: "F32" | "BF16" = "F32") =>
  ({ solver: "round", bits, groupSize: 32, zeroPoint, dtype }) as const;
const clipSpec = (bits: BitWidth, dtype: "F32" | "BF16" = "F32") =>
  ({ solver: "clip", bits, groupSize: 64, zeroPoint: "real", dtype }) as const;
const packedSpec = (bits: BitWidth) => ({ bits, groupSize: 64, zeroPoint: "real" }) as const;

async function measureRound(bench: KernelBench): Promise<void> {
  const { ggml } = bench;
  const name = (bits: BitWidth, zeroPoint: "real" | "symmetric") =>
    `round ${specName(roundSpec(bits, zeroPoint))}`;
  const ratios: RatioOf[] = (["symmetric", "real"] as const).flatMap((zeroPoint) => [
    { of: name(4, zeroPoint), to: GGML_QUANTIZE("q4_0") },
    { of: name(8, zeroPoint), to: GGML_QUANTIZE("q8_0") },
    { of: name(8, zeroPoint), to: GGML_QUANTIZE_SIMD },
    { of: name(2, zeroPoint), to: name(4, zeroPoint) },
  ]);
  const groups: Group[] = [];
  for (const [place, rows] of placesOf(bench)) {
    const operands = bench.operands(rows);
    const round = (widths: readonly BitWidth[], ...kind: ["symmetric" | "real", ("F32" | "BF16")?]) =>
      widths.map((bits) => quantizeCase(operands, roundSpec(bits, ...kind)));
    const cases = [
      memcpyCase(operands),
      ...round([2, 3, 4], "symmetric"),
      ...(ggml ? [ggmlQuantizeCase(ggml, operands, "q4_0")] : []),
      ...round([4, 2, 3], "real"),
      ...round([8], "symmetric"),
      ...(ggml ? [ggmlQuantizeCase(ggml, operands, "q8_0"), ggmlQuantizeSimdCase(ggml, operands)] : []),
      ...round([8], "real"),
      ...round([2, 4, 8], "real", "BF16"),
    ];
    groups.push(await bench.measure(new Group("Round to nearest", place, ratios), cases));
  }
  const both = (of: string, to: string) =>
    groups.map((group): [string, Summary | undefined] => [group.place, group.speed(of, to)]);
  for (const zeroPoint of ["symmetric", "real"] as const) {
    for (const [bits, type, least] of [[4, "q4_0", 1.5], [8, "q8_0", 2]] as const) {
      const speeds = both(name(bits, zeroPoint), GGML_QUANTIZE(type));
      bench.ratioGoal(`round ${bits} bits g 32 ${zeroPoint} / ggml ${type}`, least, speeds, NO_GGML);
    }
    const speeds = both(name(2, zeroPoint), name(4, zeroPoint));
    bench.ratioGoal(`round 2 bits g 32 ${zeroPoint} / 4 bits`, 1, speeds, "");
  }
}

const K_QUANTS = [[2, "q2_K"], [3, "q3_K"], [4, "q4_K"]] as const;

async function measureClip(bench: KernelBench): Promise<void> {
  const { ggml } = bench;
  const name = (bits: BitWidth) => `clip ${specName(clipSpec(bits))}`;
  const ratios = K_QUANTS.map(([bits, type]) => ({ of: name(bits), to: GGML_QUANTIZE(type) }));
  const operands = bench.operands(bench.scale.inCacheRows);
  const clip = (spec: QuantizeSpec) => quantizeCase(operands, spec);
  const group = await bench.measure(new Group("Clip search with least squares", "in cache", ratios), [
    memcpyCase(operands),
    ...BITS.flatMap((bits) => {
      const type = K_QUANTS.find(([width]) => width === bits)?.[1];
      return [clip(clipSpec(bits)), ...(ggml && type ? [ggmlQuantizeCase(ggml, operands, type)] : [])];
    }),
    clip({ ...clipSpec(2), zeroPoint: "symmetric" }),
    clip({ ...clipSpec(4), groupSize: 32, zeroPoint: "symmetric" }),
    clip(clipSpec(2, "BF16")),
  ]);
  const found = group.measured.get(name(2))!;
  const speed = rate(found.timing, found.of.weights).median / 1e6;
  bench.goals.push({
    goal: "clip search 2 bits g 64, one thread",
    wanted: "≥ 100 Mw/s",
    measured: `${speed.toFixed(0)} Mw/s`,
    met: speed >= 100,
  });
}

/** Column weights between 0.1 and 10, evenly on a logarithmic scale. */
function importanceOf(cols: number): Float32Array<ArrayBuffer> {
  const random = new RandomStream(5);
  return Float32Array.from({ length: cols }, () => 10 ** (2 * random.uniform() - 1));
}

async function measureTwoLevel(bench: KernelBench): Promise<void> {
  const { ggml } = bench;
  const importance = importanceOf(COLS);
  const ratios: RatioOf[] = TWO_LEVEL_SPECS.flatMap((spec) =>
    ["", ", weighted"].map((suffix) => ({
      of: twoLevelName(spec) + suffix,
      to: GGML_QUANTIZE(spec.peer) + suffix,
    }))
  );
  const operands = bench.operands(bench.scale.inCacheRows);
  const group = await bench.measure(new Group("Search of two-level scales", "in cache", ratios), [
    memcpyCase(operands),
    ...TWO_LEVEL_SPECS.flatMap((spec) => [
      twoLevelCase(operands, spec),
      ...(ggml ? [ggmlQuantizeCase(ggml, operands, spec.peer)] : []),
      twoLevelCase(operands, spec, importance),
      ...(ggml ? [ggmlQuantizeCase(ggml, operands, spec.peer, importance)] : []),
    ]),
  ]);
  for (const { peer, ...spec } of TWO_LEVEL_SPECS) {
    for (const suffix of ["", ", weighted"]) {
      const speed = group.speed(twoLevelName(spec) + suffix, GGML_QUANTIZE(peer) + suffix);
      bench.ratioGoal(`${twoLevelName(spec)}${suffix} / ggml ${peer}`, 7, [[group.place, speed]], NO_GGML);
    }
  }
}

/** ggml's formats of each width, among which the fastest is the one to match. */
const DEQUANTIZED: Record<BitWidth, readonly GgmlType[]> = {
  2: ["q2_0", "tq2_0", "q2_K"],
  3: ["q3_K"],
  4: ["q4_0", "q4_1", "q4_K"],
  8: ["q8_0"],
};

async function measureDequantize(bench: KernelBench): Promise<void> {
  const { ggml } = bench;
  const name = (bits: BitWidth) => `dequantize ${specName(packedSpec(bits))}`;
  const ratios: RatioOf[] = [
    ...BITS.flatMap((bits) =>
      DEQUANTIZED[bits].map((type) => ({ of: name(bits), to: GGML_DEQUANTIZE(type) }))
    ),
    ...TRELLIS_BITS.map((bits) => ({ of: TRELLIS_DEQUANTIZE(bits), to: name(bits), label: "uniform" })),
  ];
  const groups: Group[] = [];
  for (const [place, rows] of placesOf(bench)) {
    const operands = bench.operands(rows);
    const cases = [
      memcpyCase(operands),
      ...BITS.flatMap((bits) => [
        dequantizeCase(operands, packedSpec(bits)),
        ...(ggml ? DEQUANTIZED[bits].map((type) => ggmlDequantizeCase(ggml, operands, type)) : []),
      ]),
      ...TRELLIS_BITS.map((bits) => trellisDequantizeCase(operands, bits)),
      dequantizeCase(operands, { bits: 4, groupSize: 32, zeroPoint: "symmetric" }),
      dequantizeCase(operands, packedSpec(4), "F16"),
      dequantizeCase(operands, packedSpec(4), "BF16"),
    ];
    groups.push(await bench.measure(new Group("Dequantize", place, ratios), cases));
  }
  for (const bits of TRELLIS_BITS) {
    const trellis = groups.map((group): [string, Summary | undefined] => [
      group.place,
      group.speed(TRELLIS_DEQUANTIZE(bits), name(bits)),
    ]);
    bench.ratioGoal(`dequantize trellis codes / uniform of ${bits} bits`, 0.4, trellis, "");
  }
  for (const bits of BITS) {
    const slowest = groups.flatMap((group): [string, Summary][] => {
      const [fastest] = DEQUANTIZED[bits].flatMap((type) => {
        const speed = group.speed(name(bits), GGML_DEQUANTIZE(type));
        return speed ? [{ type, speed }] : [];
      }).sort((a, b) => a.speed.median - b.speed.median);
      return fastest ? [[`${fastest.type} ${group.place}`, fastest.speed]] : [];
    });
    bench.ratioGoal(`dequantize ${bits} bits / ggml's fastest of ${bits} bits`, 1, slowest, NO_GGML);
    const large = groups[1]!, bytes = large.bytesAgainstMemcpy(name(bits));
    bench.ratioGoal(`dequantize ${bits} bits / memcpy's bytes`, 0.5, [[large.place, bytes]], "");
  }
}

const CONVERSIONS: readonly [TimedDtype, TimedDtype, readonly GgmlConversion[]][] = [
  ["F16", "F32", ["base f16 to f32", "simd f16 to f32"]],
  ["BF16", "F32", ["base bf16 to f32", "simd bf16 to f32"]],
  ["F32", "F16", ["base f32 to f16", "simd f32 to f16"]],
  ["F32", "BF16", ["base f32 to bf16", "simd f32 to bf16"]],
  ["F8_E4M3", "F32", []],
  ["F32", "F8_E4M3", []],
  ["F8_E5M2", "F32", []],
  ["F32", "F8_E5M2", []],
  ["BF16", "F16", []],
];

async function measureRest(bench: KernelBench): Promise<void> {
  const { ggml } = bench;
  const ratios = CONVERSIONS.flatMap(([from, to, peers]) =>
    peers.map((peer) => ({ of: `convert ${from} to ${to}`, to: `ggml ${peer}` }))
  );
  for (const [place, rows] of placesOf(bench)) {
    const operands = bench.operands(rows);
    await bench.measure(new Group("Convert", place, ratios), [
      memcpyCase(operands),
      ...CONVERSIONS.flatMap(([from, to, peers]) => [
        convertCase(operands, from, to),
        ...(ggml ? peers.map((peer) => ggmlConvertCase(ggml, operands, peer)) : []),
      ]),
    ]);
    const codes = (bits: BitWidth) =>
      (["pack", "unpack"] as const).map((direction) => codesCase(operands, direction, bits));
    await bench.measure(new Group("Codes", place), [memcpyCase(operands), ...BITS.flatMap(codes)]);
    await bench.measure(new Group("Statistics and search", place), [
      memcpyCase(operands),
      ...[undefined, ...BITS].map((bits) => statisticsCase(operands, bits)),
      findNonfiniteCase(operands, "F32"),
      findNonfiniteCase(operands, "BF16"),
    ], ["The search stops nowhere here: it reads everything. memcpy's bytes count twice, read and written."]);
  }
}

/** A name, and how its case is made. */
type NamedCall = readonly [name: string, make: (operands: Operands, name: string) => KernelCase];

const quantizingCalls = (specs: readonly QuantizeSpec[]): NamedCall[] => [
  ...specs.map((spec): NamedCall => [
    `${spec.solver} ${specName(spec)}`,
    (operands, name) => quantizeCase(operands, spec, name),
  ]),
  [
    `dequantize ${specName(packedSpec(4))}`,
    (operands, name) => dequantizeCase(operands, packedSpec(4), "F32", name),
  ],
];

async function measureThreads(bench: KernelBench): Promise<void> {
  const { kernels, context: { options, environment } } = bench;
  const threads = options.threads ?? 2;
  const goal = `${threads} threads / one, clip search 2 bits in cache`, least = 1.8;
  const skip = (reason: string) => {
    bench.skipped.push({ what: "threads", reason });
    bench.ratioGoal(goal, least, [], reason);
  };
  if (kernels.backend === "wasm") return skip("WebAssembly has one thread");
  if (threads < 2 || threads > environment.cores) {
    return skip(`${threads} threads on ${environment.cores} cores`);
  }
  const operands = bench.operands(bench.scale.threadedRows);
  const name = (text: string, count: number) => `${text}, ${count} thread${count === 1 ? "" : "s"}`;
  const calls = quantizingCalls([clipSpec(2), roundSpec(4, "real")]);
  const ratios = calls.map(([text]) => ({ of: name(text, threads), to: name(text, 1), label: "one thread" }));
  const group = new Group("Threads", "in cache", ratios);
  const cases = calls.flatMap(([text, make]) =>
    [1, threads].map((count) => make(operands.on(withThreads(kernels, count)), name(text, count)))
  );
  const others = new OtherLoad();
  await bench.measure(group, cases, ["A call starts its threads and ends them: that time is included."]);
  // Cores that other processes use are not there for our threads: the figure means little without this one.
  const load = others.cores();
  const label = load === undefined
    ? ""
    : `while others used ${load.toFixed(2)} of ${environment.cores} cores`;
  bench.ratioGoal(goal, least, [[label, group.speed(ratios[0]!.of, ratios[0]!.to)]], "");
}

const NATIVE_SETS = ["scalar", "avx2", "avx512", "neon"] as const;

/** The instruction sets of this processor, and WebAssembly, undefined where it does not open. */
async function openInstructionSets({ kernels, skipped }: KernelBench) {
  let wasm: Kernels | undefined;
  try {
    wasm = kernels.backend === "wasm" ? kernels : await openKernels({ backend: "wasm" });
  } catch (error) {
    skipped.push({ what: "WebAssembly", reason: error instanceof Error ? error.message : String(error) });
  }
  const sets: Kernels[] = [];
  for (const isa of kernels.backend === "native" ? NATIVE_SETS : []) {
    if (unchecked(kernels).calls.aq_isa_supported(INSTRUCTION_SETS[isa]) === 1) {
      sets.push(withIsa(kernels, isa));
    } else {
      skipped.push({ what: `instruction set ${isa}`, reason: "not on this processor or not in this build" });
    }
  }
  if (kernels.backend === "wasm") {
    skipped.push({ what: "native instruction sets", reason: "the backend is WebAssembly" });
  }
  if (wasm) sets.push(wasm);
  return { wasm, sets };
}

async function measureInstructionSets(bench: KernelBench): Promise<void> {
  const { wasm, sets } = await openInstructionSets(bench);
  const operands = bench.operands(bench.scale.inCacheRows);
  const rounds = [roundSpec(4, "symmetric"), roundSpec(4, "real"), roundSpec(8, "real")];
  const withGoals = quantizingCalls([...rounds, clipSpec(2)]);
  const others: NamedCall[] = [
    ["convert BF16 to F32", (operands, name) => convertCase(operands, "BF16", "F32", name)],
    ["packed error statistics, 4 bits", (operands, name) => statisticsCase(operands, 4, name)],
  ];
  for (const [i, [text, make]] of [...withGoals, ...others].entries()) {
    const name = ({ isa }: Pick<Kernels, "isa">) => `${text}, ${isa}`;
    const reference = name({ isa: "avx2" });
    const ratios = sets.map((kernels) => ({ of: name(kernels), to: reference, label: "avx2" }));
    const group = await bench.measure(
      new Group(`Instruction sets: ${text}`, "in cache", ratios.filter(({ of }) => of !== reference)),
      sets.map((kernels) => make(operands.on(kernels), name(kernels))),
    );
    if (i >= withGoals.length) continue;
    const speed = group.speed(name({ isa: "simd128" }), reference);
    bench.ratioGoal(`WebAssembly / AVX2, ${text}`, 0.25, [["", speed]], "no WebAssembly or no AVX2");
  }
  if (wasm !== bench.kernels) wasm?.close();
}

async function measurePublicApi(bench: KernelBench): Promise<void> {
  const { kernels, scale: { threadedRows } } = bench;
  const operands = bench.operands(threadedRows), weights = bench.weights(threadedRows);
  const spec: QuantizeSpec = { solver: "round", ...packedSpec(4) };
  const raw = quantizeCase(operands, spec, "aq_quantize_round 4 bits");
  const rawBack = dequantizeCase(operands, spec, "F32", "aq_dequantize 4 bits");
  const quantized = () => quantize(kernels, { data: weights, dtype: "F32" }, threadedRows, COLS, spec);
  const tensor = quantized();
  const ratios = [{ of: "quantize()", to: raw.name }, { of: "dequantize()", to: rawBack.name }];
  const cases: KernelCase[] = [
    raw,
    { ...raw, name: "quantize()", contender: { run: () => void quantized() }, check: () => {} },
    rawBack,
    {
      ...rawBack,
      name: "dequantize()",
      contender: { run: () => void dequantize(kernels, tensor) },
      check() {
        const error = relativeDifference(dequantize(kernels, tensor), weights);
        if (error < 0.12) return;
        throw new Error(`Cannot time quantize(): its relative error must be below 0.12, got ${error}`);
      },
    },
  ];
  await bench.measure(new Group("Public functions", "in cache", ratios), cases, [
    "The functions of lib/quant check their arguments and allocate their results; the kernels below them do not.",
  ]);
}

/** The suite at a scale, by default that of the options. */
export const kernelSuiteOf = (scale?: KernelScale): Suite<KernelRow> => ({
  name: "kernels",
  summary: "each kernel against memcpy and ggml, over sizes, threads and instruction sets",
  run: (context) => measureAll(context, scale ?? (context.options.quick ? QUICK_SCALE : FULL_SCALE)),
});

/** Every kernel against memcpy and ggml. */
export const kernelSuite: Suite<KernelRow> = kernelSuiteOf();

async function measureAll(context: BenchContext, scale: KernelScale): Promise<SuiteReport<KernelRow>> {
  const opened = await openGgml();
  const ggml = "reason" in opened ? undefined : opened;
  const bench = new KernelBench(context, ggml, scale);
  if ("reason" in opened) bench.skipped.push({ what: "every ggml row", reason: opened.reason });
  else context.progress(`ggml: libggml-base.so and ${opened.processorLibrary}`);
  try {
    // An engine that holds much memory is slower to allocate more and busy freeing it: large matrices come
    // last.
    await measurePublicApi(bench);
    await measureThreads(bench);
    await measureInstructionSets(bench);
    await measureClip(bench);
    await measureTwoLevel(bench);
    measureErrors(bench);
    await measureRound(bench);
    await measureDequantize(bench);
    await measureRest(bench);
    await measureProducts(bench);
  } finally {
    ggml?.close();
  }
  const { sections, rows, goals, skipped } = bench;
  return { sections, rows, goals, skipped };
}
