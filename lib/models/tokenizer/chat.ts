/**
 * Chat templates: messages as the text that a model was trained on, by the Jinja template of
 * tokenizer_config.json or chat_template.jinja. A template is a stranger's program: its steps and texts are
 * bounded.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import type { Environment, Interpreter } from "@huggingface/jinja";
import { CheckpointError } from "../../errors.ts";
import { readJsonFile } from "../../files/json.ts";
import { readWhole } from "../../files/whole.ts";
import { shown } from "../model_config.ts";
import { Field } from "./fields.ts";
import { importPackage } from "./packages.ts";
import type { TokenizerFiles } from "./files.ts";

/** Longest template: published ones stay under 30 000 characters. */
const MAX_TEMPLATE_BYTES = 2 ** 18;
/** Parts of a template that are evaluated, loops counted each time. */
const MAX_STEPS = 200_000;
/** Parts inside each other, macros that call themselves among them. */
const MAX_DEPTH = 500;
/** Characters of one text that a template makes, numbers in it, and characters of all texts on the way. */
const MAX_CHAT_LENGTH = 2 ** 20, MAX_WORK = 2 ** 26;
/** Items of a range. */
const MAX_ITEMS = 100_000;

/** A message of a conversation. */
export interface ChatMessage {
  readonly role: string;
  readonly content: string;
}

/** The template of a folder; undefined where it has none. */
export function templateOf({ folder, config }: TokenizerFiles): Field | undefined {
  const file = join(folder, "chat_template.jinja"), old = join(folder, "chat_template.json");
  if (existsSync(file)) {
    return new Field(file, "", new TextDecoder().decode(readWhole(file, MAX_TEMPLATE_BYTES)));
  }
  let field = config.at("chat_template");
  if (field.isAbsent && existsSync(old)) field = new Field(old, "", readJsonFile(old)).at("chat_template");
  if (field.isAbsent) return undefined;
  if (!Array.isArray(field.value)) return typeof field.value === "object" ? field.at("default") : field;
  const all = field.list();
  const chosen = all.find((each) => each.at("name").value === "default");
  if (chosen === undefined) throw field.fault('a list with a template named "default"');
  return chosen.at("template");
}

/**
 * The text of messages, with what begins the assistant's answer if that is wanted.
 *
 * @throws {CheckpointError} when there is no template, it is broken, refuses the messages, or takes too long
 */
export async function chatText(
  files: TokenizerFiles,
  messages: readonly ChatMessage[],
  isAnswerNext: boolean,
): Promise<string> {
  const field = templateOf(files), path = field?.path ?? files.folder;
  const fault = (reason: string, cause?: unknown) =>
    new CheckpointError(`Cannot write a chat with ${shown(path)}: ${reason}`, { path, cause });
  if (field === undefined) {
    throw fault(
      "it must have a chat template, chat_template of tokenizer_config.json or the file chat_template.jinja, got none",
    );
  }
  const template = field.text();
  if (template.length > MAX_TEMPLATE_BYTES) {
    throw field.fault(`a template of at most ${MAX_TEMPLATE_BYTES} characters`, `${template.length}`);
  }
  const jinja = await importPackage("jinja");
  try {
    const { parsed } = new jinja.Template(template), environment = new jinja.Environment();
    setGlobals(environment, (format) => new jinja.Template("{{ strftime_now(f) }}").render({ f: format }));
    for (const [name, text] of files.named) if (/^\w+$/.test(name)) environment.set(name, text);
    environment.set("messages", messages.map(({ role, content }) => ({ role, content })));
    environment.set("add_generation_prompt", isAnswerNext);
    for (const name of ["tools", "documents"]) environment.set(name, null); // there, as in transformers, and none
    return (bounded(jinja.Interpreter, environment).run(parsed) as { value: string }).value;
  } catch (cause) {
    throw fault(
      `its chat template fails: ${shown(cause instanceof Error ? cause.message : String(cause))}`,
      cause,
    );
  }
}

/** Functions and values that every template may use. */
function setGlobals(environment: Environment, now: (format: string) => string): void {
  for (const [name, value] of [["true", true], ["false", false], ["none", null]] as const) {
    environment.set(name, value);
    environment.set(name[0]!.toUpperCase() + name.slice(1), value);
  }
  environment.set("raise_exception", (reason: unknown) => {
    throw new Error(String(reason));
  });
  environment.set("strftime_now", now);
  environment.set("range", (...given: number[]) => {
    const [start, stop, step = 1] = given.length === 1 ? [0, given[0]!] : given as [number, number];
    const count = Math.max(0, Math.ceil((stop - start) / step));
    if (!(count <= MAX_ITEMS)) throw new RangeError(`a range may have ${MAX_ITEMS} items, got ${count}`);
    return Array.from({ length: count }, (_, i) => start + i * step);
  });
}

