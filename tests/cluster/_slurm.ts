/** A Slurm of two nodes on this machine, for a test: a controller and two daemons, without accounts, cgroups or systemd. */
import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { hostname } from "node:os";
import { join } from "node:path";
import process from "node:process";

const PROGRAMS = ["slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "sinfo"];

/** Why there can be no Slurm here; undefined where there can. */
export function whyNoSlurm(): string | undefined {
  const missing = PROGRAMS.filter((name) => spawnSync("sh", ["-c", `command -v ${name}`]).status !== 0);
  if (missing.length > 0) return `no ${missing.join(", ")} (Debian: slurmctld slurmd slurm-client)`;
  return process.getuid?.() === 0 ? undefined : "its daemons want to run as root here";
}

/** Ports that nothing listens on. */
async function freePorts(count: number): Promise<number[]> {
  const servers = await Promise.all(
    Array.from({ length: count }, () =>
      new Promise<ReturnType<typeof createServer>>((resolve) => {
        const server = createServer().listen(0, "127.0.0.1", () => resolve(server));
      })),
  );
  const ports = servers.map((server) => (server.address() as { port: number }).port);
  for (const server of servers) await new Promise((resolve) => server.close(resolve));
  return ports;
}

/** Why this machine's daemons do not come up; thrown where no task has been started yet. */
export class NoSlurm extends Error {}

/** A running Slurm. */
export interface Slurm {
  /** Runs one of its programs, or a script that does; returns what it printed. */
  run(program: string, ...args: string[]): string;
  /** Waits for something, at most three minutes. */
  until(what: string, isSo: () => boolean): Promise<void>;
  readonly environment: Record<string, string>;
  stop(): void;
}

/** Starts a controller and the nodes n1 and n2 of one processor each; state and logs lie in the folder. */
export async function startSlurm(folder: string): Promise<Slurm> {
  const [controller, first, second] = await freePorts(3) as [number, number, number];
  const path = join(folder, "slurm.conf");
  mkdirSync(join(folder, "state"), { recursive: true });
  const node = (name: string, port: number) =>
    `NodeName=${name} NodeAddr=127.0.0.1 Port=${port} CPUs=1 State=UNKNOWN`;
  writeFileSync(
    path,
    `ClusterName=arrowquant
SlurmctldHost=${hostname()}(127.0.0.1)
SlurmctldPort=${controller}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmUser=root
SlurmdUser=root
SelectType=select/cons_tres
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation=${folder}/state
SlurmdSpoolDir=${folder}/spool-%n
SlurmctldPidFile=${folder}/slurmctld.pid
SlurmdPidFile=${folder}/slurmd-%n.pid
SlurmctldLogFile=${folder}/slurmctld.log
SlurmdLogFile=${folder}/slurmd-%n.log
${node("n1", first)}
${node("n2", second)}
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
`,
  );
  const inherited = Object.entries(process.env).filter(([name]) => !/^(SLURM|SBATCH|ARROW)/.test(name));
  const environment = { ...Object.fromEntries(inherited) as Record<string, string>, SLURM_CONF: path };
  const daemons: ChildProcess[] = [["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], [
    "slurmd",
    "-D",
    "-N",
    "n2",
  ]]
    .map(([program, ...args]) => spawn(program!, args, { env: environment, stdio: "ignore" }));
  const stop = () => {
    // After a failure tasks may still run: they would outlive the daemons.
    const options = { env: environment, timeout: 10_000 };
    const { stdout } = spawnSync("squeue", ["-h", "-r", "-t", "R", "-o", "%A"], {
      ...options,
      encoding: "utf8",
    });
    for (const job of stdout?.split("\n").filter((id) => id !== "") ?? []) {
      spawnSync("scancel", ["--full", "--signal=KILL", job], options);
    }
    for (const daemon of daemons.toReversed()) daemon.kill("SIGKILL");
  };
  const run = (program: string, ...args: string[]): string => {
    const { status, stdout, stderr } = spawnSync(program, args, {
      env: environment,
      encoding: "utf8",
      timeout: 30_000,
    });
    if (status === 0) return stdout.trim();
    throw new Error(`${program} ${args.join(" ")}: exit status ${status}: ${stderr}${stdout}`);
  };
  /** Last lines of the daemons' logs. */
  const logs = () =>
    ["slurmctld", "slurmd-n1", "slurmd-n2"].map((name) => join(folder, `${name}.log`)).filter(existsSync)
      .map((path) => readFileSync(path, "utf8").slice(-1000)).join("\n");
  const until = async (what: string, isSo: () => boolean): Promise<void> => {
    for (const end = Date.now() + 180_000; Date.now() < end;) {
      if (isSo()) return;
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    throw new Error(`no ${what} within three minutes: ${logs()}`);
  };
  try {
    await until("two idle nodes", () => {
      const ended = daemons.find(({ exitCode, signalCode }) => exitCode !== null || signalCode !== null);
      if (ended !== undefined) {
        throw new Error(`${ended.spawnargs.join(" ")} ended: ${logs()}`);
      }
      const { status, stdout } = spawnSync("sinfo", ["-h", "-N", "-o", "%N %T"], {
        env: environment,
        encoding: "utf8",
      });
      return status === 0 && stdout.trim() === "n1 idle\nn2 idle";
    });
  } catch (cause) {
    stop();
    throw new NoSlurm(cause instanceof Error ? cause.message : String(cause), { cause });
  }
  return { run, until, environment, stop };
}
