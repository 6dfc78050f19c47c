/** Time: the denoising axis, groups of it, and the parameters that the runtime selects by them. */
export { maskRatioAxis, MAX_TIME_BINS, type TimeAxis, timestepAxis } from "./axis.ts";
export {
  adaptiveTimeGroups,
  type BinStatistics,
  equalTimeGroups,
  MAX_OBSERVED_BINS,
  MAX_TIME_GROUPS,
  type TimeGroup,
  TimeGroups,
} from "./groups.ts";
