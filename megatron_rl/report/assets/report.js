"use strict";
const theme = () => {
  const css = getComputedStyle(document.documentElement);
  const colour = (name) => css.getPropertyValue(name).trim();
  return { text: colour("--text"), soft: colour("--soft"), grid: colour("--grid"), card: colour("--card"), line: colour("--line") };
};
const axis = (own, look) => ({
  gridcolor: look.grid, linecolor: look.line, zerolinecolor: look.soft, zeroline: false, automargin: true,
  exponentformat: "power",
  tickfont: { size: 11, color: look.soft }, ...own,
  title: { ...(own.title || {}), font: { size: 12, color: look.soft }, standoff: 8 },
});
const styled = (layout) => {
  const look = theme();
  return {
    showlegend: false, margin: { l: 50, r: 12, t: 26, b: 40 }, ...layout,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: look.text },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: look.grid, activecolor: look.soft },
    hoverlabel: { bgcolor: look.card, bordercolor: look.line, font: { color: look.text, size: 12 }, namelength: -1 },
    xaxis: axis(layout.xaxis || {}, look), yaxis: axis(layout.yaxis || {}, look),
  };
};
// Plotly writes computed ranges into the layout it is given; a copy keeps ours for the next theme change.
const fresh = (layout) => styled(JSON.parse(JSON.stringify(layout)));
const options = { responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]] };
for (const [id, figure] of Object.entries(FIGURES)) {
  Plotly.newPlot(id, figure.traces, fresh(figure.layout), options);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const [id, figure] of Object.entries(FIGURES)) Plotly.react(id, figure.traces, fresh(figure.layout), options);
});
for (const chip of document.querySelectorAll(".chip")) {
  chip.addEventListener("click", () => {
    const shown = chip.getAttribute("aria-pressed") !== "true";
    chip.setAttribute("aria-pressed", String(shown));
    const run = Number(chip.dataset.run);
    for (const [id, figure] of Object.entries(FIGURES)) {
      const mine = figure.traces.flatMap((trace, i) => (trace.meta === run ? [i] : []));
      if (mine.length) Plotly.restyle(id, { visible: shown }, mine);
    }
  });
}
