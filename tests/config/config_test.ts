import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parse } from "@std/yaml";
import {
  canonicalConfig,
  type Config,
  configTable,
  DEFAULT_CONFIG,
  formatConfig,
  isSensitiveLayer,
  LATER_KEYS,
  layerBitWidth,
  loadConfig,
  MAX_CONFIG_BYTES,
  parseConfig,
  resolveConfig,
} from "../../lib/config/mod.ts";
import { environmentName, SCHEMA } from "../../lib/config/schema.ts";
import { ConfigError } from "../../lib/errors.ts";

/** The error that `run` ends with; a test fails if there is none or it is another. */
async function faultOf(run: () => unknown): Promise<ConfigError> {
  try {
    await run();
  } catch (error) {
    if (error instanceof ConfigError) return error;
    throw error;
  }
  throw new Error("accepted");
}

const faultOfYaml = (text: string): Promise<ConfigError> =>
  faultOf(() => parseConfig(text, { source: "test.yaml" }));

/** Nests `value` under a key path, as a parsed document has it. */
function nested(key: string, value: unknown): unknown {
  return key.split(".").reduceRight((inner, name) => ({ [name]: inner }), value);
}

test("nesting has a limit, whatever the runtime's stack holds", async () => {
  const deep = 100_000;
  const texts = [
    "[".repeat(deep),
    "- ".repeat(deep) + "1",
    "{a: ".repeat(40_000) + "1" + "}".repeat(40_000),
    "layer_bit_widths: " + "[".repeat(20) + "]".repeat(20),
    "layer_bit_widths: &a {x: *a}",
  ];
  for (const text of texts) {
    const { message } = await faultOfYaml(text);
    expect(message).toBe('Cannot parse configuration "test.yaml": nested too deep, 16 levels at most');
  }
});

describe("defaults", () => {
  test("are those of the documentation", () => {
    const expected: Config = {
      deploymentProfile: null,
      bitWidth: 4,
      groupSize: 64,
      scaleBits: 16,
      codes: "uniform",
      numTimeGroups: 10,
      solver: "auto",
      selfCalibration: { records: null, tokens: 128, steps: null },
      zeroPoint: "real",
      minAccuracy: 0,
      embeddingBits: null,
      headBits: null,
      layerBitWidths: {},
      skipSensitiveLayers: false,
      sensitiveLayerNames: [],
      sensitiveLayerPatterns: [],
      keepPatterns: [],
      nonFinite: "fail",
      failFast: false,
      backend: "auto",
      numThreads: 0,
      modality: "auto",
      enableTimeAware: true,
      timeGroups: "equal",
      activationBits: 8,
      perTokenLimit: 1.05,
      outputCorrection: false,
      timeScales: "shared",
      samplerCorrection: false,
      calibrationData: null,
      calibrationSamples: null,
      calibrationSeed: 0,
      calibrationMode: "blocks",
      solverOptions: {
        damping: 0.01,
        effort: "medium",
        rounds: null,
        refit: true,
        correction: 1,
        residualCorrection: 1,
        candidates: null,
        moment: "auto",
        momentBlock: 1024,
      },
      target: null,
      targetType: null,
      layerTypes: {},
      targetModelSizeMb: null,
      targetBitsPerWeight: null,
      bitPlan: null,
      thermodynamic: {
        validation: { enabled: false, smoothnessThreshold: 0.3, logViolations: true },
        boundarySmoothing: { enabled: false, windowSize: 5, interpolation: "linear" },
        transitionOptimization: {
          enabled: false,
          timeWeights: "auto",
          markovWeight: 0.1,
          entropyWeight: 0,
          learningRate: null,
          maxIterations: null,
          maxMinutes: 60,
          convergenceThreshold: 1e-4,
          betaSchedule: "auto",
        },
      },
    };
    expect(DEFAULT_CONFIG).toEqual(expected);
  });

  test("are what an empty document means", async () => {
    for (
      const text of ["", "# nothing\n", "---\n", "{}", "thermodynamic:\n", "thermodynamic: {validation: }\n"]
    ) {
      const { config, origins } = await parseConfig(text);
      expect(config).toEqual(DEFAULT_CONFIG);
      expect(new Set(Object.values(origins))).toEqual(new Set(["default"]));
    }
  });

  test("cannot be changed, at any depth", () => {
    expect(() => Object.assign(DEFAULT_CONFIG, { bitWidth: 2 })).toThrow(TypeError);
    expect(() => Object.assign(DEFAULT_CONFIG.thermodynamic.validation, { enabled: true })).toThrow(
      TypeError,
    );
    expect(() => (DEFAULT_CONFIG.keepPatterns as string[]).push("x")).toThrow(TypeError);
  });

  test("every schema row has its own environment variable", () => {
    const names = SCHEMA.map((row) => environmentName(row.key));
    expect(new Set(names).size).toBe(names.length);
    expect(names).toContain("ARROW_QUANT_THERMODYNAMIC_VALIDATION_ENABLED");
  });

  test("keys without effect are keys of the schema", () => {
    const keys = SCHEMA.map((row) => row.key);
    expect(LATER_KEYS.length).toBeGreaterThan(0);
    for (const key of LATER_KEYS) expect(keys).toContain(key);
  });
});

