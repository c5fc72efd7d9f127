"use strict";
const list = document.getElementById("problems"), view = document.getElementById("view");
const show = document.getElementById("show"), find = document.getElementById("find");
const byId = new Map(PROBLEMS.map((problem) => [problem.id, { ...problem, samples: [] }]));
for (const sample of SAMPLES) byId.get(sample.id).samples.push(sample);
const problems = [...byId.values()];
const right = (sample) => sample.score >= 1;
const tests = {
  all: () => true,
  wrong: (problem) => !problem.samples.every(right),
  right: (problem) => problem.samples.some(right),
  mixed: (problem) => problem.samples.some(right) && !problem.samples.every(right),
  cut: (problem) => problem.samples.some((sample) => sample.finish_reason === "length"),
  unboxed: (problem) => problem.samples.some((sample) => !sample.boxed),
  failed: (problem) => problem.samples.some((sample) => sample.error || sample.unfinished),
};
// Only text nodes: what a model writes is never taken for markup.
const element = (tag, text, className) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
};
const open = (problem) => {
  for (const item of list.children) item.setAttribute("aria-current", String(item.dataset.id === problem.id));
  view.replaceChildren(element("h3", problem.id), element("p", problem.problem, "text"), element("p", `Answer: ${problem.answer}`, "gold"));
  for (const sample of problem.samples) {
    const box = element("details");
    box.open = problem.samples.length === 1;
    const state = right(sample) ? "right" : "wrong";
    const facts = [`sample ${sample.sample}`, state, sample.answer === null ? "no answer" : `answers ${sample.answer.slice(0, 60)}`, `${sample.tokens} tokens`];
    if (sample.finish_reason === "length") facts.push("cut");
    if (sample.error || sample.unfinished) facts.push(`grading failed ${sample.unfinished}`);
    box.append(element("summary", facts.join(" · "), state), element("div", sample.response, "text"));
    if (sample.error) box.append(element("pre", sample.error));
    view.append(box);
  }
};
const refresh = () => {
  const words = find.value.toLowerCase();
  const holds = (problem) => !words || [problem.id, problem.problem, problem.answer, ...problem.samples.map((s) => s.response)].some((text) => text.toLowerCase().includes(words));
  const found = problems.filter((problem) => tests[show.value](problem) && holds(problem));
  list.replaceChildren(...found.map((problem) => {
    const item = element("button", `${problem.samples.filter(right).length}/${problem.samples.length}  ${problem.problem.slice(0, 80)}`);
    item.dataset.id = problem.id;
    item.addEventListener("click", () => open(problem));
    return item;
  }));
  document.getElementById("count").textContent = `${found.length} of ${problems.length} problems`;
  if (found.length) open(found[0]);
  else view.replaceChildren();
};
show.addEventListener("change", refresh);
find.addEventListener("change", refresh);
refresh();
