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
    ...(layout.yaxis2 && { yaxis2: axis(layout.yaxis2, look) }),
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

const element = (parent, tag, text = "", name = "") => {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  parent.append(made);
  return made;
};
if (typeof SAMPLES !== "undefined") {
  const [pickRun, pickStep, pickColour] = ["run", "step", "colour"].map((name) => document.getElementById(`sample-${name}`));
  const list = document.getElementById("sample-list");
  const tint = (token, values, kind, i, largest) => {
    if (kind === "selected") {
      if (values.selected.includes(i)) token.style.background = "rgba(232, 120, 12, 0.55)";
      return;
    }
    const value = values[kind][i];
    const [red, green, blue] = kind === "covariance" && value < 0 ? [66, 105, 208] : [232, 120, 12];
    token.style.background = `rgba(${red}, ${green}, ${blue}, ${(0.7 * Math.abs(value)) / largest})`;
  };
  const draw = () => {
    list.replaceChildren();
    const kind = pickColour.value;
    const shown = SAMPLES[pickRun.value].samples.filter((row) => row.step === Number(pickStep.value));
    const largest = kind === "selected" ? 1
      : Math.max(1e-9, ...shown.flatMap((row) => (row.tokens ? row.tokens[kind] : [])).map(Math.abs));
    for (const sample of shown) {
      const box = element(list, "div", "", "sample");
      element(box, "p", `score ${sample.score}, reward ${sample.reward}, ${sample.finish_reason}, answer ${sample.answer}`);
      const text = element(box, "div", "", "tokens");
      element(text, "span", sample.prompt, "prompt");
      const values = sample.tokens;
      if (!values) { element(text, "span", sample.response); continue; }
      values.text.forEach((piece, i) => {
        const token = element(text, "span", piece, values.selected.includes(i) ? "picked" : "");
        token.title = `logprob ${values.logprob[i]}, entropy ${values.entropy[i]} nats, covariance ${values.covariance[i]}` +
          (values.selected.includes(i) ? ", selected" : "");
        tint(token, values, kind, i, largest);
      });
    }
  };
  const fillSteps = () => {
    pickStep.replaceChildren();
    for (const step of new Set(SAMPLES[pickRun.value].samples.map((row) => row.step))) element(pickStep, "option", String(step));
    pickStep.selectedIndex = pickStep.options.length - 1;
    draw();
  };
  SAMPLES.forEach((run, i) => { element(pickRun, "option", run.label).value = i; });
  pickRun.addEventListener("change", fillSteps);
  pickStep.addEventListener("change", draw);
  pickColour.addEventListener("change", draw);
  fillSteps();
}
if (typeof RELOAD_SECONDS !== "undefined") {
  // The hash outlives a reload, also where a file's page has no storage.
  const place = Number(new URLSearchParams(location.hash.slice(1)).get("y"));
  if (place) requestAnimationFrame(() => scrollTo(0, place));
  setTimeout(() => {
    history.replaceState(null, "", `#y=${Math.round(scrollY)}`);
    location.reload();
  }, 1000 * RELOAD_SECONDS);
}