describe("values", () => {
  const accepted: [string, unknown, unknown?][] = [
    ...[2, 3, 4, 8].map((v): [string, unknown] => ["bit_width", v]),
    ...[0, 16, 32, 64, 128, 256].map((v): [string, unknown] => ["group_size", v]),
    ...[4, 6, 16].map((v): [string, unknown] => ["scale_bits", v]),
    ["num_time_groups", 1],
    ["num_time_groups", 100],
    ["calibration_samples", 32],
    ["calibration_samples", 1024],
    ["num_threads", 0],
    ["num_threads", 64],
    ["min_accuracy", 0],
    ["min_accuracy", 1],
    ["min_accuracy", -0, 0],
    ["target_model_size_mb", 0.5],
    ["target_model_size_mb", null],
    ["deployment_profile", null],
    ["layer_bit_widths", { "a.b": 16, "^c": 2 }],
    ["sensitive_layer_names", ["lm_head.weight", "a,b"]],
    ["sensitive_layer_patterns", ["layers\\.(0|31)\\."]],
    ["thermodynamic.boundary_smoothing.interpolation", "sigmoid"],
    ["thermodynamic.transition_optimization.beta_schedule", "cosine"],
    ["thermodynamic.transition_optimization.entropy_weight", 100],
    ["thermodynamic.transition_optimization.time_weights", "ddim"],
    ["thermodynamic.transition_optimization.learning_rate", 1],
  ];
  for (const [key, value, normal = value] of accepted) {
    test(`accepts ${key}: ${JSON.stringify(value)}`, () => {
      const resolved = resolveConfig({ file: nested(key, value), fileSource: "f.yaml" });
      const path = key.split(".").map((k) => k.replace(/_(.)/g, (_, c: string) => c.toUpperCase()));
      const found = path.reduce<unknown>((o, k) => (o as Record<string, unknown>)[k], resolved.config);
      expect(found).toEqual(normal);
      expect(Object.is(found, -0)).toBe(false);
      expect(resolved.origins[key]).toBe("f.yaml");
    });
  }

  const rejected: [string, unknown, string][] = [
    ...[0, 1, 5, 6, 7, 16, 2.5, NaN, Infinity, "4", true, null, [4], { a: 4 }, new Date(0)].map(
      (v): [string, unknown, string] => ["bit_width", v, "integer, one of 2, 3, 4, 8"],
    ),
    ...[-1, 1, 48, 512, 64.5].map(
      (v): [string, unknown, string] => ["group_size", v, "integer, one of 0, 16, 32, 64, 128, 256"],
    ),
    ...[1, 2, 5, 8, "4", null].map(
      (v): [string, unknown, string] => ["scale_bits", v, "integer, one of 0, 3, 4, 6, 16"],
    ),
    ...[0, 101, -1, 10.5].map((v): [string, unknown, string] => ["num_time_groups", v, "integer, 1 to 100"]),
    ...[31, 1025].map((
      v,
    ): [string, unknown, string] => ["calibration_samples", v, "integer or null, 32 to 1024"]),
    ...[-1, 65].map((v): [string, unknown, string] => ["num_threads", v, "integer, 0 to 64"]),
    ...[-0.1, 1.1, NaN, "0.5"].map((v): [string, unknown, string] => ["min_accuracy", v, "number, 0 to 1"]),
    ...["yes", 1, 0, "true", null].map(
      (v): [string, unknown, string] => ["fail_fast", v, "boolean, true or false"],
    ),
    ...["Clip", "", 1, null, ["clip"]].map(
      (v): [string, unknown, string] => ["solver", v, "string, one of auto, clip, round, feedback, best"],
    ),
    ["deployment_profile", "phone", "string or null, one of edge, local, cloud"],
    ["target_model_size_mb", 0, "number or null, above 0, at most 1000000000"],
    ["thermodynamic.validation.smoothness_threshold", 1.5, "number, 0 to 1"],
    ["thermodynamic.boundary_smoothing.window_size", 0, "integer, 1 to 1000"],
    ["thermodynamic.boundary_smoothing.interpolation", "quadratic", "string, one of linear, cubic, sigmoid"],
    ["thermodynamic.transition_optimization.entropy_weight", 100.5, "number, 0 to 100"],
    ["thermodynamic.transition_optimization.entropy_weight", -1, "number, 0 to 100"],
    ["thermodynamic.transition_optimization.entropy_weight", NaN, "number, 0 to 100"],
    ["thermodynamic.transition_optimization.markov_weight", 101, "number, 0 to 100"],
    ["thermodynamic.transition_optimization.time_weights", true, "string, one of auto, none, ddpm, ddim"],
    ["thermodynamic.transition_optimization.beta_schedule", "sigmoid", "string, one of auto, linear, cosine"],
    ["thermodynamic.transition_optimization.learning_rate", 0, "number or null, above 0, at most 1"],
    ["thermodynamic.transition_optimization.max_iterations", 0, "integer or null, 1 to 100000"],
    ["thermodynamic.transition_optimization.max_minutes", 0, "number, above 0, at most 100000"],
  ];
  for (const [key, value, expected] of rejected) {
    test(`rejects ${key}: ${typeof value === "string" ? JSON.stringify(value) : String(value)}`, async () => {
      const fault = await faultOf(() => resolveConfig({ file: nested(key, value), fileSource: "f.yaml" }));
      expect(fault.problems).toHaveLength(1);
      expect(fault.problems[0]).toMatchObject({ key, expected, source: "f.yaml" });
    });
  }

  test('shows strings quoted, so that "4" is told from 4', async () => {
    const fault = await faultOfYaml('bit_width: "4"');
    expect(fault.message).toBe(
      'Cannot use configuration: 1 problem\n  "bit_width": got "4", expected integer, one of 2, 3, 4, 8 (test.yaml)',
    );
  });

  test("takes floats without a fraction as integers", async () => {
    expect((await parseConfig("group_size: 64.0\nbit_width: 0x2")).config).toMatchObject({
      groupSize: 64,
      bitWidth: 2,
    });
  });

  test("names the faulty entry of a list or map", async () => {
    const fault = await faultOf(() =>
      resolveConfig({
        file: {
          sensitive_layer_patterns: ["ok", "(", 3, "x".repeat(257), "\\y"],
          sensitive_layer_names: ["", "("],
          layer_bit_widths: { a: 5, "[": 4, "b": "4", "": 2 },
        },
      })
    );
    expect(fault.problems.map((p) => p.key)).toEqual([
      "sensitive_layer_patterns[1]",
      "sensitive_layer_patterns[2]",
      "sensitive_layer_patterns[3]",
      "sensitive_layer_patterns[4]",
      "sensitive_layer_names[0]",
      'layer_bit_widths["a"]',
      'layer_bit_widths["["]',
      'layer_bit_widths["b"]',
      'layer_bit_widths[""]',
    ]);
    expect(fault.problems[0]!.expected).toContain("regular expression");
  });

  test("limits the length of lists and maps", async () => {
    const names = Array.from({ length: 4097 }, (_, i) => `layer${i}`);
    const file = { keep_patterns: names, layer_bit_widths: Object.fromEntries(names.map((n) => [n, 4])) };
    expect((await faultOf(() => resolveConfig({ file }))).problems.map((p) => p.value)).toEqual([
      "a list of 4097",
      "a mapping of 4097",
    ]);
    expect(resolveConfig({ file: { keep_patterns: names.slice(1) } }).config.keepPatterns).toHaveLength(4096);
  });
});

