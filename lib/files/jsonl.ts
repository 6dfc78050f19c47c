/** Files of one JSON value a line. */
import { JsonFault, parseJsonLine } from "./json.ts";
import { readWhole } from "./whole.ts";

/** Largest file: it is held in memory. */
const MAX_JSONL_BYTES = 256 * 2 ** 20;
/** Longest line: one string, which is parsed at once. */
const MAX_LINE_BYTES = 16 * 2 ** 20;

/**
 * Values of a file's lines with their numbers, from 1 on; blank lines and byte order marks are passed over.
 *
 * @param fault makes the error from its reason
 * @throws the fault when the file or a line is too long, no UTF-8, or no JSON
 * @throws {CheckpointError} when it cannot be opened or read
 */
export function* jsonLines(
  path: string,
  fault: (reason: string, cause?: unknown) => Error,
): Generator<readonly [line: number, value: unknown]> {
  const bytes = readWhole(path, MAX_JSONL_BYTES, fault);
  const decoder = new TextDecoder("utf-8", { fatal: true });
  const isWide = bytes[0]! + bytes[1]! === 0xff + 0xfe;
  for (let begin = 0, line = 1; begin < bytes.length; line++) {
    const found = bytes.indexOf(0x0a, begin), end = found < 0 ? bytes.length : found;
    if (end - begin > MAX_LINE_BYTES) {
      throw fault(`line ${line} must have at most ${MAX_LINE_BYTES} bytes, got ${end - begin}`);
    }
    let text: string;
    try {
      text = decoder.decode(bytes.subarray(begin, end));
    } catch (cause) {
      throw fault(`line ${line} must be UTF-8, got ${isWide ? "UTF-16" : "other bytes"}`, cause);
    }
    begin = end + 1;
    if (text.trim() === "") continue;
    let value: unknown;
    try {
      value = parseJsonLine(text);
    } catch (cause) {
      const isArray = line === 1 && /^\s*\[/.test(text); // of records, as in a .json file
      const got = isArray
        ? ", a record, got the beginning of an array"
        : cause instanceof JsonFault
        ? `: ${cause.reason}`
        : "";
      throw fault(`line ${line} must be JSON${got}`, cause);
    }
    yield [line, value];
  }
}
