/** Tables with a bit of everything for tests of charts and reports. Synthetic: nothing here was measured. */
import type { RowOf, TableName } from "../../lib/analysis/schema.ts";
import { type ColumnTable, tableFromRows } from "../../lib/analysis/tables.ts";
import { encodePng } from "../../lib/models/dit/png.ts";

/** A number in [0, 1) that looks random and is the same every time. */
const noise = (seed: number) => {
  const x = Math.sin(seed * 12.9898) * 43758.5453;
  return x - Math.floor(x);
};

const MODEL = "synthetic";
const LAYER_KINDS = [
  ["self_attn.q_proj", "attention"],
  ["self_attn.k_proj", "attention"],
  ["self_attn.o_proj", "attention"],
  ["mlp.gate_proj", "feed-forward"],
  ["mlp.down_proj", "feed-forward"],
  ["input_layernorm", "norm"],
] as const;

export function layerRows(count: number, setting = "2 clip"): RowOf<"layers">[] {
  return Array.from({ length: count }, (_, i) => {
    const [name, kind] = LAYER_KINDS[i % LAYER_KINDS.length]!;
    const isKept = kind === "norm";
    return {
      model: MODEL,
      setting,
      name: `model.layers.${Math.floor(i / LAYER_KINDS.length)}.${name}.weight`,
      kind,
      action: isKept ? "kept" : i % 11 === 4 ? "fallback" : "quantized",
      reason: isKept ? "not a matrix" : "bit_width",
      bits: isKept ? null : i % 11 === 4 ? 3 : 2,
      groupSize: isKept ? null : 64,
      weights: isKept ? 64 : 4096,
      bitsPerWeight: isKept ? 16 : 2.5,
      relativeRmsError: isKept ? null : 0.2 + 0.15 * noise(i),
      cosine: isKept ? null : 0.94 + 0.05 * noise(i + 0.5),
      maxError: isKept ? null : noise(i),
      bytesBefore: 8192,
      bytesAfter: 1280,
      milliseconds: 1 + noise(i + 7),
    };
  });
}

const intervalled = (name: string, value: number, width: number) => ({
  [name]: value,
  [`${name}Low`]: Math.max(0, value - width),
  [`${name}High`]: value + width,
});

export function timeRows(): RowOf<"time">[] {
  const settings = ["4 round", "3 round", "2 round", "2 clip"];
  const output = settings.flatMap((setting, s) =>
    Array.from({ length: 10 }, (_, i): RowOf<"time"> => ({
      model: MODEL,
      setting,
      tUnit: "timestep",
      tBegin: i * 111,
      tEnd: i * 111 + 1,
      ...intervalled("relativeError", 0.001 * 4 ** s * (1 + 3 * noise(i)), 0.0004 * 4 ** s),
      ...intervalled("stepKl", 0.01 * 3 ** s * Math.exp(-i / 4), 0.003 * 3 ** s * Math.exp(-i / 4)),
    }))
  );
  const layers = Array.from(
    { length: 12 },
    (_, layer) =>
      Array.from({ length: 5 }, (_, group): RowOf<"time"> => ({
        model: MODEL,
        setting: "2 clip",
        layer: `blocks.${Math.floor(layer / 2)}.${layer % 2 === 0 ? "attn" : "mlp"}.weight`,
        timeGroup: group,
        tUnit: "timestep",
        tBegin: group * 200,
        tEnd: (group + 1) * 200,
        relativeError: 0.002 * (1 + layer) * (1 + noise(layer * 5 + group)),
      })),
  ).flat();
  const theta = (stage: "before" | "after", begin: number, end: number, level: number): RowOf<"time"> => ({
    model: MODEL,
    setting: "2 clip",
    layer: "blocks.0.attn.weight",
    tUnit: "timestep",
    tBegin: begin,
    tEnd: end,
    stage,
    scale: 0.02 + 0.01 * level,
    zeroPoint: 120 - 10 * level,
    activationLow: -2 - level,
    activationHigh: 3 + 1.4 * level,
  });
  const levels = [0, 1, 1.5, 3];
  return [
    ...output,
    ...layers,
    ...levels.map((level, i) => theta("before", i * 250, (i + 1) * 250, level)),
    ...levels.flatMap((level, i) => [
      theta("after", i * 250 + (i > 0 ? 30 : 0), (i + 1) * 250 - (i < 3 ? 30 : 0), level),
      ...(i < 3
        ? Array.from({ length: 6 }, (_, k) =>
          theta(
            "after",
            (i + 1) * 250 - 30 + k * 10,
            (i + 1) * 250 - 20 + k * 10,
            level + (levels[i + 1]! - level) * (k + 0.5) / 6,
          ))
        : []),
    ]),
  ];
}