describe("documents", () => {
  test("all faults stand in one message, of all layers, hidden values too", async () => {
    const fault = await faultOf(() =>
      resolveConfig({
        file: { bit_width: 5, grop_size: 64, thermodynamic: { validation: { enabled: "yes" } } },
        fileSource: "f.yaml",
        environment: { ARROW_QUANT_BIT_WIDTH: "two", ARROW_QUANT_SOLVR: "clip" },
        overrides: { bit_width: "4", min_accuracy: "2", nonsense: 1 },
        overrideSources: { min_accuracy: "--min-accuracy" },
      })
    );
    const message = fault.message.split("\n");
    expect(message[0]).toBe("Cannot use configuration: 7 problems");
    expect(message.slice(1).sort()).toEqual([
      '  "ARROW_QUANT_SOLVR": got "clip", expected a known key; did you mean "ARROW_QUANT_SOLVER"? (environment)',
      '  "bit_width": got "two", expected integer, one of 2, 3, 4, 8 (environment ARROW_QUANT_BIT_WIDTH)',
      '  "bit_width": got 5, expected integer, one of 2, 3, 4, 8 (f.yaml)',
      '  "grop_size": got 64, expected a known key; did you mean "group_size"? (f.yaml)',
      '  "min_accuracy": got 2, expected number, 0 to 1 (--min-accuracy)',
      '  "nonsense": got 1, expected a known key (command line)',
      '  "thermodynamic.validation.enabled": got "yes", expected boolean, true or false (f.yaml)',
    ]);
    expect(fault.problems).toHaveLength(7);
    expect(fault.code).toBe("AQ_CONFIG");
  });

  const suggestions: [string, string | undefined][] = [
    ["bitwidth: 4", "bit_width"],
    ["bitWidth: 4", "bit_width"],
    ["bits_width: 4", "bit_width"],
    ["thermo_dynamic: {}", "thermodynamic"],
    ["smoothness_threshold: 0.3", "thermodynamic.validation.smoothness_threshold"],
    ["thermodynamic: {validation: {enable: true}}", "thermodynamic.validation.enabled"],
    ["thermodynamic.validation.enabled: true", "thermodynamic.validation.enabled"],
    ["completely_different: 1", undefined],
    ["constructor: 1", undefined],
    ["__proto__: {bit_width: 2}", undefined],
  ];
  for (const [text, suggestion] of suggestions) {
    test(`rejects ${text}`, async () => {
      const { problems } = await faultOfYaml(text);
      expect(problems).toHaveLength(1);
      expect(problems[0]!.expected).toBe(
        suggestion === undefined ? "a known key" : `a known key; did you mean "${suggestion}"?`,
      );
    });
  }

  test("a prototype is not changed by a document", async () => {
    await faultOfYaml("__proto__: {polluted: 1}\nthermodynamic: {__proto__: {polluted: 1}}");
    const { config } = await parseConfig("layer_bit_widths: {__proto__: 2}");
    expect(({} as Record<string, unknown>)["polluted"]).toBe(undefined);
    expect(Object.entries(config.layerBitWidths)).toEqual([["__proto__", 2]]);
    expect(Object.getPrototypeOf(config.layerBitWidths)).toBe(Object.prototype);
  });

  for (const text of ["- bit_width: 4", "bit_width", "4", "true"]) {
    test(`rejects the document ${text}`, async () => {
      const fault = await faultOfYaml(text);
      expect(fault.problems[0]).toMatchObject({ key: "(document)", expected: "a mapping of keys to values" });
    });
  }

  test("rejects a section that is no mapping", async () => {
    expect((await faultOfYaml("thermodynamic: {validation: true}")).problems[0]).toMatchObject({
      key: "thermodynamic.validation",
      value: "true",
    });
  });

  test("says where text is not YAML, and keeps the parser's error", async () => {
    const fault = await faultOfYaml("bit_width: 4\ngroup_size: [1,\nsolver: clip\n");
    expect(fault.message).toMatch(/^Cannot parse configuration "test\.yaml": .* at line \d+, column \d+$/);
    expect(fault.cause).toBeInstanceOf(Error);
    expect((await faultOfYaml("bit_width: 4\nbit_width: 2\n")).message).toMatch(/at line 2, column 1$/);
    await faultOfYaml("bit_width: 4\n---\nbit_width: 2\n");
  });

  test("an expanding or cyclic alias costs nothing", async () => {
    // Walking all of it would take 4^30 steps.
    const levels = Array.from(
      { length: 30 },
      (_, i) => `a${i + 1}: &a${i + 1} [*a${i}, *a${i}, *a${i}, *a${i}]`,
    );
    const bomb = ["a0: &a0 [x, x]", ...levels, "bit_width: *a30"].join("\n");
    expect((await faultOfYaml(bomb)).message.length).toBeLessThan(20_000);
    expect((await faultOfYaml("a: &a [*a]\nbit_width: *a")).message.length).toBeLessThan(1000);
    const cycle: Record<string, unknown> = {};
    cycle["thermodynamic"] = cycle;
    await faultOf(() => resolveConfig({ file: cycle }));
  });

  test("keys without end are refused soon, those of a long list are not", async () => {
    const keys = (count: number) => Array.from({ length: count }, (_, i) => `  k${i}: 4`).join("\n");
    expect((await faultOfYaml(`layer_bit_widths:\n${keys(18_000)}`)).message).toContain(
      "mappings of too many keys",
    );
    const { config } = await parseConfig(`layer_bit_widths:\n${keys(4096)}`);
    expect(Object.keys(config.layerBitWidths).length).toBe(4096);
  });

  test("very deep nesting ends in an error", async () => {
    await faultOfYaml("a: " + "[".repeat(100_000));
  });

  test("limits the size of the text", async () => {
    const text = `# ${"x".repeat(MAX_CONFIG_BYTES)}`;
    expect((await faultOfYaml(text)).message).toBe(
      `Cannot read configuration "test.yaml": larger than ${MAX_CONFIG_BYTES} bytes`,
    );
    expect((await parseConfig(text.slice(0, MAX_CONFIG_BYTES))).config).toEqual(DEFAULT_CONFIG);
  });
});

