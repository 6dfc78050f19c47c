/**
 * Limits that the system sets this process: memory, processors, processor time. On Linux control groups of
 * both versions count, up to the root of their hierarchy, and what a limit's page cache takes is free: the
 * kernel gives it back. Without `/proc` (macOS, Deno without the permission to read) there is less to know,
 * and nothing fails.
 */
import { readFileSync } from "node:fs";
import { availableParallelism, freemem, totalmem } from "node:os";
import process from "node:process";

/** Limits of this process, as far as the system tells. */
export interface Limits {
  /** Bytes that it may still take; Infinity where the system does not tell. */
  readonly availableBytes: number;
  /** The tightest limit on its memory and where it stands; undefined without any. */
  readonly memoryLimit: { readonly bytes: number; readonly path: string } | undefined;
  /** Processors that it may keep busy: at least 1, a quota rounded up. */
  readonly processors: number;
  /** The tightest quota of processors and where it stands; undefined without any. */
  readonly quota: { readonly processors: number; readonly path: string } | undefined;
  /** Seconds of processor time after which the system ends it (`ulimit -t`); undefined without one. */
  readonly processorSeconds: number | undefined;
}

/** A place where control groups are seen: the hierarchy's folder `root` is mounted at `at`. */
interface Mount {
  readonly root: string;
  readonly at: string;
}

/** Files of one version of control groups. */
const VERSIONS = [
  { limit: "memory.max", used: "memory.current", cache: ["inactive_file", "active_file"] },
  {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    cache: ["total_inactive_file", "total_active_file"],
  },
] as const;
/** Limits from here on are version 1's word for none. */
const NO_LIMIT = 2 ** 60;

interface Permissions {
  querySync(permission: { name: string; path?: string; kind?: string }): { state: string };
}

/** Whether Deno lets this be read without asking; true elsewhere. */
function isGranted(permission: { name: string; path?: string; kind?: string }): boolean {
  const { Deno: deno } = globalThis as { Deno?: { permissions: Permissions } };
  return deno === undefined || deno.permissions.querySync(permission).state === "granted";
}

/** Text of a file; empty where it cannot be read. */
function textOf(path: string): string {
  if (!isGranted({ name: "read", path })) return "";
  try {
    return readFileSync(path, "utf8");
  } catch {
    return ""; // not Linux, not this version of control groups, or not permitted: there is nothing to know
  }
}

/** The number in a text; undefined for `max`, nothing and what is none. */
function countIn(text: string): number | undefined {
  return /^\d+$/.test(text.trim()) ? Number(text) : undefined;
}

/** The number behind a name in lines of names and numbers. */
const field = (text: string, name: string): number | undefined =>
  countIn(new RegExp(`^${name}:?\\s+(\\d+)`, "m").exec(text)?.[1] ?? "");

/** Folders of a controller's groups that this process is in, each below the next one. */
function groupFolders(system: string, controller: "memory" | "cpu"): string[] {
  const paths = new Map(
    textOf(`${system}/proc/self/cgroup`).split("\n").flatMap((line): [number, string][] => {
      const [, , names, path] = /^(\d+):([^:]*):(\/.*)$/.exec(line) ?? [];
      if (path === undefined) return [];
      return names === "" ? [[2, path]] : names!.split(",").includes(controller) ? [[1, path]] : [];
    }),
  );
  const folders = mountsOf(system, controller).flatMap(([version, { root, at }]) => {
    const path = paths.get(version) ?? "/", inside = root === "/" ? path : path.slice(root.length);
    // A group outside of what is mounted, as a container may see: only the mounted one is known.
    const isInside = root === "/" || path === root || path.startsWith(`${root}/`);
    const parts = isInside ? inside.split("/").filter(Boolean) : [];
    return parts.concat("").map((_, i) => [at, ...parts.slice(0, parts.length - i)].join("/"));
  });
  return [...new Set(folders)].map((folder) => system + folder);
}

/** Where a controller's hierarchies are mounted, by version; the usual places are looked at in any case. */
function mountsOf(system: string, controller: "memory" | "cpu"): [version: number, Mount][] {
  const mounted = textOf(`${system}/proc/self/mountinfo`).split("\n").flatMap((line): [number, Mount][] => {
    const [own = "", type = ""] = line.split(" - "), fields = own.split(" ").map(unescaped);
    const [kind, , options = ""] = type.split(" "), mount = { root: fields[3]!, at: fields[4]! };
    if (kind === "cgroup2") return [[2, mount]];
    return kind === "cgroup" && options.split(",").includes(controller) ? [[1, mount]] : [];
  });
  const usual = { root: "/", at: "/sys/fs/cgroup" };
  return [...mounted, [2, usual], [1, { root: "/", at: `${usual.at}/${controller}` }]];
}

