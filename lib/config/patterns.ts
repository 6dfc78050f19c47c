/**
 * Name patterns whose matching ends soon: JavaScript's regular expressions with flag `u`, without back
 * references. A backtracking engine may try for years what a file from a stranger asks for.
 */

/** A compiled pattern. */
export interface NamePattern {
  /** Whether it is found anywhere in a name. */
  test(name: string): boolean;
}

/** Most repetitions that a pattern may count, as in `a{2,1000}`. */
const MAX_COUNT = 1000;
/** Characters that a part of a pattern remembers. */
const MAX_KNOWN = 256;
/** Steps that a backtracking engine may take for a name; beyond them sets of places are matched. */
const MAX_STEPS = 1e6;

/** A set of places in a name: bit `i` is the place in front of character `i`. */
type Places = bigint;

/** A name while it is matched: its characters and every place in it. */
interface Name {
  readonly characters: readonly string[];
  readonly all: Places;
}

/** A part of a pattern. */
interface Part {
  /** The places behind it where it begins at some of `from`. */
  readonly match: (name: Name, from: Places) => Places;
  /** Ways to match it at one place, for an engine that tries all: at most `ways · length ^ power`. */
  readonly ways: number;
  readonly power: number;
}

/** Bits of the places for which a condition holds. */
function placesWhere({ characters }: Name, holds: (i: number) => boolean): Places {
  let bits = "0b";
  for (let i = characters.length; i >= 0; i--) bits += holds(i) ? "1" : "0";
  return BigInt(bits);
}

/** Places that depend on the name alone, found once a name. */
function remembered(of: (name: Name) => Places): (name: Name) => Places {
  let last: Name | undefined, places = 0n;
  return (name) => {
    if (name !== last) [last, places] = [name, of(name)];
    return places;
  };
}

const sequence = (parts: readonly Part[]): Part => ({
  match: (name, from) => parts.reduce((at, part) => at === 0n ? at : part.match(name, at), from),
  ways: parts.reduce((product, { ways }) => product * ways, 1),
  power: parts.reduce((sum, { power }) => sum + power, 0),
});

const choice = (parts: readonly Part[]): Part => ({
  match: (name, from) => parts.reduce((reached, part) => reached | part.match(name, from), 0n),
  ways: parts.reduce((sum, { ways }) => sum + ways, 0),
  power: Math.max(...parts.map(({ power }) => power)),
});

function repeat(part: Part, least: number, most: number): Part {
  const isOptional = least === 0 && most === 1, isPlain = part.ways === 1 && part.power === 0;
  return {
    match(name, from) {
      for (let i = 0; i < least; i++) from = part.match(name, from);
      let reached = from;
      for (let i = least; i < most && from !== 0n; i++) {
        from = part.match(name, from) & ~reached;
        reached |= from;
      }
      return reached;
    },
    ways: isOptional ? 1 + part.ways : isPlain ? 1 : Infinity,
    power: part.power + (isOptional ? 0 : 1),
  };
}

/** One character that `source` stands for. */
function character(source: string): Part {
  const one = new RegExp(`^(?:${source})$`, "u"), known = new Map<string, boolean>();
  const isOne = (text = "") => {
    const answer = known.get(text) ?? one.test(text);
    if (known.size < MAX_KNOWN) known.set(text, answer);
    return answer;
  };
  const places = remembered((name) => placesWhere(name, (i) => isOne(name.characters[i])));
  return { match: (name, from) => (from & places(name)) << 1n, ways: 1, power: 0 };
}

const isWord = (text = "") => /^\w$/.test(text);

/** Conditions on the place in front of character `i`. */
const CONDITIONS: Readonly<Record<string, (characters: readonly string[], i: number) => boolean>> = {
  "^": (_, i) => i === 0,
  "$": (characters, i) => i === characters.length,
  "\\b": (characters, i) => isWord(characters[i - 1]) !== isWord(characters[i]),
  "\\B": (characters, i) => isWord(characters[i - 1]) === isWord(characters[i]),
};

