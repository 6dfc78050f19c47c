/**
 * How charts look: two themes over one palette, which readers with any common colour blindness can tell apart
 * (Okabe and Ito, https://jfly.uni-koeln.de/color/; sequential: viridis). Shapes or positions always say the
 * same again.
 */
import type { Spec } from "./_chart.ts";

/** Colour schemes of charts. */
export const THEMES = ["light", "dark"] as const;
/** A colour scheme of charts. */
export type Theme = (typeof THEMES)[number];

/** DejaVu Sans draws the pixels; a browser without it takes Verdana, whose letters are as wide. */
export const FONT = "DejaVu Sans, Verdana, sans-serif";

/** As many as no palette has: a colour that comes again comes with another shape. */
const SHAPES = ["circle", "square", "triangle-up", "cross", "diamond", "triangle-right", "triangle-down"];

interface Colours {
  readonly background: string;
  readonly text: string;
  readonly muted: string;
  readonly grid: string;
  readonly categories: readonly string[];
}

const COLOURS: Readonly<Record<Theme, Colours>> = {
  light: {
    background: "#ffffff",
    text: "#1f2328",
    muted: "#59636e",
    grid: "#e4e7ea",
    categories: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d", "#999999"],
  },
  dark: {
    background: "#16191d",
    text: "#e6e8ea",
    muted: "#9da5ae",
    grid: "#2f353b",
    categories: ["#56b4e9", "#e69f00", "#00b583", "#cc79a7", "#f0e442", "#d55e00", "#bdbdbd", "#7f7f7f"],
  },
};

/** Colours of a theme, for pages that charts stand in. */
export function themeColours(theme: Theme): Colours {
  return COLOURS[theme];
}

/** Vega-Lite's configuration of a theme. */
export function themeConfig(theme: Theme): Spec {
  const { background, text, muted, grid, categories } = COLOURS[theme];
  return {
    background,
    font: FONT,
    padding: 12,
    view: { stroke: null },
    title: {
      anchor: "start",
      color: text,
      fontSize: 14,
      fontWeight: 600,
      offset: 12,
      subtitleColor: muted,
      subtitleFontSize: 11,
      subtitlePadding: 5,
    },
    axis: {
      labelColor: muted,
      titleColor: text,
      titleFontWeight: "normal",
      titleFontSize: 11,
      labelFontSize: 11,
      titlePadding: 8,
      gridColor: grid,
      domainColor: muted,
      tickColor: muted,
      labelLimit: 220,
      labelOverlap: "greedy",
      labelSeparation: 5,
    },
    axisBand: { grid: false, domain: false, ticks: false },
    header: { labelColor: text, titleColor: text, labelFontSize: 12 },
    legend: {
      labelColor: text,
      titleColor: muted,
      titleFontWeight: "normal",
      titleFontSize: 11,
      labelFontSize: 11,
      orient: "bottom",
      direction: "horizontal",
      columns: 4,
      labelLimit: 200,
      symbolSize: 70,
      gradientLength: 260,
      offset: 12,
    },
    range: {
      category: [...categories],
      symbol: [...SHAPES],
      heatmap: { scheme: "viridis" },
      ramp: { scheme: "viridis" },
    },
    point: { filled: true, size: 60, color: categories[0]! },
    line: { strokeWidth: 2, color: categories[0]! },
    bar: { color: categories[0]! },
    rule: { color: categories[0]! },
    area: { color: categories[0]!, opacity: 0.18 },
    rect: { color: categories[0]! },
    text: { color: text, fontSize: 11 },
    style: {
      reference: { color: muted, strokeDash: [5, 4], strokeWidth: 1.5 },
      referenceBand: { color: muted, opacity: 0.14 },
      connector: { color: muted, strokeWidth: 1, opacity: 0.6 },
      note: { color: muted, fontSize: 13 },
      halo: { color: background, stroke: background, strokeWidth: 4, strokeJoin: "round" },
    },
  };
}

/** A chart in a theme. */
export function withTheme(spec: Spec, theme: Theme): Spec {
  return { ...spec, config: themeConfig(theme) };
}
