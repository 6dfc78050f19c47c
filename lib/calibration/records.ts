/**
 * Calibration records of language models: tokens of texts, prompts with answers, chats or ids. Padding is cut
 * off, and what may be predicted is the same whatever form or file a record comes in.
 */
import { jsonLines } from "../files/jsonl.ts";
import {
  answerLength,
  type ChatMessage,
  isPuzzleVocabulary,
  type LoadedModel,
  loadTokenizer,
  type MaskedTransformerConfig,
  openTokenizer,
  readTokenizerFiles,
  specialTokens,
  type Tokenizer,
} from "../models/mod.ts";
import { SafetensorsFile, type TensorInfo } from "../tensor/mod.ts";
import { CalibrationError } from "../errors.ts";
import { calibrationFault as fail, distinctRecords } from "./draw.ts";
import type { OwnSequences } from "./own_samples.ts";

/** Most tokens of all records together that are held in memory. */
const MAX_CALIBRATION_TOKENS = 2 ** 26;

/** Tokens of a record, cut to what the model takes, and from where on they may be masked. */
export interface Sequence {
  readonly tokens: Int32Array;
  readonly start: number;
  /** A token: 0 where its label says that it is not predicted; undefined where labels do not say. */
  readonly labelled?: Uint8Array | undefined;
}

/** Records of a file. */
export interface SequenceRecords {
  /** Each once, however often the file has it. */
  readonly sequences: readonly Sequence[];
  /** All records of the file. */
  readonly count: number;
  /** How many were cut. */
  readonly cut: number;
  readonly warnings: readonly string[];
  /** Whether a token may be masked and predicted: special ones and padding are not. */
  isPredictable(tokens: Int32Array, at: number): boolean;
}

/** A record as a file has it. */
interface Row {
  readonly tokens: ArrayLike<number>;
  readonly answerStart?: number | undefined;
  /** 0 where a token is padding. */
  readonly attention?: ArrayLike<number> | undefined;
  /** 0 where a token behind the start is not predicted. */
  readonly labelled?: Uint8Array | undefined;
}

type Loaded = Exclude<LoadedModel, { readonly kind: "dit" }>;
type Fault = (reason: string, cause?: unknown) => Error;

/** Makes records of rows, by the special tokens of the model and of its tokenizer. */
class RowReader {
  readonly warnings: string[] = [];
  readonly #never: ReadonlySet<number | undefined>;
  readonly #pads: ReadonlySet<number | undefined>;
  readonly files: ReturnType<typeof readTokenizerFiles>;