describe("layers", () => {
  const profiles = { edge: [2, 5, 256], local: [4, 10, 128], cloud: [8, 20, 64] };
  for (const [profile, values] of Object.entries(profiles)) {
    test(`the profile ${profile} sets its three keys`, () => {
      const { config, origins } = resolveConfig({ file: { deployment_profile: profile } });
      expect([config.bitWidth, config.numTimeGroups, config.groupSize]).toEqual(values);
      expect(origins["bit_width"]).toBe(`deployment_profile ${profile}`);
      expect(config).toEqual({
        ...DEFAULT_CONFIG,
        deploymentProfile: config.deploymentProfile,
        bitWidth: config.bitWidth,
        numTimeGroups: config.numTimeGroups,
        groupSize: config.groupSize,
      });
    });
  }

  test("default < profile < file < environment < command line", () => {
    const key = "bit_width";
    const all = {
      profile: "edge",
      file: { bit_width: 3 },
      fileSource: "f.yaml",
      environment: { ARROW_QUANT_BIT_WIDTH: "8" },
      overrides: { bit_width: 4 },
    };
    const { overrides: _, ...withoutOverrides } = all;
    const { environment: __, ...withoutEnvironment } = withoutOverrides;
    const { file: ___, ...profileOnly } = withoutEnvironment;
    const seen = [all, withoutOverrides, withoutEnvironment, profileOnly, {}].map((layers) => {
      const { config, origins } = resolveConfig(layers);
      return [config.bitWidth, origins[key]];
    });
    expect(seen).toEqual([
      [4, "command line"],
      [8, "environment ARROW_QUANT_BIT_WIDTH"],
      [3, "f.yaml"],
      [2, "deployment_profile edge"],
      [4, "default"],
    ]);
  });

  test("an explicit key wins over a profile, even with the default's value, wherever the profile stands", () => {
    const { config, origins } = resolveConfig({ file: { bit_width: 4 }, profile: "cloud" });
    expect(config).toMatchObject({ bitWidth: 4, groupSize: 64, numTimeGroups: 20 });
    expect(origins).toMatchObject({
      bit_width: "configuration file",
      group_size: "deployment_profile cloud",
    });
  });

  test("the profile of the highest layer counts, and null undoes it", () => {
    const file = { deployment_profile: "edge" };
    const environment = { ARROW_QUANT_DEPLOYMENT_PROFILE: "local" };
    expect(resolveConfig({ file, environment }).config.groupSize).toBe(128);
    expect(resolveConfig({ file, environment, profile: "cloud" }).config.numTimeGroups).toBe(20);
    expect(resolveConfig({ profile: "cloud", overrides: { deployment_profile: "edge" } }).config.bitWidth)
      .toBe(2);
    expect(resolveConfig({ file, overrides: { deployment_profile: null } }).config).toEqual(DEFAULT_CONFIG);
  });

  test("command-line values may be text or typed; undefined is absent", () => {
    const { config, origins } = resolveConfig({
      overrides: {
        bit_width: "2",
        group_size: 32,
        keep_patterns: ["a,b"],
        solver: undefined,
        min_accuracy: ".9",
      },
      overrideSources: { bit_width: "--bits" },
    });
    expect(config).toMatchObject({ bitWidth: 2, groupSize: 32, keepPatterns: ["a,b"], minAccuracy: 0.9 });
    expect(origins).toMatchObject({ bit_width: "--bits", group_size: "command line", solver: "default" });
  });

  test("arguments are neither kept nor frozen", () => {
    const names = ["a"];
    const { config } = resolveConfig({ file: { sensitive_layer_names: names } });
    names.push("b");
    expect(config.sensitiveLayerNames).toEqual(["a"]);
  });
});