export function peerRows(): RowOf<"peers">[] {
  const methods = [
    ["2 round", "arrowquant", 2.5, 0.52],
    ["2 clip", "arrowquant", 2.5, 0.7],
    ["3 round", "arrowquant", 3.5, 0.9],
    ["3 clip", "arrowquant", 3.5, 0.94],
    ["4 round", "arrowquant", 4.5, 0.97],
    ["8 round", "arrowquant", 8.5, 0.985],
    ["ggml q2_K", "ggml", 2.625, 0.66],
    ["ggml q4_K", "ggml", 4.5, 0.96],
    ["HQQ", "re-implementation", 2.5, 0.61],
    ["GPTQ", "re-implementation", 2.5, 0.83],
  ] as const;
  return [
    {
      model: MODEL,
      method: "full",
      library: "arrowquant",
      task: "all",
      ...intervalled("accuracy", 0.985, 0.01),
    },
    ...methods.map(([method, library, bitsPerWeight, accuracy]): RowOf<"peers"> => ({
      model: MODEL,
      method,
      library,
      bitsPerWeight,
      task: "all",
      samples: 300,
      ...intervalled("accuracy", accuracy, 0.04),
      ...intervalled("kl", (1 - accuracy) * 0.8 + 1e-4, 0.01),
      relativeRmsError: (1 - accuracy) / 2,
      seconds: 1.5,
    })),
  ];
}

export function phaseRows(): RowOf<"phases">[] {
  const phases = [["baseline", 0.5, 0.4, 0.7], ["phase1", 0.5, 0.4, 0.7], ["phase2", 0.56, 0.33, 0.85], [
    "phase3_full",
    0.93,
    0.06,
    0.92,
  ]] as const;
  return phases.flatMap(([phase, accuracy, stepKl, markovScore], p) =>
    ["add", "sort", "all"].map((task, i): RowOf<"phases"> => ({
      model: MODEL,
      setting: "2 bits",
      phase,
      task,
      bits: 2,
      bitsPerWeight: 2.5,
      ...intervalled("accuracy", Math.min(1, accuracy + 0.05 * (i - 1)), 0.05),
      ...(task === "all"
        ? { ...intervalled("stepKl", stepKl, 0.03), markovScore, overhead: 0.07 * p, converged: p === 3 }
        : {}),
    }))
  );
}

export function kernelRows(): RowOf<"kernels">[] {
  const kernels = [
    ["memcpy", "memcpy", 8, 2400],
    ["round 2 bits, g 32, real", "arrowquant", 4.4, 1900],
    ["round 4 bits, g 32, symmetric", "arrowquant", 4.6, 1800],
    ["clip 2 bits, g 64, real", "arrowquant", 4.3, 310],
    ["ggml quantize_q4_0", "ggml", 4.56, 450],
    ["ggml quantize_q2_K", "ggml", 4.33, 14],
    ["dequantize 8 bits, g 64, real", "arrowquant", 5.1, 3600],
    ["ggml dequantize_row_q8_0", "ggml", 5.06, 3700],
  ] as const;
  return kernels.map(([kernel, library, bytes, rate]): RowOf<"kernels"> => ({
    group: "Synthetic",
    kernel,
    library,
    backend: "native",
    isa: "avx2",
    place: "from memory",
    threads: 1,
    weightsPerSecond: library === "memcpy" ? null : rate * 1e6,
    bytesPerSecond: rate * bytes * 1e6,
    timesMemcpy: library === "memcpy" ? null : rate * bytes / (2400 * 8),
  }));
}

