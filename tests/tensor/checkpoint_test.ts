import { afterAll, describe, expect, test } from "bun:test";
import { cpSync, mkdirSync, readdirSync, renameSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { CheckpointError, FormatError } from "../../lib/errors.ts";
import { modelKind, openCheckpoint, type PlaceOptions } from "../../lib/tensor/mod.ts";
import { entry, MODELS, readIndependently, temporaryFolder, thrown, writeRaw } from "./_files.ts";

const root = temporaryFolder();
afterAll(root.remove);
let folders = 0;

/** A new folder with files: objects as JSON, texts as they are, lists of names as a safetensors file of bytes. */
function folderWith(files: Record<string, unknown>): string {
  const folder = join(root.path, `${folders++}`);
  for (const [name, content] of Object.entries(files)) {
    const path = join(folder, name);
    mkdirSync(join(path, ".."), { recursive: true });
    if (Array.isArray(content)) {
      const entries = content.map((tensor, i) => entry(tensor, "U8", [1], i, i + 1));
      writeRaw(path, `{${entries.join(",")}}`, Uint8Array.from(content, (_, i) => i + 1));
    } else writeFileSync(path, typeof content === "string" ? content : JSON.stringify(content));
  }
  return folder;
}

function refusal(folder: string, type: typeof CheckpointError | typeof FormatError = CheckpointError) {
  const before = openDescriptors();
  const error = thrown(() => openCheckpoint(folder));
  expect(error).toBeInstanceOf(type);
  expect(openDescriptors()).toBe(before);
  return error;
}

/** Open descriptors of this process; 0 where the system does not list them. */
function openDescriptors(): number {
  try {
    return readdirSync("/proc/self/fd").length;
  } catch {
    return 0;
  }
}

const INDEX = "model.safetensors.index.json";
const A = "model-00001-of-00002.safetensors";
const B = "model-00002-of-00002.safetensors";

describe("openCheckpoint opens", () => {
  test("dream-mini: two shards with an index", () => {
    const path = join(MODELS, "dream-mini");
    using checkpoint = openCheckpoint(path);
    expect(checkpoint.kind).toBe("dream");
    expect(checkpoint.indexFile).toBe(INDEX);
    expect(checkpoint.subfolder).toBe(undefined);
    expect(checkpoint.files.map(({ name }) => name)).toEqual([A, B]);
    expect(checkpoint.config?.["hidden_size"]).toBe(64);
    expect(checkpoint.tensors.size).toBe(51);
    const names = [...checkpoint.tensors.keys()];
    expect(names[0]).toBe("model.embed_tokens.weight");
    const wanted = readIndependently(join(path, B)).tensors["lm_head.weight"]!;
    expect([...checkpoint.tensors.get("lm_head.weight")!.info.shape]).toEqual(wanted.shape);
    expect(Buffer.compare(checkpoint.read("lm_head.weight"), wanted.data)).toBe(0);
    const target = new Uint8Array(6);
    checkpoint.readInto("lm_head.weight", 10, target);
    expect([...target]).toEqual([...wanted.data.subarray(10, 16)]);
    const bytes = [...checkpoint.tensors.values()].reduce((sum, { info }) => sum + info.byteLength, 0);
    expect(bytes).toBe(355200);
  });

  test("glyph-dit: one model among other safetensors files", () => {
    using checkpoint = openCheckpoint(join(MODELS, "glyph-dit"));
    expect(checkpoint.kind).toBe("dit");
    expect(checkpoint.indexFile).toBe(undefined);
    expect(checkpoint.files.map(({ name }) => name)).toEqual(["diffusion_pytorch_model.safetensors"]);
    expect(checkpoint.tensors.size).toBe(120);
  });

  test("a single file, with the config.json beside it or none", () => {
    using shard = openCheckpoint(join(MODELS, "dream-mini", A));
    expect(shard.kind).toBe("dream");
    expect(shard.files.map(({ name }) => name)).toEqual([A]);
    expect(shard.folder).toBe(join(MODELS, "dream-mini"));
    using alone = openCheckpoint(join(folderWith({ "x.safetensors": ["a", "b"] }), "x.safetensors"));
    expect(alone.kind).toBe("unknown");
    expect(alone.config).toBe(undefined);
    expect([...alone.read("b")]).toEqual([2]);
  });

  test("the transformer of a diffusers pipeline, and says so", () => {
    const folder = folderWith({ "model_index.json": {}, "vae/diffusion_pytorch_model.safetensors": ["v"] });
    cpSync(join(MODELS, "glyph-dit"), join(folder, "transformer"), { recursive: true });
    using checkpoint = openCheckpoint(folder);
    expect(checkpoint.subfolder).toBe("transformer");
    expect(checkpoint.folder).toBe(join(folder, "transformer"));
    expect(checkpoint.path).toBe(folder);
    expect(checkpoint.kind).toBe("dit");
  });

  test("other names when they leave no doubt", () => {
    using one = openCheckpoint(
      folderWith({ "weights.safetensors": ["a"], "time_parameters.safetensors": ["t"] }),
    );
    expect([...one.tensors.keys()]).toEqual(["a"]);
    const variant = "diffusion_pytorch_model.fp16.safetensors.index.json";
    const files = { "x.safetensors": ["b", "a"], "unused.safetensors": ["a"] };
    using other = openCheckpoint(
      folderWith({ ...files, [variant]: { weight_map: { a: "x.safetensors", b: "x.safetensors" } } }),
    );
    expect(other.indexFile).toBe(variant);
    expect([...other.tensors.keys()]).toEqual(["b", "a"]);
    using numbered = openCheckpoint(folderWith({ "x-00001-of-00001.safetensors": ["a"] }));
    expect(numbered.tensors.size).toBe(1);
  });

  test("shards that are links, as a download cache has them", () => {
    const folder = folderWith({ [INDEX]: { weight_map: { a: A } }, "blob": ["a"] });
    symlinkSync(join(folder, "blob"), join(folder, A));
    using checkpoint = openCheckpoint(folder);
    expect([...checkpoint.read("a")]).toEqual([1]);
  });

  test("a finished model beside an unfinished one", () => {
    using checkpoint = openCheckpoint(
      folderWith({ "model.safetensors": ["a"], "model.safetensors.partial": "" }),
    );
    expect(checkpoint.tensors.size).toBe(1);
  });
});

describe("openCheckpoint takes what the libraries take, and says so", () => {
  const D = "diffusion_pytorch_model";
  const index = (file: string, name = "a") => ({ weight_map: { [name]: file } });
  const opened = (files: Record<string, unknown>, options?: PlaceOptions, below = "") => {
    using checkpoint = openCheckpoint(join(folderWith(files), below), options);
    return { names: [...checkpoint.tensors.keys()].join(), notes: checkpoint.notes.join("; ") };
  };

  test("transformers: the single file before the index, also one of shards that are gone", () => {
    for (const stale of [{ [A]: ["old"] }, {}]) {
      const { names, notes } = opened({ "model.safetensors": ["new"], [INDEX]: index(A, "old"), ...stale });
      expect(names).toBe("new");
      expect(notes).toBe(`"model.safetensors" is taken, as transformers does, and not "${INDEX}" beside it`);
    }
  });

  test("transformers: no single file that is a part of the model in the index", () => {
    const part = { "model.safetensors": ["a"], [A]: ["a"], [B]: ["b"] };
    const both = { weight_map: { a: A, b: B } };
    const { message } = thrown(() => opened({ ...part, [INDEX]: both }));
    expect(message).toContain('"model.safetensors" must have every tensor');
    expect(message).toContain('got none of "b"');
    expect(opened({ ...part, [INDEX]: both }, undefined, "model.safetensors").names).toBe("a");
    const own = { weight_map: { a: "model.safetensors", b: "model-2.safetensors" } };
    expect(thrown(() => opened({ "model.safetensors": ["a"], [INDEX]: own })).message).toContain('"b"');
    // an index that is no JSON is not read by transformers either
    expect(opened({ ...part, [INDEX]: "{" }).names).toBe("a");
  });

  test("a shard or a file of another variant, given by its path, is told", () => {
    const shards = { [INDEX]: { weight_map: { a: A, b: B } }, [A]: ["a"], [B]: ["b"] };
    expect(opened(shards, undefined, A)).toEqual({
      names: "a",
      notes: `"${A}" is one of 2 shards, which alone is read: for the whole model give the folder`,
    });
    const plain = { "model.safetensors": ["a"], "model.fp16.safetensors": ["b"] };
    const asked = { variant: "fp16" };
    expect(thrown(() => opened(plain, asked, "model.safetensors")).message).toContain('the variant "fp16"');
    expect(opened(plain, asked, "model.fp16.safetensors").names).toBe("b");
  });

  test("diffusers: the index before the single file", () => {
    const { names, notes } = opened({
      [`${D}.safetensors`]: ["old"],
      [`${D}.safetensors.index.json`]: index(`${D}-00001-of-00001.safetensors`),
      [`${D}-00001-of-00001.safetensors`]: ["a"],
    });
    expect(names).toBe("a");
    expect(notes).toContain("as diffusers does");
  });

  test("a variant alone, in every spelling; beside others only when it is asked for", () => {
    const shard = "model.fp16-00001-of-00002.safetensors";
    const cases: Record<string, unknown>[] = [
      { "model.fp16.safetensors": ["a"] },
      { "model.safetensors.index.fp16.json": index(shard), [shard]: ["a"] },
      {
        [`${D}.safetensors.fp16.index.json`]: index(`${D}-1-of-2.fp16.safetensors`),
        [`${D}-1-of-2.fp16.safetensors`]: ["a"],
      },
      { [`${D}.fp16.safetensors.index.json`]: index("x.safetensors"), "x.safetensors": ["a"] },
    ];
    for (const files of cases) {
      const { names, notes } = opened(files);
      expect(names).toBe("a");
      expect(notes).toContain('no weights but of the variant "fp16"');
      expect(opened(files, { variant: "fp16" }).names).toBe("a");
    }
    const both = { "model.safetensors": ["plain"], "model.fp16.safetensors": ["half"] };
    expect(opened(both)).toEqual({
      names: "plain",
      notes: 'not read beside "model.safetensors": "model.fp16.safetensors"',
    });
    expect(opened(both, { variant: "fp16" }).names).toBe("half");
    expect(thrown(() => opened(both, { variant: "int8" })).message).toContain('the variant "int8"');
    const several = { "model.fp16.safetensors": ["a"], "model.ema.safetensors": ["b"] };
    expect(thrown(() => opened(several)).message).toContain("--variant chooses one of ema, fp16");
  });

  test("no file twice: consolidated weights beside shards are not read", () => {
    const { names, notes } = opened({
      [INDEX]: index(A),
      [A]: ["a"],
      "consolidated.safetensors": ["a", "b"],
    });
    expect(names).toBe("a");
    expect(notes).toContain('"consolidated.safetensors"');
  });

  test("shards that the index does not name are told, those of another model are not", () => {
    const stale = { "model-00001-of-00003.safetensors": ["x"], "model-00003-of-00003.safetensors": ["y"] };
    const { names, notes } = opened({ [INDEX]: index(A), [A]: ["a"], ...stale });
    expect(names).toBe("a");
    expect(notes).toBe(
      `not read beside "${INDEX}": "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"`,
    );
    const single = opened({ "model.safetensors": ["a"], ...stale });
    expect(single.names).toBe("a");
    expect(single.notes).toContain('not read beside "model.safetensors": "model-00001-of-00003');
    expect(opened({ [INDEX]: index(A), [A]: ["a"], "text-00001-of-00002.safetensors": ["t"] }).notes).toBe(
      "",
    );
  });

  test("of a pipeline its denoiser, also beside a checkpoint in one file; of two none", () => {
    const unet = {
      "model_index.json": {},
      [`unet/${D}.safetensors`]: ["a"],
      [`vae/${D}.safetensors`]: ["v"],
    };
    expect(opened({ ...unet, "v1-5-pruned.safetensors": ["all"] })).toEqual({
      names: "a",
      notes: 'a diffusers pipeline: "unet" is quantized and run, the other folders stay',
    });
    const two = { ...unet, [`transformer/${D}.safetensors`]: ["b"] };
    const { message } = thrown(() => opened(two));
    expect(message).toContain('"transformer", "unet"');
    expect(message).toContain("give the path of one");
    expect(opened(two, undefined, "transformer").names).toBe("b");
    expect(opened(two, { subfolder: "unet" }).names).toBe("a");
    expect(thrown(() => opened(two, { subfolder: "vae" })).message).toContain(
      'a denoiser "vae", got "transformer", "unet"',
    );
    expect(thrown(() => opened({ [`${D}.safetensors`]: ["a"] }, { subfolder: "unet" })).message).toContain(
      "must be a diffusers pipeline",
    );
  });

  test("of a model in the cache the snapshot of main, or the only one", () => {
    const snapshot = (id: string) => ({ [`snapshots/${id}/model.safetensors`]: [id], "blobs/x": "" });
    expect(opened({ ...snapshot("1"), ...snapshot("2"), "refs/main": "2\n" }).names).toBe("2");
    expect(opened({ ...snapshot("1"), "refs/main": "gone" }).names).toBe("1");
    expect(thrown(() => opened({ ...snapshot("1"), ...snapshot("2"), "refs/other": "2" })).message)
      .toContain('one snapshot or that of refs/main, got "1", "2"');
  });
});

describe("openCheckpoint refuses", () => {
  const map = (weight_map: unknown) => ({ metadata: {}, weight_map });

  test("paths that hold no model, and says what is there and what is wanted", () => {
    expect(refusal(join(root.path, "absent")).message).toContain("no such file or folder");
    const { message } = refusal(folderWith({ "README.md": "", "config.json": {} }));
    expect(message).toContain('"README.md", "config.json"');
    expect(message).toContain("model.safetensors or diffusion_pytorch_model.safetensors");
    expect(refusal(join(folderWith({ "x.bin": "" }), "x.bin")).message).toContain("*.safetensors");
    expect(refusal(folderWith({ "a.safetensors": ["a"], "b.safetensors": ["b"] })).message)
      .toContain('"a.safetensors", "b.safetensors"');
    const both = { "model.safetensors": ["a"], "diffusion_pytorch_model.safetensors": ["b"] };
    expect(refusal(folderWith(both)).message).toContain("one model");
    expect(refusal(folderWith({ "model_index.json": {}, "vae/x.safetensors": ["a"] })).message).toContain(
      "transformer",
    );
    expect(refusal(folderWith({ [A]: ["a"] })).message).toContain("must have an index");
  });

  test("unfinished output, and says how to go on", () => {
    const cases: Record<string, unknown>[] = [
      { "model.safetensors.partial": "" },
      { [A]: ["a"], [`${B}.partial`]: "" },
      { [INDEX]: map({ a: A, b: B }), [A]: ["a"], [`${B}.partial`]: "" },
    ];
    for (const files of cases) {
      const { message } = refusal(folderWith(files));
      expect(message).toContain("--resume");
      expect(message).toContain(".safetensors.partial");
    }
    const folder = folderWith({ "model.safetensors.partial": ["a"] });
    expect(refusal(join(folder, "model.safetensors.partial")).message).toContain("--resume");
  });

  test("a missing shard, by name", () => {
    const folder = folderWith({ [INDEX]: map({ a: A, b: B }), [A]: ["a"] });
    const error = refusal(folder);
    expect(error.message).toContain(B);
    expect(error.path).toBe(join(folder, B));
  });

  test("an index that disagrees with its shards, by tensor and file", () => {
    const absent = refusal(folderWith({ [INDEX]: map({ a: A, b: B, c: A }), [A]: ["a"], [B]: ["b"] }));
    expect(absent.tensor).toBe("c");
    expect(absent.message).toContain(`"${A}" must have tensor "c", got no such tensor`);
    const elsewhere = refusal(
      folderWith({ [INDEX]: map({ a: A, b: A, c: B }), [A]: ["a"], [B]: ["b", "c"] }),
    );
    expect(elsewhere.tensor).toBe("b");
    expect(elsewhere.message).toContain(`got it in "${B}"`);
    const twice = refusal(folderWith({ [INDEX]: map({ a: A, b: B }), [A]: ["a"], [B]: ["b", "a"] }));
    expect(twice.tensor).toBe("a");
    expect(twice.message).toContain(`got both "${A}" and "${B}"`);
    const extra = refusal(folderWith({ [INDEX]: map({ a: A, b: B }), [A]: ["a", "x"], [B]: ["y", "b"] }));
    expect(extra.message).toContain(`"x (${A})", "y (${B})"`);
  });

  test("shard names that lead out of the folder or are no names", () => {
    const outside = folderWith({ "secret.safetensors": ["a"] });
    const names = [
      "../0/secret.safetensors",
      join(outside, "secret.safetensors"),
      "sub/x.safetensors",
      "..\\x.safetensors",
      "C:x.safetensors",
      "..",
      ".",
      "",
      "config.json",
      "x\0.safetensors",
      7,
      null,
      ["x.safetensors"],
    ];
    for (const name of names) {
      const error = refusal(
        folderWith({ [INDEX]: map({ a: name }), "sub/x.safetensors": ["a"] }),
        FormatError,
      );
      expect(error.tensor).toBe("a");
      expect(error.message).toContain("in the same folder");
    }
  });

  test("an index or config that is broken", () => {
    const cases: [string, string][] = [
      ["", "valid JSON"],
      ["{", "valid JSON"],
      ["[]", "JSON object"],
      ["{}", "weight_map must be an object"],
      ['{"weight_map":[]}', "weight_map must be an object"],
      ['{"weight_map":{}}', "at least one tensor"],
      [`{"weight_map":{"a":"${A}","\\u0061":"${B}"}}`, "must not be repeated"],
      ["[".repeat(100_000), "nested at most 64 deep"],
      ["\ufeff{}", "valid JSON"],
    ];
    for (const [text, message] of cases) {
      const folder = folderWith({ [INDEX]: text, [A]: ["a"], [B]: ["b"] });
      const error = refusal(folder, FormatError);
      expect(error.message).toContain(message);
      expect(error.path).toBe(join(folder, INDEX));
    }
    const config = refusal(
      folderWith({ "config.json": '{"a":1,"a":2}', "model.safetensors": ["a"] }),
      FormatError,
    );
    expect(config.message).toContain("config.json");
    const huge = folderWith({ "config.json": " ".repeat(64 * 2 ** 20 + 1), "model.safetensors": ["a"] });
    expect(refusal(huge, FormatError).message).toContain("at most 67108864 bytes");
  });

  test("a broken shard, and closes the good ones", () => {
    const folder = folderWith({ [INDEX]: map({ a: A, b: B }), [A]: ["a"], [B]: "no safetensors" });
    expect(refusal(folder, FormatError).path).toBe(join(folder, B));
  });
});

test("a checkpoint closes every file and reads no more", () => {
  const before = openDescriptors();
  const checkpoint = openCheckpoint(join(MODELS, "dream-mini"));
  const error = thrown(() => checkpoint.read("absent"));
  expect(error).toBeInstanceOf(CheckpointError);
  expect(error.tensor).toBe("absent");
  checkpoint.close();
  checkpoint.close();
  expect(openDescriptors()).toBe(before);
  expect(thrown(() => checkpoint.read("lm_head.weight"))).toBeInstanceOf(TypeError);
});

test("modelKind knows the families and guesses nothing", () => {
  const cases: [Record<string, unknown> | undefined, string][] = [
    [{ model_type: "Dream" }, "dream"],
    [{ model_type: "dream" }, "dream"],
    [{ architectures: ["DreamModel"] }, "dream"],
    [{ model_type: "llada", architectures: ["LLaDAModelLM"] }, "llada"],
    [{ architectures: ["LLaDAModelLM"] }, "llada"],
    [{ model_type: "llada_moe", architectures: ["LLaDAMoEModelLM"] }, "llada_moe"],
    [{ model_type: "llada", architectures: ["LLaDAMoEModel"] }, "llada_moe"],
    [{ model_type: "sdar", architectures: ["SDARForCausalLM"] }, "sdar"],
    [{ model_type: "sdar_moe", architectures: ["SDARMoeForCausalLM"] }, "unknown"],
    [{ _class_name: "DiTTransformer2DModel" }, "dit"],
    [{ _class_name: "Transformer2DModel", norm_type: "ada_norm_zero" }, "dit"],
    [{ _class_name: "Transformer2DModel", norm_type: "ada_norm_single" }, "unknown"],
    [{ model_type: "llama", architectures: ["LlamaForCausalLM"] }, "unknown"],
    [{ model_type: 3, architectures: "DreamModel" }, "unknown"],
    [{ architectures: [null, 4] }, "unknown"],
    [{}, "unknown"],
    [undefined, "unknown"],
  ];
  for (const [config, kind] of cases) {
    expect(`${JSON.stringify(config)} ${modelKind(config)}`).toBe(`${JSON.stringify(config)} ${kind}`);
  }
});

test("renaming and removing files of an open checkpoint does not disturb it", () => {
  const folder = folderWith({ "model.safetensors": ["a"] });
  using checkpoint = openCheckpoint(folder);
  renameSync(join(folder, "model.safetensors"), join(folder, "moved"));
  rmSync(join(folder, "moved"));
  expect([...checkpoint.read("a")]).toEqual([1]);
});