describe("environment", () => {
  const set = (name: string, text: string): Config =>
    resolveConfig({ environment: { [`ARROW_QUANT_${name}`]: text } }).config;

  test("sets keys of every kind", () => {
    expect(set("GROUP_SIZE", "128").groupSize).toBe(128);
    expect(set("FAIL_FAST", "true").failFast).toBe(true);
    expect(set("FAIL_FAST", "1").failFast).toBe(true);
    expect(set("ENABLE_TIME_AWARE", "0").enableTimeAware).toBe(false);
    expect(set("SOLVER", "round").solver).toBe("round");
    expect(set("TARGET_MODEL_SIZE_MB", "1.5e3").targetModelSizeMb).toBe(1500);
    expect(set("TARGET_MODEL_SIZE_MB", "").targetModelSizeMb).toBe(null);
    expect(set("TARGET_MODEL_SIZE_MB", "null").targetModelSizeMb).toBe(null);
    expect(set("SENSITIVE_LAYER_NAMES", "a, b").sensitiveLayerNames).toEqual(["a", "b"]);
    expect(set("SENSITIVE_LAYER_NAMES", '["a,b", "c"]').sensitiveLayerNames).toEqual(["a,b", "c"]);
    expect(set("SENSITIVE_LAYER_NAMES", "").sensitiveLayerNames).toEqual([]);
    expect(set("LAYER_BIT_WIDTHS", '{"a": 2}').layerBitWidths).toEqual({ a: 2 });
    expect(set("THERMODYNAMIC_VALIDATION_ENABLED", "true").thermodynamic.validation.enabled).toBe(true);
    expect(
      set("THERMODYNAMIC_BOUNDARY_SMOOTHING_WINDOW_SIZE", "9").thermodynamic.boundarySmoothing.windowSize,
    )
      .toBe(9);
  });

  const rejected: [string, string][] = [
    ["BIT_WIDTH", ""],
    ["BIT_WIDTH", " 4"],
    ["BIT_WIDTH", "4 bits"],
    ["BIT_WIDTH", "0x4"],
    ["BIT_WIDTH", "4n"],
    ["BIT_WIDTH", "Infinity"],
    ["BIT_WIDTH", "null"],
    ["MIN_ACCURACY", "NaN"],
    ["MIN_ACCURACY", "."],
    ["FAIL_FAST", "TRUE"],
    ["FAIL_FAST", "constructor"],
    ["SOLVER", "clip "],
    ["KEEP_PATTERNS", "[a-z]+"],
    ["KEEP_PATTERNS", "a,,b"],
    ["LAYER_BIT_WIDTHS", "a=2"],
    ["LAYER_BIT_WIDTHS", "[2]"],
    ["LAYER_BIT_WIDTHS", '{"a": "2"}'],
    ["BITWIDTH", "4"],
    ["bit_width", "4"],
    ["", "4"],
  ];
  for (const [name, text] of rejected) {
    test(`rejects ARROW_QUANT_${name}=${text}`, async () => {
      const fault = await faultOf(() => set(name, text));
      expect(fault.problems).toHaveLength(1);
      expect(fault.message).toContain(`ARROW_QUANT_${name}`);
    });
  }

  test("heeds only its own prefix and set variables", () => {
    const environment = { ARROWQUANT_LIBRARY: "x", PATH: "/bin", ARROW_QUANT_BIT_WIDTH: undefined };
    expect(resolveConfig({ environment }).config).toEqual(DEFAULT_CONFIG);
  });
});

