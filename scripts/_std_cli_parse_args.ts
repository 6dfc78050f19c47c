import minimist from "minimist";
export function parseArgs(args: string[], options?: object): Record<string, unknown> { return minimist(args, options as never); }
