/** Real Slurm: an array on two nodes, one task killed in the middle and requeued, the merge behind it. */
import { afterAll, expect, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { openKernels } from "../../lib/native/mod.ts";
import { quantizeCheckpoint } from "../../lib/pipeline/mod.ts";
import { differences, gaussian, isDeno, matrix, ROOT, workplace, writeCheckpoint } from "../_checkpoints.ts";
import { configOf, DREAM } from "../pipeline/_runs.ts";
import { NoSlurm, startSlurm, whyNoSlurm } from "./_slurm.ts";

const place = workplace();
afterAll(() => place.remove());
const TASKS = 6, KILLED = 3;

/** Stands for `arrowquant`: the first start of a task stops half-way, for whoever kills it. */
function hangingOnce(command: string, parts: string, flag: string): string {
  const path = join(place.path, "arrowquant.sh");
  const folder = `${parts}/shard-${KILLED}-of-${TASKS}`,
    journal = `${folder}/arrowquant.partial/progress.jsonl`;
  writeFileSync(
    path,
    `if [ "\${SLURM_ARRAY_TASK_ID:-}" = ${KILLED} ] && [ ! -e ${flag} ]; then
  while [ ! -e ${flag} ]; do
    ${command} "$@" & task=$!
    # With a tensor done and others to do; a task that was faster begins again.
    while kill -0 $task 2>/dev/null; do
      if [ -e ${journal} ] && [ "$(wc -l < ${journal})" -ge 2 ] && kill -STOP $task; then
        if [ -e ${journal} ]; then touch ${flag}; else kill -CONT $task; fi
        wait $task
      fi
    done
    [ -e ${flag} ] || rm -rf ${folder}
  done
fi
exec ${command} "$@"
`,
  );
  return `bash ${path}`;
}

test("the merge waits for the tasks, whatever these wait for, and reads the same weights", () => {
  const folder = place.fresh("sbatch"), log = join(folder, "log");
  mkdirSync(folder);
  writeFileSync(join(folder, "sbatch"), `#!/bin/sh\necho "$@" >> ${log}\necho 41\n`, { mode: 0o755 });
  const environment = { ...process.env, PATH: `${folder}:${process.env["PATH"]}`, ARROWQUANT: "arrowquant" };
  for (const own of [["--dependency=afterok:7"], ["--dependency", "afterok:7"], ["-d", "afterok:7"]]) {
    const options = [
      ...own,
      "--time",
      "10",
      "--",
      "quantize",
      "model",
      join(folder, "out"),
      "2",
      ...["--variant", "fp16", "--bits", "4"],
    ];
    const { status, stdout } = spawnSync(
      "bash",
      [join(ROOT, "scripts", "cluster", "slurm.sh"), ...options],
      { env: environment, encoding: "utf8" },
    );
    expect([status, stdout]).toEqual([0, "41\n"]);
    const [tasks, merge] = readFileSync(log, "utf8").trim().split("\n").slice(-2);
    expect(tasks).toContain(`${own.join(" ")} --time 10 `);
    expect(merge!.match(/afterok:\d+/g)).toEqual(["afterok:41"]);
    expect(merge).toContain(" --time 10 ");
    expect(merge).toMatch(/ 2 --variant fp16$/); // the same weights
  }
});

test(
  "arrays on two nodes, a task killed and requeued, and blocks solved together: the bytes of one task",
  async () => {
    const reason = isDeno ? "it takes seconds, and Bun runs it" : whyNoSlurm();
    if (reason !== undefined) return console.log(`skipped: no Slurm: ${reason}`);
    mkdirSync(place.path, { recursive: true });
    const data = gaussian(2 ** 20, 1), [output, together] = [place.fresh(), place.fresh()];
    const flag = join(place.path, "hangs");
    const tensors = Array.from(
      { length: 24 },
      (_, i) => [`layers.${i}.weight`, matrix(1024, 1024, data)] as const,
    );
    const input = writeCheckpoint(place.fresh("model"), Object.fromEntries(tensors));
    const slurm = await startSlurm(join(place.path, "slurm")).catch((error: Error) => error);
    // Only daemons that do not come up are a reason: what goes wrong in a running Slurm fails.
    if (slurm instanceof NoSlurm) return console.log(`skipped: Slurm does not start: ${slurm.message}`);
    if (slurm instanceof Error) throw slurm;
    try {
      const command = `${process.execPath} run ${join(ROOT, "scripts", "arrowquant.ts")}`;
      // More widths than one are tried, so that a tensor takes a moment.
      slurm.environment["ARROW_QUANT_MIN_ACCURACY"] = "0.999";
      slurm.environment["ARROWQUANT"] = hangingOnce(command, `${output}.parts`, flag);
      const script = join(ROOT, "scripts", "cluster", "slurm.sh");
      const options = ["--bits", "2", "--solver", "clip"];
      slurm.run("bash", script, "--cpus-per-task=1", "--", "quantize", input, output, `${TASKS}`, ...options);
      await slurm.until("task that hangs", () => existsSync(flag));
      const job = slurm.run("squeue", "-h", "-r", "-t", "R", "-o", "%F_%K").split("\n")
        .find((id) => id.endsWith(`_${KILLED}`))!;
      slurm.run("scontrol", "requeue", job);
      // Slurm lets a requeued job wait for two minutes.
      await slurm.until(
        "requeued task",
        () => slurm.run("squeue", "-h", "-r", "-t", "PD", "-o", "%F_%K").includes(job),
      );
      slurm.run("scontrol", "update", `JobId=${job}`, "StartTime=now");
      await slurm.until("end of all jobs", () => slurm.run("squeue", "-h") === "");
      // Both nodes solve one model, block by block.
      delete slurm.environment["ARROW_QUANT_MIN_ACCURACY"];
      slurm.environment["ARROWQUANT"] = command;
      const solve = [
        ...["--bits", "2", "--solver", "best", "--effort", "low"],
        "--samples",
        "32",
        "--together",
        "3",
      ];
      slurm.run("bash", script, "--cpus-per-task=1", "--", "quantize", DREAM, together, "2", ...solve);
      await slurm.until("end of all jobs", () => slurm.run("squeue", "-h") === "");
    } finally {
      slurm.stop();
    }
    const logs = (name: string) => readFileSync(`${output}.logs/${name}.log`, "utf8");
    expect(logs("task-1")).toContain("shard 1/6: from SLURM_ARRAY_TASK_ID=1");
    expect(logs("task-1")).toContain("1 threads");
    expect(logs(`task-${KILLED}`)).toContain("DUE TO JOB REQUEUE");
    expect(logs(`task-${KILLED}`)).toMatch(/the journal names [1-9]\d* of 4 tensors/);
    expect(existsSync(output) ? "" : logs("merge")).toBe("");
    using kernels = await openKernels({ threads: 1 });
    const whole = place.fresh();
    await quantizeCheckpoint({
      input,
      output: whole,
      config: configOf({ solver: "clip", bit_width: 2, min_accuracy: 0.999 }),
      kernels,
    });
    expect(differences(output, whole)).toEqual([]);
    expect(existsSync(together) ? "" : readFileSync(`${together}.logs/task-1.log`, "utf8")).toBe("");
    const solved = place.fresh(),
      config = configOf({
        ...{ solver: "best", bit_width: 2, calibration_samples: 32 },
        "solver_options.effort": "low",
      });
    await quantizeCheckpoint({ input: DREAM, output: solved, config, kernels });
    expect(differences(together, solved)).toEqual([]);
  },
  600_000,
);