  constructor(folder: string, readonly config: MaskedTransformerConfig, readonly limit: number) {
    const { maskToken, padToken, bosToken, eosTokens } = config;
    try {
      this.files = readTokenizerFiles(folder);
    } catch (cause) {
      this.warnings.push(`the tokenizer's special tokens are not known: ${(cause as Error).message}`);
    }
    const named = this.files && specialTokens(this.files);
    this.#pads = new Set([padToken, named?.pad]);
    const never = new Set([...named?.all ?? [], ...this.#pads, maskToken, bosToken]);
    // The token that ends an answer is learned as its last one.
    for (const token of eosTokens) never.delete(token);
    this.#never = never;
  }

  /** @throws the fault when a token is outside the vocabulary, or nothing may be predicted */
  sequence(
    { tokens, answerStart = 0, attention, labelled }: Row,
    fault: Fault,
  ): Sequence & { readonly isCut: boolean } {
    const { vocabularySize, maskToken, bosToken, eosTokens } = this.config;
    for (let i = 0; i < tokens.length; i++) {
      const token = tokens[i]!;
      if (!(Number.isInteger(token) && token >= 0 && token < vocabularySize)) {
        throw fault(`must have input_ids from 0 to ${vocabularySize - 1}, got ${token}`);
      }
    }
    let own = new Int32Array(tokens), start = answerStart, predicted = labelled;
    if (attention !== undefined) {
      for (let i = 0; i < answerStart; i++) if (attention[i] === 0) start--;
      own = own.filter((_, i) => attention[i] !== 0);
      predicted = predicted?.filter((_, i) => attention[i] !== 0);
    }
    const isPadding = (token: number) =>
      this.#pads.has(token) && (attention === undefined || !eosTokens.includes(token));
    let begin = Math.max(0, own.findIndex((token) => !isPadding(token)));
    let end = own.findLastIndex((token) => !isPadding(token)) + 1;
    // Where padding is also the beginning or the end, one of a run is that.
    if (begin > 0 && own[begin - 1] === bosToken) begin--;
    if (end > 0 && end < own.length && eosTokens.includes(own[end]!)) end++;
    if (attention === undefined) {
      // Ends in a row are padding too: some tools fill up with them whatever the model's padding is.
      const isSecondEnd = (at: number) => own[at] === own[at - 1] && eosTokens.includes(own[at]!);
      while (end - begin > 1 && isSecondEnd(end - 1)) end--;
      const first = begin;
      while (begin + 1 < end && isSecondEnd(begin + 1)) begin++;
      if (begin > first && own[begin] !== bosToken) begin++;
    }
    own = own.subarray(begin, end);
    start = Math.max(0, start - begin);
    if (start >= this.limit) {
      throw fault(`must leave room for what is predicted in ${this.limit} tokens, got a prompt of ${start}`);
    }
    const cut = own.slice(0, this.limit);
    predicted = predicted?.slice(begin, begin + cut.length);
    if (!cut.some((token) => token !== maskToken && !isPadding(token))) {
      throw fault("must have tokens beside mask and padding, got none");
    }
    while (start < cut.length && !(predicted?.[start] !== 0 && this.isPredictable(cut, start))) start++;
    if (predicted?.includes(0, start) === false) predicted = undefined; // padding alone
    return { tokens: cut, start, labelled: predicted, isCut: own.length > this.limit };
  }

  isPredictable(tokens: Int32Array, at: number): boolean {
    return !this.#never.has(tokens[at]!) && (at > 0 || tokens[at] !== this.config.bosToken);
  }
}

/** Rows of the records of a JSONL file. */
class TextReader {
  #tokenizer: Tokenizer | undefined;

  constructor(readonly loaded: Loaded, readonly files: ReturnType<typeof readTokenizerFiles>) {}

  async row(value: unknown, fault: Fault): Promise<Row> {
    const record = (typeof value === "object" ? value : undefined) as
      | Record<string, unknown>
      | undefined
      | null;
    const { prompt, messages, text, input_ids: ids } = record ?? {};
    const answer = [record?.["answer"], record?.["response"], record?.["completion"]].find(isText);
    try {
      if (isText(prompt) && answer !== undefined) return await this.#answered(prompt, answer, fault);
      if (Array.isArray(messages)) return await this.#chat(messages, fault);
      if (isText(text)) {
        if (text === "") throw fault("must have text, got an empty one");
        return { tokens: (await this.#load()).encode(text, { special: true }) };
      }
    } catch (cause) {
      if (!(cause instanceof RangeError) || "code" in cause) throw cause;
      throw fault(`must be text of the model's vocabulary: ${cause.message}`, cause);
    }
    if (Array.isArray(ids)) return idRow(ids, record!, fault);
    throw fault(
      'must be {"prompt", "answer"}, {"messages"}, {"text"} or {"input_ids", "prompt_length"? or "labels"?, "attention_mask"?}',
    );
  }

  async #load(): Promise<Tokenizer> {
    return this.#tokenizer ??= this.files === undefined
      ? await loadTokenizer(this.loaded.folder)
      : await openTokenizer(this.files);
  }

  /** The special tokens stand where the tokenizer puts them around a text, as in generation. */
  async #answered(prompt: string, answer: string, fault: Fault): Promise<Row> {
    const tokenizer = await this.#load(), begin = tokenizer.encode(prompt), end = tokenizer.encode(answer);
    if (end.length === 0) throw fault("must have an answer, got an empty one");
    const { bosToken, eosToken } = this.loaded.model.config;
    let before: number[] = [], after: number[] = [];
    if (this.loaded.kind === "dream" && isPuzzleVocabulary(tokenizer) && answerLength(prompt) !== undefined) {
      before = bosToken === undefined ? [] : [bosToken];
      after = eosToken === undefined ? [] : [eosToken];
    } else {
      const whole = [...tokenizer.encode(answer, { special: true })];
      const at = whole.findIndex((_, i) => end.every((token, k) => whole[i + k] === token));
      [before, after] = [whole.slice(0, at), whole.slice(at + end.length)];
    }
    const tokens = [...before, ...begin, ...end, ...after];
    return { tokens, answerStart: before.length + begin.length };
  }

  /** The last answer of a conversation is predicted; without one, all that is no special token. */
  async #chat(messages: readonly unknown[], fault: Fault): Promise<Row> {
    const isMessage = (each: unknown): each is ChatMessage => {
      const { role, content } = (each ?? {}) as Partial<ChatMessage>;
      return isText(role) && isText(content);
    };
    if (messages.length === 0 || !messages.every(isMessage)) {
      throw fault('must have messages of {"role", "content"} as text');
    }
    const tokenizer = await this.#load(), text = await tokenizer.chat(messages, false);
    const isAnswered = messages.length > 1 && messages.at(-1)!.role === "assistant";
    const asked = isAnswered ? await tokenizer.chat(messages.slice(0, -1), true) : "";
    if (!text.startsWith(asked)) return { tokens: tokenizer.encode(text) };
    const begin = tokenizer.encode(asked), end = tokenizer.encode(text.slice(asked.length));
    return { tokens: [...begin, ...end], answerStart: begin.length };
  }
}

const isText = (value: unknown): value is string => typeof value === "string";

function idRow(ids: readonly unknown[], record: Record<string, unknown>, fault: Fault): Row {
  const { prompt_length: answerStart, attention_mask: attention } = record;
  if (ids.length === 0) throw fault("must have input_ids, got none");
  if (
    answerStart !== undefined &&
    !(Number.isInteger(answerStart) && Number(answerStart) >= 0 && Number(answerStart) < ids.length)
  ) {
    throw fault(`must have a prompt_length from 0 to ${ids.length - 1}, got ${JSON.stringify(answerStart)}`);
  }
  if (
    attention !== undefined &&
    !(Array.isArray(attention) && attention.length === ids.length &&
      attention.every((each) => each === 0 || each === 1))
  ) {
    throw fault(`must have an attention_mask of ${ids.length} numbers 0 or 1, got others`);
  }
  const labels = Array.isArray(record["labels"]) ? record["labels"] : undefined; // a class, say, is none
  const byLabels = labels === undefined || answerStart !== undefined
    ? {}
    : labelled(labels, ids.length, fault);
  return {
    tokens: ids as number[],
    answerStart: answerStart as number | undefined,
    attention: attention as number[] | undefined,
    ...byLabels,
  };
}

/** Labels of what is not predicted, as transformers has them. */
const NOT_PREDICTED = -100;

/** What labels say: where those begin that are predicted, and which behind them are not. */
function labelled(
  labels: ArrayLike<unknown>,
  count: number,
  fault: Fault,
): Pick<Row, "answerStart" | "labelled"> {
  const own = Uint8Array.from(labels, (label) => label === NOT_PREDICTED ? 0 : 1),
    answerStart = own.indexOf(1);
  if (labels.length === count && answerStart >= 0) {
    return { answerStart, labelled: own.includes(0, answerStart) ? own : undefined };
  }
  throw fault(`must have ${count} labels, one or more other than ${NOT_PREDICTED}, got others`);
}

/** Integer arrays by their dtype. */
const INTEGERS = { I32: Int32Array, I64: BigInt64Array, U8: Uint8Array, BOOL: Uint8Array } as const;

/**
 * Rows of a safetensors file, one at a time: `input_ids: I32 or I64 [records, tokens]`, and if they are there
 * `attention_mask` and `labels` of that shape.
 */
function* tensorRows(file: SafetensorsFile, fault: Fault): Generator<Row> {
  const info = file.tensors.get("input_ids");
  if (info === undefined || (info.dtype !== "I32" && info.dtype !== "I64") || info.shape.length !== 2) {
    throw fault('it must hold "input_ids" as I32 or I64 [records, tokens]');
  }
  const [records, tokens] = info.shape as [number, number];
  const [mask, labels] = ["attention_mask", "labels"].map((name) => {
    const other = file.tensors.get(name);
    if (other === undefined || Object.hasOwn(INTEGERS, other.dtype) && `${other.shape}` === `${info.shape}`) {
      return other;
    }
    throw fault(
      `"${name}" must be I32, I64, U8 or BOOL [${info.shape}], got ${other.dtype} [${other.shape}]`,
    );
  });
  const row = ({ name, dtype }: TensorInfo, i: number) => {
    const values = new INTEGERS[dtype as keyof typeof INTEGERS](tokens);
    file.readInto(name, i * values.byteLength, new Uint8Array(values.buffer));
    return values instanceof BigInt64Array ? Float64Array.from(values, Number) : values;
  };
  for (let i = 0; tokens > 0 && i < records; i++) {
    yield {
      tokens: row(info, i),
      attention: mask && row(mask, i),
      ...labels && labelled(row(labels, i), tokens, (reason) => fault(`record ${i} ${reason}`)),
    };
  }
}

/** What a model wrote itself, as records; sequences of nothing but padding and ends are left out. */
export function writtenRecords(loaded: Loaded, { rows }: OwnSequences, limit: number): SequenceRecords {
  const reader = new RowReader(loaded.folder, loaded.model.config, limit);
  const sequences = rows.flatMap((row): Sequence[] => {
    try {
      const { tokens, start } = reader.sequence(row, (reason) => fail("self", reason));
      return start < tokens.length ? [{ tokens, start }] : [];
    } catch (error) {
      if (error instanceof CalibrationError) return [];
      throw error;
    }
  });
  const distinct = distinctRecords(
    sequences.length,
    (i) => [Int32Array.of(sequences[i]!.start), sequences[i]!.tokens],
  );
  if (distinct.length === 0) {
    throw fail("self", "the model must write tokens beside padding and ends, got none");
  }
  return {
    sequences: distinct.map((i) => sequences[i]!),
    count: sequences.length,
    cut: 0,
    warnings: [],
    isPredictable: (tokens, at) => reader.isPredictable(tokens, at),
  };
}

/**
 * The records of a file for a model.
 *
 * @throws {CalibrationError} when a record is not what the model reads, naming its line
 */
export async function readRecords(loaded: Loaded, path: string, limit: number): Promise<SequenceRecords> {
  const reader = new RowReader(loaded.folder, loaded.model.config, limit);
  const all: Sequence[] = [];
  let count = 0, cut = 0, held = 0;
  const add = (row: Row, fault: Fault) => {
    const { isCut, ...sequence } = reader.sequence(row, fault), { tokens, start } = sequence;
    count++;
    if (start < tokens.length) all.push(sequence);
    if (isCut) cut++;
    held += tokens.length;
    if (held > MAX_CALIBRATION_TOKENS) {
      throw fail(path, `it must hold at most ${MAX_CALIBRATION_TOKENS} tokens, got more: give fewer records`);
    }
  };
  if (path.endsWith(".safetensors")) {
    using file = SafetensorsFile.open(path);
    for (const row of tensorRows(file, (reason) => fail(path, reason))) {
      const record = count;
      add(row, (reason) => fail(path, `record ${record} ${reason}`));
    }
  } else {
    const texts = new TextReader(loaded, reader.files);
    for (const [line, value] of jsonLines(path, (reason, cause) => fail(path, reason, cause))) {
      const fault: Fault = (reason, cause) => fail(path, `line ${line} ${reason}`, cause);
      add(await texts.row(value, fault), fault);
    }
  }
  if (count === 0) throw fail(path, "it must hold records, got none");
  if (all.length === 0) {
    throw fail(path, "it must hold records with tokens to predict, got only special ones");
  }
  const empty = `${
    count - all.length
  } of ${count} records have only special tokens to predict: they are left out`;
  const distinct = distinctRecords(all.length, (i) => {
    const { start, tokens, labelled = new Uint8Array() } = all[i]!;
    return [Int32Array.of(start, labelled.length), tokens, labelled];
  });
  return {
    sequences: distinct.map((i) => all[i]!),
    count: all.length,
    cut,
    warnings: count > all.length ? [...reader.warnings, empty] : reader.warnings,
    isPredictable: (tokens, at) => reader.isPredictable(tokens, at),
  };
}