function picture(seed: number): string {
  const pixels = Uint8Array.from({ length: 256 }, (_, i) => {
    const x = i % 16 - 8, y = Math.floor(i / 16) - 8;
    return 255 * Number(Math.abs(Math.hypot(x, y) - 3 - seed % 4) < 1.5);
  });
  return `data:image/png;base64,${encodePng(pixels, 16, 16, 1).toBase64()}`;
}

export function sampleRows(): RowOf<"samples">[] {
  const images = ["full", "2 round", "2 clip"].flatMap((setting, s) =>
    Array.from({ length: 8 }, (_, sample): RowOf<"samples"> => ({
      model: "synthetic images",
      setting,
      sample,
      label: `${sample}`,
      isCorrect: (sample + s) % 4 !== 3,
      image: picture(sample + s),
    }))
  );
  const texts = ["full", "2 round", "2 clip"].flatMap((setting, s) =>
    Array.from({ length: 6 }, (_, sample): RowOf<"samples"> => ({
      model: "synthetic text",
      setting,
      sample,
      label: "add",
      prompt: `${12 + sample}+${30 + sample}=`,
      expected: `0${42 + 2 * sample}`,
      answer: `0${42 + 2 * sample + (s === 1 ? 1 : 0)}`,
      isCorrect: s !== 1,
    }))
  );
  return [...images, ...texts];
}

export function driftRows(): RowOf<"drift">[] {
  return ["3 round", "2 round", "2 clip"].flatMap((setting, s) =>
    Array.from({ length: 51 }, (_, step): RowOf<"drift"> => ({
      model: MODEL,
      setting,
      step,
      ...intervalled("relativeDistance", (0.1 + 0.2 * s) * (step / 50) ** 2, 0.02 * (step / 50)),
    }))
  );
}

export function lossRows(): RowOf<"losses">[] {
  return Array.from({ length: 60 }, (_, iteration): RowOf<"losses"> => ({
    model: MODEL,
    setting: "phase3_full",
    iteration,
    total: 0.02 + Math.exp(-iteration / 12),
    quantization: 0.015 + 0.8 * Math.exp(-iteration / 12),
    markov: 0.005 + 0.2 * Math.exp(-iteration / 10),
  }));
}

export function codeRows(): RowOf<"codes">[] {
  return [2, 4, 8].flatMap((bits) =>
    Array.from({ length: 2 ** bits }, (_, code): RowOf<"codes"> => ({
      model: MODEL,
      setting: `${bits} clip`,
      layer: "blocks.0.attn.weight",
      bits,
      code,
      count: Math.round(1e5 * Math.exp(-(((code + 0.5) / 2 ** bits - 0.5) ** 2) / 0.05)),
    }))
  );
}

/** Every table. */
export async function syntheticTables(): Promise<{ [Name in TableName]: ColumnTable }> {
  return {
    layers: await tableFromRows("layers", layerRows(42)),
    time: await tableFromRows("time", timeRows()),
    phases: await tableFromRows("phases", phaseRows()),
    peers: await tableFromRows("peers", peerRows()),
    kernels: await tableFromRows("kernels", kernelRows()),
    samples: await tableFromRows("samples", sampleRows()),
    drift: await tableFromRows("drift", driftRows()),
    losses: await tableFromRows("losses", lossRows()),
    codes: await tableFromRows("codes", codeRows()),
  };
}
