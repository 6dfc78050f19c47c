/**
 * The kernel suite: every kernel against memcpy and against ggml in the same run, in cache and from memory, over
 * threads and instruction sets, with the goals of the project beside what was measured.
 */
import { type InstructionSet, type Kernels, openKernels } from "../../native/mod.ts";
import { type BitWidth, dequantize, packedBytes, quantize } from "../../quant/mod.ts";
import { OtherLoad } from "../../eval/environment.ts";
import { GGML_TYPES, type GgmlConversion, type GgmlType, openGgml } from "../ggml.ts";
import {
  COLS,
  FULL_SCALE,
  Group,
  KernelBench,
  type KernelScale,
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
  type KernelHandle,
  type Operands,
  packedArrayBytes,
  packedArrays,
  quantizeCase,
  quantizeInto,
  type QuantizeSpec,
  relativeDifference,
  specName,
  statisticsCase,
  type TimedDtype,
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
import { TWO_LEVEL_SPECS, twoLevelCase, twoLevelName } from "./two_level.ts";
import { uniformGenerator } from "../random.ts";
import type { Summary } from "../../eval/statistics.ts";
import type { BenchContext, Suite, SuiteReport } from "../suite.ts";
import { rate } from "../timing.ts";

/** Copy of a case of one place whose bytes are those of a float32 matrix. */
const memcpyOf = (operands: Operands) => memcpyCase(operands.count * 4, [operands.rows, operands.cols]);

const BITS: readonly BitWidth[] = [2, 3, 4, 8];

const placesOf = ({ scale }: KernelBench): readonly [Place, number][] => [
  ["in cache", scale.inCacheRows],
  ["from memory", scale.fromMemoryRows],
];

const roundSpec = (
  bits: BitWidth,
  zeroPoint: "real" | "symmetric",
  dtype: "F32" | "BF16" = "F32",
): QuantizeSpec => ({
  solver: "round",
  bits,
  groupSize: 32,
  zeroPoint,
  dtype,
});

const NO_GGML = "ggml is not there";

async function measureRound(bench: KernelBench): Promise<void> {
  const { handle, ggml } = bench;
  const name = (bits: BitWidth, zeroPoint: "real" | "symmetric") =>
    `round ${specName(roundSpec(bits, zeroPoint))}`;
  const ratios: RatioOf[] = (["symmetric", "real"] as const).flatMap((zeroPoint) => [
    { of: name(4, zeroPoint), to: GGML_QUANTIZE("q4_0") },
    { of: name(8, zeroPoint), to: GGML_QUANTIZE("q8_0") },
    { of: name(8, zeroPoint), to: GGML_QUANTIZE_SIMD("q8_0") },
    { of: name(2, zeroPoint), to: name(4, zeroPoint) },
  ]);
  const groups: Group[] = [];
  for (const [place, rows] of placesOf(bench)) {
    const operands = bench.operands(rows);
    const round = (spec: QuantizeSpec) => quantizeCase(handle, handle.kernels, operands, spec);
    const group = new Group("Round to nearest", place, ratios);
    groups.push(group);
    await bench.measure(group, [
      memcpyOf(operands),
      round(roundSpec(2, "symmetric")),
      round(roundSpec(3, "symmetric")),
      round(roundSpec(4, "symmetric")),
      ...(ggml ? [ggmlQuantizeCase(ggml, operands, "q4_0")] : []),
      round(roundSpec(4, "real")),
      round(roundSpec(2, "real")),
      round(roundSpec(3, "real")),
      round(roundSpec(8, "symmetric")),
      ...(ggml
        ? [ggmlQuantizeCase(ggml, operands, "q8_0"), ggmlQuantizeSimdCase(ggml, operands, "q8_0")]
        : []),
      round(roundSpec(8, "real")),
      round(roundSpec(2, "real", "BF16")),
      round(roundSpec(4, "real", "BF16")),
      round(roundSpec(8, "real", "BF16")),
    ]);
  }
  const both = (of: string, to: string) =>
    groups.map((group) => [group.place, group.speed(of, to)] as [string, Summary | undefined]);
  for (const zeroPoint of ["symmetric", "real"] as const) {
    bench.ratioGoal(
      `round 4 bits g 32 ${zeroPoint} / ggml q4_0`,
      1.5,
      both(name(4, zeroPoint), GGML_QUANTIZE("q4_0")),
      NO_GGML,
    );
    bench.ratioGoal(
      `round 8 bits g 32 ${zeroPoint} / ggml q8_0`,
      2,
      both(name(8, zeroPoint), GGML_QUANTIZE("q8_0")),
      NO_GGML,
    );
    bench.ratioGoal(
      `round 2 bits g 32 ${zeroPoint} / 4 bits`,
      1,
      both(name(2, zeroPoint), name(4, zeroPoint)),
      "",
    );
  }
}

const CLIP_GROUP_SIZE = 64;
const clipSpec = (bits: BitWidth, dtype: "F32" | "BF16" = "F32"): QuantizeSpec => ({
  solver: "clip",
  bits,
  groupSize: CLIP_GROUP_SIZE,
  zeroPoint: "real",
  dtype,
});
const K_QUANTS = [[2, "q2_K"], [3, "q3_K"], [4, "q4_K"]] as const;

async function measureClip(bench: KernelBench): Promise<void> {
  const { handle, ggml } = bench;
  const name = (bits: BitWidth) => `clip ${specName(clipSpec(bits))}`;
  const ratios = K_QUANTS.map(([bits, type]) => ({ of: name(bits), to: GGML_QUANTIZE(type) }));
  const operands = bench.operands(bench.scale.inCacheRows);
  const clip = (spec: QuantizeSpec) => quantizeCase(handle, handle.kernels, operands, spec);
  const group = await bench.measure(new Group("Clip search with least squares", "in cache", ratios), [
    memcpyOf(operands),
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
  const uniform = uniformGenerator(5);
  return Float32Array.from({ length: cols }, () => 10 ** (2 * uniform() - 1));
}

async function measureTwoLevel(bench: KernelBench): Promise<void> {
  const { handle, ggml } = bench;
  const importance = importanceOf(COLS);
  const ratios: RatioOf[] = TWO_LEVEL_SPECS.flatMap((spec) =>
    ["", ", weighted"].map((suffix) => ({
      of: twoLevelName(spec) + suffix,
      to: GGML_QUANTIZE(spec.peer) + suffix,
    }))
  );
  const operands = bench.operands(bench.scale.inCacheRows);
  const group = await bench.measure(new Group("Search of two-level scales", "in cache", ratios), [
    memcpyOf(operands),
    ...TWO_LEVEL_SPECS.flatMap((spec) => [
      twoLevelCase(handle, operands, spec),
      ...(ggml ? [ggmlQuantizeCase(ggml, operands, spec.peer)] : []),
      twoLevelCase(handle, operands, spec, importance),
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
  const { handle, ggml } = bench;
  const spec = (bits: BitWidth) => ({ bits, groupSize: 64, zeroPoint: "real" }) as const;
  const name = (bits: BitWidth) => `dequantize ${specName(spec(bits))}`;
  const ratios = BITS.flatMap((bits) =>
    DEQUANTIZED[bits].map((type) => ({ of: name(bits), to: GGML_DEQUANTIZE(type) }))
  );
  const groups: Group[] = [];
  for (const [place, rows] of placesOf(bench)) {
    const operands = bench.operands(rows);
    const dequantized = (to: "F32" | "F16" | "BF16", bits: BitWidth) =>
      dequantizeCase(handle, handle.kernels, operands, spec(bits), to);
    const group = new Group("Dequantize", place, ratios);
    groups.push(group);
    await bench.measure(group, [
      memcpyOf(operands),
      ...BITS.flatMap((bits) => [
        dequantized("F32", bits),
        ...(ggml ? DEQUANTIZED[bits].map((type) => ggmlDequantizeCase(ggml, operands, type)) : []),
      ]),
      dequantizeCase(handle, handle.kernels, operands, { bits: 4, groupSize: 32, zeroPoint: "symmetric" }),
      dequantized("F16", 4),
      dequantized("BF16", 4),
    ]);
  }
  for (const bits of BITS) {
    bench.ratioGoal(
      `dequantize ${bits} bits / ggml's fastest of ${bits} bits`,
      1,
      groups.flatMap((group) => {
        const speeds = DEQUANTIZED[bits].flatMap((type) => {
          const speed = group.speed(name(bits), GGML_DEQUANTIZE(type));
          return speed ? [{ type, speed }] : [];
        }).sort((a, b) => a.speed.median - b.speed.median);
        const [fastest] = speeds;
        return fastest ? [[`${fastest.type} ${group.place}`, fastest.speed] as [string, Summary]] : [];
      }),
      NO_GGML,
    );
    const [, large] = groups;
    bench.ratioGoal(`dequantize ${bits} bits / memcpy's bytes`, 0.5, [[
      large!.place,
      large!.bytesAgainstMemcpy(name(bits)),
    ]], "");
  }
}

async function measureRest(bench: KernelBench): Promise<void> {
  const { handle, ggml } = bench;
  const { kernels } = handle;
  const conversions: [TimedDtype, TimedDtype, GgmlConversion[]][] = [
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
  const ratios = conversions.flatMap(([from, to, peers]) =>
    peers.map((peer) => ({ of: `convert ${from} to ${to}`, to: `ggml ${peer}` }))
  );
  for (const [place, rows] of placesOf(bench)) {
    const operands = bench.operands(rows);
    await bench.measure(new Group("Convert", place, ratios), [
      memcpyOf(operands),
      ...conversions.flatMap(([from, to, peers]) => [
        convertCase(handle, kernels, operands, from, to),
        ...(ggml ? peers.map((peer) => ggmlConvertCase(ggml, kernels, operands, peer)) : []),
      ]),
    ]);
    await bench.measure(new Group("Codes", place), [
      memcpyOf(operands),
      ...BITS.flatMap((
        bits,
      ) => [codesCase(handle, operands, "pack", bits), codesCase(handle, operands, "unpack", bits)]),
    ]);
    await bench.measure(new Group("Statistics and search", place), [
      memcpyOf(operands),
      statisticsCase(handle, kernels, operands, undefined),
      ...BITS.map((bits) => statisticsCase(handle, kernels, operands, bits)),
      findNonfiniteCase(handle, operands, "F32"),
      findNonfiniteCase(handle, operands, "BF16"),
    ], ["The search stops nowhere here: it reads everything. memcpy's bytes count twice, read and written."]);
  }
}

async function measureThreads(bench: KernelBench): Promise<void> {
  const { handle } = bench;
  const threads = bench.context.options.threads ?? 2;
  const goal = `${threads} threads / one, clip search 2 bits in cache`;
  const least = 1.8;
  const skip = (reason: string) => {
    bench.skipped.push({ what: "threads", reason });
    bench.ratioGoal(goal, least, [], reason);
  };
  if (handle.kernels.backend === "wasm") return skip("WebAssembly has one thread");
  if (threads < 2 || threads > bench.context.environment.cores) {
    return skip(`${threads} threads on ${bench.context.environment.cores} cores`);
  }
  const operands = bench.operands(bench.scale.threadedRows);
  const name = (text: string, count: number) => `${text}, ${count} thread${count === 1 ? "" : "s"}`;
  const texts = ["clip 2 bits, g 64, real", "round 4 bits, g 32, real", "dequantize 4 bits, g 64, real"];
  const group = new Group(
    "Threads",
    "in cache",
    texts.map((text) => ({ of: name(text, threads), to: name(text, 1), label: "one thread" })),
  );
  const cases = [1, threads].map((count) => [
    quantizeCase(
      handle,
      handle.kernels,
      operands,
      { ...clipSpec(2), threads: count },
      name(texts[0]!, count),
    ),
    quantizeCase(
      handle,
      handle.kernels,
      operands,
      { ...roundSpec(4, "real"), threads: count },
      name(texts[1]!, count),
    ),
    dequantizeCase(
      handle,
      handle.kernels,
      operands,
      { bits: 4, groupSize: 64, zeroPoint: "real", threads: count },
      "F32",
      name(texts[2]!, count),
    ),
  ]);
  const others = new OtherLoad();
  await bench.measure(group, texts.flatMap((_, i) => cases.map((each) => each[i]!)), [
    "A call starts its threads and ends them: what that costs counts.",
  ]);
  // Cores that somebody else uses are not there for our threads: the figure means little without this one.
  const load = others.cores();
  const label = load === undefined
    ? ""
    : `while others used ${load.toFixed(2)} of ${bench.context.environment.cores} cores`;
  bench.ratioGoal(goal, least, [[label, group.speed(name(texts[0]!, threads), name(texts[0]!, 1))]], "");
}

const NATIVE_SETS: readonly [InstructionSet, number][] = [["scalar", 1], ["avx2", 2], ["avx512", 3], [
  "neon",
  4,
]];

async function measureInstructionSets(bench: KernelBench): Promise<void> {
  const { kernels } = bench.handle;
  const operands = bench.operands(bench.scale.inCacheRows);
  let wasm: Kernels | undefined;
  try {
    wasm = kernels.backend === "wasm" ? kernels : await openKernels({ backend: "wasm" });
  } catch (error) {
    bench.skipped.push({
      what: "WebAssembly",
      reason: error instanceof Error ? error.message : String(error),
    });
  }
  const handles: KernelHandle[] = [];
  if (kernels.backend === "native") {
    for (const [isa, isaNumber] of NATIVE_SETS) {
      if (kernels.calls.aq_isa_supported(isaNumber) === 1) handles.push({ kernels, isa, isaNumber });
      else {bench.skipped.push({
          what: `instruction set ${isa}`,
          reason: "not on this processor or not in this build",
        });}
    }
  } else {
    bench.skipped.push({ what: "native instruction sets", reason: "the backend is WebAssembly" });
  }
  if (wasm) handles.push({ kernels: wasm, isa: wasm.isa, isaNumber: wasm.isaNumber });

  const kinds: { text: string; isGoal: boolean; make: (handle: KernelHandle, name: string) => KernelCase }[] =
    [
      {
        text: "round 4 bits, g 32, symmetric",
        isGoal: true,
        make: (handle, name) => quantizeCase(handle, kernels, operands, roundSpec(4, "symmetric"), name),
      },
      {
        text: "round 4 bits, g 32, real",
        isGoal: true,
        make: (handle, name) => quantizeCase(handle, kernels, operands, roundSpec(4, "real"), name),
      },
      {
        text: "round 8 bits, g 32, real",
        isGoal: true,
        make: (handle, name) => quantizeCase(handle, kernels, operands, roundSpec(8, "real"), name),
      },
      {
        text: "clip 2 bits, g 64, real",
        isGoal: true,
        make: (handle, name) => quantizeCase(handle, kernels, operands, clipSpec(2), name),
      },
      {
        text: "dequantize 4 bits, g 64, real",
        isGoal: true,
        make: (handle, name) =>
          dequantizeCase(
            handle,
            kernels,
            operands,
            { bits: 4, groupSize: 64, zeroPoint: "real" },
            "F32",
            name,
          ),
      },
      {
        text: "convert BF16 to F32",
        isGoal: false,
        make: (handle, name) => ({ ...convertCase(handle, kernels, operands, "BF16", "F32"), name }),
      },
      {
        text: "packed error statistics, 4 bits",
        isGoal: false,
        make: (handle, name) => ({ ...statisticsCase(handle, kernels, operands, 4), name }),
      },
    ];
  for (const { text, isGoal, make } of kinds) {
    const name = (handle: KernelHandle) => `${text}, ${handle.isa}`;
    const reference = `${text}, avx2`;
    const group = await bench.measure(
      new Group(
        `Instruction sets: ${text}`,
        "in cache",
        handles.map((handle) => ({ of: name(handle), to: reference, label: "avx2" })).filter(({ of }) =>
          of !== reference
        ),
      ),
      handles.map((handle) => make(handle, name(handle))),
    );
    if (isGoal) {
      bench.ratioGoal(
        `WebAssembly / AVX2, ${text}`,
        0.25,
        [["", group.speed(`${text}, simd128`, reference)]],
        "no WebAssembly or no AVX2",
      );
    }
  }
  if (wasm !== kernels) wasm?.close();
}

async function measurePublicApi(bench: KernelBench): Promise<void> {
  const { handle } = bench;
  const operands = bench.operands(bench.scale.threadedRows);
  const weights = bench.weights(bench.scale.threadedRows);
  const spec: QuantizeSpec = { solver: "round", bits: 4, groupSize: 64, zeroPoint: "real" };
  const raw = quantizeCase(handle, handle.kernels, operands, spec, "aq_quantize_round 4 bits");
  const rawBack = dequantizeCase(handle, handle.kernels, operands, spec, "F32", "aq_dequantize 4 bits");
  const quantized = () =>
    quantize(handle.kernels, { data: weights, dtype: "F32" }, operands.rows, COLS, spec);
  const tensor = quantized();
  const { check: _, contender: __, ...circumstances } = raw;
  const { check: ___, contender: ____, ...circumstancesBack } = rawBack;
  await bench.measure(
    new Group("Public functions", "in cache", [
      { of: "quantize()", to: raw.name },
      { of: "dequantize()", to: rawBack.name },
    ]),
    [
      raw,
      { ...circumstances, name: "quantize()", contender: { run: () => void quantized() }, check: () => {} },
      rawBack,
      {
        ...circumstancesBack,
        name: "dequantize()",
        contender: { run: () => void dequantize(handle.kernels, tensor) },
        check() {
          const error = relativeDifference(dequantize(handle.kernels, tensor), weights);
          if (!(error < 0.12)) {
            throw new Error(`Cannot time quantize(): its relative error must be below 0.12, got ${error}`);
          }
        },
      },
    ],
    ["The functions of lib/quant check their arguments and allocate their results; the kernels below them do not."],
  );
}

/** Relative RMS errors of our formats and ggml's on the same weights, by bits per weight. */
function measureErrors(bench: KernelBench): void {
  const { handle, ggml } = bench;
  const { kernels } = handle;
  const rows = bench.scale.threadedRows, weights = bench.weights(rows), count = weights.length;
  bench.context.progress(`Errors on ${count} Gaussian weights`);
  const found: { name: string; library: string; bitsPerWeight: number; error: number }[] = [];
  const solvers = [["round", 32, "symmetric"], ["round", 32, "real"], ["round", 64, "real"], [
    "clip",
    64,
    "real",
  ], ["clip", 32, "symmetric"]] as const;
  for (const bits of BITS) {
    for (const [solver, groupSize, zeroPoint] of solvers) {
      const spec: QuantizeSpec = { solver, bits, groupSize, zeroPoint };
      const out = packedArrays(rows, COLS, spec);
      quantizeInto(handle, weights, rows, COLS, spec, out);
      const restored = dequantize(kernels, {
        rows,
        cols: COLS,
        bits,
        groupSize,
        zeroPointKind: zeroPoint,
        packed: out.packed,
        scale: out.scale,
        zeroPoint: out.zeroPoint ?? undefined,
      });
      const bitsPerWeight = packedArrayBytes(out) * 8 / count;
      found.push({
        name: `${solver} ${specName(spec)}`,
        library: "arrowquant",
        bitsPerWeight,
        error: relativeDifference(restored, weights),
      });
    }
  }
  for (const spec of TWO_LEVEL_SPECS) {
    const { bits, groupSize, scaleBits } = spec;
    const tensor = quantize(kernels, { data: weights, dtype: "F32" }, rows, COLS, {
      bits,
      groupSize,
      scaleBits,
    });
    found.push({
      name: twoLevelName(spec),
      library: "arrowquant",
      bitsPerWeight: (packedBytes(rows, COLS, bits, groupSize, "real", scaleBits) - 16) * 8 / count,
      error: relativeDifference(dequantize(kernels, tensor), weights),
    });
  }
  if (ggml) {
    const packed = new Uint8Array(2 * count), restored = new Float32Array(count);
    for (const type of GGML_TYPES) {
      const bitsPerWeight = ggml.quantize(type, weights, packed, rows, COLS) * 8 / count;
      ggml.dequantizeRow(type, packed, restored, count);
      found.push({
        name: `ggml ${type}`,
        library: "ggml",
        bitsPerWeight,
        error: relativeDifference(restored, weights),
      });
    }
  }
  found.sort((a, b) => a.bitsPerWeight - b.bitsPerWeight || a.error - b.error);
  bench.sections.push({
    title: `Weight error on the same ${count} Gaussian weights (relative RMS)`,
    notes: [
      "Weights without structure: the order of methods on a model can differ, and a model's accuracy is another matter.",
    ],
    columns: [
      { key: "name", title: "format" },
      { key: "bitsPerWeight", title: "bits/weight", digits: 4 },
      { key: "error", title: "relative RMS error", digits: 5 },
    ],
    rows: found,
  });
  const { environment } = bench.context;
  for (const row of found) {
    bench.rows.push({
      suite: "kernels",
      group: "Weight error",
      kernel: row.name,
      library: row.library,
      backend: environment.backend,
      isa: environment.isa,
      shape: [rows, COLS],
      runtime: environment.runtime,
      processor: environment.processor,
      bitsPerWeight: row.bitsPerWeight,
      relativeRmsError: row.error,
    });
  }
  const errorOf = (name: string) => found.find((row) => row.name === name)?.error;
  const against = (ourName: string, type: GgmlType, bitsPerWeight: number) => {
    const mine = errorOf(ourName)!, theirs = errorOf(`ggml ${type}`);
    bench.goals.push({
      goal: `error of ${ourName} (${bitsPerWeight} b/w)`,
      wanted: theirs === undefined ? `≤ ${type}'s` : `≤ ${theirs.toFixed(5)} (${type})`,
      measured: theirs === undefined ? null : mine.toFixed(5),
      met: theirs === undefined ? null : mine <= theirs,
      ...(theirs === undefined ? { reason: NO_GGML } : {}),
    });
  };
  against("round 4 bits, g 32, symmetric", "q4_0", 4.5);
  against("round 8 bits, g 32, symmetric", "q8_0", 8.5);
  against(twoLevelName(TWO_LEVEL_SPECS[0]), "q2_K", 2.625);
  against(twoLevelName(TWO_LEVEL_SPECS[1]), "q4_K", 4.5);
  const clip = errorOf("clip 2 bits, g 64, real")!;
  bench.goals.push({
    goal: "error of clip 2 bits, g 64, real",
    wanted: "≤ 0.357",
    measured: clip.toFixed(4),
    met: clip <= 0.357,
  });
}

/** The suite at a given scale. */
export function kernelSuiteOf(scale: KernelScale | undefined): Suite {
  return {
    name: "kernels",
    summary: "each kernel against memcpy and ggml, over sizes, threads and instruction sets",
    run: (context) => measureAll(context, scale ?? (context.options.quick ? QUICK_SCALE : FULL_SCALE)),
  };
}

/** Every kernel against memcpy and ggml. */
export const kernelSuite: Suite = kernelSuiteOf(undefined);

async function measureAll(context: BenchContext, scale: KernelScale): Promise<SuiteReport> {
  const opened = await openGgml();
  const ggml = "reason" in opened ? undefined : opened;
  const bench = new KernelBench(context, ggml, scale);
  if ("reason" in opened) bench.skipped.push({ what: "every ggml row", reason: opened.reason });
  else context.progress(`ggml: libggml-base.so and ${opened.processorLibrary}`);
  try {
    // An engine that holds much memory is slower to allocate more and busy freeing it: large matrices come last.
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