function condition(holds: (name: Name) => Places, { ways, power }: Pick<Part, "ways" | "power">): Part {
  const places = remembered(holds);
  return { match: (name, from) => from & places(name), ways, power };
}

/** `(?=…)`, `(?!…)`, `(?<=…)` or `(?<!…)` */
function lookAround(part: Part, isBehind: boolean, isWanted: boolean): Part {
  return condition((name) => {
    const found = isBehind
      ? part.match(name, name.all)
      : placesWhere(name, (i) => part.match(name, 1n << BigInt(i)) !== 0n);
    return isWanted ? found : name.all & ~found;
  }, part);
}

const TOKEN =
  /\\(?:[1-9]\d*|k<[^>]*>|[pPu]\{[^}]*\}|u[\da-fA-F]{4}(?:\\u[dD][c-fC-F][\da-fA-F]{2})?|x[\da-fA-F]{2}|c[a-zA-Z]|.)|\[(?:\\.|[^\]\\])*\]|\((?:\?(?:[a-z-]*:|[=!]|<[=!]|<[^>]*>))?|[*+?]\??|\{\d+(?:,\d*)?\}\??|./gsu;

/** The part that tokens of a valid pattern stand for, up to its closing parenthesis. */
function parse(tokens: Iterator<string>): Part {
  const choices: Part[] = [];
  let parts: Part[] = [];
  for (let next = tokens.next(); next.done !== true && next.value !== ")"; next = tokens.next()) {
    const token = next.value, holds = CONDITIONS[token];
    const [, least, comma, most] = /^\{(\d+)(,?)(\d*)/.exec(token) ?? [];
    if (token === "|") {
      choices.push(sequence(parts));
      parts = [];
    } else if (least !== undefined) {
      const to = comma === "" ? Number(least) : most === "" ? Infinity : Number(most);
      if (Number(least) > MAX_COUNT || (to > MAX_COUNT && to < Infinity)) {
        throw new SyntaxError(`at most ${MAX_COUNT} repetitions`);
      }
      parts.push(repeat(parts.pop()!, Number(least), to));
    } else if (/^[*+?]/.test(token)) {
      parts.push(repeat(parts.pop()!, token[0] === "+" ? 1 : 0, token[0] === "?" ? 1 : Infinity));
    } else if (/^\(\?<?[=!]/.test(token)) {
      parts.push(lookAround(parse(tokens), token.includes("<"), token.endsWith("=")));
    } else if (/^\(\?[a-z-]/.test(token)) throw new SyntaxError("no modifiers");
    else if (token[0] === "(") parts.push(parse(tokens));
    else if (holds !== undefined) {
      parts.push(condition((name) => placesWhere(name, (i) => holds(name.characters, i)), sequence([])));
    } else if (/^\\[1-9k]/.test(token)) throw new SyntaxError("no back references");
    else parts.push(character(token));
  }
  return choice([...choices, sequence(parts)]);
}

/**
 * Compiles a name pattern: a JavaScript regular expression with flag `u`, found anywhere in a tensor's name.
 *
 * @throws {SyntaxError} if it does not compile, refers back, or counts beyond a limit
 */
export function compilePattern(pattern: string): NamePattern {
  const found = compiled.get(pattern) ?? compile(pattern);
  if (compiled.size >= MAX_COMPILED) compiled.clear();
  compiled.set(pattern, found);
  return found;
}

/** Patterns compiled before: the same ones are asked for with every tensor. */
const compiled = new Map<string, NamePattern>(), MAX_COMPILED = 10_000;

function compile(pattern: string): NamePattern {
  const native = new RegExp(pattern, "u");
  const { match, ways, power } = parse((pattern.match(TOKEN) ?? []).values());
  return {
    test(text) {
      if (ways * text.length ** (1 + power) <= MAX_STEPS) return native.test(text);
      const characters = [...text];
      const name = { characters, all: (1n << BigInt(characters.length + 1)) - 1n };
      return match(name, name.all) !== 0n;
    },
  };
}
