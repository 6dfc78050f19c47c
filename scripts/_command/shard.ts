/** The part of the work that a command does: by its option, or by the environment of an array's task. */
import { parseShard, type Shard, shardFromEnvironment, shardText } from "../../lib/pipeline/mod.ts";

/**
 * The shard of a command, undefined for the whole; where the environment chose it, that is printed.
 *
 * @param asked value of `--shard`
 * @throws {ConfigError} on a value that names none, or variables of an array with gaps
 */
export function chosenShard(
  asked: string | undefined,
  environment: Readonly<Record<string, string | undefined>>,
  log: (line: string) => void,
): Shard | undefined {
  if (asked === "none") return undefined;
  if (asked !== undefined) return parseShard(asked);
  const found = shardFromEnvironment(environment);
  if (found === undefined) return undefined;
  log(`shard ${shardText(found.shard)}: from ${found.source}; --shard none does the whole`);
  return found.shard;
}