describe("files", () => {
  let folder = "";
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), "arrowquant-config-"));
  });
  afterAll(() => rm(folder, { recursive: true }));

  const write = async (name: string, content: string | Uint8Array): Promise<string> => {
    const path = join(folder, name);
    await writeFile(path, content);
    return path;
  };

  test("are read and named in the origins", async () => {
    const path = await write("good.yaml", "\ufeffbit_width: 2\r\nsolver: round\r\n");
    const { config, origins } = await loadConfig({ path, overrides: { solver: "clip" } });
    expect(config).toMatchObject({ bitWidth: 2, solver: "clip" });
    expect(origins).toMatchObject({ bit_width: path, solver: "command line" });
  });

  test("are optional", async () => {
    expect((await loadConfig()).config).toEqual(DEFAULT_CONFIG);
    expect((await loadConfig({ environment: { ARROW_QUANT_BIT_WIDTH: "8" } })).config.bitWidth).toBe(8);
  });

  test("that are absent, folders, too large or not UTF-8 are named in the error", async () => {
    const paths = [
      join(folder, "absent.yaml"),
      folder,
      await write("large.yaml", `# ${"x".repeat(MAX_CONFIG_BYTES)}`),
      await write("latin1.yaml", new Uint8Array([0x23, 0xe9, 0x0a])),
    ];
    const faults = await Promise.all(paths.map((path) => faultOf(() => loadConfig({ path }))));
    faults.forEach((fault, i) => {
      expect(fault.message.startsWith(`Cannot read configuration "${paths[i]}": `)).toBe(true);
    });
    expect(faults[0]!.cause).toMatchObject({ code: "ENOENT" });
    expect(faults[2]!.message).toContain("larger than");
    expect(faults[3]!.message).toContain("not UTF-8");
  });
});

