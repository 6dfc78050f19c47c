/**
 * Charts as plain functions of a table: each returns a Vega-Lite specification with its data inside, without
 * colours, which render.ts, the report or a notebook puts into a theme. A table without rows gives
 * a chart that says so; another table than the one that is drawn is a TypeError.
 */
export type { ChartOptions, Json, Spec } from "../_chart.ts";
export { type Theme, themeConfig, THEMES, withTheme } from "../_theme.ts";
export { errorByLayer, LAYER_METRICS, type LayerChartOptions } from "./layers.ts";
export {
  errorOverTime,
  TIME_METRICS,
  type TimeChartOptions,
  type TimeParameterOptions,
  timeParameters,
  transitionKl,
} from "./time.ts";
export { accuracyByBits, frontOf, QUALITY_METRICS, type QualityOptions } from "./quality.ts";
export { lossHistory, PHASE_METRICS, type PhaseOptions, phasesAgainstBaseline } from "./phases.ts";
export { codeHistogram } from "./codes.ts";
export { type KernelChartOptions, kernelRoofline, kernelThroughput } from "./kernels.ts";
export { sampleSheet, trajectoryDrift } from "./samples.ts";