/** `\040` and its like as characters. */
const unescaped = (text: string): string =>
  text.replace(/\\([0-7]{3})/g, (_, digits: string) => String.fromCharCode(Number.parseInt(digits, 8)));

/** Limit and room of a group's memory; undefined where it has no limit. */
function memoryOf(folder: string): { bytes: number; room: number; path: string } | undefined {
  for (const { limit, used, cache } of VERSIONS) {
    const path = `${folder}/${limit}`, bytes = countIn(textOf(path));
    if (bytes === undefined || bytes >= NO_LIMIT) continue;
    const stat = textOf(`${folder}/memory.stat`);
    const cached = cache.reduce((sum, name) => sum + (field(stat, name) ?? 0), 0);
    const taken = Math.max(0, (countIn(textOf(`${folder}/${used}`)) ?? 0) - cached);
    return { bytes, room: Math.max(0, bytes - taken), path };
  }
  return undefined;
}

/** Processors that a group's quota allows; undefined where it has none. */
function quotaOf(folder: string): { processors: number; path: string } | undefined {
  const [quota, period] = textOf(`${folder}/cpu.max`).trim().split(/\s+/).map(countIn);
  if (quota !== undefined && period) return { processors: quota / period, path: `${folder}/cpu.max` };
  const path = `${folder}/cpu.cfs_quota_us`, own = countIn(textOf(path));
  const per = countIn(textOf(`${folder}/cpu.cfs_period_us`));
  return own !== undefined && per ? { processors: own / per, path } : undefined;
}

/** Processors in a list as `0-3,8`. */
function listed(list: string): number {
  return list.split(",").reduce((sum, range) => {
    const [first, last = first] = range.split("-").map(Number);
    return sum + (last! - first! + 1);
  }, 0);
}

/** The one with the least of something. */
const least = <T>(values: readonly T[], of: (value: T) => number): T | undefined =>
  values.reduce<T | undefined>(
    (best, value) => best === undefined || of(value) < of(best) ? value : best,
    undefined,
  );

/** Bytes that the machine has left, where `/proc` does not say. */
function machineBytes(): number {
  if (!isGranted({ name: "sys", kind: "systemMemoryInfo" })) return Infinity;
  // Elsewhere "free" leaves out what the system would give back at once: there only what can never fit is
  // known.
  return process.platform === "linux" ? freemem() : totalmem();
}

/**
 * Limits of this process.
 *
 * @param system folder in place of `/`, for tests
 *
 * @example
 * ```ts
 * import { limitsOf } from "./limits.ts";
 * const { availableBytes, processors } = limitsOf();
 * console.log(availableBytes > 0, processors >= 1);
 * ```
 */
export function limitsOf(system = ""): Limits {
  const free = field(textOf(`${system}/proc/meminfo`), "MemAvailable");
  const machine = free === undefined ? machineBytes() : free * 1024;
  const groups = groupFolders(system, "memory").flatMap((folder) => memoryOf(folder) ?? []);
  const limit = least(groups, ({ bytes }) => bytes);
  const quota = least(
    groupFolders(system, "cpu").flatMap((folder) => quotaOf(folder) ?? []),
    (own) => own.processors,
  );
  const allowed = /^Cpus_allowed_list:\s*(\S+)/m.exec(textOf(`${system}/proc/self/status`))?.[1];
  const present = Math.min(availableParallelism(), allowed === undefined ? Infinity : listed(allowed));
  return {
    availableBytes: groups.reduce((room, group) => Math.min(room, group.room), machine),
    memoryLimit: limit && { bytes: limit.bytes, path: limit.path.slice(system.length) },
    processors: Math.max(1, Math.min(present, Math.ceil(quota?.processors ?? Infinity))),
    quota: quota && { ...quota, path: quota.path.slice(system.length) },
    processorSeconds: countIn(
      /^Max cpu time\s+(\d+)/m.exec(textOf(`${system}/proc/self/limits`))?.[1] ?? "",
    ),
  };
}