type Node = NonNullable<Parameters<Interpreter["evaluate"]>[0]>;
type Value = ReturnType<Interpreter["evaluate"]>;

/** Parts that write nothing by themselves, or what they contain. */
const STATEMENTS = "Set If For Macro Comment CallStatement FilterStatement Break Continue Program".split(" ");

/** What a value is written as, in Python's spelling; lists are not written as Python does, but by tojson. */
function written({ type }: Node, value: Value): string {
  const isStatement = STATEMENTS.includes(type), shown = value as { type: string; toString(): string };
  if (shown.type === "UndefinedValue" || (shown.type === "NullValue" && isStatement)) return "";
  if (shown.type === "NullValue") return "None";
  if (shown.type === "BooleanValue") return String(value.value) === "true" ? "True" : "False";
  if (["ArrayValue", "TupleValue", "ObjectValue"].includes(shown.type)) {
    throw new TypeError("it may write a list or an object with tojson alone");
  }
  return shown.toString();
}

/**
 * Makes an interpreter evaluate blocks as Jinja does where the library does not: what a loop wrote before
 * `break` or `continue` stays, and what it sets is gone in the next round.
 *
 * @returns a wrapper for every evaluation
 */
function withJinjasBlocks(
  interpreter: Interpreter,
  textOf: (text: string, environment: Environment) => Value,
): (node: Node | undefined, run: () => Value) => Value {
  const loops: { readonly body: unknown; end: unknown }[] = [];
  const jumps = new Map<unknown, { readonly isBreak: boolean; text: string }>();
  const block = (parts: Node[], environment: Environment): Value => {
    const loop = loops.at(-1), isBody = loop !== undefined && loop.body === parts;
    if (isBody && loop.end !== undefined) throw loop.end;
    const Scope = environment.constructor as typeof Environment;
    const own = isBody ? new Scope(environment) : environment;
    let text = "";
    for (const part of parts) {
      try {
        text += written(part, interpreter.evaluate(part, own));
      } catch (error) {
        const jump = jumps.get(error);
        if (jump === undefined) throw error;
        text += jump.text;
        jump.text = isBody ? "" : text;
        if (!isBody) throw error;
        if (jump.isBreak) loop.end = error;
        break;
      }
    }
    return textOf(text, environment);
  };
  Object.assign(interpreter, { evaluateBlock: block });
  return (node, run) => {
    const { type, body } = (node ?? {}) as { readonly type?: string; readonly body?: unknown };
    if (type === "For") loops.push({ body, end: undefined });
    try {
      return run();
    } catch (error) {
      if (type === "Break" || type === "Continue") jumps.set(error, { isBreak: type === "Break", text: "" });
      throw error;
    } finally {
      if (type === "For") loops.pop();
    }
  };
}

/** An interpreter that gives up where a template takes too long or makes too much. */
function bounded(Base: typeof Interpreter, environment: Environment): Interpreter {
  let steps = 0, work = 0, depth = 0;
  const limit = (what: string, most: number, got: number) => {
    if (got > most) throw new RangeError(`it may have ${most} ${what}, got more`);
  };
  class Bounded extends Base {
    override evaluate(...args: Parameters<Interpreter["evaluate"]>): ReturnType<Interpreter["evaluate"]> {
      limit("parts inside each other", MAX_DEPTH, ++depth);
      let result: ReturnType<Interpreter["evaluate"]>;
      try {
        result = wrapped(args[0], () => super.evaluate(...args));
      } finally {
        depth--;
      }
      const { value } = result as { value: unknown };
      if (typeof value === "number" && !Number.isFinite(value)) throw new TypeError("a result is no number");
      const size = typeof value === "string"
        ? value.length
        : Math.abs(Number(typeof value === "number" && value));
      limit("characters, and numbers up to that", MAX_CHAT_LENGTH, size);
      if (typeof value === "string") limit("characters on the way", MAX_WORK, work += size);
      // A loop takes as many steps as its list has items.
      limit("steps", MAX_STEPS, steps += Array.isArray(value) ? value.length + 1 : 1);
      return result;
    }
  }
  const interpreter = new Bounded(environment);
  const wrapped = withJinjasBlocks(
    interpreter,
    (text, scope) =>
      Base.prototype.evaluate.call(interpreter, { type: "StringLiteral", value: text } as Node, scope),
  );
  return interpreter;
}