describe("formatConfig", () => {
  const everything = {
    deployment_profile: "edge",
    bit_width: 3,
    min_accuracy: 0.97,
    layer_bit_widths: { "a\\.b: c # d": 16, 'quote"é😀\u2028': 2, "10": 4, "9": 3, "true": 8 },
    sensitive_layer_names: ["- x", "null", "a, b", "tab\t", "\u0085\u007f\ufeff"],
    sensitive_layer_patterns: ["^layers\\.\\d+\\.mlp", "[{}]"],
    target_model_size_mb: 1234.5,
    thermodynamic: {
      validation: { enabled: true },
      transition_optimization: { convergence_threshold: 1e-9, beta_schedule: "cosine" },
    },
  };

  test("parses back to the same configuration", async () => {
    for (const file of [{}, everything]) {
      const resolved = resolveConfig({ file, environment: { ARROW_QUANT_NUM_THREADS: "3" } });
      const again = await parseConfig(formatConfig(resolved));
      expect(again.config).toEqual(resolved.config);
      expect(Object.keys(again.config.layerBitWidths)).toEqual(Object.keys(resolved.config.layerBitWidths));
    }
  });

  test("holds every key, each with its origin, and its sections", () => {
    const resolved = resolveConfig({
      file: everything,
      fileSource: "my config.yaml",
      environment: { ARROW_QUANT_NUM_THREADS: "3" },
      overrides: { zero_point: "integer" },
      overrideSources: { zero_point: "--zero-point" },
    });
    const text = formatConfig(resolved);
    const lines = text.trimEnd().split("\n");
    const values = lines.filter((line) => / # from /.test(line));
    expect(values).toHaveLength(SCHEMA.length);
    expect(lines.filter((line) => !values.includes(line))).toEqual([
      "self_calibration:",
      "solver_options:",
      "thermodynamic:",
      "  validation:",
      "  boundary_smoothing:",
      "  transition_optimization:",
    ]);
    const squeezed = values.map((line) => line.replace(/ +/g, " "));
    expect(squeezed).toContain("bit_width: 3 # from my config.yaml");
    expect(squeezed).toContain("group_size: 256 # from deployment_profile edge");
    expect(squeezed).toContain("num_threads: 3 # from environment ARROW_QUANT_NUM_THREADS");
    expect(squeezed).toContain("zero_point: integer # from --zero-point");
    expect(squeezed).toContain("solver: auto # from default");
    expect(squeezed).toContain(" enabled: true # from my config.yaml");
    expect(Object.keys(parse(text) as object)).toContain("thermodynamic");
  });

  test("a source cannot break out of its comment", async () => {
    const resolved = resolveConfig({ file: { bit_width: 2 }, fileSource: "a\nbit_width: 8\r\u2028b" });
    expect((await parseConfig(formatConfig(resolved))).config).toEqual(resolved.config);
  });
});

describe("canonicalConfig", () => {
  test("is stable JSON of sorted key paths", () => {
    const text = canonicalConfig(DEFAULT_CONFIG);
    const keys = Object.keys(JSON.parse(text) as object);
    expect(keys).toEqual([...keys].sort());
    expect(keys).toContain("thermodynamic.validation.enabled");
    expect(canonicalConfig(structuredClone(DEFAULT_CONFIG))).toBe(text);
  });

  test("does not depend on the order of the file or on where values came from", () => {
    const a = resolveConfig({ file: { layer_bit_widths: { a: 2, b: 3 }, bit_width: 2 } }).config;
    const b = resolveConfig({ overrides: { bit_width: "2", layer_bit_widths: '{"b": 3, "a": 2}' } }).config;
    expect(canonicalConfig(a)).toBe(canonicalConfig(b));
  });

  test("changes with every value that can change a byte, and with no other", () => {
    const changed = {
      "bit_width": 8,
      "group_size": 0,
      "scale_bits": 4,
      "solver": "round",
      "zero_point": "symmetric",
      "min_accuracy": 0.5,
      "layer_bit_widths": { a: 2 },
      "skip_sensitive_layers": true,
      "sensitive_layer_names": ["a"],
      "keep_patterns": ["a"],
      "non_finite": "keep",
      "thermodynamic.validation.smoothness_threshold": 0.4,
    };
    const texts = Object.entries(changed).map(([key, value]) =>
      canonicalConfig(resolveConfig({ file: nested(key, value) }).config)
    );
    expect(new Set([canonicalConfig(DEFAULT_CONFIG), ...texts]).size).toBe(texts.length + 1);
    const file = { num_threads: 2, backend: "wasm", fail_fast: true };
    expect(canonicalConfig(resolveConfig({ file }).config)).toBe(canonicalConfig(DEFAULT_CONFIG));
  });
});

describe("layers by name", () => {
  const { config } = resolveConfig({
    file: {
      layer_bit_widths: {
        "blocks.1.mlp": 2,
        "^blocks\\.1\\.": 3,
        "mlp$|mlp\\.weight$": 8,
        "blocks.1.mlp.weight": 4,
        "head": 16,
      },
      sensitive_layer_names: ["proj_in", "x.bias"],
      sensitive_layer_patterns: ["time_embed"],
    },
  });

  test("a tensor's own name wins, then the pattern with most bits", () => {
    expect(layerBitWidth(config, "blocks.1.mlp.weight")).toBe(4);
    expect(layerBitWidth(config, "blocks.1.mlp")).toBe(2);
    expect(layerBitWidth(config, "blocks.1.attn.weight")).toBe(3);
    expect(layerBitWidth(config, "blocks.1.x.mlp.weight")).toBe(8);
    expect(layerBitWidth(config, "lm_head.weight")).toBe(16);
    expect(layerBitWidth(config, "blocks.2.attn.weight")).toBe(undefined);
    expect(layerBitWidth(DEFAULT_CONFIG, "constructor")).toBe(undefined);
  });

  test("sensitive names are whole names, patterns are found anywhere", () => {
    const names = [
      "proj_in.weight",
      "proj_in",
      "x.bias",
      "a.time_embed.0.weight",
      "a.proj_in.weight",
      "x.weight",
    ];
    expect(names.map((name) => isSensitiveLayer(config, name))).toEqual([
      true,
      true,
      true,
      true,
      false,
      false,
    ]);
  });
});

test("docs/configuration.md holds the schema's table", async () => {
  const page = await readFile(new URL("../../docs/configuration.md", import.meta.url), "utf8");
  const table = page.split("\n").filter((line) => line.startsWith("| "));
  expect(table).toEqual(configTable().split("\n"));
  for (const row of SCHEMA) expect(configTable()).toContain(`| \`${row.key}\` |`);
});

test("every rule over several keys that is broken stands in one message, with the sources", async () => {
  const fault = await faultOf(() =>
    resolveConfig({
      file: {
        solver: "best",
        min_accuracy: 0.9,
        enable_time_aware: false,
        thermodynamic: { validation: { enabled: true }, transition_optimization: { enabled: true } },
      },
      fileSource: "f.yaml",
      environment: { ARROW_QUANT_TARGET_BITS_PER_WEIGHT: "3", ARROW_QUANT_BIT_PLAN: "plan.json" },
      overrides: { time_scales: "per_group", output_correction: true },
      overrideSources: { output_correction: "--correction", time_scales: "--scales" },
    })
  );
  expect(fault.message).toBe(
    "Cannot use configuration: 4 problems\n" +
      '  "min_accuracy": got 0.9, expected 0 with solver best: the cosine of weights is not what it minimizes (f.yaml)\n' +
      '  "bit_plan": got "plan.json", expected null with target_bits_per_weight or target_model_size_mb ' +
      "(environment ARROW_QUANT_BIT_PLAN)\n" +
      '  "thermodynamic.validation.enabled": got true, expected false with enable_time_aware false (f.yaml): ' +
      "it looks at the activations' quantization parameters (f.yaml)\n" +
      '  "time_scales": got "per_group", expected shared with output_correction true (--correction) (--scales)',
  );
  expect(fault.problems.map(({ source }) => source)).toEqual([
    "f.yaml",
    "environment ARROW_QUANT_BIT_PLAN",
    "f.yaml",
    "--scales",
  ]);
});

test("a target has no budget and no bit plan: its types choose groups and zero points", async () => {
  for (
    const [key, value] of [["target_bits_per_weight", 3], ["target_model_size_mb", 9], ["bit_plan", "p"]]
  ) {
    const fault = await faultOf(() =>
      resolveConfig({ file: { target: "llama.cpp", [key as string]: value } })
    );
    expect(fault.problems.map(({ key }) => key)).toEqual([key as string]);
    expect(fault.message).toContain("layer_types gives layers their types");
  }
});

test("offsets have groups of 16 to 128, one width a layer, and nothing that reads zero points", async () => {
  expect(resolveConfig({ file: { zero_point: "offset", group_size: 32 } }).config.zeroPoint).toBe("offset");
  const fault = await faultOf(() =>
    resolveConfig({
      file: {
        zero_point: "offset",
        group_size: 0,
        scale_bits: 4,
        bit_plan: "p.json",
        time_scales: "per_group",
      },
      fileSource: "f.yaml",
    })
  );
  expect(fault.problems.map(({ key }) => key)).toEqual([
    "group_size",
    "scale_bits",
    "zero_point",
    "time_scales",
  ]);
});

describe("scale_bits", () => {
  const groupSizeOf = (file: object) => {
    const { config, origins } = resolveConfig({ file });
    return [config.groupSize, origins["group_size"]];
  };

  test("brings group sizes of its own where none is asked for", () => {
    expect(groupSizeOf({ scale_bits: 4, bit_width: 2 })).toEqual([
      16,
      "default with scale_bits 4 (configuration file)",
    ]);
    expect(groupSizeOf({ scale_bits: 6, bit_width: 3 })[0]).toBe(16);
    expect(groupSizeOf({ scale_bits: 6 })[0]).toBe(32);
    expect(groupSizeOf({ scale_bits: 4, deployment_profile: "edge" })[0]).toBe(16); // not the profile's 256
    expect(groupSizeOf({ scale_bits: 4, group_size: 128 })).toEqual([128, "configuration file"]);
    expect(groupSizeOf({ scale_bits: 16 })).toEqual([64, "default"]);
  });

  test("what formatConfig prints is the same configuration again", async () => {
    const resolved = resolveConfig({ overrides: { scale_bits: "6", bit_width: "2" } });
    expect((await parseConfig(formatConfig(resolved))).config).toEqual(resolved.config);
  });

  test("excludes whole rows, groups of a superblock and stored zero points, with every fault in one message", async () => {
    for (const group_size of [0, 256]) {
      const fault = await faultOf(() =>
        resolveConfig({ file: { scale_bits: 4, group_size, zero_point: "symmetric" }, fileSource: "f.yaml" })
      );
      expect(fault.message).toBe(
        "Cannot use configuration: 2 problems\n" +
          `  "group_size": got ${group_size}, expected one of 16, 32, 64, 128 with scale_bits 4 (f.yaml) (f.yaml)\n` +
          '  "zero_point": got "symmetric", expected real with scale_bits 4 (f.yaml) (f.yaml)',
      );
    }
    expect(() => resolveConfig({ file: { scale_bits: 16, group_size: 0, zero_point: "integer" } })).not
      .toThrow();
  });
});
