/** The Kubernetes manifest, against the API's schema and against what its containers run. */
import { describe, expect, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parse } from "@std/yaml";
import { shardFromEnvironment } from "../../lib/plan/shards.ts";
import { ROOT, run } from "../_checkpoints.ts";
import { readersPython } from "../_readers.ts";

const MANIFEST = join(ROOT, "scripts", "cluster", "kubernetes.yaml");
const text = readFileSync(MANIFEST, "utf8");
interface Container {
  readonly command: readonly string[];
  readonly args?: readonly string[];
  readonly env?: readonly { readonly name: string; readonly value?: string }[];
}
interface Job {
  readonly spec: {
    readonly completions?: number;
    readonly completionMode?: string;
    readonly template: {
      readonly spec: {
        readonly containers: readonly Container[];
        readonly initContainers?: readonly Container[];
      };
    };
  };
}
const [tasks, merge] = text.split("\n---\n").map((document) => parse(document) as Job) as [Job, Job];

test("the manifest is of the API's schema, and the validator tells what is not", () => {
  const python = readersPython();
  if (python === undefined) return;
  const validate = (path: string) =>
    spawnSync(python, ["-m", "kubernetes_validate", "--strict", path], { encoding: "utf8" });
  const { status, stdout, stderr } = validate(MANIFEST);
  expect([status, (stdout + stderr).match(/passed for resource job/g)?.length]).toEqual([0, 2]);
  const folder = mkdtempSync(join(tmpdir(), "arrowquant-kubernetes-"));
  try {
    for (
      const [right, wrong] of [["completions: 8", 'completions: "8"'], [
        "parallelism:",
        "paralelism:",
      ]] as const
    ) {
      const path = join(folder, "wrong.yaml");
      writeFileSync(path, text.replace(right, wrong));
      expect(validate(path).status).not.toBe(0);
    }
  } finally {
    rmSync(folder, { recursive: true });
  }
});

describe("the manifest's tasks", () => {
  const { completions, completionMode, template: { spec: { containers: [task] } } } = tasks.spec;
  test("know their part by the Job's index and count", () => {
    const count = task!.env!.find(({ name }) => name === "JOB_COMPLETIONS")!.value!;
    expect([completionMode, Number(count)]).toEqual(["Indexed", completions]);
    const found = shardFromEnvironment({ JOB_COMPLETION_INDEX: "7", JOB_COMPLETIONS: count });
    expect(found!.shard).toEqual({ index: 8, count: completions! });
  });
  test("are merged once as many parts are there, from where they wrote", () => {
    const { initContainers, containers: [own] } = merge.spec.template.spec;
    expect(initContainers![0]!.command.at(-1)).toContain(`shard-*-of-${completions}/`);
    expect(initContainers![0]!.command.at(-1)).toContain(`= ${completions} ]`);
    const parts = task!.command[5]!;
    expect(own!.command.slice(3, 5)).toEqual(["merge", parts]);
    expect(initContainers![0]!.command.at(-1)).toContain(`${parts}/shard-`);
  });
  test("have options that the commands have", () => {
    for (const { command, args = [] } of [task!, merge.spec.template.spec.containers[0]!]) {
      const { stdout } = run("arrowquant.ts", [command[3]!, "--help"]);
      for (const option of [...command.slice(4), ...args].filter((word) => word.startsWith("--"))) {
        expect(stdout).toContain(option);
      }
    }
  });
});
